from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mixadapters.training import collators
from mixadapters.training.collators import ObjectMaskingCollator, PairCollator, WithGeneralText

SENTENCES = ["The tower is located at Paris.", "Rio de Janeiro, in Brazil; {x} and {0}!", "a b c d e f g h i j"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wrap(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 64, **options})


def wordpiece(**options) -> PreTrainedTokenizerFast:
    """Words and punctuation apart; long words in pieces of at most four letters."""
    pieces = ["the", "tower", "is", "located", "at", "par", "##is", "rio", "de", "jan", "##eiro", "cat", "##egory"]
    pieces += list("abcdefghijklmnopqrstuvwxyz.,;!?{}()0") + [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    vocab = {name: i for i, name in enumerate(SPECIAL + pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrap(tokenizer, **options)


def byte_level(**options) -> PreTrainedTokenizerFast:
    """Tokens carry the space before them, and their offsets cover it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return wrap(tokenizer, **options)


@pytest.fixture(params=[wordpiece, byte_level], ids=["wordpiece", "byte_level"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return request.param()


def hidden_text(tokenizer, batch, row: int = 0) -> str:
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels != -100]).strip()


def characters(text: str) -> str:
    """Without what WordPiece does to a text."""
    return text.lower().replace(" ", "").replace("##", "")


# --- masked objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("The tower is located at Paris.", "Paris"),
        ("Paris, the tower", "Paris"),
        ("(Paris)", "Paris"),
        ("is Rio de Janeiro; at the tower", "Rio de Janeiro"),
        ("the {x} tower {0} {", "{x}"),
        ("the tower", "the tower"),
        ("b a. b", "a"),
    ],
)
def test_the_object_is_masked_and_nothing_else(tokenizer, text, target) -> None:
    start = text.index(target)
    batch = ObjectMaskingCollator(tokenizer)([{"text": text, "object": (start, start + len(target))}])
    whole = tokenizer(text, return_tensors="pt")["input_ids"]
    masked = batch["labels"] != -100
    assert characters(hidden_text(tokenizer, batch)) == characters(target)
    assert torch.equal(batch["input_ids"] == tokenizer.mask_token_id, masked)
    assert torch.equal(batch["labels"][masked], whole[masked])
    assert torch.equal(batch["input_ids"][~masked], whole[~masked])


def test_the_full_stop_after_the_object_stays() -> None:
    tokenizer = wordpiece()
    batch = ObjectMaskingCollator(tokenizer)([{"text": "The tower is located at Paris.", "object": "Paris"}])
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert tokens == ["[CLS]", "the", "tower", "is", "located", "at", "[MASK]", "[MASK]", ".", "[SEP]"]


def test_masking_is_the_same_under_padding(tokenizer) -> None:
    rows = [{"text": "at Paris.", "object": "Paris"}, {"text": "the tower is located at a.", "object": [0, 9]}]
    collator = ObjectMaskingCollator(tokenizer)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        together = collator(rows)
        assert (together["labels"][together["attention_mask"] == 0] == -100).all()
        for i, row in enumerate(rows):
            alone, valid = collator([row]), together["attention_mask"][i] == 1
            for name in ("input_ids", "labels"):
                assert torch.equal(together[name][i][valid], alone[name][0])


def test_triples_are_verbalised_with_braces_as_they_are() -> None:
    collator = ObjectMaskingCollator(byte_level(), "{{{subject}}} is located at {object}.")
    triple = {"subject": "{object} {0} {", "relation": "AtLocation", "object": "Paris {x}"}
    text, start, end = collator.locate(triple)
    assert text == "{{object} {0} {} is located at Paris {x}."
    assert text[start:end] == "Paris {x}"
    assert hidden_text(collator.tokenizer, collator([triple])) == "Paris {x}"


def test_the_object_of_a_triple_is_found_where_the_template_puts_it() -> None:
    collator = ObjectMaskingCollator(
        wordpiece(), {"AtLocation": "{subject} is at {object}.", "IsA": "{object}: {subject}"}
    )
    assert collator.locate({"subject": "a", "relation": "AtLocation", "object": "a"}) == ("a is at a.", 8, 9)
    assert collator.locate({"subject": "a", "relation": "IsA", "object": "a"}) == ("a: a", 0, 1)
    with pytest.raises(ValueError, match="relation='HasA' has no template"):
        collator.locate({"subject": "a", "relation": "HasA", "object": "a"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "the tower", "object": "Paris"}, "does not occur"),
        ({"text": "Paris is Paris", "object": "Paris"}, "occurs more than once"),
        ({"text": "the tower", "object": ""}, "does not occur"),
        ({"text": "the tower", "object": (3, 4)}, "covers no character"),
        ({"text": "the tower", "object": (4, 99)}, "covers no character"),
        ({"text": "the tower", "object": (1, 2, 3)}, "neither a string nor"),
        ({"text": "the tower"}, "neither a string nor"),
        ({"text": None, "object": "a"}, "not a string"),
        ({"text": "a category", "object": "cat"}, None),
        ({"text": "a tower", "object": "tow"}, "shares a token with 'er'"),
        ({"text": "a " * 62 + "Paris", "object": "Paris"}, "max_length"),
        ({"subject": "a", "object": "b"}, "neither 'text' nor a string in"),
        ({"subject": "a", "relation": "is", "object": " "}, "nothing to mask"),
    ],
)
def test_rows_without_a_clear_object_are_refused(row, message) -> None:
    collator = ObjectMaskingCollator(wordpiece())
    assert collator.usable(row) is (message is None)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            collator([row])


def test_text_is_cut_behind_the_object() -> None:
    row = {"text": "at Paris. " + "the tower " * 99, "object": "Paris"}
    assert ObjectMaskingCollator(wordpiece(), max_length=16)([row])["input_ids"].shape == (1, 16)
    assert ObjectMaskingCollator(wordpiece())([row])["input_ids"].shape == (1, 64)
    assert ObjectMaskingCollator(wordpiece(model_max_length=None))([row])["input_ids"].shape[1] > 64


@pytest.mark.parametrize(
    "template", ["{subject} is", "{object} {object}", "{object} {}", "{object!r}", "{tail} {object}"]
)
def test_bad_templates_are_refused(template) -> None:
    with pytest.raises(ValueError, match=r"must have \{object\} once"):
        ObjectMaskingCollator(wordpiece(), template)


def test_tokenizers_that_cannot_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="no mask_token"):
        ObjectMaskingCollator(wordpiece(mask_token=None))
    with pytest.raises(ValueError, match="no pad_token"):
        ObjectMaskingCollator(wordpiece(pad_token=None))
    with pytest.raises(ValueError, match="use_fast=True"):
        ObjectMaskingCollator(SimpleNamespace(is_fast=False, pad_token="[PAD]"))


# --- pairs ------------------------------------------------------------------------------------------------------


def test_partners_are_neighbours_in_one_batch(tokenizer) -> None:
    rows = [{"text": "the tower"}, {"text": "Paris", "positive": "Rio de Janeiro", "id": 3}]
    batch = PairCollator(tokenizer, max_length=16)(rows)
    texts = ["the tower", "the tower", "Paris", "Rio de Janeiro"]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_columns_that_a_dataset_fills_with_none_count_as_absent(tokenizer) -> None:
    pairs = PairCollator(tokenizer, max_length=16)
    filled = pairs([{"text": "the tower", "positive": None}, {"text": "Paris", "positive": "Rio"}])
    assert torch.equal(
        filled["input_ids"], pairs([{"text": "the tower"}, {"text": "Paris", "positive": "Rio"}])["input_ids"]
    )
    triple = {"subject": "the tower", "relation": "stands in", "object": "Paris"}
    other = {"text": "the heart is red", "object": "heart"}
    objects = ObjectMaskingCollator(tokenizer, max_length=16)
    filled = objects([{**triple, "text": None}, {**other, "subject": None, "relation": None}])
    for name, value in objects([triple, other]).items():
        assert torch.equal(filled[name], value), name


def test_pairs_are_cut_to_length() -> None:
    assert PairCollator(wordpiece(), 8)([{"text": "a " * 50}])["input_ids"].shape == (2, 8)
    assert PairCollator(wordpiece())([{"text": "a " * 99}])["input_ids"].shape == (2, 64)


def test_pairs_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns \['sentence'\] has text=None"):
        PairCollator(wordpiece())([{"sentence": "a"}])


# --- general text -----------------------------------------------------------------------------------------------

GENERAL = list("abcdefghij")


def mixed(seed: int = 0, batch_size: int = 4, general=GENERAL, **options) -> WithGeneralText:
    tokenizer = wordpiece()
    return WithGeneralText(PairCollator(tokenizer), general, tokenizer, 8, batch_size, seed, **options)


def drawn(collator: WithGeneralText, batches: int) -> list[str]:
    """The general texts, each one letter, of so many batches."""
    texts = []
    for _ in range(batches):
        ids = collator([{"text": "a tower"}])["old_input_ids"]
        texts += collator.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def test_general_text_joins_the_batch_padded_by_itself() -> None:
    collator = mixed(general=["a", "a b c d", "a b c d e f g h i j"], batch_size=3)
    batch = collator([{"text": "a tower"}])
    assert set(batch) >= {"input_ids", "attention_mask", "labels", "old_input_ids", "old_attention_mask"}
    assert batch["input_ids"].shape == (2, 4)
    assert batch["old_input_ids"].shape == batch["old_attention_mask"].shape == (3, 8)
    assert sorted(batch["old_attention_mask"].sum(1).tolist()) == [3, 6, 8]
    assert (batch["old_input_ids"][batch["old_attention_mask"] == 0] == collator.tokenizer.pad_token_id).all()


def test_general_text_is_drawn_without_replacement_in_new_orders() -> None:
    texts = drawn(mixed(), 10)
    turns = [texts[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(turn) == GENERAL for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4


def test_general_text_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = drawn(mixed(seed=3), 5)
    torch.manual_seed(2)
    assert drawn(mixed(seed=3), 5) == first
    assert drawn(mixed(seed=4), 5) != first


@pytest.mark.parametrize(
    "copy", [lambda collator: collator.state_dict(), lambda c: pickle.loads(pickle.dumps(c)).state_dict()]
)
def test_general_text_goes_on_after_resuming(copy) -> None:
    collator = mixed()
    drawn(collator, 4)
    state = copy(collator)
    rest = drawn(collator, 5)
    resumed = mixed()
    resumed.load_state_dict(state)
    assert drawn(resumed, 5) == rest


def test_state_of_another_order_is_refused() -> None:
    for other in (mixed(seed=1), mixed(batch_size=2), mixed(general=GENERAL[:5])):
        with pytest.raises(ValueError, match="would not go on"):
            mixed().load_state_dict(other.state_dict())


def test_processes_draw_disjoint_general_text(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        ranks.append(drawn(mixed(batch_size=5), 2))
    assert sorted(ranks[0][:5] + ranks[1][:5]) == GENERAL
    assert sorted(ranks[0][5:] + ranks[1][5:]) == GENERAL


def test_dataloader_workers_draw_disjoint_text_and_another_order_each_epoch() -> None:
    collator = mixed(batch_size=5)
    loader = DataLoader(
        [{"text": "a"}] * 4,
        batch_size=1,
        num_workers=2,
        collate_fn=collator,
        generator=torch.Generator().manual_seed(0),
    )
    epochs = [
        [collator.tokenizer.batch_decode(b["old_input_ids"], skip_special_tokens=True) for b in loader] for _ in "12"
    ]
    for batches in epochs:  # workers take turns
        assert sorted(batches[0] + batches[1]) == GENERAL
        assert sorted(batches[2] + batches[3]) == GENERAL
    assert epochs[0] != epochs[1]


def test_general_text_wraps_collators_of_transformers() -> None:
    tokenizer = wordpiece()
    collator = WithGeneralText(
        DataCollatorForLanguageModeling(tokenizer, seed=0), [{"text": "a"}] * 3, tokenizer, 8, 2
    )
    batch = collator([tokenizer("the tower"), tokenizer("a")])
    assert batch["labels"].shape == (2, 4)
    assert batch["old_input_ids"].shape == (2, 3)


def test_bad_general_text_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=11"):
        mixed(batch_size=11)
    with pytest.raises(TypeError, match="no length"):
        mixed(general=(text for text in GENERAL))
    with pytest.raises(ValueError, match="has text=None"):
        mixed(general=[None] * 4)([{"text": "a"}])
    with pytest.raises(ValueError, match="seed=-1"):
        mixed(seed=-1)
    tokenizer = wordpiece()
    with pytest.raises(ValueError, match="once"):
        WithGeneralText(mixed(), GENERAL, tokenizer, 8, 2)([{"text": "a"}])


def test_collators_need_no_datasets_package() -> None:
    assert "datasets" not in vars(collators)


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = {"text": "the heart is red", "object": "heart", "positive": "a heart"}
ROWS = [
    ([], "the batch has no rows"),
    ([GOOD, {"input_ids": [1]}], r"row 1 of the batch with the columns \['input_ids'\] .*remove_unused_columns=False"),
    ([GOOD, "the heart"], "row 1 of the batch is 'the heart', a str; a row maps columns"),
    ([GOOD, None], "row 1 of the batch is None"),
    ([GOOD, {**GOOD, "text": None}], "row 1 of the batch .* has text=None, not a string"),
    ([GOOD, {**GOOD, "text": "heart \ud800"}], "row 1 of the batch has text=.* with half of a surrogate pair"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS)
@pytest.mark.parametrize("kind", [ObjectMaskingCollator, PairCollator])
def test_bad_rows_are_named(kind, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind(wordpiece())(rows)


@pytest.mark.parametrize(
    "target", [(0.5, 2), ("0", "2"), (None, 2), (False, True), (0, 1, 2), {"start": 0}, None, "", "liver", 3]
)
def test_objects_that_are_no_span_are_named_with_their_row(target) -> None:
    with pytest.raises(ValueError, match="row 1 of the batch: object="):
        ObjectMaskingCollator(wordpiece())([GOOD, {**GOOD, "object": target}])


def test_an_object_that_overlaps_itself_is_not_clear() -> None:
    with pytest.raises(ValueError, match="'heh' occurs more than once in text='a heheh'"):
        ObjectMaskingCollator(wordpiece())([{"text": "a heheh", "object": "heh"}])


@pytest.mark.parametrize("name", ["text", "positive"])
@pytest.mark.parametrize("blank", ["", " \n"])
def test_blank_texts_are_no_pair(name, blank) -> None:
    with pytest.raises(ValueError, match=rf"row 1 of the batch has {name}=.* is blank; take such rows out: dataset"):
        PairCollator(wordpiece())([GOOD, {**GOOD, name: blank}])


@pytest.mark.parametrize("value", [0, -1, 2, 2.5, "8", True])
@pytest.mark.parametrize("name", ["max_length", "pad_to_multiple_of"])
@pytest.mark.parametrize("kind", [ObjectMaskingCollator, PairCollator])
def test_lengths_that_cut_or_pad_nothing_are_refused(kind, name, value) -> None:
    if (name, value) == ("pad_to_multiple_of", 2):
        kind(wordpiece(), **{name: value})
        return
    with pytest.raises(
        ValueError, match=f"{name}={value!r} must be an integer, at least {3 if name == 'max_length' else 1}"
    ):
        kind(wordpiece(), **{name: value})


@pytest.mark.parametrize("template", [3, {}, {"r": None}, ["{object}"], "{object", "", "{object!r}"])
def test_templates_that_cannot_be_read_are_named(template) -> None:
    with pytest.raises(ValueError, match="template="):
        ObjectMaskingCollator(wordpiece(), template=template)


@pytest.mark.parametrize("kind", [ObjectMaskingCollator, PairCollator])
def test_what_is_no_tokenizer_is_named(kind) -> None:
    with pytest.raises(ValueError, match="tokenizer='bert' is no tokenizer"):
        kind("bert")


class Counted(IterableDataset):
    """A stream that knows its length; torch gives it a __getitem__ that refuses."""

    def __iter__(self) -> Iterator[str]:
        return iter(["the heart", "a nerve"])

    def __len__(self) -> int:
        return 2


DRAWN = {"general": ["the heart", "a nerve"], "max_length": 8, "batch_size": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"general": "the heart"}, "general=str"),
        ({"general": {"text": ["the heart"]}}, "general=dict"),
        ({"general": iter(["the heart"])}, "general=list_iterator"),
        ({"general": Counted()}, "general=Counted has no length, or no texts by number"),
        ({"general": []}, "batch_size=1 must be from 1 to .* 0"),
        *(({"max_length": value}, "max_length=") for value in (0, 2, 2.5, "8", True)),
        *(({"batch_size": value}, "batch_size=") for value in (0, 3, 1.5, "1", True)),
        *(({"seed": value}, "seed=") for value in (-1, 0.5, None, True)),
        ({"collator": None}, "collator=None cannot be called"),
        ({"tokenizer": None}, "tokenizer=None is no tokenizer"),
    ],
)
def test_general_text_that_cannot_be_drawn_is_refused_at_once(given, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        WithGeneralText(**{"collator": dict, "tokenizer": wordpiece(), **DRAWN, **given})


@pytest.mark.parametrize("general", [[None], [3], [""], ["  "], [{"txt": "a"}], ["\ud800"]])
def test_general_rows_without_text_are_named(general) -> None:
    collator = WithGeneralText(dict, general, wordpiece(), max_length=8, batch_size=1)
    with pytest.raises(ValueError, match=r"general\[0\] "):
        collator([])


@pytest.mark.parametrize("made", [None, [1]])
def test_a_collator_that_makes_no_batch_is_named(made) -> None:
    collator = WithGeneralText(lambda _: made, ["the heart"], wordpiece(), max_length=8, batch_size=1)
    with pytest.raises(TypeError, match=f"returned a {type(made).__name__}, not a batch by name"):
        collator([])


@pytest.mark.parametrize("drawn", [None, -1, "3", 1.5, True])
def test_a_state_that_counts_nothing_is_refused(drawn) -> None:
    collator = WithGeneralText(dict, ["the heart"], wordpiece(), max_length=8, batch_size=1)
    with pytest.raises(ValueError, match="drawn="):
        collator.load_state_dict({**collator.state_dict(), "drawn": drawn})
    with pytest.raises(ValueError, match="is not what state_dict"):
        collator.load_state_dict(None)
    assert collator.state_dict()["drawn"] == 0
