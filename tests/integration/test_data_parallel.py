"""nn.DataParallel: copies of a model share its context, and each thread has the record and the weights of its own.

Here the copies lie on the CPU, the second with other weights, so that whoever reads the model's own is found out.
"""

from __future__ import annotations

import copy
import importlib
import threading
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig, MoSAConfig, PILLConfig

replication: Any = importlib.import_module("torch.nn.parallel.replicate")  # whose name a function has, too
IDS = torch.randint(5, 90, (4, 7), generator=torch.Generator().manual_seed(0))
TASK = {"task_type": "CAUSAL_LM", "init_weights": False}
OTHER = 1.05  # times the weights: those of the second copy
CONFIGS: dict[str, Any] = {
    "bottleneck": lambda: BottleneckConfig(r=4, **TASK),
    "moa": lambda: MoAConfig(num_experts=3, r=4, **TASK),
    "moa by block": lambda: MoAConfig(num_experts=3, r=4, router_scope="block", **TASK),
    "mixda": lambda: MixDAConfig(domains=["a", "b"], r=4, task_r=3, **TASK),
    "pill": lambda: PILLConfig(r=4, **TASK),
}


@pytest.fixture(scope="session")
def tiny(tiny: Any) -> Any:
    """Models of three layers where a test asks for no more: MixDA adapts two of them by default."""
    return partial(tiny, layers=3)


def copies(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """As nn.DataParallel makes them in each forward."""

    def weights(tensors: list[torch.Tensor], devices: Any, detach: bool = False) -> list[list[torch.Tensor]]:
        return [[t.view_as(t) for t in tensors], [t * OTHER if t.is_floating_point() else t for t in tensors]]

    with monkeypatch.context() as patch:
        patch.setattr(replication, "_broadcast_coalesced_reshape", weights)
        patch.setattr(replication, "_get_device_index", lambda device, optional=False: device)
        return replication.replicate(model, [0, 1])


def twin(model: nn.Module) -> nn.Module:
    """A model with the weights of the second copy."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(OTHER)
    return made


def in_threads(models: list[nn.Module], batches: list[dict[str, Any]]) -> list[Any]:
    """As `parallel_apply`: all begin at once."""
    found: dict[int, Any] = {}
    start, grad = threading.Barrier(len(models)), torch.is_grad_enabled()

    def run(number: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                start.wait(30)
                found[number] = models[number](**batches[number])
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found.values():
        if isinstance(error, Exception):
            raise error
    return [found[number] for number in range(len(models))]


def made(kind: str, tiny: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    fields = {"modality_ids": torch.zeros_like(IDS)} if kind == "pill" else {}
    whole = {"input_ids": IDS, "labels": IDS, **fields}
    halves = [{name: value[i : i + 2] for name, value in whole.items()} for i in (0, 2)]
    return get_peft_model(tiny("llama"), CONFIGS[kind]()), halves


@torch.no_grad()
def compare(model: nn.Module, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in threads, several times, with the models that they are copies of, one after the other."""
    expected = [one(**batch).logits for one, batch in zip((model, twin(model)), batches, strict=True)]
    for _ in range(3):
        found = in_threads(copies(model, monkeypatch), batches)
        for output, logits in zip(found, expected, strict=True):
            torch.testing.assert_close(output.logits, logits)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_each_copy_runs_with_its_own_weights(kind: str, training: bool, tiny: Any, monkeypatch) -> None:
    model, batches = made(kind, tiny)
    model.train(training)
    compare(model, batches, monkeypatch)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_both_halves(kind: str, checkpointing: bool, tiny: Any, monkeypatch) -> None:
    model, batches = made(kind, tiny)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    other, fresh = twin(model), copy.deepcopy(model)
    for one, batch in zip((model, other), batches, strict=True):
        one(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    second = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert expected.keys() == second.keys()
    for steps in (1, 2):  # of a model whose first forwards are those of copies
        outputs = in_threads(copies(fresh, monkeypatch), batches)
        with torch.no_grad():
            in_threads(copies(fresh, monkeypatch), batches[::-1])
        sum(output.loss for output in outputs).backward()
        for name, parameter in fresh.named_parameters():
            if name in expected:
                whole = steps * (expected[name] + OTHER * second[name])
                torch.testing.assert_close(parameter.grad, whole, msg=name)


@pytest.mark.parametrize("kind", ["bottleneck", "moa", "mixda"])
def test_rows_of_each_thread_take_the_adapters_that_they_name(kind: str, tiny: Any, monkeypatch) -> None:
    model, batches = made(kind, tiny)
    model.add_adapter("other", CONFIGS[kind]())
    model.eval()
    names = [["default", "other"], ["other", "__base__"]]
    batches = [{"input_ids": b["input_ids"], "adapter_names": n} for b, n in zip(batches, names, strict=True)]
    compare(model, batches, monkeypatch)


def test_what_is_drawn_once_for_a_forward_is_refused(tiny: Any, monkeypatch) -> None:
    """The draw would stay with the model, and its copies would train weights that nobody has drawn."""
    model = get_peft_model(tiny("llama"), MoSAConfig(r=4, num_experts=2, **TASK))
    batches = [{"input_ids": IDS[i : i + 2], "labels": IDS[i : i + 2]} for i in (0, 2)]
    with pytest.raises(ValueError, match=r"does not reach the copies that nn.DataParallel makes .*torchrun"):
        in_threads(copies(model, monkeypatch), batches)
    assert torch.isfinite(model(**batches[0]).loss)


def test_where_nothing_is_drawn_copies_are_not_refused(tiny: Any, monkeypatch) -> None:
    model = get_peft_model(tiny("llama"), MoSAConfig(r=4, num_experts=2, **TASK)).eval()
    batches = [{"input_ids": IDS[i : i + 2]} for i in (0, 2)]
    with torch.no_grad(), model.disable_adapter():
        outputs = in_threads(copies(model, monkeypatch), batches)
        torch.testing.assert_close(outputs[0].logits, model(**batches[0]).logits)
    names = [{**batch, "adapter_names": ["__base__"] * 2} for batch in batches]
    with torch.no_grad():
        outputs = in_threads(copies(model, monkeypatch), names)
        torch.testing.assert_close(outputs[0].logits, model(**names[0]).logits)
