"""All datasets of tensorllm; importing this module registers them."""

from tensorllm.data.base import DATASETS, ReasoningDataModule
from tensorllm.data.bios_profession import BiosProfession
from tensorllm.data.demo_world import DemoWorld
from tensorllm.data.example import Example
from tensorllm.data.fever import Fever
from tensorllm.data.hotpotqa import HotpotQA
from tensorllm.data.questions import Questions
from tensorllm.data.text import Text
from tensorllm.data.wikidata_qa import WikidataQA

__all__ = [
    "DATASETS",
    "BiosProfession",
    "DemoWorld",
    "Example",
    "Fever",
    "HotpotQA",
    "Questions",
    "ReasoningDataModule",
    "Text",
    "WikidataQA",
]
