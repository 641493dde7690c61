"""The page of `tensorllm report`: runs read, grouped, drawn and put into one HTML file."""
