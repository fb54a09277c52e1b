"""The names of TPUs: each has its devices, or there is one sentence that says why not and what to write."""

import importlib.util

import pytest
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.parallel.mesh import make_mesh
from llmjax.plan.topology import ALIASES, GENERATIONS, MOST_SLICES, parse_topology, topology_devices

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]
# Devices of a chip, as jax counts them.
DEVICES = dict.fromkeys(GENERATIONS, 1) | {"tpu7x": 2}
# What may follow a generation of so many dimensions, and how many chips that makes.
SHAPES = {
    2: {"1x1": 1, "1x2": 2, "2x1": 2, "1x4": 4, "2x2": 4, "2x4": 8, "4x2": 8, "4X4": 16, "4x4x1": 16, "16x16": 256,
        "1x1*2": 2, "2x2*2": 8},
    3: {"1x1x1": 1, "1x1": 1, "1x2x1": 2, "2x2x1": 4, "2x2": 4, "2x2x2": 8, "2x2x4": 16, "4x2x2": 16, "4x4x5": 80,
        "1x1x1*2": 2, "2x2x1*3": 12},
}  # fmt: skip
MISTAKES = {
    "": "none of the generations", "v5q:4x4": "did you mean 'v5", "v2:2x2": "none of the generations",
    "v3:2x2": "none of the generations", "7x:2x2x1": "did you mean 'tpu7x'", "h100:8": "none of the generations",
    "v5e": "GENERATION:SHAPE", "v5e:": "GENERATION:SHAPE", "v5e-16": "GENERATION:SHAPE", "v5e 4x4": "GENERATION:SHAPE",
    "v5e:-1x4": "GENERATION:SHAPE", "v5e:4x4x": "GENERATION:SHAPE", "v5e:4x4*": "GENERATION:SHAPE",
    "2x v5e:4x4": "none of the generations", "v5e:4": "a v5e has 2 dimensions", "v5e:4x4x4": "a v5e has 2 dimensions",
    "v5p:4x4x5x6": "a v5p has 3 dimensions", "v5p:4": "a v5p has 3 dimensions", "v5e:0x4": "can be 0",
    "v5e:4x4*0": "can be 0", "v5e:3x3": "1 or even", "v6e:4x5": "1 or even", "v5p:3x4x4": "1 or even",
    "v5e:16x32": "at most 256 chips, not 512", "v6e:32x32": "at most 256 chips, not 1024",
    "v5p:32x32x32": "at most 6144 chips", "v4:4096x4096x4096": "at most 4096 chips",
    f"v5e:2x2*{MOST_SLICES + 1}": "at most 256 slices",
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_topology_that_does_not_exist_is_one_sentence_that_ends_in_one_that_does(name):
    with pytest.raises(UserError) as error:
        topology_devices(name)
    sentence = str(error.value)
    assert (
        sentence.startswith(f"plan.topology={name!r} cannot be compiled for (") and MISTAKES[name] in sentence
    )
    assert "\n" not in sentence
    parse_topology(sentence.rpartition(" such as ")[2])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_shape_of_every_generation_is_understood(generation):
    for shape in SHAPES[GENERATIONS[generation].dimensions]:
        assert parse_topology(f"{generation}:{shape}").generation == generation
        assert parse_topology(f" {generation.upper()}:{shape} ") == parse_topology(f"{generation}:{shape}")
    assert parse_topology(GENERATIONS[generation].example).slices == 1
    assert parse_topology(f"{GENERATIONS[generation].example}*3").slices == 3


@pytest.mark.parametrize("name", ALIASES)
def test_what_a_generation_is_called_elsewhere_is_understood(name):
    assert parse_topology(f"{name}:2x2").generation == ALIASES[name]


def test_without_the_compiler_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"plan.topology='v5e:4x4' needs .*; pip install 'llmjax\[tpu\]'"):
        topology_devices("v5e:4x4")


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_every_shape_of_every_generation_has_its_devices(self, generation):
        for shape, chips in SHAPES[GENERATIONS[generation].dimensions].items():
            devices = topology_devices(f"{generation}:{shape}")
            assert len(devices) == chips * DEVICES[generation], shape
            slices = parse_topology(f"{generation}:{shape}").slices
            assert len({getattr(d, "slice_index", None) for d in devices}) == slices

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_every_shape_of_every_generation_carries_a_mesh(self, generation):
        for shape in SHAPES[GENERATIONS[generation].dimensions]:
            devices = topology_devices(f"{generation}:{shape}")
            assert make_mesh(mesh_section(), devices).size == len(devices), shape
