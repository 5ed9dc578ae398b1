"""Leaves on disk against the arrays they stand for, and what is read of them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mobiquant_jax.io import DiskLeaf, load_hf, materialize, open_hf, save_hf
from mobiquant_jax.io.checkpoint import save_checkpoint
from mobiquant_jax.io.dequantized import open_dequantized
from mobiquant_jax.models import Llama, LlamaConfig
from mobiquant_jax.sharding import Placement, make_mesh


@pytest.fixture
def stack():
    """An array of 5 layers, the leaf that stands for it, and the layers that were read."""
    array = np.random.default_rng().standard_normal((5, 6, 4))
    seen = []

    def read(layer):
        seen.append(layer)
        return array[layer]

    return array, DiskLeaf(shape=array.shape, dtype=np.dtype(np.float64), read=read, stacked=True), seen


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (2, slice(1, 3)),
        (slice(1, 4), slice(None), slice(0, 2)),
        slice(None),
        (slice(0, 2), 3),
        (3, Ellipsis, 1),
        (slice(4, None), slice(2, 6), slice(None)),
    ],
)
def test_indexing_is_numpys(stack, index):
    array, leaf, _ = stack
    np.testing.assert_array_equal(leaf[index], array[index])


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path, small_config):
    config = small_config()
    params = jax.jit(Llama(config).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    save_hf(tmp_path, config, params)
    _, opened = open_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError) as error:
        materialize(opened)
    assert str(error.value).startswith(f"{file}: damaged or truncated safetensors file: ")


def test_a_file_that_may_not_be_read_is_named(tmp_path, small_config):
    config = small_config()
    params = jax.jit(Llama(config).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    save_hf(tmp_path, config, params)
    file = tmp_path / "model.safetensors"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(PermissionError, match=f"Permission denied: '{file}'"):
        open_hf(tmp_path)


def test_only_the_layers_asked_for_are_read(stack):
    array, leaf, seen = stack
    assert (leaf.ndim, leaf.size, leaf.nbytes, len(leaf)) == (3, 120, 960, 5)
    layer = leaf.layer(3)
    assert seen == []
    np.testing.assert_array_equal(np.asarray(layer), array[3])
    np.testing.assert_array_equal(np.asarray(leaf), array)
    np.testing.assert_array_equal(np.asarray(leaf, np.float32), array.astype(np.float32))
    positions = np.array([0, 23, 24, 119])
    np.testing.assert_array_equal(leaf.sample(positions), array.ravel()[positions])
    assert seen == [3, *range(5), *range(5), 0, 1, 4]
    with pytest.raises(IndexError, match="layer 5 of 5"):
        leaf[5]
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(leaf, copy=False)


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    params = jax.jit(Llama(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    save_hf(tmp_path / "model", config, params, dtype="bfloat16", max_shard_bytes=20_000)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [np.float32, None])
def test_an_opened_folder_is_the_loaded_one(tmp_path, folder, dtype):
    config, opened = open_hf(folder, dtype)
    _, loaded = load_hf(folder, dtype)
    assert all(isinstance(leaf, DiskLeaf) for leaf in jax.tree.leaves(opened))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opened) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), loaded
    )
    jax.tree.map(np.testing.assert_array_equal, materialize(opened), loaded)
    save_hf(tmp_path / "copy", config, opened, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "copy", dtype)[1], loaded)


def test_a_sharded_load_reads_each_shard_from_the_files(folder):
    config, opened = open_hf(folder)
    _, loaded = load_hf(folder)
    placement = Placement.create(make_mesh(data=2, fsdp=2, model=2), config)
    placed = placement.put(opened)
    jax.tree.map(np.testing.assert_array_equal, placed, loaded)
    kernel = placed["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "model", "fsdp")
    assert kernel.addressable_shards[0].data.shape == (3, 32, 16)


def test_a_checkpoint_is_dequantized_layer_by_layer(tmp_path, random_elastic):
    model = random_elastic(5, num_hidden_layers=3, tie_word_embeddings=True)
    save_checkpoint(tmp_path / "elastic", model, provenance={})
    for width in (1, 4, 7):
        config, opened, tokenizer = open_dequantized(tmp_path / "elastic", width)
        assert config == model.config and tokenizer is None
        jax.tree.map(np.testing.assert_array_equal, materialize(opened), model.dequantized_params(width))
    with pytest.raises(ValueError, match="width 9 is outside 1..8"):
        open_dequantized(tmp_path / "elastic", 9)
    for file in (tmp_path / "elastic" / "variables" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="elastic/variables' cannot be read: array '"):
        materialize(opened)
