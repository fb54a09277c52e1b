"""The text that is sent: whole characters, and nothing of a stop string, wherever the tokens are cut."""

import random

import pytest

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.generate.text import StoppedText

TOKENIZER = ByteTokenizer()


def sent(text, stops):
    """The pieces that are sent of a text of single bytes, and whether it was stopped."""
    stream, pieces = StoppedText(TOKENIZER, stops, continues=True), []
    for token in TOKENIZER.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream.stopped


@pytest.mark.parametrize("text, stops, kept", [
    ("one\ntwo", ["\n"], "one"),
    ("one", ["\n"], "one"),
    ("aab", ["ab"], "a"),
    ("ababac", ["abac"], "ab"),
    ("a###", ["####"], "a###"),
    ("x </s> y", ["</s>", "</"], "x "),
    ("x </a></s> y", ["</s>"], "x </a>"),
    ("春江潮水，海上", ["，"], "春江潮水"),
    ("春江", ["江水"], "春江"),
    ("stop", ["stop"], ""),
    ("all", [], "all"),
    ("all", [""], "all"),
])  # fmt: skip
def test_a_text_ends_before_its_first_stop_string(text, stops, kept):
    pieces, stopped = sent(text, stops)
    assert "".join(pieces) == kept and stopped == (kept != text)


def test_what_may_begin_a_stop_string_waits_and_the_rest_is_sent_at_once():
    pieces, _ = sent("a#b##", ["##!"])
    assert pieces == ["a", "", "#b", "", "", "##"]


def test_half_a_character_is_never_sent():
    pieces, _ = sent("é春😀", [])
    assert [piece for piece in pieces if piece] == ["é", "春", "😀"] and "�" not in "".join(pieces)
    stream = StoppedText(TOKENIZER)
    assert [stream.push(i) for i in TOKENIZER.encode("春")[:2]] == ["", ""] and stream.flush() == "�"


def test_any_cut_of_any_text_gives_what_finding_the_first_stop_gives():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab春", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab春", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        # The stop string that is complete first ends the text.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        pieces, stopped = sent(text, stops)
        assert stopped == bool(ends)
        whole = text[: min(ends)] if ends else text
        starts = [whole.find(stop) for stop in stops if stop in whole]
        assert "".join(pieces) == (whole[: min(starts)] if starts else whole)
