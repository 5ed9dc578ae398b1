"""What the scripts tell XLA before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobiquant_jax.compilation import prefer_library_matmuls

ROOT = Path(__file__).parents[1]
FLAG = "--xla_gpu_enable_triton_gemm"
SCRIPTS = ("calibrate", "baselines", "quality", "tasks", "analyze", "evaluate")


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


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads config files by it
@pytest.mark.parametrize(
    "script, mistake",
    [
        ("calibrate", ["--config=configs/smollm2_135m.py", "--config.calibration.epochs=0"]),
        ("baselines", ["--config=configs/smollm2_135m.py", "--bits=9"]),
        ("quality", []),
        ("tasks", []),
        ("analyze", []),
        ("evaluate", ["--bits=1"]),
    ],
)
def test_scripts_that_train_and_score_say_so(call_script, monkeypatch, script, mistake):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert call_script(script, *mistake).returncode == 2
    assert os.environ["XLA_FLAGS"] == f"{FLAG}=false"


def test_xla_reads_its_flags_after_the_scripts_imports():
    """An unknown flag that is set once all is imported still ends the process: so known ones are read, too."""
    script = f"""
import os, runpy, jax
from absl import flags
for name in {SCRIPTS}:
    known = set(flags.FLAGS)
    runpy.run_path(f"experiments/{{name}}.py")
    for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
os.environ["XLA_FLAGS"] = "--xla_no_flag=1"
jax.devices()
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode != 0 and "Unknown flag in XLA_FLAGS: --xla_no_flag" in ended.stderr
