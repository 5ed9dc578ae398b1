"""Channel scales: input channels that matter get finer steps, while every block computes what it did.

    y = (x / s) (s W)

A group of weights shares one step, so a row that is scaled up is read with a step that is finer for it. ``1 / s`` moves
into what feeds the linear, and costs nothing at run time: into the norm before q, k and v or before gate and up, into
the columns of up before down (the idea of AWQ, arXiv 2306.00978). Rows of o stay: query heads may share their values.

The scale of a channel whose input has root mean square m_j and whose row of weights has w_j, both divided by their
geometric means over channels, is

    s_j = m_j^a / w_j^b

and (a, b) the pair of a grid with the least ``sum_j m_j^2 |d_j|^2``, d the error of the scaled weights at some width,
scaled back: the output's expected squared error were the inputs uncorrelated. The grid holds (0, 0). Means are over all
tokens alike: the huge activations of a first token, which later layers live by, are made by single rows of down. A
channel that is next to silent counts as one of a 32nd of the median, or its row's step would be as coarse as it likes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.models import Block, LlamaConfig
from mobiquant_jax.models.layers import project
from mobiquant_jax.quant import Clipping, fake_quantize
from mobiquant_jax.routing import cutoff

EXPONENTS = np.array([(a / 10, b) for a in range(10) for b in (0.0, 0.25, 0.5)], np.float32)
"""Pairs (a, b) that are tried."""

_SITES = {  # what the scale is divided out of: the linears that read it
    "attention_norm": ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    "mlp_norm": ("mlp/gate_proj", "mlp/up_proj"),
    "up_proj": ("mlp/down_proj",),
}
_QUIETEST = 2.0**-10  # of the median mean square
_TINY = 1e-30


class ChannelScales(NamedTuple):
    """What the rows of a block's linears are multiplied by, named by what is divided; stacked blocks lead with L.

    Attributes:
        attention_norm: rows of q, k and v.
        mlp_norm: rows of gate and up.
        up_proj: rows of down.
    """

    attention_norm: Float[Array, "*L D"]
    mlp_norm: Float[Array, "*L D"]
    up_proj: Float[Array, "*L F"]


def fold(block: Params, scales: ChannelScales) -> Params:
    """Scales a block's rows and divides what feeds them: its function stays the same.

    Args:
        block: parameters of a dense block, or of stacked ones.
        scales: of that block or those.
    """
    folded: Params = {part: dict(leaves) for part, leaves in block.items()}
    for fed, paths in _SITES.items():
        for part, name in (path.split("/") for path in paths):
            rows = getattr(scales, fed)[..., :, None]
            folded[part][name] = {"kernel": folded[part][name]["kernel"] * rows}
    for norm in ("attention_norm", "mlp_norm"):
        folded[norm] = {"scale": block[norm]["scale"] / getattr(scales, norm)}
    folded["mlp"]["up_proj"] = {"kernel": folded["mlp"]["up_proj"]["kernel"] / scales.up_proj[..., None, :]}
    return folded


def stack_scales(scales: Sequence[ChannelScales]) -> ChannelScales:
    """Those of blocks that are stacked, on the host."""
    stacked: ChannelScales = jax.tree.map(lambda *leaves: np.stack(leaves), *scales)
    return stacked


def find_scales(
    config: LlamaConfig, block: Params, x: Float[Array, "B T D"], group_size: int, width: int, at_once: int = 1
) -> ChannelScales:
    """The best scales of a block; traceable.

    Args:
        config: architecture.
        block: parameters of the dense block.
        x: what enters it.
        group_size: of the slices.
        width: bits at which weights are to be right.
        at_once: windows that go through the block together; the batch is a multiple of it.
    """
    with jax.default_matmul_precision("float32"):  # as the streams are made
        moments = _input_moments(config, block, x, at_once)

    def best(paths: tuple[str, ...]) -> Float[Array, " in"]:
        kernels = [block[path.split("/")[0]][path.split("/")[1]]["kernel"] for path in paths]
        return _best_scale(kernels, moments[paths[0]], group_size, width)

    return ChannelScales(**{fed: best(paths) for fed, paths in _SITES.items()})


def _best_scale(
    kernels: Sequence[Float[Array, "in out"]], moment: Float[Array, " in"], group_size: int, width: int
) -> Float[Array, " in"]:
    log_input = _centred_log_rms(moment)
    log_row = _centred_log_rms(jnp.stack([jnp.sum(jnp.square(kernel), axis=1) for kernel in kernels]).sum(axis=0))

    def scale(exponents: Float[Array, "2"]) -> Float[Array, " in"]:
        return jnp.exp(exponents[0] * log_input - exponents[1] * log_row)

    def loss(exponents: Float[Array, "2"]) -> Float[Array, ""]:
        rows = scale(exponents)[:, None]

        def of(kernel: Float[Array, "in out"]) -> Float[Array, ""]:
            clipping = Clipping.create(kernel.shape[0], kernel.shape[1], group_size)
            error = fake_quantize(kernel * rows, clipping, width) / rows - kernel
            return jnp.sum(moment[:, None] * jnp.square(error))

        return jnp.stack([of(kernel) for kernel in kernels]).sum()

    grid = jnp.asarray(EXPONENTS)
    return scale(grid[jnp.argmin(jax.lax.map(loss, grid))])


def _centred_log_rms(moment: Float[Array, " in"]) -> Float[Array, " in"]:
    """Of mean squares: the logarithm of their root over its geometric mean."""
    median = cutoff(moment, jnp.ones_like(moment), moment.size / 2)
    logarithm = 0.5 * jnp.log(jnp.maximum(moment, _QUIETEST * median + _TINY))
    return logarithm - jnp.mean(logarithm)


def _input_moments(
    config: LlamaConfig, block: Params, x: Float[Array, "B T D"], at_once: int
) -> dict[str, Float[Array, " in"]]:
    """Mean squares of every linear's inputs, by path."""

    def windows(x: Float[Array, "b T D"]) -> Any:
        apply: Callable[..., Any] = Block(config, linear=_Recorded).apply
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return apply({"params": block}, x, positions, mutable=["moments"])[1]["moments"]

    # Neighbours in the batch lie on one device: each step takes one window of every device's.
    steps = x.reshape(at_once, -1, *x.shape[1:]).swapaxes(0, 1)
    found = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(windows, steps))
    return {path: found[path.split("/")[0]][path.split("/")[1]]["square"][0] for path in config.linear_shapes()}


class _Recorded(nn.Module):
    """A dense linear that sows the mean squares of its inputs into ``moments``."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: None = None) -> Float[Array, "B T out"]:
        del control
        self.sow("moments", "square", jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(0, 1)))
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        return project(x.astype(self.dtype), kernel, self.dtype)
