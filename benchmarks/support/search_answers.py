"""The rank search where answers are generated, beside the same search that generates every token of
every trial anew.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.results import Comparison
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.data.base import ReasoningDataModule
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.evaluation.forward import Padded, last_columns
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.evaluation.scorer import make_scorer
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.examiner import Examiner
from tensorllm.search.forwards import PrefixForward
from tensorllm.search.prefix import default_budget
from tensorllm.search.space import Point, make_space
from tensorllm.search.staged import DatasetExamples
from tensorllm.search.trial import TrialResult

WANTED = 4.0
MODES: dict[str, dict[str, Any]] = {
    "laser": {"matrices": ["in", "gate", "out"], "rho": [0.05, 0.1, 0.2, 0.33, 0.5, 0.7]},
    "shared-tucker": {},
}


class Anew(PrefixForward):
    """Prompts and gold answers as the search keeps them; every step runs all layers, and the output
    embedding reads as many columns of each row as of the longest.
    """

    def merged(self, caches: Sequence[Any], lanes: Sequence[int]) -> Any:
        (cache,) = caches
        return cache

    def __call__(  # type: ignore[override]
        self, batch: Padded, *, keep: int | Sequence[int], best: bool = False, **how: Any
    ) -> tuple[Tensor, Any]:
        how.pop("paths", None)
        if isinstance(keep, int):
            return super().__call__(batch, keep=keep, **how)
        logits_BNV, cache = super().__call__(batch, keep=max(keep), **how)
        logits_MV = logits_BNV[last_columns(keep, logits_BNV.device)]
        return logits_MV.argmax(-1) if best else logits_MV, cache


class Counted(PrefixForward):
    """As the search has it; counts generated tokens."""

    tokens = 0

    def __call__(self, batch: Padded, **how: Any) -> tuple[Tensor, Any]:
        self.tokens += sum(path is not None for path in how.get("paths", ()))
        return super().__call__(batch, **how)


def examiner(model: Any, tokenizer: Any, data: ReasoningDataModule, points: list[Point]) -> Any:
    """A new one knows nothing."""
    return Examiner(
        model, tokenizer, [DatasetExamples(data.examples, data.max_new_tokens)],
        PROTOCOLS["strict"],
        points=points,
        budget=CacheBudget(default_budget(model.device)),
    )  # fmt: skip


def running(
    forward: type[PrefixForward],
    made: Examiner,
    tokenizer: Any,
    data: ReasoningDataModule,
    **how: Any,
) -> Any:
    """Let the examiner run its model so.

    Args:
        how: other arguments of `make_scorer`.
    """
    made.forward = forward(made.model, made.prefix)
    made.parts[0].scorer = make_scorer(
        made.model, tokenizer, protocol=PROTOCOLS["strict"],
        max_new_tokens=data.max_new_tokens, forward=made.forward, **how,
    )  # fmt: skip
    return made.forward


def points_of(model: Any, mode: str, layers: Sequence[int], trials: int, seed: int) -> list[Point]:
    """A sample of the search space, later layers first, as the search takes them."""
    roles = RoleMatrices(model.config, parameters_of(model))
    space = make_space(roles, mode, layers=tuple(layers), values=MODES[mode])
    grid = [space.point(values) for values in space.grid]
    points = random.Random(seed).sample(grid, min(trials, len(grid)))
    return sorted(points, key=lambda point: -point.layers[0])


def answers(
    folder: Path, dataset: str, file: Path, *, mode: str, layers: Sequence[int], trials: int,
    questions: int, seed: int,
) -> tuple[dict[str, Comparison], dict[str, Any]]:  # fmt: skip
    """Both ways over the same trials, in one process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = make_dataset(dataset, data_file=file, split="val", limit=questions)
    data.connect(tokenizer)
    points = points_of(model, mode, layers, trials, seed)
    ours = examiner(model, tokenizer, data, points)
    peer = examiner(model, tokenizer, data, points)
    count = running(Counted, ours, tokenizer, data)
    running(Anew, peer, tokenizer, data, compact_below=0.5)
    _, original = timed(ours, [None])
    before = len(ours.prefix.tokens)
    count.tokens = 0
    size = ours.side_by_side
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    mine, found = 0.0, []
    for group in groups:
        first, one = timed(ours, group)
        mine += first
        found += one
        print(f"{len(found)} of {len(points)} trials: {mine:.1f} CPU s", flush=True)
    known = 1 - (len(ours.prefix.tokens) - before) / count.tokens
    again, _ = timed(ours, groups[-1])
    plain, others = anew(peer, points)
    compared = Comparison(
        ours=mine / len(points),
        unit="CPU s",
        peer=plain / len(points),
        peer_name="every answer anew",
        wanted=WANTED,
    )
    both = list(zip(found, others, strict=True))
    about = {
        "examples_per_second": {
            "ours": len(points) * len(data.examples) / mine,
            "peer": len(points) * len(data.examples) / plain,
        },
        "share_of_known_tokens": known,
        "side_by_side": size,
        "verdicts_that_differ": sum(one.correct != other.correct for one, other in both),
        "largest_difference_loss": max(abs(one.loss - other.loss) for one, other in both),
        "accuracies": [one.accuracy for one in (*original, *found)],
        "trials": len(points),
        "questions": len(data.examples),
        "layers": list(layers),
    }
    all_known = Comparison(
        ours=again / len(groups[-1]),
        unit="CPU s",
        peer=plain / len(points),
        peer_name="every answer anew",
        wanted=WANTED,
    )
    what = f"{dataset}, {mode}, {folder.name}"
    return {f"a trial of {what}": compared, f"the last ones again, {what}": all_known}, about


def anew(peer: Examiner, points: Sequence[Point]) -> tuple[float, list[TrialResult]]:
    """Seconds and results of the trials one by one, each answer read anew."""
    seconds, found = 0.0, []
    timed(peer, [None])
    for point in points:
        more, one = timed(peer, [point])
        seconds += more
        found += one
        print(f"anew {len(found)} of {len(points)}: {seconds:.1f} CPU s", flush=True)
    return seconds, found


def timed(examine: Examiner, points: Sequence[Point | None]) -> tuple[float, list[TrialResult]]:
    """Seconds of all cores: other work on the machine does not count."""
    started = time.process_time()
    found = examine.together(points, [()] * len(points))
    results = [one for one in found if isinstance(one, TrialResult)]
    assert len(results) == len(points), "none is refused"
    return time.process_time() - started, results
