"""What engines that shard a model need of its adapters, as far as one process shows it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from processes import one_of_two
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from mixadapters import BottleneckConfig, MixDAConfig
from mixadapters.core.joining import with_loss
from mixadapters.core.saving import complete, own_keys, restore_frozen
from mixadapters.training.callbacks import check_saves, check_sharded_once

IDS = torch.arange(5, 17).view(2, 6)


def adapted(tiny: Any, **fields: Any) -> PeftModel:
    config = {"r": 4, "init_weights": False, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(tiny("llama"), BottleneckConfig(**config))
    model.add_adapter("other", BottleneckConfig(**config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name or ".other." in name)
    return model.train()


def test_adapters_that_other_processes_name_get_gradients_of_zero(tiny: Any) -> None:
    model = adapted(tiny)
    model(input_ids=IDS, labels=IDS, adapter_names=["default", "__base__"]).loss.backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".other." in name]
    assert len(others) > 2
    assert all(alone[name] is None for name in others)
    model.zero_grad()
    with one_of_two():
        model(input_ids=IDS, labels=IDS, adapter_names=["default", "__base__"]).loss.backward()
        for name, p in model.named_parameters():
            if name in others:
                assert p.grad is not None, name
                assert not p.grad.any()
            elif alone[name] is not None:
                torch.testing.assert_close(p.grad, alone[name])
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, adapter_names=["__base__", "__base__"]).loss.backward()  # nothing of its own
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_fsdp_that_accelerate_leaves_out_is_warned_of(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = adapted(tiny)
    with one_of_two(), pytest.warns(UserWarning, match=r"keeps for GPUs.*fully_shard"):
        model(input_ids=IDS, labels=IDS)


def test_parts_of_adapters_that_are_sharded_by_themselves_are_refused(tiny: Any) -> None:
    with one_of_two():
        model = get_peft_model(tiny("llama"), BottleneckConfig(r=4, task_type="CAUSAL_LM")).train()
        host = next(iter(model.base_model.hosts()))
        fully_shard(host.adapters["default"].bank.experts["adapter"].down, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match=r"experts\.adapter\.down.*TRANSFORMER_BASED_WRAP"):
            model(input_ids=IDS, labels=IDS)


def turned_on(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(True)


LATER: dict[str, Callable[[PeftModel], Any]] = {
    "stage": lambda model: model.base_model.set_stage("task", "default"),
    "adapter": lambda model: model.set_adapter("other"),
    "domain": lambda model: model.base_model.add_domain("b", adapter_name="default"),
    "new adapter": lambda model: (
        model.add_adapter("new", MixDAConfig(domains=["a"], r=4, task_type="CAUSAL_LM")), model.set_adapter("new"),
    ),
    "by hand": turned_on,
}  # fmt: skip


@pytest.mark.parametrize("later", LATER)
def test_weights_of_which_ddp_does_not_know_are_refused(later: str, tiny: Any) -> None:
    config = MixDAConfig(domains=["a"], r=4, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config)
    model.add_adapter("other", config)
    model.base_model.set_stage("domain", "default")
    with one_of_two():
        wrapped = DistributedDataParallel(model.train())
        if later != "by hand":  # whoever has looked already looks again
            wrapped(input_ids=IDS, labels=IDS)
        LATER[later](model)
        with pytest.raises(ValueError, match=r"other weights train, but did not when DistributedDataParallel"):
            wrapped(input_ids=IDS, labels=IDS)
        DistributedDataParallel(model)(input_ids=IDS, labels=IDS)  # the remedy
        with torch.no_grad():
            wrapped(input_ids=IDS, labels=IDS)


def test_weights_that_ddp_is_told_to_leave_alone_are_not_missed(tiny: Any) -> None:
    model = adapted(tiny)
    others = [name for name, _ in model.named_parameters() if ".other." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    with one_of_two():
        DistributedDataParallel(model)(input_ids=IDS, labels=IDS)


def test_adapters_that_come_after_fully_shard_are_said_to_train_apart(tiny: Any) -> None:
    config = MixDAConfig(domains=["a"], r=4, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config).train()
    with one_of_two():
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(input_ids=IDS, labels=IDS)
        names = [name for name, _ in model.named_parameters()]
        for change in (
            lambda tuner: tuner.add_domain("b"), lambda tuner: tuner.remove_domain("a"),
            lambda tuner: tuner.keep_experts({path: ["a"] for path, _ in tuner._mixtures("default")}),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"shared out over processes.*before it is sharded"):
                change(model.base_model)
        assert [name for name, _ in model.named_parameters()] == names
        model.add_adapter("new", config)
        model.set_adapter("new")
        with pytest.warns(UserWarning, match=r"new\..* trains and is not sharded.*Add adapters before fully_shard"):
            model(input_ids=IDS, labels=IDS)


def test_only_the_first_process_saves_what_it_has_gathered(tiny: Any) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=4, task_type="CAUSAL_LM"))
    with one_of_two(rank=1):
        assert get_peft_model_state_dict(model, state_dict={}) == {}
    with one_of_two(rank=0), pytest.raises(ValueError, match="weights are missing"):
        get_peft_model_state_dict(model, state_dict={})


def test_weights_that_an_engine_has_frozen_come_from_what_is_kept_and_from_files(tiny: Any, tmp_path: Any) -> None:
    model = get_peft_model(tiny("llama"), MixDAConfig(domains=["a"], r=4, init_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.base_model.set_stage("task")
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = model.base_model.context.engine.kept
    kept.update({k.removeprefix("base_model.model."): v for k, v in whole.items() if ".domain.bank." in k})
    given = {k: v for k, v in model.state_dict().items() if ".domain.bank." not in k}
    complete(given, model)
    assert set(own_keys(model, "mixda_", "default")) <= given.keys()
    assert all(torch.equal(given[name], whole[name]) for name in whole if name in given)
    given = {name: tensor + 1 for name, tensor in whole.items()}
    complete(given, model)  # what is there stays
    assert all(torch.equal(given[name], tensor + 1) for name, tensor in whole.items())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    restore_frozen(model, "default", tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, whole[name]) == (".domain.bank." in name)


def test_what_each_stage_has_frozen_is_kept_where_zero_3_has_shared_it_out(tiny: Any) -> None:
    config = MixDAConfig(domains=["a"], r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config).train()
    root, engine = model.base_model.model, model.base_model.context.engine
    for parameter in model.parameters():
        parameter.ds_id = 0  # by which ZeRO-3 knows it
    for stage, inside in (("task", ".domain.bank."), ("domain", ".task.")):
        model.base_model.set_stage(stage)
        engine.look(root, trains=True)
        own = {name for name in dict(root.named_parameters()) if "mixda_" in name or ".modules_to_save." in name}
        frozen = {name for name in own if not root.get_parameter(name).requires_grad}
        assert engine.kept.keys() == frozen
        assert any(inside in name for name in frozen)
        assert len(frozen) < len(own)


def test_engines_that_would_write_no_adapter_are_refused() -> None:
    def trainer(**state: Any) -> Any:
        return SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(**state)))

    check_saves(trainer())
    check_saves(trainer(fsdp_plugin=SimpleNamespace(state_dict_type="StateDictType.FULL_STATE_DICT")))
    with pytest.raises(ValueError, match=r"'SHARDED_STATE_DICT'.*FULL_STATE_DICT"):
        check_saves(trainer(fsdp_plugin=SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")))
    for stage, gathers, refused in ((2, False, False), (3, True, False), (3, False, True)):
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        if refused:
            with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
                check_saves(trainer(deepspeed_plugin=plugin))
        else:
            check_saves(trainer(deepspeed_plugin=plugin))


def test_a_model_that_fsdp_has_sharded_is_refused_by_the_next_stage(tiny: Any) -> None:
    model = adapted(tiny)
    trainer: Any = SimpleNamespace(model=model, is_fsdp_enabled=True)
    check_sharded_once(trainer)
    with one_of_two():
        fully_shard(model.base_model.model.model.layers[0], mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match="make the model of the next stage anew"):
            check_sharded_once(trainer)
        trainer.is_distributed_loading_by_transformers = True  # by `from_pretrained`, which Trainer takes
        check_sharded_once(trainer)


def test_a_process_does_not_save_what_lies_in_others(tiny: Any, tmp_path: Any) -> None:
    model = get_peft_model(tiny("llama"), BottleneckConfig(r=4, task_type="CAUSAL_LM"))
    whole = get_peft_model_state_dict(model)
    parameter = model.get_parameter(next(name for name, p in model.named_parameters() if p.requires_grad))
    held = parameter.data
    parameter.data, parameter.ds_id = held.new_empty(0), 0  # type: ignore[attr-defined]  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"has no entries in this one.*accelerator.get_state_dict"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with one_of_two(rank=1):  # accelerate gathers for the first process alone, and all call save_pretrained
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.safetensors"))
    parameter.data = held
    del parameter.ds_id
    with one_of_two():
        fully_shard(model.base_model.model.model.layers[0], mesh=init_device_mesh("cpu", (2,)))
        with pytest.warns(UserWarning, match=r"no file takes it as it is.*accelerator.get_state_dict"):
            assert get_peft_model_state_dict(model).keys() == whole.keys()  # for those who keep parts


def test_a_loss_stays_in_outputs_that_have_no_place_for_one() -> None:
    outputs = pytest.importorskip("diffusers.models.modeling_outputs")
    output = with_loss(outputs.Transformer2DModelOutput(sample=torch.ones(2)), torch.tensor(3.0))
    assert isinstance(output, outputs.Transformer2DModelOutput)
    values, spec = _pytree.tree_flatten(output)  # as data parallelism does it
    again = _pytree.tree_unflatten(values, spec)
    assert (float(again.loss), float(output["loss"])) == (3.0, 3.0)
    assert torch.equal(again.sample, output.sample)


@pytest.mark.parametrize("blocks", [True, False])
def test_weights_that_the_root_has_gathered_are_not_said_to_be_left_out(blocks: bool, tiny: Any) -> None:
    """A head that is saved lies in no block, but in what the root shares out."""
    config = BottleneckConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config).train()
    with one_of_two():
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers if blocks else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
