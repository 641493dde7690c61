"""The request of each command: its fields are the command's options, defined once."""
