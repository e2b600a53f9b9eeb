"""What may become of files on disk: each field of a JSON, and each tensor of a file of weights, damaged by itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WRONG: tuple[Any, ...] = (None, "x", "", -1, 2**62, 1e308, float("nan"), [], {}, [None], True, [[-1]])  # of a field


def damaged_json(file: Path) -> Iterator[str]:
    """Damages a file one way after the other, says how, and leaves it as it was."""
    text = file.read_text(encoding="utf-8")
    content = json.loads(text)
    try:
        for cut in ("", text[: len(text) // 2], "null", "[]", "{}", "[" * 50000, text + "x", '"' + text):
            file.write_text(cut, encoding="utf-8")
            yield f"JSON {cut[:20]!r}"
        file.write_bytes(b"\xff\xfe" + text.encode())
        yield "JSON of another encoding"
        for place in _places(content):
            name = ".".join(map(str, place))
            for wrong in ("gone", *WRONG):
                changed = copy.deepcopy(content)
                owner = changed
                for step in place[:-1]:
                    owner = owner[step]
                if wrong == "gone":
                    del owner[place[-1]]
                elif json.dumps(wrong) == json.dumps(owner[place[-1]]):
                    continue
                else:
                    owner[place[-1]] = wrong
                file.write_text(json.dumps(changed), encoding="utf-8")
                yield f"{name} {wrong!r:.30}"
    finally:
        file.write_text(text, encoding="utf-8")


def _places(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of fields, and of the first entry of each list and of each dict of many."""
    inside = list(content.items() if isinstance(content, dict) else enumerate(content))
    for name, value in inside[:1] if isinstance(content, list) or len(inside) > 12 else inside:
        yield (*before, name)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*before, name))


def damaged_weights(file: Path, most: int = 4) -> Iterator[str]:
    """As `damaged_json`. most: tensors that are damaged, of different kinds first."""
    whole, tensors = file.read_bytes(), load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kinds: dict[str, str] = {}
    for key in sorted(tensors):
        kinds.setdefault(key.rpartition(".")[2], key)
    keys = [*kinds.values(), *sorted(set(tensors) - set(kinds.values()))][:most]
    try:
        for length in (0, 7, 9, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            yield f"cut to {length}"
        file.write_bytes(whole + b"12345678")
        yield "longer"
        file.write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
        yield "a huge header"
        save_file({}, file, metadata)
        yield "no tensors"
        save_file({**tensors, "x.weight": torch.ones(2)}, file, metadata)
        yield "one more key"
        for key in keys:
            rest = {name: tensor for name, tensor in tensors.items() if name != key}
            save_file(rest, file, metadata)
            yield f"{key} gone"
            for how, tensor in _damaged(tensors[key]):
                save_file({**rest, key: tensor.contiguous()}, file, metadata)
                yield f"{key} {how}"
    finally:
        file.write_bytes(whole)


def _damaged(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "one axis more", tensor[None]
    yield "one entry", torch.ones((), dtype=tensor.dtype)
    yield "flat", tensor.flatten() if tensor.dim() > 1 else tensor[..., None]
    yield "empty", tensor.new_zeros((0,) * max(tensor.dim(), 1))
    if tensor.dim():
        yield "shorter", tensor[:-1]
        yield "longer", torch.cat([tensor, tensor[:1]])
    for dtype in (torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64):
        if dtype != tensor.dtype:
            yield f"as {dtype}", tensor.to(dtype)
    if tensor.is_floating_point():
        yield "of NaN", torch.full_like(tensor, torch.nan)
        yield "of -inf", torch.full_like(tensor, -torch.inf)
    elif tensor.dtype != torch.bool:
        yield "of the largest", torch.full_like(tensor, torch.iinfo(tensor.dtype).max)
        yield "of the least", torch.full_like(tensor, torch.iinfo(tensor.dtype).min)
