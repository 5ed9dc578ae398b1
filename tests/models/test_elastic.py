"""The elastic runtime against float64 numpy, the dense model, and a count of compilations."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import KVCache, Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticLinear, ElasticModel
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import RandomDepth, TableBudget, UniformDepth

GRID = (2.0, 3.0, 5.0, 8.0)  # of the random model


@pytest.fixture(scope="module")
def model(random_elastic):
    return random_elastic(11)


@pytest.fixture(scope="module")
def forward(model):
    """``(bits [3]) -> (logits, token bits)`` of the random model, compiled once for all tests."""
    compiled = jax.jit(model.forward)

    def call(tokens, bits):
        return compiled(model.variables, tokens, jnp.broadcast_to(jnp.asarray(bits, jnp.float32), 3))

    return call


@pytest.fixture(scope="module")
def dense_forward(model):
    return jax.jit(lambda params, tokens: Llama(model.config).apply({"params": params}, tokens))


@pytest.fixture(scope="module")
def sown(model):
    """What each linear sows under a routing policy."""

    @jax.jit
    def call(tokens, policy, key):
        rngs = {"routing": key}
        return model.module.apply(model.variables, tokens, policy, mutable=["scores", "stats"], rngs=rngs)[1]

    return call


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(12).integers(0, 97, (3, 17)), jnp.int32)


def codes_of(weight, layer):
    """8-bit codes of one layer, read from the words' bits: slice 0 on top, consecutive inputs from the lowest bits."""
    codes = 0
    for plane in weight.planes:
        words = np.asarray(plane[layer]).astype(np.uint64)
        fields = np.stack([(words >> np.uint64(2 * i)) & np.uint64(3) for i in range(16)], axis=1)  # [words, 16, out]
        codes = 4 * codes + fields.reshape(-1, words.shape[1])[: weight.in_features].astype(np.int64)
    return codes


def read(weight, layer, width):
    """The kernel at a width: the design's ``s ((c + 1/2) / 4^(width/2 - 1) - z / 64)`` in float64."""
    codes = codes_of(weight, layer)
    size = len(codes) // weight.scale.shape[1]
    s = np.repeat(np.asarray(weight.scale[layer], np.float64), size, axis=0)
    z = np.repeat(np.asarray(weight.zero[layer], np.float64), size, axis=0)
    return s * ((codes // 2 ** (8 - width) + 0.5) / 2.0 ** (width - 2) - z / 64)


def depths_of(scores, table, bits):
    """Depth of each token from its scores ``[B, T, 3]`` and the interpolated threshold."""
    tau = np.interp(bits, GRID, np.asarray(table, np.float64))[:, None, None]
    tau = np.where(bits[:, None, None] <= 2, np.inf, np.where(bits[:, None, None] >= 8, -np.inf, tau))
    return 1 + np.cumprod(np.asarray(scores, np.float64) > tau, axis=-1).sum(-1).astype(int)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_dequantized_params_match_numpy(model, width):
    params = model.dequantized_params(width)
    for path in ("attention/k_proj", "mlp/down_proj"):
        part, name = path.split("/")
        weight = model.variables["slices"]["layers"][part][name]["weight"]
        for layer in range(2):
            np.testing.assert_allclose(
                params["layers"][part][name]["kernel"][layer], read(weight, layer, width), rtol=1e-5, atol=1e-6
            )
    for kept in ("embedder", "final_norm", "lm_head"):
        assert params[kept] is model.variables["params"][kept]
    with pytest.raises(ValueError, match="width 9 is outside 1..8"):
        model.dequantized_params(9)


@pytest.mark.parametrize(("bits", "width"), [(8.0, 8), (2.0, 2)])
def test_ends_equal_the_dense_model_at_that_width(model, forward, dense_forward, tokens, bits, width):
    logits, token_bits = forward(tokens, bits)
    expected = dense_forward(model.dequantized_params(width), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(token_bits) == width)


def test_uniform_depth_equals_the_dense_model_at_that_width(model, dense_forward, tokens):
    depths = jnp.array([2, 3, 4])
    logits, token_bits = jax.jit(model.forward_with)(model.variables, tokens, UniformDepth(depth=depths))
    for row, width in enumerate((4, 6, 8)):
        expected = dense_forward(model.dequantized_params(width), tokens)
        np.testing.assert_allclose(logits[row], expected[row], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(token_bits[row], width)


def test_a_linear_gives_every_token_its_own_depth(model):
    """One linear by hand, at three budgets in one batch."""
    x = np.random.default_rng(13).normal(size=(3, 40, 64))
    bits = np.array([2.6, 4.0, 6.5])
    layer = jax.tree.map(lambda leaf: leaf[1], model.variables)  # embedding and head are cut too, and unused
    variables = {name: layer[name]["layers"]["attention"]["q_proj"] for name in ("params", "slices", "routing")}
    linear = ElasticLinear(features=64, elastic=model.elastic)
    policy = TableBudget(bits=jnp.asarray(bits, jnp.float32))
    y, state = linear.apply(variables, jnp.asarray(x, jnp.float32), policy, mutable=["scores", "stats"])

    depth = depths_of(state["scores"]["scores"][0], variables["routing"]["thresholds"], bits)
    assert set(np.unique(depth)) == {1, 2, 3, 4}
    np.testing.assert_array_equal(state["stats"]["bits"][0], 2 * depth)
    weight = model.variables["slices"]["layers"]["attention"]["q_proj"]["weight"]
    for k in range(1, 5):
        np.testing.assert_allclose(
            np.asarray(y)[depth == k], x[depth == k] @ read(weight, 1, 2 * k), rtol=1e-4, atol=1e-4
        )


def test_token_bits_weigh_linears_by_their_size(model, forward, sown, tokens):
    bits = np.array([2.5, 4.0, 7.0])
    policy = TableBudget(bits=jnp.asarray(bits, jnp.float32))
    state = sown(tokens, policy, jax.random.key(0))
    sizes = dict(q_proj=64 * 64, k_proj=64 * 32, v_proj=64 * 32, o_proj=64 * 64)
    sizes |= dict(gate_proj=64 * 96, up_proj=64 * 96, down_proj=96 * 64)
    spent, total = np.zeros((3, 17)), 0
    for path in model.config.linear_shapes():
        part, name = path.split("/")
        (scores,) = state["scores"]["layers"][part][name]["scores"]
        for layer in range(2):
            table = model.variables["routing"]["layers"][part][name]["thresholds"][layer]
            spent += sizes[name] * 2 * depths_of(scores[layer], table, bits)
            total += sizes[name]
    measured = forward(tokens, bits)[1]
    np.testing.assert_allclose(measured, spent / total, rtol=1e-5)
    assert len(np.unique(np.round(measured, 4))) > 10


def test_each_row_at_its_bits_equals_the_row_alone(model, forward, tokens):
    bits = [2.4, 3.7, 6.0]
    together = model.apply_fn(model.variables, tokens, jnp.array(bits))
    for row, b in enumerate(bits):
        alone = model.apply_fn(model.variables, tokens[row : row + 1], b)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-4)
    same = model.apply_fn(model.variables, tokens, 3.7)
    np.testing.assert_allclose(same[1], together[1], rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(same[0] - together[0])) > 1e-2
    np.testing.assert_allclose(same, forward(tokens, 3.7)[0], rtol=1e-4, atol=1e-4)


def test_changing_the_bits_compiles_nothing(model, tokens):
    sweep = np.arange(2, 8.25, 0.25)
    assert len(sweep) == 25
    outputs = [model.apply_fn(model.variables, tokens, 2.0)]
    model.apply_fn(model.variables, tokens, jnp.full(3, 2.0)).block_until_ready()
    requests = [jnp.asarray([b, 10 - b, 5.0], jnp.float32) for b in sweep]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    for bits, request in zip(sweep, requests, strict=True):
        outputs.append(model.apply_fn(model.variables, tokens, float(bits)))
        model.apply_fn(model.variables, tokens, request)
    jax.block_until_ready(outputs)
    assert compiled == []
    jax.jit(lambda x: x * 3.25 + 1.5)(jnp.ones(7))
    assert compiled, "the listener hears compilations"
    digests = {np.asarray(output).tobytes() for output in outputs}
    assert len(digests) > 15  # the bits had an effect


def test_decode_with_a_cache_equals_the_full_pass(model, forward, tokens):
    bits = jnp.array([2.6, 4.5, 8.0])
    logits, used = forward(tokens, bits)
    cache = KVCache.create(model.config, 3, 20)
    decode = jax.jit(model.decode)
    parts = []
    for start, end in [(0, 9), *((i, i + 1) for i in range(9, 17))]:
        step_logits, step_bits, cache = decode(model.variables, tokens[:, start:end], cache, bits)
        parts.append((step_logits, step_bits))
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts], axis=1), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts], axis=1), used, rtol=1e-5)
    np.testing.assert_array_equal(cache.length, 17)


def test_a_random_policy_draws_from_its_key(model, sown, tokens):
    policy = RandomDepth(bits=jnp.full(3, 3.0))
    draws = [sown(tokens, policy, jax.random.key(k))["stats"]["layers"] for k in (0, 0, 1)]
    q, again, other = (np.asarray(draw["attention"]["q_proj"]["bits"][0]) for draw in draws)  # [L, B, T]
    np.testing.assert_array_equal(q, again)
    assert np.any(q != other)
    assert np.any(q[0] != q[1])  # layers draw for themselves
    assert np.any(q != np.asarray(draws[0]["mlp"]["up_proj"]["bits"][0]))  # and so do linears
    every = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(draws[0])])
    assert every.mean() == pytest.approx(3.0, abs=0.15)


def test_models_are_compared_and_hashed_by_identity(model):
    copy = ElasticModel(config=model.config, elastic=model.elastic, variables=model.variables)
    assert model == model and copy != model
    assert len({model, copy, model}) == 2


def test_a_dense_model_ignores_bits(model, dense_forward, tokens):
    dense = ElasticModel(config=model.config, variables={"params": model.dequantized_params(8)})
    assert (dense.is_elastic, model.is_elastic) == (False, True)
    logits, used = jax.jit(dense.forward)(dense.variables, tokens, 3.0)
    assert np.all(np.asarray(used) == 32.0) and used.shape == tokens.shape
    np.testing.assert_allclose(logits, dense_forward(dense.variables["params"], tokens), rtol=1e-5, atol=1e-5)
    at_2, at_7 = (dense.apply_fn(dense.variables, tokens, bits) for bits in (2.0, 7.0))
    np.testing.assert_array_equal(at_2, at_7)
    np.testing.assert_allclose(at_2, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no widths"):
        dense.dequantized_params(4)


def test_another_slicing(random_elastic, tokens):
    elastic = ElasticConfig(group_size=16, slice_bits=(4, 2, 1, 1), router_hidden_size=4, budget_grid=(4.0, 5.0, 8.0))
    model = random_elastic(3, elastic, num_hidden_layers=1)
    logits, used = jax.jit(model.forward)(model.variables, tokens, jnp.array([8.0, 4.0, 5.0]))
    for row, width in enumerate((8, 4)):
        expected = Llama(model.config).apply({"params": model.dequantized_params(width)}, tokens[row : row + 1])
        np.testing.assert_allclose(logits[row], expected[0], rtol=1e-4, atol=1e-4)
        assert np.all(np.asarray(used[row]) == width)


def llama3_8b():
    path = Path(__file__).parents[2] / "configs" / "llama3_8b.py"
    spec = importlib.util.spec_from_file_location("llama3_8b", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().model.architecture.to_dict()


@pytest.mark.parametrize("overrides", [{}, dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)])
def test_large_models_have_the_shapes_and_the_bytes(overrides):
    sizes = llama3_8b() | overrides | (dict(num_attention_heads=64) if overrides else {})
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    config, elastic = LlamaConfig(**sizes), ElasticConfig()
    variables = abstract_variables(config, elastic)
    weights = jax.tree.leaves(variables["slices"], is_leaf=lambda leaf: isinstance(leaf, SlicedWeight))
    assert len(weights) == 7
    params = config.num_hidden_layers * sum(math.prod(shape) for shape in config.linear_shapes().values())
    assert sum(plane.size for weight in weights for plane in weight.planes) * 32 == 8 * params
    assert all(len(weight.planes) == 4 and weight.group_size == 128 for weight in weights)
    assert sum(weight.scale.size for weight in weights) * 128 == params
    thresholds = jax.tree.leaves(variables["routing"])
    assert {leaf.shape for leaf in thresholds} == {(config.num_hidden_layers, 10)}
    assert "kernel" not in variables["params"]["layers"]["mlp"]["up_proj"]


def test_bad_settings_are_named(small_config):
    with pytest.raises(ValueError, match="router hidden size 0"):
        ElasticConfig(router_hidden_size=0)
    with pytest.raises(ValueError, match="budget grid"):
        ElasticConfig(budget_grid=(3.0, 8.0))
    with pytest.raises(ValueError, match="slice bits"):
        ElasticConfig(slice_bits=(2, 2, 2))
    with pytest.raises(ValueError, match="^mlp/down_proj: group size 64 does not divide the 100 input features$"):
        ElasticConfig(group_size=64).check_model(small_config(intermediate_size=100))
