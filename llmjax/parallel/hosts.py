"""Several processes that work as one: how they start, which one writes output, and which rows of a batch each
provides.

Each process feeds its own devices, so it makes only those rows of the global batch that its devices need. The
sharding alone determines these rows, so training sees the same packed sequences for any number of processes. A row
that several processes need (because its positions are split over them, or it is replicated) is made by each of them.
Only this file uses `jax.distributed`.
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

# The environment variables that start several processes by hand.
EXPLICIT = ("LLMJAX_COORDINATOR", "LLMJAX_NUM_PROCESSES", "LLMJAX_PROCESS_ID")
# The environment variable with the seconds that processes wait for each other at the start.
TIMEOUT = "LLMJAX_TIMEOUT"
# The default number of seconds: processes started by hand, and processes of a cluster, whose machines may come up
# minutes apart. Both are choices.
EXPLICIT_SECONDS, CLUSTER_SECONDS = 60, 300
# When jax's own timeout expires, it ends the process without a clear message. It gets this many seconds more than our
# timeout, so that ours is first.
GRACE_SECONDS = 60


def initialize() -> None:
    """Joins the other processes if the environment describes any. It must be called before jax uses a device.

    It looks for, in this order: LLMJAX_COORDINATOR (host:port of process 0) with LLMJAX_NUM_PROCESSES and
    LLMJAX_PROCESS_ID; a SLURM step with several tasks; a TPU host. Otherwise the process is alone and nothing
    happens. Raises UserError if the LLMJAX_ variables are incomplete, malformed or contradictory. If the others do
    not join within LLMJAX_TIMEOUT seconds, the process prints one sentence and exits with code 2.
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
        # The metadata of a TPU machine says how many hosts there are. A single host may have none, which raises
        # ValueError.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize()


def _explicit() -> tuple[str, int, int]:
    """(address of process 0, number of processes, index of this process) from the environment."""
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
    """The seconds to wait, from the environment or `default`."""
    text = os.environ.get(TIMEOUT) or str(default)
    if not text.isdecimal() or not 0 < int(text) <= 86400:
        raise UserError(f"{TIMEOUT}={text!r} is not a number of seconds from 1 to 86400; give for example 60")
    return int(text)


@contextlib.contextmanager
def _patience(seconds: int, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends the process with `sentence()` and exit code 2 if the block takes longer than `seconds`."""

    def give_up() -> None:
        complain(f"{sentence()}; {TIMEOUT}=SECONDS waits longer")
        os._exit(2)

    # The block waits in C++, where no exception can reach it, so another thread ends the process.
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _who_is_missing(address: str, count: int, index: int, seconds: int) -> str:
    """A sentence that says why process `index` is still waiting."""
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
    """Whether a server accepts connections at `address`."""
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
    """Whether this is the process that writes logs and prints output."""
    return jax.process_index() == 0


def start_vote(flag: bool) -> jax.Array | bool:
    """Whether `flag` is true on any process, as a value on which `bool()` waits.

    It is dispatched like any other computation, so it costs no waiting until it is read. All processes must call it,
    in the same order relative to their other computations.
    """
    if jax.process_count() == 1:
        return flag
    # One flag per device, reduced by `any` to a scalar that every process can read.
    mesh = _all_devices()
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    flags = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.array([flag]))
    return _any(mesh)(flags)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. Waits for all processes."""
    return bool(start_vote(flag))


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


@functools.cache
def _any(mesh: Mesh):
    return jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_batch_rows(sharding: Sharding, global_batch: int) -> np.ndarray:
    """The sorted indices (int64) of the rows of a [global_batch, T] array that this process must provide.

    Raises UserError if the batch does not divide over the devices that share it.
    """
    # Any T will do that every mesh axis divides.
    shape = (global_batch, len(sharding.device_set))
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
    """The global array of shape `global_shape`, of which this process provides `local_rows` along `axis`.

    `local_rows` comes from `local_batch_rows`, for a sharding that splits its first dimension as `axis` is split
    here. `local_array` holds these rows. It must not be modified later: on the CPU the device array may share its
    memory.
    """
    expected = (*global_shape[:axis], len(local_rows), *global_shape[axis + 1 :])
    if local_array.shape != expected:
        raise ValueError(f"local_array has shape {local_array.shape}, but these rows have shape {expected}")
    if jax.process_count() == 1:
        return jax.device_put(local_array, sharding)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        # jax asks only for devices that hold a part of the array.
        assert index is not None
        # jax asks for global rows; they are found by their rank among the local rows, which are sorted.
        rows = np.arange(global_shape[axis])[index[axis]]
        mine = np.take(local_array, np.searchsorted(local_rows, rows), axis)
        return mine[(*index[:axis], slice(None), *index[axis + 1 :])]

    return jax.make_array_from_callback(global_shape, sharding, shard)
