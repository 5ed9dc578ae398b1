"""The command experiments/convert.py as a user runs it."""

import json
import os
import re
import runpy
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mobiquant_jax.io import load_hf, open_dense, save_hf, tensor_specs
from mobiquant_jax.io.checkpoint import abstract_variables, save_checkpoint
from mobiquant_jax.io.dequantized import open_dequantized
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "convert.py"


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def assert_fails(result, *parts):
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


@pytest.fixture
def tensors():
    """A model of one layer in bfloat16, by Hugging Face name."""
    rng = np.random.default_rng()
    shapes = {
        "model.embed_tokens.weight": (20, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.mlp.gate_proj.weight": (48, 32),
        "model.layers.0.mlp.up_proj.weight": (48, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 48),
        "model.norm.weight": (32,),
    }
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, tensors):
    folder = tmp_path / "source"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 20,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def random_checkpoint():
    """The functions ``write_hf``, ``write_gguf`` and ``write_elastic`` of the script beside the tests of io."""
    return runpy.run_path(str(ROOT / "tests" / "io" / "random_checkpoint.py"))


def test_hugging_face_to_hugging_face(tmp_path, folder, tensors, call_script):
    result = run(f"--from={folder}", f"--to={tmp_path / 'same'}")
    assert result.returncode == 0, result.stderr
    assert f"wrote {tmp_path / 'same'} in bfloat16, without a tokenizer" in result.stdout
    written = load_file(tmp_path / "same" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and written[name].tobytes() == tensor.tobytes()

    assert not call_script("convert", f"--from={folder}", f"--to={tmp_path / 'wide'}", "--dtype=float32").returncode
    for name, tensor in load_file(tmp_path / "wide" / "model.safetensors").items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_gguf_with_its_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    for key, value in {**sizes, "attention.head_count": 4}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    kernel = np.random.default_rng().standard_normal((32, 32)).astype(np.float32)
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in linears:
        writer.add_tensor(f"blk.0.{name}.weight", kernel)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    result = run(f"--from={path}", f"--to={tmp_path / 'hf'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("in float32\n")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(written["model.layers.0.mlp.up_proj.weight"], kernel)
    assert not np.array_equal(written["model.layers.0.self_attn.q_proj.weight"], kernel)
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["merges"] == [["a", "b"]]


@pytest.mark.parametrize("kind", ["hf", "gguf", "elastic"])
def test_memory_does_not_grow_with_the_model(tmp_path, folder, random_checkpoint, kind):
    """Peak memory of the whole command, for models of 2 and of 26 layers of 6 MB in bfloat16.

    It is the kernel's mark, since that of ``resource`` starts at the parent's.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from Linux's /proc")
    code = f"""
import pathlib, re, runpy, sys
sys.argv[0] = {str(SCRIPT)!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 512, "intermediate_size": 1536}
    peaks = []
    for layers in (2, 26):
        source = tmp_path / f"layers{layers}"
        config["num_hidden_layers"] = layers
        architecture = LlamaConfig.from_hf(config)
        if kind == "hf":
            specs = tensor_specs(architecture, "hf")
            tensors = {name: np.full(spec.shape, 0.5, ml_dtypes.bfloat16) for name, spec in specs.items()}
            source.mkdir()
            (source / "config.json").write_text(json.dumps(config))
            save_file(tensors, source / "model.safetensors")
        elif kind == "gguf":
            random_checkpoint["write_gguf"](source, architecture)
        else:
            random_checkpoint["write_elastic"](source, architecture, ElasticConfig(group_size=128))
        arguments = [f"--from={source}", f"--to={tmp_path / f'copy{layers}'}", "--dtype=float32"]
        arguments += ["--bits=5"] if kind == "elastic" else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
        environment.pop("GLIBC_TUNABLES", None)  # conftest's keep what is freed, for speed
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment
        )
        assert result.returncode == 0, result.stderr
        peaks.append(1024 * int(result.stdout.split()[-1]))
    written = (tmp_path / "copy26" / "model.safetensors").stat().st_size
    growth = 60e6 if kind == "elastic" else 20e6  # threads keep some of what they free; 24 packed layers are 86 MB
    assert written > 300e6 and peaks[1] - peaks[0] < growth, peaks


def test_the_largest_tensor_is_held_once(tmp_path, random_checkpoint, small_config, monkeypatch):
    """Bytes of arrays alive at once, where one tensor outweighs all others: its float32 copy and small parts."""
    monkeypatch.setattr("mobiquant_jax.io.safetensors._CHUNK_BYTES", 2**20)
    monkeypatch.setattr("mobiquant_jax.io.gguf._CHUNK_BYTES", 2**20)
    monkeypatch.setattr("mobiquant_jax.io.checkpoint._MATRIX_CHUNK_BYTES", 2**20)
    config = small_config(vocab_size=2**17, tie_word_embeddings=True)
    largest = 4 * config.vocab_size * config.hidden_size
    for kind, model in {"hf": "", "gguf": "", "elastic": ElasticConfig(group_size=32, router_hidden_size=8)}.items():
        random_checkpoint[f"write_{kind}"](tmp_path / kind, config, *([model] if model else []))
        tracemalloc.start()  # numpy tells it of its arrays; of mapped files it knows nothing
        try:
            opened = open_dequantized(tmp_path / kind, 3) if model else open_dense(tmp_path / kind, None)
            save_hf(tmp_path / f"{kind}.out", opened[0], opened[1], dtype="bfloat16")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (0.3 if kind == "hf" else 1.5) * largest, (kind, peak / largest)


def test_what_it_took_is_said_and_recorded(tmp_path, folder, call_script):
    record = tmp_path / "record.json"
    for number, bound in enumerate((1_000_012_288, 1_000_006_144)):
        dtype = ["float32", "bfloat16"][number]
        found = call_script(
            "convert", f"--from={folder}", f"--to={tmp_path / dtype}", f"--dtype={dtype}", f"--json={record}"
        )
        assert found.returncode in (0, None), found.stderr
        assert re.match(
            r"0\.00 GB in \d+\.\d s; largest tensor 0\.00 GB, peak memory \d+\.\d\d GB\nwrote", found.stdout
        )
        last = json.loads(record.read_text())["conversions"][number]
        assert (last["source"], last["dtype"], last["layers"], last["tensors"]) == ("Hugging Face", dtype, 1, 11)
        assert last["largest_tensor"] == (4, 2)[number] * 48 * 32 and last["bound"] == bound
        assert last["bytes"] == sum((4, 2)[number] * leaf.size for leaf in jax.tree.leaves(load_hf(folder)[1]))
        assert 50e6 < last["peak_host_bytes"] < 50e9 and last["provenance"]["command"].endswith(f"--json={record}")
    record.write_text("[]")
    found = call_script("convert", f"--from={folder}", f"--to={tmp_path / 'third'}", f"--json={record}")
    assert found.stderr == f"error: '{record}' holds no list 'conversions' of records\n"
    assert record.read_text() == "[]" and not (tmp_path / "third").exists()


def test_checkpoint_at_a_width(tmp_path, folder, call_script):
    config, _ = load_hf(folder)
    elastic = ElasticConfig(group_size=16, router_hidden_size=4)
    rng = np.random.default_rng()

    def fill(leaf):
        high = 2**32 if leaf.dtype == np.uint32 else 50
        return rng.integers(1, high, leaf.shape).astype(leaf.dtype)

    variables = jax.tree.map(fill, abstract_variables(config, elastic))
    model = ElasticModel(config=config, elastic=elastic, variables=variables)
    save_checkpoint(tmp_path / "checkpoint", model, provenance={})

    arguments = (f"--from={tmp_path / 'checkpoint'}", f"--to={tmp_path / 'hf'}")
    result = run(*arguments, "--bits=3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("in float32, without a tokenizer\n")
    _, written = load_hf(tmp_path / "hf")
    for path in config.linear_shapes():
        part, name = path.split("/")
        weight = variables["slices"]["layers"][part][name]["weight"]
        expected = jax.vmap(lambda weight: weight.dequantize_width(3))(weight)
        np.testing.assert_array_equal(written["layers"][part][name]["kernel"], expected)
    np.testing.assert_array_equal(written["embedder"]["embedding"], variables["params"]["embedder"]["embedding"])
    assert_fails(call_script("convert", *arguments), "--bits must be a whole number from 1 to 8")
    assert_fails(call_script("convert", *arguments, "--bits=2.5"), "bits")


def test_mistakes_are_one_line_and_write_nothing(tmp_path, folder, call_script):
    target = tmp_path / "target"
    to = f"--to={target}"

    def call(*arguments):
        return call_script("convert", *arguments)

    assert_fails(run(to), "--from=MODEL and --to=FOLDER are required")
    assert_fails(call(f"--from={tmp_path / 'nowhere'}", to), "no file or folder")
    assert_fails(call(f"--from={ROOT / 'tests'}", to), "tests", "no config.json")
    assert_fails(call("--from=package:no_such_package", to), "no package 'no_such_package' is installed")
    assert_fails(call(f"--from={folder}", to, "--bits=4"), "--bits applies to a checkpoint")
    assert_fails(call(f"--from={folder}", f"--to={folder}"), "is not an empty folder")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_fails(call(f"--from={folder}", to), "model.safetensors", "truncated")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
