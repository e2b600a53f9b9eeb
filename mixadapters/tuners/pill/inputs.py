"""What images and sounds for models of text have in common: placeholders, a frozen encoder, and a projector."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixadapters.core.fields import LARGEST, check_integer
from mixadapters.core.files import being_loaded
from mixadapters.routers.modality import TOKEN_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EncodedInputs(nn.Module):
    """Puts what a frozen encoder makes of a medium in the place of placeholder tokens.

    A model may have one for each medium. The first that is attached has the hook on the model's forward, which serves
    all of them.

    Args:
        model: takes embeddings (B, T, d).
        encoder: frozen; moves with the model, and is not among the model's weights.
        width: of what `states` gives.
        tokens: how many placeholders stand for an image or a clip.
        token_id: the placeholder. None: the first id behind the model's vocabulary that no other medium has, so that
            no table has to grow.
        projector: (..., width) -> (..., d). None: a linear map without bias.
    """

    attribute: ClassVar[str]  # of the model that takes them
    modality: ClassVar[str]  # one of TOKEN_TYPES
    medium: ClassVar[str]  # many of them, in messages
    takes: ClassVar[tuple[str, ...]]  # arguments of the model's forward; the first is needed where there are any
    token_id: int

    def __init__(
        self, model: PreTrainedModel, encoder: PreTrainedModel, *, width: int, tokens: int, token_id: int | None,
        projector: nn.Module | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if token_id is not None:
            check_integer("token_id", token_id, least=0, most=LARGEST)
        table = model.get_input_embeddings()
        taken = {front.token_id for front in front_ends(model)}
        if token_id in taken:
            raise ValueError(f"token_id={token_id} stands for another medium already; {sorted(taken)} are taken")
        if token_id is None:
            token_id = next(i for i in range(table.num_embeddings, LARGEST) if i not in taken)
        self.token_id = token_id
        self.tokens, self.width = tokens, width
        self.__dict__["model"] = model  # not a child: it is the parent
        self.__dict__["encoder"] = encoder.requires_grad_(False).eval()
        if projector is None:
            weight = table.weight
            projector = nn.Linear(
                width, table.embedding_dim, bias=False, device=weight.device,
                dtype=weight.dtype if weight.is_floating_point() else None,
            )  # fmt: skip
            nn.init.normal_(projector.weight, std=0.02)
        self.projector = projector

    @classmethod
    def attach(cls, model: PreTrainedModel, encoder: PreTrainedModel, **options: Any) -> Any:
        """Make `model` take such inputs; see the class. Raises ValueError where it does already, or has adapters."""
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has adapters already, whose config knows neither the tokens of {cls.medium} "
                f"nor the projector; attach {cls.__name__} to the base model, before get_peft_model"
            )
        if hasattr(model, cls.attribute):
            raise ValueError(f"{type(model).__name__} has a module {cls.attribute!r} already")
        front, first = cls(model, encoder, **options), not front_ends(model)
        model.add_module(cls.attribute, front)
        if first:
            model.register_forward_pre_hook(front.before, with_kwargs=True)
        return front

    @property
    def token_ids(self) -> dict[str, list[int]]:
        """For configs: the tokens that stand for this modality."""
        return {self.modality: [self.token_id]}

    def facts(self) -> dict[str, int]:
        """What gives its tokens their meaning beside encoder and projector: a config holds it, and it is compared."""
        return {"tokens": self.tokens}

    def _apply(self, fn: Any, recurse: bool = True) -> EncodedInputs:
        self.encoder._apply(fn)
        return super()._apply(fn, recurse)

    def states(self, *given: Any) -> Tensor:
        """What `takes` names, as the forward gets it -> (I, tokens, width)."""
        raise NotImplementedError

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        fronts = front_ends(module)
        given = {name: kwargs.pop(name, None) for front in fronts for name in front.takes}
        ids, names = kwargs.get("input_ids"), [name for name, value in given.items() if value is not None]
        if ids is None:
            if names:
                raise ValueError(
                    f"{' and '.join(names)} need input_ids, whose placeholders say where the "
                    f"{' and '.join(front.medium for front in fronts)} go"
                )
        elif names or (self.training and torch.is_grad_enabled()) or any(f.places(ids).any() for f in fronts):
            kwargs |= {"input_ids": None, "inputs_embeds": embed(module, ids, given)}
        return (), kwargs

    def places(self, ids: Tensor) -> Tensor:
        return ids == self.token_id

    def embed(self, input_ids: Tensor, *given: Any) -> Tensor:
        """input_ids (B, T) and what `takes` names -> embeddings (B, T, d); see `fill`."""
        return embed(self.model, input_ids, dict(zip(self.takes, given, strict=False)))

    def fill(self, embeddings: Tensor, input_ids: Tensor, given: dict[str, Any]) -> Tensor:
        """embeddings (B, T, d) with what the encoder makes of `given` at the placeholders, in their order.

        Raises:
            ValueError: there are more or fewer placeholders than tokens of the inputs, or a row ends inside one; a
                part of `given` without what it belongs to.
        """
        main, *more = (given.get(name) for name in self.takes)
        like, places = next(self.projector.parameters()), self.places(input_ids)
        if main is not None:
            if not main.is_floating_point():
                raise ValueError(
                    f"{self.takes[0]} are {main.dtype}, not what the encoder reads; give what its own processor makes "
                    f"of the {self.medium}"
                )
            states = self.states(main, *more).to(like.dtype)
        elif any(value is not None for value in more):
            raise ValueError(f"{', '.join(self.takes[1:])} is given without {self.takes[0]}, which it belongs to")
        else:
            states = like.new_zeros(0, self.tokens, self.width)
        per_row = places.sum(1)
        if (per_row % self.tokens).any() or int(per_row.sum()) != states.shape[0] * self.tokens:
            raise ValueError(
                f"rows with {per_row.tolist()} placeholders (token {self.token_id}) do not fit {states.shape[0]} "
                f"{self.medium} of {self.tokens} tokens each"
            )
        tokens = self.projector(states).flatten(0, 1).to(embeddings.dtype)
        return embeddings.index_put(places.nonzero(as_tuple=True), tokens)

    @torch.no_grad()
    def inputs(self, input_ids: Tensor, *given: Any, **others: Any) -> dict[str, Any]:
        """The arguments of `generate` for such a batch, with the inputs of all media of the model: it takes embeddings
        and what each token is, but no images or sounds."""
        fronts = front_ends(self.model)
        named = dict(zip(self.takes, given, strict=False))
        named |= {name: others.pop(name) for front in fronts for name in front.takes if name in others}
        types = torch.zeros_like(input_ids)
        for front in fronts:
            types = types.masked_fill(front.places(input_ids), TOKEN_TYPES.index(front.modality))
        return {**others, "inputs_embeds": embed(self.model, input_ids, named), "mm_token_type_ids": types}


def front_ends(model: nn.Module) -> list[EncodedInputs]:
    """Those of a model, in the order in which they were attached."""
    return [child for child in model.children() if isinstance(child, EncodedInputs)]


def embed(model: Any, input_ids: Tensor, given: dict[str, Any]) -> Tensor:
    """input_ids (B, T) -> embeddings (B, T, d), with `given`, by argument, at the placeholders; see `fill`."""
    fronts = front_ends(model)
    tokens = input_ids
    for front in fronts:
        tokens = tokens.masked_fill(front.places(input_ids), 0)  # which may lie behind the table
    embeddings = model.get_input_embeddings()(tokens)
    for front in fronts:
        embeddings = front.fill(embeddings, input_ids, given)
    return embeddings


def check_token_ids(token_ids: dict[str, list[int]]) -> None:
    """Raises ValueError unless each modality has tokens, and no token has two modalities."""
    modality_of: dict[int, str] = {}
    for modality, tokens in token_ids.items():
        if not tokens:
            raise ValueError(f"token_ids={token_ids} has no token for {modality!r}; name one, or leave it out")
        for token in tokens:
            if token < 0:
                raise ValueError(f"token_ids={token_ids}: {token} is no token id, an integer from 0")
            if token in modality_of:
                raise ValueError(
                    f"token_ids={token_ids}: token {token} stands for {modality_of[token]!r} and for {modality!r}; "
                    "name each token once"
                )
            modality_of[token] = modality


def check_front_ends(model: nn.Module, config: Any) -> None:
    """Note in a new config how images and sounds come into the model; refuse a model in which they come in otherwise.

    What the model has no way in for is not asked for: text needs none.

    Raises:
        ValueError: they stand at a token that the config does not name, and would count as text; or they are not read
            as they were when an adapter that is being loaded was saved.
    """
    fronts, token_ids = front_ends(model), config.token_ids or {}
    for front in fronts:
        named = token_ids.get(front.modality)
        if named and front.token_id not in named:
            raise ValueError(
                f"{type(front).__name__} puts {front.medium} at token {front.token_id}, and token_ids={token_ids} "
                f"names {named}: attach it with token_id={named[0]}, or name its own (token_ids)"
            )
    if being_loaded() is None:
        config.front_ends = {front.modality: front.facts() for front in fronts} or None
    for front in fronts:
        wanted = (config.front_ends or {}).get(front.modality, front.facts())
        if wanted != front.facts():
            raise ValueError(
                f"the adapter was trained with {front.medium} of {_words(wanted)}, and here {type(front).__name__} "
                f"has {_words(front.facts())}: attach it to the base model as it was then (tokens are grid x grid of "
                "images), before the adapter is loaded"
            )


def _words(facts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(facts.items()))


def warn_of_projector(model: nn.Module, saved_whole: Iterable[str]) -> None:
    """Warn where images or sounds have a way in that the adapter neither trains nor saves."""
    if front_ends(model) and not any("projector".endswith(module.rpartition(".")[2]) for module in saved_whole):
        warnings.warn(
            "the projector of images or sounds, which is drawn at random where it is attached, is neither trained nor "
            "saved with this adapter: pass modules_to_save=['projector'], unless it has been trained before",
            stacklevel=2,
        )


def refuse_lack_of_projector(
    model: nn.Module, names: list[str], saved_whole: Iterable[str], token_ids: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a config whose projector the model lacks, as it does where its images or sounds have no way in. Warn of a
    new one that leaves the projector which is there as it is.

    names: of all modules of the model.
    """
    if being_loaded() is None:
        warn_of_projector(model, saved_whole)
    lacking = sorted(module for module in saved_whole if not any(name.endswith(module) for name in names))
    if lacking and not front_ends(model):
        given = f", token_id={ids[0]}" if (ids := [token for tokens in token_ids.values() for token in tokens]) else ""
        raise ValueError(
            f"modules_to_save={sorted(saved_whole)}: {type(model).__name__} has no module {lacking[0]!r}, such as the "
            "projector of images or sounds. Give the base model what the adapter was trained with before it is put "
            f"in: ImageInputs.attach(model, encoder{given}), or AudioInputs"
        )
