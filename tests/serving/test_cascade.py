"""The strong expert is asked for the rows of which the weak one is not sure, and for no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from seeing import IMAGE, seeing, seen
from torch import nn

from mixadapters import BottleneckConfig
from mixadapters.serving import ConfidenceCascade, confidence

LOGITS = torch.tensor([[4.0, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 9.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 2.0]])


class Counted:
    """Logits by the number of each row, which it notes."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.seen = logits, []

    def __call__(self, rows: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
        assert names is None or [f"row{i}" for i in rows.tolist()] == names
        self.seen += rows.tolist()
        return self.logits[rows]


@pytest.mark.parametrize("dispersion", ["variance", "entropy"])
def test_confidence_is_zero_where_uniform_and_one_where_certain(dispersion) -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0], [0.0, 200.0, 0.0]], requires_grad=True)
    found = confidence(logits, dispersion)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))
    assert not found.requires_grad
    many = confidence(torch.randn(200, 7) * 3, dispersion)
    assert ((many >= 0) & (many <= 1)).all()
    for bad, message in [
        ((logits[:, :1], dispersion), "two classes or more"),
        ((logits, "range"), "dispersion='range'"),
    ]:
        with pytest.raises(ValueError, match=message):
            confidence(*bad)


def test_confidence_is_the_variance_over_that_of_a_certain_answer() -> None:
    probs = LOGITS.softmax(-1)
    expected = probs.var(-1) / torch.tensor([1.0, 0.0, 0.0]).var()
    torch.testing.assert_close(confidence(LOGITS), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_rows_go_to_the_strong_expert_below_the_threshold_alone(threshold) -> None:
    weak, strong = Counted(LOGITS), Counted(-LOGITS - 1)
    cascade = ConfidenceCascade(weak, strong, threshold)
    output = cascade.classify({"rows": torch.arange(5), "names": [f"row{i}" for i in range(5)]})
    unsure = [row for row in range(5) if threshold == 1 or float(confidence(LOGITS)[row]) < threshold]
    assert strong.seen == unsure == output.strong.nonzero()[:, 0].tolist()
    assert weak.seen == list(range(5))
    assert (cascade.rows, cascade.strong_rows) == (5, len(unsure))
    expected = LOGITS.clone()
    expected[unsure] = -LOGITS[unsure] - 1
    assert torch.equal(output.logits, expected)
    assert len(unsure) == {0.0: 0, 0.3: 2, 0.9: 4, 1.0: 5}[threshold]


def test_a_row_that_is_certain_to_the_last_bit_goes_to_the_strong_expert_at_threshold_one() -> None:
    logits = torch.tensor([[0.0, 500.0]])
    assert float(confidence(logits)) == 1.0
    assert ConfidenceCascade(lambda x: x, lambda x: -x, 1.0).classify({"x": logits}).strong.all()


LORA = LoraConfig(r=4, init_lora_weights=False, target_modules=["query"])


@pytest.mark.parametrize("config", [BottleneckConfig(r=4, init_weights=False), LORA])
def test_a_cascade_of_adapters_answers_like_each_of_them(config, tiny, tiny_inputs) -> None:
    model = get_peft_model(tiny("bert", "sequence_classification"), config, "law").eval()
    batch = tiny_inputs("bert", batch=6, padding="right")
    with torch.no_grad():
        base = model(**batch, adapter_names=["__base__"] * 6).logits
        law = model(**batch, adapter_names=["law"] * 6).logits
    threshold = float(confidence(base).median())
    output = ConfidenceCascade.of_adapters(model, "__base__", "law", threshold).classify(batch)
    assert output.strong.sum() in (2, 3)
    torch.testing.assert_close(output.logits, torch.where(output.strong[:, None], law, base), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="there is no adapter 'lav'"):
        ConfidenceCascade.of_adapters(model, "__base__", "lav")


@pytest.mark.parametrize(
    ("per_row", "said"), [([2, 0], r"rows \[1\] hold none"), ([0, 2, 1], r"rows \[0\] hold none")]
)
def test_images_that_are_not_one_for_each_row_are_refused(per_row, said) -> None:
    config = BottleneckConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    cascade = ConfidenceCascade.of_adapters(
        get_peft_model(seeing("llava"), config, "law").eval(), "__base__", "law", 1
    )
    for call in (cascade.generate, cascade.classify):
        with pytest.raises(ValueError, match=rf"a cascade takes the rows of a batch apart.*{said}"):
            call(seen("llava", per_row))
        with pytest.raises(ValueError, match=r"'pixel_values': 4.* must be one for each row"):
            call(seen("llava", [2, 2]))


@pytest.mark.parametrize(("kind", "per_row"), [("llava", [1, 1, 1]), ("smolvlm", [2, 1, 1])])
def test_images_follow_the_rows_that_the_strong_expert_answers(kind, per_row) -> None:
    config = BottleneckConfig(r=2, init_weights=False, target_modules=r".*(?:language|text)_model.*q_proj")
    model, batch = get_peft_model(seeing(kind), config, "law").eval(), seen(kind, per_row)
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    cascade = ConfidenceCascade.of_adapters(model, "__base__", "law", 0.0)
    cascade.threshold = float(cascade.generate(batch, **settings).confidence.median()) + 1e-6
    found = cascade.generate(batch, **settings)
    assert found.strong.sum() == 2
    for row, name in enumerate("law" if strong else "__base__" for strong in found.strong):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        alone = model.generate(**one, **settings, adapter_names=[name])
        assert torch.equal(found.sequences[row], alone[0])


@pytest.fixture(scope="module")
def writer(tiny):
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=4, init_weights=False), "law").eval()
    return model


@pytest.mark.parametrize("options", [{}, {"eos_token_id": [11, 40], "pad_token_id": 0}])
def test_requests_are_written_again_where_the_weak_answer_was_unsure(options, writer, tiny_inputs) -> None:
    batch = tiny_inputs("llama", batch=6, length=5, padding="left")
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    cascade = ConfidenceCascade.of_adapters(writer, "__base__", "law", 0.0)
    weak = cascade.generate(batch, **settings)
    assert not weak.strong.any()
    cascade.threshold = float(weak.confidence.median()) + 1e-6
    both = cascade.generate(batch, **settings)
    assert 0 < both.strong.sum() < 6
    assert (cascade.rows, cascade.strong_rows) == (12, int(both.strong.sum()))
    for row in range(6):
        name = "law" if both.strong[row] else "__base__"
        one = {key: value[row : row + 1] for key, value in batch.items()}
        alone = writer.generate(**one, adapter_names=[name], **settings)[0]
        assert torch.equal(both.sequences[row, : len(alone)], alone)
        assert (both.sequences[row, len(alone) :] == 0).all()
    assert not torch.equal(both.sequences[:, : weak.sequences.shape[1]], weak.sequences)


def test_confidence_of_an_answer_ends_with_the_answer(writer, tiny_inputs) -> None:
    """What stands behind its end is no part of it: the same request alone, cut there, is as sure."""
    batch = tiny_inputs("llama", batch=4, length=5)
    cascade = ConfidenceCascade.of_adapters(writer, "__base__", "law", 0.0)
    plain = cascade.generate(batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    end = int(plain.sequences[1, 6])  # its second token
    found = cascade.generate(batch, max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0)
    with torch.no_grad():
        logits = writer(input_ids=plain.sequences[1:2, :6], adapter_names=["__base__"]).logits[0, -2:]
    torch.testing.assert_close(found.confidence[1], confidence(logits).mean(), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found.confidence[1], plain.confidence[1])


# --- calibration ---


def made(count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weak expert that is right where it is sure, and a strong one that is right nearly everywhere."""
    draw = torch.Generator().manual_seed(seed)
    sure = torch.rand(count, generator=draw)
    weak = torch.rand(count, generator=draw) < torch.where(sure > 0.4, 0.96, 0.4)
    strong = torch.rand(count, generator=draw) < 0.92
    return sure, weak, strong


def at(threshold: float, sure, weak, strong) -> tuple[float, float]:
    """Share of strong calls and accuracy, as a cascade would have them."""
    called = (sure < threshold) | (threshold >= 1)
    return called.double().mean().item(), torch.where(called, strong, weak).double().mean().item()


def test_every_point_of_the_curve_is_what_its_threshold_does() -> None:
    sure, weak, strong = made(60)
    sure[10:14] = sure[9]  # ties
    sure[20], sure[21] = 1.0, 1 - 2**-24
    points = ConfidenceCascade.curve(sure, weak, strong)
    assert len(points) >= 55
    assert [points[0].threshold, points[-1].threshold] == [0.0, 1.0]
    for point in points:
        share, accuracy = at(point.threshold, sure, weak, strong)
        assert share == pytest.approx(point.strong_share)
        assert accuracy == pytest.approx(point.quality)
        assert point.weak_quality == pytest.approx(weak.float().mean().item())


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.33, 1.0])
def test_a_calibrated_cascade_keeps_within_its_share(limit) -> None:
    sure, weak, strong = made()
    cascade = ConfidenceCascade(None, None)
    point = cascade.calibrate(sure, weak, strong, strong_share=limit)
    share, accuracy = at(cascade.threshold, sure, weak, strong)
    assert share == pytest.approx(point.strong_share)
    assert share <= limit
    assert accuracy == pytest.approx(
        max(p.quality for p in cascade.curve(sure, weak, strong) if p.strong_share <= limit)
    )


def test_as_few_strong_calls_as_reach_the_strong_experts_accuracy() -> None:
    sure, weak, strong = made()
    cascade = ConfidenceCascade(None, None)
    point = cascade.calibrate(sure, weak, strong)
    assert point.quality >= point.strong_quality > point.weak_quality
    assert point.strong_share <= 0.5
    fewer = [p for p in cascade.curve(sure, weak, strong) if p.strong_share < point.strong_share]
    assert all(p.quality < point.strong_quality for p in fewer)
    cheaper = cascade.calibrate(sure, weak, strong, loss=0.05)
    assert cheaper.strong_share < point.strong_share
    assert cheaper.quality >= cheaper.strong_quality - 0.05


def test_a_row_whose_confidence_is_no_number_goes_to_the_strong_expert() -> None:
    broken = LOGITS.clone()
    broken[1, 0] = torch.nan
    cascade = ConfidenceCascade(lambda x: broken, lambda x: LOGITS[: len(x)], threshold=0.0)
    assert cascade.classify({"x": LOGITS}).strong.nonzero().flatten().tolist() == [1]


def test_what_cannot_be_right_is_refused(writer, tiny_inputs) -> None:
    for arguments, message in [
        ({"threshold": 1.5}, "threshold=1.5 must be"),
        ({"dispersion": "max"}, "dispersion='max'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ConfidenceCascade(None, None, **arguments)
    with pytest.raises(ValueError, match=r"an expert must give logits \(5, C\)"):
        ConfidenceCascade(lambda x: x.unsqueeze(0), None).classify({"x": LOGITS})
    with pytest.raises(ValueError, match="one entry for each row under every name"):
        ConfidenceCascade(None, None).classify({"x": LOGITS, "y": LOGITS[:2]})
    with pytest.raises(ValueError, match="one entry for each row under every name"):
        ConfidenceCascade(None, None).classify({})
    batch = tiny_inputs("llama")
    cascade = ConfidenceCascade.of_adapters(writer, "__base__", "law")
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be 1"):
            cascade.generate(batch, **options)
    with pytest.raises(ValueError, match="has no method `generate`"):
        ConfidenceCascade(SimpleNamespace(), nn.Identity()).generate(batch)
    sure, weak, strong = made(10)
    with pytest.raises(ValueError, match="sure holds what is no finite number"):
        cascade.calibrate(sure.log() * 0 / 0, weak, strong)
    for arguments, message in [
        ((sure, weak[:3], strong), "give \\(N,\\) of each"),
        ((sure[:0], weak[:0], strong[:0]), "N above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            cascade.calibrate(*arguments)
    with pytest.raises(ValueError, match="strong_share=2 must be"):
        cascade.calibrate(sure, weak, strong, strong_share=2)
    with pytest.raises(ValueError, match="loss=-1 must be"):
        cascade.calibrate(sure, weak, strong, loss=-1)
