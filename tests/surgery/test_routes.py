"""Tables of routes: what they refuse, and how tokens are spelt."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixadapters.surgery.routes import LayerRoutes, RouteTable, heaviest, spelling


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token, as in a byte-level BPE that has learned nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece: "##" continues a word."""
    words = ["[UNK]", "cell", "di", "##vide", "##s", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("text", ["a  b\n\tc", "naïve 😀 ok", "😀😀", "end é"])
def test_tokens_together_are_the_text(text) -> None:
    tokenizer = bytes_tokenizer()
    found = spelling(tokenizer, tokenizer(text)["input_ids"])
    assert len(found) == len(text.encode())
    assert "".join(found) == text


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    assert spelling(bytes_tokenizer(), bytes_tokenizer()("é!")["input_ids"]) == ["", "é", "!"]


def test_bytes_that_are_no_character_are_told() -> None:
    tokenizer = bytes_tokenizer()
    lone = tokenizer("😀")["input_ids"][0]
    found = spelling(tokenizer, [lone] * 20 + tokenizer("ok")["input_ids"])
    assert len(found) == 22
    assert found[:20] != [""] * 20
    assert "".join(found) == tokenizer.decode([lone] * 20) + "ok"


def test_pieces_of_a_word_stand_together() -> None:
    tokenizer = pieces_tokenizer()
    assert spelling(tokenizer, tokenizer("cell divides .")["input_ids"]) == ["cell", " di", "vide", "s", " ."]


def test_a_long_text_is_spelt_in_one_pass() -> None:
    tokenizer, read = bytes_tokenizer(), []

    class Counted:
        def decode(self, ids, **options):
            read.append(len(ids))
            return tokenizer.decode(ids, **options)

    spelling(Counted(), tokenizer("word " * 200)["input_ids"])
    assert max(read) < 20


def test_the_heaviest_come_first_and_none_last() -> None:
    weights = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.9]])
    indices = torch.tensor([[4, 2, 0], [1, 3, -1]])
    experts, kept = heaviest(weights, indices)
    assert experts.tolist() == [[2, 0, 4], [1, 3, -1]]
    assert kept.tolist() == [pytest.approx([0.7, 0.2, 0.1]), pytest.approx([0.5, 0.3, 0.0])]
    experts, kept = heaviest(weights, top=2)
    assert experts.tolist() == [[1, 2], [2, 0]]
    assert kept.shape == (2, 2)


def layer(experts: list, weights: list | None = None, names: tuple[str, ...] = ("a", "b")) -> LayerRoutes:
    ids = [torch.tensor(of) for of in experts]
    return LayerRoutes("m.0", names, ids, [torch.ones(i.shape) for i in ids] if weights is None else weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layer([[[0], [2]]]), r"m\.0, text 0: experts between 0 and 2; they are numbered from 0 to 1"),
        (lambda: layer([[[0], [-2]]]), "and -1 is none"),
        (lambda: layer([[0, 1]]), r"experts \(2,\) and weights \(2,\) must both be \(T, k\)"),
        (lambda: layer([[[0], [1]]], [torch.tensor([[1.0], [torch.nan]])]), "infinite or no number"),
        (lambda: RouteTable([["x"]], [layer([[[0], [1]]])]), r"texts of \[2\] tokens, but the texts have \[1\]"),
        (lambda: RouteTable([["x"]], [], ["one", "two"]), "labels: 2 for 1 texts"),
    ],
)
def test_what_does_not_fit_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
