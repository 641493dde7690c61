"""Compress models, in memory and from folder to folder, and report every ratio by its name."""
