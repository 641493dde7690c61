"""How answers are scored: protocols, fast scorers for causal and masked models, statistics."""
