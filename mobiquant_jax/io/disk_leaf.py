"""Leaves of a parameter tree that stay where they are stored, and are read a layer at a time.

A tree of them has the shapes and types of the loaded tree, and takes its place wherever leaves are indexed before they
are used: `save_hf` reads one tensor, block-wise calibration one block, a process of a pod what its devices hold.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from mobiquant_jax.io.names import Params, TensorSpec


@dataclass(frozen=True, kw_only=True)
class DiskLeaf:
    """An array that is read on demand; ``leaf[index]`` and ``np.asarray(leaf)`` give numpy arrays.

    Attributes:
        shape: with a leading layer axis where ``stacked``.
        dtype: the type that reads are converted to.
        read: gives the array, or one layer of a stack by its number; a view of a mapped file where it can be.
        stacked: the first axis counts layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    stacked: bool

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * self.dtype.itemsize

    def layer(self, index: int) -> "DiskLeaf":
        """One layer of a stack, not read yet.

        Raises:
            IndexError: there is no such layer.
        """
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(f"layer {index} of {self.shape[0]}")
        return replace(self, shape=self.shape[1:], read=partial(self.read, index % self.shape[0]), stacked=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part; of a stack, only the layers that the first index names."""
        if not self.stacked:
            return np.asarray(self.read()[index], self.dtype)
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int | np.integer):
            return self.layer(int(first))[tuple(rest)]
        layers = range(*first.indices(self.shape[0]))
        parts = (self.read(layer)[tuple(rest)] for layer in layers)
        return _stack(parts, len(layers), self.dtype) if layers else np.empty(self.shape, self.dtype)[index]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Reads everything."""
        if copy is False:
            raise ValueError("a leaf on disk cannot be an array without a copy")
        whole = self[...] if not self.stacked else self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def sample(self, flat: np.ndarray) -> np.ndarray:
        """Elements at flat positions in row-major order; touches little more of the file than those.

        Args:
            flat: rising positions, ``[n]``.
        """
        if not self.stacked:
            return np.asarray(self.read()[np.unravel_index(flat, self.shape)], self.dtype)
        layer, within = np.divmod(flat, self.size // self.shape[0])
        return np.concatenate([self.layer(int(i)).sample(within[layer == i]) for i in np.unique(layer)])


def disk_tree(
    specs: Mapping[str, TensorSpec], read: Callable[[str], np.ndarray], dtypes: Mapping[str, DTypeLike]
) -> Params:
    """A parameter tree over the tensors of a file.

    Args:
        specs: what the model needs; already compared with the file by ``check_tensors``.
        read: gives a tensor by name, in the file's orientation.
        dtypes: tensor name -> dtype; a stacked leaf gets the smallest dtype that holds all of its layers exactly.

    Returns:
        The tree of `DiskLeaf`, layers stacked along axis 0.
    """
    by_leaf: dict[str, list[TensorSpec]] = {}
    for spec in specs.values():
        by_leaf.setdefault(spec.path, []).append(spec)
    params: Params = {}
    for path, members in by_leaf.items():
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = _leaf(members, read, np.result_type(*{np.dtype(dtypes[spec.name]) for spec in members}))
    return params


def layer(leaf: Any, index: int) -> Any:
    """One layer of a stacked leaf: of a `DiskLeaf`, one that is not read yet."""
    return leaf.layer(index) if isinstance(leaf, DiskLeaf) else leaf[index]


def materialize(tree: Any) -> Any:
    """Reads every `DiskLeaf` of a tree into memory; other leaves stay as they are."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, DiskLeaf) else leaf, tree)


def _stack(parts: Iterator[np.ndarray], count: int, dtype: np.dtype) -> np.ndarray:
    """Like ``np.stack``, with one part in memory beside the result."""
    first = np.asarray(next(parts))
    stack = np.empty((count, *first.shape), dtype)
    stack[0] = first
    for row, part in enumerate(parts, start=1):
        stack[row] = part
    return stack


def _leaf(members: list[TensorSpec], read: Callable[[str], np.ndarray], dtype: np.dtype) -> DiskLeaf:
    shape = members[0].shape[::-1] if members[0].transposed else members[0].shape
    stacked = members[0].layer is not None

    def read_layer(layer: int = 0) -> np.ndarray:
        return members[layer].to_tree(read(members[layer].name))

    return DiskLeaf(shape=(len(members), *shape) if stacked else shape, dtype=dtype, read=read_layer, stacked=stacked)
