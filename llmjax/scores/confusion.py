"""What a confusion matrix says: accuracy, macro-F1, Matthews' coefficient, and a table of the classes.

Entry [i, j] of the matrix counts the texts of class i that were taken for class j.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# The file in a workdir with the confusion matrix of the newest evaluation.
FILE = "classes.json"
# The most classes for which the whole matrix is printed on a terminal. A choice: it fits into 80 columns.
PRINTED = 8


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """The scores of one class, as shares of 1; NaN where there is nothing to take a share of.

    label      its name
    count      the texts that are of this class
    precision  of the texts that were taken for this class, the share that is of it
    recall     of the texts of this class, the share that was taken for it
    f1         the harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN)
    """

    label: str
    count: int
    precision: float
    recall: float
    f1: float


def class_scores(labels: Sequence[str], confusion: np.ndarray) -> list[ClassScores]:
    """The scores of each class, in the order of `labels`."""
    confusion = np.asarray(confusion, np.float64)
    right, actual, taken = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        columns = right / taken, right / actual, 2 * right / (actual + taken)
    return [
        ClassScores(label, round(float(count)), *(float(column[i]) for column in columns))
        for i, (label, count) in enumerate(zip(labels, actual, strict=True))
    ]


def accuracy(confusion: np.ndarray) -> float:
    """The share of the texts that were taken for what they are."""
    return float(np.trace(confusion) / np.sum(confusion))


def macro_f1(confusion: np.ndarray) -> float:
    """The mean of F1 over the classes. A class that no text is of and none was taken for has no F1 and is left out."""
    scores = class_scores([""] * len(confusion), confusion)
    return float(np.mean([one.f1 for one in scores if not math.isnan(one.f1)]))


def matthews(confusion: np.ndarray) -> float:
    """Matthews' correlation coefficient, for any number of classes (Gorodkin 2004): 1 where all is right, 0 for a guess
    that does not look at the text. It is 0, too, where all texts are of one class or were taken for one."""
    confusion = np.asarray(confusion, np.float64)
    total, right = confusion.sum(), np.trace(confusion)
    actual, taken = confusion.sum(1), confusion.sum(0)
    covariance = right * total - actual @ taken
    spread = math.sqrt(max(total**2 - taken @ taken, 0.0)) * math.sqrt(max(total**2 - actual @ actual, 0.0))
    return float(covariance / spread) if spread else 0.0


def calibration_error(bins: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017): how far confidence lies from accuracy, on average over texts.

    bins  [bins, 3]: the number of texts of similar confidence, the sum of their confidences, and how many are right
    """
    bins = np.asarray(bins, np.float64)
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def table_rows(labels: Sequence[str], confusion: np.ndarray) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of the classes, as text."""
    head = ["class", "texts", "precision", "recall", "F1"]
    rows = [
        [one.label, f"{one.count:,}", *(_share(value) for value in (one.precision, one.recall, one.f1))]
        for one in class_scores(labels, confusion)
    ]
    return head, rows


def confusion_rows(labels: Sequence[str], confusion: np.ndarray) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the matrix, as text: a row for each class, a column for what it was taken for."""
    head = ["of \\ taken for", *labels]
    rows = [
        [label, *(f"{round(float(count)):,}" for count in row)]
        for label, row in zip(labels, confusion, strict=True)
    ]
    return head, rows


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
