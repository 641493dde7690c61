"""The papers' three architectures by name; every other one is a plain causal or masked reasoner."""

from typing import ClassVar, final

from transformers import PreTrainedModel

from tensorllm.evaluation.scorer import is_masked
from tensorllm.lightning.reasoner import CausalReasoner, MaskedReasoner, Reasoner


@final
class GPTJReasoner(CausalReasoner):
    """GPT-J (EleutherAI/gpt-j-6b)."""

    model_type: ClassVar[str] = "gptj"


@final
class LlamaReasoner(CausalReasoner):
    """LLaMA (meta-llama/Llama-2-7b-hf)."""

    model_type: ClassVar[str] = "llama"


@final
class RobertaReasoner(MaskedReasoner):
    """RoBERTa (FacebookAI/roberta-base)."""

    model_type: ClassVar[str] = "roberta"


def reasoner_of(model: PreTrainedModel) -> type[Reasoner]:
    """The class that fits a model."""
    named = {c.model_type: c for c in (GPTJReasoner, LlamaReasoner, RobertaReasoner)}
    general = MaskedReasoner if is_masked(model) else CausalReasoner
    return named.get(model.config.model_type, general)
