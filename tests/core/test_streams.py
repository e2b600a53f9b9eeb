"""The sequences of a forward, as models give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForMultipleChoice, StaticCache

from mixadapters import BottleneckConfig, MixDAConfig
from mixadapters.core import streams
from mixadapters.core.rows import RowNames
from mixadapters.core.streams import PackedRequests, RequestMemory, read_stream


def test_choices_of_a_row_are_rows_next_to_each_other() -> None:
    ids = torch.arange(12).view(2, 3, 2)
    mask = torch.ones_like(ids)
    mask[1, 2, 1] = 0
    stream = read_stream({"input_ids": ids, "attention_mask": mask})
    assert (stream.batch, stream.length, stream.copies) == (6, 2, 3)
    assert torch.equal(stream.mask, mask.view(6, 2) == 1)
    assert stream.spread([5, 7], 6, "field").tolist() == [5, 5, 5, 7, 7, 7]


def packed(lengths: tuple[int, ...], tokens: int) -> dict:
    requests = PackedRequests(lengths, RowNames(["__base__", "x"]), tuple(range(len(lengths))))
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "cache": object(), "cu_seq_lens_q": object()}
    return {"inputs": inputs, "requests": requests}


def test_what_a_request_says_goes_to_its_tokens_in_a_packed_row() -> None:
    stream = read_stream(**packed((2, 1, 3), 6))
    assert stream.spread([5, 7, 9], 6, "field").tolist() == [5, 5, 7, 9, 9, 9]
    assert stream.spread(torch.eye(3), 6, "field").argmax(1).tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(("values", "count"), [([5, 7], 6), ([5, 7, 9], 3), ([5, 7, 9], 1), (5, 6)])
def test_other_values_or_rows_than_those_of_the_packed_requests_are_refused(values, count) -> None:
    with pytest.raises(ValueError, match=r"field: .*3 requests of 6 tokens"):
        read_stream(**packed((2, 1, 3), 6)).spread(values, count, "field")


def test_a_packed_row_of_other_tokens_than_its_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="the packed row has 7 tokens, its requests 6"):
        read_stream(**packed((2, 1, 3), 7))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_a_mask_of_pairs_says_which_tokens_are_real(dtype) -> None:
    mask = torch.ones(2, 3, 3, dtype=dtype)
    mask[0, :, 2] = 0
    stream = read_stream({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask})
    assert stream.mask.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_multiple_choice_reads_each_choice_as_alone(granularity) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertForMultipleChoice(BertConfig(**shape, intermediate_size=24))
    config = MixDAConfig(domains=["a", "b"], r=2, gate_granularity=granularity, init_weights=False)
    model = get_peft_model(base, config).eval()
    ids = torch.randint(3, 50, (2, 3, 5))
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    whole = model(input_ids=ids, attention_mask=mask).logits
    for choice in range(3):
        alone = model(input_ids=ids[:, choice : choice + 1], attention_mask=mask[:, choice : choice + 1]).logits
        torch.testing.assert_close(whole[:, choice], alone[:, 0])
    routed = model(input_ids=ids, attention_mask=mask, domain_ids=torch.tensor([0, 1], dtype=torch.int8)).logits
    torch.testing.assert_close(routed[1:], model(input_ids=ids[1:], attention_mask=mask[1:], domain_ids=[1]).logits)
    with pytest.raises(ValueError, match="domain_ids"):
        model(input_ids=ids, attention_mask=mask, domain_ids=[0, 1, 0, 1, 0, 1])


def test_multiple_choice_rows_name_their_adapters() -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForMultipleChoice(BertConfig(**shape, intermediate_size=24))
    model = get_peft_model(base, BottleneckConfig(r=2, init_weights=False), adapter_name="x").eval()
    model.add_adapter("y", BottleneckConfig(r=2, init_weights=False))
    ids = torch.randint(3, 50, (2, 3, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mixed = model(**inputs, adapter_names=["x", "y"]).logits
    for row, name in enumerate("xy"):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(**inputs).logits[row])


def test_sums_of_packed_requests_go_on_from_what_each_keeps() -> None:
    """Each as by itself, to the bit, whatever its neighbours are; one without a memory begins at 0."""
    texts = [torch.randn(9, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    memories = [RequestMemory(), RequestMemory(), None]
    for cut in ((slice(0, 4), slice(0, 1), slice(0, 9)), (slice(4, 9), slice(1, 2), slice(0, 1))):
        parts = [text[piece] for text, piece in zip(texts, cut, strict=True)]
        lengths = tuple(map(len, parts))
        found = PackedRequests(lengths, None, (), memories).running_sums(torch.cat(parts), "gate").split(list(lengths))
        before = [text[: piece.start].sum(0) for text, piece in zip(texts, cut, strict=True)]
        for sums, part, past in zip(found, parts, before, strict=True):
            torch.testing.assert_close(sums, part.cumsum(0) + past)
        alone = PackedRequests((lengths[2],), None, ()).running_sums(parts[2], "gate")
        assert torch.equal(alone, found[2])


def test_memory_of_a_request_begins_anew_where_it_is_read_again() -> None:
    memory = RequestMemory()
    assert memory.read(0, 5)
    memory.state["gate"] = torch.ones(2)
    assert memory.read(5, 1)
    assert "gate" in memory.state
    assert memory.read(0, 3)
    assert not memory.state
    assert not memory.read(5, 1)


def test_padding_is_read_when_it_is_asked_for_as_it_was_when_the_forward_began(monkeypatch) -> None:
    """In decoding hardly anybody asks; a static cache counts on in place meanwhile."""
    read: list[int] = []
    plain = streams._current_mask

    def noted(mask: Tensor, batch: int, length: int, past: Any) -> Tensor | None:
        read.append(length)
        return plain(mask, batch, length, past)

    monkeypatch.setattr(streams, "_current_mask", noted)

    class Static:
        layers: tuple[()] = ()
        count = torch.tensor(3)

        def get_seq_length(self) -> Tensor:
            return self.count

    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 1]])
    given = {"input_ids": torch.ones(2, 1, dtype=torch.long), "attention_mask": mask, "past_key_values": Static()}
    stream = read_stream(given)
    Static.count += 1
    assert not read
    found = stream.mask
    assert found is not None
    assert found.tolist() == [[True], [False]]
    assert stream.mask is found
    assert read == [1]
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\) does not fit 2 rows of 2 tokens"):
        read_stream({"input_ids": torch.ones(2, 2, dtype=torch.long), "attention_mask": mask})
    assert read == [1]


@pytest.mark.parametrize("adapted", [False, True])
@torch.no_grad()
def test_a_mask_may_cover_all_that_a_static_cache_has_room_for(tiny, adapted: bool) -> None:
    """As in loops that are written by hand for the compiler, whose shapes must not change."""
    model = tiny("llama")
    if adapted:
        model = get_peft_model(model, MixDAConfig(domains=["a", "b"], r=4, init_weights=False)).eval()
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 0] = 0
    cache = StaticCache(config=model.config, max_cache_len=9)
    steps = [
        model(input_ids=ids[:, part], attention_mask=mask, past_key_values=cache).logits
        for part in (slice(0, 3), slice(3, 4))
    ]
    expected = model(input_ids=ids, attention_mask=mask[:, :4]).logits
    torch.testing.assert_close(torch.cat(steps, 1)[1], expected[1])
    torch.testing.assert_close(torch.cat(steps, 1)[0, 1:], expected[0, 1:])
    cache = StaticCache(config=model.config, max_cache_len=9)
    if adapted:
        with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 8\) does not fit 2 rows of 3 tokens"):
            model(input_ids=ids[:, :3], attention_mask=mask[:, :8], past_key_values=cache)
