"""Hugging Face folders: bit-exact round trips, transformers reads what is written, and clear errors."""

import json
import resource
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mobiquant_jax.io import load_hf, save_hf
from mobiquant_jax.models import Llama, LlamaConfig

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_folder(folder, config, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_all(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def folder(tmp_path, hf_config, hf_tensors):
    return write_folder(tmp_path / "source", hf_config, hf_tensors)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(tmp_path, hf_config, hf_tensors, dtype, shards):
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in hf_tensors.items()}
    source = write_folder(tmp_path / "source", hf_config, tensors, shards)
    config, params = load_hf(source, dtype=None)
    assert config == LlamaConfig.from_hf(hf_config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(DTYPES[dtype])}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        np.testing.assert_array_equal(
            params["layers"]["attention"]["o_proj"]["kernel"][layer], tensors[prefix + "self_attn.o_proj.weight"].T
        )
        np.testing.assert_array_equal(
            params["layers"]["mlp_norm"]["scale"][layer], tensors[prefix + "post_attention_layernorm.weight"]
        )
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)

    target = tmp_path / "new" / "target"
    limit = 10**9 if shards == 1 else 20_000
    save_hf(target, config, params, dtype=dtype, max_shard_bytes=limit)
    assert len(list(target.glob("*.safetensors"))) == 1 if shards == 1 else len(list(target.glob("*.safetensors"))) > 2
    written = read_all(target)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].tobytes() == tensor.tobytes(), name
    assert LlamaConfig.from_hf(json.loads((target / "config.json").read_text())) == config
    reloaded_config, reloaded = load_hf(target, dtype=None)
    assert reloaded_config == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_the_tree_has_the_models_shapes(folder):
    config, params = load_hf(folder)
    expected = jax.eval_shape(Llama(config).init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, dict(expected))


def test_default_is_float32_and_a_dtype_casts(tmp_path, hf_config, hf_tensors):
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in hf_tensors.items()}
    halves["model.layers.1.mlp.up_proj.weight"] = hf_tensors["model.layers.1.mlp.up_proj.weight"]
    source = write_folder(tmp_path / "source", hf_config, halves)
    _, params = load_hf(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    _, params = load_hf(source, dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    # As stored: a stack of both types takes the one that loses nothing.
    _, params = load_hf(source, dtype=None)
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == np.float32
    assert params["layers"]["mlp"]["gate_proj"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up_proj"]["kernel"][1], hf_tensors["model.layers.1.mlp.up_proj.weight"].T
    )


def test_jax_parameters_are_written_too(tmp_path, folder, hf_tensors):
    config, params = load_hf(folder)
    save_hf(tmp_path / "target", config, jax.tree.map(jax.numpy.asarray, params))
    for name, tensor in read_all(tmp_path / "target").items():
        np.testing.assert_array_equal(tensor, hf_tensors[name])


@pytest.mark.parametrize("case", ["untied", "tied", "llama3 rotary scaling"])
def test_transformers_gives_the_same_logits(tmp_path, hf_config, hf_tensors, rng, case):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    if case == "tied":
        hf_config["tie_word_embeddings"] = True
        del hf_tensors["lm_head.weight"]
    if case == "llama3 rotary scaling":
        hf_config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    source = write_folder(tmp_path / "source", hf_config, hf_tensors)
    config, params = load_hf(source)
    save_hf(tmp_path / "target", config, params)
    tokens = rng.integers(0, config.vocab_size, (2, 50))

    def logits(folder):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).logits.numpy()

    theirs = logits(tmp_path / "target")
    np.testing.assert_array_equal(theirs, logits(source))
    ours = np.asarray(Llama(config).apply({"params": params}, tokens.astype(np.int32)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_a_tied_head_stored_twice_must_equal_the_embedding(tmp_path, hf_config, hf_tensors):
    hf_config["tie_word_embeddings"] = True
    hf_tensors["lm_head.weight"] = hf_tensors["model.embed_tokens.weight"].copy()
    hf_tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _, params = load_hf(write_folder(tmp_path / "equal", hf_config, hf_tensors))
    assert "lm_head" not in params
    hf_tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(ValueError) as error:
        load_hf(write_folder(tmp_path / "other", hf_config, hf_tensors))
    assert_one_line(error, "other", "lm_head.weight", "differs")


def test_tensors_are_read_one_at_a_time(tmp_path, hf_config, rng):
    hf_config |= {"hidden_size": 256, "num_hidden_layers": 12, "vocab_size": 64, "tie_word_embeddings": True}
    config = LlamaConfig.from_hf(hf_config)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), dict(shapes))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 256 * 64 * 4
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        save_hf(tmp_path / "model", config, params)
        saved = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        load_hf(tmp_path / "model")
        loaded = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    slack = 4 * largest + 300_000
    assert saved < slack < total / 2
    assert loaded < total + slack


def test_missing_files(tmp_path, hf_config, hf_tensors):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_hf(tmp_path / "nowhere")
    source = write_folder(tmp_path / "source", hf_config, hf_tensors, shards=3)
    (source / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_hf(source)
    assert_one_line(error, "'part-1.safetensors'", "index.json is missing")
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no model.safetensors.index.json"):
        load_hf(source)


def test_an_index_that_lies(tmp_path, hf_config, hf_tensors):
    source = write_folder(tmp_path / "source", hf_config, hf_tensors, shards=2)
    shutil.copy(source / "part-0.safetensors", source / "part-1.safetensors")
    with pytest.raises(ValueError) as error:
        load_hf(source)
    assert_one_line(error, "part-1.safetensors", "already in another shard")
    save_file({"model.norm.weight": hf_tensors["model.norm.weight"]}, source / "part-0.safetensors")
    save_file({}, source / "part-1.safetensors")
    with pytest.raises(ValueError) as error:
        load_hf(source)
    assert_one_line(error, "lacks tensor", "index.json places in it")


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_json(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load_hf(folder)
    assert_one_line(error, "config.json", "JSON")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(ValueError) as error:
        load_hf(folder)
    assert_one_line(error, "model.safetensors", "truncated")


def test_wrong_tensors_are_named(tmp_path, hf_config, hf_tensors):
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = hf_tensors[name]
    cases = {
        "shape": ({name: tensor.T.copy()}, (name, "(48, 32)", "(32, 48)")),
        "extra": ({"model.layers.0.self_attn.q_proj.bias": tensor[0]}, ("unexpected", "self_attn.q_proj.bias")),
        "missing": ({name: None}, ("missing tensor", name)),
        "integer": ({name: tensor.astype(np.int8)}, (name, "I8")),
    }
    for case, (change, parts) in cases.items():
        changed = {key: value for key, value in {**hf_tensors, **change}.items() if value is not None}
        with pytest.raises(ValueError) as error:
            load_hf(write_folder(tmp_path / case, hf_config, changed))
        assert_one_line(error, case, *parts)


def test_an_unsupported_model_is_named_with_its_folder(tmp_path, hf_config, hf_tensors):
    hf_config["model_type"] = "mamba"
    with pytest.raises(ValueError) as error:
        load_hf(write_folder(tmp_path / "source", hf_config, hf_tensors))
    assert_one_line(error, "source", "mamba")


def test_nothing_is_overwritten(tmp_path, folder):
    config, params = load_hf(folder)
    for target in (folder, folder / "config.json"):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ValueError, match="is not an empty folder"):
            save_hf(target, config, params)
        assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", config, params)
    assert load_hf(tmp_path / "empty")[0] == config


def test_a_failed_write_leaves_nothing(tmp_path, folder):
    config, params = load_hf(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError) as error:
            save_hf(tmp_path / "target", config, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(error, "cannot write", "target", "too large")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parameters_must_fit_before_anything_is_written(tmp_path, folder):
    config, params = load_hf(folder)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel[:2]
    with pytest.raises(ValueError) as error:
        save_hf(tmp_path / "target", config, params)
    assert_one_line(error, "layers/mlp/up_proj/kernel", "(2, 32, 48)", "(3, 32, 48)")
    del params["layers"]["mlp"]["up_proj"]
    with pytest.raises(ValueError, match="no leaf 'layers/mlp/up_proj/kernel'"):
        save_hf(tmp_path / "target", config, params)
    params["layers"]["mlp"]["up_proj"] = {"kernel": kernel * 1e6}
    with pytest.raises(ValueError, match="up_proj.weight' holds values outside float16's range"):
        save_hf(tmp_path / "target", config, params, dtype="float16")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        save_hf(tmp_path / "target", config, params, dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_stories260k_round_trip(tmp_path, shared_data):
    source = shared_data / "stories260K"
    config, params = load_hf(source)
    save_hf(tmp_path / "target", config, params)
    original, written = read_all(source), read_all(tmp_path / "target")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor)
