"""What a role's matrix reads, by a hook of the tests' own, and copies that are compressed."""

import copy

import numpy as np
import torch

from tensorllm.calibration.hooks import module_of
from tensorllm.compression.engine import compress
from tensorllm.models import RoleMatrices, parameters_of


def inputs_of(model, layer: int, role: str, calibration) -> np.ndarray:
    """(N, X): what the role's matrix reads on the text, without padding, by a hook of our own."""
    roles = RoleMatrices(model.config, parameters_of(model))
    seen = []
    module = module_of(model, roles, layer, role)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for sequence in calibration.sequences:
            model(torch.tensor([sequence]))
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double().numpy()


def made(strategy, model, calibration=None):
    """A copy of the model, compressed."""
    smaller = copy.deepcopy(model)
    compress(smaller, strategy, calibration=calibration)
    return smaller
