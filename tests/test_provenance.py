"""Provenance is JSON, and fingerprints tell apart what must be told apart."""

import importlib.metadata
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import provenance as module
from mobiquant_jax.provenance import fingerprint, peak_memory, provenance, short_commit


def tree(**changes):
    rng = np.random.default_rng(5)
    return {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": {"c": np.arange(9000)}} | changes


def test_fingerprint_is_of_the_content():
    assert fingerprint(tree()) == fingerprint(tree())
    assert fingerprint(tree()) == fingerprint(tree(a=jnp.asarray(tree()["a"])))  # on the device or not
    assert len(fingerprint(tree())) == 64


@pytest.mark.parametrize(
    "other",
    [
        tree(a=tree()["a"] + np.float32(1e-6)),
        tree(a=tree()["a"].reshape(4, 3)),
        tree(a=tree()["a"].view(np.int32)),
        tree(b={"d": np.arange(9000)}),
        tree(b={"c": np.arange(9000)[::-1]}),
        tree(e=np.zeros(0)),
    ],
)
def test_fingerprint_tells_apart(other):
    assert fingerprint(other) != fingerprint(tree())


def test_provenance_is_json_and_true(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/x.py", "--a=b c"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    found = provenance()
    assert found["xla_flags"] == "--xla_dump_to=x"
    assert json.loads(json.dumps(found)) == found
    assert found["command"].endswith("experiments/x.py '--a=b c'")
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["python"] == sys.version.split()[0]
    assert found["device_count"] >= 1 and found["devices"] == ["cpu"]


@pytest.mark.parametrize(
    ("answers", "commit"),
    [({"rev-parse": "abc\n", "status": ""}, "abc"), ({"rev-parse": "abc", "status": " M x"}, "abc+dirty")],
)
def test_commit_says_whether_the_checkout_is_changed(monkeypatch, answers, commit):
    def git(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=next(v for k, v in answers.items() if k in command))

    monkeypatch.setattr(subprocess, "run", git)
    assert module.provenance()["commit"] == commit


def test_outside_of_git_there_is_no_commit(monkeypatch):
    def git(command, **_):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(subprocess, "run", git)
    assert module.provenance()["commit"] is None


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-package-here",))
    assert module.provenance()["versions"] == {"no-such-package-here": None}


@pytest.mark.parametrize(
    ("commit", "shown"),
    [(None, "no commit"), ("0123456789", "0123456"), ("0123456789+dirty", "0123456+dirty")],
)
def test_a_shortened_commit_still_says_that_it_was_changed(commit, shown):
    assert short_commit(commit) == shown


def test_peak_memory_is_of_this_process_and_does_not_fall():
    """In a process of its own, started by one that holds more."""
    code = """
import numpy as np
from mobiquant_jax.provenance import peak_host_bytes
start = peak_host_bytes()
ballast = np.ones(200_000_000, np.uint8)
held = peak_host_bytes()
del ballast
print(start, held, peak_host_bytes())
"""
    ballast = np.ones(600_000_000, np.uint8)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del ballast
    start, held, left = map(int, found.stdout.split())
    assert 20e6 < start < 600e6 and 190e6 < held - start < 250e6 and left > held - 1e6


def test_peak_device_memory_is_the_fullest_devices(monkeypatch):
    assert peak_memory()["peak_device_gb"] is None  # CPUs do not say

    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": peak}) for peak in (2_000_000_000, 3_141_592_653)]
    monkeypatch.setattr(module.jax, "local_devices", lambda: [*devices, Device(None)])
    assert peak_memory()["peak_device_gb"] == 3.142
