"""The built site must not ask anything of another host: no font, script, style, image or frame."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

OUTSIDE = r"(?:https?:)?//[^\s\"')>]+"
FETCHED = (
    re.compile(rf"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=[\"']?({OUTSIDE})"),
    re.compile(rf"<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\shref=[\"']?({OUTSIDE})"),
    re.compile(rf"(?:url\(|@import )\s*[\"']?({OUTSIDE})"),
)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail the build where a page would fetch something."""
    folder = Path(config.site_dir)
    found = [
        f"{path.relative_to(folder)}: {address}"
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".html", ".css", ".svg"}
        for address in fetched(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("the site would fetch from the network:\n" + "\n".join(found))


def fetched(text: str) -> list[str]:
    """Addresses on other hosts that a browser fetches without being asked."""
    return [address for pattern in FETCHED for address in pattern.findall(text)]
