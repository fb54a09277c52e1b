"""TPUs to compile for, by name: `v5e:4x4`, `v5p:4x4x4`, `v6e:1x1`, and `v5e:4x4*2` for two slices of this shape.

A name consists of a generation, a colon, and the number of chips along each dimension of the torus. A suffix `*N`
asks for N such slices, connected by the data centre network. The TPU compiler, which comes with the `tpu` extra,
compiles for these devices on any machine.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax

from llmjax.errors import UserError, reason_of

# Without a TPU, libtpu would ask the metadata server of a TPU machine; these variables make it use given answers. The
# last one lets several processes load libtpu.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPU chips.

    dimensions  the number of dimensions of the torus that its chips form
    most_chips  the most chips in one slice (cloud.google.com/tpu/docs)
    example     a name of this generation, for error messages
    config      the compiler's name for how cores are joined into devices; "" if there is only one way
    """

    dimensions: int
    most_chips: int
    example: str
    config: str = ""


GENERATIONS = {
    "v4": Generation(3, 4096, "v4:4x4x4", "megacore"),
    "v5e": Generation(2, 256, "v5e:4x4"),
    "v5p": Generation(3, 6144, "v5p:4x4x4"),
    "v6e": Generation(2, 256, "v6e:4x4"),
    "tpu7x": Generation(3, 9216, "tpu7x:4x4x4"),
}
# Other names of the generations.
ALIASES = {"v7x": "tpu7x", "v5litepod": "v5e", "v5lite": "v5e"}
# The most slices to compile for: a choice, far beyond existing systems.
MOST_SLICES = 256
# The number of chips of a host along each of the first two dimensions.
HOST = 2


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed name.

    generation  a key of GENERATIONS
    shape       chips along three dimensions
    slices      the number of slices
    """

    generation: str
    shape: tuple[int, int, int]
    slices: int


def parse_topology(name: str) -> Topology:
    """The parts of a value of `plan.topology`. Raises UserError if no TPU has this name."""
    found = re.fullmatch(r"([a-z0-9]+):([0-9]+(?:x[0-9]+)*)(?:\*([0-9]+))?", name.strip().lower())
    word = re.split(r"[^a-z0-9]", name.strip().lower())[0]
    word = ALIASES.get(word, word)
    example = GENERATIONS[word if word in GENERATIONS else "v5p"].example
    if word not in GENERATIONS:
        close = difflib.get_close_matches(word, [*GENERATIONS, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {ALIASES.get(close[0], close[0])!r}, or use" if close else "use"
        raise _refused(name, f"{word!r} is none of the generations {', '.join(GENERATIONS)}", hint, example)
    if not found:
        rule = "a name is GENERATION:SHAPE, or GENERATION:SHAPE*SLICES for several slices"
        raise _refused(name, rule, "use", example)
    generation, slices = GENERATIONS[word], int(found[3] or 1)
    shape = tuple(map(int, found[2].split("x")))
    # A last dimension of 1 may be left out or written, as in v5e:4x4x1.
    dimensions = len(shape) - 1 if len(shape) == 3 and shape[2] == 1 else len(shape)
    if not 2 <= dimensions <= generation.dimensions:
        raise _refused(name, f"a {word} has {generation.dimensions} dimensions", "use", example)
    x, y, z = (*shape, 1)[:3]
    if 0 in (x, y, z, slices):
        raise _refused(name, "no dimension and no number of slices can be 0", "use", example)
    if slices > MOST_SLICES:
        raise _refused(
            name, f"there can be at most {MOST_SLICES} slices, not {slices}", "use", f"{example}*2"
        )
    if any(size > 1 and size % HOST for size in (x, y)):
        rule = f"a host has {HOST}x{HOST} chips, so that the first two dimensions are 1 or even"
        raise _refused(name, rule, "use", example)
    if x * y * z > generation.most_chips:
        rule = f"a slice of {word} has at most {generation.most_chips} chips, not {x * y * z}"
        raise _refused(name, rule, "use fewer, or several slices by a last *SLICES,", example)
    return Topology(word, (x, y, z), slices)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of the TPU called `name`, for compiling only. Raises UserError if the compiler does not know it."""
    topology = parse_topology(name)
    generation = GENERATIONS[topology.generation]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"plan.topology={name!r} needs the TPU compiler, which is not installed; pip install 'llmjax[tpu]'"
        )
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    settings: dict[str, Any] = {"chip_config_name": generation.config} if generation.config else {}
    settings |= {"num_slices": topology.slices} if topology.slices > 1 else {}
    # A topology smaller than a host (v5e:1x1) must be told so, or the compiler assumes whole hosts.
    settings["chips_per_host_bounds"] = [*(math.gcd(size, HOST) for size in topology.shape[:2]), 1]
    shape = "x".join(map(str, topology.shape[: generation.dimensions]))
    try:
        found = topologies.get_topology_desc(
            topology_name=f"{topology.generation}:{shape}", platform="tpu", **settings
        )
    except Exception as error:
        text = reason_of(error)[:200]
        raise _refused(name, text, "use", generation.example) from None
    return list(found.devices)


def _refused(name: str, rule: str, remedy: str, example: str) -> UserError:
    return UserError(
        f"plan.topology={name!r} cannot be compiled for ({rule}); {remedy} a name such as {example}"
    )
