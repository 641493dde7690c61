"""Checkpoints on disk: reading local ones, writing dense and factored ones, loading factored ones."""
