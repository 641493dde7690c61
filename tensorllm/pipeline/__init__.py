"""Import paths of 0.1 that scripts use. Each warns, and goes with 0.3."""
