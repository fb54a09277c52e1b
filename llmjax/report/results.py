"""The tiles at the head of the report: the scores of the last evaluation, other results, and the speed."""

import html
import re

import numpy as np

from llmjax.quantities import format_number
from llmjax.report.page_parts import as_entries
from llmjax.report.run_files import Run
from llmjax.scores.score import Score
from llmjax.workdir.metrics import column

# (label, value, note under the value)
Tile = tuple[str, str, str]
# A score with more decimals than this (`Score.digits`) is shown with a fixed number of decimals, as a loss is. Others
# are shortened to four significant digits.
FEW_DIGITS = 2


def draw_tiles(run: Run) -> str:
    """The tiles as HTML, or nothing if there are no results yet."""
    results = as_entries(run.summary.get("results"))
    # How well common compressors do on the held-out text, for comparison.
    compressors = {
        label: text for label, text in results.items() if re.search(r"\b(gzip|xz)\b", label.lower())
    }
    tiles = _quality_tiles(run, compressors)
    # The summary repeats the scores of the last evaluation, rounded; metrics.jsonl has them in full.
    shown = {score.label for score in run.scores} | {label.lower() for label in compressors}
    for label, text in results.items():
        if not (run.metrics.evaluate and label.lower() in shown):
            tiles.append((label, text, ""))
    tiles += _speed_tiles(run)
    body = "".join(
        f'<div class="tile"><dt>{html.escape(label)}</dt><dd><b>{html.escape(value)}</b>'
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for label, value, note in tiles
    )
    return f'<section aria-label="Key results"><dl class="tiles">{body}</dl></section>' if body else ""


def _speed_tiles(run: Run) -> list[Tile]:
    """A tile with the median tokens per second, and with the share of the device's peak FLOP/s if it is known."""
    speed = column(run.metrics.train, "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if not speed.size:
        return []
    mfu = column(run.metrics.train, "mfu")
    mfu = mfu[np.isfinite(mfu)]
    note = f"median, {100 * np.median(mfu):.1f}% of peak" if mfu.size else "median"
    return [("Tokens per second", format_number(float(np.median(speed))), note)]


def _quality_tiles(run: Run, compressors: dict[str, str]) -> list[Tile]:
    """A tile for each score of the last evaluation, or one for the train loss if nothing was evaluated."""
    evaluate = run.metrics.evaluate
    if evaluate and run.scores and evaluate[-1].get(run.scores[0].name) is not None:
        others = [score for score in run.scores[1:] if evaluate[-1].get(score.name) is not None]
        tiles = [_first_score_tile(run)]
        return tiles + [_score_tile(score, evaluate[-1][score.name], compressors) for score in others]
    loss = column(run.metrics.train, "loss")
    loss = loss[np.isfinite(loss)]
    if not loss.size:
        return []
    return [("Train loss", f"{loss[-1]:.3f}", "nats per token, last update")]


def _first_score_tile(run: Run) -> Tile:
    """A tile for the main score, by which the best checkpoint is chosen.

    It has the last value and, if an earlier one was better, a note with the best value.
    """
    evaluate, score = run.metrics.evaluate, run.scores[0]
    values = column(evaluate, score.name)
    finite = np.flatnonzero(np.isfinite(values))
    ranks = [score.rank(value) for value in values[finite]]
    best = int(finite[np.argmin(ranks)]) if finite.size else len(values) - 1
    word = "highest" if score.higher_is_better else "lowest"
    note = f"{word} {values[best]:.3f} at update {evaluate[best]['update']:,.0f}"
    return _title(score), f"{values[-1]:.3f}", score.unit if best == len(values) - 1 else note


def _score_tile(score: Score, value: float, compressors: dict[str, str]) -> Tile:
    """A tile for a score other than the first, with its value in the last evaluation.

    If compressors were measured by the same score, they are the note: `gzip 1.83 · xz 1.62`.
    """
    # The label of the score within a compressor's label or text, which the note leaves out.
    pattern = rf"[,:]? *{re.escape(score.label)}"
    comparable = any(re.search(pattern, f"{label} {text}", re.I) for label, text in compressors.items())
    beside = " · ".join(
        f"{re.sub(pattern, '', label, flags=re.I)} {text}"
        for label, text in compressors.items()
        if comparable
    )
    text = f"{value:.3f}" if score.digits > FEW_DIGITS else format_number(value, 4)
    return _title(score), text, beside or score.unit


def _title(score: Score) -> str:
    """The label with a capital letter. `str.capitalize` would make the other letters small."""
    return score.label[:1].upper() + score.label[1:]
