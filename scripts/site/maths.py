"""Formulas become MathML when the site is built: browsers draw it, no script is needed."""

import re
from html import unescape

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """What pymdownx.arithmatex marked, converted."""
    html = INLINE.sub(lambda found: convert(unescape(found[1])), html)
    return BLOCK.sub(lambda found: f'<div class="formula">{_block(found[1])}</div>', html)


def _block(text: str) -> str:
    return convert(unescape(text).strip(), display="block")
