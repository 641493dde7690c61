"""The base class of all datasets: where rows come from, which are used, how they are batched."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tensorllm.data.example import Example, Workload
from tensorllm.data.reading import Row, field_of, rows_of_file
from tensorllm.data.repository import HubSource, rows_of_hub
from tensorllm.data.tokens import check_characters
from tensorllm.dataset_names import GROUP
from tensorllm.errors import UserError
from tensorllm.registry import Registry, did_you_mean, one_of

Split = Literal["val", "test", "all"]
VALIDATION = 0.2  # the first fifth, in order, as in the papers
DATASETS: Registry[type["ReasoningDataModule"]] = Registry("dataset", GROUP)

Planner = Callable[[Sequence[Example]], Sequence[Any]]


def one_per_batch(examples: Sequence[Example]) -> Sequence[list[Example]]:
    """Each example by itself: the plan until a model provides a better one."""
    return [[example] for example in examples]


class ReasoningDataModule(LightningDataModule, ABC):
    """Questions with known answers.

    A dataset names its fields and converts a row to an `Example`; it may also filter (`select`).

    In a Trainer, `validate` reads the first fifth and `test` what `split` says, so that tuning by
    `validate` never uses the test part.

    Args:
        data_file: a local file instead of the hub, or a folder: a copy of the hub's repository.
        split: the part that `examples` and `trainer.test` use: the first fifth (`val`, for
            `examples` only), the rest (`test`) or `all`.
        limit: the most examples to use of a part.
        fields: other names of the fields: `{"answer": "gold"}`.

    Class attributes:
        source: where it is on the hub; None: local files only.
        field_names: role -> the names under which real files have it, the preferred one first.
        max_new_tokens: the most tokens of a generated answer; 0: nothing is generated.
        workload: how much the papers' experiments read, so that a plan needs no data.
    """

    workload: ClassVar[Workload | None] = None
    source: ClassVar[HubSource | None] = None
    field_names: ClassVar[dict[str, tuple[str, ...]]] = {}
    max_new_tokens: int = 0

    def __init__(
        self,
        data_file: Path | str | None = None,
        *,
        split: Split = "test",
        limit: int | None = None,
        fields: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        known = (name for name in DATASETS if DATASETS[name] is type(self))
        self.name = next(known, type(self).__name__)  # a class can be used without being registered
        one_of("split", split, get_args(Split))
        if limit is not None and limit < 1:
            raise UserError(f"--limit must be at least 1, got {limit}")
        if unknown := set(fields or ()) - set(self.field_names):
            name = min(unknown)
            hint = did_you_mean(name, list(self.field_names))
            raise UserError(
                f"{self.name} has no field {name!r}.{hint} Known: {', '.join(self.field_names)}"
            )
        self.data_file = None if data_file is None else Path(data_file)
        self.split: Split = split
        self.limit = limit
        self.fields = fields or {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.masked = False
        self.context: int | None = None
        self.done: frozenset[int] = frozenset()  # indices scored by an earlier, interrupted run
        self.notes: list[str] = []  # what was left out and why, for the results
        self._stage_split: Split | None = None  # of the Trainer's current stage
        self._everything: list[Example] | None = None
        self._planner: Planner = one_per_batch

    def connect(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        masked: bool = False,
        context: int | None = None,
    ) -> None:
        """Set the tokenizer and limits of the model that reads the dataset.

        Args:
            tokenizer: of the model.
            masked: whether it is a masked language model.
            context: how many tokens the model can read; None: unlimited.
        """
        if (tokenizer, masked, context) == (self.tokenizer, self.masked, self.context):
            return
        self.tokenizer, self.masked, self.context = tokenizer, masked, context
        self._everything = None

    @abstractmethod
    def example(self, row: Row, where: str) -> Example | None:
        """The row as an example; None if the papers leave it out."""

    def select(self, examples: Iterable[Example]) -> Iterable[Example]:
        """The examples that the papers keep, out of those of one hub split or file."""
        return examples

    @property
    def repository(self) -> HubSource | None:
        """The hub's repository, or a local copy of it; None if rows come from one file."""
        if self.data_file is None or self.source is None:
            return self.source if self.data_file is None else None
        return replace(self.source, folder=self.data_file) if self.data_file.is_dir() else None

    def rows(self) -> Iterator[Iterator[Row]]:
        """The rows of each part of the source, part by part."""
        source = self.repository
        if source is not None:
            for split in source.splits:
                yield rows_of_hub(source, split)
        elif self.data_file is not None:
            yield rows_of_file(self.data_file)
        else:
            raise UserError(f"dataset {self.name!r} is not on the hub: give --data-file")

    def value(self, row: Row, role: str, where: str) -> Any:
        """The row's field that plays `role`, under any of its names."""
        names = (self.fields[role],) if role in self.fields else self.field_names[role]
        return row[field_of(row, names, where)]

    def text(self, row: Row, role: str, where: str) -> str:
        """The same as text, stripped; it must be text that is not blank, or a number."""
        value = self.value(row, role, where)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {role} must be text that is not empty, got {value!r:.60}")
        return value.strip()

    def _read(self, row: Row, where: str) -> Example | None:
        found = self.example(row, where)
        if found is not None:
            for text in (found.prompt, found.answer, *found.choices):
                check_characters(text, where)
        return found

    def load(self) -> list[Example]:
        """All examples of the source, numbered, before any split."""
        source = self.data_file if self.data_file is not None else self.name
        found: list[Example] = []
        for part in self.rows():
            read = (self._read(row, f"{source}, row {n}") for n, row in enumerate(part, 1))
            found += self.select(e for e in read if e is not None)
        if not found:
            raise UserError(f"{source} has no row that {self.name} can use")
        return [
            Example(e.prompt, e.answer, e.choices, index, e.tokens) for index, e in enumerate(found)
        ]

    @property
    def examples(self) -> list[Example]:
        """The chosen examples, in the order of the dataset: the Trainer stage's part, or `split`.

        They are read on first use.
        """
        return self.part(self._stage_split or self.split)

    def part(self, split: Split) -> list[Example]:
        """The examples of a part, at most `limit`.

        Raises:
            UserError: the part is empty, or the rows cannot be read.
        """
        if self._everything is None:
            self._everything = self.load()
        first = int(VALIDATION * len(self._everything))
        spans = {"val": (0, first), "test": (first, None), "all": (0, None)}
        chosen = self._everything[slice(*spans[split])][: self.limit]
        if not chosen:
            raise UserError(
                f"split {split!r} of {self.name} is empty: the first {VALIDATION:.0%} of the "
                f"examples are 'val', the rest 'test'; there is {len(self._everything)} in all"
            )
        return chosen

    def setup(self, stage: str) -> None:
        """Lightning: choose the part that this stage reads.

        Nothing is read yet: some datasets need the tokenizer, which the module sets (`connect`)
        once it has its model.
        """
        if stage == "test" and self.split == "val":
            raise UserError(
                "trainer.test does not read the validation part, and this dataset has split='val': "
                "use trainer.validate, or leave split out"
            )
        self._stage_split = "val" if stage == "validate" else self.split
        self._planner, self.done = one_per_batch, frozenset()  # an earlier run may have failed

    def teardown(self, stage: str) -> None:
        """Lightning: drop this run's state, which would keep the model alive with the data."""
        self._stage_split, self._planner, self.done = None, one_per_batch, frozenset()
        self.trainer = None

    def plan_with(self, planner: Planner) -> None:
        """Make this run's batches with `planner`, a function from examples to batches."""
        self._planner = planner

    def val_dataloader(self) -> DataLoader[Any]:
        return self._dataloader(self.part("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._dataloader(self.part(self.split))

    def _dataloader(self, examples: Sequence[Example]) -> DataLoader[Any]:
        """This process's batches, padded with None so that all processes take as many steps."""
        # Lightning's DistributedSampler would repeat examples to give every device as many.
        batches = self._planner([e for e in examples if e.index not in self.done])
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        share: list[Any] = list(batches[rank::world])
        steps = max(1, -(-len(batches) // world))  # Lightning skips an empty loader
        share += [None] * (steps - len(share))
        return DataLoader(share, batch_size=None, collate_fn=_untouched)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # lists of tokens; the scorer pads them on the model's device


def _untouched(batch: Sequence[Any] | None) -> Iterator[Any] | None:
    """An iterator, which Lightning hands on as it is: in lists it looks for tensors to convert."""
    return None if batch is None else iter(batch)
