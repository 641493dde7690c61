"""Markdown tables of what benchmarks compared; see fill_numbers.py for how they get into pages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lookup = Callable[[str], Any]
ERROR = "of the norm"  # a unit whose differences are small
HEAD = ("what", "ours", "peer", "times better", "wanted", "times the floor")


def figure(number: float, form: str | None = None) -> str:
    """A number as people write it: three digits, or by Python's format."""
    if form is not None:
        return format(number, form)
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{float(f'{number:.3g}'):g}" if abs(number) >= 1e-3 else f"{number:.2e}"


def amount(number: float, unit: str) -> str:
    """A number with its unit, bytes in the multiple that suits them."""
    if unit == "bytes":
        for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
            if number >= size:
                return f"{figure(number / size)} {name}"
    if unit == "s" and number < 1:
        return f"{figure(1000 * number)} ms"
    if unit == ERROR:
        return f"{number:.5f}"
    return f"{figure(number)} {unit}"


def span(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{figure(float(f'{seconds / size:.2g}'))} {unit}"
    return f"{figure(float(f'{seconds:.2g}'))} s"


def benchmark(value: Lookup, name: str) -> str:
    """All parts of a results file that compare something, each with how it was made."""
    out = []
    compared = {title: part for title, part in value(name).items() if part["comparisons"]}
    for title, part in compared.items():
        out += [f"**{title}**", "", _table(part["comparisons"]), "", made(part), ""]
    return "\n".join(out).rstrip()


def comparisons(value: Lookup, *paths: str) -> str:
    """Chosen comparisons in one table: `file/part` for all of a part, or one by its name.

    Of several files, the rows say which they are of.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    files = {path.partition("/")[0] for path in paths}
    for path in paths:
        found = value(path)
        name = f"{path.partition('/')[0]}: " if len(files) > 1 else ""
        many = found["comparisons"] if "comparisons" in found else {path.split("/")[-1]: found}
        rows |= {f"{name}{what}": one for what, one in many.items()}
    return _table(rows)


def mutants(value: Lookup) -> str:
    """What scripts/mutants.py counted, of the modules that were tried."""
    rows = []
    keys = ("mutants", "killed", "survived", "untried")
    for name, one in value("mutants/modules").items():
        if one["untried"] == one["mutants"]:
            continue
        rows.append((f"`{name.rpartition('/')[2]}`", *(str(one[key]) for key in keys)))
    return table(("module", *keys), rows)


def durations(value: Lookup, *names: str) -> str:
    """How long each benchmark's commands took, the parts of one command together."""
    rows = []
    for name in names:
        taken: dict[str, float] = {}
        for part in value(name).values():
            if part.get("wall_s"):
                taken[part["command"]] = max(part["wall_s"], taken.get(part["command"], 0.0))
        minutes = f"{max(1, round(sum(taken.values()) / 60))} min" if taken else "not recorded"
        rows.append((f"`benchmarks/{name}.py`", minutes))
    return table(("script", "took"), rows)


RULES = ("equal energy", "marginal error", "searched")


def energy(value: Lookup, *metrics: str) -> str:
    """benchmarks/energy.py: a row for each part, scope and ratio; metrics as `part:accuracy`."""
    out = []
    for part, _, metric in (words.partition(":") for words in metrics):
        found = {(r["scope"], r["ratio"], r["rule"]): r for r in value(f"energy/{part}/rows")}
        unit = {"accuracy": "accuracy %"}.get(metric, metric)
        for scope in dict.fromkeys(scope for scope, _, _ in found):
            edge, plain = (found[scope, None, rule] for rule in ("noise edge", "original"))
            once = (f"{edge[metric]:.1f} at {edge['reached']:.1f}", f"{plain[metric]:.1f}")
            what = f"{part}, {scope.removeprefix('attention of ')}, {unit}"
            for ratio in dict.fromkeys(r for s, r, _ in found if s == scope and r):
                cells = (f"{found[scope, ratio, rule][metric]:.1f}" for rule in RULES)
                out.append((what, f"{ratio:g}", *cells, *once))
                what, once = "", ("", "")
    return table(("what", "ratio", *RULES, "noise edge", "original"), out)


def guides(value: Lookup, *parts: str) -> str:
    """benchmarks/guide.py: a row for each part and ranking."""
    out = []
    for name in parts:
        part = value(f"guide/{name}")
        what = f"{name}, {part['points']} points"
        for ranking, of in part["rankings"].items():
            correlations = (f"{of[f'spearman_{n}']:+.2f}" for n in ("chosen", "accuracy"))
            scores = (f"{of[n]:.1f}" for n in ("validation", "test"))
            out.append((what, ranking, f"{of['trials_until_near']}", *correlations, *scores))
            what = ""
        scores = (f"{part['best'][n]:.1f}" for n in ("validation", "test"))
        out.append(("", "random", f"{part['trials_in_random_order']:.0f}", "", "", "", ""))
        out.append(("", "all of them", f"{part['points']}", "", "", *scores))
        scores = (f"{part['original'][n]:.1f}" for n in ("validation", "test"))
        out.append(("", "original", "", "", "", *scores))
    head = ("grid", "order", "trials", "with loss", "with accuracy", "validation", "test")
    return table(head, out)


def made(part: Mapping[str, Any]) -> str:
    """Machine, versions, commit, date and command, as one paragraph."""
    versions = part["versions"]
    names = ("python", "torch", "transformers", "tensorly")
    with_ = ", ".join(f"{name} {versions[name]}" for name in names)
    where = f"{part['hardware']}; {with_}; {part['date'][:10]}"
    where += f", commit {part['commit']}" if part.get("commit") else ""
    note = f" ({part['note']})" if part.get("note") else ""
    return f"{where}{note}: `{part['command']}`"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """With only the columns that some row fills."""
    cells = [_cells(what, one) for what, one in rows.items()]
    kept = [i for i in range(len(HEAD)) if any(row[i] for row in cells)]
    return table(tuple(HEAD[i] for i in kept), [tuple(row[i] for i in kept) for row in cells])


def _cells(what: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    unit, peer, wanted = one["unit"], one["peer"], one["wanted"]
    reached = one.get("times", one["ours"])
    form = ".5f" if unit == ERROR else None
    missed = wanted is not None and reached < wanted
    return (
        what,
        amount(one["ours"], unit),
        "" if peer is None else f"{one['peer_name']} {amount(peer, unit)}",
        "" if peer is None else figure(one["times"], form),
        "" if wanted is None else f"{figure(wanted, form)}{' (missed)' if missed else ''}",
        figure(one["times_floor"]) if one["floor"] is not None else "",
    )
