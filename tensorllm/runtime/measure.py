"""Measuring how models run: time of a prompt and of one more token, bytes of weights and caches.

On a shared machine one thread that waits for a core holds up the others at every barrier. So each
turn is kept with the time that this process waited, and medians are over the turns that did not.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorllm.progress import Progress, quiet

QUIET = 0.02  # of a turn's time, summed over threads, that may be spent waiting for a core


class Turn(NamedTuple):
    """Seconds of one call, and seconds that this process's threads waited for a core meanwhile."""

    seconds: float
    waited: float = 0.0

    @property
    def quiet(self) -> bool:
        return self.waited <= QUIET * self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """How one model ran; times are medians.

    Attributes:
        prefill_tokens_per_second: of a whole prompt at once.
        decode_tokens_per_second: one token after another behind that prompt; None for encoders.
        weight_bytes: parameters and buffers, tied ones once.
        key_bytes, value_bytes: of the cache behind the prompt, all layers.
        peak_bytes: the most memory resident, of a process that did only this; None: not measured.
        prefill_noise, decode_noise: half the distance of the quartiles over the median.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    weight_bytes: int
    key_bytes: int
    value_bytes: int
    peak_bytes: int | None = None
    prefill_noise: float = 0.0
    decode_noise: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(
    calls: Mapping[str, Callable[..., Any]],
    repeats: int,
    before: Mapping[str, Callable[[], Any]] | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """Each call in turns with the others, so that what else the machine does hits all alike.

    Args:
        before: by the same names, what makes the argument of each call, outside its time.
        on_turn: called behind each call that counts, outside its time.
    """
    given = {name: () if before is None else (before[name],) for name in calls}
    for name, call in calls.items():
        call(*(make() for make in given[name]))
    _wait()
    out: dict[str, list[Turn]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            arguments = [make() for make in given[name]]
            if arguments:
                _wait()
            waited, started = waited_for_cores(), time.perf_counter()
            call(*arguments)
            _wait()
            seconds = time.perf_counter() - started
            out[name].append(Turn(seconds, waited_for_cores() - waited))
            on_turn()
    return out


def counted(turns: list[Turn]) -> list[float]:
    """Seconds of the quiet turns.

    Where none was: of a process with one thread, those that it ran; of one with more, all of each.
    """
    quiet = [turn.seconds for turn in turns if turn.quiet]
    if quiet:
        return quiet
    alone = torch.get_num_threads() == 1
    return [turn.seconds - turn.waited if alone else turn.seconds for turn in turns]


def medians(turns: Mapping[str, list[Turn]]) -> dict[str, float]:
    """Seconds of the median turn of those that are `counted`."""
    return {name: statistics.median(counted(every)) for name, every in turns.items()}


def noises(turns: Mapping[str, list[Turn]]) -> dict[str, float]:
    """Half the distance of the quartiles over the median, of the turns that are `counted`."""
    out = {}
    for name, every in turns.items():
        seconds = counted(every)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        out[name] = (high - low) / 2 / statistics.median(seconds)
    return out


def waited_for_cores() -> float:
    """Seconds that this process's threads have been ready to run and were not, as Linux counts.

    Source: Documentation/scheduler/sched-stats.rst; 0 on systems that do not count it.
    """
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread may end meanwhile
            total += int(file.read_text().split()[1])
    return total / 1e9


@torch.inference_mode()
def measure(
    models: Mapping[str, Any],
    prompt: int,
    new: int,
    repeats: int,
    seed: int = 0,
    batch: int = 1,
    progress: Progress = quiet,
) -> dict[str, Measured]:
    """Run models side by side on the same random tokens.

    Args:
        prompt: tokens of the prompt.
        new: tokens that are decoded behind it, one by one.
        batch: texts that are read and written at once; tokens per second are of all of them.
        progress: called with (turns done, turns in all, what is timed).
    """
    some = next(iter(models.values()))
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        0, some.config.get_text_config().vocab_size, (batch, prompt + new), generator=noise
    )
    ids = ids.to(some.device)
    whole = ids[:, :prompt]
    decodes = all(model.can_generate() for model in models.values())
    turns, turn = (1 + decodes) * repeats * len(models), itertools.count(1)
    reads = interleaved(
        {name: _prefill(model, whole) for name, model in models.items()},
        repeats,
        on_turn=lambda: progress(next(turn), turns, "prefill"),
    )
    prefill, prefill_noise = medians(reads), noises(reads)
    decode: dict[str, float] = {}
    decode_noise: dict[str, float] = {}
    caches: dict[str, Any] = dict.fromkeys(models)
    if decodes:
        caches = {name: _read(model, whole) for name, model in models.items()}
        writes = interleaved(
            {name: _decode(model, ids, prompt) for name, model in models.items()},
            repeats,
            {name: partial(copy.deepcopy, cache) for name, cache in caches.items()},
            on_turn=lambda: progress(next(turn), turns, "decode"),
        )
        decode, decode_noise = medians(writes), noises(writes)
    return {
        name: Measured(
            batch * prompt / prefill[name],
            batch * new / decode[name] if decodes else None,
            weight_bytes(model),
            *cache_bytes(caches[name]),
            prefill_noise=prefill_noise[name],
            decode_noise=decode_noise.get(name),
        )
        for name, model in models.items()
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; storage that is shared counts once."""
    storages: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the keys and of the values that a cache holds, counted on its tensors' storage."""
    if cache is None:
        return 0, 0
    keys = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    return keys, sum(layer.values.untyped_storage().nbytes() for layer in cache.layers)


def _prefill(model: Any, ids: Tensor) -> Callable[[], Any]:
    last = {"logits_to_keep": 1} if model.can_generate() else {}
    return lambda: model(ids, **last)


def _read(model: Any, ids: Tensor) -> Any:
    """The cache behind a prompt, which decoding begins with."""
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def _decode(model: Any, ids: Tensor, prompt: int) -> Callable[[Any], None]:
    def run(cache: Any) -> None:
        for i in range(prompt, ids.shape[1]):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)

    return run


def _wait() -> None:
    """Until a GPU has done what it was given: calls return before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
