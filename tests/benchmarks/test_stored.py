"""The benchmarks' count of what a compressed model stores."""

import pytest
import torch
from support.stored import stored_numbers
from transformers import LlamaConfig, LlamaForCausalLM

import tensorllm as tl
from tensorllm.calibration.layers import InMemory


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_matrices_that_were_left_whole_count_too(layers):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=2, vocab_size=50,
        )
    )  # fmt: skip
    spec = InMemory(model).roles.spec
    report = tl.compress(model, tl.LaserSVD(rank=3, matrices=("out",)), layers=layers)
    each = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    assert stored_numbers(spec, report) == 2 * each - len(layers) * (32 * 64 - 3 * (32 + 64))
    assert stored_numbers(spec, report, ("q", "o")) == 2 * 2 * 32 * 32 - len(layers) * (
        32 * 64 - 3 * (32 + 64)
    )
