"""Checkpoints on disk: reading, writing dense and factored folders, loading factored ones."""
