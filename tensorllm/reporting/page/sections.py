"""The page's section on a subject, as plain values for its template."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tensorllm.compression.report import RATIO_NAMES
from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.reporting.page.drawing import model_drawing
from tensorllm.reporting.page.figures import score_tile, smaller, times
from tensorllm.reporting.page.runs import Json
from tensorllm.reporting.page.section_scores import changed_examples, scores_section, speed_section
from tensorllm.reporting.page.section_weights import (
    decompositions,
    ratios,
    site_row,
    weight_pictures,
)
from tensorllm.reporting.page.subjects import Subject
from tensorllm.reporting.page.theme import Canvas
from tensorllm.reporting.tables import count, size
from tensorllm.shown import MAIN


def subject_view(subject: Subject, canvas: Canvas, number: int) -> dict[str, Any]:
    """Everything the template shows of one subject."""
    prefix = f"{number}-"
    report = subject.report
    measured = subject.measured()
    drawing = model_drawing(report) if report else None
    return {
        "id": f"run-{number}",
        "kind": "Run",
        "title": subject.title,
        "sentence": subject.sentence(),
        "tiles": list(_tiles(subject, measured)),
        "drawing": drawing,
        "tall": drawing is not None and "model tall" in drawing,
        "decompositions": decompositions(report["sites"]) if report else [],
        "ratios": ratios(report, subject.benched) if report else [],
        "sites": [site_row(site) for site in report["sites"]] if report else [],
        "weights": weight_pictures(subject, canvas, prefix),
        "scores": [
            scores_section(found, run, canvas, f"{prefix}{n}-")
            for n, (found, run) in enumerate(zip_longest(measured, subject.evaluated), 1)
        ],
        "examples": [changed for run in subject.evaluated if (changed := changed_examples(run))],
        "speed": [
            speed_section(run, canvas, f"{prefix}{n}-") for n, run in enumerate(subject.benched, 1)
        ],
        "provenance": [
            {"title": title, "rows": provenance_rows(facts)} for title, facts in _sources(subject)
        ],
    }


def _tiles(subject: Subject, measured: Sequence[BeforeAfter]) -> Iterator[dict[str, str]]:
    for found in measured[:1]:
        for metric in MAIN:
            if metric in found.after:
                before = None if found.before is None else found.before[metric]
                yield score_tile(metric, f"on {found.dataset}", found.after[metric], before)
    if subject.report:
        ratios, totals = subject.report["ratios"], subject.report["totals"]
        name = next(n for n in ("attention_of_edited_layers", "matrices_compressed") if n in ratios)
        factor, what = smaller(ratios[name])
        yield {"label": RATIO_NAMES[name], "value": times(factor), "note": what, "tone": ""}
        yield {
            "label": "whole model",
            "value": times(ratios["whole_model"]),
            "note": f"{count(totals['parameters_before'])} → {count(totals['parameters_after'])}",
            "tone": "",
        }


def _sources(subject: Subject) -> Iterator[tuple[str, Json]]:
    if subject.compressed is not None:
        yield "Compression", subject.compressed.report
    for run in subject.evaluated:
        yield f"Evaluation on {run.results['dataset']}", run.results
    for bench in subject.benched:
        yield "Benchmark", bench.found


def provenance_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of everything known about how a run was made."""
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
