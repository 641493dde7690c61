"""Scoring with a model: plan batches, predict each, and run several batches at once.

`tensorllm.evaluation.evaluate.score` is the whole evaluation as one function; the LightningModule
and the rank search use these parts.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar
from typing import Protocol as Interface

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.data.example import Example
from tensorllm.data.tokens import check_ids
from tensorllm.errors import UserError
from tensorllm.evaluation.batching import fill, finite, halving
from tensorllm.evaluation.causal import CausalBatch, CausalScorer
from tensorllm.evaluation.encoding import Encoded, Encoder
from tensorllm.evaluation.forward import ModelForward
from tensorllm.evaluation.generation import COMPACT_BELOW, Greedy
from tensorllm.evaluation.masked import (
    MaskedEncoder,
    MaskedForward,
    MaskedItem,
    MaskedScorer,
    context_of_masked,
)
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import STRICT, Protocol, require_single_tokens
from tensorllm.models.task import context_length
from tensorllm.models.task import is_masked as fills_masks


class BatchTokens(NamedTuple):
    """Columns times rows of one batch, padding included.

    Attributes:
        read: for prompts that are only read.
        generate: for answers that are generated, one token per row at a time.
    """

    read: int
    generate: int


# A CPU is fastest while a layer's activations fit its caches.
CPU = BatchTokens(read=1536, generate=4096)
ACCELERATOR = BatchTokens(read=65536, generate=65536)


R = TypeVar("R", covariant=True)


class Scores(Interface[R]):
    """Anything that scores batches."""

    def score(self, batch: Any) -> R:
        """The result of one batch: predictions in the batch's order."""
        ...


class Scorer(Scores[list[Prediction]], Interface):
    """Plans and scores batches for one kind of model."""

    def plan(self, examples: Sequence[Example]) -> list[Any]:
        """Batches of examples; the same for every model with this tokenizer and context."""
        ...


def is_masked(model: PreTrainedModel) -> bool:
    """Whether it is a masked language model, without a causal head."""
    return fills_masks(model.config)


def make_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    protocol: Protocol = STRICT,
    max_new_tokens: int = 0,
    batch_tokens: int | None = None,
    forward: ModelForward | MaskedForward | None = None,
    stop_early: bool = True,
    compact_below: float = COMPACT_BELOW,
    device: torch.device | None = None,
) -> Scorer:
    """The scorer for this kind of model.

    Args:
        model: in eval mode, on its device.
        tokenizer: its tokenizer.
        protocol: decides which answers are right.
        max_new_tokens: the most tokens of a generated answer.
        batch_tokens: most tokens of a batch, padding and generated ones included; None: what suits
            the device.
        forward: how the model is run; None: as it is.
        stop_early: stop a generation when its verdict is certain.
        compact_below: drop finished rows from the cache once at most this share of its rows is
            still being generated.
        device: where the model will be when it scores; None: where it is.

    Raises:
        UserError: the model has no head that predicts tokens.
    """
    if model.get_output_embeddings() is None:
        raise UserError(f"a {type(model).__name__} has no head that predicts tokens")
    context = context_of(model.config, tokenizer)
    suited = CPU if (device or model.device).type == "cpu" else ACCELERATOR
    budget = BatchTokens(batch_tokens, batch_tokens) if batch_tokens else suited
    if is_masked(model):
        run = forward if isinstance(forward, MaskedForward) else MaskedForward(model)
        return MaskedModelScorer(run, tokenizer, protocol, context, budget)
    assert not isinstance(forward, MaskedForward)
    greedy = Greedy(
        forward or ModelForward(model),
        tokenizer,
        protocol,
        max_new_tokens=max_new_tokens,
        eos=eos_of(model),
        stop_early=stop_early,
        compact_below=compact_below,
    )
    encoder = Encoder(tokenizer, context, max_new_tokens)
    return CausalModelScorer(CausalScorer(greedy), encoder, budget, embedding_rows(model))


class CausalModelScorer:
    """Plans and scores batches for a causal model."""

    def __init__(
        self, scorer: CausalScorer, encoder: Encoder, budget: BatchTokens, rows: int
    ) -> None:
        self.scorer = scorer
        self.encoder = encoder
        self.budget = budget
        self.rows = rows

    def plan(self, examples: Sequence[Example]) -> list[CausalBatch]:
        items = self.encoder(examples)
        check_ids([ids for e in items for ids in (e.prompt, *e.full)], self.rows, "the dataset")
        if self.scorer.protocol.single_token_choices:
            for e in items:
                lengths = [len(ids) - e.shared for ids in e.full]
                require_single_tokens(dict(zip(e.example.choices, lengths, strict=False)))
        vocabulary = self.scorer.forward.vocabulary
        new = self.encoder.max_new_tokens

        def cost(e: Encoded) -> tuple[int, int]:
            if e.example.choices:
                extra = sum(len(ids) - e.shared for ids in e.full)
                return e.shared + extra, extra * vocabulary
            return e.length + new, (e.length - min(e.start, len(e.prompt)) + 1) * vocabulary

        kinds: dict[tuple[bool, bool], list[Encoded]] = {}
        for e in items:
            kinds.setdefault((bool(e.example.choices), bool(e.example.tokens)), []).append(e)
        together = self.scorer.protocol.unmasked_padding
        batches: list[list[Encoded]] = []
        for kind, of_kind in sorted(kinds.items()):
            generated = kind == (False, False)
            tokens = self.budget.generate if generated else self.budget.read
            batches += fill(of_kind, cost, tokens, together if generated else 1)
        return [CausalBatch(key, tuple(batch)) for key, batch in enumerate(batches)]

    def score(self, batch: CausalBatch) -> list[Prediction]:
        def part(items: Sequence[Encoded]) -> list[Prediction]:
            # A part's shape differs from the planned batch's: nothing may be kept under its key.
            whole = len(items) == len(batch.items)
            return self.scorer(CausalBatch(batch.key if whole else None, tuple(items)))

        return halving(part, batch.items)

    def side_by_side(self, batch: CausalBatch, lanes: Sequence[int]) -> dict[int, list[Prediction]]:
        """Predictions under each of the edits that the scorer's forward runs side by side.

        Raises:
            RuntimeError: among others, out of memory: fewer at once may fit.
            UserError: the loss under one of them is not finite.
        """
        rows = self.scorer.side_by_side(batch, lanes)
        return {lane: finite(of_lane) for lane, of_lane in rows.items()}


class MaskedModelScorer:
    """Plans and scores batches for a masked model."""

    def __init__(
        self,
        forward: MaskedForward,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        context: int,
        budget: BatchTokens,
    ) -> None:
        model = forward.model
        self.encoder = MaskedEncoder(tokenizer, context_of_masked(model, context), protocol)
        self.scorer = MaskedScorer(forward, tokenizer, protocol)
        self.vocabulary = model.config.get_text_config().vocab_size
        self.rows = embedding_rows(model)
        self.budget = budget

    def plan(self, examples: Sequence[Example]) -> list[list[MaskedItem]]:
        def cost(item: MaskedItem) -> tuple[int, int]:
            tokens = item.length * len(item.texts)
            return tokens, tokens * self.vocabulary

        items = self.encoder(examples)
        check_ids([t.ids for item in items for t in item.texts], self.rows, "the dataset")
        return list(fill(items, cost, self.budget.read))

    def score(self, batch: list[MaskedItem]) -> list[Prediction]:
        return halving(self.scorer, batch)


def context_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that a model can read."""
    limits = [context_length(config), tokenizer.model_max_length]
    return min(int(limit) for limit in limits if limit)


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding; the tokenizer's vocabulary may be smaller or larger."""
    table: Any = model.get_input_embeddings().weight
    return len(table)


def eos_of(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a generation."""
    config = model.generation_config
    eos = None if config is None else config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


# Small models' matrices are too small to share between cores: torch's threads would spend more
# time waiting for each other than working. So each core takes a batch of its own.
SMALL = 2**26  # parameters; with larger models one batch keeps all cores busy

T = TypeVar("T")


def workers_for(model: PreTrainedModel, device: torch.device | None = None) -> int:
    """How many batches are scored at once; `device` as in `make_scorer`."""
    # Autocast applies only to the thread that switched it on.
    if (device or model.device).type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1
    return torch.get_num_threads() if model.num_parameters() <= SMALL else 1


def score_all(scorer: Scores[T], batches: Sequence[Any], workers: int) -> Generator[T, None, None]:
    """The result of each batch, in order; if closed early, batches not yet begun are dropped."""
    if workers == 1 or len(batches) < 2:
        yield from map(scorer.score, batches)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(scorer.score, batches)
    finally:
        torch.set_num_threads(threads)


def grouped(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive items in groups of `size`."""
    return [items[at : at + size] for at in range(0, len(items), size)]
