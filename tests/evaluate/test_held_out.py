"""Held-out results are exact sums, divided once."""

import gzip
import lzma
import math

import jax.numpy as jnp
import numpy as np
import pytest
from sections import section

from llmjax.errors import UserError
from llmjax.evaluate.held_out import compressed_bits_per_byte, evaluate
from llmjax.tasks.language_model import LanguageModel
from llmjax.types import LossSums


def sums(loss, weight, correct=0.0):
    return LossSums(jnp.float32(loss), jnp.float32(weight), {"accuracy": jnp.float32(correct)})


def scored(batches, num_bytes=100):
    totals = evaluate(lambda params, batch: sums(*batch), None, iter(batches), num_bytes)
    return LanguageModel().evaluate(totals)


def test_uneven_batches_are_not_averaged_by_batch():
    results = scored([(30.0, 10.0, 5.0), (2.0, 2.0, 1.0), (0.0, 0.0, 0.0)], num_bytes=64)
    assert results["loss"] == 32 / 12
    assert results["perplexity"] == pytest.approx(math.exp(32 / 12))
    assert results["bits_per_byte"] == pytest.approx(32 / math.log(2) / 64)
    assert results["accuracy"] == 6 / 12


def test_how_the_targets_are_cut_into_batches_does_not_matter():
    rng = np.random.default_rng(0)
    parts = [(float(loss), 1.0, 0.0) for loss in np.float32(rng.random(1000) * 1e4)]
    whole = scored([(math.fsum(part[0] for part in parts), 1000.0, 0.0)])
    assert scored(parts)["loss"] == pytest.approx(math.fsum(part[0] for part in parts) / 1000, rel=1e-12)
    assert scored(parts)["loss"] == scored(parts[::-1])["loss"]
    assert whole["loss"] == pytest.approx(scored(parts)["loss"], rel=1e-6)


def test_a_loss_beyond_measure_is_reported_and_does_not_raise():
    results = scored([(1e6, 1.0)])
    assert results["loss"] == 1e6 and math.isfinite(results["perplexity"])
    assert math.isnan(scored([(math.nan, 1.0)])["loss"])


@pytest.mark.parametrize("batches", [[(0.0, 0.0)], [(0.0, 0.0)] * 3])
def test_no_targets_is_an_error(batches):
    with pytest.raises(UserError, match="no targets; raise data.held_out_fraction"):
        scored(batches)


@pytest.mark.parametrize("key", ["every", "batch_size"])
def test_a_negative_setting_is_named(key):
    with pytest.raises(UserError, match=f"evaluate.{key}=-1 must not be negative; use 0 for"):
        section("evaluate", **{key: -1})


def test_compressors_are_measured_at_their_strongest_on_all_of_the_text():
    text = b"the quick brown fox " * 50 + bytes(range(256))
    bits = compressed_bits_per_byte(text)
    assert bits["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert bits["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert compressed_bits_per_byte(b"")["gzip"] > 0
