"""Hooks by the objects that they belong to."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixadapters.core.bound_hooks import owners, unhook


class Listener:
    def before(self, module: nn.Module, args: Any) -> None: ...

    def before_all(self, module: nn.Module, args: Any, kwargs: Any) -> None: ...

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None: ...


def hook_up(module: nn.Module, listener: Listener) -> None:
    module.register_forward_pre_hook(listener.before)
    module.register_forward_pre_hook(listener.before_all, with_kwargs=True)
    module.register_forward_hook(listener.after, with_kwargs=True, always_call=True)


def test_owners_come_in_order_and_functions_have_none() -> None:
    module, first, second = nn.Identity(), Listener(), Listener()
    module.register_forward_pre_hook(first.before)
    module.register_forward_pre_hook(lambda module, args: None)
    module.register_forward_pre_hook(second.before)
    assert list(owners(module._forward_pre_hooks)) == [first, None, second]


def test_unhook_leaves_the_hooks_of_others_and_nothing_of_its_own() -> None:
    module, one, other = nn.Identity(), Listener(), Listener()
    hook_up(module, other)
    before = [dict(part) for name, part in sorted(vars(module).items()) if "hooks" in name and part]
    hook_up(module, one)
    unhook(module, one)
    assert [dict(part) for name, part in sorted(vars(module).items()) if "hooks" in name and part] == before
    assert set(owners(module._forward_pre_hooks)) == set(owners(module._forward_hooks)) == {other}
