"""Scores say which way is better, survive a file, and are told in words."""

import math

import numpy as np
import pytest

from llmjax.scores import (
    FILE,
    Score,
    accuracy,
    calibration_error,
    class_scores,
    confusion_rows,
    describe_scores,
    macro_f1,
    matthews,
    read_scores,
    scores_as_json,
    table_rows,
)
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


# Rows are what texts are of, columns what they were taken for. The third class occurs nowhere.
MATRIX = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])


def test_the_scores_of_a_confusion_matrix_are_those_worked_out_by_hand():
    first, second, third = class_scores(["a", "b", "c"], MATRIX)
    assert (first.count, first.precision, first.recall) == (8, 6 / 7, 6 / 8)
    assert (second.count, second.precision, second.recall) == (4, 3 / 5, 3 / 4)
    assert (first.f1, second.f1) == pytest.approx((12 / 15, 6 / 9))
    assert third.count == 0 and math.isnan(third.precision) and math.isnan(third.f1)
    assert accuracy(MATRIX) == 9 / 12
    assert macro_f1(MATRIX) == pytest.approx((12 / 15 + 6 / 9) / 2)


def test_the_coefficient_of_two_classes_is_matthews_own_formula():
    (tn, fp), (fn, tp) = [[50, 3], [7, 20]]
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(np.array([[tn, fp], [fn, tp]])) == pytest.approx(expected)
    assert matthews(np.eye(4) * 3) == pytest.approx(1)
    # One class for all says nothing.
    assert matthews(np.array([[5, 0], [3, 0]])) == 0 == matthews(np.array([[5, 0], [0, 0]]))


def test_confidence_that_is_right_is_calibrated():
    assert calibration_error(np.array([[10, 9.0, 9], [0, 0, 0], [10, 6.0, 6]])) == 0
    assert calibration_error(np.array([[10, 9.0, 5], [10, 6.0, 7]])) == pytest.approx((4 + 1) / 20)


def test_tables_of_classes_name_every_class():
    head, rows = table_rows(["a", "b", "c"], MATRIX)
    assert len(head) == 5 and rows[0] == ["a", "8", "0.8571", "0.7500", "0.8000"] and rows[2][2:] == ["–"] * 3
    head, rows = confusion_rows(["a", "b", "c"], MATRIX)
    assert head[1:] == ["a", "b", "c"] and rows[0] == ["a", "6", "2", "0"]
