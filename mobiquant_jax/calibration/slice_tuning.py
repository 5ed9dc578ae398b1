"""Slices that are tuned alone, once all coarser ones are final.

The code at few bits and the code at many cannot both be best: what moves a weight into another bin at 2 bits moves it
at 8 bits too. But within its bin a weight is free. So the top bits of every code stay as they are, and the bits below
learn what is best for the widths that read them:

    floor(p / 2^(8 - w)) = const,        p = 64 W / s + z the position on the grid, w the last final width

Reads of up to ``w`` bits do not change by a bit. Positions start from given weights, each where it lies in its final
bin, or at the end of the bin that is nearer to it. For slices that were tuned with the coarser ones those are the tuned
weights. Slices beyond (``calibration.fine_above``) start from the unquantized model's: most weights are then what they
were before they were tuned for few bits.

A slice is trained at its own width and at all beyond it, up to ``fine_above``, whose bins lie in its own. A model of
260 thousand parameters, one seed, was better for it from 3.25 to 4 bits by 0.2 to 0.4 %, and worse from 2.25 to 3 by
0.2 to 0.3 % (``results/slice_tuning.json``).

But where linears read them one after the other, as routers have it between two widths, those that do are no longer what
the others were tuned with: of SmolLM2-135M at 4 bits, perplexity rises by 2.1 % where its attention alone reads 6. The
attention's may start from its tuned weights instead (``calibration.fine_tuned_attention``): it rose by 1.4 % then, and
one seed of SmolLM2 was better at all bits above 4, by 0.1 to 1.7 % (``results/candidates.json``). A model of 260
thousand parameters was 1 to 2 % worse (``results/fine_slices.json``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration import shapes
from mobiquant_jax.calibration.distillation import Distiller
from mobiquant_jax.calibration.linears import Params, UniformWidth
from mobiquant_jax.calibration.optimizer import FINAL_RATE
from mobiquant_jax.calibration.samples import spread_budgets
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.layers import project
from mobiquant_jax.quant import (
    CODE_BITS,
    LAST_POSITION,
    SlicedWeight,
    grid_position,
    read_position,
    slice_codes,
    weight_at,
)

_NORMS = ("attention_norm", "mlp_norm")
_MARGIN = 2**CODE_BITS - LAST_POSITION  # what a weight keeps from the upper end of its bin


class PositionLinear(nn.Module):
    """A linear whose weights are positions on a fixed grid, all tokens at one width.

    Attributes:
        features: number of outputs.
        elastic: slicing.
        dtype: type of the multiplication and of the result.
    """

    features: int
    elastic: ElasticConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: UniformWidth) -> Float[Array, "B T out"]:
        """``y = x @ W_width`` with a straight-through gradient to the positions."""
        groups = (x.shape[-1] // self.elastic.group_size, self.features)
        position = self.param("position", nn.initializers.zeros, (x.shape[-1], self.features))
        scale = jax.lax.stop_gradient(self.param("scale", nn.initializers.ones, groups))
        zero = jax.lax.stop_gradient(self.param("zero", nn.initializers.zeros, groups))
        return project(x.astype(self.dtype), read_position(position, scale, zero, control.width), self.dtype)


def positions(layers: Params, weights: Params, final_width: int) -> Params:
    """The stacked blocks' parameters for this stage: as near to given weights as final bins allow.

    Args:
        layers: variables of the packed blocks, ``params`` and ``slices``.
        weights: parameters of blocks whose kernels are wanted, unquantized or trained ones.
        final_width: how many bits of every code are final.
    """
    params: Params = {name: layers["params"][name] for name in _NORMS}
    for part, linears in layers["slices"].items():
        params[part] = {
            name: _position(linear["weight"], weights[part][name]["kernel"], final_width)
            for name, linear in linears.items()
        }
    return params


def _position(weight: SlicedWeight, kernel: Float[Array, "L rows columns"], final_width: int) -> Params:
    scale, zero = weight.scale.astype(jnp.float32), weight.zero.astype(jnp.float32)
    codes = jax.vmap(SlicedWeight.codes)(weight).astype(jnp.float32)
    return {
        "position": _in_bin(jax.vmap(grid_position)(kernel, scale, zero), codes, final_width),
        "scale": scale,
        "zero": zero,
    }


def _in_bin(position: Array, inside: Array, final_width: int) -> Array:
    """The position nearest to ``position`` in the bin of ``final_width`` bits around ``inside``."""
    size = 2.0 ** (CODE_BITS - final_width)
    low = jnp.floor(inside / size) * size
    return jnp.clip(position, low, low + (size - _MARGIN))


@dataclass(frozen=True, kw_only=True)
class SliceTuner(Distiller):
    """Tunes the bits of every code below those that are final.

    Attributes:
        final_width: how many bits of every code are final.
        reads: the widths to train at, all beyond.
        epochs: length of the rate's decay.
        rate: peak learning rate, in steps of the 8-bit code.
    """

    STREAM = 3_000_000

    final_width: int
    reads: tuple[int, ...]
    epochs: int
    rate: float

    @property
    def stream(self) -> int:
        """See `Distiller`."""
        return self.STREAM + 100_000 * self.final_width

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """See `Distiller`."""
        return partial(PositionLinear, elastic=self.elastic)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """See `Distiller`."""
        rate = optax.cosine_decay_schedule(self.rate, max(self.epochs * self.steps, 1), alpha=FINAL_RATE)
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        return optax.partition({True: adam, False: optax.set_to_zero()}, _is_position)

    @cached_property
    def abstract_params(self) -> Params:
        """See `Distiller`."""
        return _abstract_positions(self.config, self.elastic)

    def draw_steps(self, rng: np.random.Generator) -> Int[np.ndarray, " steps"]:
        """See `Distiller`."""
        return spread_budgets(self.reads, self.steps, rng).astype(np.int32)

    def constrain(self, params: Params, before: Params) -> Params:
        """See `Distiller`: no weight leaves its bin at the last final width."""

        def one(path: Any, new: Array, old: Array) -> Array:
            return _in_bin(new, old, self.final_width) if path[-1].key == "position" else new

        return jax.tree_util.tree_map_with_path(one, params, before)

    @cached_property
    def begin(self) -> Callable[[Params, Params], Params]:
        """Jitted `positions` of the packed blocks, given the parameters of those that they start from."""
        return jax.jit(_positions_of(self.final_width), out_shardings=self.placement.shardings(self.abstract_params))

    @cached_property
    def tuned_attention(self) -> Callable[[Params], Params]:
        """Jitted: the parameters to the weights of the attention at their positions, as without quantization."""

        def one(linear: Params) -> Params:
            return {"kernel": jax.vmap(weight_at)(linear["position"], linear["scale"], linear["zero"])}

        def make(params: Params) -> Params:
            return {"attention": {name: one(linear) for name, linear in params["attention"].items()}}

        made = jax.eval_shape(make, self.abstract_params)
        return jax.jit(make, out_shardings=self.placement.shardings(made))

    @cached_property
    def slices(self) -> Callable[[Params], Params]:
        """Jitted: the parameters to the blocks' ``slices``."""
        made = shapes.packed_layers(self.config, self.elastic)["slices"]
        return jax.jit(_slices_of(self.elastic.slice_bits), out_shardings=self.placement.shardings(made))


@lru_cache(maxsize=8)
def _abstract_positions(config: LlamaConfig, elastic: ElasticConfig) -> Params:
    """The same for all slices."""
    layers, weights = shapes.packed_layers(config, elastic), shapes.dense_model(config)["layers"]
    return jax.eval_shape(_positions_of(0), layers, weights)  # shapes are those of any width


@lru_cache(maxsize=8)
def _positions_of(final_width: int) -> Callable[[Params, Params], Params]:
    """One function for equal arguments, as `shapes.packing`."""
    return partial(positions, final_width=final_width)


@lru_cache(maxsize=8)
def _slices_of(slice_bits: tuple[int, ...]) -> Callable[[Params], Params]:
    """``params -> slices``; one function for equal arguments, as `shapes.packing`."""

    def one(linear: Params) -> SlicedWeight:
        codes = jnp.floor(linear["position"]).astype(jnp.uint8)
        return slice_codes(codes, linear["scale"], linear["zero"], slice_bits)

    def make(params: Params) -> Params:
        parts = {part: linears for part, linears in params.items() if part not in _NORMS}
        return {
            part: {name: {"weight": jax.vmap(one)(linear)} for name, linear in linears.items()}
            for part, linears in parts.items()
        }

    return make


def _is_position(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "position", params)
