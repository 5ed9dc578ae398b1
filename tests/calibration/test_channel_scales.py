"""Channel scales: the block's function stays, and the weights that matter get nearer to what they were."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import channel_scales
from mobiquant_jax.calibration.channel_scales import EXPONENTS, ChannelScales, fold
from mobiquant_jax.models import Block
from mobiquant_jax.quant import Clipping, fake_quantize

GROUP = 8
find_scales = jax.jit(channel_scales.find_scales, static_argnums=(0, 3, 4), static_argnames="at_once")


@pytest.fixture
def block(config, params):
    """A dense block with norms other than 1."""
    rng = np.random.default_rng(3)
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[0], params["layers"])
    for norm in ("attention_norm", "mlp_norm"):
        one[norm] = {"scale": rng.uniform(0.5, 2.0, config.hidden_size).astype(np.float32)}
    return one


@pytest.fixture
def stream(config):
    """Windows with three loud channels."""
    x = np.random.default_rng(4).normal(size=(3, 12, config.hidden_size)).astype(np.float32)
    x[:, :, [1, 7, 12]] *= 12.0
    return x


def apply(config, block, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return np.asarray(_apply(config, block, x, positions), np.float64)


@partial(jax.jit, static_argnums=0)
def _apply(config, block, x, positions):
    return Block(config).apply({"params": block}, x, positions)[0]


def test_any_scales_leave_the_function(config, block, stream):
    rng = np.random.default_rng(5)
    shapes = {"attention_norm": config.hidden_size, "mlp_norm": config.hidden_size, "up_proj": config.intermediate_size}
    scales = ChannelScales(**{name: rng.uniform(0.2, 5.0, size).astype(np.float32) for name, size in shapes.items()})
    folded = fold(block, scales)
    want, got = apply(config, block, stream), apply(config, folded, stream)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    changed = jax.tree.map(lambda a, b: not np.allclose(a, b), block, folded)
    unchanged = [
        jax.tree_util.keystr(path) for path, moved in jax.tree_util.tree_leaves_with_path(changed) if not moved
    ]
    assert unchanged == ["['attention']['o_proj']['kernel']"]
    stacked = fold(
        jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), block),
        ChannelScales(*(np.stack([leaf, leaf[::-1]]) for leaf in scales)),
    )
    jax.tree.map(lambda all_, one: np.testing.assert_array_equal(all_[0], one), stacked, folded)
    second = fold(jax.tree.map(lambda leaf: 2 * leaf, block), ChannelScales(*(leaf[::-1] for leaf in scales)))
    jax.tree.map(lambda all_, one: np.testing.assert_array_equal(all_[1], one), stacked, second)


@pytest.mark.parametrize("width", [2, 3])
def test_the_scales_found_are_the_best_of_the_grid(config, block, stream, width):
    """Against a search written out with numpy, but for the quantizer itself."""
    found = find_scales(config, block, stream, GROUP, width)
    normed = stream.astype(np.float64)
    normed = normed / np.sqrt(np.mean(normed**2, axis=-1, keepdims=True) + config.rms_norm_eps)
    moment = np.mean((normed * block["attention_norm"]["scale"]) ** 2, axis=(0, 1))
    kernel = np.concatenate([block["attention"][name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")], axis=1)

    def centred(square):
        root = np.sqrt(square)
        return root / np.exp(np.mean(np.log(root)))

    def loss(scale):
        scaled = jnp.asarray(kernel * scale[:, None], jnp.float32)
        read = np.asarray(fake_quantize(scaled, Clipping.create(*kernel.shape, GROUP), width), np.float64)
        return moment @ np.mean((read / scale[:, None] - kernel) ** 2, axis=1)

    m, w = centred(moment), centred(np.mean(kernel.astype(np.float64) ** 2, axis=1))
    scales = [m**a / w**b for a, b in EXPONENTS.astype(np.float64)]
    losses = [loss(scale) for scale in scales]
    assert loss(np.asarray(found.attention_norm, np.float64)) <= 1.001 * min(losses) < 0.9 * losses[0]
    nearest = min(np.abs(np.log(np.asarray(found.attention_norm) / scale)).max() for scale in scales)
    assert nearest < 1e-3  # one of the grid


def test_down_gets_its_scale_from_what_up_and_gate_make(config, block, stream):
    found = find_scales(config, block, stream, GROUP, 3)
    folded = fold(block, found)

    def error(of):
        """Of the MLP's output, every linear but down as it was."""
        kernel = jnp.asarray(of["mlp"]["down_proj"]["kernel"])
        read = fake_quantize(kernel, Clipping.create(*kernel.shape, GROUP), 3)
        changed = of | {"mlp": of["mlp"] | {"down_proj": {"kernel": read}}}
        return np.mean((apply(config, changed, stream) - apply(config, of, stream)) ** 2)

    loud = jax.tree.map(np.array, block)
    loud["mlp"]["up_proj"]["kernel"][:, 5] *= 30.0  # one channel of down's input
    assert error(fold(loud, find_scales(config, loud, stream, GROUP, 3))) < 0.7 * error(loud)
    assert np.ptp(found.up_proj) > 0.1 and error(folded) < error(block)


def test_silent_channels_and_dead_rows_stay_in_bounds(config, block, stream):
    """Zero gains, rows of zeros and channels that are all but silent get the scale of a quiet channel, not of none."""
    dead = jax.tree.map(np.array, block)
    dead["attention_norm"]["scale"][3] = 0.0
    dead["mlp_norm"]["scale"][4] = 1e-20
    dead["mlp"]["up_proj"]["kernel"][:, 2] = 0.0
    dead["mlp"]["down_proj"]["kernel"][9] = 0.0
    scales = find_scales(config, dead, stream, GROUP, 3)
    for leaf in scales:
        assert np.isfinite(leaf).all() and 1 / 64 < np.min(leaf) and np.max(leaf) < 64 * np.median(leaf)
    want, got = apply(config, dead, stream), apply(config, fold(dead, scales), stream)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    together = find_scales(config, dead, stream, GROUP, 3, at_once=3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), scales, together)
