"""Notebooks as pages of the site: their text, code and stored results, as Markdown."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """For each `x.ipynb` a page `x.md` beside it, and its pictures."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        stem = notebook.src_uri.removesuffix(".ipynb")
        cells = json.loads(Path(notebook.abs_src_path or "").read_text(encoding="utf-8"))["cells"]
        pictures: dict[str, str | bytes] = {}
        text = "\n\n".join(part for cell in cells for part in parts(cell, stem, pictures))
        name = Path(notebook.src_uri).name
        text += f"\n\n[Download this notebook]({name})\n"
        files.append(File.generated(config, f"{stem}.md", content=text))
        for path, picture in pictures.items():
            files.append(File.generated(config, path, content=picture))
    return files


def parts(cell: dict[str, Any], stem: str, pictures: dict[str, str | bytes]) -> Iterator[str]:
    """The Markdown of one cell; its pictures are added to `pictures` by path."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        kind = next((kind for kind in PICTURES if kind in data), None)
        if kind is None:
            yield "```text\n" + "".join(data["text/plain"]).rstrip("\n") + "\n```"
            continue
        path = f"{stem}-{len(pictures) + 1}.{PICTURES[kind]}"
        content = "".join(data[kind])
        pictures[path] = base64.b64decode(content) if kind == "image/png" else content
        yield f"![]({Path(path).name})"
