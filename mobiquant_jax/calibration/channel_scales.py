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
tokens alike: the huge activations of a first token, which later layers live by, are made by single rows of down.
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

EXPONENTS = np.array([(a / 10, b) for a in range(10) for b in (0.0, 0.25, 0.5)], np.float32)
"""Pairs (a, b) that are tried."""

_SITES = {  # what the scale is divided out of: the linears that read it
    "attention_norm": ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    "mlp_norm": ("mlp/gate_proj", "mlp/up_proj"),
    "up_proj": ("mlp/down_proj",),
}
_TINY = 1e-12


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
    config: LlamaConfig, block: Params, x: Float[Array, "B T D"], group_size: int, width: int
) -> ChannelScales:
    """The best scales of a block; traceable.

    Args:
        config: architecture.
        block: parameters of the dense block.
        x: what enters it.
        group_size: of the slices.
        width: bits at which weights are to be right.
    """
    moments = _input_moments(config, block, x)

    def best(paths: tuple[str, ...]) -> Float[Array, " in"]:
        part = paths[0].split("/")[0]
        kernel = jnp.concatenate([block[part][path.split("/")[1]]["kernel"] for path in paths], axis=1)
        return _best_scale(kernel, moments[paths[0]], group_size, width)

    return ChannelScales(**{fed: best(paths) for fed, paths in _SITES.items()})


def _best_scale(
    kernel: Float[Array, "in out"], moment: Float[Array, " in"], group_size: int, width: int
) -> Float[Array, " in"]:
    clipping = Clipping.create(kernel.shape[0], kernel.shape[1], group_size)
    log_input, log_row = _centred_log_rms(moment), _centred_log_rms(jnp.mean(jnp.square(kernel), axis=1))

    def scale(exponents: Float[Array, "2"]) -> Float[Array, " in"]:
        return jnp.exp(exponents[0] * log_input - exponents[1] * log_row)

    def loss(exponents: Float[Array, "2"]) -> Float[Array, ""]:
        rows = scale(exponents)[:, None]
        error = fake_quantize(kernel * rows, clipping, width) / rows - kernel
        return moment @ jnp.mean(jnp.square(error), axis=1)

    grid = jnp.asarray(EXPONENTS)
    return scale(grid[jnp.argmin(jax.lax.map(loss, grid))])


def _centred_log_rms(moment: Float[Array, " in"]) -> Float[Array, " in"]:
    """Of second moments: the logarithm of their root over its geometric mean."""
    logarithm = 0.5 * jnp.log(jnp.maximum(moment, _TINY))
    return logarithm - jnp.mean(logarithm)


def _input_moments(config: LlamaConfig, block: Params, x: Float[Array, "B T D"]) -> dict[str, Float[Array, " in"]]:
    """Mean squares of every linear's inputs, by path."""

    def window(x: Float[Array, "T D"]) -> Any:
        apply: Callable[..., Any] = Block(config, linear=_Recorded).apply
        positions = jnp.arange(len(x), dtype=jnp.int32)[None]
        return apply({"params": block}, x[None], positions, mutable=["moments"])[1]["moments"]

    found = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(window, x))
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
        return project(x.astype(self.dtype), kernel).astype(self.dtype)
