"""Elastic checkpoints: bit-exact, atomic, and one line of what is wrong with a damaged one."""

import contextlib
import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mobiquant_jax.calibration.optimizer import grouped_adamw
from mobiquant_jax.io import checkpoint
from mobiquant_jax.io.checkpoint import (
    DamagedTree,
    is_checkpoint,
    load_checkpoint,
    load_tree,
    save_checkpoint,
    save_tree,
)
from mobiquant_jax.io.load import load_model
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
MADE_BY = {"command": "a test", "versions": {"jax": "x"}}


class FileTokenizer:
    """Saves what a tokenizer saves, a file."""

    def save(self, folder):
        (Path(folder) / "note.txt").write_text("tokens")


@pytest.fixture(scope="module")
def model(random_elastic):
    return random_elastic(21, num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(path, model, MADE_BY)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(path, kind, *parts):
    with pytest.raises(kind) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message, message


def test_round_trip_is_bit_exact(model, saved):
    loaded = load_checkpoint(saved)
    assert_same(loaded.variables, model.variables)
    assert (loaded.config, loaded.elastic, loaded.tokenizer) == (model.config, model.elastic, None)
    assert is_checkpoint(saved) and load_model(saved).is_elastic
    manifest = json.loads((saved / "mobiquant.json").read_text())
    assert manifest["provenance"] == MADE_BY
    assert json.loads((saved / "config.json").read_text())["hidden_size"] == 64


def test_other_slicings_and_a_tied_head_round_trip(random_elastic, tmp_path):
    elastic = ElasticConfig(group_size=16, slice_bits=(4, 2, 2), router_hidden_size=3, budget_grid=(4.0, 8.0))
    model = random_elastic(22, elastic, num_hidden_layers=3, tie_word_embeddings=True)
    save_checkpoint(tmp_path / "c", model, {})
    loaded = load_checkpoint(tmp_path / "c")
    assert_same(loaded.variables, model.variables)
    assert loaded.elastic == elastic


def test_saving_replaces_an_older_checkpoint(model, copy, random_elastic):
    newer = random_elastic(23, num_hidden_layers=1, tokenizer=FileTokenizer())
    save_checkpoint(copy, newer, {})
    assert_same(load_checkpoint(copy).variables, newer.variables)
    assert (copy / "note.txt").read_text() == "tokens"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


class BrokenTokenizer:
    def save(self, folder):
        raise OSError("no space left on device")


@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_leaves_the_old_one_and_no_litter(model, copy, tmp_path, exists):
    path = copy if exists else tmp_path / "new"
    before = files_of(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, dataclasses.replace(model, tokenizer=BrokenTokenizer()), {})
    assert files_of(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_an_interrupted_save_leaves_the_old_one_and_no_litter(model, copy, tmp_path, monkeypatch):
    def interrupted(path, tree):
        Path(path).mkdir()
        raise KeyboardInterrupt

    before = files_of(tmp_path)
    monkeypatch.setattr(checkpoint, "save_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(copy, model, {})
    assert files_of(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_failed_rename_puts_the_old_one_back(model, copy, tmp_path, monkeypatch):
    rename = Path.rename

    def fails_for_the_new_one(self, target):
        if ".partial" in self.name and Path(target) == copy:
            raise OSError("the disk went away")
        return rename(self, target)

    before = files_of(tmp_path)
    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="went away"):
        save_checkpoint(copy, model, {})
    assert files_of(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_is_found_before_anything_is_written(model, copy, tmp_path, monkeypatch):
    before = files_of(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(OSError, match=r"cannot write '.*': no space left, 0\.\d\d MB are needed, 0\.03 free"):
        save_checkpoint(copy, model, {})
    assert files_of(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_disk_that_fills_up_while_it_is_written_is_one_error(copy, tmp_path):
    """The system refuses files beyond some size, as it does beyond the disk's; orbax's threads log nothing.

    In a process of its own: what TensorStore abandons would be collected, with a warning, in some later test.
    """
    program = """
import resource, sys
from mobiquant_jax.io.checkpoint import load_checkpoint, save_checkpoint
model = load_checkpoint(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save_checkpoint(sys.argv[1], model, {})
except OSError as error:
    print(error)
"""
    before = files_of(tmp_path)
    result = subprocess.run([sys.executable, "-c", program, copy], capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(r"cannot write '.*': File too large\n", result.stdout), result.stderr
    assert "_SignalingThread" not in result.stderr
    assert files_of(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_writes_that_go_on_after_one_has_failed_leave_nothing(model, copy, tmp_path, monkeypatch):
    """TensorStore's others go on, and make the folders that they miss."""
    threads = []

    def fails_while_others_write(self, folder, args):
        def write():
            for number in range(10):
                late = Path(f"{folder}.orbax-checkpoint-tmp") / "d" / str(number)
                with contextlib.suppress(OSError):  # removed meanwhile
                    late.parent.mkdir(parents=True, exist_ok=True)
                    late.write_text("late")
                time.sleep(0.03)

        threads.append(threading.Thread(target=write))
        threads[0].start()
        raise ValueError("Error writing 'x': No space left on device [tensorstore_spec='{}']")

    before = files_of(tmp_path)
    monkeypatch.setattr(ocp.Checkpointer, "save", fails_while_others_write)
    with pytest.raises(OSError, match=r"^cannot write '.*': No space left on device$"):
        save_checkpoint(copy, model, {})
    threads[0].join()
    assert files_of(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_folder_that_cannot_be_removed_does_not_keep_the_error_back(model, tmp_path, monkeypatch):
    def fails(self, folder, args):
        Path(f"{folder}.orbax-checkpoint-tmp").mkdir()
        raise ValueError("Error writing 'x': Read-only file system [tensorstore_spec='{}']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fails)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint, "_LONGEST_SECONDS", 0.3)
    with pytest.raises(OSError, match=r"^cannot write '.*': Read-only file system$"):
        save_tree(tmp_path / "tree", {"a": np.zeros(3)})


def test_an_unquantized_model_is_refused(model, tmp_path):
    dense = ElasticModel(config=model.config, variables={"params": {}})
    with pytest.raises(ValueError, match="unquantized model is saved with io.save_hf"):
        save_checkpoint(tmp_path / "dense", dense, {})
    assert not list(tmp_path.iterdir())


def test_missing_parts(copy):
    fails(copy.parent / "nowhere", FileNotFoundError, "no elastic checkpoint", "mobiquant.json")
    (copy / "config.json").rename(copy / "elsewhere.json")
    fails(copy, FileNotFoundError, "config.json")
    (copy / "elsewhere.json").rename(copy / "config.json")
    shutil.rmtree(copy / "variables")
    fails(copy, FileNotFoundError, "variables")
    (copy / "mobiquant.json").unlink()
    fails(copy, FileNotFoundError, "no elastic checkpoint", "mobiquant.json")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (dict(layout_version=7), ["layout_version 7", "reads 1"]),
        (dict(format_version=None), ["format_version None", "reads 2"]),
        (dict(elastic=None), ["mobiquant.json"]),
        (dict(elastic={"group_sise": 32}), ["mobiquant.json", "group_sise"]),
        (dict(elastic={"group_size": 48}), ["group size 48", "attention/q_proj"]),
        (dict(elastic={"slice_bits": [2, 2]}), ["slice bits (2, 2)"]),
    ],
)
def test_a_manifest_that_does_not_fit(copy, change, parts):
    manifest = json.loads((copy / "mobiquant.json").read_text()) | change
    (copy / "mobiquant.json").write_text(json.dumps(manifest))
    fails(copy, ValueError, *parts)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_manifest_that_is_no_json_object(copy, content):
    (copy / "mobiquant.json").write_text(content)
    fails(copy, ValueError, "mobiquant.json", "JSON")


@pytest.mark.parametrize(
    "change",
    [
        dict(num_hidden_layers=2),
        dict(intermediate_size=128),
        dict(vocab_size=96),
        dict(tie_word_embeddings=True),
        dict(num_key_value_heads=4),
    ],
)
def test_variables_of_another_architecture(copy, change):
    content = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(content))
    fails(copy, ValueError, "variables")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "one bit"])
def test_damaged_variables(copy, damage, monkeypatch):
    largest = max((p for p in (copy / "variables").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "removed":
        largest.unlink()
    elif damage == "one bit":
        content = bytearray(largest.read_bytes())
        content[np.random.default_rng().integers(len(content))] ^= 1 << np.random.default_rng().integers(8)
        largest.write_bytes(content)
    else:
        content = largest.read_bytes()
        largest.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    gc.collect()
    left_behind: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", left_behind.append)
    fails(copy, ValueError, "variables", f"file '{largest.relative_to(copy / 'variables').as_posix()}' is")
    gc.collect()
    assert not left_behind  # abandoned reads would each print a traceback after the one-line error


@pytest.mark.parametrize("content", [{"_METADATA": 7}, {"format_version": 3, "files": {}}])
def test_a_tree_of_another_format_is_not_called_damaged(copy, content):
    (copy / "variables" / "files.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        load_checkpoint(copy)
    version = content.get("format_version", 1)
    assert str(error.value) == f"'{copy}/variables' has format_version {version}, this version reads 2"
    assert not isinstance(error.value, DamagedTree)


def test_trees(tmp_path):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.arange(3, dtype=jnp.uint32), jnp.ones(2, jnp.bfloat16))}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    save_tree(tmp_path / "t", tree)
    assert_same(load_tree(tmp_path / "t", like), tree)
    with pytest.raises(ValueError, match="exists"):
        save_tree(tmp_path / "t", tree)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_tree(tmp_path / "u", like)
    prefix = f"'{tmp_path}/t' cannot be read as this model's variables: "
    for other, reason in (
        ({**like, "a": jax.ShapeDtypeStruct((3, 2), jnp.float32)}, "array 'a' is float32 (2, 3), not float32 (3, 2)"),
        ({**like, "a": jax.ShapeDtypeStruct((2, 3), jnp.int32)}, "array 'a' is float32 (2, 3), not int32 (2, 3)"),
        ({"a": like["a"]}, "unexpected array 'b/0'"),
        ({**like, "c": like["a"]}, "missing array 'c'"),
    ):
        with pytest.raises(ValueError) as error:
            load_tree(tmp_path / "t", other)
        assert str(error.value) == prefix + reason


def test_little_more_than_the_largest_part_of_an_array_is_written_at_once(tmp_path, monkeypatch):
    """Orbax refuses parts that reach its limit, and copies as much as the limit allows."""
    sharding = NamedSharding(make_mesh(data=4, model=2), PartitionSpec(None, "model"))
    split = jax.ShapeDtypeStruct((10**6, 1000), jnp.float32, sharding=sharding)  # parts of 2 GB
    assert checkpoint._concurrent_gb({"a": np.ones(3), "b": split}) == 3
    assert checkpoint._concurrent_gb([np.broadcast_to(np.int8(0), 10**9 - 1)]) == 1
    handler, limits = checkpoint.ocp.PyTreeCheckpointHandler, []

    def make(**options):
        limits.append(options["save_concurrent_gb"])
        return handler(**options)

    monkeypatch.setattr(checkpoint.ocp, "PyTreeCheckpointHandler", make)
    save_tree(tmp_path / "tree", {"a": jnp.ones(3)})
    assert limits == [1]


def test_an_optimizer_state_round_trips(tmp_path):
    params = {"q": {"kernel": jnp.ones((4, 2))}, "norm": {"scale": jnp.ones(2)}}
    optimizer = grouped_adamw(1e-3, 0.0, 1e-3, 5)
    _, state = optimizer.update(params, optimizer.init(params), params)
    save_tree(tmp_path / "t", (params, state))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, state))
    assert_same(load_tree(tmp_path / "t", like), (params, state))
