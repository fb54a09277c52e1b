"""Scores say which way is better, survive a file, and are told in words."""

import pytest

from llmjax.scores.score import FILE, Score, describe_scores, read_scores, scores_as_json
from llmjax.tasks.table import TASKS


def test_the_lowest_rank_is_the_best_whichever_way_a_score_goes():
    losses, accuracies = Score("loss", "loss"), Score("accuracy", "accuracy", higher_is_better=True)
    assert min([2.0, 1.0, 3.0], key=losses.rank) == 1.0
    assert min([0.2, 0.9, 0.3], key=accuracies.rank) == 0.9


@pytest.mark.parametrize("task", TASKS)
def test_scores_come_back_from_their_file_and_names_are_different(task, tmp_path):
    scores = TASKS[task].scores
    (tmp_path / FILE).write_text(scores_as_json(scores))
    assert read_scores(tmp_path) == scores and len({score.name for score in scores}) == len(scores) > 0


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '[{"title": "x"}]', "[" * 5000])
def test_a_file_that_cannot_be_read_tells_no_scores(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    assert read_scores(tmp_path) == ()


def test_words_have_the_digits_and_the_unit():
    scores = (Score("loss", "held-out loss", "nats per token", digits=4), Score("f1", "F1"))
    assert describe_scores(scores, {"loss": 1.23456}) == {"held-out loss": "1.2346 nats per token"}
    assert describe_scores(scores, {"loss": 1.0, "f1": 0.5, "more": 2.0})["F1"] == "0.500"
