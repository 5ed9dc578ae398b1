"""The picture of the table: what is drawn, and where."""

import pytest
from matplotlib.axes import Axes

from mobiquant_jax.baselines import plot_perplexities


def row(method, bits, perplexity, seed=None, made=None, text="a", used=None):
    found = dict(method=method, bits=bits, calibrated_bits=made, measured_bits=used or bits, seed=seed, text=text)
    return found | {"perplexity": perplexity}


def test_means_bars_and_what_is_left_out(tmp_path, monkeypatch):
    drawn = {}

    def errorbar(axes, x, y, yerr, label, linestyle, **_):
        drawn[label] = (list(x), list(y), [list(side) for side in yerr], linestyle)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    rows = [
        row("unquantized", None, 10.0),
        row("qat", 3, 14.0, seed=0, made=3),
        row("qat", 3, 17.0, seed=1, made=3),
        row("qat", 2, 99.0, seed=0, made=2),
        row("qat", 2, 90.0, seed=0, made=3),  # made for another width
        row("rtn", 2, 101.0, made=2),  # more than ten times the best
        row("rtn", 2, None, made=2),
        row("elastic", 4.0, 11.0),
        row("elastic", 2.5, 30.0, used=2.4),
        row("elastic", 2.5, 5.0, text="b"),
    ]
    plot_perplexities(tmp_path / "a.picture", rows)  # whatever it is called
    assert (tmp_path / "a.picture").read_bytes().startswith(b"\x89PNG")
    assert drawn == {
        "elastic": ([2.4, 4.0], [30.0, 11.0], [[0, 0], [0, 0]], "-"),
        "qat": ([2, 3], [99.0, 15.5], [[0, 1.5], [0, 1.5]], "none"),
    }


def test_nothing_to_draw(tmp_path):
    for rows in ([], [row("rtn", 2, None, made=2)]):
        with pytest.raises(ValueError, match="no finite perplexity"):
            plot_perplexities(tmp_path / "a.png", rows)
