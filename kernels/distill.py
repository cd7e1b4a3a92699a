"""Cosine and smooth-L1 loss of every token, on teacher features standardised as they are read; forward and backward.

One token, D channels; s the student's feature, x the teacher's, raw:
    t = (x - mean) / max(std, eps)        d = s - t        |s|' = max(|s|, 1e-8), |t|' likewise
    cos    = 1 - <s, t> / (|s|' |t|')
    smooth = 1/D sum_c h(d_c)             h(d) = m (|d| - m/2) / beta, m = min(|d|, beta);   h(d) = |d| if beta = 0
With g, q the gradients that arrive for cos and smooth:
    d/ds = b s - a t + q/D h'(d)          a = g / (|s|' |t|'),   b = a <s, t> / (|s|' |s|), and b = 0 where s = 0
                                          h'(d) = clamp(d / beta, -1, 1);   h'(d) = sign(d) if beta = 0
A token with g = q = 0 (a dropped image) has gradient 0 whatever it holds, even NaN, and is not read.

Traffic: forward reads s and x; backward reads them again (<s,t>, |s|, |t| are computed anew) and writes the gradient.
Nothing else is longer than one number a token. A program strides over the tokens with mean and 1/max(std, eps) in
registers, while the tokens of its next two turns travel to shared memory (num_stages=3).

Instructions are what binds next. A warp takes 4, 2 or 1 tokens a turn, each with a share of its lanes (`plan`): no lane
idles at D = 384, 768, 1024 or 1536, and sums across lanes, addresses and roots are computed for all of them at once.
bf16 is read two channels a word (`words.py`). A lane sums its channels in one chain of fused multiplications and adds.
"""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import reference
from .words import as_words, join, split, unpack

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _kernel(student, teacher, mean, std, cos, smooth, grad, rows, N, s_outer, s_row, t_outer, t_row, eps,
            BACKWARD: tl.constexpr, BETA: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
            PACK: tl.constexpr, VECTOR: tl.constexpr):
    """Forward writes the losses to cos and smooth; backward reads their gradients there and writes grad."""
    STEPS: tl.constexpr = (D + TILE * PACK - 1) // (TILE * PACK)
    weight = 1.0 / (D * BETA) if BETA != 0 else 1.0 / D
    mus, invs = _statistics(mean, std, eps, D, TILE, PACK)
    step = tl.num_programs(0) * ROWS
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s_at, s_hop, s_carry = _walk(first, step, N, s_outer, s_row)
    t_at, t_hop, t_carry = _walk(first, step, N, t_outer, t_row)
    j = first % N
    for start in tl.range(tl.program_id(0) * ROWS, rows, step, num_stages=3):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        live = inside
        if BACKWARD:
            g = tl.load(cos + row, mask=inside, other=0.0)
            q = tl.load(smooth + row, mask=inside, other=0.0)
            live = (g != 0.0) | (q != 0.0)   # true for NaN; masked, not branched around: loads stay pipelined
        s_tokens = student + (s_at * VECTOR)[:, None]
        t_tokens = teacher + (t_at * VECTOR)[:, None]
        j += step % N
        carry = j >= N
        j = tl.where(carry, j - N, j)
        s_at += tl.where(carry, s_carry, s_hop)
        t_at += tl.where(carry, t_carry, t_hop)
        dot = tl.zeros([ROWS, TILE], tl.float32)
        s_square = tl.zeros([ROWS, TILE], tl.float32)
        t_square = tl.zeros([ROWS, TILE], tl.float32)
        loss = tl.zeros([ROWS, TILE], tl.float32)
        kept = ()
        for k in tl.static_range(STEPS):
            ss = _read(s_tokens, live[:, None], k, D, TILE, PACK)
            xs = _read(t_tokens, live[:, None], k, D, TILE, PACK)
            for h in tl.static_range(PACK):
                s = ss[h]
                # As an fma it is not fused with s - t, for which backward would keep x - mean in registers.
                t = tl.fma(xs[h] - mus[k * PACK + h], invs[k * PACK + h], 0.0)
                dot += s * t
                s_square += s * s
                t_square += t * t
                if BACKWARD:
                    kept = kept + (s, t)
                elif BETA == 0:
                    loss += tl.abs(s - t)
                else:
                    m = tl.minimum(tl.abs(s - t), BETA)   # a NaN becomes beta here, and is back with the factor |d|
                    loss += m * (tl.abs(s - t) - 0.5 * m)
        norm2 = tl.sum(s_square, 1)
        s_inverse = _inverse_norm(norm2)
        t_inverse = _inverse_norm(tl.sum(t_square, 1))
        if BACKWARD:
            b = tl.where(norm2 == 0.0, 0.0, g * s_inverse * t_inverse * tl.sum(dot, 1) * s_inverse * tl.rsqrt(norm2))
            _write_gradient(grad, row, inside, kept, (g * s_inverse * t_inverse)[:, None], b[:, None],
                            (q * weight)[:, None], BETA, D, TILE, PACK)
        else:
            tl.store(cos + row, 1.0 - tl.sum(dot, 1) * s_inverse * t_inverse, mask=inside)
            tl.store(smooth + row, tl.sum(loss, 1) * weight, mask=inside)


@triton.jit
def _write_gradient(grad, row, inside, kept, a, b, q, BETA: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
                    PACK: tl.constexpr):
    for k in tl.static_range((D + TILE * PACK - 1) // (TILE * PACK)):
        parts = ()
        for h in tl.static_range(PACK):
            s, t = kept[2 * (k * PACK + h)], kept[2 * (k * PACK + h) + 1]
            d = s - t
            if BETA == 0:
                slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
            else:
                slope = tl.clamp(d, -BETA, BETA, propagate_nan=NAN)   # times beta, as is 1 / q
            parts = parts + (b * s - a * t + q * slope,)
        channel = k * TILE * PACK + tl.arange(0, TILE * PACK)[None, :]
        ok = inside[:, None]
        if (k + 1) * TILE * PACK > D:
            ok = ok & (channel < D)
        at = grad + row.to(tl.int64)[:, None] * D + channel
        tl.store(at, join(parts, PACK).to(grad.dtype.element_ty), mask=ok)


@triton.jit
def _statistics(mean, std, eps, D: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr):
    """mean and 1/max(std, eps) in tuples, as `_read` lays channels out; 0 past the last one, where t is then 0 too."""
    mus, invs = (), ()
    for k in tl.static_range((D + TILE * PACK - 1) // (TILE * PACK)):
        channel = k * TILE * PACK + tl.arange(0, TILE * PACK)
        mu = tl.load(mean + channel, mask=channel < D, other=0.0)
        sd = tl.load(std + channel, mask=channel < D, other=1.0)
        inv = tl.where(channel < D, 1.0 / tl.maximum(sd, eps, propagate_nan=NAN), 0.0)
        mus = mus + split(mu[None, :], PACK)
        invs = invs + split(inv[None, :], PACK)
    return mus, invs


@triton.jit
def _read(tokens, live, k: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr):
    """The k-th TILE words of tokens [ROWS, 1], unpacked: PACK tensors [ROWS, TILE] in fp32."""
    word = k * TILE + tl.arange(0, TILE)[None, :]
    if (k + 1) * TILE * PACK > D:
        live = live & (word < D // PACK)
    return unpack(tl.load(tokens + word, mask=live, other=0), PACK)


@triton.jit
def _inverse_norm(square):
    return tl.minimum(tl.rsqrt(square), 1e8, propagate_nan=NAN)   # 1 / max(norm, 1e-8)


@triton.jit
def _walk(row, step, N, outer, inner):
    """Where row i N + j lies, i outer + j inner, and how far row + step is: in the same i, and carried to the next."""
    at = (row // N).to(tl.int64) * outer + (row % N).to(tl.int64) * inner
    hop = (step // N).to(tl.int64) * outer + (step % N).to(tl.int64) * inner
    return at, hop, hop + outer - tl.cast(N, tl.int64) * inner


class Card(NamedTuple):
    """What of a GPU decides how many programs it holds."""
    lanes: int = 32            # of a warp
    multiprocessors: int = 1
    registers: int = 65536     # of 4 bytes, of a multiprocessor
    shared: int = 233472       # bytes of its shared memory, where tokens under way wait; 0: in registers (ROCm)


@cache
def card(device):
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Card(found.warp_size, found.multi_processor_count, 2048 * found.warp_size, 0)
    return Card(32, found.multi_processor_count, found.regs_per_multiprocessor, found.shared_memory_per_multiprocessor)


class Plan(NamedTuple):
    rows: int        # tokens that a program takes a turn
    tile: int        # words that it reads of each at once: 16 bytes a lane
    warps: int
    programs: int    # that a multiprocessor holds


def plan(backward, D, word, pair, card=Card()):
    """Plan for D channels, `pair` of them in a word of `word` bytes.

    A warp takes as many channels as its registers hold: mean and 1/max(std, eps) of each, and backward both features.
    How many registers that takes is estimated, from above: launched is what fits. A test compares with the compiler."""
    channels = 2048 if pair == 2 and not backward else 1536
    rows = next((n for n in (4, 2) if n * D <= channels and n * D * word <= 4096 * pair), 1)
    warps = min(16, triton.next_power_of_2(triton.cdiv(D, channels)))
    tile = 16 // word * card.lanes * warps // rows
    words = triton.cdiv(D, tile * pair) * tile * rows // (card.lanes * warps)   # of a lane
    if backward:
        registers = max(96, 8 + 5 * words * pair)
    else:
        registers = 56 + 5 * words if pair == 2 else 64 + 3 * words
    if not card.shared:
        registers += 32 + 4 * words
    programs = card.registers // (card.lanes * warps * min(256, triton.cdiv(registers, 8) * 8))
    if card.shared:
        programs = min(programs, card.shared // (4 * words * word * card.lanes * warps + 1024))
    return Plan(rows, tile, warps, max(1, min(32, programs)))


def launch(student, teacher, mean, std, cos, smooth, grad, beta, eps):
    """Runs `_kernel`, backward if there is a grad to fill, on [A, N, D]; cos, smooth and grad are contiguous."""
    backward = grad is not None
    A, N, D = student.shape
    xs, pair = as_words(student, teacher)
    word = max(x.element_size() for x in xs)
    gpu = card(student.device) if student.is_cuda else Card()
    rows, tile, warps, programs = plan(backward, D, word, pair, gpu)
    strides = [n for x in xs for n in (x.stride(0) if A > 1 else 0, x.stride(1))]
    vector = gcd(16 // word, *strides)   # words that lie together, aligned, wherever a token begins
    grid = min(triton.cdiv(A * N, rows), programs * gpu.multiprocessors)
    with torch.cuda.device_of(student):
        _kernel[(grid,)](
            *xs, mean, std, cos, smooth, grad, A * N, N, *(n // vector for n in strides), eps, BACKWARD=backward,
            BETA=beta, D=D, ROWS=rows, TILE=tile, PACK=pair, VECTOR=vector, num_warps=warps, enable_fp_fusion=True)


DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else "cuda"


@torch.library.custom_op("dune::distill_loss", mutates_args=(), device_types=DEVICES)
def distill_loss(student: torch.Tensor, teacher: torch.Tensor, mean: torch.Tensor, std: torch.Tensor,
                 beta: float = 1.0, eps: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """student, teacher [A, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty; mean, std [D] fp32
    -> (cos, smooth), each [A, N] fp32, differentiable in student. `kernels.distill_loss` checks its arguments."""
    cos = torch.empty(student.shape[:2], device=student.device, dtype=torch.float32)
    smooth = torch.empty_like(cos)
    launch(student, teacher, mean, std, cos, smooth, None, beta, eps)
    return cos, smooth


@torch.library.custom_op("dune::distill_loss_backward", mutates_args=(), device_types=DEVICES)
def distill_loss_backward(g_cos: torch.Tensor, g_smooth: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor,
                          mean: torch.Tensor, std: torch.Tensor, beta: float, eps: float) -> torch.Tensor:
    """Gradient of sum(g_cos * cos + g_smooth * smooth) for student: [A, N, D] in its dtype."""
    grad = torch.empty(student.shape, device=student.device, dtype=student.dtype)
    launch(student, teacher, mean, std, g_cos, g_smooth, grad, beta, eps)
    return grad


@distill_loss.register_fake
def _(student, teacher, mean, std, beta=1.0, eps=1e-3):
    cos = student.new_empty(student.shape[:2], dtype=torch.float32)
    return cos, torch.empty_like(cos)


@distill_loss_backward.register_fake
def _(g_cos, g_smooth, student, teacher, mean, std, beta, eps):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g_cos, g_smooth):
    grad = distill_loss_backward(g_cos.contiguous(), g_smooth.contiguous(), *ctx.saved_tensors, ctx.beta, ctx.eps)
    return grad, None, None, None, None, None


distill_loss.register_autograd(_backward, setup_context=_save)


if "cpu" not in DEVICES:   # the operators themselves, torch.ops.dune.*, also take CPU tensors
    distill_loss.register_kernel("cpu")(reference.forward)
    distill_loss_backward.register_kernel("cpu")(reference.backward)
