"""The weights of experts: from the adapters that they were, and as adapters of their own again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mixadapters.core.fields import check_switches
from mixadapters.core.files import being_loaded
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, check_known, of_active
from mixadapters.surgery.splitting import segment
from mixadapters.tuners.gathering import Gathered
from mixadapters.tuners.lora import factors_of, save_lora
from mixadapters.tuners.moa.config import MoAConfig
from mixadapters.tuners.moa.layer import ExpertMixture, FollowRouter
from mixadapters.tuners.sources import check_new_folder


class ExpertWeights(MixtureModel):
    """Part of MoA's tuner."""

    @torch.no_grad()
    def fill(self, adapter_name: str, name: str, found: Gathered) -> None:
        """Copy the weights of a gathered expert into its places, in segments where the mixture has them."""
        pieces = self._moa(adapter_name).pieces(name)
        for path, tensors in found.weights.items():
            bank = self.host_at(path).adapters[adapter_name].bank
            for i, piece in enumerate(pieces):
                for key, parameter in bank.experts[piece].named_parameters():
                    if parameter.is_meta:
                        raise ValueError("experts with a source need low_cpu_mem_usage=False")
                    parameter.copy_(segment(key, tensors[key], i, len(pieces)))

    @of_active
    @torch.no_grad()
    def fit_router(self, adapter_name: str = UNNAMED, missing_ok: bool = False) -> None:
        """Make routers that read the experts' weights, such as "arrow", from the weights as they are now.

        Raises:
            ValueError: the router is none of these, unless `missing_ok`.
        """
        fitted = False
        for _, mixture in self._mixtures(adapter_name):
            router, bank = mixture.router, mixture.bank
            if getattr(router, "needs_fit", False):
                empty = any(p.is_meta for p in bank.parameters())
                trained = any(bool(bank.experts[n].up.weight.any()) for n in bank.names if not empty)
                if not empty and trained and (not missing_ok or being_loaded() is None):
                    weights = dict(zip(bank.names, bank.weights(None), strict=True))
                    kept = {"kept": mixture.stands.keys()} if mixture.stands else {}
                    router.fit({name: weights.get(name) for name in router.experts}, **kept)
                fitted = True
        if not fitted and not missing_ok:
            raise ValueError(
                "the router of this mixture is not made from its experts' weights: there is nothing to fit"
            )

    @of_active
    def export_expert(
        self, name: str, folder: str | Path, *, pad_ranks: bool = False, adapter_name: str = UNNAMED
    ) -> None:
        """Write a LoRA expert as an adapter folder of PEFT's LoRA, which loads without this library.

        pad_ranks: for servers, such as vLLM and SGLang: one rank at all modules, the scale in B, and zeros at modules
            that they run together with adapted ones (q, k and v; gate and up).

        Raises:
            ValueError: there is no such expert, it is no LoRA, or `folder` is none, or holds something already.
        """
        check_switches(pad_ranks=pad_ranks)
        config = self._moa(adapter_name)
        check_known("expert", name, config.all_names())
        if config.expert_type != "lora":
            raise ValueError(f"export_expert writes LoRA, and expert_type={config.expert_type!r}")
        check_new_folder("export_expert", folder)
        factors = {}
        for path, mixture in self._mixtures(adapter_name):
            by_name = dict(zip(mixture.bank.names, mixture.bank.weights(None), strict=True))
            held = [mixture.holder_of(piece) for piece in config.pieces(name)]
            parts = [by_name[piece] for piece in held if piece is not None]
            if parts:
                factors[path] = factors_of(parts)
        save_lora(factors, folder, config, pad_ranks, self.model)

    def set_trainable(self, adapter_name: str) -> None:
        """Train what the config and the stage say."""
        config = self._moa(adapter_name)
        if config.inference_mode:
            for _, mixture in self._mixtures(adapter_name):
                mixture.requires_grad_(False)
            return
        if adapter_name in self.stage:
            self.set_stage(self.stage[adapter_name], adapter_name)
        elif config.frozen_experts():
            patterns = config.trained_in("task")
            for host in self.placed(adapter_name):
                host.stages[adapter_name] = patterns
            for parameter, matches in self._stage_parameters(patterns, adapter_name):
                if not matches:
                    parameter.requires_grad_(False)

    def _leaders(self, adapter_name: str) -> dict[str, Any]:
        """path -> router, of the layers that decide for themselves."""
        mixtures = self._mixtures(adapter_name)
        return {path: m.router for path, m in mixtures if not isinstance(m.router, FollowRouter)}

    def _moa(self, adapter_name: str) -> MoAConfig:
        config = self.config_of(adapter_name)
        if not isinstance(config, MoAConfig):
            raise ValueError(f"adapter {adapter_name!r} is a {config.peft_type.value} adapter, not MOA")
        return config

    def _mixtures(self, adapter_name: str) -> Iterator[tuple[str, ExpertMixture]]:
        return ((host.path, mixture) for host, mixture in self.placed(adapter_name).items())
