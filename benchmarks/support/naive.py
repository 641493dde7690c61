"""The papers' way, independent of tensorllm.evaluation: one example at a time, everything computed
anew.

Follows LASER's scripts (github.com/pratyushasharma/laser, src/intervention_gptj_hotpot.py and
others): `generate` for the verdict, a forward pass over prompt and answer for the loss, a forward
pass per choice. No caches, no batches.
"""

import re
import string
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tensorllm.data.example import Example


@dataclass
class Verdict:
    correct: bool
    log_probability: float
    answer_tokens: int
    generation: str
    choices: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        return -self.log_probability / self.answer_tokens


def squad(text: str) -> str:
    """normalize_answer of the SQuAD evaluation script."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answered(text: str, answer: str, *, paper: bool) -> bool:
    if paper:
        return answer.strip().lower() in text.strip().lower()
    return f" {squad(answer)} " in f" {squad(text)} "


def find_answer_len(ids: list[int], prompt: str, answer: str, tokenizer: Any) -> int:
    for i in range(len(ids) - 1, -1, -1):
        if tokenizer.decode(ids[i:], clean_up_tokenization_spaces=False).strip() == answer.strip():
            return len(ids) - i
    # LASER asserts here; an answer that the tokenizer cannot spell begins where the prompt's tokens
    # end.
    same = 0
    for token, other in zip(tokenizer(prompt).input_ids, ids, strict=False):
        if token != other:
            break
        same += 1
    return len(ids) - same


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of each token but the first, given those before it."""
    logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].double()


def shortened(ids: list[int], cut: int) -> list[int]:
    return ids[:1] + ids[1 + cut :] if cut > 0 else ids


@torch.inference_mode()
def generated(
    model: Any, tokenizer: Any, e: Example, new: int, *, paper: bool = False, context: int = 10**9
) -> Verdict:
    prompt = tokenizer(e.prompt).input_ids
    full = tokenizer(f"{e.prompt} {e.answer}").input_ids
    cut = max(len(prompt) + new, len(full)) - context
    prompt, full = shortened(prompt, cut), shortened(full, cut)
    told = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
    )[0].tolist()
    text = tokenizer.decode(told[len(prompt) :], skip_special_tokens=True)
    searched = tokenizer.decode(told, skip_special_tokens=True) if paper else text
    length = find_answer_len(full, e.prompt, e.answer, tokenizer)
    log_p = log_probabilities(model, full)[-length:].sum()
    return Verdict(answered(searched, e.answer, paper=paper), float(log_p), length, text)


@cache
def one_token(tokenizer: Any, choice: str) -> int | None:
    """The choice's token after a space, where it is one: the scripts look it up beforehand."""
    plain, more = tokenizer("x").input_ids, tokenizer(f"x {choice}").input_ids
    return more[-1] if more[:-1] == plain else None


@torch.inference_mode()
def chosen(model: Any, tokenizer: Any, e: Example, *, context: int = 10**9) -> Verdict:
    tokens = [one_token(tokenizer, choice) for choice in e.choices]
    if None not in tokens:
        prompt = tokenizer(e.prompt).input_ids
        prompt = shortened(prompt, len(prompt) + 1 - context)
        last = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)[-1]
        return verdict(e, last[tokens].tolist(), [1] * len(tokens))
    full = [tokenizer(f"{e.prompt} {choice}").input_ids for choice in e.choices]
    cut = max(map(len, (*full, tokenizer(e.prompt).input_ids))) - context
    full = [shortened(ids, cut) for ids in full]
    lengths = [
        find_answer_len(f, e.prompt, c, tokenizer) for f, c in zip(full, e.choices, strict=True)
    ]
    start = min(len(f) - n for f, n in zip(full, lengths, strict=True))
    sums = [float(log_probabilities(model, f)[start - 1 :].sum()) for f in full]
    return verdict(e, sums, [len(f) - start for f in full])


def verdict(e: Example, sums: list[float], tokens: list[int]) -> Verdict:
    gold = e.choices.index(e.answer)
    best = max(s for i, s in enumerate(sums) if i != gold)
    return Verdict(sums[gold] > best, sums[gold], tokens[gold], "", tuple(sums))


def naive(
    model: Any, tokenizer: Any, e: Example, new: int, *, paper: bool = False, context: int = 10**9
) -> Verdict:
    if e.choices:
        return chosen(model, tokenizer, e, context=context)
    return generated(model, tokenizer, e, new, paper=paper, context=context)


@torch.inference_mode()
def masked(model: Any, tokenizer: Any, e: Example, *, paper: bool = False) -> Verdict:
    """LASER's intervention_roberta_*.py for one example."""
    mask = tokenizer.mask_token

    def at_masks(ids: list[int]) -> Tensor:
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return logits[torch.tensor(ids) == tokenizer.mask_token_id].double()

    def asked(n: int) -> list[int]:
        blanks = " ".join([mask] * n)
        text = e.prompt.replace(mask, blanks) if mask in e.prompt else f"{e.prompt} {blanks}"
        return tokenizer(text).input_ids

    if e.choices:
        ids = [tokenizer(f" {c}", add_special_tokens=False).input_ids for c in e.choices]
        sums = [
            float(sum(p[t] for p, t in zip(at_masks(asked(len(i))), i, strict=True))) for i in ids
        ]
        return verdict(e, sums, list(map(len, ids)))
    text = tokenizer.decode(at_masks(asked(5)).argmax(-1).tolist())
    full = tokenizer(f"{e.prompt} {e.answer}", add_special_tokens=False).input_ids
    length = find_answer_len(full, e.prompt, e.answer, tokenizer)
    gold = full[-length:]
    blank = full[:-length] + [tokenizer.mask_token_id] * length
    if not paper:
        blank = (
            tokenizer.build_inputs_with_special_tokens(blank)
            if hasattr(tokenizer, "build_inputs_with_special_tokens")
            else [tokenizer.cls_token_id, *blank, tokenizer.sep_token_id]
        )
    log_p = sum(p[t] for p, t in zip(at_masks(blank), gold, strict=True))
    return Verdict(answered(text, e.answer, paper=paper), float(log_p), length + paper, text)
