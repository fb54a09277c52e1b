"""What a confusion matrix says, worked out by hand."""

import math

import numpy as np
import pytest

from llmjax.scores.confusion import (
    accuracy,
    calibration_error,
    class_scores,
    confusion_rows,
    macro_f1,
    matthews,
    table_rows,
)

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
