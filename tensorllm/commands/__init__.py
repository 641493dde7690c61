"""The commands: compress, evaluate, search and others, assembled from the other packages."""
