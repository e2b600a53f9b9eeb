"""Folders in which weights lie as codes: what `save_pretrained` writes, and back.

A tensor goes into codes where its rows or columns are ternary, as `compress_experts` has made them, and the codes are
shorter: without loss. One that is a product of low rank and some rows lies as these: up to the product's rounding.
Files of weights have names of their own, so that nothing that does not know the codes loads half a model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from mixadapters.core.fields import check_kind, one_of
from mixadapters.core.files import digest_of, read_config, weights_of
from mixadapters.core.folders import check_folder, folder_aside, new_folder
from mixadapters.surgery.choices import CODECS
from mixadapters.surgery.codec import EncodedRows, PackedRows
from mixadapters.surgery.layouts import EXPERTS_FILE
from mixadapters.surgery.lowrank import LowRankSparse, content_digest
from mixadapters.surgery.qmoe import TernaryMatrix, encode_matrix
from mixadapters.surgery.saving import load_pruned
from mixadapters.surgery.view import check_model

INDEX = "compression.json"  # which tensors lie in codes, by file
LOW_RANK = "lowrank_sparse"
MOST_LARGER = 256  # times that a product has more entries than its parts: a small file must not fill the memory
PARTS = {
    "qmoe": ("words", "ends", "levels"),
    "packed": ("digits", "levels"),
    LOW_RANK: ("left", "right", "kept", "sparse"),
}  # of each codec, the tensors in the file
FORMAT = 1
SUFFIX, COMPRESSED = ".safetensors", ".compressed.safetensors"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
NOTE = """
## Compressed weights

Some weights in this folder lie in codes. It loads by `mixadapters.surgery.load_compressed`, or by
stock libraries from the folder that `mixadapters.surgery.expand_compressed` writes.
"""


class Sizes(NamedTuple):
    """Bytes of the weights of a folder."""

    plain: int  # of all tensors, as `save_pretrained` writes them
    coded: int  # of those that lie in codes, so
    uncoded: int  # of these, plain
    on_disk: int  # of the files of weights


def save_compressed(
    model: nn.Module, folder: str | Path, *, codec: str = "qmoe", adapter_name: str = "default",
    factors: Mapping[str, LowRankSparse] | None = None,
) -> Sizes:  # fmt: skip
    """Save a model, or an adapter of one, with its ternary weights as codes, and its products as their factors.

    Args:
        folder: a new or an empty one.
        codec: "qmoe": words of 16 bits; "packed": five weights to a byte.
        adapter_name: of a PeftModel.
        factors: `Compression.factors` of method "lowrank_sparse". A matrix that has changed since lies as it is.

    Raises:
        ValueError: the folder holds something, or the codec is unknown; nothing is written.
    """
    check_model(model)
    _check_choice(codec, factors)
    target = new_folder(folder)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        if hasattr(model, "peft_config"):
            if adapter_name not in model.peft_config:
                raise ValueError(f"adapter_name={adapter_name!r} is unknown; have {sorted(model.peft_config)}")
            model.save_pretrained(beside, selected_adapters=[adapter_name])
            plain = Path(beside) if adapter_name == "default" else Path(beside) / adapter_name
        elif adapter_name != "default":
            raise ValueError(f"adapter_name={adapter_name!r}: the model has no adapters of PEFT; leave it out")
        else:
            plain = Path(beside) / "model"
            model.save_pretrained(plain)
        return compress_folder(plain, target, codec=codec, factors=factors)


def compress_folder(
    source: str | Path, target: str | Path, *, codec: str = "qmoe", factors: Mapping[str, LowRankSparse] | None = None
) -> Sizes:
    """Write the folder `source` of a saved model or adapter again, with ternary weights as codes.

    codec, factors: as in `save_compressed`.

    Raises:
        ValueError: `target` holds something, or `source` has no weights in safetensors.
    """
    check_folder(source)
    _check_choice(codec, factors)
    if (Path(source) / INDEX).exists():
        raise ValueError(f"{source} holds {INDEX}: its weights lie in codes already; expand it first")
    index: dict[str, Any] = {}
    digests: dict[str, str] = {}
    sizes = Sizes(0, 0, 0, 0)
    with folder_aside(target) as aside:
        for path in sorted(Path(source).iterdir()):
            if not path.name.endswith(SUFFIX):
                if path.is_file():
                    shutil.copyfile(path, aside / path.name)
                continue
            tensors, described, counted = _compress(path, codec, factors or {})
            index[path.name] = described
            written = aside / (path.name.removesuffix(SUFFIX) + COMPRESSED)
            save_file(tensors, written, metadata={"format": "pt"})
            digests[path.name] = _file_digest(written)
            sizes = Sizes(*(a + b for a, b in zip(sizes, (*counted, written.stat().st_size), strict=True)))
        if not index:
            raise ValueError(f"{source} holds no weights in {SUFFIX}: save the model with save_pretrained first")
        content = {"format_version": FORMAT, "files": index, "digests": digests}
        (aside / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
        card = aside / "README.md"
        card.write_text((card.read_text(encoding="utf-8") if card.exists() else "") + NOTE, encoding="utf-8")
    return sizes


def _check_choice(codec: str, factors: Any) -> None:
    one_of("codec", codec, CODECS)
    if factors is not None:
        check_kind("factors", factors, Mapping, "those of a Compression")
        for form in factors.values():
            check_kind("factors: an entry", form, LowRankSparse, "a LowRankSparse")


def _file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            total.update(part)
    return total.hexdigest()


def _compress(
    path: Path, codec: str, factors: Mapping[str, LowRankSparse]
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, int, int]]:
    """The tensors of a file with codes in place of some, what is to be known of these, and the first of `Sizes`."""
    tensors, described = {}, {}
    plain = coded = uncoded = 0
    with weights_of(path) as weights:
        for key in weights:
            tensor = weights[key]
            plain += tensor.nbytes
            dtype = str(tensor.dtype).removeprefix("torch.")
            form = _form_of(tensor, codec, factors) if dtype in DTYPES else None
            if form is None or form.nbytes >= tensor.nbytes:
                tensors[key] = tensor
                continue
            used = LOW_RANK if isinstance(form, Products) else codec
            described[key] = {"shape": list(form.shape), "by_columns": form.by_columns, "codec": used, "dtype": dtype}
            if tuple(form.shape) != tuple(tensor.shape):
                described[key]["halves"] = True
            tensors |= {f"{key}.{name}": part for name, part in _parts(form).items()}
            coded, uncoded = coded + form.nbytes, uncoded + tensor.nbytes
    return tensors, described, (plain, coded, uncoded)


class Products(NamedTuple):
    """A matrix, or a stack of them, each in one piece or in two, one above the other, as products and some rows."""

    pieces: LowRankSparse  # of stacks: left (n, M, rank), right (n, rank, K), kept (n, m), sparse (n, m, K)
    shape: tuple[int, ...]
    by_columns: bool  # whether they are those of the transposed matrix

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.pieces)

    def dense(self) -> Tensor:
        """Raises ValueError where the parts do not belong together."""
        left, right, kept, sparse = self.pieces
        *stack, rows, columns = (*self.shape[:-2], *(self.shape[-2:][::-1] if self.by_columns else self.shape[-2:]))
        fits = all(part.dim() == 3 for part in (left, right, sparse)) and kept.dim() == 2 and left.shape[1] > 0
        if not fits or (
            right.shape != (len(left), left.shape[2], columns) or sparse.shape != (*kept.shape, columns)
            or len(kept) != len(left) or len(left) * left.shape[1] != math.prod(stack) * rows
            or len({left.dtype, right.dtype, sparse.dtype}) > 1 or kept.dtype != torch.int32
        ):  # fmt: skip
            raise ValueError(f"its factors {[tuple(p.shape) for p in self.pieces]} do not make up {self.shape}")
        if math.prod(self.shape) > MOST_LARGER * sum(part.numel() for part in self.pieces):
            raise ValueError(f"its factors are more than {MOST_LARGER} times smaller than {self.shape}")
        if kept.numel() and not bool(((kept >= 0) & (kept < left.shape[1])).all()):
            raise ValueError("it keeps rows that it does not have")
        made = [
            LowRankSparse(*parts[:2], parts[2].long(), parts[3]).dense() for parts in zip(*self.pieces, strict=True)
        ]
        whole = torch.stack(made).view(*stack, rows, columns)
        return whole.transpose(-1, -2).contiguous() if self.by_columns else whole


def _form_of(tensor: Tensor, codec: str, factors: Mapping[str, LowRankSparse]) -> TernaryMatrix | Products | None:
    """The codes of a tensor; of gate and up in one, which may be ternary each by its columns, of these two halves."""
    if factors:
        return _products_of(tensor, factors)
    form = encode_matrix(tensor, codec)
    if form is None and tensor.dim() > 2 and not tensor.shape[-2] % 2:
        return encode_matrix(tensor.unflatten(-2, (2, -1)), codec)
    return form


def _products_of(tensor: Tensor, factors: Mapping[str, LowRankSparse]) -> Products | None:
    """The factors of a matrix, of a stack of them, or of gate and up in one; None where some are not known."""
    shapes = {(form.left.shape[0], form.right.shape[1]) for form in factors.values()}
    if tensor.dim() < 2:
        return None
    for by_columns in (False, True):
        rows = tensor.transpose(-1, -2) if by_columns else tensor
        for count in (1, 2):
            if rows.shape[-2] % count or (rows.shape[-2] // count, rows.shape[-1]) not in shapes:
                continue
            pieces = rows.reshape(-1, rows.shape[-2] // count, rows.shape[-1])
            forms = [factors.get(content_digest(piece)) for piece in pieces]
            known = [form for form in forms if form is not None]
            if len(known) == len(forms):
                left, right, kept, sparse = (torch.stack(parts).cpu() for parts in zip(*known, strict=True))
                found = Products(LowRankSparse(left, right, kept.int(), sparse), tuple(tensor.shape), by_columns)
                small = math.prod(found.shape) > MOST_LARGER * sum(part.numel() for part in found.pieces)
                return None if small else found
    return None


def _parts(form: TernaryMatrix | Products) -> dict[str, Tensor]:
    if isinstance(form, Products):
        return form.pieces._asdict()
    rows = form.rows
    if isinstance(rows, EncodedRows):
        return {"words": rows.words, "ends": rows.ends, "levels": form.levels}
    return {"digits": rows.digits, "levels": form.levels}


def expand_compressed(folder: str | Path, target: str | Path) -> None:
    """Write the folder that was compressed, as it was, for stock libraries.

    Products are computed anew, so an adapter that has some gets a digest of what they are here.

    Raises:
        ValueError: `folder` is no compressed one, is incomplete or was changed, or `target` holds something.
    """
    check_folder(folder)
    source = Path(folder)
    files, digests = _read_index(source)
    with folder_aside(target) as aside:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != INDEX and not path.name.endswith(COMPRESSED):
                shutil.copyfile(path, aside / path.name)
        _take_note(aside / "README.md")
        for name, described in files.items():
            path = source / (name.removesuffix(SUFFIX) + COMPRESSED)
            if not path.is_file():
                raise ValueError(f"{folder} has no {path.name}, which its {INDEX} names: copy it there, or save again")
            if name in digests and _file_digest(path) != digests[name]:
                raise ValueError(f"{path} is not what {INDEX} was written with: one of the two was changed")
            with weights_of(path) as weights:
                save_file(_expand(path, weights, described), aside / name, metadata={"format": "pt"})
            if any(about["codec"] == LOW_RANK for about in described.values()):
                _renew_digest(aside, name)


def _take_note(card: Path) -> None:
    """Take off a card what is said of codes, and the card if that was all."""
    if card.exists():
        text = card.read_text(encoding="utf-8").removesuffix(NOTE)
        card.write_text(text, encoding="utf-8")
        if not text:
            card.unlink()


def _renew_digest(folder: Path, name: str) -> None:
    """Have the config of a plain folder say the digest of the weights that are in it now."""
    config_file = folder / CONFIG_NAME
    config = read_config(config_file) if config_file.exists() else {}
    if config.get("digest") is not None:
        _, *orders = str(config["digest"]).split()
        with weights_of(folder / name) as weights:
            found = digest_of(weights, str(config.get("peft_type")), config.get("modules_to_save"))
        config["digest"] = " ".join([str(found), *orders])
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _expand(path: Path, weights: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, without codes."""
    tensors, used, there = {}, set(), set(weights)
    for key, about in described.items():
        keys = [f"{key}.{name}" for name in PARTS[about["codec"]]]
        if missing := [k for k in keys if k not in there]:
            raise ValueError(f"{path} has no {missing[0]!r}, which {INDEX} speaks of: one of the two was changed")
        used.update(keys)
        try:
            tensors[key] = _decoded([weights[k] for k in keys], about)
        except ValueError as error:
            raise ValueError(f"{path}: {key!r}: {error}") from error
    for key in there:
        if key not in used:
            if key in tensors:
                raise ValueError(f"{path}: {key!r} is there twice, in codes and plain")
            tensors[key] = weights[key]
    return tensors


def _decoded(parts: list[Tensor], about: Mapping[str, Any]) -> Tensor:
    """The tensor of some codes. Raises ValueError where they do not belong together."""
    shape, by_columns, dtype = tuple(about["shape"]), about["by_columns"], DTYPES[about["dtype"]]
    if about["codec"] == LOW_RANK:
        made = Products(LowRankSparse(*parts), shape, by_columns).dense()
        if made.dtype != dtype:
            raise ValueError(f"its factors are of {made.dtype}, and {INDEX} says {dtype}")
        return made
    width = shape[-2 if by_columns else -1]
    form: EncodedRows | PackedRows
    form = EncodedRows(parts[0], parts[1], width) if about["codec"] == "qmoe" else PackedRows(parts[0], width)
    made = TernaryMatrix(form, parts[-1], shape, by_columns).dense(dtype)
    return made.flatten(-3, -2) if "halves" in about else made


def _read_index(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What a compressed folder says of its files, and their digests, which folders of before have none of.

    Raises:
        ValueError: it could not have been written here.
    """
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
    digests = content.get("digests", {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"{folder / INDEX}: `digests` must hold one for each file")
    return files, digests


def _is_described(about: Any) -> bool:
    if not isinstance(about, dict) or about.keys() - {"halves"} != {"shape", "by_columns", "codec", "dtype"}:
        return False
    shape = about["shape"]
    return (
        isinstance(shape, list) and len(shape) >= (4 if "halves" in about else 2)
        and about.get("halves", True) is True and all(type(n) is int and n > 0 for n in shape)
        and math.prod(shape) < 2**48 and type(about["by_columns"]) is bool
        and about["codec"] in tuple(PARTS) and about["dtype"] in tuple(DTYPES)  # whatever they are, a list too
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

    check_folder(folder)
    _read_index(Path(folder))
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    if is_adapter != (base_model is not None):
        needs = "an adapter: pass its base model" if is_adapter else "a whole model: leave base_model out"
        raise ValueError(f"base_model={type(base_model).__name__}, but {folder} holds {needs}")
    with tempfile.TemporaryDirectory() as parent:
        plain = Path(parent) / Path(folder).resolve().name  # which warnings say
        expand_compressed(folder, plain)
        try:
            if base_model is not None:
                return PeftModel.from_pretrained(base_model, str(plain), **options)
            pruned = (plain / EXPERTS_FILE).exists()
            model = load_pruned(plain, **options) if pruned else _whole(plain, folder, options)
        except ValueError as error:
            said = str(error).replace(str(plain), str(folder))
            raise ValueError(said if str(folder) in said else f"{folder}: {said}") from error
        model.config._name_or_path = model.name_or_path = str(folder)  # what adapters of it will say
        return model


def _whole(plain: Path, folder: str | Path, options: dict[str, Any]) -> Any:
    """The model of a plain folder. Raises ValueError, naming `folder`, where it says no class of transformers."""
    import transformers

    named = read_config(plain / "config.json").get("architectures")
    kind: Any = getattr(transformers, str(named[0]), None) if isinstance(named, list) and len(named) == 1 else None
    is_model = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        raise ValueError(f"{folder}: architectures={named!r} name no model of transformers; expand the folder first")
    return kind.from_pretrained(str(plain), **options)
