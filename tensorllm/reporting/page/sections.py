"""What the page says of a subject, as plain values for its template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensorllm.compression.report import RATIO_NAMES
from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.evaluation.row import Row
from tensorllm.reporting.page.drawing import factor_drawing, model_drawing
from tensorllm.reporting.page.plots_scores import change_picture, score_pictures, speed_picture
from tensorllm.reporting.page.plots_weights import error_pictures, spectra_pictures
from tensorllm.reporting.page.runs import Benched, Evaluated, Json
from tensorllm.reporting.page.subjects import Subject
from tensorllm.reporting.page.theme import Canvas
from tensorllm.reporting.tables import count, size

MEANING = {
    "matrices_compressed": "only the matrices that were decomposed",
    "attention_of_edited_layers": "q, k, v and o of the layers that were edited",
    "all_attention": "q, k, v and o of every layer",
    "whole_model": "all parameters, embeddings included",
    "bytes_on_disk": "the weight files",
}
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


def subject_view(subject: Subject, canvas: Canvas, number: int) -> dict[str, Any]:
    """Everything the template shows of one subject."""
    prefix = f"{number}-"
    report = subject.report
    measured = subject.measured()
    return {
        "id": f"run-{number}",
        "title": subject.title,
        "sentence": subject.sentence(),
        "tiles": list(_tiles(subject, measured)),
        "drawing": model_drawing(report) if report else None,
        "decompositions": _decompositions(report["sites"]) if report else [],
        "ratios": _ratios(report, subject.benched) if report else [],
        "sites": [_site(site) for site in report["sites"]] if report else [],
        "weights": _weight_pictures(subject, canvas, prefix),
        "scores": [_scores(found, canvas, f"{prefix}{n}-") for n, found in enumerate(measured, 1)],
        "examples": [
            changed
            for n, run in enumerate(subject.evaluated, 1)
            if (changed := _examples(run, canvas, f"{prefix}{n}-"))
        ],
        "speed": [_speed(run, canvas, f"{prefix}{n}-") for n, run in enumerate(subject.benched, 1)],
        "provenance": [facts for run in _sources(subject) if (facts := _provenance(*run))],
    }


def _tiles(subject: Subject, measured: Sequence[BeforeAfter]) -> Iterator[dict[str, str]]:
    for found in measured[:1]:
        for metric in ("accuracy", "loss"):
            if metric not in found.after:
                continue
            digits, unit = (1, " %") if metric == "accuracy" else (3, "")
            tile = {
                "label": f"{metric} on {found.dataset}",
                "value": f"{found.after[metric]:.{digits}f}{unit}",
                "note": "",
                "tone": "",
            }
            if found.before is not None:
                change = found.after[metric] - found.before[metric]
                better = change >= 0 if metric == "accuracy" else change <= 0
                points = " points" if metric == "accuracy" else ""
                tile["note"] = (
                    f"{change:+.{digits}f}{points} from {found.before[metric]:.{digits}f}"
                )
                tile["tone"] = "good" if better else "bad"
            yield tile
    if subject.report:
        ratios, totals = subject.report["ratios"], subject.report["totals"]
        name = next(n for n in ("attention_of_edited_layers", "matrices_compressed") if n in ratios)
        yield {
            "label": RATIO_NAMES[name],
            "value": f"{ratios[name]:.4g}×",
            "note": "fewer parameters",
            "tone": "",
        }
        yield {
            "label": "whole model",
            "value": f"{ratios['whole_model']:.4g}×",
            "note": f"{count(totals['parameters_before'])} → {count(totals['parameters_after'])}",
            "tone": "",
        }


def _decompositions(sites: Sequence[Json]) -> list[dict[str, Any]]:
    """One drawing per kind of decomposition: sites of the same shape and ranks share it."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for site in sites:
        key = (*site["roles"], *site["shape"], *site["ranks"])
        if key not in out and (drawing := factor_drawing(site)) is not None:
            out[key] = {"drawing": drawing, "name": _roles(site), "rows": _factor_rows(site)}
    return list(out.values())[:4]


def _factor_rows(site: Json) -> list[tuple[str, str]]:
    shape, ranks = site["shape"], site["ranks"]
    if site["kind"] == "low-rank":
        return [
            ("W", f"{shape[0]} × {shape[1]}"),
            ("U", f"{shape[0]} × {ranks[0]}"),
            ("Vᵀ", f"{ranks[0]} × {shape[1]}"),
        ]
    heads = shape[-1]
    rows = [
        ("W", f"{' × '.join(map(str, shape[:-1]))}, for {heads} heads"),
        ("G", f"{' × '.join(map(str, ranks))}, for {heads} heads"),
    ]
    pairs = zip(shape, ranks, strict=False)
    return rows + [(f"U{'₁₂₃'[n]}", f"{size} × {rank}") for n, (size, rank) in enumerate(pairs)]


def _roles(site: Json) -> str:
    roles = "".join(site["roles"])
    return "Attention: q, k, v and o together" if roles == "qkvo" else f"Matrix {roles}"


def _ratios(report: Json, benched: Sequence[Benched]) -> list[dict[str, str]]:
    """Every ratio by its name, with the two numbers it is of."""
    totals, sites, layers = report["totals"], report["sites"], report["layer_attention"]
    matrices = [sum(s[f"parameters_{when}"] for s in sites) for when in ("before", "after")]
    edited = [sum(layer[when] for layer in layers) for when in ("before", "after")]
    rest = layers[0]["before"] * (report["model_layers"] - len(layers)) if layers else 0
    numbers = {
        "matrices_compressed": [count(n) for n in matrices],
        "attention_of_edited_layers": [count(n) for n in edited],
        "all_attention": [count(n + rest) for n in edited],
        "whole_model": [count(totals[f"parameters_{w}"]) for w in ("before", "after")],
        "bytes_on_disk": [size(totals.get(f"bytes_{w}") or 0) for w in ("before", "after")],
    }
    out = [
        _ratio(RATIO_NAMES[name], MEANING[name], *numbers[name], value)
        for name, value in report["ratios"].items()
    ]
    if 1 < len(layers) <= 4:
        out[1:1] = [
            _ratio(
                f"attention of layer {layer['layer']}",
                "q, k, v and o of this layer",
                count(layer["before"]),
                count(layer["after"]),
                layer["ratio"],
            )
            for layer in layers
        ]
    for run in benched[:1]:
        models = run.found["models"]
        for name, key, field in (
            ("resident weights", "weights", "weight_bytes"),
            ("cached keys", "keys", "key_bytes"),
            ("cached values", "values", "value_bytes"),
        ):
            if key in run.found["ratios"]:
                pair = [size(models[which][field]) for which in ("dense", "factored")]
                out.append(_ratio(name, "in memory, as it runs", *pair, run.found["ratios"][key]))
    return out


def _ratio(name: str, meaning: str, before: str, after: str, value: float) -> dict[str, str]:
    return {
        "name": name,
        "meaning": meaning,
        "before": before,
        "after": after,
        "ratio": f"{value:.3g}×" if value >= 100 else f"{value:.2f}×",
    }


def _site(site: Json) -> dict[str, str]:
    return {
        "name": site["name"],
        "shape": "×".join(map(str, site["shape"])),
        "ranks": f"{site['kind']}, rank{'s' if len(site['ranks']) > 1 else ''} "
        + ", ".join(map(str, site["ranks"])),
        "before": count(site["parameters_before"]),
        "after": count(site["parameters_after"]),
        "ratio": f"{site['compression_ratio']:.2f}×",
        "error": f"{site['relative_error']:.4f}",
        "seconds": f"{site['seconds']:.2f} s",
    }


def _weight_pictures(subject: Subject, canvas: Canvas, prefix: str) -> list[Any]:
    if subject.compressed is None:
        return []
    details = subject.compressed.details
    sites = subject.compressed.report["sites"]
    return [
        *spectra_pictures(canvas, sites, details, prefix),
        *error_pictures(canvas, details, prefix),
    ]


def _scores(found: BeforeAfter, canvas: Canvas, prefix: str) -> dict[str, Any]:
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
                "before_interval": _interval(found.intervals_before.get(metric), digits),
                "after": f"{after:.{digits}f}",
                "after_interval": _interval(found.intervals_after.get(metric), digits),
                "change": "" if change is None else f"{change:+.{digits}f}",
                "change_interval": _interval(spread.get("interval"), digits),
                "tone": "" if not change else "good" if (change > 0) == upwards else "bad",
            }
        )
    return {
        "where": found.where,
        "rows": rows,
        "beside": found.before is not None,
        "tests": _tests(found),
        "pictures": score_pictures(canvas, found, prefix),
    }


def _interval(bounds: Sequence[float] | None, digits: int) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}" if bounds else ""


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


def _examples(run: Evaluated, canvas: Canvas, prefix: str) -> dict[str, Any] | None:
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
    picture = change_picture(canvas, run.before, run.rows, prefix)
    return {"groups": groups, "pictures": [picture], "dataset": run.results["dataset"]}


def _example(before: Row, after: Row) -> dict[str, str]:
    prompt = after.prompt if len(after.prompt) <= TAIL else f"… {after.prompt[-TAIL:]}"
    return {
        "prompt": prompt.strip(),
        "answer": after.answer.strip(),
        "before": before.generation.strip(),
        "after": after.generation.strip(),
        "loss": f"{before.loss:.2f} → {after.loss:.2f}",
    }


def _speed(run: Benched, canvas: Canvas, prefix: str) -> dict[str, Any]:
    from tensorllm.reporting.bench import ROWS

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


def _sources(subject: Subject) -> Iterator[tuple[str, Json]]:
    if subject.compressed is not None:
        yield "Compression", subject.compressed.report
    for run in subject.evaluated:
        yield f"Evaluation on {run.results['dataset']}", run.results
    for bench in subject.benched:
        yield "Benchmark", bench.found


def _provenance(title: str, facts: Json) -> dict[str, Any]:
    """Where a number comes from: name and value of all that is known."""
    return {"title": title, "rows": provenance_rows(facts)}


def provenance_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of all that is known of how a run was made."""
    environment = facts.get("environment", facts)
    settings = facts.get("settings") or {}
    known = {
        "model": facts.get("model"),
        "revision": facts.get("revision"),
        "mode": facts.get("mode"),
        "settings": ", ".join(f"{k} = {v}" for k, v in settings.items() if k != "calibration"),
        "dataset": facts.get("dataset"),
        "data file": facts.get("data_file"),
        "protocol": facts.get("protocol"),
        "split": facts.get("split"),
        "examples": facts.get("examples"),
        "seed": facts.get("seed"),
        "dtype": facts.get("dtype"),
        "format": facts.get("format"),
        "seconds": f"{facts['seconds']:.1f}" if facts.get("seconds") else None,
        "peak memory": size(facts["peak_resident_bytes"])
        if facts.get("peak_resident_bytes")
        else None,
        "hardware": environment.get("hardware"),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items()),
        "command": environment.get("command"),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]
