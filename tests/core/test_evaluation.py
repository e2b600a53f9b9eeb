"""A model in evaluation for a while."""

from __future__ import annotations

import pytest
from torch import nn

from mixadapters.core.evaluation import in_evaluation


def test_every_module_is_as_it_was_afterwards_even_where_something_fails() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1][0].eval()  # of a part that its owner keeps still
    before = [module.training for module in model.modules()]
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), in_evaluation(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
