"""Text out of token ids as they come, up to the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
BEFORE = 6  # tokens that come before a text and are decoded with its beginning: enough for the bytes of a character


class Detokenizer:
    """Token ids -> text, piece by piece. A character whose bytes are not all there waits for them.

    Args:
        after: the ids that the text continues. Many tokenizers leave out the space that the first of all tokens
            begins with.
        whole: whether these end with a whole character, as those of a text do.
    """

    def __init__(self, tokenizer: Any, after: Sequence[int] = (), whole: bool = False) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = list(after[-BEFORE:])
        self._start = 0  # decoded again from here, as spaces depend on the token before
        self._read = len(self._ids)  # given up to here
        while not whole and self._read and self._decode(self._ids[: self._read]).endswith(UNFINISHED):
            self._read -= 1  # a character that those have begun is of this text

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids add."""
        self._ids.extend(ids)
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What still waits, as it is."""
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class StopStrings:
    """Lets text through up to the first of some strings; the beginning of one waits until it is known to be none."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self.stopped = False
        self._waiting = ""

    def add(self, text: str) -> str:
        """What may be given of the text so far; nothing after a stop."""
        if self.stopped:
            return ""
        self._waiting += text
        found = [place for stop in self.stops if (place := self._waiting.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._waiting = self._waiting[: min(found)], ""
            return given
        keep = max((self._begun(stop) for stop in self.stops), default=0)
        given, self._waiting = self._waiting[: len(self._waiting) - keep], self._waiting[len(self._waiting) - keep :]
        return given

    def rest(self) -> str:
        given, self._waiting = self._waiting, ""
        return given

    def _begun(self, stop: str) -> int:
        """How many characters of a stop the text ends with."""
        most = min(len(stop) - 1, len(self._waiting))
        return next((n for n in range(most, 0, -1) if self._waiting.endswith(stop[:n])), 0)
