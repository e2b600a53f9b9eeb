"""The comparison on questions about images, whole, on a few made-up images."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SIZES = {"steps": 2, "pretraining_steps": 5, "batch_size": 4, "width": 16, "r": 2, "image_size": 16, "max_length": 40}
SMALL = ["--seeds", "0", *(part for name, size in SIZES.items() for part in (f"--{name}", str(size)))]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows))


def pack(path: Path, images: dict[str, Image.Image]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, image in images.items():
            data = io.BytesIO()
            image.save(data, "PNG")
            entry = tarfile.TarInfo(name)
            entry.size = data.tell()
            data.seek(0)
            archive.addfile(entry, data)


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (16, 16), COLORS[color])


@pytest.fixture
def data(tmp_path) -> Path:
    folder, images = tmp_path / "data" / "vision/easy_vqa", {}
    for split, count in (("train", 12), ("test", 4)):
        rows = []
        for i in range(count):
            color, name = ("red", "blue")[i % 2], f"{split}/{i}.png"
            images[name] = picture(color)
            rows += [
                {"question": "what color is the shape?", "answer": color, "image": name},
                {"question": "is there a red shape?", "answer": "yes" if color == "red" else "no", "image": name},
                {"question": "is there not a blue circle?", "answer": "yes", "image": name},
            ]
        write(folder / f"{split}_questions.jsonl.gz", rows)
    pack(folder / "images.tar.gz", images)
    folder, rows = tmp_path / "data" / "scienceqa", []
    for i, (split, image) in enumerate([("mm_train", 1), ("mm_dev", 1), ("mm_test", 1), (None, 1), (None, 0)] * 3):
        row = {"question": f"which {i} ?", "context": "red" if i % 2 else "", "choices": ["red", "blue"],
               "answer": i % 2, "has_image": bool(image)}  # fmt: skip
        # As in the published files: most of the test set says nothing of a question but its caption, if that.
        row |= {"subject": "natural science", "topic": "color"} if i % 5 == 4 or i < 3 else {}
        row |= {"caption": "A red field."} if image else {}
        rows.append(row | ({"image_file": f"images/{i}.jpg", "mm_split": split} if split else {}))
    write(folder / "test.jsonl.gz", rows)
    write(folder / "train_subset.jsonl.gz", rows[4::5])
    write(folder / "val_subset.jsonl.gz", rows[4::5])
    pack(folder / "images.tar.gz", {row["image_file"]: picture("red") for row in rows if "image_file" in row})
    return tmp_path / "data"


@pytest.fixture
def example(monkeypatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    for name in ("pill_vqa", "pill_vqa_data"):
        sys.modules.pop(name, None)
    return importlib.import_module("pill_vqa")


def test_comparison_chooses_rates_on_dev_and_reports_by_subject(tmp_path, data, example, capsys) -> None:
    out, methods = tmp_path / "out", ["text_only", "lora", "pill_align"]
    search = ["--rates", "1e-2", "1e-3", "--per_subject", "5", "--methods", *methods]
    example.main(["--data_dir", str(data), "--out", str(out), *search, *SMALL])
    report = json.loads((out / "report.json").read_text())
    assert [run["method"] for run in report["runs"]] == methods
    assert {run["seed"] for run in report["search"]} == {100}
    assert {run["rate"] for run in report["search"]} == {1e-2, 1e-3}
    for run in report["runs"]:
        assert run["rate"] == report["rates"][run["method"]]
        assert 0 <= run["all"] <= 1
        assert {"subject: color", "subject: yes or no", "modality: image"} <= run.keys()
    sizes = {run["method"]: run["adapters"] for run in report["runs"]}
    assert abs(sizes["lora"] - sizes["pill_align"]) < 0.1 * sizes["pill_align"]
    printed = capsys.readouterr().out
    assert all(f"| {method} |" in printed for method in methods)
    assert (out / "table.md").read_text().strip() in printed
    assert (out / "answers.png").read_bytes()[:4] == b"\x89PNG"


def test_scienceqa_has_questions_with_and_without_images(tmp_path, data, example) -> None:
    arguments = ["--task", "scienceqa", "--data_dir", str(data), "--out", str(tmp_path / "out"), "--rates", "1e-2"]
    example.main([*arguments, "--methods", "pill_one", "pill_zero", *SMALL])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = {"modality: image", "modality: text", "modality: neither", "all"}
    groups |= {"subject: natural science", "subject: not given"}
    assert [run["method"] for run in report["runs"]] == ["pill_one", "pill_zero"]
    assert all(groups <= run.keys() for run in report["runs"])


def test_words_for_an_image_of_scienceqa_come_from_what_its_row_has(data, example) -> None:
    tags = [row["tags"] for row in example.load("scienceqa", str(data)).train if row["images"]]
    assert tags == [{"a", "red", "field", "color"}, {"a", "red", "field"}, {"a", "red", "field"}]


def test_images_without_a_word_need_an_encoder_that_is_given(tmp_path, data, example) -> None:
    folder = data / "scienceqa"
    write(folder / "test.jsonl.gz", [
        {"question": "which ?", "context": "", "choices": ["red", "blue"], "answer": 0, "has_image": True,
         "image_file": "images/0.jpg", "mm_split": f"mm_{split}"} for split in ("train", "dev", "test")
    ])  # fmt: skip
    with pytest.raises(SystemExit, match="--encoder"):
        example.main(["--task", "scienceqa", "--data_dir", str(data), "--out", str(tmp_path / "out"), *SMALL])


def test_small_pieces_are_pretrained_once(tmp_path, data, example) -> None:
    args = example.Arguments(data_dir=str(data), out=str(tmp_path / "out"), **SIZES)
    example.Comparison(args)
    pieces = [tmp_path / "out" / name / "model.safetensors" for name in ("llama", "vit")]
    before = [weights.stat().st_mtime_ns for weights in pieces]
    example.Comparison(args)
    assert [weights.stat().st_mtime_ns for weights in pieces] == before


def test_words_that_describe_an_image_come_from_all_its_answers(data, example) -> None:
    rows = example.load("easy_vqa", str(data))
    assert all(row["tags"] == {"red"} or row["tags"] == {"blue"} for row in rows.train)
    assert {row["image"] for row in rows.train}.isdisjoint(row["image"] for row in rows.dev)


def test_set_of_the_hub_is_read_by_its_own_names(example, monkeypatch) -> None:
    row = {"question": "which ?", "hint": "a text", "choices": ["a", "b"], "answer": 1, "image": None,
           "subject": "social science", "topic": "geography"}  # fmt: skip
    asked = []
    fake = types.SimpleNamespace(
        load_dataset=lambda name: asked.append(name) or {split: [row] for split in ("train", "validation", "test")}
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    questions = example.load("derek-thomas/ScienceQA", None)
    assert asked == ["derek-thomas/ScienceQA"]
    assert questions.test[0]["answer"] == " B"
    assert questions.test[0]["modality"] == "text"


def test_bad_commands_are_refused(example) -> None:
    with pytest.raises(SystemExit, match="pil_one"):
        example.main(["--methods", "pil_one"])
    with pytest.raises(SystemExit, match="needs --data_dir"):
        example.main(["--task", "easy_vqa"])
    with pytest.raises(SystemExit, match="--task shapes draws its images and reads no --data_dir files"):
        example.main(["--task", "shapes", "--data_dir", "files"])


def test_without_files_there_are_shapes_whose_answers_their_images_tell(example) -> None:
    assert example.Arguments().task == "shapes"
    assert example.Arguments(data_dir="files").task == "easy_vqa"
    drawn = example.load("shapes", None)
    assert [len(split) for split in (drawn.train, drawn.dev, drawn.test)] == [3000, 300, 1200]
    again = example.load("shapes", None)
    assert again.test[5]["images"][0].tobytes() == drawn.test[5]["images"][0].tobytes()
    assert {row["answer"] for row in drawn.test if row["subject"] == "shape"} == {" circle", " rectangle", " triangle"}
    for color, shape, true in zip(*(drawn.test[i:300:3] for i in range(3)), strict=True):
        (image,) = color["images"]
        pixels = np.asarray(image)
        ys, xs = (pixels != pixels[0, 0]).any(2).nonzero()
        right = (pixels == ImageColor.getrgb(color["answer"].strip())).all(2)
        box = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
        share = right.sum() / box
        low, high = {" rectangle": (0.99, 1), " circle": (0.7, 0.9), " triangle": (0.4, 0.65)}[shape["answer"]]
        assert low <= share <= high
        assert true["answer"] == (" yes" if shape["answer"].strip() in true["prompt"] else " no")


def test_the_picture_shows_what_was_answered_rightly_and_wrongly(example, tmp_path, monkeypatch) -> None:
    from matplotlib import pyplot

    rows = [
        {"prompt": f"<image> {i} ?", "answer": " red", "images": [picture("red")] if i < 3 else []} for i in range(4)
    ]
    kept: list = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    example.plot_answers(rows, ["red", "blue", "red", "blue"], tmp_path / "answers.png", "lora", each=2)
    shown = [
        [(axis.get_title(), *(t.get_text() for t in axis.texts)) for axis in kept[0].axes[i : i + 2]] for i in (0, 2)
    ]
    assert shown == [[("lora: red", "0 ?"), ("lora: red", "2 ?")], [("lora: blue   right: red", "1 ?"), ("",)]]
    assert (tmp_path / "answers.png").stat().st_size > 1000


def test_text_is_measured_before_and_after_images_are_learned(example, tmp_path) -> None:
    sys.modules.pop("pill_text", None)
    study = importlib.import_module("pill_text")
    words = [f"{a}{b}" for a in ("red", "blue", "old") for b in ("cat", "house", "bird", "s", "ly")]
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 60)) + f" {i}" for i in range(30)]
    (tmp_path / "general.txt").write_text("\n\n".join(texts))
    arguments = ["--general", str(tmp_path / "general.txt"), "--out", str(tmp_path / "out"), "--methods", "lora",
                 "pill_images", "--vocabulary", "320", "--test_rows", "3", "--text_test_rows", "4"]  # fmt: skip
    study.main([*arguments, *SMALL, "--r", "4", "--text_rows", "8"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lora, images = report["runs"]
    assert images["text"] == 0.0  # experts for images alone leave text as it was, bit for bit
    assert lora["text"] != 0.0
    assert abs(images["adapters"] - lora["adapters"]) < 0.2 * lora["adapters"]
    assert images["behind"] != 0.0
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[3].startswith("| pill_images |")
    with pytest.raises(SystemExit, match="one rate for all methods"):
        study.main(["--rates", "1e-2", "1e-3"])
