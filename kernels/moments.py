"""Mean and sum of squared deviations of every channel, in one pass over the features.

    mean_c = sum_r x_rc / R          m2_c = sum_r (x_rc - mean_c)^2          (r over R rows, c over D channels)

Stage 1: a program walks over its share of the rows, for one block of channels, and adds up the deviations from its own first row k:
    s1 = sum (x - k)     s2 = sum (x - k)^2     mean = k + s1 / n     m2 = s2 - s1^2 / n
k belongs to the data, so m2 >= (k - mean)^2 and s2 <= (1 + n) m2: the subtraction costs at most a factor of n (a few hundred) in relative
error even if k is an outlier, and nothing when k is an ordinary value. The plain sum of squares has no such bound (mean 100, std 0.01).
Stage 2: the few hundred partial results are merged (Chan et al. 1979), always in the same order: two runs give the same bits.
    mean = sum n_p mean_p / sum n_p     m2 = sum m2_p + n_p (mean_p - mean)^2

Traffic: every feature is read once; partial results are about 1 % of that, and mostly stay in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from . import reference

WARPS = 4
UNROLL = 8       # row slabs that a thread has in flight at once: 8 loads of 16 bytes
PROGRAMS = 640   # of stage 1: 5 for each multiprocessor of an H100; its partial results are then 0.9 % of [128, 576, 1024] in bf16


@triton.jit
def _partial_kernel(x, means, m2s, counts, N, D, x_outer, x_row, tiles, tiles_per_outer,
                    ROWS: tl.constexpr, UNROLL: tl.constexpr, COLS: tl.constexpr):
    group, groups = tl.program_id(1), tl.num_programs(1)
    begin = (group.to(tl.int64) * tiles // groups).to(tl.int32)
    end = ((group + 1).to(tl.int64) * tiles // groups).to(tl.int32)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    outer_0, row_0 = begin // tiles_per_outer, (begin % tiles_per_outer) * (ROWS * UNROLL)
    shift = tl.load(x + outer_0.to(tl.int64) * x_outer + row_0.to(tl.int64) * x_row + col, mask=col < D, other=0.0).to(tl.float32)
    s1 = tl.zeros([ROWS, COLS], tl.float32)
    s2 = tl.zeros([ROWS, COLS], tl.float32)
    count = 0
    for tile in range(begin, end):
        outer, row = tile // tiles_per_outer, (tile % tiles_per_outer) * (ROWS * UNROLL)
        count += tl.minimum(N - row, ROWS * UNROLL)
        for u in tl.static_range(UNROLL):
            r = row + u * ROWS + tl.arange(0, ROWS)
            i = tl.where(r < N, outer, outer_0).to(tl.int64)   # past the end: row k again, whose deviation is 0
            j = tl.where(r < N, r, row_0).to(tl.int64)
            at = x + (i * x_outer + j * x_row)[:, None] + col[None, :]
            d = tl.load(at, mask=(col < D)[None, :], other=0.0).to(tl.float32) - shift[None, :]
            s1 += d
            s2 += d * d
    n = count.to(tl.float32)
    a, b = tl.sum(s1, 0), tl.sum(s2, 0)
    m2 = tl.maximum(b - a * (a / n), 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = group.to(tl.int64) * D + col
    tl.store(means + out, shift + a / n, mask=col < D)
    tl.store(m2s + out, m2, mask=col < D)
    tl.store(counts + group, n)


@triton.jit
def _merge_kernel(means, m2s, counts, mean, m2, P, D, SETS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    p = tl.arange(0, SETS)
    ok = (p < P)[:, None] & (col < D)[None, :]
    n = tl.load(counts + p, mask=p < P, other=0.0)
    mu = tl.load(means + p[:, None] * D + col[None, :], mask=ok, other=0.0)
    dev = tl.load(m2s + p[:, None] * D + col[None, :], mask=ok, other=0.0)
    base = tl.load(means + col, mask=col < D, other=0.0)   # weighted relative to the first set: a large mean loses no digits
    total = tl.sum(n, 0)
    joint = base + tl.sum(n[:, None] * (mu - base[None, :]), 0) / total
    gap = mu - joint[None, :]
    tl.store(mean + col, joint, mask=col < D)
    tl.store(m2 + col, tl.sum(dev + n[:, None] * gap * gap, 0), mask=col < D)


def blocks(D):
    """(ROWS, COLS) of one load of stage 1: 1024 elements, 8 for each thread, at most 256 channels wide (4 blocks of D = 1024)."""
    cols = min(256, triton.next_power_of_2(D))
    return 1024 // cols, cols


def launch(x):
    """x [A, N, D], last dimension contiguous -> mean [D], m2 [D], fp32. Two launches."""
    A, N, D = x.shape
    rows, cols = blocks(D)
    tiles_per_outer = triton.cdiv(N, rows * UNROLL)      # a tile stays within one outer index, so that its rows are evenly spaced
    tiles = A * tiles_per_outer
    col_blocks = triton.cdiv(D, cols)
    P = min(tiles, max(1, PROGRAMS // col_blocks))
    means, m2s = torch.empty(2, P, D, device=x.device, dtype=torch.float32)
    counts = torch.empty(P, device=x.device, dtype=torch.float32)
    mean, m2 = torch.empty(D, device=x.device, dtype=torch.float32), torch.empty(D, device=x.device, dtype=torch.float32)
    sets = triton.next_power_of_2(P)
    merge_cols = 4096 // sets
    with torch.cuda.device_of(x):
        _partial_kernel[(col_blocks, P)](x, means, m2s, counts, N, D, x.stride(0) if A > 1 else 0, x.stride(1), tiles, tiles_per_outer,
                                         ROWS=rows, UNROLL=UNROLL, COLS=cols, num_warps=WARPS, enable_fp_fusion=True)
        _merge_kernel[(triton.cdiv(D, merge_cols),)](means, m2s, counts, mean, m2, P, D,
                                                     SETS=sets, COLS=merge_cols, num_warps=WARPS, enable_fp_fusion=True)
    return mean, m2


DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else "cuda"


@torch.library.custom_op("dune::channel_moments", mutates_args=(), device_types=DEVICES)
def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [A, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty -> (mean, m2), each [D] fp32. `kernels.channel_moments`
    takes any leading dimensions and checks its argument."""
    return launch(x)


@channel_moments.register_fake
def _(x):
    return x.new_empty(x.shape[-1], dtype=torch.float32), x.new_empty(x.shape[-1], dtype=torch.float32)


if "cpu" not in DEVICES:   # the operator itself, torch.ops.dune.channel_moments, also takes CPU tensors
    channel_moments.register_kernel("cpu")(reference.channel_moments)
