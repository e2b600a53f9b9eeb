"""What surgery asks of a tuner whose experts it cuts: that its config says afterwards what the layers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixadapters.core.names import UNNAMED, of_active


class CuttingVerbs:
    """Part of a tuner. Methods whose experts can come and go override it; paths are those of adapted modules."""

    def config_of(self, adapter_name: str) -> Any:
        raise NotImplementedError

    @of_active
    def keep_experts(
        self, kept: Mapping[str, Sequence[str]], *, renormalize: bool = True, adapter_name: str = UNNAMED
    ) -> None:
        """Remove the experts that `kept` does not name, module by module; other modules keep all of theirs.

        Args:
            kept: path -> the names of the experts that stay, in any order.
            renormalize: share out among the others what a router gave to those that leave. False: nobody gets it.

        Raises:
            ValueError: no such module or expert, a module that would have none, or experts that cannot go.
        """
        raise ValueError(f"keep_experts: {self._no_surgery(adapter_name)}")

    @of_active
    def share_experts(self, stands: Mapping[str, Mapping[str, str]], adapter_name: str = UNNAMED) -> None:
        """Let experts of a module stand for others, which lose their weights there; the router stays as it is.

        stands: path -> {expert that goes: the one that takes its rows}.

        Raises:
            ValueError: no such module or expert, or experts that cannot go.
        """
        raise ValueError(f"share_experts: {self._no_surgery(adapter_name)}")

    @of_active
    def resize_expert(self, path: str, name: str, rank: int, adapter_name: str = UNNAMED) -> None:
        """Give an expert another rank at one module. Its weights there are those of a new one, to be written.

        Raises:
            ValueError: no such module or expert, or a rank that is not positive.
        """
        raise ValueError(f"resize_expert: {self._no_surgery(adapter_name)}")

    def _no_surgery(self, adapter_name: str) -> str:
        kind = self.config_of(adapter_name).peft_type.value
        return f"adapter {adapter_name!r} is of type {kind}, whose experts are what its config says; those of MOA can"
