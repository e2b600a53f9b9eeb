"""The trunk that turns (guidance scale, timestep, condition) into features, and the adapters that read them."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.numbers import real_numbers, refuse_other_masks
from mixadapters.core.streams import Stream, repeat_rows
from mixadapters.tuners.agd.config import VARIED, AGDConfig

SCALE_PERIODS = (50.0, 0.25)  # of the waves that stand for a guidance scale: smooth over its whole range
TIMESTEP_PERIODS = (2 * math.pi * 1e4, 2 * math.pi)
WAVES = 32
PLACES = 3  # that a token may have, by `places`


class Features(NamedTuple):
    """What a forward is conditioned on, in fp32."""

    phi: Tensor | None  # (B,) what the outputs are multiplied by; None: 1
    summary: Tensor  # (B, r), for film as its blocks read it; (B, PLACES, r) where tokens differ by their `place`
    tokens: Tensor | None = None  # (B, S, r), for cross-attention
    mask: Tensor | None = None  # (B, S) bool, False at padding; None: no padding
    place: Tensor | None = None  # (B, T) of `places`


class Embedded(NamedTuple):
    """The conditions of one pass, as vectors of width r."""

    singles: list[Tensor]  # (B, r) each
    prompt: Tensor | None  # (B, S, r)
    mask: Tensor | None  # (B, S) bool, False at padding; None: no padding


class CastLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def waves(values: Tensor, periods: tuple[float, float]) -> Tensor:
    """values (B,) -> (B, 2 * WAVES) sines and cosines, with periods spaced evenly by their logarithm."""
    long, short = (math.log(p) for p in periods)
    steps = torch.linspace(long, short, WAVES, device=values.device)
    angles = 2 * math.pi * values.unsqueeze(1) / steps.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conditions(nn.Module):
    """Embeddings of what a pass is conditioned on: class, prompt and pooled text, as far as the config names them."""

    def add_embeddings(self, config: AGDConfig) -> None:
        conditions = config.conditions or {}
        self.classes = nn.Embedding(config.num_classes or 0, config.r) if "class" in conditions else None
        self.prompt = CastLinear(config.prompt_width or 0, config.r) if "prompt" in conditions else None
        self.pooled = CastLinear(config.pooled_width or 0, config.r) if "pooled" in conditions else None

    def embed(self, inputs: dict[str, Tensor]) -> Embedded:
        """inputs: class (B,), prompt (B, S, P), prompt_mask (B, S), pooled (B, P)."""
        singles, prompt, mask = [], None, None
        if self.classes is not None:
            singles.append(self.classes(inputs["class"].long()).float())
        if self.pooled is not None:
            singles.append(self.pooled(inputs["pooled"].float()))
        if self.prompt is not None:
            prompt, mask = self.prompt(inputs["prompt"].float()), inputs.get("prompt_mask")
        return Embedded(singles, prompt, None if mask is None else mask.bool())


class Trunk(Conditions):
    """Features of guidance scale, timestep and condition, in fp32: the sum of one embedding for each.

    A half-precision guidance scale, or features that are fast waves of it, would tell neighbouring scales apart as if
    they had nothing in common; these are slow, fixed, and computed in fp32.
    """

    def __init__(self, config: AGDConfig) -> None:
        super().__init__()
        conditions = config.conditions or {}
        self.timestep_scale = config.timestep_scale
        self.kind = config.kind
        self.gate = 2 / (config.max_scale - 1) if config.gate else None
        self.scale = self._mlp(config.r)
        self.timestep = self._mlp(config.r) if "timestep" in conditions else None
        self.add_embeddings(config)
        self.negative: Conditions | None = None
        if config.negative == "distil":
            self.negative = Conditions()
            self.negative.add_embeddings(config)
        self.place = nn.Embedding(PLACES, config.r) if config.after_prompt else None
        self.reads_prompt = bool(config.after_prompt)  # `generate` tells it

    @staticmethod
    def _mlp(width: int) -> nn.Sequential:
        return nn.Sequential(CastLinear(2 * WAVES, width), nn.SiLU(), CastLinear(width, width))

    @property
    def device(self) -> torch.device:
        return self.scale[0].weight.device

    def forward(self, scale: Tensor, inputs: dict[str, Tensor], negative: dict[str, Tensor] | None = None) -> Features:
        """scale: (B,). inputs: timestep (B,), and what `Conditions.embed` takes, as `negative` of the second pass."""
        phi = None if self.gate is None else (scale - 1) * self.gate
        singles = [self.scale(waves(scale, SCALE_PERIODS))]
        if self.timestep is not None:
            singles.append(self.timestep(waves(inputs["timestep"] * self.timestep_scale, TIMESTEP_PERIODS)))
        passes = [self.embed(inputs)]
        if self.negative is not None and negative is not None:
            passes.append(self.negative.embed(negative))
        singles += [single for one in passes for single in one.singles]
        if self.kind == "cross_attention":
            return Features(phi, singles[0], *_as_tokens(singles, passes))
        for prompt, mask in ((one.prompt, one.mask) for one in passes):
            if prompt is not None:
                real = torch.ones_like(prompt[..., :1]) if mask is None else mask.unsqueeze(-1).to(prompt.dtype)
                singles.append((prompt * real).sum(1) / real.sum(1).clamp_min(1))
        summary = torch.stack(singles).sum(0)
        if self.place is not None:
            summary = summary.unsqueeze(1) + self.place.weight.float()
        if self.kind == "film":  # here, since it is the same for every block
            summary = F.silu(F.layer_norm(summary, summary.shape[-1:]))
        return Features(phi, summary)


class GuidanceAdapter(Adapter):
    """y + phi(w) * g(x, features); a forward without a guidance scale leaves y as it is.

    The adapter at a model's first site owns the trunk, and runs it once per forward.
    """

    def __init__(self, site: Site, config: AGDConfig, first: GuidanceAdapter | None) -> None:
        super().__init__()
        self.__dict__["first"] = first or self  # no child: its parameters are the first one's
        self.path, self.stack = site.path, site.stack
        self.config = config
        if first is None:
            self.trunk = Trunk(config)

    def prepare(self, context: ForwardContext) -> None:
        if self.__dict__["first"] is not self:
            return
        record, config = context.record, self.config
        scale = record.values.get("guidance_scale", config.default_scale if config.default_scale != 1 else None)
        if scale is None:
            return
        stream = context.stream(self.stack)
        sample = next((v for v in record.inputs.values() if isinstance(v, Tensor)), None)
        if sample is None:
            raise ValueError(
                f"guidance_scale={scale} acts by what the model's forward is given, and {self.path!r} is called "
                "outside one: call the model, or end the block that holds guidance_scale"
            )
        device = self.trunk.device
        device = sample.device if device.type == "meta" else device  # weights that are loaded when used
        check_scale(scale, config)
        scale = _rows("guidance_scale", scale, stream.batch // stream.copies, device)
        scale = stream.spread(scale, stream.batch, "guidance_scale")
        inputs = self._conditions_in(record.inputs)
        if missing := [n for n in config.conditions or {} if n not in inputs and n != "prompt_mask"]:
            names = [(config.conditions or {})[n] for n in missing]
            raise ValueError(f"the forward has no {names}, which the adapters read as {missing}")
        negative = self._negative(inputs, record.values, stream)
        if "timestep" in inputs:
            inputs["timestep"] = _rows("timestep", inputs["timestep"], stream.batch, device, single=True)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        negative = negative and {name: value.to(device) for name, value in negative.items()}
        scale = _within(record.values.get("guidance_interval"), scale, inputs.get("timestep"))
        with torch.autocast(device.type, enabled=False):
            features = self.trunk(scale, inputs, negative)
        if config.after_prompt:
            features = features._replace(place=self._places(context).to(device))
        record.shared[self] = features

    def _places(self, context: ForwardContext) -> Tensor:
        """(B, T) of each token whether it follows the prompt, as `places` has it."""
        place: Tensor | None = context.token_field("prompt_mask", self.stack, places)
        if place is None:
            raise ValueError(
                "the adapters read which tokens follow the prompt (after_prompt): pass prompt_mask (B, T), 1 on the "
                "prompt; `generate` knows it"
            )
        return place

    def _conditions_in(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the adapters read, by its name, as far as it is among the arguments of a forward."""
        found = {name: _argument(arguments, path) for name, path in (self.config.conditions or {}).items()}
        return {name: value for name, value in found.items() if value is not None}

    def _negative(self, inputs: dict[str, Any], values: dict[str, Any], stream: Stream) -> dict[str, Any] | None:
        """The conditions of the second pass, (B, ...): `unconditional`, and for the rest those of the first."""
        if self.config.negative != "distil":
            return None
        given = values.get("unconditional")
        if not isinstance(given, dict) or not (own := self._conditions_in(given)).keys() & VARIED:
            names = [path for name, path in (self.config.conditions or {}).items() if name in VARIED]
            raise ValueError(
                "the adapters read what the second pass is conditioned on (negative='distil'): give `unconditional`, "
                f"a dict with one or several of {names} for it; in pipelines OnePass does"
            )
        for name, value in own.items():
            _check_like(name, value, inputs.get(name))
        if "prompt" in own:  # of a mask that is not given, the other prompt's is none
            inputs = {name: value for name, value in inputs.items() if name != "prompt_mask"}
        rows = {name: value for name, value in {**inputs, **own}.items() if name != "timestep"}
        return {name: _of_all_rows(value, stream, f"unconditional of {name}") for name, value in rows.items()}

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """x (B, ..., K), y (B, ..., M) -> (B, ..., M); B may be a multiple of the forward's batch."""
        features: Features | None = context.record.shared.get(self.__dict__["first"])
        if features is None:
            return y
        features = Features._make(None if f is None else _like(f, x, self.path) for f in features)
        delta = self.delta(x.to(y.dtype), features).to(y.dtype)
        if features.phi is None:
            return y + delta
        return torch.addcmul(y, features.phi.to(y.dtype).view(-1, *[1] * (y.dim() - 1)), delta)

    def delta(self, x: Tensor, features: Features) -> Tensor:
        """g: (B, ..., M), or with ones in place of the token axes."""
        raise NotImplementedError


class FilmAdapter(GuidanceAdapter):
    """up(SiLU((down x)(1 + gamma) + beta)), with gamma and beta made of the features."""

    def __init__(self, site: Site, config: AGDConfig, rank: int, first: GuidanceAdapter | None) -> None:
        super().__init__(site, config, first)
        self.down = CastLinear(site.in_features, rank)
        self.film = CastLinear(config.r, 2 * rank)
        self.up = CastLinear(rank, site.out_features)

    def delta(self, x: Tensor, features: Features) -> Tensor:
        film = self.film(features.summary)
        if features.place is None:
            film = _between(film, x)
        else:
            film = film.gather(1, features.place.unsqueeze(-1).expand(-1, -1, film.shape[-1]))
        gamma, beta = film.to(x.dtype).chunk(2, dim=-1)
        return self.up(F.silu(torch.addcmul(beta, self.down(x), 1 + gamma)))


class OffsetAdapter(GuidanceAdapter):
    """up(LN(ReLU(down features))): one vector for all tokens (the paper's offset adapter)."""

    def __init__(self, site: Site, config: AGDConfig, rank: int, first: GuidanceAdapter | None) -> None:
        super().__init__(site, config, first)
        self.down = CastLinear(config.r, rank)
        self.up = CastLinear(rank, site.out_features)

    def delta(self, x: Tensor, features: Features) -> Tensor:
        hidden = F.relu(self.down(features.summary))
        return _between(self.up(F.layer_norm(hidden, hidden.shape[-1:])), x)


class CrossAttentionAdapter(GuidanceAdapter):
    """Attention of one head from x to the conditions as tokens (the paper's other adapter, without its positions:
    the tokens of a prompt bring their own)."""

    def __init__(self, site: Site, config: AGDConfig, rank: int, first: GuidanceAdapter | None) -> None:
        super().__init__(site, config, first)
        self.query = CastLinear(site.in_features, rank, bias=False)
        self.key_value = CastLinear(config.r, 2 * rank, bias=False)
        self.up = CastLinear(rank, site.out_features)

    def delta(self, x: Tensor, features: Features) -> Tensor:
        tokens = features.tokens
        assert tokens is not None
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        query = self.query(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1))
        key, value = self.key_value(tokens).to(query.dtype).chunk(2, dim=-1)
        mask = None if features.mask is None else features.mask.unsqueeze(1)
        out = self.up(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        return out.view(*x.shape[:-1], out.shape[-1])


ADAPTERS: dict[str, Any] = {"film": FilmAdapter, "offset": OffsetAdapter, "cross_attention": CrossAttentionAdapter}


def _as_tokens(singles: list[Tensor], passes: list[Embedded]) -> tuple[Tensor, Tensor | None]:
    """singles (B, r) and the prompts of all passes -> tokens (B, S, r) and their mask (B, S), where there is one."""
    tokens = [torch.stack(singles, dim=1)] + [one.prompt for one in passes if one.prompt is not None]
    masks = [None] + [one.mask for one in passes if one.prompt is not None]
    if all(mask is None for mask in masks):
        return torch.cat(tokens, dim=1), None
    known = [
        torch.ones(part.shape[:2], dtype=torch.bool, device=part.device) if mask is None else mask
        for part, mask in zip(tokens, masks, strict=True)
    ]
    return torch.cat(tokens, dim=1), torch.cat(known, dim=1)


def places(prompt: Tensor) -> Tensor:
    """prompt (B, T), 1 on it -> 0 after the prompt, 1 in it, 2 on its last token.

    Raises:
        ValueError: other values than True and False, or 1 and 0.
    """
    refuse_other_masks("prompt_mask", prompt)
    prompt = prompt.long()
    return prompt + prompt * (1 - F.pad(prompt[:, 1:], (0, 1)))


def check_scale(scale: Any, config: AGDConfig) -> None:
    """Warn of a scale that was not trained; not of one on an accelerator, which would have to be waited for.

    Raises:
        ValueError: a scale that is no number, or not finite.
    """
    values = real_numbers("guidance_scale", scale)
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return
    trained = (values >= config.min_scale) & (values <= config.max_scale)
    if trained.all():
        return
    if not values.isfinite().all():
        raise ValueError(f"guidance_scale={scale} must be finite")
    if not (trained | (values == 1)).all():
        warnings.warn(
            f"guidance_scale={scale} lies outside the trained range [{config.min_scale}, {config.max_scale}]",
            stacklevel=2,
        )


def check_interval(name: str, interval: Any) -> tuple[Any, Any]:
    """The least and the largest timestep at which to guide. Raises ValueError where it is no such pair."""
    ends = tuple(interval) if isinstance(interval, (list, tuple, Tensor)) else ()
    if len(ends) != 2 or not all(isinstance(e, (int, float, Tensor)) and not isinstance(e, bool) for e in ends):
        raise ValueError(f"{name}={interval!r} must be two numbers, the least timestep to be guided and the largest")
    return ends


def _within(interval: Any, scale: Tensor, timestep: Tensor | None) -> Tensor:
    """scale (B,), and 1 in rows whose timestep (B,) lies outside the interval, where there is one."""
    if interval is None:
        return scale
    if timestep is None:
        raise ValueError(f"guidance_interval={interval} needs adapters that read the timestep")
    low, high = check_interval("guidance_interval", interval)
    return torch.where((timestep >= low) & (timestep <= high), scale, 1.0)


def _rows(name: str, value: Any, batch: int, device: torch.device, *, single: bool = False) -> Tensor:
    """A number or (B,) tensor -> (B,) fp32. single: (1,) counts as a number."""
    rows = real_numbers(name, value, device)
    if rows.dim() == 0 or (single and rows.numel() == 1):
        return rows.reshape(()).expand(batch)
    if rows.shape != (batch,):
        raise ValueError(
            f"{name} of shape {tuple(rows.shape)} does not fit a batch of {batch}: give a number or one for each row"
        )
    return rows


def _argument(inputs: dict[str, Any], path: str) -> Any:
    """The argument at a path such as "added_cond_kwargs.text_embeds"; None where it is not given."""
    found: Any = inputs
    for part in path.split("."):
        found = None if found is None else found.get(part)
    return found


def _check_like(name: str, value: Any, first: Tensor | None) -> None:
    """ValueError where a condition of the second pass is nothing like that of the first, (B, ...)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"unconditional of {name}={value!r} is no tensor")
    if first is None:
        return
    if value.dim() != first.dim() or (name in ("prompt", "pooled") and value.shape[-1] != first.shape[-1]):
        raise ValueError(
            f"unconditional of {name} has the shape {tuple(value.shape)}, and that of the first pass "
            f"{tuple(first.shape)}; they differ in rows, and prompts in their length"
        )


def _of_all_rows(value: Tensor, stream: Stream, name: str) -> Tensor:
    """value (1, ...), of each row of the caller's batch, or of this forward's -> (B, ...)."""
    if value.shape[0] == stream.batch:
        return value
    if value.shape[0] == 1:
        return value.expand(stream.batch, *value.shape[1:])
    return stream.spread(value, stream.batch, name)


def _like(feature: Tensor, x: Tensor, path: str) -> Tensor:
    """feature (B, ...) on the device of x and with as many rows."""
    feature = feature.to(x.device)
    return feature if feature.shape[0] == x.shape[0] else repeat_rows(feature, x.shape[0], f"features at {path}")


def _between(rows: Tensor, x: Tensor) -> Tensor:
    """rows (B, d) -> (B, 1, ..., d), to meet x (B, ..., K)."""
    return rows.view(rows.shape[0], *[1] * (x.dim() - 2), rows.shape[-1])
