"""LightningModules that evaluate: causal and masked behaviour, a thin final class per
architecture.
"""

from tensorllm.modules.architectures import (
    GPTJReasoner,
    LlamaReasoner,
    RobertaReasoner,
    reasoner_of,
)
from tensorllm.modules.reasoner import CausalReasoner, MaskedReasoner, Reasoner

__all__ = [
    "CausalReasoner",
    "GPTJReasoner",
    "LlamaReasoner",
    "MaskedReasoner",
    "Reasoner",
    "RobertaReasoner",
    "reasoner_of",
]
