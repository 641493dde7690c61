"""The demo world's held-out questions, in the shapes of the four datasets."""

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.demo import questions
from tensorllm.data.example import Example
from tensorllm.data.reading import Row
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError


@DATASETS.register("demo", aliases=ALIASES["demo"])
class DemoWorld(ReasoningDataModule):
    """Questions about the demo's small world, in four shapes; generated, so no file and no hub."""

    max_new_tokens = 2

    def example(self, row: Row, where: str) -> Example | None:
        return Example(row["prompt"], row["answer"], tuple(row["choices"]))

    def load(self) -> list[Example]:
        if self.data_file is not None:
            raise UserError("the demo dataset is generated: it takes no --data-file")
        return [
            Example(q.prompt, q.answer, tuple(q.choices), index)
            for index, q in enumerate(questions())
        ]
