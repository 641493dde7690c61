"""Write the README.md of a checkpoint folder: a model card as the Hugging Face hub reads it.

Our part stands between two marks, so that it can be rewritten while the rest stays.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tensorllm.compression.card_text import body
from tensorllm.compression.formats import FORMATS
from tensorllm.compression.report import asked_for
from tensorllm.evaluation.before_after import BeforeAfter, of_scores
from tensorllm.io import write_text
from tensorllm.model_names import short_names
from tensorllm.progress import silenced
from tensorllm.shown import SHOWN

CARD = "README.md"
REPORT = "report.json"
BEGIN, END = "<!-- tensorllm: begin -->", "<!-- tensorllm: end -->"
OURS = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")
INHERITED = (*LICENCE, "language", "datasets", "tags", "base_model")
NEEDED = ("base_model", "license")
MEASURED = ("model-index", "model_name")
REPORTED = ("accuracy", "loss", "perplexity")  # metrics
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}


def card(
    report: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    previous: str = "",
    origin: Mapping[str, Any] | None = None,
    measured: Sequence[BeforeAfter] = (),
) -> str:
    """The model card of a folder.

    Args:
        report: the content of report.json; the scores in it are shown too.
        config: the content of config.json.
        previous: a card to extend: the folder's own, or that of the original model.
        origin: what else is known of the original (`origin.origin`); its own card takes precedence.
        measured: further measurements, shown in order.
    """
    kept, text = _split(previous)
    if report.get("evaluation"):
        scores = of_scores(report["evaluation"])
        known = {(m.dataset, m.split, m.protocol) for m in measured}
        again = (scores.dataset, scores.split, scores.protocol) in known
        measured = measured if again else [scores, *measured]
    more = dict(origin or {})
    base = hub_id(report["model"]) or more.pop("base_model", None)
    if not kept.get("license"):
        kept |= more
    task = _task(config)
    own = f"{BEGIN}\n\n{body(report, base=base, task=task, measured=measured)}\n\n{END}"
    if OURS.search(text):
        text = OURS.sub(lambda _: own, text)
    elif text.strip():
        text = f"{own}\n\n## The card of the original model\n\n{text.strip()}"
    else:
        text = own
    data = _metadata(kept, report, base, task, measured)
    return f"---\n{data}\n---\n\n{text.strip()}\n"


def rewrite_card(folder: Path, measured: Sequence[BeforeAfter] = ()) -> None:
    """Rewrite the card of a finished folder from its report, with measurements."""
    report, config = (json.loads((folder / name).read_text()) for name in (REPORT, "config.json"))
    path = folder / CARD
    write_text(path, card(report, config=config, previous=text_of(path), measured=measured))


def text_of(path: Path) -> str:
    """A card's text, whatever its encoding; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def card_lacks(card: str) -> tuple[str, ...]:
    """The fields a reader of the hub looks for first and that a card lacks, such as the licence."""
    values, _ = _split(card)
    return tuple(name for name in NEEDED if not values.get(name))


def hub_id(model: str) -> str | None:
    """The hub id of a model that a report names; None for a local folder."""
    known = short_names().get(model)
    if known is not None:
        return known.get("hub")
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _metadata(
    kept: dict[str, Any],
    report: Mapping[str, Any],
    base: str | None,
    task: str | None,
    measured: Sequence[BeforeAfter],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name = f"{report['model'].rpartition('/')[2]}-{report['mode']}"
    results = [
        EvalResult(
            task_type=task or "text-generation",
            **_dataset(found.dataset),
            dataset_split=found.split,
            dataset_args={"protocol": found.protocol, "examples": found.examples},
            metric_type=metric,
            metric_name=SHOWN[metric].title,
            metric_value=round(found.after[metric], 4),
            metric_args=_beside(found, metric) or None,
        )
        for found in measured
        for metric in REPORTED
        if metric in found.after
    ]
    kinds = sorted({site["kind"] for site in report["sites"]})
    mode, _ = asked_for(report["mode"], report["settings"])
    tags = [*kept.pop("tags", []), "tensorllm", "compression", "low-rank", mode, *kinds]
    values = {
        **kept,
        "library_name": FORMATS[report["format"]].library,
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(tags)),
    }
    if base is not None:
        values["base_model"] = base
    if results:  # the hub wants a model name along with results, and only then
        values |= {"model_name": name, "eval_results": results}
    return ModelCardData(**values).to_yaml()


def _dataset(name: str) -> dict[str, Any]:
    """The dataset for the hub's metadata: its repository and configuration if it has one."""
    from tensorllm.data import DATASETS

    source = DATASETS[name].source if name in DATASETS else None
    if source is None:
        return {"dataset_type": name, "dataset_name": name}
    config = {"dataset_config": source.config} if source.config else {}
    return {"dataset_type": source.repo, "dataset_name": name, **config}


def _beside(found: BeforeAfter, metric: str) -> dict[str, Any]:
    """A value's context: its interval, and the original model's value."""
    out: dict[str, Any] = {}
    if interval := found.intervals_after.get(metric):
        out["interval_95"] = [round(end, 4) for end in interval]
    if found.before is not None and metric in found.before:
        out["original_model"] = round(found.before[metric], 4)
    return out


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata worth keeping and the text of a card; an unreadable card is all text."""
    from huggingface_hub import ModelCard

    if not card.strip():
        return {}, ""
    try:
        with silenced("huggingface_hub.repocard"):  # of a card without metadata
            read = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        return {}, card
    values = read.data.to_dict()
    if OURS.search(read.text):
        values = {key: value for key, value in values.items() if key not in MEASURED}
    else:
        values = {key: values[key] for key in INHERITED if values.get(key)}
    if isinstance(values.get("tags"), str):
        values["tags"] = [values["tags"]]
    return values, read.text


def _task(config: Mapping[str, Any]) -> str | None:
    """The hub's name for the model's task."""
    for name in config.get("architectures") or []:
        for ending, task in TASKS.items():
            if name.endswith(ending):
                return task
    return None
