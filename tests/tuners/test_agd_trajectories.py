"""Trajectories: what the sampler computes, and that a record is whole, bounded and resumable."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from mixadapters import AGDConfig
from mixadapters.tuners.agd import (
    Trajectories,
    TrajectoryPlan,
    classifier_free,
    denoiser,
    guided,
    nested,
    record,
    sample,
)
from mixadapters.tuners.agd.storage import write_whole

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SHAPE = (2, 4, 4)
LABELS = {"class_labels": torch.arange(6)}
NULL = {"class_labels": torch.tensor([9])}


def predict(x: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """A model of one formula: depends on all of its arguments."""
    label = conditions["class_labels"].view(-1, 1, 1, 1) / 10
    return (x * (0.3 + label) + timestep.view(-1, 1, 1, 1) / 2000).tanh()


def ddim(**changes: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **changes)


def plan(**changes: Any) -> TrajectoryPlan:
    return TrajectoryPlan(**{"shape": SHAPE, "steps": 5, "batch_size": 2, "dtype": "float32", **changes})


# --- the teacher --------------------------------------------------------------------------------------------------


def test_guidance_is_linear_in_the_scale_and_exact_at_one() -> None:
    c, u = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    scale = torch.tensor([1.0, 2.0, 4.0])
    out = classifier_free(c, u, scale, torch.zeros(3))
    assert torch.equal(out[0], c[0])
    torch.testing.assert_close(out[2], c[2] + 3 * (c[2] - u[2]))
    first = classifier_free(c, u, scale, torch.zeros(3), channels=1)
    torch.testing.assert_close(first[:, :1], out[:, :1])
    assert torch.equal(first[:, 1:], c[:, 1:])
    like = classifier_free(c, u, scale, torch.zeros(3), rescale=1.0)
    torch.testing.assert_close(like.std((1, 2, 3)), c.std((1, 2, 3)))


def test_guided_prediction_is_made_of_a_conditional_and_an_unconditional_one() -> None:
    x, t = torch.randn(6, *SHAPE), torch.full((6,), 300.0)
    scale = torch.linspace(1, 6, 6)
    calls: list[int] = []

    def counting(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return predict(*args)

    out = guided(counting, LABELS, NULL, scale)(x, t)
    assert calls == [12]
    c, u = predict(x, t, LABELS), predict(x, t, {"class_labels": torch.full((6,), 9)})
    torch.testing.assert_close(out, u + scale.view(-1, 1, 1, 1) * (c - u))
    inside = guided(predict, LABELS, NULL, scale, interval=(400, 800))
    torch.testing.assert_close(inside(x, t), c)
    torch.testing.assert_close(inside(x, t + 200), guided(predict, LABELS, NULL, scale)(x, t + 200))


def test_any_rule_may_guide() -> None:
    def rule(c: Tensor, u: Tensor, scale: Tensor, timestep: Tensor) -> Tensor:
        return c + timestep.view(-1, 1, 1, 1)

    x, t = torch.randn(6, *SHAPE), torch.full((6,), 7.0)
    out = guided(predict, LABELS, NULL, torch.full((6,), 3.0), rule)(x, t)
    torch.testing.assert_close(out, predict(x, t, LABELS) + 7)


def test_dotted_conditions_are_entries_of_dict_arguments() -> None:
    assert nested({"a": 1, "b.c": 2, "b.d": 3}) == {"a": 1, "b": {"c": 2, "d": 3}}


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: ddim(),
        lambda: ddim(prediction_type="v_prediction"),
        lambda: diffusers.DDPMScheduler(),
        lambda: diffusers.EulerDiscreteScheduler(),
        lambda: diffusers.EulerAncestralDiscreteScheduler(),
        lambda: diffusers.DPMSolverMultistepScheduler(),
        lambda: diffusers.HeunDiscreteScheduler(),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_every_scheduler_samples_and_is_left_as_it_was(scheduler) -> None:
    scheduler = scheduler()
    before = scheduler.timesteps.clone()
    seen: list[Tensor] = []

    def step(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        assert t.shape == (6,)
        return predict(x, t, LABELS)

    results = [
        sample(step, scheduler, torch.randn(6, *SHAPE, generator=g), 5, generator=g)
        for g in (torch.Generator().manual_seed(s) for s in (0, 0, 1))
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].isfinite().all()
    assert torch.equal(scheduler.timesteps, before)
    assert len(seen) >= 15


def test_sampler_does_what_a_pipeline_does() -> None:
    """DiTPipeline's own loop, on a model with a learned variance that both leave aside."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval()
    pipe = diffusers.DiTPipeline(model, vae, ddim())
    pipe.set_progress_bar_config(disable=True)
    found: list[Tensor] = []
    vae.decode = lambda z: found.append(z * vae.config.scaling_factor) or vae.__class__.decode(vae, z)
    g = torch.Generator().manual_seed(3)
    pipe([1, 2], guidance_scale=3.0, num_inference_steps=4, generator=g, output_type="np")
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    step = guided(
        denoiser(model), {"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([1000])},
        torch.full((2,), 3.0), lambda c, u, w, t: classifier_free(c, u, w, t, channels=3),
    )  # fmt: skip
    ours = sample(step, ddim(), noise, 4)
    # The pipeline guides all four channels of the noise.
    assert not torch.allclose(ours, found[0], atol=1e-4)
    step = guided(
        denoiser(model), {"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([1000])},
        torch.full((2,), 3.0),
    )  # fmt: skip
    torch.testing.assert_close(sample(step, ddim(), noise, 4), found[0], atol=1e-4, rtol=1e-4)


# --- recording ----------------------------------------------------------------------------------------------------


def test_states_have_the_targets_of_the_guided_model(tmp_path) -> None:
    data = record(predict, ddim(), LABELS, NULL, plan(scales=(2.0, 5.0)), tmp_path / "data")
    assert len(data) == 6 * 5
    for item in (data[0], data[7], data[-1]):
        x, t, w = item["sample"].unsqueeze(0), item["timestep"].view(1), item["guidance_scale"].view(1)
        assert 2 <= w <= 5
        labels = {"class_labels": item["class_labels"].view(1)}
        torch.testing.assert_close(guided(predict, labels, NULL, w)(x, t)[0], item["target"])
    assert [int(data[i]["class_labels"]) for i in range(0, 30, 5)] == list(range(6))
    assert [float(data[i]["timestep"]) for i in range(5)] == [999, 799, 599, 399, 199]


def test_interval_is_recorded_as_a_scale_of_one() -> None:
    data = record(predict, ddim(), LABELS, NULL, plan(interval=(300, 700), scales=(3.0, 4.0)))
    for i in range(len(data)):
        inside = 300 <= data[i]["timestep"] <= 700
        assert (data[i]["guidance_scale"] > 1) == inside
        if not inside:
            labels = {"class_labels": data[i]["class_labels"].view(1)}
            plain = predict(data[i]["sample"].unsqueeze(0), data[i]["timestep"].view(1), labels)
            torch.testing.assert_close(plain[0], data[i]["target"])


def test_kept_states_are_some_of_each_trajectory() -> None:
    whole = record(predict, ddim(), LABELS, NULL, plan(steps=8))
    some = record(predict, ddim(), LABELS, NULL, plan(steps=8, keep=3))
    assert len(some) == 18
    chosen = set()
    for row in range(6):
        times = [float(some[3 * row + k]["timestep"]) for k in range(3)]
        assert times == sorted(set(times), reverse=True)
        chosen.add(tuple(times))
        for k in range(3):
            twin = next(
                whole[8 * row + i] for i in range(8) if whole[8 * row + i]["timestep"] == some[3 * row + k]["timestep"]
            )
            assert torch.equal(twin["sample"], some[3 * row + k]["sample"])
            assert torch.equal(twin["target"], some[3 * row + k]["target"])
    assert len(chosen) > 1


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class Interrupted:
    """`predict`, interrupted in its n-th call."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.calls = last, 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return predict(*args)


def test_interrupted_record_goes_on_and_equals_an_unbroken_one(tmp_path) -> None:
    whole, half, rest = Interrupted(), Interrupted(9), Interrupted()
    unbroken = record(whole, ddim(), LABELS, NULL, plan(), tmp_path / "unbroken")
    assert whole.calls == 1 + 3 * 5  # a first word, three shards of five steps
    with pytest.raises(KeyboardInterrupt):
        record(half, ddim(), LABELS, NULL, plan(), tmp_path / "broken")
    assert set(files(tmp_path / "broken")) == {"index.json", "00000.safetensors"}
    resumed = record(rest, ddim(), LABELS, NULL, plan(), tmp_path / "broken")
    assert rest.calls == 1 + 2 * 5
    assert files(tmp_path / "broken") == files(tmp_path / "unbroken")
    assert len(resumed) == len(unbroken)
    with pytest.raises(ValueError, match=r"a record with other \['plan'\]"):
        record(predict, ddim(), LABELS, NULL, plan(seed=1), tmp_path / "broken")
    with pytest.raises(ValueError, match=r"a record with other \['scheduler'\]"):
        record(predict, ddim(beta_start=2e-4), LABELS, NULL, plan(), tmp_path / "broken")
    with pytest.raises(ValueError, match=r"a record with other \['conditions', 'model_says'\]"):
        record(predict, ddim(), {"class_labels": torch.ones(6)}, NULL, plan(), tmp_path / "broken")


# --- killed writers -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are made fast")
def test_record_that_is_killed_twenty_times_equals_an_unbroken_one(tmp_path) -> None:
    def slow(*args: Any) -> Tensor:
        time.sleep(1e-3)
        return predict(*args)

    def work() -> None:
        logging.disable_progress_bar()  # its lock is shared with whoever was forked, and would be held for good
        record(slow, ddim(), LABELS, NULL, small, tmp_path / "broken")

    small = plan(batch_size=1)
    record(predict, ddim(), LABELS, NULL, small, tmp_path / "unbroken")
    chance, processes = random.Random(0), multiprocessing.get_context("fork")
    killed = 0
    for _ in range(20):
        process = processes.Process(target=work)
        process.start()
        time.sleep(chance.uniform(0.0, 0.02))
        process.kill()
        process.join()
        killed += process.exitcode != 0
    assert killed > 3
    record(predict, ddim(), LABELS, NULL, small, tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "unbroken")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["index.json", "00001.safetensors"])
def test_file_that_was_cut_is_written_again_and_said(tmp_path, name, kept) -> None:
    record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    whole = files(tmp_path)
    (tmp_path / name).write_bytes(whole[name][: int(kept * len(whole[name]))])
    if name == "index.json":
        with pytest.raises(ValueError, match=r"index.json is no JSON.*record\(\) with the same arguments"):
            Trajectories.open(tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"not whole: 4 of its trajectories.*00001.safetensors.*goes on with it"):
            assert len(Trajectories.open(tmp_path)) == 4 * 5
    with pytest.warns(UserWarning, match=f"{name} (was cut|is not whole)"):
        record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    assert files(tmp_path) == whole


def test_record_without_some_shards_is_read_and_said(tmp_path) -> None:
    record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    (tmp_path / "00002.safetensors").unlink()
    with pytest.warns(UserWarning, match="4 of 6 trajectories can be read"):
        assert len(Trajectories.open(tmp_path)) == 4 * 5


def test_shard_of_another_record_is_refused(tmp_path) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        record(predict, ddim(), LABELS, NULL, plan(seed=seed), tmp_path / folder)
    shutil.copy(tmp_path / "b" / "00001.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"00001\.safetensors belongs to another record"):
        Trajectories.open(tmp_path / "a")
    with pytest.raises(ValueError, match=r"00001\.safetensors belongs to another record"):
        record(predict, ddim(), LABELS, NULL, plan(), tmp_path / "a")


def test_two_writers_of_a_file_have_names_of_their_own(tmp_path) -> None:
    """Each finds its own file aside, and the last word is a whole file; what a killed one left is swept."""
    file = tmp_path / "index.json"
    (tmp_path / ".index.json.1-dead.part").write_text("half")

    def other_first(aside: Path) -> None:
        aside.write_text("one")
        write_whole(file, lambda own: own.write_text("one") if own != aside else pytest.fail("shared"))

    write_whole(file, other_first)
    assert files(tmp_path) == {"index.json": b"one"}
    with pytest.raises(OSError, match="full"):
        write_whole(file, lambda aside: (aside.write_text("half"), (_ for _ in ()).throw(OSError("disk full"))))
    assert files(tmp_path) == {"index.json": b"one"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "no index of a record"), ('{"format_version": true, "plan": {}}', "no index of a record"),
     ('{"format_version": 1}', "it lacks format_version or plan"), (" " * (2**24 + 1), "has at most 16777216")],
)  # fmt: skip
def test_index_that_is_none_is_refused(tmp_path, content, message) -> None:
    record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Trajectories.open(tmp_path)


def test_shard_that_is_none_is_refused(tmp_path) -> None:
    record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    save_file({"sample": torch.zeros(2, 5), "timestep": torch.zeros(2, 4)}, tmp_path / "00001.safetensors")
    with pytest.raises(ValueError, match=r"00001\.safetensors is no shard of a record: its parts are"):
        Trajectories.open(tmp_path)


# --- whose trajectories -------------------------------------------------------------------------------------------


def test_record_does_not_go_on_by_another_function(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        record(Interrupted(9), ddim(), LABELS, NULL, plan(), tmp_path)
    with pytest.raises(ValueError, match=r"a record with other \['model_says'\]"):
        record(lambda x, t, c: 1.01 * predict(x, t, c), ddim(), LABELS, NULL, plan(), tmp_path)
    assert len(record(predict, ddim(), LABELS, NULL, plan(), tmp_path)) == 30


def small_dit() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=9,
    ).eval()  # fmt: skip


def test_record_goes_on_by_a_model_of_the_same_weights_only(tmp_path) -> None:
    model = small_dit()
    whole = record(denoiser(model), ddim(), LABELS, NULL, plan(), tmp_path / "data")
    assert "model_digest" in whole.config_fields["teacher"]
    (tmp_path / "data" / "00001.safetensors").unlink()
    other = small_dit()
    with torch.no_grad():
        other.transformer_blocks[0].ff.net[2].bias[3] += 1e-6  # what no prediction would show
    with pytest.raises(ValueError, match=r"a record with other \['model_digest'"):
        record(denoiser(other), ddim(), LABELS, NULL, plan(), tmp_path / "data")
    with pytest.raises(ValueError, match=r"a record with other \['model_digest'"):
        record(denoiser(small_dit().bfloat16()), ddim(), LABELS, NULL, plan(), tmp_path / "data")
    # Adapters that rest are no part of the teacher.
    adapted = get_peft_model(small_dit(), AGDConfig(r=4))
    assert denoiser(adapted).digest() == denoiser(model).digest()
    assert len(record(denoiser(adapted), ddim(), LABELS, NULL, plan(), tmp_path / "data")) == 30


def test_record_of_an_earlier_version_is_read_but_does_not_go_on(tmp_path) -> None:
    data = record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    facts = {k: v for k, v in data.info.items() if k not in ("model_says", "trajectories")}
    (tmp_path / "index.json").write_text(json.dumps(facts, indent=2) + "\n")
    for file in tmp_path.glob("*.safetensors"):
        save_file(load_file(file), file)  # without metadata
    assert len(Trajectories.open(tmp_path)) == 30
    assert len(record(predict, ddim(), LABELS, NULL, plan(), tmp_path)) == 30
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unfinished record of an earlier version.*Trajectories\.open"):
        record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    with pytest.raises(ValueError, match=r"\['scheduler'\] are facts of the record itself"):
        record(predict, ddim(), LABELS, NULL, plan(), info={"scheduler": "mine"})


# --- what is not finite -------------------------------------------------------------------------------------------


def test_states_without_signal_are_refused_with_step_and_scheduler(tmp_path) -> None:
    scheduler = ddim(rescale_betas_zero_snr=True)  # its first step divides a noise prediction by zero
    message = r"sample at step 1 \(timestep 799\) of DDIMScheduler is not finite.*'epsilon'.*v_prediction"
    with pytest.raises(ValueError, match=message):
        record(predict, scheduler, LABELS, NULL, plan(), tmp_path / "data")
    assert set(files(tmp_path / "data")) == {"index.json"}
    velocity = ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    data = record(predict, velocity, LABELS, NULL, plan())
    assert all(data[i]["target"].isfinite().all() for i in range(30))


def test_targets_that_overflow_on_disk_are_refused_with_the_remedy() -> None:
    def large(*args: Any) -> Tensor:
        return 1e5 * predict(*args)

    with pytest.raises(ValueError, match=r"target at step 0 \(timestep 999\) of DDIM.* more than dtype='float16'"):
        record(large, ddim(), LABELS, NULL, plan(dtype="float16", steps=1))
    record(large, ddim(), LABELS, NULL, plan(dtype="bfloat16", steps=1))

    def broken(x: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return torch.where(timestep.view(-1, 1, 1, 1) < 500, torch.nan, predict(x, timestep, conditions))

    with pytest.raises(ValueError, match=r"target at step 3 \(timestep 399\).*lower scales"):
        record(broken, ddim(), LABELS, NULL, plan())


def test_states_that_an_earlier_version_recorded_are_refused_when_they_are_read() -> None:
    data = record(predict, ddim(), LABELS, NULL, plan())
    data.shards[1]["target"][0, 2, 0, 0, 0] = torch.inf
    assert data[11]["target"].isfinite().all()
    with pytest.raises(ValueError, match=r"target at timestep 599 \(state 12, step 2 of a record by DDIMScheduler\)"):
        data[12]


def test_seeds_side_by_side_share_no_noise() -> None:
    starts = [
        tuple(shard["sample"][:, 0].flatten(1)[:, 0].tolist())
        for seed in range(3)
        for shard in record(predict, ddim(), LABELS, NULL, plan(seed=seed)).shards
    ]
    assert len(set(sum(starts, ()))) == 3 * 6


def test_record_in_memory_equals_the_one_on_disk(tmp_path) -> None:
    memory = record(predict, ddim(), LABELS, NULL, plan())
    disk = record(predict, ddim(), LABELS, NULL, plan(), tmp_path / "data")
    for i in range(len(memory)):
        assert all(torch.equal(memory[i][key], disk[i][key]) for key in memory[i])
    assert memory.info == disk.info


def test_size_is_bounded_before_anything_is_sampled(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"more than max_bytes=5000; keep fewer steps"):
        record(predict, ddim(), LABELS, NULL, plan(max_bytes=5000), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    record(predict, ddim(), LABELS, NULL, plan(max_bytes=5000, keep=1), tmp_path / "data")
    expected = plan(keep=1).bytes_of(LABELS)
    stored = sum(p.stat().st_size for p in (tmp_path / "data").glob("*.safetensors"))
    assert expected <= stored < expected + 3 * 1000


def test_half_precision_halves_the_record(tmp_path) -> None:
    data = record(predict, ddim(), LABELS, NULL, plan(dtype="float16"), tmp_path / "data")
    assert data.shards[0]["sample"].dtype == torch.float16
    assert data[0]["sample"].dtype == torch.float32
    assert plan(dtype="float16").bytes_of(LABELS) < 0.6 * plan().bytes_of(LABELS)


def test_second_order_schedulers_keep_as_many_states_as_asked() -> None:
    data = record(predict, diffusers.HeunDiscreteScheduler(), LABELS, NULL, plan())
    assert len(data) == 30


def test_facts_of_the_record_are_kept(tmp_path) -> None:
    rule = partial(classifier_free, channels=1)
    data = record(predict, ddim(), LABELS, NULL, plan(), tmp_path / "d", rule=rule, info={"model": "tiny"})
    info = json.loads((tmp_path / "d" / "index.json").read_text())
    assert info == data.info
    assert info["rule"] == {"name": "classifier_free", "channels": 1}
    assert info["scheduler"]["class"] == "DDIMScheduler"
    assert info["model"] == "tiny"
    assert data.config_fields == {"min_scale": 1.0, "max_scale": 6.0, "teacher": info}
    info["format_version"] = 2
    (tmp_path / "d" / "index.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="format_version=2 is newer"):
        Trajectories.open(tmp_path / "d")


def test_held_out_trajectories_share_no_state_with_the_others() -> None:
    data = record(predict, ddim(), LABELS, NULL, plan())
    train, held_out = data.split(3)
    assert (len(train), len(held_out)) == (15, 15)
    assert {int(train[i]["class_labels"]) for i in range(15)} == {0, 1, 2}
    assert {int(held_out[i]["class_labels"]) for i in range(15)} == {3, 4, 5}
    for bad in (0, 6):
        with pytest.raises(ValueError, match=f"held_out={bad}"):
            data.split(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": (3.0, 1.0)}, r"scales=\(3.0, 1.0\) is no range"),
        ({"keep": 6}, "keep=6 must lie between 1 and steps=5"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"scales": ("1", "6")}, r"scales=\('1', '6'\) must be two numbers"),
        ({"scales": (True, 6.0)}, r"scales=\(True, 6.0\) must be two numbers"),
        ({"scales": (1.0, 1j)}, r"scales=\(1.0, 1j\) must be two numbers"),
        ({"scales": (1.0, float("inf"))}, r"scales=\(1.0, inf\) must be two numbers"),
        ({"scales": 3.0}, r"scales=3.0 must be two numbers"),
        ({"interval": ("200", "800")}, r"interval=\('200', '800'\) must be two numbers"),
        ({"steps": "5"}, "steps='5' must be an integer"),
        ({"steps": -1}, "steps=-1 must be an integer, at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be an integer, at least 1"),
        ({"shape": (4, 0)}, r"shape=\(4, 0\) must be positive sizes"),
        ({"schedule": 3}, "schedule=3 must be a dict"),
        ({"keep": True}, "keep=True must be an integer"),
    ],
)
def test_impossible_plans_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, one: sample(lambda x, t: x, ddim(), x, steps=-1), "steps=-1 must be an integer, at least 1"),
        (lambda x, one: sample(lambda x, t: x, ddim(), x, 2, timestep_factor=0), "timestep_factor=0 must be"),
        (lambda x, one: classifier_free(x, x, one, one, rescale=math.nan), "rescale=nan must be a number from 0 to 1"),
        (lambda x, one: classifier_free(x, x, one, one, channels=5), "channels=5 must be .* at most 4"),
        (lambda x, one: guided(len, {"prompt": x}, {"promt": x}, one), r"unconditional has \['promt'\], which"),
    ],
)
def test_what_guidance_cannot_do_is_refused_by_name(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, 3, 3), torch.ones(2))


def test_other_files_and_uneven_conditions_are_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        record(predict, ddim(), LABELS, NULL, plan(), tmp_path)
    with pytest.raises(ValueError, match="same number of rows"):
        record(predict, ddim(), {**LABELS, "other": torch.ones(2)}, NULL, plan())


def test_former_places_of_the_names_still_serve_them() -> None:
    from mixadapters.training import distillation, pipelines
    from mixadapters.training import trajectories as former
    from mixadapters.tuners import agd

    for module in (distillation, pipelines, former):
        assert all(getattr(module, name) is getattr(agd, name) for name in module.__all__)
    assert {*distillation.__all__, *pipelines.__all__, *former.__all__} <= set(agd.__all__)
