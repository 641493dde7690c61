"""Bias in Bios: the profession of a person from a biography (arXiv 1901.09451).

Source: De-Arteaga et al. 2019.
"""

from typing import ClassVar

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.example import Example, Workload
from tensorllm.data.reading import Row
from tensorllm.data.repository import HubSource
from tensorllm.dataset_names import ALIASES
from tensorllm.errors import UserError

# In the order of the hub's integer labels.
_NAMES = """
    accountant architect attorney chiropractor comedian composer dentist dietitian dj filmmaker
    interior_designer journalist model nurse painter paralegal pastor personal_trainer photographer
    physician poet professor psychologist rapper software_engineer surgeon teacher yoga_teacher
"""
PROFESSIONS = _NAMES.split()
# Those that are a single token in the papers' tokenizers, in LASER's order.
CHOICES = (
    "journalist",
    "poet",
    "composer",
    "model",
    "teacher",
    "architect",
    "painter",
    "professor",
)
MASKED_TOKENS = 50  # the last tokens of the text that are kept


@DATASETS.register("bios_profession", aliases=ALIASES["bios_profession"])
class BiosProfession(ReasoningDataModule):
    """The profession of a person from a biography: one of eight.

    All rows of a local file are used, even if it has a `split` column.
    """

    source = HubSource("LabHC/bias_in_bios", None, ("dev",))
    workload = Workload(19223, 100.5, 1.0)
    field_names: ClassVar = {"text": ("hard_text", "bio", "text"), "profession": ("profession",)}

    def example(self, row: Row, where: str) -> Example | None:
        profession = self._profession(row, where)
        if profession not in CHOICES:
            return None
        text = self.text(row, "text", where)
        if self.masked and self.tokenizer is not None:
            kept = self.tokenizer(text, add_special_tokens=False).input_ids[-MASKED_TOKENS:]
            text = str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        prompt = f"Consider the following text: {text}{'' if text.endswith(('.', '?')) else '.'}"
        if self.masked and self.tokenizer is not None:
            mask = self.tokenizer.mask_token
            prompt += f" The profession of the person in the text is called {mask}."
        else:
            prompt += " What is the profession of the person in this text?"
            prompt += " The profession of this person is"
        return Example(prompt, profession, CHOICES)

    def _profession(self, row: Row, where: str) -> str:
        value = self.value(row, "profession", where)
        digits = str(value).strip()
        if digits.isdigit() and int(digits) < len(PROFESSIONS):
            return PROFESSIONS[int(digits)]
        name = digits.lower().replace(" ", "_")
        if name not in PROFESSIONS:
            known = f"0..{len(PROFESSIONS) - 1} or one of {', '.join(PROFESSIONS)}"
            raise UserError(f"{where}: profession must be {known}, got {value!r:.60}")
        return name
