"""`tensorllm report`: runs as one page that anybody can open."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorllm.compression.card import rewrite_card
from tensorllm.environment import printable
from tensorllm.errors import Incomplete, UserError
from tensorllm.io import check_writable, write_text
from tensorllm.reporting.page.render import GENERATOR, render
from tensorllm.reporting.page.runs import Run, read_run
from tensorllm.reporting.page.subjects import put_together
from tensorllm.reporting.page.theme import Canvas

NEEDED = ("matplotlib", "jinja2")


@dataclass(frozen=True, slots=True)
class Page:
    """The page, the files of its plots, and the model cards that were extended."""

    page: Path
    plots: list[Path]
    cards: list[Path]

    def to_json(self) -> dict[str, Any]:
        return {
            "page": printable(str(self.page)),
            "plots": [printable(str(path)) for path in self.plots],
            "cards": [str(path) for path in self.cards],
        }


def report(runs: Sequence[Path], out: Path, *, cards: bool = False) -> Page:
    """Write the page of these runs to `out`, and its plots into a folder beside it.

    Args:
        runs: folders that tensorllm wrote, or files with its --json output.
        out: the HTML file; an earlier page is replaced, any other file is refused.
        cards: add the measurements to the model cards of the checkpoints among the runs.

    Raises:
        UserError: a path that is no run, or a file that cannot be written.
        Incomplete: the disk is full.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"a report needs {missing[0]}: pip install 'tensorllm[report]'")
    if not runs:
        raise UserError("give one or more runs: folders that tensorllm wrote")
    _check(out)
    read = [read_run(path) for path in {path.resolve(): path for path in runs}.values()]
    canvas = Canvas(out.with_name(f"{out.stem}_plots"))
    try:
        text = _rendered(read, canvas)
        write_text(out, text)
        return Page(out, canvas.files, _extend_cards(read) if cards else [])
    except OSError as error:
        raise Incomplete(f"writing {out} failed: {error.strerror or error}") from None


def _rendered(runs: Sequence[Run], canvas: Canvas) -> str:
    try:
        return render(runs, canvas)
    except KeyError as error:
        paths = ", ".join(str(run.path) for run in runs)
        raise UserError(
            f"{paths}: written by another version of tensorllm, or damaged (it lacks {error})"
        ) from error


def _check(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out must be a file such as report.html, {out} is a folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    check_writable(out.parent)
    if out.exists() and GENERATOR not in out.read_text(errors="replace")[:2000]:
        raise UserError(f"{out} exists and is no page of tensorllm; give another --out")


def _extend_cards(runs: Sequence[Run]) -> list[Path]:
    out = []
    for subject in put_together(runs)[0]:
        if subject.compressed is not None and subject.compressed.path.is_dir():
            rewrite_card(subject.compressed.path, subject.measured())
            out.append(subject.compressed.path / "README.md")
    return out
