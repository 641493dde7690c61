"""Results of evaluations as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tensorllm.reporting.tables import new_table

METRICS = {  # name -> what is printed, decimals
    "accuracy": ("accuracy, %", 2),
    "loss": ("loss, nats per token", 4),
    "perplexity": ("perplexity", 2),
    "top_1": ("first token in top 1, %", 2),
    "top_5": ("... in top 5, %", 2),
    "top_10": ("... in top 10, %", 2),
    "token_f1": ("token F1, %", 2),
}
SHOWN = 8  # examples of each kind of change
WIDTH = 36  # of a question; answers wrap beside it


def score_tables(results: Mapping[str, Any]) -> RenderableType:
    """One evaluation; with the original beside it where there is one."""
    parts: list[RenderableType] = [_headline(results)]
    before = results.get("before")
    if before is None:
        table = new_table("", "value", "95 % interval", number_from=1)
        for name, (title, digits) in METRICS.items():
            value = results["metrics"].get(name)
            if value is None:
                continue
            table.add_row(
                title, f"{value:.{digits}f}", _interval(results["intervals"].get(name), digits)
            )
        return Group(*parts, table, *_notes(results))
    parts.append(_side_by_side(before["metrics"], results["metrics"], results["comparison"]))
    return Group(*parts, _tests(results["comparison"]), *_notes(results))


def comparison_tables(changes: Mapping[str, Any]) -> RenderableType:
    """Two folders of results."""
    before, after = changes["before"], changes["after"]
    parts: list[RenderableType] = [
        _headline(before),
        _headline(after),
        _side_by_side(before["metrics"], after["metrics"], changes["comparison"]),
        _tests(changes["comparison"]),
    ]
    for kind, title in (("mended", "wrong, now right"), ("broken", "right, now wrong")):
        rows = changes[kind]
        if rows:
            table = new_table(f"{title} ({len(rows)})", "answer", "generated now", number_from=3)
            for row in rows[:SHOWN]:
                table.add_row(*(_short(row[name]) for name in ("prompt", "answer", "generation")))
            parts.append(table)
    return Group(*parts)


def _headline(results: Mapping[str, Any]) -> Text:
    text = Text()
    text.append(str(results["model"]), style="bold")
    if results["compressor"] is not None:
        text.append(f" ({results['compressor']['mode']})")
    text.append(
        f" on {results['dataset']}, {results['split']}, protocol {results['protocol']}, "
        f"{results['examples']} examples, {results['dtype']}"
    )
    return text


def _side_by_side(
    before: Mapping[str, float], after: Mapping[str, float], comparison: Mapping[str, Any]
) -> RenderableType:
    table = new_table("", "before", "after", "change", "95 % interval", number_from=1)
    for name, (title, digits) in METRICS.items():
        value = before.get(name)
        if value is None:
            continue
        change = after[name] - value
        spread = comparison[name]["interval"] if name in ("accuracy", "loss") else None
        table.add_row(
            title,
            f"{value:.{digits}f}",
            f"{after[name]:.{digits}f}",
            f"{change:+.{digits}f}",
            _interval(spread, digits),
        )
    return table


def _tests(comparison: Mapping[str, Any]) -> Text:
    return Text(
        f"wrong to right {comparison['mended']}, right to wrong {comparison['broken']} of "
        f"{comparison['examples']}: McNemar p {_p(comparison['mcnemar_p'])}; "
        f"loss, paired bootstrap p {_p(comparison['loss_p'])}"
    )


def _notes(results: Mapping[str, Any]) -> list[Text]:
    notes = [Text(note, style="dim") for note in results["notes"]]
    if cut := results["truncated_prompts"]:
        notes.append(Text(f"{cut} prompts lost their beginning to fit the context", style="dim"))
    return notes


def _interval(bounds: list[float] | None, digits: int) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f}…{bounds[1]:.{digits}f}"


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"…{line[-WIDTH:]}"
