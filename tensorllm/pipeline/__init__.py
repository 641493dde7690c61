"""Deprecated import paths of 0.1. Each warns, and will be removed in 0.3."""
