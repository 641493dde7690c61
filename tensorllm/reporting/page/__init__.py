"""The page of `tensorllm report`: reads, groups and draws runs, and writes one HTML file."""
