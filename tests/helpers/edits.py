"""Edits that stand for compressed layers."""


class Edit:
    """A matrix of one layer scaled, for a while."""

    def __init__(self, roles, weights, layer, role, scale):
        self.weight, self.scale = weights[roles.name(layer, role)], scale

    def __enter__(self):
        self.before = self.weight.clone()
        self.weight.mul_(self.scale)

    def __exit__(self, *exception):
        self.weight.copy_(self.before)
