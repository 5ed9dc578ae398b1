"""Building the CUDA kernels: compiled wherever there is a compiler, which needs no GPU."""

import pytest

from mobiquant_jax.ops import compiler, decode_attention, decode_layers
from mobiquant_jax.ops.sliced_matmul import gpu

LIBRARIES = [
    (gpu.SOURCE, ("MOBIQUANT_GROUPS=1",)),
    (gpu.SOURCE, ("MOBIQUANT_GROUPS=4",)),
    (decode_attention.SOURCE, ()),
    (decode_layers.SOURCE, ("MOBIQUANT_GROUPS=2",)),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBIQUANT_JAX_CACHE", str(tmp_path))


@pytest.mark.parametrize(("source", "definitions"), LIBRARIES, ids=["1", "4", "attention", "layers"])
def test_builds_once(source, definitions, tmp_path):
    if compiler.find_nvcc() is None:
        pytest.skip("no nvcc")
    library = compiler.compile_library(source, definitions)
    assert library.parent == tmp_path and [library] == list(tmp_path.iterdir())
    written = library.stat().st_mtime_ns
    assert compiler.compile_library(source, definitions) == library and library.stat().st_mtime_ns == written


def test_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    with pytest.raises(NotImplementedError, match="no nvcc"):
        compiler.compile_library(*LIBRARIES[0])
    assert not any(tmp_path.iterdir())


def test_a_failed_build_gives_the_compilers_word_and_leaves_nothing(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    runs = tmp_path / "runs"
    nvcc.write_text(f"#!/bin/sh\necho run >> {runs}\necho 'kernel.cu(1): error: no such thing' >&2\nexit 2\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(compiler, "find_nvcc", lambda: str(nvcc))
    for _ in range(2):  # every trace of a model asks again
        with pytest.raises(NotImplementedError, match="no such thing"):
            compiler.compile_library(*LIBRARIES[0])
    assert runs.read_text() == "run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "runs"]
