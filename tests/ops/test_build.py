"""Building the CUDA kernels: compiled wherever there is a compiler, which needs no GPU."""

import pytest

from mobiquant_jax.ops.sliced_matmul import build


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBIQUANT_JAX_CACHE", str(tmp_path))


@pytest.mark.parametrize("groups", [1, 4])
def test_builds_once(groups, tmp_path):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    library = build.build(groups)
    assert library.parent == tmp_path and [library] == list(tmp_path.iterdir())
    written = library.stat().st_mtime_ns
    assert build.build(groups) == library and library.stat().st_mtime_ns == written


def test_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(NotImplementedError, match="no nvcc"):
        build.build(1)
    assert not any(tmp_path.iterdir())


def test_a_failed_build_gives_the_compilers_word_and_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'ffi.cu(1): error: no such thing' >&2\nexit 2\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(compiler))
    with pytest.raises(NotImplementedError, match="no such thing"):
        build.build(1)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
