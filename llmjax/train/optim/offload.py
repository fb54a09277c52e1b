"""Keeps the optimizer's state in the memory of the hosts between updates (compute.offload_optimizer).

The state of AdamW is twice as large as the parameters, and only the end of an update reads it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

# The name that jax gives to memory of a host that a device can read and write by itself.
HOST = "pinned_host"


def is_offloaded(leaf: Any) -> bool:
    """Whether this array of an optimizer's state is kept in the host's memory: all but scalars and whole numbers."""
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def on_host(sharding: NamedSharding) -> NamedSharding:
    """`sharding`, but in the memory of each device's host."""
    return sharding.with_memory_kind(HOST)


def to_device(state: Any) -> Any:
    """`state` in the devices' memory."""
    return _moved(state, jax.memory.Space.Device)


def to_host(state: Any) -> Any:
    """`state` in the memory of their hosts."""
    return _moved(state, jax.memory.Space.Host)


def _moved(state: Any, space: Any) -> Any:
    """`state` with the arrays of `is_offloaded` in `space`, one of `jax.memory.Space`."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if is_offloaded(x) else x, state)
