"""One check of the values of all configs, from their annotations and metadata."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from peft import PeftConfig

from mixadapters import (
    AGDConfig,
    BottleneckConfig,
    GateUsageCallback,
    MixDAConfig,
    MoSAConfig,
    PILLConfig,
    StageCallback,
)
from mixadapters.core.fields import check_fields, check_integer, check_number
from mixadapters.core.patterns import check_pattern
from mixadapters.surgery import compress_experts, merge_experts, prune_curve, prune_experts
from mixadapters.tuners.mixda.model import MixDAModel
from mixadapters.tuners.moa.model import MoAModel

CONFIGS = (AGDConfig, BottleneckConfig, MixDAConfig, MoSAConfig, PILLConfig)
NAN, INF = float("nan"), float("inf")
WRONG: list[tuple[type, dict[str, Any]]] = [
    (BottleneckConfig, {"scale": 0}),
    (MoSAConfig, {"scale": 0.0}),
    (BottleneckConfig, {"scale": NAN}),
    (BottleneckConfig, {"scale": INF}),
    (BottleneckConfig, {"scale": True}),
    (BottleneckConfig, {"glu": "false"}),
    (BottleneckConfig, {"glu": 0}),
    (BottleneckConfig, {"layer_norm": "no"}),
    (BottleneckConfig, {"init_weights": "gaussian"}),
    (BottleneckConfig, {"inference_mode": 1}),
    (BottleneckConfig, {"rank_pattern": {".*": 0}}),
    (BottleneckConfig, {"rank_pattern": {".*": "8"}}),
    (BottleneckConfig, {"rank_pattern": [8]}),
    (BottleneckConfig, {"reduction_factor": INF}),
    (BottleneckConfig, {"r": "8"}),
    (BottleneckConfig, {"r": 8.5}),
    (BottleneckConfig, {"r": True}),
    (BottleneckConfig, {"dropout": None}),
    (BottleneckConfig, {"dropout": NAN}),
    (BottleneckConfig, {"activation": None}),
    (BottleneckConfig, {"format_version": "9"}),
    (BottleneckConfig, {"layers_to_transform": -1}),
    (BottleneckConfig, {"target_modules": [3]}),
    (BottleneckConfig, {"target_modules": {"dense": 1}}),
    (BottleneckConfig, {"modules_to_save": "head"}),
    (BottleneckConfig, {"sites": {"ffn": 3}}),
    (BottleneckConfig, {"hidden_size": 0}),
    (BottleneckConfig, {"trainable_token_indices": {"wte": [1.5]}}),
    (MixDAConfig, {"temperature": NAN}),
    (MixDAConfig, {"temperature": INF}),
    (MixDAConfig, {"gate_frozen_bias": NAN}),
    (MixDAConfig, {"balance_coef": NAN}),
    (MixDAConfig, {"balance_coef": -1}),
    (MixDAConfig, {"z_coef": -1.0}),
    (MixDAConfig, {"domains": None}),
    (MixDAConfig, {"domains": {"a": {"revision": "main"}}}),
    (MixDAConfig, {"domains": {"a": {"ranks": {"layer": 0}}}}),
    (MixDAConfig, {"domains": {"a": {"ranks": {"layer": "4"}}}}),
    (MixDAConfig, {"domains": {"a": {"source": 3}}}),
    (MixDAConfig, {"domains": {"a": {"source": "x", "check_base_model": "no"}}}),
    (MixDAConfig, {"gate_hidden": [True]}),
    (MixDAConfig, {"domain_layers": [NAN]}),
    (MixDAConfig, {"null_arms": {"layer": -1}}),
    (MoSAConfig, {"num_experts": "4"}),
    (MoSAConfig, {"num_experts": 256}),
    (MoSAConfig, {"scale": NAN}),
    (MoSAConfig, {"consistency": INF}),
    (MoSAConfig, {"sync_ranks": "yes"}),
    (PILLConfig, {"gate": "no"}),
    (PILLConfig, {"modalities": "text"}),
    (PILLConfig, {"token_ids": {"image": [5], "text": [5]}}),
    (AGDConfig, {"min_scale": NAN}),
    (AGDConfig, {"conditions": {"prompt": 1}}),
    (AGDConfig, {"num_classes": 10.0}),
    (BottleneckConfig, {"scale": 10**400}),
    (BottleneckConfig, {"reduction_factor": 10**400}),
    (BottleneckConfig, {"dropout": 10**5000}),
    (BottleneckConfig, {"r": 10**30}),
    (BottleneckConfig, {"r": 10**12 + 1}),
    (MixDAConfig, {"balance_coef": 10**400}),
    (MixDAConfig, {"gate_hidden": [10**400]}),
    (MixDAConfig, {"domains": {"a": {"ranks": {"layer": 10**30}}}}),
    (MoSAConfig, {"consistency": 10**400}),
    (MixDAConfig, {"temperature": 1e-320}),
    (MixDAConfig, {"temperature": 1e-38}),
    (MixDAConfig, {"gate_frozen_bias": 1e300}),
    (MixDAConfig, {"balance_coef": 1e300}),
    (MixDAConfig, {"reduction_factor": 1e-9}),
    (BottleneckConfig, {"scale": 1e-320}),
    (BottleneckConfig, {"reduction_factor": 1e-320}),
    (BottleneckConfig, {"exclude_modules": ""}),
    (BottleneckConfig, {"exclude_modules": ["x", ""]}),
    (BottleneckConfig, {"target_modules": [""]}),
    (BottleneckConfig, {"modules_to_save": [""]}),
    (BottleneckConfig, {"rank_pattern": {"": 3}}),
    (BottleneckConfig, {"sites": {"ffn": ""}}),
    (BottleneckConfig, {"trainable_token_indices": [-1]}),
    (BottleneckConfig, {"trainable_token_indices": {"wte": [3, -1]}}),
    (AGDConfig, {"timestep_scale": 0}),
    (AGDConfig, {"timestep_scale": -1.0}),
    (AGDConfig, {"min_scale": -1.0}),
]


@pytest.mark.parametrize(("config", "given"), WRONG)
def test_wrong_values_are_refused_by_name_from_python_and_from_json(config: Any, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=name):
        config(**given)
    with pytest.raises(ValueError, match=name):
        PeftConfig.from_peft_type(peft_type=config().peft_type.value, **given)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_refuses_an_object_and_a_bool_or_text_in_place_of_a_number(config: Any) -> None:
    defaults = config()
    for f in fields(config):
        if f.name in ("peft_type", "task_type", "auto_mapping"):  # PEFT's
            continue
        wrong = [object()]
        if type(getattr(defaults, f.name)) in (int, float):
            wrong += [True, "1", NAN, [1]]
        for value in wrong:
            with pytest.raises(ValueError, match=f.name):
                config(**{f.name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_a_value_that_is_set_later_is_checked_before_a_model_is_touched(config: Any, tiny: Any) -> None:
    from peft import get_peft_model

    base = tiny("llama")
    before = list(dict(base.named_modules()))
    later = config()
    later.init_weights = "no"
    with pytest.raises(ValueError, match="init_weights='no' must be True or False"):
        get_peft_model(base, later)
    assert list(dict(base.named_modules())) == before


def test_messages_say_what_a_field_takes() -> None:
    @dataclass
    class Example:
        width: int = field(default=1, metadata={"least": 1, "most": 9})
        share: float | None = field(default=None, metadata={"above": 0, "below": 1})
        kind: Literal["a", "b"] | None = None
        names: list[str] = field(default_factory=list)

    def message(**given: Any) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_fields(Example(**given))
        return str(error.value)

    check_fields(Example(9, 0.5, "b", ["x"]))
    assert message(width=10) == "width=10 must be an integer, at least 1, at most 9"
    assert message(share=1.0) == "share=1.0 must be a finite number or None, above 0, less than 1"
    assert message(share=0) == "share=0 must be a finite number or None, above 0, less than 1"
    assert message(kind="c") == "kind='c' is unknown; choose one of ['a', 'b']."
    assert message(width=10**30).endswith("0 must be an integer; an integer is 1000000000000 at most")
    assert message(share=10**400).endswith("must be a finite number or None; an integer is 1000000000000 at most")
    assert message(names="x") == "names='x' must be a list of strings"
    assert len(message(names="x" * 10**6)) < 300


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "must be an integer, at least 1, at most 9"),
        (10, "must be an integer, at least 1, at most 9"),
        (2.0, "must be an integer, at least 1, at most 9"),
        (True, "must be an integer, at least 1, at most 9"),
        (None, "must be an integer, at least 1, at most 9"),
    ],
)
def test_an_argument_that_is_no_integer_of_its_range_is_refused(value: Any, said: str) -> None:
    check_integer("steps", np.int64(9), least=1, most=9)
    with pytest.raises(ValueError, match=f"^steps={value} {said}$"):
        check_integer("steps", value, least=1, most=9)


@pytest.mark.parametrize("value", [0, 1.0, -0.5, True, "0.5", NAN, INF, 1e-31, 10**400])
def test_an_argument_that_is_no_number_of_its_range_is_refused_as_a_field_is(value: Any) -> None:
    @dataclass
    class Example:
        share: float = field(default=0.5, metadata={"above": 0, "below": 1})

    check_number("share", 0.25, above=0, below=1)
    with pytest.raises(ValueError, match="must be a finite number") as of_field:
        check_fields(Example(value))
    with pytest.raises(ValueError, match="must be a finite number, above 0, less than 1") as of_argument:
        check_number("share", value, above=0, below=1)
    said, words = str(of_field.value), str(of_argument.value)
    assert ("a number is 0, or 1e-30 to 1e+30 in size" in words) == (value in (1e-31, 10**400))
    words = words.replace(", above 0, less than 1;", ";")  # of sizes a field says that alone
    assert words.partition(";")[0] == said.partition(";")[0]


def test_large_floats_are_floats() -> None:
    assert BottleneckConfig(reduction_factor=1e16).reduction_factor == 1e16
    assert MixDAConfig(balance_coef=1e29, temperature=1e-29).balance_coef == 1e29
    with pytest.raises(ValueError, match=r"scale=1e-31 .*a number is 0, or 1e-30 to 1e\+30 in size"):
        BottleneckConfig(scale=1e-31)
    with pytest.raises(ValueError, match=r"modules_to_save=\[''\] holds an empty string"):
        BottleneckConfig(modules_to_save=[""])


# --- patterns -----------------------------------------------------------------------------------------------------

HANG = [
    r"(a+)+$", r"(a|a)*b", r"(a|ab)*c", "a?" * 30 + "a" * 30, ".*" * 6 + "x", r"(.*\.)*mlp", r"(a?){30}a{30}",
    r"(x+x+)+y", r"([a-z]+)*\d", r"(.*a){20}", r"(a*)*", r"(a)\1*", r"(?=(a+)+)b", r"a*A*a*A*a*b(?i:)",
    r"(m)(?(1)(?:[a-z._0-9]+)+!|x)", r"(m)?(?(1)x|(a+)+b)",
]  # fmt: skip
WORK = [
    r"(?:.*\.)?layers\.\d+\.mlp", r"(.*\.)?transformer_blocks\.\d+\.attn2", r"(\w+\.)*mlp", r".*(q_proj|v_proj)$",
    r"model\.layers\.(0|1|2|3)\.mlp\.(down|up)_proj", r"(?!.*vision).*\.mlp", r"(?:a|b)*c", r".*encoder.*layer.*o",
    r"(vision\.)?layers\.\d+\.(?(1)fc2|down_proj)", r"(?!)|mlp",
]  # fmt: skip


if sys.version_info >= (3, 11):
    HANG += [r"(?>(?:\w+\.?)+!)|x", r"(?:(?:\w+\.?)+!)++|x", r"(?>(a|ab)*)c"]
    WORK += [r"(?>layers)\.\d++\.mlp", r"(?>.*\.)?mlp"]


@pytest.mark.parametrize("pattern", HANG)
@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "sites", "rank_pattern", "layers_pattern"])
def test_patterns_that_can_hang_are_refused_by_field(where: str, pattern: str) -> None:
    given = {"sites": {"ffn": pattern}, "rank_pattern": {pattern: 4}, "layers_pattern": [pattern]}.get(where, pattern)
    with pytest.raises(ValueError, match=rf"^{where}=.*can take very long"):
        BottleneckConfig(**{where: given})


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "sites", "rank_pattern", "modules_to_save"])
def test_patterns_that_do_not_compile_are_refused_by_field(where: str) -> None:
    given = {"sites": {"ffn": "("}, "rank_pattern": {"(": 4}, "modules_to_save": ["("]}.get(where, "(")
    with pytest.raises(ValueError, match=rf"^{where}=.*is no regular expression"):
        BottleneckConfig(**{where: given})


@pytest.mark.parametrize("pattern", WORK)
def test_patterns_as_people_write_them_are_taken(pattern: str) -> None:
    check_pattern("target_modules", pattern)


def test_long_patterns_are_refused_before_they_are_compiled() -> None:
    with pytest.raises(ValueError, match=r"target_modules='aaaa.*has 1000000 characters"):
        BottleneckConfig(target_modules="a" * 10**6)
    with pytest.raises(ValueError, match="target_modules"):
        BottleneckConfig(target_modules="(" * 3000 + ")" * 3000)
    with pytest.raises(ValueError, match="target_modules"):
        BottleneckConfig(target_modules="a{1,60000}" * 100)


ANY = SimpleNamespace(named=str)  # a tuner that is asked for nothing but whom its verb means
SWITCHES: list[tuple[Any, str, tuple[Any, ...]]] = [
    (prune_experts, "preserve_mass", (None, None, 1)),
    (prune_experts, "dry_run", (None, None, 1)),
    (prune_curve, "higher_is_better", (None, None, len)),
    (merge_experts, "align", (None, None, 1)),
    (merge_experts, "dry_run", (None, None, 1)),
    (compress_experts, "dry_run", (None, ())),
    (MoAModel.remove_expert, "renormalize", (ANY, "a")),
    (MoAModel.keep_experts, "renormalize", (ANY, {})),
    (MoAModel.export_expert, "pad_ranks", (ANY, "a", "folder")),
    (MixDAModel.remove_domain, "renormalize", (ANY, "a")),
    (MixDAModel.keep_experts, "renormalize", (ANY, {})),
    (MixDAModel.export_domain, "pad_ranks", (ANY, "a", "folder")),
    (StageCallback, "check_head", ("task",)),
    (GateUsageCallback, "per_layer", (None,)),
]


@pytest.mark.parametrize(("function", "name", "others"), SWITCHES, ids=[f"{f.__name__}-{n}" for f, n, _ in SWITCHES])
def test_what_is_neither_true_nor_false_is_no_switch(function: Any, name: str, others: tuple[Any, ...]) -> None:
    """Words such as "no" would turn it on. Nothing else has been looked at by then."""
    for value in ("no", 0, None):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be True or False"):
            function(*others, **{name: value})
