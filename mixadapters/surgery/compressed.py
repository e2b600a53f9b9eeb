"""Folders in which ternary weights lie as codes: what `save_pretrained` writes, without loss, and back.

A tensor goes into codes where its rows or columns are ternary, as `compress_experts` has made them, and the codes are
shorter. Files of weights have names of their own, so that nothing that does not know the codes loads half a model.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixadapters.core.config import one_of
from mixadapters.core.files import folder_aside, new_folder, read_config, weights_of
from mixadapters.surgery.codec import EncodedRows, PackedRows
from mixadapters.surgery.layouts import EXPERTS_FILE
from mixadapters.surgery.qmoe import CODECS, TernaryMatrix, encode_matrix
from mixadapters.surgery.saving import load_pruned

INDEX = "compression.json"  # which tensors lie in codes, by file
FORMAT = 1
SUFFIX, COMPRESSED = ".safetensors", ".compressed.safetensors"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
NOTE = """
## Compressed weights

Some weights in this folder lie in codes, without loss. It loads by `mixadapters.surgery.load_compressed`, or by
stock libraries from the folder that `mixadapters.surgery.expand_compressed` writes.
"""


class Sizes(NamedTuple):
    """Bytes of the weights of a folder."""

    plain: int  # of all tensors, as `save_pretrained` writes them
    coded: int  # of those that lie in codes, so
    uncoded: int  # of these, plain
    on_disk: int  # of the files of weights


def save_compressed(
    model: nn.Module, folder: str | Path, *, codec: str = "qmoe", adapter_name: str = "default"
) -> Sizes:
    """Save a model, or an adapter of one, with its ternary weights as codes.

    Args:
        folder: a new or an empty one.
        codec: "qmoe": words of 16 bits; "packed": five weights to a byte.
        adapter_name: of a PeftModel.

    Raises:
        ValueError: the folder holds something, or the codec is unknown; nothing is written.
    """
    one_of("codec", codec, CODECS)
    target = new_folder(folder)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        if hasattr(model, "peft_config"):
            if adapter_name not in model.peft_config:
                raise ValueError(f"adapter_name={adapter_name!r} is unknown; have {sorted(model.peft_config)}")
            model.save_pretrained(beside, selected_adapters=[adapter_name])
            plain = Path(beside) if adapter_name == "default" else Path(beside) / adapter_name
        else:
            plain = Path(beside) / "model"
            model.save_pretrained(plain)
        return compress_folder(plain, target, codec=codec)


def compress_folder(source: str | Path, target: str | Path, *, codec: str = "qmoe") -> Sizes:
    """Write the folder `source` of a saved model or adapter again, with ternary weights as codes.

    Raises:
        ValueError: `target` holds something, or `source` has no weights in safetensors.
    """
    one_of("codec", codec, CODECS)
    if (Path(source) / INDEX).exists():
        raise ValueError(f"{source} holds {INDEX}: its weights lie in codes already; expand it first")
    index: dict[str, Any] = {}
    sizes = Sizes(0, 0, 0, 0)
    with folder_aside(target) as aside:
        for path in sorted(Path(source).iterdir()):
            if not path.name.endswith(SUFFIX):
                if path.is_file():
                    shutil.copyfile(path, aside / path.name)
                continue
            tensors, described, counted = _compress(path, codec)
            index[path.name] = described
            written = aside / (path.name.removesuffix(SUFFIX) + COMPRESSED)
            save_file(tensors, written, metadata={"format": "pt"})
            sizes = Sizes(*(a + b for a, b in zip(sizes, (*counted, written.stat().st_size), strict=True)))
        if not index:
            raise ValueError(f"{source} holds no weights in {SUFFIX}: save the model with save_pretrained first")
        content = {"format_version": FORMAT, "files": index}
        (aside / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
        card = aside / "README.md"
        card.write_text((card.read_text(encoding="utf-8") if card.exists() else "") + NOTE, encoding="utf-8")
    return sizes


def _compress(path: Path, codec: str) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, int, int]]:
    """The tensors of a file with codes in place of some, what is to be known of these, and the first of `Sizes`."""
    tensors, described = {}, {}
    plain = coded = uncoded = 0
    with weights_of(path) as weights:
        for key in weights:
            tensor = weights[key]
            plain += tensor.nbytes
            dtype = str(tensor.dtype).removeprefix("torch.")
            form = encode_matrix(tensor, codec) if dtype in DTYPES else None
            if form is None or form.nbytes >= tensor.nbytes:
                tensors[key] = tensor
                continue
            described[key] = {"shape": list(form.shape), "by_columns": form.by_columns, "codec": codec, "dtype": dtype}
            tensors |= {f"{key}.{name}": part for name, part in _parts(form).items()}
            coded, uncoded = coded + form.nbytes, uncoded + tensor.nbytes
    return tensors, described, (plain, coded, uncoded)


def _parts(form: TernaryMatrix) -> dict[str, Tensor]:
    rows = form.rows
    if isinstance(rows, EncodedRows):
        return {"words": rows.words, "ends": rows.ends, "levels": form.levels}
    return {"digits": rows.digits, "levels": form.levels}


def expand_compressed(folder: str | Path, target: str | Path) -> None:
    """Write the folder that was compressed, as it was, for stock libraries.

    Raises:
        ValueError: `folder` is no compressed one, is incomplete or was changed, or `target` holds something.
    """
    source, files = Path(folder), _read_index(Path(folder))
    with folder_aside(target) as aside:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != INDEX and not path.name.endswith(COMPRESSED):
                shutil.copyfile(path, aside / path.name)
        _take_note(aside / "README.md")
        for name, described in files.items():
            path = source / (name.removesuffix(SUFFIX) + COMPRESSED)
            if not path.is_file():
                raise ValueError(f"{folder} has no {path.name}, which its {INDEX} names: copy it there, or save again")
            with weights_of(path) as weights:
                save_file(_expand(path, weights, described), aside / name, metadata={"format": "pt"})


def _take_note(card: Path) -> None:
    """Take off a card what is said of codes, and the card if that was all."""
    if card.exists():
        text = card.read_text(encoding="utf-8").removesuffix(NOTE)
        card.write_text(text, encoding="utf-8")
        if not text:
            card.unlink()


def _expand(path: Path, weights: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, without codes."""
    tensors, used, there = {}, set(), set(weights)
    for key, about in described.items():
        names = ("words", "ends", "levels") if about["codec"] == "qmoe" else ("digits", "levels")
        keys = [f"{key}.{name}" for name in names]
        if missing := [k for k in keys if k not in there]:
            raise ValueError(f"{path} has no {missing[0]!r}, which {INDEX} speaks of: one of the two was changed")
        *rows, levels = (weights[k] for k in keys)
        used.update(keys)
        shape, width = tuple(about["shape"]), about["shape"][-2 if about["by_columns"] else -1]
        form: EncodedRows | PackedRows
        form = EncodedRows(rows[0], rows[1], width) if about["codec"] == "qmoe" else PackedRows(rows[0], width)
        try:
            tensors[key] = TernaryMatrix(form, levels, shape, about["by_columns"]).dense(DTYPES[about["dtype"]])
        except ValueError as error:
            raise ValueError(f"{path}: {key!r}: {error}") from error
    for key in there:
        if key not in used:
            if key in tensors:
                raise ValueError(f"{path}: {key!r} is there twice, in codes and plain")
            tensors[key] = weights[key]
    return tensors


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """What a compressed folder says of its files. Raises ValueError for what could not have been written here."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no {INDEX}: it was not written by save_compressed; load it as it is")
    content = read_config(folder / INDEX)
    if content.get("format_version") != FORMAT:
        raise ValueError(f"{folder / INDEX}: format_version={content.get('format_version')!r}, known is {FORMAT}")
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / INDEX}: `files` must hold names of files and what lies in codes in them")
    for name, described in files.items():
        if Path(name).name != name or not name.endswith(SUFFIX) or not isinstance(described, dict):
            raise ValueError(f"{folder / INDEX}: {name!r} is no name of a file of weights in this folder")
        for key, about in described.items():
            if not _is_described(about):
                raise ValueError(f"{folder / INDEX}: what it says of {key!r} is no shape, dtype and codec: {about!r}")
    return files


def _is_described(about: Any) -> bool:
    if not isinstance(about, dict) or about.keys() != {"shape", "by_columns", "codec", "dtype"}:
        return False
    shape = about["shape"]
    return (
        isinstance(shape, list) and len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
        and math.prod(shape) < 2**48 and type(about["by_columns"]) is bool and about["codec"] in CODECS
        and about["dtype"] in DTYPES
    )  # fmt: skip


def load_compressed(folder: str | Path, base_model: nn.Module | None = None, **options: Any) -> nn.Module:
    """The adapter of a compressed folder in `base_model`, or the model of one.

    Args:
        options: of `PeftModel.from_pretrained`, or of the model class's `from_pretrained`.

    Raises:
        ValueError: `folder` is no compressed one, is incomplete or was changed; or it is an adapter's and there is no
            base model, or the other way round.
    """
    from peft import PeftModel

    _read_index(Path(folder))
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    if is_adapter != (base_model is not None):
        needs = "an adapter: pass its base model" if is_adapter else "a whole model: leave base_model out"
        raise ValueError(f"base_model={type(base_model).__name__}, but {folder} holds {needs}")
    with tempfile.TemporaryDirectory() as parent:
        plain = Path(parent) / "plain"
        expand_compressed(folder, plain)
        if base_model is not None:
            return PeftModel.from_pretrained(base_model, str(plain), **options)
        model = load_pruned(plain, **options) if (plain / EXPERTS_FILE).exists() else _whole(plain, folder, options)
        model.config._name_or_path = model.name_or_path = str(folder)  # what adapters of it will say
        return model


def _whole(plain: Path, folder: str | Path, options: dict[str, Any]) -> Any:
    """The model of a plain folder. Raises ValueError, naming `folder`, where it says no class of transformers."""
    import transformers

    named = read_config(plain / "config.json").get("architectures")
    kind: Any = getattr(transformers, str(named[0]), None) if isinstance(named, list) and len(named) == 1 else None
    if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}: architectures={named!r} name no model of transformers; expand the folder first")
    return kind.from_pretrained(str(plain), **options)
