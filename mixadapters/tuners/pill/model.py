from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.absent import HEADS
from mixadapters.core.adapter import Adapter, Chain, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.files import being_loaded
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.sites import has_two_stacks, layer_index
from mixadapters.core.walking import outside_adapters
from mixadapters.routers import ModalityRouter, SingleRouter
from mixadapters.routers.modality import TOKEN_TYPES
from mixadapters.tuners.pill.config import PILLConfig
from mixadapters.tuners.pill.inputs import EncodedInputs, check_front_ends, refuse_lack_of_projector

# How one linear for query, key and value orders its outputs: all values last, or the values last in each head.
QKV_LAYOUTS = {"gpt2": "blocks", "phi3": "blocks", "gpt_neox": "heads", "bloom": "heads"}


class ValueGate(Adapter):
    """y * g(x) for the values of tokens that are no text; everything else in y is left bit for bit.

    Args:
        head_of: (M,) number of the KV head that a column of y belongs to, `heads` where it is no value.
        open: g = 1, whatever the weights.
    """

    def __init__(self, config: PILLConfig, in_features: int, heads: int, head_of: Tensor) -> None:
        super().__init__()
        self.modalities, self.shift = config.source(), float(config.gate_init == "one")
        self.open = config.stage == "align"
        self.register_buffer("head_of", head_of, persistent=False)
        gated = config.gate_modalities or config.modalities[1:]
        self.key_of = {config.modalities.index(m): "shared" if config.gate_shared else m for m in gated}
        keys = dict.fromkeys(self.key_of.values())
        self.gates = nn.ModuleDict({key: nn.Linear(in_features, heads, bias=False) for key in keys})
        for gate in self.gates.values():
            if config.init_weights:
                nn.init.zeros_(gate.weight)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """x: (B, T, d) what the projection reads; y: (B, T, M) what it gives."""
        if self.open:
            return y
        ids = self.modalities.ids(context).to(y.device).view(*x.shape[:-1], 1)
        factor = y.new_ones(1)
        for number, key in self.key_of.items():
            gate = self.gates[key]
            g = self.shift + gate(x.to(gate.weight.dtype)).tanh()
            factor = torch.where(ids == number, g.to(y.dtype), factor)
        return y * nn.functional.pad(factor, (0, 1), value=1.0).index_select(-1, self.head_of)


class PILLModel(MixtureModel):
    """The tuner of PILL: experts on the norms of each layer, and a gate on its attention values."""

    fields = ("modality_ids", "mm_token_type_ids")
    moving = ("stage",)

    def roles(self, config: PILLConfig) -> tuple[str, ...]:
        roles = ["attention_norm"] if config.attention_adapter != "none" else []
        if roles or config.ffn_experts != []:
            roles.append("ffn_norm")  # also without experts: where there is none, the other norm feeds the FFN too
        if config.gate:
            known = self.known_roles(config)
            roles.append("qkv" if "qkv" in known and "value" not in known else "value")
        return tuple(roles)

    def resolve(self, config: PILLConfig, model_config: dict[str, Any]) -> None:
        if has_two_stacks(self.model):
            raise ValueError(f"PILL is for decoders; {type(self.model).__name__} has an encoder of its own")
        found = {name: getattr(self.model.config, f"{name}_token_id", None) for name in TOKEN_TYPES[1:]}
        known = {name: [token] for name, token in found.items() if token is not None}
        # A model may have one token for images and videos, which then says nothing.
        if config.token_ids is None and known and len({tokens[0] for tokens in known.values()}) == len(known):
            config.token_ids = known
        if config.gate_init is None:
            config.gate_init = "one" if known or model_config.get("vision_config") else "zero"
        check_front_ends(self.model, config)
        heads = set(config.modules_to_save or ()) - HEADS
        refuse_lack_of_projector(self.model, self.places(), heads, config.token_ids or {})
        if being_loaded() is None:
            self._refuse_unknown_tokens(config, known)
        super().resolve(config, model_config)
        self._refuse_uneven(config)

    def _refuse_unknown_tokens(self, config: PILLConfig, known: dict[str, list[int]]) -> None:
        """Refuse token ids that no input can hold: behind the vocabulary are only those that the model replaces."""
        size = self.model.config.get_text_config().vocab_size
        replaced = {token for tokens in known.values() for token in tokens}
        replaced.update(
            module.token_id for _, module in outside_adapters(self.model) if isinstance(module, EncodedInputs)
        )
        for modality, tokens in (config.token_ids or {}).items():
            if wrong := [token for token in tokens if token >= size and token not in replaced]:
                raise ValueError(
                    f"token_ids={config.token_ids}: {wrong} for {modality!r} lie beyond the vocabulary of {size} "
                    "tokens, and nothing in the model puts something in their place; attach ImageInputs or "
                    "AudioInputs before, or name tokens of the vocabulary"
                )

    def _refuse_uneven(self, config: PILLConfig) -> None:
        """A layer that lacks one of the roles: it runs in parallel on one norm, or has no attention values."""
        assert config.sites is not None
        names = self.places()
        chosen = config.layers_to_transform
        wanted = [chosen] if isinstance(chosen, int) else chosen
        layers = {
            role: {i for n in names if re.fullmatch(config.sites[role], n) and (i := layer_index(n)) is not None}
            for role in self.roles(config)
        }
        every = set().union(*layers.values())
        for role, have in layers.items():
            if missing := sorted(i for i in every - have if wanted is None or i in wanted):
                raise ValueError(
                    f"layers {missing} have no module for the role {role!r}: PILL needs a norm of its own for "
                    "attention and for the FFN, and a projection of values; leave these layers out by "
                    "layers_to_transform, or what they lack by attention_adapter='none', ffn_experts=[] or gate=False"
                )

    def build(self, config: PILLConfig, site: Site) -> Adapter | None:
        if site.role in ("value", "qkv"):
            return ValueGate(config, site.in_features, *self._heads(config, site))
        attention = site.role == "attention_norm"
        shared = attention and config.attention_adapter == "shared"
        if attention:
            names = ["shared"] if shared else config.modalities
        else:
            names = config.modalities if config.ffn_experts is None else config.ffn_experts
            text = self.model.config.get_text_config()
            if layer_index(site.path) == text.num_hidden_layers - 1 and not config.last_layer_experts:
                names = [name for name in names if name == "text"]
        if not names:
            return None
        bank = AdapterBank(site.in_features, site.out_features, activation="silu", glu=True, bias=False)
        for name in names:
            bank.add(name, self.rank_at(config, site.path, config.r), config.init_weights)
            down = bank.experts[name].down.weight
            if config.init_weights and not down.is_meta:  # where a file is checked there are shapes alone
                # 0.02 at the released code's width of 4096, and as strong at any other.
                nn.init.normal_(down, std=1.28 * site.in_features**-0.5)
        router = SingleRouter(site.in_features, names) if shared else ModalityRouter(
            site.in_features, names, config.source()
        )  # fmt: skip
        return Chain(**{"attention" if attention else "ffn": Mixture(router, bank, "sequential")})

    def _heads(self, config: PILLConfig, site: Site) -> tuple[int, Tensor]:
        """How many factors the gate gives, and the one that belongs to each output of the projection."""
        text = self.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layout = "heads" if site.role == "value" else QKV_LAYOUTS.get(text.model_type)
        if layout is None:
            raise ValueError(
                f"PILL does not know where {text.model_type!r} models keep the values in {site.path!r}; known are "
                f"{sorted(QKV_LAYOUTS)}. Pass gate=False, or sites={{'value': <regular expression>}}"
            )
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        heads = site.out_features // width if site.role == "value" else heads
        own = torch.arange(heads).repeat_interleave(width)
        if layout == "blocks":
            head_of = torch.full((site.out_features,), heads)
            head_of[-own.numel() :] = own
        else:
            head_of = torch.full((heads, site.out_features // heads), heads)
            head_of[:, -width:] = own.view(heads, width)
        if config.gate_granularity == "layer":
            head_of, heads = (head_of == heads).long(), 1
        return heads, head_of.flatten()

    # --- stages and caches ------------------------------------------------------------------------------------

    def after_injection(self, config: PILLConfig, adapter_name: str) -> None:
        self.context.cache_owner = self.at_work
        if config.stage == "align" and not config.inference_mode:
            self.set_stage("align", adapter_name)

    @of_active
    def set_stage(self, stage: str, adapter_name: str = UNNAMED, domain: str | None = None) -> None:
        super().set_stage(stage, adapter_name, domain)
        self.peft_config[adapter_name].stage = stage
        for adapter in self.placed(adapter_name).values():
            if isinstance(adapter, ValueGate):
                adapter.open = stage == "align"

    def at_work(self) -> str:
        """Which adapters act in the next forward."""
        first = next(self.hosts(), None)
        if first is None or first.disable_adapters:
            return "the base model"
        return " and ".join(f"adapter {n!r} in stage {self.peft_config[n].stage!r}" for n in self.active_adapters)
