"""Compress, evaluate, search: where the parts are put together."""
