"""The text of a model card: what was done, how to load it, what was measured, how to repeat it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorllm.compression.citations import citation
from tensorllm.compression.descriptions import done_in_words
from tensorllm.compression.formats import FORMATS
from tensorllm.compression.report import RATIO_NAMES, asked_for
from tensorllm.compressors import COMPRESSORS
from tensorllm.evaluation.before_after import BeforeAfter
from tensorllm.recipes import as_yaml
from tensorllm.shown import MAIN, SHOWN

AUTO = {"fill-mask": "AutoModelForMaskedLM"}


def body(
    report: Mapping[str, Any],
    *,
    base: str | None,
    task: str | None,
    measured: Sequence[BeforeAfter],
) -> str:
    """The card as Markdown, without front matter; the arguments are those of `card.card`."""
    decomposed = bool(report["sites"])
    mode, _ = asked_for(report["mode"], report["settings"])
    parts = [
        f"# {report['model']}, compressed: {mode}",
        _what(report, base),
        _loading(report["format"], task),
        *([_sites(report["sites"])] if decomposed else []),
        _ratios(report["ratios"]),
        *([_measured(measured)] if measured else []),
        _again(report) if decomposed else _exported(report),
        *([_citation(mode)] if decomposed else []),
    ]
    return "\n\n".join(parts)


def _what(report: Mapping[str, Any], base: str | None) -> str:
    link = f"[{base}](https://huggingface.co/{base})" if base else f"`{report['model']}`"
    revision = f" at revision `{report['revision']}`" if report["revision"] else ""
    done = done_in_words(report["sites"]) or _width(report["ffn_width"])
    return f"{link}{revision} with {done}, by tensorllm. All other weights are as they were."


def _width(width: Mapping[str, int]) -> str:
    return (
        f"FFNs of {width['after']:,} channels in place of {width['before']:,}, without those that "
        "nothing reads"
    )


def _loading(format: str, task: str | None) -> str:
    written = FORMATS[format]
    code = written.code.replace("{auto}", AUTO.get(task or "", "AutoModelForCausalLM"))
    also = f"\n\n{written.also}" if written.also else ""
    return f"## Load it\n\n{written.how}\n\n```python\n{code}\n```{also}"


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{site['name']}`",
            f"{'×'.join(map(str, site['shape']))}",
            f"{site['kind']} ({', '.join(map(str, site['ranks']))})",
            f"{site['parameters_before']:,}",
            f"{site['parameters_after']:,}",
            f"{site['compression_ratio']:.2f}",
            f"{site['relative_error']:.4f}",
        )
        for site in sites
    ]
    head = (
        "what",
        "shape",
        "factors (ranks)",
        "parameters",
        "after",
        "ratio",
        "error of the weights",
    )
    return f"## What was done\n\n{_table(head, rows)}"


def _ratios(ratios: Mapping[str, float]) -> str:
    rows = [(RATIO_NAMES[name], f"{value:.3f}") for name, value in ratios.items()]
    return f"## Compression ratios, each by its name\n\n{_table(('of', 'ratio'), rows)}"


def _measured(measured: Sequence[BeforeAfter]) -> str:
    parts = ["## Measured"]
    for found in measured:
        rows = []
        for name in MAIN:
            if name not in found.after:
                continue
            title, digits = SHOWN[name].title, SHOWN[name].digits
            after = _value(found.after[name], found.intervals_after.get(name), digits)
            before = "" if found.before is None else found.before[name]
            if isinstance(before, float):
                before = _value(before, found.intervals_before.get(name), digits)
            rows.append((title, str(before), after))
        seed = "" if found.seed is None else f", bootstrap seed {found.seed}"
        spread = "; in brackets 95 % intervals" if found.intervals_after else ""
        table = _table(("", "before", "after"), rows)
        parts.append(f"{found.where[0].upper()}{found.where[1:]}{seed}{spread}.\n\n{table}")
    return "\n\n".join(parts)


def _value(value: float, interval: Sequence[float] | None, digits: int) -> str:
    spread = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{spread}"


def _again(report: Mapping[str, Any]) -> str:
    """How to repeat a compression; the recipe has the settings that resulted from all options."""
    shown_elsewhere = ("calibration", "chosen_by")  # by options, or not a setting
    settings = {key: v for key, v in report["settings"].items() if key not in shown_elsewhere}
    recipe = {"model": report["model"], "mode": report["mode"], "layers": report["layers"]}
    text = as_yaml(recipe | settings)
    revision = f" --revision {report['revision']}" if report["revision"] else ""
    fitted = report["settings"].get("calibration")
    draw = "--sequences {sequences} --seed {seed}".format_map(fitted) if fitted else ""
    more = " --length {length}".format_map(fitted) if fitted and "length" in fitted else ""
    more += " --sampled SAMPLED" if fitted and "added" in fitted else ""
    more += " --distill-text DISTILLED" if fitted and "to_distill" in fitted else ""
    data = f" --calibration FILE {draw}{more}" if fitted else ""
    facts = f"\n\n{_fitted_to(fitted)}" if fitted else ""
    version = report["environment"].get("versions", {}).get("tensorllm", "")
    format, out, then = report["format"], "FOLDER", ""
    if not FORMATS[format].by_compress:
        then = f"\ntensorllm export FACTORED FOLDER --format {format}"
        format, out = "factored", "FACTORED"
    return (
        f"## Make it again\n\nWith tensorllm {version}, this in `recipe.yaml`:\n\n"
        f"```yaml\n{text}```\n\n```\ntensorllm compress --config recipe.yaml{revision}{data} "
        f"--format {format} --out {out}{then}\n```{facts}"
    )


def _exported(report: Mapping[str, Any]) -> str:
    """How a folder was exported from an ordinary one, of which nothing was decomposed."""
    version = report["environment"].get("versions", {}).get("tensorllm", "")
    return (
        f"## Make it again\n\nWith tensorllm {version}:\n\n```\ntensorllm export MODEL FOLDER "
        f"--format {report['format']}\n```"
    )


def _fitted_to(text: Mapping[str, Any]) -> str:
    """Which texts FILE, SAMPLED and DISTILLED were, and what was drawn from them."""
    lost = (
        " The loss on them rose by {loss_increase:.4f} from {loss:.4f} nats per token."
        if "loss_increase" in text
        else ""
    ).format_map(text)
    # Older folders do not have it.
    ran = f" The model ran in {text['dtype']}." if "dtype" in text else ""
    other = " DISTILLED was `{source}`, all of its {sequences:,} sequences; SHA-256: `{sha256}`."
    taught = other.format_map(text["to_distill"]) if "to_distill" in text else ""
    if "added" in text:
        added = text["added"]
        return (
            f"FILE was `{text['source']}`, from which {text['sequences']:,} sequences were drawn, "
            f"and SAMPLED `{added['source']}`, with {added['sequences']:,}: {text['tokens']:,} "
            f"tokens in all. SHA-256 of the sequences: `{text['sha256']}`.{taught}{ran}{lost}"
        )
    return (
        f"FILE was `{text['source']}`: {text['sequences']:,} sequences of {text['tokens']:,} "
        f"tokens in all were drawn from it. SHA-256 of these: `{text['sha256']}`."
        f"{taught}{ran}{lost}"
    )


def _citation(mode: str) -> str:
    source = COMPRESSORS[mode].source if mode in COMPRESSORS else ""
    return f"## Cite\n\n{citation(source)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
