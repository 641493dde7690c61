"""Where a fit keeps what is too large to hold twice: in memory, or in a folder to resume from.

Files are written completely or not at all, so whatever exists is finished.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.calibration.heap import trim_heap
from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.io import TEMPORARY, no_space, write_tensors, write_text
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.quantised import kind_named

FINGERPRINT = "fit.json"
BACKWARDS = 3  # forward passes that a training step costs; it reads single states


class Store:
    """Tensors by name.

    Args:
        folder: None for memory; otherwise created if it does not exist.
        fingerprint: identifies the work. A folder's contents from other work are deleted, except
            for stores within it: those of several processes, or of a narrow export.

    Raises:
        UserError: the folder contains something that no fit has written.
    """

    def __init__(
        self, folder: Path | None = None, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        if folder is None:
            return
        said = json.dumps(fingerprint, sort_keys=True, indent=1)
        mark = folder / FINGERPRINT
        if mark.is_file() and mark.read_text() == said:
            return
        folder.mkdir(parents=True, exist_ok=True)
        held = [p for p in folder.iterdir() if p != mark and not _is_apart(p)]
        strange = [p for p in held if p.is_dir() or not mark.is_file()]
        if strange:
            name = strange[0].name
            raise UserError(f"{folder} holds {name}, which no fit left there; give another")
        for path in held:
            path.unlink()
        write_text(mark, said)

    def has(self, name: str) -> bool:
        return name in self._held if self.folder is None else self.path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name.

        Raises:
            Incomplete: the disk is full; finished layers are kept for the next run.
        """
        if self.folder is None:
            self._held[name] = dict(tensors)
            return
        try:
            write_tensors(self.path(name), tensors)
        except OSError as error:
            raise no_space(self.folder, error, "layer") from error

    def load(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        """The tensors saved under `name` whose own names start with `prefix`."""
        if self.folder is None:
            return {key: t for key, t in self._held[name].items() if key.startswith(prefix)}
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as held:
            return {key: held.get_tensor(key) for key in held.keys() if key.startswith(prefix)}  # noqa: SIM118

    def part(self, name: str, prefix: str) -> dict[str, Tensor]:
        """As `load`, with the prefix removed from the names."""
        return {key.removeprefix(prefix): t for key, t in self.load(name, prefix).items()}

    def has_factors(self, site: Site) -> bool:
        """Whether there are factors of the site among those of its layer."""
        return bool(self.load(f"factors-{site.layers[0]}", f"{site.name}/"))

    def factors(self, site: Site) -> Factors:
        """The factors of a site, saved with those of its layer under the names of `as_stored`."""
        named = self.part(f"factors-{site.layers[0]}", f"{site.name}/")
        kind = next(iter(named)).partition("/")[0]
        return kind_named(kind).from_tensors({n.partition("/")[2]: t for n, t in named.items()})

    def drop(self, name: str) -> None:
        """Delete what was saved under `name`, if anything."""
        self._held.pop(name, None)
        if self.folder is not None:
            self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def _is_apart(path: Path) -> bool:
    """Whether this is a half-written file, or the folder of another store."""
    return path.suffix == TEMPORARY or (path / FINGERPRINT).is_file()


def as_stored(site: Site, factors: Factors) -> dict[str, Tensor]:
    """The tensors of a site's factors, by their names among those of its layer."""
    kind = factors.kind
    return {f"{site.name}/{kind}/{name}": t for name, t in factors.tensors().items()}


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states before one layer, a tensor per batch, each read from the store when needed.

    Attributes:
        store: where they are.
        name: under which they are saved, with the batch's number.
        count: of batches.
        device: to which they are read, as a folder does not record it.
    """

    store: Store
    name: str
    count: int
    device: torch.device

    def keep(self, batches: Iterable[Tensor]) -> None:
        for number, hidden in enumerate(batches):
            self.store.save(f"{self.name}-{number}", {"hidden": hidden})

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.count):
            yield self[number]

    def at(self, number: int) -> Tensor:
        """The states of one batch, for a forward pass."""
        return self[number]

    def __getitem__(self, number: int) -> Tensor:
        return self.store.load(f"{self.name}-{number}")["hidden"].to(self.device)

    def drop(self) -> None:
        for number in range(self.count):
            self.store.drop(f"{self.name}-{number}")


class Counted:
    """States that report how many were read so far."""

    def __init__(self, states: "States", report: Callable[[int], None]) -> None:
        self.states, self.report, self.read = states, report, 0
        report(0)

    def __iter__(self) -> Iterator[Tensor]:
        for hidden in self.states:
            yield hidden
            self._count()

    def at(self, number: int) -> Tensor:
        self._count()
        return self.states[number]

    def __getitem__(self, number: int) -> Tensor:
        self._count(BACKWARDS)
        return self.states[number]

    def _count(self, passes: int = 1) -> None:
        self.read += passes
        self.report(self.read)


Hidden = States | Counted  # hidden states before a layer, read in order or one by one


class Sweep:
    """A pass through the layers that resumes where an earlier one was interrupted.

    Each step gives the layer, the states before it by name, and a function that keeps those after
    it; `done` then saves the result, which marks the step as finished.
    """

    def __init__(
        self, store: Store, what: str, names: Sequence[str], start: list[Tensor], layers: int
    ) -> None:
        self.store, self.what, self.names = store, what, names
        self.start, self.layers = start, layers
        self.layer = 0

    def __iter__(self) -> Iterator[tuple[int, list[States], Callable[..., None]]]:
        finished = [n for n in range(self.layers) if self.store.has(f"{self.what}-{n}")]
        self.layer = len(finished)
        if not finished:
            for states in self._before(0):
                states.keep(self.start)
        while self.layer < self.layers:
            yield self.layer, self._before(self.layer), self._keep
            for states in self._before(self.layer):
                states.drop()
            trim_heap()
            self.layer += 1

    def done(self, found: Mapping[str, Tensor]) -> None:
        self.store.save(f"{self.what}-{self.layer}", found)

    def forget_start(self) -> None:
        """Free the memory of the first layer's states, wherever that list is held.

        Their number and device stay known.
        """
        self.start[:] = [hidden.new_empty(0) for hidden in self.start]

    def _keep(self, *batches: Iterable[Tensor]) -> None:
        if self.layer + 1 < self.layers:
            for states, hidden in zip(self._before(self.layer + 1), batches, strict=True):
                states.keep(hidden)

    def _before(self, layer: int) -> list[States]:
        names = [f"{name}-{layer}" for name in self.names]
        device = self.start[0].device
        return [States(self.store, name, len(self.start), device) for name in names]
