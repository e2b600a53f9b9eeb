"""QMoE's codec, against its definition: the most probable words, found greedily, and back without loss."""

from __future__ import annotations

import heapq
import math

import pytest
import torch

from mixadapters.surgery.codec import (
    LONGEST,
    P_ZERO,
    WORDS,
    EncodedRows,
    PackedRows,
    decode,
    dictionary,
    encode,
    pack,
    unpack,
)

PROBABILITY = {0: P_ZERO, 1: (1 - P_ZERO) / 2, 2: (1 - P_ZERO) / 2}


def words() -> list[tuple[int, ...]]:
    found = dictionary()
    return [tuple(w[:n]) for w, n in zip(found.pairs.tolist(), found.lengths.tolist(), strict=True)]


def draw(rows: int, width: int, zeros: float = 0.6, seed: int = 0) -> torch.Tensor:
    u = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.where(u < zeros, 0, torch.where(u < (1 + zeros) / 2, 1, -1)).to(torch.int8)


def test_the_dictionary_is_closed_under_prefixes_and_has_every_pair() -> None:
    have = words()
    assert len(set(have)) == len(have) == WORDS
    assert {(pair,) for pair in range(9)} <= set(have)
    assert {word[:-1] for word in have if len(word) > 1} <= set(have)
    assert max(map(len, have)) == LONGEST


def test_the_dictionary_holds_the_most_probable_words() -> None:
    pair = [math.log(PROBABILITY[a] * PROBABILITY[b]) for a in range(3) for b in range(3)]
    waiting, best = [(0.0, ())], []
    while len(best) <= WORDS:  # the empty word is none
        cost, word = heapq.heappop(waiting)
        best.append(cost)
        if len(word) < LONGEST:
            for p, log in enumerate(pair):
                heapq.heappush(waiting, (cost - log, (*word, p)))
    ours = sorted(-sum(pair[p] for p in word) for word in words())
    assert ours == pytest.approx(best[1:], abs=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 27, 28, 29, 64, 257])
@pytest.mark.parametrize(("there", "back"), [(encode, decode), (pack, unpack)])
def test_what_is_encoded_comes_back(width: int, there, back) -> None:
    for zeros in (0.0, 0.6, 1.0):
        trits = draw(6, width, zeros, width)
        assert torch.equal(back(there(trits)), trits)
    assert back(there(draw(0, width))).shape == (0, width)


def test_each_word_is_the_longest_that_fits() -> None:
    trits = draw(3, 75, 0.8)
    have, number = words(), {word: i for i, word in enumerate(words())}
    expected = []
    for row in torch.nn.functional.pad(trits, (0, 1)).tolist():
        left = tuple(3 * (a % 3) + b % 3 for a, b in zip(row[::2], row[1::2], strict=True))
        while left:
            size = next(n for n in range(LONGEST, 0, -1) if left[:n] in number and len(left) >= n)
            expected.append(number[left[:size]])
            left = left[size:]
    assert encode(trits).words.long().tolist() == expected
    assert len(have[expected[0]]) > 1


def test_rows_of_many_zeros_take_less_than_a_bit_and_those_of_few_more_than_when_packed() -> None:
    sparse, dense = draw(32, 4096, 0.885), draw(32, 4096, 0.45)
    assert encode(sparse).nbytes * 8 / sparse.numel() < 0.78
    assert encode(dense).nbytes > pack(dense).nbytes == 32 * 820


def test_trits_that_are_none_are_refused() -> None:
    for wrong in (torch.full((2, 3), 2, dtype=torch.int8), torch.zeros(2, 3), torch.full((1, 1), -128).to(torch.int8)):
        with pytest.raises(ValueError, match="must be int8 numbers of -1, 0 and 1"):
            encode(wrong)
    with pytest.raises(ValueError, match="must be rows"):
        pack(torch.zeros(2, 0, dtype=torch.int8))


def test_codes_that_were_changed_are_refused() -> None:
    rows = encode(draw(4, 31))
    halved = rows.ends.clone()
    halved[0] += 1
    changed = rows.words.int().flip(0).to(torch.uint16)
    for wrong in (
        EncodedRows(rows.words[:-1], rows.ends, 31),
        EncodedRows(rows.words, halved, 31),
        EncodedRows(rows.words, -rows.ends, 31),
        EncodedRows(changed, rows.ends, 31),
        EncodedRows(rows.words, rows.ends, 33),
        EncodedRows(rows.words.int(), rows.ends, 31),
        EncodedRows(encode(torch.ones(1, 32, dtype=torch.int8)).words, torch.tensor([2]).int(), 31),
    ):
        with pytest.raises(ValueError, match="encoded rows"):
            decode(wrong)
    packed = pack(draw(4, 31))
    for wrong in (PackedRows(packed.digits, 36), PackedRows(packed.digits.long(), 31),
                  PackedRows(torch.full_like(packed.digits, 243), 31), PackedRows(packed.digits + 1, 31)):  # fmt: skip
        with pytest.raises(ValueError, match="packed rows"):
            unpack(wrong)


def test_what_fills_up_an_odd_width_must_be_nothing() -> None:
    rows = draw(3, 6)
    rows[1, 5] = 1
    with pytest.raises(ValueError, match="what fills up an odd width is not 0"):
        decode(encode(rows)._replace(width=5))
    rows[:, 5] = 0
    assert torch.equal(decode(encode(rows)._replace(width=5)), rows[:, :5])
