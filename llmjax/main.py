"""The command line: `python -m llmjax.main --config=configs/base.py [--mode=...] [--workdir=...] [--config.KEY=VALUE]`.

    train     train, or go on training, in --workdir (default: runs/NAME for configs/NAME.py); the default mode
    evaluate  held-out loss of a checkpoint; before there is one, of what --config.checkpoint.init_from names
    generate  continue each --prompt, or each line of --prompt_file
    plan      say what the config means, compile its step for the devices at hand or --config.plan.topology, run nothing

With --workdir alone, the config saved there is used. SIGTERM and Ctrl-C stop a training, which is saved, and so the
same command goes on from there; a second Ctrl-C ends it at once, and the other modes end at the first.

exit code  0    all of it is done
           1    training failed, or what follows it: what was trained is saved, and one sentence says what to do
           2    a mistake in what was asked for, in one sentence
           75   a training was stopped, and the same command goes on with it
           130  interrupted by Ctrl-C
           141  nobody reads the output any more
           143  ended by SIGTERM, in the other modes
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax is imported: XLA's log says nothing to a user

import absl.logging

from llmjax.escapes import complain, show
from llmjax.failures import FAILED, describe_failure
from llmjax.flags import describe_help, name_of, parse, read_prompts
from llmjax.workdir.contents import check_place


class _Terminated(BaseException):
    """SIGTERM came, in a mode that has nothing to save."""


def main(argv: Sequence[str], *, alone: bool = False) -> int:
    """Runs one mode; the exit code. `alone`: the process does nothing else, and so a second Ctrl-C may end it."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # what libraries log as errors is raised, too
    try:
        if (text := describe_help(argv, __doc__.strip())) is not None:
            show(text)
            return 0
        values, config = parse(argv)
        prompts = read_prompts(values)
        workdir = pathlib.Path(values.workdir or f"runs/{name_of(values.config)}")
        check_place(workdir)
        from llmjax.modes import dispatch  # after the flags, for jax takes seconds to import

        with _terminable(alone):
            return dispatch.run(values.mode, config, workdir, prompts=prompts, checkpoint=values.checkpoint)
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
            os._exit(code)  # threads that were writing would print tracebacks while the interpreter goes down
        return code
    except KeyboardInterrupt:
        show("\nllmjax: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        show("llmjax: ended by SIGTERM", file=sys.stderr)
        return 143


@contextlib.contextmanager
def _terminable(alone: bool) -> Iterator[None]:
    """Lets SIGTERM end a mode in good order, as Ctrl-C does; training has its own way, and sets its own handlers."""
    from llmjax.train.loop.stop_request import end_on_second_interrupt

    def end(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if alone:
        end_on_second_interrupt()
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def console() -> None:
    """The command `llmjax`."""
    sys.exit(main(sys.argv, alone=True))


if __name__ == "__main__":
    console()
