"""All probes together: they depend on neither batch nor mesh, and a model that learns to copy is found out."""

import json

import jax
import numpy as np
import pytest
from some_slow import often
from test_position import T, program_for

from llmjax.evaluate.probes.copying import make_copy
from llmjax.evaluate.probes.suite import PROBES, default_lengths, describe, make_probes, run_probes
from tests.evaluate.probe_text import chinese, spelled, text_of, words

LENGTHS = (1, 16, 32, 160)  # the last is longer than the model's sequences, which have 32 tokens


def results_of(program, params, probes):
    losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
    return run_probes(probes, losses, params, program.probe_shape)


def numbers(results):
    """Every number in the results, in order."""
    if isinstance(results, dict):
        return [n for value in results.values() for n in numbers(value)]
    if isinstance(results, list):
        return [n for value in results for n in numbers(value)]
    return [] if isinstance(results, str) or results is None else [float(results)]


@pytest.fixture(scope="module")
def probes():
    text = text_of(spelled(words(30), chinese(20), words(10, 1)), T)
    made = make_probes(list(PROBES), LENGTHS, text)
    assert list(made) == list(PROBES)
    return made


@pytest.fixture(scope="module")
def params():
    return jax.device_get(program_for(jax.devices()[:1]).init().params)


@pytest.fixture(scope="module")
def one_device(probes, params):
    return results_of(program_for(jax.devices()[:1]), params, probes)


def test_results_survive_json_and_are_told_in_lines(one_device):
    assert json.loads(json.dumps(one_device, allow_nan=False)) == one_device
    rows = describe(one_device)
    assert list(rows) == [
        "loss by position", "loss by context", "passkey, en", "passkey, en, exact", "passkey, zh",
        "passkey, zh, exact", "needle, en", "needle, en, exact", "needle, zh", "needle, zh, exact", "copy at distance",
    ]  # fmt: skip
    assert rows["loss by context"].startswith("1: 6.") and "  160: 6." in rows["loss by context"]
    assert rows["needle, en"].startswith("160: ") and rows["needle, en"].endswith("% chosen (chance 25%)")


@pytest.mark.parametrize("changes", [{"evaluate__batch_size": 3}, {"evaluate__batch_size": 16}], ids=str)
def test_results_do_not_depend_on_the_batch(changes, probes, params, one_device):
    results = results_of(program_for(jax.devices()[:1], **changes), params, probes)
    np.testing.assert_allclose(numbers(results), numbers(one_device), rtol=1e-5)


@pytest.mark.parametrize(
    "data, fsdp, seq, tensor", often([(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2)], lambda shape: shape[1] == 2)
)
def test_results_do_not_depend_on_the_mesh(data, fsdp, seq, tensor, probes, params, one_device):
    program = program_for(jax.devices(), mesh__data=data, mesh__fsdp=fsdp, mesh__seq=seq, mesh__tensor=tensor)
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state().params
    )
    np.testing.assert_allclose(numbers(results_of(program, placed, probes)), numbers(one_device), rtol=1e-5)


def test_texts_that_fit_have_the_shape_of_evaluation_and_longer_ones_fewer_rows():
    program = program_for(jax.devices()[:1], evaluate__batch_size=6)
    assert [program.probe_shape(n) for n in (1, T, T + 1, 3 * T, 10 * T)] == [
        (6, T), (6, T), (3, 2 * T), (2, 3 * T), (1, 10 * T),
    ]  # fmt: skip
    sharded = program_for(jax.devices(), mesh__data=2, mesh__fsdp=2, mesh__seq=2, evaluate__batch_size=8)
    assert [sharded.probe_shape(n) for n in (T, 2 * T, 3 * T)] == [(8, T), (4, 2 * T), (4, 3 * T)]


def test_lengths_follow_from_seq_len_and_are_sorted():
    assert default_lengths(2048) == (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert default_lengths(100) == (1, 16, 32, 64, 100) and default_lengths(8) == (1, 8)
    text = text_of(spelled(words(30)), T)
    (probe,) = make_probes(["copy"], (32, 8, 8), text).values()
    assert sorted({len(piece.labels) for piece in probe.pieces()}) == [8, 32]


LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def repeated_letters(rng, letters, rows, index):
    """Sequences that go round after 4 to T / 2 letters; what comes again counts."""
    ones = np.ones((rows, T), np.int32)
    read, weights = np.ones((rows, T + 1), np.int32), ones.astype(np.float32)
    for row, weight in zip(read, weights):
        D = rng.integers(4, T // 2 + 1)
        row[1:] = np.resize(rng.permutation(letters)[:D], T)
        weight[: D + 1] = 0
    return {
        "tokens": read[:, :-1], "targets": read[:, 1:], "weights": weights, "segments": ones,
        "positions": ones.cumsum(1, dtype=np.int32) - 1, "index": np.arange(rows, dtype=np.int32) + index,
    }  # fmt: skip


@pytest.mark.slow
def test_a_model_that_learns_to_copy_is_seen_to():
    """Two layers get there at once, between updates 100 and 200 (three seeds of three): induction heads."""
    updates, rows = 300, 64
    program = program_for(
        jax.devices()[:1], model__model_dim=64, transformer__num_heads=4, transformer__mlp_dim=128, model__init_std=0.1,
        model__tie_embeddings=False, transformer__position="learned", optimizer__learning_rate=2e-2,
        optimizer__warmup_updates=30, train__num_updates=updates, train__tokens_per_update=rows * T,
    )  # fmt: skip
    text, state = text_of(spelled(LETTERS), T), program.init()
    letters, rng = np.array(text.sequences.store.documents[0][1:-1]), np.random.default_rng(0)
    probes = {"copy": make_copy(text, (8, 16, 32))}
    before = results_of(program, program.eval_params(state), probes)["copy"]
    for update in range(updates):
        order = program.steering.decide(program.steering.start(), update * rows * T).inputs
        batch = program.placement.place(repeated_letters(rng, letters, rows, update * rows))
        state, _ = program.train_step(state, batch, order)
    after = results_of(program, program.eval_params(state), probes)["copy"]
    assert before["distance"] == [4, 8, 16]
    assert max(before["accuracy"]) < 0.2 and min(after["accuracy"]) > 0.9
    assert max(after["loss"]) < 0.5 and min(after["first_loss"]) > 3
