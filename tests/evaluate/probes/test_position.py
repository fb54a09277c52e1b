"""Loss by position: the buckets are what they say, and together they are the held-out loss."""

import jax
import numpy as np
import pytest

from configs import base
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.evaluate.held_out import evaluate
from llmjax.evaluate.probes.position import make_position
from llmjax.evaluate.scoring import score_pieces
from tests.evaluate.probe_text import V, spelled, text_of, words

T = 32
SIZES = {
    "model.num_layers": 2, "model.model_dim": 16, "transformer.num_heads": 2, "transformer.mlp_dim": 32,
    "model.init_std": 0.3,
    "data.seq_len": T, "train.tokens_per_update": 8 * T, "compute.accumulation_steps": 1,
}  # fmt: skip


def program_for(devices, **changes):
    raw = base.get_config()
    raw.update_from_flattened_dict(SIZES | {key.replace("__", "."): value for key, value in changes.items()})
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
    return make_program(config, derived, V, devices)


def positions_as_losses(params, arrays):
    return arrays["positions"].astype(np.float32), arrays["targets"] > 0


@pytest.fixture
def text():
    return text_of(spelled(*(words(n, seed=n) for n in (1, 2, 3, 5, 8, 30))), T)


def test_buckets_are_powers_of_two_of_the_position_in_the_document(text):
    probe = make_position(text, ())
    results = probe.summarize(
        score_pieces(positions_as_losses, None, probe.pieces(), probe.num_labels, lambda n: (2, T))
    )
    assert results["from"] == [0, 1, 2, 4, 8, 16]
    predictions = text.lengths() - 1
    positions = np.concatenate([np.arange(n) % T for n in predictions])
    for first, stop, loss, count in zip(
        results["from"], [1, 2, 4, 8, 16, 32], results["loss"], results["targets"]
    ):
        inside = positions[(positions >= first) & (positions < stop)]
        assert count == len(inside) and loss == inside.mean()


def test_buckets_without_targets_are_left_out():
    text = text_of(spelled("abc"), T)
    probe = make_position(text, ())
    sums = score_pieces(positions_as_losses, None, probe.pieces(), probe.num_labels, lambda n: (2, T))
    assert probe.summarize(sums)["from"] == [0, 1, 2]


def test_the_buckets_add_up_to_the_held_out_loss(text):
    program = program_for(jax.devices()[:1])
    params = program.init().params
    with program.placement.batches(text.sequences, stop=text.sequences.plan.num_rows) as feed:
        plain = program.task.evaluate(evaluate(program.eval_step, params, feed, 1))
    probe = make_position(text, ())
    losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
    sums = score_pieces(losses, params, probe.pieces(), probe.num_labels, program.probe_shape)
    assert sums.count.sum() == text.sequences.plan.num_tokens
    assert sums.loss.sum() / sums.count.sum() == pytest.approx(plain["loss"], rel=1e-6)
    assert sums.correct.sum() / sums.count.sum() == pytest.approx(plain["accuracy"], rel=1e-6)
