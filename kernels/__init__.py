"""Feature statistics and distillation losses that read and write every feature as rarely as possible.

    mean, m2 = channel_moments(teacher)                          # [D] fp32 each; reads the features once
    std = (m2 / (count - 1)).sqrt()
    cos, smooth_l1 = distill_loss(student, teacher, mean, std)   # [...] fp32 each, from [..., D] features

Triton kernels on CUDA and ROCm (`moments.py`, `distill.py`; on the CPU with TRITON_INTERPRET=1, for tests).
Plain PyTorch (`reference.py`) elsewhere and for float64. To use it in another project, copy the folder: it
needs torch, and Triton for its kernels. `muon.py`, the optimizer, stands alone.
"""

import importlib.util
import os

import torch

from . import reference
from .reference import merge_moments

# Triton is imported when features are first on a GPU: it takes 74 MB, and data workers never need it.
_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

__all__ = ["channel_moments", "distill_loss", "merge_moments", "reference"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_TOKENS = 2**31 - 2**20   # the kernels count tokens in 32 bits, some of them past the last one


def channel_moments(x):
    """Mean and sum of squared deviations of every channel over all leading dimensions of x.

    x: [..., D], bf16, fp16, fp32 or fp64, last dimension contiguous. Views such as tokens[:, 1:] are not
    copied.
    Returns (mean, m2), each [D], fp32 (fp64 for fp64). Accurate for any mean and spread; the same bits in
    every run. Not differentiable. `merge_moments` merges the results of several sets: processes exchange
    2 D + 1 numbers instead of their features.
    Raises ValueError if x is empty, not floating-point, too large, or its last dimension is not contiguous.
    """
    _check_features("x", x)
    x = x.detach()
    if not _uses_triton(x):
        return reference.channel_moments(x)
    from . import moments
    return moments.channel_moments(*reference.fold(x))


def distill_loss(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """Cosine and smooth-L1 loss of every token between the student and t = (teacher - mean) / max(std, eps).

    student, teacher: [..., D], same shape, bf16, fp16, fp32 or fp64, last dimension contiguous. Views such as
    tokens[:, 1:] are not copied.
    mean, std: [D], fp32 (or fp64). eps: smallest std, 0 for none.
    beta: where smooth L1 becomes linear, 0 for L1. Triton compiles once for each beta.
    Returns (cos, smooth_l1), each [...], fp32 (fp64 if an argument is): 1 - cosine similarity, and the mean
    over channels of smooth L1. Differentiable once, with respect to student alone.
    NaN and infinity appear in the losses of their token. A token whose two incoming gradients are 0 (a
    dropped image) gets gradient 0, even if it holds NaN.
    Raises ValueError if the arguments do not fit.
    """
    _check_features("student", student)
    _check_features("teacher", teacher)
    D = student.shape[-1]
    if teacher.shape != student.shape:
        found, expected = list(teacher.shape), list(student.shape)
        raise ValueError(f"teacher has shape {found}, expected the student's {expected}")
    for name, x in (("mean", mean), ("std", std)):
        if x.shape != (D,) or not x.is_contiguous():
            found = f"shape {list(x.shape)} and strides {list(x.stride())}"
            raise ValueError(f"{name} has {found}, expected [{D}] and contiguous")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {x.dtype}, expected torch.float32")
    for name, x in (("teacher", teacher), ("mean", mean), ("std", std)):
        if x.device != student.device:
            raise ValueError(f"{name} is on {x.device}, expected {student.device}, where student is")
    if not (beta >= 0 and eps >= 0):
        raise ValueError(f"beta is {beta} and eps is {eps}, expected numbers >= 0")
    teacher, mean, std = teacher.detach(), mean.detach(), std.detach()
    if not _uses_triton(student, teacher, mean, std):
        return reference.distill_loss(student, teacher, mean, std, beta, eps)
    from . import distill
    features = reference.fold(student, teacher)
    cos, smooth, _ = distill.distill_loss(*features, mean, std, float(beta), float(eps))
    return cos.view(student.shape[:-1]), smooth.view(student.shape[:-1])


def _uses_triton(*xs):
    return _installed and (xs[0].is_cuda or _interpreted) and all(x.dtype != torch.float64 for x in xs)


def _check_features(name, x):
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [..., D] with at least one feature")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has strides {list(x.stride())}, expected a contiguous last dimension")
    tokens = x.numel() // x.shape[-1]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{name} has {tokens} tokens, expected at most {MAX_TOKENS}: split it")
