"""Whether a run can go on from a checkpoint folder, and of which stage it is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixadapters.training.checkpoints import adapters_in, begun_anew, fault, lay_out_moments, note_stages, stage_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "other").mkdir(parents=True)
    for place in (folder, folder / "other"):
        save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, place / "adapter_model.safetensors", {"format": "pt"})
    torch.save({"state": torch.ones(3)}, folder / "optimizer.pt")
    torch.save({}, folder / "scheduler.pt")
    torch.save({}, folder / "rng_state_1.pth")  # of the second process
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_whole_checkpoint_has_no_fault(checkpoint: Path) -> None:
    assert fault(checkpoint) == ""
    (checkpoint / "optimizer.pt").unlink()  # as save_only_model leaves it
    assert fault(checkpoint) == ""


def test_files_that_are_not_read_and_those_of_an_old_torch_are_no_fault(checkpoint: Path) -> None:
    (checkpoint / "index.bin").write_bytes(b"of a callback of the user's own")
    torch.save({"state": torch.ones(3)}, checkpoint / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert fault(checkpoint) == ""


def test_missing_state_is_a_fault(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()
    assert fault(checkpoint) == "it has no trainer_state.json, which is written last"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "other/adapter_model.safetensors"])
@pytest.mark.parametrize("what", ["a link to nowhere", "a folder"])
def test_what_is_no_file_of_weights_is_a_fault(name: str, what: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir() if what == "a folder" else (checkpoint / name).symlink_to(checkpoint / "gone")
    assert re.fullmatch(f"{name} cannot be read: .+", fault(checkpoint))


@pytest.mark.parametrize(
    ("gone", "options", "anew"),
    [
        ([], {}, []),
        (["rng_state.pth"], {}, ["random numbers"]),
        (["rng_state.pth"], {"process_index": 1, "world_size": 2}, []),
        ([], {"process_index": 2, "world_size": 4}, ["random numbers"]),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], {}, ["the optimizer's moments", "random numbers"]),
        (["optimizer.pt", "scheduler.pt"], {"deepspeed": True}, []),  # whose own files hold that
        ([], {"scaled": True}, ["the scale of float16's loss"]),
    ],
)
def test_what_begins_anew_is_what_files_lack(
    gone: list[str], options: dict[str, Any], anew: list[str], checkpoint: Path
) -> None:
    torch.save({}, checkpoint / "rng_state.pth")
    for name in gone:
        (checkpoint / name).unlink()
    scaled = torch.amp.GradScaler("cpu", enabled=options.get("scaled", False))
    trainer = SimpleNamespace(
        args=SimpleNamespace(process_index=options.get("process_index", 0), world_size=options.get("world_size", 1)),
        accelerator=SimpleNamespace(scaler=scaled), is_deepspeed_enabled=options.get("deepspeed", False),
    )  # fmt: skip
    found = begun_anew(checkpoint, trainer)
    assert len(found) == len(anew)
    assert all(one.startswith(start) for one, start in zip(found, anew, strict=True))


def test_the_optimizer_of_fsdp_is_a_folder(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer_0")
    args = SimpleNamespace(process_index=1, world_size=2)
    assert begun_anew(checkpoint, SimpleNamespace(args=args, accelerator=SimpleNamespace(scaler=None))) == []


def test_the_adapters_of_a_checkpoint_are_found(checkpoint: Path) -> None:
    (checkpoint / "runs").mkdir()
    assert adapters_in(checkpoint) == ["default", "other"]
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "other" / "adapter_model.bin")
    assert adapters_in(checkpoint) == ["other"]


FILES = ["trainer_state.json", "adapter_model.safetensors", "other/adapter_model.safetensors", "optimizer.pt",
         "scheduler.pt", "rng_state_1.pth"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_cut_of_a_file_is_a_fault(name: str, checkpoint: Path) -> None:
    data = (checkpoint / name).read_bytes()
    for length in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1}:
        if length < len(data):
            (checkpoint / name).write_bytes(data[:length])
            assert name in fault(checkpoint), length


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff"])
def test_headers_that_say_nothing_are_faults(header: bytes, checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0123")
    assert "adapter_model.safetensors has" in fault(checkpoint)


def test_a_huge_header_is_not_read(checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").write_bytes((1 << 62).to_bytes(8, "little"))
    assert "adapter_model.safetensors has 8 bytes, an unknown number by its header" in fault(checkpoint)


def test_the_stage_of_an_adapter_is_noted(tmp_path: Path) -> None:
    assert stage_of(tmp_path, "default") is None
    note_stages(tmp_path, {"default": "task", "second": "domain"})
    assert (stage_of(tmp_path, "default"), stage_of(tmp_path, "second")) == ("task", "domain")
    assert stage_of(tmp_path, "other") is None


def test_the_note_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text('{"adapter": "default", "stage": "task"}', encoding="utf-8")
    assert stage_of(tmp_path, "default") == "task"
    assert stage_of(tmp_path, "other") is None


def test_a_note_that_is_interrupted_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def interrupted(self: Path, text: str, **options: str) -> None:
        write(self, text[:9], **options)
        raise KeyboardInterrupt

    note_stages(tmp_path, {"default": "domain"})
    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        note_stages(tmp_path, {"default": "task"})
    assert stage_of(tmp_path, "default") == "domain"
    assert [file.name for file in tmp_path.iterdir()] == ["stage.json"]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "1", '{"adapter": "default"}', '{"adapter": "default", "stage": 1}', '{"stages": ["default"]}',
        '{"stages": {"default": 1}}', '{"adapter": ["default"], "stage": "task"}',
    ],
)  # fmt: skip
def test_a_note_that_says_nothing_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(text, encoding="utf-8")
    assert stage_of(tmp_path, "default") is None


def test_moments_come_to_lie_as_their_parameters_do() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([parameter])
    moment = torch.randn(4, 3).t()
    optimizer.state[parameter] = {"exp_avg": moment, "step": torch.tensor(2.0)}
    lay_out_moments(optimizer)
    kept = optimizer.state[parameter]["exp_avg"]
    assert kept.stride() == parameter.stride()
    assert torch.equal(kept, moment)
