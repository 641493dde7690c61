"""The published experiments: which they are, what they need, and a rehearsal of them."""
