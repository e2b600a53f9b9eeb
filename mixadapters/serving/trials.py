"""Puts an adapter into a served model and tries it, or says why it cannot be served and leaves the model as it was."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mixadapters.core.files import PREFIX, SavedAdapter, loading, not_finite, weights_of
from mixadapters.core.layer import AdapterHost
from mixadapters.core.saving import check_kinds
from mixadapters.core.sites import unwrapped
from mixadapters.serving.forms import LORA, Form, Found, form_of
from mixadapters.serving.requests import AdapterRefused
from mixadapters.serving.residency import Residents
from mixadapters.tuners import MoAConfig


class Trials:
    """Of adapters of one model. Its verbs are for moments in which no forward runs.

    Args:
        model: the root.
        residents: its adapters.
    """

    def __init__(self, model: Any, residents: Residents) -> None:
        self.model, self.residents = model, residents

    def load(self, name: str, folder: str | Path, found: Found) -> Form | None:
        """Put an adapter into the model and try it.

        Returns:
            What others of its form need no trial by.
        """
        if found.kind == "LORA":
            source = {LORA: {"source": str(folder), "check_base_model": False}}  # it has been
            config: Any = MoAConfig(experts=source, router={"kind": "single"}, num_experts_per_tok=None)
            self._inject(name, config, None)
        else:
            self._inject(name, PeftConfig.from_pretrained(str(folder)), found.saved)
        try:
            refuse(name, self.refusal(name))
            if found.kind != "LORA":
                self._fill(name, found.path)
            self.model.eval()
            refuse(name, self._trial(name))
            form = form_of(found, self.residents.parts_in(name), lambda: self._trial(name))
        except BaseException:
            self.residents.forget(name)
            raise
        return form

    def _inject(self, name: str, config: Any, saved: SavedAdapter | None) -> None:
        """Put an adapter into the model, or leave it as it was."""
        config.inference_mode = True
        with warnings.catch_warnings(), loading(saved):
            warnings.simplefilter("ignore")  # "Already found a `peft_config`": so it should be
            try:
                inject_adapter_in_model(config, self.model, name)
            except re.error as error:  # of the folder's config
                raise ValueError(
                    f"adapter {name!r}: a pattern of its config is no regular expression: {error}"
                ) from None
        self.residents.find_hosts()

    def _fill(self, name: str, path: Path) -> None:
        """Read the weights of an adapter that is in the model.

        Raises:
            ValueError: the file has not these weights, and no others: embeddings would be those of all requests.
            AdapterRefused: one of them is not finite; it may be of an expert that no token of the trial is given to.
        """
        own = {host.path: adapter for host, adapter in self.residents.parts_of(name)}
        mark = f".{self.residents.parts_of(name)[0][0].prefix}adapters."
        parts: dict[str, dict[str, Any]] = {place: {} for place in own}
        with weights_of(path) as weights:
            if broken := not_finite(weights):
                refuse(name, f"{broken[0]!r} in its file holds NaN or infinite values")
            for key in weights:
                place, found, rest = key.removeprefix(PREFIX).partition(mark)
                if not found or place not in parts:
                    raise ValueError(f"{str(path)!r} holds {key!r}, which is no weight of this adapter's own")
                parts[place][rest] = weights[key]
        for place, adapter in own.items():
            check_kinds(name, parts[place], adapter.state_dict())
            try:
                adapter.load_state_dict(parts[place])
            except RuntimeError as error:
                raise ValueError(f"{str(path)!r} does not fit {place!r}: {error}") from None

    def refusal(self, name: str) -> str | None:
        """Why an adapter that is in the model cannot be right among packed requests; None if it can."""
        head = unwrapped(self.model.get_output_embeddings())
        for host, _ in self.residents.parts_of(name):
            if reason := host.packed_refusal(name):
                return f"{reason} at {host.path!r} must know the earlier tokens of its request"
            if host.get_base_layer() is head:
                return f"it adapts {host.path!r}, which reads the last token of each request alone"
            if host.merged_adapters:
                return f"adapters {host.merged_adapters} are merged at {host.path!r}: unmerge them first"
        for path, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
                return f"it has {path!r} of its own (modules_to_save or trained tokens), of which a step runs one"
        return None

    @torch.no_grad()
    def _trial(self, name: str) -> str | None:
        """Why a first forward of two tokens fails; None if it does not."""
        ids = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        try:
            logits = self.model(input_ids=ids, adapter_names=[name], use_cache=False).logits
        except Exception as error:  # whatever it is, it would end the loop, and with it all requests
            return f"a first forward fails ({type(error).__name__}: {error})"
        return None if bool(logits.isfinite().all()) else "a first forward gives logits that are no finite numbers"


def refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise AdapterRefused(f"adapter {name!r} cannot be served: {reason}")


def foreign_names(model: nn.Module) -> set[str]:
    """Those of PEFT's own adapters, which are off. Raises ValueError where they act."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, AdapterHost):
            continue
        if module.active_adapters and not module.disable_adapters:
            raise ValueError(
                f"{path!r} has PEFT's own adapters {list(module.active_adapters)}, which would act on every "
                "request: load their folders by the server, into a model without them"
            )
        names.update(module._all_available_adapter_names())
    return names
