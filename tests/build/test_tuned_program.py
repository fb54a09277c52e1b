"""Runs in which a part of the parameters trains: first losses, memory, layout invariance, and what stays frozen."""

import dataclasses

import jax
import numpy as np
import pytest
from some_slow import often

from llmjax.train.trees import flatten
from tests.build.test_program import UPDATES, trace
from tests.build.test_program_of_families import program_for

LORA = {"lora.rank": 2, "lora.alpha": 8.0, "optimizer.weight_decay": 0.5, "optimizer.name": "adamw"}
# What is tuned -> the config.
TUNED = {
    "gpt": LORA | {"lora.targets": ("attention", "w_up")},
    "gpt experts scanned": LORA,
    "encoder_decoder": {"train.frozen": ("layers:1", "encoder/mlp")},
    "lstm projected": LORA,
}
CUTS = {
    "accumulation": {"compute.accumulation_steps": 8},
    "multisteps": {"compute.engine": "multisteps"},
    "mesh": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "fused": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "compute.engine": "fused"},
    "fused, gathered once": {
        "mesh.data": 2, "mesh.fsdp": 4, "compute.engine": "fused", "compute.gather": "update",
    },
    "sequences": {"mesh.data": 2, "mesh.seq": 2, "mesh.tensor": 2},
}  # fmt: skip


@pytest.fixture(scope="module", params=often(TUNED, lambda name: name in ("gpt", "encoder_decoder")))
def tuned(request):
    program = program_for(request.param, TUNED[request.param])
    return request.param, program, trace(program)


def test_the_first_loss_is_that_of_the_whole_model_and_then_it_falls(tuned):
    name, _, losses = tuned
    others = {key: value for key, value in TUNED[name].items() if key.startswith("optimizer.")}
    assert losses[0] == trace(program_for(name, others))[0]
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("cut", often(CUTS, lambda cut: cut == "fused"))
def test_every_cut_of_the_work_gives_the_same_losses(tuned, cut):
    name, _, losses = tuned
    if name.startswith("lstm") and "mesh.seq" in CUTS[cut]:
        pytest.skip("a family without attention, whose sequences are not split")
    np.testing.assert_allclose(trace(program_for(name, TUNED[name] | CUTS[cut])), losses, rtol=1e-5)


def test_frozen_parameters_have_no_state_and_no_checkpoint(tuned):
    _, program, _ = tuned
    state, saved = program.abstract_state(), program.abstract_saved()
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    frozen = {path: x for path, x in flatten(state.frozen).items()}
    # Two moments and the sums of the update, each the size of what trains; and a few counters.
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 3 * trained + 16
    assert not jax.tree.leaves(saved.frozen) and frozen
    assert sum(x.size for x in jax.tree.leaves(saved)) <= 3 * trained + 16


def test_an_update_returns_the_frozen_parameters_as_they_were(tuned):
    _, program, _ = tuned
    before = jax.device_get(program.init().frozen)
    states = []

    def step(*arguments):
        states.append(program.train_step(*arguments))
        return states[-1]

    trace(dataclasses.replace(program, train_step=step))
    assert int(states[-1][0].update) == UPDATES
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(states[-1][0].frozen), before)
    # And the parameters that are evaluated are those of the whole model.
    whole = program.eval_params(states[-1][0])
    assert jax.tree.structure(whole) == jax.tree.structure(program.params_shape)


def test_in_bfloat16_a_fused_update_rounds_an_adapted_matrix_as_the_other_engines_do():
    changes = TUNED["gpt"] | {"model.dtype": "bfloat16", "compute.accumulation_steps": 1, "lora.alpha": 64.0}
    in_place = trace(program_for("gpt", changes))
    np.testing.assert_allclose(
        trace(program_for("gpt", changes | {"compute.engine": "fused"})), in_place, rtol=1e-5
    )
