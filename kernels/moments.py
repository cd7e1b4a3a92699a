"""Mean and sum of squared deviations of every channel, in one pass over the features.

    mean_c = sum_r x_rc / R          m2_c = sum_r (x_rc - mean_c)^2          (r over R rows, c over D channels)

Stage 1: a program walks over its share of rows, for one block of channels, and adds up deviations from its first row k:
    s1 = sum (x - k)     s2 = sum (x - k)^2     mean = k + s1 / n     m2 = s2 - s1^2 / n
k belongs to the data, so m2 >= (k - mean)^2 and s2 <= (1 + n) m2: the subtraction costs at most a factor of n (a few
hundred) in relative error even if k is an outlier, and nothing when k is an ordinary value. The plain sum of squares
has no such bound (mean 100, std 0.01).
Stage 2: the partial results are merged (Chan et al. 1979), always in the same order: two runs give the same bits.
    mean = sum n_p mean_p / sum n_p     m2 = sum m2_p + n_p (mean_p - mean)^2

Traffic: every feature is read once; partial results are about 1 % of that, and mostly stay in the L2 cache.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from . import reference
from .words import as_words, join, unpack

WARPS = 4
UNROLL = 8       # row slabs that a thread has in flight at once: 8 loads of 16 bytes
PROGRAMS = 640   # of stage 1, 4 or 5 on each multiprocessor; partial results are 0.9 % of [128, 576, 1024] in bf16


@triton.jit
def _load(x, word, D: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr):
    """The channels in the words at x, in fp32 and in order; 0 past the last one."""
    if D % (TILE * PACK) == 0:
        words = tl.load(x)
    else:
        words = tl.load(x, mask=word < D // PACK, other=0)
    return join(unpack(words, PACK), PACK)


@triton.jit
def _partial_kernel(x, means, m2s, counts, N, x_outer, x_row, tiles, tiles_per_outer,
                    D: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
                    VECTOR: tl.constexpr):
    group, groups = tl.program_id(1), tl.num_programs(1)
    begin = (group.to(tl.int64) * tiles // groups).to(tl.int32)
    end = ((group + 1).to(tl.int64) * tiles // groups).to(tl.int32)
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    col = tl.program_id(0) * TILE * PACK + tl.arange(0, TILE * PACK)
    begin_row = (begin % tiles_per_outer) * (ROWS * UNROLL)
    at_k = (begin // tiles_per_outer).to(tl.int64) * x_outer + begin_row.to(tl.int64) * x_row
    shift = _load(x + at_k * VECTOR + word, word, D, TILE, PACK)
    s1 = tl.zeros([ROWS, TILE * PACK], tl.float32)
    s2 = tl.zeros([ROWS, TILE * PACK], tl.float32)
    count = 0
    stride = tl.cast(x_row, tl.int64)
    lane_row = tl.arange(0, ROWS) * stride
    for tile in range(begin, end):
        outer, row = tile // tiles_per_outer, (tile % tiles_per_outer) * (ROWS * UNROLL)
        count += tl.minimum(N - row, ROWS * UNROLL)
        at_row = outer.to(tl.int64) * x_outer + row * stride + lane_row
        for u in tl.static_range(UNROLL):
            r = row + u * ROWS + tl.arange(0, ROWS)
            at = tl.where(r < N, at_row + u * ROWS * stride, at_k)   # past the end: row k again, whose deviation is 0
            d = _load(x + (at * VECTOR)[:, None] + word[None, :], word[None, :], D, TILE, PACK) - shift[None, :]
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
    base = tl.load(means + col, mask=col < D, other=0.0)   # relative to the first set: a large mean loses no digits
    total = tl.sum(n, 0)
    joint = base + tl.sum(n[:, None] * (mu - base[None, :]), 0) / total
    gap = mu - joint[None, :]
    tl.store(mean + col, joint, mask=col < D)
    tl.store(m2 + col, tl.sum(dev + n[:, None] * gap * gap, 0), mask=col < D)


def plan(A, N, D, pair=1, lanes=32):
    """How [A, N, D] features, `pair` channels in a word, are cut for warps of `lanes` lanes.

    A load of stage 1 has `rows` rows of `tile` words: 8 elements a lane, at most 256 channels wide (4 blocks of D =
    1024). UNROLL loads are a tile, and lie within one outer index, so that their rows are evenly spaced.
    -> rows, tile, blocks of channels, tiles, tiles of an outer index, sets of partial results."""
    cols = gcd(D, 256) if D % 64 == 0 else max(pair, min(256, triton.next_power_of_2(D)))   # all lanes busy at D = 384
    rows = 8 * lanes * WARPS // cols
    blocks = triton.cdiv(D, cols)
    tiles_per_outer = triton.cdiv(N, rows * UNROLL)
    tiles = A * tiles_per_outer
    return rows, cols // pair, blocks, tiles, tiles_per_outer, min(tiles, max(1, PROGRAMS // blocks))


def launch(x):
    """x [A, N, D], last dimension contiguous -> mean [D], m2 [D], fp32. Two launches."""
    A, N, D = x.shape
    (words,), pair = as_words(x)
    lanes = torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32
    rows, tile, blocks, tiles, tiles_per_outer, sets = plan(A, N, D, pair, lanes)
    means, m2s = torch.empty(2, sets, D, device=x.device, dtype=torch.float32)
    counts = torch.empty(sets, device=x.device, dtype=torch.float32)
    mean = torch.empty(D, device=x.device, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    outer, row = words.stride(0) if A > 1 else 0, words.stride(1)
    vector = gcd(16 // words.element_size(), outer, row)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        _partial_kernel[(blocks, sets)](
            words, means, m2s, counts, N, outer // vector, row // vector, tiles, tiles_per_outer,
            D=D, ROWS=rows, UNROLL=UNROLL, TILE=tile, PACK=pair, VECTOR=vector, **options)
        merged = triton.next_power_of_2(sets)
        _merge_kernel[(triton.cdiv(D, 4096 // merged),)](
            means, m2s, counts, mean, m2, sets, D, SETS=merged, COLS=4096 // merged, **options)
    return mean, m2


DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else "cuda"


@torch.library.custom_op("dune::channel_moments", mutates_args=(), device_types=DEVICES)
def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [A, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty -> (mean, m2), each [D] fp32.
    `kernels.channel_moments` takes any leading dimensions and checks its argument."""
    return launch(x)


@channel_moments.register_fake
def _(x):
    return x.new_empty(x.shape[-1], dtype=torch.float32), x.new_empty(x.shape[-1], dtype=torch.float32)


if "cpu" not in DEVICES:   # the operator itself, torch.ops.dune.channel_moments, also takes CPU tensors
    channel_moments.register_kernel("cpu")(reference.channel_moments)
