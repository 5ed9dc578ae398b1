"""An elastic checkpoint as a dense parameter tree: each layer read from disk and dequantized when it is indexed."""

from collections.abc import Callable
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from mobiquant_jax.io.checkpoint import VARIABLES, abstract_variables, read_manifest
from mobiquant_jax.io.disk_leaf import DiskLeaf
from mobiquant_jax.io.names import Params
from mobiquant_jax.io.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from mobiquant_jax.models.config import LlamaConfig
from mobiquant_jax.quant import CODE_BITS, SlicedWeight


def open_dequantized(path: str | Path, width: int) -> tuple[LlamaConfig, Params, Tokenizer | None]:
    """Opens an elastic checkpoint read at a uniform width.

    Args:
        path: the checkpoint.
        width: bits, 1 to 8.

    Returns:
        The config, the dense parameter tree of `DiskLeaf` in float32, and the tokenizer, if any.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: a width outside 1..8, another format, or, when a leaf is read, damaged variables.
    """
    if not 1 <= width <= CODE_BITS:
        raise ValueError(f"width {width} is outside 1..{CODE_BITS} bits")
    path = Path(path)
    config, elastic = read_manifest(path)
    like = abstract_variables(config, elastic)["params"]
    read = _reader(path / VARIABLES)
    dequantize = jax.jit(lambda weight: weight.dequantize_width(width))

    def stored(*names: str) -> DiskLeaf:
        leaf = reduce(lambda node, name: node[name], names, like)
        return DiskLeaf(
            shape=tuple(leaf.shape),
            dtype=np.dtype(leaf.dtype),
            read=partial(read, ("params", *names)),
            stacked=names[0] == "layers",
        )

    def dequantized(part: str, name: str, shape: tuple[int, int]) -> DiskLeaf:
        names = ("slices", "layers", part, name, "weight")

        def read_layer(layer: int) -> np.ndarray:
            weight = SlicedWeight(
                planes=tuple(read((*names, "planes", str(e)), layer) for e in range(len(elastic.slice_bits))),
                scale=read((*names, "scale"), layer),
                zero=read((*names, "zero"), layer),
                in_features=shape[0],
                slice_bits=elastic.slice_bits,
            )
            return np.asarray(dequantize(weight))

        stack = (config.num_hidden_layers, *shape)
        return DiskLeaf(shape=stack, dtype=np.dtype(np.float32), read=read_layer, stacked=True)

    layers: Params = {norm: {"scale": stored("layers", norm, "scale")} for norm in ("attention_norm", "mlp_norm")}
    for linear, shape in config.linear_shapes().items():
        part, name = linear.split("/")
        layers.setdefault(part, {})[name] = {"kernel": dequantized(part, name, shape)}
    params: Params = {"layers": layers}
    for part in like.keys() - {"layers"}:
        params[part] = {name: stored(part, name) for name in like[part]}
    return config, params, load_tokenizer(path) if has_tokenizer(path) else None


def _reader(folder: Path) -> Callable[..., Any]:
    """``read(names, *index)``: a part of one array of an orbax tree, straight from its TensorStore.

    It comes chunk by chunk, since TensorStore may hold all the chunks of a read beside its result.
    """

    @cache
    def opened(name: str) -> Any:
        store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()

    def read(names: tuple[str, ...], *index: int) -> Any:
        name = ".".join(names)
        try:
            store = opened(name)[index or ...]
            array = np.empty(store.shape, store.dtype.numpy_dtype)
            chunk = store.chunk_layout.read_chunk.shape or ()  # None of a scalar
            for corner in np.ndindex(*(-(-size // step) for size, step in zip(store.shape, chunk, strict=True))):
                part = tuple(slice(at * step, (at + 1) * step) for at, step in zip(corner, chunk, strict=True))
                array[part] = store[part or ...].read().result()
            return array
        except Exception as error:  # TensorStore raises many types for damaged trees
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"'{folder}' cannot be read: array '{name}': {reason}") from error

    return read
