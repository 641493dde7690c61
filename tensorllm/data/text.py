"""Any text: how well the model predicts it (perplexity), without generation or accuracy."""

from collections.abc import Iterator
from typing import Any, ClassVar

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example
from tensorllm.data.opening import ending, lines_of
from tensorllm.data.reading import KNOWN, Row, json_items, rows_of_file
from tensorllm.data.tokens import open_ended
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError


@DATASETS.register("text", aliases=ALIASES["text"])
class Text(ReasoningDataModule):
    """The perplexity of any text file.

    Documents are cut into blocks that overlap by one token, so that every token except a document's
    first is scored once.

    A file of rows gives one document per row (field `text`), a JSON list of strings one per string,
    any other file is one document.

    Args:
        block: tokens per block; the model's context, if that is shorter.
    """

    field_names: ClassVar = {"text": ("text", "story", "content", "document")}

    def __init__(self, *args: Any, block: int = 1024, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if block < 2:
            raise UserError(f"block must be at least 2 tokens, got {block}")
        self.block = block

    def documents(self) -> Iterator[str]:
        path = self.data_file
        if path is None:
            raise UserError("dataset 'text' is not on the hub: give --data-file")
        if ending(path) not in KNOWN:
            yield "".join(lines_of(path)).replace("\r\n", "\n")
            return
        if ending(path) == ".json":
            items = json_items(path)
            if all(isinstance(item, str) for item in items):
                yield from items
                return
        for number, row in enumerate(rows_of_file(path), 1):
            yield self.text(row, "text", f"{path}, row {number}")

    def example(self, row: Row, where: str) -> Example | None:
        return Example("", self.text(row, "text", where))

    def load(self) -> list[Example]:
        if self.masked:
            raise UserError("running text needs a causal model, got a masked one")
        assert self.tokenizer is not None, "connect() comes first"
        size = min(self.block, self.context or self.block)
        found: list[Example] = []
        for document in self.documents():
            (ids,) = open_ended(self.tokenizer, [document])
            for start in range(0, len(ids) - 1, size - 1):
                block = ids[start : start + size]
                found.append(
                    Example("", str(self.tokenizer.decode(block)), (), len(found), tuple(block))
                )
        if not found:
            raise UserError(f"{self.data_file} has no text of two tokens or more")
        return found
