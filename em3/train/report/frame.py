"""What every page of em3 is made of. Words that came from data pass through ``html.escape``; a page runs no script."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .style import CSS

# The browser itself refuses to load or run anything that is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def whole(title: str, body: str, version: str) -> str:
    """A page with a plain-text title around a body of HTML: one file that needs nothing else."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<main>
{body}
<footer>Written by em3 {escape(version)}.</footer>
</main>
</body>
</html>
"""


def title(text: str) -> str:
    return f"<h2>{text}</h2>"


def row(name: str, cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def table(content: str, name: str) -> str:
    """A table that scrolls inside itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>{content}</table></div>'


def pre(text: str, name: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><pre>{escape(text)}</pre></div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names with the CSS variables of their colours."""
    spans = "".join(f'<span style="--swatch: var({colour})">{escape(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{spans}</div>'
