"""Rank search: find the layers and ranks that give the best compressed model, within minutes."""
