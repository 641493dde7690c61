"""The model that `search.py` searches: random weights, yet ranks matter for its answers.

Shapes: D model width, K head width, M = 4 matrices, H heads; N questions.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GPTJConfig, GPTJForCausalLM

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.data.base import ReasoningDataModule
from tensorllm.evaluation.scorer import make_scorer
from tensorllm.tensors.stacking import ATTENTION, STACKINGS

MARGIN = 2.0  # nats between the right and the best wrong choice
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
        w_DKMH = stacking.stack([roles.read(weights, layer, r) for r in ATTENTION], roles.geometry)
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
    found = STACKINGS["heads"].unstack(w_DKMH, roles.geometry, len(ATTENTION))
    for role, w_ID in zip(ATTENTION, found, strict=True):
        roles.write(weights, layer, role, w_ID)


@torch.inference_mode()
def fit_readout(model: GPTJForCausalLM, tokenizer: Any, data: ReasoningDataModule) -> None:
    """Make the first choice's first token tell right from wrong answers, by least squares.

    A random model answers every question alike, whatever is edited: nothing would be to be found.
    """
    scorer = make_scorer(model, tokenizer)
    rows = [row for batch in scorer.plan(data.examples) for row in scorer.score(batch)]
    rows.sort(key=lambda row: row.index)
    prompt, choices = data.examples[0].prompt, data.examples[0].choices
    first = choices[0]
    gaps, wanted, states = [], [], []
    for example, row in zip(data.examples, rows, strict=True):
        if example.choices != choices or row.choice_log_probabilities is None:
            continue
        one, *others = row.choice_log_probabilities
        gaps.append(one - max(others))
        wanted.append(MARGIN if example.answer == first else -MARGIN)
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        states.append(model.transformer(ids).last_hidden_state[0, -1])
    h_ND, target_N = torch.stack(states).double(), torch.tensor(wanted) - torch.tensor(gaps)
    token = tokenizer(f"{prompt} {first}")["input_ids"][len(tokenizer(prompt)["input_ids"])]
    found_D1 = torch.linalg.lstsq(h_ND, target_N.double()[:, None], driver="gelsd").solution
    model.lm_head.weight[token] += found_D1[:, 0].float()
