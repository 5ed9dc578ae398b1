"""Elastic checkpoints: one folder with the variables (orbax), the architecture, the slicing and the tokenizer.

config.json          the architecture, as Hugging Face writes it
mobiquant.json       format and layout versions, slicing and routing, provenance
tokenizer.json, ...  the tokenizer, where there is one
variables/           packed slices, routers, thresholds, norms, embedding and head
"""

import contextlib
import dataclasses
import glob
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from mobiquant_jax import distributed
from mobiquant_jax.files import read_json_object, save_json
from mobiquant_jax.io.tokenizer import has_tokenizer, load_tokenizer
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.quant import LAYOUT_VERSION
from mobiquant_jax.sharding import Placement

FORMAT_VERSION = 2  # of checkpoints and of each saved tree
MANIFEST = "mobiquant.json"
VARIABLES = "variables"
INVENTORY = "files.json"  # in each saved tree: the size and the CRC-32 of every file
_CHUNK_BYTES = 2**20  # smaller layers share a chunk
_MATRIX_CHUNK_BYTES = 2**26  # of the embedding and the head
_READ_BYTES = 2**24
_QUIET_SECONDS = 1.0  # after which writes of a failed save are taken to have ended
_LONGEST_SECONDS = 20.0  # for which they are waited for


class DamagedTree(ValueError):
    """A saved tree whose files are not those that were written."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is an elastic checkpoint."""
    return (Path(path) / MANIFEST).is_file()


def save_tree(path: str | Path, tree: Any) -> None:
    """Writes a pytree of arrays; the folder appears only once it is complete, with an inventory of its files.

    Several processes call it together and see the same file system; each writes what its own devices hold.

    Raises:
        ValueError: the folder exists.
        OSError: the disk refuses; nothing is left behind.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"'{path}' exists already")
    partial = distributed.partial_name(path)

    def complete() -> None:
        save_json(partial / INVENTORY, {"format_version": FORMAT_VERSION, "files": _inventory(partial)})
        partial.rename(path)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # one that was killed may have had the same process id
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))

    try:
        distributed.on_main(f"saving '{path}'", begin)
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=_one_replica(), save_concurrent_gb=_concurrent_gb(tree)
        )
        with _reported_once(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial, ocp.args.PyTreeSave(tree, jax.tree.map(_by_layer, tree)))
        distributed.on_main(f"saving '{path}'", complete)
    except BaseException as error:
        _remove_abandoned(partial)
        if not isinstance(error, ValueError):
            raise
        # TensorStore tells of a full disk by one, after a chain of "Error writing ...: ", before a dump of settings.
        reason = str(error).partition(" [")[0].rpartition(": ")[2]
        raise OSError(f"cannot write '{path}': {reason}") from error


def _remove_abandoned(partial: Path) -> None:
    """Removes what a failed save has written, until nothing has come for a while; a disk may refuse even that.

    The first write that fails is raised while TensorStore's threads go on with the others, and each of them makes the
    folders that it misses. Nothing tells when they have ended.
    """
    begin = quiet_since = time.monotonic()
    while (now := time.monotonic()) - quiet_since < _QUIET_SECONDS and now - begin < _LONGEST_SECONDS:
        unfinished = partial.parent.glob(f"{glob.escape(partial.name)}.orbax-checkpoint-tmp*")
        for folder in filter(os.path.lexists, (partial, *unfinished)):
            shutil.rmtree(folder, ignore_errors=True)
            quiet_since = time.monotonic()
        time.sleep(_QUIET_SECONDS / 20)


def _check_space(folder: Path, needed: int) -> None:
    """Raises OSError unless so many bytes fit on a folder's disk.

    Found out while writing, it is a traceback from each of the threads of orbax and TensorStore. Compressed, the arrays
    may be a little smaller.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"cannot write '{folder}': no space left, {needed / 1e6:.2f} MB are needed, {free / 1e6:.2f} free"
        )


@contextlib.contextmanager
def _reported_once() -> Iterator[None]:
    """Silences what orbax's threads log of an error that the block raises anyway."""

    def is_other(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _one_replica() -> Any:
    """How leaves are written: of several devices that hold the same part, one writes it.

    By default they share the work, by slices that are compiled for every shape and device: 19 s of a CPU for the first
    86 arrays on a mesh of eight devices.
    """
    handlers = ocp.type_handlers
    return handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)), (np.ndarray, handlers.NumpyHandler())
    )


def _concurrent_gb(tree: Any) -> int:
    """Gigabytes that may be on their way to the disk at once: as few as the largest part of an array allows.

    By default it is 96, and all of the tree is copied while it is compressed. A part that a device holds is written in
    one piece, which must be smaller than the limit.
    """

    def part_bytes(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return 1 + max(map(part_bytes, jax.tree.leaves(tree)), default=0) // 10**9


def _by_layer(leaf: Any) -> ocp.SaveArgs:
    """Large stacks are stored in chunks of one layer, large matrices in parts: an export reads one at a time."""
    if leaf.ndim == 2 and leaf.nbytes > _MATRIX_CHUNK_BYTES:
        return ocp.SaveArgs(chunk_byte_size=_MATRIX_CHUNK_BYTES)
    layer_bytes = leaf.nbytes // max(1, leaf.shape[0]) if leaf.ndim > 2 else 0
    return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,)) if layer_bytes >= _CHUNK_BYTES else ocp.SaveArgs()


def _inventory(folder: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32 of each file below a folder, the inventory itself left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != INVENTORY)
    return {file.relative_to(folder).as_posix(): [file.stat().st_size, _crc32(file)] for file in files}


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while part := opened.read(_READ_BYTES):
            value = zlib.crc32(part, value)
    return value


def _damage(folder: Path) -> str:
    """What is wrong with the files of a saved tree, or "".

    Orbax starts all reads at once and abandons the others when one fails; each of those prints a traceback of its own,
    whenever it happens to be collected. So a folder with a damaged file is never handed to it.

    Raises:
        ValueError: another format.
    """
    try:
        record = read_json_object(folder / INVENTORY)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version", 1)  # the first one did not say
        raise ValueError(f"'{folder}' has format_version {version}, this version reads {FORMAT_VERSION}")
    found = _inventory(folder)
    for name, (size, crc) in record["files"].items():
        if name not in found:
            return f"file '{name}' is missing"
        if found[name][0] != size:
            return f"file '{name}' is {found[name][0]} bytes long, not {size}"
        if found[name][1] != crc:
            return f"file '{name}' is not what was written: its CRC-32 is {found[name][1]:08x}, not {crc:08x}"
    return ""


def _check_files(folder: Path) -> None:
    """Process 0 reads all files of a saved tree; the verdict is everybody's.

    Raises:
        DamagedTree: names the file.
        ValueError: another format.
    """
    damage = ""

    def look() -> None:
        nonlocal damage
        damage = _damage(folder)

    distributed.on_main(f"checking '{folder}'", look)
    if distributed.from_main(int(bool(damage))):
        raise DamagedTree(
            f"'{folder}' cannot be read as this model's variables: {damage or 'process 0 says which file is damaged'}"
        )


def load_tree(path: str | Path, like: Any) -> Any:
    """Reads a pytree of arrays.

    Args:
        path: a folder of ``save_tree``.
        like: the same tree of ``jax.ShapeDtypeStruct``; its shardings place the arrays, on the first device where it
            has none, whatever mesh they were saved from.

    Raises:
        FileNotFoundError: no such folder.
        DamagedTree: a file is missing or not what was written.
        ValueError: the stored tree is of another format, or has other names, shapes or types.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder '{path}'")
    _check_files(path)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = _leaves(checkpointer.metadata(path).item_metadata.tree)
            # Compared before anything is read: orbax casts to other types, and refuses other shapes halfway.
            _check_leaves(stored, _leaves(like))
            return checkpointer.restore(path, jax.tree.map(_placed, like))
    except Exception as error:  # orbax and TensorStore raise many types for damaged trees
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"'{path}' cannot be read as this model's variables: {reason}") from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """With a sharding: without one orbax would want the devices that saved it."""
    first = SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or first
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of each array by its name; what holds no array has neither."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {
        name: (tuple(leaf.shape), jnp.dtype(leaf.dtype))
        for name, leaf in leaves.items()
        if getattr(leaf, "dtype", None) is not None
    }


def _check_leaves(stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*wanted, *stored]:
        if name not in stored:
            raise ValueError(f"missing array '{name}'")
        if name not in wanted:
            raise ValueError(f"unexpected array '{name}'")
        if stored[name] != wanted[name]:
            (shape, dtype), (other_shape, other_dtype) = stored[name], wanted[name]
            raise ValueError(f"array '{name}' is {dtype} {shape}, not {other_dtype} {other_shape}")


def abstract_variables(config: LlamaConfig, elastic: ElasticConfig) -> Variables:
    """Shapes and types of an elastic model's variables; allocates nothing.

    Raises:
        ValueError: the group size does not divide a linear's inputs.
    """
    elastic.check_model(config)
    return jax.tree.map(lambda leaf: leaf, _abstract_variables(config, elastic))  # the caller's own


@lru_cache(maxsize=8)
def _abstract_variables(config: LlamaConfig, elastic: ElasticConfig) -> Variables:
    """Traces the model, which takes a second."""
    model = ElasticModel(config=config, elastic=elastic, variables={})
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(
        lambda tokens: model.module.init(jax.random.key(0), tokens, model.budget_policy(tokens, 8.0)), tokens
    )
    return {name: variables[name] for name in ("params", "slices", "routing")}


def save_checkpoint(path: str | Path, model: ElasticModel, provenance: dict[str, Any]) -> None:
    """Writes an elastic model atomically: under a temporary name, renamed when complete.

    Args:
        path: folder to make; one that exists is replaced only once the new one is complete.
        model: the model.
        provenance: what made it; stored as JSON.

    Raises:
        ValueError: the model is not elastic.
        OSError: the disk refuses; nothing is left behind and an older checkpoint is untouched.
    """
    elastic = model.elastic
    if elastic is None:
        raise ValueError("an unquantized model is saved with io.save_hf, not as an elastic checkpoint")
    path = Path(path).absolute()
    partial = distributed.partial_name(path)

    def describe() -> None:
        (partial / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save(partial)
        manifest = {
            "format_version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
            "elastic": dataclasses.asdict(elastic),
            "provenance": provenance,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _replace(path, partial)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # one that was killed may have had the same process id
        partial.mkdir(parents=True)

    try:
        distributed.on_main(f"saving '{path}'", begin)
        save_tree(partial / VARIABLES, model.variables)
        distributed.on_main(f"saving '{path}'", describe)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(path: Path, complete: Path) -> None:
    """Renames a complete folder into the place of another, which is restored if that fails."""
    if not path.exists():
        complete.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        complete.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def load_checkpoint(path: str | Path, mesh: Mesh | None = None) -> ElasticModel:
    """Reads an elastic model.

    Args:
        path: the checkpoint.
        mesh: splits the variables over these devices, whatever mesh they were saved from; each process reads only what
            its own devices hold. None for one device.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: another format or layout, or variables that do not fit the architecture.
    """
    path = Path(path)
    config, elastic = read_manifest(path)
    like = abstract_variables(config, elastic)
    placement = None if mesh is None else Placement.create(mesh, config, elastic)
    variables = load_tree(path / VARIABLES, like if placement is None else placement.abstract(like))
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    return ElasticModel(config=config, elastic=elastic, variables=variables, tokenizer=tokenizer, placement=placement)


def read_manifest(path: str | Path) -> tuple[LlamaConfig, ElasticConfig]:
    """Reads what a checkpoint says it is.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: another format or layout, or a description that makes no sense.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise FileNotFoundError(f"'{path}' is no elastic checkpoint: it has no {MANIFEST}")
    manifest = read_json_object(path / MANIFEST)
    for name, known in (("format_version", FORMAT_VERSION), ("layout_version", LAYOUT_VERSION)):
        if manifest.get(name) != known:
            raise ValueError(f"'{path}' has {name} {manifest.get(name)!r}, this version reads {known}")
    config = LlamaConfig.from_hf(read_json_object(path / "config.json"))
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["elastic"].items()}
        elastic = ElasticConfig(**fields)
        elastic.check_model(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{path / MANIFEST}' does not describe the slicing: {error}") from error
    return config, elastic
