"""All layers of a decode step in one call, on a GPU: ``JAX_PLATFORMS=cuda python -m pytest -m gpu tests``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.models.rope import inverse_frequencies
from mobiquant_jax.ops import untile_weight
from mobiquant_jax.ops.decode_layers import RoutedLinears, check_supported, decode_layers
from mobiquant_jax.routing import lookup
from mobiquant_jax.serving import prepare
from mobiquant_jax.serving.attention import rotation
from mobiquant_jax.serving.one_call import supports_one_call

NAMES = ("qkv", "o", "gate_up", "down")
SLOTS = 40


def exact(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def rounded(array):
    return exact(jnp.asarray(array, jnp.bfloat16))


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def scores(router, layer, x):
    """``[S, B, 3]``."""
    linears, width = router.magnitude.shape[1:]
    rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-12)
    found = []
    for s in range(linears):
        hidden = x / rms @ exact(router.hidden[layer])[:, s * width : (s + 1) * width]
        hidden = silu(hidden + np.log(rms) * exact(router.magnitude[layer, s]) + exact(router.hidden_bias[layer, s]))
        found.append(hidden @ exact(router.output[layer, s]) + exact(router.output_bias[layer, s]))
    return np.stack(found)


def rotate(heads, angles):
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))


class Reference:
    """The step in float64 at given depths, rounded where the kernels round; notes what the routers would have said."""

    def __init__(self, packed, sites, thresholds, depths):
        self.packed, self.sites, self.thresholds, self.depths = packed, sites, exact(thresholds), np.asarray(depths)
        self.margins = []  # of each site and layer: scores less threshold, and the depths taken

    def product(self, name, layer, x):
        site = self.sites[NAMES.index(name)]
        first = sum(len(s.weight.segments) for s in self.sites[: NAMES.index(name)])
        kernels = [jax.tree.map(lambda leaf: leaf[layer], kernel) for kernel in untile_weight(site.weight)]
        thresholds, taken = (rows[layer, first : first + len(kernels)] for rows in (self.thresholds, self.depths))
        margin = scores(site.router, layer, x) - thresholds[..., None]
        self.margins.append((margin, taken))
        rows = [
            np.stack([row @ exact(kernel.dequantize(int(d))) for row, d in zip(x, depth, strict=True)])
            for kernel, depth in zip(kernels, taken, strict=True)
        ]
        return rounded(np.concatenate(rows, axis=1))

    def attention(self, layer, qkv, positions, key, value):
        cfg = self.packed.config
        size, group = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
        parts = np.split(
            qkv.reshape(len(qkv), -1, size),
            [cfg.num_attention_heads, cfg.num_attention_heads + cfg.num_key_value_heads],
            axis=1,
        )
        angles = (positions[:, None] * inverse_frequencies(cfg).astype(np.float64))[:, None]
        q, k = (rotate(part, angles) for part in parts[:2])
        mixed = []
        for b, position in enumerate(positions):
            key[layer, b, position], value[layer, b, position] = k[b], parts[2][b]
            keys, values = (cache[layer, b, : position + 1].repeat(group, axis=1) for cache in (key, value))
            weights = np.exp(np.einsum("hd,shd->hs", q[b], keys) / np.sqrt(size))
            mixed.append(np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), values).ravel())
        return rounded(np.stack(mixed))

    def run(self, x, positions, key, value):
        v, eps = self.packed.variables, self.packed.config.rms_norm_eps
        for layer in range(self.packed.config.num_hidden_layers):
            normed = rounded(norm(x, exact(v.attention_norm[layer]), eps))
            mixed = self.attention(layer, self.product("qkv", layer, normed), positions, key, value)
            x = rounded(x + self.product("o", layer, mixed))
            normed = rounded(norm(x, exact(v.mlp_norm[layer]), eps))
            gate, up = np.split(self.product("gate_up", layer, normed), 2, axis=1)
            x = rounded(x + self.product("down", layer, rounded(silu(gate) * up)))
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(
    ("sizes", "group_size", "width"),
    [
        (dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, head_dim=64), 32, 8),
        (
            dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64),
            64,
            32,
        ),
        (dict(hidden_size=1024, intermediate_size=3584, num_attention_heads=8, head_dim=128), 128, 64),
    ],
)
def test_matches_float64(batch, sizes, group_size, width, random_elastic):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    rng = np.random.default_rng(batch + width)
    grid = (2.0, 3.0, 5.0, 8.0)
    elastic = ElasticConfig(group_size=group_size, router_hidden_size=width, budget_grid=grid)
    model = random_elastic(int(rng.integers(99)), elastic, num_hidden_layers=3, **sizes)
    packed = prepare(model)
    bits = jnp.asarray(rng.uniform(2.5, 6, batch), jnp.float32)
    sites = [RoutedLinears(s.weight, s.router) for s in (packed.variables.sites[name] for name in NAMES)]
    thresholds = lookup(packed.variables.thresholds, packed.variables.grid, bits)
    positions = rng.integers(0, SLOTS, batch)
    x = jnp.asarray(rng.normal(size=(batch, sizes["hidden_size"])), jnp.bfloat16)
    empty = KVCache.create(packed.config, batch, SLOTS, jnp.bfloat16)
    key, value = (jnp.asarray(rng.normal(size=empty.k.shape), jnp.bfloat16) for _ in range(2))
    turned = rotation(packed.config, jnp.asarray(positions[:, None]))
    norms = packed.variables.attention_norm, packed.variables.mlp_norm
    before = exact(key), exact(value)
    step = jax.jit(decode_layers, static_argnums=4)
    eps = packed.config.rms_norm_eps
    call = (x, turned, jnp.asarray(positions), norms, eps, key, value, sites, thresholds)
    got = step(*call, jnp.int32(1))
    reference = Reference(packed, sites, thresholds, got.depths)
    want = reference.run(exact(x), positions, *before)
    assert np.linalg.norm(exact(got.x) - want) / np.linalg.norm(want) < 2e-2
    for found, expected in ((got.key, before[0]), (got.value, before[1])):
        assert np.linalg.norm(exact(found) - expected) / np.linalg.norm(expected) < 1e-2
    clear = 0
    for margin, taken in reference.margins:
        decided = (np.abs(margin) > 0.05 * np.abs(margin).max()).all(axis=-1)  # elsewhere rounding may decide
        np.testing.assert_array_equal(taken[decided], 1 + np.cumprod(margin > 0, axis=-1).sum(axis=-1)[decided])
        clear += decided.sum()
    assert clear > 0.5 * got.depths.size and len(np.unique(got.depths)) > 1
    again = step(*call, jnp.int32(4))  # what is fetched ahead changes nothing
    np.testing.assert_array_equal(exact(again.x), exact(got.x))


@pytest.mark.gpu
def test_generation_through_one_call_is_that_of_the_separate_programs(random_elastic, monkeypatch):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    elastic = ElasticConfig(group_size=64, router_hidden_size=32, budget_grid=(2.0, 3.0, 5.0, 8.0))
    sizes = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, head_dim=64)
    packed = prepare(random_elastic(3, elastic, **sizes))
    tokens, bits = jnp.asarray([[5], [7], [11]]), jnp.asarray([2.0, 8.0, 8.0])  # depths that no rounding decides
    cache = KVCache.create(packed.config, 3, 8, jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(i), cache.k.shape, jnp.bfloat16) for i in (0, 1))
    cache = KVCache(k=k, v=v, length=jnp.asarray([0, 3, 7]))
    assert supports_one_call(jnp.zeros((3, 1, 256), jnp.bfloat16), cache, packed.variables.sites)
    one = jax.jit(packed.decode)(packed.variables, tokens, cache, bits)
    monkeypatch.setattr("mobiquant_jax.serving.packed.supports_one_call", lambda *_: False)
    apart = jax.jit(lambda *a: packed.decode(*a))(packed.variables, tokens, cache, bits)
    assert np.linalg.norm(exact(one[0]) - exact(apart[0])) < 2e-2 * np.linalg.norm(exact(apart[0]))
    np.testing.assert_allclose(one[1], apart[1], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(one[1])[:, 0], bits, rtol=1e-5)


def test_where_it_cannot_run_it_says_why(random_elastic):
    elastic = ElasticConfig(group_size=64, router_hidden_size=8, budget_grid=(2.0, 8.0))
    sizes = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, head_dim=64)
    packed = prepare(random_elastic(3, elastic, **sizes), implementation="gpu")
    sites = [RoutedLinears(s.weight, s.router) for s in (packed.variables.sites[name] for name in NAMES)]
    reason = "17 " if jax.default_backend() == "gpu" else "Hopper"
    with pytest.raises(NotImplementedError, match=reason):
        check_supported(17, KVCache.create(packed.config, 17, 8, jnp.bfloat16).k, sites)


def test_arrays_of_other_shapes_are_refused(random_elastic):
    packed = prepare(random_elastic(3, ElasticConfig(group_size=32, budget_grid=(2.0, 8.0))), implementation="gpu")
    v, cache = packed.variables, KVCache.create(packed.config, 1, 8, jnp.bfloat16)
    sites = [RoutedLinears(v.sites[name].weight, v.sites[name].router) for name in NAMES]
    x, turned = jnp.zeros((1, packed.config.hidden_size), jnp.bfloat16), rotation(packed.config, jnp.zeros((1, 1)))
    rest = (jnp.zeros(1, jnp.int32), (v.attention_norm, v.mlp_norm), 1e-5, cache.k, cache.v, sites)
    with pytest.raises(ValueError, match=r"thresholds \(2, 6, 1\) .* than \(2, 7, 1\)"):
        decode_layers(x, turned, *rest, jnp.zeros((2, 6, 1)), jnp.int32(1))
    with pytest.raises(ValueError, match=r"rotation \(1, 1, \d+\) .* than \(2, 1, \d+\)"):
        decode_layers(x, turned[:1], *rest, jnp.zeros((2, 7, 1)), jnp.int32(1))


def decode_steps(packed, bits, tokens, slots, held):
    """Logits of every step ``[T, B, V]`` and the cache, all steps in one program, from a random cache."""
    empty = KVCache.create(packed.config, len(held), slots, jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(i), empty.k.shape, jnp.bfloat16) for i in (0, 1))

    def step(cache, token):
        logits, _, cache = packed.decode(packed.variables, token[:, None], cache, bits)
        return cache, logits[:, 0]

    start = KVCache(k=k, v=v, length=jnp.asarray(held))
    cache, logits = jax.jit(lambda start: jax.lax.scan(step, start, tokens), donate_argnums=0)(start)
    return np.asarray(logits, np.float64), cache


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2.0, 8.0])  # depths that no rounding decides
def test_steps_behind_each_other_see_what_the_earlier_ones_wrote(bits, random_elastic, monkeypatch):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    elastic = ElasticConfig(group_size=128, router_hidden_size=32, budget_grid=(2.0, 3.0, 5.0, 8.0))
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    packed = prepare(random_elastic(5, elastic, num_hidden_layers=3, **sizes))
    held = np.r_[np.zeros(4), 1:5, [63, 64, 500, 900, 1000, 1020, 1050, 1080]].astype(np.int32)  # few keys and many
    tokens = jax.random.randint(jax.random.key(2), (12, len(held)), 0, packed.config.vocab_size, jnp.int32)
    target = jnp.full(len(held), bits, jnp.float32)
    logits, cache = decode_steps(packed, target, tokens, 1100, held)
    monkeypatch.setattr("mobiquant_jax.serving.packed.supports_one_call", lambda *_: False)
    expected, apart = decode_steps(packed, target, tokens, 1100, held)
    error, size = (np.linalg.norm(array, axis=(0, 2)) for array in (logits - expected, expected))
    assert (error < 0.1 * size).all()  # one wrong key of an earlier step: half the size and more
    for found, wanted in ((cache.k, apart.k), (cache.v, apart.v)):
        assert np.linalg.norm(exact(found) - exact(wanted)) < 1e-2 * np.linalg.norm(exact(wanted))
