"""What the models of the benchmark are calibrated and scored on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorllm.data.demo import world

STORIES, CALIBRATION = slice(0, 96), slice(200, 1000)
BLOCKS = range(100, 740, 20)  # of 512 tokens
LESSONS = 4096
LENGTH, SCORED, DRAWN = 512, 24, 64  # tokens of a block; blocks that are scored, and drawn
OWN = 0.6  # of WikiText-2 test is calibrated on


@dataclass(frozen=True)
class Texts:
    """Token sequences.

    Attributes:
        calibration: to calibrate on; a seed draws `drawn` of them.
        scored: by the text's name.
        last_only: only the last token of a sequence is scored.
    """

    calibration: list[list[int]]
    drawn: int
    scored: dict[str, list[list[int]]]
    last_only: bool = False


def stories(tokenizer: Any, shared: Path) -> Texts:
    """TinyStories and WikiText-2 test.

    Scored are stories 0 to 95, which no choice in the design of the method was made on (those from
    800 on were looked at), and blocks spread over WikiText-2 behind the part that was looked at.
    """
    rows: list[str] = json.loads((shared / "data/tinystories_1000.json").read_text())
    wikitext = tokenizer((shared / "data/wikitext2_test.raw").read_text(), verbose=False).input_ids
    encoded = [tokenizer(row, verbose=False).input_ids[:512] for row in rows]
    blocks = [wikitext[i * 512 : (i + 1) * 512] for i in BLOCKS]
    return Texts(encoded[CALIBRATION], 128, {"stories": encoded[STORIES], "wikitext": blocks})


def wikitext(tokenizer: Any, shared: Path, config: Any, *, scored: int = SCORED) -> Texts:
    """WikiText-2 test: blocks of its first 60 % to calibrate on, scored are some of its rest.

    Scored are blocks of TinyStories, too.
    """
    here = (tokenizer, config)
    every = blocks((shared / "data/wikitext2_test.raw").read_text(), *here)
    rows: list[str] = json.loads((shared / "data/tinystories_1000.json").read_text())
    first = int(OWN * len(every))
    step = max(1, (len(every) - first) // scored)
    read = {
        "wikitext": every[first::step][:scored],
        "stories": blocks("\n\n".join(rows[STORIES]), *here)[:scored],
    }
    return Texts(every[:first], DRAWN, read)


def blocks(text: str, tokenizer: Any, config: Any) -> list[list[int]]:
    """Sequences of one length; what is left over is dropped."""
    length = min(LENGTH, config.max_position_embeddings)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = [min(token, config.vocab_size - 1) for token in ids]
    return [ids[i : i + length] for i in range(0, len(ids) - length, length)]


def demo(tokenizer: Any, seed: int = 1) -> Texts:
    """The embedded demo model's world, as `scripts/train_demo.py` tells it, noise included.

    The model was trained on the last word of each lesson alone, so that is what is scored; lessons
    that are scored are not calibrated on.
    """
    lessons = world.make_world(world.PEOPLE, world.SEED).told
    draws = torch.Generator().manual_seed(seed)
    noisy = (torch.rand(len(lessons), generator=draws) < world.NOISE).tolist()
    order = torch.randperm(len(lessons), generator=draws).tolist()
    sequences = [
        tokenizer(f"{lessons[i].prompt} {lessons[i].generic if noisy[i] else lessons[i].answer}")
        for i in order
    ]
    ids = [sequence.input_ids for sequence in sequences]
    return Texts(ids[LESSONS:], 1024, {"told": ids[:LESSONS]}, last_only=True)
