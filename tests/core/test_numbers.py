"""Numbers that callers give for the rows of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from mixadapters import MixDAConfig, MoAConfig, PILLConfig
from mixadapters.core.numbers import real_numbers, whole_numbers


@pytest.mark.parametrize("given", [3, 2.5, [1, 2.5], (1.0, 2.0), np.array([1, 2]), torch.tensor([1, 2]).bfloat16()])
def test_numbers_come_as_they_are(given: Any) -> None:
    found = real_numbers("scale", given)
    assert found.dtype == torch.float32
    assert found.tolist() == torch.as_tensor(given).tolist()


@pytest.mark.parametrize(
    "given", ["3", b"3", 1j, True, [True, 2], ["3"], [None], None, {}, np.array(["3"]), [[1], [1, 2]]]
)
def test_what_is_no_number_is_refused(given: Any) -> None:
    for read in (real_numbers, whole_numbers):
        with pytest.raises(ValueError, match=r"^field"):
            read("field", given)


CONFIGS = {
    "domain_ids": MixDAConfig(domains=["a", "b"], r=2, task_adapter=None),
    "expert_ids": MoAConfig(num_experts=2, r=2),
    "modality_ids": PILLConfig(r=2),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_numbers_on_the_meta_device_are_refused_by_name(field: str, tiny: Any, tiny_inputs: Any) -> None:
    model, inputs = get_peft_model(tiny("llama"), CONFIGS[field]), tiny_inputs("llama")
    shape = inputs["input_ids"].shape if field == "modality_ids" else inputs["input_ids"].shape[:1]
    with pytest.raises(ValueError, match=f"{field} is on the meta device and holds no values; make it on the device"):
        model(**inputs, **{field: torch.zeros(shape, dtype=torch.long, device="meta")})
    model(**inputs, **{field: torch.zeros(shape, dtype=torch.long)})
