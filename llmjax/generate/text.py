"""From tokens to the text that is sent: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from llmjax.data.tokenizer.tokenizer import StreamDecoder, Tokenizer


class StoppedText:
    """The text of tokens that come one by one, up to the first of the strings `stops` in it.

    What may be the beginning of a stop string is held back until it is known. `continues` says that the tokens go on
    after others, so that a space at their beginning belongs to the text.

    stopped  whether a stop string has come; nothing is to be written after it
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = False):
        self._decoder = StreamDecoder(tokenizer, continues)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token: often some characters, sometimes none."""
        return self._take(self._decoder.push(token), at_end=False)

    def flush(self) -> str:
        """The rest of the text, at its end. Bytes that are no whole character are U+FFFD."""
        return self._take(self._decoder.flush(), at_end=True)

    def _take(self, text: str, at_end: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = 0 if at_end else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def until_stop(text: str, stops: Sequence[str]) -> str:
    """A whole text up to the first of the strings in it."""
    return text[: min([len(text), *(place for place in map(text.find, stops) if place >= 0)])]


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that `stop` begins with, less than all of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
