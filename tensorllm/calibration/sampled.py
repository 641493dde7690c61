"""A calibration set written by the model itself.

Shapes: B sequences of a batch, T their length so far, at most.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, StoppingCriteriaList

from tensorllm.calibration.sequences import Calibration
from tensorllm.errors import UserError
from tensorllm.models.scores import refuse_nan
from tensorllm.models.task import context_length, is_masked, text_config_of
from tensorllm.progress import Progress, quiet, silenced

BATCH = 32  # sequences generated at once


def sampled_text(
    model: PreTrainedModel,
    *,
    sequences: int = 96,
    length: int = 512,
    seed: int = 0,
    progress: Progress = quiet,
) -> Calibration:
    """Sequences sampled from the model at temperature 1, each from a uniformly drawn first token.

    A short text shows few of the inputs that a matrix will meet; the model's own samples show more.
    The end-of-text token is treated like any other, so documents follow one another.

    Source: LLM-QAT (arXiv 2305.17888), section 3.1; for pruning, Williams et al. (arXiv
    2410.17170).

    Args:
        model: a causal language model.
        sequences: how many.
        length: tokens of each, at most the model's context.
        seed: of the sampling.
        progress: called with (tokens written, tokens in all, what is done).

    Raises:
        UserError: numbers out of range, a masked language model, or NaN scores.
    """
    check_sample(model.config, sequences, length)
    written: list[tuple[int, ...]] = []

    def report(ids_BT: Tensor, scores: Any) -> Tensor:
        progress(len(written) * length + ids_BT.numel(), sequences * length, "writing")
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)  # never stop

    with torch.random.fork_rng(), silenced("transformers.generation"):
        torch.manual_seed(seed)
        first_N1 = torch.randint(text_config_of(model.config).vocab_size, (sequences, 1))
        for first_B1 in first_N1.to(model.device).split(BATCH):
            written += map(tuple, _continued(model, first_B1, length, report).tolist())
    return Calibration(tuple(written), source="sampled", seed=seed)


def check_sample(config: PretrainedConfig, sequences: int, length: int) -> None:
    """Refuse what `sampled_text` cannot write, by the model's config."""
    if sequences < 1 or length < 2:
        raise UserError(
            f"a sample is 1 or more sequences of 2 or more tokens, got {sequences} × {length}"
        )
    if is_masked(config):
        raise UserError("the model fills masks and writes no text; a causal model is needed")
    context = context_length(config)
    if context is not None and length > context:
        raise UserError(f"a sequence has at most the model's {context} tokens, got {length}")


def _continued(
    model: PreTrainedModel, first_B1: Tensor, length: int, report: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """(B, T): the first tokens and what the model samples after them, whatever its own settings.

    Args:
        report: a stopping criterion, called after each token.
    """
    generate: Any = model.generate
    ids_BT: Tensor = generate(
        first_B1,
        attention_mask=torch.ones_like(first_B1),
        max_new_tokens=length - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        num_return_sequences=1,
        stop_strings=None,
        eos_token_id=-1,  # no end token: continue after a document's end
        pad_token_id=0,  # unused: all have the same length
        logits_processor=refuse_nan(),
        stopping_criteria=StoppingCriteriaList([report]),
    )
    return ids_BT
