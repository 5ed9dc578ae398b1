"""Text generation on the device."""

from mobiquant_jax.serving.engine import Chunk, DecodeFn, Generation, generate, stream
from mobiquant_jax.serving.sampling import SamplingConfig, sample

__all__ = ["Chunk", "DecodeFn", "Generation", "SamplingConfig", "generate", "sample", "stream"]
