"""What the server counts, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import collections
from collections.abc import Mapping

# The upper bounds of the buckets of durations, in seconds. A choice.
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Durations in seconds, counted by bucket."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Counts a duration."""
        self.counts[sum(seconds > bound for bound in BOUNDS)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """The lines of this histogram: cumulative counts, the sum and the count."""
        lines, total = [], 0
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Counts:
    """Requests, tokens and durations since the server began. Used by the event loop alone."""

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.prompt_tokens = self.new_tokens = self.left = 0
        self.request_seconds, self.first_token_seconds = Histogram(), Histogram()

    def describe(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The page for Prometheus; `gauges` are further {name: (what it is, value)} that go up and down."""
        counters: dict[str, tuple[str, float]] = {
            "prompt_tokens_total": ("Tokens of prompts that were accepted.", self.prompt_tokens),
            "new_tokens_total": ("Tokens that were written.", self.new_tokens),
            "clients_left_total": ("Requests whose client left before the end.", self.left),
        }
        lines = _head("requests_total", "counter", "Requests by path and status; 499: the client left.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'llmjax_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, (text, value) in counters.items():
            lines += [*_head(name, "counter", text), f"llmjax_{name} {value}"]
        for name, (text, value) in gauges.items():
            lines += [*_head(name, "gauge", text), f"llmjax_{name} {value:g}"]
        for name, text, histogram in (
            ("request_seconds", "Duration of requests for texts and vectors.", self.request_seconds),
            ("first_token_seconds", "Time until the first token of a request.", self.first_token_seconds),
        ):
            lines += [*_head(name, "histogram", text), *histogram.lines(f"llmjax_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP llmjax_{name} {text}", f"# TYPE llmjax_{name} {kind}"]
