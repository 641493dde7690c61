"""HotpotQA: multi-hop questions with short answers (Yang et al. 2018, arXiv 1809.09600)."""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example, Workload
from tensorllm.data.reading import Row
from tensorllm.data.repository import HubSource, rows_of_hub
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError

ANSWER_TOKENS = 15
# "We use the LLAMA tokenizer for consistency": so all models of the papers answer the same
# questions.
COUNTING_TOKENIZER = "meta-llama/Llama-2-7b-hf"


@DATASETS.register("hotpotqa", aliases=ALIASES["hotpotqa"])
class HotpotQA(ReasoningDataModule):
    """Questions whose answer takes two steps; the answer is generated.

    Only answers of at most 15 LLaMA tokens, special tokens included, as in LASER's
    `dataset_utils/hotpot.py`.

    Args:
        counting_tokenizer: counts the answers' tokens: a hub id or folder. By default LLaMA-2's if
            it is in the local cache, otherwise the evaluated model's own; the results say which.
    """

    source = HubSource("hotpotqa/hotpot_qa", "fullwiki", ("train", "validation"))
    workload = Workload(14618, 23.1, 3.5)
    field_names: ClassVar = {"question": ("question",), "answer": ("answer",)}
    max_new_tokens = 15

    def __init__(self, *args: Any, counting_tokenizer: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counting_tokenizer = counting_tokenizer

    def rows(self) -> Iterator[Iterator[Row]]:
        """From the hub: as many train rows as there are validation rows, then the validation rows.

        The test split has no answers.
        """
        source = self.repository
        if source is None:
            yield from super().rows()
            return
        validation = list(rows_of_hub(source, "validation"))
        yield itertools.islice(rows_of_hub(source, "train"), len(validation))
        yield iter(validation)

    def example(self, row: Row, where: str) -> Example | None:
        question, answer = self.text(row, "question", where), self.text(row, "answer", where)
        if len(self._counter(answer).input_ids) > ANSWER_TOKENS:
            return None
        mark = "" if question.endswith(("?", ".")) else "?"
        return Example(f"{question}{mark} The answer is", answer)

    def load(self) -> list[Example]:
        self._counter = self._load_counter()  # another model's tokenizer may count now
        self.notes = [f"answers counted by the tokenizer of {self._counter.name_or_path}"]
        return super().load()

    def _load_counter(self) -> PreTrainedTokenizerBase:
        wanted = self.counting_tokenizer
        try:
            return AutoTokenizer.from_pretrained(
                wanted or COUNTING_TOKENIZER, local_files_only=wanted is None
            )
        except (OSError, ValueError) as error:
            if wanted is not None or self.tokenizer is None:
                name = wanted or COUNTING_TOKENIZER
                raise UserError(f"cannot load the tokenizer {name!r}: {error!s:.120}") from None
        return self.tokenizer
