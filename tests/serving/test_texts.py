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


class Words:
    """As Llama's: each token is a word with the space before it, which is left out of the first of all."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{i}" for i in ids if i).removeprefix(" ")


@pytest.mark.parametrize("prompt", [[], [0], [7], [0, *range(1, 20)]])
def test_text_goes_on_with_what_comes_before_it(prompt) -> None:
    detokenizer, words = Detokenizer(Words(), prompt), Words()
    text = "".join(detokenizer.add([i]) for i in (3, 0, 4)) + detokenizer.rest()
    assert words.decode(prompt, True) + text == words.decode([*prompt, 3, 4], True)


def test_a_text_that_ends_with_the_sign_of_what_is_unreadable_is_not_given_again() -> None:
    prompt = list("a\ufffd".encode())
    detokenizer = Detokenizer(Bytes(), prompt, whole=True)
    assert detokenizer.add(b"b") + detokenizer.rest() == "b"


def test_a_character_that_a_prompt_begins_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(Bytes(), [*b"a", 0xF0, 0x9F, 0x99])
    assert detokenizer.add([0x82]) + detokenizer.add(b"b") + detokenizer.rest() == "🙂b"


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
