"""Questions answered by likelihood: what is read, which tokens count, and which answer is chosen."""

import gzip
import json

import numpy as np
import pytest

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError
from llmjax.evaluate.questions import Question, Reader, as_json, describe, read_questions, summarize
from llmjax.evaluate.scoring import Sums
from llmjax.scores.bootstrap import mean_interval


def write(path, *records):
    text = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_both_forms_of_choices_are_read(tmp_path, name):
    path = write(
        tmp_path / name,
        {"query": "天空是", "choices": ["蓝色的", "木头"], "gold": 0},
        "",
        {"context_options": ["a b", "a c"], "continuation": "d", "gold": 1},
    )
    assert read_questions(path) == [
        Question(("天空是", "天空是"), ("蓝色的", "木头"), 0),
        Question(("a b", "a c"), ("d", "d"), 1),
    ]


@pytest.mark.parametrize("record, message", [
    ("{", "line 1 is not JSON"),
    ("[1]", "line 1 has no form that is known"),
    ({"query": "a", "choices": ["b", "c"]}, "line 1 has gold=None for 2 choices"),
    ({"query": "a", "choices": ["b", "c"], "gold": 2}, "line 1 has gold=2 for 2 choices"),
    ({"query": "a", "choices": ["b", "c"], "gold": True}, "line 1 has gold=True for 2 choices"),
    ({"query": "a", "choices": ["b"], "gold": 0}, "line 1 has gold=0 for 1 choices"),
    ({"query": "a", "choices": "bc", "gold": 0}, "line 1 has no form"),
    ({"query": "a", "choices": ["b", " "], "gold": 0}, "line 1 has no form"),
    ({"query": 5, "continuation": "b"}, "line 1 has no form"),
    ({"query": "a"}, "line 1 has no form"),
])  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.jsonl", record))


def test_a_file_that_is_no_questions_is_one_sentence(tmp_path):
    for path, message in (
        (tmp_path / "absent.jsonl", "does not exist"),
        (write(tmp_path / "none.jsonl", ""), "has no question"),
        (write(tmp_path / "both.jsonl", {"query": "a", "continuation": "b"},
               {"query": "a", "choices": ["b", "c"], "gold": 0}), "with choices and others without"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_questions(path)
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "no.jsonl.gz")


def test_the_tokens_after_the_context_count_and_nothing_else():
    tokenizer = ByteTokenizer()
    question = Question(("ab", ""), ("cd", "e"), None)
    first, second = Reader(tokenizer, " ", True, 8).pieces([question])
    assert first.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("ab cd")]
    assert first.labels.tolist() == [-1, -1, 0, 0, 0]
    # Without a context there is no delimiter.
    assert second.tokens.tolist() == [
        tokenizer.bos_id,
        *tokenizer.encode("e"),
    ] and second.labels.tolist() == [1]


def test_a_model_that_was_trained_without_bos_reads_none_but_where_it_would_read_nothing():
    tokenizer = ByteTokenizer()
    first, second = Reader(tokenizer, " ", False, 8).pieces([Question(("ab", ""), ("cd", "e"), None)])
    assert first.tokens.tolist() == tokenizer.encode("ab cd") and first.labels.tolist() == [-1, 0, 0, 0]
    assert second.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("e")]


def test_a_long_context_loses_its_beginning_which_is_counted_and_a_long_answer_is_refused():
    reader = Reader(ByteTokenizer(), "", True, 4)
    (piece,) = reader.pieces([Question(("abcdef",), ("gh",), None)])
    assert piece.tokens.tolist() == ByteTokenizer().encode("defgh") and piece.labels.tolist() == [
        -1,
        -1,
        0,
        0,
    ]
    assert reader.shortened == 1
    with pytest.raises(UserError, match="has 5 tokens, more than the data.seq_len=4"):
        list(reader.pieces([Question(("a",), ("bcdef",), None)]))


class Merging(ByteTokenizer):
    """A tokenizer that has one token for the two letters xy."""

    def encode(self, text, *, continues=False):
        return [250 if id == 250 else id for id in super().encode(text.replace("xy", "z"))]


def test_a_token_that_reaches_into_the_answer_counts():
    (piece,) = Reader(Merging(), "", True, 8).pieces([Question(("ax",), ("yb",), None)])
    # The context alone ends with x, and the whole text has xy in its place.
    assert piece.labels.tolist() == [-1, 0, 0]


def test_the_largest_likelihood_is_chosen_by_itself_per_token_and_per_byte():
    question = Question(("a",) * 3, ("bb", "cccccc", "d"), 1)
    sums = Sums(np.array([2.0, 3.0, 2.5]), np.array([1.0, 2.0, 1.0]), np.zeros(3))
    answers = summarize([question], sums)
    assert {name: values.tolist() for name, values in answers.scores.items()} == {
        "accuracy": [0.0], "accuracy_per_token": [1.0], "accuracy_per_byte": [1.0],
    }  # fmt: skip
    assert answers.items[0]["chosen"] == 0 and answers.items[0]["log_likelihoods"] == [-2.0, -3.0, -2.5]
    with pytest.raises(UserError, match="not a finite number"):
        summarize([question], Sums(np.array([np.nan, 3.0, 2.5]), sums.count, sums.correct))


def test_the_end_of_a_text_is_predicted_or_not():
    asked = [Question(("a",), ("bc",), None), Question(("a",), ("bd",), None)]
    answers = summarize(asked, Sums(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([2.0, 1.0])))
    assert answers.scores["exact"].tolist() == [1, 0] and answers.scores["nats_per_token"].tolist() == [
        0.5,
        1.5,
    ]
    assert describe(answers)["loss"].startswith("1.0000 nats per token  (0.5000 to 1.5000)")
    assert as_json(answers)["scores"]["exact"]["mean"] == 0.5


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        mean, low, high = mean_interval((rng.random(200) < 0.3).astype(np.float64))
        assert low <= mean <= high
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 100
    assert mean_interval(np.ones(5)) == (1.0, 1.0, 1.0)
