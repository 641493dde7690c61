"""Fixtures of all tests: real data where it lies beside the repository, tiny random models.

Set before anything imports torch or transformers: one thread per test process, and no network.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

ROOT = Path(__file__).parents[1]
MASKED = {"roberta", "bert", "distilbert"}
TINY = {  # sizes under the names that the families of configs use; each config takes its own
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
# What tests make of these: a special token that is not in a vocabulary of 101 warns on every use.
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
TINY_OF: dict[str, dict[str, object]] = {  # what a model type needs beside TINY
    "gptj": {"rotary_dim": 4},
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16},
    "gemma3_text": {**GROUPED, "head_dim": 16},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "distilbert": {"hidden_dim": 64},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real models and data that are not in the repository; its tests skip where it is absent."""
    folder = Path(os.environ.get("TENSORLLM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set TENSORLLM_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def tinystories(shared_dir: Path) -> Path:
    """A really trained LLaMA of 656 thousand parameters, as a local Hugging Face folder."""
    folder = shared_dir / "models" / "tinystories-656K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return folder


@pytest.fixture
def make_tiny() -> Callable[..., PreTrainedModel]:
    """`make_tiny(model_type, seed=0, **config)`: a tiny random transformers model.

    `config` overrides or adds fields of the architecture's own config class.
    """

    def make(model_type: str, seed: int = 0, **config: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        sizes = {**TINY, **TOKENS, **TINY_OF.get(model_type, {}), **config}
        made = AutoConfig.for_model(model_type, **sizes)
        auto = AutoModelForMaskedLM if model_type in MASKED else AutoModelForCausalLM
        return auto.from_config(made, dtype=torch.float32).eval()

    return make
