"""Choose the demo's recipes on its first 20 % of questions: `python scripts/select_demo.py`.

Independent of the library's own decomposition (tensorly does it here), so that it can be held
against it. Prints accuracy (per cent) and loss on the validation part, by which the choice is made,
and on the rest.
Shapes: D model width, K head width, M = 4 matrices, H heads, N questions, T tokens.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM

from tensorllm.data.demo import MODEL_DIR, Question, questions

RANKS = [
    (r1, r2, r3)
    for r1, r2, r3 in itertools.product((16, 32, 64, 96, 128), (8, 16, 24, 32), (1, 2, 3, 4))
    if r1 <= r2 * r3 * 4  # 4 heads: beyond this a rank cannot be reached
]
MATRICES = {"in": "fc_in", "out": "fc_out"}
FFN_RANKS = (1, 2, 4, 8, 16, 32, 64)
LASERS_IN_HYBRID = 2  # the best of them, with every Tucker of every layer


class Asked(NamedTuple):
    """Questions of one prompt length and one set of choices, as token ids."""

    prompt_NT: Tensor
    answer_N: Tensor
    choices_C: Tensor


class Score(NamedTuple):
    """Accuracy in per cent and mean loss in nats per answer."""

    accuracy: float
    loss: float

    def __str__(self) -> str:
        return f"{self.accuracy:5.1f} % loss {self.loss:.3f}"


Edit = tuple[nn.Linear, Tensor]


def ask(asked: list[Question], tokenizer: Any) -> list[Asked]:
    """Token ids, grouped so that nothing is padded."""
    groups: dict[tuple[int, tuple[str, ...]], list[tuple[list[int], int]]] = {}
    for one in asked:
        ids = tokenizer(one.prompt)["input_ids"]
        answer = tokenizer.convert_tokens_to_ids(one.answer)
        groups.setdefault((len(ids), one.choices), []).append((ids, answer))
    return [
        Asked(
            *map(torch.tensor, zip(*rows, strict=True)),
            torch.tensor([tokenizer.convert_tokens_to_ids(c) for c in choices], dtype=torch.long),
        )
        for (_, choices), rows in groups.items()
    ]


@torch.inference_mode()
def score(model: GPTJForCausalLM, asked: list[Asked]) -> Score:
    """Open questions: the likeliest word of all. Choices: the likeliest of them."""
    right, nats, count = 0, 0.0, 0
    for prompt_NT, answer_N, choices_C in asked:
        logits_NV = model(prompt_NT, logits_to_keep=1, use_cache=False).logits[:, -1]
        best_N = logits_NV.argmax(-1)
        if len(choices_C):
            best_N = choices_C[logits_NV[:, choices_C].argmax(-1)]
        right += int((best_N == answer_N).sum())
        nats += nn.functional.cross_entropy(logits_NV, answer_N, reduction="sum").item()
        count += len(answer_N)
    return Score(100 * right / count, nats / count)


@contextmanager
def edited(edits: list[Edit]) -> Iterator[None]:
    """The model with other weights, for a while."""
    before = [linear.weight.data for linear, _ in edits]
    for linear, weight in edits:
        linear.weight.data = weight
    yield
    for (linear, _), weight in zip(edits, before, strict=True):
        linear.weight.data = weight


def tucker_edits(attention: nn.Module, heads: int, ranks: tuple[int, int, int]) -> list[Edit]:
    """The four attention matrices after a partial Tucker decomposition in the paper's layout."""
    projections: list[Any] = [attention.q_proj, attention.k_proj, attention.v_proj]
    out: Any = attention.out_proj
    width = out.weight.shape[0]
    slices = [p.weight.data.T for p in projections] + [out.weight.data]
    w_DKMH = torch.stack([s.reshape(width, heads, -1) for s in slices], 2).permute(0, 3, 2, 1)
    with tensorly.backend_context("pytorch"):
        tucker, _ = partial_tucker(w_DKMH, list(ranks), modes=[0, 1, 2], init="svd", n_iter_max=3)
        w_DKMH = tensorly.tenalg.multi_mode_dot(*tucker, modes=[0, 1, 2])
    near = w_DKMH.permute(2, 0, 3, 1).reshape(4, width, -1).contiguous()
    return [*zip(projections, (n.T.contiguous() for n in near[:3]), strict=True), (out, near[3])]


def laser_edits(linear: nn.Linear, rank: int) -> list[Edit]:
    """One matrix after truncation to `rank`."""
    u, s, v = torch.linalg.svd(linear.weight.data, full_matrices=False)
    return [(linear, u[:, :rank] * s[:rank] @ v[:rank])]


def search(model: GPTJForCausalLM, chosen_on: list[Asked]) -> dict[str, dict[Any, list[Edit]]]:
    """For each mode all that was tried, the best on validation first."""

    def ranked(tried: dict[Any, list[Edit]]) -> dict[Any, list[Edit]]:
        scores = {}
        for name, edits in tried.items():
            with edited(edits):
                scores[name] = score(model, chosen_on)
        order = sorted(tried, key=lambda n: (-scores[n].accuracy, scores[n].loss))
        return {name: tried[name] for name in order}

    layers = list(enumerate(model.transformer.h))
    heads = model.config.n_head
    tucker = ranked({(i, r): tucker_edits(h.attn, heads, r) for i, h in layers for r in RANKS})
    laser = ranked(
        {
            (i, name, r): laser_edits(getattr(h.mlp, MATRICES[name]), r)
            for i, h in layers
            for name in MATRICES
            for r in FFN_RANKS
        }
    )
    best = list(laser)[:LASERS_IN_HYBRID]
    together = {(t, f): edits + laser[f] for t, edits in tucker.items() for f in best}
    return {"shared-tucker": tucker, "laser": laser, "hybrid": ranked(together)}


def main() -> None:
    """Search on the first 20 %, report on both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--people", type=int)
    options = parser.parse_args()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    known = questions(options.people) if options.people else questions()
    cut = len(known) // 5
    parts = [known[:cut], known[cut:]]
    tasks = ["all", *dict.fromkeys(one.task for one in known)]

    def line(name: object, edits: list[Edit]) -> None:
        with edited(edits):
            print(f"{name}")
            for task in tasks if len(tasks) > 2 else tasks[:1]:
                kept = [[q for q in p if task in ("all", q.task)] for p in parts]
                val, test = (score(model, ask(part, tokenizer)) for part in kept)
                print(f"    {task:16} validation {val}, test {test}")

    line("original", [])
    for mode, tried in search(model, ask(parts[0], tokenizer)).items():
        for name in list(tried)[:3]:
            line(f"{mode} {name}", tried[name])
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
