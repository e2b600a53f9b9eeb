"""Domains in other forms: as adapters of their own, as one bottleneck, or merged for a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixadapters.core.bank import Weights, norm_folded
from mixadapters.core.fields import check_switches
from mixadapters.core.files import PREFIX
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, check_known, of_active
from mixadapters.routers.fixed import ConstantRouter
from mixadapters.tuners.bottleneck.config import BottleneckConfig, placement_taps
from mixadapters.tuners.bottleneck.model import EXPERT
from mixadapters.tuners.lora import factors_of, save_lora
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.lora import pattern_of
from mixadapters.tuners.mixda.router import OPTION_OF, read_router, weights_of
from mixadapters.tuners.sources import check_new, check_new_folder, write_adapter


class DomainForms(MixtureModel):
    """Part of MixDA's tuner."""

    def _mixtures(self, adapter_name: str) -> Iterator[tuple[str, Mixture]]:
        raise NotImplementedError

    def _renumber(self, adapter_name: str) -> None:
        raise NotImplementedError

    def domain_role(self, config: MixDAConfig) -> str:
        raise NotImplementedError

    # --- as adapters of their own ------------------------------------------------------------------------------

    @of_active
    @torch.no_grad()
    def export_domain(
        self, name: str, folder: str | Path, *, pad_ranks: bool = False, adapter_name: str = UNNAMED
    ) -> None:
        """Write a domain as an adapter folder of its own: at full weight, without gate and task adapter.

        A LoRA becomes one of PEFT's, which loads without this library; a bottleneck a BottleneckConfig's. Either can
        be gathered again.

        pad_ranks: of LoRA: as in `export_expert`, one rank at all modules and the scale in B, for servers that need
            that.

        Raises:
            ValueError: there is no such domain, it stands for the whole output of its layers (combine="convex"), or
                `folder` is none, or holds something already.
        """
        check_switches(pad_ranks=pad_ranks)
        config = self.config_of(adapter_name)
        check_known("domain", name, config.domains)
        check_new_folder("export_domain", folder)
        if config.combine == "convex":
            raise ValueError(
                "export_domain: with combine='convex' a domain stands for the whole output of a layer, and an adapter "
                "of its own would be added to it"
            )
        mixtures = {path: m for path, m in self._mixtures(adapter_name) if name in m.bank.experts}
        if config.domain_type == "lora":
            own = {path: m.bank.weights(None)[m.bank.names.index(name)] for path, m in mixtures.items()}
            factors = {path: factors_of([expert]) for path, expert in own.items()}
            save_lora(factors, folder, config, pad_ranks, self.model)
            return
        if pad_ranks:
            raise ValueError("export_domain: pad_ranks=True is for LoRA; leave it out")
        ranks = {path: m.bank.experts[name].rank for path, m in mixtures.items()}
        weights = {
            f"{PREFIX}{path}.bottleneck_adapters.bank.experts.{EXPERT}.{key}": parameter
            for path, m in mixtures.items()
            for key, parameter in m.bank.experts[name].named_parameters()
        }
        write_adapter(folder, self._as_bottleneck(config, ranks), weights)

    def _as_bottleneck(self, config: MixDAConfig, ranks: dict[str, int]) -> BottleneckConfig:
        """The config of a domain of these ranks by module, as an adapter of its own."""
        usual = Counter(ranks.values()).most_common(1)[0][0]
        where: dict[str, Any] = {"target_modules": sorted(ranks)}
        if config.sites is not None:
            taps = placement_taps("parallel", config.adapter_input, self.known_roles(config))
            own = rf"(?:.*\.)?(?:{pattern_of(ranks)})"
            where = {"sites": {self.domain_role(config): own, **{role: config.sites[role] for role in taps}}}
        return BottleneckConfig.domain(
            r=usual, rank_pattern={path: rank for path, rank in ranks.items() if rank != usual},
            adapter_input=config.adapter_input, activation=config.activation, glu=config.adapter_glu,
            layer_norm=config.adapter_layer_norm, hidden_size=config.hidden_size, task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path, revision=config.revision, inference_mode=True,
            **where,
        )  # fmt: skip

    # --- as one ------------------------------------------------------------------------------------------------

    @of_active
    @torch.no_grad()
    def join_domains(
        self, name: str, weights: Mapping[str, float] | None = None, *, adapter_name: str = UNNAMED
    ) -> None:
        """Make one domain of all: their ranks side by side, each at a weight that no gate changes any more.

        y + sum_k w_k U_k act(D_k x) is one bottleneck with the rows of all D_k and the columns of all w_k U_k: exact
        for a gate that is constant, whose weights are taken where none are given. A gate that depends on its input is
        given up by this. Make optimizers anew afterwards.

        weights: of the domains by name; those that are not named, or 0, are left out.

        Raises:
            ValueError: unknown domains, nothing with a weight, a gate without fixed weights and none given, or
                combine="convex".
        """
        config = self.config_of(adapter_name)
        check_new("domain", name, (), self.peft_config.keys() - {adapter_name})
        MixDAConfig(domains=[name])  # checks the name
        if config.combine == "convex":
            raise ValueError("join_domains: with combine='convex' the gate weighs the frozen layer too; use 'delta'")
        mixtures = dict(self._mixtures(adapter_name))
        shares = {path: self._shares(config, mixture, weights) for path, mixture in mixtures.items()}
        if not any(any(found) for found in shares.values()):
            raise ValueError(f"join_domains: weights={weights} leave nothing of the domains {list(config.domains)}")
        joined = {path: _side_by_side(mixture.bank.weights(None), shares[path]) for path, mixture in mixtures.items()}
        scales = {"scales": {path: 1.0 for path, parts in joined.items() if parts}}
        entry: dict[str, Any] = {"ranks": {p: len(parts["down.weight"]) for p, parts in joined.items() if parts}}
        if config.domain_type == "lora":
            entry |= scales | {"biases": [path for path, parts in joined.items() if "up.bias" in parts]}
        config.domains, config.domain_order, config.null_arms = {name: entry}, [name], {}
        for field in OPTION_OF:
            setattr(config, field, None)
        config.router = {"kind": "constant", "weights": {name: 1.0}}
        read_router(config)
        for path, mixture in mixtures.items():
            self._put_in_place(config, path, mixture, name, joined[path])
        self._renumber(adapter_name)

    def _shares(self, config: MixDAConfig, mixture: Mixture, weights: Any) -> list[float]:
        """The weight of each domain at one layer."""
        if weights is not None:
            return weights_of(dict(weights), mixture.bank.names, list(config.domains))
        fixed = mixture.router.constant()
        if fixed is None:
            raise ValueError(
                f"join_domains: the gate {config.gate!r} weighs the domains by its input, so that no one bottleneck "
                "equals them; give weights={domain: weight}"
            )
        return fixed

    def _put_in_place(
        self, config: MixDAConfig, path: str, mixture: Mixture, name: str, parts: dict[str, Tensor]
    ) -> None:
        """One domain in the place of those of a mixture, of these weights; none where they hold nothing."""
        bank, adapter_name = mixture.bank, mixture.key.adapter
        trained = any(p.requires_grad for p in bank.parameters())
        for old in bank.names:
            bank.remove(old)
        if not parts:
            del self.host_at(path).adapters[adapter_name].domain
            return
        bank.add(name, len(parts["down.weight"]), **config.expert_options(name, path))
        expert = bank.experts[name].to(parts["down.weight"])
        for key, parameter in expert.named_parameters():
            if key in parts:
                parameter.copy_(parts[key])
        expert.requires_grad_(trained)
        router = ConstantRouter(mixture.router.in_features, [name], [1.0]).to(parts["down.weight"].device)
        mixture.router = router
        router.bind(self._site(config, adapter_name, self._unwrapped(path), path))

    # --- merged for a request ----------------------------------------------------------------------------------

    @of_active
    @contextmanager
    def merged_domains(self, weights: Mapping[str, float], *, adapter_name: str = UNNAMED) -> Iterator[None]:
        """Within the block the domains count by these weights and not by the gate, merged into the frozen layers.

        `with tuner.merged_domains({"law": 0.7, "code": 0.3}): model.generate(...)`: every row, at the cost of the base
        model. Afterwards everything is as before, the frozen weights bit for bit.

        weights: of the domains by name; 0 for those that are not named.

        Raises:
            ValueError: unknown domains, adapters that are merged already, or one that no weight of a linear layer
                equals: a bottleneck with an activation, of the domains or of the task.
        """
        config = self.config_of(adapter_name)
        if merged := sorted({name for host in self.hosts() for name in host.merged_adapters}):
            raise ValueError(f"merged_domains: the adapters {merged} are merged already; unmerge them first")
        mixtures = [mixture for _, mixture in self._mixtures(adapter_name)]
        fixed = [weights_of(dict(weights), mixture.bank.names, list(config.domains)) for mixture in mixtures]
        gates = [mixture.router for mixture in mixtures]
        try:
            for mixture, shares in zip(mixtures, fixed, strict=True):
                mixture.router = ConstantRouter(mixture.router.in_features, mixture.bank.names, shares)
            self.merge_adapter([adapter_name])
        finally:
            for mixture, gate in zip(mixtures, gates, strict=True):
                mixture.router = gate
        try:
            yield
        finally:
            self.unmerge_adapter()


def _side_by_side(weights: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """The parameters of the expert that equals these experts at these weights; {} where all are 0."""
    parts = [(w, share * w.scale) for w, share in zip(weights, shares, strict=True) if share]
    if not parts:
        return {}
    found = {"up.weight": torch.cat([share * w.up for w, share in parts], 1)}
    ends = [share * w.b_up for w, share in parts if w.b_up is not None]
    if ends:
        found["up.bias"] = torch.stack(ends).sum(0)
    for name in ("down", "gate"):
        rows = [norm_folded(getattr(w, name), getattr(w, f"b_{name}"), w.norm) for w, _ in parts]
        for key, tensors in zip(("weight", "bias"), zip(*rows, strict=True), strict=True):
            if tensors[0] is not None:  # as in all: they are of one bank
                found[f"{name}.{key}"] = torch.cat(tensors)
    return found
