"""The seven linear kernels of a dense block, by path."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from mobiquant_jax.models import LlamaConfig

Params = dict[str, Any]
Kernels = dict[str, Array]
"""``{"attention/q_proj": [in, out], ...}`` in the order of execution."""


def get_kernels(block: Params, config: LlamaConfig) -> Kernels:
    """The kernels of one block's parameters (or, with a leading layer axis, of all blocks')."""
    paths = (path.split("/") for path in config.linear_shapes())
    return {f"{part}/{name}": block[part][name]["kernel"] for part, name in paths}


def with_kernels(block: Params, kernels: Mapping[str, Array]) -> Params:
    """A copy of a block's parameters with some kernels replaced."""
    copy = {part: dict(leaves) for part, leaves in block.items()}
    for path, kernel in kernels.items():
        part, name = path.split("/")
        copy[part][name] = {"kernel": kernel}
    return copy


def map_kernels(function: Callable[[Array], Array], block: Params, config: LlamaConfig) -> Params:
    """A copy of a block's parameters with ``function`` applied to each kernel."""
    return with_kernels(block, {path: function(kernel) for path, kernel in get_kernels(block, config).items()})
