"""What PEFT's own tests are run with: the types of this library, in the forms that users give them.

The names that `plugin.py` reads:

    TYPES           name of a type -> its config class
    MANDATORY       (config class, arguments it cannot be built without), for the tests of configs
    BY_TARGET       config classes for the tests that call `config_cls(target_modules=[...])`
    CUSTOM_MODELS   (name, model of test_custom_models.py, config class, arguments)
    LEARNING_RATES  (name of a type, model) -> rate for the tests that train them without aim, where 0.5 is too much
    PAIRS           (name, "", config class, arguments, arguments) of two adapters on one MLP
    MIXED           (name, function that makes a config) for the tests of batches that mix adapters
    MIXED_TARGETS   target modules that MIXED can take; PEFT's other rows are excluded, with MIXED_TARGETS_REASON
    BY_FILE         test file -> (config class, arguments)
    ALL_TYPES       tests that loop over every registered type in their body
    EXCLUDE         tests that do not apply, each with the reason
    AT_LEAST        name of a type -> how many tests have to pass in a full run
    FILES_NOT_RUN   test file of PEFT -> why its tests are left out
    why_not_mergeable
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mixadapters import AGDConfig, BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig, PILLConfig

Arguments = dict[str, Any]


@dataclass
class TwoDomains(MixDAConfig):
    """MixDA with two new domains, for the tests that know no argument but `target_modules`."""

    domains: Any = field(default_factory=lambda: ["a", "b"])


TYPES: dict[str, type] = {
    "BOTTLENECK": BottleneckConfig,
    "MIXDA": MixDAConfig,
    "MOA": MoAConfig,
    "MOSA": MoSAConfig,
    "PILL": PILLConfig,
    "AGD": AGDConfig,
}
MANDATORY: list[tuple[type, Arguments]] = [
    (BottleneckConfig, {}),
    (MixDAConfig, {"domains": ["a", "b"]}),
    (MoAConfig, {}),
    (MoSAConfig, {}),
    (PILLConfig, {}),
    (AGDConfig, {}),
]
BY_TARGET: list[type] = [BottleneckConfig, TwoDomains, MoAConfig, MoSAConfig]


def bottleneck(**arguments: Any) -> tuple[type, Arguments]:
    return BottleneckConfig, {"r": 4, **arguments}


def mixda(**arguments: Any) -> tuple[type, Arguments]:
    # At the default width, 1 or 2 here, the task adapter's ReLU is often dead.
    return MixDAConfig, {"domains": ["a", "b"], "r": 4, "task_r": 8, **arguments}


def moa(**arguments: Any) -> tuple[type, Arguments]:
    # All experts are chosen, so that each gets a gradient in the few steps of these tests.
    # Without the balance loss, which reentrant checkpointing would lose and which is refused there.
    sparse = {"num_experts_per_tok": None, "router": "top_k", "router_aux_loss_coef": 0.0}
    return MoAConfig, {"r": 4, "num_experts": 3, **sparse, **arguments}


def mosa(**arguments: Any) -> tuple[type, Arguments]:
    return MoSAConfig, {"r": 4, **arguments}


def pill(**arguments: Any) -> tuple[type, Arguments]:
    # Two of the tokens in the tests stand for images: the tests call the model without modalities.
    return PILLConfig, {"r": 4, "token_ids": {"image": [2, 5]}, "last_layer_experts": True, **arguments}


def agd(**arguments: Any) -> tuple[type, Arguments]:
    # These tests name no guidance scale, without which the model is its base.
    return AGDConfig, {"r": 8, "default_scale": 6.0, **arguments}


# --- models of test_custom_models.py: MLP has lin0 (10, 20) and lin1 (20, 2), both with bias ---

BOTH = ["lin0", "lin1"]
LINEAR = {"activation": "identity"}
MLP_FORMS: dict[str, tuple[type, Arguments]] = {
    "bottleneck, regular expression": bottleneck(target_modules="lin0"),
    "bottleneck": bottleneck(target_modules=["lin0"]),
    "bottleneck on both": bottleneck(target_modules=BOTH, activation="silu"),
    "bottleneck and a trained head": bottleneck(target_modules=["lin0"], modules_to_save=["lin1"]),
    "bottleneck, parallel": bottleneck(target_modules=BOTH, placement="parallel"),
    "bottleneck, GLU": bottleneck(target_modules=["lin0"], glu=True, activation="silu"),
    "bottleneck, layer norm": bottleneck(target_modules=["lin0"], layer_norm=True),
    "bottleneck, learnable scale": bottleneck(target_modules=["lin0"], scale="learnable"),
    "bottleneck, fixed scale and dropout": bottleneck(target_modules=["lin0"], scale=0.5, dropout=0.1),
    "bottleneck, ranks by module": bottleneck(target_modules=BOTH, rank_pattern={"lin0": 2}),
    "bottleneck, linear": bottleneck(target_modules=BOTH, **LINEAR),
    "bottleneck, linear and parallel": bottleneck(target_modules=["lin0"], placement="parallel", **LINEAR),
    "bottleneck, linear, learnable scale": bottleneck(target_modules=["lin1"], scale="learnable", **LINEAR),
    "mixda": mixda(target_modules=["lin0"]),
    "mixda on both": mixda(target_modules=BOTH),
    "mixda and a trained head": mixda(target_modules=["lin0"], modules_to_save=["lin1"]),
    "mixda, sigmoid gate": mixda(target_modules=["lin0"], gate="sigmoid"),
    "mixda, gate with a hidden layer": mixda(target_modules=["lin0"], gate_hidden=[8]),
    "mixda, no task adapter": mixda(target_modules=["lin0"], task_adapter=None),
    "mixda, convex": mixda(target_modules=["lin0"], combine="convex"),
    "mixda, one domain": mixda(domains=["a"], target_modules=["lin1"]),
    "moa": moa(target_modules=["lin0"]),
    "moa on both": moa(target_modules=BOTH),
    "moa and a trained head": moa(target_modules=["lin0"], modules_to_save=["lin1"]),
    "moa, softmax, names": moa(target_modules=BOTH, router="softmax", experts=["a", "b"], num_experts=8),
    "moa, sigmoid scores, shared": moa(target_modules=["lin0"], scoring_func="sigmoid", n_shared_experts=1),
    "moa, bottleneck": moa(target_modules=["lin0"], expert_type="bottleneck"),
    "moa, glu": moa(target_modules=["lin0"], expert_type="glu", activation="silu"),
    "moa, constant": (MoAConfig, {"r": 4, "num_experts": 3, "target_modules": BOTH, "router": "constant"}),
    "moa, top_p of all": moa(target_modules=["lin0"], router={"kind": "top_p", "p": 1.0}),
    "moa, null arms": moa(target_modules=["lin0"], router="null", num_null_experts=2),
    "moa, cosine": moa(target_modules=["lin0"], router="cosine"),
    "moa, sigmoid": moa(target_modules=BOTH, router="sigmoid"),
    "moa, recurrent": moa(target_modules=BOTH, router={"kind": "recurrent", "base": "softmax", "width": 8}),
    "moa, router with a hidden layer": moa(target_modules=["lin0"], router="softmax", router_hidden=[8]),
    "moa, segments": moa(target_modules=["lin0"], segments=2, router="softmax"),
    "moa, residual": moa(target_modules=["lin0"], n_shared_experts=1, residual=True),
    "moa, rsLoRA, ranks and alphas by module": moa(
        target_modules=BOTH, use_rslora=True, rank_pattern={"lin0": 2}, alpha_pattern={"lin1": 4}
    ),
    "moa, dropout and a fixed factor": moa(target_modules=["lin0"], lora_dropout=0.1, routed_scaling_factor=2.0),
    "moa, normalised weights": moa(target_modules=["lin0"], norm_topk_prob=True),
    "moa, pfeiffer": moa(target_modules=BOTH, expert_type="bottleneck", placement="pfeiffer", activation="silu"),
    "agd": agd(target_modules=["lin0"]),
    "agd on both": agd(target_modules=BOTH),
    "agd and a trained head": agd(target_modules=["lin0"], modules_to_save=["lin1"]),
    "agd, offset": agd(target_modules=["lin1"], kind="offset"),
    "mosa": mosa(target_modules=["lin0"], scale=1.0),
    # With both halves split, three steps may pass before the gradient of `down` meets a part of `up` that has moved.
    "mosa, pfeiffer, one pass": mosa(
        target_modules=BOTH, style="pfeiffer", activation="silu", split="down", consistency=0.0
    ),
    "mosa and a trained head": mosa(target_modules=["lin0"], modules_to_save=["lin1"], scale=4.0),
    "mosa, LoRA": mosa(target_modules=BOTH, base="lora", split="both", granularity="rank"),
}
CUSTOM_MODELS = [
    *((name, "MLP", config, arguments) for name, (config, arguments) in MLP_FORMS.items()),
    # The scale makes it learn enough in the three steps of test_only_params_are_updated.
    ("bottleneck on Conv1D", "EmbConv1D", *bottleneck(target_modules=["conv1d"], scale=4.0)),
    ("bottleneck on Conv1D, linear", "EmbConv1D", *bottleneck(target_modules=["conv1d"], **LINEAR)),
    ("mixda on Conv1D", "EmbConv1D", *mixda(target_modules=["conv1d"])),
    ("moa on Conv1D", "EmbConv1D", *moa(target_modules=["conv1d"], lora_alpha=16)),
    ("mosa, LoRA on Conv1D", "EmbConv1D", *mosa(target_modules=["conv1d"], base="lora", scale=4.0)),
]
# Inputs are up to 89 there: at 0.5 the second step saturates every gate, or ends in NaN.
LEARNING_RATES = {("MIXDA", "MLP"): 0.05, ("MOA", "MLP"): 0.05, ("AGD", "MLP"): 0.05, ("MOSA", "MLP"): 0.05}
PAIR_FORMS: dict[str, tuple[type, Arguments]] = {
    "bottleneck": bottleneck(init_weights=False),
    "bottleneck, parallel": bottleneck(init_weights=False, placement="parallel"),
    "bottleneck, linear": bottleneck(init_weights=False, **LINEAR),
    "bottleneck, linear and parallel": bottleneck(init_weights=False, placement="parallel", **LINEAR),
    "mixda": mixda(init_weights=False),
    "moa": moa(init_weights=False),
    "mosa, LoRA": mosa(init_weights=False, base="lora", split="both"),
}
PAIRS = [
    (
        f"{name}, lin0 and {other}",
        "",
        config,
        *(arguments | {"target_modules": [target]} for target in ("lin0", other)),
    )
    for name, (config, arguments) in PAIR_FORMS.items()
    for other in BOTH
]
MIXED: list[tuple[str, Callable[..., Any]]] = [
    ("bottleneck", lambda i, **kwargs: BottleneckConfig(r=4 + 4 * i, init_weights=False, **kwargs)),
    (
        "bottleneck, two kinds",
        lambda i, **kwargs: BottleneckConfig(r=4, glu=bool(i), activation="silu", init_weights=False, **kwargs),
    ),
    (
        "bottleneck, linear and parallel",
        lambda i, **kwargs: BottleneckConfig(
            r=4, placement="parallel", activation="identity", init_weights=False, **kwargs
        ),
    ),
    (
        "mixda",
        lambda i, **kwargs: MixDAConfig(domains=["a", "b", "c"][: 2 + i], r=4, task_r=8, init_weights=False, **kwargs),
    ),
    ("moa", lambda i, **kwargs: MoAConfig(num_experts=2 + i, r=4, router="softmax", init_weights=False, **kwargs)),
    ("mosa", lambda i, **kwargs: MoSAConfig(r=4 + 4 * i, scale=1.0, init_weights=False, **kwargs)),
]
MIXED_TARGETS = {"lin0", "lin1"}
MIXED_TARGETS_REASON = "on an embedding, a convolution, nn.MultiheadAttention, or a model for GPUs"

# --- transformers models ---

# Regular expressions, since a name in a list has to occur in the model, and the models of a file differ.
# The linear layer that an FFN ends in:
DECODER_OUTPUT = r".*\.(fc2|mlp\.c_proj|fc_out|down_proj)"
SEQ2SEQ_OUTPUT = r".*\.(wo|fc2)"
CLASSIFIER_OUTPUT = r".*\.(output\.dense|down_proj)"
ANY_OUTPUT = r".*\.(fc2|mlp\.c_proj|fc_out|down_proj|wo)"
# The whole FFN, or where a model has no module for it, its last layer:
DECODER_BLOCK = r".*\.(mlp|fc2)"
ANY_BLOCK = r".*\.(mlp|fc2|wo)"


def with_task(task: str, *rows: tuple[type, Arguments]) -> list[tuple[type, Arguments]]:
    return [(config, {"task_type": task, **arguments}) for config, arguments in rows]


BY_FILE: dict[str, list[tuple[type, Arguments]]] = {
    "test_decoder_models.py": with_task(
        "CAUSAL_LM",
        bottleneck(),
        bottleneck(placement="houlsby", layer_norm=True),
        bottleneck(placement="parallel", adapter_input="ffn_intermediate"),
        bottleneck(target_modules=DECODER_BLOCK, placement="parallel", glu=True, activation="silu"),
        bottleneck(target_modules=DECODER_OUTPUT, use_bias=False, **LINEAR),
        mixda(domain_layers=[0, 1]),
        mixda(target_modules=DECODER_OUTPUT),
        moa(),
        moa(router_scope="block", n_shared_experts=1),
        moa(target_modules=DECODER_BLOCK, expert_type="bottleneck", router_scope="model"),
        mosa(),
        mosa(base="lora", split="both"),
        pill(gate_init="one"),
    ),
    "test_encoder_decoder_models.py": with_task(
        "SEQ_2_SEQ_LM",
        bottleneck(),
        bottleneck(target_modules=SEQ2SEQ_OUTPUT, use_bias=False, **LINEAR),
        mixda(domain_layers=[0, 1]),
        mixda(target_modules=SEQ2SEQ_OUTPUT),
        moa(),
        moa(router_scope="block"),
        moa(target_modules=SEQ2SEQ_OUTPUT, router="softmax", segments=2),
        mosa(style="houlsby"),
    ),
    "test_feature_extraction_models.py": with_task(
        "FEATURE_EXTRACTION",
        bottleneck(),
        bottleneck(target_modules=["output.dense"], **LINEAR),
        mixda(domain_layers=[0, 1], gate_granularity="sequence"),
        mixda(target_modules=["output.dense"]),
        moa(),
        moa(router_scope="block", granularity="sequence"),
        moa(target_modules=["output.dense"], expert_type="glu", activation="silu", router_scope="model"),
        mosa(consistency=0.0),  # these outputs have no logits
    ),
    "test_seq_classifier.py": with_task(
        "SEQ_CLS",
        bottleneck(),
        bottleneck(target_modules=CLASSIFIER_OUTPUT, **LINEAR),
        mixda(domain_layers=[0, 1]),
        moa(),
        moa(target_modules=CLASSIFIER_OUTPUT, router="sigmoid", n_shared_experts=1),
        mosa(),
    ),
    "test_token_classification_qa.py": [
        bottleneck(),
        mixda(domain_layers=[0, 1]),
        moa(),
        moa(router_scope="block", router="null", num_null_experts=1),
        mosa(),
    ],
    "test_extra_mixed.py": [
        bottleneck(init_weights=False),
        bottleneck(init_weights=False, target_modules=ANY_BLOCK, placement="parallel"),
        mixda(init_weights=False, domain_layers=[0, 1]),
        mixda(init_weights=False, domain_layers=[0, 1], gate_granularity="causal_prefix"),
        mixda(init_weights=False, target_modules=ANY_OUTPUT),
        moa(init_weights=False),
        moa(init_weights=False, router_scope="block", num_experts_per_tok=2),
        moa(init_weights=False, target_modules=ANY_OUTPUT, router="sigmoid", expert_type="bottleneck"),
    ],
}


def why_not_mergeable(model_id: str, config: type, arguments: Arguments) -> str | None:
    """The reason why no single weight equals the layer with its adapter; None where one does."""
    if issubclass(config, MixDAConfig):
        return "a gate weighs the domains by the input"
    if issubclass(config, MoAConfig):
        return None if arguments["router"] == "constant" else "a router weighs the experts by the input"
    if issubclass(config, PILLConfig):
        return "its experts are not linear, and its router depends on the input"
    if issubclass(config, MoSAConfig):
        return None if arguments.get("base") == "lora" else "the adapter is not linear"
    if arguments.get("glu") or arguments.get("layer_norm") or arguments.get("activation") != "identity":
        return "the bottleneck is not linear"
    return None


# --- what does not apply ---


@dataclass(frozen=True)
class Exclusion:
    """Tests left out: a regular expression for their ids, why, and for which of their parameters."""

    test: str
    reason: str
    when: Callable[[Arguments], bool] = lambda params: True


EXCLUDE = [
    Exclusion(
        r"tiny-dummy-qwen2|Roberta|DebertaV2",
        "their layers are those of Llama, BERT and DeBERTa, with which the same tests run",
    ),
    Exclusion(
        r"test_passing_input_embeds_works\[PILLConfig", "embeddings do not say which tokens are images: it raises"
    ),
    Exclusion(
        r"GPTJ.*PILLConfig|PILLConfig.*GPTJ",
        "its attention and FFN run in parallel on one norm, which PILL refuses",
    ),
    Exclusion(
        r"gradient_checkpointing\[True",
        "one router for all layers and reentrant checkpointing do not go together: it raises",
        lambda params: params["config_kwargs"].get("router_scope") == "model",
    ),
    Exclusion(
        r"prompt_(tuning|learning)|FeatureExtractionModel::test_passing_input_embeds_works", "tests prompt learning"
    ),
    Exclusion(r"weighted_(combination|adapter)", "add_weighted_adapter is for LoRA and IA3"),
    Exclusion(r"with_bias_(raises|warns)|learnable_bias", "these configs have no field `bias`"),
    Exclusion(
        r"(Decoder|EncoderDecoder)Models::test_(mixed_adapter_batches|generate_with_mixed)",
        "PEFT runs it for LoRA only: extra_mixed.py runs it for these types",
    ),
    Exclusion(
        r"test_default_target_modules_(list_of_str|str)\[",
        "edits LoRA's and DeLoRA's tables of default target modules",
    ),
    Exclusion(
        r"layer_indexing",
        "layers_to_transform does not go with targets given as a regular expression, in PEFT neither",
        lambda params: isinstance(params["config_kwargs"].get("target_modules"), str),
    ),
    Exclusion(
        r"test_disable_adapters\[",
        "wants the base model at the start, which a convex mixture is not",
        lambda params: params["config_kwargs"].get("combine") == "convex",
    ),
    Exclusion(
        r"test_only_params_are_updated\[moa, (recurrent|residual)",
        "its three steps saturate these weights before the parts behind them have moved",
    ),
    Exclusion(
        r"test_from_pretrained_forward_compatible",
        "PEFT drops unknown keys of a saved config with a warning, these types refuse them",
    ),
    Exclusion(
        r"test_mixed_adapter_batches_training_mode_raises",
        "LoRA refuses mixed batches in training, these types train on them",
    ),
    Exclusion(
        r"test_mixed_adapter_batches_merged_raises",
        "merges, and this adapter cannot be merged",
        lambda params: getattr(params["config0"], "activation", None) != "identity",
    ),
]
ALL_TYPES = [r"test_from_peft_type$"]
AT_LEAST = {"BOTTLENECK": 1630, "MIXDA": 880, "MOA": 1600, "MOSA": 660, "PILL": 120}
FILES_NOT_RUN = {
    "test_torch_compile.py": "trains on a data set from the hub",
    "test_vision_models.py": "downloads an image when it is imported",
    "test_common_gpu.py, test_gpu_examples.py, test_quantization.py": "need a GPU",
    "test_mixed.py": "PeftMixedModel takes a closed list of PEFT's types",
    "the other files": "test one type of PEFT each, or build LoRA configs in the bodies of the tests",
}
