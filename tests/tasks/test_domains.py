"""What stage 1 reads: texts in parts of a length that a model takes."""

from __future__ import annotations

import pytest

from mixadapters.tasks.domains import key, split_text, unique


def test_texts_are_cut_into_sentences_and_what_is_short_is_dropped() -> None:
    assert list(split_text("One two three four five. One two three four! Is this a sentence, too?")) == [
        "One two three four five.",
        "Is this a sentence, too?",
    ]


@pytest.mark.parametrize(("words", "lengths"), [(60, [60]), (64, [60]), (65, [60, 5]), (125, [60, 60, 5])])
def test_long_sentences_are_cut_into_parts_of_sixty_words(words: int, lengths: list[int]) -> None:
    text = " ".join(f"w{i}" for i in range(words))
    parts = list(split_text(text))
    assert [len(part.split()) for part in parts] == lengths
    assert text.startswith(" ".join(parts))


def test_texts_that_differ_in_case_digits_and_punctuation_alone_are_one() -> None:
    assert key("The 3rd, of 4!") == "the rd of"
    assert unique(["One thing.", "one thing 2", "Another"]) == ["One thing.", "Another"]
