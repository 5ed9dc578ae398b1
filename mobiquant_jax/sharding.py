"""Where every array lives on a mesh: one table of logical dimensions, and the only file that knows axis names.

A mesh has three axes. ``data`` splits windows and requests; ``fsdp`` splits them too and, besides, the parameters along
the residual width; ``model`` splits heads, feed-forward channels and the vocabulary (Megatron-style, arXiv 1909.08053).
Every array is described by the logical names of its dimensions, and `RULES` says which axes split each name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import WORD_BITS, SlicedWeight

if TYPE_CHECKING:  # the models import this file
    from mobiquant_jax.models.config import LlamaConfig
    from mobiquant_jax.models.elastic import ElasticConfig

DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")

# Logical dimension -> the axes that split it; a dimension without an entry is whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),  # windows, samples, requests
    "embed": (FSDP,),  # the residual width, of parameters only: activations keep it whole
    "heads": (MODEL,),  # query heads x head_dim
    "kv_heads": (MODEL,),  # key-value heads x head_dim
    "ffn": (MODEL,),
    "vocab": (MODEL,),
}

# (inputs, outputs) of each linear
_LINEARS = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "ffn"),
    "up_proj": ("embed", "ffn"),
    "down_proj": ("ffn", "embed"),
    "lm_head": ("embed", "vocab"),
}

# Dimensions of each array below a linear, by the last name of its path. Words and groups run along the inputs.
_LINEAR_ARRAYS = {
    "kernel": ("in", "out"),
    "position": ("in", "out"),
    "planes": ("in", "out"),
    "scale": ("in", "out"),
    "zero": ("in", "out"),
    "gamma": ("in", "out"),
    "beta": ("in", "out"),
    "hidden": ("in", "router"),
    "magnitude": ("router",),
    "hidden_bias": ("router",),
    "output": ("router", "slice"),
    "output_bias": ("slice",),
    "thresholds": ("grid",),
}

# The other arrays, by the last two names of their path.
_OTHER_ARRAYS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embedder", "embedding"): ("vocab", "embed"),
    ("attention_norm", "scale"): ("channel",),
    ("mlp_norm", "scale"): ("channel",),
    ("final_norm", "scale"): ("channel",),
}


def make_mesh(*, data: int = -1, fsdp: int = 1, model: int = 1, devices: Any = None) -> Mesh:
    """The mesh of all devices.

    Args:
        data: size of the axis ``data``; -1 for what the other two leave.
        fsdp: size of the axis ``fsdp``.
        model: size of the axis ``model``: consecutive devices, the best connected ones.
        devices: the devices, all of the job by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if min(fsdp, model) < 1 or (data < 1 and data != -1):
        raise ValueError(f"mesh sizes data={data}, fsdp={fsdp}, model={model} must be positive (data may be -1)")
    shape = (max(1, len(devices) // (fsdp * model)) if data == -1 else data, fsdp, model)
    if math.prod(shape) != len(devices):
        raise ValueError(f"a mesh of data x fsdp x model = {shape} does not use all {len(devices)} devices")
    # Not jax.make_mesh: off v5e it refuses sizes that cut a TPU's physical axes, such as 8 x 8 of 4 x 4 x 4 chips.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def job_mesh(*, data: int, fsdp: int, model: int) -> Mesh:
    """The mesh that a run asks for: of all devices or, in a single process, of the first few.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or to one that divides it.
    """
    devices = jax.devices()
    wanted = data * fsdp * model
    if jax.process_count() == 1 and wanted > 0 and len(devices) % wanted == 0:
        devices = devices[:wanted]
    return make_mesh(data=data, fsdp=fsdp, model=model, devices=devices)


def one_device() -> Mesh:
    """The mesh of the first device alone, where every sharding is the whole array."""
    return make_mesh(devices=jax.devices()[:1])


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one logical dimension of a model is split.

    Attributes:
        dim: its name, a key of `RULES`.
        size: its length.
        unit: how many of its elements must stay together: a head, a group, a word.
        axes: the mesh axes that split it; none where it is whole on every device.
        reason: why it is whole although there is a rule, or "".
    """

    dim: str
    size: int
    unit: int
    axes: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A mesh and how one model is split over it; hashable, so that modules can hold it.

    Each logical dimension is decided once for the whole model, so that arrays which meet in an operation agree.

    Attributes:
        mesh: the devices.
        splits: the decision for each dimension.
    """

    mesh: Mesh | AbstractMesh
    splits: tuple[Split, ...]

    @classmethod
    def create(
        cls, mesh: Mesh | AbstractMesh, config: "LlamaConfig", elastic: "ElasticConfig | None" = None
    ) -> "Placement":
        """Decides every dimension of a model.

        Args:
            mesh: from `make_mesh`.
            config: architecture.
            elastic: slicing; then groups and packed words stay whole. None for an unquantized model.
        """
        head = config.head_dim
        packed = 1 if elastic is None else math.lcm(elastic.group_size, WORD_BITS // min(elastic.slice_bits))
        dims = {
            "embed": (config.hidden_size, packed),
            "heads": (config.num_attention_heads * head, math.lcm(head, packed)),
            "kv_heads": (config.num_key_value_heads * head, head),
            "ffn": (config.intermediate_size, packed),
            "vocab": (config.vocab_size, 1),
        }
        return cls(mesh=mesh, splits=tuple(_decide(mesh, dim, *sizes) for dim, sizes in dims.items()))

    def check(self, **batches: int) -> None:
        """Raises ValueError, naming it, where an axis would leave devices without work of their own.

        The heads of keys and values and the vocabulary may be too few to be split: they are small, and whole then.

        Args:
            **batches: numbers of windows, by name, that are split over ``data`` and ``fsdp``.
        """
        for split in self.splits:
            if split.reason and split.dim in ("embed", "heads", "ffn"):
                raise ValueError(f"{_described(self.mesh)} does not fit the model: {split.reason}")
        for name, size in batches.items():
            if size % self.batch_shards:
                raise ValueError(
                    f"{_described(self.mesh)} does not fit {name}={size}: no multiple of data x fsdp = "
                    f"{self.batch_shards}"
                )

    @property
    def batch_shards(self) -> int:
        """Parts that a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    def spec(self, path: tuple[str, ...], shape: tuple[int, ...]) -> P:
        """The partition of a parameter, a packed weight, a router or an optimizer moment.

        Args:
            path: names on the way to the array; only those from the linear on matter, so that optimizer states, which
                repeat the parameters' paths below their own, follow the parameters.
            shape: a leading layer axis is recognized by the rank.

        Raises:
            ValueError: the table has no such array.
        """
        if not shape:
            return P()
        dims = _dimensions(path)
        if dims is None or not len(dims) <= len(shape) <= len(dims) + 1:
            raise ValueError(f"sharding has no rule for the array '{'/'.join(path)}' of shape {shape}")
        stacked = (None,) * (len(shape) - len(dims))
        return P(*stacked, *(self._axes(dim) for dim in dims))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every array in a tree of parameters, slices, thresholds or optimizer state."""

        def one(path: Any, leaf: Any) -> NamedSharding:
            return NamedSharding(self.mesh, self.spec(_names(path), tuple(leaf.shape)))

        return jax.tree_util.tree_map_with_path(one, tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes and types of a tree, with the shardings."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def put(self, tree: Any) -> Any:
        """Places a tree of host arrays; each process reads only what its own devices hold."""
        return jax.tree.map(place, tree, self.shardings(tree))

    def put_batch(self, array: Any) -> Array:
        """Places a host array that is split along its first dimension, the batch."""
        return place(array, self.batched(array.shape))

    def put_whole(self, tree: Any) -> Any:
        """Places a tree of host arrays on every device."""
        return jax.tree.map(lambda array: place(array, self.replicated), tree)

    def batched(self, shape: tuple[int, ...], dim: int = 0) -> NamedSharding:
        """The sharding of tokens, streams and whatever else is split along a batch only.

        Args:
            shape: of the array.
            dim: which dimension is the batch.
        """
        spec: list[Any] = [None] * len(shape)
        spec[dim] = _batch_axes(self.mesh, shape[dim])
        return NamedSharding(self.mesh, P(*spec))

    def cache(self, cache: Any) -> Any:
        """The shardings of a `KVCache`: sequences over the batch axes, heads as the key projection has them."""

        def one(leaf: Any) -> NamedSharding:
            if leaf.ndim == 1:
                return self.batched(leaf.shape)
            return NamedSharding(
                self.mesh, P(None, _batch_axes(self.mesh, leaf.shape[1]), None, self._axes("kv_heads"), None)
            )

        return jax.tree.map(one, cache)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device needs whole."""
        return NamedSharding(self.mesh, P())

    def matmul(self, linear: str, matmul: Callable[..., Array]) -> Callable[..., Array]:
        """Runs a kernel ``(x [B, T, in], weight, depth [B, T]) -> y [B, T, out]`` on each device's own shards.

        The compiler cannot split a custom kernel. Every device multiplies its tokens by its part of the weight, and
        partial sums are added where the inputs are split. Parts along ``fsdp`` are gathered first, since that axis
        splits the tokens.

        Args:
            linear: name of the linear, e.g. ``"q_proj"``.
            matmul: the kernel on local arrays.
        """
        rows, columns = self._kernel_axes(linear)

        def local(x: Array, weight: SlicedWeight, depth: Array) -> Array:
            return _sum_over(rows, matmul(x, replace(weight, in_features=x.shape[-1]), depth))

        def apply(x: Float[Array, "B T in"], weight: SlicedWeight, depth: Array) -> Float[Array, "B T out"]:
            batch = _batch_axes(self.mesh, x.shape[0])
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(P(batch, None, rows), P(rows, columns), P(batch, None)),
                out_specs=P(batch, None, columns),
                check_vma=False,  # custom kernels do not say which axes their results vary over
            )(x, weight, depth)

        return apply

    def matmul_gradient(self, linear: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """Runs the backward pass of a `matmul` on each device's own shards, as the forward one runs.

        It is ``(g [B, T, out], x [B, T, in], weight, masks [B, T, M]) -> (to_x [B, T, in], products [B, T, M])``, where
        products are sums over inputs and outputs. Left to the compiler, it is what is summed up to them that devices
        would exchange: an array of the inputs' size for each slice.

        Args:
            linear: name of the linear.
            gradient: the function on local arrays.
        """
        rows, columns = self._kernel_axes(linear)

        def local(g: Array, x: Array, weight: SlicedWeight, masks: Array) -> tuple[Array, Array]:
            to_x, products = gradient(g, x, replace(weight, in_features=x.shape[-1]), masks)
            return _sum_over(columns, to_x), _sum_over((*rows, *columns), products)

        def apply(g: Array, x: Array, weight: SlicedWeight, masks: Array) -> tuple[Array, Array]:
            batch = _batch_axes(self.mesh, x.shape[0])
            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(P(batch, None, columns), P(batch, None, rows), P(rows, columns), P(batch)),
                out_specs=(P(batch, None, rows), P(batch)),
            )(g, x, weight, masks)

        return apply

    def _kernel_axes(self, linear: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes that split a linear's inputs and outputs while it multiplies."""
        rows, columns = (tuple(axis for axis in self._axes(dim) or () if axis != FSDP) for dim in _LINEARS[linear])
        return rows, columns

    def _axes(self, dim: str) -> tuple[str, ...] | None:
        """The axes of a dimension as a `PartitionSpec` takes them."""
        return next((split.axes or None for split in self.splits if split.dim == dim), None)


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """A table's rows of tokens; under ``jax.set_mesh`` the compiler is told what to gather.

    A token's row is needed whole, and on other devices than those that split the table along its width. Of many tokens,
    a device's rows of the table are gathered: looked up first, the rows of all tokens would be put together on every
    device. Of few, as in decoding, that is less than the table.
    """
    mesh = _auto_mesh()
    if mesh is None:
        return jnp.take(table, tokens, axis=0)
    shards = math.prod(mesh.shape[axis] for axis in RULES["vocab"])
    axes = RULES["vocab"] if table.shape[0] % shards == 0 else None
    if mesh.shape[FSDP] > 1 and tokens.size < table.shape[0] // (shards if axes else 1):
        return jax.lax.with_sharding_constraint(jnp.take(table, tokens, axis=0), P())
    return jnp.take(jax.lax.with_sharding_constraint(table, P(axes, None)), tokens, axis=0)


def _auto_mesh() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh``, if the compiler splits over it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types) else mesh


def _described(mesh: Mesh | AbstractMesh) -> str:
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def place(array: Any, sharding: NamedSharding) -> Array:
    """A host array on the devices of a sharding; ``array[index]`` is asked only for the parts this process holds."""
    return jax.make_array_from_callback(tuple(array.shape), sharding, lambda index: np.asarray(array[index]))


def constrain_batch(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Tells the compiler, under ``jax.set_mesh``, that an activation is split along its batch and nothing else.

    Without it the partitioner may split the residual stream along its width, as the parameters are, and re-arrange it
    in every layer.
    """
    mesh = _auto_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(_batch_axes(mesh, x.shape[0]), *[None] * (x.ndim - 1)))


def _sum_over(axes: tuple[str, ...], x: Array) -> Array:
    """The sum of a shard over mesh axes, inside ``jax.shard_map``."""
    return jax.lax.psum(x, axes) if axes else x


def _decide(mesh: Mesh | AbstractMesh, dim: str, size: int, unit: int) -> Split:
    axes = RULES[dim]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    decide = partial(Split, dim=dim, size=size, unit=unit)
    if shards == 1 or size % (shards * unit) == 0:
        return decide(axes=axes)
    return decide(axes=(), reason=f"{dim}: {size} / {unit} whole units do not split over {shards} ({', '.join(axes)})")


def _batch_axes(mesh: Mesh | AbstractMesh, size: int) -> tuple[str, ...] | None:
    """As many of the batch's axes, from the first, as divide this batch."""
    axes = RULES["batch"]
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


def _dimensions(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Logical dimensions of the array at a path, or None where the table has none."""
    linear = next((index for index, name in enumerate(path) if name in _LINEARS), None)
    if linear is None:
        return _OTHER_ARRAYS.get(path[-2:])
    rows, columns = _LINEARS[path[linear]]
    dims = _LINEAR_ARRAYS.get(path[-1])
    return dims and tuple({"in": rows, "out": columns}.get(dim, dim) for dim in dims)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names in a pytree path, without positions in tuples."""
    names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return tuple(name for name in names if isinstance(name, str))
