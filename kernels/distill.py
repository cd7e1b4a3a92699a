"""Cosine and smooth-L1 loss of every token, on teacher features standardized as they are read.

One token, D channels; s is the student's feature, x the teacher's, raw:
    t = (x - mean) / max(std, eps)        d = s - t        |s|' = max(|s|, 1e-8), |t|' likewise
    cos    = 1 - <s, t> / (|s|' |t|')
    smooth = 1/D sum_c h(d_c)             h(d) = m (|d| - m/2) / beta, m = min(|d|, beta)
                                          h(d) = |d| if beta = 0
Backward, from the gradients dcos and dsmooth that arrive:
    ds = dcos (a s - b t) + dsmooth/D h'(d)
    b = 1 / (|s|' |t|')                   a = b <s, t> / (|s|' |s|), and a = 0 where s = 0
    h'(d) = clamp(d / beta, -1, 1)        h'(d) = sign(d) if beta = 0
A token with dcos = dsmooth = 0 (a dropped image) is not read and gets gradient 0, even if it holds NaN.

Memory traffic: forward reads s and x. Backward reads them again and writes the gradient. Forward saves a and
b of every token, so that backward needs no sums. Everything else is a few numbers for each token.

A program takes several blocks of tokens of one image. It keeps mean and 1 / max(std, eps) in registers, and
copies the tokens of the next two iterations to shared memory meanwhile (num_stages=3). A warp takes 4, 2 or 1
tokens at once: at D = 384, 768, 1024 and 1536 every lane has work, and reads 16 bytes at a time.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from .device import device_limits

PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)
WARPS = 8   # for each multiprocessor: they fit even with the maximum of 255 registers


@triton.jit
def _forward_kernel(
        student,
        teacher,
        mean,
        std,
        cos,
        smooth,
        coefs,
        N,
        s_batch,
        s_token,
        t_batch,
        t_token,
        eps,
        BETA: tl.constexpr,
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ALIGN: tl.constexpr):
    """Program (i, j) takes blocks j, j + num_programs(1), ... of BLOCK_N tokens of image i."""
    image = tl.program_id(0).to(tl.int64)
    means, inverses = _load_statistics(mean, std, eps, D, BLOCK_N, BLOCK_D)
    first = tl.program_id(1) * BLOCK_N
    step = tl.num_programs(1) * BLOCK_N
    for start in tl.range(first, N, step, num_stages=3):
        token = start + tl.arange(0, BLOCK_N)
        mask = token < N
        s_start = student + _offset(image, token, s_batch, s_token, ALIGN)
        t_start = teacher + _offset(image, token, t_batch, t_token, ALIGN)
        dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        s_square = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        t_square = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        loss = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for k in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            s = _load(s_start, mask, k, D, BLOCK_D)
            t = (_load(t_start, mask, k, D, BLOCK_D) - means[k]) * inverses[k]
            dot += s * t
            s_square += s * s
            t_square += t * t
            loss += _smooth_l1(s - t, BETA)
        s_norm2 = tl.sum(s_square, 1)
        s_inverse = _inverse_norm(s_norm2)
        t_inverse = _inverse_norm(tl.sum(t_square, 1))
        similarity = tl.sum(dot, 1) * s_inverse * t_inverse
        # Below 1e-32 the term in a is smaller than rounding, and rsqrt takes what is below 1e-38 for 0.
        a = tl.where(s_norm2 < 1e-32, 0.0, similarity * s_inverse * tl.rsqrt(s_norm2))
        b = s_inverse * t_inverse
        out = image * N + token
        tl.store(cos + out, 1.0 - similarity, mask=mask)
        tl.store(smooth + out, tl.sum(loss, 1) * _smooth_weight(D, BETA), mask=mask)
        tl.store(coefs + 2 * out, a, mask=mask)
        tl.store(coefs + 2 * out + 1, b, mask=mask)


@triton.jit
def _backward_kernel(
        student,
        teacher,
        mean,
        std,
        grad_cos,
        grad_smooth,
        coefs,
        grad,
        N,
        s_batch,
        s_token,
        t_batch,
        t_token,
        eps,
        BETA: tl.constexpr,
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ALIGN: tl.constexpr):
    """Program (i, j) takes the same tokens as in `_forward_kernel`."""
    image = tl.program_id(0).to(tl.int64)
    means, inverses = _load_statistics(mean, std, eps, D, BLOCK_N, BLOCK_D)
    first = tl.program_id(1) * BLOCK_N
    step = tl.num_programs(1) * BLOCK_N
    for start in tl.range(first, N, step, num_stages=3):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < N
        out = image * N + token
        dcos = tl.load(grad_cos + out, mask=inside, other=0.0)
        dsmooth = tl.load(grad_smooth + out, mask=inside, other=0.0)
        # Dropped tokens are masked (NaN != 0 is true). A branch would prevent pipelining.
        mask = (dcos != 0.0) | (dsmooth != 0.0)
        a = dcos * tl.load(coefs + 2 * out, mask=mask, other=0.0)
        b = dcos * tl.load(coefs + 2 * out + 1, mask=mask, other=0.0)
        c = dsmooth * _smooth_weight(D, BETA)
        s_start = student + _offset(image, token, s_batch, s_token, ALIGN)
        t_start = teacher + _offset(image, token, t_batch, t_token, ALIGN)
        for k in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            s = _load(s_start, mask, k, D, BLOCK_D)
            t = (_load(t_start, mask, k, D, BLOCK_D) - means[k]) * inverses[k]
            ds = a[:, None] * s - b[:, None] * t + c[:, None] * _smooth_l1_slope(s - t, BETA)
            pointers, ds_mask = _pointers(grad + out * D, inside, k, D, BLOCK_D)
            tl.store(pointers, ds.to(grad.dtype.element_ty), mask=ds_mask)


@triton.jit
def _load_statistics(mean, std, eps, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """mean and 1 / max(std, eps): two tuples of [BLOCK_N, BLOCK_D], one for each block of channels.

    All rows are equal: in this shape Triton gives them the layout of the features. Past channel D both are 0,
    and therefore t."""
    means, inverses = (), ()
    token = tl.zeros([BLOCK_N, 1], tl.int32)
    for k in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        channel = k * BLOCK_D + tl.arange(0, BLOCK_D)[None, :] + token
        mask = channel < D
        mu = tl.load(mean + channel, mask=mask, other=0.0)
        sd = tl.load(std + channel, mask=mask, other=1.0)
        inverse = 1.0 / tl.maximum(sd, eps, propagate_nan=PROPAGATE_NAN)
        means = means + (mu,)
        inverses = inverses + (tl.where(mask, inverse, 0.0),)
    return means, inverses


@triton.jit
def _offset(image, token, batch_stride, token_stride, ALIGN: tl.constexpr):
    """Where tokens begin. ALIGN divides the strides, which allows loads of 16 bytes."""
    return tl.multiple_of(image * batch_stride + token.to(tl.int64) * token_stride, ALIGN)


@triton.jit
def _load(start, mask, k: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The k-th block of channels of the tokens that begin at start [BLOCK_N], in fp32; 0 where masked."""
    pointers, mask = _pointers(start, mask, k, D, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pointers(start, mask, k: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(pointers, mask) of that block."""
    channel = k * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = mask[:, None]
    if (k + 1) * BLOCK_D > D:
        mask = mask & (channel < D)
    return start[:, None] + channel, mask


@triton.jit
def _smooth_l1(d, BETA: tl.constexpr):
    """Smooth L1 times beta."""
    if BETA == 0:
        return tl.abs(d)
    else:
        m = tl.minimum(tl.abs(d), BETA)   # of NaN this is beta; the factor |d| makes it NaN again
        return m * (tl.abs(d) - 0.5 * m)


@triton.jit
def _smooth_l1_slope(d, BETA: tl.constexpr):
    """Its derivative, times beta."""
    if BETA == 0:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        return tl.clamp(d, -BETA, BETA, propagate_nan=PROPAGATE_NAN)


@triton.jit
def _smooth_weight(D: tl.constexpr, BETA: tl.constexpr):
    return 1.0 / (D * BETA) if BETA != 0 else 1.0 / D


@triton.jit
def _inverse_norm(square):
    return tl.minimum(tl.rsqrt(square), 1e8, propagate_nan=PROPAGATE_NAN)   # 1 / max(norm, 1e-8)


def launch(kernel, student, teacher, mean, std, outputs, beta, eps):
    """Run a kernel on student and teacher [B, N, D]. Its other tensors, `outputs`, are contiguous."""
    B, N, D = student.shape
    lanes, multiprocessors = device_limits(student.device)
    size = max(student.element_size(), teacher.element_size())
    channels = 4096 // size   # of a warp at once: its registers (bf16) or shared memory (fp32) hold no more
    tokens = 1
    while tokens < 4 and 2 * tokens * D <= channels:
        tokens *= 2
    warps = min(16, triton.next_power_of_2(triton.cdiv(D, channels)))
    programs = max(1, WARPS // warps) * multiprocessors
    programs_per_image = min(triton.cdiv(N, tokens), max(1, programs // B))
    strides = *student.stride()[:2], *teacher.stride()[:2]
    with torch.cuda.device_of(student):
        kernel[(B, programs_per_image)](
            student,
            teacher,
            mean,
            std,
            *outputs,
            N,
            *strides,
            eps,
            BETA=beta,
            D=D,
            BLOCK_N=tokens,
            BLOCK_D=16 // size * lanes * warps // tokens,
            ALIGN=gcd(16, *strides),
            num_warps=warps,
            enable_fp_fusion=True)


@torch.library.custom_op("dune::distill_loss", mutates_args=())
def distill_loss(
        student: torch.Tensor,
        teacher: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        beta: float = 1.0,
        eps: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """student, teacher: [B, N, D], bf16, fp16 or fp32, last dimension contiguous, not empty.
    mean, std: [D], fp32.

    Returns cos, smooth [B, N] and, for backward, coefs [B, N, 2] = (a, b), all fp32. Differentiable with
    respect to student. `kernels.distill_loss` checks the arguments."""
    B, N, D = student.shape
    cos = torch.empty(B, N, device=student.device, dtype=torch.float32)
    smooth = torch.empty_like(cos)
    coefs = torch.empty(B, N, 2, device=student.device, dtype=torch.float32)
    launch(_forward_kernel, student, teacher, mean, std, (cos, smooth, coefs), beta, eps)
    return cos, smooth, coefs


@torch.library.custom_op("dune::distill_loss_backward", mutates_args=())
def distill_loss_backward(
        grad_cos: torch.Tensor,
        grad_smooth: torch.Tensor,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        coefs: torch.Tensor,
        beta: float,
        eps: float) -> torch.Tensor:
    """Derivative of sum(grad_cos * cos + grad_smooth * smooth) by student: [B, N, D], its dtype."""
    grad = torch.empty(student.shape, device=student.device, dtype=student.dtype)
    outputs = grad_cos, grad_smooth, coefs, grad
    launch(_backward_kernel, student, teacher, mean, std, outputs, beta, eps)
    return grad


@distill_loss.register_fake
def _(student, teacher, mean, std, beta=1.0, eps=1e-3):
    B, N, D = student.shape
    cos = torch.empty(B, N, device=student.device, dtype=torch.float32)
    return cos, torch.empty_like(cos), torch.empty(B, N, 2, device=student.device, dtype=torch.float32)


@distill_loss_backward.register_fake
def _(grad_cos, grad_smooth, student, teacher, mean, std, coefs, beta, eps):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, grad_cos, grad_smooth, grad_coefs):
    grads = grad_cos.contiguous(), grad_smooth.contiguous()
    grad = distill_loss_backward(*grads, *ctx.saved_tensors, ctx.beta, ctx.eps)
    return grad, None, None, None, None, None


distill_loss.register_autograd(_backward, setup_context=_setup_context)
