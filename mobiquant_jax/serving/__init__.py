"""Text generation on the device."""

from mobiquant_jax.serving.engine import Chunk, DecodeFn, Generation, generate, stream
from mobiquant_jax.serving.packed import PackedModel, ServingArrays, device_bytes, prepare
from mobiquant_jax.serving.sampling import SamplingConfig, sample

__all__ = [
    "Chunk",
    "DecodeFn",
    "Generation",
    "PackedModel",
    "SamplingConfig",
    "ServingArrays",
    "device_bytes",
    "generate",
    "prepare",
    "sample",
    "stream",
]
