"""Options of MoA's router in its config: fields that say nothing, and what changes along a training."""

from __future__ import annotations

from typing import Any

from mixadapters.core.config import MixtureConfig, without_keys
from mixadapters.core.fields import default_of
from mixadapters.routers.schedules import check_schedules, value_at
from mixadapters.tuners.moa.router import OPTION_OF, USUAL, router_spec, says_granularity, spelled_out


class ScheduledConfig(MixtureConfig):
    """Part of MoA's config."""

    router: Any
    schedules: Any
    num_experts_per_tok: Any

    def __post_init__(self) -> None:
        kind = self.__dict__["peft_type"]  # a string in JSON, of PEFT's enum in `to_dict` and in copies, or None
        super().__post_init__()
        if kind is not None and self.router is not None:
            auto = {name: default_of(self, name) for name in USUAL}
            # Copies, unlike what is saved, have "auto" itself; what else they say is said.
            copied = type(kind) is not str and self.num_experts_per_tok == auto["num_experts_per_tok"]
            for name, usual in USUAL.items():
                if getattr(self, name) == usual and not (copied and says_granularity(self)):
                    setattr(self, name, auto[name])

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; where a router is named, fields of it that say nothing hold what they stand for."""
        saved = super().to_dict()
        if self.router is None:
            return saved
        said = spelled_out(self)
        return saved | {n: v for n, v in USUAL.items() if saved[n] == default_of(self, n)} | {"router": said}

    def check_schedules(self, schedules: Any) -> None:
        """Raise ValueError if these are no schedules of options that the router may change in training."""
        scheduled: Any = router_spec(self)[0].scheduled
        check_schedules(schedules, scheduled if isinstance(scheduled, tuple) else None)  # else it depends on its base

    def note_progress(self, done: float) -> None:
        """Say what options with a schedule are at this share of the training: a saved adapter is made with these."""
        for option, points in self.schedules.items():
            self.note_option(option, value_at(option, points, done))

    def note_option(self, option: str, value: Any) -> None:
        """Say what an option of the router is now, in `router`."""
        for name, stands_for in OPTION_OF.items():
            if stands_for == option:
                setattr(self, name, default_of(self, name))
        assert isinstance(self.router, dict)
        base = self.router.get("base")
        if isinstance(base, dict) and option in base:
            self.router = {**self.router, "base": {**base, option: value}}
        else:
            self.router = {**self.router, option: value}

    def option_now(self, option: str) -> Any:
        """What `router` says that an option is; None where it says nothing."""
        assert isinstance(self.router, dict)
        base = self.router.get("base")
        return base[option] if isinstance(base, dict) and option in base else self.router.get(option)

    def compared(self, other: MixtureConfig) -> dict[str, Any]:
        """As every config's, without the options that both have on a schedule: loading takes over the file's."""
        said = super().compared(other)
        moving = self.schedules.keys() & getattr(other, "schedules", {}).keys()
        router = without_keys(said["router"], moving)
        if router is not None and "base" in router:
            router["base"] = without_keys(router["base"], moving)
        return said | {name: None for name, option in OPTION_OF.items() if option in moving} | {"router": router}
