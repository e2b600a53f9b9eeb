"""The Triton kernels: two for the forward, the same two mirrored for the gradient of x, one for those of the weights.

A program works on a tile of rows and a window of experts, whose columns lie side by side in the hidden width R.
MODE says where a tile's rows and window come from:

- "all": consecutive rows, the experts [FIRST, LAST) for each of them: a mixture of all;
- "runs": consecutive rows of one run, and the one expert that the run has chosen;
- "sorted": rows with the same expert, by the tables of `plan.py`.

No atomics: whatever is summed by several programs goes to a workspace of its own, and is added up in a fixed order.
Products take operands of DTYPE (weights are rounded tile by tile, in registers) and accumulate in fp32.
"""
# No `from __future__ import annotations` here: triton reads the annotations of the parameters.

import triton
import triton.language as tl

# What varies from batch to batch must not lead to another compilation.
VARYING = ["N", "RUN", "TILES_MAX", "FIRST", "LAST", "THRESHOLD"]


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _act(z, ACT: tl.constexpr):
    """The activation and its slope at z, both fp32."""
    if ACT == "identity":
        return z, tl.full(z.shape, 1.0, tl.float32)
    elif ACT == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return z * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "silu":
        s = _sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACT == "tanh")
        t = 2.0 * _sigmoid(2.0 * z) - 1.0
        return t, 1.0 - t * t


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _kept(SEED, rows, columns, THRESHOLD):
    """Which elements dropout keeps, for rows (BM,) and columns (BK,): `hashing.kept`, bit for bit."""
    seed = tl.load(SEED)
    key = _mix(seed.to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32)))
    key = _mix(rows.to(tl.uint32) ^ key)
    column = columns.to(tl.uint32) * 0x9E3779B1
    return _mix(key[:, None] ^ column[None, :]) >= THRESHOLD.to(tl.uint32)


@triton.jit
def _dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def _tile(
    pid, INDICES, index_stride, ORDER, TILES, TILES_MAX, N, RUN, FIRST, LAST, MODE: tl.constexpr, BM: tl.constexpr
):
    """Rows (BM,) int64 of a tile, which of them are there, and its window of experts [first, last)."""
    lane = tl.arange(0, BM)
    if MODE == "all":
        rows = pid.to(tl.int64) * BM + lane
        return rows, rows < N, FIRST, LAST
    elif MODE == "runs":
        per_run = tl.cdiv(RUN, BM)
        run = (pid // per_run).to(tl.int64)
        local = (pid % per_run) * BM + lane
        expert = tl.load(INDICES + run * RUN * index_stride).to(tl.int32)
        return run * RUN + local, local < RUN, tl.maximum(expert, 0), expert + 1
    else:
        expert = tl.load(TILES + pid)
        position = tl.load(TILES + TILES_MAX + pid) + lane
        there = position < tl.load(TILES + 2 * TILES_MAX + pid)
        rows = tl.load(ORDER + position, mask=there, other=0).to(tl.int64)
        return rows, there, tl.maximum(expert, 0), expert + 1


@triton.jit
def _end(low, high, row_there, MODE: tl.constexpr):
    """`high`, or `low` for a tile without rows, which only sorted ones can be."""
    if MODE == "sorted":
        return tl.where(tl.max(row_there.to(tl.int32), 0) > 0, high, low)
    else:
        return high


@triton.jit
def _window(STARTS, first, last, ALIGN: tl.constexpr, BR: tl.constexpr):
    """The first column of a window of experts, int64, the columns (BR,), and which of them are there."""
    start = tl.multiple_of(tl.load(STARTS + first), ALIGN)
    stop = tl.multiple_of(tl.load(STARTS + last), ALIGN)
    columns = start + tl.arange(0, BR)
    return start.to(tl.int64), columns, columns < stop


@triton.jit
def _owners(OWNERS, columns, there, first, MODE: tl.constexpr):
    """The expert that each column belongs to."""
    if MODE == "all":
        return tl.load(OWNERS + columns, mask=there, other=-2)
    else:
        return tl.where(there, first, -2)


@triton.jit
def _weights(rows, row_there, experts, INDICES, index_stride, WEIGHTS, weight_stride, SCALE, BM: tl.constexpr):
    """weight * scale of each row for each of `experts` (B,), 0 where the row did not choose it: (BM, B) fp32."""
    known = experts >= 0
    there = row_there[:, None] & known[None, :]
    if INDICES is None:
        if WEIGHTS is None:
            w = tl.where(there, 1.0, 0.0)
        else:
            w = tl.load(WEIGHTS + rows[:, None] * weight_stride + experts[None, :], mask=there, other=0.0).to(
                tl.float32
            )
    else:
        chosen = tl.load(INDICES + rows * index_stride, mask=row_there, other=-1).to(tl.int32)
        hit = there & (chosen[:, None] == experts[None, :])
        if WEIGHTS is None:
            w = tl.where(hit, 1.0, 0.0)
        else:
            weight = tl.load(WEIGHTS + rows * weight_stride, mask=row_there, other=0.0).to(tl.float32)
            w = tl.where(hit, weight[:, None], 0.0)
    if SCALE is not None:
        w *= tl.load(SCALE + experts, mask=known, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def _sum_parts(P, part_stride, offsets, mask, PARTS: tl.constexpr):
    total = tl.load(P + offsets, mask=mask, other=0.0)
    for s in tl.static_range(1, PARTS):
        total += tl.load(P + s * part_stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def _add_bias(z, B, columns, there):
    if B is not None:
        z += tl.load(B + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=VARYING)
def shrink(
    X, W, V, Z, SEED, INDICES, ORDER, TILES, STARTS,
    N, K, HIDDEN, RUN, TILES_MAX, FIRST, LAST, THRESHOLD, keep_factor,
    x_stride, w_column, w_k, v_column, v_k, z_part, z_gate, index_stride,
    MODE: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Z[part, row, :] = x W^T, and x V^T behind it, over this part of the K columns; with a SEED x is under dropout.

    The backward runs it with the output's gradient for x.
    """
    part = tl.program_id(1)
    rows, row_there, first, last = _tile(
        tl.program_id(0), INDICES, index_stride, ORDER, TILES, TILES_MAX, N, RUN, FIRST, LAST, MODE, BM
    )
    start, _, there = _window(STARTS, first, last, ALIGN, BR)
    lane = tl.arange(0, BR)
    per_part = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(1)) * BK
    low = part * per_part
    high = tl.minimum(low + per_part, K)
    high = _end(low, high, row_there, MODE)
    if MODE != "all":
        high = tl.where(first < last, high, low)
    z = tl.zeros((BM, BR), tl.float32)
    if V is not None:
        v = tl.zeros((BM, BR), tl.float32)
    for k0 in range(low, high, BK):
        k = k0 + tl.arange(0, BK)
        x_mask = row_there[:, None]
        w_mask = there[None, :]
        if not EVEN:
            x_mask = x_mask & (k < K)[None, :]
            w_mask = w_mask & (k < K)[:, None]
        x = tl.load(X + rows[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
        if SEED is not None:
            x = tl.where(_kept(SEED, rows, k, THRESHOLD), x, 0.0)
        w = tl.load(W + start * w_column + lane[None, :] * w_column + k[:, None] * w_k, mask=w_mask, other=0.0)
        z = _dot(x, w, z, DTYPE, PRECISION)
        if V is not None:
            w = tl.load(V + start * v_column + lane[None, :] * v_column + k[:, None] * v_k, mask=w_mask, other=0.0)
            v = _dot(x, w, v, DTYPE, PRECISION)
    at = part.to(tl.int64) * z_part + rows[:, None] * HIDDEN + lane[None, :]
    z_mask = row_there[:, None] & there[None, :]
    tl.store(Z + at, z * keep_factor, mask=z_mask)
    if V is not None:
        tl.store(Z + z_gate + at, v * keep_factor, mask=z_mask)


@triton.jit(do_not_specialize=VARYING)
def expand(
    Z, Z_SUM, B_DOWN, B_GATE, UP, B_UP, WEIGHTS, SCALE, BASE, BASE_WEIGHT, Y, INDICES, ORDER, TILES, STARTS, OWNERS,
    N, M, HIDDEN, RUN, TILES_MAX, FIRST, LAST,
    z_part, z_gate, up_column, up_m, weight_stride, base_stride, index_stride,
    MODE: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Y = base_weight * base + (weight * scale * act(z)) up^T + weight * scale * b_up, in parts of the M columns.

    Rows that chose no expert of the window get their base unchanged. Z_SUM keeps z for the backward, if Z is in parts.
    """
    rows, row_there, first, last = _tile(
        tl.program_id(0), INDICES, index_stride, ORDER, TILES, TILES_MAX, N, RUN, FIRST, LAST, MODE, BM
    )
    start, columns, there = _window(STARTS, first, last, ALIGN, BR)
    lane = tl.arange(0, BR)
    owners = _owners(OWNERS, columns, there, first, MODE)
    hidden_mask = row_there[:, None] & there[None, :]
    at = rows[:, None] * HIDDEN + lane[None, :]
    z = _sum_parts(Z, z_part, at, hidden_mask, PARTS)
    if Z_SUM is not None:
        tl.store(Z_SUM + at, z, mask=hidden_mask & (tl.program_id(1) == 0))
    z = _add_bias(z, B_DOWN, columns, there)
    if GATED:
        v = _sum_parts(Z + z_gate, z_part, at, hidden_mask, PARTS)
        if Z_SUM is not None:
            tl.store(Z_SUM + z_gate + at, v, mask=hidden_mask & (tl.program_id(1) == 0))
        a, _ = _act(_add_bias(v, B_GATE, columns, there), ACT)
        a *= z
    else:
        a, _ = _act(z, ACT)
    w = _weights(rows, row_there, owners, INDICES, index_stride, WEIGHTS, weight_stride, SCALE, BM)
    h = tl.where(w != 0.0, a * w, 0.0).to(DTYPE)  # what a row did not choose adds nothing, be it infinite
    if B_UP is not None:
        experts = first + tl.arange(0, BE)
        expert_there = experts < last
        w = _weights(
            rows, row_there, tl.where(expert_there, experts, -2),
            INDICES, index_stride, WEIGHTS, weight_stride, SCALE, BM,
        )  # fmt: skip
    chosen = tl.max((w != 0.0).to(tl.int32), 1) > 0
    if BASE_WEIGHT is not None:
        base_weight = tl.load(BASE_WEIGHT + rows, mask=row_there, other=0.0).to(tl.float32)
    per_part = tl.cdiv(tl.cdiv(M, BN), tl.num_programs(1)) * BN
    low = tl.program_id(1) * per_part
    # The attribute has the compiler fetch the base ahead too, although it feeds no product.
    high = _end(low, tl.minimum(low + per_part, M), row_there, MODE)
    for m0 in tl.range(low, high, BN, num_stages=STAGES):
        m = m0 + tl.arange(0, BN)
        up_mask = there[:, None]
        y_mask = row_there[:, None]
        if not EVEN:
            up_mask = up_mask & (m < M)[None, :]
            y_mask = y_mask & (m < M)[None, :]
        up = tl.load(UP + start * up_column + lane[:, None] * up_column + m[None, :] * up_m, mask=up_mask, other=0.0)
        y = _dot(h, up, tl.zeros((BM, BN), tl.float32), DTYPE, PRECISION)
        if B_UP is not None:
            b_mask = expert_there[:, None] & (m < M)[None, :]
            bias = tl.load(B_UP + experts[:, None] * M + m[None, :], mask=b_mask, other=0.0)
            y = _dot(w, bias, y, DTYPE, PRECISION)
        if BASE is not None:
            base = tl.load(BASE + rows[:, None] * base_stride + m[None, :], mask=y_mask, other=0.0).to(tl.float32)
            if BASE_WEIGHT is not None:
                base *= base_weight[:, None]
            y = tl.where(chosen[:, None], y + base, base)
        tl.store(Y + rows[:, None] * M + m[None, :], y.to(Y.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=VARYING)
def expand_back(
    Z, DH, B_DOWN, B_GATE, DOWN, GATE, WEIGHTS, SCALE, B_UP_DOT, SEED,
    DX_BEFORE, DX, DZ, DV, HS, WS, DWEIGHTS, INDICES, ORDER, TILES, STARTS, OWNERS,
    N, K, HIDDEN, RUN, TILES_MAX, FIRST, LAST, THRESHOLD, keep_factor,
    z_gate, dh_part, down_column, down_k, gate_column, gate_k, weight_stride, dweight_stride, index_stride, dot_width,
    MODE: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The mirror of `expand`: from z and DH = <dy, up> to dx = DX_BEFORE + dz down + dv gate, in parts of K.

    Beside it, for the gradients of the weights: DZ and DV (of z, and of the gate's), HS = weight * scale * act(z)
    and WS = weight * scale; and DWEIGHTS, which lacks the factor `scale`.
    """
    rows, row_there, first, last = _tile(
        tl.program_id(0), INDICES, index_stride, ORDER, TILES, TILES_MAX, N, RUN, FIRST, LAST, MODE, BM
    )
    start, columns, there = _window(STARTS, first, last, ALIGN, BR)
    lane = tl.arange(0, BR)
    owners = _owners(OWNERS, columns, there, first, MODE)
    hidden_mask = row_there[:, None] & there[None, :]
    at = rows[:, None] * HIDDEN + lane[None, :]
    z = _add_bias(tl.load(Z + at, mask=hidden_mask, other=0.0), B_DOWN, columns, there)
    dh = _sum_parts(DH, dh_part, at, hidden_mask, PARTS)
    w = _weights(rows, row_there, owners, INDICES, index_stride, WEIGHTS, weight_stride, SCALE, BM)
    da = tl.where(w != 0.0, dh * w, 0.0)  # what a row did not choose has no gradient, be it infinite; so below
    if GATED:
        v = _add_bias(tl.load(Z + z_gate + at, mask=hidden_mask, other=0.0), B_GATE, columns, there)
        act, slope = _act(v, ACT)
        a = act * z
        dz = da * act
        dv = tl.where(w != 0.0, da * z * slope, 0.0)
    else:
        a, slope = _act(z, ACT)
        dz = da * slope
    dz = tl.where(w != 0.0, dz, 0.0)
    if tl.program_id(1) == 0:
        if DZ is not None:
            tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=hidden_mask)
        if DV is not None:
            tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=hidden_mask)
        if HS is not None:
            tl.store(HS + at, tl.where(w != 0.0, a * w, 0.0).to(HS.dtype.element_ty), mask=hidden_mask)
        if WS is not None or B_UP_DOT is not None:
            experts = first + tl.arange(0, BE)
            experts = tl.where(experts < last, experts, -2)
            bias_at = rows[:, None] * dot_width + tl.arange(0, BE)[None, :]
            bias_mask = row_there[:, None] & (experts >= 0)[None, :]
        if WS is not None:
            ws = _weights(rows, row_there, experts, INDICES, index_stride, WEIGHTS, weight_stride, SCALE, BM)
            tl.store(WS + bias_at, ws.to(WS.dtype.element_ty), mask=bias_mask)
        if DWEIGHTS is not None:
            # Of a weight: <dy, up a + b_up>, whose first part is the sum of dh * a over the columns of its expert.
            if B_UP_DOT is not None:
                b_up_dot = tl.load(B_UP_DOT + bias_at, mask=bias_mask, other=0.0)
            if INDICES is None:
                for e in range(first, last):
                    dweight = tl.sum(tl.where((owners == e)[None, :], dh * a, 0.0), 1)
                    if B_UP_DOT is not None:
                        dweight += tl.sum(tl.where((experts == e)[None, :], b_up_dot, 0.0), 1)
                    tl.store(DWEIGHTS + rows * dweight_stride + e, dweight, mask=row_there)
            else:
                chosen = tl.load(INDICES + rows * index_stride, mask=row_there, other=-1).to(tl.int32)
                dweight = tl.sum(tl.where(chosen[:, None] == owners[None, :], dh * a, 0.0), 1)
                if B_UP_DOT is not None:
                    dweight += tl.sum(tl.where(chosen[:, None] == experts[None, :], b_up_dot, 0.0), 1)
                inside = row_there & (chosen >= first) & (chosen < last)
                tl.store(DWEIGHTS + rows * dweight_stride, dweight, mask=inside)
    if DX is not None:
        dz = dz.to(DTYPE)
        if GATED:
            dv = dv.to(DTYPE)
        per_part = tl.cdiv(tl.cdiv(K, BN), tl.num_programs(1)) * BN
        low = tl.program_id(1) * per_part
        high = _end(low, tl.minimum(low + per_part, K), row_there, MODE)
        for k0 in tl.range(low, high, BN, num_stages=STAGES):
            k = k0 + tl.arange(0, BN)
            w_mask = there[:, None]
            x_mask = row_there[:, None]
            if not EVEN:
                w_mask = w_mask & (k < K)[None, :]
                x_mask = x_mask & (k < K)[None, :]
            down = tl.load(
                DOWN + start * down_column + lane[:, None] * down_column + k[None, :] * down_k, mask=w_mask, other=0.0
            )
            dx = _dot(dz, down, tl.zeros((BM, BN), tl.float32), DTYPE, PRECISION)
            if GATED:
                gate = tl.load(
                    GATE + start * gate_column + lane[:, None] * gate_column + k[None, :] * gate_k,
                    mask=w_mask,
                    other=0.0,
                )
                dx = _dot(dv, gate, dx, DTYPE, PRECISION)
            if SEED is not None:
                dx = tl.where(_kept(SEED, rows, k, THRESHOLD), dx * keep_factor, 0.0)
            if DX_BEFORE is not None:
                dx += tl.load(DX_BEFORE + rows[:, None] * K + k[None, :], mask=x_mask, other=0.0).to(tl.float32)
            tl.store(DX + rows[:, None] * K + k[None, :], dx.to(DX.dtype.element_ty), mask=x_mask)


@triton.jit
def _add_rows(
    acc, bias, L, V, SEED, rows, row_there, lanes, lane_there, c, C, HIDDEN, v_stride, THRESHOLD,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """acc (BR, BC) += L[rows]^T V[rows], and bias (BR,) += the sum of L[rows]."""
    left = tl.load(
        L + rows[None, :] * HIDDEN + lanes[:, None], mask=row_there[None, :] & lane_there[:, None], other=0.0
    )
    v_mask = row_there[:, None] if EVEN else row_there[:, None] & (c < C)[None, :]
    right = tl.load(V + rows[:, None] * v_stride + c[None, :], mask=v_mask, other=0.0)
    if SEED is not None:
        right = tl.where(_kept(SEED, rows, c, THRESHOLD), right, 0.0)
    acc = _dot(left, right, acc, DTYPE, PRECISION)
    if BIAS:
        bias += tl.sum(left.to(tl.float32), 1)
    return acc, bias


@triton.jit(do_not_specialize=VARYING)
def wgrad(
    L, V, SEED, OUT, BIAS, INDICES, ORDER, OFFSETS, STARTS,
    N, C, HIDDEN, RUN, FIRST, LAST, THRESHOLD, keep_factor,
    v_stride, out_part, out_row, out_column, bias_part, index_stride,
    MODE: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OUT[part, column, c] = sum of L[row, column] * V[row, c] over a part of the rows that chose the column's expert.

    Programs are (block of V's columns, expert and block of its hidden columns, part). BIAS gets the sums of L alone.
    """
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    lanes = tl.program_id(1) % BLOCKS * BR + tl.arange(0, BR)
    expert = tl.program_id(1) // BLOCKS
    if MODE == "all":
        start = tl.load(STARTS + FIRST)
        lane_there = start + lanes < tl.load(STARTS + LAST)
    else:
        start = tl.load(STARTS + expert)
        lane_there = start + lanes < tl.load(STARTS + expert + 1)
    acc = tl.zeros((BR, BC), tl.float32)
    bias = tl.zeros((BR,), tl.float32)
    if MODE == "all":
        per_part = tl.cdiv(tl.cdiv(N, BM), parts) * BM
        low = part * per_part
        high = tl.minimum(low + per_part, N)
        for m0 in range(low, high, BM):
            rows = tl.arange(0, BM).to(tl.int64) + m0
            acc, bias = _add_rows(
                acc, bias, L, V, SEED, rows, rows < high, lanes, lane_there, c, C, HIDDEN, v_stride, THRESHOLD,
                EVEN, DTYPE, PRECISION, BIAS is not None,
            )  # fmt: skip
    elif MODE == "runs":
        per_part = tl.cdiv(tl.cdiv(RUN, BM), parts) * BM
        low = part * per_part
        high = tl.minimum(low + per_part, RUN)
        for run in range(0, N // RUN):  # those of other experts are passed over
            if tl.load(INDICES + run * RUN * index_stride).to(tl.int32) == expert:
                for m0 in range(low, high, BM):
                    local = m0 + tl.arange(0, BM)
                    rows = local.to(tl.int64) + run * RUN
                    acc, bias = _add_rows(
                        acc, bias, L, V, SEED, rows, local < high, lanes, lane_there, c, C, HIDDEN,
                        v_stride, THRESHOLD, EVEN, DTYPE, PRECISION, BIAS is not None,
                    )  # fmt: skip
    else:
        begin = tl.load(OFFSETS + expert)
        end = tl.load(OFFSETS + expert + 1)
        per_part = tl.cdiv(tl.cdiv(end - begin, BM), parts) * BM
        low = begin + part * per_part
        high = tl.minimum(low + per_part, end)
        for m0 in range(low, high, BM):
            position = m0 + tl.arange(0, BM)
            there = position < high
            rows = tl.load(ORDER + position, mask=there, other=0).to(tl.int64)
            acc, bias = _add_rows(
                acc, bias, L, V, SEED, rows, there, lanes, lane_there, c, C, HIDDEN, v_stride, THRESHOLD,
                EVEN, DTYPE, PRECISION, BIAS is not None,
            )  # fmt: skip
    columns = start.to(tl.int64) + lanes
    at = part.to(tl.int64) * out_part + columns[:, None] * out_row + c[None, :] * out_column
    tl.store(OUT + at, (acc * keep_factor).to(OUT.dtype.element_ty), mask=lane_there[:, None] & (c < C)[None, :])
    if BIAS is not None and tl.program_id(0) == 0:
        tl.store(BIAS + part * bias_part + columns, bias, mask=lane_there)
