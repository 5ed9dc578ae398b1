"""Fixed-width baselines: one quantized model a width, each a plain dense model with dequantized kernels."""

from mobiquant_jax.baselines.autoround import AutoRoundConfig
from mobiquant_jax.baselines.awq import AWQConfig
from mobiquant_jax.baselines.engine import QuantizedModel, quantize_blocks
from mobiquant_jax.baselines.gptq import GPTQConfig
from mobiquant_jax.baselines.methods import METHODS, Baseline, Method, find_method, quantize_model, run_omniquant_at
from mobiquant_jax.baselines.omniquant import OmniQuantConfig
from mobiquant_jax.baselines.qat import QATConfig
from mobiquant_jax.baselines.rtn import RTNConfig
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec

__all__ = [
    "METHODS",
    "AWQConfig",
    "AutoRoundConfig",
    "Baseline",
    "BlockOutcome",
    "BlockTask",
    "GPTQConfig",
    "Method",
    "OmniQuantConfig",
    "QATConfig",
    "QuantSpec",
    "QuantizedModel",
    "RTNConfig",
    "find_method",
    "quantize_blocks",
    "quantize_model",
    "run_omniquant_at",
]
