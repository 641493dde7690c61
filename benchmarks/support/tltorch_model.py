"""The same model with tltorch's factorised linears in all attention: used by `runtime.py`.

tensorly-torch is needed by this benchmark alone: pip install tensorly-torch.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.attention_block import gptj
from torch import nn
from transformers import GPTJForCausalLM

from tensorllm.compression.publish import peak_resident_bytes
from tensorllm.runtime.measure import measure

IMPLEMENTATIONS = ("factorized", "reconstructed")
PROMPT, NEW = 512, 32


def installed() -> bool:
    try:
        import tltorch  # noqa: F401
    except ImportError:
        return False
    return True


def tltorch_model(parameters: int, implementation: str) -> Any:
    """A 12-layer GPT-J of width 1024; nothing is ever allocated for its dense attention.

    Args:
        parameters: of all attention, to be met as closely as tltorch's ranks allow.
        implementation: tltorch's: contract with the factors, or rebuild each matrix as it is used.
    """
    import tltorch

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = GPTJForCausalLM(gptj(1024, 12, 16))
    share = parameters / (12 * 4 * 1024**2)
    for layer in model.transformer.h:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = tltorch.FactorizedLinear(
                (32, 32), (32, 32), bias=False, factorization="tucker", rank=share,
                implementation=implementation,
            )  # fmt: skip
            setattr(layer.attn, name, linear)
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(t.is_meta for t in own):
            module.to_empty(device="cpu", recurse=False)
            _fill(module)
    return model.eval()


def attention_parameters(model: Any) -> int:
    return sum(p.numel() for layer in model.transformer.h for p in layer.attn.parameters())


def peak_of(parameters: int, implementation: str) -> int:
    """Peak resident bytes of a fresh process that makes this model and runs it once."""
    line = f"from support import tltorch_model as m; m.print_peak({parameters}, {implementation!r})"
    run = subprocess.run(
        [sys.executable, "-c", line],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout.splitlines()[-1])


def print_peak(parameters: int, implementation: str) -> None:
    measure({"model": tltorch_model(parameters, implementation)}, PROMPT, NEW, 1)
    print(peak_resident_bytes())


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Small random weights, and tables of positions too: only times count."""
    for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if t.is_floating_point():
            t.normal_(0, 0.02)
