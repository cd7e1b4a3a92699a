"""Cosine and smooth-L1 loss of every token, on teacher features that are standardised as they are read; forward and backward.

One token, D channels; s the student's feature, x the teacher's, raw:
    t = (x - mean) / max(std, eps)        d = s - t        |s|' = max(|s|, 1e-8), |t|' likewise
    cos    = 1 - <s, t> / (|s|' |t|')
    smooth = 1/D sum_c h(d_c)             h(d) = m (|d| - m/2) / beta, m = min(|d|, beta);   h(d) = |d| if beta = 0
With g, q the gradients that arrive for cos and smooth:
    d/ds = b s - a t + q/D h'(d)          a = g / (|s|' |t|'),   b = a <s, t> / (|s|' |s|), and b = 0 where s = 0
                                          h'(d) = clamp(d / beta, -1, 1);   h'(d) = sign(d) if beta = 0
A token with g = q = 0 (a dropped image) has gradient 0 whatever it holds, even NaN, and is not read.

Traffic: forward reads s and x; backward reads s and x again (<s,t>, |s|, |t| are computed anew) and writes the gradient. Nothing else
is longer than one number a token. A program is one warp for each 1024 channels, so that up to there no sum crosses warps; it strides
over the tokens with mean and 1/max(std, eps) in registers, while the next two tokens travel to shared memory (num_stages=3).
"""

import torch
import triton
import triton.language as tl

from . import reference


@triton.jit
def _statistics(mean, std, col, D, eps):
    """mean and 1/max(std, eps) of the channels; 0 past the last one, where t is then 0 too."""
    mu = tl.load(mean + col, mask=col < D, other=0.0)
    sd = tl.load(std + col, mask=col < D, other=1.0)
    return mu, tl.where(col < D, 1.0 / tl.maximum(sd, eps, propagate_nan=tl.PropagateNan.ALL), 0.0)


@triton.jit
def _floor(norm):
    return tl.maximum(norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _forward_kernel(student, teacher, mean, std, cos, smooth, rows, N, D, s_outer, s_row, t_outer, t_row, beta, eps,
                    BLOCK: tl.constexpr, L1: tl.constexpr):
    col = tl.arange(0, BLOCK)
    mu, inv = _statistics(mean, std, col, D, eps)
    scale = 1.0 / D if L1 else 1.0 / (D * beta)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):
        i, j = (row // N).to(tl.int64), (row % N).to(tl.int64)
        s = tl.load(student + i * s_outer + j * s_row + col, mask=col < D, other=0.0).to(tl.float32)
        x = tl.load(teacher + i * t_outer + j * t_row + col, mask=col < D, other=0.0).to(tl.float32)
        t = (x - mu) * inv
        dot, s_norm, t_norm = tl.sum(s * t, 0), tl.sqrt(tl.sum(s * s, 0)), tl.sqrt(tl.sum(t * t, 0))
        d = tl.abs(s - t)
        if L1:
            loss = d
        else:
            m = tl.minimum(d, beta)   # a NaN becomes beta here, and is back with the factor d
            loss = m * (d - 0.5 * m)
        tl.store(cos + row, 1.0 - dot / (_floor(s_norm) * _floor(t_norm)))
        tl.store(smooth + row, tl.sum(loss, 0) * scale)


@triton.jit
def _backward_kernel(g_cos, g_smooth, student, teacher, mean, std, grad, rows, N, D, s_outer, s_row, t_outer, t_row, beta, eps,
                     BLOCK: tl.constexpr, L1: tl.constexpr):
    col = tl.arange(0, BLOCK)
    mu, inv = _statistics(mean, std, col, D, eps)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):
        i, j = (row // N).to(tl.int64), (row % N).to(tl.int64)
        g, q = tl.load(g_cos + row), tl.load(g_smooth + row)
        live = (g != 0.0) | (q != 0.0)   # true for NaN
        last = D * live.to(tl.int32)     # a dropped token is masked, not branched around: the loads stay pipelined
        s = tl.load(student + i * s_outer + j * s_row + col, mask=col < last, other=0.0).to(tl.float32)
        x = tl.load(teacher + i * t_outer + j * t_row + col, mask=col < last, other=0.0).to(tl.float32)
        t = (x - mu) * inv
        dot, s_norm, t_norm = tl.sum(s * t, 0), tl.sqrt(tl.sum(s * s, 0)), tl.sqrt(tl.sum(t * t, 0))
        a = g / (_floor(s_norm) * _floor(t_norm))
        b = tl.where(s_norm == 0.0, 0.0, a * dot / (_floor(s_norm) * s_norm))
        d = s - t
        if L1:
            slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
        else:
            slope = tl.clamp(d * (1.0 / beta), -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        ds = b * s - a * t + (q / D) * slope
        tl.store(grad + (i * N + j) * D + col, ds.to(grad.dtype.element_ty), mask=col < D)


def plan(D):
    """(BLOCK, num_warps, programs a multiprocessor keeps of the forward and of the backward kernel) for D channels.

    Compiled for sm_90 with one warp for 1024 channels, a thread has 127 to 135 registers forward and 236 to 255 backward: 14 and 8
    warps fit, with 28 and 16 rows on their way to them. Twice the warps need half the registers, which keeps as many rows on their way,
    but the sums cross warps and each channel costs 28 % more instructions (`python -m kernels.bench --compiled` has the registers)."""
    block = triton.next_power_of_2(D)
    warps = min(16, max(1, block // 1024))
    return block, warps, max(1, 14 // warps), max(1, 8 // warps)


def _programs(x, rows, each):
    return min(rows, each * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1))


def _strides(x):
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def launch_forward(student, teacher, mean, std, beta, eps):
    """student, teacher [A, N, D], last dimension contiguous; mean, std [D] fp32 -> cos, smooth [A, N] fp32."""
    A, N, D = student.shape
    block, warps, each, _ = plan(D)
    cos = torch.empty(A, N, device=student.device, dtype=torch.float32)
    smooth = torch.empty_like(cos)
    with torch.cuda.device_of(student):
        _forward_kernel[(_programs(student, A * N, each),)](
            student, teacher, mean, std, cos, smooth, A * N, N, D, *_strides(student), *_strides(teacher), beta, eps,
            BLOCK=block, L1=beta == 0, num_warps=warps, enable_fp_fusion=True)
    return cos, smooth


def launch_backward(g_cos, g_smooth, student, teacher, mean, std, beta, eps):
    """g_cos, g_smooth [A, N] fp32, contiguous; the rest as forward -> gradient [A, N, D], contiguous, in the student's dtype."""
    A, N, D = student.shape
    block, warps, _, each = plan(D)
    grad = torch.empty(A, N, D, device=student.device, dtype=student.dtype)
    with torch.cuda.device_of(student):
        _backward_kernel[(_programs(student, A * N, each),)](
            g_cos, g_smooth, student, teacher, mean, std, grad, A * N, N, D, *_strides(student), *_strides(teacher), beta, eps,
            BLOCK=block, L1=beta == 0, num_warps=warps, enable_fp_fusion=True)
    return grad


DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else "cuda"


@torch.library.custom_op("dune::distill_loss", mutates_args=(), device_types=DEVICES)
def distill_loss(student: torch.Tensor, teacher: torch.Tensor, mean: torch.Tensor, std: torch.Tensor,
                 beta: float = 1.0, eps: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """student, teacher [A, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty; mean, std [D] fp32 -> (cos, smooth), each
    [A, N] fp32, differentiable in student. `kernels.distill_loss` takes any leading dimensions and checks its arguments."""
    return launch_forward(student, teacher, mean, std, beta, eps)


@torch.library.custom_op("dune::distill_loss_backward", mutates_args=(), device_types=DEVICES)
def distill_loss_backward(g_cos: torch.Tensor, g_smooth: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor,
                          mean: torch.Tensor, std: torch.Tensor, beta: float, eps: float) -> torch.Tensor:
    """Gradient of sum(g_cos * cos + g_smooth * smooth) for student: [A, N, D] in its dtype."""
    return launch_backward(g_cos, g_smooth, student, teacher, mean, std, beta, eps)


@distill_loss.register_fake
def _(student, teacher, mean, std, beta=1.0, eps=1e-3):
    return student.new_empty(student.shape[:2], dtype=torch.float32), student.new_empty(student.shape[:2], dtype=torch.float32)


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
