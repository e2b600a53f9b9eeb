"""A plain Trainer, without callbacks of ours, does nothing to the rows that nobody is told of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset as Rows
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig
from mixadapters.core import trainers
from mixadapters.core.trainers import columns

IDS = [[5 + i, 6, 7, 8] for i in range(8)]


def trainer(model: nn.Module, folder: Path, rows: Any, **options: Any) -> Trainer:
    given = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no", **options}
    args = TrainingArguments(str(folder), disable_tqdm=True, use_cpu=True, **given)
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows)


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict({"input_ids": IDS, "labels": IDS, **columns})


@pytest.fixture
def mixture(tiny: Any) -> nn.Module:
    return get_peft_model(
        tiny("llama"), MixDAConfig(domains=["a", "b"], r=2, domain_layers=[1], task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize(
    ("config", "column"),
    [
        (MixDAConfig(domains=["a", "b"], r=2, domain_layers=[1], task_type="CAUSAL_LM"), "domain_ids"),
        (MoAConfig(experts=["a", "b"], r=2, router="task", task_type="CAUSAL_LM"), "expert_ids"),
        (BottleneckConfig(r=2, task_type="CAUSAL_LM"), "adapter_names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_that_adapters_read_are_not_dropped(config: Any, column: str, tiny: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), config)
    values = ["default"] * 8 if column == "adapter_names" else [0, 1] * 4
    plain = trainer(model, tmp_path, rows(**{column: values}))
    for run in (plain.train, plain.evaluate):
        with pytest.raises(ValueError, match=rf"drop the columns \['{column}'\].*pass remove_unused_columns=False"):
            run()
    unread = rows(source=["web"] * 8)
    if column != "expert_ids":  # which that router needs
        trainer(model, tmp_path, unread).train()


@pytest.mark.parametrize("several", [False, True])
def test_columns_of_an_evaluation_are_not_dropped_either(several: bool, mixture: nn.Module, tmp_path: Path) -> None:
    plain, chosen = trainer(mixture, tmp_path, rows()), rows(domain_ids=[0, 1] * 4)
    plain.eval_dataset = {"plain": rows(), "chosen": chosen} if several else chosen
    with pytest.raises(ValueError, match=r"drop the columns \['domain_ids'\]"):
        plain.train()


class Drawn(Rows):
    """Rows that are drawn when they are asked for, and alone say what they hold."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(5, 90, (4,))
        return {"input_ids": ids, "labels": ids, "domain_ids": index % 2}


def test_a_stream_that_knows_its_length_is_not_asked_for_a_row() -> None:
    class Counted(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({"input_ids": ids} for ids in IDS)

        def __len__(self) -> int:
            return len(IDS)

    assert columns(Counted()) is None


def test_a_look_at_a_row_draws_no_numbers(mixture: nn.Module, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert columns(Drawn()) == {"input_ids", "labels", "domain_ids"}
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"drop the columns \['domain_ids'\]"):
        trainer(mixture, tmp_path, Drawn()).train()


def test_each_trainer_of_a_model_is_looked_at(mixture: nn.Module, tmp_path: Path) -> None:
    mixture.base_model.set_stage("domain")
    chosen = rows(domain_ids=[0, 1] * 4)
    first = trainer(mixture, tmp_path, chosen, remove_unused_columns=False)
    first.train()
    with mixture.base_model.record_usage() as usage:
        first.train()
    assert usage.report()["gate/mean/weight/a"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="domain_ids"):
        trainer(mixture, tmp_path, chosen).train()


def test_a_pass_over_rows_is_looked_at_once(
    mixture: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], trainers.trainer_above
    monkeypatch.setattr(trainers, "trainer_above", lambda: looks.append(1) or look())
    plain = trainer(mixture, tmp_path, rows(), max_steps=3)
    plain.train()
    assert len(looks) == 1
    plain.evaluate()
    assert len(looks) == 2


class Stream(IterableDataset):
    """Rows that do not say what they hold."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "domain_ids": 0} for ids in IDS)


def test_of_a_stream_whose_columns_nobody_knows_a_warning(mixture: nn.Module, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"drops the columns \['domain_ids'\] of a dataset that does not say"):
        trainer(mixture, tmp_path, Stream()).train()


def test_other_models_are_nobodys_business(mixture: nn.Module, tiny: Any, tmp_path: Path) -> None:
    class Teacher(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
            with torch.no_grad():
                mixture(input_ids=inputs["input_ids"], labels=inputs["labels"])
            return super().compute_loss(model, inputs, *args, **options)

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Teacher(tiny("llama"), args, train_dataset=rows(domain_ids=[0, 1] * 4)).train()


def test_processes_that_would_train_by_themselves_are_refused(
    mixture: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer(mixture, tmp_path, rows())
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it
    with pytest.raises(ValueError, match="WORLD_SIZE=2 processes were launched"):
        plain.train()
    trainers.check_launched(SimpleNamespace(world_size=2))  # they train together


def test_the_best_checkpoint_of_an_adapter_that_would_not_be_reloaded_is_refused(tiny: Any, tmp_path: Path) -> None:
    for name in ("mine", "default"):
        model = get_peft_model(tiny("llama"), BottleneckConfig(r=2, task_type="CAUSAL_LM"), adapter_name=name)
        best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
        plain = trainer(model, tmp_path / name, rows(), save_steps=1, **best)
        if name == "default":
            plain.train()
            continue
        with pytest.raises(ValueError, match="reloads the adapter 'default' only, and 'mine' trains"):
            plain.train()


def test_routers_that_a_column_goes_past_are_warned_of_where_they_are_to_train(mixture, tmp_path) -> None:
    kept = {"remove_unused_columns": False}
    chosen = rows(domain_ids=[0, 1] * 4)
    with pytest.warns(
        UserWarning, match=r"the column domain_ids chooses the experts.*learn nothing: leave the column"
    ):
        trainer(mixture, tmp_path, chosen, **kept).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learn nothing")
        trainer(mixture, tmp_path, rows(), **kept).train()
        mixture.base_model.set_stage("domain")
        trainer(mixture, tmp_path, chosen, **kept).train()


def test_rows_of_an_evaluation_that_lack_what_training_had_are_warned_of(mixture: nn.Module, tmp_path: Path) -> None:
    run = trainer(mixture, tmp_path, rows(domain_ids=[0, 1] * 4), remove_unused_columns=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.evaluate()
    assert not [one for one in seen if "column" in str(one.message)]  # nor that routers learn nothing: none is to
    with pytest.warns(UserWarning, match=r"columns \['domain_ids'\], which the train dataset has and this one lacks"):
        run.evaluate(rows())
