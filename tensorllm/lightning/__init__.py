"""LightningModules that evaluate: causal and masked behaviour, a thin final class per
architecture.
"""

from tensorllm.lightning.architectures import (
    GPTJReasoner,
    LlamaReasoner,
    RobertaReasoner,
    reasoner_of,
)
from tensorllm.lightning.reasoner import CausalReasoner, MaskedReasoner, Reasoner

__all__ = [
    "CausalReasoner",
    "GPTJReasoner",
    "LlamaReasoner",
    "MaskedReasoner",
    "Reasoner",
    "RobertaReasoner",
    "reasoner_of",
]
