"""Score with a masked model: the answer is what it predicts at the mask tokens.

Shapes: B texts, T tokens, V vocabulary, N masked places.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.matching import holds_answer, token_f1
from tensorllm.evaluation.predictions import Prediction, chosen_prediction
from tensorllm.evaluation.protocol import Protocol, require_single_tokens

OPEN_MASKS = 5  # masks after an open question, as in LASER's intervention_roberta_*.py


@dataclass(frozen=True, slots=True)
class MaskedText:
    """Tokens with masks, and the tokens that belong there (empty: any prediction)."""

    ids: list[int]
    places: list[int]
    gold: list[int] = field(default_factory=list)


class MaskedItem(NamedTuple):
    """One example as one or more texts.

    With choices one text per distinct choice length; without, one to answer and one for the loss.
    """

    example: Example
    texts: tuple[MaskedText, ...]
    choices: tuple[tuple[int, list[int]], ...]  # for each choice its text's index and its tokens
    truncated: int

    @property
    def length(self) -> int:
        return max(len(t.ids) for t in self.texts)


class MaskedEncoder:
    """Encodes examples as masked texts; those beyond the context lose their beginning."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, protocol: Protocol
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(
                "a masked model needs a tokenizer with a mask token, "
                f"{tokenizer.name_or_path!r} has none"
            )
        self.tokenizer = tokenizer
        self.context = context
        self.protocol = protocol
        self.mask = tokenizer.mask_token
        self._answers: dict[str, list[int]] = {}

    def __call__(self, examples: Sequence[Example]) -> list[MaskedItem]:
        return [self._choices(e) if e.choices else self._open(e) for e in examples]

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of the answer after a space."""
        if answer not in self._answers:
            ids = self.tokenizer(f" {answer}", add_special_tokens=False).input_ids
            self._answers[answer] = ids
        return self._answers[answer]

    def _choices(self, example: Example) -> MaskedItem:
        choices = [self.answer_ids(choice) for choice in example.choices]
        if self.protocol.single_token_choices:
            require_single_tokens(dict(zip(example.choices, map(len, choices), strict=True)))
        sizes = sorted({len(ids) for ids in choices})
        texts, cuts = zip(*(self._asked(example.prompt, size) for size in sizes), strict=True)
        where = tuple((sizes.index(len(ids)), ids) for ids in choices)
        return MaskedItem(example, tuple(texts), where, max(cuts))

    def _open(self, example: Example) -> MaskedItem:
        asked, cut = self._asked(example.prompt, OPEN_MASKS)
        bare = self.protocol.masked_bare_loss
        full = self.tokenizer(
            f"{example.prompt} {example.answer}", add_special_tokens=not bare, verbose=False
        ).input_ids
        special = set(self.tokenizer.all_special_ids)
        end = len(full)
        while not bare and end > 1 and full[end - 1] in special:
            end -= 1
        start = self._answer_start(full[:end], example)
        ids, cut_loss = self._fitted(
            full[:start] + [self.tokenizer.mask_token_id] * (end - start) + full[end:]
        )
        places = list(range(start - cut_loss, end - cut_loss))
        return MaskedItem(
            example, (asked, MaskedText(ids, places, full[start:end])), (), max(cut, cut_loss)
        )

    def _answer_start(self, full: list[int], example: Example) -> int:
        for start in range(len(full) - 1, 0, -1):
            if str(self.tokenizer.decode(full[start:])).strip() == example.answer.strip():
                return start
        return max(1, len(full) - len(self.answer_ids(example.answer)))

    def _asked(self, prompt: str, masks: int) -> tuple[MaskedText, int]:
        blanks = " ".join([self.mask] * masks)
        text = prompt.replace(self.mask, blanks) if self.mask in prompt else f"{prompt} {blanks}"
        ids, cut = self._fitted(self.tokenizer(text, verbose=False).input_ids)
        places = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(places) != masks:
            raise UserError(f"a prompt may hold one {self.mask}, got {prompt!r:.80}")
        return MaskedText(ids, places), cut

    def _fitted(self, ids: list[int]) -> tuple[list[int], int]:
        cut = max(0, len(ids) - self.context)
        kept = 1 if ids[0] in self.tokenizer.all_special_ids else 0
        return ids[:kept] + ids[kept + cut :], cut


class MaskedForward:
    """Runs a transformers model on padded texts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device  # read anew: a Trainer moves the model

    def __call__(self, ids_BT: Tensor, seen_BT: Tensor, key: Hashable = None) -> Tensor:
        """Logits (B, T, V); `key` identifies the tokens, see `ModelForward`."""
        return self.model(input_ids=ids_BT, attention_mask=seen_BT).logits


class MaskedScorer:
    """Turns batches of masked items into predictions."""

    def __init__(
        self, forward: MaskedForward, tokenizer: PreTrainedTokenizerBase, protocol: Protocol
    ) -> None:
        self.forward = forward
        self.tokenizer = tokenizer
        self.protocol = protocol

    @torch.inference_mode()
    def __call__(self, items: Sequence[MaskedItem]) -> list[Prediction]:
        log_NV = iter(self._log_probabilities([t for item in items for t in item.texts]))
        return [
            self._chosen(item, [next(log_NV) for _ in item.texts])
            if item.choices
            else self._open_answer(item, next(log_NV), next(log_NV))
            for item in items
        ]

    def _log_probabilities(self, texts: list[MaskedText]) -> list[Tensor]:
        """Log-probabilities (N, V) at each text's masks."""
        width = max(len(t.ids) for t in texts)
        pad = self.tokenizer.pad_token_id
        ids_BT = np.full((len(texts), width), 0 if pad is None else pad, np.int64)
        seen_BT = np.zeros_like(ids_BT)
        for row, seen, text in zip(ids_BT, seen_BT, texts, strict=True):
            row[: len(text.ids)] = text.ids
            seen[: len(text.ids)] = 1
        device = self.forward.device
        inputs = (torch.from_numpy(ids_BT).to(device), torch.from_numpy(seen_BT).to(device))
        logits_BTV = self.forward(*inputs, key=ids_BT.tobytes())
        counts = [len(t.places) for t in texts]
        rows = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts)).to(device)
        columns = torch.tensor([place for t in texts for place in t.places], device=device)
        return list(logits_BTV[rows, columns].float().log_softmax(-1).split(counts))

    def _chosen(self, item: MaskedItem, log_NV: list[Tensor]) -> Prediction:
        sums = [
            float(log_NV[text][range(len(ids)), ids].double().sum()) for text, ids in item.choices
        ]
        text, ids = item.choices[item.example.choices.index(item.example.answer)]
        return chosen_prediction(
            item.example,
            sums,
            answer_tokens=len(ids),
            rank=_rank(log_NV[text][0], ids[0]),
            truncated=item.truncated,
        )

    def _open_answer(self, item: MaskedItem, asked_NV: Tensor, loss_NV: Tensor) -> Prediction:
        e, gold = item.example, item.texts[1].gold
        predicted = asked_NV.argmax(-1).tolist()
        text = str(self.tokenizer.decode(predicted))
        window = str(self.tokenizer.decode(predicted[: len(gold)], skip_special_tokens=True))
        return Prediction(
            index=e.index,
            prompt=e.prompt,
            answer=e.answer,
            generation=text,
            correct=holds_answer(text, e.answer, self.protocol),
            log_probability=float(loss_NV[range(len(gold)), gold].double().sum()),
            answer_tokens=len(gold) + int(self.protocol.masked_extra_token),
            rank=_rank(loss_NV[0], gold[0]),
            token_f1=token_f1(window, e.answer),
            truncated=item.truncated,
        )


def _rank(log_V: Tensor, token: int) -> int:
    return int((log_V > log_V[token]).sum()) + 1


def context_of_masked(model: PreTrainedModel, context: int) -> int:
    """The context length, less the positions that some position tables reserve for padding."""
    reserved = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
    )
    return context - max(reserved, default=0)
