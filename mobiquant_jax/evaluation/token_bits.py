"""How many bits each token of a sentence used: measured, as a picture, and as a line for the terminal."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from mobiquant_jax import distributed
from mobiquant_jax.evaluation.perplexity import LanguageModel, check_bits
from mobiquant_jax.evaluation.report import INK, STYLE
from mobiquant_jax.files import whole_file

COLORMAP = matplotlib.colormaps["YlGnBu"]
COLORMAP_RANGE = (0.08, 0.82)  # leaves out the near-white and the near-black end
LUMINANCE = (0.2126, 0.7152, 0.0722)
# Sizes of the picture, in points.
FONT_SIZE, PADDING, WORD_GAP, TEXT_WIDTH = 13.0, 4.0, 4.0, 600.0
BOX_HEIGHT, LINE_HEIGHT, MARGIN, HEAD, FOOT = 26.0, 33.0, 16.0, 36.0, 48.0
ANSI_COLORS = (230, 193, 151, 115, 80, 74, 68)  # of the 256-colour palette, light yellow to blue


class TextCodec(Protocol):
    """What is needed of a tokenizer; ``io.tokenizer.Tokenizer`` is one."""

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Returns the token ids of a text."""

    def decode(self, ids: Int[np.ndarray, " N"]) -> str:
        """Returns the text of token ids."""


@dataclass(frozen=True, kw_only=True)
class TokenBits:
    """A text cut into tokens, with the average bits that each used.

    Attributes:
      pieces: the tokens' text; joined, they are the text.
      bits: average bits of each token.
    """

    pieces: tuple[str, ...]
    bits: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.pieces or len(self.pieces) != len(self.bits):
            raise ValueError(f"{len(self.pieces)} tokens but {len(self.bits)} values of bits; at least one is needed")

    @property
    def scale(self) -> tuple[float, float]:
        """Whole bits that enclose all tokens', or tenths where they differ by less than one."""
        unit = 1 if max(self.bits) - min(self.bits) >= 1 else 10
        low, high = math.floor(min(self.bits) * unit), math.ceil(max(self.bits) * unit)
        return low / unit, max(high, low + 1) / unit


def measure_token_bits(model: LanguageModel, tokenizer: TextCodec, text: str, bits: float) -> TokenBits:
    """Runs a text through a model and notes the bits of every token.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      text: a sentence or two.
      bits: target average bits in [2, 8].

    Returns:
      The tokens and their bits, as `split_text` cuts them.

    Raises:
      ValueError: bits outside [2, 8], or a text without tokens.
    """
    ids = tokenizer.encode(text)
    if not len(ids):
        raise ValueError(f"the text {text!r} has no tokens")
    request = jnp.full(1, check_bits(bits), jnp.float32)
    _, token_bits = jax.jit(model.forward)(model.variables, jnp.asarray(ids, jnp.int32)[None], request)
    return split_text(tokenizer, ids, distributed.fetch(token_bits)[0].astype(np.float64))


def split_text(tokenizer: TextCodec, ids: Int[np.ndarray, " N"], used: Float[np.ndarray, " N"]) -> TokenBits:
    """Cuts the text of token ids into pieces that can be shown.

    Args:
      tokenizer: which made the ids.
      ids: a text's tokens, at least one.
      used: average bits of each.

    Returns:
      The tokens and their bits. Tokens that end inside a character of several bytes are joined with those that
      complete it.
    """
    pieces, piece_bits, start, shown = [], [], 0, ""
    for end in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:end])
        if decoded.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        pieces.append(decoded[len(shown) :])
        piece_bits.append(float(used[start:end].mean()))
        start, shown = end, decoded
    return TokenBits(pieces=tuple(pieces), bits=tuple(piece_bits))


def format_token_bits(token_bits: TokenBits, stream: TextIO = sys.stdout) -> str:
    """Writes a text as one line with each token's bits in colour, or in brackets where the stream is no terminal.

    Args:
      token_bits: the text.
      stream: where it will be printed.

    Returns:
      The coloured text with its scale, or plain text such as ``The[2.4] capital[3.1]``.
    """
    pieces = [re.sub(r"\s*\n\s*", " ", piece) for piece in token_bits.pieces]
    if not stream.isatty():
        return "".join(f"{piece}[{bits:.1f}]" for piece, bits in zip(pieces, token_bits.bits, strict=True))
    low, high = token_bits.scale

    def painted(text: str, fraction: float) -> str:
        color = ANSI_COLORS[round(fraction * (len(ANSI_COLORS) - 1))]
        return f"\x1b[48;5;{color};38;5;16m{text}\x1b[0m"

    words = [painted(piece, (b - low) / (high - low)) for piece, b in zip(pieces, token_bits.bits, strict=True)]
    steps = len(ANSI_COLORS) - 1
    legend = "".join(painted("  ", step / steps) for step in range(steps + 1))
    return f"{''.join(words)}\n{low:g} {legend} {high:g} bits"


def plot_token_bits(path: str | Path, token_bits: TokenBits, title: str) -> None:
    """Draws a text with each token in a box coloured by its bits, and a colour bar below.

    The tokens of a word touch; a gap is where the text has a space.

    Args:
      path: the PNG to write.
      token_bits: the text.
      title: a line above the picture.
    """
    low, high = token_bits.scale
    with matplotlib.rc_context(STYLE):
        boxes = _layout(token_bits.pieces)
        bottom = (boxes[-1].line + 1) * LINE_HEIGHT  # points below the top of the first line
        width, height = TEXT_WIDTH + 2 * MARGIN, bottom + HEAD + FOOT
        figure = Figure(figsize=(width / 72, height / 72), dpi=160)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.text(0, -HEAD / 2, title, fontsize=11, color=INK, parse_math=False)
        for box, bits in zip(boxes, token_bits.bits, strict=True):
            top = box.line * LINE_HEIGHT
            paper, ink = colors((bits - low) / (high - low))
            axes.add_patch(Rectangle((box.x, top), box.width, BOX_HEIGHT, facecolor=paper, edgecolor="white"))
            baseline = top + 0.68 * BOX_HEIGHT
            axes.text(box.x + PADDING, baseline, box.text, fontsize=FONT_SIZE, color=ink, parse_math=False)
        gradient = np.array([[to_rgb(colors(part)[0]) for part in np.linspace(0, 1, 256)]])  # [1, 256, 3]
        axes.imshow(gradient, extent=(0, 180, bottom + 20, bottom + 10), aspect="auto")
        axes.text(0, bottom + 34, f"{low:g} bits", fontsize=9, color=INK)
        axes.text(180, bottom + 34, f"{high:g} bits", fontsize=9, color=INK, ha="right")
        mean = f"average of these tokens: {np.mean(token_bits.bits):.2f} bits"
        axes.text(200, bottom + 19, mean, fontsize=9, color=INK)
        axes.set(xlim=(-MARGIN, TEXT_WIDTH + MARGIN), ylim=(bottom + FOOT, -HEAD))
        with whole_file(path) as unfinished:
            figure.savefig(unfinished)


def colors(fraction: float) -> tuple[str, str]:
    """Hexadecimal colours of a box and of the text in it, by its place between the ends of the scale."""
    start, stop = COLORMAP_RANGE
    paper = COLORMAP(start + (stop - start) * fraction)
    return to_hex(paper), "#ffffff" if np.dot(paper[:3], LUMINANCE) < 0.5 else INK


class _Box(NamedTuple):
    """A token's place in the picture, in points; lines are counted from the top."""

    text: str
    x: float
    line: int
    width: float


def _layout(pieces: Sequence[str]) -> list[_Box]:
    """Sets tokens in lines; a line is broken between words only, or where the text breaks it."""
    texts = [
        piece.strip() or ("\u21b5" if "\n" in piece else "\u2423") for piece in pieces
    ]  # signs of newline and space
    widths = [_text_width(text) + 2 * PADDING for text in texts]
    starts_word = [i == 0 or piece[:1].isspace() or pieces[i - 1][-1:].isspace() for i, piece in enumerate(pieces)]
    boxes: list[_Box] = []
    x, line = 0.0, 0
    for i, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        if starts_word[i]:
            end = next((j for j in range(i + 1, len(pieces)) if starts_word[j]), len(pieces))
            broken = i > 0 and _breaks_between(pieces[i - 1], piece)
            x += WORD_GAP if x else 0.0
            if broken or (x and x + sum(widths[i:end]) > TEXT_WIDTH):
                x, line = 0.0, line + 1
        elif x + widths[i] > TEXT_WIDTH:
            x, line = 0.0, line + 1  # a word longer than the line
        boxes.append(_Box(text, x, line, widths[i]))
        x += widths[i]
    return boxes


def _breaks_between(piece: str, following: str) -> bool:
    """Whether a line ends between two tokens; one of newlines alone stays on the line it ends."""
    after = piece[len(piece.rstrip()) :]
    before = following[: len(following) - len(following.lstrip())] if following.strip() else ""
    return "\n" in after + before


def _text_width(text: str) -> float:
    """Width of a text in points; "$" would start mathematics."""
    return TextPath((0, 0), text.replace("$", "S"), size=FONT_SIZE).get_extents().x1 if text else 0.0
