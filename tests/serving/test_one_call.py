"""What a decode step is told to fetch ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.serving.one_call import expected_slices


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_slices_are_expected_that_three_products_in_four_read(batch):
    for bits in np.linspace(2, 8, 49):  # in steps of 1/8
        below, share = divmod(bits / 2, 1)  # tokens read this many slices, and this share of them one more
        likely = 1 - (1 - share) ** batch >= 0.75
        assert int(expected_slices(jnp.full(batch, bits, jnp.float32))) == below + likely, bits


def test_the_deepest_sequence_of_a_batch_counts():
    expected = jax.jit(expected_slices)
    assert int(expected(jnp.array([2.0, 8.0, 2.5]))) == 4
    assert int(expected(jnp.array([2.0, 2.0, 2.0]))) == 1
