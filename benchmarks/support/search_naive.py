"""The loop that a rank search replaces: used by `search.py`.

What the authors' scripts do for every trial: decompose with tensorly, then ask one question and one
choice at a time.
"""

from typing import Any

import tensorly
import torch
from support.search_model import write_attention
from tensorly.decomposition import partial_tucker
from transformers import GPTJForCausalLM

from tensorllm.data.base import ReasoningDataModule
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.space import Point
from tensorllm.tensors.stacking import ATTENTION, STACKINGS


def naive_edit(model: GPTJForCausalLM, point: Point) -> None:
    """What the authors do: stack the heads, tensorly's partial_tucker, write back."""
    roles = RoleMatrices(model.config, parameters_of(model))
    stacking = STACKINGS["heads"]
    weights = parameters_of(model)
    for layer in point.layers:
        w = stacking.stack(
            [roles.read(weights, layer, r) for r in ATTENTION], roles.spec.geometry(0)
        )
        with tensorly.backend_context("pytorch"):
            (core, factors), _ = partial_tucker(
                w, rank=list(point.settings["ranks"]), modes=[0, 1, 2], init="svd", tol=1e-5
            )
            near = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1, 2])
        write_attention(roles, weights, layer, near)


def one_by_one(model: GPTJForCausalLM, tokenizer: Any, data: ReasoningDataModule) -> list[bool]:
    """Verdicts, one example and one choice at a time: the likeliest answer's tokens."""
    verdicts = []
    for example in data.examples:
        scores = []
        for choice in example.choices or (example.answer,):
            prompt = tokenizer(example.prompt)["input_ids"]
            whole = tokenizer(f"{example.prompt} {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            answer = range(len(prompt), len(whole))
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in answer))
        best = scores.index(max(scores))
        verdicts.append(bool(example.choices) and example.choices[best] == example.answer)
    return verdicts
