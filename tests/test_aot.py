"""Compiling ahead of time: on fake CPU devices always, for a TPU where its compiler is installed."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from mobiquant_jax.aot import (
    GIB,
    DoesNotFit,
    calibration_program,
    compile_for,
    render_table,
    serving_programs,
    tpu_mesh,
)
from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.sharding import make_mesh

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
ELASTIC = ElasticConfig(group_size=32, router_hidden_size=8)
CALIBRATION = CalibrationConfig(windows=16, threshold_windows=8, window_length=16, batch_size=2)


def local_bytes(arguments):
    leaves = jax.tree.leaves(arguments)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def test_a_program_is_accounted_for_and_refused_where_memory_is_short():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    _, decode = serving_programs(CONFIG, ELASTIC, mesh, batch=4, context=8)
    found = compile_for(decode, mesh, GIB)
    assert found.program == "decode" and found.flops > 0 and found.bytes_accessed > 0
    assert local_bytes(decode.arguments) <= found.memory < 40 * local_bytes(decode.arguments)
    with pytest.raises(DoesNotFit, match=r"decode does not fit: it needs 0\.0 GiB of a chip's 0 GiB") as refused:
        compile_for(decode, mesh, 1000)
    assert refused.value.needed == found.memory


def test_programs_are_split_over_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    prefill, _ = serving_programs(CONFIG, ELASTIC, mesh, batch=4, context=8)
    logits, bits, cache = jax.eval_shape(prefill.function, *prefill.arguments)
    assert logits.shape == (4, 256) and bits.shape == (4, 8) and cache.k.dtype == jnp.bfloat16
    calibration = calibration_program(CONFIG, ELASTIC, CALIBRATION, mesh)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(calibration.arguments))
    assert local_bytes(calibration.arguments) < whole / 3
    with jax.set_mesh(mesh):
        params, _, healthy = jax.eval_shape(calibration.function, *calibration.arguments)
    assert params["mlp"]["up_proj"]["kernel"].shape == (64, 128) and healthy.shape == ()


def test_a_topology_that_does_not_exist():
    for topology in ("v9:2x2", "v5e", "v5e:4", "v5p:2x2x2x2"):
        with pytest.raises(ValueError, match=f"topology '{topology}' is not KIND:AxB"):
            tpu_mesh(topology, tp=1)


def test_the_tpu_compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    mesh = tpu_mesh("v5e:2x4", tp=2, fsdp=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
    for program in serving_programs(CONFIG, ELASTIC, mesh, batch=4, context=8):
        assert compile_for(program, mesh, GIB).memory < GIB
    assert dict(tpu_mesh("v5p:4x4x4", tp=8, fsdp=8).shape) == {"data": 1, "fsdp": 8, "model": 8}  # cuts the second axis
    with pytest.raises(ValueError, match="topology 'v5e:3x7'"):
        tpu_mesh("v5e:3x7", tp=1)


def test_the_table():
    decode = {"program": "decode", "memory": 3 * GIB // 2, "flops": 1.23456e12, "bytes_accessed": 2.5e9, "seconds": 3.0}
    too_large = {"program": "calibration", "memory": 17 * GIB} | dict.fromkeys(("flops", "bytes_accessed", "seconds"))
    record = {
        "model": "llama3_8b",
        "topology": "v5e:2x4",
        "mesh": [1, 1, 8],
        "chip_memory": 16 * GIB,
        "batch": 4,
        "context": 512,
        "calibration_batch": 2,
        "programs": [too_large, decode],
        "provenance": {"commit": "0123456789", "versions": {"jax": "1.2"}, "libtpu": "0.1"},
    }
    assert render_table([record, record | {"programs": []}]).splitlines()[2:] == [
        "| llama3_8b | v5e:2x4 | 1 x 1 x 8 | calibration, batch 2 | 17.0 (16): does not fit | | |",
        "| llama3_8b | v5e:2x4 | 1 x 1 x 8 | decode, batch 4 | 1.5 (16) | 1.23 | 2.5 |",
        "",
        "`experiments/aot_check.py` at 0123456: 512 tokens a sequence; jax 1.2, libtpu 0.1.",
    ]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads config files by it
@pytest.mark.parametrize("content", ['{"model": "x"}', '[{"model": "x"}]', '{"compiled": [{"model": "x"}]}', "["])
def test_a_file_that_holds_something_else_is_named_before_anything_is_compiled(call_script, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    found = call_script(
        "aot_check", "--config=configs/llama32_1b.py", "--topology=v5e:2x4", "--tp=8", f"--output={path}"
    )
    assert found.returncode == 2 and str(path) in found.stderr and len(found.stderr.splitlines()) == 1
    assert path.read_text() == content
