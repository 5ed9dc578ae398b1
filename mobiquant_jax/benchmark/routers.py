"""A decoding step with routers and without.

On a Hopper GPU the step with them is one call of chained kernels; without, it is a program for each product, norm and
gate. So the difference is what a model pays for routing, not what the routers alone take.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mobiquant_jax.benchmark.decode import compile_decoding, decoding_seconds
from mobiquant_jax.benchmark.settings import BenchmarkSettings
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.serving import PackedModel

_BITS = 2.0  # where a step is shortest, and their part largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedDepth:
    """In place of a router: the first slice for all, at no cost.

    Attributes:
        linears: how many it decides for.
    """

    linears: int = dataclasses.field(metadata={"static": True})

    def depths(self, x: Any, thresholds: Any, layer: Any) -> Any:
        """See `FusedRouter`."""
        return jnp.ones((self.linears, *x.shape[:2]), jnp.int32)


def router_rows(model: PackedModel, settings: BenchmarkSettings) -> Iterator[Row]:
    """Yields ``ms`` of a step at batch 1 and 2 bits, and ``without_ms``."""
    routed, unrouted = (
        decoding_seconds(one, compile_decoding(one, 1, settings), 1, _BITS, settings)[0]
        for one in (model, without_routers(model))
    )
    yield {"ms": 1e3 * routed, "without_ms": 1e3 * unrouted}


def without_routers(model: PackedModel) -> PackedModel:
    """The same model at one slice throughout."""
    sites = {
        name: dataclasses.replace(site, router=FixedDepth(len(site.weight.segments)))
        for name, site in model.variables.sites.items()
    }
    return dataclasses.replace(model, variables=dataclasses.replace(model.variables, sites=sites))
