"""A user's adapter runs on the user's samples; all others are the base's, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from mixadapters import BottleneckConfig
from mixadapters.serving import FeatureGaussian, GlobalLocalMixture, PooledStates

ROWS = 24


def samples(kind: int) -> dict[str, torch.Tensor]:
    """Texts of a kind: alice's are of the tokens 10 to 19, bob's of 30 to 39, generic ones of 50 to 89."""
    low, high = {0: (10, 20), 1: (30, 40), 2: (50, 90)}[kind]
    ids = torch.randint(low, high, (ROWS, 6), generator=torch.Generator().manual_seed(kind))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full((ROWS,), 2 - kind)}


def without_labels(kind: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in samples(kind).items() if name != "labels"}


def digest(model) -> str:
    """Of all that is no adapter's."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        if ".alice." not in name and ".bob." not in name:
            state.update(name.encode() + value.numpy().tobytes())
    return state.hexdigest()


def adapted(tiny):
    config = BottleneckConfig(r=4, layers_to_transform=[2, 3])
    model = get_peft_model(tiny("bert", "sequence_classification"), config, "alice")
    model.add_adapter("bob", config)
    return model.eval()


@pytest.fixture(scope="module")
def fitted(tiny):
    """(mixture of two users, digests of the base before and after, losses of alice's training)."""
    model = adapted(tiny)
    mixture = GlobalLocalMixture(model, PooledStates(model))
    before = digest(model)
    generic = mixture.embed(**without_labels(2))
    losses = mixture.fit_user("alice", samples(0), generic, epochs=12, rate=1e-2)
    mixture.fit_user("bob", samples(1), FeatureGaussian.fit(generic), epochs=1)
    return mixture, (before, digest(model)), losses


def test_training_a_user_changes_the_users_adapter_alone(fitted) -> None:
    mixture, (before, after), losses = fitted
    assert before == after
    assert losses[-1] < 0.8 * losses[0]
    assert mixture.model.active_adapters == ["alice"]
    assert not mixture.model.training


def test_the_gate_knows_the_users_samples(fitted) -> None:
    mixture, *_ = fitted
    assert mixture.choose("alice", **without_labels(0)).count("alice") > 0.8 * ROWS
    assert mixture.choose("bob", **without_labels(1)).count("bob") > 0.8 * ROWS
    for user in ("alice", "bob"):  # bob's gate has seen a Gaussian in place of generic samples
        assert mixture.choose(user, **without_labels(2)).count("__base__") > 0.8 * ROWS


def test_rows_that_are_not_the_users_are_the_bases_bit_for_bit(fitted) -> None:
    mixture, *_ = fitted
    batch = {name: torch.cat([without_labels(0)[name][:4], without_labels(2)[name][:4]]) for name in without_labels(0)}
    names = mixture.choose("alice", **batch)
    assert {"alice", "__base__"} == set(names)
    output = mixture("alice", batch).logits
    with torch.no_grad(), mixture.model.disable_adapter():
        base = mixture.model(**batch).logits
    for row, name in enumerate(names):
        assert torch.equal(output[row], base[row]) is (name == "__base__")
    closed = GlobalLocalMixture(mixture.model, mixture.embed, threshold=1.0)
    closed.gates = mixture.gates
    assert torch.equal(closed("alice", batch).logits, base)


def test_the_overhead_is_counted(fitted) -> None:
    mixture, *_ = fitted
    adapter = 2 * (2 * 32 * 4 + 4 + 32)  # two layers of r=4 at width 32, with biases
    found = mixture.overhead("alice")
    base = sum(p.numel() for name, p in mixture.model.named_parameters() if "adapters." not in name)
    assert found.parameters == adapter + 33
    assert found.macs == 2 * 2 * 32 * 4
    assert found.share == pytest.approx((adapter + 33) / base)


def test_files_of_one_user_hold_nothing_of_another(fitted, tiny, tmp_path) -> None:
    mixture, *_ = fitted
    alice, bob = mixture.save("alice", tmp_path), mixture.save("bob", tmp_path)
    before = {path: path.read_bytes() for path in bob.iterdir()}
    mixture.save("alice", tmp_path)
    assert {path: path.read_bytes() for path in bob.iterdir()} == before
    for path in alice.glob("*"):
        assert b"bob" not in path.read_bytes()
    model = PeftModel.from_pretrained(tiny("bert", "sequence_classification"), bob, adapter_name="bob")
    again = GlobalLocalMixture(model.eval(), PooledStates(model))
    again.load("alice", alice)
    batch = without_labels(0)
    assert again.choose("alice", **batch) == mixture.choose("alice", **batch)
    assert torch.equal(again("alice", batch).logits, mixture("alice", batch).logits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(3)}, "must hold weight and bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.tensor(0.0)}, r"weight must be \(d,\)"),
        ({"weight": torch.tensor([torch.nan]), "bias": torch.tensor(0.0)}, "all finite"),
        (None, "gate.safetensors is missing"),
    ],
)
def test_a_broken_gate_is_refused_before_the_adapter_is_loaded(content, message, fitted, tiny, tmp_path) -> None:
    mixture, *_ = fitted
    folder: Path = mixture.save("alice", tmp_path)
    (folder / "gate.safetensors").unlink()
    if content is not None:
        save_file(content, folder / "gate.safetensors")
    model = adapted(tiny)
    model.delete_adapter("alice")
    with pytest.raises(ValueError, match=message):
        GlobalLocalMixture(model, PooledStates(model)).load("alice", folder)
    assert list(model.peft_config) == ["bob"]


def test_a_gaussian_replays_mean_and_spread() -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([1.0, 3.0, 0.1])
    )
    replay = FeatureGaussian.fit(features)
    torch.testing.assert_close(replay.factor @ replay.factor.T, features.T.cov())
    drawn = replay.sample(20000, seed=1)
    assert torch.equal(drawn, replay.sample(20000, seed=1))
    torch.testing.assert_close(drawn.T.cov(), features.T.cov(), rtol=0.1, atol=0.1)
    few = FeatureGaussian.fit(features[:2])  # fewer samples than width
    assert few.sample(4).shape == (4, 3)
    with pytest.raises(ValueError, match="N of 2 or more"):
        FeatureGaussian.fit(features[:1])


def test_what_cannot_be_right_is_refused(fitted, tiny) -> None:
    mixture, *_ = fitted
    with pytest.raises(ValueError, match=r"user='alicia' has no adapter; .*Did you mean 'alice'"):
        mixture.fit_user("alicia", samples(0), torch.zeros(4, 32))
    with pytest.raises(ValueError, match="user='carol' has no gate"):
        mixture.choose("carol", **without_labels(0))
    with pytest.raises(ValueError, match="threshold=-1 must be"):
        GlobalLocalMixture(mixture.model, mixture.embed, -1)
    with pytest.raises(ValueError, match=r"must be \(N, d\)"):
        mixture.fit_gate("alice", torch.zeros(4, 32), torch.zeros(4, 31))
    model = adapted(tiny)
    model.get_base_model().classifier.requires_grad_(True)
    with pytest.raises(ValueError, match="would train too"):
        GlobalLocalMixture(model, PooledStates(model)).fit_user("alice", samples(0), torch.zeros(4, 32))
