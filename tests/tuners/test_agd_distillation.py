"""Distillation: the losses by their formulas, and that adapters learn to say in one pass what two passes say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from seeing import seeing, seen
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from mixadapters import AGDConfig, StageCallback
from mixadapters.tuners.agd import (
    GuidanceDistillation,
    LanguageGuidanceDistillation,
    Trajectories,
    TrajectoryCollator,
    TrajectoryPlan,
    denoiser,
    guided,
    guided_log_probabilities,
    record,
    relative_error,
    snr_weights,
    space_weights,
)
from mixadapters.tuners.agd.layer import places

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*torchao.*")]

NULL = {"class_labels": torch.tensor([5])}


def dit(out_channels: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=out_channels, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval().requires_grad_(False)


def recorded(base: nn.Module, rows: int = 16, steps: int = 6) -> Trajectories:
    plan = TrajectoryPlan((2, 4, 4), steps=steps, batch_size=8, dtype="float32")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return record(denoiser(base), scheduler, {"class_labels": torch.arange(rows) % 5}, NULL, plan)


@pytest.fixture(scope="module")
def data() -> Trajectories:
    return recorded(dit())


def adapt(base: nn.Module, data: Trajectories | None = None, **fields: Any) -> PeftModel:
    fields = {"r": 8, **({} if data is None else data.config_fields), **fields}
    return get_peft_model(base, AGDConfig(**fields))


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-2,
            "remove_unused_columns": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True, "logging_strategy": "no", **changes,
        }
    )  # fmt: skip


def trainer(model: nn.Module, data: Any, folder: Any, objective: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        model, arguments(folder, **changes), train_dataset=data, data_collator=TrajectoryCollator(model),
        callbacks=[StageCallback("distill", objectives=[objective or GuidanceDistillation()])],
    )  # fmt: skip


def batch_of(data: Trajectories, model: nn.Module, rows: int = 6) -> dict[str, Any]:
    return TrajectoryCollator(model)([data[i * 5] for i in range(rows)])


def test_whole_timesteps_are_whole_numbers_in_a_batch(data) -> None:
    """An engine that casts arguments to bfloat16 would round them as floats: 749 to 748."""
    model = dit()
    batch = batch_of(data, model)
    assert batch["timestep"].dtype == torch.int64
    items = [{**data[i], "timestep": data[i]["timestep"] + 0.5} for i in range(2)]
    assert TrajectoryCollator(model)(items)["timestep"].tolist() == [float(item["timestep"]) for item in items]


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["normalized", "native"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_the_weighted_distance_to_the_target(data, loss, weighted) -> None:
    model = adapt(dit(), data)
    batch = batch_of(data, model)
    table = snr_weights(diffusers.DDIMScheduler()) if weighted else None
    context = model.base_model.context
    context.objectives.append(GuidanceDistillation(loss, timestep_weights=table))
    output = model.train()(**batch)
    distance = (output.sample - batch["target"]).square().mean((1, 2, 3))
    if loss == "normalized":
        distance = distance / ((batch["guidance_scale"] - 1) ** 2 + 0.25)
    if weighted:
        alphas = diffusers.DDIMScheduler().alphas_cumprod[batch["timestep"].long()]
        distance = distance * (1 / alphas).clamp(max=25)
    torch.testing.assert_close(output.loss, distance.mean())
    model.eval()
    torch.testing.assert_close(model(**batch).loss, output.loss)  # in evaluation too
    assert not hasattr(model(**{k: v for k, v in batch.items() if k != "target"}), "loss")


def test_targets_are_made_on_the_way_where_the_batch_says_how(data) -> None:
    model = adapt(dit(), data, default_scale=3.0)
    batch = batch_of(data, model)
    context = model.base_model.context
    context.objectives.append(GuidanceDistillation())
    expected = model.train()(**batch).loss
    target = batch.pop("target")
    null = {"class_labels": torch.full((6,), 5)}
    with torch.no_grad():  # adapters that do something must not reach the teacher
        for host in model.base_model.hosts():
            host.adapters["default"].up.weight.normal_(std=3.0)
    moved = model(**batch, target=target).loss
    torch.testing.assert_close(model(**batch, unconditional=null).loss, moved)
    assert (moved - expected).abs() > 1e-3
    with pytest.raises(ValueError, match="neither target nor unconditional"):
        model(**batch)


def test_learned_variance_is_neither_guided_nor_trained() -> None:
    base = dit(out_channels=4)
    data = recorded(base)
    assert data[0]["target"].shape == (2, 4, 4)
    model = adapt(base, data)
    model.base_model.context.objectives.append(GuidanceDistillation())
    batch = batch_of(data, model)
    output = model.train()(**batch)
    assert output.sample.shape[1] == 4
    distance = (output.sample[:, :2] - batch["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(output.loss, (distance / ((batch["guidance_scale"] - 1) ** 2 + 0.25)).mean())


def test_batches_that_cannot_be_distilled_are_refused(data, tmp_path) -> None:
    model = adapt(dit(), data)
    model.base_model.context.objectives.append(GuidanceDistillation())
    batch = batch_of(data, model)
    with pytest.raises(ValueError, match=r"target \(6, 2, 3, 4\) does not fit the prediction \(6, 2, 4, 4\)"):
        model(**{**batch, "target": batch["target"][:, :, :3]})
    with pytest.raises(ValueError, match="no guidance_scale"):
        model(**{k: v for k, v in batch.items() if k != "guidance_scale"})
    with pytest.raises(ValueError, match="loss='huber' is unknown"):
        GuidanceDistillation("huber")
    with pytest.raises(ValueError, match="delta=0 must be a finite number, above 0"):
        GuidanceDistillation(delta=0)
    for weights in (torch.tensor([1.0, torch.nan]), torch.ones(2, 2), [-1.0]):
        with pytest.raises(ValueError, match=r"timestep_weights of shape .* must be \(T,\) finite numbers"):
            GuidanceDistillation(timestep_weights=weights)
    for clip in (0, torch.nan, True):
        with pytest.raises(ValueError, match="clip="):
            snr_weights(diffusers.DDIMScheduler(), clip)
        with pytest.raises(ValueError, match="clip="):
            space_weights(diffusers.DDIMScheduler(), "noise", clip)
    for options, message in (({"by": "class"}, "by='class' is unknown"), ({"edges": [3, 1]}, "numbers that rise")):
        with pytest.raises(ValueError, match=message):
            relative_error(model, [batch], **options)
    with pytest.raises(ValueError, match=r"remove_unused_columns=True would drop.*'guidance_scale', 'target'"):
        trainer(model, data, tmp_path, remove_unused_columns=True)


def test_targets_that_are_not_finite_never_reach_the_weights(data, tmp_path) -> None:
    model = adapt(dit(), data)
    model.base_model.context.objectives.append(GuidanceDistillation())
    batch = batch_of(data, model)
    batch["target"][[1, 4], 0, 0, 0] = torch.tensor([torch.inf, torch.nan])
    times = [float(batch["timestep"][row]) for row in (1, 4)]
    for call in (lambda: model.train()(**batch), lambda: relative_error(model, [batch])):
        with pytest.raises(ValueError, match=r"not finite in rows \[1, 4\] of the batch, at timesteps") as caught:
            call()
        assert str(times) in str(caught.value)
    broken = recorded(dit())
    for shard in broken.shards:
        shard["target"][:, :, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"target at timestep .* of a record by DDIMScheduler\) is not finite"):
        trainer(adapt(dit(), broken), broken, tmp_path).train()


def test_schedulers_of_flow_matching_have_no_weights_by_signal() -> None:
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler has no alphas_cumprod.*leave out"):
        snr_weights(diffusers.FlowMatchEulerDiscreteScheduler())


def test_models_that_return_tensors_or_tuples_get_a_loss_too(data) -> None:
    class Bare(nn.Module):
        def __init__(self, inner: nn.Module, as_tuple: bool) -> None:
            super().__init__()
            self.inner, self.as_tuple = inner, as_tuple

        def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
            output = self.inner(hidden_states, timestep=timestep, class_labels=class_labels).sample
            return (output,) if self.as_tuple else output

    for as_tuple in (False, True):
        fields = {"target_modules": ["attn1"], "conditions": {"timestep": "timestep"}, "teacher": None}
        model = adapt(Bare(dit(), as_tuple), data, **fields)
        model.base_model.context.objectives.append(GuidanceDistillation())
        output = model.train()(**batch_of(data, model))
        assert output["loss"] > 0
        assert output["sample"].shape == (6, 2, 4, 4)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, Trajectories, Trajectories]:
    """A model that has learned five classes of pictures and their mixture, so that guidance is what it is for; its
    guided trajectories, and some held out."""
    base = dit().train().requires_grad_(True)
    for block in base.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # it would drop labels in each block on its own
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, 2, 4, 4, generator=generator)
    noising = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    optimizer = torch.optim.Adam(base.parameters(), 3e-3)
    for _ in range(300):
        labels = torch.randint(0, 5, (64,), generator=generator)
        noise = torch.randn(64, 2, 4, 4, generator=generator)
        images = means[labels] + 0.5 * torch.randn(64, 2, 4, 4, generator=generator)
        timestep = torch.randint(0, 1000, (64,), generator=generator)
        given = torch.where(torch.rand(64, generator=generator) < 0.2, 5, labels)
        said = base(noising.add_noise(images, noise, timestep), timestep=timestep, class_labels=given).sample
        (said - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    base.eval().requires_grad_(False)
    return base, *recorded(base, rows=168, steps=10).split(8)


# The others are the paper's, and here to learn at all.
@pytest.mark.parametrize(
    ("kind", "steps", "bound"), [("film", 200, 0.4), ("cross_attention", 60, 0.8), ("offset", 60, 0.8)]
)
def test_adapters_learn_the_guided_prediction_on_held_out_trajectories(kind, steps, bound, learned, tmp_path) -> None:
    base, train, held_out = learned
    model = adapt(copy.deepcopy(base), train, kind=kind, r=16)
    batches = list(DataLoader(held_out, 40, collate_fn=TrajectoryCollator(model)))
    assert relative_error(model, batches) == [1.0]
    options = {"max_steps": steps, "lr_scheduler_type": "cosine"}
    trainer(model, train, tmp_path, learning_rate=5e-3, **options).train()
    model.eval()
    below, above, nowhere = relative_error(model, batches, "guidance_scale", [4.0, 7.0])
    assert above < bound
    assert below < 1
    assert nowhere != nowhere  # no scale above 7
    (after,) = relative_error(model, batches)
    by_time = relative_error(model, batches, "timestep", [500.0])
    assert min(by_time) <= after <= max(by_time)


def test_adapters_learn_to_guide_against_the_condition_that_they_are_given(learned, tmp_path) -> None:
    """Away from one of the other classes, and from another one where they are told so."""
    base, _, _ = learned
    rows = torch.arange(168)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    train, held_out = record(
        denoiser(base), scheduler, {"class_labels": rows % 5}, {"class_labels": (rows + 1 + rows // 5 % 4) % 5},
        TrajectoryPlan((2, 4, 4), steps=10, batch_size=84, dtype="float32"),
    ).split(8)  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), AGDConfig(r=32, **{**train.config_fields, "teacher": None}))
    assert model.peft_config["default"].negative == "distil"
    trainer(model, train, tmp_path, learning_rate=1e-2, max_steps=200, lr_scheduler_type="cosine").train()
    batches = list(DataLoader(held_out, 80, collate_fn=TrajectoryCollator(model)))
    (right,) = relative_error(model.eval(), batches)
    for batch in batches:
        batch["unconditional"] = {name: (value + 1) % 5 for name, value in batch["unconditional"].items()}
    (wrong,) = relative_error(model, batches)
    assert right < 0.5
    assert right < 0.6 * wrong


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("space", ["noise", "sample", "velocity"])
def test_loss_in_another_space_is_the_distance_of_what_predictions_imply(predicted, space) -> None:
    """Noise, sample and velocity of two predictions of one x_t, made by hand."""
    flow = predicted == "flow"
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler(prediction_type=predicted)
    )
    t = 300
    alpha, sigma = (
        (0.7, 0.3) if flow else (scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5)
    )
    x, one, other = torch.randn(3, 5, dtype=torch.float64)

    def implied(said: Tensor) -> Tensor:
        if flow:
            sample, noise = x - sigma * said, x + alpha * said
        elif predicted == "v_prediction":
            sample, noise = alpha * x - sigma * said, sigma * x + alpha * said
        elif predicted == "sample":
            sample, noise = said, (x - alpha * said) / sigma
        else:
            sample, noise = (x - sigma * said) / alpha, said
        velocity = noise - sample if flow else alpha * noise - sigma * sample
        return {"noise": noise, "sample": sample, "velocity": velocity}[space]

    expected = (implied(one) - implied(other)).square().mean()
    found = (one - other).square().mean() * space_weights(scheduler, space)[t]
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)
    assert space_weights(scheduler, space).isfinite().all()


def test_space_of_the_loss_must_be_known() -> None:
    with pytest.raises(ValueError, match="loss_space='latent' is unknown"):
        space_weights(diffusers.DDIMScheduler(), "latent")


def test_record_teaches_the_model_that_made_it_and_no_other(data) -> None:
    other = dit()
    with torch.no_grad():
        other.proj_out_2.weight.add_(0.1)
    with pytest.raises(ValueError, match=r"made by a DiTTransformer2DModel of other weights.*leave out `teacher`"):
        adapt(other, data)
    adapt(other, data, teacher=None)
    adapt(dit().to(torch.bfloat16), data)  # of which nobody can tell
    info = {**data.info, "model_class": "UNet2DConditionModel"}
    with pytest.raises(ValueError, match="made by a UNet2DConditionModel, and teaches no DiTTransformer2DModel"):
        adapt(dit(), teacher=info)
    before = {name: value for name, value in data.info.items() if name not in ("model_class", "model_dtypes")}
    adapt(dit(), teacher=before)  # an older record


def test_quantized_model_is_taught_by_itself(tmp_path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = dit()
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    train = recorded(base)
    model = adapt(base, train)
    batches = [batch_of(train, model)]
    trainer(model, train, tmp_path, max_steps=10).train()
    assert relative_error(model.eval(), batches)[0] < 1
    model.save_pretrained(tmp_path / "saved")
    again = dit()
    torchao.quantize_(again, torchao.Int8WeightOnlyConfig())
    loaded = PeftModel.from_pretrained(again, tmp_path / "saved").eval()
    assert relative_error(loaded, batches) == relative_error(model, batches)


def test_trainer_trains_the_adapters_alone_and_evaluates(data, tmp_path) -> None:
    model = adapt(dit(), data)
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = trainer(model, data, tmp_path, label_names=["target"], per_device_eval_batch_size=16)
    run.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".agd_adapters.default." in n for n in changed)
    assert any("trunk" in n for n in changed)
    measured = run.evaluate(data)["eval_loss"]
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss for batch in DataLoader(data, 16, collate_fn=TrajectoryCollator(model))]
    assert measured == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def test_accumulated_micro_batches_equal_one_batch(data, tmp_path) -> None:
    weights = []
    for size, accumulate in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        model = adapt(dit(), data)
        run = trainer(
            model, data, tmp_path, max_steps=2, per_device_train_batch_size=size, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulate, optim="sgd", train_sampling_strategy="sequential",
        )  # fmt: skip
        run.train()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name, atol=1e-5, rtol=1e-4)


def test_training_in_bf16_with_checkpointing_saves_and_resumes_adapters_alone(data, tmp_path) -> None:
    def made() -> PeftModel:
        torch.manual_seed(0)
        model = adapt(dit().bfloat16(), data)
        model.get_base_model().enable_gradient_checkpointing()
        return model

    options = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "save_safetensors": True}
    options = {k: v for k, v in options.items() if k in TrainingArguments.__dataclass_fields__}
    whole = made()
    trainer(whole, data, tmp_path / "run", **options).train()
    folder = tmp_path / "run" / "checkpoint-2"
    size = (folder / "adapter_model.safetensors").stat().st_size
    adapters = 4 * sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert size < adapters + 20_000
    assert not list(folder.glob("model*.safetensors"))
    resumed = made()
    trainer(resumed, data, tmp_path / "run", **options).train(resume_from_checkpoint=str(folder))
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(other, value, msg=name, atol=1e-5, rtol=1e-4)
    assert any(p.abs().max() > 0 for n, p in whole.named_parameters() if ".up." in n)


def test_interval_teacher_is_imitated_outside_its_interval_by_the_base() -> None:
    base = dit()
    x, t = torch.randn(4, 2, 4, 4), torch.tensor([100.0, 300.0, 600.0, 900.0])
    labels, scale = {"class_labels": torch.arange(4)}, torch.full((4,), 3.0)
    step = guided(denoiser(base), labels, NULL, scale, interval=(200, 700))
    model = adapt(base).eval()
    for host in model.base_model.hosts():
        nn.init.normal_(host.adapters["default"].up.weight, std=0.3)
    with torch.no_grad():
        student = model(x, timestep=t, **labels, guidance_scale=scale, guidance_interval=(200, 700)).sample
        plain = model(x, timestep=t, **labels).sample
    for row in (0, 3):
        assert torch.equal(student[row], plain[row])
        torch.testing.assert_close(step(x, t)[row], plain[row], atol=1e-5, rtol=1e-5)


# --- language models ----------------------------------------------------------------------------------------------


def texts(rows: int = 4, length: int = 10, seed: int = 0, words: int = 91) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5 + words, (rows, length), generator=g)
    prompt = torch.zeros_like(ids)
    real = torch.ones_like(ids)
    for row in range(rows):
        real[row, : row % 3] = 0  # left padding
        prompt[row, row % 3 : 4 + row % 2] = 1
    ids = ids.masked_fill(real == 0, 0)
    return {"input_ids": ids, "attention_mask": real, "prompt_mask": prompt}


def test_teacher_of_language_models_is_that_of_generate(tiny) -> None:
    model = tiny("llama")
    batch = texts()
    real, prompt = batch["attention_mask"].bool(), batch["prompt_mask"].bool()
    scores = guided_log_probabilities(model, batch["input_ids"], real, prompt, 2.5)
    for row in range(4):
        start, end = row % 3, 4 + row % 2  # the prompt
        ids = batch["input_ids"][row : row + 1, start:]
        rule = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, model)
        for place in range(end - start, ids.shape[1] + 1):
            with torch.no_grad():
                logits = model(ids[:, :place]).logits[:, -1]
            expected = rule(ids[:, :place], logits).log_softmax(-1)
            torch.testing.assert_close(scores[row, start + place - 1], expected[0], atol=1e-4, rtol=1e-4)


def test_language_model_learns_to_generate_in_one_pass_what_guidance_takes_two_for(tiny, tmp_path) -> None:
    base = tiny("llama", num_hidden_layers=2)
    model = get_peft_model(base, AGDConfig(r=32, max_scale=3.0, task_type="CAUSAL_LM"))
    many = texts(2048, words=6)
    train = [
        {k: v[i] for k, v in many.items()} | {"guidance_scale": torch.tensor(1.5 + (i // 6 % 4) / 2)}
        for i in range(2048)
    ]
    test = texts(32, seed=99, words=6)
    real, prompt = test["attention_mask"].bool(), test["prompt_mask"].bool()
    valid = real & ~prompt

    def distance(scale: float | None) -> float:
        model.eval()
        with torch.no_grad():
            extra = {} if scale is None else {"guidance_scale": scale, "prompt_mask": test["prompt_mask"]}
            student = model(input_ids=test["input_ids"], attention_mask=test["attention_mask"], **extra).logits
        teacher = guided_log_probabilities(model, test["input_ids"], real, prompt, 2.5)
        student = student.log_softmax(-1)
        return float((teacher.exp() * (teacher - student)).sum(-1)[valid].mean())

    before = distance(2.5)
    assert before == pytest.approx(distance(None))
    run = Trainer(
        model, arguments(tmp_path, max_steps=100, learning_rate=5e-3, per_device_train_batch_size=32),
        train_dataset=train,
        callbacks=[StageCallback("distill", objectives=[LanguageGuidanceDistillation()], check_head=False)],
    )  # fmt: skip
    run.train()
    assert distance(2.5) < 0.87 * before
    assert distance(None) == pytest.approx(before)

    # In use: one pass per token, over a cache, each row with its scale.
    ids = test["input_ids"][:4, 3:7]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    calls: list[int] = []
    handle = base.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"].shape[0]), with_kwargs=True)
    with model.base_model.context.pin(guidance_scale=torch.tensor([1.0, 2.5, 2.5, 1.0])):
        together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, use_cache=False)
    assert torch.equal(together, again)
    assert calls == [4] * 8
    calls.clear()
    scales = torch.tensor([1.0, 2.5, 2.5, 1.0])
    by_argument = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), guidance_scale=scales, **settings)
    assert torch.equal(by_argument, together)
    assert calls == [4] * 4
    handle.remove()
    plain = tiny("llama", num_hidden_layers=2).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(together[[0, 3]], plain[[0, 3]])
    with model.base_model.context.pin(guidance_scale=2.5):
        beams = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, **settings)
    assert beams.shape == together.shape


def test_language_loss_counts_what_follows_a_prompt_from_its_last_token_on(tiny) -> None:
    model = get_peft_model(tiny("llama"), AGDConfig(r=4, max_scale=3.0, task_type="CAUSAL_LM")).train()
    for host in model.base_model.hosts():
        nn.init.normal_(host.adapters["default"].up.weight, std=0.3)
    model.base_model.context.objectives.append(LanguageGuidanceDistillation())
    batch = texts()
    output = model(**batch, guidance_scale=2.0)
    student = output.logits.detach().log_softmax(-1)
    real, prompt = batch["attention_mask"].bool(), batch["prompt_mask"].bool()
    teacher = guided_log_probabilities(tiny("llama"), batch["input_ids"], real, prompt, 2.0)
    distances = []
    for row in range(4):
        end = 4 + row % 2  # of the prompt, which its last token belongs to
        for place in range(end - 1, real.shape[1]):
            p, q = teacher[row, place], student[row, place]
            distances.append((p.exp() * (p - q)).sum())
    torch.testing.assert_close(output.loss.detach(), torch.stack(distances).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "paligemma", "internvl", "smolvlm", "mllama"])
def test_teacher_of_a_model_that_sees_is_given_the_images_and_without_the_prompt_none(kind) -> None:
    config = AGDConfig(r=4, max_scale=3.0, task_type="CAUSAL_LM")
    model, plain, batch = get_peft_model(seeing(kind), config).train(), seeing(kind), seen(kind, [2, 1])
    model.base_model.context.objectives.append(LanguageGuidanceDistillation())
    ids, prompt = batch["input_ids"], torch.ones_like(batch["input_ids"])
    prompt[:, -2:] = 0
    types = {"token_type_ids": 1 - prompt} if kind == "paligemma" else {}  # it is causal in the answer alone
    batch |= types
    if kind == "llava":  # the caller's positions
        batch["position_ids"] = torch.arange(3, 3 + ids.shape[1]).expand(2, -1)
    calls: list[set[str]] = []
    model.get_base_model().register_forward_pre_hook(lambda _, args, given: calls.append(set(given)), with_kwargs=True)
    beside = {"prompt_mask": prompt, "guidance_scale": torch.tensor([1.0, 2.0]), "labels": ids, "use_cache": False}
    with torch.no_grad():
        given = model(**batch, **beside)
        whole = plain(**batch).logits[:, -3:].log_softmax(-1)
        types = {name: value[:, -3:] for name, value in types.items()}
        answer = plain(input_ids=ids[:, -3:], attention_mask=torch.ones(2, 3, dtype=torch.long), **types).logits
        answer = answer.log_softmax(-1)
    torch.testing.assert_close(given.logits[:, -3:].log_softmax(-1), whole, rtol=1e-4, atol=1e-5)  # at the start
    said = (answer + 2 * (whole - answer)).log_softmax(-1)[1]
    distance = (said.exp() * (said - whole[1])).sum(-1)
    assert distance.mean() > 0.05
    sorts = {name for name in batch if name.endswith("token_type_ids")}
    _, whole_pass, answer_pass = calls
    assert set(batch) <= whole_pass
    assert answer_pass - {"guidance_scale"} == {"input_ids", "attention_mask", "position_ids", "use_cache", *sorts}
    assert "labels" not in whole_pass
    torch.testing.assert_close(given.loss, distance.sum() / 6, rtol=1e-3, atol=1e-5)  # of scale 1 there is none
    prompt[1, :] = torch.arange(prompt.shape[1]) <= (ids[1] != 0).int().argmax()
    with pytest.raises(ValueError, match="an image or sound stands after the prompt"):
        model(**batch, prompt_mask=prompt, guidance_scale=2.0)


def test_language_batches_without_prompts_are_refused(tiny) -> None:
    model = get_peft_model(tiny("llama"), AGDConfig(r=4, task_type="CAUSAL_LM")).train()
    model.base_model.context.objectives.append(LanguageGuidanceDistillation())
    batch = texts()
    with pytest.raises(ValueError, match=r"no \['prompt_mask', 'guidance_scale'\]"):
        model(input_ids=batch["input_ids"])


# --- what follows the prompt --------------------------------------------------------------------------------------


def language_adapters(tiny: Any, **fields: Any) -> PeftModel:
    """As if trained."""
    model = get_peft_model(tiny("llama"), AGDConfig(**{"r": 4, "max_scale": 3.0, "task_type": "CAUSAL_LM", **fields}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "agd_adapters." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def test_places_of_tokens_are_before_at_and_after_the_end_of_the_prompt() -> None:
    prompt = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert places(prompt).tolist() == [[1, 1, 2, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 2]]
    with pytest.raises(ValueError, match="prompt_mask must hold True and False, or 1 and 0"):
        places(prompt * 2)


def test_language_adapters_tell_a_prompt_from_what_follows(tiny) -> None:
    model = language_adapters(tiny)
    assert model.peft_config["default"].after_prompt
    ids = texts(rows=1)["input_ids"]
    ends = {end: torch.arange(10).lt(end).long().unsqueeze(0) for end in (3, 6)}
    with torch.no_grad():
        early, late = (model(input_ids=ids, guidance_scale=2.0, prompt_mask=mask).logits[0] for mask in ends.values())
        base = model(input_ids=ids).logits[0]
        assert torch.equal(model(input_ids=ids, guidance_scale=1.0, prompt_mask=ends[3]).logits[0], base)
    assert torch.equal(early[:2], late[:2])  # within both prompts, before the end of either
    assert ((early - late).abs().amax(1)[2:] > 1e-4).all()
    with pytest.raises(ValueError, match=r"which tokens follow the prompt .*pass prompt_mask \(B, T\)"):
        model(input_ids=ids, guidance_scale=2.0)


def test_generation_knows_where_its_prompt_ends(tiny) -> None:
    """In every forward: with a cache, without one, and in parts of a prompt."""
    model = language_adapters(tiny)
    batch = texts(rows=2, length=6)
    ids, real = batch["input_ids"], batch["attention_mask"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "guidance_scale": 2.5}
    found = model.generate(input_ids=ids, attention_mask=real, **settings)
    for options in ({"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids=ids, attention_mask=real, **settings, **options), found), options
    prompt = torch.ones_like(ids)
    plain = language_adapters(tiny, task_type=None)  # whose `generate` PEFT hands on
    del settings["guidance_scale"]
    context = plain.base_model.context
    with context.pin(guidance_scale=2.5):
        assert torch.equal(plain.generate(input_ids=ids, attention_mask=real, **settings), found)
        with context.pin(prompt_mask=prompt), context.pin_in_thread(prompt_mask=torch.zeros_like(prompt)):
            assert not torch.equal(plain.generate(input_ids=ids, attention_mask=real, **settings), found)
        with pytest.raises(ValueError, match=r"pass prompt_mask .*`generate` knows it"):
            plain(input_ids=ids, attention_mask=real)
    ours = plain.generate(input_ids=ids, attention_mask=real, guidance_scale=2.5, **settings)
    with model.disable_adapter():
        theirs = model.get_base_model().generate(input_ids=ids, attention_mask=real, guidance_scale=2.5, **settings)
    assert torch.equal(ours, theirs)  # transformers' two passes
    assert not torch.equal(ours, found)
    for step in range(5):
        sofar = found[:, : 6 + step]
        grown = [torch.cat([part, torch.full((2, step), value)], 1) for part, value in ((real, 1), (prompt, 0))]
        with torch.no_grad():
            logits = model(input_ids=sofar, attention_mask=grown[0], prompt_mask=grown[1], guidance_scale=2.5).logits
        assert torch.equal(logits[:, -1].argmax(-1), found[:, 6 + step])


def test_language_adapters_of_before_load_without_an_embedding_of_places(tiny, tmp_path) -> None:
    model = language_adapters(tiny, after_prompt=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("after_prompt") is False
    file.write_text(json.dumps(fields))
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    ids = texts(rows=1)["input_ids"]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, guidance_scale=2.0).logits for m in (model, again))
    assert torch.equal(ours, theirs)
    again.load_adapter(tmp_path, "default")  # as a Trainer does that goes on
    assert again.peft_config["default"].after_prompt is False


def test_places_are_for_the_kind_that_has_them(tiny) -> None:
    with pytest.raises(ValueError, match="after_prompt=True is for kind='film', not 'offset'"):
        AGDConfig(kind="offset", after_prompt=True)
    assert get_peft_model(tiny("llama"), AGDConfig(r=4, kind="offset")).peft_config["default"].after_prompt is False


def test_another_model_may_be_the_teacher(tiny) -> None:
    model = language_adapters(tiny).train()
    batch = {**texts(), "guidance_scale": 2.0}
    losses = []
    for teacher in (None, tiny("llama"), tiny("llama", num_hidden_layers=3)):
        model.base_model.context.objectives[:] = [LanguageGuidanceDistillation(teacher)]
        losses.append(float(model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] != pytest.approx(losses[2])
