"""FEVER: claims that are true or false (Thorne et al. 2018, arXiv 1803.05355)."""

from collections.abc import Iterable
from typing import ClassVar

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example, Workload
from tensorllm.data.reading import Row
from tensorllm.data.repository import HubSource
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError

ANSWERS = dict.fromkeys(("supports", "true", "1"), "true") | dict.fromkeys(
    ("refutes", "false", "0"), "false"
)
UNDECIDED = {"not enough info", "nei"}  # the hub's v1.0 has no such rows; FEVER's own files do


@DATASETS.register("fever", aliases=ALIASES["fever"])
class Fever(ReasoningDataModule):
    """Whether a claim is true or false.

    Each claim is used once, and only if all its labels agree, as in LASER's
    `dataset_utils/fever.py`.
    """

    source = HubSource("EleutherAI/fever", "v1.0", ("paper_dev", "paper_test"))
    workload = Workload(13086, 25.9, 1.0)
    field_names: ClassVar = {"claim": ("claim", "question"), "label": ("label", "answer")}

    def example(self, row: Row, where: str) -> Example | None:
        label = str(self.value(row, "label", where)).strip().lower()
        if label in UNDECIDED:
            return None
        if label not in ANSWERS:
            known = "SUPPORTS, REFUTES, NOT ENOUGH INFO, true, false, 1, 0"
            raise UserError(f"{where}: label must be one of {known}, got {label!r}")
        claim = self.text(row, "claim", where)
        mark = "" if claim.endswith((".", "?")) else "."
        prompt = (
            f"Consider the following claim: {claim}{mark} Is this claim true or false. The claim is"
        )
        return Example(prompt, ANSWERS[label], ("true", "false"))

    def select(self, examples: Iterable[Example]) -> Iterable[Example]:
        claims: dict[str, list[Example]] = {}
        for example in examples:
            claims.setdefault(example.prompt, []).append(example)
        return [same[0] for same in claims.values() if len({e.answer for e in same}) == 1]
