"""Covariances of the inputs of matrices, and of the gradients at their outputs.

Shapes: B sequences, T positions, D model width, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.covariances import Covariances, Key, Wanted
from tensorllm.calibration.hooks import CovarianceHooks
from tensorllm.calibration.layers import Layers
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.calibration.sequences import Batch
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.evaluating import evaluating
from tensorllm.progress import Progress, quiet

# Tokens per unit of the model's width on which sizes are chosen, and on which gradients are taken;
# but at least half of the text, and half of that half. Fits use all of the text.
MEASURED_TOKENS, GRADIENT_TOKENS = 2, 2


def measure_loss(
    model: nn.Module,
    roles: RoleMatrices,
    keys: Sequence[Key],
    batches: Sequence[Batch],
    wanted: Wanted,
    *,
    seed: int = 0,
    spill: Path | None = None,
    progress: Progress = quiet,
    ranks: Ranks = ALONE,
) -> Covariances:
    """Covariances with gradients of the loss: one pass forward and backward of the whole model.

    Labels are sampled from the model's own predictions (seeded), so that the gradients' covariance
    is the Fisher information and no labels are needed (Martens and Grosse, arXiv 1503.05671).

    Args:
        model: with its language-model head.
        roles: of the model.
        keys: layers, and roles of each that read the same input.
        batches: the text.
        wanted: which covariances.
        seed: of the labels.
        spill: a folder for the covariances, as memory-mapped files; None: in memory.
        progress: called with (batches done, batches, what is done).
        ranks: the processes of the fit.

    Raises:
        UserError: activations that are not finite; the message names the module and the batch.
    """
    runner: Any = model
    draws = torch.Generator().manual_seed(seed + 104729 * ranks.rank)
    device = next(model.parameters()).device
    hooks = CovarianceHooks(model, roles, keys, wanted, spill, ranks=ranks)
    with hooks, _embeddings_need_gradients(model):
        for number, batch in enumerate(batches):
            progress(number, len(batches), "measuring")
            hooks.begin(number, batch)
            mask = batch.mask_BT.long().to(device)
            out = runner(input_ids=batch.ids_BT.to(device), attention_mask=mask)
            _sampled_loss(out, batch, draws).backward()
            hooks.add_gradients()
        return hooks.covariances()


class Measurement:
    """One layer run on the calibration set; iterating gives its outputs while it is measured.

    Gradients are those of the layer's own output, from a backward pass through this layer only: of
    the product of the output with a random vector per token (seeded), scaled by the inverse of the
    output's norm. So an error is weighted by the squared change of the layer's output relative to
    its norm, as seen by the norm before the next layer. This includes all interactions: Q with K in
    the scores, V with O in the sum, and the FFN's matrices with each other. Gradients are taken on
    a sample of the batches.

    Args:
        layers: how layers are run.
        layer: number of the layer.
        block: its module.
        keys: the layer, and its roles that read the same input.
        hidden: states (B, T, D) before the layer, one per batch.
        wanted: which covariances.
        seed: of the random vectors.
        ranks: the processes of the fit.
    """

    def __init__(
        self,
        layers: Layers,
        layer: int,
        block: nn.Module,
        keys: Sequence[Key],
        hidden: Iterable[Tensor],
        wanted: Wanted,
        *,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.layers, self.layer, self.block, self.hidden = layers, layer, block, hidden
        model, roles = layers.source.model, layers.source.roles
        self.hooks = CovarianceHooks(model, roles, keys, wanted, ranks=ranks)
        self.wanted, self.ranks = wanted, ranks
        self.seed = seed + 7919 * layer
        self._found: Covariances | None = None

    @property
    def covariances(self) -> Covariances:
        """The covariances over all batches; runs the layer now if it was not iterated over."""
        if self._found is None:
            for _ in self:
                pass
        assert self._found is not None
        return self._found

    def __iter__(self) -> Iterator[Tensor]:
        """The hidden states (B, T, D) after the layer, batch by batch.

        Raises:
            UserError: activations that are not finite; the message names the module and the batch.
        """
        draws = torch.Generator().manual_seed(self.seed)
        calls = self.layers.calls[self.layer]
        batches = self.layers.batches[: len(calls) - self.layers.held_out]
        width = self.layers.source.roles.spec.geometry(self.layer).D
        sampled_B = sampled(batches, width, GRADIENT_TOKENS) & self.wanted.gradients
        both = zip(calls, self.hidden, strict=True)
        with self.hooks:
            for number, (call, hidden_BTD) in enumerate(islice(both, len(batches))):
                self.hooks.begin(number, batches[number], gradients=bool(sampled_B[number]))
                if not sampled_B[number]:
                    with torch.no_grad():
                        plain_BTD = call.run(self.block, hidden_BTD)
                    yield plain_BTD
                    continue
                with torch.enable_grad():
                    found_BTD = call.run(self.block, hidden_BTD.detach().requires_grad_())
                    out_BTD = found_BTD.float()
                whole = (batches[number].rows, *out_BTD.shape[1:])  # the same in any process
                random_BTD = self.ranks.rows(torch.randn(whole, generator=draws)).to(out_BTD)
                size_BT1 = out_BTD.detach().norm(dim=-1, keepdim=True).clamp(min=1e-20)
                random_BTD *= batches[number].mask_BT.to(out_BTD.device)[..., None] / size_BT1
                out_BTD.backward(random_BTD)
                self.hooks.add_gradients()
                yield found_BTD.detach()
        self._found = self.hooks.covariances()
        for call, hidden_BTD in both:
            with torch.no_grad():
                held_BTD = call.run(self.block, hidden_BTD)
            yield held_BTD


def sampled(batches: Sequence[Batch], width: int, each: int) -> Tensor:
    """A mask of the batches that form a sample of the text.

    Every other batch, or more of them if that half has fewer than `each` tokens per unit of
    `width`.
    """
    tokens = sum(batch.count for batch in batches)
    share = min(1.0, max(0.5, each * width / max(tokens, 1)))
    steps = (torch.arange(len(batches) + 1) * share).ceil()
    return torch.diff(steps) > 0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, no gradients of parameters and no dropout."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for p, value in wanted.items():
                p.requires_grad_(value)


@contextmanager
def _embeddings_need_gradients(model: Any) -> Iterator[None]:
    """Within the block, gradients flow from the embeddings' output on."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def _sampled_loss(out: Any, batch: Batch, draws: torch.Generator) -> Tensor:
    """Summed cross entropy of labels sampled from the predictions themselves."""
    if getattr(out, "logits", None) is None:
        raise UserError(
            "weighting=loss needs a model with its language-model head, got a base model"
        )
    log_p_NV = batch.tokens(out.logits).float().log_softmax(dim=-1)
    sums_NV = log_p_NV.detach().exp().cumsum(dim=-1)
    heights_N1 = torch.rand(len(sums_NV), 1, generator=draws).to(sums_NV.device) * sums_NV[:, -1:]
    drawn_N = torch.searchsorted(sums_NV, heights_N1).flatten().clamp(max=sums_NV.shape[1] - 1)
    return nn.functional.nll_loss(log_p_NV, drawn_N, reduction="sum")
