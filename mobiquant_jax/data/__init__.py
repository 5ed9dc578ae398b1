"""Text for calibration and evaluation: named sources, their token ids, and windows of fixed length."""

from mobiquant_jax.data.sources import SPLITS, load_text
from mobiquant_jax.data.tokens import load_token_ids
from mobiquant_jax.data.windows import token_windows

__all__ = ["SPLITS", "load_text", "load_token_ids", "token_windows"]
