"""Reading the code blocks of the documentation."""

import re
import shlex
from textwrap import dedent
from typing import NamedTuple

from repository import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language ("" if none is named) and its text."""

    language: str
    text: str


def blocks(text: str, *languages: str) -> list[Block]:
    """All blocks of a page, or those in some languages."""
    found = [Block(language, dedent(code)) for _, language, code in BLOCK.findall(text)]
    return [block for block in found if not languages or block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `tensorllm ...` line, prompts and comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line.strip().removeprefix("$ ") for line in joined.split("\n"))
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tensorllm ")]
