"""The tables of the report: every evaluation, every event, and every change of the batch with its reason."""

import numpy as np

from llmjax.quantities import format_number
from llmjax.report import curves
from llmjax.report.page_parts import figure_table, folded, section
from llmjax.report.results import FEW_DIGITS
from llmjax.report.run_files import Run
from llmjax.scores import confusion
from llmjax.workdir.metrics import Metrics, column

# A table of more rows than this is folded. A choice: about half a screen.
LONG = 12


def draw_evaluations(run: Run) -> str:
    """The section with a row for each evaluation, or nothing if there are none.

    The scores are the first columns after update and tokens. All other numbers of the evaluations follow.
    """
    lines = run.metrics.evaluate
    if not lines:
        return ""
    scores = {score.name: score for score in run.scores}
    first = [key for key in ("update", "tokens", *scores) if any(key in line for line in lines)]
    measured = {key for line in lines for key, value in line.items() if isinstance(value, float)}
    keys = first + sorted(measured - {*first, "seconds"})

    def cell(key: str, value: float | None) -> str:
        if value is None:
            return "–"
        if key == "update":
            return f"{value:,.0f}"
        if key in scores and scores[key].digits > FEW_DIGITS:
            return f"{value:.4f}"
        return format_number(value, 4)

    rows = [[cell(key, line.get(key)) for key in keys] for line in lines]
    table = figure_table([key.replace("_", " ") for key in keys], rows)
    if len(lines) > LONG:
        table = folded(f"All {len(lines):,} evaluations", table)
    return section("Held-out evaluations", table)


def draw_classes(run: Run) -> str:
    """The section of a classification: the scores of each class, what each was taken for, and the calibration."""
    if not run.classes:
        return ""
    labels, matrix = [str(label) for label in run.classes["labels"]], np.asarray(run.classes["confusion"])
    body = figure_table(*confusion.table_rows(labels, matrix))
    table = figure_table(*confusion.confusion_rows(labels, matrix))
    title = "Texts of each class, by what they were taken for"
    body += folded(title, table) if len(labels) > LONG else f"<h3>{title}</h3>{table}"
    rows = [
        [f"{count:,.0f}", f"{confidence / count:.4f}", f"{right / count:.4f}"]
        for count, confidence, right in run.classes["calibration"]
        if count
    ]
    calibration = figure_table(["texts", "mean confidence", "accuracy"], rows)
    body += folded("Calibration: is a model that is 90 % sure right in 90 %?", calibration)
    return section("Classes", f'{body}<p class="note">After update {run.classes["update"]:,.0f}.</p>')


def draw_events(metrics: Metrics) -> str:
    """The section about events: what happened, how much was dropped and skipped, and each change of the batch size."""
    counts = {key: float(np.nansum(column(metrics.train, key))) for key in curves.COUNTED}
    words = {"dropped": "micro-step{} dropped", "skipped": "update{} skipped"}
    said = [f"{count:,.0f} {words[key].format('s' * (count != 1))}" for key, count in counts.items() if count]
    body = f'<p class="note">In all, {" and ".join(said)}.</p>' if said else ""
    if metrics.events:
        rows = [
            [f"{line['update']:,.0f}", str(line.get("event", "")), str(line.get("text", ""))]
            for line in metrics.events
        ]
        table = figure_table(["update", "event", "what happened"], rows, words=2)
        body = (folded(f"All {len(rows):,} events", table) if len(rows) > LONG else table) + body
    rows = [
        [f"{update:,.0f}", f"{before:,.0f} → {after:,.0f}", reason]
        for update, before, after, reason in curves.batch_changes(metrics)
    ]
    if rows:
        table = figure_table(["update", "micro-steps", "why"], rows, words=1)
        body += folded(f"Changes of the batch ({len(rows):,})", table)
    return section("Events", body)
