"""What the scripts tell XLA before JAX starts."""

import os
import subprocess
import sys

import pytest

from mobiquant_jax.compilation import prefer_library_matmuls

FLAG = "--xla_gpu_enable_triton_gemm"


@pytest.mark.parametrize(
    "before, after",
    [
        (None, f"{FLAG}=false"),
        ("--xla_force_host_platform_device_count=8", f"--xla_force_host_platform_device_count=8 {FLAG}=false"),
        (f"{FLAG}=true", f"{FLAG}=true"),
    ],
)
def test_library_matmuls_are_preferred_unless_the_user_chose(before, after, monkeypatch):
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    for _ in range(2):
        prefer_library_matmuls()
        assert os.environ["XLA_FLAGS"] == after


def test_xla_reads_its_flags_after_the_imports():
    """An unknown flag that is set once all is imported still ends the process: so known ones are read, too."""
    script = "import os, jax, mobiquant_jax.experiment; os.environ['XLA_FLAGS'] = '--xla_no_flag=1'; jax.devices()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode != 0 and "xla_no_flag" in ended.stderr
