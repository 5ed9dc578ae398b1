"""AWQ (Lin et al., arXiv 2306.00978): channels that carry large activations are scaled up before rounding.

    y = (x / s) (s W)       s = m^a / sqrt(max(m^a) min(m^a))       m = mean |x|,  a searched in [0, 1)

1 / s moves into what feeds the linear: the norm before q/k/v and gate/up, the columns of up before down, those of v
before o where each query head has its own value head. Then each group's range is clipped, q and k excepted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.baselines.capture import INPUT_GROUPS, Moments, TokenWeighting, capture
from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec, positions
from mobiquant_jax.models import LlamaConfig, rms_norm
from mobiquant_jax.models.llama import MLP, Attention
from mobiquant_jax.quant import unclipped_limits
from mobiquant_jax.quant.grid import group

UNCLIPPED = ("attention/q_proj", "attention/k_proj")  # their errors multiply in the scores
QKV, O_PROJ, GATE_UP, DOWN = INPUT_GROUPS


@dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """Settings of AWQ.

    Attributes:
        scale_steps: exponents tried, from 0 in steps of ``1 / scale_steps``.
        clip_steps: ranges tried, from the whole one down; 0 leaves out clipping.
        most_clipping: largest share of the range that may be cut.
        search_windows: windows, evenly spaced, on which the attention's and the MLP's outputs are compared.
        energy_exponent: see `TokenWeighting`.
        first_token: how often the token at position 0 counts.
    """

    scale_steps: int = 20
    clip_steps: int = 10
    most_clipping: float = 0.5
    search_windows: int = 16
    energy_exponent: float = 0.0
    first_token: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.scale_steps < 1 or self.clip_steps < 0 or self.search_windows < 1:
            raise ValueError(
                f"awq needs scale_steps, search_windows >= 1 and clip_steps >= 0, got {self.scale_steps}, "
                f"{self.search_windows}, {self.clip_steps}"
            )
        if not 0 < self.most_clipping < 1:
            raise ValueError(f"awq.most_clipping={self.most_clipping} must lie between 0 and 1")
        _ = self.weighting

    @property
    def weighting(self) -> TokenWeighting:
        """How tokens count in every error."""
        return TokenWeighting(exponent=self.energy_exponent, first=self.first_token)

    @classmethod
    def recipe(cls, bits: int) -> "AWQConfig":
        """The published settings at a width."""
        return cls()


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
    kernels = get_kernels(block, config)
    for path in kernels:
        scale = scales.of(path)
        if scale is not None:
            kernels[path] = kernels[path] * scale[:, None]
    kernels["mlp/up_proj"] = kernels["mlp/up_proj"] / scales.down
    if scales.o is not None:
        kernels["attention/v_proj"] = kernels["attention/v_proj"] / scales.o
    folded = with_kernels(block, kernels)
    folded["attention_norm"] = {"scale": block["attention_norm"]["scale"] / scales.qkv}
    folded["mlp_norm"] = {"scale": block["mlp_norm"]["scale"] / scales.gate_up}
    return folded


def channel_scale(magnitude: Float[Array, " in"], exponent: Float[Array, ""]) -> Float[Array, " in"]:
    """``m^a`` brought to a geometric centre of 1."""
    scale = jnp.maximum(magnitude**exponent, 1e-4)
    return scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))


def clipped_limits(
    weight: Float[Array, "in out"], gram: Float[Array, "in in"], spec: QuantSpec, config: AWQConfig
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """Group limits ``[max(min W, -m), min(max W, m)]``, m a share of max |W| that loses least.

    The loss is the squared error of the group's share of the output, ``d^T H_g d`` with d the weight error.
    """
    lo, hi = unclipped_limits(weight, spec.group_size)
    if config.clip_steps == 0:
        return lo, hi
    largest = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    groups = len(weight) // spec.group_size
    own = jnp.einsum("gigj->gij", gram.reshape(groups, spec.group_size, groups, spec.group_size))

    def limits(share: Array) -> tuple[Array, Array]:
        return jnp.maximum(lo, -share * largest), jnp.minimum(hi, share * largest)

    def error(share: Array) -> Float[Array, "groups out"]:
        difference = group(fake_quantize(weight, *limits(share), spec.bits) - weight, spec.group_size)
        return jnp.einsum("gio,gij,gjo->go", difference, own, difference)

    shares = 1 - config.most_clipping * jnp.arange(config.clip_steps) / config.clip_steps
    best = jnp.argmin(jax.lax.map(error, shares), axis=0)
    return limits(shares[best])


def build(spec: QuantSpec, config: AWQConfig) -> Callable[[BlockTask], BlockOutcome]:
    """AWQ for the blocks of a model."""
    model = spec.config
    shared_values = model.num_key_value_heads != model.num_attention_heads

    def rounded(weight: Array) -> Array:
        return round_to_nearest(weight, spec.group_size, spec.bits)

    def best_scale(moments: Moments, loss: Callable[[Array], Array]) -> Float[Array, " in"]:
        exponents = jnp.arange(config.scale_steps) / config.scale_steps
        scales = jax.vmap(lambda a: channel_scale(moments.magnitude, a))(exponents)  # [steps, in]
        return scales[jnp.argmin(jax.lax.map(loss, scales))]

    def output_loss(
        module: Callable[[Params, Array], Array], part: Params, names: tuple[str, ...], inputs: Float[Array, "N T D"]
    ) -> Callable[[Array], Array]:
        """The loss of a scale: squared error of the output of a whole attention or MLP, tokens weighted."""
        reference = jax.lax.map(lambda x: module(part, x[None])[0], inputs)

        def loss(scale: Float[Array, " in"]) -> Float[Array, ""]:
            fake = part | {name: {"kernel": rounded(part[name]["kernel"] * scale[:, None])} for name in names}

            def window(pair: tuple[Array, Array]) -> Float[Array, ""]:
                x, wanted = pair
                # q, k, v (or gate, up) see x / s.
                difference = module(fake, (x / scale)[None])[0] - wanted
                return jnp.mean(config.weighting(x[None])[0] * jnp.sum(jnp.square(difference), axis=-1))

            return jnp.mean(jax.lax.map(window, (inputs, reference)))

        return loss

    def linear_loss(weight: Float[Array, "in out"], gram: Float[Array, "in in"]) -> Callable[[Array], Array]:
        """The loss of a scale: squared error of the linear's own output."""

        def loss(scale: Float[Array, " in"]) -> Float[Array, ""]:
            difference = rounded(weight * scale[:, None]) / scale[:, None] - weight
            return jnp.einsum("io,ij,jo->", difference, gram, difference)

        return loss

    def attend(part: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return Attention(model).apply({"params": part}, x, positions(x), None, None)[0]

    def mlp(part: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        apply: Callable[..., Any] = MLP(model).apply
        return apply({"params": part}, x, None)

    def search(block: Params, stream: Float[Array, "N T D"], found: dict[str, Moments]) -> ChannelScales:
        stride = max(1, len(stream) // config.search_windows)
        x = stream[::stride][: config.search_windows]
        normed = rms_norm(x, block["attention_norm"]["scale"], model.rms_norm_eps)
        mixed = x + jax.lax.map(lambda window: attend(block["attention"], window[None])[0], normed)
        mlp_input = rms_norm(mixed, block["mlp_norm"]["scale"], model.rms_norm_eps)

        def own(path: str) -> Float[Array, " in"]:
            part, name = path.split("/")
            return best_scale(found[path], linear_loss(block[part][name]["kernel"], found[path].gram))

        attention_loss = output_loss(attend, block["attention"], ("q_proj", "k_proj", "v_proj"), normed)
        mlp_loss = output_loss(mlp, block["mlp"], ("gate_proj", "up_proj"), mlp_input)
        return ChannelScales(
            qkv=best_scale(found[QKV[0]], attention_loss),
            o=None if shared_values else own(O_PROJ[0]),
            gate_up=best_scale(found[GATE_UP[0]], mlp_loss),
            down=own(DOWN[0]),
        )

    @jax.jit
    def quantize_block(block: Params, stream: Float[Array, "N T D"]) -> Params:
        found = capture(model, block, stream, tuple(paths[0] for paths in INPUT_GROUPS), config.weighting)
        scales = search(block, stream, found)
        folded = fold(block, scales, model)
        kernels = get_kernels(folded, model)
        for paths in INPUT_GROUPS:
            gram, scale = found[paths[0]].gram, scales.of(paths[0])
            if scale is not None:
                gram = gram / (scale[:, None] * scale)  # of x / s
            for path in paths:
                if path in UNCLIPPED:
                    kernels[path] = rounded(kernels[path])
                else:
                    limits = clipped_limits(kernels[path], gram, spec, config)
                    kernels[path] = fake_quantize(kernels[path], *limits, spec.bits)
        return with_kernels(folded, kernels)

    return lambda task: BlockOutcome(params=quantize_block(task.dense, task.quantized))
