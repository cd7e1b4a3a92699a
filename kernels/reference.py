"""What the kernels compute, in plain PyTorch: the definition, and the path for the CPU and for systems without Triton.

`definition` is the loss as one writes it down, `gradient` its derivative (the formula is in `distill.py`). The public
functions work through the tokens in blocks that fit the processor's cache: temporary memory is a few blocks.
"""

import torch
import torch.nn.functional as F

BLOCK = 1 << 18        # features in a block: 1 MiB in fp32, and a handful of such temporaries
GPU_BLOCK = 1 << 24    # on a GPU without Triton, which has to be kept busy


def _standardised(student, teacher, mean, std, eps):
    dtype = _dtype(student, teacher, mean, std)
    return student.to(dtype), (teacher.to(dtype) - mean) / std.clamp(min=eps)


def definition(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """cos and smooth-L1 loss of every token, in fp32 (fp64 if any argument is)."""
    s, t = _standardised(student, teacher, mean, std, eps)
    return 1 - F.cosine_similarity(s, t, dim=-1, eps=1e-8), F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(-1)


def gradient(g_cos, g_smooth, student, teacher, mean, std, beta, eps):
    """Derivative of sum(g_cos * cos + g_smooth * smooth) by student; 0 where both are 0, whatever the token holds."""
    s, t = _standardised(student, teacher, mean, std, eps)
    s_norm = torch.linalg.vector_norm(s, dim=-1)
    s_floor, t_floor = s_norm.clamp(min=1e-8), torch.linalg.vector_norm(t, dim=-1).clamp(min=1e-8)
    a = g_cos / (s_floor * t_floor)
    b = torch.where(s_norm == 0, 0, a * torch.linalg.vecdot(s, t) / (s_floor * s_norm))
    d = s - t
    slope = d.sign_() if beta == 0 else d.div_(beta).clamp_(-1, 1)
    ds = slope.mul_(g_smooth[..., None] / s.shape[-1]).addcmul_(b[..., None], s).addcmul_(a[..., None], t, value=-1)
    return ds.masked_fill_(((g_cos == 0) & (g_smooth == 0))[..., None], 0)


def distill_loss(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """See `kernels.distill_loss`. Under torch.compile it is `definition`, for the compiler to fuse."""
    if torch.compiler.is_compiling():
        return definition(student, teacher, mean, std, beta, eps)
    cos, smooth = _Loss.apply(*fold(student, teacher), mean, std, beta, eps)
    return cos.view(student.shape[:-1]), smooth.view(student.shape[:-1])


def channel_moments(x):
    """See `kernels.channel_moments`."""
    x, = fold(x)
    dtype = _dtype(x)
    count, mean, m2 = 0, x.new_zeros(x.shape[-1], dtype=dtype), x.new_zeros(x.shape[-1], dtype=dtype)
    for block in _blocks(x):
        part = x[block].to(dtype).flatten(0, 1)
        n, shift = part.shape[0], part[0]
        d = part - shift                               # from a row of the block: a large mean loses no digits
        total = d.sum(0)
        part_mean, part_m2 = shift + total / n, (d.square_().sum(0) - total * total / n).clamp_(min=0)
        gap = part_mean - mean
        m2 += part_m2 + gap * gap * (count * n / (count + n))
        mean += gap * (n / (count + n))
        count += n
    return mean, m2


def merge_moments(counts, means, m2s):
    """Joins the moments of P sets (Chan et al. 1979): counts [P], means [P, D], m2s [P, D] -> count, mean [D], m2 [D].

    counts is a float tensor on the features' device, and nothing here waits for the device. A set with count 0 changes
    nothing, whatever its mean and m2 hold; if every count is 0, so are the results. fp32 in, fp32 out.
    """
    n = counts[:, None]
    means, m2s = means.where(n > 0, 0), m2s.where(n > 0, 0)
    count = counts.sum()
    mean = (n * means).sum(0) / count.clamp(min=1)
    mean = mean + (n * (means - mean)).sum(0) / count.clamp(min=1)   # takes back the rounding of the line above
    return count, mean, (m2s + n * (means - mean).square()).sum(0)


def fold(*xs):
    """[..., D] tensors of one leading shape as [A, N, D] views; only what does not fold into two is copied."""
    lead = [n for n in xs[0].shape[:-1] if n != 1]
    xs = [x.reshape(*lead, x.shape[-1]) for x in xs]
    for k in range(len(lead) + 1):
        if all(_joins(x, 0, k) and _joins(x, k, len(lead)) for x in xs):
            break
    A, N = torch.Size(lead[:k]).numel(), torch.Size(lead[k:]).numel()
    return [x.reshape(A, N, x.shape[-1]) for x in xs]


def _joins(x, i, j):
    """Whether dimensions i to j-1 of x are one evenly spaced run."""
    return all(x.stride(d) == x.shape[d + 1] * x.stride(d + 1) for d in range(i, j - 1))


def _dtype(*xs):
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def _blocks(x):
    """Indices that cut [A, N, D] into blocks of about BLOCK features, or GPU_BLOCK."""
    A, N, D = x.shape
    rows = max(1, (GPU_BLOCK if x.is_cuda else BLOCK) // D)
    for i in range(0, A, max(1, rows // N)):
        for j in range(0, N, rows):
            yield slice(i, i + max(1, rows // N)), slice(j, j + rows)


def forward(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """student, teacher [A, N, D] -> cos, smooth [A, N]."""
    cos = torch.empty(student.shape[:2], dtype=_dtype(student, teacher, mean, std), device=student.device)
    smooth = torch.empty_like(cos)
    for block in _blocks(student):
        cos[block], smooth[block] = definition(student[block], teacher[block], mean, std, beta, eps)
    return cos, smooth


def backward(g_cos, g_smooth, student, teacher, mean, std, beta, eps):
    """g_cos, g_smooth [A, N], the rest as forward -> gradient [A, N, D] in the student's dtype."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for block in _blocks(student):
        grad[block] = gradient(g_cos[block], g_smooth[block], student[block], teacher[block], mean, std, beta, eps)
    return grad


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mean, std, beta, eps):
        ctx.save_for_backward(student, teacher, mean, std)
        ctx.beta, ctx.eps = beta, eps
        return forward(student, teacher, mean, std, beta, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_cos, g_smooth):
        return backward(g_cos, g_smooth, *ctx.saved_tensors, ctx.beta, ctx.eps), None, None, None, None, None
