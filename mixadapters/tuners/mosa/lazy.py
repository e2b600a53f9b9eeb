"""The optimizer for `inactive_update="lazy"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.tuners.mosa.split import SplitLinear


class LazyAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that leaves alone what was not drawn.

    Entries of experts that no forward has drawn since the last step keep value and moments bit for bit, without decay,
    and each expert counts its own steps. All other parameters are those of torch's AdamW. For the Trainer:
    `Trainer(..., optimizer_cls_and_kwargs=(LazyAdamW, {"peft_model": model, "lr": 1e-3}))`.

    Args:
        params: parameters or groups of them.
        peft_model: holds the split projections.
        options: as for torch.optim.AdamW, without `amsgrad` and `maximize`.
    """

    def __init__(self, params: Any, peft_model: nn.Module, **options: Any) -> None:
        for name in ("amsgrad", "maximize"):
            if options.get(name):
                raise ValueError(f"{name}=True is not supported; leave it out, or use inactive_update='dense'")
        super().__init__(params, **options)
        self.peft_model = peft_model

    def split_weights(self) -> set[int]:
        """Identities of the weights whose draws it knows."""
        return {id(m.weight) for m in self.peft_model.modules() if isinstance(m, SplitLinear) and m.lazy}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = {id(m.weight): m for m in self.peft_model.modules() if isinstance(m, SplitLinear) and m.lazy}
        held: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in parts and parameter.grad is not None:
                    held.append((group, parameter, parameter.grad))
                    parameter.grad = None  # torch's AdamW passes over it
        super().step()
        for group, parameter, gradient in held:
            parameter.grad = gradient
            self._lazy_step(group, parameter, gradient, parts[id(parameter)])
        for part in parts.values():
            part.forget()
        return loss

    def _lazy_step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, part: SplitLinear) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(part.num_experts, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += part.drawn
        owner = part.owner.long()
        active, step = part.drawn[owner], state["step"].clamp(min=1).to(parameter.dtype)[owner]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.copy_(torch.where(active, mean.lerp(gradient, 1 - beta1), mean))
        square.copy_(torch.where(active, beta2 * square + (1 - beta2) * gradient.square(), square))
        spread = (square / (1 - beta2**step)).sqrt() + group["eps"]
        change = (
            parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] / (1 - beta1**step) * mean / spread
        )
        parameter.copy_(torch.where(active, change, parameter))
