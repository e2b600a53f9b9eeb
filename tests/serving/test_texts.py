"""Text out of token ids as they come."""

from __future__ import annotations

import random

import pytest

from mixadapters.serving.texts import Detokenizer, StopStrings


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🙂!", "🙂🙂🙂"])
def test_pieces_are_the_whole_and_no_character_is_broken(text, seed) -> None:
    rng, ids = random.Random(seed), [*text.encode(), 256]
    detokenizer, pieces = Detokenizer(Bytes()), []
    while ids:
        taken = rng.randint(1, 3)
        pieces.append(detokenizer.add(ids[:taken]))
        ids = ids[taken:]
    pieces.append(detokenizer.rest())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_character_that_never_ends_comes_at_the_end() -> None:
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.add([*b"a", 0xF0, 0x9F]) == ""
    assert detokenizer.rest() == "a\ufffd"
    assert detokenizer.rest() == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "stops", "given"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaaab", ["aab"], "aa"),
        ("one two", ["twos"], "one two"),
        ("one two", [], "one two"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_comes_up_to_the_first_stop(text, stops, given, seed) -> None:
    rng, stopping, pieces, rest = random.Random(seed), StopStrings(stops), [], text
    while rest:
        taken = rng.randint(1, 4)
        pieces.append(stopping.add(rest[:taken]))
        rest = rest[taken:]
    assert "".join(pieces) + stopping.rest() == given
    assert stopping.stopped == (given != text)
