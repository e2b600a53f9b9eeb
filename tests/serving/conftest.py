"""A tiny model and saved adapters of three types, for servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from served import KINDS


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    others = (
        t for t in threading.enumerate() if not t.daemon and not t.name.startswith(("asyncio_", "uvloop_"))
    )  # of a loop
    for thread in set(others) - before:
        thread.join(30)
        assert not thread.is_alive(), thread


@pytest.fixture(scope="session")
def causal(tiny) -> Callable[[], Any]:
    """A fresh copy of a causal model of two layers that ends no text by itself."""

    def make() -> Any:
        model = tiny("llama", num_hidden_layers=2, max_position_embeddings=256, eos_token_id=None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:  # so large that adapters change tokens
                    parameter.mul_(1.0 if "lm_head" in name else 2.0)
        return model

    return make


@pytest.fixture(scope="session")
def save(causal) -> Callable[..., Path]:
    """save(folder, kind, seed, **fields): a random adapter of a kind, as a folder."""

    def make(folder: Path, kind: str, seed: int = 0, **fields: Any) -> Path:
        model = get_peft_model(causal(), KINDS[kind](**fields))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adapters." in name or "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        model.save_pretrained(folder)
        return folder

    return make
