"""The linears of a model as an axis: N of them in a layer, in the order of ``LlamaConfig.linear_shapes``."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.quant import widths


def elastic_config(model: ElasticModel) -> ElasticConfig:
    """The slicing of a model, or a ValueError if it is unquantized."""
    if model.elastic is None:
        raise ValueError("an unquantized model has no depths to analyze: give an elastic checkpoint")
    return model.elastic


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the axes of an analysis' arrays are called.

    Attributes:
        linears: of a layer: ``q``, ``k``, ..., ``down``.
        bits: at every depth.
    """

    linears: tuple[str, ...]
    bits: tuple[int, ...]

    @classmethod
    def of(cls, model: ElasticModel) -> "Labels":
        """Those of a model."""
        names = (path.split("/")[1].removesuffix("_proj") for path in model.config.linear_shapes())
        return cls(linears=tuple(names), bits=widths(elastic_config(model).slice_bits))

    @property
    def low_bits(self) -> tuple[int, ...]:
        """Bits at every depth below full, where errors are."""
        return self.bits[:-1]


def linear_sizes(config: LlamaConfig) -> Int[np.ndarray, " N"]:
    """Parameters of each of a layer's linears."""
    return np.array([rows * columns for rows, columns in config.linear_shapes().values()])


def linear_shares(config: LlamaConfig) -> Float[np.ndarray, " N"]:
    """Each linear's share of a layer's parameters."""
    sizes = linear_sizes(config)
    return sizes / sizes.sum()


def nest(config: LlamaConfig, name: str, values: Array) -> dict[str, Any]:
    """The variables ``{part: {linear: {name: value}}}`` of a block, from one value a linear."""
    tree: dict[str, Any] = {}
    for path, value in zip(config.linear_shapes(), values, strict=True):
        part, linear = path.split("/")
        tree.setdefault(part, {})[linear] = {name: value}
    return tree


def stack_sown(config: LlamaConfig, collection: Any, name: str) -> Float[Array, "L N ..."]:
    """What all linears of the scanned layers sowed under a name."""
    paths = (path.split("/") for path in config.linear_shapes())
    return jnp.stack([collection["layers"][part][linear][name][0] for part, linear in paths], axis=1)
