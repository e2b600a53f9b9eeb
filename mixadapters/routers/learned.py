"""Learned routers: score -> pool -> choose. `softmax` and `sigmoid` differ in how logits become weights.

Source: Diao et al. 2023 (arXiv 2306.05406), section 3.3 and appendix A. Granularities other than the paper's and the
causal forms are ours. Logits and weights are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.bank import Scale
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import FROZEN, Routing
from mixadapters.routers.arms import ArmSurgery
from mixadapters.routers.base import COEFFICIENTS, PooledRouter
from mixadapters.routers.options import check_options
from mixadapters.routers.pooling import POOLINGS
from mixadapters.routers.score import ACTIVATIONS, HOMOGENEOUS, exact, features, linear, score_layers


class LearnedRouter(PooledRouter, ArmSurgery):
    """Weights over the experts, per token, sequence, causal prefix or request.

    A router of a user's own overrides `choose` (logits -> Routing), `weigh` (logits -> weights of the arms) or
    `score`. Its constructor passes on what it does not name: `def __init__(self, *args, k=1, **options)`.

    Arms are the experts in order, then arms without expert ("null": what a removed domain leaves behind), then the
    frozen layer if `frozen_arm`. In a convex mixture that arm's weight is `Routing.base_weight`; otherwise it only
    takes mass from the experts.

    Args:
        hidden: widths of ReLU layers before the output; [] is a linear router.
        granularity: one of GRANULARITIES. "sequence" pools over the whole sequence, so it is for encoders;
            "causal_prefix" pools the logits of positions up to each token; "request" pools the prompt, once.
        pool: one of POOLS, for "sequence". "last" reads the last position, padding or not (the released code).
        dropout: before each linear layer, in training.
        frozen_bias: initial logit of the frozen arm; a large one starts near the frozen model.
        normalize: scale the input to unit root mean square (gated FFNs have large outliers).
        convex: return the frozen arm's weight as `base_weight`.
        temperature: divides the logits.
        null_arms: how many arms without expert there are.
        init_range: standard deviation of the output layer's weights at the start.
        jitter: in training, multiplies what the router reads by numbers between 1 - jitter and 1 + jitter (Fedus et
            al. 2021, section 2.4).
        noise: in training, adds Gaussian noise of the standard deviation noise / A to A logits (Riquelme et al. 2021).
        activation: of the output layer: act(W x) / temperature + b (Nguyen et al. 2024, arXiv 2401.13875). None:
            (W x + b) / temperature.
        learnable_temperature: train the temperature; for an activation with which it is no scale of W.

    Raises:
        ValueError: a value out of range, or an unknown granularity, pool or activation.
    """

    frozen_arm = True
    masked: tuple[str, ...] = ()  # arms that no row gets, as if they were not there
    scheduled: tuple[str, ...] = (*COEFFICIENTS, "temperature", "jitter", "noise")
    learns = True

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        hidden: Sequence[int] = (),
        granularity: str = "token",
        pool: str = "masked_mean",
        dropout: float = 0.0,
        frozen_bias: float = 0.0,
        normalize: bool = True,
        convex: bool = False,
        temperature: float = 1.0,
        null_arms: int = 0,
        init_range: float = 0.0,
        jitter: float = 0.0,
        noise: float = 0.0,
        activation: str | None = None,
        learnable_temperature: bool = False,
        **coefficients: Any,
    ) -> None:
        super().__init__(in_features, experts, **coefficients)
        check_options(
            granularity=granularity, pool=pool, hidden=hidden, temperature=temperature, dropout=dropout,
            frozen_bias=frozen_bias, null_arms=null_arms, normalize=normalize, convex=convex, init_range=init_range,
            jitter=jitter, noise=noise, activation=activation, learnable_temperature=learnable_temperature,
        )  # fmt: skip
        if learnable_temperature and activation in HOMOGENEOUS:
            raise ValueError(
                f"learnable_temperature=True with activation={activation!r}: the temperature would be one more scale "
                f"of the weights; choose one of {sorted(set(ACTIVATIONS).difference(HOMOGENEOUS))}"
            )
        self.normalize, self.convex, self.temperature, self.null_arms = normalize, convex, temperature, null_arms
        self.jitter, self.noise, self.activation = jitter, noise, activation
        self.log_temperature = Scale(math.log(temperature)) if learnable_temperature else None
        self.pooling = POOLINGS[granularity](pool)
        self.hidden, self.output = score_layers(in_features, hidden, len(self.arms), dropout, init_range)
        if self.has_frozen_arm:
            nn.init.constant_(self.output.bias[-1:], frozen_bias)

    def bind(self, site: Site) -> None:
        super().bind(site)
        self.pooling.bind(site)

    @property
    def has_frozen_arm(self) -> bool:
        return self.frozen_arm or self.convex

    @property
    def arms(self) -> list[str]:
        null = [f"null{i}" for i in range(self.null_arms)]
        return [*self.experts, *null, *([FROZEN] if self.has_frozen_arm else [])]

    def check_option(self, name: str, value: Any) -> None:
        if name == "temperature" and self.log_temperature is not None:
            raise ValueError(f"temperature={value!r} cannot be set: learnable_temperature=True trains it")
        super().check_option(name, value)

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        logits = self.pooling(self.score, tokens, context)  # (N, A)
        noisy = self.disturbed(logits, context)
        if self.masked:
            noisy = noisy.masked_fill(self.masked_columns(noisy), -torch.inf)
        routing = self.choose(self.tempered(noisy))._replace(logits=logits)
        return self.completed(routing, noisy, context)

    def masked_columns(self, logits: Tensor) -> Tensor:
        """(A,) bool, on the device of logits (N, A)."""
        return torch.tensor([arm in self.masked for arm in self.arms], device=logits.device)

    def score(self, tokens: Tensor) -> Tensor:
        """tokens (..., d) -> logits (..., A), in float32 at least."""
        read = exact(tokens, self.normalize)
        if self.training and self.jitter:
            read = read * torch.empty_like(read).uniform_(1 - self.jitter, 1 + self.jitter)
        parts: Any = self._modules  # past `nn.Module.__getattr__`: a decoding step comes here in every layer
        output, hidden = parts["output"], parts["hidden"]
        learned = None if self.log_temperature is None else self.log_temperature.weight
        return self.logits(features(read, hidden), output.weight, output.bias, learned)

    def logits(
        self, read: Tensor, weight: Tensor, bias: Tensor | None, log_temperature: Tensor | None = None
    ) -> Tensor:
        """read (..., h) -> (..., A) by the weight (A, h) and the bias (A,) of the output layer.

        With an activation the temperature is in them; log_temperature (1,) is a learned one.
        """
        if self.activation is None:
            return self.project(read, weight, bias)
        scores = ACTIVATIONS[self.activation](self.project(read, weight, None))
        scores = scores / (
            self.current_temperature if log_temperature is None else log_temperature.to(scores.dtype).exp()
        )
        return scores if bias is None else scores + bias.to(scores.dtype)

    def project(self, read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output layer without its activation."""
        return linear(read, weight, bias)

    def disturbed(self, logits: Tensor, context: ForwardContext) -> Tensor:
        """logits (N, A) with noise in training: the same for all tokens that decide together."""
        if not (self.training and self.noise):
            return logits
        return logits + self.noise / logits.shape[1] * self.drawn_for(logits, context)

    def drawn_for(self, logits: Tensor, context: ForwardContext, draw: Any = Tensor.normal_) -> Tensor:
        """Random numbers (N, A), with one row for all tokens that decide together."""
        count = context.stream(self.stack).batch if self.pooling.by_row else len(logits)
        return draw(logits.new_empty(count, logits.shape[1])).repeat_interleave(len(logits) // count, dim=0)

    @property
    def current_temperature(self) -> float:
        """What divides the logits now, where the temperature is not learned."""
        return self.temperature

    def tempered(self, logits: Tensor) -> Tensor:
        if self.activation is not None or self.current_temperature == 1:
            return logits
        return logits / self.current_temperature

    def weigh(self, logits: Tensor) -> Tensor:
        """logits (N, A) -> weights (N, A)."""
        raise NotImplementedError

    def choose(self, logits: Tensor) -> Routing:
        """logits (N, A), divided by the temperature -> Routing."""
        weights = self.weigh(logits)
        count = len(self.experts)
        # What removed domains leave behind goes to the frozen layer, so that a softmax still sums to 1.
        base_weight = weights[:, count:].sum(1) if self.convex else None
        return Routing(weights=weights[:, :count], base_weight=base_weight, probs=weights)

    def completed(self, routing: Routing, noisy: Tensor, context: ForwardContext) -> Routing:
        """What `choose` has made of the logits `noisy`, where more than logits decides."""
        return routing


DomainGate = LearnedRouter  # its name in MixDA
