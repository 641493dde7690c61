"""A model, perhaps compressed, that answers questions: `trainer.validate(module, datamodule)`."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.compression.engine import compress
from tensorllm.compressors.base import Compressor
from tensorllm.data.base import ReasoningDataModule
from tensorllm.errors import UserError
from tensorllm.evaluation.parallel import grouped, score_all, workers_for
from tensorllm.evaluation.protocol import STRICT, Protocol
from tensorllm.evaluation.row import Row
from tensorllm.evaluation.scorer import Scorer, context_of, is_masked, make_scorer
from tensorllm.evaluation.summary import columns
from tensorllm.metrics import answer_metrics


class Reasoner(LightningModule):
    """Evaluates a model; logs every metric of `tensorllm.metrics` when an epoch of validation or
    test ends.

    Args:
        model: a transformers model, or what loads one: then each device's process loads its own.
        tokenizer: its tokenizer.
        compressor: applied to the model before the first batch.
        layers: which layers it edits; all by default.
        protocol: what counts as a right answer.
        batch_tokens: how many tokens a batch may have; None: what suits the device.
        on_rows: called with the rows of each finished batch.
    """

    model: PreTrainedModel
    masked: ClassVar[bool]  # whether it fills masks in, or predicts the next token
    model_type: ClassVar[str | None] = None  # of one architecture only

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        compressor: Compressor | None = None,
        layers: Sequence[int] | None = None,
        protocol: Protocol = STRICT,
        *,
        batch_tokens: int | None = None,
        on_rows: Callable[[list[Row]], None] | None = None,
    ) -> None:
        super().__init__()
        self._load: Callable[[], PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self._check(model)
            self.model = model
        else:
            self._load = model
        self.tokenizer = tokenizer
        self.compressor = compressor
        self.layers = layers
        self.protocol = protocol
        self.batch_tokens = batch_tokens
        self.on_rows = on_rows
        self.metrics = answer_metrics()
        self._scorer: Scorer | None = None
        self._workers = 1

    def _check(self, model: PreTrainedModel) -> None:
        """Raise UserError for a model of another kind."""
        found = model.config.model_type
        if self.model_type not in (None, found):
            raise UserError(f"a model of type {self.model_type!r} is needed, got {found!r}")
        if is_masked(model) != self.masked:
            kind = "masked" if self.masked else "causal"
            raise UserError(f"a {kind} model is needed, got {type(model).__name__}")

    def configure_model(self) -> None:
        """Load, compress, and plan the batches; once, however often Lightning calls it."""
        if self._load is not None:
            loaded = self._load()
            self._check(loaded)
            self.model, self._load = loaded, None
        if self.compressor is not None:
            compress(self.model, self.compressor, self.layers)
            self.compressor = None
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReasoningDataModule):
            raise UserError(f"validation needs a ReasoningDataModule, got {type(data).__name__}")
        context = context_of(self.model.config, self.tokenizer)
        data.connect(self.tokenizer, masked=is_masked(self.model), context=context)
        self._scorer = make_scorer(
            self.model,
            self.tokenizer,
            protocol=self.protocol,
            max_new_tokens=data.max_new_tokens,
            batch_tokens=self.batch_tokens,
        )
        plan, self._workers = self._scorer.plan, workers_for(self.model)
        data.plan_with(lambda examples: grouped(plan(examples), self._workers))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self._scorer is not None, "Lightning calls configure_model first"
        if batch is None:
            return  # another device has one batch more
        for rows in score_all(self._scorer, batch, self._workers):
            self._keep(rows)

    def _keep(self, rows: list[Row]) -> None:
        self.metrics.update(**{k: v.to(self.device) for k, v in columns(rows).items()})
        if self.on_rows is not None:
            self.on_rows(rows)

    def on_validation_epoch_end(self) -> None:
        values = {name: value.float() for name, value in self.metrics.compute().items()}
        self.log_dict({name: value for name, value in values.items() if not value.isnan()})
        self.metrics.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


class CausalReasoner(Reasoner):
    """A model that predicts the next token."""

    masked: ClassVar[bool] = False


class MaskedReasoner(Reasoner):
    """A model that fills masks in."""

    masked: ClassVar[bool] = True
