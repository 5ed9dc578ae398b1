"""The model as it is served: packed weights of all layers, read in place by layer index.

The same mathematics as `Llama` over `ElasticLinear`, written as one pure function over arrays made for it: linears of
one input are fused, and the loop over layers carries an index, since a slice of the stacked weights would be copied
before a kernel could read it. Where there are kernels for it, a step's layers are one call instead: see `one_call`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.layers import project, rms_norm, swiglu
from mobiquant_jax.ops import Implementation
from mobiquant_jax.routing import lookup
from mobiquant_jax.serving.attention import attend
from mobiquant_jax.serving.one_call import layers_in_one_call, supports_one_call
from mobiquant_jax.serving.site import SITES, Site, fuse_site, of_sites

Carry = tuple[Array, KVCache, Array]  # residual stream, cache, weight bits read by each token


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ServingArrays:
    """Everything on the device.

    Attributes:
        embedding: token vectors; also the head where the model ties them.
        head: output kernel, or None.
        final_norm: gain before the head.
        attention_norm: gain before each layer's attention.
        mlp_norm: gain before each layer's MLP.
        sites: the linears, by the names of `SITES`.
        thresholds: recorded for each routed linear, in the order of `SITES`, at each average of ``grid``; of a dense
            model there are none. One array, so that a step looks them all up in one kernel.
        grid: average bits of the thresholds.
    """

    embedding: Float[Array, "V D"]
    head: Float[Array, "D V"] | None
    final_norm: Float[Array, " D"]
    attention_norm: Float[Array, "L D"]
    mlp_norm: Float[Array, "L D"]
    sites: dict[str, Any]
    thresholds: Float[Array, "L linears grid"]
    grid: tuple[float, ...] = field(metadata={"static": True})


@dataclass(frozen=True, kw_only=True, eq=False)  # compared and hashed by identity, so its methods can be static to jit
class PackedModel:
    """A model ready to decode: `decode` is what ``generate`` and ``stream`` take.

    Attributes:
        config: architecture.
        variables: the arrays.
        dtype: type of the activations.
    """

    config: LlamaConfig
    variables: ServingArrays
    dtype: DTypeLike = jnp.bfloat16

    def decode(
        self, variables: ServingArrays, tokens: Int[Array, "B T"], cache: KVCache, bits: ArrayLike
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T"], KVCache]:
        """Logits, the bits each token used, and the grown cache; see `ElasticModel.decode`. Pure.

        Args:
            variables: the arrays.
            tokens: token ids that follow what the cache holds.
            cache: keys and values of earlier tokens; needs room for T more.
            bits: target average bits, a scalar or one a sequence; traced.
        """
        cfg = self.config
        batch, length = tokens.shape
        positions = cache.length[:, None] + jnp.arange(length, dtype=jnp.int32)
        target = jnp.broadcast_to(jnp.asarray(bits, jnp.float32), (batch,))
        thresholds = lookup(variables.thresholds, variables.grid, target)
        with jax.named_scope("embed"):
            x = variables.embedding[tokens].astype(self.dtype)
        if supports_one_call(x, cache, variables.sites):
            x, cache, read = layers_in_one_call(cfg, variables, thresholds, x, positions, cache, target)
        else:
            x, cache, read = self._over_layers(cfg, variables, thresholds, x, positions, cache)
        with jax.named_scope("unembed"):
            x = rms_norm(x, variables.final_norm, cfg.rms_norm_eps)
            logits = project(x, variables.embedding.T if variables.head is None else variables.head)
        weights = float(cfg.num_hidden_layers * sum(rows * columns for rows, columns in cfg.linear_shapes().values()))
        return logits, read / weights, KVCache(k=cache.k, v=cache.v, length=cache.length + length)

    def _over_layers(
        self, cfg: LlamaConfig, variables: ServingArrays, thresholds: Array, x: Array, positions: Array, cache: KVCache
    ) -> Carry:
        of_site = of_sites(thresholds)

        def site(name: str, x: Array, index: Any) -> tuple[list[Array], Array]:
            return variables.sites[name](x, of_site[name], index, self.dtype)

        def layer(index: Any, carry: Carry) -> Carry:
            x, cache, read = carry
            normed = rms_norm(x, variables.attention_norm[index], cfg.rms_norm_eps)
            qkv, qkv_read = site("qkv", normed, index)
            mixed, cache = attend(cfg, qkv, positions, cache, index)
            (out,), out_read = site("o", mixed, index)
            x = x + out
            normed = rms_norm(x, variables.mlp_norm[index], cfg.rms_norm_eps)
            (gate, up), up_read = site("gate_up", normed, index)
            (down,), down_read = site("down", swiglu(gate, up), index)
            return x + down, cache, read + qkv_read + out_read + up_read + down_read

        return self._repeat(layer, (x, cache, jnp.zeros(positions.shape, jnp.float32)))

    def _repeat(self, layer: Callable[[Any, Carry], Carry], start: Carry) -> Carry:
        return jax.lax.fori_loop(0, self.config.num_hidden_layers, layer, start)


def prepare(
    model: ElasticModel, dtype: DTypeLike = jnp.bfloat16, implementation: Implementation | None = None
) -> PackedModel:
    """Repacks a calibrated model for serving, on the device it is on.

    Args:
        model: an elastic model. Its arrays stay as they are; drop it to free them.
        dtype: type of the activations, the embedding, the head and the routers' first layers.
        implementation: of the elastic matmul, which also chooses the weights' layout; the platform's if None.

    Raises:
        ValueError: the model is not elastic, or its weights have no serving layout.
    """
    if model.elastic is None:
        raise ValueError("only an elastic model can be packed: this one is unquantized")
    params = model.variables["params"]
    head = None if model.config.tie_word_embeddings else params["lm_head"]["kernel"].astype(dtype)
    arrays = ServingArrays(
        embedding=params["embedder"]["embedding"].astype(dtype),
        head=head,
        final_norm=params["final_norm"]["scale"],
        attention_norm=params["layers"]["attention_norm"]["scale"],
        mlp_norm=params["layers"]["mlp_norm"]["scale"],
        sites={name: _site(model, paths, dtype, implementation) for name, paths in SITES.items()},
        thresholds=jnp.stack(_leaves(model, sum(SITES.values(), ()), "routing", "thresholds"), axis=1),
        grid=model.elastic.budget_grid,
    )
    return PackedModel(config=model.config, variables=arrays, dtype=dtype)


def _site(model: ElasticModel, paths: tuple[str, ...], dtype: DTypeLike, implementation: Implementation | None) -> Site:
    weights, routers = _leaves(model, paths, "slices", "weight"), _leaves(model, paths, "params", "router")
    return fuse_site(weights, routers, dtype, implementation)


def _leaves(model: ElasticModel, paths: Iterable[str], collection: str, name: str) -> list[Any]:
    """What each linear has in a collection under this name, stacked over layers."""
    found: list[Any] = []
    for path in paths:
        part, linear = path.split("/")
        found.append(_child(_child(model.variables[collection]["layers"], part), linear)[name])
    return found


def _child(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return tree[name]


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
