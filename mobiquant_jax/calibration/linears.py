"""The trainable linears that calibration puts into the model's own block.

Both have the parameters ``kernel``, ``clipping`` and ``router``, so that a block's parameters serve either.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.layers import project
from mobiquant_jax.quant import Clipping, fake_quantize, limits, quantize, widths
from mobiquant_jax.routing import Policy, Router, RoutingInputs, mask_bits, score

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class UniformWidth:
    """The control of linears that train at one width: all tokens read ``width`` bits."""

    width: Int[Array, ""]


class NestedLinear(nn.Module):
    """A linear through the nested quantizer at one width for all tokens: one matmul, no routing.

    Attributes:
        features: number of outputs.
        elastic: slicing and routing.
        dtype: type of the multiplication and of the result.
    """

    features: int
    elastic: ElasticConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: UniformWidth) -> Float[Array, "B T out"]:
        """``y = x @ W_width`` with straight-through gradients."""
        kernel, clipping = _kernel(self, x.shape[-1])
        fake = fake_quantize(kernel, clipping, control.width)
        return project(x.astype(self.dtype), fake, self.dtype)


class RoutedLinear(nn.Module):
    """A linear through the nested quantizer, each token at its own depth, gates straight-through.

    Slices are residuals, ``R_1 = W_1`` and ``R_e = W_e - W_{e-1}``, and all of them meet their masked inputs in one
    matmul: ``y = [x, m_2 x, ..., m_E x] @ [R_1; R_2; ...; R_E]``. Closed gates are computed too: their gradient is what
    opens them.

    Attributes:
        features: number of outputs.
        elastic: slicing and routing.
        dtype: type of the multiplication and of the result.
        depth: the most slices that a token reads; all of them if None. The router scores every slice.
    """

    features: int
    elastic: ElasticConfig
    dtype: DTypeLike = jnp.float32
    depth: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: Policy) -> Float[Array, "B T out"]:
        """Routes and multiplies; sows the bits of each token into ``stats``."""
        kernel, clipping = _kernel(self, x.shape[-1])
        every_slice = self.elastic.slice_bits
        router = self.param("router", Router.create, x.shape[-1], self.elastic.router_hidden_size, len(every_slice))
        slice_bits = every_slice[: self.depth]
        # How a router sees its input is no part of the model, as at run time.
        scores = score(router, jax.lax.stop_gradient(x))[..., : len(slice_bits) - 1]
        masks = control.masks(RoutingInputs(x=x, scores=scores, slice_bits=slice_bits))
        self.sow("stats", "bits", mask_bits(masks, slice_bits))
        read = jax.vmap(fake_quantize, in_axes=(None, None, 0))
        reads = read(kernel, clipping, jnp.asarray(widths(slice_bits)))  # [E, in, out]
        residuals = jnp.diff(reads, axis=0, prepend=0.0)
        every = jnp.concatenate([jnp.ones_like(masks[..., :1]), masks], axis=-1).astype(self.dtype)  # [B, T, E]
        masked = every[..., None] * x.astype(self.dtype)[..., None, :]  # [B, T, E, in]
        # Two contracted dimensions, not one of their product: a mesh splits the inputs.
        return jnp.einsum("btei,eio->bto", masked, residuals.astype(self.dtype), preferred_element_type=self.dtype)


def _kernel(module: "NestedLinear | RoutedLinear", in_features: int) -> tuple[Float[Array, "in out"], Clipping]:
    """The kernel and its clipping logits, as parameters of the calling module."""
    kernel = module.param("kernel", nn.initializers.lecun_normal(), (in_features, module.features))
    create = partial(Clipping.create, in_features, module.features, module.elastic.group_size)
    return kernel, module.param("clipping", lambda _: create())


def trainable(dense: Params, config: LlamaConfig, elastic: ElasticConfig, key: Key[Array, ""]) -> Params:
    """A block's parameters for calibration: the dense ones with clipping and a router at each linear.

    Args:
        dense: parameters of one dense block.
        config: architecture.
        elastic: slicing and routing.
        key: seeds the routers.
    """
    params = {part: dict(leaves) for part, leaves in dense.items()}
    keys = jax.random.split(key, len(config.linear_shapes()))
    for (path, (rows, columns)), linear_key in zip(config.linear_shapes().items(), keys, strict=True):
        part, name = path.split("/")
        params[part][name] = {
            "kernel": dense[part][name]["kernel"],
            "clipping": Clipping.create(rows, columns, elastic.group_size),
            "router": Router.create(linear_key, rows, elastic.router_hidden_size, len(elastic.slice_bits)),
        }
    return params


def pack_block(params: Params, config: LlamaConfig, elastic: ElasticConfig) -> Params:
    """The elastic block's variables: kernels encoded, routers and norms kept, thresholds not yet recorded."""
    variables: Params = {"params": {}, "slices": {}, "routing": {}}
    for part in ("attention_norm", "mlp_norm"):
        variables["params"][part] = params[part]
    for path in config.linear_shapes():
        part, name = path.split("/")
        linear = params[part][name]
        weight = quantize(linear["kernel"], *limits(linear["kernel"], linear["clipping"]), elastic.slice_bits)
        variables["params"].setdefault(part, {})[name] = {"router": linear["router"]}
        variables["slices"].setdefault(part, {})[name] = {"weight": weight}
        thresholds = jnp.zeros(len(elastic.budget_grid))
        variables["routing"].setdefault(part, {})[name] = {"thresholds": thresholds}
    return variables
