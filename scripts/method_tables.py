"""Markdown tables of methods and whole models; see fill_numbers.py for how they get there."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark_tables import Lookup, figure, table

LOSSES = {
    "SharedTucker4D": "shared-tucker",
    "SVD": "svd",
    "ASVD": "asvd",
    "SVD-LLM": "svd-llm",
    "SVD-LLM, sequential": "svd-llm-sequential",
    "AA-SVD": "aa-svd",
    "ours": "ours",
}
VARIANTS = {
    "default": "ours",
    "without refit": "ours refit_epochs=0",
    "`weighting=loss`": "ours weighting=loss",
    "`distill_steps=300`": "ours distill_steps=300",
}


def closed(value: Lookup, part: str, text: str) -> str:
    """Losses on a text, and the share of the gap closed: mean and deviation over seeds, least."""
    cells = {(e["scope"], e["ratio"], e["method"]): e for e in value(part)["summary"]}
    head = ("scope", "ratio", *LOSSES, "closed", "least")
    rows = []
    for scope, ratio in dict.fromkeys(key[:2] for key in sorted(cells)):
        found = [cells.get((scope, ratio, method)) for method in LOSSES.values()]
        losses = ["" if one is None else f"{one[text]['mean']:.3f}" for one in found]
        ours = cells[scope, ratio, "ours"][f"{text} closed"]
        share = _spread(ours), f"{100 * ours['least']:.1f} %"
        rows.append((scope, f"{ratio:g}", *losses, *share))
    return table(head, rows)


def shares(value: Lookup, *parts: str) -> str:
    """The mean shares that ours closes, a row per model (`part:text`) and scope."""
    rows, ratios = [], dict[float, None]()
    for part in parts:
        path, _, text = part.partition(":")
        found = [e for e in value(path)["summary"] if e["method"] == "ours"]
        for scope in dict.fromkeys(e["scope"] for e in found):
            cells = {e["ratio"]: e[f"{text} closed"]["mean"] for e in found if e["scope"] == scope}
            ratios |= dict.fromkeys(cells)
            name = f"{path.rpartition('/')[2]}, {scope}"
            rows.append((name, *(f"{100 * cells[ratio]:.0f} %" for ratio in sorted(cells))))
    return table(("gap closed at ratio", *(f"{ratio:g}" for ratio in sorted(ratios))), rows)


def variants(value: Lookup, part: str, text: str) -> str:
    """The share of the gap that variants of ours close on the first draw of text."""
    found = value(part)
    dense, rows = found["dense"][text], [row for row in found["rows"] if row["seed"] == 0]
    loss = {(r["scope"], r["ratio"], r["method"]): r[text] for r in rows}
    asked = dict.fromkeys(key[:2] for key in loss if key[2] == "ours distill_steps=300")
    out = []
    for at in asked:
        base = loss[*at, "svd-llm"]
        shares = [(base - loss[*at, m]) / (base - dense) for m in VARIANTS.values()]
        out.append((at[0], f"{at[1]:g}", *(f"{100 * share:.1f} %" for share in shares)))
    return table(("scope", "ratio", *VARIANTS), out)


def reasoning(value: Lookup, part: str) -> str:
    """Accuracy of what was chosen on the validation part, and of the two it is measured by."""
    found = value(part)
    cells = [_reasoning_row(row) for row in found["rows"] if row.get("chosen")]
    head = ("method", "layers", "ratio", "whole model", "validation %", "test %", "test loss")
    return table(head, cells)


def _reasoning_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    layers: Sequence[int] | None = row["layers"]
    named = "" if row["mode"] == "original" else _layers(layers)
    ratio = "" if row["ratio"] is None else f"{row['ratio']:g}"
    scores = (f"{row['val']['accuracy']:.1f}", f"{row['test']['accuracy']:.1f}")
    size = f"{row['whole_model']:.2f}×"
    return (row["mode"], named, ratio, size, *scores, figure(row["test"]["loss"], ".2f"))


def _layers(layers: Sequence[int] | None) -> str:
    return "all" if layers is None else ", ".join(map(str, layers))


def _spread(share: Mapping[str, float]) -> str:
    return f"**{100 * share['mean']:.1f} ± {100 * share['sd']:.1f} %**"


def mixtures(value: Lookup, part: str, sizes: str) -> str:
    """Losses of the experts' methods at equal size, over the dense model's; a row per size."""
    found = value(part)
    cells = {(e["removed"], e["method"]): e for e in found["summary"] if e["sizes"] == sizes}
    methods = list(dict.fromkeys(method for _, method in cells))
    rows = []
    for removed in sorted({at for at, _ in cells}):
        row = [f"{removed:.0%}"]
        for method in methods:
            one = cells.get((removed, method))
            lost = one["loss"] - found["dense"]["mean"] if one else 0.0
            row.append(f"+{lost:.4f} ({one['kept']:.1%})" if one else "")
        rows.append(tuple(row))
    return table(("removed", *methods), rows)


def real_model(value: Lookup, part: str) -> str:
    """Losses of a real model at equal size on two texts, a row per method; best other and ours."""
    found = value(part)
    texts = [name for name in found["dense"] if name != "questions"]
    sizes = sorted({row["kept"] for row in found["rows"]}, reverse=True)
    head = ("method", *(f"{text}, {size:g} kept" for text in texts for size in sizes))
    cells = {(row["method"], row["kept"]): row for row in found["rows"]}
    rows = []
    for method in dict.fromkeys(row["method"] for row in found["rows"]):
        here = [(cells.get((method, size)), text) for text in texts for size in sizes]
        rows.append((method, *("" if one is None else f"{one[text]:.3f}" for one, text in here)))
    return table(head, rows)


def real_model_questions(value: Lookup, part: str) -> str:
    """Accuracy (per cent) and loss (nats) of a real model on questions, a row per method and size;
    only what was asked of."""
    found = value(part)
    rows = [{"method": "dense", "kept": 1.0, **found["dense"]}, *found["rows"]]
    asked = [row for row in rows if "questions" in row]
    datasets = [name for name in asked[0]["questions"] if name != "rows"]
    out = []
    for row in sorted(asked, key=lambda row: -row["kept"]):
        scores = [row["questions"][name] for name in datasets]
        cells = (f"{score['accuracy']:.1f} / {score['loss']:.2f}" for score in scores)
        out.append((f"{row['method']}, {row['kept']:g} kept", *cells))
    return table(("method", *datasets), out)


def tucker_front(value: Lookup, part: str) -> str:
    """Losses of whole attentions by share of the model that is saved, a column per method."""
    rows = value(part)["rows"]
    losses = {(row["ratio"], row["method"]): row["loss"] for row in rows}
    saved = {row["ratio"]: row["saved_of_model"] for row in reversed(rows)}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    out = [
        (f"{ratio:g}", f"{saved[ratio]:.1f}", *(f"{losses[ratio, m]:.3f}" for m in methods))
        for ratio in dict.fromkeys(row["ratio"] for row in rows)
    ]
    return table(("attention smaller by", "of the model saved, %", *methods), out)


def edits(value: Lookup, file: str) -> str:
    """Edits of a layer: accuracy and loss on the questions, and changes of other losses."""
    asked = dict.fromkeys(o for part in value(file).values() for o in part.get("others", {}))
    out = []
    for name, part in value(file).items():
        scores, others = part["scores"], part.get("others", {})
        before, gain = scores["before"]["metrics"], scores["comparison"]["accuracy"]
        low, high = gain["interval"]
        changes = (
            f"{others[other]['metrics']['loss'] - others[other]['before']['metrics']['loss']:+.2f}"
            if other in others
            else ""
            for other in asked
        )
        out.append(
            (
                name,
                f"{before['accuracy']:.1f} to {scores['metrics']['accuracy']:.1f}",
                f"{gain['difference']:+.1f} ({low:.1f} to {high:.1f})",
                f"{scores['metrics']['loss'] - before['loss']:+.2f}",
                *changes,
            )
        )
    head = ("edit", "right, %", "points", "loss", *(f"loss on {other}" for other in asked))
    return table(head, out)
