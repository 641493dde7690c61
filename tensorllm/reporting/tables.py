"""Rich tables that fit a terminal of 80 columns."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tensorllm.compression.dry_run import DryRun
from tensorllm.compression.report import RATIO_NAMES, CompressionReport, SiteReport, asked_for
from tensorllm.reporting.rows import MANY, new_table
from tensorllm.shown import MAIN, SHOWN

WORST = 5  # sites that are shown if there are too many for a row each


def compression_tables(report: CompressionReport) -> RenderableType:
    """Sites, ratios, and scores before and after if there are any."""
    parts: list[RenderableType] = [_headline(report), *_found(report)]
    parts += [_sites(report), _ratios(report)]
    parts += _few_bits(report)
    if report.format == "factored":
        parts.append(_policy(report))
    elif report.ffn_width is not None:
        parts.append("an ordinary checkpoint: FFN width {} → {}".format(*report.ffn_width))
    elif report.totals.bytes_after is not None:
        parts.append("a dense checkpoint keeps its size: --format factored stores the factors")
    if report.evaluation:
        parts.append(_scores(report.evaluation))
    return Group(*parts)


def _found(report: CompressionReport) -> list[RenderableType]:
    """What the model's structure was found to be, and the layers that were left out."""
    out: list[RenderableType] = [Text(report.structure)] if report.structure else []
    by_lack: dict[tuple[str, ...], list[int]] = {}
    for layer, roles in report.missing_roles.items():
        by_lack.setdefault(roles, []).append(layer)
    for roles, layers in by_lack.items():
        where = ", ".join(map(str, layers)) if len(layers) <= MANY else f"{len(layers)} layers"
        out.append(Text(f"passed over, without {', '.join(roles)}: layers {where}"))
    return out


def _few_bits(report: CompressionReport) -> list[str]:
    """How many sites are quantised, which ranks and parameter counts do not show."""
    held = Counter(site.few_bits for site in report.sites if site.few_bits)
    if not held:
        return []
    shown = ", ".join(f"{count} in {how}" for how, count in sorted(held.items()))
    return [f"of {len(report.sites)} sites {shown}; report.json says which (kind)"]


def _policy(report: CompressionReport) -> str:
    """How many sites `--policy auto` would run factored; report.json says why for each."""
    chosen = sum(site.auto.startswith("factored") for site in report.sites)
    return (
        f"--policy auto runs {chosen} of {len(report.sites)} sites factored; report.json says why"
    )


def sizes_table(reports: Sequence[CompressionReport]) -> RenderableType:
    """Compressions of one model to several sizes, side by side."""
    table = new_table(
        "target ratio", "matrices", "whole model", "parameters", "files", number_from=1
    )
    for report in reports:
        ratios, after = report.ratios(), report.totals.bytes_after
        table.add_row(
            f"{report.settings['target_ratio']:g}",
            f"{ratios['matrices_compressed']:.3f}",
            f"{ratios['whole_model']:.3f}",
            count(report.totals.parameters_after),
            "" if after is None else size(after),
        )
    return table


def plan_table(plan: DryRun) -> RenderableType:
    """What a run would do, for `--dry-run`."""
    table = new_table("site", "shape", "parameters", "after", "ratio", number_from=2)
    _whole(table, "parameters")
    for site in plan.sites:
        after = site.parameters_after
        ratio = "not known yet" if after is None else f"{site.parameters_before / after:.2f}"
        left = "not known yet" if after is None else count(after)
        before = count(site.parameters_before)
        table.add_row(_label(site.name), _shape(site.shape), before, left, ratio)
    totals = new_table("plan", "before", "after", number_from=1)
    totals.add_row(
        "parameters", count(plan.parameters_before), _known(plan.parameters_after, count)
    )
    totals.add_row("weight files", size(plan.bytes_before), _known(plan.bytes_after, size))
    time = "not known yet" if plan.seconds is None else duration(plan.seconds)
    totals.add_row("predicted time", "", time)
    totals.add_row("predicted peak memory", "", size(plan.peak_bytes))
    return Group(table, totals)


def count(n: int) -> str:
    """A count such as 67.1M, 1.4M, 950."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.{1 if n >= 10 * limit else 2}f}{unit}"
    return str(n)


def size(n: int) -> str:
    """A size in binary units."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return f"{n} B"


def duration(seconds: float) -> str:
    """A duration such as under 1 s, 12 s, 3.5 min, 20.1 h, 1,200 days."""
    if seconds < 1:
        return "under 1 s"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{int(unit > 1)}f} {name}"
    return f"{seconds / 86_400:,.0f} days"


def p_value(value: float, least: float = 1e-4) -> str:
    """A p-value such as `= 0.031`; `≤ 0.001` at the least that is shown or can be resolved."""
    return f"≤ {least:g}" if value <= least else f"= {value:.2g}"


def _headline(report: CompressionReport) -> Text:
    mode, settings = asked_for(report.mode, report.settings)
    shown = ", ".join(f"{key}={_brief(value)}" for key, value in settings.items())
    text = Text()
    text.append(mode, style="bold")
    text.append(f"({shown}) on {report.model}, {report.dtype}, {report.format}")
    return text


def _brief(value: Any) -> str:
    """A setting on one line; long lists are given by their length."""
    if isinstance(value, Mapping):
        if {"source", "tokens", "sequences", "seed"} <= set(value):  # a calibration text
            return "{source} ({sequences} sequences, {tokens} tokens, seed {seed})".format_map(
                value
            )
        shown = {key: inner for key, inner in value.items() if key != "sha256"}
        return " ".join(f"{key}={_brief(inner)}" for key, inner in shown.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    long = isinstance(value, list) and (len(value) > 7 or any(isinstance(v, dict) for v in value))
    return f"{len(value)} of them" if long else str(value)


def _sites(report: CompressionReport) -> RenderableType:
    """A row for every site; if there are many, a row per kind of matrix, and the worst sites."""
    if len(report.sites) <= MANY:
        return _every_site(report, report.sites)
    groups: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        groups.setdefault(_matrices(site.name), []).append(site)
    table = new_table("matrices", "sites", "ranks", "parameters", "CR", "error", number_from=1)
    for name, sites in groups.items():
        ranks = [min(s.ranks for s in sites), max(s.ranks for s in sites)]
        shown = [",".join(map(str, r)) for r in ranks]
        before, after = (
            sum(getattr(s, f"parameters_{when}") for s in sites) for when in ("before", "after")
        )
        errors = sorted(s.relative_error for s in sites)
        table.add_row(
            name,
            str(len(sites)),
            shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}",
            f"{count(before)} → {count(after)}",
            f"{before / after:.2f}",
            f"{errors[0]:.3f} to {errors[-1]:.3f}",
        )
    worst = sorted(report.sites, key=lambda site: -site.relative_error)[:WORST]
    return Group(
        table,
        f"the {WORST} of {len(report.sites)} sites that lost most; report.json has all:",
        _every_site(report, worst),
    )


def _every_site(report: CompressionReport, sites: Sequence[SiteReport]) -> Table:
    names = ["site", "shape", "ranks", "parameters", "CR", "error", "s"]
    if "calibration" in report.settings:  # the factors were fitted earlier
        names.remove("s")
    table = new_table(*names, number_from=3)
    _whole(table, "CR", "error", "s")
    for site in sites:
        cells = (
            _label(site.name),
            _shape(site.shape),
            ",".join(str(rank) for rank in site.ranks),
            f"{count(site.parameters_before)} → {count(site.parameters_after)}",
            f"{site.ratio:.2f}",
            f"{site.relative_error:.4f}",
            f"{site.seconds:.2f}",
        )
        table.add_row(*cells[: len(names)])
    return table


def _whole(table: Table, *names: str) -> None:
    """Keep figures in these columns on one line; others may break if a row is too wide."""
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.header in names


def _label(name: str) -> str:
    """A site's name with a shared prefix only once: `layers.0.experts.in-gate`."""
    return re.sub(r"(?<=-)(?:experts|shared)\.", "", name)


def _matrices(name: str) -> str:
    """Which matrices a site has, in whichever layer and expert: `experts.in`."""
    return re.sub(r"experts\.\d+\.", "experts.", _label(name).split(".", 2)[2])


def _ratios(report: CompressionReport) -> Table:
    table = new_table("compression ratio of", "ratio", number_from=1)
    for name, value in report.ratios().items():
        table.add_row(RATIO_NAMES[name], f"{value:.3f}")
    return table


def _scores(evaluation: Mapping[str, Any]) -> Table:
    before, after = evaluation["before"], evaluation["after"]
    named = ", ".join(str(before[key]) for key in ("dataset", "split", "protocol") if key in before)
    table = new_table(named or "scores", "before", "after", "change", number_from=1)
    for name in MAIN:
        if name in after:  # running text has no accuracy
            shown, one, other = SHOWN[name], before[name], after[name]
            change = Text(f"{other - one:+z.{shown.digits}f}", style="bold")
            table.add_row(shown.title, shown.exact(one), shown.exact(other), change)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def _known(value: int | None, show: Any) -> str:
    return "not known yet" if value is None else show(value)


def result_tables(result: CompressionReport | DryRun) -> RenderableType:
    """The tables of what `tensorllm compress` returned."""
    return plan_table(result) if isinstance(result, DryRun) else compression_tables(result)
