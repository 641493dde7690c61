"""The page's sections on answers and speed: metrics, tests, changed examples, benchmarks."""

from collections.abc import Sequence
from typing import Any

from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.statistics import LEAST_P
from tensorllm.reporting.bench import ROWS, in_units
from tensorllm.reporting.page.figures import between, signed
from tensorllm.reporting.page.plots_scores import change_picture, score_pictures, speed_picture
from tensorllm.reporting.page.runs import Benched, Evaluated
from tensorllm.reporting.page.theme import Canvas
from tensorllm.reporting.tables import p_value
from tensorllm.shown import SHOWN

LISTED = 40  # examples of each kind of change
TAIL = 420  # characters of a prompt: its end, with the question


def scores_section(
    found: BeforeAfter, run: Evaluated | None, canvas: Canvas, prefix: str
) -> dict[str, Any]:
    """Every metric before and after, with the interval of its change.

    Args:
        found: the metrics.
        run: the evaluation, if its predictions are available to be shown.
        canvas: draws the plots.
        prefix: of the ids of the section's pictures.
    """
    rows = []
    for metric, shown in SHOWN.items():
        if metric not in found.after:
            continue
        after = found.after[metric]
        before = None if found.before is None else found.before.get(metric)
        change = None if before is None else after - before
        spread = (found.comparison or {}).get(metric, {})
        rows.append(
            {
                "name": shown.title,
                "before": "" if before is None else shown.exact(before),
                "before_interval": between(found.intervals_before.get(metric), shown.digits),
                "after": shown.exact(after),
                "after_interval": between(found.intervals_after.get(metric), shown.digits),
                "change": "" if change is None else signed(change, shown.digits),
                "change_interval": between(spread.get("interval"), shown.digits),
                "tone": "" if change is None else shown.tone(change),
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
    loss = f"the loss changed with p {p_value(c['loss_p'], LEAST_P)} (paired bootstrap)."
    if "accuracy" not in found.after:  # running text: nothing is right or wrong
        return loss.capitalize()
    return (
        f"{c['wrong_to_right']:,} answers went from wrong to right and "
        f"{c['right_to_wrong']:,} from right to wrong "
        f"(McNemar's test, p {p_value(c['mcnemar_p'])}); {loss}"
    )


def changed_examples(run: Evaluated) -> dict[str, Any] | None:
    """The examples whose verdict changed; of running text, those whose loss changed most."""
    if not run.rows or len(run.before) != len(run.rows):
        return None
    pairs = list(zip(run.before, run.rows, strict=True))
    if all(after.correct is None for _, after in pairs):
        pairs.sort(key=lambda pair: pair[1].loss - pair[0].loss)
        groups = [
            _group("more probable now", "good", [p for p in pairs if p[1].loss < p[0].loss]),
            _group("less probable now", "bad", [p for p in pairs[::-1] if p[1].loss > p[0].loss]),
        ]
    else:
        groups = [
            _group(title, tone, [p for p in pairs if (p[0].correct, p[1].correct) == verdicts])
            for title, tone, verdicts in (
                ("wrong, now right", "good", (False, True)),
                ("right, now wrong", "bad", (True, False)),
            )
        ]
    return {"groups": groups, "dataset": run.results["dataset"]}


def _group(title: str, tone: str, pairs: Sequence[tuple[Prediction, Prediction]]) -> dict[str, Any]:
    return {
        "title": title,
        "tone": tone,
        "count": len(pairs),
        "shown": [_example(before, after) for before, after in pairs[:LISTED]],
    }


def _example(before: Prediction, after: Prediction) -> dict[str, str]:
    prompt = after.prompt if len(after.prompt) <= TAIL else f"… {after.prompt[-TAIL:]}"
    return {
        "prompt": prompt.strip(),
        "answer": after.answer.strip(),
        "before": before.generation.strip(),
        "after": after.generation.strip(),
        "loss": f"{before.loss:.2f} → {after.loss:.2f}",
    }


def speed_section(run: Benched, canvas: Canvas, prefix: str) -> dict[str, Any]:
    """Speed and memory, dense and factored, as `tensorllm bench` measured them."""
    models, ratios = run.found["models"], run.found["ratios"]
    rows = []
    for name, field, key, unit in ROWS:
        if key in ratios:
            shown = [in_units(models[which][field], unit) for which in ("dense", "factored")]
            rows.append({"name": name, "dense": shown[0], "factored": shown[1]})
            rows[-1]["gain"] = f"{ratios[key]:.2f}×"
    sites = run.found["sites"]
    factored = sum(site["factored"] for site in sites)
    note = f"{factored} of {len(sites)} compressed sites run in their factors."
    if "prompt_tokens" in run.found:  # older files do not have it
        note += f" A prompt of {run.found['prompt_tokens']} tokens, "
        note += f"{run.found['new_tokens']} decoded behind it."
    return {"rows": rows, "note": note, "pictures": [speed_picture(canvas, run.found, prefix)]}
