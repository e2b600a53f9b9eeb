from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.files import PREFIX, being_loaded
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.saving import own_hosts
from mixadapters.core.sites import find_architecture
from mixadapters.core.walking import outside_adapters, plain_path
from mixadapters.routers import SingleRouter
from mixadapters.tuners.bottleneck.config import placement_roles, placement_taps
from mixadapters.tuners.bottleneck.model import EXPERT, bottleneck
from mixadapters.tuners.mosa.config import MoSAConfig
from mixadapters.tuners.mosa.objective import ConsistencyObjective
from mixadapters.tuners.mosa.split import HALVES, PassRouter, SplitBank, SplitMixture
from mixadapters.tuners.sources import check_new_folder, write_adapter


class MoSAModel(MixtureModel):
    """The plain adapter of a config, split; and the way back, `merge_experts`."""

    def roles(self, config: MoSAConfig) -> tuple[str, ...]:
        known = self.known_roles(config)
        if config.base == "lora":
            return ("query", "value") if "value" in known else ("qkv",)
        return placement_roles(*config.placed(), known)

    def taps(self, config: MoSAConfig) -> tuple[str, ...]:
        if config.base == "lora":
            return ()
        return placement_taps(*config.placed(), self.known_roles(config))

    def resolve(self, config: MoSAConfig, model_config: dict[str, Any]) -> None:
        if config.style == "adaptformer" and config.adapter_input is None:
            # Stages of Swin and ConvNeXt, and post-norm models, have no norm that the stream alone runs into.
            by_table = config.sites is not None or config.target_modules is None
            whole = by_table and {"ffn", "ffn_norm"} <= self.known_roles(config) and self._has("ffn_norm", config)
            config.adapter_input = "residual" if whole else "ffn_input"
        super().resolve(config, model_config)
        depth = model_config.get("num_hidden_layers")
        used = config.deep_weight or config.deep_layers != MoSAConfig.deep_layers
        if used and isinstance(depth, int) and config.deep_layers > depth and being_loaded() is None:
            raise ValueError(
                f"deep_layers={config.deep_layers}: the model has {depth} layers, whose hidden states deep_weight "
                f"compares; set deep_layers from 1 to {depth}"
            )

    def _has(self, role: str, config: MoSAConfig) -> bool:
        """Whether the model has modules of a role: a table names more than each size of an architecture has."""
        patterns = config.sites or vars(
            find_architecture(self.get_model_config(self.model).get("model_type", "custom"))
        )
        return any(re.fullmatch(patterns[role], name) for name in self.places())

    def after_injection(self, config: MoSAConfig, adapter_name: str) -> None:
        objectives = self.context.objectives
        mine = next((o for o in objectives if isinstance(o, ConsistencyObjective)), None)
        if mine is None:
            mine = ConsistencyObjective(self.model)
            objectives.insert(0, mine)  # the others see the rows of the first pass
        host = next(iter(self.placed(adapter_name)), None)
        if host is not None:
            mine.adapters[adapter_name] = host, config

    def build(self, config: MoSAConfig, site: Site) -> Mixture:
        rank = self.rank_at(config, site.path, config.r or 0)
        if config.base == "lora":
            bank = AdapterBank(
                site.in_features, site.out_features, activation="identity", bias=False, scale=float(config.scale or 0)
            )
            bank.add(EXPERT, rank, config.init_weights)
            plain = Mixture(SingleRouter(site.in_features, [EXPERT]), bank, dropout=config.dropout, observes=True)
        else:
            tap = site.tap("ffn_norm") or site.tap("ffn_input")
            plain = bottleneck(config.plain(), site, rank, tap=tap)
        return plain if config.num_experts == 1 else self._split(config, site, plain)

    def _split(self, config: MoSAConfig, site: Site, plain: Mixture) -> SplitMixture:
        name = plain_path(site.path)
        bank = SplitBank(
            plain.bank, name, num_experts=config.num_experts, granularity=config.granularity,
            seed=config.partition_seed, halves=HALVES if config.split == "both" else (config.split,),
            per_expert=config.biases == "per_expert",
            merge=config.merge, separate=config.sampler == "group", lazy=config.inactive_update == "lazy",
            sync_ranks=config.sync_ranks, init_weights=config.init_weights,
        )  # fmt: skip
        router = PassRouter(bank.in_features, [EXPERT], bank, site.stack)
        return SplitMixture(
            router, bank, plain.insertion, tap=plain.tap, dropout=plain.dropout.p, observes=plain.observes
        )

    # --- the way back -----------------------------------------------------------------------------------------

    @of_active
    def merge_experts(self, adapter_name: str = UNNAMED) -> tuple[PeftConfig, dict[str, Tensor]]:
        """The plain adapter that equals this one in evaluation: its config, and its weights as PEFT saves them.

        A BottleneckConfig for base="adapter"; stock LoRA, which needs no mixadapters to be loaded, for base="lora".
        Nothing is changed, so it may be called at any time and any number of times.

        Raises:
            ValueError: unknown adapter name.
        """
        config = self.config_of(adapter_name)
        placed, weights = self.placed(adapter_name), self._modules_to_save(adapter_name)
        for host, adapter in placed.items():
            bank = adapter.bank
            ((_, expert),) = bank.experts.items()
            (plain,) = bank.weights(None)
            where = f"{PREFIX}{host.path}."
            if config.base == "lora":
                ones = (1,) * (host.get_base_layer().weight.dim() - 2)  # of a convolution
                weights[f"{where}lora_A.weight"] = plain.down.reshape(*plain.down.shape, *ones)
                weights[f"{where}lora_B.weight"] = plain.up.reshape(*plain.up.shape, *ones)
            else:
                where += f"bottleneck_adapters.bank.experts.{EXPERT}."
                kept = {n: p for n, p in expert.named_parameters() if n.partition(".")[0] not in HALVES}
                computed = {"down.weight": plain.down, "up.weight": plain.up, "down.bias": plain.b_down,
                            "up.bias": plain.b_up}  # fmt: skip
                weights |= {f"{where}{n}": t for n, t in {**kept, **computed}.items() if t is not None}
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        if config.base == "adapter":
            return config.plain(), weights
        ranks = {host.path: adapter.bank.weights(None)[0].down.shape[0] for host, adapter in placed.items()}
        return config.plain_lora(
            sorted(ranks), {path: rank for path, rank in ranks.items() if rank != config.r},
            fan_in_fan_out=any(isinstance(host.get_base_layer(), Conv1D) for host in placed),
        ), weights  # fmt: skip

    @of_active
    def save_merged(self, folder: str | Path, adapter_name: str = UNNAMED) -> None:
        """Write the plain adapter of `merge_experts` as PEFT saves one, for `PeftModel.from_pretrained`.

        Raises:
            ValueError: `folder` is none, or holds something already.
        """
        check_new_folder("save_merged", folder)
        config, weights = self.merge_experts(adapter_name)
        inference_mode, config.inference_mode = config.inference_mode, True
        write_adapter(folder, config, weights)
        config.inference_mode = inference_mode

    def _modules_to_save(self, adapter_name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path, module in outside_adapters(self.model):
            if isinstance(module, AuxiliaryTrainingWrapper):
                state = module.adapter_state_dict(adapter_name, module.state_dict())
                found |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in state.items()}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As for every method; and the partition of the file must be that of the model."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = ((path, host.adapters[adapter_name]) for path, host in own_hosts(model, cls.prefix, adapter_name))
        banks = {
            f"{path}.{cls.prefix}adapters.{adapter_name}.{name}.partition": module
            for path, adapter in own
            for name, module in adapter.named_modules()
            if isinstance(module, SplitBank)
        }
        for key, saved in remapped.items():
            if key in banks and int(saved) != banks[key].checksum:
                raise ValueError(
                    f"adapter {adapter_name!r}: the entries at {key!r} were dealt to other experts when it was saved; "
                    "load it with its own config (num_experts, partition_seed, split, granularity, r)"
                )
        return remapped
