"""A model is evaluated without dropout and given back as it was, module by module."""

import pytest
from torch import nn

from tensorllm.calibration.statistics import frozen
from tensorllm.models.evaluating import evaluating


def model() -> nn.Sequential:
    """In training, but for one part of it that is held still."""
    whole = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Dropout()).train()
    whole[0].eval().requires_grad_(False)
    return whole


@pytest.mark.parametrize("block", [evaluating, frozen])
def test_each_module_gets_its_mode_back(block):
    whole = model()
    modes = [module.training for module in whole.modules()]
    wanted = [p.requires_grad for p in whole.parameters()]
    with block(whole):
        assert not any(module.training for module in whole.modules())
    assert [module.training for module in whole.modules()] == modes
    assert [p.requires_grad for p in whole.parameters()] == wanted
