"""Where models are found: paths and installed packages, which are never imported."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from mobiquant_jax.io import load_dense, resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that fails when imported."""
    folder = tmp_path / "site" / "model_in_a_package"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_a_package_is_found_without_importing_it(package, write_gguf, gguf_metadata, gguf_shapes):
    with pytest.raises(FileNotFoundError, match="holds no .gguf file"):
        resolve("package:model_in_a_package")
    tensors = {name: np.ones(shape, np.float32) for name, shape in gguf_shapes.items()}
    path = write_gguf(package / "weights" / "a.gguf", gguf_metadata, tensors)
    assert resolve("package:model_in_a_package") == resolve("package:model-in-a-package") == path
    config, params, tokenizer = load_dense("package:model_in_a_package")
    assert config.hidden_size == 256 and params["final_norm"]["scale"].shape == (256,) and tokenizer is None
    assert "model_in_a_package" not in sys.modules
    (package / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="several .gguf files"):
        resolve("package:model_in_a_package")


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder", "", "../x"])
def test_no_such_package(name):
    with pytest.raises(FileNotFoundError, match="is installed"):
        resolve(f"package:{name}")


def test_paths(tmp_path, hf_config, hf_tensors):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        resolve(tmp_path / "nowhere")
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    save_file(hf_tensors, tmp_path / "model.safetensors")
    _, params, tokenizer = load_dense(tmp_path)
    np.testing.assert_array_equal(params["final_norm"]["scale"], hf_tensors["model.norm.weight"])
    assert tokenizer is None
