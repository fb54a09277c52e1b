"""The sink TensorBoard: event files in `tensorboard/` of a workdir, with curves and the texts sampled by the run."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from llmjax.escapes import escape_surrogates
from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import Opening

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files, see `contract.Sink`."""

    def __init__(self, opening: Opening):
        self._folder, self._opened = opening.workdir / FOLDER, 0
        self._open(opening.update)

    def _open(self, update: int) -> None:
        # Imported late, because the parameters of a new run are made, and its step compiles, before this is needed.
        with _without_torch():
            from tensorboardX import SummaryWriter

        self._opened += 1
        self._writer = SummaryWriter(
            str(self._folder),
            # TensorBoard drops what it read before at this step and later ones.
            purge_step=update + 1,
            flush_secs=10,
            # By default tensorboardX names a file by the second: two files of one second would be the same.
            filename_suffix=f".{update}.{os.getpid()}.{self._opened}",
        )

    def numbers(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, update)

    def samples(self, update: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples, 1):
            prompt = (
                f"**after the prompt**\n\n{_verbatim(sample.prompt)}"
                if sample.prompt
                else "**without a prompt**"
            )
            text = f"{prompt}\n\n**the model wrote**\n\n{_verbatim(sample.text)}"
            self._writer.add_text(f"sample/{number}", escape_surrogates(text), update)

    def rewind(self, update: int) -> None:
        self._writer.close()
        self._open(update)

    def flush(self) -> None:
        self._writer.flush()

    def summarize(self, results: Mapping[str, float]) -> None:
        """The curves end with the results."""

    def close(self, failed: bool) -> None:
        self._writer.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """A context manager in which torch cannot be imported, unless it is already.

    tensorboardX imports torch where it is installed, which takes seconds, and does without it where it is not.
    """
    if "torch" in sys.modules:
        yield
        return
    # An import of a module that is None here fails as that of one which is not installed.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _verbatim(text: str) -> str:
    """`text` as Markdown that shows it as it is. The Text tab would otherwise take a `#` of it for a headline."""
    # Lines indented by four spaces are a block of code, whatever they contain. A fence could be closed by the text.
    return "\n".join(f"    {line}" for line in re.split("\r\n|\r|\n", text))
