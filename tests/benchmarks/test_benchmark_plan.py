"""The plan on paper counts what the code does: sizes, memory, products; power laws are found."""

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tensorllm.compression.dry_run import dry_run
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import SharedTucker4D

LLAMA = LlamaConfig(
    hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128,
    num_key_value_heads=8, vocab_size=128_256, architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)  # fmt: skip


def write_sparse(folder: Path) -> None:
    """The model's folder with all its tensors, none of which takes room on the disk."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16).state_dict()
    end, header = 0, {}
    for name, tensor in shapes.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    LLAMA.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_the_plan_is_that_of_a_dry_run(tmp_path: Path):
    import plan

    try:
        write_sparse(tmp_path)
    except OSError as error:
        pytest.skip(f"this disk has no sparse file of 812 GB: {error}")
    ranks = plan.ranks_at("mild", *plan.STACK[:3])
    dry = dry_run(
        FolderTask(source=tmp_path, target=tmp_path / "out", compressor=SharedTucker4D(ranks=ranks))
    )
    assert dry.parameters_before == plan.PARAMETERS
    assert dry.sites[0].shape == plan.STACK
    foreseen = next(task for task in plan.tasks() if task.name == "compress, mild ranks")
    assert foreseen.memory == dry.peak_bytes
    assert abs(foreseen.disk - dry.bytes_before) < 1e-5 * foreseen.disk  # but for the header


def test_necessary_products_of_a_tiny_decomposition_by_hand():
    from support.counts import eigen_sizes, necessary_multiply_adds

    # D 6, K 3, M 2, H 1; all matrices kept, K cut to 2, D to 4: Gram of K and projection, of D and
    # projection; the sweep repeats both behind a projection on the other mode.
    sizes, ranks = (6, 3, 2, 1), (4, 2, 2)
    head = 6 * 2 * (9 / 2 + 2 * 3)
    width = 16 / 2 * 6 + 2 * 6 * 4 * 4  # the smaller side is K·M = 4
    sweep = 6 * 3 * 2 * 4 + 4 * 2 * 9 / 2 + 6 * 3 * 2 * 2 + width
    assert necessary_multiply_adds(sizes, ranks, 0) == head + width
    assert necessary_multiply_adds(sizes, ranks, 2) == head + width + 2 * sweep
    assert eigen_sizes(sizes, ranks, 1) == [3, 4, 3, 4]
    assert eigen_sizes(sizes, (4, 2, 1), 0) == [3, 2, 2]


def test_a_power_law_is_found_with_its_interval():
    from support.curves import fit

    exact = fit([(x, 3.0 * x**2.5) for x in (1, 2, 4, 8)])
    assert exact["exponent"] == pytest.approx(2.5)
    assert exact["factor"] == pytest.approx(3.0)
    assert exact["plus_minus"] == pytest.approx(0.0, abs=1e-6)
    noisy = fit([(1, 1.1), (2, 1.9), (4, 4.4), (8, 7.6)])  # of seconds = size
    assert abs(noisy["exponent"] - 1) < noisy["plus_minus"] < 0.5
    assert fit([(1, 1), (2, 2)])["plus_minus"] is None


def test_machines_are_faster_from_left_to_right():
    import plan

    machines = plan.machines()
    for task in plan.tasks():
        totals = [sum(task.steps(machine).values()) for machine in machines]
        assert totals == sorted(totals, reverse=True), task.name
        assert all(min(task.steps(machine).values()) > 0 for machine in machines)
