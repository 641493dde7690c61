"""Measuring how models run: time of a prompt and of further tokens, bytes of weights and caches.

On a shared machine, one thread that waits for a core delays the others at every barrier. So the
waiting time of this process is recorded for each turn, and medians are over the turns without.
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

QUIET = 0.02  # share of a turn's time that its threads may wait for a core, in all


class Turn(NamedTuple):
    """Seconds of one call, and the seconds that this process's threads waited for a core."""

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
        decode_tokens_per_second: one token at a time after that prompt; None for encoders.
        weight_bytes: parameters and buffers, tied ones once.
        key_bytes, value_bytes: of the cache after the prompt, all layers.
        peak_bytes: peak resident memory of a process that did only this; None: not measured.
        prefill_noise, decode_noise: half the interquartile range over the median.
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
    """Time the calls in turns, so that other load on the machine affects all alike.

    Args:
        calls: by name.
        repeats: timed turns of each call; one more comes first as a warm-up.
        before: by the same names, functions that make each call's argument, untimed.
        on_turn: called after each timed call, untimed.
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

    If there are none: without the waiting time for a process with one thread, otherwise of all
    turns.
    """
    quiet = [turn.seconds for turn in turns if turn.quiet]
    if quiet:
        return quiet
    alone = torch.get_num_threads() == 1
    return [turn.seconds - turn.waited if alone else turn.seconds for turn in turns]


def medians(turns: Mapping[str, list[Turn]]) -> dict[str, float]:
    """Median seconds of the turns that `counted` returns."""
    return {name: statistics.median(counted(every)) for name, every in turns.items()}


def noises(turns: Mapping[str, list[Turn]]) -> dict[str, float]:
    """Half the interquartile range over the median, of the turns that `counted` returns."""
    out = {}
    for name, every in turns.items():
        seconds = counted(every)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        out[name] = (high - low) / 2 / statistics.median(seconds)
    return out


def waited_for_cores() -> float:
    """Seconds that this process's threads have been runnable but not running, from Linux.

    Source: Documentation/scheduler/sched-stats.rst; 0 on systems that do not report it.
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
        models: by name.
        prompt: tokens of the prompt.
        new: tokens that are decoded after it, one at a time.
        repeats: turns of each model.
        seed: of the tokens.
        batch: number of texts at once; tokens per second are of all of them.
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
    """Bytes of parameters and buffers; shared storage counts once."""
    storages: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the keys and of the values in a cache, by the storage of its tensors."""
    if cache is None:
        return 0, 0
    keys = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    return keys, sum(layer.values.untyped_storage().nbytes() for layer in cache.layers)


def _prefill(model: Any, ids: Tensor) -> Callable[[], Any]:
    last = {"logits_to_keep": 1} if model.can_generate() else {}
    return lambda: model(ids, **last)


def _read(model: Any, ids: Tensor) -> Any:
    """The cache after a prompt, from which decoding starts."""
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def _decode(model: Any, ids: Tensor, prompt: int) -> Callable[[Any], None]:
    def run(cache: Any) -> None:
        for i in range(prompt, ids.shape[1]):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)

    return run


def _wait() -> None:
    """Wait until a GPU has finished, as calls return earlier."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
