"""BigBench QA-WikiData: complete a sentence made of a Wikidata triple (arXiv 2206.04615)."""

from typing import ClassVar

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example, Workload
from tensorllm.data.reading import Row
from tensorllm.data.repository import HubSource
from tensorllm.dataset_names import ALIASES


@DATASETS.register("wikidata_qa", aliases=ALIASES["wikidata_qa"])
class WikidataQA(ReasoningDataModule):
    """Facts of Wikidata as sentences to complete; the answer is generated.

    Only rows with exactly one target are used; the prompt is the input, stripped.
    """

    source = HubSource("tasksource/bigbench", "qa_wikidata", ("validation", "train"))
    workload = Workload(20321, 8.7, 1.1)
    field_names: ClassVar = {
        "input": ("inputs", "input", "prompt", "question"),
        "target": ("targets", "target", "answer"),
    }
    max_new_tokens = 10

    def example(self, row: Row, where: str) -> Example | None:
        targets = self.value(row, "target", where)
        if isinstance(targets, list) and len(targets) > 1:
            return None
        return Example(self.text(row, "input", where), self.text(row, "target", where))
