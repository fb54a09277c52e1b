"""The command line: `python -m llmjax.main --config=configs/base.py [--mode=...] [--workdir=...] [--config.KEY=VALUE]`.

    train     train, or continue training, in --workdir (default: runs/NAME for configs/NAME.py); the default mode
    evaluate  report the held-out loss of a checkpoint, or of --config.checkpoint.init_from before there is one, or with
              --questions=FILE how many questions it answers right
    generate  continue each --prompt, each line of --prompt_file, or with --interactive each line that is typed
    chat      answer each line that is typed, in a conversation, for a run of the task conversation or a chat model
    translate write the translation of each of these texts, for a run of the task translation
    classify  label each --prompt, each line of --prompt_file, or without both each line of standard input
    embed     print the vector of each of these texts, or with --neighbours=TEXT what is nearest to it; --table=FILE
    serve     answer requests in the form of OpenAI's API, and serve a page to chat with, at --config.serve.port
    plan      explain the config and compile its step, for these devices or --config.plan.topology, without running it

With --workdir alone, the config saved there is used. SIGTERM and Ctrl-C stop a training run after saving it, and the
same command continues it. A second Ctrl-C ends it at once. The other modes end at the first one; serve
ends its texts before, with exit code 0.

exit code  0    everything is done
           1    training or a later stage failed; trained parameters are saved, and one sentence says what to do
           2    the request has a mistake, which one sentence explains
           75   a training run was stopped; the same command continues it
           130  interrupted by Ctrl-C
           141  the reader of the output is gone
           143  ended by SIGTERM, in modes other than train
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

# This must be set before jax is imported. XLA's log means nothing to a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging

from llmjax.escapes import complain, show
from llmjax.failures import FAILED, describe_failure
from llmjax.flags import describe_help, name_of, parse, read_profile, read_prompts, read_table
from llmjax.terminal.stages import StageProgress
from llmjax.workdir.contents import check_place


class _Terminated(BaseException):
    """SIGTERM arrived in a mode that has nothing to save."""


def main(argv: Sequence[str], *, alone: bool = False) -> int:
    """Runs one mode and returns the exit code. `alone` says that the process does nothing else, so that a second
    Ctrl-C may end it at once."""
    # What libraries log as errors, they also raise.
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        if (text := describe_help(argv, __doc__.strip())) is not None:
            show(text)
            return 0
        values, config = parse(argv)
        prompts, profile, table = read_prompts(values), read_profile(values), read_table(values)
        workdir = pathlib.Path(values.workdir or f"runs/{name_of(values.config)}")
        check_place(workdir)
        # Imported late: jax takes seconds to import, and mistakes in flags are reported before.
        with StageProgress(speaks=sys.stderr.isatty) as progress:
            progress("importing jax")
            from llmjax.modes import dispatch

            importlib.import_module(f"llmjax.modes.{values.mode}")

        with _terminable(alone):
            return dispatch.run(
                values.mode,
                config,
                workdir,
                prompts=prompts,
                checkpoint=values.checkpoint,
                interactive=values.interactive,
                references=None if values.references is None else pathlib.Path(values.references),
                profile=profile,
                jsonl=values.jsonl,
                neighbours=values.neighbours,
                table=table,
                questions=[pathlib.Path(path) for path in values.questions],
                against=None if values.against is None else pathlib.Path(values.against),
            )
    except BrokenPipeError:
        from llmjax.terminal.progress import silence

        silence()
        return 141
    except Exception as error:
        failure = describe_failure(error)
        if failure is None:
            raise
        code, sentence = failure
        complain(sentence)
        if alone and code == FAILED:
            # Threads that are still writing would print tracebacks while the interpreter shuts down.
            os._exit(code)
        return code
    except KeyboardInterrupt:
        show("\nllmjax: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        show("llmjax: ended by SIGTERM", file=sys.stderr)
        return 143


@contextlib.contextmanager
def _terminable(alone: bool) -> Iterator[None]:
    """A context manager in which SIGTERM ends a mode as Ctrl-C does. Training replaces the handler by its own."""
    from llmjax.train.loop.stop_request import end_on_second_interrupt

    def end(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Within a larger program, Ctrl-C belongs to that program.
    if alone:
        end_on_second_interrupt()
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_closed_streams() -> None:
    """Opens os.devnull for each standard stream that the caller has closed, as `<&-` and `2>&-` do.

    Python sets such a stream to None. Its descriptor would go to the next file that is opened, and what a library
    prints would be written into that file.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            # It gets the lowest descriptor that is free, which is the closed one.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def console() -> None:
    """The command `llmjax`."""
    _open_closed_streams()
    sys.exit(main(sys.argv, alone=True))


if __name__ == "__main__":
    console()
