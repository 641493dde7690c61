"""How answers are scored: the protocol, the fast scorers for causal and masked models,
statistics.
"""
