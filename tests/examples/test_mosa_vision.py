"""The comparison, whole, on few images; and how its rows are chosen."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    for name in ("mosa_vision", "mosa_vision_data", "sentences_corpus"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import mosa_vision

    return mosa_vision


def picture(seed: int, mode: str = "RGB", size: int = 32) -> bytes:
    from PIL import Image

    pixels = numpy.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG" if mode == "RGB" else "PNG")
    return file.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Local sets in the formats that the example reads."""
    folder = tmp_path / "data"
    (folder / "mnist_t10k").mkdir(parents=True)
    (folder / "omniglot").mkdir()
    arrays = {}
    for split in ("train", "test"):
        images = [picture(i) for i in range(40)]
        arrays |= {
            f"{split}_bytes": numpy.frombuffer(b"".join(images), dtype=numpy.uint8),
            f"{split}_offsets": numpy.cumsum([0, *map(len, images)]),
            f"{split}_labels": numpy.arange(40) % 10,
        }
    numpy.savez(folder / "cifar10_jpeg_small.npz", **arrays)
    digits = numpy.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=numpy.uint8)
    (folder / "mnist_t10k" / "t10k-images.gz").write_bytes(gzip.compress(bytes(16) + digits.tobytes()))
    labels = (numpy.arange(60) % 10).astype(numpy.uint8)
    (folder / "mnist_t10k" / "t10k-labels.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    with zipfile.ZipFile(folder / "omniglot" / "small.zip", "w") as archive:
        for alphabet in ("Alef", "Bet", "Gimel", "Dalet"):
            for i in range(20):
                archive.writestr(f"small/{alphabet}/character01/0001_{i + 1:02d}.png", picture(i, "L", 105))
    return folder


def test_m19_the_ablation_runs_as_written(example, tmp_path, monkeypatch, capsys) -> None:
    rows = example.load_pretraining

    def few(data_dir: str | None, size: int) -> tuple:
        found, classes = rows(data_dir, size)
        return example.Rows(found.inputs[:60], found.labels[:60]), classes

    monkeypatch.setattr(example, "load_pretraining", few)
    monkeypatch.setattr(example, "RATES", {name: [1e-3] for name in example.METHODS if name != "mosa"})
    monkeypatch.setattr(example.Experiment.costs, "__defaults__", (1,))
    example.main(
        ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "base"), "--seeds", "0", "1", "--shots", "2",
         "--epochs", "1", "--pretrain_epochs", "1", "--test_rows", "20", "--r", "4"]
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(run["method"], run["seed"]) for run in report["runs"]] == [
        (method, seed) for seed in (0, 1) for method in example.METHODS
    ]
    assert {run["seed"] for run in report["tuning"]} == {100}
    assert not any("accuracy" in run for run in report["tuning"])  # test rows choose nothing
    sizes = {run["method"]: run["trainable_parameters"] for run in report["runs"]}
    assert sizes["adapter"] == sizes["sparsity"] == sizes["consistency"] == sizes["mosa"]
    assert abs(sizes["lora"] - sizes["adapter"]) < 0.2 * sizes["adapter"]
    assert [run["merged_equal"] for run in report["runs"] if "merged_equal" in run] == [True]
    costs = report["costs_of_a_step"]
    assert costs["mosa"]["trainable_bytes"] == costs["adapter"]["trainable_bytes"]
    assert costs["mosa"]["optimizer_bytes"] == costs["adapter"]["optimizer_bytes"]
    assert costs["mosa"]["bytes_for_backward"] > 1.5 * costs["adapter"]["bytes_for_backward"]
    assert report["pretraining"]["classes"] == 5
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {method} |" in table for method in example.METHODS)
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    assert "report:" in capsys.readouterr().out


def test_training_validation_and_test_rows_of_a_seed_are_apart_and_balanced(example, tmp_path) -> None:
    arguments = example.Arguments(cache=str(tmp_path), shots=4, pretrain_epochs=1)
    experiment = example.Experiment(arguments)
    labels = experiment.base.data.train.labels
    train, val = experiment.split(0)
    assert not set(train.tolist()) & set(val.tolist())
    for rows in (train, val):
        assert torch.bincount(labels[rows]).tolist() == [4] * 5
    other, _ = experiment.split(1)
    assert set(other.tolist()) != set(train.tolist())
    experiment.args.shots = 0
    everything, held = experiment.split(0)
    assert sorted([*everything.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(held) == len(labels) // 10


@pytest.mark.parametrize(("name", "classes"), [("cifar", 5), ("mnist", 10), ("omniglot", 1), ("digits", 5)])
def test_local_sets_are_read_as_images_of_the_wanted_size(example, files, name, classes) -> None:
    data, found = example.load_images(name, str(files), size=28)
    assert found == classes
    for rows in (data.train, data.test):
        assert rows.inputs.shape == (len(rows.labels), 3, 28, 28)
        assert -1 <= rows.inputs.min() < rows.inputs.max() <= 1
        assert set(rows.labels.tolist()) <= set(range(classes))


def test_no_class_serves_both_pretraining_and_a_task(example, tmp_path) -> None:
    """Images that show their class by their brightness: what was read is told by what it looks like."""
    from PIL import Image

    def grey(level: int, size: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (size, size), level).convert("RGB" if size == 32 else "L").save(file, "PNG")
        return file.getvalue()

    (tmp_path / "omniglot").mkdir()
    images = [grey(10 * (i % 10), 32) for i in range(40)]
    part = {"bytes": numpy.frombuffer(b"".join(images), numpy.uint8), "offsets": numpy.cumsum([0, *map(len, images)])}
    part["labels"] = numpy.arange(40) % 10
    arrays = {f"{split}_{name}": value for split in ("train", "test") for name, value in part.items()}
    numpy.savez(tmp_path / "cifar10_jpeg_small.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "omniglot" / "small.zip", "w") as archive:
        for number, alphabet in enumerate(("Alef", "Bet", "Gimel", "Dalet")):  # read in the order of their names
            archive.writestr(f"small/{alphabet}/character01/0001_01.png", grey(150 + 20 * number, 105))
            archive.writestr(f"small/{alphabet}/character01/0001_11.png", grey(150 + 20 * number, 105))

    def levels(images: torch.Tensor) -> set[int]:
        return {round(255 * float(level)) for level in images.mean((1, 2, 3))}

    rows, classes = example.load_pretraining(str(tmp_path), size=28)
    assert classes == 5 + 2  # five of CIFAR; two alphabets of one character, since the last two are left out
    assert levels(rows.inputs / 2 + 0.5) == {0, 10, 20, 30, 40, 150, 170}
    readers = sys.modules[example.load_pretraining.__module__]
    for reader, expected in ((readers.cifar, {50, 60, 70, 80, 90}), (readers.omniglot, {190})):
        for part in reader(tmp_path, task=True):
            assert levels(part.inputs) == expected


def test_missing_data_is_said_with_the_remedy(example, tmp_path) -> None:
    with pytest.raises(SystemExit, match="pass --data_dir, a folder that has cifar10_jpeg"):
        example.load_images("cifar", None, size=28)
    with pytest.raises(SystemExit, match=r"has no mnist\*/\*images\*\.gz"):
        example.load_images("mnist", str(tmp_path), size=28)
    with pytest.raises(SystemExit, match="--methods 'bitfit' is unknown"):
        example.main(["--methods", "bitfit"])


def test_widths_and_sizes_run_the_same_steps_on_the_same_rows(
    example: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delitem(sys.modules, "mosa_width", raising=False)
    import mosa_width

    class Stub:
        def __init__(self, args: example.Arguments) -> None:
            self.args, self.asked = args, []

        def split(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.arange(self.args.shots * 5), torch.arange(5)

        def run(self, method: str, seed: int, rate: float, test: bool) -> dict:
            batches = -(-self.args.shots * 5 // self.args.batch_size)
            assert self.args.epochs * batches == 60
            gain = 0.1 if method == "mosa" and self.args.r == 64 else 0.0
            return {"method": method, "seed": seed, "rate": rate, "accuracy": 0.5 + gain + seed / 100}

    monkeypatch.setattr(mosa_width, "Experiment", Stub)
    mosa_width.main(["--out", str(tmp_path), "--widths", "4", "64", "--sizes", "2", "8", "--seeds", "0", "1"])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert table[2].startswith("| 4 | 2 | 0.505 | 0.505 | +0.000")
    assert table[5].startswith("| 64 | 8 | 0.505 | 0.605 | +0.100")
    assert len(json.loads((tmp_path / "report.json").read_text())) == 2 * 2 * 2 * 2
