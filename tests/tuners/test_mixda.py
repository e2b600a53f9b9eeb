"""MixDA end to end: the acceptance list of its specification, numbered, and every edge case of the method."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapted import logits, randomize
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters import BottleneckConfig, ForwardContext, MixDAConfig
from mixadapters.core.bank import AdapterBank
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing
from mixadapters.core.streams import Stream
from mixadapters.kernels import adapter_backend
from mixadapters.routers import build_router
from mixadapters.training.objectives import PreservationObjective

DOMAINS, SITES = ["a", "b"], [1, 2]


def mixda(tiny: Any, kind: str = "llama", head: str | None = None, **fields: Any) -> nn.Module:
    """A tiny model with a random mixture, in evaluation mode."""
    fields = {"domains": DOMAINS, "domain_layers": SITES, "r": 4, **fields}
    return randomize(get_peft_model(tiny(kind, head), MixDAConfig(**fields))).eval()


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    return dict(model.base_model._mixtures("default"))


def context(model: nn.Module) -> ForwardContext:
    return model.base_model.context


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- the mixture in plain words ----------------------------------------------------------------------------------


def expert_output(expert: nn.Module, x: Tensor, act: Any = F.gelu) -> Tensor:
    """K_k(x) = U gelu(D x + d) + u, one expert at a time."""
    return act(x @ expert.down.weight.T + expert.down.bias) @ expert.up.weight.T + expert.up.bias


def plain_mixture(mixture: Mixture, x: Tensor, y: Tensor, weights: Tensor, base_weight: Tensor | None) -> Tensor:
    """o = base_weight * F + sum_k w_k K_k(x) by a loop: x (N, I), y (N, H), weights (N, K)."""
    out = y if base_weight is None else base_weight.unsqueeze(1) * y
    for k, expert in enumerate(mixture.bank.experts.values()):
        out = out + weights[:, k : k + 1] * expert_output(expert, x)
    return out


def small_mixture(gate: str, convex: bool, dtype: torch.dtype = torch.float64, **options: Any) -> Mixture:
    """Three experts of ranks 2, 3 and 2 from 5 to 4 features."""
    bank = AdapterBank(5, 4)
    for name, rank in (("a", 2), ("b", 3), ("c", 2)):
        bank.add(name, rank, init_weights=False)
    router = build_router(gate, 5, bank.names, convex=convex, path="site", **options)
    torch.manual_seed(2)
    mixture = Mixture(router, bank, "parallel").to(dtype)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return mixture


def context_of(tokens: Tensor, mask: Tensor | None = None) -> ForwardContext:
    found = ForwardContext()
    found.enter(Record(open=True))
    found.record.streams[""] = Stream(*tokens.shape[:2], mask)
    return found


# --- 5.2, the acceptance list ------------------------------------------------------------------------------------


def old_text(tiny_inputs: Any, kind: str, **about: Any) -> dict[str, Tensor]:
    inputs = tiny_inputs(kind, padding="right", seed=7, **about)
    return {"old_input_ids": inputs["input_ids"], "old_attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_acceptance_01_old_domain_loss_is_positive_with_gradients_in_adapters_only(
    tiny, tiny_inputs, kind, combine
) -> None:
    model = mixda(tiny, kind, combine=combine).train()
    model.base_model.set_stage("domain")
    context(model).objectives.append(PreservationObjective(weight=1.0, knowledge_weight=0.0))
    inputs = tiny_inputs(kind, labels="tokens")
    output = model(**inputs, **old_text(tiny_inputs, kind))
    assert float(output.loss.detach()) > 0.01
    output.loss.backward()
    found = gradients(model)
    assert found
    assert all(".domain.bank.experts." in name for name in found)
    assert all(grad.abs().max() > 0 for grad in found.values())
    assert len(found) == len(SITES) * len(DOMAINS) * 4


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_acceptance_02_stage_two_loads_stage_one_bit_for_bit(tiny, tiny_inputs, tmp_path, kind) -> None:
    sources = {}
    for seed, name in enumerate(DOMAINS):
        config = MixDAConfig(domains=[name], domain_layers=SITES, r=3 + seed, task_adapter=None)
        one = randomize(get_peft_model(tiny(kind), config), seed=seed).eval()
        one.save_pretrained(tmp_path / name)
        sources[name] = one
    two = get_peft_model(tiny(kind), MixDAConfig(domains={n: str(tmp_path / n) for n in DOMAINS}, task_adapter=None))
    two.base_model.set_stage("task")
    loaded, matched = dict(two.named_parameters()), 0
    for source in sources.values():
        for key, parameter in source.named_parameters():
            if ".experts." in key:
                assert torch.equal(loaded[key], parameter)
                assert not loaded[key].requires_grad
                matched += 1
    assert matched == 2 * len(SITES) * 4 == sum(".experts." in key for key in loaded)
    inputs = tiny_inputs(kind)
    for number, source in enumerate(sources.values()):
        alone = logits(source, {**inputs, "domain_ids": torch.tensor([0, 0])})
        found = logits(two.eval(), {**inputs, "domain_ids": torch.tensor([number] * 2)})
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    two.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(tiny(kind), tmp_path / "both")
    assert torch.equal(logits(again, inputs), logits(two, inputs))


GATES = [
    ("llama", "token", "left"),
    ("llama", "causal_prefix", "left"),
    ("llama", "causal_prefix", "right"),
    ("llama", "request", "left"),
    ("llama", "request", "right"),
    ("bert", "token", "right"),
    ("bert", "sequence", "right"),
    ("bert", "sequence", "left"),
]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("kind", "granularity", "side"), GATES)
def test_acceptance_03_padding_and_neighbours_change_nothing(tiny, tiny_inputs, kind, granularity, side, gate) -> None:
    model = mixda(tiny, kind, gate=gate, gate_granularity=granularity)
    batch = tiny_inputs(kind, batch=4, length=9, padding=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = {} if kind == "bert" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    if kind == "bert" and side == "left":  # BERT counts positions from the left edge
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    together = logits(model, {**batch, **positions})
    for row in range(4):
        real = mask[row].bool()
        alone = logits(model, {"input_ids": ids[row : row + 1, real], "attention_mask": mask[row : row + 1, real]})
        torch.testing.assert_close(together[row, real], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("task_adapter", ["pfeiffer", "houlsby", "parallel", None])
def test_acceptance_04_output_is_base_at_init(tiny, tiny_inputs, granularity, gate, task_adapter) -> None:
    kind = "bert" if granularity == "sequence" else "llama"
    config = MixDAConfig(domains=DOMAINS, gate=gate, gate_granularity=granularity, task_adapter=task_adapter)
    model = get_peft_model(tiny(kind), config).eval()
    randomize(model, only="router")  # for any gate
    inputs = tiny_inputs(kind, padding="right")
    assert torch.equal(logits(model, inputs), logits(tiny(kind), inputs))


def at_sites(model: nn.Module, inputs: dict[str, Tensor], site: str) -> list[tuple[Tensor, Tensor]]:
    """(frozen, adapted) output of every adapted module whose path holds `site`."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for host in model.base_model.hosts():
        if site in host.path:
            for module in (host.base_layer, host):

                def keep(m: nn.Module, args: tuple, y: Tensor, path: str = host.path) -> None:
                    found.setdefault(path, []).append(y)

                handles.append(module.register_forward_hook(keep))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return [tuple(pair) for pair in found.values()]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("domains", [["a"], ["a", "b", "c"]])
def test_acceptance_04_convex_starts_within_one_percent_of_base(tiny, tiny_inputs, gate, domains) -> None:
    config = MixDAConfig(domains=domains, domain_layers=SITES, combine="convex", gate=gate, task_adapter=None)
    model = get_peft_model(tiny("llama"), config).eval()
    for frozen, adapted in at_sites(model, tiny_inputs("llama"), "down_proj"):
        torch.testing.assert_close(adapted, 0.99 * frozen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["dense", "segments", "reference"])
@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_acceptance_05_fused_equals_a_loop_with_gradients(gate, convex, backend) -> None:
    mixture = small_mixture(gate, convex)
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    direction = torch.randn(2, 3, 4, dtype=torch.float64)
    inputs = [x, y, *mixture.parameters()]

    def grads(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((output.view(2, 3, 4) * direction).sum(), inputs))

    with adapter_backend(backend):
        fused = mixture(x, y, context_of(x))
        found = grads(fused)
    rms = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    scores = rms @ mixture.router.output.weight.T + mixture.router.output.bias
    w = (scores.sigmoid() if gate == "sigmoid" else scores.softmax(-1)).flatten(0, 1)
    base_weight = w[:, -1] if convex else None
    loop = plain_mixture(mixture, x.flatten(0, 1), y.flatten(0, 1), w[:, :3], base_weight)
    torch.testing.assert_close(fused.flatten(0, 1), loop, atol=1e-12, rtol=1e-12)
    for one, other in zip(found, grads(loop), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("granularity", ["token", "sequence", "causal_prefix", "request"])
@pytest.mark.parametrize(("gate", "convex"), [("softmax", True), ("sigmoid", False)])
def test_acceptance_05_gradients_pass_gradcheck(gate, convex, granularity) -> None:
    mixture = small_mixture(gate, convex, granularity=granularity)
    names = [name for name, _ in mixture.named_parameters()]
    x, y = torch.randn(2, 2, 5, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])

    def run(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(mixture, given, (x, y, context_of(x, mask)))

    inputs = [t.detach().requires_grad_() for t in (x, y, *mixture.parameters())]
    assert torch.autograd.gradcheck(run, inputs)


CAUSAL = [(kind, g) for kind in ("llama", "gpt2") for g in ("token", "causal_prefix", "request")]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(("kind", "granularity"), CAUSAL)
def test_acceptance_06_no_position_sees_the_future(tiny, tiny_inputs, kind, granularity, training) -> None:
    overrides = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    config = MixDAConfig(domains=DOMAINS, domain_layers=[0, 1, 2], r=4, gate_granularity=granularity)
    model = randomize(get_peft_model(tiny(kind, **overrides), config)).train(training)
    inputs = tiny_inputs(kind, length=8)
    if granularity == "request":  # the prompt is known: its first two tokens
        inputs["prompt_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]] * 2)
    before = logits(model, inputs)
    for t in range(2 if granularity == "request" else 0, 7):
        changed = inputs["input_ids"].clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 17) % 90 + 5
        after = logits(model, {**inputs, "input_ids": changed})
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=0)
        assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :], atol=1e-3)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("kind", "granularity"), CAUSAL)
def test_acceptance_07_cached_decoding_equals_the_full_forward(tiny, tiny_inputs, kind, granularity, padding) -> None:
    model = mixda(tiny, kind, gate_granularity=granularity)
    inputs = tiny_inputs(kind, batch=3, length=5, padding=padding)
    made = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    length = made.sequences.shape[1]
    mask = F.pad(inputs["attention_mask"], (0, length - 5), value=1)
    full = {
        "input_ids": made.sequences,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }
    if granularity == "request":
        full["prompt_mask"] = F.pad(inputs["attention_mask"], (0, length - 5))
    expected = logits(model, full)
    for step, found in enumerate(made.logits):
        torch.testing.assert_close(found, expected[:, 4 + step], atol=1e-4, rtol=1e-4)
    assert not torch.equal(made.sequences, tiny(kind).generate(**inputs, max_new_tokens=6, eos_token_id=None))


@pytest.mark.parametrize("granularity", ["token", "causal_prefix", "request"])
def test_acceptance_07_beams_with_and_without_cache_agree(tiny, tiny_inputs, granularity) -> None:
    model = mixda(tiny, gate_granularity=granularity)
    inputs = tiny_inputs("llama", batch=2, length=5, padding="left")
    asked = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **asked, return_dict_in_generate=True, output_scores=True)
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, real] for name, value in inputs.items()}
        one = model.generate(**alone, **asked, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(one.sequences[0, int(real.sum()) :], cached.sequences[row, 5:])
        torch.testing.assert_close(one.sequences_scores[0], cached.sequences_scores[row], atol=1e-5, rtol=1e-4)
    if granularity != "request":  # without a cache the prompt is not told from what was generated
        slow = model.generate(**inputs, **asked, use_cache=False)
        assert torch.equal(slow, cached.sequences)


def test_acceptance_07_a_prompt_pinned_for_generation_is_the_request(tiny, tiny_inputs) -> None:
    """A system text and its question, of which only the question is to decide; with beams."""
    model = mixda(tiny, gate_granularity="request")
    inputs = tiny_inputs("llama", batch=2, length=6)
    prompt = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for beams in (1, 2):
        with context(model).pin(prompt_mask=prompt):
            made = model.generate(**inputs, **asked, num_beams=beams, output_logits=True)
        if beams == 1:
            full = {
                "input_ids": made.sequences, "attention_mask": torch.ones(2, 10).long(),
                "prompt_mask": F.pad(prompt, (0, 4)),
            }  # fmt: skip
            expected = logits(model, full)
            for step, found in enumerate(made.logits):
                torch.testing.assert_close(found, expected[:, 5 + step], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_acceptance_08_adding_a_domain_is_a_no_op(tiny, tiny_inputs, gate, granularity) -> None:
    inputs = tiny_inputs("bert", padding="right")
    model = mixda(tiny, "bert", gate=gate, gate_granularity=granularity).double()
    before = logits(model, inputs)
    model.base_model.add_domain("new", r=9)
    assert all(mixture.bank.names == ["a", "b", "new"] for mixture in mixtures(model).values())
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("convex", [False, True], ids=["delta", "convex"])
@pytest.mark.parametrize("trained", [False, True], ids=["stage 2", "stage 1"])
def test_acceptance_09_no_stack_of_domain_outputs_is_saved(trained, convex) -> None:
    """The released code saves [B, T, H, K + 1] and the K adapters' outputs; here rows of the summed rank at most."""
    batch, length, width, wide, rank, domains = 2, 16, 64, 256, 4, 8
    bank = AdapterBank(wide, width)
    for k in range(domains):
        bank.add(f"d{k}", rank)
    mixture = Mixture(build_router("softmax", wide, bank.names, convex=convex, path="s"), bank, "parallel")
    bank.requires_grad_(trained)
    x, y = torch.randn(batch, length, wide, requires_grad=True), torch.randn(batch, length, width, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = mixture(x, y, context_of(x))
    out.sum().backward()
    rows = batch * length
    activations = {t.untyped_storage().data_ptr(): t for t in saved if t.shape[:1] == (rows,) or t.dim() > 2}
    assert activations
    assert max(t.numel() for t in activations.values()) <= rows * wide  # the input itself
    others = [t for t in activations.values() if t.numel() < rows * wide]
    assert max(t.numel() for t in others) <= rows * max(width, domains * rank) < rows * width * (domains + 1) / 8
    assert sum(t.numel() for t in others) < rows * width * (domains + 1) / 2


def large(config: MixDAConfig) -> dict[str, int]:
    """Parameters of a RoBERTa-large with `config` by what they are, per adapted layer."""
    from transformers import RobertaConfig, RobertaModel

    shape = RobertaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        model = get_peft_model(RobertaModel(shape), config)
    counts: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        path, mark, rest = name.partition(".mixda_adapters.default.")
        if mark:
            kind = ".".join(rest.split(".")[:2])
            counts[path, kind] = counts.get((path, kind), 0) + parameter.numel()
    kinds = {kind for _, kind in counts}
    per_layer = {kind: {n for (_, k), n in counts.items() if k == kind} for kind in kinds}
    assert all(len(sizes) == 1 for sizes in per_layer.values())
    return {kind: sizes.pop() for kind, sizes in per_layer.items()} | {
        f"{kind} layers": sum(k == kind for _, k in counts) for kind in kinds
    }


def test_acceptance_10_gate_is_small_and_sizes_are_the_published_ones() -> None:
    assert large(MixDAConfig(domains=["one"])) == {
        "domain.bank": 1_312_000,  # H = 1024, I = 4096, r = 256: 2.6M, 0.74 % of RoBERTa-large
        "domain.bank layers": 2,
        "domain.router": 8_194,  # 4096 x 2 + 2
        "domain.router layers": 2,
        "task.bank": 132_160,
        "task.bank layers": 24,
    }
    released = large(MixDAConfig.preset("released", domains=["one"]))
    assert released["domain.router"] == 4_329_218
    assert released["domain.bank"] == 1_312_000
    assert large(MixDAConfig(domains=["one", "two", "three"]))["domain.router"] == 4096 * 4 + 4
    assert large(MixDAConfig(domains=["one"], gate="sigmoid"))["domain.router"] == 4096 + 1
    assert large(MixDAConfig.preset("paper", domains=["one"]))["domain.router"] == 1024 * 2 + 2


def released_layer(w: dict[str, Tensor], domains: list[str], z: Tensor, ffn: Tensor) -> tuple[Tensor, Tensor]:
    """The released code's equations (specification 1.1, 1.2 and 1.4): z (B, T, I), ffn (B, T, H)."""
    h = z[:, -1:, :]  # the last position, padding or not
    for i in ("1", "4", "7"):  # dropout, linear, ReLU, three times
        h = F.relu(F.linear(h, w[f"domain.router.hidden.{i}.weight"], w[f"domain.router.hidden.{i}.bias"]))
    gate = F.linear(h, w["domain.router.output.weight"], w["domain.router.output.bias"]).softmax(-1)  # (B, 1, K + 1)
    arms = []
    for name in domains:
        down, d, up, u = (
            w[f"domain.bank.experts.{name}.{key}"] for key in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        arms.append(F.linear(F.gelu(F.linear(z, down, d)), up, u))
    arms.append(ffn)  # the FFN is the last arm
    o = (torch.stack(arms, dim=3) @ gate.unsqueeze(-1)).squeeze(-1)  # (B, T, H, K + 1) @ (B, 1, K + 1, 1)
    task = {key.removeprefix("task.bank.experts.adapter."): t for key, t in w.items() if key.startswith("task.")}
    t = F.linear(
        F.relu(F.linear(o, task["down.weight"], task["down.bias"])), task["up.weight"], task["up.bias"]
    )  # fmt: skip
    return o + t, gate


@pytest.mark.parametrize("domains", [["a"], ["a", "b", "c"]])
def test_acceptance_11_released_preset_computes_the_released_equations(tiny, tiny_inputs, domains) -> None:
    config = MixDAConfig.preset("released", domains=domains, domain_layers=SITES, r=3)
    model = randomize(get_peft_model(tiny("roberta"), config), scale=0.1).eval()
    inputs = tiny_inputs("roberta", batch=3, padding="right")
    checked, gates = [], []
    for i in SITES:
        host = model.base_model.model.roberta.encoder.layer[i].output.dense
        weights = dict(host.mixda_adapters["default"].named_parameters())
        router = host.mixda_adapters["default"].domain.router
        assert router.arms == [*domains, "frozen"]
        router.register_forward_hook(lambda m, args, routing: gates.append(routing.probs))

        def compare(module: nn.Module, args: tuple, y: Tensor, weights: dict[str, Tensor] = weights) -> None:
            expected, gate = released_layer(weights, domains, args[0], module.base_layer(args[0]))
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
            assert gate.shape == (3, 1, len(domains) + 1)
            torch.testing.assert_close(gates[-1].view(3, -1, len(domains) + 1), gate.expand(-1, y.shape[1], -1))
            checked.append(gate)

        host.register_forward_hook(compare)
    assert not torch.allclose(logits(model, inputs), logits(tiny("roberta"), inputs), atol=1e-2)
    assert len(checked) == 2
    assert checked[0].std() > 0.01


def test_acceptance_11_released_gate_starts_by_halving_the_ffn(tiny, tiny_inputs) -> None:
    config = MixDAConfig.preset("released", domains=["a"], domain_layers=[1], task_adapter=None)
    model = get_peft_model(tiny("roberta"), config).eval()
    ((frozen, adapted),) = at_sites(model, tiny_inputs("roberta"), "output.dense")
    torch.testing.assert_close(adapted, frozen / 2, atol=1e-6, rtol=1e-5)


class Texts:
    """Three languages of thirty words each. A rule says what follows a word; in unruly texts any word may."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.first = {"general": 5, "a": 35, "b": 65}
        self.follows = {}
        for name in self.first:  # one cycle through the thirty words
            order = torch.randperm(30, generator=self.generator)
            self.follows[name] = torch.empty(30, dtype=torch.long).scatter_(0, order, order.roll(-1))

    def draw(self, name: str, size: int, unruly: bool = False) -> dict[str, Tensor]:
        words = torch.randint(30, (size, 16), generator=self.generator)
        for t in range(1, 0 if unruly else 16):
            words[:, t] = self.follows[name][words[:, t - 1]]
        ids = words + self.first[name]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def joined(*batches: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def train(model: nn.Module, batches: Any, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        loss = model(**batches()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def loss_on(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def test_acceptance_12_gate_learns_to_route_two_domains_and_keeps_the_old_one(tiny, tmp_path) -> None:
    """A decoder that knows all words, and the rule of one language, learns the rules of the two others."""
    texts, only = Texts(), torch.zeros(64, dtype=torch.long)  # `only`: routed to the first domain
    general, held = texts.draw("general", 64), {name: texts.draw(name, 64) for name in DOMAINS}
    base = tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    words = lambda: joined(texts.draw("general", 16), texts.draw("a", 8, True), texts.draw("b", 8, True))  # noqa: E731
    train(base, words, 120, 3e-3)
    old = loss_on(base, general)
    assert old < 0.1
    assert all(3.3 < loss_on(base, batch) < 3.7 for batch in held.values())  # ln 30 is 3.4

    def stage_one(name: str, weight: float) -> nn.Module:
        config = MixDAConfig(domains=[name], domain_layers=[2, 3], r=16, task_adapter=None)
        model = get_peft_model(copy.deepcopy(base), config)
        model.base_model.set_stage("domain")
        context(model).objectives.append(PreservationObjective(weight))

        def batch() -> dict[str, Tensor]:
            told = {f"old_{key}": value for key, value in texts.draw("general", 16).items() if key != "labels"}
            return {**texts.draw(name, 16), **told, "domain_ids": only[:16]}

        train(model, batch, 120, 3e-3)
        return model

    alone = {}
    for name in DOMAINS:
        model = stage_one(name, 10.0)
        model.save_pretrained(tmp_path / name)
        alone[name] = loss_on(model, {**held[name], "domain_ids": only})
        assert alone[name] < 3.2
        assert loss_on(model, {**general, "domain_ids": only}) - old < 0.01
    # The old-domain loss is what keeps the old domain.
    assert loss_on(stage_one("a", 0.0), {**general, "domain_ids": only}) - old > 0.2

    gathered = {name: str(tmp_path / name) for name in DOMAINS}
    mixture = get_peft_model(copy.deepcopy(base), MixDAConfig(domains=gathered, task_adapter=None))
    mixture.base_model.set_stage("task")
    assert all(".domain.router." in name for name, p in mixture.named_parameters() if p.requires_grad)
    train(mixture, lambda: joined(texts.draw("a", 16), texts.draw("b", 16)), 60, 3e-2)
    routed: list[Tensor] = []
    for m in mixtures(mixture).values():
        m.router.register_forward_hook(lambda module, args, routing: routed.append(routing.weights))
    for number, name in enumerate(DOMAINS):
        routed.clear()
        assert loss_on(mixture, held[name]) < alone[name] + 0.02
        assert len(routed) == 2
        for weights in routed:  # in each layer, for more than 95 % of the words
            assert float((weights[:, number] > weights[:, 1 - number]).float().mean()) > 0.95
            assert float(weights[:, number].mean()) > 0.9
    assert loss_on(mixture, general) - old < 0.02


# --- no domains, one domain, missing domains ---------------------------------------------------------------------


@pytest.mark.parametrize("task_adapter", ["pfeiffer", None])
def test_mixture_without_domains_is_base_bit_for_bit(tiny, tiny_inputs, tmp_path, task_adapter) -> None:
    inputs = tiny_inputs("llama", padding="right")
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=[], task_adapter=task_adapter)).eval()
    assert mixtures(model) == {}
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))
    model.save_pretrained(tmp_path)
    if task_adapter:
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        assert torch.equal(logits(loaded, inputs), logits(tiny("llama"), inputs))


@pytest.mark.parametrize("combine", ["delta", "convex"])
def test_disabled_mixture_is_base_bit_for_bit(tiny, tiny_inputs, combine) -> None:
    inputs = tiny_inputs("bert", padding="right")
    model = mixda(tiny, "bert", combine=combine)
    assert not torch.allclose(logits(model, inputs), logits(tiny("bert"), inputs), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(tiny("bert"), inputs))
    assert torch.equal(logits(model.unload(), inputs), logits(tiny("bert"), inputs))


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": r".*"},
        {"domain_layers": [1], "layers_to_transform": [2]},
        {"domain_layers": []},
    ],
)
def test_new_domains_without_a_place_are_an_error(tiny, fields) -> None:
    with pytest.raises(ValueError, match=r"no place for domain adapters|exclude"):
        get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"domains": {"a": {"ranks": {"model.layers.9.mlp.down_proj": 2}}}},
            r"ranks=.* name \['model.layers.9.*those",
        ),
        ({"domains": {"a": {"ranks": {"lm_head": 2}}}}, r"domains\['a'\]: ranks=.* name \['lm_head'\], which take no"),
        (
            {"null_arms": {"model.layers.9.mlp.down_proj": 2}},
            r"null_arms=.* name \['model.layers.9.*have no gate; those",
        ),
        (
            {"null_arms": {"model.layers.0.mlp.down_proj": 2}},
            r"null_arms=.* name \['model.layers.0.*have no gate; those",
        ),
    ],
)
def test_ranks_and_null_arms_of_modules_without_a_gate_are_refused(tiny, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny("llama"), MixDAConfig(**{"domains": ["a"], **fields}))
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny("llama"), MixDAConfig(**{"domains": ["a"], **fields}, task_adapter=None))


# --- mixed batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize(
    ("kind", "granularity"), [("llama", "token"), ("llama", "causal_prefix"), ("bert", "sequence")]
)
def test_domain_ids_route_each_row_as_if_it_were_alone(tiny, tiny_inputs, kind, granularity, combine) -> None:
    model = mixda(tiny, kind, gate_granularity=granularity, combine=combine, task_adapter=None)
    inputs = tiny_inputs(kind, batch=4, padding="right")
    ids = model.base_model.domain_ids(["b", "__base__", "a", "b"])
    assert ids.tolist() == [1, -1, 0, 1]
    found = logits(model, {**inputs, "domain_ids": ids})
    for row, number in enumerate(ids.tolist()):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = logits(model, {**alone, "domain_ids": torch.tensor([number])})
        torch.testing.assert_close(found[row], expected[0], atol=1e-5, rtol=1e-5)
    # Row by row the kernel sees other shapes, so only the row without a domain can be compared bit for bit.
    assert torch.equal(found[1], logits(tiny(kind), inputs)[1])


@pytest.mark.parametrize("bad", [2, -2])
def test_domain_ids_out_of_range_are_an_error(tiny, tiny_inputs, bad) -> None:
    model = mixda(tiny)
    with pytest.raises(ValueError, match=rf"domain_ids=.*{bad}.*must lie between -1 \(none\) and 1"):
        logits(model, {**tiny_inputs("llama"), "domain_ids": torch.tensor([0, bad])})
    with pytest.raises(ValueError, match="`domain_ids` should be the same"):
        logits(model, {**tiny_inputs("llama"), "domain_ids": torch.tensor([0, 1, 0])})


def test_domain_ids_hold_over_a_generation(tiny, tiny_inputs) -> None:
    model = mixda(tiny, task_adapter=None)
    inputs = tiny_inputs("llama", batch=2, length=5)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with context(model).pin(domain_ids=torch.tensor([1, -1])):
        mixed = model.generate(**inputs, **asked)
        model.generate(**inputs, **asked, num_beams=2)
    assert torch.equal(mixed[1], tiny("llama").generate(**inputs, **asked)[1])
    assert not torch.equal(mixed[0], tiny("llama").generate(**inputs, **asked)[0])
    with context(model).pin(domain_ids=torch.tensor([1, 1])):
        assert torch.equal(mixed[0], model.generate(**inputs, **asked)[0])


MIXED = {
    "one": {"domains": ["a", "b"], "domain_layers": [1, 2], "r": 4},
    "two": {"domains": ["x"], "domain_layers": [0, 2], "r": 3, "gate": "sigmoid"},
    "three": {"domains": ["p", "q", "s"], "domain_layers": [2], "r": 2, "combine": "convex", "task_adapter": None},
}


def several(tiny: Any, kind: str, granularity: str) -> nn.Module:
    """Three mixtures with domains, layers, gates and combinations of their own in one model."""
    model = get_peft_model(tiny(kind), MixDAConfig(gate_granularity=granularity, **MIXED["one"]), adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, MixDAConfig(gate_granularity=granularity, **MIXED[name]))
    return randomize(model).eval()


@pytest.mark.parametrize(
    ("kind", "granularity"), [("llama", "token"), ("llama", "causal_prefix"), ("bert", "sequence")]
)
def test_rows_name_mixtures_of_different_domains(tiny, tiny_inputs, kind, granularity) -> None:
    model = several(tiny, kind, granularity)
    inputs = tiny_inputs(kind, batch=6, padding="right")
    names = ["two", "__base__", "one", "three", "two", "one"]
    found = logits(model, {**inputs, "adapter_names": names})
    base = logits(tiny(kind), inputs)
    assert torch.equal(found[1], base[1])
    for name in MIXED:
        model.set_adapter(name)
        alone = logits(model, inputs)
        for row in (i for i, n in enumerate(names) if n == name):
            torch.testing.assert_close(found[row], alone[row], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[row], base[row], atol=1e-2)


def test_mixed_batches_train_each_mixture_as_its_own_rows_would(tiny, tiny_inputs) -> None:
    model = several(tiny, "llama", "token").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mixda_adapters" in name)
    inputs = tiny_inputs("llama", batch=4, labels="tokens")
    names = ["one", "two", "three", "one"]
    model(**inputs, adapter_names=names).loss.backward()
    together = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    for name in MIXED:
        rows = [i for i, n in enumerate(names) if n == name]
        part = {key: value[rows] for key, value in inputs.items()}
        (model(**part, adapter_names=[name] * len(rows)).loss * len(rows) / 4).backward()
    apart = gradients(model)
    assert apart.keys() == together.keys()
    for name, grad in apart.items():
        torch.testing.assert_close(together[name], grad, atol=1e-6, rtol=1e-4)


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "granularity", "side"), GATES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 6)])
def test_one_row_or_one_token_keeps_its_shape(tiny, tiny_inputs, kind, granularity, side, batch, length) -> None:
    """The released code squeezes: one row loses its axis, one token is broadcast to (B, B)."""
    model = mixda(tiny, kind, gate_granularity=granularity, combine="convex")
    inputs = tiny_inputs(kind, batch=batch, length=length)
    found = logits(model, inputs)
    assert found.shape == (batch, length, 96)
    for row in range(batch):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(found[row], logits(model, alone)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_row_of_padding_alone_is_finite_and_disturbs_no_other(tiny, tiny_inputs, granularity) -> None:
    model = mixda(tiny, "bert", gate_granularity=granularity, balance_coef=0.1, z_coef=0.1, entropy_coef=0.1)
    inputs = tiny_inputs("bert", batch=3, labels="tokens")
    expected = logits(model, inputs)
    inputs["attention_mask"][1] = 0
    inputs["labels"][1] = -100
    found = logits(model, inputs)
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-5)
    model.train()(**inputs).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_bfloat16_keeps_gate_weights_in_float32_until_they_are_used(tiny, tiny_inputs, kind) -> None:
    inputs = tiny_inputs(kind, labels="tokens")
    seen = []
    for autocast in (True, False):
        base = tiny(kind).to(torch.bfloat16)
        model = randomize(
            get_peft_model(base, MixDAConfig(domains=DOMAINS, combine="convex"), autocast_adapter_dtype=autocast)
        )
        for mixture in mixtures(model).values():
            mixture.router.register_forward_hook(lambda m, args, routing: seen.append(routing.probs))
        output = model.train()(**inputs)
        output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
        assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert seen
    assert all(probs.dtype == torch.float32 for probs in seen)
    for probs in seen:
        torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)), atol=1e-6, rtol=0)


def test_sixteen_bit_results_are_near_those_of_thirty_two(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama")
    model = mixda(tiny, combine="convex")
    exact = logits(model, inputs)
    half = logits(copy.deepcopy(model).to(torch.bfloat16), inputs).float()
    noise = (logits(tiny("llama").to(torch.bfloat16), inputs).float() - logits(tiny("llama"), inputs)).abs().max()
    assert (half - exact).abs().max() < 3 * noise


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coef", ["balance_coef", "z_coef", "entropy_coef"])
@pytest.mark.parametrize(("kind", "granularity"), [("llama", "token"), ("bert", "sequence")])
def test_auxiliary_losses_join_the_loss_of_a_plain_forward(tiny, tiny_inputs, kind, granularity, coef) -> None:
    inputs = tiny_inputs(kind, batch=3, padding="right", labels="tokens")
    overrides = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    found = {}
    for value in (0.0, 1.0, 2.0):
        fields = {"domains": DOMAINS, "domain_layers": SITES, "gate_granularity": granularity, coef: value}
        model = randomize(get_peft_model(tiny(kind, **overrides), MixDAConfig(**fields)))
        assert torch.equal(model.eval()(**inputs).loss, found.setdefault("eval", model(**inputs).loss))
        found[value] = model.train()(**inputs).loss
        if value == 1.0:
            found[value].backward()
            (name,) = context(model).loss_log
            assert name == coef.removesuffix("_coef")
            assert any(".router.output.weight" in n and g.abs().max() > 0 for n, g in gradients(model).items())
    torch.testing.assert_close(found[0.0], found["eval"])
    added = found[1.0] - found[0.0]
    assert float(added.detach().abs()) > 1e-3
    torch.testing.assert_close(found[2.0] - found[0.0], 2 * added, atol=1e-5, rtol=1e-4)


def test_gate_usage_counts_real_tokens_once_per_forward(tiny, tiny_inputs) -> None:
    from mixadapters.training.callbacks import collect_usage

    inputs = tiny_inputs("llama", batch=3, padding="right")
    model = mixda(tiny).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.base_model.model.enable_input_require_grads()
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        for mixture in mixtures(model).values():
            assert context(model).usage.count(mixture.key) == int(inputs["attention_mask"].sum())
        report = collect_usage(model)
        shares = [report[f"gate/mean/weight/{arm}"] for arm in (*DOMAINS, "frozen")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert 0 < report["gate/mean/entropy"] < math.log(3)


@pytest.mark.parametrize("granularity", ["token", "causal_prefix"])
def test_checkpointing_changes_neither_loss_nor_gradients(tiny, tiny_inputs, granularity) -> None:
    inputs = tiny_inputs("llama", batch=3, padding="right", labels="tokens")
    found = []
    for checkpointing in (False, True):
        fields = {"gate_dropout": 0.3, "adapter_dropout": 0.2, "balance_coef": 0.5, "z_coef": 0.1}
        model = mixda(tiny, gate_granularity=granularity, **fields).train()
        context(model).objectives.append(PreservationObjective())
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.base_model.model.enable_input_require_grads()
        torch.manual_seed(5)
        loss = model(**inputs, **old_text(tiny_inputs, "llama", batch=3)).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (one, these), (other, those) = found
    torch.testing.assert_close(one, other)
    assert these.keys() == those.keys()
    for name, grad in these.items():
        torch.testing.assert_close(grad, those[name], atol=1e-6, rtol=1e-4)


def test_gate_dropout_is_off_in_evaluation(tiny, tiny_inputs) -> None:
    model = mixda(tiny, gate_dropout=0.5, adapter_dropout=0.5, gate_hidden=[8])
    inputs = tiny_inputs("llama")
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    assert not torch.equal(logits(model.train(), inputs), logits(model, inputs))


# --- stage 1 -----------------------------------------------------------------------------------------------------


def plain_old_loss(model: nn.Module, tiny: Any, kind: str, old: dict[str, Tensor], convex: bool) -> Tensor:
    """1/L sum over layers and domains of the masked mean of (K - F)^2 (delta: A^2), on the frozen model's stream."""
    base, seen = tiny(kind), {}
    for path in mixtures(model):
        base.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: seen.update({path: (args[0], y)}))
    with torch.no_grad():
        base(input_ids=old["old_input_ids"], attention_mask=old["old_attention_mask"])
    terms = []
    mask = old["old_attention_mask"].unsqueeze(-1)
    for path, mixture in mixtures(model).items():
        x, y = seen[path]
        for expert in mixture.bank.experts.values():
            delta = expert_output(expert, x) - (y if convex else 0)
            terms.append((delta.square() * mask).sum() / (mask.sum() * delta.shape[-1]))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("combine", ["delta", "convex"])
@pytest.mark.parametrize(("kind", "granularity"), [("bert", "token"), ("bert", "sequence"), ("llama", "token")])
def test_stage_one_loss_is_knowledge_and_old_domain_loss(tiny, tiny_inputs, kind, granularity, combine) -> None:
    """lambda L_K + L_S: padding left out, each domain alone whatever the gate says, on the base model's own stream."""
    overrides = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    config = MixDAConfig(
        domains=DOMAINS,
        domain_layers=SITES,
        r=4,
        combine=combine,
        gate_granularity=granularity,
        task_adapter="houlsby",
    )
    model = randomize(get_peft_model(tiny(kind, **overrides), config)).train()
    model.base_model.set_stage("domain")
    inputs, old = tiny_inputs(kind, padding="right", labels="tokens"), old_text(tiny_inputs, kind, batch=3)
    knowledge = model(**inputs).loss
    context(model).objectives.append(PreservationObjective(weight=2.0, knowledge_weight=0.5))
    found = model(**inputs, **old).loss
    expected = plain_old_loss(model, tiny, kind, old, combine == "convex")
    torch.testing.assert_close(found, 0.5 * knowledge + 2.0 * expected, atol=1e-5, rtol=1e-4)
    found.backward()
    assert all(".bank.experts." in name and ".domain." in name for name in gradients(model))

    garbage = {**old, "old_input_ids": torch.where(old["old_attention_mask"] > 0, old["old_input_ids"], 9)}
    torch.testing.assert_close(model(**inputs, **garbage).loss, found)


def test_old_domain_loss_stops_after_the_last_adapted_layer(tiny, tiny_inputs) -> None:
    model = mixda(tiny, domain_layers=[0, 1], task_adapter="pfeiffer").train()
    model.base_model.set_stage("domain")
    context(model).objectives.append(PreservationObjective())
    inner, ran = model.base_model.model.model, []
    for i, layer in enumerate(inner.layers):
        layer.register_forward_hook(lambda m, args, y, i=i: ran.append(i))
    model(**tiny_inputs("llama", labels="tokens"), **old_text(tiny_inputs, "llama"))
    assert ran == [0, 1, 2, 3, 0, 1]
    assert len(inner.layers) == 4


def test_old_domain_loss_leaves_out_domains_that_do_not_train(tiny, tiny_inputs) -> None:
    old = old_text(tiny_inputs, "llama")
    model = mixda(tiny).train()
    model.base_model.set_stage("domain")
    for mixture in mixtures(model).values():
        mixture.bank.experts["a"].requires_grad_(False)
    context(model).objectives.append(PreservationObjective(knowledge_weight=0.0))
    found = model(**tiny_inputs("llama", labels="tokens"), **old).loss
    for mixture in mixtures(model).values():
        mixture.bank.remove("a")
    torch.testing.assert_close(found, plain_old_loss(model, tiny, "llama", old, False), atol=1e-6, rtol=1e-4)


def test_old_domain_loss_is_zero_for_a_new_delta_domain_and_not_for_a_convex_one(tiny, tiny_inputs) -> None:
    for combine, positive in (("delta", False), ("convex", True)):
        model = get_peft_model(tiny("llama"), MixDAConfig(domains=DOMAINS, combine=combine)).train()
        model.base_model.set_stage("domain")
        context(model).objectives.append(PreservationObjective(knowledge_weight=0.0))
        loss = model(**tiny_inputs("llama", labels="tokens"), **old_text(tiny_inputs, "llama")).loss
        assert (float(loss.detach()) > 0) == positive


# --- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_stages_train_what_the_specification_says(tiny, kind) -> None:
    config = MixDAConfig(domains=DOMAINS, domain_layers=SITES, task_type=TaskType.SEQ_CLS)
    model = get_peft_model(tiny(kind, "sequence_classification"), config)
    head = {"bert": "classifier", "llama": "score"}[kind]
    trained: dict[str, set[str]] = {}
    for stage in ("domain", "task", "domain"):
        model.base_model.set_stage(stage)
        trained[stage] = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in model.named_parameters() if "mixda_adapters" in name}
    assert trained["domain"] == {name for name in adapters if ".domain.bank." in name}
    heads = {name for name, _ in model.named_parameters() if f"{head}.modules_to_save." in name}
    assert heads
    assert trained["task"] == {name for name in adapters if ".domain.bank." not in name} | heads
    with pytest.raises(ValueError, match=r"stage='tasks' is unknown; have \['domain', 'task'\]. Did you mean 'task'"):
        model.base_model.set_stage("tasks")


def test_stage_without_parameters_is_an_error(tiny) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=[]))
    with pytest.raises(ValueError, match="stage='domain' trains nothing"):
        model.base_model.set_stage("domain")


def test_only_the_chosen_stage_moves(tiny, tiny_inputs) -> None:
    model = mixda(tiny).train()
    inputs = tiny_inputs("llama", labels="tokens")
    for stage, parts in (("domain", [".domain.bank."]), ("task", [".domain.router.", ".task."])):
        model.base_model.set_stage(stage)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(**inputs).loss.backward()
        optimizer.step()
        model.zero_grad()
        for name, parameter in model.named_parameters():
            moves = any(part in name for part in parts)
            assert torch.equal(parameter, before[name]) != moves, name


# --- gates in a model --------------------------------------------------------------------------------------------


def test_paper_preset_computes_the_papers_equations(tiny, tiny_inputs) -> None:
    """w = sigmoid(W q + b) with q the attention output; o = w [K; F], per token."""
    model = randomize(
        get_peft_model(tiny("roberta"), MixDAConfig.preset("paper", domains=DOMAINS, domain_layers=[1], r=3))
    ).eval()
    layer, seen = model.base_model.model.roberta.encoder.layer[1], {}
    layer.intermediate.dense.register_forward_hook(lambda m, args, y: seen.update(q=args[0]))
    chain = layer.output.dense.mixda_adapters["default"]
    chain.domain.register_forward_hook(lambda m, args, y: seen.update(z=args[0], ffn=args[1], o=y))
    logits(model, tiny_inputs("roberta", padding="right"))
    w = (seen["q"] @ chain.domain.router.output.weight.T + chain.domain.router.output.bias).sigmoid()
    arms = [expert_output(expert, seen["z"]) for expert in chain.domain.bank.experts.values()] + [seen["ffn"]]
    expected = sum(w[..., k : k + 1] * arm for k, arm in enumerate(arms))
    torch.testing.assert_close(seen["o"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("adapter_input", "gate_input"), [("ffn_input", None), ("ffn_intermediate", "ffn_input")])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_inputs_of_adapters_and_gate_are_those_that_the_config_names(
    tiny, tiny_inputs, kind, adapter_input, gate_input
) -> None:
    fields = {"adapter_input": adapter_input, "gate_input": gate_input, "domain_layers": [1], "task_adapter": None}
    model = mixda(tiny, kind, **fields)
    inner = {n.replace(".base_layer", ""): m for n, m in model.base_model.model.named_modules() if ".1." in n}
    feeds = {"bert": "intermediate.dense", "llama": "mlp.gate_proj", "gpt2": "mlp.c_fc"}[kind]
    ends = {"bert": "1.output.dense", "llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[kind]
    seen: dict[str, Tensor] = {}

    def module_at(end: str) -> nn.Module:  # the base layer, where it is wrapped
        return next(module for name, module in inner.items() if name.endswith(end))

    module_at(feeds).register_forward_hook(lambda m, args, y: seen.update(ffn_input=args[0]))
    module_at(ends).register_forward_hook(lambda m, args, y: seen.update(ffn_intermediate=args[0], ffn=y))
    ((_, mixture),) = mixtures(model).items()
    mixture.router.register_forward_hook(lambda m, args, routing: seen.update(weights=routing.weights))
    mixture.register_forward_hook(lambda m, args, y: seen.update(o=y))
    logits(model, tiny_inputs(kind))
    read = seen[gate_input or adapter_input]
    scores = F.rms_norm(read, read.shape[-1:]) @ mixture.router.output.weight.T + mixture.router.output.bias
    torch.testing.assert_close(seen["weights"], scores.softmax(-1)[..., :2].flatten(0, 1), atol=1e-5, rtol=1e-5)
    x = seen[adapter_input]
    expected = plain_mixture(mixture, x.flatten(0, 1), seen["ffn"].flatten(0, 1), seen["weights"], None)
    torch.testing.assert_close(seen["o"].flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


def test_sequence_gate_on_a_causal_decoder_is_refused_before_anything_changes(tiny, tiny_inputs) -> None:
    for kind in ("llama", "gpt2", "t5"):
        model = tiny(kind)
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=r"gate_granularity='sequence'.*would see the future.*'causal_prefix'"):
            get_peft_model(model, MixDAConfig(gate_granularity="sequence"))
        assert list(model.state_dict()) == keys
        assert not model._forward_pre_hooks
    decoder = tiny("bert", "base", is_decoder=True)
    with pytest.raises(ValueError, match="would see the future"):
        get_peft_model(decoder, MixDAConfig(gate_granularity="sequence"))


def test_sequence_gate_on_the_encoder_of_two_stacks_is_allowed(tiny, tiny_inputs) -> None:
    config = MixDAConfig(
        domains=DOMAINS, gate_granularity="sequence", exclude_modules=r"decoder\..*", domain_layers=SITES
    )
    model = randomize(get_peft_model(tiny("t5"), config)).eval()
    assert all(path.startswith("encoder") for path in mixtures(model))
    inputs = tiny_inputs("t5", padding="right")
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize(("kind", "granularity"), [("bert", "sequence"), ("llama", "request")])
def test_missing_mask_is_refused_by_gates_that_need_it(tiny, tiny_inputs, kind, granularity) -> None:
    model = mixda(tiny, kind, gate_granularity=granularity)
    ids = tiny_inputs(kind)["input_ids"]
    with pytest.raises(
        ValueError, match=rf"gate_granularity='{granularity}' needs to know the padding.*attention_mask"
    ):
        logits(model, {"input_ids": ids})
    logits(model, {"input_ids": ids[:1]})
    with model.disable_adapter():
        logits(model, {"input_ids": ids})


def test_request_gate_trains_on_masked_prompts_and_refuses_to_guess(tiny, tiny_inputs) -> None:
    model = mixda(tiny, gate_granularity="request").train()
    inputs = tiny_inputs("llama", labels="tokens")
    with pytest.raises(ValueError, match="labels cover a row from its first token"):
        model(**inputs)
    with pytest.raises(ValueError, match="must know the prompt in training"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    labels = inputs["labels"].clone()
    labels[:, :3] = -100
    one = model(**{**inputs, "labels": labels})
    prompt = torch.zeros(2, 7, dtype=torch.long)
    prompt[:, :3] = 1
    two = model(**inputs, prompt_mask=prompt)
    torch.testing.assert_close(one.logits, two.logits)
    one.loss.backward()
    assert all(".router." in n or ".bank." in n for n in gradients(model))


def test_stacks_gate_by_their_own_streams(tiny, tiny_inputs) -> None:
    """The encoder's padding must not reach the decoder's gate, nor the other way round."""
    model = mixda(tiny, "t5", gate_granularity="causal_prefix")
    assert {path.split(".")[0] for path in mixtures(model)} == {"encoder", "decoder"}
    inputs = tiny_inputs("t5", batch=3, length=9, padding="right")
    together = logits(model, inputs)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "decoder_input_ids": inputs["decoder_input_ids"][row : row + 1, :6],
        }
        torch.testing.assert_close(together[row, :6], logits(model, alone)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["token", "causal_prefix", "request"])
def test_encoder_decoder_generates_as_its_full_forward(tiny, tiny_inputs, granularity) -> None:
    model = mixda(tiny, "t5", gate_granularity=granularity)
    inputs = tiny_inputs("t5", padding="right")
    del inputs["decoder_input_ids"]
    made = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    full = {**inputs, "decoder_input_ids": made.sequences}
    if granularity == "request":  # the decoder's request is its start token
        full["prompt_mask"] = F.pad(torch.ones(2, 1), (0, made.sequences.shape[1] - 1))
    expected = logits(model, full)
    for step, found in enumerate(made.logits):
        torch.testing.assert_close(found, expected[:, step], atol=1e-4, rtol=1e-4)


def test_input_dependent_mixture_refuses_to_merge_with_the_reason(tiny) -> None:
    model = mixda(tiny, task_adapter=None)
    with pytest.raises(ValueError, match="cannot be merged: its router depends on the input"):
        model.merge_and_unload()


# --- one large domain, equal domains -----------------------------------------------------------------------------


def test_equal_domains_get_equal_weights_and_stay_finite(tiny, tiny_inputs) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = mixda(tiny, domains=["a", "b", "c"], balance_coef=0.01, z_coef=0.01)
    for mixture in mixtures(model).values():
        for name in "bc":
            mixture.bank.experts[name].load_state_dict(mixture.bank.experts["a"].state_dict())
        nn.init.zeros_(mixture.router.output.weight)
        nn.init.zeros_(mixture.router.output.bias)
    model.base_model.set_stage("task")
    train(model, lambda: inputs, 20, 1e-2)
    assert logits(model, inputs).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_one_dominant_domain_is_the_same_as_routing_to_it(tiny, tiny_inputs, size) -> None:
    inputs = tiny_inputs("llama")
    model = mixda(tiny, combine="convex", task_adapter=None)
    for mixture in mixtures(model).values():
        mixture.router.output.bias.data.copy_(torch.tensor([0.0, size, 0.0]))
    expected = logits(model, {**inputs, "domain_ids": torch.tensor([1, 1])})
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


# --- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "sum"}, "combine='sum' is unknown"),
        ({"gate": "softmx"}, "gate='softmx' is unknown.*Did you mean 'softmax'"),
        ({"gate_granularity": "tokens"}, "gate_granularity='tokens' is unknown.*Did you mean 'token'"),
        ({"gate_pool": "mean"}, "gate_pool='mean' is unknown"),
        ({"gate_input": "x"}, "gate_input='x' is unknown"),
        ({"adapter_input": "ffn"}, "adapter_input='ffn' is unknown"),
        ({"activation": "relu6"}, "activation='relu6' is unknown"),
        ({"task_activation": "swish"}, "task_activation='swish' is unknown"),
        ({"task_adapter": "ia3"}, "task_adapter='ia3' is unknown"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"task_r": -1}, "`task_r` should be a positive integer"),
        ({"reduction_factor": 0}, "reduction_factor=0 must be a finite number, at least 0.001"),
        ({"task_reduction_factor": -2}, "task_reduction_factor=-2 must be a finite number, at least 0.001"),
        ({"adapter_dropout": 1.5}, "adapter_dropout=1.5 must be"),
        ({"gate_dropout": -0.5}, "gate_dropout=-0.5 must be"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number or None, above 0"),
        ({"gate_input": "ffn_intermediate", "adapter_input": "ffn_input"}, "is not possible.*leave gate_input=None"),
        ({"router": {"kind": "counts", "null_arms": 1}}, "null_arms.* is 1: router 'counts'.*leave it 0"),
        ({"domain_layers": [1.5]}, r"domain_layers=\[1.5\]: the fraction 1.5 must be in \(0, 1\]"),
        ({"domain_layers": [0.0]}, "the fraction 0.0 must be"),
        ({"gait": "softmax", "r": 2}, r"has no field 'gait'. Did you mean 'gate'"),
        ({"format_version": 9}, "format_version=9 is newer"),
        ({"gate_hidden": [0]}, r"gate_hidden=\[0\] must be a list of integers or None, at least 1"),
        ({"gate_hidden": 768}, r"gate_hidden=768 must be a list of integers or None, at least 1"),
    ],
)
def test_config_refuses_wrong_fields(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixDAConfig(**fields)


@pytest.mark.parametrize(
    ("given", "depth", "expected"),
    [
        (None, 24, [7, 11]),  # the paper's layers of RoBERTa-large
        (None, 12, [3, 5]),
        (None, 6, [1, 2]),
        (None, 4, [1]),
        (None, 1, [0]),
        ([0.25, 0.5, 1.0], 8, [1, 3, 7]),
        ([1, 1.0], 4, [1, 3]),
        ([3, 0, 3], 4, [0, 3]),
    ],
)
def test_layers_are_indices_or_fractions_of_the_depth(given, depth, expected) -> None:
    assert MixDAConfig(domain_layers=given).layers(depth) == expected


@pytest.mark.parametrize("given", [[4], [0.5, 17]])
def test_layers_out_of_range_are_an_error(tiny, given) -> None:
    with pytest.raises(ValueError, match=r"domain_layers=.*: the model has layers 0 to 3, not \[.*\]"):
        get_peft_model(tiny("llama"), MixDAConfig(domain_layers=given))


def test_rank_pattern_reaches_domain_adapters(tiny) -> None:
    config = MixDAConfig(domains=DOMAINS, domain_layers=[0, 1], r=4, rank_pattern={"layers.1.mlp.down_proj": 7})
    model = get_peft_model(tiny("llama"), config)
    found = {path: {e.rank for e in m.bank.experts.values()} for path, m in mixtures(model).items()}
    assert list(found.values()) == [{4}, {7}]


def test_presets_are_configs_with_overrides() -> None:
    paper, released = MixDAConfig.preset("paper"), MixDAConfig.preset("released", gate_hidden=[8])
    assert (paper.gate, paper.combine, paper.gate_granularity) == ("sigmoid", "convex", "token")
    assert (released.gate, released.gate_pool, released.gate_hidden) == ("softmax", "last", [8])
    with pytest.raises(ValueError, match=r"preset='relesed' is unknown.*Did you mean 'released'"):
        MixDAConfig.preset("relesed")


def test_config_survives_json(tmp_path) -> None:
    config = MixDAConfig(
        domains=["z", "a"], r=3, domain_layers=[1, 1.0], gate="sigmoid", gate_hidden=[5], temperature=2.0,
        adapter_glu=True, task_adapter=None, rank_pattern={"a": 2}, task_type=TaskType.CAUSAL_LM,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert list(read.domains) == ["z", "a"]
    assert [type(layer) for layer in read.domain_layers] == [int, float]


@pytest.mark.parametrize("fields", [{"adapter_glu": True}, {"adapter_layer_norm": True}, {"activation": "silu"}])
@pytest.mark.parametrize("adapter_input", ["ffn_intermediate", "ffn_input"])
def test_kinds_of_domain_adapters_start_as_base_train_and_load(
    tiny, tiny_inputs, tmp_path, fields, adapter_input
) -> None:
    inputs = tiny_inputs("llama", labels="tokens")
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=DOMAINS, adapter_input=adapter_input, **fields)).eval()
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))
    randomize(model).train()(**inputs).loss.backward()
    assert all(name in gradients(model) for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_order": ["a", "b", "c"]}, "must name the domains"),
        ({"gate_hidden": [5]}, "is missing|no place for"),
        ({"task_adapter": None}, "no place for"),
        ({"task_r": 9}, "in the file and"),
        ({"gate": "sigmoid"}, r"router\.output.* in the file and"),
        ({"colour": "blue"}, "has no field 'colour'"),
    ],
)
def test_saved_weights_and_config_must_fit(tiny, tmp_path, changes, message) -> None:
    import json

    mixda(tiny).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_bottleneck_and_mixda_of_one_domain_agree(tiny, tiny_inputs) -> None:
    """One adapter is one adapter, whatever its type."""
    inputs = tiny_inputs("llama")
    one = mixda(tiny, domains=["a"], task_adapter=None)
    fields = {"placement": "parallel", "adapter_input": "ffn_intermediate", "layers_to_transform": SITES, "r": 4}
    other = get_peft_model(tiny("llama"), BottleneckConfig(**fields))
    ours = dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            twin = name.replace(
                "bottleneck_adapters.default.bank.experts.adapter", "mixda_adapters.default.domain.bank.experts.a"
            )
            if "bottleneck" in name:
                parameter.copy_(ours[twin])
    found = logits(one, {**inputs, "domain_ids": torch.tensor([0, 0])})
    torch.testing.assert_close(found, logits(other, inputs), atol=1e-6, rtol=1e-6)


def test_hard_routing_by_hand_equals_the_banks_own(tiny) -> None:
    """`Routing` by index is the same mixture as one-hot weights."""
    mixture = small_mixture("softmax", False)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    indices = torch.tensor([[0], [2], [-1], [1], [0], [-1]])
    weights = F.one_hot(indices[:, 0].clamp_min(0), 3) * (indices >= 0)
    one = mixture.bank(x, Routing(indices), None, y)
    torch.testing.assert_close(one, plain_mixture(mixture, x, y, weights.double(), None))
    assert torch.equal(one[[2, 5]], y[[2, 5]])
