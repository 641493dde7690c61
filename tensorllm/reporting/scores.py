"""Evaluation results as tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tensorllm.compression.report import asked_for
from tensorllm.evaluation.before_after import count_of_examples
from tensorllm.evaluation.statistics import LEAST_P
from tensorllm.reporting.rows import new_table
from tensorllm.reporting.tables import p_value
from tensorllm.shown import MAIN, SHOWN

LISTED = 8  # examples of each kind of change
WIDTH = 36  # of a question; answers wrap beside it


def score_tables(results: Mapping[str, Any]) -> RenderableType:
    """One evaluation, beside the original's if there is one."""
    parts: list[RenderableType] = [_headline(results)]
    before = results.get("before")
    if before is None:
        table = new_table("", "value", "95 % interval", number_from=1)
        for name, shown in SHOWN.items():
            value = results["metrics"].get(name)
            if value is not None:
                spread = results["intervals"].get(name)
                table.add_row(shown.title, shown.exact(value), _interval(spread, shown.digits))
        return Group(*parts, table, *_notes(results))
    parts.append(_side_by_side(before["metrics"], results["metrics"], results["comparison"]))
    tests = _tests(results["metrics"], results["comparison"])
    return Group(*parts, tests, *_notes(results))


def comparison_tables(changes: Mapping[str, Any]) -> RenderableType:
    """The comparison of two folders of results."""
    before, after = changes["before"], changes["after"]
    metrics, comparison = changes["metrics"], changes["comparison"]
    parts: list[RenderableType] = [_headline(before), _headline(after)]
    if not before["examples"] == after["examples"] == comparison["examples"]:
        parts.append(f"over the {count_of_examples(comparison['examples'])} that both have:")
    parts += [
        _side_by_side(metrics["before"], metrics["after"], comparison),
        _tests(metrics["after"], comparison),
    ]
    for kind, title in (
        ("wrong_to_right", "wrong, now right"),
        ("right_to_wrong", "right, now wrong"),
    ):
        rows = changes[kind]
        if rows:
            table = new_table(f"{title} ({len(rows)})", "answer", "generated now", number_from=3)
            for row in rows[:LISTED]:
                table.add_row(*(_short(row[name]) for name in ("prompt", "answer", "generation")))
            parts.append(table)
    return Group(*parts)


def _headline(results: Mapping[str, Any]) -> Text:
    text = Text()
    text.append(str(results["model"]), style="bold")
    if results["compressor"] is not None:
        mode, _ = asked_for(results["compressor"]["mode"], results["compressor"])
        text.append(f" ({mode})")
    text.append(
        f" on {results['dataset']}, {results['split']}, protocol {results['protocol']}, "
        f"{count_of_examples(results['examples'])}, {results['dtype']}"
        f"{', prior taken out' if results.get('calibrated_prior') else ''}"
    )
    return text


def _side_by_side(
    before: Mapping[str, float], after: Mapping[str, float], comparison: Mapping[str, Any]
) -> RenderableType:
    table = new_table("", "before", "after", "change", "95 % interval", number_from=1)
    for name, shown in SHOWN.items():
        value = before.get(name)
        if value is None:
            continue
        spread = comparison[name]["interval"] if name in MAIN else None
        table.add_row(
            shown.title,
            shown.exact(value),
            shown.exact(after[name]),
            f"{after[name] - value:+z.{shown.digits}f}",
            _interval(spread, shown.digits),
        )
    return table


def _tests(metrics: Mapping[str, float], comparison: Mapping[str, Any]) -> Text:
    loss = f"loss, paired bootstrap p {p_value(comparison['loss_p'], LEAST_P)}"
    if "accuracy" not in metrics:  # running text: nothing is right or wrong
        return Text(loss)
    changed = (
        f"wrong to right {comparison['wrong_to_right']}, "
        f"right to wrong {comparison['right_to_wrong']} of {comparison['examples']}"
    )
    return Text(f"{changed}: McNemar p {p_value(comparison['mcnemar_p'])}; {loss}")


def _notes(results: Mapping[str, Any]) -> list[Text]:
    notes = [Text(note, style="dim") for note in results["notes"]]
    if cut := results["truncated_prompts"]:
        notes.append(Text(f"{cut} prompts lost their beginning to fit the context", style="dim"))
    return notes


def _interval(bounds: list[float] | None, digits: int) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f}…{bounds[1]:.{digits}f}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"…{line[-WIDTH:]}"
