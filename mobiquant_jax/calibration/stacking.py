"""Blocks, one after the other, as one tree with a leading layer axis."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.sharding import Placement


def stack_blocks(blocks: Iterable[Params], count: int, placement: Placement) -> Params:
    """Stacks trees on their devices; one block at a time is there beside the stack.

    Args:
        blocks: trees of equal shapes.
        count: how many.
        placement: where the stack lies.
    """
    remaining = iter(blocks)
    first = next(remaining)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), first)
    shardings = placement.shardings(like)

    def empty() -> Params:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def insert(stack: Params, block: Params, index: jax.Array) -> Params:
        return jax.tree.map(lambda rows, row: rows.at[index].set(row), stack, block)

    insert_jit = jax.jit(insert, donate_argnums=0, out_shardings=shardings)
    stack = insert_jit(jax.jit(empty, out_shardings=shardings)(), first, np.int32(0))
    for index, block in enumerate(remaining, start=1):
        stack = insert_jit(stack, block, np.int32(index))
    return stack
