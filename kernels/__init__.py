"""Standardised distillation losses and feature statistics that touch every feature as few times as possible.

    mean, m2 = channel_moments(teacher)                          # [D] fp32 each; reads the features once
    std = (m2 / (count - 1)).sqrt()
    cos, smooth_l1 = distill_loss(student, teacher, mean, std)   # [...] fp32 each, from [..., D] features

Triton kernels on CUDA and ROCm (`moments.py`, `distill.py`; also on the CPU with TRITON_INTERPRET=1), plain PyTorch
(`reference.py`) elsewhere and for float64. Needs torch, and triton where there is one; copy the folder and it works.
"""

import importlib.util
import os

import torch

from . import reference
from .reference import merge_moments

# Triton is imported where features first lie on a GPU: it weighs 74 MB, and data workers never need it.
_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

__all__ = ["channel_moments", "distill_loss", "merge_moments", "reference"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def channel_moments(x):
    """Mean and sum of squared deviations of every channel over all leading dimensions of x.

    x: [..., D], bf16, fp16, fp32 or fp64, last dimension contiguous; a view such as tokens[:, 1:] is not copied.
    Returns (mean, m2), each [D], fp32 (fp64 for fp64), accurate for any mean and spread, the same bits in every run.
    Sets merge from (count, mean, m2) by `merge_moments`: processes exchange 2D+1 numbers instead of their features.
    Raises ValueError for an empty or integer x, or a last dimension that is not contiguous. Not differentiable.
    """
    _check_features("x", x)
    x = x.detach()
    if not _on_triton(x):
        return reference.channel_moments(x)
    from . import moments
    return moments.channel_moments(*reference.fold(x))


def distill_loss(student, teacher, mean, std, beta=1.0, eps=1e-3):
    """Cosine and smooth-L1 loss of every token between student and t = (teacher - mean) / max(std, eps).

    student, teacher: [..., D], bf16, fp16, fp32 or fp64, one shape, last dimension contiguous; views are not copied.
    mean, std: [D], fp32 (or fp64 if the features are). beta: where smooth L1 turns linear, 0 means L1; Triton compiles
    for each beta. eps: least std; 0 means none.
    Returns (cos, smooth_l1), each [...], fp32 (fp64 if an argument is): 1 - cosine similarity, and mean over channels
    of smooth L1. Differentiable in student alone. NaN and infinity show in their token's losses; a token for which both
    incoming gradients are 0 (a dropped image) gets gradient 0 whatever it holds.
    Raises ValueError for arguments that do not fit, before any work.
    """
    _check_features("student", student)
    _check_features("teacher", teacher)
    D = student.shape[-1]
    if teacher.shape != student.shape:
        raise ValueError(f"teacher has shape {list(teacher.shape)}, expected the student's {list(student.shape)}")
    for name, x in (("mean", mean), ("std", std)):
        if x.shape != (D,) or not x.is_contiguous():
            found = f"shape {list(x.shape)} and strides {list(x.stride())}"
            raise ValueError(f"{name} has {found}, expected [{D}] and contiguous")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {x.dtype}, expected torch.float32")
    for name, x in (("teacher", teacher), ("mean", mean), ("std", std)):
        if x.device != student.device:
            raise ValueError(f"{name} is on {x.device}, expected {student.device}, where student is")
    if not beta >= 0 or not eps >= 0:
        raise ValueError(f"beta is {beta} and eps is {eps}, expected numbers >= 0")
    teacher, mean, std = teacher.detach(), mean.detach(), std.detach()
    if not _on_triton(student, teacher, mean, std):
        return reference.distill_loss(student, teacher, mean, std, beta, eps)
    from . import distill
    cos, smooth = distill.distill_loss(*reference.fold(student, teacher), mean, std, float(beta), float(eps))
    return cos.view(student.shape[:-1]), smooth.view(student.shape[:-1])


def _on_triton(*xs):
    return _installed and (xs[0].is_cuda or _interpreted) and all(x.dtype != torch.float64 for x in xs)


def _check_features(name, x):
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [..., D] with at least one token and one channel")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has strides {list(x.stride())}, expected a contiguous last dimension")
