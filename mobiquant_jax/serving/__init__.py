"""Text generation on the device."""

from mobiquant_jax.serving.engine import Chunk, DecodeFn, Generation, generate, stream
from mobiquant_jax.serving.packed import PackedModel, ServingArrays, device_bytes, prepare
from mobiquant_jax.serving.sampling import SamplingConfig, sample
from mobiquant_jax.serving.transcript import Transcript

__all__ = [
    "Chunk",
    "DecodeFn",
    "Generation",
    "PackedModel",
    "SamplingConfig",
    "ServingArrays",
    "Transcript",
    "device_bytes",
    "generate",
    "prepare",
    "sample",
    "stream",
]
