"""A mixture of experts into one adapter: once for good, or anew for each domain from a few unlabelled texts.

Source: Zhong et al. 2022, Meta-DMoE (arXiv 2210.03885). Experts are frozen; an aggregator makes one target of their
features, and the student takes a few steps towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer, check_kind, check_number, one_of
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.routing import RoutingKey

Batch = dict[str, Any]  # arguments of a model
Features = Callable[[nn.Module, Batch], Tensor]  # -> (R, d), of the same rows for teacher and student
AGGREGATORS = ("mean", "router", "transformer")


def token_states(model: Any, batch: Batch) -> Tensor:
    """(R, d) last hidden states of the R real tokens of a batch: what the head reads."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    states = model(**given, output_hidden_states=True).hidden_states[-1]
    mask = batch.get("attention_mask")
    return states.flatten(0, 1) if mask is None else states[mask.bool()]


def text_states(model: Any, batch: Batch) -> Tensor:
    """(B, d) mean of the last hidden states of each text's real tokens."""
    rows, mask = token_states(model, batch), batch.get("attention_mask")
    if mask is None:
        return rows.unflatten(0, (len(batch["input_ids"]), -1)).mean(1)
    return torch.stack([part.mean(0) for part in rows.split(mask.sum(1).tolist())])


class MixtureTeacher:
    """The experts of a mixture, each alone and all as its router has them. Frozen: nothing has a gradient.

    Args:
        model: a PeftModel whose active adapter is a mixture.
        features: what is taken of a forward.

    Raises:
        ValueError: the model has no mixture whose experts could be chosen.
    """

    def __init__(self, model: nn.Module, features: Features = token_states) -> None:
        check_kind("model", model, nn.Module, "a PeftModel with MoA or MixDA")
        tuner = next((module for module in model.modules() if isinstance(module, MixtureModel)), None)
        if tuner is None or not _active(tuner):
            raise ValueError(f"{type(model).__name__} has no mixture: pass a PeftModel with MoA or MixDA")
        self.model, self.features, self.tuner = model, features, tuner
        experts = (name for mixture in _active(tuner).values() for name in mixture.expert_names)
        self.names = list(dict.fromkeys(experts))

    @torch.no_grad()
    def routed(self, batch: Batch) -> Tensor:
        """(R, d) features of the mixture as it is."""
        with in_evaluation(self.model):
            return self.features(self.model, batch)

    @torch.no_grad()
    def experts(self, batch: Batch) -> Tensor:
        """(R, N, d) features of each expert alone, with weight 1 in every layer that has it."""
        return torch.stack([self._alone(name, batch) for name in self.names], 1)

    def _alone(self, name: str, batch: Batch) -> Tensor:
        rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        pins = {}
        for key, mixture in _active(self.tuner).items():
            names = mixture.expert_names
            pins[key] = torch.full((rows,), names.index(name) if name in names else -1)
        with in_evaluation(self.model), self.tuner.pin_routes(pins):
            return self.features(self.model, batch)


def _active(tuner: MixtureModel) -> dict[RoutingKey, Mixture]:
    return {key: mixture for key, mixture in tuner.mixtures().items() if key.adapter in tuner.active_adapters}


class MeanAggregator(nn.Module):
    """The mean of the experts' features."""

    def forward(self, features: Tensor, left_out: int | None = None) -> Tensor:
        """features (R, N, d) -> (R, d). left_out: an expert that does not count."""
        kept = [n for n in range(features.shape[1]) if n != left_out]
        return features[:, kept].mean(1)


class TransformerAggregator(nn.Module):
    """One transformer layer over the experts' features, then their mean. It learns in `MixtureDistiller.meta_fit`.

    Args:
        width: d.
        heads: attention heads, which divide it.

    Raises:
        ValueError: they do not.
    """

    def __init__(self, width: int, heads: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide the width of the features, {width}")
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True, norm_first=True)

    def forward(self, features: Tensor, left_out: int | None = None) -> Tensor:
        """As `MeanAggregator`."""
        kept = [n for n in range(features.shape[1]) if n != left_out]
        return self.layer(features[:, kept]).mean(1)


class Episode(NamedTuple):
    """What one domain has for a step of `meta_fit`."""

    support: Batch  # without labels
    query: Batch  # with labels
    expert: int | None = None  # the domain's own expert, which is left out: at test time there is none


class MixtureDistiller:
    """Adapts a student to a domain by a few steps towards what the experts of a mixture make of unlabelled text.

    theta' = theta - inner_lr * grad of |f_theta(x) - t|^2, `steps` times from the student's own weights, which stay as
    they are: each call of `adapt` begins anew. Dropout is off.

    Args:
        teacher: a `MixtureTeacher`, or what has its `experts` and `routed`.
        student: a model whose parameters that require a gradient, such as those of one adapter, adapt.
        aggregator: what makes the target t of the experts' features: "mean", "router" (the mixture as it is),
            "transformer", or a module as `MeanAggregator`.
        inner_lr, steps: as above.
        features: of the student; those of the teacher must have the same rows.
        heads: of "transformer".

    Raises:
        ValueError: a number out of range, an unknown aggregator, or a student without anything to train.
    """

    def __init__(
        self, teacher: Any, student: nn.Module, aggregator: str | nn.Module = "mean", *, inner_lr: float = 3e-4,
        steps: int = 1, features: Features = token_states, heads: int = 16,
    ) -> None:  # fmt: skip
        if not isinstance(aggregator, nn.Module):
            one_of("aggregator", aggregator, AGGREGATORS)
        if not hasattr(teacher, "routed" if aggregator == "router" else "experts"):
            raise ValueError(
                f"teacher={type(teacher).__name__} says nothing of experts: give MixtureTeacher(model), or what has "
                "its methods"
            )
        check_kind("student", student, nn.Module, "a model")
        check_integer("heads", heads, least=1)
        check_number("inner_lr", inner_lr, above=0)
        check_integer("steps", steps, least=0)
        self.teacher, self.student, self.features = teacher, student, features
        self.inner_lr, self.steps, self.heads = inner_lr, steps, heads
        self.routed = aggregator == "router"
        self.aggregator: nn.Module | None = aggregator if isinstance(aggregator, nn.Module) else None
        if aggregator == "mean":
            self.aggregator = MeanAggregator()
        self.own_parameters()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What adapts. Raises ValueError where the student has nothing to train."""
        found = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError("no parameter of the student requires a gradient: set its stage, or load it is_trainable")
        return found

    def target(self, batch: Batch, left_out: int | None = None, training: bool = False) -> Tensor:
        """(R, d) what the student is to make of a batch.

        left_out: an expert that does not count. training: the aggregator's dropout is on.
        """
        if self.routed:
            if left_out is not None:
                raise ValueError("aggregator='router' takes the mixture as it is: no expert can be left out")
            return self.teacher.routed(batch)
        features = self.teacher.experts(batch)
        if features.shape[1] == 1 and left_out is not None:
            raise ValueError("the only expert is the domain's own, so nothing would be left to learn from")
        if self.aggregator is None:  # its width is that of the features
            self.aggregator = TransformerAggregator(features.shape[-1], self.heads).to(features)
        with nullcontext() if training else in_evaluation(self.aggregator):
            return self.aggregator(features, left_out)

    def adapt(self, batch: Batch, *, left_out: int | None = None, create_graph: bool = False) -> dict[str, Tensor]:
        """The student's parameters for the domain of an unlabelled batch, by name.

        create_graph: keep how they depend on the student's own parameters and the aggregator's, as `meta_fit` needs.
        """
        parameters: dict[str, Tensor] = dict(self.own_parameters())
        with torch.enable_grad(), in_evaluation(self.student), _differentiable(create_graph):
            target = self.target(batch, left_out, training=create_graph)
            for _ in range(self.steps):
                made = self._call(parameters, lambda model: self.features(model, batch))
                loss = (made - (target if create_graph else target.detach())).square().mean()
                slopes = torch.autograd.grad(
                    loss, list(parameters.values()), create_graph=create_graph, allow_unused=True
                )
                parameters = {
                    name: p if slope is None else p - self.inner_lr * slope
                    for (name, p), slope in zip(parameters.items(), slopes, strict=True)
                }
                if not create_graph:
                    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        return parameters if create_graph else {name: p.detach() for name, p in parameters.items()}

    def predict(self, batch: Batch, parameters: dict[str, Tensor]) -> Any:
        """The student's output with parameters that `adapt` has returned."""
        with in_evaluation(self.student):
            return self._call(parameters, lambda model: model(**batch))

    def _call(self, parameters: dict[str, Tensor], run: Callable[[nn.Module], Any]) -> Any:
        """What `run` makes of the student with other parameters; it keeps its own."""
        return functional_call(_Run(self.student, run), {f"model.{name}": p for name, p in parameters.items()}, ())

    @contextmanager
    def adapted(self, batch: Batch) -> Iterator[nn.Module]:
        """The student itself, adapted inside the block: for `generate`, and whatever calls it. Afterwards it is as
        before, to the last bit."""
        own = self.own_parameters()
        before = {name: p.detach().clone() for name, p in own.items()}
        new = self.adapt(batch)
        try:
            _write(own, new)
            yield self.student
        finally:
            _write(own, before)

    def meta_fit(
        self, episodes: Iterable[Episode], *, lr: float = 3e-5, aggregator_lr: float | None = None
    ) -> list[float]:
        """Train student and aggregator so that a student that has adapted to a domain does well there.

        Args:
            episodes: one step each; `query` has labels, and the student's output a loss.
            lr: of Adam, for the student. aggregator_lr: for the aggregator; None: as `lr`.

        Returns:
            The loss of each episode.
        """
        check_number("lr", lr, above=0)
        if aggregator_lr is not None:
            check_number("aggregator_lr", aggregator_lr, above=0)
        losses: list[float] = []
        optimizer: torch.optim.Optimizer | None = None
        for episode in episodes:
            with _differentiable(True):
                parameters = self.adapt(episode.support, left_out=episode.expert, create_graph=True)
                loss = self.predict(episode.query, parameters).loss
                if optimizer is None:  # the aggregator may have been made just now
                    groups = [{"params": list(self.own_parameters().values()), "lr": lr}]
                    learned = [] if self.aggregator is None else list(self.aggregator.parameters())
                    groups += [{"params": learned, "lr": lr if aggregator_lr is None else aggregator_lr}]
                    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses


def distil_mixture(
    teacher: Any,
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    aggregator: str | nn.Module = "router",
    lr: float = 1e-3,
    features: Features = token_states,
    heads: int = 16,
) -> list[float]:
    """Train one adapter to say what a mixture says: |f_student(x) - t|^2 on unlabelled batches, by AdamW.

    Args:
        teacher, aggregator, features, heads: as in `MixtureDistiller`. A new "transformer" has learned nothing: pass
            the `aggregator` of a distiller after `meta_fit`.
        student: what trains of it is what requires a gradient; with dropout, if it is in training.
        batches: one step each.

    Returns:
        The loss of each step: the mean squared error of the features.

    Raises:
        ValueError: as `MixtureDistiller`; or aggregator="transformer".
    """
    if aggregator == "transformer":
        raise ValueError(
            "aggregator='transformer' would be a new one, which has learned nothing: pass the aggregator of a "
            "MixtureDistiller after meta_fit, or 'mean' or 'router'"
        )
    distiller = MixtureDistiller(teacher, student, aggregator, features=features, heads=heads)
    check_number("lr", lr, above=0)
    check_kind("batches", batches, Iterable, "a list, or another iterable, of batches")
    optimizer = torch.optim.AdamW(distiller.own_parameters().values(), lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        check_kind("batch", batch, Mapping, "the arguments of a forward by name")
        with torch.no_grad():
            target = distiller.target(batch)
        loss = (features(student, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


class _Run(nn.Module):
    """What a function makes of a model, as a module: parameters of the model can be given for one call."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Any:
        return self.run(self.model)


@torch.no_grad()
def _write(own: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in own.items():
        parameter.copy_(values[name])


@contextmanager
def _differentiable(twice: bool) -> Iterator[None]:
    """With attention that can be differentiated twice, if it is to be."""
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
        yield
