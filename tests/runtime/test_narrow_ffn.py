"""An FFN that keeps some channels of all its matrices runs at their width."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tensorllm.compressors.calibrated.channels import narrowed_site
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.runtime import install
from tensorllm.runtime.kept_rows import KeptRowsSite
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.weights import write_dense

KEPT = 7


def normed() -> Any:
    """A model with a norm between the matrices of its FFNs."""
    config = AutoConfig.for_model(
        "bitnet", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=101,
        num_key_value_heads=2, num_hidden_layers=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A model whose FFNs keep `KEPT` channels: dense, with zeros for the others, and narrow."""
    dense: Any = normed() if name == "bitnet" else tiny_model(name)
    narrow = copy.deepcopy(dense)
    roles = RoleMatrices(dense.config, parameters_of(dense))
    draws = torch.Generator().manual_seed(2)
    sites = []
    for layer in range(roles.layers):
        geometry = roles.spec.geometry(layer)
        site = narrowed_site(layer, geometry.roles)
        if site is None:
            pytest.skip("no FFN of its own: a mixture of experts")
        rows_R = torch.randperm(geometry.F, generator=draws)[:KEPT]
        every = torch.cat([rows_R + n * geometry.F for n in range(len(site.roles))])
        values = torch.randn(len(every), geometry.D, generator=draws)
        factors = KeptRows.of(every, values, len(site.roles) * geometry.F)
        with torch.no_grad():
            write_dense(site, factors, roles, parameters_of(dense))
        sites.append((site, factors))
    install(narrow, sites)
    return dense, narrow


@pytest.mark.parametrize("name", [*TINY, "bitnet"])
@torch.no_grad()
def test_a_narrow_ffn_gives_what_the_dense_one_does(name: str) -> None:
    dense, narrow = pair(name)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    for tokens in (ids, ids[:1, :1]):  # also the single token that is decoded
        want = dense(tokens).logits
        assert (narrow(tokens).logits - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("name", "width"), [("llama", KEPT), ("gpt2", None), ("bitnet", None)])
@torch.no_grad()
def test_what_is_between_its_matrices_is_narrow_unless_it_has_parameters(
    name: str, width: int | None
) -> None:
    _, narrow = pair(name)
    seen: list[int] = []

    def see(module: nn.Module, given: tuple[Any, ...], found: Tensor) -> None:
        seen.append(found.shape[-1])

    for path, module in narrow.named_modules():
        if path.rpartition(".")[2] in ("act_fn", "act"):
            module.register_forward_hook(see)
    narrow(torch.tensor([[5, 6, 7]]))
    full = next(m.sizes[0] for m in narrow.modules() if isinstance(m, KeptRowsSite))
    assert set(seen) == {width or full}
