"""Guidance by adapters for the modular pipelines of diffusers (0.42), whose guiders are experimental there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.hooks import root_of
from mixadapters.tuners.agd.calls import refuse_distilled
from mixadapters.tuners.agd.layer import check_scale
from mixadapters.tuners.agd.pipeline import guidance_adapters


class AdapterGuidance(BaseGuidance):
    """The guider of a modular pipeline whose denoiser has guidance adapters: one pass per step.

        pipe.update_components(guider=AdapterGuidance(guidance_scale=5.0))

    What the pipeline has for an unconditional pass, negative prompts among it, is not read, so adapters that read it
    (`negative="distil"`) are refused.

    Args:
        start, stop: the share of the steps that are guided; elsewhere the model is its base.

    Raises:
        ValueError: when the denoiser runs: it has no active guidance adapter, or one that
            reads negative prompts, or embeds the guidance scale.
    """

    _input_predictions: ClassVar = ["pred_cond"]

    @register_to_config
    def __init__(
        self, guidance_scale: float = 7.5, start: float = 0.0, stop: float = 1.0, enabled: bool = True
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self._pinned: AbstractContextManager[None] | None = None

    def prepare_models(self, denoiser: nn.Module) -> None:
        self.cleanup_models(denoiser)  # a forward that failed has left its scale
        super().prepare_models(denoiser)
        model = root_of(denoiser)
        refuse_distilled(model)
        scale = self.guidance_scale if self._guides() else 1.0
        for adapter in guidance_adapters(model):
            check_scale(scale, adapter.config)
            if adapter.config.negative == "distil":
                raise ValueError(
                    "the adapters read negative prompts (negative='distil'), of which a guider is not told; use the "
                    "pipeline that is not modular, with OnePass"
                )
        rows = torch.tensor(float(scale), device=next(model.parameters()).device)
        self._pinned = ForwardContext.of(model).pin_in_thread(guidance_scale=rows)
        self._pinned.__enter__()

    def cleanup_models(self, denoiser: nn.Module) -> None:
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.__exit__(None, None, None)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def forward(self, pred_cond: Tensor) -> GuiderOutput:
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        return True

    @property
    def num_conditions(self) -> int:
        return 1

    def _guides(self) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < end
