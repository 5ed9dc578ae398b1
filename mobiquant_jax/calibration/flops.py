"""What a block's training costs in floating-point operations, and what accelerators can do at best."""

import jax

from mobiquant_jax.calibration.config import Stage
from mobiquant_jax.models import LlamaConfig

# Dense bfloat16 operations a second of a device, by how its kind's name in JAX begins; the longest beginning counts.
# Sources: NVIDIA's H100 and H200 data sheets (SXM, without sparsity), cloud.google.com/tpu/docs.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Operations a second of all the devices together, or None where their kind is not known."""
    kind = devices[0].device_kind
    known = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(known, key=len)] * len(devices) if known else None


def block_flops(config: LlamaConfig, length: int, slices: int = 1) -> float:
    """Operations of a block's matrix products in one forward pass over one window.

        2 T slices sum_l in_l out_l  +  2 T^2 heads head_dim

    Attention counts the causal half of its two products.

    Args:
        config: architecture.
        length: T, tokens of the window.
        slices: how many products each linear does.
    """
    linears = sum(rows * columns for rows, columns in config.linear_shapes().values())
    attention = length * config.num_attention_heads * config.head_dim
    return 2.0 * length * (slices * linears + attention)


def epoch_flops(config: LlamaConfig, stage: Stage, *, windows: int, length: int, slices: int, follows: bool) -> float:
    """Operations of an epoch's training steps: forward, and twice that backward.

    A routed linear multiplies every slice, those behind closed gates too: their gradient is what opens them. Routers,
    quantization, evaluation and the recomputed forward pass are not counted.

    Args:
        config: architecture.
        stage: whose epoch.
        windows: samples of an epoch.
        length: tokens of a window.
        slices: of each linear.
        follows: whether the full-precision block runs on the quantized stream too, forward only.
    """
    step = 3 * block_flops(config, length, slices if stage.routing == "penalty" else 1)
    return windows * (step + (block_flops(config, length) if follows else 0.0))
