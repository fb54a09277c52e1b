"""A profile of some updates of a run: what host and devices did at which time, for xprof, TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llmjax.errors import reason_of

# The name of an update in the trace, where the number of the update follows it.
NAME = "update"


class Profiler:
    """Traces the updates of `window` by `jax.profiler`, once. No number of the run depends on it.

    The devices are idle when the trace begins and when it ends, so that it holds whole updates and nothing else. What
    fails in the profiler is said, and the run goes on.

    window  numbers of updates; an empty range traces nothing
    folder  each process writes into it. Processes need folders of their own, because those of one machine would write
            the same files
    say     prints a line
    """

    def __init__(
        self,
        window: range = range(0),
        folder: Path = Path("profile"),
        say: Callable[[str], None] = lambda text: None,
    ):
        self._window, self._folder, self._say = window, folder, say
        self._is_due, self._is_active = bool(window), False
        self._last = 0

    @contextlib.contextmanager
    def around(self, update: int, state: Callable[[], Any], on_pause: Callable[[], None]) -> Iterator[None]:
        """A context manager for dispatching the micro-steps of `update`.

        state     () -> the newest state, for which the profiler waits before it begins and ends
        on_pause  called when the wall time of the updates before and after means nothing
        """
        if self._is_due and update == self._window.start:
            self._is_due = False
            jax.block_until_ready(state())
            self._start()
            on_pause()
        if not self._is_active:
            yield
            return
        with jax.profiler.StepTraceAnnotation(NAME, step_num=update):
            yield
        self._last = update
        if update >= self._window[-1]:
            jax.block_until_ready(state())
            self._stop()
            on_pause()

    def close(self) -> None:
        """Ends a trace that is under way, because the run ends."""
        if self._is_active:
            self._stop()
        elif self._is_due:
            self._is_due = False
            self._say(f"profile: the run ended before update {self._window.start}, so there is none")

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Otherwise every call of a Python function is an event too, and a trace keeps no more than a million.
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        except Exception as error:
            self._say(f"profile: none was made ({reason_of(error)})")
            return
        self._is_active = True

    def _stop(self) -> None:
        self._is_active = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._say(f"profile: it was not written whole ({reason_of(error)})")
            return
        first, cut = self._window.start, "" if self._last == self._window[-1] else ", where the run ended,"
        self._say(
            f"profile: updates {first} to {self._last}{cut} are in {self._folder}; open it by xprof or tensorboard "
            f"--logdir={self._folder}, or its perfetto_trace.json.gz at ui.perfetto.dev"
        )
