"""Predict what an evaluation costs, from the sizes of model and dataset alone.

Assumed: prompts are read at the speed of large matrix products on this machine; a generated token
takes at least the time in which all weights are read from memory once per batch; every answer is
generated to its last allowed token; a search examines every layer on every validation example. So
the times are upper bounds, except for overheads. They do not include loading the weights.
"""

import time
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tensorllm.compression.cost import decomposition_seconds
from tensorllm.compression.plan import plan_jobs
from tensorllm.data.base import DATASETS, VALIDATION
from tensorllm.evaluation.batching import LOGITS
from tensorllm.evaluation.protocol import PAPER
from tensorllm.evaluation.scorer import ACCELERATOR, CPU
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.task import task_of
from tensorllm.reproduction.published import Cell

BASE_BYTES = 450 * 2**20  # the interpreter with torch and transformers
COPIES = 3  # of a batch's logits in float32, and of a stacked tensor while it is decomposed


@dataclass(frozen=True, slots=True)
class Machine:
    """A device's speed: flop per second, and bytes of memory per second."""

    flops: float
    bandwidth: float


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Measure the device briefly: the best of two matrix products, and of two copies."""
    size = 512  # half precision may be very slow on a CPU
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.zeros(2**26, dtype=torch.uint8, device=device)
    flops = 2 * size**3 / _best(lambda: a @ a, device)
    return Machine(flops, 2 * b.nbytes / _best(b.clone, device))


def _best(call: Any, device: str) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds[1:]), 1e-9)


@dataclass(frozen=True, slots=True)
class RunCost:
    """Predicted seconds, and bytes at the peak."""

    seconds: float
    peak_bytes: int


class CellForecast:
    """Predicts the cost of a model's cells.

    Args:
        model: of the real sizes, on the meta device.
        machine: what it runs on.
        dtype: of the weights.
        accelerated: whether it runs on an accelerator.
    """

    def __init__(
        self, model: Any, machine: Machine, dtype: torch.dtype, *, accelerated: bool
    ) -> None:
        self.machine = machine
        self.width = dtype.itemsize
        self.parameters = sum(p.numel() for p in model.parameters())
        self.roles = RoleMatrices(model.config, parameters_of(model))
        self.masked = self.roles.task == "masked"
        self.vocabulary = model.config.get_text_config().vocab_size
        self.budget = ACCELERATOR if accelerated else CPU
        spec = self.roles.spec
        self.model_width = spec.geometry(0).D
        tables = 2 * self.vocabulary * self.model_width  # read in part: a row per token
        self.in_layers = max(self.parameters - tables, 1)
        self.cached = 2 * self.width * sum(geo.G * geo.K for geo in spec.geometries)

    def cell(self, cell: Cell, examples: int, *, searched: bool) -> RunCost:
        """The cost of one cell.

        Args:
            cell: of the published tables.
            examples: in its test part.
            searched: whether its layer is searched.
        """
        tests = 1
        seconds = 0.0
        layers = self.roles.layers
        working = 0
        if cell.recipe is not None:
            override = {} if cell.layout is None else {"layout": cell.layout}
            compressor = cell.recipe.compressor(**override)
            jobs = plan_jobs(compressor, self.roles, cell.recipe.layers or (0,))
            shapes = [job.site.shape(self.roles.spec.geometry(0)) for job in jobs]
            once = decomposition_seconds(shapes, self.machine.flops)
            seconds += once * (layers if searched else 1)
            working = COPIES * 4 * max(map(prod, shapes))
        if searched:
            validation = round(examples * VALIDATION / (1 - VALIDATION))
            seconds += (layers + 2) * self.scoring(cell.dataset, validation)
            tests = 2  # the original's, too
        seconds += tests * self.scoring(cell.dataset, examples)
        return RunCost(seconds, BASE_BYTES + self.width * self.parameters + self._batch() + working)

    def scoring(self, dataset: str, examples: int) -> float:
        """Seconds to score examples of a dataset, by the papers' protocol."""
        kind = DATASETS[dataset]
        load = kind.workload
        assert load is not None, f"{dataset} says no workload"
        length = load.prompt_tokens + load.answer_tokens
        new = kind.max_new_tokens
        opened = new > 0
        # The papers' loss reads padded batches again; a masked model reads a text for it.
        passes = 2 if opened and (self.masked or PAPER.unmasked_padding) else 1
        per_token = 2.0 * self.in_layers
        heads = 2.0 * self.vocabulary * self.model_width * (load.answer_tokens + 1)
        seconds = examples * passes * (per_token * length + heads) / self.machine.flops
        if self.masked or not opened:
            return seconds
        rows = min(examples, max(1, int(self.budget.generate / (length + new))))
        compute = rows * (per_token + heads / (load.answer_tokens + 1)) / self.machine.flops
        step = max(compute, self.width * self.parameters / self.machine.bandwidth)
        return seconds + examples / rows * new * step

    def _batch(self) -> int:
        """Bytes of a full batch's key-value cache and logits."""
        cache = 0 if self.masked else self.budget.generate * self.cached
        return cache + COPIES * 4 * LOGITS


# Config fields that may hold the FFN width.
FFN_WIDTHS = ("n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "intermediate_size")


def real_model(facts: dict[str, Any]) -> Any:
    """The published model by its sizes, on the meta device, without weights."""
    sizes = facts["sizes"]
    return model_of_sizes(
        facts["model_type"],
        width=sizes["hidden"],
        heads=sizes["heads"],
        layers=sizes["layers"],
        ffn=sizes["ffn"],
        vocabulary=sizes["vocabulary"],
        device="meta",
    )


def model_of_sizes(
    model_type: str,
    *,
    width: int,
    heads: int,
    layers: int,
    ffn: int,
    vocabulary: int,
    device: str = "cpu",
    **config: Any,
) -> Any:
    """A model of an architecture with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    made = AutoConfig.for_model(
        model_type,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config},
    )
    setattr(made, next(name for name in FFN_WIDTHS if hasattr(made, name)), ffn)
    kind = AutoModelForMaskedLM if task_of(made) == "masked" else AutoModelForCausalLM
    with torch.device(device):
        return kind.from_config(made).eval()
