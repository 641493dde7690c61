"""Checkpoints on disk: read them, write dense and factored folders, load factored ones."""
