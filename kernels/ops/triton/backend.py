"""The operation by Triton kernels on CUDA and ROCm; `mixadapters.kernels.backends` says what a backend is."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixadapters.kernels.hashing import threshold
from mixadapters.kernels.problem import Problem
from mixadapters.kernels.triton import configs, kernels
from mixadapters.kernels.triton.launch import architecture, launch
from mixadapters.kernels.triton.plan import Pass, Plan, column_tables, plan

_BIAS = {"down": "b_down", "gate": "b_gate"}  # summed along with the weight's gradient
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def refuses(p: Problem) -> str | None:
    """Why the kernels cannot run `p`, or None."""
    if p.x.device.type != "cuda" and not configs.interpreted():
        return f"x is on {p.x.device.type}, and the kernels need a GPU"
    if p.x.dtype not in DTYPES:
        return f"x is {p.x.dtype}; the kernels take float32, float16 and bfloat16"
    if max(p.ranks, default=0) > configs.WIDEST:
        return f"a rank of {max(p.ranks)} is above {configs.WIDEST}"
    if p.x.stride(1) != 1:
        return f"the columns of x are {p.x.stride(1)} elements apart, not 1"
    if p.run > 1 and p.x.shape[0] % p.run:
        return f"{p.x.shape[0]} rows are no multiple of run={p.run}"
    return None


def keeps(p: Problem) -> tuple[Tensor, ...]:
    """What `forward` keeps: z (passes, 1 or 2, N, widest window) fp32, and the tables of sorted rows, if any."""
    todo = plan(p, training=True)
    return _hidden(p, todo, len(todo.passes)), *todo.tables


def forward(p: Problem, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y (N, M), and what `keeps` says if `keep`."""
    call = _Call(p, keep)
    p, todo = call.p, call.plan
    z = _hidden(p, todo, len(todo.passes) if keep else 1)
    y, base, base_weight = p.x, p.base, p.base_weight
    for i, step in enumerate(todo.passes):
        # Between passes sums stay in fp32.
        final = p.x.dtype if p.base is None else p.base.dtype
        y = p.x.new_empty(p.x.shape[0], p.up.shape[0], dtype=final if i == len(todo.passes) - 1 else torch.float32)
        whole = z[i if keep else 0]
        parts = call.shrink_parts(p.x.shape[1], p.gate is not None)
        partial = whole if parts == 1 else z.new_empty(parts, *whole.shape)
        call.shrink(step, p.x, p.down, p.gate, partial, parts, seed=call.seed)
        call.expand(step, partial, whole if keep and parts > 1 else None, parts, base, base_weight, y)
        base, base_weight = y, None
    return y, (z, *todo.tables) if keep else ()


def _hidden(p: Problem, todo: Plan, passes: int) -> Tensor:
    return p.x.new_empty(passes, 1 if p.gate is None else 2, p.x.shape[0], todo.hidden, dtype=torch.float32)


def backward(p: Problem, kept: tuple[Tensor, ...], grad: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients named in `needs`, each in the dtype of its field; never those of base and base_weight."""
    z, *tables = kept
    call = _Call(p, True, tuple(tables))
    p, todo = call.p, call.plan
    rows = p.x.shape[0]
    sums = {name: _Sum(call, name) for name in ("down", "gate", "up", "b_up") if needs & {name, _BIAS.get(name)}}
    weigh = bool(needs & {"weights", "scale"})
    dweights = p.x.new_zeros(rows, p.slots, dtype=torch.float32) if weigh else None
    dx = None
    # Each pass: the gradient of the hidden values, from it that of x, and beside it the left factors of those of the
    # weights, `lefts`, which meet x or the output's gradient in `_Sum.add`.
    for i, step in enumerate(todo.passes):
        parts = call.shrink_parts(p.up.shape[0], False)
        dh = z.new_empty(parts, rows, todo.hidden)
        call.shrink(step, grad, p.up.t(), None, dh, parts)
        b_up_dot = None
        if weigh and p.b_up is not None:
            b_up_dot = z.new_empty(rows, todo.experts)
            call.shrink(step, grad, p.b_up, None, b_up_dot, 1, by_expert=True)
        before = dx  # of earlier passes, to which this one adds; fp32 until the last has
        if "x" in needs:
            dx = p.x.new_empty(p.x.shape, dtype=p.x.dtype if i == len(todo.passes) - 1 else torch.float32)
        lefts = {name: p.x.new_empty(rows, total.hidden) for name, total in sums.items()}
        slot = 0 if todo.mode == "all" else i
        call.expand_back(
            step, z[i], dh, parts, b_up_dot, before, dx, lefts, None if dweights is None else dweights[:, slot:]
        )
        for name, total in sums.items():
            total.add(step, i, lefts[name], p.x if name in _BIAS else grad)
    found = {"x": dx} if dx is not None else {}
    for name, total in sums.items():
        found[name], bias = total.finish()
        if bias is not None:
            found[_BIAS[name]] = bias
    if dweights is not None:
        found |= _weight_gradients(p, dweights)
    return {name: gradient for name, gradient in found.items() if name in needs}


def _weight_gradients(p: Problem, dweights: Tensor) -> dict[str, Tensor]:
    """Of weights and scale, from `dweights` (N, k), which has neither factor."""
    found = {}
    if p.weights is not None:
        scaled = dweights
        if p.scale is not None:
            scale = p.scale.float()
            if p.indices is not None:
                scale = scale[p.indices.clamp_min(0).long()].masked_fill(p.indices < 0, 1)
            scaled = dweights * scale
        found["weights"] = scaled.to(p.weights.dtype)
    if p.scale is not None:
        values = dweights if p.weights is None else dweights * p.weights.float()
        if p.indices is None:
            by_expert = values.sum(0)
        else:
            # By sorting: adding at an index would add in any order.
            experts, order = p.indices.reshape(-1).sort(stable=True)
            bounds = torch.arange(len(p.ranks) + 1, device=experts.device, dtype=experts.dtype)
            offsets = torch.searchsorted(experts, bounds)
            by_expert = torch.segment_reduce(values.reshape(-1)[order], "sum", offsets=offsets, unsafe=True)
        found["scale"] = by_expert.to(p.scale.dtype)
    return found


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


class _Call:
    """A problem with its plan, and how each kernel is launched for it."""

    def __init__(self, p: Problem, training: bool, tables: tuple[Tensor, ...] = ()) -> None:
        self.p = p = p._replace(
            b_down=_dense(p.b_down), b_up=_dense(p.b_up), b_gate=_dense(p.b_gate), indices=_dense(p.indices),
            weights=_dense(p.weights), scale=_dense(p.scale), base=_dense(p.base), base_weight=_dense(p.base_weight),
        )  # fmt: skip
        self.plan: Plan = plan(p, training, tables)
        self.arch = architecture(p.x.device)
        self.starts, self.owners = column_tables(p.ranks, p.x.device)
        self.unit_starts = column_tables((1,) * len(p.ranks), p.x.device)[0] if p.b_up is not None else None
        self.common = {
            "MODE": self.plan.mode,
            "ALIGN": gcd(16, *p.ranks),
            "DTYPE": DTYPES[p.x.dtype],
            "PRECISION": configs.precision(p.x.dtype, self.arch),
        }
        # Of a run, or of the batch; unknown where it does not or must not matter.
        self.rows: int | None = p.run if self.plan.mode == "runs" else p.x.shape[0]
        if p.batch_invariant or self.plan.mode == "sorted":
            self.rows = None
        self.seed = p.seed if p.dropout else None
        self.keep_factor = 1 / (1 - p.dropout)
        self.threshold = threshold(p.dropout)
        self.experts = configs.bucket(self.plan.experts)

    def tiles(self, kernel: str, width: int, gated: bool, by_expert: bool = False) -> configs.Tiles:
        hidden = self.plan.experts if by_expert else self.plan.hidden
        tiles = configs.tiles(kernel, self.arch, self.p.x.dtype, hidden, self.rows, width, gated)
        if self.rows is None and kernel != "wgrad":
            tiles = tiles._replace(rows=configs.sorted_rows(self.p.x.dtype, self.plan.hidden, self.p.gate is not None))
        return tiles

    def programs(self, step: Pass, size: int) -> int:
        """Tiles of `size` rows."""
        rows = self.p.x.shape[0]
        if step.tiles is not None:
            return step.tiles.shape[1]
        if self.plan.mode == "runs":
            return rows // self.p.run * triton.cdiv(self.p.run, size)
        return triton.cdiv(rows, size)

    def shrink_parts(self, width: int, gated: bool) -> int:
        tiles = self.tiles("shrink", width, gated)
        blocks = triton.cdiv(width, tiles.width)
        return configs.parts(
            "shrink", self.arch, self.programs(self.plan.passes[0], tiles.rows), blocks, self.p.batch_invariant
        )

    def _where(self, step: Pass) -> dict[str, Any]:
        """Which rows meet which experts."""
        return {
            "INDICES": step.indices, "ORDER": step.order, "TILES": step.tiles, "STARTS": self.starts,
            "RUN": self.p.run, "TILES_MAX": 0 if step.tiles is None else step.tiles.shape[1],
            "FIRST": step.first, "LAST": step.last, "index_stride": _row_stride(step.indices),
        }  # fmt: skip

    def _weighing(self, step: Pass) -> dict[str, Any]:
        """What weighs the experts' outputs."""
        return {
            "WEIGHTS": step.weights, "SCALE": self.p.scale, "OWNERS": self.owners,
            "weight_stride": _row_stride(step.weights),
        }  # fmt: skip

    def _dropping(self, seed: Tensor | None) -> dict[str, Any]:
        return {
            "SEED": seed, "THRESHOLD": self.threshold, "keep_factor": self.keep_factor if seed is not None else 1.0
        }  # fmt: skip

    def _shape(self, tiles: configs.Tiles, parts: int) -> dict[str, Any]:
        """Constants of the two kernels that expand."""
        return {
            **self.common, "ACT": self.p.act, "GATED": self.p.gate is not None, "PARTS": parts, "STAGES": tiles.stages,
            "BM": tiles.rows, "BR": tiles.hidden, "BE": self.experts, "BN": tiles.width, "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }  # fmt: skip

    def shrink(
        self, step: Pass, x: Tensor, w: Tensor, v: Tensor | None, z: Tensor, parts: int,
        seed: Tensor | None = None, by_expert: bool = False,
    ) -> None:  # fmt: skip
        """z (parts, ..., N, hidden) = x w^T in `parts` parts; w and v are (R, K) of any strides, or w is (E, K)."""
        tiles = self.tiles("shrink", x.shape[1], v is not None, by_expert)
        given = {
            **self._where(step), **self._dropping(seed),
            "X": x, "W": w, "V": v, "Z": z, "N": x.shape[0], "K": x.shape[1], "HIDDEN": z.shape[-1],
            "x_stride": x.stride(0), "w_column": w.stride(0), "w_k": w.stride(1),
            "v_column": v.stride(0) if v is not None else 0, "v_k": v.stride(1) if v is not None else 0,
            "z_part": z.stride(0) if parts > 1 else 0, "z_gate": x.shape[0] * z.shape[-1],
        }  # fmt: skip
        common = self.common
        if by_expert:
            given |= {"STARTS": self.unit_starts}
            common = {**common, "ALIGN": 1}
        launch(
            kernels.shrink, (self.programs(step, tiles.rows), parts), given,
            **common, EVEN=x.shape[1] % tiles.width == 0, BM=tiles.rows, BR=tiles.hidden, BK=tiles.width,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def expand(
        self, step: Pass, partial: Tensor, z: Tensor | None, parts: int, base: Tensor | None,
        base_weight: Tensor | None, y: Tensor,
    ) -> None:  # fmt: skip
        """y (N, M) from the parts of z; their sum goes to `z`."""
        p, tiles = self.p, self.tiles("expand", y.shape[1], False)
        programs = self.programs(step, tiles.rows)
        columns = configs.parts("expand", self.arch, programs, triton.cdiv(y.shape[1], tiles.width))
        given = {
            **self._where(step), **self._weighing(step),
            "Z": partial, "Z_SUM": z, "B_DOWN": p.b_down, "B_GATE": p.b_gate, "UP": p.up, "B_UP": p.b_up,
            "BASE": base, "BASE_WEIGHT": base_weight, "Y": y,
            "N": y.shape[0], "M": y.shape[1], "HIDDEN": self.plan.hidden,
            "z_part": partial.stride(0) if parts > 1 else 0, "z_gate": partial.stride(-3),
            "up_column": p.up.stride(1), "up_m": p.up.stride(0), "base_stride": _row_stride(base),
        }  # fmt: skip
        even = y.shape[1] % tiles.width == 0
        launch(kernels.expand, (programs, columns), given, EVEN=even, **self._shape(tiles, parts))

    def expand_back(
        self, step: Pass, z: Tensor, dh: Tensor, parts: int, b_up_dot: Tensor | None, before: Tensor | None,
        dx: Tensor | None, lefts: dict[str, Tensor], dweights: Tensor | None,
    ) -> None:  # fmt: skip
        """dx (N, K) from the parts of dh, and what the gradients of all weights are made of."""
        p, width = self.p, self.p.x.shape[1]
        tiles = self.tiles("expand_back", width, p.gate is not None)
        programs = self.programs(step, tiles.rows)
        columns = 1
        if dx is not None:
            columns = configs.parts("expand_back", self.arch, programs, triton.cdiv(width, tiles.width))
        given = {
            **self._where(step), **self._weighing(step), **self._dropping(self.seed),
            "Z": z, "DH": dh, "B_DOWN": p.b_down, "B_GATE": p.b_gate, "DOWN": p.down, "GATE": p.gate,
            "B_UP_DOT": b_up_dot, "DX_BEFORE": before, "DX": dx, "DZ": lefts.get("down"), "DV": lefts.get("gate"),
            "HS": lefts.get("up"), "WS": lefts.get("b_up"), "DWEIGHTS": dweights,
            "N": z.shape[1], "K": width, "HIDDEN": self.plan.hidden, "z_gate": z.stride(0), "dh_part": dh.stride(0),
            "down_column": p.down.stride(0), "down_k": p.down.stride(1),
            "gate_column": p.gate.stride(0) if p.gate is not None else 0,
            "gate_k": p.gate.stride(1) if p.gate is not None else 0,
            "dweight_stride": _row_stride(dweights), "dot_width": self.plan.experts,
        }  # fmt: skip
        even = width % tiles.width == 0
        launch(kernels.expand_back, (programs, columns), given, EVEN=even, **self._shape(tiles, parts))


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


class _Sum:
    """The gradient of one weight, summed over parts of the rows and over passes."""

    def __init__(self, call: _Call, name: str) -> None:
        self.call, self.name = call, name
        p = call.p
        self.weight: Tensor = getattr(p, name)
        by_expert = name == "b_up"
        # Rows are the hidden columns, or the experts; columns those of the other factor.
        self.shape = (len(p.ranks) if by_expert else sum(p.ranks), p.x.shape[1] if name in _BIAS else p.up.shape[0])
        self.starts = call.unit_starts if by_expert else call.starts
        self.hidden = call.plan.experts if by_expert else call.plan.hidden
        self.tiles = configs.tiles("wgrad", call.arch, p.x.dtype, self.hidden, call.rows, self.shape[1])
        self.hidden_blocks = triton.cdiv(self.hidden, self.tiles.hidden)
        groups = self.hidden_blocks * (1 if call.plan.mode == "all" else len(p.ranks))
        self.blocks = triton.cdiv(self.shape[1], self.tiles.width), groups
        rows = p.run if call.plan.mode == "runs" else p.x.shape[0]
        if call.plan.mode == "sorted":
            rows //= len(p.ranks)
        # At least four tiles of rows for each part: the workspace costs memory traffic too.
        most = max(1, rows // (4 * self.tiles.rows))
        self.parts = configs.parts("wgrad", call.arch, self.blocks[0] * self.blocks[1], most)
        self.all_parts = self.parts * (1 if call.plan.mode == "all" else len(call.plan.passes))
        if self.all_parts == 1:
            self.out = torch.empty_like(self.weight)
            view = self.out.t() if name == "up" else self.out
            self.strides = (0, *view.stride())
        else:
            self.out = p.x.new_empty(self.all_parts, *self.shape, dtype=torch.float32)
            self.strides = self.out.stride()
        bias = _BIAS.get(name)
        has_bias = bias is not None and getattr(p, bias) is not None
        self.bias = p.x.new_empty(self.all_parts, self.shape[0], dtype=torch.float32) if has_bias else None

    def add(self, step: Pass, i: int, left: Tensor, right: Tensor) -> None:
        """The share of one pass: left (N, hidden)^T right (N, C), for the rows of each expert."""
        call, p, tiles = self.call, self.call.p, self.tiles
        first_part = 0 if call.plan.mode == "all" else i * self.parts
        seed = call.seed if self.name in _BIAS else None
        given = {
            **call._dropping(seed),
            "L": left, "V": right, "OUT": self.out[first_part:] if self.all_parts > 1 else self.out,
            "BIAS": None if self.bias is None else self.bias[first_part:],
            "INDICES": step.indices, "ORDER": step.order, "OFFSETS": step.offsets, "STARTS": self.starts,
            "N": right.shape[0], "C": right.shape[1], "HIDDEN": self.hidden, "RUN": p.run,
            "FIRST": step.first, "LAST": step.last, "v_stride": right.stride(0),
            "out_part": self.strides[0], "out_row": self.strides[1], "out_column": self.strides[2],
            "bias_part": self.shape[0], "index_stride": _row_stride(step.indices),
        }  # fmt: skip
        launch(
            kernels.wgrad, (*self.blocks, self.parts), given,
            MODE=call.plan.mode, EVEN=right.shape[1] % tiles.width == 0, DTYPE=call.common["DTYPE"],
            PRECISION=call.common["PRECISION"], BLOCKS=self.hidden_blocks,
            BM=tiles.rows, BR=tiles.hidden, BC=tiles.width, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """The gradient, and that of the bias."""
        out = self.out
        if self.all_parts > 1:
            out = out.sum(0)
            out = (out.t() if self.name == "up" else out).to(self.weight.dtype)
        bias = None if self.bias is None else self.bias.sum(0).to(getattr(self.call.p, _BIAS[self.name]).dtype)
        return out, bias
