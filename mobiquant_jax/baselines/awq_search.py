"""AWQ's search for the channel scales: the exponent whose rounded linears hurt the output least.

q, k, v are judged by the attention's output, gate and up by the MLP's, o and down by their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.baselines.capture import INPUT_GROUPS, Moments
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import QuantSpec, positions
from mobiquant_jax.calibration import channel_scales
from mobiquant_jax.models import LlamaConfig, rms_norm
from mobiquant_jax.models.llama import MLP, Attention

QKV, O_PROJ, GATE_UP, DOWN = INPUT_GROUPS
Loss = Callable[[Float[Array, " in"]], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ChannelScales:
    """What the rows of a block's linears are multiplied by.

    Attributes:
        qkv: rows of q, k and v.
        o: rows of o; None where value heads are shared by query heads.
        gate_up: rows of gate and up.
        down: rows of down.
    """

    qkv: Float[Array, " D"]
    o: Float[Array, " D"] | None
    gate_up: Float[Array, " D"]
    down: Float[Array, " F"]

    def of(self, path: str) -> Float[Array, " in"] | None:
        """The scale of a linear's rows; None for 1."""
        return next(
            scale
            for paths, scale in zip(INPUT_GROUPS, (self.qkv, self.o, self.gate_up, self.down), strict=True)
            if path in paths
        )


def fold(block: Params, scales: ChannelScales, config: LlamaConfig) -> Params:
    """Scales the rows of all linears and divides what feeds them: the block's function stays the same."""
    folded = channel_scales.fold(block, channel_scales.ChannelScales(scales.qkv, scales.gate_up, scales.down))
    if scales.o is None:
        return folded
    kernels = get_kernels(folded, config)
    kernels["attention/o_proj"] = kernels["attention/o_proj"] * scales.o[:, None]
    kernels["attention/v_proj"] = kernels["attention/v_proj"] / scales.o
    return with_kernels(folded, kernels)


def channel_scale(magnitude: Float[Array, " in"], exponent: Float[Array, ""]) -> Float[Array, " in"]:
    """``m^a`` brought to a geometric centre of 1."""
    scale = jnp.maximum(magnitude**exponent, 1e-4)
    return scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))


def search_scales(
    spec: QuantSpec,
    exponents: Float[Array, " steps"],
    block: Params,
    stream: Float[Array, "n T D"],
    found: dict[str, Moments],
) -> ChannelScales:
    """The best scales of a block; traceable.

    Args:
        spec: width and group size of the rounding that is tried out.
        exponents: the candidates.
        block: the block's dense parameters.
        stream: the windows, entering the block, on which outputs are compared.
        found: moments of the inputs of q, o, gate and down.
    """
    model = spec.config
    normed = rms_norm(stream, block["attention_norm"]["scale"], model.rms_norm_eps)
    mixed = stream + jax.lax.map(lambda x: _attend(model, block["attention"], x), normed)
    mlp_input = rms_norm(mixed, block["mlp_norm"]["scale"], model.rms_norm_eps)

    def best(path: str, loss: Loss) -> Float[Array, " in"]:
        scales = jax.vmap(lambda exponent: channel_scale(found[path].magnitude, exponent))(exponents)  # [steps, in]
        return scales[jnp.argmin(jax.lax.map(loss, scales))]

    def own(path: str) -> Float[Array, " in"]:
        return best(path, _linear_loss(spec, get_kernels(block, model)[path], found[path].gram))

    shared_values = model.num_key_value_heads != model.num_attention_heads
    return ChannelScales(
        qkv=best(QKV[0], _output_loss(spec, _attend, block["attention"], QKV, normed)),
        o=None if shared_values else own(O_PROJ[0]),
        gate_up=best(GATE_UP[0], _output_loss(spec, _mlp, block["mlp"], GATE_UP, mlp_input)),
        down=own(DOWN[0]),
    )


def _output_loss(
    spec: QuantSpec,
    module: Callable[[LlamaConfig, Params, Array], Array],
    part: Params,
    paths: tuple[str, ...],
    inputs: Float[Array, "n T D"],
) -> Loss:
    """The loss of a scale: mean squared error of the output of a whole attention or MLP."""
    reference = jax.lax.map(lambda x: module(spec.config, part, x), inputs)

    def loss(scale: Float[Array, " D"]) -> Float[Array, ""]:
        names = [path.split("/")[1] for path in paths]
        rounded = {
            name: round_to_nearest(part[name]["kernel"] * scale[:, None], spec.group_size, spec.bits) for name in names
        }
        fake = part | {name: {"kernel": kernel} for name, kernel in rounded.items()}

        def window(pair: tuple[Array, Array]) -> Float[Array, ""]:
            x, wanted = pair
            return jnp.mean(jnp.square(module(spec.config, fake, x / scale) - wanted))

        return jnp.mean(jax.lax.map(window, (inputs, reference)))

    return loss


def _linear_loss(spec: QuantSpec, weight: Float[Array, "in out"], gram: Float[Array, "in in"]) -> Loss:
    """The loss of a scale: squared error of the linear's own output."""

    def loss(scale: Float[Array, " in"]) -> Float[Array, ""]:
        rounded = round_to_nearest(weight * scale[:, None], spec.group_size, spec.bits)
        difference = rounded / scale[:, None] - weight
        return jnp.einsum("io,ij,jo->", difference, gram, difference)

    return loss


def _attend(config: LlamaConfig, part: Params, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    return Attention(config).apply({"params": part}, x[None], positions(x[None]), None, None)[0][0]


def _mlp(config: LlamaConfig, part: Params, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    apply: Callable[..., Any] = MLP(config).apply
    return apply({"params": part}, x[None], None)[0]
