"""Blocks, one after the other, as one tree with a leading layer axis."""

from collections.abc import Iterable
from functools import partial

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

    Raises:
        ValueError: there are more or fewer.
    """
    remaining = iter(blocks)
    first = next(remaining)
    shardings = placement.shardings(jax.eval_shape(partial(_repeated, count=count), first))
    stack = jax.jit(_repeated, static_argnums=1, out_shardings=shardings)(first, count)
    insert = jax.jit(_insert, donate_argnums=0, out_shardings=shardings)
    for index, block in zip(range(1, count), remaining, strict=True):
        stack = insert(stack, block, np.int32(index))
    return stack


def _repeated(block: Params, count: int) -> Params:
    return jax.tree.map(lambda row: jnp.broadcast_to(row, (count, *row.shape)), block)


def _insert(stack: Params, block: Params, index: jax.Array) -> Params:
    return jax.tree.map(lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, index, 0), stack, block)
