"""Several processes that work as one computer: how they start, which one speaks, which rows of a batch each has.

Each process feeds its own devices, so it makes only the rows of the global batch that they need. Which rows
those are follows from the sharding alone: the same packed sequences are trained on however many processes
share the work. A row that several processes need (its positions are split over them, or it is replicated)
is made by each of them. This file alone knows `jax.distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from llmjax.errors import UserError
from llmjax.escapes import complain

EXPLICIT = ("LLMJAX_COORDINATOR", "LLMJAX_NUM_PROCESSES", "LLMJAX_PROCESS_ID")
TIMEOUT = "LLMJAX_TIMEOUT"
# Seconds that processes wait for each other at the start: those that a person starts, and those of a cluster,
# whose machines may come up minutes apart.
EXPLICIT_SECONDS, CLUSTER_SECONDS = 60, 300
# jax ends the whole process when its own time is over, without a sentence; so it gets this much more than we wait.
GRACE_SECONDS = 60


def initialize() -> None:
    """Joins the other processes, where the environment says that there are any; before jax touches a device.

    In this order: LLMJAX_COORDINATOR (host:port of process 0) with LLMJAX_NUM_PROCESSES and
    LLMJAX_PROCESS_ID; a SLURM step of several tasks; a TPU host. Anything else is one process, and nothing
    happens. Raises UserError where the LLMJAX_ variables are incomplete, malformed or contradict each other. Where
    the others do not come within LLMJAX_TIMEOUT seconds, the process ends with one sentence and exit code 2.
    """
    if jax.distributed.is_initialized():
        return
    if any(name in os.environ for name in EXPLICIT):
        address, count, index = _explicit()
        if count > 1:
            seconds = _timeout(EXPLICIT_SECONDS)
            with _patience(seconds, lambda: _who_is_missing(address, count, index, seconds)):
                jax.distributed.initialize(
                    address, count, index, initialization_timeout=seconds + GRACE_SECONDS
                )
    elif _is_slurm_step() or _is_tpu_pod():
        seconds = _timeout(CLUSTER_SECONDS)
        missing = f"not all processes of this cluster had joined after {seconds} s; start every one of them"
        with _patience(seconds, lambda: missing):
            jax.distributed.initialize(initialization_timeout=seconds + GRACE_SECONDS)
    elif _has_tpu():
        # The metadata of a TPU machine says how many hosts there are; a single one need not have any.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize()


def _explicit() -> tuple[str, int, int]:
    missing = [name for name in EXPLICIT if not os.environ.get(name)]
    if missing:
        raise UserError(f"{missing[0]} is not set; several processes need all of {', '.join(EXPLICIT)}")
    address = os.environ[EXPLICIT[0]]
    match = re.fullmatch(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(
            f"LLMJAX_COORDINATOR={address!r} is not host:port of process 0; give for example localhost:1234, or "
            "[::1]:1234 for an IPv6 address"
        )
    numbers = []
    for name in EXPLICIT[1:]:
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]!r} is not a number; give a whole number from 0")
        numbers.append(int(os.environ[name]))
    count, index = numbers
    if not index < count:
        raise UserError(f"LLMJAX_PROCESS_ID={index} is not below LLMJAX_NUM_PROCESSES={count}; count from 0")
    return address, count, index


def _timeout(default: int) -> int:
    text = os.environ.get(TIMEOUT) or str(default)
    if not text.isdecimal() or not 0 < int(text) <= 86400:
        raise UserError(f"{TIMEOUT}={text!r} is not a number of seconds from 1 to 86400; give for example 60")
    return int(text)


@contextlib.contextmanager
def _patience(seconds: int, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends the process with `sentence()` and exit code 2 if the block takes longer than `seconds`.

    The block waits in C++, where no exception can reach it.
    """

    def give_up() -> None:
        complain(f"{sentence()}; {TIMEOUT}=SECONDS waits longer")
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _who_is_missing(address: str, count: int, index: int, seconds: int) -> str:
    """Why process `index` is still alone, in words."""
    if index and not _answers(address):
        return (
            f"LLMJAX_COORDINATOR={address!r} has not answered for {seconds} s; start process 0 there, or give "
            "the host:port at which it listens"
        )
    return (
        f"LLMJAX_NUM_PROCESSES={count}, but not all of them had joined at {address} after {seconds} s; start each "
        f"LLMJAX_PROCESS_ID from 0 to {count - 1} once"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def _is_slurm_step() -> bool:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_NODELIST" in os.environ and not tasks.isdecimal():
        raise UserError(f"SLURM_STEP_NUM_TASKS={tasks!r} is not a number; start the processes with srun")
    return "SLURM_STEP_NODELIST" in os.environ and int(tasks) > 1


def _is_tpu_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def _has_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in platforms and bool(devices) and importlib.util.find_spec("libtpu") is not None


def is_primary() -> bool:
    """Whether this process is the one that writes logs and speaks to the user."""
    return jax.process_index() == 0


def start_vote(flag: bool) -> jax.Array | bool:
    """Whether any process says True, as a value that `bool()` waits for.

    It is dispatched like any other computation, so that asking costs no wait until the answer is read. All
    processes must call it, in the same order among their other computations.
    """
    if jax.process_count() == 1:
        return flag
    mesh = _all_devices()
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    flags = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.array([flag]))
    return _any(mesh)(flags)


def any_process(flag: bool) -> bool:
    """Whether any process says True; waits for all of them."""
    return bool(start_vote(flag))


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


@functools.cache
def _any(mesh: Mesh):
    return jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_batch_rows(sharding: Sharding, global_batch: int) -> np.ndarray:
    """Which rows of a `[global_batch, T]` array this process must make, sorted, int64.

    Raises UserError where the batch does not divide over the devices that share it.
    """
    shape = (global_batch, len(sharding.device_set))  # any T that every mesh axis divides
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise UserError(
            f"a batch of {global_batch} sequences does not divide over the mesh {_describe(sharding)}; "
            "make it a multiple of data x fsdp"
        ) from error
    rows = [np.arange(global_batch)[index[0]] for index in indices if index is not None]
    return np.unique(np.concatenate(rows)).astype(np.int64)


def _describe(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        return " x ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
    return str(sharding)


def make_global(
    sharding: Sharding,
    global_shape: tuple[int, ...],
    local_rows: np.ndarray,
    local_array: np.ndarray,
    axis: int = 0,
) -> jax.Array:
    """The global array of shape `global_shape` of which this process holds `local_rows` along `axis`.

    `local_rows` is what `local_batch_rows` gave for a sharding whose first dimension is cut as `axis` is here.
    `local_array` holds those rows and must not be written to afterwards: on the CPU the device array may
    share its memory.
    """
    expected = (*global_shape[:axis], len(local_rows), *global_shape[axis + 1 :])
    if local_array.shape != expected:
        raise ValueError(f"local_array has shape {local_array.shape}, but these rows have shape {expected}")
    if jax.process_count() == 1:
        return jax.device_put(local_array, sharding)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only those devices are asked for that hold a part
        rows = np.arange(global_shape[axis])[index[axis]]
        mine = np.take(local_array, np.searchsorted(local_rows, rows), axis)
        return mine[(*index[:axis], slice(None), *index[axis + 1 :])]

    return jax.make_array_from_callback(global_shape, sharding, shard)
