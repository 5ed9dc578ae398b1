"""The report of an analysis: figures, tables, and one page that holds them all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobiquant_jax.analysis import figures, html
from mobiquant_jax.analysis.comparison import RIVALS, ROUTER
from mobiquant_jax.analysis.linears import Labels
from mobiquant_jax.analysis.numbers import findings_json
from mobiquant_jax.analysis.rows import Row, excess
from mobiquant_jax.analysis.study import Findings
from mobiquant_jax.evaluation import TokenBits, plot_token_bits
from mobiquant_jax.files import save_json

PAGE_BITS = 3.0  # the token page shows the average nearest to it
PICTURE_TOKENS = 200  # of tokens.png; the page shows the whole window


def write_report(folder: Path, findings: Findings, labels: Labels, text: TokenBits, about: Mapping[str, Any]) -> None:
    """Writes the PNGs, ``numbers.json`` and ``report.html``.

    Args:
        folder: where; it exists.
        findings: what was found.
        labels: of the arrays' axes.
        text: the first window at `page_bits`.
        about: what was analyzed and how, JSON-ready: ``checkpoint``, ``data``, ``windows``, ``window_length``, the
            shapes ``search_windows`` and ``choice_windows``, and where it all came from.
    """
    draw_figures(folder, findings, labels, text)
    save_json(folder / "numbers.json", {**about, **findings_json(findings, labels)}, indent=1)
    (folder / "report.html").write_text(report_page(folder, findings, labels, text, about), encoding="utf-8")


def page_bits(findings: Findings) -> float:
    """The average at which the token page shows the text."""
    return min(findings.router, key=lambda bits: abs(bits - PAGE_BITS))


def draw_figures(folder: Path, findings: Findings, labels: Labels, text: TokenBits) -> None:
    """Writes all PNGs."""
    layer, linear = typical_linear(findings)
    bits = np.asarray(labels.bits)
    figures.plot_policies(folder / "policies.png", findings.policies, findings.full)
    figures.plot_correlation(folder / "correlation.png", findings.errors, labels)
    used = {asked: use.linear_bits for asked, use in findings.router.items()}
    static = {asked: bits[allocation.table - 1] for asked, allocation in findings.static.items()}
    figures.plot_bits(folder / "bits.png", used, static, labels)
    figures.plot_error_curves(folder / "error_curves.png", findings.errors, labels)
    figures.plot_error_maps(folder / "error_maps.png", findings.errors, labels)
    figures.plot_overlap(folder / "overlap.png", findings.errors, labels)
    name = f"{labels.linears[linear]} of layer {layer}"
    figures.plot_migration(folder / "migration.png", findings.example[layer, linear], labels, name)
    figures.plot_retention(folder / "retention.png", findings.retention)
    start = TokenBits(pieces=text.pieces[:PICTURE_TOKENS], bits=text.bits[:PICTURE_TOKENS])
    plot_token_bits(folder / "tokens.png", start, f"bits each token used at {page_bits(findings):g} average bits")


def typical_linear(findings: Findings) -> tuple[int, int]:
    """Layer and linear whose worst tokens migrate as much as the median linear's, from the first depth to the last."""
    shared = findings.errors.overlap[:, :, 0, -1]
    order = np.argsort(shared, axis=None)
    layer, linear = np.unravel_index(order[len(order) // 2], shared.shape)
    return int(layer), int(linear)


def report_page(folder: Path, findings: Findings, labels: Labels, text: TokenBits, about: Mapping[str, Any]) -> str:
    """The page, from the findings and the PNGs in the folder."""

    def picture(name: str, caption: str) -> str:
        return html.picture(folder / f"{name}.png", caption)

    asked = sorted(findings.router)
    windows = f"{about['windows']} windows of {about['window_length']} tokens of {about['data']}"
    low = labels.bits[0]
    return html.page(
        f"Analysis of {about['checkpoint']}",
        [
            html.heading(f"Analysis of {about['checkpoint']}", 1),
            html.paragraph(f"{windows}; perplexity at full depth {findings.full.perplexity:.3f}.", "muted"),
            html.heading("Does routing earn its place?"),
            html.paragraph(
                "All rivals of the router have the bits that it used. The oracles know what each token's output loses, "
                "not what the model's loss gains: a static allocation that beats them shows that output errors are a "
                "poor guide to the tokens that matter. Static allocations were found on "
                f"{np.prod(about['search_windows'])} tokens of the calibration text and chosen on "
                f"{np.prod(about['choice_windows'])} others."
            ),
            html.table(["", *(f"{bits:g} bits" for bits in asked)], _policy_table(findings.policies, asked)),
            html.paragraph(
                "The router's perplexity against each rival's, with standard errors over paired windows: green where "
                "the router is better by more than two of them, red where it is worse.",
                "muted",
            ),
            html.table(["router against", *(f"{bits:g} bits" for bits in asked)], _verdicts(findings.policies, asked)),
            html.table(["rival", "is"], ((name, what) for name, what in RIVALS.items())),
            picture("policies", "Left: perplexity. Right: each policy against random depths, with standard errors."),
            html.heading("Do the router's scores follow the errors?"),
            picture(
                "correlation",
                "Rank correlation, over the tokens, of the score of a slice with the squared output error that the "
                "slice removes. A dot is a layer, a bar the mean over layers.",
            ),
            html.heading("Where the bits go"),
            picture("bits", "Average bits of each linear: the router's, and the best static allocation's."),
            html.heading("Bits by token"),
            html.paragraph(f"The first window at {page_bits(findings):g} average bits.", "muted"),
            html.token_page(text),
            html.heading("What a token loses"),
            picture(
                "error_curves",
                "Error of a linear's output relative to the same output at full depth, tokens sorted from best to "
                "worst. Line: median over layers; band: all layers.",
            ),
            picture("error_maps", "The mean over tokens, for each linear of each layer."),
            html.heading("Are the worst tokens the same at every width?"),
            picture(
                "overlap", "How much of the worst tenth of the tokens at one width is in the worst tenth at another."
            ),
            picture("migration", f"A typical linear: the tokens worst at {low} bits (red) at every other width."),
            html.heading("Keeping a tenth of the tokens at full depth"),
            html.paragraph(
                "Each linear keeps its own tenth of the tokens at full depth and reads all others at a low one. "
                "Were the tokens that matter those of largest error, and the same at every width, it would not matter "
                "at which width they are chosen."
            ),
            picture("retention", "Perplexity by how the tokens are chosen; the dashed line is without any."),
            f"<details><summary>Provenance</summary><pre>{html.escape(json.dumps(about, indent=2))}</pre></details>",
        ],
    )


def _policy_table(rows: Sequence[Row], asked: Sequence[float]) -> list[list[str]]:
    by_case = {(row.name, row.asked): row for row in rows}
    used = ["router's bits", *(f"{by_case[ROUTER, bits].bits:.2f}" for bits in asked)]
    return [used] + [[name, *(f"{by_case[name, bits].perplexity:.3f}" for bits in asked)] for name in (ROUTER, *RIVALS)]


def _verdicts(rows: Sequence[Row], asked: Sequence[float]) -> list[list[str]]:
    """The router's excess over each rival, coloured where it is beyond two standard errors."""
    by_case = {(row.name, row.asked): row for row in rows}

    def cell(name: str, bits: float) -> str:
        ratio, error = excess(by_case[ROUTER, bits], by_case[name, bits])
        style = "better" if ratio < -2 * error else "worse" if ratio > 2 * error else "muted"
        spread = f" ± {100 * error:.1f}" if np.isfinite(error) else ""
        return f'<span class="{style}">{100 * ratio:+.1f}{spread} %</span>'

    return [[name, *(cell(name, bits) for bits in asked)] for name in RIVALS]
