"""Every backend of the elastic matmul against float64 numpy on random depths and shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import quant
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.ops.sliced_matmul import api, grouped


def case(seed, tokens, in_features=192, out_features=40, slice_bits=(2, 2, 2, 2)):
    rng = np.random.default_rng(seed)
    weight = quant.round_to_nearest(
        jnp.asarray(rng.normal(size=(in_features, out_features)).astype(np.float32)), 64, slice_bits
    )
    x = jnp.asarray(rng.normal(size=(tokens, in_features)).astype(np.float32))
    depth = jnp.asarray(rng.integers(1, len(slice_bits) + 1, tokens))
    return x, weight, depth


def dense(x, weight, depth):
    kernels = {k: np.asarray(weight.dequantize(k), np.float64) for k in range(1, len(weight.planes) + 1)}
    return np.stack([np.asarray(row, np.float64) @ kernels[int(k)] for row, k in zip(x, depth, strict=True)])


@pytest.mark.parametrize("implementation", ["reference", "grouped", None])
@pytest.mark.parametrize(("tokens", "slice_bits"), [(1, (2, 2, 2, 2)), (64, (2, 1, 1, 2, 2)), (700, (2, 2, 2, 2))])
def test_matches_dense(implementation, tokens, slice_bits):
    x, weight, depth = case(tokens, tokens, slice_bits=slice_bits)
    got = jax.jit(sliced_matmul, static_argnames="implementation")(x, weight, depth, implementation=implementation)
    np.testing.assert_allclose(got, dense(x, weight, depth), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depths", [[1] * 300, [4] * 300, [1] * 299 + [4], [3] * 128 + [2] * 128])
def test_uneven_runs(depths):
    x, weight, _ = case(1, len(depths))
    got = sliced_matmul(x, weight, jnp.array(depths), implementation="grouped")
    np.testing.assert_allclose(got, dense(x, weight, depths), rtol=1e-4, atol=1e-4)


def test_tiles_find_their_depth_without_a_loop():
    slots = str(jax.make_jaxpr(partial(grouped._tile_slots, slices=4, tiles=6))(jnp.zeros(300, jnp.int32)))
    assert "while" not in slots and "scan" not in slots


@pytest.mark.parametrize(("platform", "chosen"), [("cpu", "grouped"), ("gpu", "reference")])
def test_many_tokens_are_sorted_by_depth_but_on_a_gpu(monkeypatch, platform, chosen):
    """A GPU would wait for the host at every tile."""
    x, weight, depth = case(3, 256)
    used = []
    for name in ("grouped", "reference"):
        monkeypatch.setitem(api._XLA, name, lambda x, weight, depth, name=name: used.append(name) or x[:, :40])
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    sliced_matmul(x, weight, depth)
    assert used == [chosen]


def test_batch_axes_and_bad_shapes():
    x, weight, depth = case(2, 6)
    got = sliced_matmul(x.reshape(2, 3, -1), weight, depth.reshape(2, 3))
    np.testing.assert_allclose(got.reshape(6, -1), dense(x, weight, depth), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit a weight of 192"):
        sliced_matmul(x[:, :100], weight, depth)
    with pytest.raises(ValueError, match="implementation 'fast'"):
        sliced_matmul(x, weight, depth, implementation="fast")
