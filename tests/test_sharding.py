"""Placement on 8 fake devices: the same numbers as on one, whole groups and words, and specs of the large models."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mobiquant_jax import sharding
from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.calibration.config import stages
from mobiquant_jax.calibration.gains import pull_back
from mobiquant_jax.calibration.linears import trainable
from mobiquant_jax.calibration.optimizer import grouped_adamw
from mobiquant_jax.config_flags import load_config
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import KVCache, Llama, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.ops import sliced_matmul
from mobiquant_jax.quant import SlicedWeight, round_to_nearest
from mobiquant_jax.routing import depth_masks
from mobiquant_jax.sharding import AXES, Placement, constrain_batch, look_up, make_mesh

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, model=2)


@pytest.fixture(scope="module")
def model(random_elastic):
    # 96 channels would not be two shards of whole groups of 32, nor 97 tokens two of any.
    return random_elastic(21, intermediate_size=128, vocab_size=98)


def architecture(name):
    return LlamaConfig(**load_config(CONFIGS / f"{name}.py").model.architecture)


def abstract_mesh(data, fsdp, model):
    return AbstractMesh((data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * 3)


def test_logits_of_an_elastic_model_equal_one_device(mesh, model):
    tokens = jnp.asarray(np.random.default_rng().integers(0, 97, (4, 17)), jnp.int32)
    bits = jnp.array([2.0, 3.3, 5.0, 8.0])
    expected, expected_bits = jax.jit(model.forward)(model.variables, tokens, bits)
    placement = Placement.create(mesh, model.config, model.elastic)
    assert all(split.axes for split in placement.splits)
    sharded = ElasticModel(
        config=model.config, elastic=model.elastic, variables=placement.put(model.variables), placement=placement
    )
    with jax.set_mesh(mesh):
        forward = jax.jit(
            sharded.forward,
            in_shardings=(placement.shardings(model.variables), placement.batched(tokens.shape), placement.replicated),
            out_shardings=placement.replicated,
        )
        logits, token_bits = forward(sharded.variables, tokens, bits)
    np.testing.assert_array_equal(token_bits, expected_bits)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    jax.tree.map(np.testing.assert_array_equal, sharded.variables, model.variables)
    kernel = sharded.variables["slices"]["layers"]["mlp"]["down_proj"]["weight"]
    assert kernel.planes[0].addressable_shards[0].data.shape == (2, 128 // 16 // 2, 64 // 2)
    assert kernel.scale.addressable_shards[0].data.shape == (2, 128 // 32 // 2, 64 // 2)


def test_logits_of_a_dense_model_and_its_decoding_equal_one_device(mesh):
    config = LlamaConfig(
        vocab_size=98,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    dense = ElasticModel(config=config, variables={})
    tokens = jnp.asarray(np.random.default_rng().integers(0, 98, (4, 9)), jnp.int32)
    params = jax.jit(Llama(config).init)(jax.random.key(3), tokens)["params"]
    expected = jax.jit(Llama(config).apply)({"params": params}, tokens)
    placement = Placement.create(mesh, config)
    placed = placement.put({"params": params})
    cache = KVCache.create(config, 4, 12)
    with jax.set_mesh(mesh):
        logits = jax.jit(Llama(config).apply)(placed, jax.device_put(tokens, placement.batched(tokens.shape)))
        cache = jax.device_put(cache, placement.cache(cache))
        decoded, _, cache = jax.jit(dense.decode)(placed, tokens, cache, None)
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    np.testing.assert_allclose(decoded, expected, atol=tolerance)
    assert placement.cache(cache).k.spec == P(None, ("data", "fsdp"), None, ("model",), None)


@pytest.mark.parametrize("linear", ["q_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("batch", [4, 3])
def test_a_kernel_under_shard_map_equals_the_unsplit_one(mesh, model, linear, batch):
    rows, columns = {path.split("/")[1]: shape for path, shape in model.config.linear_shapes().items()}[linear]
    rng = np.random.default_rng()
    weight = round_to_nearest(jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32), 32)
    x = jnp.asarray(rng.normal(size=(batch, 5, rows)), jnp.float32)
    depth = jnp.asarray(rng.integers(1, 5, (batch, 5)), jnp.int32)
    seen = []

    def local(x, weight, depth):
        seen.append((x.shape, weight.scale.shape, weight.in_features))
        return sliced_matmul(x, weight, depth)

    placement = Placement.create(mesh, model.config, model.elastic)
    y = jax.jit(placement.matmul(linear, local))(x, weight, depth)
    np.testing.assert_allclose(y, sliced_matmul(x, weight, depth), atol=1e-4)
    split_rows = rows if linear == "q_proj" else rows // 2
    split_columns = columns // 2 if linear == "q_proj" else columns
    local_batch = 1 if batch == 4 else 3
    assert seen == [((local_batch, 5, split_rows), (split_rows // 32, split_columns), split_rows)]


@pytest.mark.parametrize("linear", ["q_proj", "down_proj"])
def test_the_backward_pass_of_gains_equals_the_unsplit_one(mesh, model, linear):
    """And devices exchange sums of the inputs' size, not one for each slice."""
    rows, columns = {path.split("/")[1]: shape for path, shape in model.config.linear_shapes().items()}[linear]
    rng = np.random.default_rng()
    weight = round_to_nearest(jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32), 32)
    x, g = (jnp.asarray(rng.normal(size=(4, 5, size)), jnp.float32) for size in (rows, columns))
    masks = depth_masks(jnp.asarray(rng.integers(1, 5, (4, 5))), 4)
    placement = Placement.create(mesh, model.config, model.elastic)
    weight = jax.device_put(weight, NamedSharding(mesh, placement.spec((linear, "planes"), (rows, columns))))
    split = jax.jit(placement.matmul_gradient(linear, pull_back)).lower(g, x, weight, masks).compile()
    for found, expected in zip(split(g, x, weight, masks), pull_back(g, x, weight, masks), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    sums = re.findall(r"= (.*) all-reduce(?:-start)?\(", split.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", " ".join(sums))]
    assert sizes and max(sizes) <= 1 * 5 * rows


@pytest.mark.parametrize(
    ("axes", "tokens", "gathered"),
    [
        (dict(data=2, fsdp=2, model=2), 1, 4 * 32),  # rows of all tokens
        (dict(data=2, fsdp=2, model=2), 20, 48 * 32),  # a device's rows, which are fewer
        (dict(data=2, fsdp=2, model=2), 40, 48 * 32),
        (dict(data=8, fsdp=1, model=1), 1, 0),  # whole on every device
        (dict(data=4, fsdp=1, model=2), 1, 0),
    ],
)
def test_rows_or_the_table_are_gathered_whichever_is_less(axes, tokens, gathered):
    rng, mesh = np.random.default_rng(), make_mesh(**axes)
    table = jnp.asarray(rng.normal(size=(96, 32)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 96, (8 if axes["data"] == 8 else 4, tokens)), jnp.int32)
    split = jax.device_put(table, NamedSharding(mesh, P("model", "fsdp")))
    spread = jax.device_put(ids, NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        looked_up = jax.jit(lambda *given: constrain_batch(look_up(*given))).lower(split, spread).compile()
    np.testing.assert_array_equal(looked_up(split, spread), np.asarray(table)[ids])
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", looked_up.as_text())
    assert max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0) == gathered


def test_groups_and_words_stay_whole():
    config = architecture("llama3_8b")
    for slice_bits, group_size in (((2, 2, 2, 2), 128), ((4, 4), 64), ((1, 1, 2, 4), 128)):
        elastic = ElasticConfig(group_size=group_size, slice_bits=slice_bits, budget_grid=(slice_bits[0], 8.0))
        slices = abstract_variables(config, elastic)["slices"]
        weights = jax.tree.leaves(slices, is_leaf=lambda node: isinstance(node, SlicedWeight))
        for data, fsdp, model in ((1, 4, 8), (1, 32, 4), (1, 64, 16), (1, 3, 7), (2, 1, 128)):
            mesh = abstract_mesh(data, fsdp, model)
            placement = Placement.create(mesh, config, elastic)
            for weight in weights:
                specs = placement.shardings({"q_proj": {"weight": weight}})  # the name only sets which axes are meant
                parts = [leaf.spec[1:] for leaf in jax.tree.leaves(specs)]
                assert len(set(parts)) == 1, "planes, scale and zero of one weight split alike"
            for split in placement.splits:
                shards = math.prod(mesh.shape[axis] for axis in split.axes)
                assert split.size % (shards * split.unit) == 0
                if split.dim != "kv_heads" and split.dim != "vocab":
                    assert split.unit % group_size == 0 and split.unit * min(slice_bits) % 32 == 0


@pytest.mark.parametrize(
    ("name", "shape"), [("llama3_8b", (2, 4, 8)), ("llama3_70b", (1, 8, 8)), ("llama3_70b", (4, 4, 16))]
)
def test_every_dimension_of_the_large_models_divides_or_says_why_not(name, shape):
    config, elastic = architecture(name), ElasticConfig()
    mesh = abstract_mesh(*shape)
    placement = Placement.create(mesh, config, elastic)
    whole = {split.dim: split.reason for split in placement.splits if not split.axes}
    if shape[2] == 16:  # 8 key-value heads
        assert whole == {"kv_heads": "kv_heads: 1024 / 128 whole units do not split over 16 (model)"}
    else:
        assert not whole
    dense = jax.eval_shape(Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    total = {}
    for kind, tree in (("dense", dense), ("elastic", abstract_variables(config, elastic))):
        placed = jax.tree.leaves(placement.abstract(tree))
        total[kind] = [
            sum(leaf.dtype.itemsize * math.prod(sizes(leaf)) for leaf in placed)
            for sizes in (lambda leaf: leaf.shape, lambda leaf: leaf.sharding.shard_shape(leaf.shape))
        ]
    # `shard_shape` refuses a dimension that does not divide. Nothing large is whole anywhere either: a device holds its
    # share and, above it, the routers (split by `fsdp` alone) and the key and value projections where they are whole.
    excess = 1.36 if whole else 1.08
    for everything, mine in total.values():
        assert everything / (shape[1] * shape[2]) <= mine <= excess * everything / (shape[1] * shape[2])


def test_optimizer_state_follows_the_parameters(mesh, model):
    dense = jax.eval_shape(Llama(model.config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), dense["params"]["layers"])
    params = jax.eval_shape(lambda p: trainable(p, model.config, model.elastic, jax.random.key(0)), block)
    placement = Placement.create(mesh, model.config, model.elastic)
    wanted = {
        jax.tree_util.keystr(path): spec.spec
        for path, spec in jax.tree_util.tree_leaves_with_path(placement.shardings(params))
    }
    (stage,) = stages(CalibrationConfig())
    state = jax.eval_shape(grouped_adamw(stage.weight_lr, stage.clipping_lr, 1e-3, 10).init, params)
    found = jax.tree_util.tree_leaves_with_path(placement.shardings(state))
    moments = [(jax.tree_util.keystr(path), spec.spec) for path, spec in found if "mu" in jax.tree_util.keystr(path)]
    assert len(moments) == 7 * 8  # kernel, gamma, beta and five arrays of the router
    for path, spec in moments:
        assert spec == next(value for name, value in wanted.items() if path.endswith(name))


def test_what_has_no_rule_is_an_error(mesh, model):
    placement = Placement.create(mesh, model.config, model.elastic)
    with pytest.raises(ValueError, match="no rule for the array 'layers/attention/q_proj/bias' of shape"):
        placement.shardings({"layers": {"attention": {"q_proj": {"bias": jnp.zeros(4)}}}})
    with pytest.raises(ValueError, match="no rule for the array 'something'"):
        placement.shardings({"something": jnp.zeros(4)})


def test_mesh_sizes(mesh):
    assert mesh.axis_names == ("data", "fsdp", "model") == sharding.AXES
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "model": 1}
    with pytest.raises(ValueError, match=r"\(3, 1, 2\) does not use all 8 devices"):
        make_mesh(data=3, model=2)
    with pytest.raises(ValueError, match=r"\(1, 1, 16\) does not use all 8 devices"):
        make_mesh(model=16)
    with pytest.raises(ValueError, match="model=0"):
        make_mesh(model=0)


def test_a_job_takes_all_devices_or_a_share_of_them():
    assert sharding.job_mesh(data=2, fsdp=1, model=1).devices.ravel().tolist() == jax.devices()[:2]
    assert dict(sharding.job_mesh(data=-1, fsdp=2, model=2).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert sharding.one_device().devices.ravel().tolist() == jax.devices()[:1]
    with pytest.raises(ValueError, match=r"\(1, 3, 1\) does not use all 8 devices"):
        sharding.job_mesh(data=1, fsdp=3, model=1)


def test_a_mesh_that_leaves_devices_without_work_is_named(model):
    placement = Placement.create(abstract_mesh(2, 2, 2), model.config, model.elastic)
    placement.check(windows=8)
    with pytest.raises(ValueError, match="^mesh data=2, fsdp=2, model=2 does not fit windows=6: no multiple of data x"):
        placement.check(windows=6)
    with pytest.raises(ValueError, match="model=3 does not fit the model: heads: 64 / 32 whole units do not split"):
        Placement.create(abstract_mesh(1, 1, 3), model.config, model.elastic).check()


def test_the_batch_takes_the_axes_that_divide_it(mesh, model):
    placement = Placement.create(mesh, model.config, model.elastic)
    assert placement.batched((8, 5, 3)).spec == P(("data", "fsdp"), None, None)
    assert placement.batched((6, 5)).spec == P(("data",), None)
    assert placement.batched((3, 5)).spec == P(None, None)
    assert placement.batched((3, 8), dim=1).spec == P(None, ("data", "fsdp"))
    x = jnp.ones((2, 3, 2))
    assert constrain_batch(x) is x  # no mesh, nothing to say
    with jax.set_mesh(mesh):
        assert jax.jit(constrain_batch)(jnp.ones((4, 3, 2))).sharding.spec[0] == ("data", "fsdp")
