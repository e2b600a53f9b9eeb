"""Questions about images as rows of prompt, answer and images: shapes that are drawn, easy_vqa, ScienceQA.

A row is {"prompt", "answer", "images": [PIL image], "subject", "modality", "tags"}; tags are words that describe the
image, for a vision encoder that has to be pretrained; there may be none.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Row = dict[str, Any]
LETTERS = "ABCDEFGH"
NOT_GIVEN = "not given"  # subject of a question whose file names none
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SIDE = 64  # pixels of a drawn image


@dataclass
class Questions:
    train: list[Row]
    dev: list[Row]
    test: list[Row]


def load(task: str, data_dir: str | None) -> Questions:
    """`task`: "shapes", "easy_vqa" or "scienceqa" below `data_dir`, or the name of ScienceQA on the hub."""
    if task == "shapes":
        return shapes()
    if task not in ("easy_vqa", "scienceqa"):
        return scienceqa_of_the_hub(task)
    if data_dir is None:
        raise SystemExit(f"--task {task} needs --data_dir, the folder that holds vision/easy_vqa and scienceqa")
    return (
        easy_vqa(Path(data_dir, "vision/easy_vqa")) if task == "easy_vqa" else scienceqa(Path(data_dir, "scienceqa"))
    )


def shapes(train: int = 1000, dev: int = 100, test: int = 400, seed: int = 0) -> Questions:
    """One shape on each image, drawn here, and three questions on it: its color, its shape, and whether it is so."""
    chance = random.Random(seed)
    return Questions(*([row for _ in range(count) for row in drawn(chance)] for count in (train, dev, test)))


def drawn(chance: random.Random) -> list[Row]:
    """The questions on a new image."""
    shape, color, paper = chance.choice(SHAPES), chance.choice(COLORS), chance.randint(200, 255)
    image = Image.new("RGB", (SIDE, SIDE), (paper, paper, paper))
    width, height = (chance.randint(SIDE // 4, SIDE // 2) for _ in "wh")
    height = width if shape == "circle" else height
    x, y = chance.randint(2, SIDE - width - 2), chance.randint(2, SIDE - height - 2)
    pen, box = ImageDraw.Draw(image), (x, y, x + width, y + height)
    if shape == "triangle":
        pen.polygon([(x, y + height), (x + width, y + height), (x + width // 2, y)], fill=color)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=color)
    told = chance.choice((shape, chance.choice(SHAPES)))
    asked = (
        ("what color is the shape?", color), ("what shape is in the image?", shape),
        (f"is there a {told}?", "yes" if told == shape else "no"),
    )  # fmt: skip
    return [
        {"prompt": f"<image> {question}", "answer": f" {answer}", "images": [image], "subject": subject_of(answer),
         "modality": "image", "tags": {shape, color}}
        for question, answer in asked
    ]  # fmt: skip


def easy_vqa(folder: Path, dev_images: int = 150) -> Questions:
    """Drawn shapes. The dev split is the questions on the last images of the training set."""
    images = read_images(folder / "images.tar.gz")
    splits: dict[str, list[Row]] = {}
    for split in ("train", "test"):
        questions = read_rows(folder / f"{split}_questions.jsonl.gz")
        tags = defaultdict(set)
        for q in questions:
            tags[q["image"]] |= told_by(q)
        splits[split] = [
            {
                "prompt": f"<image> {q['question']}", "answer": f" {q['answer']}", "images": [images[q["image"]]],
                "subject": subject_of(q["answer"]), "modality": "image", "tags": tags[q["image"]],
                "image": q["image"],
            }
            for q in questions
        ]  # fmt: skip
    names = list(dict.fromkeys(row["image"] for row in splits["train"]))
    held = set(names[-min(dev_images, len(names) // 4) :])
    train = [row for row in splits["train"] if row["image"] not in held]
    return Questions(train, [row for row in splits["train"] if row["image"] in held], splits["test"])


def told_by(question: Row) -> set[str]:
    """The shape and the color that a question of easy_vqa and its answer tell of the image."""
    words = set(question["question"].rstrip("?").split())
    if question["answer"] not in ("yes", "no"):
        return words & {*SHAPES, *COLORS} | {question["answer"]}
    denies = bool(words & {"not", "no"})
    return words & {*SHAPES, *COLORS} if (question["answer"] == "yes") != denies else set()


def subject_of(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in SHAPES else "color"


def scienceqa(folder: Path) -> Questions:
    """Test questions with images in the splits of the file; questions on text from the subsets of train and val."""
    images = read_images(folder / "images.tar.gz")
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for name, split in (("train_subset", "train"), ("val_subset", "dev"), ("test", "test")):
        for q in read_rows(folder / f"{name}.jsonl.gz"):
            if q.get("image_file"):
                splits[q["mm_split"].removeprefix("mm_")].append(science_row(q, q["context"], images[q["image_file"]]))
            elif not q["has_image"]:
                splits[split].append(science_row(q, q["context"], None))
    return Questions(**splits)


def scienceqa_of_the_hub(name: str) -> Questions:
    """The whole set, such as derek-thomas/ScienceQA."""
    from datasets import load_dataset

    sets = load_dataset(name)
    return Questions(
        *([science_row(q, q["hint"], q["image"]) for q in sets[s]] for s in ("train", "validation", "test"))
    )


def science_row(q: Row, context: str, image: Any) -> Row:
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, q["choices"], strict=False))
    prompt = f"Question: {q['question']}\nContext: {context or 'N/A'}\nOptions: {options}\nAnswer:"
    return {
        "prompt": prompt if image is None else f"<image>\n{prompt}", "answer": f" {LETTERS[q['answer']]}",
        "images": [] if image is None else [image.convert("RGB")], "subject": q.get("subject") or NOT_GIVEN,
        "modality": "image" if image is not None else "text" if context else "neither", "tags": told_by_science(q),
    }  # fmt: skip


def told_by_science(question: Row) -> set[str]:
    """The words of the image's caption, and the topic; files and the hub do not give both for every question."""
    caption, topic = question.get("caption"), question.get("topic")
    return set(re.findall(r"[a-z]+", (caption or "").lower())) | ({topic} if topic else set())


def read_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_images(path: Path) -> dict[str, Image.Image]:
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isfile()]
        return {m.name: Image.open(io.BytesIO(archive.extractfile(m).read())).convert("RGB") for m in members}
