"""Compiling ahead of time: on fake CPU devices always, for a TPU where its compiler is installed."""

import dataclasses
import importlib.util
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mobiquant_jax.aot import (
    GIB,
    DoesNotFit,
    Footprint,
    Program,
    compile_for,
    render_table,
    serving_programs,
    tpu_mesh,
    training_programs,
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
CALIBRATION = CalibrationConfig(
    windows=16,
    threshold_windows=4,
    window_length=16,
    batch_size=2,
    end_epochs=3,
    routed_epochs=2,
    fine_above=4,
    fine_epochs=2,
    end_batch_size=4,
    fit_epochs=2,
    fit_batch_size=4,
)


def local_bytes(arguments):
    leaves = jax.tree.leaves(arguments)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_a_program_is_accounted_for_and_refused_where_memory_is_short():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    _, decode = serving_programs(CONFIG, ELASTIC, mesh, batch=4, context=8)
    found = compile_for(decode, mesh, GIB)
    assert found.flops > 0 and found.bytes_accessed > 0
    assert local_bytes(decode.arguments) <= found.memory < 40 * local_bytes(decode.arguments)
    with pytest.raises(DoesNotFit, match=r"decode does not fit: it needs 0\.0 GiB of a chip's 0 GiB") as refused:
        compile_for(decode, mesh, 1000)
    assert refused.value.needed == found.memory


def failing(message):
    """A program that the compiler refuses with a message."""

    def compile():
        raise jax.errors.JaxRuntimeError(message)

    function = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=compile))
    return Program(name="tuning", function=function, arguments=(), batch=1, tokens=1)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_a_refusal_of_the_compiler_says_what_it_takes(message):
    wanted = r"tuning does not fit: it needs 20\.50GiB of a chip's 15\.75GiB that programs may use"
    with pytest.raises(DoesNotFit, match=wanted) as refused:
        compile_for(failing(message), make_mesh(data=4, model=2), 16 * GIB)
    assert refused.value.needed == 20.5 * GIB


def test_an_error_of_the_compiler_that_is_no_refusal_is_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_for(failing("INTERNAL: something else"), make_mesh(data=4, model=2), GIB)


def test_programs_are_split_over_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    prefill, _ = serving_programs(CONFIG, ELASTIC, mesh, batch=4, context=8)
    logits, bits, cache = jax.eval_shape(prefill.function, *prefill.arguments)
    assert logits.shape == (4, 256) and bits.shape == (4, 8) and cache.k.dtype == jnp.bfloat16


def test_training_is_split_over_the_mesh_and_gives_back_the_state_it_takes():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    programs = training_programs(CONFIG, ELASTIC, CALIBRATION, mesh)
    assert [(p.name, p.batch, p.tokens) for p in programs] == [
        ("calibration", 2, 16),
        ("tuning", 4, 16),
        ("routed", 4, 16),
        ("slices", 4, 16),
        ("fitting", 4, 16),
    ]
    results = []
    for program in programs:
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.arguments))
        assert local_bytes(program.arguments) < whole / (2 if program.name == "fitting" else 3)
        with jax.set_mesh(mesh):
            results.append(jax.eval_shape(program.function, *program.arguments))
    (params, _, healthy), (tuned, divergences, _), (routed, fewer, _), (alone, _, _), (fitted, _) = results
    assert params["mlp"]["up_proj"]["kernel"].shape == (64, 128) and healthy.shape == ()
    assert tuned.params["mlp"]["up_proj"]["kernel"].shape == (2, 64, 128) and divergences.shape == (16 // 4,)
    assert fewer.shape == ((16 - 4) // 4,)  # without the windows that thresholds are recorded on
    assert shapes(routed.params) == shapes(tuned.params)
    assert alone.params["mlp"]["up_proj"]["position"].shape == (2, 64, 128)
    assert fitted.routers["mlp"]["up_proj"]["router"].hidden.shape == (2, 64, 8)
    for result, program in zip((tuned, routed, alone, fitted), programs[1:], strict=True):
        assert shapes(result) == shapes(program.arguments[0])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(end_epochs=0), ["calibration", "routed", "slices", "fitting"]),
        (dict(routed_epochs=0, fine_epochs=0), ["calibration", "tuning", "fitting"]),
        (dict(fit_epochs=0), ["calibration", "tuning", "routed", "slices"]),
        (dict(fine_above=8, fine_epochs=0), ["calibration", "tuning", "routed"]),
        (dict(fine_above=8, fine_epochs=0, slice_epochs=1), ["calibration", "tuning", "routed", "slices"]),
        (dict(recipe="paper", end_epochs=0, routed_epochs=0, fine_epochs=0, fine_above=8), ["calibration"]),
    ],
)
def test_only_what_a_recipe_has(changes, names):
    recipe = dataclasses.replace(CALIBRATION, **changes)
    programs = training_programs(CONFIG, ELASTIC, recipe, make_mesh(data=2, fsdp=2, model=2))
    assert [program.name for program in programs] == names


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


RECORD = {
    "model": "llama3_8b",
    "topology": "v5e:2x4",
    "mesh": [1, 1, 8],
    "program": "decode",
    "batch": 4,
    "tokens": 512,
    "chip_memory": 16 * GIB,
    "memory": 3 * GIB // 2,
    "flops": 1.23456e12,
    "bytes_accessed": 2.5e9,
    "seconds": 3.0,
    "provenance": {"commit": "0123456789", "versions": {"jax": "1.2"}, "libtpu": "0.1"},
}


def test_the_table():
    """Programs of one mesh stand together, though another's were compiled between them."""
    too_large = {"program": "tuning", "batch": 2, "memory": 17 * GIB}
    too_large |= dict.fromkeys(("flops", "bytes_accessed", "seconds"))
    assert render_table([RECORD, RECORD | {"mesh": [1, 2, 4]}, RECORD | too_large]).splitlines()[2:] == [
        "| llama3_8b | v5e:2x4 | 1 x 1 x 8 | decode, batch 4 | 1.5 (16) | 1.23 | 2.5 |",
        "| llama3_8b | v5e:2x4 | 1 x 1 x 8 | tuning, batch 2 | 17.0 (16): does not fit | | |",
        "| llama3_8b | v5e:2x4 | 1 x 2 x 4 | decode, batch 4 | 1.5 (16) | 1.23 | 2.5 |",
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


@pytest.fixture
def check(call_script, monkeypatch, tmp_path):
    """``(programs, memory) -> (process, records)``: aot_check.py where every program needs so much of eight CPUs."""
    output = tmp_path / "aot.json"
    monkeypatch.setattr("mobiquant_jax.aot.tpu_mesh", lambda *_, **__: make_mesh(data=2, fsdp=2, model=2))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")

    def call(programs, memory):
        def compile_for(program, mesh, available):
            if memory > available:
                raise DoesNotFit(f"{program.name} does not fit", memory)
            return Footprint(memory=memory, flops=1e12, bytes_accessed=1e9, seconds=0.5)

        monkeypatch.setattr("mobiquant_jax.aot.compile_for", compile_for)
        config = ["--config=configs/stories260k.py", "--config.calibration.end_epochs=0", "--topology=v5e:2x4"]
        result = call_script("aot_check", *config, f"--programs={programs}", f"--output={output}")
        return result, json.loads(output.read_text())["compiled"] if output.is_file() else []

    return call


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_records_of_programs_that_are_not_compiled_again_are_kept(check):
    _, first = check("prefill,fitting,decode", GIB)
    assert [(r["program"], r["mesh"], r["memory"]) for r in first] == [
        (name, [2, 2, 2], GIB) for name in ("fitting", "prefill", "decode")
    ]
    result, records = check("prefill", 17 * GIB)
    assert result.returncode == 2 and "prefill does not fit" in result.stderr
    assert records[0] == first[0] and records[2] == first[2]
    assert records[1]["memory"] == 17 * GIB and records[1]["seconds"] is None
    result, records = check("calibration", 2 * GIB)
    assert not result.stderr and "calibration, batch 1 | 2.0 (16) |" in result.stdout
    assert [r["program"] for r in records] == ["fitting", "prefill", "decode", "calibration"]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_program_that_the_recipe_lacks_is_named(check):
    result, records = check("decode,tuning", GIB)
    wanted = "error: --programs: 'tuning' is none of this recipe's, calibration, fitting, prefill, decode\n"
    assert (result.returncode, result.stderr, records) == (2, wanted, [])
