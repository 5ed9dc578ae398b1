"""Pieces of a page of HTML that needs no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mobiquant_jax.evaluation.token_bits import TokenBits, colors

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0 auto; padding: 2rem 1.2rem;
  max-width: 60rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; } .muted, figcaption { color: #616e7c; font-size: .9rem; }
figure { margin: 1.2rem 0; } img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.better { color: #1b7f5c; } .worse { color: #c0392b; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; padding: 1rem;
  border: 1px solid #e4e7eb; border-radius: 6px; }
.tokens span { padding: .12rem 0; }
.scale { display: inline-block; width: 12rem; height: .7rem; vertical-align: middle; margin: 0 .5rem; }
details { margin-top: 2rem; } pre { font-size: .8rem; overflow-x: auto; background: #f5f7fa; padding: 1rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def picture(path: Path, caption: str) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{escape(path.stem)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def token_page(token_bits: TokenBits) -> str:
    """A text with each token on the colour of its bits, which it also tells under the mouse."""
    low, high = token_bits.scale

    def span(piece: str, bits: float) -> str:
        paper, ink = colors((bits - low) / (high - low))
        return f'<span title="{bits:.2f} bits" style="background:{paper};color:{ink}">{escape(piece)}</span>'

    spans = "".join(span(piece, bits) for piece, bits in zip(token_bits.pieces, token_bits.bits, strict=True))
    stops = ",".join(colors(step / 8)[0] for step in range(9))
    scale = f'<span class="scale" style="background:linear-gradient(90deg,{stops})"></span>'
    return f'<p class="muted">{low:g} bits{scale}{high:g} bits</p>\n<div class="tokens">{spans}</div>'
