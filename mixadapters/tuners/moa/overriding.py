"""Experts that are off, on or scaled from now on, and in the saved adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mixadapters.core.fields import one_of
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.surgery.mixtures import deciding_router, mixture_layers
from mixadapters.surgery.tuning import (
    MODES,
    LayerTuning,
    Place,
    attach_tuning,
    check_tuning,
    places_of,
    read_places,
    written_places,
)
from mixadapters.tuners.moa.spawning import ExpertSpawning


class ExpertOverriding(ExpertSpawning):
    """Part of MoA's tuner."""

    @of_active
    def override_experts(
        self,
        off: Iterable[Place] = (),
        on: Mapping[Any, float] | None = None,
        scale: Mapping[Any, float] | None = None,
        mode: str = "zero",
        *,
        adapter_name: str = UNNAMED,
    ) -> None:
        """Switch experts off, on, or scale them, as `surgery.tune_experts` does, from now on: the config keeps it.

        What an earlier call has said holds no more; without arguments nothing is overridden. An expert that leaves
        the mixture leaves this too.

        Raises:
            ValueError: as `tune_experts`; nothing is changed.
        """
        one_of("mode", mode, MODES)
        config = self._moa(adapter_name)
        tunings = read_places(mixture_layers(self, adapter_name), off, on or {}, scale or {})
        for layer, tuning in tunings.items():
            check_tuning(layer, tuning, mode)
        self._end_overrides(adapter_name)
        self._begin_overrides(tunings, mode)
        config.expert_overrides = written_places(tunings, mode)

    def _begin_overrides(self, tunings: Mapping[Any, LayerTuning], mode: str) -> None:
        for layer, tuning in tunings.items():
            attach_tuning(layer.mixture, replace(tuning, kept=True), mode)

    def _end_overrides(self, adapter_name: str) -> None:
        said = self._moa(adapter_name).expert_overrides
        masked = [tuple(place) for place in said.get("off", ())] if said.get("mode") == "mask" else []
        for path, mixture in self._mixtures(adapter_name):
            mixture.tunings[:] = [tuning for tuning in mixture.tunings if not getattr(tuning, "kept", False)]
            router: Any = deciding_router(mixture.router)
            if names := [name for where, name in masked if where == path]:
                router.masked = tuple(name for name in router.masked if name not in names)

    def apply_overrides(self, adapter_name: str) -> None:
        """Do what the config says.

        Raises:
            ValueError: it speaks of experts that are not there, or of what they cannot do.
        """
        said = self._moa(adapter_name).expert_overrides
        if said:
            self.override_experts(*places_of(said), adapter_name=adapter_name)

    def _settle(self, adapter_name: str) -> None:
        """And forget what the config says of experts that have left."""
        super()._settle(adapter_name)
        config = self._moa(adapter_name)
        if config.expert_overrides:
            self._end_overrides(adapter_name)
            layers = mixture_layers(self, adapter_name)
            off, on, scale, mode = places_of(config.expert_overrides)
            there = {(layer.path, name) for layer in layers for name in layer.names}
            off = [place for place in off if place in there]
            on = {place: share for place, share in on.items() if place in there}
            scale = {place: factor for place, factor in scale.items() if place in there}
            tunings = read_places(layers, off, on, scale)
            self._begin_overrides(tunings, mode)
            config.expert_overrides = written_places(tunings, mode)
