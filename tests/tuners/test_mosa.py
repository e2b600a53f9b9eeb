"""MoSA: the partition, the draws, what trains, the two passes, and the way back to a plain adapter."""

from __future__ import annotations

import copy
import hashlib
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted import gradients, randomize, without_dropout
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from processes import Process
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from mixadapters import BottleneckConfig, LazyAdamW, MoSAConfig
from mixadapters.core.routing import Routing
from mixadapters.tuners.mosa.objective import Pair
from mixadapters.tuners.mosa.split import GRANULARITIES, SplitBank, SplitLinear, deal

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
ONE_PASS = {"consistency": 0.0}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": 3}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of two layers, a first and a last one, where a test asks for no more."""
    return partial(tiny, layers=2)


def mosa(model: nn.Module, **fields: Any) -> PeftModel:
    """A MoSA model with random D, in training mode."""
    return randomize(get_peft_model(model, MoSAConfig(**{"r": 8, **fields}))).train()


def banks(model: nn.Module) -> list[SplitBank]:
    return [m for m in model.modules() if isinstance(m, SplitBank)]


def parts(model: nn.Module) -> list[SplitLinear]:
    return [m for m in model.modules() if isinstance(m, SplitLinear)]


def drawn(model: nn.Module) -> list[Tensor]:
    """The experts of the last forward, (passes, 2) for each bank."""
    shared = model.base_model.context.record.shared
    return [shared[bank] for bank in banks(model)]


def losses(model: nn.Module) -> dict[str, float]:
    """The auxiliary losses since the last call, by name."""
    log = model.base_model.context.loss_log
    found = {name: float(total) / count for name, (total, count) in log.items()}
    log.clear()
    return found


# --- M1: the partition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "num_experts"), [((7, 11), 4), ((48, 33), 49), ((5, 3), 15), ((768, 64), 4)])
def test_m01_every_entry_has_one_owner_and_parts_differ_by_one_at_most(shape, num_experts) -> None:
    owner = deal(shape, num_experts, "element", "layer.0.up", 0)
    assert owner.shape == shape
    assert owner.dtype == torch.uint8
    sizes = torch.bincount(owner.flatten().long(), minlength=num_experts)
    assert len(sizes) == num_experts
    assert sizes.sum() == shape[0] * shape[1]
    assert sizes.max() - sizes.min() <= 1
    masks = torch.stack([owner == i for i in range(num_experts)]).sum(0)
    assert (masks == 1).all()


def test_m01_map_does_not_depend_on_dtype_order_or_global_seed(tiny) -> None:
    maps = {}
    for dtype, first in itertools.product((torch.float32, torch.bfloat16, torch.float16), (0, 1)):
        torch.manual_seed(first)
        model = get_peft_model(tiny("llama", layers=4).to(dtype), MoSAConfig(r=8), autocast_adapter_dtype=False)
        maps[dtype, first] = [part.owner for part in parts(model)]
    for owners in maps.values():
        assert all(torch.equal(a, b) for a, b in zip(owners, maps[torch.float32, 0], strict=True))
    owners = maps[torch.float32, 0]
    assert not torch.equal(owners[0], owners[1])  # each layer has its own
    backwards = get_peft_model(tiny("llama", layers=4), MoSAConfig(r=8, layers_to_transform=[3, 1]))
    assert all(torch.equal(a.owner, owners[i]) for a, i in zip(parts(backwards), (1, 3), strict=True))
    other = get_peft_model(tiny("llama"), MoSAConfig(r=8, partition_seed=1))
    assert not torch.equal(parts(other)[0].owner, owners[0])


def test_m01_map_is_the_same_in_every_process() -> None:
    owner = deal((48, 33), 7, "element", "layer.0.up", 3)
    assert hashlib.sha256(owner.numpy().tobytes()).hexdigest()[:16] == "043b4e2d96d7b156"


@pytest.mark.parametrize(("granularity", "units"), [("element", 12), ("row", 3), ("column", 4)])
def test_m01_more_experts_than_units_are_refused(granularity, units) -> None:
    with pytest.raises(ValueError, match=rf"num_experts=13 is more than the {units} units .*lower it"):
        deal((3, 4), 13, granularity, "layer.0.up", 0)
    with pytest.raises(ValueError, match="num_experts=256 must be an integer, at least 1, at most 255"):
        MoSAConfig(num_experts=256)


# --- M2: what trains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"split": "both"}, {"base": "lora", "split": "both"}], ids=str)
def test_m02_entries_of_others_have_no_gradient_and_the_drawn_ones_that_of_a_dense_weight(
    tiny, tiny_inputs, fields
) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = mosa(tiny("llama"), **fields, **ONE_PASS)
    model(**inputs).loss.backward()
    experts = {id(bank): d for bank, d in zip(banks(model), drawn(model), strict=True)}
    grads = gradients(model)
    dense = copy.deepcopy(model)
    for bank, mine in zip(banks(dense), banks(model), strict=True):  # the drawn weights, as leaves
        expert = bank.experts["adapter"]
        for column, half in enumerate(("down", "up")):
            part = getattr(expert, half)
            if isinstance(part, SplitLinear):
                weight, _ = part.of_expert(experts[id(mine)][0, column])
                part.base, part.weight = None, nn.Parameter(weight.detach())
                part.owner.fill_(experts[id(mine)][0, column])
    for bank in banks(dense):
        bank.draws -= 1
    dense(**inputs).loss.backward()
    checked = 0
    for (name, part), twin in zip(model.named_modules(), dense.modules(), strict=True):
        if isinstance(part, SplitLinear):
            gradient, full = grads[f"{name}.weight"], twin.weight.grad
            bank = next(b for b in banks(model) if part in b.split_parts())
            column = int(part is bank.experts["adapter"].up)
            here = part.owner == experts[id(bank)][0, column]
            assert (gradient[~here] == 0).all()
            torch.testing.assert_close(gradient[here], full[here])
            checked += int(gradient[here].abs().max() > 0)
    assert checked == len(parts(model))


# --- M3: one expert is the plain adapter -------------------------------------------------------------------------

PLAIN = [
    (
        {"style": "pfeiffer", "layer_norm": False},
        BottleneckConfig(r=8, placement="pfeiffer", activation="relu"),
    ),
    (
        {"style": "houlsby"},
        BottleneckConfig(r=8, placement="houlsby", activation="silu"),
    ),
    (
        {"style": "adaptformer", "split": "both"},
        BottleneckConfig(r=8, placement="parallel", adapter_input="residual", layer_norm=True, scale=0.1),
    ),
    (
        {"base": "lora"},
        LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ),
]


@pytest.mark.parametrize(
    ("fields", "plain"), PLAIN, ids=lambda v: v.get("style", "lora") if isinstance(v, dict) else ""
)
def test_m03_one_expert_is_the_plain_adapter_bit_for_bit(tiny, tiny_inputs, fields, plain) -> None:
    trained = []
    for config in (MoSAConfig(r=8, num_experts=1, **fields), plain):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), copy.deepcopy(config)).train()
        if isinstance(config, LoraConfig):  # PEFT draws twice
            torch.manual_seed(0)
            weights = get_peft_model(
                tiny("llama"), MoSAConfig(r=8, num_experts=1, **fields)
            ).base_model.merge_experts()
            set_peft_model_state_dict(model, weights[1])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for step in range(30):
            outputs = model(**tiny_inputs("llama", length=4, labels="tokens", seed=step % 3))
            outputs.loss.backward()
            history.append(outputs.loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        trained.append((torch.stack(history), [p.detach() for p in model.parameters() if p.requires_grad]))
    (losses_mosa, mine), (losses_plain, theirs) = trained
    assert losses_mosa[-1] < 0.9 * losses_mosa[0]
    if isinstance(plain, LoraConfig):  # PEFT multiplies and adds in another order
        torch.testing.assert_close(losses_mosa, losses_plain, atol=1e-4, rtol=1e-4)
        return
    assert torch.equal(losses_mosa, losses_plain)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# --- M4: the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "fields", [{}, {"style": "houlsby", "split": "both"}, {"base": "lora", "split": "down"}], ids=str
)
def test_m04_output_is_base_at_the_start_in_training_and_evaluation(tiny, tiny_inputs, kind, fields) -> None:
    inputs = tiny_inputs(kind)
    base = without_dropout(tiny(kind, **({"dropout_rate": 0.0} if kind == "t5" else {})))
    if hasattr(base.config, "attention_probs_dropout_prob"):
        base.config.attention_probs_dropout_prob = 0.0
    with torch.no_grad():
        expected = base(**inputs).logits
    model = without_dropout(get_peft_model(base, MoSAConfig(r=8, **fields)))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, expected)
    torch.testing.assert_close(model.train()(**inputs).logits, expected, atol=2e-4, rtol=1e-4)
    assert len(drawn(model)) == len(banks(model)) > 0


# --- M5, M6, M7: the mean of the experts -------------------------------------------------------------------------


def all_outputs(bank: SplitBank, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of every pair of experts, (N^2, n, M), and that of the merged bank, (n, M)."""
    outputs = []
    for pair in itertools.product(range(bank.num_experts), repeat=2):
        weights = bank._weights(torch.tensor(pair))
        hidden = F.linear(x, weights.down, weights.b_down)
        hidden = {"identity": lambda h: h, "gelu": F.gelu}[bank.activation](hidden)
        outputs.append(weights.scale * F.linear(hidden, weights.up, weights.b_up))
    return torch.stack(outputs), bank(x, Routing(), None)


def one_bank(tiny: Any, **fields: Any) -> SplitBank:
    config = {"layer_norm": False} if fields.get("base") != "lora" else {}
    model = mosa(tiny("llama"), num_experts=3, **config, **fields).double()
    return banks(model)[0]


@pytest.mark.parametrize("biases", ["shared", "per_expert", "none"])
def test_m05_up_split_evaluates_the_mean_over_experts_exactly(tiny, biases) -> None:
    bank = one_bank(tiny, split="up", biases=biases)
    outputs, merged = all_outputs(bank, torch.randn(5, bank.in_features, dtype=torch.double))
    assert outputs.std(0).mean() > 0.01
    torch.testing.assert_close(outputs.mean(0), merged, atol=1e-12, rtol=0)


@pytest.mark.parametrize("split", ["up", "down", "both"])
def test_m06_lora_evaluates_the_mean_over_pairs_of_experts_exactly(tiny, split) -> None:
    bank = one_bank(tiny, base="lora", split=split)
    outputs, merged = all_outputs(bank, torch.randn(5, bank.in_features, dtype=torch.double))
    assert outputs.std(0).mean() > 0.01
    torch.testing.assert_close(outputs.mean(0), merged, atol=1e-12, rtol=0)


def test_m07_down_split_before_an_activation_is_only_close_to_the_mean(tiny) -> None:
    bank = one_bank(tiny, split="down")
    outputs, merged = all_outputs(bank, torch.randn(64, bank.in_features, dtype=torch.double))
    gap = (outputs.mean(0) - merged).norm() / merged.norm()
    assert 1e-3 < gap < 0.5
    with torch.no_grad():
        bank.experts["adapter"].down.weight.mul_(0.1)
    outputs, merged = all_outputs(bank, torch.randn(64, bank.in_features, dtype=torch.double))
    assert (outputs.mean(0) - merged).norm() / merged.norm() < 0.1 * gap


def test_m07_sum_is_as_many_times_the_learned_part_as_there_are_experts(tiny) -> None:
    mean, total = (one_bank(tiny, base="lora", split="up", merge=how) for how in ("mean", "sum"))
    x = torch.randn(5, mean.in_features, dtype=torch.double)
    torch.testing.assert_close(total(x, Routing(), None), 3 * mean(x, Routing(), None))


def test_m07_biases_of_the_experts_are_averaged_or_added_up_as_their_weights(tiny) -> None:
    part = parts(mosa(tiny("llama"), split="up", biases="per_expert"))[0]
    biases = torch.stack([part.of_expert(torch.tensor(i))[1] for i in range(part.num_experts)])
    assert (biases[0] - biases[1]).abs().max() > 1e-3
    torch.testing.assert_close(part.merged("mean")[1], biases.mean(0))
    torch.testing.assert_close(part.merged("sum")[1], biases.sum(0))


# --- M8, M9: the optimizer ---------------------------------------------------------------------------------------


class Copies(nn.Module):
    """The method as published: N whole copies of a weight, one of them in use, gradients masked after backward."""

    def __init__(self, part: SplitLinear) -> None:
        super().__init__()
        start = torch.zeros_like(part.weight) if part.base is None else part.base
        self.weights = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(part.num_experts))
        self.owner = part.owner

    def mask(self) -> None:
        for i, weight in enumerate(self.weights):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad * (self.owner == i)

    def merged(self) -> Tensor:
        return torch.stack(list(self.weights)).mean(0)


@pytest.mark.parametrize("fields", [{}, {"split": "both", "num_experts": 3}], ids=str)
def test_m08_sgd_takes_the_steps_of_whole_copies_with_masked_gradients(tiny, fields) -> None:
    bank = one_bank_at_start(tiny, **fields)
    expert = bank.experts["adapter"]
    copies = {
        half: Copies(getattr(expert, half)) for half in ("down", "up") if hasattr(getattr(expert, half), "owner")
    }
    fixed = {
        n: p
        for n, p in bank.named_parameters()
        if "weight" not in n or isinstance(getattr(expert, n.split(".")[2]), nn.Linear)
    }
    optimizer = torch.optim.SGD([getattr(expert, half).weight for half in copies], lr=0.05, momentum=0.9)
    reference = torch.optim.SGD([w for c in copies.values() for w in c.weights], lr=0.05, momentum=0.9)
    assert fixed
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, bank.in_features, dtype=torch.double, generator=generator)
        goal = torch.randn(16, bank.out_features, dtype=torch.double, generator=generator)
        experts = bank.draw(1)[0]
        mine = bank._weights(experts)
        theirs = mine._replace(**{h: copies[h].weights[experts[("down", "up").index(h)]] for h in copies})
        for weights in (mine, theirs):
            hidden = F.gelu(F.linear(x, weights.down, weights.b_down))
            F.mse_loss(F.linear(hidden, weights.up, weights.b_up), goal).backward()
        for whole in copies.values():
            whole.mask()
        for one in (optimizer, reference):
            one.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for half, whole in copies.items():
        merged, _ = getattr(expert, half).merged("mean")
        assert (merged - whole.weights[0]).abs().max() > 1e-4
        torch.testing.assert_close(merged, whole.merged(), atol=1e-12, rtol=0)


def one_bank_at_start(tiny: Any, **fields: Any) -> SplitBank:
    return banks(get_peft_model(tiny("llama"), MoSAConfig(r=8, layer_norm=False, **fields)).double())[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, steps: int) -> None:
    for step in range(steps):
        model(**inputs("llama", labels="tokens", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_m09_dense_moves_what_was_not_drawn_and_lazy_leaves_value_and_moments_alone(tiny, tiny_inputs) -> None:
    for mode, optimizer_class in (("dense", torch.optim.AdamW), ("lazy", LazyAdamW)):
        model = mosa(tiny("llama"), split="both", inactive_update=mode, **ONE_PASS)
        given = {"peft_model": model} if mode == "lazy" else {}
        optimizer = optimizer_class(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, **given
        )
        train(model, optimizer, tiny_inputs, 6)
        start = {id(p): p.base.clone() for p in parts(model) if p.base is not None}
        before = [
            (p.weight.clone(), {n: t.clone() for n, t in optimizer.state[p.weight].items()}) for p in parts(model)
        ]
        train(model, optimizer, tiny_inputs, 1)
        by_part = [expert for draw in drawn(model) for expert in draw[0]]
        idle = 0
        for part, (value, state), expert in zip(parts(model), before, by_part, strict=True):
            elsewhere, now = part.owner != expert, optimizer.state[part.weight]
            if id(part) in start:
                assert torch.equal(part.base, start[id(part)])
            assert not torch.equal(part.weight[~elsewhere], value[~elsewhere])
            if mode == "dense":
                assert not torch.equal(part.weight[elsewhere], value[elsewhere])
                continue
            assert torch.equal(part.weight[elsewhere], value[elsewhere])
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(now[moment][elsewhere], state[moment][elsewhere])
                assert not torch.equal(now[moment][~elsewhere], state[moment][~elsewhere])
            moved = now["step"] - state["step"]
            assert moved[expert] == 1
            assert moved.sum() == 1
            idle += int(elsewhere.sum())
        assert mode == "dense" or idle > 0


def test_m09_lazy_adamw_is_adamw_on_each_experts_own_weights() -> None:
    plain = nn.Linear(6, 5, bias=False).double()
    part = SplitLinear(
        plain, deal((5, 6), 3, "element", "x", 0), 3, zero=True, per_expert=False, lazy=True, init_weights=True
    )
    copies = [nn.Parameter(part.weight.detach().clone()) for _ in range(3)]
    lazy = LazyAdamW([part.weight], peft_model=part, lr=0.02, weight_decay=0.1)
    usual = torch.optim.AdamW(copies, lr=0.02, weight_decay=0.1)
    for step in range(30):
        expert = torch.tensor([0, 0, 2, 1, 0][step % 5])
        x = torch.randn(4, 6, dtype=torch.double)
        part.note(expert)
        (x @ part.of_expert(expert)[0].T).sin().sum().backward()
        mask = part.owner == expert
        copies[expert].grad = part.weight.grad.clone()
        lazy.step()
        lazy.zero_grad()
        usual.step()  # the other copies have no gradient, so it passes over them
        usual.zero_grad()
        torch.testing.assert_close(part.weight[mask], copies[expert][mask], atol=1e-12, rtol=0)
    assert lazy.state[part.weight]["step"].tolist() == [18, 6, 6]


def test_m09_lazy_without_its_optimizer_is_refused(tiny, tiny_inputs) -> None:
    model = mosa(tiny("llama"), inactive_update="lazy", **ONE_PASS)
    with pytest.raises(ValueError, match="inactive_update='lazy' needs the optimizer LazyAdamW"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), tiny_inputs, 2)


@pytest.mark.parametrize("made", [{"fused": True}, {"foreach": True}, {"other": True}], ids=str)
def test_m09_optimizers_that_know_no_draws_are_refused_before_their_first_step(tiny, tiny_inputs, made) -> None:
    """Fused ones change weights without a trace in their version; a LazyAdamW may belong to another model."""
    model = copy.deepcopy(mosa(tiny("llama"), inactive_update="lazy", **ONE_PASS))
    other = mosa(tiny("llama"), inactive_update="lazy", **ONE_PASS)
    optimizer_class, given = torch.optim.AdamW, made
    if "other" in made:
        optimizer_class, given = LazyAdamW, {"peft_model": other}
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1, **given)
    model(**tiny_inputs("llama", labels="tokens")).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"needs the optimizer LazyAdamW.*was to make a step.*'dense'"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    # Those of models without lazy parts are nobody's business.
    usual = mosa(tiny("llama"), **ONE_PASS)
    usual(**tiny_inputs("llama", labels="tokens")).loss.backward()
    torch.optim.AdamW(usual.parameters(), lr=0.1, fused=True).step()


def test_m09_trainer_with_its_default_optimizer_is_refused(tiny, tiny_inputs, tmp_path) -> None:
    batch = tiny_inputs("bert", batch=8, labels="tokens")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    model = get_peft_model(tiny("bert"), MoSAConfig(r=8, inactive_update="lazy"))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        Trainer(model, arguments, train_dataset=rows).train()


# --- M10: saving and resuming ------------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, rows: list[dict[str, Tensor]], **given: Any) -> Trainer:
    lazy = model.peft_config["default"].inactive_update == "lazy"
    optimizers = {"optimizer_cls_and_kwargs": (LazyAdamW, {"peft_model": model, "lr": 1e-2})} if lazy else {}
    arguments = TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **given,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, **optimizers)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_m10_resumed_training_is_bit_exact(tiny, tiny_inputs, tmp_path, mode) -> None:
    batch = tiny_inputs("bert", batch=8, labels="tokens")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    fields = {"r": 8, "split": "both", "inactive_update": mode, "dropout": 0.1}
    whole = get_peft_model(tiny("bert"), MoSAConfig(**fields))
    start = copy.deepcopy(whole)
    trainer(whole, tmp_path, rows).train()
    assert all(int(bank.draws) == 6 for bank in banks(whole))
    trainer(start, tmp_path, rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    names = [n for n, _ in whole.named_parameters() if "mosa_" in n] + [
        n for n, _ in whole.named_buffers() if "mosa_" in n
    ]
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (whole, start)]
    assert len(names) > 20
    for name in names:
        assert torch.equal(states[0][name], states[1][name]), name


@pytest.mark.parametrize(
    "changed", [{"partition_seed": 1}, {"num_experts": 3}, {"granularity": "row"}, {"r": 4}], ids=str
)
def test_m10_another_partition_than_the_saved_one_is_refused(tiny, tmp_path, changed) -> None:
    mosa(tiny("llama")).save_pretrained(tmp_path)
    ((name, value),) = changed.items()
    message = rf"adapter 'default' of this model: {name}=.* in the file, {value!r} here|in the file and \(4,"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path, config=MoSAConfig(**{"r": 8, **changed}))
    target = mosa(tiny("llama"), **changed)
    with pytest.raises(ValueError, match=message):
        target.load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("half", ["down", "up"])
def test_m10_a_file_in_which_one_half_was_dealt_otherwise_is_refused(tiny, tmp_path, monkeypatch, half: str) -> None:
    """The config cannot say so: by another generator of torch, for one."""
    with monkeypatch.context() as patch:
        dealt = lambda shape, n, kind, name, seed: deal(shape, n, kind, name, seed + name.endswith(f".{half}"))  # noqa: E731
        patch.setattr("mixadapters.tuners.mosa.split.deal", dealt)
        mosa(tiny("llama"), split="both").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the entries at .*partition' were dealt to other experts when it was saved"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_m10_saved_adapter_evaluates_the_same_and_goes_on_drawing(tiny, tiny_inputs, tmp_path) -> None:
    inputs = tiny_inputs("llama")
    model = mosa(tiny("llama"), split="both", granularity="rank", biases="per_expert")
    for _ in range(3):
        model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    for _ in range(3):
        assert torch.equal(loaded.train()(**inputs).logits, model.train()(**inputs).logits)
    assert int(banks(loaded)[0].draws) == 6


# --- M11: recomputation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_m11_checkpointing_recomputes_with_the_same_draws(tiny, tiny_inputs, kind) -> None:
    inputs = tiny_inputs(kind, labels="classes" if kind == "vit" else "tokens")
    model = mosa(without_dropout(tiny(kind)), split="both")

    def run(reentrant: bool | None = None) -> dict[str, Tensor]:
        for bank in banks(model):
            bank.draws.fill_(7)
        if reentrant is not None:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        outputs = [model(**inputs) for _ in range(2)]  # two forwards before one backward
        (outputs[0].loss - 0.5 * outputs[1].loss + outputs[1].logits.square().mean()).backward()
        assert all(int(bank.draws) == 9 for bank in banks(model))  # none in backward
        return gradients(model)

    plain, recomputed = run(), run(reentrant=False)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-4)
    assert any(g.abs().max() > 1e-4 for g in plain.values())


def test_m11_compiled_forwards_draw_like_others(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("vit", labels="classes")
    model = mosa(without_dropout(tiny("vit", num_hidden_layers=1)))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


# --- M12: several processes --------------------------------------------------------------------------------------

WORKER = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from peft import get_peft_model
from mixadapters import MoSAConfig
from mixadapters.tuners.mosa.split import SplitBank

def train(rows, wrap):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=4, **sizes)
    model = get_peft_model(LlamaForCausalLM(config), MoSAConfig(r=8, split="both")).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mosa_" in name:
                parameter.normal_(std=0.3)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    draws, banks = [], [m for m in model.modules() if isinstance(m, SplitBank)]
    for step in range(4):
        ids = torch.randint(5, 64, (4, 6), generator=torch.Generator().manual_seed(step))[rows]
        wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        draws.append(torch.stack([model.base_model.context.record.shared[bank] for bank in banks]))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(draws), [p.detach() for p in model.parameters() if p.requires_grad]

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.save(train(slice(2 * rank, 2 * rank + 2), DistributedDataParallel), f"{folder}/{rank}")
if rank == 0:
    torch.save(train(slice(None), lambda model: model), f"{folder}/alone")
"""


def test_m12_two_ranks_draw_alike_and_equal_one_process(tmp_path) -> None:
    running = [Process(WORKER, [str(rank), str(tmp_path)]) for rank in range(2)]
    for process in running:
        process.finish()
    (draws0, weights0), (draws1, weights1), (_, alone) = (torch.load(tmp_path / name) for name in ("0", "1", "alone"))
    assert torch.equal(draws0, draws1)
    assert len({tuple(step.flatten().tolist()) for step in draws0}) > 1
    for a, b, c in zip(weights0, weights1, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


def test_m12_ranks_draw_apart_where_told_so(tiny, monkeypatch) -> None:
    def draws(sync: bool) -> list[list[int]]:
        model = get_peft_model(tiny("llama"), MoSAConfig(r=8, sync_ranks=sync))
        found = []
        for rank in (0, 1):
            monkeypatch.setattr("mixadapters.tuners.mosa.split.rank", lambda rank=rank: rank)
            found.append([i for bank in banks(model) for i in bank.draw(2).flatten().tolist()])
            for bank in banks(model):
                bank.draws.zero_()
        return found

    together, apart = draws(True), draws(False)
    assert together[0] == together[1]
    assert apart[0] != apart[1]


def test_m12_draws_of_passes_and_steps_are_apart(tiny) -> None:
    """No pass repeats that of a neighbouring step, and halves draw apart; with sampler="batch" passes agree."""
    model = mosa(tiny("llama"), split="both", num_experts=200, r=16)
    (bank, *_), steps = banks(model), 12
    drawn = torch.stack([bank.draw(2) for _ in range(steps)])  # (steps, passes, halves)
    assert drawn.unique().numel() > 0.85 * drawn.numel()
    together = banks(mosa(tiny("llama"), split="both", sampler="batch"))[0]
    assert together.draw(2).shape == (1, 2)
    assert bank.draw(2).shape == (2, 2)


# --- M13: evaluation ---------------------------------------------------------------------------------------------


def test_m13_evaluation_is_deterministic_runs_once_and_leaves_training_alone(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = mosa(tiny("llama"))
    seen: list[int] = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    expected = [model(**inputs).loss.detach() for _ in range(2)]
    assert seen == [4, 4]  # two passes
    assert not torch.equal(*expected)
    model.eval()
    first, second = (model(**inputs) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert seen[2:] == [2, 2]
    plain, weights = model.base_model.merge_experts()
    assert isinstance(plain, BottleneckConfig)
    assert losses(model).keys() == {"consistency"}  # of the first two forwards
    model(**inputs)
    assert not losses(model)  # evaluation has none
    for bank in banks(model):
        bank.draws.zero_()
    with torch.no_grad():  # nor does a forward without gradients draw
        assert torch.equal(model.train()(**inputs).logits, first.logits)
    assert torch.equal(model(**inputs).loss, expected[0])
    model.eval()(**inputs)
    assert torch.equal(model.train()(**inputs).loss, expected[1])
    assert weights


def test_m13_generate_uses_the_merged_weights(tiny, tiny_inputs) -> None:
    model = mosa(tiny("llama"), split="both").eval()
    prompt = tiny_inputs("llama", padding="left")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    config, weights = model.base_model.merge_experts()
    plain = get_peft_model(tiny("llama"), config).eval()
    plain.load_state_dict({k.replace("_adapters.", "_adapters.default."): v for k, v in weights.items()}, strict=False)
    assert torch.equal(plain.generate(**prompt, max_new_tokens=5, do_sample=False), tokens)


# --- M14: consistency --------------------------------------------------------------------------------------------


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """Per place, of logits (..., C)."""
    p, q = p.softmax(-1), q.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2


def passes(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """Logits of both passes of the next forward, computed one at a time, and that forward's output."""
    logits = []
    count = [int(bank.draws) for bank in banks(model)]
    output = model(**inputs)
    experts = drawn(model)
    for number in (0, 1):
        alone = copy.deepcopy(model).eval()
        for bank, draw in zip(banks(alone), experts, strict=True):
            chosen = bank._weights(draw[number])
            bank.weights = lambda context, chosen=chosen: [chosen]
        logits.append(alone(**{k: v for k, v in inputs.items() if k != "labels"}).logits)
    assert [int(bank.draws) for bank in banks(model)] == [c + 1 for c in count]
    return logits[0], logits[1], output


@pytest.mark.parametrize("split", ["up", "both"])
def test_m14_classifier_trains_on_pass_one_and_the_distance_of_both(tiny, tiny_inputs, split) -> None:
    inputs = tiny_inputs("vit", batch=3, labels="classes")
    model = mosa(without_dropout(tiny("vit")), split=split, consistency=0.7, aux_ce=0.2, scale=1.0)
    first, second, output = passes(model, inputs)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(output.logits, first, atol=1e-5, rtol=1e-4)
    expected = F.cross_entropy(first, inputs["labels"]) + 0.2 * F.cross_entropy(second, inputs["labels"])
    torch.testing.assert_close(output.loss, expected + 0.7 * symmetric_kl(first, second).mean())


@pytest.mark.parametrize(
    ("kind", "head"), [("bert", "token_classification"), ("llama", None), ("gpt2", None), ("t5", None)]
)
def test_m14_token_losses_leave_padding_out(tiny, tiny_inputs, kind, head) -> None:
    inputs = tiny_inputs(kind, batch=3, padding="right", labels="tokens")
    if head:
        inputs["labels"] = torch.where(inputs["labels"] == -100, -100, inputs["labels"] % 3)
    more = {"dropout_rate": 0.0} if kind == "t5" else {"attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    model = mosa(without_dropout(tiny(kind, head, **more)), consistency=0.7, aux_ce=0.2, scale=1.0)
    plain = dict(inputs)
    if kind == "t5":
        plain["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(inputs["labels"])
    first, second, _ = passes(copy.deepcopy(model), plain)
    output = model(**inputs)
    torch.testing.assert_close(output.logits, first, atol=1e-4, rtol=1e-3)
    labels = inputs["labels"]
    if kind in ("llama", "gpt2"):
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    real = labels != -100
    assert 0 < real.sum() < real.numel()
    cross = [F.cross_entropy(logits[real], labels[real]) for logits in (first, second)]
    expected = cross[0] + 0.2 * cross[1] + 0.7 * symmetric_kl(first, second)[real].mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=1e-4)


def test_m14_without_labels_the_attention_mask_says_what_counts(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=3, padding="left")
    model = mosa(tiny("llama"), scale=1.0)
    first, second, output = passes(model, inputs)
    real = inputs["attention_mask"] != 0
    assert losses(model)["consistency"] == pytest.approx(symmetric_kl(first, second)[real].mean().item(), rel=1e-4)
    output.logits.sum().backward()  # the loss rides on the logits
    assert parts(model)[0].weight.grad is not None


def test_m14_distance_is_zero_for_equal_draws_and_pulls_each_side_to_the_other_held_fixed(tiny, tiny_inputs) -> None:
    model = mosa(without_dropout(tiny("vit")), sampler="batch", scale=1.0)
    model(**tiny_inputs("vit", labels="classes")).loss.backward()
    assert losses(model) == {"consistency": pytest.approx(0.0, abs=1e-12)}  # rows lie elsewhere, and round otherwise
    z1, z2 = (torch.randn(4, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    pair = Pair(z1, z2, None, None)
    pair.first, pair.second = z1, z2
    pair.divergence().backward()
    torch.testing.assert_close(z1.grad, (z1.softmax(-1) - z2.softmax(-1)).detach() / 8)
    torch.testing.assert_close(z2.grad, (z2.softmax(-1) - z1.softmax(-1)).detach() / 8)


def test_m14_hidden_states_of_the_first_blocks_are_compared(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("vit", batch=3, labels="classes")
    model = mosa(without_dropout(tiny("vit")), consistency=0.0, deep_weight=0.5, deep_layers=2, scale=1.0)
    output = model(**inputs)
    assert output.get("hidden_states") is None
    assert output.logits.shape == (3, 3)
    deep = losses(model)
    assert deep.keys() == {"deep_consistency"}
    for bank in banks(model):
        bank.draws.zero_()
    seen: list[Tensor] = []
    for layer in model.get_base_model().vit.layers[:2]:
        layer.register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    model(**inputs)
    expected = torch.stack([(h[0::2] - h[1::2]).square().mean() for h in seen]).mean()
    assert deep["deep_consistency"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("reason", ["multi_label", "no_logits"])
def test_m14_what_has_no_classes_is_refused_with_the_remedy(tiny, tiny_inputs, reason) -> None:
    head = "base" if reason == "no_logits" else "sequence_classification"
    model = mosa(tiny("bert", head))
    inputs = tiny_inputs("bert")
    if reason == "multi_label":
        inputs["labels"] = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"pass consistency=0"):
        model(**inputs)
    assert mosa(tiny("bert", head), **ONE_PASS)(**inputs) is not None


def test_m14_accumulated_micro_batches_weigh_as_one(tiny, tiny_inputs, tmp_path) -> None:
    """With equal draws in each step, two micro-batches of one row give the step of one batch of two."""
    batch = tiny_inputs("llama", batch=4, labels="tokens")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    trained = []
    for size, accumulated in ((2, 1), (1, 2)):
        model = mosa(tiny("llama"), sampler="group")
        for bank in banks(model):
            bank.draw = lambda passes: torch.tensor([[0, 0], [0, 1]])
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append(
            [p.detach() - s for p, s in zip((p for p in model.parameters() if p.requires_grad), start, strict=True)]
        )
    for one, two in zip(*trained, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)
    assert max(change.abs().max() for change in trained[0]) > 1e-4


# --- M15: merging ------------------------------------------------------------------------------------------------

LORA_KINDS = ["llama", "gpt2", "vit", "bert"]


@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_m15_lora_saved_merged_is_stock_lora_with_the_same_outputs(tiny, tiny_inputs, tmp_path, kind, merge) -> None:
    inputs = tiny_inputs(kind)
    model = mosa(tiny(kind), base="lora", split="both", merge=merge, scale=0.5, rank_pattern={r".*\.1\..*": 4}).eval()
    expected = model(**inputs).logits
    model.base_model.save_merged(tmp_path)
    stock = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(stock(**inputs).logits, expected, atol=2e-4, rtol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("mosa" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=2e-4, rtol=1e-4)
    weights = {n: p.clone() for n, p in model.get_base_model().named_parameters() if "mosa_" not in n}
    model.merge_adapter()
    assert any(not torch.equal(p, weights[n]) for n, p in model.get_base_model().named_parameters() if n in weights)
    with pytest.warns(UserWarning, match="[Aa]lready merged"):
        model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.get_base_model().named_parameters() if n in weights)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "fields", [{}, {"style": "pfeiffer", "split": "down"}, {"style": "houlsby", "biases": "none"}], ids=str
)
def test_m15_adapter_saved_merged_is_a_bottleneck_with_the_same_outputs(tiny, tiny_inputs, tmp_path, fields) -> None:
    inputs = tiny_inputs("vit")
    model = mosa(tiny("vit"), layers_to_transform=[0], modules_to_save=["classifier"], **fields).eval()
    expected = model(**inputs).logits
    model.base_model.save_merged(tmp_path)
    plain = PeftModel.from_pretrained(tiny("vit"), tmp_path).eval()
    assert type(plain.peft_config["default"]) is BottleneckConfig
    torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"cannot be merged|cannot merge at 'vit\.layers\.0\.mlp': ViTMLP is not a linear layer"
    ):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="adapter_name='other' is unknown"):
        model.base_model.merge_experts("other")


# --- M16: sizes --------------------------------------------------------------------------------------------------

VIT_B = transformers.ViTConfig()
SWIN_B = transformers.SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
SIZES = [
    (VIT_B, {"r": 64}, 1_208_064),
    (VIT_B, {"r": 64, "style": "pfeiffer"}, 1_208_064),
    (VIT_B, {"r": 16}, 322_752),
    (VIT_B, {"r": 64, "style": "houlsby"}, 2_379_264),
    (VIT_B, {"r": 16, "base": "lora"}, 589_824),
    (SWIN_B, {"r": 64}, 1_553_664),
]


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    SIZES,
    ids=lambda v: "" if isinstance(v, (int, object)) and not isinstance(v, dict) else str(v),
)
@pytest.mark.parametrize("split", ["up", "both"])
def test_m16_trainable_parameters_are_those_of_one_plain_adapter(config, fields, expected, split) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    model = get_peft_model(model, MoSAConfig(split=split, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert parts(model)
    _, weights = model.base_model.merge_experts()
    assert sum(tensor.numel() for tensor in weights.values()) == expected


# --- M17: forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_m17_structured_units_are_dealt_whole(tiny, tiny_inputs, granularity) -> None:
    model = mosa(tiny("llama"), split="both", granularity=granularity, num_experts=3)
    expert = banks(model)[0].experts["adapter"]
    for half in ("down", "up"):
        owner = getattr(expert, half).owner
        kind = {"down": "row", "up": "column"}[half] if granularity == "rank" else granularity
        units = owner if kind == "element" else owner[:, :1] if kind == "row" else owner[:1]
        assert (owner == units).all()
        sizes = torch.bincount(units.flatten().long(), minlength=3)
        assert sizes.sum() == units.numel()
        assert sizes.max() - sizes.min() <= 1
    model(**tiny_inputs("llama", labels="tokens")).loss.backward()


def test_m17_biases_are_shared_or_each_experts_own_or_absent(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    shapes = {}
    for biases in ("shared", "per_expert", "none"):
        model = mosa(tiny("llama"), split="up", biases=biases, **ONE_PASS)
        expert = banks(model)[0].experts["adapter"]
        shapes[biases] = [None if b is None else tuple(b.shape) for b in (expert.down.bias, expert.up.bias)]
        model(**inputs).loss.backward()
        if biases == "per_expert":
            used = int(drawn(model)[0][0, 1])
            assert all((expert.up.bias.grad[i].abs().max() > 0) == (i == used) for i in range(4))
    assert shapes == {"shared": [(8,), (32,)], "per_expert": [(8,), (4, 32)], "none": [None, None]}


def test_m17_rows_of_a_mixed_batch_use_their_own_adapters(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=3)
    model = mosa(tiny("llama"), **ONE_PASS)
    model.add_adapter("plain", MoSAConfig(r=4, num_experts=1, style="adaptformer"))
    randomize(model, seed=3).eval()
    expected = []
    for row, name in enumerate(("default", "plain", "__base__")):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(**one).logits)
        else:
            model.set_adapter(name)
            expected.append(model(**one).logits)
    mixed = model(**inputs, adapter_names=["default", "plain", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_m17_mixed_batches_train_on_two_passes(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", batch=3, labels="tokens")
    model = mosa(tiny("llama"), split="both", scale=1.0)
    alone = {name: value[:1] for name, value in inputs.items()}
    model(**alone).loss.backward()
    expected, distance = gradients(model), losses(model)["consistency"]
    for bank in banks(model):
        bank.draws.zero_()
    shown = torch.tensor([True, False, False]).view(-1, 1)
    inputs["labels"] = torch.where(shown, inputs["labels"], -100)
    model(**inputs, adapter_names=["default", "__base__", "__base__"]).loss.backward()
    assert losses(model)["consistency"] == pytest.approx(distance, rel=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


class Pointwise(nn.Module):
    """Two convolutions of kernel 1, the second one with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1, stride=2, bias=False)
        self.classifier = nn.Linear(6, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.classifier(self.second(self.first(pixel_values).relu()).mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def test_m17_convolutions_of_kernel_one_take_adapters_and_merge(tmp_path) -> None:
    images = torch.randn(2, 3, 5, 6)
    torch.manual_seed(0)
    base = Pointwise()
    names = {"target_modules": ["first", "second"]}
    start = base(images).logits
    model = get_peft_model(copy.deepcopy(base), MoSAConfig(base="lora", r=8, split="both", **names))
    torch.testing.assert_close(model(images).logits, start)
    randomize(model).train()
    model(pixel_values=images, labels=torch.tensor([1, 3])).loss.backward()
    assert all(part.weight.grad.abs().max() > 0 for part in parts(model))
    expected = model.eval()(images).logits
    assert (expected - start).abs().max() > 1e-3
    model.base_model.save_merged(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(images).logits, expected)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(images).logits, expected)
    with pytest.raises(ValueError, match="convolutions of kernel 1 without padding and groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), MoSAConfig(target_modules=["0"]))


# --- M18: number formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"base": "lora", "split": "both"}], ids=str)
def test_m18_half_precision_base_and_autocast_keep_the_delta_in_fp32(tiny, tiny_inputs, fields) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    expected = randomize(mosa(tiny("llama"), **fields), 0.05).eval()(**inputs).logits
    half = randomize(mosa(tiny("llama").to(torch.bfloat16), **fields), 0.05)
    auto = randomize(mosa(tiny("llama"), **fields), 0.05)
    for model in (half, auto):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is auto):
            model(**inputs).loss.backward()
            logits = model.eval()(**inputs).logits
        assert all(p.weight.dtype == torch.float32 and p.weight.grad.abs().max() > 0 for p in parts(model))
        assert all(p.base is None or p.base.dtype in (torch.float32, torch.bfloat16) for p in parts(model))
        assert (logits.float() - expected).norm() / expected.norm() < 0.1


def test_m18_quantized_base_trains(tiny, tiny_inputs, tmp_path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    tiny("llama").save_pretrained(tmp_path)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig()), device_map="cpu"
    )
    model = mosa(quantized, base="lora", split="both")
    model(**tiny_inputs("llama", labels="tokens")).loss.backward()
    assert all(p.weight.dtype == torch.float32 and p.weight.grad.abs().max() > 0 for p in parts(model))


# --- what is predicted, and which labels are left out -------------------------------------------------------------


def segmenting(name: str, ignored: int = 255) -> nn.Module:
    torch.manual_seed(0)
    if name == "beit":
        config: Any = transformers.BeitConfig(
            **{**SMALL, "num_hidden_layers": 4}, **IMAGES, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
            use_auxiliary_head=False, semantic_loss_ignore_index=ignored,
        )  # fmt: skip
        return transformers.BeitForSemanticSegmentation(config)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
        semantic_loss_ignore_index=ignored, hidden_dropout_prob=0.0, drop_path_rate=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("name", "ignored"), [("beit", 255), ("beit", -100), ("beit", 0), ("segformer", 255)])
def test_images_that_are_labelled_agree_over_classes_where_there_are_labels(name, ignored, labelled) -> None:
    base = without_dropout(segmenting(name, ignored))
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model = mosa(base, aux_ce=0.5, scale=4.0, **({} if name == "beit" else {"target_modules": ["mlp.fc2"]}))
    labels = torch.randint(1, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    labels[:, :8] = ignored
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "labels": labels}
    if not labelled:
        labels.fill_(1)
        model.peft_config["default"].aux_ce = 0.0
        inputs.pop("labels")
    seen: list[Tensor] = []
    base.decode_head.register_forward_hook(lambda module, given, out: seen.append(out))
    output = model(**inputs)
    (logits,) = seen
    first, second = logits[0::2].detach(), logits[1::2].detach()
    assert torch.equal(output.logits, first)
    distances = symmetric_kl(first.movedim(1, -1), second.movedim(1, -1))
    half = distances.shape[1] // 2
    valid = distances[:, half:] if labelled else distances
    found = losses(model)
    assert float(distances[:, :half].mean()) != pytest.approx(float(distances[:, half:].mean()), rel=1e-3)
    assert found["consistency"] == pytest.approx(float(valid.mean()), rel=2e-3)
    if labelled:
        large = [F.interpolate(z, size=(16, 16), mode="bilinear", align_corners=False) for z in (first, second)]
        errors = [F.cross_entropy(z, labels, ignore_index=ignored) for z in large]
        assert found["aux_ce"] == pytest.approx(float(errors[1]), rel=1e-4)
        expected = errors[0] + 0.5 * found["aux_ce"] + found["consistency"]
        assert float(output.loss) == pytest.approx(float(expected), rel=1e-4)


class Painter(nn.Module):
    """Classes of pixels, by a model that says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lift(x.movedim(1, -1))).movedim(-1, 1)


def unpredictable() -> dict[str, tuple[nn.Module, dict[str, Any], str]]:
    """Models and batches in which no consistency over classes can be trained; and what the error names."""
    t = transformers
    bert = t.BertConfig(vocab_size=50, **SMALL, num_labels=3)
    speech = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
        "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    sound = {"input_values": torch.randn(2, 200)}
    ids = {"input_ids": torch.randint(0, 50, (2, 7))}
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    yolos = t.YolosConfig(**{**SMALL, "image_size": [16, 16], "patch_size": 4, "num_labels": 3})
    boxes = [{"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}] * 2
    several = t.BertForSequenceClassification(t.BertConfig(**bert.to_dict() | {"vocab_size": 50}))
    several.config.problem_type = "multi_label_classification"
    own = t.BertForTokenClassification(copy.deepcopy(bert))
    own.config.ce_ignore_index = -1
    depth = t.DPTForDepthEstimation(
        t.DPTConfig(
            **{**SMALL, "num_hidden_layers": 4}, **IMAGES, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        )
    )  # fmt: skip
    return {
        "ctc": (
            t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**speech)),
            {**sound, "labels": torch.ones(2, 4).long()},
            "'ForCTC'",
        ),
        "frames": (
            t.Wav2Vec2ForAudioFrameClassification(t.Wav2Vec2Config(**speech, num_labels=3)),
            {**sound, "labels": F.one_hot(torch.ones(2, 49).long(), 3)},
            r"labels \(2, 49, 3\)",
        ),
        "boxes": (t.YolosForObjectDetection(yolos), {**image, "labels": boxes}, "labels of YolosForObjectDetection"),
        "several": (several, {**ids, "labels": torch.rand(2, 3)}, "problem_type='multi_label_classification'"),
        "several, no labels": (several, ids, "problem_type='multi_label_classification'"),
        "floats": (t.BertForSequenceClassification(bert), {**ids, "labels": torch.rand(2, 3)}, "torch.float32"),
        "two tasks": (
            t.BertForPreTraining(bert),
            {**ids, "labels": ids["input_ids"], "next_sentence_label": torch.tensor([0, 1])},
            "next_sentence_label of BertForPreTraining",
        ),
        "own index": (own, {**ids, "labels": torch.ones(2, 7).long()}, r"other labels than -100: \{'ce_ignore_index'"),
        "depth": (depth, image, "has no logits"),
        "pixels": (Painter(), {"x": torch.randn(2, 3, 4, 4)}, "which axis holds the classes"),
    }


UNPREDICTABLE = unpredictable()


@pytest.mark.parametrize("name", UNPREDICTABLE)
def test_outputs_and_labels_without_known_classes_are_refused(name) -> None:
    base, inputs, message = UNPREDICTABLE[name]
    targets = {"pixels": ".*lift", "boxes": ".*layer.*dense", "depth": ".*layer.*dense"}
    model = mosa(base, **({"target_modules": targets[name]} if name in targets else {}))
    with pytest.raises(ValueError, match=rf"{message}.*pass consistency=0"):
        model(**inputs)
    model.unload()


@pytest.mark.parametrize("aux_ce", [0.0, 0.5])
def test_answers_weigh_their_two_ends_alike(aux_ce: float) -> None:
    torch.manual_seed(0)
    base = without_dropout(transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=50, **SMALL)))
    model = mosa(base, consistency=0.7, aux_ce=aux_ce, scale=1.0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    ends = {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([2, 3])}  # 9: past the end
    seen: list[Tensor] = []
    base.qa_outputs.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    output = model(input_ids=torch.randint(0, 50, (2, 7)), **ends)
    loss, ((first, second),) = 0.0, [(out[0::2], out[1::2]) for out in seen]
    for column, targets in enumerate(ends.values()):
        kept = targets < 7
        distance = symmetric_kl(first[..., column], second[..., column]).mean()
        entropies = [F.cross_entropy(logits[kept, :, column], targets[kept]) for logits in (first, second)]
        loss += (entropies[0] + aux_ce * entropies[1] + 0.7 * distance) / 2
    torch.testing.assert_close(output.loss.detach(), loss, atol=1e-5, rtol=1e-4)


def test_labels_of_tokens_that_a_loss_leaves_out_do_not_count(tiny) -> None:
    config = transformers.BertConfig(vocab_size=50, **SMALL, num_labels=3)
    model = mosa(without_dropout(transformers.BertForTokenClassification(config)))
    inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "labels": torch.tensor([[-100, 1, 2, -100, 0, 1, -100]] * 2)}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    first, second, output = passes(model, inputs)
    kept = inputs["labels"] != -100
    assert losses(model)["consistency"] == pytest.approx(float(symmetric_kl(first, second)[kept].mean()), rel=1e-4)
    expected = F.cross_entropy(first[kept], inputs["labels"][kept]) + symmetric_kl(first, second)[kept].mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)


# --- architectures -----------------------------------------------------------------------------------------------

CLIP = transformers.CLIPConfig(vision_config={**SMALL, **IMAGES}, text_config=SMALL, num_labels=3)
ARCHITECTURES = {
    "vit": ("ViT", transformers.ViTConfig(**SMALL, **IMAGES)),
    "deit": ("DeiT", transformers.DeiTConfig(**SMALL, **IMAGES)),
    "swin": ("Swin", transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, **IMAGES)),
    "convnext": (
        "ConvNext",
        transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=3),
    ),
    "clip": ("CLIP", CLIP),
}


CONVOLUTIONS = {
    "resnet": ("ResNet", transformers.ResNetConfig, {"layer_type": "bottleneck"}),
    "regnet x": ("RegNet", transformers.RegNetConfig, {"layer_type": "x", "groups_width": 8}),
    "regnet y": ("RegNet", transformers.RegNetConfig, {"layer_type": "y", "groups_width": 8}),
}


def convolutional(name: str, **fields: Any) -> nn.Module:
    family, config, own = CONVOLUTIONS[name]
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 3}
    return getattr(transformers, f"{family}ForImageClassification")(config(**{**sizes, **own, **fields})).eval()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutional_models_take_adapters_after_the_last_convolution_of_a_layer(name, tmp_path) -> None:
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    with torch.no_grad():
        expected = convolutional(name)(**inputs).logits
    model = get_peft_model(convolutional(name), MoSAConfig(r=8, style="pfeiffer"))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected)
    places = [host.path for host in model.base_model.hosts()]
    assert len(places) == 3
    assert all(model.base_model._unwrapped(path).kernel_size == (1, 1) for path in places)
    randomize(model).train()
    model(**inputs).loss.backward()
    assert all(part.weight.grad.abs().max() > 0 for part in parts(model))
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.base_model.save_merged(tmp_path)
    plain = PeftModel.from_pretrained(convolutional(name), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, trained)


def test_training_leaves_the_statistics_of_a_frozen_base_as_they_were() -> None:
    """No file of an adapter holds them, so that a model loaded from it would give other outputs."""
    base = convolutional("resnet")
    head = nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(32, affine=False), nn.Linear(32, 3))
    base.classifier = head
    before = {name: value.clone() for name, value in base.named_buffers() if "running" in name}
    model = get_peft_model(base, MoSAConfig(r=4, style="pfeiffer", modules_to_save=["classifier"]))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    model.train()(**inputs).loss.backward()
    moved = {n for n, value in model.named_buffers() if "running" in n and not torch.equal(value, _at(before, n))}
    assert moved == {
        f"base_model.model.classifier.modules_to_save.default.1.running_{kind}" for kind in ("mean", "var")
    }  # a head of one's own trains whole, and is saved
    base.resnet.embedder.embedder.normalization.requires_grad_(True)
    assert model.train().base_model.model.resnet.embedder.embedder.normalization.training


def _at(before: dict[str, Tensor], name: str) -> Tensor:
    for word in ("base_model.model.", ".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(word, "")
    return before[name]


@pytest.mark.parametrize(
    ("fields", "layer_type", "message"),
    [
        ({"style": "adaptformer"}, "bottleneck", "no module for the role 'ffn_input'.*choose another placement"),
        ({"base": "lora"}, "bottleneck", "no module for the role 'qkv'.*choose another placement"),
        (
            {"base": "lora", "target_modules": ["layer.1.convolution"]},
            "bottleneck",
            "of kernel 1 without",
        ),
        ({"style": "pfeiffer"}, "basic", "not found in the base model"),
    ],
)
def test_what_convolutional_models_do_not_have_is_refused_by_name(fields, layer_type, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(convolutional("resnet", layer_type=layer_type), MoSAConfig(**fields))


class Tasks(transformers.ViTPreTrainedModel):
    """Heads by task on one backbone, as in the paper's second scenario."""

    def __init__(self) -> None:
        super().__init__(transformers.ViTConfig(**SMALL, **IMAGES))
        torch.manual_seed(0)
        self.backbone = without_dropout(transformers.ViTModel(self.config))
        self.head_birds, self.head_cars = nn.Linear(SMALL["hidden_size"], 4), nn.Linear(SMALL["hidden_size"], 2)

    def forward(self, pixel_values: Tensor, task: str, labels: Tensor | None = None) -> Any:
        logits = getattr(self, f"head_{task}")(self.backbone(pixel_values).last_hidden_state[:, 0])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def test_one_split_adapter_serves_heads_by_task(tmp_path) -> None:
    fields = {"style": "pfeiffer", "r": 8, "num_experts": 2, "split": "both", "scale": 1.0}
    heads = ["head_birds", "head_cars"]
    model = randomize(get_peft_model(Tasks(), MoSAConfig(**fields, modules_to_save=heads)))
    images = {"birds": torch.randn(4, 3, 16, 16), "cars": torch.randn(3, 3, 16, 16)}
    labels = {"birds": torch.tensor([0, 1, 2, 3]), "cars": torch.tensor([0, 1, 1])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for task, other in (("birds", "cars"), ("cars", "birds")):
        model.train()(images[task], task=task, labels=labels[task]).loss.backward()
        assert losses(model)["consistency"] > 0
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(f"head_{task}" in n for n in touched)
        assert not any(f"head_{other}" in n for n in touched)
        assert any("mosa_adapters" in n for n in touched)  # the same one for both
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Tasks(), tmp_path).eval()
    with torch.no_grad():
        for task, pixels in images.items():
            expected = model.eval()(pixels, task=task).logits
            assert torch.equal(loaded(pixels, task=task).logits, expected)


@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vision_models_take_adapters_by_the_table(name, style) -> None:
    if name == "convnext" and style == "lora":
        pytest.skip("no attention")
    family, config = ARCHITECTURES[name]
    base = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    size = 32 if name == "convnext" else 16
    inputs = {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])}
    with torch.no_grad():
        expected = base(**inputs).logits
    fields = {"base": "lora"} if style == "lora" else {"style": style}
    model = get_peft_model(base, MoSAConfig(r=8, **fields))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert len(banks(model)) == (4 if style == "lora" else 2)
    randomize(model).train()(**inputs).loss.backward()
    assert losses(model)["consistency"] > 0
    assert all(p.weight.grad.abs().max() > 0 for p in parts(model))


# --- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "prefix"}, "base='prefix' is unknown"),
        ({"style": "adaptfomer"}, "style='adaptfomer' is unknown.*adaptformer"),
        ({"split": "left"}, "split='left' is unknown"),
        ({"biases": "own"}, "biases='own' is unknown"),
        ({"base": "lora", "style": "houlsby"}, "style='houlsby' is for adapters"),
        ({"base": "lora", "biases": "shared"}, "biases='shared': LoRA has none"),
        ({"base": "lora", "scale": "learnable"}, "scale='learnable' is for adapters"),
        ({"style": "houlsby", "adapter_input": "residual"}, "adapter_input='residual' needs style='adaptformer'"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"consistency": -1.0}, "consistency=-1.0 must be a finite number"),
        ({"dropout": 1.0}, "dropout=1.0 must be a finite number, at least 0, less than 1"),
        ({"deep_layers": 0}, "`deep_layers` should be a positive integer"),
        ({"inactive_update": "lazy", "sync_ranks": False}, "'lazy' needs sync_ranks=True"),
        ({"r": 8, "bias": "shared"}, "no field 'bias'"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MoSAConfig(**fields)


@pytest.mark.parametrize("fields", [{"deep_layers": 99}, {"deep_layers": 3, "deep_weight": 0.1}, {"deep_weight": 0.1}])
def test_more_hidden_states_than_the_model_has_are_refused(tiny, fields) -> None:
    with pytest.raises(ValueError, match=r"deep_layers=\d+: the model has 2 layers.* set deep_layers from 1 to 2"):
        mosa(tiny("vit"), **fields)
    mosa(tiny("vit"), **{**fields, "deep_layers": 2})
    mosa(tiny("vit"))  # the paper's 6 are not used


def test_defaults_follow_the_base_and_the_style() -> None:
    assert (MoSAConfig().r, MoSAConfig().scale, MoSAConfig().activation) == (64, 0.1, "gelu")
    assert (MoSAConfig(style="pfeiffer").activation, MoSAConfig(style="houlsby").activation) == ("relu", "silu")
    lora = MoSAConfig(base="lora")
    assert (lora.r, lora.scale, lora.biases, lora.style) == (16, 1.0, "none", None)
    assert (MoSAConfig().consistency, MoSAConfig(num_experts=1).consistency) == (1.0, 0.0)
