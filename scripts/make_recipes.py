"""Write `configs/<model>/<dataset>/<mode>.yaml` from `configs/published.yaml`.

    python scripts/make_recipes.py

The facts are in published.yaml and in nowhere else; a recipe is one published experiment said in
the fields of its compressor. tests/reproduction/test_recipes.py fails where the files differ from
what this writes.
"""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
Facts = dict[str, Any]

LAYOUT = "official  # the published numbers are of the authors' code, which cuts heads its own way"
SEARCHED = "null  # never published: tensorllm search-ranks finds it"


def load_published(configs: Path = CONFIGS) -> Facts:
    published: Facts = yaml.safe_load((configs / "published.yaml").read_text())
    return published


def recipes(published: Facts) -> dict[str, str]:
    """Path below configs/ -> text, for every recipe that the published facts make."""
    files: dict[str, str] = {}
    for cell in published["tensorllm"]["cells"]:
        folder = f"{cell['model']}/{cell['dataset']}"
        laser = _laser_row(published, cell)
        files[f"{folder}/shared-tucker.yaml"] = _shared_tucker(published, cell)
        files[f"{folder}/laser.yaml"] = _laser(published, cell, laser)
        files[f"{folder}/hybrid.yaml"] = _hybrid(published, cell, laser)
        for role in cell.get("per_matrix", ()):
            text = _per_matrix(published, cell, role)
            files[f"{folder}/per-matrix-tucker-{role}.yaml"] = text
    return files


def _laser_row(published: Facts, cell: Facts) -> Facts:
    [row] = [
        row
        for row in published["laser"]["cells"]
        if (row["model"], row["dataset"]) == (cell["model"], cell["dataset"])
    ]
    return dict(row)


def _head(cell: Facts, mode: str) -> list[str]:
    return [f"model: {cell['model']}", f"dataset: {cell['dataset']}", f"mode: {mode}"]


def _layers(cell: Facts) -> str:
    return f"layers: {SEARCHED if cell['layer'] is None else [cell['layer']]}"


def _layers_origin(cell: Facts) -> str:
    return "searched" if cell["layer"] is None else "published"


def _ranks(cell: Facts) -> list[str]:
    first, *others = cell["ranks"]
    lines = [f"ranks: {first}"]
    if others:
        lines.append(f"alternatives: {others}  # the published ratio fits these as well")
    return lines


def _tail(source: str, origin: dict[str, str], before: Facts, after: Facts) -> list[str]:
    marks = ", ".join(f"{field}: {mark}" for field, mark in origin.items())
    return [
        f"origin: {{{marks}}}",
        f"source: {source}",
        "published:",
        f"  before: {_numbers(before)}",
        f"  after: {_numbers(after)}",
        "",
    ]


def _numbers(numbers: Facts) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in numbers.items()) + "}"


def _shared_tucker(published: Facts, cell: Facts) -> str:
    origin = {"layers": _layers_origin(cell), "ranks": cell["ranks_origin"]}
    source = published["tensorllm"]["source"]
    lines = [
        *_head(cell, "shared-tucker"),
        f"layout: {LAYOUT}",
        _layers(cell),
        *_ranks(cell),
        *_tail(source, origin, cell["original"], cell["shared_tucker"]),
    ]
    return "\n".join(lines)


def _laser(published: Facts, cell: Facts, laser: Facts) -> str:
    origin = dict.fromkeys(("layers", "matrices", "rho"), "published")
    lines = [
        *_head(cell, "laser"),
        f"layers: [{laser['layer']}]",
        f"matrices: [{laser['matrix']}]",
        f"rho: {laser['rho']}",
        *_tail(published["laser"]["source"], origin, laser["original"], laser["laser"]),
    ]
    return "\n".join(lines)


def _hybrid(published: Facts, cell: Facts, laser: Facts) -> str:
    choice = "LASER's own best; the hybrid's FFN choice was never published"
    origin = {
        "layers": _layers_origin(cell),
        "ranks": cell["ranks_origin"],
        "ffn_layers": "inferred",
        "matrices": "inferred",
        "rho": "inferred",
    }
    source = published["tensorllm"]["source"]
    lines = [
        *_head(cell, "hybrid"),
        f"layout: {LAYOUT}",
        _layers(cell),
        *_ranks(cell),
        f"ffn_layers: [{laser['layer']}]  # {choice}",
        f"matrices: [{laser['matrix']}]",
        f"rho: {laser['rho']}",
        *_tail(source, origin, cell["original"], cell["hybrid"]),
    ]
    return "\n".join(lines)


def _per_matrix(published: Facts, cell: Facts, role: str) -> str:
    width, head_width, _ = cell["ranks"][0]
    origin = {"layers": "inferred", "ranks": "inferred", "matrices": "published"}
    source = published["tensorllm"]["source"]
    lines = [
        *_head(cell, "per-matrix-tucker"),
        f"layout: {LAYOUT}",
        f"{_layers(cell)}  # the shared decomposition's; the ablation's own were never published",
        f"ranks: [{width}, {head_width}]  # as the layer",
        f"matrices: [{role}]",
        *_tail(source, origin, cell["original"], cell["per_matrix"][role]),
    ]
    return "\n".join(lines)


def main() -> None:
    files = recipes(load_published())
    for path, text in files.items():
        (CONFIGS / path).parent.mkdir(parents=True, exist_ok=True)
        (CONFIGS / path).write_text(text)
    print(f"{len(files)} recipes written to {CONFIGS}")


if __name__ == "__main__":
    main()
