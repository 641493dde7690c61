"""Recipes as data, installed as `tensorllm.configs` and read through `importlib.resources`."""
