"""Every way to accumulate compiles with the kernel of its devices on every kind of mesh, for TPUs and for GPUs."""

import importlib.util
import itertools
import math

import jax
import pytest

from configs import base
from llmjax.build import model
from llmjax.build import program as build_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.plan.topology import topology_devices
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.fused import MANUAL

tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'llmjax[tpu]'",
    ),
]
TINY = {
    "model.num_layers": 2, "model.model_dim": 128, "transformer.num_heads": 4, "transformer.num_kv_heads": 2,
    "transformer.head_dim": 64, "transformer.mlp_dim": 256, "model.dtype": "bfloat16", "compute.scan_layers": True,
    "tokenizer.vocab_size": 512, "data.seq_len": 256, "train.tokens_per_update": 16 * 256,
    "compute.accumulation_steps": 2, "optimizer.name": "adamw", "mesh.data": 1,
}  # fmt: skip
# Engines without weights to gather; each other one is tried with both choices of fused_gather.
NO_GATHER = ("in_place", "multisteps")
WAYS = [
    (name, gather)
    for name in ENGINES
    for gather in MANUAL
    if name not in NO_GATHER or gather == next(iter(MANUAL))
]
# Named after what is split; sequences by the algorithm that two key/value heads lead to.
MESHES = {
    "one chip": {},
    "data": {"mesh.data": 4},
    "fsdp": {"mesh.fsdp": 4},
    "tensor": {"mesh.data": 2, "mesh.tensor": 2},
    "hybrid": {"mesh.seq": 4},
    "ring": {"mesh.seq": 2, "mesh.tensor": 2},
    "ulysses": {"mesh.fsdp": 2, "mesh.seq": 2},
    "mixed": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.seq": 2},
}
TOPOLOGIES = {
    "v5e": {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:1x1x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:1x1", 4: "v6e:2x2", 8: "v6e:2x4"},
}
# Those that lower differently; one chip and mixed meshes among them.
ON_GPUS = ("one chip", "data", "fsdp", "ring", "mixed")
QUICK = {"exec_time_optimization_effort": -1.0}


def cases():
    """Each engine on each mesh with the kernel of a TPU; and each mesh with another kernel and an engine, which take
    turns, as the generations of TPUs do."""
    found = [(*engine, "auto", mesh) for engine, mesh in itertools.product(WAYS, MESHES)]
    for i, mesh in enumerate(MESHES):
        found.append((*WAYS[i // 2 % len(WAYS)], ("blockwise", "full")[i % 2], mesh))
    generations = itertools.cycle(TOPOLOGIES)
    return [(*case, next(generations)) for case in found]


def make_program(devices, **changes):
    """The tiny model on the first of `devices` that its mesh takes."""
    raw = base.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    raw.update_from_flattened_dict({**TINY, **changes})
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
    return build_program.make_program(config, derived, config.tokenizer.vocab_size, devices)


def tpus(mesh, generation):
    return topology_devices(TOPOLOGIES[generation][math.prod(MESHES[mesh].values())])


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("accumulation, gather, kernel, mesh, generation", cases())
    def test_a_train_step_compiles_for_tpus(self, accumulation, gather, kernel, mesh, generation):
        settings = {
            "compute.engine": accumulation,
            "compute.gather": gather,
            "compute.kernel": kernel,
        }
        program = make_program(tpus(mesh, generation), **settings, **MESHES[mesh])
        text = program.lower().compile(compiler_options=QUICK).as_text()
        assert ("tpu_custom_call" in text) == (kernel == "auto")

    @pytest.mark.parametrize("mesh", MESHES)
    def test_what_is_measured_between_updates_lowers_for_tpus(self, mesh):
        program = make_program(tpus(mesh, "v5e"), **MESHES[mesh])
        arrays = program.abstract_state().params, program.placement.abstract_batch()
        for name in ("eval_step", "statistics", "token_losses"):
            assert "tpu_custom_call" in getattr(program, name).lower(*arrays).as_text(), name


# by jax 0.12, which still has it
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ON_GPUS)
@pytest.mark.parametrize("accumulation, gather", WAYS)
def test_a_train_step_lowers_for_gpus(accumulation, gather, mesh, monkeypatch):
    """Without a GPU, for a mesh of CPU devices, with the kernel that GPUs get."""
    monkeypatch.setattr(model, "choose_kernel", lambda *arguments: ("pallas_gpu", "as the test says"))
    devices = jax.devices()[: math.prod(MESHES[mesh].values())]
    settings = {"compute.engine": accumulation, "compute.gather": gather}
    program = make_program(devices, **settings, **MESHES[mesh])
    arguments = program.abstract_state(), program.placement.abstract_batch(), program.abstract_inputs()
    text = program.train_step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call") >= 3
