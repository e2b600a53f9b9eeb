"""The codec of QMoE: rows of ternary weights as 16-bit words of a fixed dictionary, without loss.

Source: Frantar and Alistarh 2023, QMoE (arXiv 2310.16795), section 4. A word stands for up to 14 pairs of weights. The
dictionary holds the 2^16 strings of pairs that are the most probable where each weight is 0 with probability 0.885.
It is closed under prefixes and has all single pairs, so that the longest word that fits is found step by step, and
there always is one. Words are numbered by length and then in lexicographic order, which is ours.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

WORDS = 2**16
LONGEST = 14  # pairs of a word
P_ZERO = 0.885  # of the weights for which the dictionary is made
PAIRS = 9  # of weights -1, 0, 1: the pair (a, b) is the number 3 (a mod 3) + (b mod 3), so 0 is two zeros
ROWS_AT_ONCE = 2**14  # which are encoded in step


class Dictionary(NamedTuple):
    """The words, and the automaton that finds them."""

    pairs: Tensor  # (WORDS, LONGEST) uint8, numbers of the pairs of each word, 0 after its end
    lengths: Tensor  # (WORDS,) int64, pairs of each word
    steps: Tensor  # (WORDS * PAIRS,) int32: word and pair -> the longer word; ~w: end it, and go on with w


class EncodedRows(NamedTuple):
    """R rows of `width` ternary weights."""

    words: Tensor  # (n,) uint16, row after row
    ends: Tensor  # (R,) int32, where the words of each row end
    width: int

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.ends.nbytes


def _words_of_length(pairs: int, probability: float) -> list[tuple[float, int, int, int]]:
    """(log probability, pairs, nonzero weights, count) of each class of equally probable words of so many pairs."""
    zero, other = math.log(probability), math.log((1 - probability) / 2)
    return [
        ((2 * pairs - n) * zero + n * other, pairs, n, math.comb(2 * pairs, n) * 2**n) for n in range(2 * pairs + 1)
    ]


def _room() -> dict[tuple[int, int], int]:
    """(pairs, nonzero weights) -> how many words of that class the dictionary holds: the most probable ones."""
    classes = [entry for pairs in range(1, LONGEST + 1) for entry in _words_of_length(pairs, P_ZERO)]
    room, left = {}, WORDS
    for _, pairs, nonzero, count in sorted(classes, reverse=True):
        room[pairs, nonzero] = min(count, left)
        left -= room[pairs, nonzero]
    return room


class PackedRows(NamedTuple):
    """R rows of `width` ternary weights, five to a byte."""

    digits: Tensor  # (R, ceil(width / 5)) uint8
    width: int

    @property
    def nbytes(self) -> int:
        return self.digits.nbytes


@functools.cache
def dictionary() -> Dictionary:
    """The dictionary, made level by level: a word's prefixes are more probable than it is, so they are in it."""
    room = _room()
    nonzeros = torch.tensor([(a > 0) + (b > 0) for a in range(3) for b in range(3)])
    strings, counts = torch.zeros(1, 0, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    numbers = torch.tensor([-1])  # of the words in `strings`; the empty one is none
    words, lengths = [], []
    steps = torch.full((WORDS, PAIRS), -1, dtype=torch.int32)
    made = 0
    for length in range(1, LONGEST + 1):
        parents = numbers.repeat_interleave(PAIRS)
        last = torch.arange(PAIRS).repeat(len(strings))
        counts = counts.repeat_interleave(PAIRS) + nonzeros[last]
        strings = torch.cat([strings.repeat_interleave(PAIRS, 0), last.to(torch.uint8).unsqueeze(1)], 1)
        kept = torch.zeros(len(strings), dtype=torch.bool)
        for nonzero in range(2 * length + 1):
            kept[(counts == nonzero).nonzero()[: room[length, nonzero], 0]] = True
        strings, counts, parents, last = strings[kept], counts[kept], parents[kept], last[kept]
        numbers = torch.arange(made, made + len(strings))
        if length > 1:
            steps[parents, last] = numbers.int()
        made += len(strings)
        words.append(torch.nn.functional.pad(strings, (0, LONGEST - length)))
        lengths.append(torch.full((len(strings),), length))
    ends = ~torch.arange(PAIRS, dtype=torch.int32).expand(WORDS, PAIRS)  # words of one pair have its number
    return Dictionary(torch.cat(words), torch.cat(lengths), torch.where(steps < 0, ends, steps).flatten())


def encode(trits: Tensor) -> EncodedRows:
    """Ternary rows as words.

    Args:
        trits: (R, W) int8 of -1, 0 and 1, any W above 0.

    Raises:
        ValueError: another shape or other values, or more words than 32 bits number.
    """
    _check(trits)
    parts = [_encode(rows) for rows in trits.cpu().split(ROWS_AT_ONCE)]
    words, counts = torch.cat([words for words, _ in parts]), torch.cat([counts for _, counts in parts])
    if len(words) >= 2**31:
        raise ValueError(f"{len(words)} words are more than one tensor may have; encode fewer rows at a time")
    return EncodedRows(words, counts.cumsum(0).int(), trits.shape[1])


def _check(trits: Tensor) -> None:
    if trits.dim() != 2 or trits.shape[1] == 0:
        raise ValueError(f"trits {tuple(trits.shape)} must be rows (R, W) of at least one weight")
    if trits.dtype != torch.int8 or bool(((trits > 1) | (trits < -1)).any()):
        raise ValueError(f"trits ({trits.dtype}) must be int8 numbers of -1, 0 and 1: quantize the weights first")


def _encode(trits: Tensor) -> tuple[Tensor, Tensor]:
    """The words of some rows, and how many each row has. All rows go through the automaton in step."""
    numbers = (torch.nn.functional.pad(trits, (0, trits.shape[1] % 2)) % 3).int()
    pairs = (3 * numbers[:, 0::2] + numbers[:, 1::2]).t().contiguous()  # (P, R)
    steps, state = dictionary().steps, pairs[0]
    ended = torch.full_like(pairs, -1)
    for place in range(1, len(pairs)):
        after = steps[state * PAIRS + pairs[place]]
        ends = after < 0
        ended[place - 1] = torch.where(ends, state, -1)
        state = torch.where(ends, ~after, after)
    ended[-1] = state
    by_row = ended.t()
    return by_row[by_row >= 0].to(torch.uint16), (ended >= 0).sum(0)


def decode(rows: EncodedRows) -> Tensor:
    """(R, W) int8 ternary weights.

    Raises:
        ValueError: the parts do not belong together, as in a file that was changed.
    """
    words, ends, width = rows
    if words.dtype != torch.uint16 or ends.dtype != torch.int32 or words.dim() != 1 or ends.dim() != 1 or width < 1:
        raise ValueError("encoded rows have words (n,) of uint16, ends (R,) of int32, and a width of 1 or more")
    found, counts = dictionary(), ends.cpu().long().diff(prepend=torch.zeros(1, dtype=torch.long))
    if bool((counts < 0).any()) or (int(ends[-1]) if len(ends) else 0) != len(words):
        raise ValueError(f"encoded rows: the ends of rows do not part {len(words)} words")
    numbers = words.cpu().long()
    lengths, pairs = found.lengths[numbers], (width + 1) // 2
    sums = torch.zeros(len(ends), dtype=torch.long).scatter_add(
        0, torch.repeat_interleave(torch.arange(len(ends)), counts), lengths
    )
    if bool((sums != pairs).any()):
        raise ValueError(f"encoded rows: words of a row stand for other than {pairs} pairs, which width {width} has")
    real = torch.arange(LONGEST) < lengths.unsqueeze(1)
    flat = found.pairs[numbers][real].view(len(ends), pairs)
    trits = torch.stack([flat // 3, flat % 3], 2).view(len(ends), 2 * pairs).to(torch.int8)
    trits = torch.where(trits == 2, -1, trits)
    if width % 2 and bool(trits[:, -1].any()):
        raise ValueError("encoded rows: what fills up an odd width is not 0")
    return trits[:, :width].contiguous()


def pack(trits: Tensor) -> PackedRows:
    """Ternary rows (R, W) int8, five weights to a byte: the plain form, for rows of few zeros, and for narrow ones."""
    _check(trits)
    digits = torch.nn.functional.pad(trits.cpu(), (0, -trits.shape[1] % 5)) % 3
    powers = torch.tensor([81, 27, 9, 3, 1])
    return PackedRows((digits.unflatten(1, (-1, 5)).long() * powers).sum(2).to(torch.uint8), trits.shape[1])


def unpack(rows: PackedRows) -> Tensor:
    """(R, W) int8 ternary weights. Raises ValueError where the parts do not belong together."""
    digits, width = rows
    if digits.dtype != torch.uint8 or digits.dim() != 2 or width < 1 or digits.shape[1] != (width + 4) // 5:
        raise ValueError(f"packed rows of width {width} have ceil(width / 5) bytes each, not {tuple(digits.shape)}")
    if bool((digits > 242).any()):
        raise ValueError("packed rows: a byte above 242 is no five ternary weights")
    numbers = digits.cpu().long().unsqueeze(2) // torch.tensor([81, 27, 9, 3, 1]) % 3
    trits = torch.where(numbers == 2, -1, numbers).to(torch.int8).flatten(1)
    if bool(trits[:, width:].any()):
        raise ValueError("packed rows: what fills up a row is not 0")
    return trits[:, :width].contiguous()
