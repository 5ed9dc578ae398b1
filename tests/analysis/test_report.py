"""The page and its folder: what they hold, and what they refuse."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mobiquant_jax.analysis import html, new_folder
from mobiquant_jax.evaluation import TokenBits

WORDS = TokenBits(pieces=("<b>", " cap", "ital\n", " &"), bits=(2.0, 3.5, 6.0, 2.0))


class Spans(HTMLParser):
    """The text and the attributes of every span with a title."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if "title" in dict(attributes):
            self.found.append(("", dict(attributes)))

    def handle_data(self, data):
        if self.found and not self.found[-1][0]:
            self.found[-1] = (data, self.found[-1][1])


def test_token_page_colours_the_text_by_bits():
    spans = Spans(html.token_page(WORDS)).found
    assert [text for text, _ in spans] == list(WORDS.pieces)  # escaped: no tag of the text's own
    assert [attributes["title"] for _, attributes in spans] == ["2.00 bits", "3.50 bits", "6.00 bits", "2.00 bits"]

    def brightness(attributes):
        return sum(int(part, 16) for part in re.findall(r"[0-9a-f]{2}", attributes["style"].split(";")[0])[-3:])

    low, middle, high, again = (brightness(attributes) for _, attributes in spans)
    assert low == again > middle > high


def test_tables_and_paragraphs():
    page = html.page(
        "a < b", [html.heading("x & y"), html.table(["", "n"], [["<i>cell</i>", "1"]]), html.paragraph("<")]
    )
    assert "<title>a &lt; b</title>" in page and "<h2>x &amp; y</h2>" in page and "<p>&lt;</p>" in page
    assert "<td><i>cell</i></td><td>1</td>" in page


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "some" / "analysis"
    with pytest.raises(RuntimeError), new_folder(target, overwrite=False) as folder:
        (folder / "numbers.json").write_text("{}")
        assert not target.exists()
        raise RuntimeError
    assert list(target.parent.iterdir()) == []

    with new_folder(target, overwrite=False) as folder:
        (folder / "numbers.json").write_text("1")
    with pytest.raises(ValueError, match="holds an analysis: --overwrite replaces it"):
        new_folder(target, overwrite=False).__enter__()
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "numbers.json").read_text() == "1"
    with new_folder(target, overwrite=True) as folder:
        (folder / "numbers.json").write_text("2")
    assert (target / "numbers.json").read_text() == "2"
    assert [entry.name for entry in target.parent.iterdir()] == ["analysis"]


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files but no analysis"):
            new_folder(tmp_path, overwrite=overwrite).__enter__()
        with pytest.raises(ValueError, match=r"notes.txt' is a file, not a folder"):
            new_folder(tmp_path / "notes.txt", overwrite=overwrite).__enter__()
    assert np.all([entry.name == "notes.txt" for entry in tmp_path.iterdir()])
