"""Pass keys and needles: hidden where it is claimed, and told apart by those who look."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError
from llmjax.evaluate.probes import sentences
from llmjax.evaluate.probes.retrieval import DEPTHS, encode_within, make_needle, make_passkey, sentence_ids
from llmjax.evaluate.scoring import make_token_losses, score_pieces
from llmjax.types import Batch
from tests.evaluate.fake_models import Copier, Unigram
from tests.evaluate.probe_text import TOKENIZER, V, chinese, spelled, text_of, words

T = 256
MAKERS = {"passkey": make_passkey, "needle": make_needle}
FACTS = {"passkey": sentences.pass_key, "needle": sentences.fact}


@pytest.fixture(scope="module")
def text():
    return text_of(spelled(words(80), chinese(200), words(40, 1)), T)


def results_of(model, params, probe):
    step = jax.jit(make_token_losses(model))
    sums = score_pieces(
        lambda p, arrays: step(p, Batch(**arrays)),
        params,
        probe.pieces(),
        probe.num_labels,
        lambda n: (16, T),
    )
    return probe.summarize(sums)


@pytest.mark.parametrize("name", MAKERS)
def test_what_copies_finds_everything_and_what_does_not_look_is_at_chance_exactly(name, text):
    probe = MAKERS[name](text, (192, 256))
    found = results_of(Copier(V), None, probe)
    assert [of["language"] for of in found] == ["en", "zh"]
    for of in found:
        ones = np.ones((len(DEPTHS), 2)).tolist()
        assert of["length"] == [192, 256] and of["choice"] == ones and of["exact"] == ones
        assert np.max(of["loss"]) < 1e-3 and of["chance"] == 0.25
    for logits in (jnp.zeros(V), jnp.asarray(np.random.default_rng(0).normal(size=V), jnp.float32)):
        for of in results_of(Unigram(V), logits, probe):
            assert of["choice"] == np.full((len(DEPTHS), 2), 0.25).tolist()
            assert np.max(of["exact"]) == 0


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_hidden_lies_at_its_depth_in_a_text_of_its_length(name, text):
    pieces, places = list(MAKERS[name](text, (256,)).pieces()), []
    assert len(pieces) == 2 * len(DEPTHS) * 2 * 4 * 4
    for number, piece in enumerate(pieces):
        language = ("en", "zh")[number // (len(pieces) // 2)]
        (counted,) = np.nonzero(piece.labels >= 0)
        assert counted[-1] == len(piece.labels) - 1 and (piece.labels[counted] == number).all()
        assert 256 - 12 <= len(piece.labels) <= 256
        read = TOKENIZER.decode(piece.tokens.tolist())
        assert "\ufffd" not in read  # no character is cut
        depth = DEPTHS[number // 32 % len(DEPTHS)]
        group, hidden, answer = number // 16 % 2, number // 4 % 4, number % 4
        cell = number // 32
        of = FACTS[name](language, 2 * cell + group)
        sentence = f"\n{of.lead}{of.answers[hidden]}{of.rest.format(of.answers[hidden])}\n"
        end = f"\n{of.question}\n{of.lead}{of.answers[answer]}"
        assert read.endswith(end) and read.count(sentence) == 1
        before, after = read.removesuffix(end).split(sentence)
        assert len(before) == pytest.approx(depth * len(before + after), abs=3)
        places.append((before + after, depth))
    if name == "passkey":  # which has room for the same filler at every depth
        assert len({filler for filler, _ in places}) == 2 * 2


def test_lengths_without_room_for_the_sentences_are_left_out_or_named(text):
    found = make_passkey(text, (16, 64, 256))
    assert {len(piece.labels) // 64 for piece in found.pieces()} <= {3, 4}
    with pytest.raises(
        UserError, match=r"evaluate.probes has 'needle', whose .* the longest .* is 64; give a longer"
    ):
        make_needle(text, (1, 64))


def test_a_text_in_one_language_is_asked_in_it_alone():
    for document, language in ((chinese(150), "zh"), (words(50), "en")):
        text = text_of(spelled(document), T)
        probe = make_passkey(text, (T,))
        sums = score_pieces(
            lambda p, arrays: (arrays["targets"] * 1.0, arrays["targets"] < 0),
            None, probe.pieces(), probe.num_labels, lambda n: (16, T),
        )  # fmt: skip
        assert [of["language"] for of in probe.summarize(sums)] == [language]


def test_a_short_text_goes_round_until_it_is_long_enough():
    text = text_of(spelled("春江花月夜"), T)
    for piece in make_passkey(text, (512,)).pieces():
        assert 500 <= len(piece.labels) <= 512


@pytest.mark.parametrize("make_fact", FACTS.values())
@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_are_four_different_ones_that_the_question_does_not_give_away(make_fact, language):
    for number in range(40):
        of = make_fact(language, number)
        assert len(set(of.answers)) == sentences.ANSWERS == len(of.answers)
        assert not any(part in of.question for part in (of.lead, *of.answers))
        assert not any(answer in of.lead for answer in of.answers)
    assert len(sentences.FACTS["en"]) == len(sentences.FACTS["zh"])
    assert len({sentences.pass_key(language, number).answers for number in range(500)}) == 500


@pytest.mark.parametrize("path", ["spm/mistral_v1.model", "spm/t5_32k.model"])
def test_foreign_tokenizers_give_lead_and_answer_the_same_ids_in_both_places(shared_data, path):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / path)
    of = sentences.pass_key("en", 0)
    hidden, ask, answers = sentence_ids(tokenizer, of)
    lead = encode_within(tokenizer, of.lead)
    for sentence, answer in zip(hidden, answers):
        told = [*lead, *answer]
        assert any(list(sentence[i : i + len(told)]) == told for i in range(len(sentence)))
        assert list(ask[-len(lead) :]) == lead
        assert of.answers[0].strip() in tokenizer.decode(hidden[0].tolist())
    if tokenizer.lossless:
        text = tokenizer.decode([*ask, *answers[0]])
        assert text.endswith(of.lead + of.answers[0])
