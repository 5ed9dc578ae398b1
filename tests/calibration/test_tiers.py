"""Tiers of slices: how far one reaches into those before it, and where it lies afterwards."""

import jax
import jax.numpy as jnp
import numpy as np

from mobiquant_jax.calibration.tiers import GAP, lower_from, shift_below
from mobiquant_jax.routing import Router, prefix_scores, score


def test_lowered_by_its_overlap_a_slice_comes_after_all_before_it():
    rng = np.random.default_rng()
    shift = np.array([2.0, 1.0, 4.0, 3.0])  # the third slice would come before the first two
    scores = {name: jnp.asarray(rng.normal(size=(2, 3, 400, 4)) + shift, jnp.float32) for name in ("a", "b")}
    by = float(jax.jit(shift_below)(scores, 2))
    coarse = np.concatenate([np.min(np.asarray(s)[..., :2], axis=-1).ravel() for s in scores.values()])
    finer = np.concatenate([np.asarray(s)[..., 2].ravel() for s in scores.values()])
    assert by > 3
    np.testing.assert_allclose(coarse.min() - (finer.max() - by), GAP, rtol=1e-5)
    every = np.concatenate([np.asarray(prefix_scores(s))[..., 3].ravel() for s in scores.values()])
    assert every.max() - by < coarse.min() - 0.99 * GAP


def test_only_scores_from_the_border_on_are_lowered():
    router = Router.create(jax.random.key(0), 8, 4, 5)
    x = jax.random.normal(jax.random.key(1), (7, 8))
    lowered = lower_from({"mlp": {"up_proj": {"router": router}}}, jnp.float32(2.5), 2)["mlp"]["up_proj"]["router"]
    np.testing.assert_allclose(score(lowered, x) - score(router, x), np.tile([0, 0, -2.5, -2.5], (7, 1)), atol=1e-5)
