"""Batches and scores: independent of padding and of the batch, equal to what one row at a time gives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaModel

from mixadapters.tasks import baselines, get_task
from mixadapters.tasks.metrics import score
from mixadapters.tasks.models import Base, LikelihoodRanker
from mixadapters.tasks.sources import Example, read_task


@torch.no_grad()
def logits(base, model, examples):
    return model.eval()(**base.collate(base.features(examples, training=False))).logits


KINDS = ("encoder", "decoder", "t5", "bart")


@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(KINDS, ("imdb", "commonsenseqa", "fever")), ("encoder", "stsb")],  # the others give no score
)
def test_scores_do_not_depend_on_the_batch(request, data, name, kind) -> None:
    task = get_task(name)
    base = Base(str(request.getfixturevalue(kind)), task, max_length=32)
    model = base.load()
    model = model if kind == "encoder" else LikelihoodRanker(model)
    examples = [Example((e.texts[0][: 9 + 8 * i], *e.texts[1:]), e.target, e.choices)
                for i, e in enumerate(read_task(task, data)["train"][:5])]  # fmt: skip
    together = logits(base, model, examples)
    for row, example in zip(together, examples, strict=True):
        alone = logits(base, model, [example])[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert (row[len(alone) :] < -1e30).all()  # choices that the row does not have


def test_ranker_gives_the_log_likelihood_of_each_completion(decoder, data) -> None:
    base = Base(str(decoder), get_task("fever"), max_length=32)
    lm = AutoModelForCausalLM.from_pretrained(decoder).eval()
    example = read_task(base.task, data)["train"][0]
    expected = []
    for word in base.task.said:
        ids = torch.tensor([[2, *base._ids(base.task.prompt(example.texts)), *base._ids(word)]])
        count = len(base._ids(word))
        with torch.no_grad():
            probs = lm(ids).logits[0].log_softmax(-1)
        expected.append(sum(probs[-count - 1 + i, ids[0, -count + i]] for i in range(count)))
    found = logits(base, LikelihoodRanker(lm), [example])[0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_training_text_is_labelled_after_the_prompt_only(decoder, data) -> None:
    base = Base(str(decoder), get_task("trex_slotfilling"), max_length=32)
    examples = read_task(base.task, data)["train"][:2]
    batch = base.collate(base.features(examples, training=True))
    for labels, ids, example in zip(batch["labels"], batch["input_ids"], examples, strict=True):
        kept = labels[labels != -100]
        assert kept.tolist() == [*base._ids(example.target[0]), 3]
        assert ids[labels != -100].tolist() == kept.tolist()


def test_prompts_are_padded_on_the_left_and_cut_on_the_left(decoder) -> None:
    base = Base(str(decoder), get_task("trex_slotfilling"), max_length=6)
    batch = base.collate(base.features([Example(("bad bel",), ("x",)), Example(("bad " * 9,), ("x",))], False))
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [1] * 7]
    assert batch["input_ids"][1, -1] == base._ids(":")[0]


def test_loss_of_a_head_is_that_of_its_task(encoder, data) -> None:
    def squared(scores, labels):
        return (scores[:, 0] - labels).square().mean()

    for name, loss in (("imdb", torch.nn.functional.cross_entropy), ("stsb", squared)):
        base = Base(str(encoder), get_task(name))
        batch = base.collate(base.features(read_task(base.task, data)["train"][:4], training=True))
        output = base.load().eval()(**batch)
        torch.testing.assert_close(output.loss, loss(output.logits, batch["labels"]))
        assert batch["labels"].max() <= 1  # scores are from 0 to 5


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("encoder", "trex_slotfilling", "wants text"),
        ("decoder", "stsb", "wants a score: take an encoder"),
        ("t5", "stsb", "wants a score: take an encoder, not model_type='t5'"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused(request, kind, name, message) -> None:
    with pytest.raises(ValueError, match=message):
        Base(str(request.getfixturevalue(kind)), get_task(name))


def test_positions_begin_behind_padding_where_a_model_has_them_so(tmp_path, encoder, t5) -> None:
    config = RobertaConfig(vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, max_position_embeddings=34, pad_token_id=1)  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    base = Base(str(tmp_path), get_task("imdb"), max_length=32)
    base.check_length(0)
    row = Example(("bad " * 99,), 0)
    assert base.load()(**base.collate(base.features([row], training=False))).logits.isfinite().all()
    with pytest.raises(ValueError, match="has 32 positions, too few for 33 of --max-length; pass less"):
        Base(str(tmp_path), get_task("imdb"), max_length=33).check_length(0)
    Base(str(t5), get_task("imdb"), max_length=10_000).check_length(0)  # positions relative to each other: any number


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(decoder) -> None:
    base = Base(str(decoder), get_task("commonsenseqa"), max_length=6)
    assert base.features([Example(("bad",), 0, ("mit " * 5, "kog"))], False)
    with pytest.raises(ValueError, match="an answer of 6 tokens leaves no room in --max-length 6; pass more"):
        base.features([Example(("bad",), 0, ("mit " * 6, "kog"))], False)


# --- encoder-decoders ------------------------------------------------------------------------------------------------

START = {"t5": 0, "bart": 3}  # the token that a decoder begins with
WRITTEN = {"t5": [], "bart": [2]}  # and what every answer begins with


@torch.no_grad()
def log_likelihood(lm, kind: str, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """Of each token of an answer, by as many forward passes over prompt and what was written so far."""
    before, found = [START[kind]], []
    for token in answer:
        scores = lm(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([before])).logits[0, -1]
        found.append(scores.log_softmax(-1)[token])
        before.append(token)
    return found


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_ranks_by_the_log_likelihood_of_each_answer(request, kind) -> None:
    base = Base(str(request.getfixturevalue(kind)), get_task("commonsenseqa"), max_length=32)
    lm = base.load().eval()
    examples = [Example(("bad bel dus gog",), 1, ("kog", "bad bel mus", "fit")), Example(("mit",), 0, ("dur", "kim"))]
    found = logits(base, LikelihoodRanker(lm), examples)
    for row, example in zip(found, examples, strict=True):
        prompt = [*WRITTEN[kind], *base._ids(f"Question: {example.texts[0]}\nAnswer:"), 3]
        answers = [[*WRITTEN[kind], *base._ids(choice), 3] for choice in example.choices]
        expected = torch.stack([sum(log_likelihood(lm, kind, prompt, answer)) for answer in answers])
        torch.testing.assert_close(row[: len(answers)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_is_trained_to_write_the_answer_and_to_end(request, kind) -> None:
    base = Base(str(request.getfixturevalue(kind)), get_task("trex_slotfilling"), max_length=32)
    lm = base.load().eval()
    examples = [Example(("bad bel dus gog",), ("kog", "no")), Example(("mit",), ("bad bel mus",))]
    batch = base.collate(base.features(examples, training=True))
    short, long = ([*WRITTEN[kind], *base._ids(e.target[0]), 3] for e in examples)
    assert batch["labels"].tolist() == [[*short, -100, -100], long]
    prompts = [[*WRITTEN[kind], *base._ids(f"{e.texts[0]} :"), 3] for e in examples]
    assert batch["input_ids"].tolist() == [prompts[0], [*prompts[1], 0, 0, 0]]
    each = [p for prompt, answer in zip(prompts, (short, long), strict=True)
            for p in log_likelihood(lm, kind, prompt, answer)]  # fmt: skip
    torch.testing.assert_close(lm(**batch).loss, -torch.stack(each).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_texts_are_cut_to_length_and_end_as_they_do(request, kind) -> None:
    base = Base(str(request.getfixturevalue(kind)), get_task("trex_slotfilling"), max_length=5)
    (row,) = base.features([Example(("bad " * 9 + "kog",), ("mit " * 9,))], training=True)
    kept = 4 - len(WRITTEN[kind])
    assert row["input_ids"] == [*WRITTEN[kind], *base._ids("bad bad kog :")[-kept:], 3]
    assert row["labels"] == [*WRITTEN[kind], *base._ids("mit mit mit mit")[:kept], 3]


# --- metrics and baselines ------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    # Class 0: precision 1/2, recall 1, F1 2/3; class 1: 1 and 2/3, F1 4/5; class 2 never occurs.
    found = score(get_task("mnli"), [0, 0, 1, 1], [0, 1, 1, 1])
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 2)}
    assert list(found) == ["accuracy", "macro_f1"]
    assert score(get_task("chemprot"), [0, 0, 1], [0, 1, 1])["micro_f1"] == pytest.approx(2 / 3)
    # tp 1, fp 1, fn 1, tn 1: correlation 0; F1 of class 1 is 1/2.
    assert score(get_task("cola"), [1, 1, 0, 0], [1, 0, 1, 0])["matthews"] == 0
    assert score(get_task("mrpc"), [1, 1, 0, 0], [1, 0, 1, 0])["f1"] == 0.5
    found = score(get_task("stsb"), [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert found == {"pearson": pytest.approx(3 / math.sqrt(2 * 14 / 3)), "spearman": pytest.approx(1)}
    assert score(get_task("stsb"), [1.0, 1.0], [1.0, 2.0])["pearson"] == 0  # a constant says nothing
    found = score(get_task("trex_slotfilling"), ["x", "The y"], [["x", "z"], ["y"]])
    assert found == {"accuracy": 0.5, "exact_match": 1, "token_f1": 1}


def test_baselines_on_every_kind(data) -> None:
    for name in ("imdb", "stsb", "commonsenseqa", "trex_slotfilling"):
        task = get_task(name)
        splits = read_task(task, data)
        for method in ("majority", "tfidf"):
            found = baselines.predict(method, task, splits["train"], splits["test"])
            assert len(found) == len(splits["test"])
            assert all(isinstance(p, str if task.kind == "generation" else int | float) for p in found)
    train = [Example(("bad",), 0), Example(("good",), 1), Example(("good good",), 1)]
    assert baselines.majority(get_task("imdb"), train, train[:1]) == [1]
    assert baselines.tfidf(get_task("imdb"), train, train) == [0, 1, 1]


@pytest.mark.parametrize("name", ["imdb", "stsb", "commonsenseqa", "trex_slotfilling"])
def test_texts_without_a_word_have_the_most_frequent_answer(name) -> None:
    task = get_task(name)
    targets = {"stsb": [1.0, 1.0, 4.0], "trex_slotfilling": [("b",), ("b",), ("a",)]}.get(name, [1, 1, 0])
    choices = ("x", "y") if name == "commonsenseqa" else ()
    train = [Example((text,), target, choices) for text, target in zip("a?\N{GRINNING FACE}", targets, strict=True)]
    assert baselines.tfidf(task, train, train) == baselines.majority(task, train, train)
