"""MixDA's gate: learned weights over domains, and over the frozen layer as one more arm.

Source: Diao et al. 2023 (arXiv 2306.05406), section 3.3 and appendix A. Granularities other than the paper's and the
causal forms are ours. Logits and weights are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.cache import gate_state
from mixadapters.core.context import ForwardContext
from mixadapters.core.losses import entropy, load_balance, router_z
from mixadapters.core.routing import Routing
from mixadapters.core.streams import Stream
from mixadapters.core.usage import GateUsage
from mixadapters.routers.base import ROUTERS, Router

GRANULARITIES = ("token", "sequence", "causal_prefix", "request")
POOLS = ("masked_mean", "first", "last_valid", "last")
FROZEN = "frozen"  # the arm of the frozen layer's own output


class DomainGate(Router):
    """Weights over the experts, per token, sequence, causal prefix or request.

    Arms are the experts in order, then arms without expert ("null": what a removed domain leaves behind), then the
    frozen layer if `frozen_arm`. In a convex mixture that arm's weight is `Routing.keep`; otherwise it only takes
    mass from the experts.

    Args:
        hidden: widths of ReLU layers before the output; [] is a linear gate.
        granularity: one of GRANULARITIES. "sequence" pools over the whole sequence, so it is for encoders;
            "causal_prefix" pools the logits of positions up to each token; "request" pools the prompt, once.
        pool: one of POOLS, for "sequence". "last" reads the last position, padding or not (the released code).
        frozen_bias: initial logit of the frozen arm; a large one starts near the frozen model.
        normalize: scale the gate's input to unit root mean square (gated FFNs have large outliers).
        convex: return the frozen arm's weight as `keep`.
        temperature: divides the logits.
        balance_coef, z_coef, entropy_coef: weights of the auxiliary losses.
        path: name of the site, for the state kept with a cache and for logs.
        stack: "encoder" or "decoder" in models that have both.
        ids: number of each expert in `domain_ids`; hard routing by those replaces the gate where they are given.
        num_ids: how many numbers there are in the whole model; experts may be missing at single layers.
    """

    frozen_arm = True

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
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        entropy_coef: float = 0.0,
        tap: str | None = None,
        path: str = "",
        stack: str = "",
        ids: Sequence[int] | None = None,
        num_ids: int | None = None,
        null_arms: int = 0,
    ) -> None:
        super().__init__(in_features, experts)
        self.granularity, self.pool, self.normalize = granularity, pool, normalize
        self.convex, self.temperature, self.tap = convex, temperature, tap
        self.balance_coef, self.z_coef, self.entropy_coef = balance_coef, z_coef, entropy_coef
        self.path, self.stack, self.null_arms = path, stack, null_arms
        self.mark = uuid4().hex  # tells the gates of several adapters at one site apart
        self.number(list(range(len(experts)) if ids is None else ids), num_ids)
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Dropout(dropout), nn.Linear(before, after), nn.ReLU()]
        self.hidden = nn.Sequential(*layers, nn.Dropout(dropout))
        self.output = nn.Linear(widths[-1], len(experts) + null_arms + self.has_frozen_arm)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.has_frozen_arm:
            nn.init.constant_(self.output.bias[-1:], frozen_bias)
        self.usage = GateUsage(self.arms)

    def number(self, ids: Sequence[int], num_ids: int | None = None) -> None:
        """Give the experts their numbers in `domain_ids`."""
        self.num_ids = len(ids) if num_ids is None else num_ids
        self.register_buffer("ids", torch.tensor(list(ids), dtype=torch.long), persistent=False)

    @property
    def has_frozen_arm(self) -> bool:
        return self.frozen_arm or self.convex

    @property
    def arms(self) -> list[str]:
        null = [f"null{i}" for i in range(self.null_arms)]
        return [*self.experts, *null, *([FROZEN] if self.has_frozen_arm else [])]

    def weigh(self, logits: Tensor) -> Tensor:
        """logits (..., A) float32 -> weights (..., A)."""
        raise NotImplementedError

    # --- forward ----------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        rows = tokens.numel() // tokens.shape[-1]
        chosen = context.rows("domain_ids", rows)
        if chosen is not None:
            return self._by_ids(chosen.to(tokens.device), tokens.dtype, context)
        read = tokens if self.tap is None else context.tap(self.tap)
        stream = context.stream(self.stack)
        logits, mask = self._logits(read, stream, context)
        weights = self.weigh(logits / self.temperature)  # (N, A)
        self._report(logits, weights, mask, context)
        experts = weights[:, : len(self.experts)].to(tokens.dtype)
        # What removed domains leave behind goes to the frozen layer, so that a softmax still sums to 1.
        keep = weights[:, len(self.experts) :].sum(1).to(tokens.dtype) if self.convex else None
        return Routing(weights=experts, keep=keep, probs=weights)

    def _by_ids(self, chosen: Tensor, dtype: torch.dtype, context: ForwardContext) -> Routing:
        """Row n uses the expert numbered chosen[n] (N,) with weight 1; a number without expert here: none."""
        checked = context.record.shared
        if "domain_ids" not in checked and not torch.compiler.is_compiling():
            checked["domain_ids"] = True
            if bool((chosen >= self.num_ids).any()) or bool((chosen < -1).any()):
                raise ValueError(
                    f"domain_ids={chosen.unique().tolist()} must lie between -1 (none) and {self.num_ids - 1}"
                )
        hits = chosen.unsqueeze(1) == self.ids.to(chosen.device)
        keep = (~hits.any(1)).to(dtype) if self.convex else None
        return Routing(weights=hits.to(dtype), keep=keep)

    def _logits(self, tokens: Tensor, stream: Stream, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """(N, A) float32 logits and the (N,) mask of real tokens."""
        if self.granularity == "token":
            mask = stream.mask
            flat = tokens.reshape(-1, tokens.shape[-1])
            if mask is None or mask.numel() != flat.shape[0]:
                return self._score(flat), None
            return self._score(flat), mask.reshape(-1)
        sequences = context.as_sequences(tokens, self.stack)
        batch, length, _ = sequences.shape
        mask = stream.mask if stream.mask is not None and stream.mask.shape[1] == length else None
        if self.granularity == "sequence":
            logits = self._score(self._pooled(sequences, mask, stream)).unsqueeze(1).expand(-1, length, -1)
        elif self.granularity == "causal_prefix":
            logits = self._prefix_mean(self._score(sequences), mask, stream, context)
        else:
            logits = self._request_mean(self._score(sequences), mask, stream, context).unsqueeze(1)
            logits = logits.expand(-1, length, -1)
        return logits.reshape(batch * length, -1), None if mask is None else mask.reshape(-1)

    def _score(self, read: Tensor) -> Tensor:
        kind = torch.promote_types(read.dtype, torch.float32)  # at least float32
        read = read.to(kind)
        if self.normalize:
            read = F.rms_norm(read, (read.shape[-1],))
        with torch.autocast(read.device.type, enabled=False):
            for layer in self.hidden:
                read = (
                    F.linear(read, layer.weight.to(kind), layer.bias.to(kind))
                    if isinstance(layer, nn.Linear)
                    else layer(read)
                )
            return F.linear(read, self.output.weight.to(kind), self.output.bias.to(kind))

    def _pooled(self, sequences: Tensor, mask: Tensor | None, stream: Stream) -> Tensor:
        """(B, T, d) -> (B, d)."""
        _refuse_packed(stream, "sequence")
        if self.pool == "last":
            return sequences[:, -1]
        if mask is None:
            if stream.length is not None and sequences.shape[0] > 1:
                raise _missing_mask("sequence")
            mask = torch.ones(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
        if self.pool == "masked_mean":
            weight = mask.to(sequences.dtype).unsqueeze(-1)
            return (sequences * weight).sum(1) / weight.sum(1).clamp_min(1)
        position = torch.arange(mask.shape[1], device=mask.device)
        if self.pool == "first":
            index = torch.where(mask, position, mask.shape[1]).amin(1).clamp_max(mask.shape[1] - 1)
        else:
            index = torch.where(mask, position, 0).amax(1)
        return sequences.gather(1, index.view(-1, 1, 1).expand(-1, 1, sequences.shape[-1])).squeeze(1)

    def _prefix_mean(self, scores: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext) -> Tensor:
        """(B, T, A) logits of single tokens -> mean over the real tokens up to each one.

        The running sum travels with the key-value cache. Packed sequences start anew where `position_ids` does.
        """
        weight = torch.ones_like(scores[..., :1]) if mask is None else mask.to(scores.dtype).unsqueeze(-1)
        sums = torch.cat([scores * weight, weight], dim=-1).cumsum(1)  # (B, T, A + 1)
        state, key = self._state(stream, context)
        past = None if state is None else state.get(key)
        if past is not None:
            sums = sums + past[:, -1:]
        elif stream.position_ids is not None and not stream.cached:
            sums = sums - _before_document(sums, stream.position_ids, mask)
        if state is not None:
            state[key] = sums if past is None else torch.cat([past, sums], dim=1)
        return sums[..., :-1] / sums[..., -1:].clamp_min(1)

    def _request_mean(self, scores: Tensor, mask: Tensor | None, stream: Stream, context: ForwardContext) -> Tensor:
        """(B, T, A) -> (B, A): mean over the prompt, taken once and then kept with the cache."""
        state, key = self._state(stream, context)
        frozen = None if state is None else state.get(key)
        if frozen is not None:
            return frozen
        _refuse_packed(stream, "request")
        prompt = self._prompt(scores, mask, context)
        weight = prompt.to(scores.dtype).unsqueeze(-1)
        mean = (scores * weight).sum(1) / weight.sum(1).clamp_min(1)
        if state is not None:
            state[key] = mean
        return mean

    def _prompt(self, scores: Tensor, mask: Tensor | None, context: ForwardContext) -> Tensor:
        """(B, T) bool: the tokens of the request. All that an encoder of two stacks reads; else those of
        `prompt_mask`, else those before the first label, else all."""
        record, encoder = context.record, self.stack == "encoder"
        prompt = None if encoder else context.rows("prompt_mask", scores.shape[0])
        labels = None if encoder else record.inputs.get("labels")
        real = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device) if mask is None else mask
        if prompt is not None:
            if prompt.shape != real.shape:
                raise ValueError(
                    f"prompt_mask {tuple(prompt.shape)} does not fit the tokens of this forward {tuple(real.shape)}"
                )
            return prompt.to(real.device).bool() & real
        if labels is not None and labels.shape[:2] == real.shape:
            labelled = labels != -100
            prompt = (labelled.cumsum(1) == 0) & real
            if not torch.compiler.is_compiling() and bool((labelled.any(1) & ~prompt.any(1)).any()):
                raise ValueError(
                    "gate_granularity='request' needs a prompt in each row, but labels cover a row from its first "
                    "token: mask the prompt's labels with -100, or pass prompt_mask (B, T)"
                )
            return prompt
        if record.training and not encoder:
            raise ValueError(
                "gate_granularity='request' must know the prompt in training, or it would see the answer: pass "
                "prompt_mask (B, T), or labels with -100 on the prompt"
            )
        # Generation drops a mask that has no padding, but always brings a cache.
        if mask is None and scores.shape[0] > 1 and context.stream(self.stack).cache is None:
            raise _missing_mask("request")
        return real

    def _state(self, stream: Stream, context: ForwardContext) -> tuple[dict[str, Tensor] | None, str]:
        """Where this gate keeps what it must remember of earlier tokens, None where nothing comes after; and its key.

        Layers that share their weights share their gate, which then runs several times in a forward.
        """
        runs = context.record.shared
        runs[self.mark] = runs.get(self.mark, 0) + 1
        key = f"{self.path}/{self.mark}/{runs[self.mark]}"
        if context.record.training:
            if stream.cached:
                raise ValueError(
                    f"gate_granularity={self.granularity!r} cannot train on a sequence that a cache begins"
                )
            return None, key
        if stream.cache is None:
            return context.record.state, key
        state = gate_state(stream.cache)
        if key not in state and stream.cached:  # in this order: to look into a static cache breaks a compiled graph
            raise ValueError(
                f"the key-value cache holds tokens that the gate at {self.path!r} has not seen (gate_granularity="
                f"{self.granularity!r}): fill the cache by a forward of this model with these adapters active"
            )
        return state, key

    def _report(self, logits: Tensor, weights: Tensor, mask: Tensor | None, context: ForwardContext) -> None:
        record = context.record
        if record.own_rows is not None:  # what the other rows of a mixed batch would do is no concern of this gate
            mask = record.own_rows if mask is None else mask & record.own_rows
        if not (record.training and record.grad):  # evaluation, or a reference pass
            return
        if record.open:
            self.usage.add(weights, mask)
        for name, coef, loss in (
            ("balance", self.balance_coef, load_balance),
            ("entropy", self.entropy_coef, entropy),
        ):
            if coef:
                context.add_loss(name, loss(weights, mask), coef)
        if self.z_coef:
            context.add_loss("z", router_z(logits, mask), self.z_coef)

    # --- surgery ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_expert(self, name: str, share: float) -> None:
        """A new arm before the null arms, without changing the weights of the other experts. Call `number` next."""
        place = len(self.experts)
        self._insert_row(place, share)
        self.experts.insert(place, name)
        self.usage = GateUsage(self.arms).to(self.output.weight.device)

    def _insert_row(self, place: int, share: float) -> None:
        raise NotImplementedError

    def start_at(self, share: float) -> None:
        """Make `share` the weight of the one expert of a new gate."""
        raise NotImplementedError

    @torch.no_grad()
    def remove_expert(self, name: str, renormalize: bool) -> None:
        """Drop an arm: its mass goes to a null arm, or to the others where `renormalize`."""
        place = self.experts.index(name)
        weight, bias = self.output.weight, self.output.bias
        order = [i for i in range(weight.shape[0]) if i != place]
        if not renormalize and self.frozen_arm:
            order.insert(len(self.experts) - 1 + self.null_arms, place)
            self.null_arms += 1
        self._set_rows(weight[order], bias[order])
        self.experts.remove(name)
        self.usage = GateUsage(self.arms).to(self.output.weight.device)

    def _set_rows(self, weight: Tensor, bias: Tensor) -> None:
        trainable = self.output.weight.requires_grad
        output = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        output.weight.copy_(weight)
        output.bias.copy_(bias)
        self.output = output.requires_grad_(trainable)


@ROUTERS.register("softmax")
class SoftmaxGate(DomainGate):
    """Weights that sum to 1 over experts and the frozen arm."""

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _insert_row(self, place: int, share: float) -> None:
        # The new arm takes its mass from the frozen arm alone: exp(l) is split into share and 1 - share of it.
        weight, bias = self.output.weight, self.output.bias.clone()
        new_bias = bias[-1:] + torch.log(bias.new_tensor([share]))
        bias[-1] += torch.log1p(bias.new_tensor(-share))
        self._set_rows(
            torch.cat([weight[:place], weight[-1:], weight[place:]]), torch.cat([bias[:place], new_bias, bias[place:]])
        )

    @torch.no_grad()
    def start_at(self, share: float) -> None:
        self.output.bias.copy_(self.output.bias.new_tensor([share, 1 - share]).log())


@ROUTERS.register("sigmoid")
class SigmoidGate(DomainGate):
    """Each weight on its own, between 0 and 1 (the paper's formula). Without `convex` there is no frozen arm."""

    frozen_arm = False

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def _insert_row(self, place: int, share: float) -> None:
        weight, bias = self.output.weight, self.output.bias
        new_bias = torch.logit(bias.new_tensor([share]))
        self._set_rows(
            torch.cat([weight[:place], torch.zeros_like(weight[:1]), weight[place:]]),
            torch.cat([bias[:place], new_bias, bias[place:]]),
        )

    @torch.no_grad()
    def start_at(self, share: float) -> None:
        self.output.bias[0] = torch.logit(self.output.bias.new_tensor(share))


def _missing_mask(granularity: str) -> ValueError:
    return ValueError(
        f"gate_granularity={granularity!r} needs to know the padding of a batch: pass attention_mask (B, T); "
        "torch.ones_like(input_ids) where there is none"
    )


def _refuse_packed(stream: Stream, granularity: str) -> None:
    positions = stream.position_ids
    if positions is None or torch.compiler.is_compiling() or positions.dim() != 2 or positions.shape[1] < 2:
        return
    drops = positions[:, 1:] < positions[:, :-1]
    if stream.mask is not None and stream.mask.shape == positions.shape:
        drops = drops & stream.mask[:, 1:] & stream.mask[:, :-1]
    if bool(drops.any()):
        raise ValueError(
            f"position_ids restart inside a row: several documents are packed into it, and a gate per {granularity} "
            "would mix them; use gate_granularity='token' or 'causal_prefix', or do not pack"
        )


def _before_document(sums: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """The running sum at the end of the document before each token's own, 0 in the first: same shape as sums."""
    starts = (position_ids == 0).expand(sums.shape[0], -1)
    if mask is not None:
        starts = starts & mask
    position = torch.arange(sums.shape[1], device=sums.device)
    start = torch.where(starts, position, 0).cummax(1).values  # index of the document's first token
    padded = F.pad(sums, (0, 0, 1, 0))  # padded[:, t] is the sum before token t
    return padded.gather(1, start.unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
