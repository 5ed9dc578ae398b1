"""Stacking blocks one after the other against numpy."""

import jax
import numpy as np
import pytest

from mobiquant_jax.calibration.stacking import stack_blocks
from mobiquant_jax.sharding import Placement, one_device


def test_blocks_lie_in_order_and_their_number_is_checked(config, elastic):
    rng = np.random.default_rng()
    blocks = [{"attention_norm": {"scale": rng.normal(size=config.hidden_size)}} for _ in range(3)]
    blocks = [jax.tree.map(np.float32, block) for block in blocks]
    placement = Placement.create(one_device(), config, elastic)
    found = stack_blocks(iter(blocks), 3, placement)["attention_norm"]["scale"]
    np.testing.assert_array_equal(found, np.stack([block["attention_norm"]["scale"] for block in blocks]))
    for count in (2, 4):
        with pytest.raises(ValueError):
            stack_blocks(iter(blocks), count, placement)
