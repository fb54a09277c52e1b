"""Makes the CPU backend keep the memory that it frees and asks for again in every step.

XLA on CPU allocates a program's temporaries anew on each run. glibc gives large blocks back to the system at once, so
each step takes a page fault for every 4 KiB of them: a fifth of the processor time of a small model's step.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys

# Of malloc.h: parameter -> value.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def has_accelerator() -> bool:
    """Whether this machine shows a GPU or TPU that jax may use; asked without starting jax."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(
        glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    )


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation; True where that worked.

    One arena for all threads, no blocks outside of it, and nothing handed back: the process stays at its peak size.
    To be called before jax starts its threads, which would have arenas of their own by then. Elsewhere than on
    Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
