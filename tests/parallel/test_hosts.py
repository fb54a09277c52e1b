"""One process and several see the same batches; the environment decides how many there are."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout

ROOT = pathlib.Path(__file__).parents[2]
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 4, 1)]
SHAPE = (16, 24)

WORKER = """
import sys, warnings
warnings.simplefilter("error")
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from llmjax.parallel import hosts
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import Layout
from jax.sharding import PartitionSpec
hosts.initialize()
assert jax.process_count() == 2 and len(jax.devices()) == 8
shape = SHAPE
for axes in MESHES:
    layout = Layout(make_mesh(MeshConfig(*axes, "auto", 0, "auto")))
    sharding = layout.sharding("batch", "length")
    rows = hosts.local_batch_rows(sharding, shape[0])
    local = rows[:, None] * 1000 + np.arange(shape[1])[None, :]  # each process makes its own rows only
    x = hosts.make_global(sharding, shape, rows, local.astype(np.int32))
    assert x.shape == shape and x.sharding == sharding
    stacked = np.stack([local, local + 1]).astype(np.int32)  # of two micro-batches
    lead = layout.sharding(None, "batch", "length")
    stacked = hosts.make_global(lead, (2, *shape), rows, stacked, axis=1)
    stacked = np.asarray(jax.device_get(jax.jit(lambda x: x, out_shardings=layout.sharding())(stacked)))
    one_dimensional = hosts.make_global(layout.sharding("batch"), shape[:1], rows, rows.astype(np.int32))
    both = jax.jit(lambda x, y: (x, y), out_shardings=layout.sharding())(x, one_dimensional)
    whole, index = [np.asarray(jax.device_get(part)) for part in both]
    expected = np.arange(shape[0])[:, None] * 1000 + np.arange(shape[1])[None, :]
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(stacked, [expected, expected + 1])
    np.testing.assert_array_equal(index, np.arange(shape[0]))
    print(axes, len(rows), flush=True)
assert not hosts.any_process(False)
assert hosts.any_process(jax.process_index() == 1) and hosts.any_process(hosts.is_primary())
print("primary" if hosts.is_primary() else "secondary")
"""


@pytest.fixture
def no_cluster(monkeypatch):
    for name in (
        *hosts.EXPLICIT,
        hosts.TIMEOUT,
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_NUM_TASKS",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((*args, kwargs)))
    return calls


def test_one_process_needs_every_row_and_gets_the_array_it_put_in():
    for axes in MESHES:
        sharding = Layout(make_mesh(mesh_section(*axes))).sharding("batch", "length")
        rows = hosts.local_batch_rows(sharding, SHAPE[0])
        np.testing.assert_array_equal(rows, np.arange(SHAPE[0]))
        array = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)
        x = hosts.make_global(sharding, SHAPE, rows, array)
        assert x.sharding == sharding
        np.testing.assert_array_equal(np.asarray(x), array)


def test_a_batch_that_does_not_divide_is_refused():
    sharding = Layout(make_mesh(mesh_section(4, 2, 1, 1))).sharding("batch", "length")
    with pytest.raises(UserError, match=r"batch of 12 sequences .* data=4 x fsdp=2 "):
        hosts.local_batch_rows(sharding, 12)


def test_rows_that_do_not_fit_the_array_are_refused():
    sharding = jax.sharding.NamedSharding(make_mesh(mesh_section()), PartitionSpec("data"))
    with pytest.raises(ValueError, match="has shape"):
        hosts.make_global(sharding, (16, 4), np.arange(16), np.zeros((8, 4)))


def test_alone_there_is_no_vote_and_nothing_to_join(no_cluster):
    hosts.initialize()
    assert no_cluster == [] and hosts.is_primary()
    assert hosts.any_process(True) is True and hosts.any_process(False) is False


def test_explicit_variables_start_the_processes_they_name(no_cluster, monkeypatch):
    for name, value in zip(hosts.EXPLICIT, ("localhost:1", "2", "1")):
        monkeypatch.setenv(name, value)
    hosts.initialize()
    assert no_cluster == [("localhost:1", 2, 1, {"initialization_timeout": 120})]
    monkeypatch.setenv("LLMJAX_COORDINATOR", "[::1]:65535")
    monkeypatch.setenv("LLMJAX_TIMEOUT", "7")
    hosts.initialize()
    assert no_cluster[1:] == [("[::1]:65535", 2, 1, {"initialization_timeout": 67})]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("localhost:1", "2", ""), "LLMJAX_PROCESS_ID is not set; several processes need all of"),
        (("localhost:1", "two", "0"), "LLMJAX_NUM_PROCESSES='two' is not a number"),
        (("localhost:1", "2", "2"), "LLMJAX_PROCESS_ID=2 is not below LLMJAX_NUM_PROCESSES=2"),
        (("localhost:1", "0", "0"), "LLMJAX_PROCESS_ID=0 is not below LLMJAX_NUM_PROCESSES=0"),
        (("localhost:1", "2", "-1"), "LLMJAX_PROCESS_ID='-1' is not a number"),
        *[
            (
                (address, "2", "1"),
                f"LLMJAX_COORDINATOR={re.escape(repr(address))} is not host:port of process 0",
            )
            for address in (
                "localhost",
                ":1",
                "localhost:",
                "localhost:0",
                "localhost:65536",
                "localhost:http",
                "::1:1234",
                "[::1]",
                "http://localhost:1",
                "a b:1",
            )
        ],
    ],
)
def test_contradicting_variables_are_refused(no_cluster, monkeypatch, values, message):
    for name, value in zip(hosts.EXPLICIT, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.initialize()


def test_a_cluster_is_joined_only_where_it_has_several_processes(no_cluster, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    hosts.initialize()
    assert no_cluster == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    hosts.initialize()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    hosts.initialize()
    assert no_cluster == [({"initialization_timeout": 360},)] * 2
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "two")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS='two' is not a number"):
        hosts.initialize()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "1e9"])
def test_a_time_to_wait_that_is_none_is_refused(no_cluster, monkeypatch, seconds):
    for name, value in zip((*hosts.EXPLICIT, hosts.TIMEOUT), ("localhost:1", "2", "1", seconds)):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"LLMJAX_TIMEOUT='{seconds}' is not a number of seconds"):
        hosts.initialize()


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("1", "LLMJAX_COORDINATOR='localhost:{port}' has not answered for 1 s; start process 0 there"),
        (
            "0",
            "LLMJAX_NUM_PROCESSES=2, but not all of them had joined at localhost:{port} after 1 s; start each",
        ),
    ],
)
def test_processes_that_do_not_come_are_missed_in_one_sentence(index, sentence):
    port = free_port()
    worker = start_worker(
        "from llmjax.parallel import hosts; hosts.initialize()", port, index, LLMJAX_TIMEOUT="1"
    )
    out = worker.communicate(timeout=60)[0]
    assert worker.returncode == 2 and out.count("\n") == 1, out
    assert out.startswith("llmjax: " + sentence.format(port=port)) and "LLMJAX_TIMEOUT=SECONDS" in out


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_worker(source, port, index, **environment):
    """Process `index` of two."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"LLMJAX_COORDINATOR": f"localhost:{port}", "LLMJAX_NUM_PROCESSES": "2"}
    env |= {"LLMJAX_PROCESS_ID": str(index), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", source], env=env, **pipes)


@pytest.mark.slow
def test_two_processes_assemble_the_batch_of_one():
    source = WORKER.replace("MESHES", repr(MESHES)).replace("SHAPE", repr(SHAPE))
    port = free_port()
    workers = [start_worker(source, port, index) for index in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert outputs[0].splitlines()[-1] == "primary" and outputs[1].splitlines()[-1] == "secondary"
    assert "(8, 1, 1, 1) 8" in outputs[0]  # half of the rows each, where the batch is split
    assert "(1, 1, 8, 1) 16" in outputs[1]  # all of them, where only the positions are
