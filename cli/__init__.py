"""The command line: a few lines per command; `tensorllm.commands` does the work."""
