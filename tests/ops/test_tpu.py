"""The TPU kernel without a TPU: interpreted against float64, and compiled for real topologies where libtpu is."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.ops.sliced_matmul import tpu

interpreted = jax.jit(tpu.sliced_matmul, static_argnames="interpret")


@pytest.mark.parametrize(
    ("tokens", "inputs", "group_size", "depths"),
    [(3, 4096, 128, (1, 4)), (40, 2048, 256, (1, 4)), (5, 2048, 128, (2, 2))],
)
def test_matches_float64(tokens, inputs, group_size, depths, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens)
    weights = stacked_weights(rng, 2, inputs, (128,), group_size)
    x = jnp.asarray(rng.normal(loc=0.1, size=(tokens, inputs)), jnp.bfloat16)
    depth = jnp.asarray(rng.integers(depths[0], depths[1] + 1, tokens))
    got = interpreted(x, weights[0], depth, jnp.int32(1), interpret=True)
    want = exact_product(x, weights, depth[None], 1)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want) < 3e-3  # slices in bfloat16


def test_more_tokens_than_a_tile(stacked_weights, exact_product, monkeypatch):
    monkeypatch.setattr(tpu, "_TILE_TOKENS", 16)
    rng = np.random.default_rng(0)
    weights = stacked_weights(rng, 1, 2048, (128,))
    x = jnp.asarray(rng.normal(size=(37, 2048)), jnp.bfloat16)
    depth = jnp.asarray(rng.integers(1, 5, 37))
    got = jax.jit(lambda x: tpu.sliced_matmul(x, weights[0], depth, 0, interpret=True))(x)
    want = exact_product(x, weights, depth[None], 0)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want) < 3e-3


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(576, 128, 64), (2048, 40, 128), (2048, 128, 64)])
def test_what_it_cannot_do_says_why(inputs, outputs, group_size, stacked_weights):
    (weight,) = stacked_weights(np.random.default_rng(0), 1, inputs, (outputs,), group_size)
    with pytest.raises(NotImplementedError, match="the TPU kernel needs"):
        tpu.sliced_matmul(jnp.ones((1, inputs), jnp.bfloat16), weight, jnp.ones(1, jnp.int32), 0)


def test_float32_is_not_rounded_behind_the_callers_back(stacked_weights):
    (weight,) = stacked_weights(np.random.default_rng(0), 1, 2048, (128,))
    with pytest.raises(NotImplementedError, match="multiplies bfloat16, not float32"):
        tpu.sliced_matmul(jnp.ones((1, 2048)), weight, jnp.ones(1, jnp.int32), 0)


COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from mobiquant_jax.ops.sliced_matmul import tpu
from mobiquant_jax.quant import SlicedWeight

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
layers, inputs, outputs = 2, 4096, 6144
groups = (layers, inputs // 128, outputs)
weight = SlicedWeight(
    planes=tuple(array((layers, inputs // 16, outputs), jnp.uint32) for _ in range(4)),
    scale=array(groups, jnp.bfloat16), zero=array(groups, jnp.int16), in_features=inputs, slice_bits=(2, 2, 2, 2),
)
for tokens in (1, 300):
    arguments = array((tokens, inputs), jnp.bfloat16), weight, array((tokens,), jnp.int32), array((), jnp.int32)
    compiled = jax.jit(tpu.sliced_matmul).lower(*arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert tokens > 1 or compiled.memory_analysis().temp_size_in_bytes < inputs * outputs // 4, "a layer was copied"
"""


@pytest.mark.parametrize(
    ("topology", "kind"), [("v5e:2x2", "v5litepod-4"), ("v5p:2x2x1", "v5p-8"), ("v6e:2x2", "v6e-4")]
)
def test_compiles_ahead_of_time(topology, kind):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": kind,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a device, so that tests may share the library
    }
    command = [sys.executable, "-c", COMPILE, topology]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
