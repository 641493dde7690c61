"""The model that `search.py` searches: random weights, yet ranks matter for its answers.

Shapes: D model width, K head width, M = 4 matrices, H heads; N questions.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GPTJConfig, GPTJForCausalLM

from tensorllm.data.base import ReasoningDataModule
from tensorllm.evaluation.scorer import make_scorer
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import ATTENTION, STACKINGS

MARGIN = 2.0  # nats between the right and the best wrong choice
RIDGE = 0.1  # of the mean of the diagonal
DECAY = (0.7, 0.7, 0.2)  # singular values of the modes D, K, M fall like rank ** -decay


def make_model(
    folder: Path, tokenizer: Any, data: ReasoningDataModule | None, seed: int, width: int
) -> None:
    """Write the model as a checkpoint, so that reloading it costs what it costs.

    Args:
        data: questions that its readout is fitted to; None: to none.
    """
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_embd=width, n_layer=12, n_head=16, n_positions=512,
        rotary_dim=16, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPTJForCausalLM(config).eval()
    let_spectra_decay(model)
    if data is not None:
        fit_readout(model, tokenizer, data)
    model.save_pretrained(folder)


@torch.no_grad()
def let_spectra_decay(model: GPTJForCausalLM) -> None:
    """Turn every layer's random attention tensor into one whose modes have decaying spectra."""
    weights, stacking = parameters_of(model), STACKINGS["heads"]
    roles = RoleMatrices(model.config, weights)
    for layer in range(roles.layers):
        w_DKMH = stacking.stack(
            [roles.read(weights, layer, r) for r in ATTENTION], roles.spec.geometry(0)
        )
        near_DKMH = w_DKMH
        for mode, decay in enumerate(DECAY):
            size = w_DKMH.shape[mode]
            basis, _ = torch.linalg.qr(torch.randn(size, size))
            shrink = (basis * torch.arange(1, size + 1) ** -decay) @ basis.T
            near_DKMH = torch.tensordot(shrink, near_DKMH, ([1], [mode])).movedim(0, mode)
        near_DKMH *= w_DKMH.norm() / near_DKMH.norm()
        write_attention(roles, weights, layer, near_DKMH)


def write_attention(
    roles: RoleMatrices, weights: dict[str, torch.Tensor], layer: int, w_DKMH: torch.Tensor
) -> None:
    """Put a stacked tensor back in place of a layer's Q, K, V and O."""
    found = STACKINGS["heads"].unstack(w_DKMH, roles.spec.geometry(0), len(ATTENTION))
    for role, w_ID in zip(ATTENTION, found, strict=True):
        roles.write(weights, layer, role, w_ID)


@torch.inference_mode()
def fit_readout(model: GPTJForCausalLM, tokenizer: Any, data: ReasoningDataModule) -> None:
    """Make the first choice's first token tell right from wrong answers, by ridge regression.

    A random model answers every question alike, whatever is edited: nothing would be to be found.
    Without the ridge the fit is exact and so sharp that every edit destroys it alike.
    """
    scorer = make_scorer(model, tokenizer)
    gaps, states, tokens = [], [], set()
    for batch in scorer.plan(data.examples):
        for item, row in zip(batch.items, scorer.score(batch), strict=True):
            first = item.example.choices[0]
            one, *others = row.choice_log_probabilities
            wanted = MARGIN if item.example.answer == first else -MARGIN
            gaps.append(wanted - (one - max(others)))
            ids = torch.tensor([item.full[0][: item.shared]])
            states.append(model.transformer(ids).last_hidden_state[0, -1])
            tokens.add(item.full[0][item.shared])
    (token,) = tokens
    h_ND, wanted_N = torch.stack(states).double(), torch.tensor(gaps).double()
    mean_D, mean = h_ND.mean(0), wanted_N.mean()
    gram_NN = (h_ND - mean_D) @ (h_ND - mean_D).T
    gram_NN += RIDGE * gram_NN.diagonal().mean() * torch.eye(len(gram_NN))
    found_D = (h_ND - mean_D).T @ torch.linalg.solve(gram_NN, wanted_N - mean)
    model.lm_head.weight[token] += found_D.float()
    model.lm_head.bias[token] += (mean - mean_D @ found_D).float()
