"""Tables of routes: what they refuse, and how tokens are spelt."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixadapters import MixDAConfig, MoAConfig
from mixadapters.surgery.layers import expert_layers
from mixadapters.surgery.tracing import LayerRoutes, RouteTable, heaviest, routes, spelling


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
        (lambda: RouteTable([["x"]], [], [1]), r"labels=\[1\] must be a list with one string for each text"),
    ],
)
def test_what_does_not_fit_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- of models ----------------------------------------------------------------------------------------------------

TEXTS = ["the cell divides", "a", "return x if x else y"]


class Letters:
    """A tokenizer by letters, of no language."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def by_hand(model, layer, text: str):
    """Indices and weights (T, k) of one text that runs alone."""
    seen = []
    ids = torch.tensor([Letters()(text)["input_ids"]])
    with torch.no_grad(), layer.watch(seen.append):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    (routed,) = seen
    order = routed.weights.float().sort(dim=1, descending=True, stable=True).indices
    return routed.indices.gather(1, order), routed.weights.gather(1, order)


@pytest.mark.parametrize("kind", ["adapter", "base"])
def test_routes_are_those_of_each_text_alone(tiny, kind) -> None:
    if kind == "adapter":
        model = get_peft_model(tiny("llama"), MoAConfig(num_experts=4, num_experts_per_tok=2, task_type="CAUSAL_LM"))
    else:
        model = tiny("mixtral")
    model.train()
    model.get_submodule("model").eval()  # a part that stays as it is
    trains = [module.training for module in model.modules()]
    found = routes(model, Letters(), TEXTS, labels=["x", "y", "x"], batch=2)
    assert [module.training for module in model.modules()] == trains
    layers = expert_layers(model)
    assert [layer.key for layer in found.layers] == [layer.key for layer in layers]
    assert [len(text) for text in found.tokens] == list(map(len, TEXTS))
    assert found.labels == ["x", "y", "x"]
    model.eval()
    for layer, mine in zip(layers, found.layers, strict=True):
        assert mine.names == layer.names
        for i, text in enumerate(TEXTS):
            indices, weights = by_hand(model, layer, text)
            assert torch.equal(mine.experts[i], indices)
            torch.testing.assert_close(mine.weights[i], weights.float(), atol=1e-5, rtol=1e-4)
        assert len(mine.experts[0].unique()) > 1


def test_the_frozen_layer_is_one_of_those_that_take_tokens(tiny) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["law", "code"]))
    found = routes(model, Letters(), TEXTS)
    assert found.layers
    for layer in found.layers:
        assert layer.names == ("law", "code", "frozen")
        for weights in layer.weights:
            torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


def test_layers_of_one_router_have_one_entry(tiny) -> None:
    config = MoAConfig(num_experts=4, router_scope="block", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny("llama"), config)
    assert len(expert_layers(model)) == 8
    assert len(routes(model, Letters(), TEXTS).layers) == 4


def test_an_encoder_decoder_reads_on_both_sides(tiny) -> None:
    model = get_peft_model(tiny("t5"), MoAConfig(num_experts=2, expert_type="bottleneck", task_type="SEQ_2_SEQ_LM"))
    found = routes(model, Letters(), TEXTS)
    stacks = {layer.key.split(".")[0] for layer in found.layers}
    assert stacks == {"encoder", "decoder"}


def test_a_length_cuts_texts_and_only_then(tiny) -> None:
    model = tiny("mixtral", max_position_embeddings=16)
    assert [len(text) for text in routes(model, Letters(), TEXTS, length=7).tokens] == [7, 1, 7]
    with pytest.raises(ValueError, match="text 2 has 20 tokens, but the model reads 16: pass length=16"):
        routes(model, Letters(), TEXTS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "one text or more"), ("abc", "must be a list"), (["a", ""], "text 1, '', has no tokens")],
)
def test_texts_that_are_none_are_refused(tiny, texts, message) -> None:
    with pytest.raises(ValueError, match=message):
        routes(tiny("mixtral"), Letters(), texts)


def test_labels_are_counted_before_anything_runs(tiny) -> None:
    with pytest.raises(ValueError, match="labels: 1 for 3 texts"):
        routes(tiny("mixtral"), None, TEXTS, labels=["x"])


@pytest.mark.parametrize("options", [{"batch": -1}, {"length": -1}, {"top": 0}, {"labels": "abc"}])
def test_numbers_that_would_drop_tokens_or_texts_are_refused(tiny, options) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.* must be"):
        routes(tiny("mixtral"), Letters(), TEXTS, **options)


def test_a_model_without_experts_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        routes(tiny("llama"), Letters(), TEXTS)


def test_nothing_is_left_at_the_model_after_an_error(tiny) -> None:
    model = tiny("mixtral")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        routes(model, Letters(), TEXTS)
    handle.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
