"""Whether a run can go on from a checkpoint folder, and of which stage it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixadapters.training.checkpoints import fault, lay_out_moments, note_stage, stage_of


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


def test_missing_state_is_a_fault(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()
    assert fault(checkpoint) == "it has no trainer_state.json, which is written last"


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
    note_stage(tmp_path, "default", "task")
    assert stage_of(tmp_path, "default") == "task"
    assert stage_of(tmp_path, "other") is None


def test_a_note_that_is_interrupted_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def interrupted(self: Path, text: str, **options: str) -> None:
        write(self, text[:9], **options)
        raise KeyboardInterrupt

    note_stage(tmp_path, "default", "domain")
    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        note_stage(tmp_path, "default", "task")
    assert stage_of(tmp_path, "default") == "domain"
    assert [file.name for file in tmp_path.iterdir()] == ["stage.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", "1", '{"adapter": "default"}', '{"adapter": "default", "stage": 1}'])
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
