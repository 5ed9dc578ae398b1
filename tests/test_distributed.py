"""Processes that meet, that miss each other and that fail: two real ones, four CPU devices each."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobiquant_jax.distributed import job_arguments

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from mobiquant_jax import distributed
distributed.{constant}
distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import jax, jax.numpy as jnp, numpy as np
{body}
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(process, port, body, constant="__name__"):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    code = SCRIPT.format(port=port, body=body, constant=constant)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(process)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_both(body):
    port = free_port()
    both = [start(process, port, body) for process in (0, 1)]
    return [
        (_said(out), err, process.returncode) for process in both for out, err in [process.communicate(timeout=120)]
    ]


def _said(out):
    """What Python printed between the marks; the CPU's collectives print lines of their own, in pieces, around it."""
    return "".join(re.findall("<said>(.*?)</said>", out))


def test_two_processes_share_devices_and_one_of_them_speaks(tmp_path):
    from_both = run_both(f"""
from mobiquant_jax.distributed import barrier, fetch, from_main, is_main, partial_name
from mobiquant_jax.sharding import make_mesh
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
mesh = make_mesh(data=2, fsdp=2, model=2)
split = jax.make_array_from_callback((8,), NamedSharding(mesh, P(("data", "fsdp"))), lambda i: np.arange(8.0)[i])
total = jax.jit(jnp.sum)(split)
print(f"<said>{{jax.device_count()}} {{jax.local_device_count()}} {{float(total)}} {{fetch(split).tolist()}}</said>")
path = partial_name(Path("{tmp_path}/x"))
path.with_name(path.name + f"-{{jax.process_index()}}").touch()
assert from_main(jax.process_index() + 7) == 7 and is_main() == (jax.process_index() == 0)
barrier("end")
""")
    assert [code for *_, code in from_both] == [0, 0], from_both
    assert from_both[0][0] == f"8 4 28.0 {[float(i) for i in range(8)]}"
    assert from_both[1][0] == ""
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert first[:-1] == second[:-1]


def test_what_fails_in_process_0_fails_in_all():
    body = """
from mobiquant_jax.distributed import on_main
def full():
    raise OSError("no space left")
try:
    on_main("saving", full)
except OSError as error:
    sys.stderr.write(f"{jax.process_index()}: {error}")
    sys.exit(4)
"""
    (_, first, code), (_, second, other) = run_both(body)
    assert (code, other) == (4, 4)
    assert "0: no space left" in first and "1: saving failed in process 0, which says why" in second


@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_process_is_one_line_and_no_hang(process):
    begin = time.monotonic()
    alone = start(process, port := free_port(), "", constant="CONNECT_SECONDS = 3")
    out, err = alone.communicate(timeout=60)
    assert (out, err) == ("", f"error: not all of 2 processes met at localhost:{port} within 3 s\n")
    assert alone.returncode == 2 and time.monotonic() - begin < 60


def test_a_process_that_dies_ends_the_others():
    port = free_port()
    body = """
from mobiquant_jax.distributed import barrier
if jax.process_index() == 1:
    import os
    os._exit(9)
barrier("never")
"""
    both = [start(process, port, body, constant="HEARTBEAT_SECONDS = 5") for process in (0, 1)]
    begin = time.monotonic()
    _, err = both[0].communicate(timeout=60)
    both[1].communicate(timeout=10)
    assert both[0].returncode != 0 and both[1].returncode == 9 and time.monotonic() - begin < 60
    assert "another task died" in err or "Gloo" in err or "gloo" in err


def test_a_process_that_dies_in_the_middle_is_one_line_in_the_others():
    """It dies while the other waits in a collective; before, only the runtime notices, when its heartbeats stop."""
    port = free_port()
    body = """
from mobiquant_jax.distributed import barrier
barrier("met")
if jax.process_index() == 1:
    import os, time
    time.sleep(3)
    os._exit(9)
barrier("never")
"""
    both = [start(process, port, body) for process in (0, 1)]
    begin = time.monotonic()
    (_, err), _ = [process.communicate(timeout=60) for process in both]
    assert (both[0].returncode, both[1].returncode) == (3, 9) and time.monotonic() - begin < 60
    assert (
        re.findall("^error: a computation failed, or another process is gone: .*$", err, re.M)
        and "Traceback" not in err
    )


def test_a_process_that_fails_alone_ends_the_others():
    """It leaves in good order, while the others wait for it in a collective."""
    port = free_port()
    body = """
from mobiquant_jax.distributed import barrier
barrier("met")
if jax.process_index() == 1:
    sys.exit("error: unreadable shard")
barrier("never")
"""
    both = [start(process, port, body, constant="HEARTBEAT_SECONDS = 5") for process in (0, 1)]
    begin = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert all(process.returncode != 0 for process in both) and time.monotonic() - begin < 60
    assert "error: unreadable shard" in errors[1]


def test_where_the_processes_are_known_from():
    explicit = dict(coordinator="host:1", processes=4, process=3)
    wanted = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert job_arguments(**explicit, environ={}) == wanted
    indexed = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert job_arguments(**explicit | {"process": None}, environ=indexed) == wanted
    nothing = dict(coordinator=None, processes=None, process=None)
    assert job_arguments(**nothing, environ=indexed) == {"cluster_detection_method": "k8s"}
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert job_arguments(**nothing, environ=slurm) == {"cluster_detection_method": "slurm"}
    assert job_arguments(**explicit | {"process": None, "processes": 2}, environ=slurm) == wanted | {
        "num_processes": 2,
        "process_id": 1,
    }
    assert job_arguments(**nothing, environ={"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    for alone in ({}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"TPU_WORKER_HOSTNAMES": "localhost"}):
        assert job_arguments(**nothing, environ=alone) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinator": None}, "--coordinator is missing beside --processes, --process"),
        ({"process": None}, "--process is missing beside --coordinator, --processes"),
        ({"process": 4}, r"--process=4 is outside 0\.\.3"),
        ({"coordinator": "host"}, "--coordinator='host' is not HOST:PORT"),
    ],
)
def test_numbers_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        job_arguments(**dict(coordinator="host:1", processes=4, process=3) | change, environ={})
