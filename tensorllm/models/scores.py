"""What a model says of the next token, checked while it writes.

Shapes: B texts, T tokens so far, V vocabulary.
"""

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tensorllm.errors import UserError

CAUSE = (
    "its weights hold NaN or Inf, or its activations overflow, which weights in bf16 or fp32 "
    "(--dtype) may not"
)


class _Refused(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same scores (B, V) behind tokens (B, T)."""
        if bool(scores.isnan().any()):
            raise UserError(f"the model's scores of the next token are NaN: {CAUSE}")
        return scores


def refuse_nan() -> LogitsProcessorList:
    """For `generate`: a model whose scores are NaN writes nothing (UserError)."""
    return LogitsProcessorList([_Refused()])
