"""Check a model's logits while it generates.

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
        """Return the scores (B, V) that follow tokens (B, T) unchanged.

        Raises:
            UserError: one is NaN.
        """
        if bool(scores.isnan().any()):
            raise UserError(f"the model's scores of the next token are NaN: {CAUSE}")
        return scores


def refuse_nan() -> LogitsProcessorList:
    """For `generate`: stop with a UserError if the model's scores are NaN."""
    return LogitsProcessorList([_Refused()])
