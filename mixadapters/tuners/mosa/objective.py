"""Two draws that are to agree: both passes in one forward, on a batch that holds every row twice."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.hooks import names_of_arguments
from mixadapters.core.joining import predicts_next
from mixadapters.core.media import refuse_uneven
from mixadapters.core.sites import has_two_stacks
from mixadapters.core.streams import read_stream

if TYPE_CHECKING:
    from mixadapters.core.context import ForwardContext
    from mixadapters.core.layer import AdapterHost
    from mixadapters.tuners.mosa.config import MoSAConfig

# Outputs with a distribution in their last axis -> the labels that belong to it.
DISTRIBUTIONS = {"logits": "labels", "start_logits": "start_positions", "end_logits": "end_positions"}
# Labels that the losses of transformers and torch leave out; positions are clamped to the length, which is left out.
IGNORED = {"labels": -100, "shift_labels": -100, "start_positions": 2**31 - 1, "end_positions": 2**31 - 1}
# Fields of a config that say which label of an image (B, H, W) its loss leaves out.
DENSE_IGNORED = ("semantic_loss_ignore_index", "loss_ignore_index")
# Losses of transformers (`model.loss_type`) that compare sets or sequences, and leave no single label out.
NOT_BY_PLACE = re.compile(r"CTC|RNNT|TDT|TTS|Detection|(?<!Semantic)Segmentation")
NOT_PER_ROW = frozenset({"cache_position", "num_items_in_batch"})
REMEDY = "pass consistency=0 (and no aux_ce or deep_weight) to train on one pass"


class ConsistencyObjective:
    """L = L(z1) + aux_ce CE(z2) + consistency 1/2 [KL(sg p2 || p1) + KL(sg p1 || p2)] + deep_weight MSE(h1, h2).

    Rows are doubled side by side, the first of each pair for pass 1. The labels of pass 2 are those that a loss leaves
    out, so the model itself computes L(z1), whatever its loss is, and gradient accumulation counts labels as ever. The
    caller gets the rows of pass 1. Only in training forwards with gradients.

    Raises (in the forward):
        ValueError: labels that no loss can leave out, such as numbers to regress; an output without logits.
    """

    takes: tuple[str, ...] = ()
    in_eval = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = names_of_arguments(model)
        self.adapters: dict[str, tuple[AdapterHost, MoSAConfig]] = {}  # by name: a layer that holds it, its config

    def before(self, context: ForwardContext, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        record = context.record
        config = self._config(record.values.get("adapter_names"))
        if config is None:
            return args, kwargs
        positional = self.names[: len(args)]
        kwargs = dict(kwargs)
        inputs = {**dict(zip(positional, args, strict=False)), **kwargs}
        batch = read_stream(inputs).batch if inputs else next(a.shape[0] for a in args if isinstance(a, Tensor))
        remedy = f"give rows of as many, or {REMEDY}"
        refuse_uneven(inputs, context.placeholders, batch, "the consistency of MoSA", remedy)
        ignored = _ignored(self.model, inputs)
        if decoder_input := self._decoder_input(inputs):
            kwargs |= decoder_input
        record.passes, record.copies = 2, 2 * record.copies
        record.shared[self] = config, inputs, batch, ignored
        names = (*positional, *[""] * (len(args) - len(positional)))
        args = tuple(_doubled(name, value, batch, ignored) for name, value in zip(names, args, strict=True))
        kwargs = {name: _doubled(name, value, batch, ignored) for name, value in kwargs.items()}
        if config.deep_weight:
            kwargs["output_hidden_states"] = True
        return args, kwargs

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        if self not in context.record.shared:
            return output
        config, inputs, batch, ignored = context.record.shared.pop(self)
        if config.deep_weight:
            context.add_loss("deep_consistency", _deep_distance(context, output, config), config.deep_weight)
            if not inputs.get("output_hidden_states"):
                output["hidden_states"] = None
        found = {"logits": output} if isinstance(output, Tensor) else {n: _get(output, n) for n in DISTRIBUTIONS}
        found = {name: value for name, value in found.items() if value is not None}
        if not found:
            raise ValueError(f"{type(output).__name__} has no logits, whose consistency MoSA trains; {REMEDY}")
        labels = {**context.record.values, **inputs}
        shifted = labels.get("shift_labels")
        for name, logits in found.items():
            target = labels.get(DISTRIBUTIONS[name]) if shifted is None else shifted
            if logits.dim() == 4:
                pair = Pair.of_images(module, logits, target)
            else:
                left_out = ignored[DISTRIBUTIONS[name]]
                pair = Pair.of(context, logits, target, left_out, shift=shifted is None and predicts_next(module))
            if config.consistency:
                context.add_loss("consistency", pair.divergence(), config.consistency / len(found))
            if config.aux_ce:
                context.add_loss("aux_ce", pair.second_loss(), config.aux_ce / len(found))
        return _first_of_each_pair(output, 2 * batch)

    def _config(self, named: list[str] | None) -> MoSAConfig | None:
        """That of the adapter that trains in this forward on two passes, if any."""
        for name, (host, config) in self.adapters.items():
            used = name in host.adapters and (name in host.active_adapters if named is None else name in named)
            if not used or host.disable_adapters or not config.two_passes:
                continue
            if any(p.requires_grad for p in host.adapters[name].parameters()):
                return config
        return None

    def _decoder_input(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What an encoder-decoder model would make of the labels, which pass 2 does not have."""
        labels = inputs.get("labels")
        given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if labels is None or labels.dim() < 2 or given or not has_two_stacks(self.model):
            return {}
        return {"decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=labels)}


class Pair:
    """The logits of both passes at the same places, (..., C) each; what is to be predicted there, and where."""

    def __init__(
        self, first: Tensor, second: Tensor, target: Tensor | None, valid: Tensor | None, ignored: int = -100
    ) -> None:
        self.first, self.second, self.ignored = first.float(), second.float(), ignored
        # A model on several devices may give its logits elsewhere than it takes its inputs.
        self.target = None if target is None else target.to(first.device)
        self.valid = None if valid is None else valid.to(first.device)

    @classmethod
    def of(cls, context: ForwardContext, logits: Tensor, target: Tensor | None, ignored: int, *, shift: bool) -> Pair:
        """From logits (2B, ..., C); target (B, ...) or None. shift: a place predicts the next one's target."""
        if logits.shape[-1] < 2:
            raise ValueError(f"logits {tuple(logits.shape)} are no distribution over classes; {REMEDY}")
        first, second = logits[0::2], logits[1::2]
        if target is not None and target.shape == first.shape[:-1]:
            if shift and first.dim() == 3:
                first, second, target = first[:, :-1], second[:, :-1], target[:, 1:]
            return cls(first, second, target, target != ignored, ignored)
        mask = context.stream("decoder").mask
        mask = None if mask is None else mask[0::2]
        return cls(first, second, None, mask if mask is not None and mask.shape == first.shape[:-1] else None)

    @classmethod
    def of_images(cls, module: nn.Module, logits: Tensor, target: Tensor | None) -> Pair:
        """From logits (2B, C, h, w) of a model that labels images; target (B, H, W) or None.

        A place of the logits counts where one of the pixels that it stands for has a label.

        Raises:
            ValueError: a model whose ignore index is not known, and so what it predicts.
        """
        ignored = _dense_ignored(module)
        if ignored is None:
            raise ValueError(
                f"logits {tuple(logits.shape)} of {type(module).__name__}: which axis holds the classes, and which "
                f"label is left out, is not known (its config has none of {DENSE_IGNORED}); {REMEDY}"
            )
        if logits.shape[1] < 2:
            raise ValueError(f"logits {tuple(logits.shape)} are no distribution over classes; {REMEDY}")
        first, second = logits.movedim(1, -1)[0::2], logits.movedim(1, -1)[1::2]
        if target is None:
            return cls(first, second, None, None, ignored)
        labelled = (target != ignored).float().unsqueeze(1)
        valid = F.adaptive_max_pool2d(labelled, logits.shape[-2:]).squeeze(1) > 0
        return cls(first, second, target, valid, ignored)

    def divergence(self) -> Tensor:
        """1/2 [KL(sg p2 || p1) + KL(sg p1 || p2)], the mean over valid places, in fp32."""
        logs = self.first.log_softmax(-1), self.second.log_softmax(-1)
        (p, q), (fixed_p, fixed_q) = logs, (log.detach() for log in logs)
        both = fixed_q.exp() * (fixed_q - p) + fixed_p.exp() * (fixed_p - q)
        return _mean(both.sum(-1) / 2, self.valid)

    def second_loss(self) -> Tensor:
        """Cross-entropy of pass 2."""
        if self.target is None:
            raise ValueError("aux_ce > 0 needs labels of the shape of the logits in the batch; pass aux_ce=0")
        second, target = self.second, self.target.flatten()
        if self.target.shape != second.shape[:-1]:  # images: the model enlarges its logits likewise
            second = F.interpolate(second.movedim(-1, 1), self.target.shape[-2:], mode="bilinear").movedim(1, -1)
        # Question answering: positions past the end are left out.
        kept = (target >= 0) & (target < second.shape[-1]) & (target != self.ignored)
        losses = F.cross_entropy(second.flatten(0, -2), torch.where(kept, target, 0), reduction="none")
        return _mean(losses, kept)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    valid = valid.to(values.device)
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def _deep_distance(context: ForwardContext, output: Any, config: MoSAConfig) -> Tensor:
    """Mean over the first blocks, valid tokens and width of the squared distance between the passes."""
    states = _get(output, "hidden_states") or _get(output, "encoder_hidden_states")
    if not states or len(states) < 2:
        raise ValueError(
            f"deep_weight={config.deep_weight} needs a model that returns hidden_states; {type(output).__name__} has "
            "none, so pass deep_weight=0"
        )
    mask, distances = context.record.attention_mask, []
    for hidden in states[1 : 1 + config.deep_layers]:
        square = (hidden[0::2].float() - hidden[1::2].float()).square().mean(-1)
        fits = mask is not None and mask[0::2].shape == square.shape
        distances.append(_mean(square, mask[0::2] if fits and mask is not None else None))
    return torch.stack([distance.to(distances[0].device) for distance in distances]).mean()


def _dense_ignored(model: nn.Module) -> int | None:
    """Which label of an image (B, H, W) the model's own loss leaves out; None where its config does not say."""
    config = getattr(model, "config", None)
    return next((getattr(config, name) for name in DENSE_IGNORED if hasattr(config, name)), None)


def _ignored(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Name of labels -> the label that the model's own loss leaves out, for those of pass 2.

    Raises:
        ValueError: labels of which none is known that is left out, or no classes.
    """
    config, kind = getattr(model, "config", None), type(model).__name__
    problem = getattr(config, "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        raise ValueError(f"problem_type={problem!r}: logits are no distribution over classes; {REMEDY}")
    for name, value in inputs.items():
        known = name in IGNORED and isinstance(value, Tensor)
        if "label" in name and not known and not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(f"{name} of {kind}: no label of them is known that its loss leaves out; {REMEDY}")
    labels = inputs.get("labels")
    if labels is None:
        return IGNORED
    if NOT_BY_PLACE.search(getattr(model, "loss_type", None) or ""):
        raise ValueError(f"the loss of {kind} (loss_type={model.loss_type!r}) leaves no label out; {REMEDY}")
    if labels.dim() == 3:
        ignored = _dense_ignored(model)
        if ignored is None:
            raise ValueError(
                f"labels {tuple(labels.shape)} of {kind}: its config has none of {DENSE_IGNORED}, so it is not known "
                f"which label its loss leaves out; {REMEDY}"
            )
        return {**IGNORED, "labels": ignored}
    own = {n: v for n, v in vars(config).items() if n.endswith("ignore_index")} if config is not None else {}
    if other := {n: v for n, v in own.items() if n not in DENSE_IGNORED and v != IGNORED["labels"]}:
        raise ValueError(f"{kind} leaves out other labels than {IGNORED['labels']}: {other}; {REMEDY}")
    return IGNORED


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _doubled(name: str, value: Any, batch: int, ignored: dict[str, int]) -> Any:
    """`value` with every row of the batch twice in succession; labels of the second row are such as losses ignore."""
    if isinstance(value, dict):
        return type(value)(**{k: _doubled(k, v, batch, ignored) for k, v in value.items()})
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_doubled(name, v, batch, ignored) for v in value)
    if not isinstance(value, Tensor) or value.dim() == 0 or name in NOT_PER_ROW:
        return value
    if value.shape[0] != batch:
        if name in ignored or (value.is_floating_point() and value.shape[0] != 1):
            raise ValueError(f"{name} {tuple(value.shape)} does not hold one entry per row of {batch}; {REMEDY}")
        return value
    twice = value.repeat_interleave(2, dim=0)
    if name in ignored:
        if value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(f"{name} are {value.dtype}: no classes, whose consistency MoSA trains; {REMEDY}")
        twice[1::2] = ignored[name]
    return twice


def _first_of_each_pair(output: Any, rows: int) -> Any:
    """The rows of pass 1 of every tensor in `output` that has `rows` of them."""
    if isinstance(output, Tensor):
        return output[0::2] if output.dim() > 0 and output.shape[0] == rows else output
    if isinstance(output, dict):
        return type(output)(**{name: _first_of_each_pair(value, rows) for name, value in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(_first_of_each_pair(value, rows) for value in output)
    if hasattr(output, "batch_select_indices"):  # a key-value cache
        output.batch_select_indices(torch.arange(0, rows, 2))
    return output
