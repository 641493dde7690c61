"""The published experiments: what they are, what they need, and a rehearsal of them."""
