"""A terminal of a given width for tests, and what a person sees on it."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
import threading


class Screen:
    """Everything that was written to a pseudo-terminal, which stands for standard error."""

    def __init__(self, columns, lines=24):
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.stream = os.fdopen(theirs, "w", buffering=1)
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        # Reading fails once the other end is closed.
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65536):
                self._written += data

    def close(self):
        self.stream.close()
        self._reader.join()
        os.close(self._ours)

    @property
    def drawings(self):
        """Every state of a line that was drawn and is not blank."""
        return [text for text in self._written.decode().replace("\n", "\r").split("\r") if text.strip()]

    @property
    def last(self):
        """What the line of the cursor shows at the end."""
        line = ""
        for text in self._written.decode().split("\n")[-1].split("\r"):
            line = text + line[len(text) :]
        return line.strip()


@contextlib.contextmanager
def screen(monkeypatch, columns, lines=24):
    """A screen of `columns` and `lines` in place of standard error; it can be read after the `with` block."""
    shown = Screen(columns, lines)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", shown.stream)
        try:
            yield shown
        finally:
            shown.close()
