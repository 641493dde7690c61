"""Rank search: which layers and ranks make a model best, found in minutes."""
