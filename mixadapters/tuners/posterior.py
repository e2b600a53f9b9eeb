"""Weighing the experts of an adapter as whole models, in the forwards of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mixadapters.core.context import ROUTES
from mixadapters.core.inspection import RoutingVerbs
from mixadapters.core.media import reads_media
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.core.sites import has_two_stacks, is_causal
from mixadapters.routers.posterior import PosteriorRouter


class PosteriorVerbs(RoutingVerbs):
    """Part of a tuner whose experts can be compared as whole models. Other parts do what is not here."""

    model: nn.Module
    peft_config: dict[str, Any]

    def vocab_size(self) -> int:
        """How many token ids the model knows. Raises ValueError where it reads none."""
        raise NotImplementedError

    def row_arms(self, adapter_name: str) -> list[str]:
        """The experts that rows can be routed to by number, in order."""
        raise NotImplementedError

    @of_active
    @contextmanager
    def posterior(self, *, choose_after: int | None = None, adapter_name: str = UNNAMED) -> Iterator[PosteriorRouter]:
        """Weigh the experts by how well each alone has predicted the text so far, in the forwards of a block.

        `with tuner.posterior(): trainer.evaluate()`, or `model.generate(...)`. For causal language models; nothing is
        trained, and the mixture's own routers are not asked. Each row runs once for each expert and once for the
        frozen model, so a forward costs as much as one of K + 1 times the rows, in time and in memory.

        Args:
            choose_after: from this token of a text on it has one arm, the likeliest; `generate` then runs that alone.

        Raises:
            ValueError: the model does not predict next tokens, or choose_after is no number of tokens.
        """
        self.config_of(adapter_name)  # refuses unknown names
        mixtures = self.mixtures(adapter_name)
        if not mixtures:
            raise ValueError(f"adapter_name={adapter_name!r} has no mixture; have {list(self.peft_config)}")
        of_text = (item for item in mixtures.items() if not reads_media(item[1].stack))
        key, mixture = next(of_text, next(iter(mixtures.items())))
        config = self.model.config.to_dict() if hasattr(self.model, "config") else {}
        if has_two_stacks(self.model) or not is_causal(key.path, self.model, config):
            raise ValueError(
                f"the posterior weighs predictions of the next token, and {type(self.model).__name__} makes none; use "
                "router='counts'"
            )
        assert mixture.hard_routes is not None
        field = mixture.hard_routes.field
        router = PosteriorRouter(field, self.row_arms(adapter_name), self.vocab_size(), choose_after)
        objectives = self.context.objectives
        if any(isinstance(objective, PosteriorRouter) for objective in objectives):
            raise ValueError("a block of `posterior` is open already; leave it first")
        objectives.append(router)
        try:
            yield router
        finally:
            objectives.remove(router)

    def refuse_in_blocks(self, verb: str, adapter_name: str) -> None:
        """Raise ValueError where a block is open that knows experts by their numbers, which `verb` would change, or
        their weights are shared out over processes."""
        self.context.engine.refuse_sharded(verb, self.hosts())
        for mixture in self.mixtures(adapter_name).values():
            mixture.bank.refuse_change(verb)
        self.context.engine.changed()
        if self.context.held.get(ROUTES):
            raise ValueError(
                f"{verb}: routes are pinned by numbers of experts, which would mean others: leave pin_routes first"
            )
        if any(isinstance(objective, PosteriorRouter) for objective in self.context.objectives):
            raise ValueError(
                f"{verb}: a block of posterior weighs the experts that there were when it began: leave it first"
            )
