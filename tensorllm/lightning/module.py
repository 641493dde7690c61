"""A LightningModule that scores any model, perhaps compressed, on questions.

`trainer.validate(module, data)`, `trainer.test(module, data)`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.checkpoint.loader import Loader, dtype_of
from tensorllm.checkpoint.source import resolve
from tensorllm.compression.engine import compress
from tensorllm.compressors.base import Compressor
from tensorllm.compressors.settings import settings_of
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import PROTOCOLS, STRICT, Protocol
from tensorllm.evaluation.scorer import (
    Scorer,
    context_of,
    grouped,
    is_masked,
    make_scorer,
    score_all,
    workers_for,
)
from tensorllm.evaluation.totals import update
from tensorllm.metrics import answer_metrics


class ReasoningModule(LightningModule):
    """Scores a model on a `ReasoningDataModule`; logs every metric of `tensorllm.metrics`.

    One class serves all architectures: their differences are data (`tensorllm.models`), and the
    model itself tells whether it is a masked one. A step returns
    `{"predictions": [Prediction, ...]}`, which callbacks get as `outputs`.

    Args:
        model: a transformers model, or a function that loads one, for each device's process.
        tokenizer: its tokenizer.
        compressor: applied to the model before the first batch.
        layers: which layers it edits; all by default.
        protocol: decides which answers are right, or its name.
        batch_tokens: the most tokens of a batch; None: what suits the device.
        prefix: of the names of logged metrics.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        compressor: Compressor | None = None,
        layers: Sequence[int] | None = None,
        protocol: str | Protocol = STRICT,
        *,
        batch_tokens: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self._load: Callable[[], PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self.model = model
        else:
            self._load = model
        self.tokenizer = tokenizer
        self.compressor = compressor
        self.layers = layers
        self.protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
        self.batch_tokens = batch_tokens
        self.prefix = prefix
        self.metrics = answer_metrics()
        self._predictions: list[Prediction] = []
        self._scorer: Scorer | None = None
        self._workers = 1
        self.save_hyperparameters(_hyperparameters(self))

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: str | None = None, **options: Any
    ) -> "ReasoningModule":
        """The module of a model given by short name, hub id or folder (also a compressed one).

        Args:
            dtype: of the weights, such as bf16; None: as they are stored.
            options: those of the class.
        """
        loader = Loader(resolve(str(model)).folder, dtype_of(dtype))
        return cls(loader, loader.tokenizer(), **options)

    def setup(self, stage: str) -> None:
        """Reset after a run that was interrupted: Lightning calls no teardown after an error."""
        self._predictions = []
        self.metrics.reset()

    def configure_model(self) -> None:
        """Load and compress the model, once, and set how the data is batched."""
        if self._load is not None:
            self.model, self._load = self._load(), None
        if self.compressor is not None:
            compress(self.model, self.compressor, self.layers)
            self.compressor = None
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReasoningDataModule):
            raise UserError(
                f"a ReasoningModule needs a ReasoningDataModule, got {type(data).__name__}: "
                "trainer.test(module, datamodule=data)"
            )
        context = context_of(self.model.config, self.tokenizer)
        data.connect(self.tokenizer, masked=is_masked(self.model), context=context)
        data.plan_with(lambda examples: self._plan(examples, data.max_new_tokens))

    def _plan(self, examples: Sequence[Example], max_new_tokens: int) -> list[Sequence[Any]]:
        """Groups of batches: one batch for each worker."""
        device = self.trainer.strategy.root_device  # the Trainer moves the model there
        self._scorer = make_scorer(
            self.model,
            self.tokenizer,
            protocol=self.protocol,
            max_new_tokens=max_new_tokens,
            batch_tokens=self.batch_tokens,
            device=device,
        )
        self._workers = workers_for(self.model, device)
        return grouped(self._scorer.plan(examples), self._workers)

    def add_predictions(self, predictions: Sequence[Prediction]) -> None:
        """Count predictions of an earlier, interrupted run in this run's metrics."""
        self._predictions += predictions

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, list[Prediction]]:
        return self._step(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, list[Prediction]]:
        return self._step(batch)

    def _step(self, batch: Any) -> dict[str, list[Prediction]]:
        if batch is None:  # another process has one batch more
            return {"predictions": []}
        assert self._scorer is not None, "the data module makes its batches by `_plan`"
        workers = min(self._workers, workers_for(self.model))  # one under autocast
        new = [p for scored in score_all(self._scorer, list(batch), workers) for p in scored]
        self._predictions += new
        return {"predictions": new}

    def on_validation_epoch_end(self) -> None:
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        self._log_metrics()

    def _log_metrics(self) -> None:
        update(self.metrics, self._predictions)
        self._predictions = []
        values = self.metrics.compute()  # over all processes; kept until Lightning resets them
        for name, metric in self.metrics.items():
            if not values[name].isnan():  # running text has no accuracy
                self.log(self.prefix + name, metric)

    def teardown(self, stage: str) -> None:
        self._scorer = None


def _hyperparameters(module: ReasoningModule) -> dict[str, Any]:
    """What identifies a run, for its logger."""
    named: dict[str, Any] = {"protocol": module.protocol.name}
    if module.compressor is not None:
        mode, settings = settings_of(module.compressor)
        named |= {"mode": mode, "layers": module.layers and list(module.layers), **settings}
    return named
