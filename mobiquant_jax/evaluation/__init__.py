"""Perplexity at any average bits, and how it is shown: tables, curves and token pictures."""

from mobiquant_jax.evaluation.perplexity import (
    MAX_BITS,
    MIN_BITS,
    LanguageModel,
    PerplexityResult,
    check_bits,
    evaluate_perplexity,
    parse_bits,
    perplexity_curve,
    perplexity_of,
    perplexity_step,
    summed_nll,
)
from mobiquant_jax.evaluation.report import (
    curve_rows,
    format_table,
    markdown_table,
    plot_curve,
    print_result,
    write_json,
)
from mobiquant_jax.evaluation.token_bits import (
    TokenBits,
    format_token_bits,
    measure_token_bits,
    plot_token_bits,
    split_text,
)
from mobiquant_jax.files import save_json

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "LanguageModel",
    "PerplexityResult",
    "TokenBits",
    "check_bits",
    "evaluate_perplexity",
    "curve_rows",
    "format_table",
    "format_token_bits",
    "markdown_table",
    "measure_token_bits",
    "parse_bits",
    "perplexity_curve",
    "perplexity_of",
    "perplexity_step",
    "plot_curve",
    "plot_token_bits",
    "print_result",
    "save_json",
    "split_text",
    "summed_nll",
    "write_json",
]
