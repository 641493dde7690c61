"""`tensorllm generate`: generate text with any folder; a factored one runs as factors."""

import logging
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.checkpoint.loading import load
from tensorllm.checkpoint.manifest import factored_manifest
from tensorllm.checkpoint.source import resolve
from tensorllm.data.tokens import as_messages, check_ids, open_ended
from tensorllm.errors import UserError, first_line
from tensorllm.evaluation.forward import PAD, Padded, left_padded
from tensorllm.evaluation.scorer import context_of, embedding_rows, eos_of
from tensorllm.models.ends import Ends
from tensorllm.models.scores import refuse_nan
from tensorllm.options import refuse_idle
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins, one_of
from tensorllm.requests.others import GenerateRequest, SampleRequest
from tensorllm.runtime.cost import Cache, Policy

LOG = logging.getLogger(__name__)
COLDEST = 1e-6  # logits are divided by it, and must not overflow
MOST_BEAMS = 1000  # every one has a cache of its own


def generate(request: GenerateRequest, progress: Progress = quiet) -> list[str]:
    """The prompts with the model's continuations, one text per prompt.

    If the prompts are messages of a chat, only the answers are returned.

    Args:
        request: the model, the prompts, and how tokens are chosen.
        progress: called with (tokens generated, the most there may be, what is done).

    Raises:
        UserError: settings out of range, no tokenizer, a model that generates no text, or scores
            that are NaN.
    """
    load_plugins(request.plugins)
    _check(request)
    loader = opened(request)
    tokenizer = loader.tokenizer()
    if request.chat:
        prompts = as_messages(tokenizer, request.prompts, request.model)
    else:
        prompts = open_ended(tokenizer, request.prompts)
    if not all(prompts):
        raise UserError("a prompt must be one token or more, got none")
    read, context = max(map(len, prompts)), context_of(loader.config(), tokenizer)
    if read >= context:
        raise UserError(f"the prompt must be below the model's {context} tokens, got {read}")
    model = loaded(loader, policy=request.policy, cache=request.cache)
    check_ids(prompts, embedding_rows(model), "a prompt")
    batch = left_padded(prompts, model.device)
    most = min(request.max_new_tokens, context - read)
    if most < request.max_new_tokens:
        LOG.warning(
            "at most %d tokens are written, not %d: the model reads %d, of which the prompt has %d",
            most,
            request.max_new_tokens,
            context,
            read,
        )
    eos, ends = eos_of(model), Ends(model.generation_config.stop_strings or (), tokenizer, read)
    texts = [
        [*([] if request.chat else prompt), *_until_end(row[read:], eos, ends)]
        for prompt, row in zip(
            prompts, _continued(request, model, ends, batch, most, progress), strict=True
        )
    ]
    return [str(text) for text in tokenizer.batch_decode(texts, skip_special_tokens=True)]


def _continued(
    request: GenerateRequest, model: Any, ends: Ends, batch: Padded, most: int, progress: Progress
) -> Tensor:
    """Token ids of the prompts and of at most `most` new tokens each."""
    torch.manual_seed(request.seed)
    read = batch.ids_BT.shape[1]

    def count(ids: Tensor, scores: Any) -> Tensor:
        progress(ids.shape[1] - read, most, "writing")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never stop

    sampling = {"temperature": request.temperature, "top_p": request.top_p}
    try:
        found: Tensor = model.generate(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            max_new_tokens=most,
            num_beams=request.beams,
            num_return_sequences=1,
            do_sample=request.temperature > 0,
            pad_token_id=PAD,  # masked out before a prompt, and cut off after a text's end
            return_dict_in_generate=False,
            stop_strings=None,  # the model's own, if any, are in `ends`
            logits_processor=refuse_nan(),
            stopping_criteria=StoppingCriteriaList([count, ends]),
            **(sampling if request.temperature > 0 else {}),
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # most often its own generation settings
        raise UserError(
            f"{request.model} cannot generate, perhaps for a setting in its "
            f"generation_config.json: {first_line(error)}"
        ) from None
    return found


def opened(request: GenerateRequest | SampleRequest) -> Loader:
    """The loader of a model that writes text."""
    device = device_of(request.device)
    folder = resolve(request.model, request.revision).folder
    loader = Loader(folder, dtype_of(request.dtype), device, verify=request.verify).quickest()
    if loader.masked:
        raise UserError(f"{request.model} fills masks and writes no text; evaluate it instead")
    return loader


def loaded(loader: Loader, *, policy: Policy = "always", cache: Cache = "auto") -> Any:
    """The model on its device, as factors if it is factored."""
    if factored_manifest(loader.folder) is None:
        return loader()
    model = load(
        loader.folder, policy=policy, cache=cache, dtype=loader.dtype, verify=loader.verify
    )
    return model.to(loader.device).eval()


def _until_end(ids: Tensor, eos: frozenset[int], ends: Ends) -> list[int]:
    """The tokens (T,) up to the one that ends the text; what follows is padding."""
    tokens = ids.tolist()
    lasts = (i for i, token in enumerate(tokens) if token in eos or ends.reached(ids[: i + 1]))
    return tokens[: next(lasts, len(tokens)) + 1]


def _check(request: GenerateRequest) -> None:
    one_of("--policy", request.policy, get_args(Policy))
    one_of("--cache", request.cache, get_args(Cache))
    if not request.prompts or not all(request.prompts):
        raise UserError("give a prompt that is not empty")
    for name in ("max_new_tokens", "beams"):
        if getattr(request, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(request, name)}")
    if request.beams > MOST_BEAMS:
        raise UserError(f"beams must be in 1..{MOST_BEAMS}, got {request.beams}")
    if request.temperature != 0 and not COLDEST <= request.temperature < float("inf"):
        raise UserError(
            f"temperature must be 0, or finite and {COLDEST} or more, got {request.temperature}"
        )
    if not 0 < request.top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], got {request.top_p}")
    refuse_idle(request)
