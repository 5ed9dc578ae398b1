"""Grouped AdamW against float64 numpy, what it freezes, and the guard against steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.optimizer import FINAL_RATE, grouped_adamw, guarded_update
from mobiquant_jax.quant import Clipping
from mobiquant_jax.routing import Router

RATES = dict(weight_lr=1e-2, clipping_lr=3e-2, router_lr=1e-3)
STEPS = 6


@pytest.fixture
def params():
    """The tree that end-to-end tuning trains: blocks under ``layers`` and the parts around them."""
    rng = np.random.default_rng()
    tree = {
        "embedder": {"embedding": jnp.ones((5, 8))},
        "layers": {
            "attention_norm": {"scale": jnp.ones(8)},
            "attention": {
                "q_proj": {
                    "kernel": jnp.ones((8, 4)),
                    "clipping": Clipping.create(8, 4, 4),
                    "router": Router.create(jax.random.key(0), 8, 3, 4),
                }
            },
        },
        "lm_head": {"kernel": jnp.ones((8, 5))},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


@pytest.fixture
def grads(params):
    rng = np.random.default_rng()
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(STEPS, *leaf.shape)), jnp.float32), params)


update = jax.jit(guarded_update, static_argnums=0)


def run(optimizer, params, grads, steps=STEPS):
    state = jax.jit(optimizer.init)(params)
    for step in range(steps):
        now = jax.tree.map(lambda g, step=step: g[step], grads)
        params, state, finite = update(optimizer, 1.0, now, params, state)
        assert bool(finite)
    return params, state


@pytest.fixture(scope="module")
def optimizer():
    return grouped_adamw(**RATES, steps=STEPS)


def adamw(param, grads, rate):
    """AdamW of optax's defaults without weight decay, the rate on a cosine from 1 to its final share."""
    param, mean, square = np.asarray(param, np.float64), 0.0, 0.0
    for step, grad in enumerate(np.asarray(grads, np.float64)):
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        cosine = (1 + np.cos(np.pi * step / STEPS)) / 2
        lr = rate * ((1 - FINAL_RATE) * cosine + FINAL_RATE)
        bias = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
        param = param - lr * (mean / bias[0]) / (np.sqrt(square / bias[1]) + 1e-8)
    return param


def group_of(path):
    name = jax.tree_util.keystr(path)
    return next((g for g in ("kernel", "clipping", "router") if g in name and "lm_head" not in name), "other")


def test_each_group_has_its_rate_and_the_rest_is_frozen(optimizer, params, grads):
    trained, _ = run(optimizer, params, grads)
    rates = dict(zip(("kernel", "clipping", "router"), RATES.values(), strict=True)) | {"other": 0.0}
    seen = set()
    for (path, new), old, grad in zip(
        jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(params), jax.tree.leaves(grads), strict=True
    ):
        group = group_of(path)
        seen.add(group)
        if group == "other":
            np.testing.assert_array_equal(new, old)
        else:
            np.testing.assert_allclose(new, adamw(old, grad, rates[group]), rtol=1e-4, atol=1e-6)
    assert seen == {"kernel", "clipping", "router", "other"}


@pytest.mark.parametrize("frozen", ["weight_lr", "clipping_lr", "router_lr"])
def test_a_rate_of_zero_freezes_its_group(params, grads, frozen):
    trained, _ = run(grouped_adamw(**(RATES | {frozen: 0.0}), steps=STEPS), params, grads, steps=2)
    still = {"weight_lr": "kernel", "clipping_lr": "clipping", "router_lr": "router"}[frozen]
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(params), strict=True):
        assert np.array_equal(new, old) == (group_of(path) in (still, "other")), path


@pytest.mark.parametrize("broken", ["loss", "gradient", "one gradient", "square"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, params, grads, broken):
    params, state = run(optimizer, params, grads, steps=2)
    step_grads = jax.tree.map(lambda g: g[2], grads)
    bad = {"gradient": jnp.inf, "one gradient": jnp.nan, "square": 1e30}
    loss = np.nan if broken == "loss" else 1.0
    if broken in bad:
        q = step_grads["layers"]["attention"]["q_proj"]
        q["kernel"] = q["kernel"].at[0, 0].set(bad[broken]) if broken != "gradient" else q["kernel"] * jnp.inf
    after, after_state, finite = update(optimizer, loss, step_grads, params, state)
    assert not bool(finite)
    for old, new in zip(jax.tree.leaves((params, state)), jax.tree.leaves((after, after_state)), strict=True):
        np.testing.assert_array_equal(old, new)
