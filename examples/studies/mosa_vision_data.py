"""Image and text sets for mosa_vision.py, from local files or the hub, as tensors.

Files, under --data_dir: `cifar10_jpeg*.npz` (JPEG bytes end to end, with offsets and labels, for train and test),
`mnist*/*images*.gz` and `*labels*.gz` (the idx format), `omniglot/*.zip` (alphabet/character/drawing.png); text sets
are JSON lines, as for the tasks. scikit-learn's digits need no file.

No class serves both the small ViT and a task: it is trained on the first five classes of CIFAR and all alphabets of
Omniglot but the last two; the tasks are the other five classes, the last alphabet, and MNIST. Without files it is
trained on the digits 0 to 4, and the task is the digits 5 to 9.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mixadapters.tasks.sources import read_texts

TEXT_SETS = ("sst2", "rct_like")
SPLIT_SEED = 13


@dataclass(frozen=True)
class Rows:
    """inputs: images (n, 3, S, S), or token ids (n, T) with `padding`; labels (n,); flip: a mirrored image is one."""

    inputs: Tensor
    labels: Tensor
    flip: bool = False
    padding: int = 0


@dataclass(frozen=True)
class Data:
    train: Rows
    test: Rows


# --- images ------------------------------------------------------------------------------------------------------


def load_images(
    name: str, data_dir: str | None, size: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> tuple[Data, int]:
    """The task `name` with images (n, 3, size, size), normalised; and its number of classes."""
    readers = {"digits": digits, "cifar": cifar, "mnist": mnist, "omniglot": omniglot}
    if name in readers:
        parts = readers[name](None if data_dir is None else Path(data_dir), task=True)
    else:
        parts = from_hub(name)
    labels = sorted(set(torch.cat([part.labels for part in parts]).tolist()))
    table = torch.zeros(max(labels) + 1, dtype=torch.long)
    table[labels] = torch.arange(len(labels))
    train, test = (normalised(part, table, size, mean, std) for part in parts)
    return Data(train, test), len(labels)


def load_pretraining(data_dir: str | None, size: int) -> tuple[Rows, int]:
    """The images that no task uses: (n, 3, size, size), and their number of classes."""
    if data_dir is None:
        parts = [digits(None, task=False)[0]]
    else:
        parts = [reader(Path(data_dir), task=False)[0] for reader in (cifar, omniglot)]
    inputs, labels, start = [], [], 0
    for part in parts:
        found = part.labels.unique()
        table = torch.zeros(int(found.max()) + 1, dtype=torch.long)
        table[found] = torch.arange(start, start + len(found))
        start += len(found)
        rows = normalised(part, table, size, (0.5,) * 3, (0.5,) * 3)
        inputs.append(rows.inputs)
        labels.append(rows.labels)
    return Rows(torch.cat(inputs), torch.cat(labels), flip=len(parts) > 1), start


def normalised(part: Rows, table: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Rows:
    """Images in [0, 1], of any size and one or three channels -> (n, 3, size, size)."""
    images = F.interpolate(part.inputs, size=(size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    shape = (1, 3, 1, 1)
    images = (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return Rows(images, table[part.labels], part.flip)


def parted(images: Tensor, labels: Tensor, test: float = 0.3) -> tuple[Rows, Rows]:
    """A set without a split of its own, parted always in the same way."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held = order[: int(test * len(order))], order[int(test * len(order)) :]
    return Rows(images[held[1]], labels[held[1]]), Rows(images[held[0]], labels[held[0]])


def digits(folder: Path | None, task: bool) -> tuple[Rows, Rows]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    keep = (labels >= 5) == task
    return parted(images[keep], labels[keep])


def mnist(folder: Path | None, task: bool) -> tuple[Rows, Rows]:
    images_file, labels_file = one_file(folder, "mnist*/*images*.gz"), one_file(folder, "mnist*/*labels*.gz")
    images = numpy.frombuffer(gzip.decompress(images_file.read_bytes()), dtype=numpy.uint8, offset=16)
    labels = numpy.frombuffer(gzip.decompress(labels_file.read_bytes()), dtype=numpy.uint8, offset=8)
    return parted(torch.tensor(images).view(-1, 1, 28, 28) / 255, torch.tensor(labels).long())


def cifar(folder: Path | None, task: bool) -> tuple[Rows, Rows]:
    from PIL import Image

    stored = numpy.load(one_file(folder, "cifar10_jpeg*.npz"))
    parts = []
    for split in ("train", "test"):
        data, ends = stored[f"{split}_bytes"], stored[f"{split}_offsets"]
        labels = torch.tensor(stored[f"{split}_labels"]).long()
        keep = ((labels >= 5) == task).nonzero().flatten()
        images = [numpy.asarray(Image.open(io.BytesIO(data[ends[i] : ends[i + 1]].tobytes()))) for i in keep.tolist()]
        pixels = torch.tensor(numpy.stack(images)).permute(0, 3, 1, 2) / 255
        parts.append(Rows(pixels, labels[keep], flip=True))
    return parts[0], parts[1]


def omniglot(folder: Path | None, task: bool) -> tuple[Rows, Rows]:
    """The first ten drawings of a character for training, the others for test."""
    from PIL import Image

    with zipfile.ZipFile(one_file(folder, "omniglot/*.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        alphabets = sorted({name.split("/")[-3] for name in names})
        wanted = alphabets[-1:] if task else alphabets[:-2]
        names = [name for name in names if name.split("/")[-3] in wanted]
        images = [numpy.asarray(Image.open(io.BytesIO(archive.read(n))).convert("L").resize((32, 32))) for n in names]
    characters = sorted({name.rpartition("/")[0] for name in names})
    labels = torch.tensor([characters.index(name.rpartition("/")[0]) for name in names])
    pixels = torch.tensor(numpy.stack(images)).unsqueeze(1) / 255
    early = torch.tensor([int(name.rpartition("_")[2].removesuffix(".png")) <= 10 for name in names])
    if not task:
        early = torch.ones_like(early)
    return Rows(pixels[early], labels[early]), Rows(pixels[~early], labels[~early])


def from_hub(name: str) -> tuple[Rows, Rows]:
    """A set of images and labels by its hub name; its test or validation split is the test."""
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    stored = load_dataset(name)
    held = next((split for split in ("test", "validation") if split in stored), None)
    if "train" not in stored or held is None:
        raise SystemExit(f"--dataset {name}: needs the splits train and test (or validation), has {list(stored)}")
    columns = stored["train"].features
    image = next((n for n, kind in columns.items() if isinstance(kind, ImageColumn)), None)
    label = next((n for n in ("label", "fine_label", "labels") if n in columns), None)
    if image is None or label is None:
        raise SystemExit(f"--dataset {name}: needs a column of images and one called label, has {list(columns)}")
    return rows_of(stored["train"], image, label), rows_of(stored[held], image, label)


def rows_of(rows: Iterable[Any], image: str, label: str) -> Rows:
    pixels, labels = [], []
    for row in rows:
        picture = row[image].convert("RGB").resize((224, 224))
        pixels.append(torch.tensor(numpy.asarray(picture)).permute(2, 0, 1))
        labels.append(row[label])
    return Rows(torch.stack(pixels) / 255, torch.tensor(labels), flip=True)


def one_file(folder: Path | None, pattern: str) -> Path:
    if folder is None:
        raise SystemExit(f"this set is read from files: pass --data_dir, a folder that has {pattern}")
    found = sorted(folder.rglob(pattern))
    if not found:
        raise SystemExit(f"--data_dir {folder} has no {pattern}")
    return found[0]


# --- text --------------------------------------------------------------------------------------------------------


def load_texts(name: str, data_dir: str | None, tokenizer: Any, length: int = 32) -> tuple[Data, int]:
    """Token ids (n, length), padded; training rows, and the dev rows of sst2 or the test rows of rct_like for test."""
    if data_dir is None:
        raise SystemExit(f"--dataset {name} is read from files: pass --data_dir")
    where, text, held = {"sst2": ("glue/sst2", "sentence", "dev"), "rct_like": ("dapt/rct_like", "text", "test")}[name]
    raw = {part: read_texts(Path(data_dir), f"{where}/{part}", text, value="label") for part in ("train", held)}
    names = sorted({label for _, label in raw["train"]})
    parts = []
    for rows in raw.values():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        chosen = [rows[i] for i in order[:4000]]
        tokens = tokenizer(
            [row[0] for row in chosen], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
        labels = torch.tensor([names.index(row[1]) for row in chosen])
        parts.append(Rows(tokens["input_ids"], labels, padding=tokenizer.pad_token_id))
    return Data(parts[0], parts[1]), len(names)
