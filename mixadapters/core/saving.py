"""What a saved adapter holds, and what may be loaded: every key has its place, or is refused."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn


class SavedForm(BaseTuner):
    """The keys of a saved adapter, in both directions."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name follows `<prefix>adapters`, however deep the parameter lies."""
        before, found, after = key.partition(f".{cls.prefix}adapters.{adapter_name}.")
        if found:
            return f"{before}.{cls.prefix}adapters.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's mapping; weights that are missing or left over are an error, not a warning."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mark = f"{cls.prefix}adapters."
        wanted = {k for k in model.state_dict() if f"{mark}{adapter_name}." in k}
        given = {k for k in remapped if mark in k}
        if missing := sorted(wanted - given):
            raise ValueError(
                f"the file holds {len(wanted) - len(missing)} of {len(wanted)} weights of adapter {adapter_name!r}: "
                f"{missing[0]!r} is missing. Was it saved from another base model or with another config?"
            )
        saved = {k for k in remapped if any(f".{module}." in k for module in config.modules_to_save or ())}
        if extra := sorted((given - wanted) | (saved - model.state_dict().keys())):
            raise ValueError(
                f"the file holds {len(extra)} weights that adapter {adapter_name!r} has no place for, such as "
                f"{extra[0]!r}. Was it saved from another base model or with another config?"
            )
        return remapped
