"""The items of one JSON array, one after the other, however large the file is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 1 << 20  # characters read at once, and more where an item is longer
_BLANKS = " \t\n\r"


def begins_array(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a JSON array, not of an object a line."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def array_items(stream: IO[str]) -> Iterator[Any]:
    """Decode the items of the array that the stream holds, one at a time.

    Raises:
        ValueError: it is not one array; the message counts the items before.
    """
    text = _Text(stream)
    text.take("[")
    count = 0
    while (following := text.peek()) != "]":
        try:
            if count:
                text.take(",")
            item = text.item()
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            where = "the end" if not following else f"item {count + 1} of the array"
            raise ValueError(f"{where}: {reason}") from None
        count += 1
        yield item
    text.take("]")
    if text.peek():
        raise ValueError(f"more follows behind the array of {count} items")


class _Text:
    """What has been read of a stream and not been used yet."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise ValueError(
                f"{character!r} is expected, not {found!r}" if found else "it is cut off"
            )
        self._at += 1

    def item(self) -> Any:
        """The JSON value that begins here."""
        self.peek()
        while True:
            try:
                item, end = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if self._more():
                    continue
                raise
            # a number goes on in what has not been read yet
            if end < len(self._text) or not self._more():
                self._at = end
                return item

    def _more(self) -> bool:
        """Read on, twice as much as is here already, so that a long item costs no square."""
        read = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        if read:
            self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)
