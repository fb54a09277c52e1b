"""Makes the CPU backend keep freed memory instead of requesting it from the system again in every step.

XLA on CPU allocates the temporaries of a program anew in each run. glibc returns large blocks to the system at once,
so that each step takes a page fault for every 4 KiB: a fifth of the CPU time of a small model's step.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys

# The numbers of these parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def has_accelerator() -> bool:
    """Whether this machine has a GPU or TPU that jax may use, found without starting jax."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(
        glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    )


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for later allocations. Returns True if that worked; does nothing without
    glibc.

    It must be called before jax starts its threads, which would create memory arenas of their own. The process then
    never shrinks: it stays at its peak size.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena for all threads, no blocks outside of it (mmap), and no memory returned to the system.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
