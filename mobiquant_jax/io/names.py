"""The one table between our parameter tree and the tensor names of Hugging Face and GGUF files, used both ways.

A parameter path is written with slashes (``layers/attention/q_proj/kernel``). Files hold linear weights as
``[out, in]`` and one tensor a layer; the tree holds kernels as ``[in, out]`` and stacks the layers along axis 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobiquant_jax.models.config import LlamaConfig

Params = dict[str, Any]
FileFormat = Literal["hf", "gguf"]

# parameter path, Hugging Face name, GGUF name
_TABLE = (
    ("embedder/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("layers/attention_norm/scale", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("layers/attention/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("layers/attention/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("layers/attention/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("layers/attention/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("layers/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("layers/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("layers/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    ("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    ("lm_head/kernel", "lm_head.weight", "output.weight"),
)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a file and its place in the parameter tree.

    Attributes:
        name: the tensor's name in the file.
        path: the leaf of the parameter tree, with slashes.
        layer: index along the leaf's first axis, or None where the leaf is the tensor itself.
        shape: the shape in the file: ``[out, in]`` for a linear.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether the tree holds the transpose of the file's tensor."""
        return self.path.endswith("/kernel")

    def to_tree(self, tensor: np.ndarray) -> np.ndarray:
        """The file's tensor, oriented as in the tree (a view)."""
        return tensor.T if self.transposed else tensor

    def from_tree(self, params: Mapping[str, Any]) -> np.ndarray:
        """The tensor as the file holds it, cut out of a parameter tree (a view where the leaf is in numpy)."""
        leaf = get_leaf(params, self.path)
        tensor = np.asarray(leaf if self.layer is None else leaf[self.layer])
        return tensor.T if self.transposed else tensor


def tensor_specs(config: LlamaConfig, file_format: FileFormat) -> dict[str, TensorSpec]:
    """Lists every tensor that a file of this model holds, in the order of execution.

    Args:
        config: the model; with a tied head there is no head tensor.
        file_format: whose names to use, ``"hf"`` or ``"gguf"``.

    Returns:
        Tensor name -> spec.
    """
    rows = {path: (hf if file_format == "hf" else gguf) for path, hf, gguf in _TABLE}
    if config.tie_word_embeddings:
        del rows["lm_head/kernel"]
    stacked = [path for path in rows if path.startswith("layers/")]
    after = [path for path in rows if path not in stacked and path != "embedder/embedding"]
    places: list[tuple[str, int | None]] = [("embedder/embedding", None)]
    places += [(path, layer) for layer in range(config.num_hidden_layers) for path in stacked]
    places += [(path, None) for path in after]
    specs = {}
    for path, layer in places:
        name = rows[path].format(layer)
        specs[name] = TensorSpec(name=name, path=path, layer=layer, shape=_file_shape(config, path))
    return specs


def _file_shape(config: LlamaConfig, path: str) -> tuple[int, ...]:
    """Shape of one tensor in a file."""
    if path.endswith("/scale"):
        return (config.hidden_size,)
    if path in ("embedder/embedding", "lm_head/kernel"):
        return (config.vocab_size, config.hidden_size)
    features_in, features_out = config.linear_shapes()[path.removeprefix("layers/").removesuffix("/kernel")]
    return (features_out, features_in)


def get_leaf(params: Mapping[str, Any], path: str) -> Any:
    """The leaf at a slash-separated path; a ValueError names the path where there is none."""
    node: Any = params
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"the parameter tree has no leaf '{path}'")
        node = node[key]
    return node


def check_tensors(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compares the tensors of a file with those that the model needs.

    Args:
        specs: what the model needs, from :func:`tensor_specs`.
        shapes: tensor name -> shape of everything in the file, less what is known to be ignorable.
        where: the file or folder, for the message.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; the message names the first such tensor.
    """
    if missing := [name for name in specs if name not in shapes]:
        raise ValueError(f"{where}: missing tensor '{missing[0]}'{_and_more(missing)}")
    if unexpected := [name for name in shapes if name not in specs]:
        raise ValueError(f"{where}: unexpected tensor '{unexpected[0]}'{_and_more(unexpected)} in a LLaMA model")
    for name, spec in specs.items():
        if shapes[name] != spec.shape:
            raise ValueError(f"{where}: tensor '{name}' has shape {shapes[name]}, its config needs {spec.shape}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
