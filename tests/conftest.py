"""Shared fixtures: where the real data lies, the scripts, and eight fake CPU devices for the sharding tests."""

import atexit
import contextlib
import gc
import hashlib
import io
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from absl import flags

_KEPT_SECONDS = 14 * 86400


def compiled_programs() -> Path:
    """The folder of this processor's programs, without old ones; where it cannot be written, one that goes again."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    processor = hashlib.sha256(features.encode()).hexdigest()[:16]  # a program may use all of its features
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "mobiquant_jax" / "tests" / processor
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="jax_cache_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for program in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run may be at it
            if program.stat().st_mtime < time.time() - _KEPT_SECONDS:
                program.unlink()
    return folder


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_gpu_enable_triton_gemm=false"  # scripts set it, and the cache's keys depend on it
# The tests' programs, and those of the scripts they start, run for milliseconds and compile for seconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jax").startswith("0.10."):  # later versions may lack these flags
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # a third of the compilation time on CPUs
    # Splitting programs over threads takes time too, and the other worker has the other cores: about a sixth less.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    # Passes that move work out of loops, for programs that run for long: all others run again after each of them.
    loops = "simplify-while-loops,while-loop-invariant-code-motion,while-loop-constant-sinking"
    os.environ["XLA_FLAGS"] += f" --xla_disable_hlo_passes={loops}"
# XLA's compiler frees what it has just allocated: a sixth of its time with glibc's own settings. For what is started.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=1000")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one process has compiled, pytest's other workers, the scripts that tests start and the next run read.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled_programs())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones come again too
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tracing makes millions of objects that live on; by default Python looks through them all, again and again, for cycles.
gc.set_threshold(20_000, 50, 50)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE.json", help="where a slow test writes what it measured")
    parser.addoption("--seed", type=int, help="of the moments at which a slow test kills; drawn if it is not given")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and models beside the checkout; tests that need it skip only where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def optimized():
    """Full compilation, for a test that computes for long."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def run_script():
    """``(name, *arguments) -> CompletedProcess``: experiments/NAME.py in a process of its own, as a user runs it."""

    def run(name, *arguments, **environment):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, f"experiments/{name}.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def call_file(monkeypatch):
    """``(path, *arguments) -> CompletedProcess``: a script in this process; the flags that it defines are undone."""

    def call(path, *arguments):
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        known = set(flags.FLAGS)
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
                runpy.run_path(path, run_name="__main__")
        finally:
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        return subprocess.CompletedProcess([path, *arguments], stop.value.code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def call_script(call_file, monkeypatch):
    """`run_script` in this process: seconds less, for a case of many."""
    monkeypatch.chdir(ROOT)
    return lambda name, *arguments: call_file(f"experiments/{name}.py", *arguments)


@pytest.fixture(scope="session")
def small_config():
    """A function that makes a config of the size tests can afford; its arguments replace fields."""
    from mobiquant_jax.models import LlamaConfig

    def make(**changes):
        sizes = dict(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
        )
        return LlamaConfig(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def random_elastic(small_config):
    """A function that makes an elastic model with every code, router and threshold drawn at random; uncalibrated."""
    import jax
    import jax.numpy as jnp

    from mobiquant_jax.io.checkpoint import abstract_variables
    from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel

    def make(seed, elastic=None, tokenizer=None, **architecture):
        config = small_config(**architecture)
        elastic = elastic or ElasticConfig(group_size=32, router_hidden_size=8, budget_grid=(2.0, 3.0, 5.0, 8.0))
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            name = jax.tree_util.keystr(path)
            if leaf.dtype == jnp.uint32:
                values = rng.integers(0, 2**32, leaf.shape, np.uint32)
            elif leaf.dtype == jnp.int16:
                values = rng.integers(96, 160, leaf.shape)
            elif leaf.dtype == jnp.bfloat16:
                values = rng.uniform(0.05, 0.15, leaf.shape)
            elif "thresholds" in name:
                values = -np.sort(-rng.normal(size=leaf.shape), axis=-1)  # falling, as a table of thresholds is
            else:
                values = ("norm" in name) + 0.3 * rng.normal(size=leaf.shape)
            return jnp.asarray(values, leaf.dtype)

        variables = jax.tree_util.tree_map_with_path(draw, abstract_variables(config, elastic))
        return ElasticModel(config=config, elastic=elastic, variables=variables, tokenizer=tokenizer)

    return make
