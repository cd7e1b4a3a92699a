"""What the kernels compute, in plain PyTorch: the definition, and the path for CPUs and without Triton.

`definition` is the loss as one writes it down. `distill_loss` and `channel_moments` work block by block. A
block fits in the processor's cache: this is several times faster, and temporary memory is a few blocks.
"""

import torch
import torch.nn.functional as F

BLOCK = 1 << 18       # features in a block: 1 MiB in fp32
GPU_BLOCK = 1 << 24   # on a GPU without Triton, which needs larger blocks to be busy


def definition(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """(cos, smooth_l1) of every token, in fp32 (fp64 if an argument is)."""
    s, t = _standardize(student, teacher, mean, std, eps)
    cos = 1 - F.cosine_similarity(s, t, dim=-1, eps=1e-8)
    smooth = F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(-1)
    return cos, smooth


def distill_loss(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """See `kernels.distill_loss`. Under torch.compile it is `definition`, for the compiler to fuse."""
    if torch.compiler.is_compiling():
        return definition(student, teacher, mean, std, beta, eps)
    cos, smooth = DistillLoss.apply(*fold(student, teacher), mean, std, beta, eps)
    return cos.view(student.shape[:-1]), smooth.view(student.shape[:-1])


def channel_moments(x):
    """See `kernels.channel_moments`."""
    x, = fold(x)
    count = 0
    mean = torch.zeros(x.shape[-1], dtype=_dtype(x), device=x.device)
    m2 = torch.zeros_like(mean)
    for block in _blocks(x):
        tokens = x[block].to(mean.dtype).flatten(0, 1)
        n = tokens.shape[0]
        shift = tokens[0]
        deviation = tokens - shift   # from a token of the block: a large mean loses no digits
        total = deviation.sum(0)
        block_m2 = deviation.square_().sum(0) - total * total / n
        delta = shift + total / n - mean
        m2 += block_m2.clamp_(min=0) + delta * delta * (count * n / (count + n))
        mean += delta * (n / (count + n))
        count += n
    return mean, m2


def merge_moments(counts, means, m2s):
    """Moments of the union of P sets (Chan et al. 1979).

    counts [P], means [P, D], m2s [P, D], fp32 on one device -> count [], mean [D], m2 [D], fp32.
    A set of count 0 is ignored, even if its mean or m2 is NaN. If all counts are 0, the results are 0.
    The host does not wait for the device.
    """
    n = counts[:, None]
    means = means.where(n > 0, 0)
    m2s = m2s.where(n > 0, 0)
    count = counts.sum()
    mean = (n * means).sum(0) / count.clamp(min=1)
    mean = mean + (n * (means - mean)).sum(0) / count.clamp(min=1)   # corrects the rounding of the line above
    m2 = (m2s + n * (means - mean).square()).sum(0)
    return count, mean, m2


def fold(*xs):
    """Features [..., D] of one shape -> list of [B, N, D], B = 1 if all are contiguous.

    Views of up to three dimensions are not copied."""
    shape = xs[0].shape[-2:]
    if all(x.is_contiguous() for x in xs):
        shape = 1, -1, shape[-1]
    else:
        shape = -1, *shape
    return [x.reshape(shape) for x in xs]


class DistillLoss(torch.autograd.Function):
    """student, teacher [B, N, D] -> (cos, smooth_l1), each [B, N]."""

    @staticmethod
    def forward(ctx, student, teacher, mean, std, beta, eps):
        ctx.save_for_backward(student, teacher, mean, std)
        ctx.beta, ctx.eps = beta, eps
        cos = torch.empty(student.shape[:2], dtype=_dtype(student, teacher, mean, std), device=student.device)
        smooth = torch.empty_like(cos)
        for block in _blocks(student):
            cos[block], smooth[block] = definition(student[block], teacher[block], mean, std, beta, eps)
        return cos, smooth

    @staticmethod
    def backward(ctx, grad_cos, grad_smooth):
        grad = _Gradient.apply(grad_cos, grad_smooth, *ctx.saved_tensors, ctx.beta, ctx.eps)
        return grad, None, None, None, None, None


class _Gradient(torch.autograd.Function):
    """The backward pass. As a function of its own, it can refuse to be differentiated again."""

    @staticmethod
    def forward(ctx, grad_cos, grad_smooth, student, teacher, mean, std, beta, eps):
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for block in _blocks(student):
            grad[block] = _gradient(
                grad_cos[block], grad_smooth[block], student[block], teacher[block], mean, std, beta, eps)
        return grad

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("distill_loss cannot be differentiated twice")


def _gradient(grad_cos, grad_smooth, student, teacher, mean, std, beta, eps):
    """Derivative of sum(grad_cos * cos + grad_smooth * smooth) by student; the formula is in `distill.py`."""
    s, t = _standardize(student, teacher, mean, std, eps)
    s_norm = torch.linalg.vector_norm(s, dim=-1)
    t_norm = torch.linalg.vector_norm(t, dim=-1)
    a = grad_cos / (s_norm.clamp(min=1e-8) * t_norm.clamp(min=1e-8))
    b = a * torch.linalg.vecdot(s, t) / (s_norm.clamp(min=1e-8) * s_norm)
    b = torch.where(s_norm == 0, 0, b)
    d = s - t
    slope = d.sign_() if beta == 0 else d.div_(beta).clamp_(-1, 1)
    grad = slope.mul_(grad_smooth[..., None] / s.shape[-1])
    grad.addcmul_(b[..., None], s)
    grad.addcmul_(a[..., None], t, value=-1)
    dropped = (grad_cos == 0) & (grad_smooth == 0)
    return grad.masked_fill_(dropped[..., None], 0)


def _standardize(student, teacher, mean, std, eps):
    dtype = _dtype(student, teacher, mean, std)
    return student.to(dtype), (teacher.to(dtype) - mean) / std.clamp(min=eps)


def _dtype(*xs):
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def _blocks(x):
    """Indices that cut [B, N, D] into blocks of about BLOCK features."""
    B, N, D = x.shape
    size = BLOCK if x.device.type == "cpu" else GPU_BLOCK
    tokens = max(1, size // D)
    images = max(1, tokens // N)
    for i in range(0, B, images):
        for j in range(0, N, tokens):
            yield slice(i, i + images), slice(j, j + tokens)
