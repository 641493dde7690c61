"""The datasets a search runs on: their names, files, validation and test parts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorllm.data.base import ReasoningDataModule
from tensorllm.environment import printable
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.model_names import short_names
from tensorllm.requests.search import SearchRequest
from tensorllm.search.staged import DatasetExamples

SHOWN = "--dataset takes a name, or several such as fever,wikidata_qa"


class DatasetSource(NamedTuple):
    """A dataset as it was requested: its name or YAML file, and a local file instead of the hub."""

    name: str
    data_file: Path | None


class SearchDataset(NamedTuple):
    """One dataset: its validation part compares trials, its test part scores the winner.

    Attributes:
        label: the dataset's name, or its file if another dataset has the same name.
    """

    label: str
    validation: ReasoningDataModule
    test: ReasoningDataModule

    def connect(self, tokenizer: Any, *, masked: bool, context: int) -> None:
        """Give both parts the tokenizer and the limits of the model that reads them."""
        for part in (self.validation, self.test):
            part.connect(tokenizer, masked=masked, context=context)

    @property
    def asked(self) -> DatasetExamples:
        return DatasetExamples(self.validation.examples, self.validation.max_new_tokens)


def sources_of(request: SearchRequest) -> list[DatasetSource]:
    """Parse the comma-separated datasets and files, in the same order; an empty file means the hub.

    Raises:
        UserError: no name is given, a dataset is given twice, or the files do not match in number.
    """
    known = short_names().get(request.model, {}).get("default_dataset")
    dataset, data_file = request.dataset or known, request.data_file
    if dataset is None:
        raise UserError("give --dataset: see `tensorllm list datasets`")
    names = [name.strip() for name in str(dataset).split(",")]
    if not all(names):
        raise UserError(f"{SHOWN}; got {dataset!r}")
    if len(names) == 1:
        return [DatasetSource(names[0], data_file)]
    files = [""] * len(names) if data_file is None else str(data_file).split(",")
    if len(files) != len(names):
        raise UserError(
            f"--data-file takes a file for each of {len(names)} datasets, in their order, such as "
            f"a.jsonl,b.jsonl (nothing between commas: from the hub); got {len(files)} in "
            f"{str(data_file)!r}"
        )
    found = [
        DatasetSource(name, Path(file.strip()) if file.strip() else None)
        for name, file in zip(names, files, strict=True)
    ]
    source, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"dataset {source.name!r} is given {times} times; the same name needs a --data-file of "
            "its own each time"
        )
    return found


def search_datasets(sources: Sequence[DatasetSource], limit: int | None) -> list[SearchDataset]:
    """The validation and test part of each dataset; nothing is read yet."""
    parts = [
        [
            make_dataset(source.name, data_file=source.data_file, split=split, limit=limit)
            for split in ("val", "test")
        ]
        for source in sources
    ]
    labels = _labels(sources, [str(validation.name) for validation, _ in parts])
    return [SearchDataset(label, *both) for label, both in zip(labels, parts, strict=True)]


def _labels(sources: Sequence[DatasetSource], names: Sequence[str]) -> list[str]:
    """The datasets' names; datasets that share a name are labelled by their files."""
    short = [s.data_file.stem if s.data_file else n for s, n in zip(sources, names, strict=True)]
    whole = [str(s.data_file or n) for s, n in zip(sources, names, strict=True)]
    unique = [names.count(name) == 1 for name in names]
    files = [printable(file) for file in (short if len(set(short)) == len(short) else whole)]
    return [name if one else file for name, one, file in zip(names, unique, files, strict=True)]


def need_answers(datasets: Sequence[SearchDataset]) -> None:
    """Refuse running text among several datasets: it has no accuracy to compare."""
    texts = [each.label for each in datasets if each.validation.examples[0].tokens]
    if texts and len(datasets) > 1:
        raise UserError(
            f"{texts[0]} is running text, where no answer is right or wrong: among several "
            "datasets it needs --objective loss"
        )
