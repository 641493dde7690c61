"""Dense layers of a factored model, for a single token in bfloat16."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

import tensorllm as tl
from tensorllm.runtime import one_token
from tensorllm.runtime.one_token import OneTokenLinear, linear_of


def layer(bias: bool, dtype: torch.dtype = torch.bfloat16) -> OneTokenLinear:
    torch.manual_seed(0)
    made = nn.Linear(48, 80, bias=bias, dtype=dtype)
    one_token.become_one_token(made)
    assert type(made) is OneTokenLinear
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48)])
@torch.no_grad()
def test_a_token_is_multiplied_as_in_float64(bias: bool, shape: tuple[int, ...]) -> None:
    module = layer(bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = module(x)
    want = x.double() @ module.weight.double().mT + (module.bias.double() if bias else 0)
    assert got.shape == (*shape[:-1], 80)
    assert got.dtype is torch.bfloat16
    assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tokens", "grad", "wanted"),
    [
        (torch.bfloat16, 1, False, True),
        (torch.bfloat16, 2, False, False),
        (torch.bfloat16, 1, True, False),
        (torch.float16, 1, False, False),  # slower there
        (torch.float32, 1, False, False),  # as fast as a linear layer
    ],
)
def test_only_one_token_in_bfloat16(
    dtype: torch.dtype, tokens: int, grad: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = layer(True, dtype), []
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda *given: asked.append(given) or mv(*given))
    x = torch.randn(1, tokens, 48, dtype=dtype, requires_grad=grad)
    y = module(x)
    assert bool(asked) == wanted
    assert y.shape == (1, tokens, 80)
    if grad:
        y.sum().backward()
        assert x.grad is not None
        assert module.weight.grad is not None


def test_weights_of_other_libraries_are_left_to_them() -> None:
    class Theirs(torch.Tensor):
        pass

    w = torch.randn(80, 48, dtype=torch.bfloat16).as_subclass(Theirs)
    x = torch.randn(1, 48, dtype=torch.bfloat16)
    assert isinstance(linear_of(x, w), Theirs)
    assert torch.equal(linear_of(x, w).as_subclass(torch.Tensor), nn.functional.linear(x, w))


@pytest.mark.parametrize(
    "strategy", [tl.SharedTucker4D(ranks=(8, 4, 4)), tl.LaserSVD(rho=0.4, matrices=("q", "in"))]
)
@torch.no_grad()
def test_all_linear_layers_of_a_factored_model_run_so(strategy: Any) -> None:
    """And still are what they were: the same numbers, and linear layers for every library."""
    model: Any = tiny_model("llama")
    tl.compress(model, strategy, layers=[0])
    dense = copy.deepcopy(model)
    tl.factorize(model)
    rest = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert rest
    assert not [m for m in rest if type(m) is nn.Linear]
    assert not [m for m in dense.modules() if type(m) is OneTokenLinear]
    ids = torch.tensor([[5]])
    got, want = model.bfloat16()(ids).logits.float(), dense(ids).logits
    assert (got - want).abs().max() <= 5e-2 * want.abs().max()
    assert torch.equal(copy.deepcopy(model)(ids).logits.float(), got)
