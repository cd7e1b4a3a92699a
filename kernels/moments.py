"""Mean and sum of squared deviations of every channel, in one pass over the features.

    mean_c = sum_i x_ic / n          m2_c = sum_i (x_ic - mean_c)^2          (i: n tokens, c: D channels)

Stage 1, `_partial_kernel`: each program takes some of the tokens, for one block of channels, and sums
deviations from the first of them, k:
    s1 = sum (x - k)     s2 = sum (x - k)^2     mean = k + s1 / n     m2 = s2 - s1^2 / n
As k is one of the tokens, m2 >= (k - mean)^2 and s2 <= (1 + n) m2: the subtraction multiplies the relative
error by at most n (a few hundred) if k is an outlier, and hardly at all if it is not. Sums of x and x^2 have
no such bound (take mean 100, std 0.01).
Stage 2, `_merge_kernel`: merges these partial results (Chan et al. 1979), always in the same order, so that
two runs give the same bits:
    mean = sum n_p mean_p / sum n_p     m2 = sum m2_p + n_p (mean_p - mean)^2

Memory traffic: every feature is read once. Partial results are about 1 % of that, mostly in the L2 cache.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from .device import device_limits

WARPS = 4
UNROLL = 8       # loads of 16 bytes that a thread has in flight
PROGRAMS = 640   # of stage 1: 4 or 5 for each multiprocessor


@triton.jit
def _partial_kernel(
        x,
        means,
        m2s,
        counts,
        N,
        x_batch,
        x_token,
        tiles,
        tiles_per_image,
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        UNROLL: tl.constexpr,
        ALIGN: tl.constexpr):
    """Program (i, j): block i of channels; tiles j, j + num_programs(1), ...

    A tile is UNROLL * BLOCK_N tokens of an image. ALIGN divides the strides."""
    TILE: tl.constexpr = UNROLL * BLOCK_N
    share = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = None if D % BLOCK_D == 0 else channel < D
    k_offset = _tile_offset(share, x_batch, x_token, tiles_per_image, TILE)
    k = tl.load(x + k_offset + channel, mask=mask).to(tl.float32)
    s1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    s2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    count = 0
    for tile in range(share, tiles, tl.num_programs(1)):
        tile_offset = _tile_offset(tile, x_batch, x_token, tiles_per_image, TILE)
        tokens = tl.minimum(N - tile % tiles_per_image * TILE, TILE)
        count += tokens
        for u in tl.static_range(UNROLL):
            token = u * BLOCK_N + tl.arange(0, BLOCK_N)
            offset = tile_offset + token * tl.cast(x_token, tl.int64)
            # Past the end of the image: k again, whose deviation is 0.
            offset = tl.multiple_of(tl.where(token < tokens, offset, k_offset), ALIGN)
            deviation = tl.load(x + offset[:, None] + channel, mask=mask).to(tl.float32) - k
            s1 += deviation
            s2 += deviation * deviation
    n = count.to(tl.float32)
    total = tl.sum(s1, 0, keep_dims=True)
    m2 = tl.sum(s2, 0, keep_dims=True) - total * (total / n)
    m2 = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(means + share * D + channel, k + total / n, mask=mask)
    tl.store(m2s + share * D + channel, m2, mask=mask)
    tl.store(counts + share, n)


@triton.jit
def _tile_offset(tile, x_batch, x_token, tiles_per_image, TILE: tl.constexpr):
    image = tile // tiles_per_image
    token = tile % tiles_per_image * TILE
    return image.to(tl.int64) * x_batch + token.to(tl.int64) * x_token


@triton.jit
def _merge_kernel(
        means,
        m2s,
        counts,
        mean,
        m2,
        P,
        D,
        SETS: tl.constexpr,
        BLOCK_D: tl.constexpr):
    """Program i: block i of channels, all P sets, padded to SETS."""
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p = tl.arange(0, SETS)[:, None]
    mask = (p < P) & (channel < D)
    n = tl.load(counts + p, mask=p < P, other=0.0)
    means_p = tl.load(means + p * D + channel, mask=mask, other=0.0)
    m2s_p = tl.load(m2s + p * D + channel, mask=mask, other=0.0)
    # Relative to the first mean: a large mean loses no digits.
    k = tl.load(means + channel, mask=channel < D, other=0.0)
    joint = k + tl.sum(n * (means_p - k), 0, keep_dims=True) / tl.sum(n, 0, keep_dims=True)
    delta = means_p - joint
    tl.store(mean + channel, joint, mask=channel < D)
    tl.store(m2 + channel, tl.sum(m2s_p + n * delta * delta, 0, keep_dims=True), mask=channel < D)


@torch.library.custom_op("dune::channel_moments", mutates_args=())
def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty -> mean, m2 [D], fp32.

    `kernels.channel_moments` takes any leading dimensions and checks its argument."""
    B, N, D = x.shape
    x_batch, x_token = x.stride(0), x.stride(1)
    lanes, _ = device_limits(x.device)
    block_d = gcd(D, 256) if D % 64 == 0 else min(256, triton.next_power_of_2(D))
    block_n = 8 * lanes * WARPS // block_d   # a lane loads 8 channels of a token
    blocks = triton.cdiv(D, block_d)
    tiles_per_image = triton.cdiv(N, block_n * UNROLL)
    tiles = B * tiles_per_image
    shares = min(tiles, max(1, PROGRAMS // blocks))
    means = torch.empty(shares, D, device=x.device, dtype=torch.float32)
    m2s = torch.empty_like(means)
    counts = torch.empty(shares, device=x.device, dtype=torch.float32)
    mean = torch.empty(D, device=x.device, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    sets = triton.next_power_of_2(shares)
    merged_d = 4096 // sets
    with torch.cuda.device_of(x):
        _partial_kernel[(blocks, shares)](
            x,
            means,
            m2s,
            counts,
            N,
            x_batch,
            x_token,
            tiles,
            tiles_per_image,
            D=D,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            UNROLL=UNROLL,
            ALIGN=gcd(16, x_batch, x_token),
            num_warps=WARPS,
            enable_fp_fusion=True)
        _merge_kernel[(triton.cdiv(D, merged_d),)](
            means,
            m2s,
            counts,
            mean,
            m2,
            shares,
            D,
            SETS=sets,
            BLOCK_D=merged_d,
            num_warps=WARPS,
            enable_fp_fusion=True)
    return mean, m2


@channel_moments.register_fake
def _(x):
    mean = x.new_empty(x.shape[-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)
