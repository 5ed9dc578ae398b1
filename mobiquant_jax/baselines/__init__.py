"""Fixed-width baselines: one quantized model a width, each a plain dense model with dequantized kernels."""

from mobiquant_jax.baselines.autoround import AutoRoundConfig
from mobiquant_jax.baselines.awq import AWQConfig
from mobiquant_jax.baselines.engine import QuantizedModel, Run, quantize_blocks
from mobiquant_jax.baselines.figure import plot_perplexities
from mobiquant_jax.baselines.gptq import GPTQConfig
from mobiquant_jax.baselines.grid import check_bits
from mobiquant_jax.baselines.methods import (
    METHODS,
    Method,
    find_method,
    quantize_model,
    quantize_models,
    run_omniquant_at,
)
from mobiquant_jax.baselines.omniquant import OmniQuantConfig
from mobiquant_jax.baselines.qat import QATConfig
from mobiquant_jax.baselines.results import Results, best_settings, open_results, read_results
from mobiquant_jax.baselines.rtn import RTNConfig
from mobiquant_jax.baselines.settings import program
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.table import perplexity_table

__all__ = [
    "METHODS",
    "AWQConfig",
    "AutoRoundConfig",
    "BlockOutcome",
    "BlockTask",
    "GPTQConfig",
    "Method",
    "OmniQuantConfig",
    "QATConfig",
    "QuantSpec",
    "QuantizedModel",
    "RTNConfig",
    "Results",
    "Run",
    "best_settings",
    "check_bits",
    "find_method",
    "open_results",
    "perplexity_table",
    "plot_perplexities",
    "program",
    "quantize_blocks",
    "quantize_model",
    "quantize_models",
    "read_results",
    "run_omniquant_at",
]
