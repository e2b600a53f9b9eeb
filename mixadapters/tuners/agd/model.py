from __future__ import annotations

import warnings
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mixadapters.core.adapter import Site
from mixadapters.core.files import being_loaded
from mixadapters.core.hooks import names_of_arguments
from mixadapters.core.layer import AdapterHost, HookedLayer
from mixadapters.core.model import MixtureModel
from mixadapters.core.walking import outside_adapters
from mixadapters.tuners.agd.calls import CALLS, refuse_distilled, timestep_factor
from mixadapters.tuners.agd.config import VARIED, AGDConfig
from mixadapters.tuners.agd.guidance import refuse_another_model
from mixadapters.tuners.agd.layer import ADAPTERS, GuidanceAdapter


class AGDModel(MixtureModel):
    """The tuner of AGD: an adapter at each attention block, of which the first holds the trunk for all."""

    fields = ("guidance_scale", "guidance_interval", "unconditional")
    attachment = HookedLayer

    def roles(self, config: AGDConfig) -> tuple[str, ...]:
        return ("attention",)

    def resolve(self, config: AGDConfig, model_config: dict[str, Any]) -> None:
        base = type(self.model).__name__
        if config.base_class not in (None, base):
            raise ValueError(
                f"base_class={config.base_class!r}: the adapter was made for this class of model, not for a {base!r}"
            )
        if being_loaded() is None:
            refuse_distilled(self.model)
            refuse_another_model(self.model, config.teacher or {})
            if config.timestep_scale == 1 and "timestep" not in (config.conditions or {}):
                config.timestep_scale = 1 / timestep_factor(self.model)
        if config.sites is None and config.target_modules is None and base in CALLS:
            config.sites = {"attention": CALLS[base].site}
        super().resolve(config, model_config)
        config.base_class = base
        if config.after_prompt is None:
            tokens = "input_ids" in names_of_arguments(self.model)
            made_here = being_loaded() is None  # files of an earlier version have no embedding for it
            config.after_prompt = tokens and config.kind == "film" and made_here
        self._read_conditions(config)

    def before_injection(self, config: AGDConfig, adapter_name: str) -> None:
        self.__dict__["first"] = None  # no child: it is that of its site
        super().before_injection(config, adapter_name)
        self.__dict__["first"] = None

    def _read_conditions(self, config: AGDConfig) -> None:
        """Fill in which arguments of the model's forward the adapters read, and how wide they are."""
        arguments = names_of_arguments(self.model)
        widths = _widths_of_conditions(getattr(getattr(self.model, "config", None), "get", lambda name: None))
        if config.conditions is None:
            config.conditions = {"timestep": "timestep"} if "timestep" in arguments else {}
            for name, (argument, _) in widths.items():
                if argument.partition(".")[0] in arguments:
                    config.conditions[name] = argument
            masks = [name for name in ("encoder_attention_mask", "text_embedding_mask") if name in arguments]
            if "prompt" in config.conditions and masks:
                config.conditions["prompt_mask"] = masks[0]
        for name, argument in config.conditions.items():
            if argument.partition(".")[0] not in arguments:
                raise ValueError(
                    f"conditions={config.conditions}: {type(self.model).__name__} takes no {argument!r}; it takes "
                    f"{list(arguments)}"
                )
            size = {"class": "num_classes", "prompt": "prompt_width", "pooled": "pooled_width"}.get(name)
            if size is not None and getattr(config, size) is None:
                if name not in widths:
                    raise ValueError(f"the model's config does not tell {size}; pass it, to read {name!r}")
                setattr(config, size, widths[name][1])

        if config.negative == "distil" and not VARIED & config.conditions.keys():
            raise ValueError(
                f"negative='distil' needs conditions that a second pass has otherwise, of {sorted(VARIED)}; have "
                f"conditions={config.conditions}"
            )
        if config.negative == "fixed" and (config.teacher or {}).get("unconditional_varies") and not being_loaded():
            warnings.warn(
                "the record has a negative prompt for each trajectory, and negative='fixed' learns the mean over "
                "them; AGDConfig(negative='distil') reads them",
                stacklevel=2,
            )

    def _widths(self, config: Any, base: nn.Module, path: str) -> tuple[int, int]:
        """Widths of a block: those of its first and last linear layer, in the order in which they were made."""
        own = [m for name, m in outside_adapters(base) if not name.startswith(HookedLayer.attribute)]
        linears = [m for m in own if hasattr(m, "in_features") and hasattr(m, "out_features")]
        if config.hidden_size is None and linears and linears[0] is not base:
            return linears[0].in_features, linears[-1].out_features
        return super()._widths(config, base, path)

    def build(self, config: AGDConfig, site: Site) -> GuidanceAdapter:
        rank = self.rank_at(config, site.path, config.r)
        adapter: GuidanceAdapter = ADAPTERS[config.kind](site, config, rank, self.__dict__["first"])
        if config.init_weights:
            nn.init.zeros_(adapter.up.weight)
            nn.init.zeros_(adapter.up.bias)
        self.__dict__["first"] = self.__dict__["first"] or adapter
        return adapter

    def train(self, mode: bool = True) -> AGDModel:
        """As usual, but the frozen model's dropout rests: its teacher and its student are to see the same.

        (DiT drops labels, in every block on its own.) Modules that may be checkpointed keep the flag, which some ask.
        """
        super().train(mode)
        if mode:
            self._rest(self.model)
        return self

    def _rest(self, module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(child, (AdapterHost, AuxiliaryTrainingWrapper)):
                child.training = hasattr(child, "gradient_checkpointing")
                self._rest(child)


def _widths_of_conditions(setting: Any) -> dict[str, tuple[str, int]]:
    """condition -> (argument of the forward, its size), from the config of a model of diffusers."""
    found = {}
    if setting("num_embeds_ada_norm"):
        found["class"] = ("class_labels", setting("num_embeds_ada_norm") + 1)
    elif setting("num_class_embeds"):
        found["class"] = ("class_labels", setting("num_class_embeds"))
    for name in ("encoder_hid_dim", "joint_attention_dim", "caption_channels", "cross_attention_dim", "text_dim"):
        if isinstance(setting(name), int):
            found["prompt"] = ("encoder_hidden_states", setting(name))
            break
    if setting("pooled_projection_dim"):
        found["pooled"] = ("pooled_projections", setting("pooled_projection_dim"))
    elif setting("addition_embed_type") == "text_time":
        # SDXL: the pooled text next to six embedded sizes
        width = setting("projection_class_embeddings_input_dim") - 6 * setting("addition_time_embed_dim")
        found["pooled"] = ("added_cond_kwargs.text_embeds", width)
    return found
