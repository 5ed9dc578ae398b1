"""The trainable linears: forward against the packed weights they become, gradients against float64 differences.

Seeds are fixed: one weight in 10^5 lies so near a bin's edge that two ways to round it differ.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mobiquant_jax.calibration.linears import NestedLinear, RoutedLinear, UniformWidth, pack_block, trainable
from mobiquant_jax.calibration.slice_tuning import PositionLinear
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticConfig, ElasticLinear
from mobiquant_jax.quant import Clipping, limits, quantize
from mobiquant_jax.routing import BatchBudget, FixedThreshold, Router, UniformDepth

IN, OUT, GROUP = 16, 6, 8
SLICINGS = [(2, 2, 2, 2), (4, 4), (1, 1, 2, 4)]


def elastic_of(slice_bits):
    grid = (float(slice_bits[0]), 5.0, 8.0)
    return ElasticConfig(group_size=GROUP, slice_bits=slice_bits, router_hidden_size=5, budget_grid=grid)


def random_linear(rng, slices):
    """Parameters with real clipping, and a router whose scores lie on both sides of zero."""

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return {
        "kernel": draw(IN, OUT),
        "clipping": Clipping(gamma=1 + draw(IN // GROUP, OUT), beta=1 + draw(IN // GROUP, OUT)),
        "router": Router(
            hidden=draw(IN, 5, scale=0.5),
            magnitude=draw(5),
            hidden_bias=draw(5),
            output=draw(5, slices - 1),
            output_bias=draw(slices - 1),
        ),
    }


def packed(params, slice_bits):
    return quantize(params["kernel"], *limits(params["kernel"], params["clipping"]), slice_bits)


def policies(batch, slices):
    depth = jnp.arange(batch) % slices + 1
    return [UniformDepth(depth=depth), FixedThreshold(threshold=jnp.zeros(())), BatchBudget(bits=jnp.float32(5.5))]


@pytest.mark.parametrize("slice_bits", SLICINGS)
def test_routed_linear_equals_the_packed_one_at_the_same_masks(slice_bits):
    rng = np.random.default_rng(41)
    params, elastic = random_linear(rng, len(slice_bits)), elastic_of(slice_bits)
    x = jnp.asarray(rng.normal(size=(4, 9, IN)), jnp.float32)
    routed, runtime = (cls(features=OUT, elastic=elastic) for cls in (RoutedLinear, ElasticLinear))
    variables = {
        "params": {"router": params["router"]},
        "slices": {"weight": packed(params, slice_bits)},
        "routing": {"thresholds": jnp.zeros(3)},
    }
    apply = jax.jit(lambda module, tree, policy: module.apply(tree, x, policy, mutable=["stats"]), static_argnums=0)
    depths = set()
    for policy in policies(4, len(slice_bits)):
        y, state = apply(routed, {"params": params}, policy)
        expected, expected_state = apply(runtime, variables, policy)
        np.testing.assert_array_equal(state["stats"]["bits"][0], expected_state["stats"]["bits"][0])
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        depths |= set(np.unique(state["stats"]["bits"][0]))
    assert depths == set(np.cumsum(slice_bits))


def test_a_routed_linear_of_fewer_slices_is_the_whole_one_whose_further_gates_are_shut():
    rng = np.random.default_rng(45)
    slice_bits = (2, 1, 1, 4)
    params, elastic = random_linear(rng, len(slice_bits)), elastic_of(slice_bits)
    x = jnp.asarray(rng.normal(size=(4, 9, IN)), jnp.float32)
    shut = dataclasses.replace(params["router"], output_bias=params["router"].output_bias.at[-1].set(-1e30))
    whole, first = (RoutedLinear(features=OUT, elastic=elastic, depth=depth) for depth in (None, 3))
    for policy in policies(4, 3)[:2]:
        y, state = first.apply({"params": params}, x, policy, mutable=["stats"])
        expected, expected_state = whole.apply({"params": params | {"router": shut}}, x, policy, mutable=["stats"])
        np.testing.assert_array_equal(state["stats"]["bits"][0], expected_state["stats"]["bits"][0])
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        assert len(np.unique(state["stats"]["bits"][0])) > 1


def test_nested_linear_equals_the_packed_weight_at_every_width():
    rng = np.random.default_rng(42)
    params = random_linear(rng, 4)
    weight = packed(params, (2, 2, 2, 2))
    x = rng.normal(size=(2, 3, IN)).astype(np.float32)
    module = NestedLinear(features=OUT, elastic=elastic_of((2, 2, 2, 2)))
    apply = jax.jit(lambda width: module.apply({"params": params}, x, UniformWidth(width=width)))
    for width in range(1, 9):
        expected = x.astype(np.float64) @ np.asarray(weight.dequantize_width(width), np.float64)
        np.testing.assert_allclose(apply(jnp.int32(width)), expected, rtol=1e-5, atol=1e-5)
    assert apply._cache_size() == 1


class Surrogate:
    """The linears in float64 numpy, with every rounding held at its value at one point, so that it is smooth there.

    That is what straight-through gradients are the gradients of.
    """

    def __init__(self, params, x, slice_bits, threshold, temperature):
        self.x, self.reads = np.asarray(x, np.float64), np.cumsum(slice_bits)
        self.threshold, self.temperature = threshold, temperature
        self.held = {}
        self.holding = True
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self(self.params)
        self.holding = False

    def straight_through(self, name, smooth, rounded):
        """``smooth`` plus the rounding's error at the point where it was held."""
        if self.holding:
            self.held[name] = rounded(smooth) - smooth
        return smooth + self.held[name]

    def weights(self, params):
        grouped = params["kernel"].reshape(-1, GROUP, OUT)
        lo = grouped.min(1) / (1 + np.exp(-params["clipping"].beta))
        hi = grouped.max(1) / (1 + np.exp(-params["clipping"].gamma))

        def bf16(v):
            return v.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)

        s = self.straight_through("scale", (hi - lo) / 4, bf16)
        z = self.straight_through("zero", -64 * lo / s, np.round)
        position = np.clip(64 * grouped / s[:, None] + z[:, None], 0, 255.996)
        for width in self.reads:
            step = 2.0 ** (8 - width)
            middle = self.straight_through(width, position, lambda p, step=step: (np.floor(p / step) + 0.5) * step)
            yield (s[:, None] / 64 * (middle - z[:, None])).reshape(IN, OUT)

    def masks(self, router):
        rms = np.sqrt((self.x**2).mean(-1, keepdims=True))
        hidden = self.x / rms @ router.hidden + np.log(rms) * router.magnitude + router.hidden_bias
        scores = hidden / (1 + np.exp(-hidden)) @ router.output + router.output_bias
        soft = 1 / (1 + np.exp(-(scores - self.threshold) / self.temperature))
        gates = self.straight_through("gates", soft, lambda _: (scores > self.threshold).astype(float))
        return np.cumprod(gates, axis=-1)

    def __call__(self, params, width=None):
        weights = list(self.weights(params))
        if width is not None:
            return self.x @ weights[list(self.reads).index(width)]
        masks, y = self.masks(params["router"]), self.x @ weights[0]
        for e in range(len(weights) - 1):
            y = y + masks[..., e, None] * (self.x @ (weights[e + 1] - weights[e]))
        return y


def directional(function, params, direction, epsilon=1e-6):
    ends = (jax.tree.map(lambda p, d, s=sign: p + s * epsilon * d, params, direction) for sign in (1, -1))
    forward, backward = (function(end) for end in ends)
    return (forward - backward) / (2 * epsilon)


@pytest.mark.parametrize("linear", ["nested", "routed"])
@pytest.mark.parametrize("slice_bits", SLICINGS)
def test_gradients_reach_every_parameter(linear, slice_bits):
    """Each parameter's gradient along random directions, against central differences of the float64 surrogate."""
    rng = np.random.default_rng(43)
    params = random_linear(rng, len(slice_bits))
    x = jnp.asarray(rng.normal(size=(2, 7, IN)), jnp.float32)
    pull = rng.normal(size=(2, 7, OUT))  # the loss is the output's product with it
    surrogate = Surrogate(params, x, slice_bits, threshold=0.1, temperature=0.7)
    if linear == "nested":
        width = int(np.cumsum(slice_bits)[1])
        module, control = NestedLinear(features=OUT, elastic=elastic_of(slice_bits)), UniformWidth(width=width)
        reads = (width,)
    else:
        module = RoutedLinear(features=OUT, elastic=elastic_of(slice_bits))
        control = FixedThreshold(threshold=jnp.float32(0.1), temperature=0.7)
        reads = ()

    def value(p):
        return np.sum(surrogate(p, *reads) * pull)

    loss = jax.value_and_grad(lambda p: jnp.sum(module.apply({"params": p}, x, control) * pull))
    y, grads = jax.jit(loss)(params)
    np.testing.assert_allclose(y, value(surrogate.params), rtol=1e-3, atol=1e-3)
    grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
    for (path, grad), leaf in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        used = linear == "routed" or "router" not in jax.tree_util.keystr(path)
        assert np.any(grad) == used, path
        for _ in range(3):
            along = rng.normal(size=leaf.shape)
            direction = jax.tree_util.tree_map_with_path(
                lambda p, g, path=path, along=along: along if p == path else np.zeros_like(g), grads
            )
            expected = directional(value, surrogate.params, direction)
            got = np.sum(grad * along)
            assert got == pytest.approx(expected, rel=5e-3, abs=5e-3 * np.linalg.norm(grad) + 1e-6), path


def products(jaxpr):
    """The types that each matmul of a program multiplies."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(operand.aval.dtype) for operand in eqn.invars)
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize("linear", [NestedLinear, RoutedLinear, PositionLinear])
def test_the_backward_pass_multiplies_in_bfloat16_too(linear):
    """Three products of the weights; a float32 gradient would make two of them a GPU's slower ones."""
    elastic = elastic_of((4, 4))
    module = linear(features=OUT, elastic=elastic, dtype=jnp.bfloat16)
    control = FixedThreshold(threshold=jnp.zeros(())) if linear is RoutedLinear else UniformWidth(width=jnp.int32(4))
    x = jnp.ones((2, 3, IN))
    params = module.init(jax.random.key(0), x, control)["params"]

    def loss(params, x):
        return jnp.sum(jnp.square(module.apply({"params": params}, x, control, mutable=["stats"])[0]))

    found = list(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x).jaxpr))
    assert found.count(("bfloat16", "bfloat16")) == 3
    assert all(left == right for left, right in found), found


def test_trainable_keeps_the_dense_parameters_and_draws_routers(dense, config, elastic):
    params = trainable(dense, config, elastic, jax.random.key(0))
    assert params["attention_norm"] == dense["attention_norm"]
    routers = []
    for path, (rows, columns) in config.linear_shapes().items():
        part, name = path.split("/")
        linear = params[part][name]
        assert linear["kernel"] is dense[part][name]["kernel"]
        assert linear["clipping"].gamma.shape == (rows // elastic.group_size, columns)
        routers.append(np.asarray(linear["router"].hidden).tobytes())
    assert len(set(routers)) == len(routers)
    other = trainable(dense, config, elastic, jax.random.key(1))
    assert np.any(params["mlp"]["up_proj"]["router"].output != other["mlp"]["up_proj"]["router"].output)


def test_a_packed_block_is_the_runtimes_block(dense, config, elastic):
    """Same tree as a checkpoint's layer, same outputs as the block that was trained."""
    params = jax.jit(lambda dense, key: trainable(dense, config, elastic, key))(dense, jax.random.key(3))
    variables = jax.jit(lambda params: pack_block(params, config, elastic))(params)
    wanted = {name: part["layers"] for name, part in abstract_variables(config, elastic).items()}
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(variables), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape[1:], like.dtype)
    x = jnp.asarray(np.random.default_rng(44).normal(size=(2, 12, config.hidden_size)), jnp.float32)

    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @jax.jit
    def outputs(bits):
        trained, runtime = (
            Block(config, linear=partial(cls, elastic=elastic)) for cls in (RoutedLinear, ElasticLinear)
        )
        pairs = ((trained, {"params": params}), (runtime, variables))
        return [block.apply(tree, x, positions, None, BatchBudget(bits=bits))[0] for block, tree in pairs]

    for bits in (4.0, 5.3, 8.0):
        np.testing.assert_allclose(*outputs(bits), rtol=1e-4, atol=1e-4)
