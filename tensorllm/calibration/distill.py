"""A short training of the factors only, towards the original's predictions on a text.

Shapes: B sequences, T positions, N tokens of a batch, V vocabulary, I and D of a role matrix.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from tensorllm.calibration.sequences import Batch, Calibration
from tensorllm.compressors.layer import Site
from tensorllm.compressors.steps import mean_size, warmed_up
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.progress import Progress, quiet, silenced
from tensorllm.runtime import Placement, install, module_for
from tensorllm.tensors.factors import Factors
from tensorllm.weights import dense_matrices

# Relative to a parameter's mean size, divided by the root of the model's width: the wider the
# model, the more of Adam's equal steps add up in an output (Yang et al. 2022, arXiv 2203.03466).
LEARNING_RATE = 3e-3
TOKENS = 1024  # padded positions per step


class Distiller(LightningModule):
    """The factors as parameters; the model itself is frozen and not part of this module.

    The loss of a step is the Kullback-Leibler divergence, per token, of the compressed model's
    predictions from the original's.
    """

    def __init__(
        self, model: nn.Module, roles: RoleMatrices, factors: Mapping[Site, Factors], steps: int
    ) -> None:
        super().__init__()
        student, self.placed = student_of(model, roles, factors)
        self._held = (model, student)  # in a tuple: Lightning must neither move nor train them
        self.roles, self.steps = roles, steps
        self.start = dict(factors)
        self.numbers = nn.ParameterList(
            nn.Parameter(t.clone())
            for each in factors.values()
            for t in each.tensors().values()
            if t.is_floating_point()
        )

    def factors(self) -> dict[Site, Factors]:
        """The factors in their current state."""
        numbers, out = iter(self.numbers), {}
        for site, each in self.start.items():
            now = {
                name: next(numbers) if t.is_floating_point() else t.to(self.device)
                for name, t in each.tensors().items()
            }
            out[site] = type(each).from_tensors(now)
        return out

    def weights(self) -> dict[str, Tensor]:
        """The student's parameters that come from the factors, with gradients."""
        factors = self.factors()
        return self._placed(factors) if self.placed else self._dense(factors)

    def _placed(self, factors: Mapping[Site, Factors]) -> dict[str, Tensor]:
        """The tensors of the factors, as the student's modules hold them."""
        held = parameters_of(self._held[1])
        stored = {site.name: each.tensors() for site, each in factors.items()}
        out: dict[str, Tensor] = {}
        for place in (place for place in self.placed if place.site):
            t = stored[place.site][place.tensor]
            if t.is_floating_point():
                turned = t if place.order is None else t.permute(place.order)
                out[place.parameter] = turned.to(held[place.parameter].dtype)
        return out

    def _dense(self, factors: Mapping[Site, Factors]) -> dict[str, Tensor]:
        """The dense matrices that the factors stand for."""
        held = parameters_of(self._held[1])
        out: dict[str, Tensor] = {}
        for site, each in factors.items():
            parts = dense_matrices(site, each, self.roles)
            for (layer, role), w_ID in zip(site.matrices, parts, strict=True):
                name = self.roles.name(layer, role)
                if name not in out:  # a fused parameter is written part by part
                    out[name] = held[name].clone()
                self.roles.write(out, layer, role, w_ID)
        return out

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        """The batch unchanged; a step moves what it needs."""
        return batch

    def training_step(self, batch: Batch, index: int) -> Tensor:
        model, student = self._held
        inputs = {
            "input_ids": batch.ids_BT.to(self.device),
            "attention_mask": batch.mask_BT.long().to(self.device),
        }
        with torch.no_grad():
            wanted = batch.tokens(model(**inputs).logits).float().log_softmax(-1)
        out: Any = functional_call(student, self.weights(), kwargs=inputs)
        found = batch.tokens(out.logits).float().log_softmax(-1)
        return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def configure_optimizers(self) -> Any:
        rate = LEARNING_RATE / self.roles.spec.geometry(0).D ** 0.5
        groups = [{"params": [p], "lr": rate * mean_size(p)} for p in self.numbers]
        optimizer = torch.optim.Adam(groups)
        share = partial(warmed_up, steps=self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def student_of(
    model: nn.Module, roles: RoleMatrices, factors: Mapping[Site, Factors]
) -> tuple[nn.Module, Sequence[Placement]]:
    """The model to train: it runs on the factors, and shares all other parameters with `model`.

    Otherwise every dense matrix and its gradient would be formed at each step.

    Returns:
        The student, and where the factors' tensors are placed in it; `model` and nothing if some
        factors cannot run as they are.
    """
    if not all(module_for(*each) for each in factors.items()):
        return model, ()
    weights = parameters_of(model)
    placed = []
    for site, each in factors.items():
        stored = weights[roles.name(*site.matrices[0])]
        own = {
            name: t.to(stored.device, stored.dtype if t.is_floating_point() else t.dtype, copy=True)
            for name, t in each.tensors().items()
        }
        placed.append((site, type(each).from_tensors(own)))
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    student = copy.deepcopy(model, shared)
    return student, install(student, placed)


class _Steps(Callback):
    """Reports each step as progress."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self.steps, self.progress = steps, progress

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.progress(0, self.steps, "distilling")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.progress(trainer.global_step, self.steps, "distilling")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes on devices and its advice about loggers and loaders."""
    name = "lightning.pytorch.utilities.rank_zero"
    with silenced(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield


def distill(
    model: nn.Module,
    roles: RoleMatrices,
    factors: Mapping[Site, Factors],
    text: Calibration,
    steps: int,
    progress: Progress = quiet,
) -> dict[Site, Factors]:
    """The factors after some steps of training, with unchanged shapes.

    Args:
        model: the original, frozen; it is the teacher.
        roles: of the model.
        factors: to start from.
        text: to train on.
        steps: of the optimiser.
        progress: called with (steps done, steps, what is done).
    """
    device = next(model.parameters()).device
    trained = Distiller(model, roles, factors, steps)
    draws = torch.Generator().manual_seed(text.seed)
    batches: Any = text.batches(TOKENS)
    loader: Any = DataLoader(batches, batch_size=None, shuffle=True, generator=draws)
    with _quiet():
        trainer = Trainer(
            max_steps=steps,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[_Steps(steps, progress)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(trained, loader)
    return {
        site: type(now).from_tensors({n: x.detach().cpu() for n, x in now.tensors().items()})
        for site, now in trained.factors().items()
    }
