"""The elastic runtime: LLaMA whose linears read packed slices, at a depth chosen per token.

Variables of an elastic model::

    params/layers/<linear>/router        Router            beside the norms, the embedding and the head
    slices/layers/<linear>/weight        SlicedWeight
    routing/layers/<linear>/thresholds   [L, grid]         average bits -> tau

The two collections ``stats`` (bits of each token) and ``scores`` (router scores) are sown when mutable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.llama import Llama
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.quant import SlicedWeight, check_group_size, check_slice_bits, slice_codes
from mobiquant_jax.routing import (
    Policy,
    Router,
    RoutingInputs,
    TableBudget,
    check_grid,
    mask_bits,
    mask_depth,
    score,
)
from mobiquant_jax.sharding import Placement, one_device

Variables = dict[str, Any]
DENSE_BITS = 32.0  # what an unquantized model reports as its tokens' bits


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """How a model's linears are sliced and routed.

    Attributes:
        group_size: inputs that share one scale and zero point.
        slice_bits: bits of each slice, most significant first.
        router_hidden_size: width of each router's MLP.
        budget_grid: average bits at which thresholds are recorded, from the first slice's bits to 8.
    """

    group_size: int = 128
    slice_bits: tuple[int, ...] = (2, 2, 2, 2)
    router_hidden_size: int = 32
    budget_grid: tuple[float, ...] = (2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)

    def __post_init__(self) -> None:
        """Checks the fields that need no model."""
        check_slice_bits(self.slice_bits)
        check_grid(self.budget_grid, self.slice_bits)
        if self.router_hidden_size < 2:
            raise ValueError(f"router hidden size {self.router_hidden_size} must be at least 2")

    def check_model(self, config: LlamaConfig) -> None:
        """Raises ValueError, naming the linear, unless the group size divides every linear's inputs."""
        for name, (in_features, _) in config.linear_shapes().items():
            try:
                check_group_size(in_features, self.group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


class ElasticLinear(nn.Module):
    """A linear over a `SlicedWeight`, each token at the depth its routing policy gives.

    Attributes:
        features: number of outputs.
        elastic: slicing and routing.
        dtype: type of the multiplication and of the result.
        placement: the mesh that the weights are split over, or None on one device.
    """

    features: int
    elastic: ElasticConfig
    dtype: DTypeLike = jnp.float32
    placement: Placement | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: Policy) -> Float[Array, "B T out"]:
        """Routes and multiplies.

        Args:
            x: activations.
            control: the routing policy.

        Returns:
            ``y[t] = x[t] @ W_{depth[t]}``.
        """
        cfg = self.elastic
        in_features = x.shape[-1]
        weight = self.variable("slices", "weight", _empty_slices, in_features, self.features, cfg).value
        router = self.param("router", Router.create, in_features, cfg.router_hidden_size, len(cfg.slice_bits))
        table = self.variable("routing", "thresholds", jnp.zeros, len(cfg.budget_grid)).value
        inputs = RoutingInputs(
            x=x,
            scores=score(router, jax.lax.stop_gradient(x)),  # how a router sees its input is no part of the model
            slice_bits=cfg.slice_bits,
            table=table,
            grid=cfg.budget_grid,
            key=self.make_rng("routing") if self.has_rng("routing") else None,
        )
        masks = control.masks(inputs)
        self.sow("scores", "scores", inputs.scores)
        self.sow("stats", "bits", mask_bits(masks, cfg.slice_bits))
        return self.multiply(x.astype(self.dtype), weight, masks, inputs.scores).astype(self.dtype)

    def multiply(
        self,
        x: Float[Array, "B T in"],
        weight: SlicedWeight,
        masks: Float[Array, "B T E-1"],
        scores: Float[Array, "B T E-1"],
    ) -> Float[Array, "B T out"]:
        """The product at the depths that were chosen; ``scores`` are for those who train routers."""
        del scores
        return self.matmul(x, weight, mask_depth(masks))

    @property
    def matmul(self) -> Callable[..., Array]:
        """`sliced_matmul`, on each device's own shards where there is a mesh."""
        if self.placement is None:
            return sliced_matmul
        assert self.name is not None, "a block names its linears"
        return self.placement.matmul(self.name, sliced_matmul)


def _empty_slices(in_features: int, features: int, cfg: ElasticConfig) -> SlicedWeight:
    """A weight of code zero, for ``init`` and for the shapes of a checkpoint."""
    check_group_size(in_features, cfg.group_size)
    scale = jnp.ones((in_features // cfg.group_size, features))
    return slice_codes(jnp.zeros((in_features, features), jnp.uint8), scale, jnp.zeros_like(scale), cfg.slice_bits)


@dataclass(frozen=True, kw_only=True, eq=False)  # compared and hashed by identity, so its methods can be static to jit
class ElasticModel:
    """A model with its variables: elastic, or unquantized where ``elastic`` is None.

    Attributes:
        config: architecture.
        elastic: slicing and routing; None for an unquantized model, which ignores bits.
        variables: the arrays, as ``Llama.apply`` takes them.
        tokenizer: text to ids, or None.
        dtype: type of the activations.
        placement: the mesh that the variables are split over, or None on one device.
    """

    config: LlamaConfig
    variables: Variables
    elastic: ElasticConfig | None = None
    tokenizer: Any = None
    dtype: DTypeLike = jnp.float32
    placement: Placement | None = None

    @property
    def is_elastic(self) -> bool:
        """Whether ``bits`` has an effect."""
        return self.elastic is not None

    @cached_property
    def placed(self) -> Placement:
        """Where its arrays lie: its placement, or one device."""
        return self.placement or Placement.create(one_device(), self.config, self.elastic)

    @cached_property
    def module(self) -> Llama:
        """The Linen module."""
        if self.elastic is None:
            return Llama(self.config, dtype=self.dtype)
        linear = partial(ElasticLinear, elastic=self.elastic, placement=self.placement)
        return Llama(self.config, linear=linear, dtype=self.dtype)

    @cached_property
    def apply_fn(self) -> Callable[..., Array]:
        """Jitted ``apply_fn(variables, tokens [B, T], bits) -> logits [B, T, V]``; bits a traced scalar or ``[B]``.

        Changing the bits compiles nothing.
        """

        def apply(variables: Variables, tokens: Int[Array, "B T"], bits: Any = 8.0) -> Float[Array, "B T V"]:
            logits = self.module.apply(variables, tokens, self.budget_policy(tokens, bits))
            assert isinstance(logits, jax.Array), "no collection is mutable"
            return logits

        return jax.jit(apply)

    def forward(
        self, variables: Variables, tokens: Int[Array, "B T"], bits: Any
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
        """Logits, and the average bits each token used. Pure; jit it where it is used."""
        return self.forward_with(variables, tokens, self.budget_policy(tokens, bits))

    def forward_with(
        self, variables: Variables, tokens: Int[Array, "B T"], policy: Policy | None, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
        """`forward` under any routing policy, e.g. a baseline.

        Args:
            variables: the arrays.
            tokens: token ids.
            policy: decides each token's depth; an unquantized model takes None.
            key: for policies that draw at random.
        """
        rngs = None if key is None else {"routing": key}
        logits, state = self.module.apply(variables, tokens, policy, mutable=["stats"], rngs=rngs)
        return logits, self._token_bits(state, tokens)

    def decode(
        self, variables: Variables, tokens: Int[Array, "B T"], cache: KVCache, bits: Any
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T"], KVCache]:
        """Logits, the bits each token used, and the grown cache. Pure."""
        policy = self.budget_policy(tokens, bits)
        (logits, cache), state = self.module.apply(variables, tokens, cache, policy, method="decode", mutable=["stats"])
        return logits, self._token_bits(state, tokens), cache

    def dequantized_params(self, width: int) -> Variables:
        """The dense parameters of the model read at a uniform width of 1 to 8 bits.

        Raises:
            ValueError: the model is not elastic, or a width outside 1..8.
        """
        if self.elastic is None:
            raise ValueError("an unquantized model has no widths to read")
        layers: Any = self.variables["params"]["layers"]
        dense = {name: layers[name] for name in ("attention_norm", "mlp_norm")}
        dequantize = jax.jit(jax.vmap(lambda weight: weight.dequantize_width(width)))
        for path in self.config.linear_shapes():
            part, name = path.split("/")
            weight = self.variables["slices"]["layers"][part][name]["weight"]
            dense.setdefault(part, {})[name] = {"kernel": dequantize(weight)}
        return {**self.variables["params"], "layers": dense}

    def budget_policy(self, tokens: Int[Array, "B T"], bits: Any) -> TableBudget | None:
        """The runtime's policy for a batch at ``bits``, a scalar or ``[B]``; None for an unquantized model."""
        if self.elastic is None:
            return None
        return TableBudget(bits=jnp.broadcast_to(jnp.asarray(bits, jnp.float32), tokens.shape[:1]))

    def _token_bits(self, state: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
        if self.elastic is None:
            return jnp.full(tokens.shape, DENSE_BITS)
        return average_bits(self.config, state["stats"]["layers"])


def average_bits(config: LlamaConfig, sown: Any) -> Float[Array, "B T"]:
    """Average bits of each token over all linears, weighted by their parameters.

        B = sum_l (params_l * bits_l) / sum_l params_l

    Args:
        config: architecture.
        sown: the ``stats`` of the layers, ``[L, B, T]`` for each linear (or ``[B, T]`` for those of one block).
    """
    shapes = config.linear_shapes()
    total = sum(rows * columns for rows, columns in shapes.values())
    mean = jnp.zeros(())
    for path, (rows, columns) in shapes.items():
        part, name = path.split("/")
        (bits,) = sown[part][name]["bits"]
        mean = mean + bits.reshape(-1, *bits.shape[-2:]).mean(0) * (rows * columns / total)
    return mean
