"""Markdown tables of docs/run_compressed.md; see fill_numbers.py for how they get there."""

from benchmark_tables import Lookup, figure, table

FIGURES = {
    "bytes_read": "bytes read",
    "decode": "decode",
    "predicted_decode": "predicted",
    "prefill": "prefill",
    "predicted_prefill": "predicted",
}
MIB = 2**20


def real_runtime(value: Lookup, part: str) -> str:
    """How many times better than dense a real model runs, a row per ratio, dtype and form."""
    found = value(part)["rows"]
    one = found[0]["batch"] == 1  # text, which predictions and peaks are of
    peaks = one and any(any(row["peak_bytes"].values()) for row in found)
    given = {key for row in found for times in row["times_dense"].values() for key in times}
    shown = [key for key in FIGURES if key in given and (one or not key.startswith("predicted"))]
    rows = []
    for row in sorted(found, key=lambda row: (row["ratio"], row["dtype"])):
        for name, times in row["times_dense"].items():
            if name == "dense":
                continue
            cells = [f"{times[key]:.2f}" if key in times else "" for key in shown]
            both = [row["peak_bytes"][n] for n in (name, "dense")]
            if peaks:
                cells.append(" beside ".join(f"{peak / MIB:,.0f}" for peak in both if peak))
            rows.append((f"{row['ratio']:g}", row["dtype"], name, *cells))
    head = ["ratio", "dtype", "what runs", *(FIGURES[key] for key in shown)]
    return table((*head, "peak, MiB") if peaks else tuple(head), rows)


def one_token(value: Lookup, part: str) -> str:
    """Milliseconds of each part of a decoded token; the dense model once for each dtype."""
    dense: set[str] = set()
    found = []
    for row in value(part)["rows"]:
        if row["what"] != "dense" or row["dtype"] not in dense:
            found.append(row)
        dense |= {row["dtype"]}
    parts = list(found[0]["ms"])
    rows = [
        (
            "" if row["what"] == "dense" else f"{row['ratio']:g}",
            row["dtype"],
            row["what"],
            *(f"{row['ms'][name]:.1f}" for name in parts),
            f"{row['bytes_per_token'] / MIB:,.0f}",
        )
        for row in found
    ]
    return table(("ratio", "dtype", "what runs", *parts, "read, MiB"), rows)


def compiled(value: Lookup, part: str) -> str:
    """Milliseconds of the first layers, as they are and compiled, and of the first call."""
    rows = []
    for row in value(part)["rows"]:
        for tokens in (key for key in row if key.isdigit()):
            seconds, first = row[tokens]["seconds"], row[tokens]["first_call_seconds"]
            for name in ("dense", "factored"):
                cells = [figure(1000 * seconds[n]) for n in (name, f"{name}, compiled")]
                at = (f"{row['ratio']:g}", row["dtype"], tokens, name)
                rows.append((*at, *cells, f"{first[name]:.0f}"))
    head = ("ratio", "dtype", "tokens", "what runs", "ms", "ms, compiled", "compiling, s")
    return table(head, rows)


def llama_cpp(value: Lookup, *kinds: str) -> str:
    """Folders under llama.cpp, a row per number type and folder; speeds beside the first one's."""
    out = []
    for kind in kinds:
        found = value(f"llama_cpp/{kind}")["rows"]
        first = next(iter(found.values()))
        for name, row in found.items():
            speeds = [f"{row[rate] / first[rate]:.2f}" for rate in ("prompt_per_s", "decode_per_s")]
            same = f"{row['same_texts']} of {row['texts']}"
            size = f"{row['bytes'] / 1e6:.1f}"
            out.append((kind, name, str(row["ffn_width"]), size, *speeds, same))
    head = ("numbers", "folder", "FFN width", "MB", "prompt", "decode", "texts that are the same")
    return table(head, out)
