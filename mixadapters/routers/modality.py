"""Hard routing by modality: what each token is, as the batch says it, and the experts of each kind of token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.numbers import whole_numbers
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import Routing
from mixadapters.routers.base import LOSS_OPTIONS, ROUTERS, Router

TOKEN_TYPES = ("text", "image", "video", "audio")  # what transformers' processors number in `mm_token_type_ids`
UNKNOWN = -2


@dataclass(frozen=True)
class Modalities:
    """The modalities of a model by number, 0 being text, and what says which a token has.

    In this order: the batch field `modality_ids` (B, T), with -1 for tokens that use no expert; `mm_token_type_ids`
    (B, T) of transformers' processors; the token ids themselves.

    Args:
        names: of the modalities, in the order of their numbers.
        tokens: (token id, modality) pairs, or None: token ids say nothing.
    """

    names: tuple[str, ...]
    tokens: tuple[tuple[int, str], ...] | None = None

    def ids(self, context: ForwardContext) -> Tensor:
        """(B, T) number of the modality of each token of this forward, -1 for none.

        Rows of a mixed batch that name other adapters may hold what this one does not know: they are -1.

        Raises:
            ValueError: nothing says what the tokens are, or they are of a modality that is not among `names`.
        """
        shared = context.record.shared
        if self not in shared:
            found = self._given(context)
            if torch.compiler.is_compiling():
                return found
            wrong = None
            if found.numel() and not -1 <= int(found.min()) <= int(found.max()) < len(self.names):
                wrong = (found < -1) | (found >= len(self.names))
                found = found.masked_fill(wrong, -1)
            shared[self] = found, wrong
        found, wrong = shared[self]
        if wrong is not None:
            own = context.record.own_rows
            mine = wrong if own is None else wrong & own.view(wrong.shape).to(wrong.device)
            if bool(mine.any()):
                raise self._unknown(context, mine)
        return found

    def _unknown(self, context: ForwardContext, wrong: Tensor) -> ValueError:
        """An error that says what the tokens are of whose modality the config knows nothing. wrong (B, T) bool."""
        for field, called in (("modality_ids", ()), ("mm_token_type_ids", TOKEN_TYPES), ("input_ids", None)):
            codes = context.record.inputs.get(field) if called is None else context.token_field(field)
            if codes is not None:
                break
        assert codes is not None
        found = codes.to(wrong.device)[wrong].unique().tolist()
        names = dict(enumerate(called)) if called is not None else dict(self.tokens or ())
        said = sorted({names[int(code)] for code in found if int(code) in names})
        kinds = f" ({', '.join(said)})" if said else ""
        return ValueError(
            f"the batch has tokens with {field}={found}{kinds}, which are not among "
            f"modalities={dict(enumerate(self.names))}: add the modality to the config, or leave such tokens out"
        )

    def _given(self, context: ForwardContext) -> Tensor:
        given = context.token_field("modality_ids")
        if given is not None:
            return whole_numbers("modality_ids", given).long()
        types = context.token_field("mm_token_type_ids")
        if types is not None:
            return self._numbered(whole_numbers("mm_token_type_ids", types), enumerate(TOKEN_TYPES), missing=UNKNOWN)
        tokens = context.record.inputs.get("input_ids")
        if self.tokens is None or tokens is None:
            reason = "token_ids is not set" if self.tokens is None else "there are no input_ids"
            raise ValueError(
                f"nothing says which tokens are {' or '.join(self.names)}: the batch has neither modality_ids nor "
                f"mm_token_type_ids, and {reason}; pass modality_ids (B, T) with 0 for text"
            )
        return self._numbered(tokens, self.tokens, missing=0)

    def _numbered(self, codes: Tensor, table: Sequence[tuple[int, str]] | enumerate[str], missing: int) -> Tensor:
        """codes (B, T) -> the number of the modality that `table` gives to each code; `missing` where it has none."""
        ids = torch.full_like(codes, missing, dtype=torch.long)
        for code, name in table:
            ids = ids.masked_fill(codes == code, self.names.index(name) if name in self.names else UNKNOWN)
        return ids


@ROUTERS.register("modality")
class ModalityRouter(Router):
    """Each token to the expert of its modality; tokens of a modality without expert, and of none, to no expert.

    Args:
        experts: names of modalities, those that have an expert.
        modalities: all of them, and what says which a token has. None: those of the experts, said by the batch.
    """

    fields = ("modality_ids", "mm_token_type_ids")
    without = LOSS_OPTIONS
    by_text = True

    def __init__(self, in_features: int, experts: list[str], modalities: Modalities | None = None) -> None:
        super().__init__(in_features, experts)
        self.modalities = Modalities(tuple(experts)) if modalities is None else modalities
        if unknown := [name for name in experts if name not in self.modalities.names]:
            raise ValueError(f"experts={unknown} are no modalities of {list(self.modalities.names)}")
        numbers = [self.modalities.names.index(name) for name in experts]
        self.routes = HardRoutes("modality_ids", numbers, len(self.modalities.names))

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        return self.routes.of(self.modalities.ids(context))
