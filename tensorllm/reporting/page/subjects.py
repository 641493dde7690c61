"""Group runs into subjects: a compressed model with its evaluations and benchmarks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorllm.compression.descriptions import done_in_words
from tensorllm.compression.report import asked_for
from tensorllm.evaluation.before_after import BeforeAfter, of_results, of_scores
from tensorllm.reporting.page.figures import short_name, smaller
from tensorllm.reporting.page.runs import Benched, Compressed, Evaluated, Json, Run, Searched
from tensorllm.shown import SHOWN


@dataclass(slots=True)
class Subject:
    """One model, compressed in one way or not at all, and all runs about it."""

    model: str
    compressor: Mapping[str, Any] | None
    compressed: Compressed | None = None
    evaluated: list[Evaluated] = field(default_factory=list)
    benched: list[Benched] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model's name, without its folder's path."""
        return short_name(self.model)

    @property
    def title(self) -> str:
        """A title such as `demo, hybrid`."""
        return f"{self.name}, {self.mode or 'as it is'}"

    @property
    def mode(self) -> str | None:
        """The compression mode as it was requested; None if the model is not compressed."""
        made = self.compressor
        return asked_for(made["mode"], made)[0] if made else None

    @property
    def report(self) -> Json | None:
        return self.compressed.report if self.compressed else None

    def measured(self) -> list[BeforeAfter]:
        """Every measurement; those of `evaluate` first, as they have intervals."""
        found = [of_results(run.results) for run in self.evaluated]
        known = {(m.dataset, m.split, m.protocol, m.examples) for m in found}
        scores = self.report.get("evaluation") if self.report else None
        if scores:
            own = of_scores(scores)
            if (own.dataset, own.split, own.protocol, own.examples) not in known:
                found.append(own)
        return found

    def sentence(self) -> str:
        """What was done and what the result was, in plain words."""
        done = "as it is"
        if self.report:
            done = f"with {done_in_words(self.report['sites'])}"
        elif self.compressor:
            done = f"compressed by {self.mode}"
        outcomes = [_outcome(found) for found in self.measured()[:1]]
        text = f"{outcomes[0]}, {done}" if outcomes else f"The model {self.name} {done}"
        if self.report:
            factor, what = smaller(self.report["ratios"]["whole_model"])
            text += f"; the whole model has {factor:.3g} times {what}"
        return f"{text[0].upper()}{text[1:]}."


def _outcome(found: BeforeAfter) -> str:
    name = "accuracy" if "accuracy" in found.after else "loss"
    shown = SHOWN[name]
    after = f"{shown.brief(found.after[name])} {shown.unit}"
    if found.before is None:
        return f"{name} on {found.dataset} is {after}"
    before = shown.brief(found.before[name])
    if before == shown.brief(found.after[name]):
        return f"{name} on {found.dataset} stays at {after}"
    verb = "rises" if found.after[name] > found.before[name] else "falls"
    return f"{name} on {found.dataset} {verb} from {before} to {after}"


def put_together(runs: Sequence[Run]) -> tuple[list[Subject], list[Searched]]:
    """The subjects, in the order in which the runs were given, and the searches."""
    subjects: list[Subject] = []
    for run in sorted(runs, key=lambda run: not isinstance(run, Compressed)):
        if isinstance(run, Compressed):
            r = run.report
            made = {"mode": r["mode"], **r["settings"], "layers": r["layers"]}
            subjects.append(Subject(r["model"], made, compressed=run))
        elif isinstance(run, Evaluated):
            compressor = run.results.get("compressor")
            owner = _owner(subjects, run.results["model"], compressor)
            owner.evaluated.append(run)
        elif isinstance(run, Benched):
            found = run.found
            owner = _owner(subjects, found.get("model", "benchmark"), found.get("compressor"))
            owner.benched.append(run)
    order = [run.path for run in runs]
    return (
        sorted(subjects, key=lambda s: min(order.index(path) for path in _paths(s))),
        [run for run in runs if isinstance(run, Searched)],
    )


def _owner(subjects: list[Subject], model: str, compressor: Mapping[str, Any] | None) -> Subject:
    """The subject that a run is about; a new one if there is none yet."""
    for subject in subjects:
        if (subject.model, _key(subject.compressor)) == (model, _key(compressor)):
            return subject
    subjects.append(Subject(model, compressor))
    return subjects[-1]


def _key(compressor: Mapping[str, Any] | None) -> str:
    return json.dumps(compressor, sort_keys=True)


def _paths(subject: Subject) -> list[Any]:
    runs = [subject.compressed, *subject.evaluated, *subject.benched]
    return [run.path for run in runs if run is not None]
