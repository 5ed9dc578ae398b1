"""The table, the JSON file and the pictures say what the results say."""

import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mobiquant_jax.evaluation import (
    PerplexityResult,
    TokenBits,
    format_table,
    format_token_bits,
    measure_token_bits,
    plot_curve,
    plot_token_bits,
    print_result,
    write_json,
)
from mobiquant_jax.evaluation.token_bits import TEXT_WIDTH, _layout


def result(bits: float | None, perplexity: float) -> PerplexityResult:
    measured = 32.0 if bits is None else bits + 0.02
    return PerplexityResult(bits=bits, measured_bits=measured, perplexity=perplexity, tokens=4080, seconds=1.5)


CURVE = [result(2.0, 60.0), result(2.5, 45.5), result(8.0, 30.15), result(None, 30.0)]


def test_table_compares_with_the_unquantized_model():
    lines = format_table(CURVE).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.split(r"\s{2,}", lines[0].strip()) == ["average bits", "measured", "perplexity", "vs unquantized"]
    assert [line.split() for line in lines[2:]] == [
        ["2", "2.02", "60.000", "+100.0", "%"],
        ["2.5", "2.52", "45.500", "+51.7", "%"],
        ["8", "8.02", "30.150", "+0.5", "%"],
        ["unquantized", "-", "30.000"],
    ]
    assert "unquantized" not in format_table(CURVE[:3])
    assert "vs unquantized" not in format_table(CURVE[3:])


def test_json_holds_the_four_fields_and_replaces_the_file_whole(tmp_path: Path):
    path = tmp_path / "new" / "curve.json"
    write_json(path, [*CURVE, result(3.0, float("inf"))])
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert rows[1] == {"bits": 2.5, "measured_bits": 2.52, "perplexity": 45.5, "tokens": 4080}
    assert rows[3]["bits"] is None and rows[4]["perplexity"] is None
    write_json(path, CURVE[:1])
    assert len(json.loads(path.read_text())) == 1
    assert [file.name for file in path.parent.iterdir()] == ["curve.json"]


@pytest.mark.parametrize("results", [CURVE, CURVE[:3], [result(2.0, 6e4), *CURVE, result(3.0, float("nan"))]])
def test_curve_is_drawn(tmp_path: Path, results: list[PerplexityResult]):
    plot_curve(tmp_path / "curve.png", results, "a title")
    image = matplotlib.image.imread(tmp_path / "curve.png")[..., :3]
    assert image.shape[0] > 500 and image.shape[1] > 900
    assert (np.abs(image - np.array([0x1F, 0x6F, 0xEB]) / 255).max(axis=-1) < 0.02).sum() > 1000  # the line


def test_a_curve_without_points_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no finite perplexity"):
        plot_curve(tmp_path / "curve.png", [result(None, 30.0), result(2.0, float("nan"))], "a title")
    assert not list(tmp_path.iterdir())


WORDS = TokenBits(
    pieces=("The", " cap", "ital", " costs", " $5", ".\n", "So"), bits=(2.0, 3.0, 5.5, 2.5, 4.0, 6.0, 2.0)
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_is_plain_where_there_is_no_terminal():
    assert format_token_bits(WORDS, io.StringIO()) == ("The[2.0] cap[3.0]ital[5.5] costs[2.5] $5[4.0]. [6.0]So[2.0]")


def test_line_is_coloured_by_bits_on_a_terminal():
    text, legend = format_token_bits(WORDS, Terminal()).split("\n")
    pieces = re.findall(r"\x1b\[48;5;(\d+);38;5;16m([^\x1b]*)\x1b\[0m", text)
    assert "".join(piece for _, piece in pieces) == "The capital costs $5. So"
    color = dict(zip(WORDS.bits, (color for color, _ in pieces), strict=True))
    assert pieces[0][0] == pieces[-1][0] and len(set(color.values())) >= 5
    assert legend.startswith("2 ") and legend.endswith(" 6 bits")
    assert TokenBits(pieces=("a", "b"), bits=(2.84, 3.21)).scale == (2.8, 3.3)  # tenths where all are alike
    assert TokenBits(pieces=("a",), bits=(4.0,)).scale == (4.0, 4.1)


def test_token_picture_shows_the_colours_of_the_bits(tmp_path: Path):
    def brightness(bits: float) -> float:
        with_both_ends = TokenBits(pieces=("MMMMMMMMMM", " x", " y"), bits=(bits, 2.0, 5.0))
        plot_token_bits(tmp_path / "tokens.png", with_both_ends, "costs $ and _")
        return matplotlib.image.imread(tmp_path / "tokens.png")[90, 60, :3].sum()  # inside the first box

    assert brightness(2.0) > brightness(3.0) > brightness(5.0)  # darker with more bits


def test_layout_breaks_between_words_and_where_the_text_does():
    rng = np.random.default_rng()
    pieces = [" " * bool(rng.integers(2)) + "m" * int(rng.integers(1, 9)) for _ in range(80)]
    boxes = _layout(pieces)
    assert [box.text for box in boxes] == [piece.strip() for piece in pieces]
    for before, piece, box in zip(boxes, pieces[1:], boxes[1:], strict=False):
        assert box.x + box.width <= TEXT_WIDTH + 1e-6
        if box.line == before.line:
            assert (box.x - before.x - before.width > 1) == piece.startswith(" ")
        else:
            assert box.line == before.line + 1 and box.x == 0
    assert [box.line for box in _layout(["a", ";", "\n\n", "b", " c", "\n   ", " d"])] == [0, 0, 0, 1, 1, 1, 2]


class Bytes:
    """A tokenizer of one token a byte."""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(ids.tolist()).decode(errors="replace")


class BitsOfTheToken:
    """Every token uses as many bits as its id modulo 7, plus 2, times the share of 8 bits asked for."""

    variables: dict = {}
    is_elastic = True

    def forward(self, variables, tokens, bits):
        return tokens[..., None] * 0.0, (tokens % 7 + 2) * bits[:, None] / 8


def test_token_bits_are_those_the_model_used():
    measured = measure_token_bits(BitsOfTheToken(), Bytes(), "Añ €", 4.0)
    assert measured.pieces == ("A", "ñ", " ", "€")
    expected = [np.mean([byte % 7 + 2 for byte in character.encode()]) / 2 for character in "Añ €"]
    np.testing.assert_allclose(measured.bits, expected, rtol=1e-6)


def test_token_bits_mistakes_are_named():
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        measure_token_bits(BitsOfTheToken(), Bytes(), "", 4.0)
    with pytest.raises(ValueError, match="got 1"):
        measure_token_bits(BitsOfTheToken(), Bytes(), "a", 1.0)
    with pytest.raises(ValueError, match="2 tokens but 1 values"):
        TokenBits(pieces=("a", "b"), bits=(2.0,))


def test_progress_goes_to_stderr(capsys):
    print_result(CURVE[1])
    print_result(CURVE[3])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "  2.5 bits: perplexity 45.500 in 1.5 s\n  unquantized: perplexity 30.000 in 1.5 s\n"
