"""Settings for all tests: eight simulated CPU devices, set before jax is imported, and strict rank promotion."""

import gc
import itertools
import os
import pathlib
import signal

import quick

# A background job of a shell ignores Ctrl-C, and its child processes inherit that. Tests interrupt the runs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
flags = os.environ.get("XLA_FLAGS", "")
for flag in ("--xla_force_host_platform_device_count=8", *quick.FLAGS):
    if flag.split("=")[0] not in flags:
        flags = f"{flags} {flag}".strip()
os.environ["XLA_FLAGS"] = flags

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes very many objects. With Python's default thresholds the garbage collector takes a tenth of all time.
gc.set_threshold(100_000, 50, 50)

ROOT = pathlib.Path(__file__).parents[1]
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Clears all compiled programs after every 50 tests.

    Linux lets a process have 65530 memory mappings, and every compiled program keeps some of them.
    """
    yield
    if next(TESTS) % 50 == 0:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of shared corpora; the test is skipped where it is absent."""
    path = pathlib.Path(os.environ.get("LLMJAX_SHARED", ROOT.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set LLMJAX_SHARED)")
    return path
