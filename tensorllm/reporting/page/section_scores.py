"""What the page says of answers and speed: metrics, tests, examples that changed, benchmarks."""

from typing import Any

from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.evaluation.row import Row
from tensorllm.reporting.bench import ROWS
from tensorllm.reporting.page.figures import between, signed
from tensorllm.reporting.page.plots_scores import change_picture, score_pictures, speed_picture
from tensorllm.reporting.page.runs import Benched, Evaluated
from tensorllm.reporting.page.theme import Canvas
from tensorllm.reporting.tables import size

METRICS = {
    "accuracy": ("Accuracy, %", 2, True),
    "loss": ("Loss, nats per answer token", 4, False),
    "perplexity": ("Perplexity", 2, False),
    "token_f1": ("Token F1, %", 2, True),
    "top_1": ("Answer's first token in top 1, %", 2, True),
    "top_5": ("… in top 5, %", 2, True),
    "top_10": ("… in top 10, %", 2, True),
}
SHOWN = 40  # examples of each kind of change
TAIL = 420  # characters of a prompt: its end, where the question is


def scores_section(
    found: BeforeAfter, run: Evaluated | None, canvas: Canvas, prefix: str
) -> dict[str, Any]:
    rows = []
    for metric, (title, digits, upwards) in METRICS.items():
        if metric not in found.after:
            continue
        after = found.after[metric]
        before = None if found.before is None else found.before.get(metric)
        change = None if before is None else after - before
        spread = (found.comparison or {}).get(metric, {})
        rows.append(
            {
                "name": title,
                "before": "" if before is None else f"{before:.{digits}f}",
                "before_interval": between(found.intervals_before.get(metric), digits),
                "after": f"{after:.{digits}f}",
                "after_interval": between(found.intervals_after.get(metric), digits),
                "change": "" if change is None else signed(change, digits),
                "change_interval": between(spread.get("interval"), digits),
                "tone": "" if not change else "good" if (change > 0) == upwards else "bad",
            }
        )
    pictures = score_pictures(canvas, found, prefix)
    if run is not None and run.rows and len(run.rows) == len(run.before):
        pictures.append(change_picture(canvas, run.before, run.rows, prefix))
    return {
        "where": found.where,
        "rows": rows,
        "beside": found.before is not None,
        "tests": _tests(found),
        "pictures": pictures,
    }


def _tests(found: BeforeAfter) -> str:
    if not found.comparison:
        return ""
    c = found.comparison
    return (
        f"{c['mended']} answers went from wrong to right and {c['broken']} from right to wrong "
        f"(McNemar's test, p {_p(c['mcnemar_p'])}); the loss changed with p {_p(c['loss_p'])} "
        "(paired bootstrap)."
    )


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def changed_examples(run: Evaluated) -> dict[str, Any] | None:
    """The examples whose verdict changed."""
    if not run.rows or len(run.before) != len(run.rows):
        return None
    pairs = list(zip(run.before, run.rows, strict=True))
    groups = []
    for right, title in ((True, "wrong, now right"), (False, "right, now wrong")):
        found = [(b, a) for b, a in pairs if b.correct is (not right) and a.correct is right]
        groups.append(
            {
                "title": title,
                "tone": "good" if right else "bad",
                "count": len(found),
                "shown": [_example(b, a) for b, a in found[:SHOWN]],
            }
        )
    return {"groups": groups, "dataset": run.results["dataset"]}


def _example(before: Row, after: Row) -> dict[str, str]:
    prompt = after.prompt if len(after.prompt) <= TAIL else f"… {after.prompt[-TAIL:]}"
    return {
        "prompt": prompt.strip(),
        "answer": after.answer.strip(),
        "before": before.generation.strip(),
        "after": after.generation.strip(),
        "loss": f"{before.loss:.2f} → {after.loss:.2f}",
    }


def speed_section(run: Benched, canvas: Canvas, prefix: str) -> dict[str, Any]:
    models, ratios = run.found["models"], run.found["ratios"]
    rows = []
    for name, field, key, unit in ROWS:
        if key in ratios:
            values = [models[which][field] for which in ("dense", "factored")]
            shown = [size(v) if unit == "bytes" else f"{v:,.0f} {unit}" for v in values]
            rows.append({"name": name, "dense": shown[0], "factored": shown[1]})
            rows[-1]["gain"] = f"{ratios[key]:.2f}×"
    sites = run.found["sites"]
    factored = sum(site["factored"] for site in sites)
    note = f"{factored} of {len(sites)} compressed sites run in their factors."
    return {"rows": rows, "note": note, "pictures": [speed_picture(canvas, run.found, prefix)]}
