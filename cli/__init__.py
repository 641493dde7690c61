"""The command line: a few lines per command; the work is done in `tensorllm.commands`."""
