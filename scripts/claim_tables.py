"""Markdown tables of docs/does_it_work.md; see fill_numbers.py for how they get there."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark_tables import Lookup, figure, table

Cells = Sequence[Mapping[str, Any]]


def claims(value: Lookup, model: str) -> str:
    """A row per method, a column per dataset: the change of every draw, and what was found."""
    found = value(model)
    datasets = list(found["datasets"])
    originals = (_original(found["datasets"][name]) for name in datasets)
    rows = [("original, %", *originals)]
    for method in dict.fromkeys(cell["method"] for cell in found["cells"]):
        own = [
            [c for c in found["cells"] if c["method"] == method and c["dataset"] == name]
            for name in datasets
        ]
        rows.append((method, *map(_changes, own)))
    return table(("change of accuracy, points", *datasets), rows)


def _original(dataset: Mapping[str, Any]) -> str:
    if dataset["original"] is None:
        return "not run"
    low, high = dataset["original"]["accuracy"]["interval"]
    accuracy = dataset["original"]["accuracy"]["value"]
    return f"{accuracy:.1f} ({low:.1f} to {high:.1f}), {dataset['examples']} rows"


def _changes(cells: Cells) -> str:
    """`+6.9 better, +1.0 not known`; what holds of all draws is said once."""
    shown = [
        f"{c['comparison']['accuracy']['difference']:+.1f} {_found(c)}"
        if "point" in c
        else _found(c)
        for c in cells
    ]
    return shown[0] if len(set(shown)) == 1 else "<br>".join(shown)


def _found(cell: Mapping[str, Any]) -> str:
    name = f"**{cell['found']}**" if cell["found"] == "better" else str(cell["found"])
    return f"{name} (prior)" if cell.get("shifted_prior") else name


def claim_cells(value: Lookup, model: str) -> str:
    """Every cell that was run."""
    rows = []
    for c in value(model)["cells"]:
        if "point" not in c:
            continue
        accuracy, loss = (c["comparison"][name] for name in ("accuracy", "loss"))
        low, high = accuracy["interval"]
        before, after = (c["validation"][part]["accuracy"] for part in ("original", "winner"))
        luck = c["selection"]["optimism"] if c["selection"] else None
        rows.append(
            (
                f"{c['dataset']}, {c['method']}, {c['draw']}",
                c["edit"],
                f"{before:.1f} → {after:.1f}",
                "" if luck is None else f"{luck:.1f}",
                f"{accuracy['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
                f"{c['comparison']['wrong_to_right']} / {c['comparison']['right_to_wrong']}",
                f"{loss['difference']:+.3f}",
                figure(c["p"], ".2g"),
                figure(c["p_holm"], ".2g"),
                _found(c),
            )
        )
    head = (
        "dataset, method, draw", "layer: settings", "validation %", "luck", "test, points",
        "gained / lost", "loss", "p", "p, Holm", "found",
    )  # fmt: skip
    return table(head, rows)


def claim_guards(value: Lookup, model: str) -> str:
    """Where answers are a few labels: what accuracy hides, of the original and of each winner."""
    found, rows = value(model), []
    for dataset in found["datasets"]:
        cells = [c for c in found["cells"] if c["dataset"] == dataset and c.get("guards")]
        for n, c in enumerate(cells):
            guards = c["guards"]
            if n == 0:
                first = (
                    f"{dataset}: original",
                    f"{guards['majority']:.1f}",
                    _share(guards, "original"),
                )
                rows.append((*first, *_guard(guards, "original"), ""))
            prior = guards["prior_alone"]
            rows.append(
                (
                    f"{c['method']}, {c['draw']}",
                    "",
                    _share(guards, "winner"),
                    *_guard(guards, "winner"),
                    "" if prior is None else f"{prior:.1f}",
                )
            )
    head = (
        "", "commonest label", "label said most", "balanced accuracy", "without prior",
        "prior alone",
    )  # fmt: skip
    return table(head, rows)


def _guard(guards: Mapping[str, Any], part: str) -> tuple[str, str]:
    plain = guards["without_prior"]
    balanced = f"{guards[part]['balanced_accuracy']:.1f}"
    return balanced, "" if plain is None else f"{plain[part]:.1f}"


def _share(guards: Mapping[str, Any], part: str) -> str:
    label, share = max(guards[part]["shares"].items(), key=lambda item: item[1])
    return f"{label} {100 * share:.0f} %"


def claim_frequency(value: Lookup, model: str) -> str:
    """Rows by how many other rows have the same answer: right before, and the mean over all cells
    of what was gained and lost, per cent of the rows."""
    found, rows = value(model), []
    for dataset in found["datasets"]:
        cells = [c for c in found["cells"] if c["dataset"] == dataset and "point" in c]
        name = dataset
        for bins in zip(*(c["by_frequency"] for c in cells), strict=True):
            first, count = bins[0], bins[0]["examples"]
            gained, lost = (
                100 * sum(b[key] for b in bins) / len(bins) / count
                for key in ("wrong_to_right", "right_to_wrong")
            )
            least, most = first["least"], first["most"]
            rows.append(
                (
                    name,
                    f"{least}" if least == most else f"{least} to {most}",
                    f"{count}",
                    f"{100 * first['right'] / count:.1f}",
                    f"{gained:.1f}",
                    f"{lost:.1f}",
                )
            )
            name = ""
    return table(
        ("dataset", "others with that answer", "rows", "right %", "gained %", "lost %"), rows
    )


def claim_generic(value: Lookup, model: str) -> str:
    """How often answers begin as wrong ones of the original do, before and after (the mean over
    draws), with what, and in how many cells rare or frequent answers gain for sure."""
    found, rows = value(model), []
    for dataset in found["datasets"]:
        run = [c for c in found["cells"] if c["dataset"] == dataset and "point" in c]
        for method in dict.fromkeys(c["method"] for c in run):
            cells = [c for c in run if c["method"] == method]
            known = [c["generic"] for c in cells]
            words = ", ".join(word or "(nothing)" for word in known[0]["words"])
            mean = sum(g["after"] for g in known) / len(known)
            trends = [c["trend"] for c in cells if c["trend"] is not None]
            sure = [t["spearman"] for t in trends if t["p"] <= 0.05]
            signs = (str(sum(s < 0 for s in sure)), str(sum(s > 0 for s in sure)))
            shares = (f"{known[0]['before']:.1f}", f"{mean:.1f}")
            rows.append((f"{dataset}, {method}", words, *shares, *signs, str(len(cells))))
    head = (
        "dataset, method", "wrong answers begin with", "before %", "after %",
        "rare gain", "frequent gain", "cells",
    )  # fmt: skip
    return table(head, rows)


def claim_changed(value: Lookup, model: str, dataset: str) -> str:
    """The first rows that the edits that were found better gain and lose."""
    rows = []
    for c in value(model)["cells"]:
        if c["dataset"] != dataset or c["found"] != "better" or c["draw"] > 0:
            continue
        for kind, changed in c["changed"].items():
            for row in changed:
                texts = (row["answer"], row["before"], row["after"])
                rows.append((f"{c['method']}: {kind}", *map(_said, texts)))
    return table(("edit", "answer", "before", "after"), rows)


def _said(text: str) -> str:
    """On one line, and short."""
    return " ".join(text.split())[:50].replace("|", "/").replace("`", "'")
