"""A fit in several processes of torch.distributed is the fit in one."""

import os
import socket
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from calibration_text import long_text, text
from repository import HELPERS
from tiny_models import tiny_model

from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.compressors import ActivationHybrid
from tensorllm.errors import UserError

WORK = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import calibration_text
from tiny_models import tiny_model
from tensorllm.calibration import fit
from tensorllm.calibration.ranks import joined
from tensorllm.compressors import ActivationHybrid
from tensorllm.errors import Incomplete
import tensorllm.calibration.context as context

dies = {dies!r}
replace = context.Context.replace
def dying(self, site, factors, output_map=None):
    if self.layer == 1 and dies == os.environ["RANK"]:
        os._exit(9)
    replace(self, site, factors, output_map)
context.Context.replace = dying
try:
    with joined():
        wanted = ActivationHybrid(target_ratio=2, refit_epochs={epochs})
        found = fit(wanted, tiny_model("llama"), calibration_text.{text}())
        dense = {{site.name: found.factors(site).dense() for site in found.sites}}
        torch.save(dense, {out!r} + os.environ["RANK"])
except Incomplete as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from calibration_text import text
import tensorllm.commands.compress as command
from tensorllm.requests.compress import CompressRequest
from tensorllm_cli.app import main

command._text = lambda *a: text()
given = ["--target-ratio", "2", "--calibration", {tests!r}]
sys.argv = ["tensorllm", "compress", *sys.argv[1:], *given]
main()
"""


def started(
    size: int, out: Path, dies: str = "", epochs: int = 1, text: str = "text"
) -> list[forked.Popen]:
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = WORK.format(tests=str(HELPERS), out=str(out), dies=dies, epochs=epochs, text=text)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked.Popen(
            ["-c", code],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]


@pytest.mark.parametrize(
    ("size", "epochs", "tolerance", "read"),
    [
        (2, 0, 1e-4, text),
        (2, 1, 1e-3, text),
        (2, 0, 1e-4, long_text),  # long enough that sizes are tried on a part of it
        pytest.param(3, 1, 1e-3, text, marks=pytest.mark.slow),
    ],
)
def test_several_processes_find_what_one_finds(size, epochs, tolerance, read, tmp_path):
    wanted = ActivationHybrid(target_ratio=2, refit_epochs=epochs)
    alone = fit(wanted, tiny_model("llama"), read())
    running = started(size, tmp_path / "rank", epochs=epochs, text=read.__name__)
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert len(running) == size
    for rank in range(size):
        found = torch.load(tmp_path / f"rank{rank}")
        assert found.keys() == {site.name for site in alone.sites}
        for site in alone.sites:
            w = alone.factors(site).dense()
            assert torch.allclose(found[site.name], w, atol=tolerance * float(w.abs().max()))


def test_a_process_that_dies_ends_the_others_with_one_line(tmp_path):
    first, second = started(2, tmp_path / "rank", dies="1")
    _, said = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert second.returncode == 9
    assert first.returncode == 1
    assert said.strip().splitlines()[-1].startswith("process 0 of 2 ends, as another one has ended")
    assert not list(tmp_path.iterdir())


def test_every_process_has_a_row_of_every_batch():
    parts = [text().batches(64, Ranks(rank, 3)) for rank in range(3)]
    for here in zip(*parts, strict=True):
        assert all(len(batch.ids_BT) for batch in here)
        assert sum(len(batch.ids_BT) for batch in here) == here[0].rows
        assert sum(int(batch.mask_BT.sum()) for batch in here) == here[0].count
    whole = sum(batch.count for batch in text().batches(64, ALONE))
    assert whole == sum(batch.count for batch in parts[0]) == text().tokens
    with pytest.raises(UserError, match="3 processes need as many calibration sequences, got 2"):
        Calibration(((5, 6), (7, 8))).batches(64, Ranks(0, 3))


def test_the_command_runs_under_torchrun(tmp_path):
    """Two processes fit, one writes; the folder is the one that a single process writes."""
    from tensorllm.checkpoint.loading import load

    tiny_model("llama").save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--mode", "activation-hybrid"]
    code = SCRIPT.format(tests=str(HELPERS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for size in (1, 2):
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        out = tmp_path / f"out{size}"
        running = [
            forked.Popen(
                ["-c", code, *options, "--out", out],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(size)
        ]
        said = [process.communicate(timeout=120) for process in running]
        assert [process.returncode for process in running] == [0] * size, said
        assert [bool(printed) for printed, _ in said] == [True, False][:size]
        assert not list(tmp_path.glob(".*.fit"))
    one, two = (load(tmp_path / f"out{size}").state_dict() for size in (1, 2))
    for name, w in one.items():
        assert torch.allclose(two[name], w, atol=1e-3 * float(w.abs().max()))
