"""`router` as a field of MixDA: any registered router, with its options; the older fields say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapted import logits
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mixadapters import ROUTERS, MixDAConfig, MoAConfig, Router
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers import SoftmaxGate

FIELDS: dict[str, Any] = {"domains": ["a", "b"], "r": 3, "domain_layers": [0, 1], "init_weights": False}
OWN = '''
from mixadapters import ROUTERS, Router
from mixadapters.core.routing import Routing
from torch import nn

@ROUTERS.register("mine_top_k")
class MineTopK(Router):
    """The k experts with the largest weights of a softmax."""

    def __init__(self, in_features, experts, k=1):
        super().__init__(in_features, experts)
        self.k, self.score = k, nn.Linear(in_features, len(experts))

    def forward(self, tokens, context):
        logits = self.score(tokens.reshape(-1, self.in_features)).float()
        weights, indices = logits.softmax(-1).topk(self.k)
        return Routing(indices, weights, probs=logits.softmax(-1), logits=logits)
'''


@pytest.fixture
def own() -> Iterator[dict[str, Any]]:
    """A router of a user's script, known inside the test."""
    names: dict[str, Any] = {"__name__": "script"}
    with ROUTERS.temporarily():
        exec(OWN, names)
        yield names


def adapted(tiny: Any, kind: str = "llama", **fields: Any) -> nn.Module:
    model = get_peft_model(tiny(kind), MixDAConfig(**{**FIELDS, **fields}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


# --- one by one, or together -------------------------------------------------------------------------------------

SAME = [
    ({}, "softmax"),
    ({"gate": "sigmoid"}, "sigmoid"),
    (
        {"gate_granularity": "causal_prefix", "gate_hidden": [5], "gate_normalize": False, "temperature": 2.0},
        {"kind": "softmax", "granularity": "causal_prefix", "hidden": [5], "normalize": False, "temperature": 2.0},
    ),
    (
        {"gate": "sigmoid", "gate_input": "ffn_input", "gate_frozen_bias": 1.0, "combine": "convex"},
        {"kind": "sigmoid", "input": "ffn_input", "frozen_bias": 1.0},
    ),
    ({"balance_coef": 0.5, "z_coef": 0.1, "entropy_coef": -0.1}, {"kind": "softmax", "balance_coef": 0.5,
                                                                 "z_coef": 0.1, "entropy_coef": -0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "router"), SAME)
def test_older_fields_and_router_say_the_same(tiny, tiny_inputs, tmp_path, fields, router) -> None:
    inputs = tiny_inputs("llama", padding="right", labels="tokens")
    combine = {"combine": fields["combine"]} if "combine" in fields else {}
    one, two = adapted(tiny, **fields), adapted(tiny, router=router, **combine)
    assert torch.equal(logits(one, inputs), logits(two, inputs))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert torch.equal(one.train()(**inputs).loss, two.train()(**inputs).loss)
    for i, model in enumerate((one, two)):
        model.save_pretrained(tmp_path / str(i))
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / str(i)).eval()
        assert torch.equal(logits(loaded, inputs), logits(one.eval(), inputs))


def test_fields_have_their_values_after_all() -> None:
    config = MixDAConfig(gate_dropout=0.2)
    assert (config.gate, config.gate_granularity, config.gate_hidden, config.temperature) == (
        "softmax",
        "token",
        [],
        1.0,
    )
    assert (config.router, config.gate_dropout) == (None, 0.2)
    config = MixDAConfig(router={"kind": "sigmoid", "dropout": 0.2})
    assert (config.gate, config.gate_dropout, config.gate_granularity) == ("sigmoid", 0.2, None)
    assert replace(config, r=3).router == {"kind": "sigmoid", "dropout": 0.2}
    assert MixDAConfig(router="softmax", temperature=2.0).router == {"kind": "softmax", "temperature": 2.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "softmax", "gate": "sigmoid"}, "router says kind='softmax' and gate says 'sigmoid'"),
        ({"router": {"kind": "softmax", "temperature": 2.0}, "temperature": 1.0}, r"=2.0 and temperature .*1.0"),
        ({"router": {"kind": "softmax", "hiden": [3]}}, "takes no argument 'hiden'. Did you mean 'hidden'"),
        ({"router": {"temperature": 2.0}}, "needs a 'kind'"),
        ({"router": "sotfmax"}, "unknown router 'sotfmax'.*Did you mean 'softmax'.*module that registers it"),
        ({"gate": "sotfmax"}, "gate='sotfmax' is unknown.*Did you mean 'softmax'.*module that registers it"),
        ({"router": 3}, "router=3"),
        ({"router": {"kind": "softmax", "temperature": float("nan")}}, "temperature=nan must be a finite number"),
        ({"router": {"kind": "softmax", "granularity": "tokens"}}, "granularity='tokens' is unknown.*'token'"),
        ({"router": {"kind": "softmax", "pool": "mean"}}, "pool='mean' is unknown.*'masked_mean'"),
        ({"router": {"kind": "softmax", "balance_coef": -1}}, "balance_coef=-1 must be a finite number"),
        ({"router": {"kind": "softmax", "input": "ffn"}}, r"input='ffn' is unknown|gate_input='ffn'"),
        ({"router": "constant", "temperature": 2.0}, "ConstantRouter takes no argument 'temperature'"),
        ({"gate": "constant", "gate_hidden": [3]}, "ConstantRouter takes no argument 'hidden'"),
        ({"router": "single"}, r"one expert, not \['a', 'b'\]"),
        ({"router": "constant", "combine": "convex"}, r"weighs the frozen layer's output.*ConstantRouter"),
        ({"router": {"kind": "constant", "weights": [1.0]}}, "one entry for each domain"),
        ({"router": {"kind": "softmax", "temperature": torch.tensor(2.0)}}, "temperature=.*Tensor cannot be saved"),
        ({"domains": ["frozen"]}, "domains: 'frozen' is the name of an arm"),
        ({"domains": ["a", "null0"]}, "domains: 'null0' is the name of an arm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_the_config(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MixDAConfig(**{**FIELDS, **fields})


def test_a_field_changed_beside_router_is_refused(tiny) -> None:
    config = MixDAConfig(**FIELDS, router={"kind": "softmax", "temperature": 2.0})
    config.temperature = 3.0
    with pytest.raises(ValueError, match=r"temperature=3.0 was set, but router=\{.*2.0.*\} decides"):
        get_peft_model(tiny("llama"), config)
    plain = MixDAConfig(**FIELDS)
    plain.temperature = 3.0
    router = next(iter(get_peft_model(tiny("llama"), plain).base_model.mixtures().values())).router
    assert router.temperature == 3.0


# --- routers of a user's own -------------------------------------------------------------------------------------


def test_own_router_trains_saves_and_loads_by_name(own, tiny, tiny_inputs, tmp_path) -> None:
    router = {"kind": "mine_top_k", "k": 1, "balance_coef": 0.5, "z_coef": 0.1}
    model, inputs = adapted(tiny, router=router), tiny_inputs("llama", padding="right", labels="tokens")
    tuner = model.base_model
    tuner.set_stage("task")
    model.train()(**inputs).loss.backward()
    trained = {n.split(".router.")[1] for n, p in model.named_parameters() if ".router." in n and p.grad.any()}
    assert trained == {"score.weight", "score.bias"}
    assert set(tuner.context.loss_log) == {"balance", "z"}
    assert tuner.context.usage.report()["gate/mean/weight/a"] > 0
    model.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["router"] == router
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    ids = tuner.domain_ids(["b"] * len(inputs["input_ids"]))  # hard routes stand in front of any router
    logits(model, {**inputs, "domain_ids": ids})
    assert all((r.indices == 1).all() for r in tuner.context.record.routings.values())


def test_where_the_router_is_not_registered_loading_says_so(tiny, tmp_path) -> None:
    with ROUTERS.temporarily():
        exec(OWN, {"__name__": "script"})
        adapted(tiny, router={"kind": "mine_top_k", "k": 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown router") as failed:
        PeftConfig.from_pretrained(tmp_path)
    assert str(failed.value).startswith("unknown router 'mine_top_k'; have ['arrow', 'constant',")
    assert str(failed.value).endswith(
        "A router of your own is known once the module that registers it has been imported."
    )


def test_a_router_without_surgery_refuses_domains_that_come_and_go(own, tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny, router="mine_top_k"), tiny_inputs("llama")
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=r"add_domain needs .*MineTopK .* has no add_expert and no start_at"):
        model.base_model.add_domain("c")
    with pytest.raises(ValueError, match=r"remove_domain needs .* has no remove_expert"):
        model.base_model.remove_domain("a")
    assert list(model.peft_config["default"].domains) == ["a", "b"]
    assert torch.equal(logits(model, inputs), before)


class Sharp(SoftmaxGate):
    """Only the largest weight counts."""

    def __init__(self, in_features: int, experts: list[str], *, floor: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, experts, **options)
        self.floor = floor

    def choose(self, logits: Tensor) -> Routing:
        routing = super().choose(logits)
        return routing._replace(weights=routing.weights * (routing.weights > self.floor))


def test_a_subclass_that_passes_options_on_loses_none(tiny, tiny_inputs) -> None:
    options = {"granularity": "causal_prefix", "temperature": 2.0, "hidden": [4], "balance_coef": 0.5}
    with ROUTERS.temporarily():
        ROUTERS.register("sharp")(Sharp)
        model = adapted(tiny, router={"kind": "sharp", "floor": 0.4, **options}, combine="convex")
        router = next(iter(model.base_model.mixtures().values())).router
        assert (router.granularity, router.temperature, router.floor, router.convex) == (
            "causal_prefix",
            2.0,
            0.4,
            True,
        )
        assert (router.hidden[1].out_features, router.balance_coef, router.stack) == (4, 0.5, "")
        model.base_model.add_domain("c")
        model.base_model.remove_domain("a")
        logits(model, tiny_inputs("llama"))
        routing = next(iter(model.base_model.context.record.routings.values()))
        assert ((routing.weights == 0) | (routing.weights > 0.4)).all()
        with pytest.raises(ValueError, match="causal decoder would see the future"):
            get_peft_model(tiny("llama"), MixDAConfig(**FIELDS, router={"kind": "sharp", "granularity": "sequence"}))


def test_a_router_reads_batch_fields_of_its_own(tiny, tiny_inputs) -> None:
    model, inputs = adapted(tiny, router="modality"), tiny_inputs("llama")
    ids = torch.randint(-1, 2, inputs["input_ids"].shape)
    logits(model, {**inputs, "modality_ids": ids})
    routing = next(iter(model.base_model.context.record.routings.values()))
    assert torch.equal(routing.indices, ids.reshape(-1, 1))


class Stacked(Router):
    """Notes which stack it sits in."""

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.numel() // self.in_features
        weight = torch.full((rows, len(self.experts)), float(self.stack == "decoder"))
        return Routing(weights=weight)


def test_own_routers_know_where_they_sit_and_may_read_another_input(tiny, tiny_inputs) -> None:
    with ROUTERS.temporarily():
        ROUTERS.register("stacked")(Stacked)
        model = adapted(tiny, "t5", router={"kind": "stacked", "input": "ffn_input"})
        logits(model, tiny_inputs("t5"))
        mixtures = model.base_model.mixtures()
        assert {m.router.in_features for m in mixtures.values()} != {m.bank.in_features for m in mixtures.values()}
        for key, routing in model.base_model.context.record.routings.items():
            assert (routing.weights == float("decoder" in key.path)).all()


def test_a_config_with_an_own_router_is_read_from_json(own, tmp_path) -> None:
    MixDAConfig(**FIELDS, router={"kind": "mine_top_k", "k": 2}).save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert (again.router, again.gate, again.temperature) == ({"kind": "mine_top_k", "k": 2}, "mine_top_k", None)


def test_an_argument_that_an_own_router_lacks_is_named() -> None:
    class Needs(Router):
        def __init__(self, in_features: int, experts: list[str], depth: int) -> None:
            super().__init__(in_features, experts)

    class Nothing(Router):
        def __init__(self) -> None: ...

    with ROUTERS.temporarily():
        ROUTERS.register("needs")(Needs)
        ROUTERS.register("nothing")(Nothing)
        with pytest.raises(ValueError, match=r"router 'needs': Needs\(in_features.*missing .*'depth'.*a default in"):
            MixDAConfig(**FIELDS, router="needs")
        with pytest.raises(ValueError, match=r"router 'nothing': Nothing\(\) .* too many positional arguments"):
            MixDAConfig(**FIELDS, router={"kind": "nothing"})
        assert MixDAConfig(**FIELDS, router={"kind": "needs", "depth": 3}).router == {"kind": "needs", "depth": 3}


@pytest.mark.parametrize("method", ["mixda", "moa"])
@pytest.mark.parametrize("module", ["__main__", "our.routers"])
def test_the_card_says_what_registers_an_own_router(own, tiny, tmp_path, module, method) -> None:
    own["MineTopK"].__module__ = module
    router = {"kind": "mine_top_k", "k": 1}
    if method == "mixda":
        adapted(tiny, router=router).save_pretrained(tmp_path)
    else:
        config = MoAConfig(num_experts=2, r=2, router=router, router_aux_loss_coef=0.001)
        get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    said = {
        "our.routers": "import mixadapters\nimport our.routers  # registers the router 'mine_top_k'\nfrom peft import",
        "__main__": "import mixadapters\n...  # run the code that registers the router 'mine_top_k', from the script",
    }
    assert said[module] in card
    assert (
        """- Needs the router 'mine_top_k', which is none of mixadapters': `{"k": 1, "kind": "mine_top_k"}`""" in card
    )
    adapted(tiny).save_pretrained(tmp_path)
    assert "registers" not in (tmp_path / "README.md").read_text()
