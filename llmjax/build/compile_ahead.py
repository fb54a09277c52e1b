"""Compiles the training step in a thread, while the run still makes its parameters and opens its files.

Compiling takes most of the time before the first update, and for most of it Python is free. jax remembers a program
that was compiled for the same shapes and shardings, so the first call of the step finds it and compiles nothing.
"""

from __future__ import annotations

import contextlib
import threading

import jax

from llmjax.build.program import Program


class CompileAhead:
    """A context manager that compiles the training step of a program in a thread, once `start` is called.

    An error of the compiler is not raised here: the first call of the step compiles again, and raises it where the run
    expects it. Leaving the context waits for the thread, because nothing can stop a compiler.
    """

    def __init__(self, program: Program):
        self._program = program
        self._thread: threading.Thread | None = None

    def start(self, tokens: int) -> None:
        """Starts the thread, unless it was started before, for the update that begins after `tokens` tokens.

        Nothing is compiled ahead where the rows of that update are shorter than `data.seq_len`, for which the step is
        compiled here, and where there are several processes, because their compilers must take turns in one order.
        """
        program = self._program
        whole_rows = program.steering.lengths.length(tokens) == program.batch.seq_len
        if self._thread is None and whole_rows and jax.process_count() == 1:
            self._thread = threading.Thread(target=self._compile, name="compile_ahead")
            self._thread.start()

    def _compile(self) -> None:
        with contextlib.suppress(Exception):
            self._program.lower().compile()

    def wait(self) -> None:
        """Waits until the step is compiled, if it is compiled ahead."""
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
