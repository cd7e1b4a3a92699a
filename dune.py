"""DUNE: distill several frozen vision teachers with different tasks and training data into one ViT encoder.

This file is the method (DUNE, CVPR 2025, arXiv 2503.14405; UNIC, ECCV 2024, arXiv 2408.05088): the student,
the standardization of the teachers' features, the loss with data sharing and teacher dropping, and the
projectors. The ViT and the loading of checkpoints follow. For an image i and a teacher t, a token's loss is

    l = 1/2 (1 - cos(s, z)) + 1/2 smooth_l1(s, z)     s = projector_t(student)
                                                      z = (teacher_t - mean_t) / std_t

l_it is the mean over patch tokens; if the teacher has a class token, the mean of that and the class token's
loss. The loss of a step is sum(c_it * l_it) / sum(c_it). c_it is 0 or 1: whether teacher t counts for image
i. The division by sum(c) is in train.py, where all images of all processes are known.

    student = dune.load("dune_vitbase14_448_paper")     # or a path: our checkpoints and the published ones
    tokens = student.encoder(images)                    # {"cls": [B, D], "patch": [B, N, D]}
    dinov2 = student(images)["dinov2"]["patch"]         # DINOv2's features as predicted by its projector

Shapes: B images on this process, b_t of them supervised by teacher t, T teachers, N patch tokens, D channels
of the student, D_t channels of teacher t.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels

if not hasattr(kernels, "distill_loss"):
    place = kernels.__spec__.origin or [*kernels.__path__]
    raise ImportError(f"{place} is another package named kernels; dune.py needs the kernels/ beside it")


# ---- The student -------------------------------------------------------------------------------------------

class DUNE(nn.Module):
    """The student: an encoder and, for each teacher, a projector and the statistics of its features.

    encoder    a ViT
    teachers   {name: (channels of its features, whether it has a class token)}
    projector  a key of PROJECTORS
    norm       "dune" or "unic", see TeacherNorm
    recipe     of a loaded checkpoint: the options it was trained with, {} if unknown
    teacher_weights  of a loaded checkpoint: {teacher: its file, or "random"}
    """

    def __init__(self, encoder, teachers, projector="tp", norm="dune", **projector_options):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.projectors = nn.ModuleDict()
        self.teacher_norms = nn.ModuleDict()
        self.recipe = {}
        self.teacher_weights = {}
        for name, (dim, has_cls) in teachers.items():
            self.projectors[name] = PROJECTORS[projector](encoder, dim, has_cls, **projector_options)
            self.teacher_norms[name] = TeacherNorm(dim, has_cls, norm)
        # Projectors read the tokens before encoder.norm, so it gets no gradient. It is frozen, or DDP would
        # wait for one: its weight stays 1 and its bias 0, as in the published files.
        encoder.norm.requires_grad_(False)

    def forward(self, images, index=None):
        """The student's predictions of the teachers' standardized features.

        images [B, 3, H, W] -> {teacher: {"cls": [B, D_t] or None, "patch": [B, N, D_t]}}
        index {teacher: int64 [b_t]}: project only these images for this teacher, perhaps none. None: all.
        """
        all_blocks = any(projector.uses_all_blocks for projector in self.projectors.values())
        tokens = self.encoder.tokens(images, return_all_blocks=all_blocks)
        outputs = {}
        for name in self.projectors:
            outputs[name] = self.project(name, tokens, index[name] if index else None)
        return outputs

    def as_teacher(self, images, teacher):
        """What forward() says of one teacher, in the scale of the teacher's own features.

        images [B, 3, H, W] -> {"cls": [B, D_t] or None, "patch": [B, N, D_t]}. For the teacher's own head, as
        Multi-HMR's, which then runs on the student unchanged. A head that is trained on the student loses
        less, which is what the paper does (DUNE section 4).
        """
        tokens = self.encoder.tokens(images, self.projectors[teacher].uses_all_blocks)
        features = self.project(teacher, tokens)
        norm = self.teacher_norms[teacher]
        for token_type in norm.normalizers:
            mean, std = norm.statistics(token_type)
            features[token_type] = features[token_type] * std + mean
        return features

    def project(self, teacher, tokens, index=None):
        """Apply the projector of one teacher to tokens[index]: {"cls": [b_t, D_t] or None, "patch"}."""
        if index is not None:
            tokens = [x[index] for x in tokens] if isinstance(tokens, list) else tokens[index]
        projected = split_tokens(self.projectors[teacher](tokens), True)
        if "cls" not in self.teacher_norms[teacher].normalizers:
            projected["cls"] = None
        return projected


# ---- Standardization of the teachers' features -------------------------------------------------------------

class RunningStats(nn.Module):
    """Running mean and std of one token type of one teacher, fp32 [D_t] each."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))


class TeacherNorm(nn.Module):
    """Standardizes one teacher's features per channel, class and patch tokens separately (DUNE section 3.3).

    style "dune": batch statistics in training, running averages in evaluation: (x - mean) / max(std, 1e-3).
    style "unic": running averages always; the batch updates them afterwards: (x - mean) / (std + 1e-6). In
    the first step they are still mean 0 and std 1.
    """

    def __init__(self, dim, has_cls, style="dune"):
        super().__init__()
        self.style = style
        self.normalizers = nn.ModuleDict()
        for token_type in token_types(has_cls):
            self.normalizers[token_type] = RunningStats(dim)

    def statistics(self, token_type, batch=None):
        """(mean, std), [D_t] each, to standardize by. batch: this batch's (mean, std), None in evaluation."""
        running = self.normalizers[token_type]
        if self.style == "unic":
            return running.mean.clone(), running.std + 1e-6
        mean, std = batch or (running.mean, running.std)
        return mean, std.clamp(min=1e-3)

    def forward(self, features):
        """Features standardized by the running averages, fp32. Evaluation only, see update_norms()."""
        out = {"cls": None, "patch": None}
        for token_type in self.normalizers:
            mean, std = self.statistics(token_type)
            if features[token_type] is not None:
                out[token_type] = (features[token_type].float() - mean) / std
        return out


def update_norms(norms, features, momentum):
    """One training step of standardization. Returns {teacher: {token type: (mean, std)}} for this batch.

    norms {teacher: TeacherNorm}; features {teacher: {"cls": [b_t, D_t] or None, "patch": [b_t, N, D_t]}}: raw
    features of the images that each teacher supervises on this process. The statistics are those of the
    tokens of all processes. No features are sent: for each teacher and token type a process sends count, mean
    and m2 (sum of squared deviations), 2 D_t + 1 numbers, all in one message, and they are merged exactly
    (Chan et al. 1979). The running averages move by `momentum`: stat <- (1 - m) stat + m batch_stat.
    """
    keys = []
    local = []
    for name, norm in norms.items():
        for token_type in norm.normalizers:
            keys.append((name, token_type))
            local.append(moments(features[name][token_type]))
    message = torch.cat(local)[None]
    messages = message
    if dist.is_initialized() and dist.get_world_size() > 1:
        messages = message.new_empty(dist.get_world_size(), message.shape[1])
        dist.all_gather_into_tensor(messages, message)
    statistics = {name: {} for name in norms}
    sizes = [len(x) for x in local]
    for (name, token_type), gathered in zip(keys, messages.split(sizes, 1)):
        means, m2s = gathered[:, 1:].chunk(2, 1)  # [processes, D_t] each
        count, mean, m2 = kernels.merge_moments(gathered[:, 0], means, m2s)
        std = (m2 / (count - 1).clamp(min=1)).sqrt()
        # Before the update: UNIC standardizes by the averages of the earlier batches.
        norm = norms[name]
        statistics[name][token_type] = norm.statistics(token_type, (mean, std))
        # One batch that is not finite would make the running averages NaN forever.
        finite = (count > 1) & mean.isfinite().all() & std.isfinite().all()
        running = norm.normalizers[token_type]
        running.mean.lerp_(torch.where(finite, mean, running.mean), momentum)
        running.std.lerp_(torch.where(finite, std, running.std), momentum)
    return statistics


def moments(x):
    """fp32 [1 + 2 D]: number of tokens in x [..., D], mean and sum of squared deviations per channel."""
    if x.numel() == 0:
        return torch.zeros(1 + 2 * x.shape[-1], device=x.device)
    count = torch.full((1,), x.numel() // x.shape[-1], device=x.device, dtype=torch.float32)
    mean, m2 = kernels.channel_moments(x)
    return torch.cat([count, mean, m2])


# ---- Loss, data sharing, teacher dropping ------------------------------------------------------------------

LOSS_WEIGHTS = {"cos": 0.5, "smooth_l1": 0.5}  # a token's loss is the weighted sum of these (UNIC eq. 2)


def token_losses(student, teacher, mean, std):
    """{term: fp32 [...]}, the terms of the loss of every token.

    student, teacher [..., D_t]: predicted features, and the teacher's raw features, which are standardized by
    mean and std [D_t] inside of the kernel. cos: 1 - cosine similarity. smooth_l1: mean over channels, beta
    1. To add a term, add it here and to LOSS_WEIGHTS.
    """
    # eps=0: std already contains its epsilon, see TeacherNorm.statistics.
    cos, smooth_l1 = kernels.distill_loss(student, teacher, mean, std, beta=1.0, eps=0.0)
    return {"cos": cos, "smooth_l1": smooth_l1}


def image_losses(student, teacher, statistics):
    """Losses of one teacher: (loss [b_t] of every image, its terms {"cls_cos": [b_t], "patch_cos", ...}).

    student, teacher: {"cls": [b_t, D_t] or None, "patch": [b_t, N, D_t]}; those of the teacher are raw
    features. statistics {token type: (mean, std)}. Patch tokens are averaged. If the teacher has a class
    token, the class token's loss and the mean of the patch tokens' count equally.
    """
    terms = {}
    loss = 0
    for token_type, (mean, std) in statistics.items():
        per_token = token_losses(student[token_type], teacher[token_type], mean, std)
        for term, value in per_token.items():
            value = value.mean(1) if token_type == "patch" else value
            terms[f"{token_type}_{term}"] = value
            loss = loss + LOSS_WEIGHTS[term] * value
    return loss / len(statistics), terms


def batch_losses(outputs, features, statistics, index, count):
    """image_losses of every teacher: (losses [count, T], {teacher: terms}).

    outputs, features {teacher: tokens of the images index[teacher]}; index {teacher: int64 [b_t]}: which of
    the `count` images the teacher supervises. The losses of all other images are 0.
    """
    losses = []
    terms = {}
    for name, indices in index.items():
        loss, terms[name] = image_losses(outputs[name], features[name], statistics[name])
        losses.append(loss.new_zeros(count).index_copy(0, indices, loss))
    return torch.stack(losses, 1), terms


def teacher_coefficients(losses, teacher_mask, drop, uniform):
    """c [B, T], 0 or 1: which teachers count for which images (data sharing, then teacher dropping).

    losses [B, T]: the choice depends on them, but no gradient flows through it.
    teacher_mask bool [B, T], from data.teacher_mask: may teacher t supervise image i? (DUNE section 3.2)
        "all"          every teacher supervises every image
        "own"          a teacher supervises the images of its own data only
        "own+generic"  as "own", and generic data is supervised by all teachers. Data is generic if it is
                       broad, as DINOv2's web images: these are useful input for every teacher. Scenes
                       (MASt3R) and people (Multi-HMR) are not, and supervise their own teacher alone.
                       TEACHERS says which is which.
    drop: probability of teacher dropping (UNIC section 3.3). uniform [B, T]: random numbers from U(0, 1). Of
    the teachers that may supervise an image the one with the largest loss always counts; each other one is
    dropped where uniform < drop.
    """
    hardest = losses.detach().masked_fill(~teacher_mask, -math.inf).argmax(1, keepdim=True)
    keep = (uniform >= drop).scatter(1, hardest, True)
    return (keep & teacher_mask).to(losses.dtype)


def weighted_sum(losses, coefficients):
    """(sum(c * l), sum(c)). Their ratio over all images of all processes is the loss (UNIC eq. 3).

    where() and not a product: the loss of a teacher that does not count must not enter the sum, not even as
    NaN. Its gradient is 0, too: kernels.distill_loss gives a token without incoming gradient the gradient 0.
    """
    return torch.where(coefficients > 0, coefficients * losses, 0).sum(), coefficients.sum()


# ---- Projectors --------------------------------------------------------------------------------------------
# They map the student's class and patch tokens, before its last norm, to a teacher's channels:
# [B, 1 + N, D] -> [B, 1 + N, D_t]. All teachers of a student have projectors of the same type.

class Projector(nn.Module):
    """Base class. A projector defines __init__(encoder, out_dim, has_cls) and forward(tokens).

    uses_all_blocks  forward gets a list with the output of every encoder block instead of the last block's
                     output
    width_keys       {extra constructor argument: the bias in a checkpoint whose length it is}
    """

    uses_all_blocks = False
    width_keys = {}


class TransformerProjector(Projector):
    """TP, DUNE's own (section 3.2): one ViT block over all tokens at the student's width, then Linear.

    Its Linear layers keep PyTorch's default initialization, as published; the encoder's are trunc-normal.
    """

    def __init__(self, encoder, out_dim, has_cls=True):
        super().__init__()
        self.blocks = nn.ModuleList([Block(encoder.embed_dim, encoder.num_heads, layer_scale=1e-4)])
        self.linear = nn.Linear(encoder.embed_dim, out_dim)

    def forward(self, tokens):
        return self.linear(self.blocks[0](tokens))


class SimpleProjector(Projector):
    """SP, the ablation: an MLP on each token, with its own weights for class and for patch tokens."""

    def __init__(self, encoder, out_dim, has_cls=True):
        super().__init__()
        self.mlps = nn.ModuleDict()
        for token_type in token_types(has_cls):
            self.mlps[token_type] = Mlp(encoder.embed_dim, encoder.embed_dim, out_dim)
        self.apply(init_linear)

    def forward(self, tokens):
        return apply_per_token_type(list(self.mlps.values()), tokens)


class LadderProjector(Projector):
    """LP, UNIC's: an MLP on the output of every encoder block, summed; own weights for each token type."""

    uses_all_blocks = True
    width_keys = {"hidden": "rungs.patch.0.fc1.bias", "last_hidden": "rungs.patch.{last}.fc1.bias"}

    def __init__(self, encoder, out_dim, has_cls=True, hidden=768, last_hidden=3072):
        super().__init__()
        widths = [hidden] * (len(encoder.blocks) - 1) + [last_hidden]
        self.rungs = nn.ModuleDict()  # {token type: one MLP for each encoder block}
        for token_type in token_types(has_cls):
            self.rungs[token_type] = nn.ModuleList(Mlp(encoder.embed_dim, width, out_dim) for width in widths)
        self.apply(init_linear)

    def forward(self, tokens):
        out = 0
        for i, x in enumerate(tokens):
            out = out + apply_per_token_type([mlps[i] for mlps in self.rungs.values()], x)
        return out


PROJECTORS = {"tp": TransformerProjector, "sp": SimpleProjector, "lp": LadderProjector}


def token_types(has_cls):
    return ("cls", "patch") if has_cls else ("patch",)


def apply_per_token_type(mlps, tokens):
    """Apply the first MLP to the class token and the last to the patch tokens.

    If the teacher has no class token there is only one MLP; DUNE.project then discards the class token's
    output.
    """
    return torch.cat([mlps[0](tokens[:, :1]), mlps[-1](tokens[:, 1:])], 1)


# ---- The ViT -----------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                      # [B, heads, N, d] each
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        x = attention(q, k, v).transpose(1, 2)                    # [B, N, heads, d]
        return self.proj(x.flatten(2))


class Mlp(nn.Module):
    """gelu: "none" for the exact GELU, "tanh" for its approximation.

    "swiglu", of DINOv2's ViT-g: silu(first half) * second half of fc1's output, which is wider by a third.
    """

    def __init__(self, dim, hidden_dim, out_dim=None, gelu="none"):
        super().__init__()
        self.gelu = gelu
        in_dim = hidden_dim
        if gelu == "swiglu":
            hidden_dim = (hidden_dim * 2 // 3 + 7) // 8 * 8
            in_dim = 2 * hidden_dim
        self.fc1 = nn.Linear(dim, in_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim)

    def forward(self, x):
        x = self.fc1(x)
        if self.gelu == "swiglu":
            gate, x = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(x, approximate=self.gelu))


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. drop_path: probability of dropping each residual branch, for each image."""

    def __init__(self, dim, num_heads, layer_scale=None, drop_path=0.0, eps=1e-6, gelu="none"):
        super().__init__()
        self.drop_rate = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, gelu=gelu)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x, rope=None):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rope)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def drop_path(self, x):
        if not self.training or self.drop_rate == 0:
            return x
        keep = 1 - self.drop_rate
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep) / keep


class ViT(nn.Module):
    """The Vision Transformer of the student and of every teacher.

    image_size, patch_size   pixels; the position embedding covers (image_size // patch_size)^2 patches
    registers, class_token   number of register tokens; whether there is a class token
    position     a learned embedding, named by how it is resized to other grids: "offset" (DUNE, DINOv2
                 without registers), "antialias" (DINOv2 with registers), "size" (SigLIP); or a rotary one on
                 q and k of every block: "rope" (MASt3R), "rope_centered" (DINOv3, its periods are in the
                 checkpoint)
    layer_scale  initial value of LayerScale, None for no LayerScale
    drop_path    stochastic depth of the last block, rising linearly from 0 at the first
    eps, gelu    of the LayerNorms; of the MLPs, see Mlp
    """

    def __init__(self, image_size=336, patch_size=14, embed_dim=768, depth=12, num_heads=12, registers=4, *,
                 class_token=True, position="offset", layer_scale=1e-4, drop_path=0.0, eps=1e-6, gelu="none"):
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.registers = registers
        self.position = position
        self.grid = image_size // patch_size
        self.checkpoint_blocks = False  # recompute each block in the backward pass: slower, far less memory
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = None
        if not position.startswith("rope"):
            self.pos_embed = nn.Parameter(torch.zeros(1, class_token + self.grid**2, embed_dim))
        quarter = embed_dim // num_heads // 4
        periods = 100 ** (torch.arange(quarter) / quarter)
        self.register_buffer("rope_periods", periods if position == "rope_centered" else None)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)
            self.blocks.append(Block(embed_dim, num_heads, layer_scale, rate, eps, gelu))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=1e-6)  # normal_ imports torch._dynamo: seconds
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def forward(self, images, norm=True):
        """images [B, 3, H, W] -> {"cls": [B, D] or None, "patch": [B, N, D]}; norm=False: before the norm."""
        x = self.tokens(images)
        if norm:
            x = self.norm(x)
        return split_tokens(x, self.cls_token is not None)

    def tokens(self, images, return_all_blocks=False):
        """Class and patch tokens before the last norm, the input of the projectors: [B, 1 + N, D].

        [B, N, D] if there is no class token. images [B, 3, H, W], ImageNet-normalized; H and W are divisible
        by the patch size. return_all_blocks: a list with the output of every block instead of the last one's.
        """
        rows, cols = token_grid(images, self.patch_size)
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = x.to(self.norm.weight.dtype)  # the residual stream stays fp32 under autocast
        # [0]: or the gradient for a single image is a slice with odd strides, of which DDP warns.
        if self.cls_token is not None:
            x = torch.cat([self.cls_token[0].expand(x.shape[0], -1, -1), x], 1)
        if self.pos_embed is not None:
            x = x + self.interpolate_pos_embed(rows, cols)
        # Registers go first: attention ignores the order, and x[:, registers:] is then class + patches.
        if self.register_tokens is not None:
            x = torch.cat([self.register_tokens[0].expand(x.shape[0], -1, -1), x], 1)
        rope = None
        if self.pos_embed is None:
            head_dim = self.embed_dim // self.num_heads
            prefix = x.shape[1] - rows * cols
            rope = rope_cos_sin(rows, cols, prefix, head_dim, x.device, self.rope_periods)
        outputs = []
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
            if return_all_blocks:
                outputs.append(x[:, self.registers:])
        return outputs if return_all_blocks else x[:, self.registers:]

    def interpolate_pos_embed(self, rows, cols, mode=None):
        """The position embedding [1, (1 +) rows * cols, D] of a token grid; unchanged at the trained size.

        mode: "offset", "antialias" or "size", see the class; None: this ViT's own.
        """
        if (rows, cols) == (self.grid, self.grid):
            return self.pos_embed
        mode = mode or self.position
        cls, patches = self.pos_embed.tensor_split([-self.grid**2], 1)
        patches = patches.float().unflatten(1, (self.grid, self.grid))  # [1, grid, grid, D]
        patches = patches.permute(0, 3, 1, 2)
        if mode == "offset":  # the 0.1 is DINOv2's own, kept because its weights are used with it
            scale = (rows + 0.1) / self.grid, (cols + 0.1) / self.grid
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        else:
            patches = F.interpolate(patches, (rows, cols), mode="bicubic", antialias=mode == "antialias")
        patches = patches.flatten(2).transpose(1, 2)  # [1, rows * cols, D]
        return torch.cat([cls, patches.to(cls.dtype)], 1)


SIZES = {  # standard ViT sizes, and tiny for a laptop; embed_dim is 64 * num_heads, or files do not load
    "tiny": dict(embed_dim=128, depth=2, num_heads=2),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


def token_grid(images, patch_size):
    """(rows, cols) of the tokens of images [..., H, W]. UserError if the patch size does not divide H, W."""
    height, width = (int(side) for side in images.shape[-2:])  # while being traced they are tensors
    if height % patch_size or width % patch_size:
        raise UserError(f"image size {height}x{width} is not divisible by the patch size {patch_size}")
    return height // patch_size, width // patch_size


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of [B, heads, N, d]."""
    fused = q.device.type != "cpu" or not q.requires_grad or k.shape[-2] > 512
    if fused or torch.jit.is_tracing():  # torch.jit.trace compares traces with and without gradients
        return F.scaled_dot_product_attention(q, k, v)
    # In training on a CPU with few tokens, in bf16, the fused attention is eight times slower than this.
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def rope_cos_sin(rows, cols, prefix, dim, device, periods=None):
    """Rotary position embedding: (cos, sin), each [prefix + rows * cols, dim].

    Half of the channels are rotated by the row, half by the column. The prefix tokens (class and registers)
    have no position and are not rotated.
    periods  None: MASt3R's RoPE, coordinates count from 0. [dim / 4]: DINOv3's, coordinates run from -1 to 1.
    """
    y = torch.arange(rows, device=device)
    x = torch.arange(cols, device=device)
    if periods is None:
        frequency = 100.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    else:
        frequency = 2 * math.pi / periods.float()
        y = (2 * y + 1) / rows - 1
        x = (2 * x + 1) / cols - 1
    angle_y = (y[:, None] * frequency).repeat_interleave(cols, 0)  # [rows * cols, dim / 4]
    angle_x = (x[:, None] * frequency).repeat(rows, 1)
    angle = torch.cat([angle_y, angle_y, angle_x, angle_x], -1)    # [rows * cols, dim]
    angle = F.pad(angle, (0, 0, prefix, 0))
    return angle.cos(), angle.sin()


def apply_rope(x, cos_sin):
    """Rotate q or k [B, heads, N, d] in fp32. In each half of the channels, j pairs with j + d / 4."""
    cos, sin = cos_sin
    y1, y2, x1, x2 = x.chunk(4, -1)  # [B, heads, N, d / 4] each
    rotated = torch.cat([-y2, y1, -x2, x1], -1)
    return (x * cos + rotated * sin).to(x.dtype)


def split_tokens(x, has_cls):
    """[B, (1 +) N, D] -> {"cls": [B, D] or None, "patch": [B, N, D]}, views."""
    if has_cls:
        return {"cls": x[:, 0], "patch": x[:, 1:]}
    return {"cls": None, "patch": x}


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def split_matrices(module):
    """(The weights of attention and MLPs, for Muon; all other parameters, for AdamW), two lists."""
    matrices, others = [], []
    for name, p in module.named_parameters():
        is_matrix = p.ndim == 2 and re.search(r"\b(qkv|proj|fc1|fc2)\.weight$", name)
        (matrices if is_matrix else others).append(p)
    return matrices, others


# ---- Loading -----------------------------------------------------------------------------------------------

class UserError(ValueError):
    """An error in the user's input: shown as one line that says what to do, without a traceback."""


PUBLISHED_URL = "https://download.europe.naverlabs.com/dune/{}.pth"
PUBLISHED_NAMES = ("dune_vitbase14_336", "dune_vitbase14_448", "dune_vitbase14_448_paper",
                   "dune_vitsmall14_336", "dune_vitsmall14_448")
TEACHER_ALIASES = {  # the published files' names of the teachers, and ours
    "dino2reg_vitlarge_14": "dinov2",
    "mast3r_vitlarge_16": "mast3r",
    "multihmr_vitlarge_14_672": "multihmr",
    "dino_vitbase_16": "dino",
    "deit3_vitbase_16": "deit3",
    "ibot_vitbase_16": "ibot",
    "dbotft_vitbase_16": "dbotft",
}
KEY_PATTERNS = {  # published keys -> ours
    r"^((module|_orig_mod)\.)+": "",
    r"^lp\.heads\.(\w+)\.(cls|patch)\.(\d+)\.layers\.0\.": r"projectors.\1.rungs.\2.\3.fc1.",
    r"^lp\.heads\.(\w+)\.(cls|patch)\.(\d+)\.layers\.2\.": r"projectors.\1.rungs.\2.\3.fc2.",
}


def load(path_or_name, encoder_only=False):
    """A trained student in eval mode on the CPU: a DUNE, or with encoder_only its ViT.

    path_or_name: a checkpoint of ours, a published DUNE or UNIC file, or one of PUBLISHED_NAMES, which is
    downloaded. All sizes are inferred from the tensors. UserError if the file does not hold such a model.
    """
    path = str(path_or_name)
    if path in PUBLISHED_NAMES and not os.path.exists(path):
        path = download(PUBLISHED_URL.format(path))
    content = load_checkpoint(path)
    with user_errors(path):
        state = our_state_dict(content)
        encoder_state = strip_prefix(state, "encoder.")
        if "patch_embed.proj.weight" not in encoder_state:
            raise UserError(f"holds no student; its first keys: {', '.join(list(state)[:3])}; "
                            "a teacher's file is given with its name, --weights NAME=FILE")
        encoder = vit_from_state(encoder_state)
        if encoder_only:
            return load_strict(encoder, encoder_state).eval()
        model = dune_from_state(encoder, state, content)
        return load_strict(model, state).eval()


def our_state_dict(content):
    """The state dict of a checkpoint of ours, of DUNE's or of UNIC's, under our keys."""
    tensors = dict(content.get("model", content))
    # UNIC keeps its running averages separately.
    for teacher, token_stats in content.get("teacher_ft_stats", {}).items():
        for token_type, stats in token_stats.items():
            for name, value in stats.items():
                tensors[f"teacher_norms.{teacher}.normalizers.{token_type}.{name}"] = value.flatten()
    state = {}
    for key, value in tensors.items():
        for pattern, replacement in KEY_PATTERNS.items():
            key = re.sub(pattern, replacement, key)
        parts = key.split(".")
        if parts[0] in ("projectors", "teacher_norms"):
            parts[1] = TEACHER_ALIASES.get(parts[1], parts[1])
        state[".".join(parts)] = value
    return normalize_keys(state)


def dune_from_state(encoder, state, content):
    """A DUNE without weights (on "meta") with the teachers and projectors of a checkpoint."""
    teachers = {}
    for key, value in state.items():
        match = re.fullmatch(r"teacher_norms\.([^.]+)\.normalizers\.patch\.mean", key)
        if match:
            teachers[match[1]] = len(value), key.replace(".patch.", ".cls.") in state
    is_unic = "teacher_ft_stats" in content
    recipe = content.get("args")
    if not isinstance(recipe, dict):  # published files hold a Namespace with other options
        recipe = {}
    projector = recipe.get("projector", "lp" if is_unic else "tp")
    norm = recipe.get("norm", "unic" if is_unic else "dune")
    if projector not in PROJECTORS:
        raise UserError(f"trained with --projector {projector}, which is not in PROJECTORS")
    widths = {}
    for name, key in PROJECTORS[projector].width_keys.items():
        first_teacher = next(iter(teachers))
        widths[name] = len(state[f"projectors.{first_teacher}.{key.format(last=len(encoder.blocks) - 1)}"])
    with torch.device("meta"):
        model = DUNE(encoder, teachers, projector, norm, **widths)
    model.recipe = recipe
    model.teacher_weights = content.get("weights", {})
    return model


def vit_from_state(state, **options):
    """A ViT without weights (on "meta"), its sizes inferred from a state dict in DINOv2's layout."""
    embed_dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if embed_dim % 64:
        raise UserError(f"not a supported ViT: {embed_dim} channels, not divisible by the head dimension 64")
    class_token = "cls_token" in state
    num_patches = state["pos_embed"].shape[1] - class_token if "pos_embed" in state else 1
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    layer_scale = 1e-4 if "blocks.0.ls1.gamma" in state else None
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    gelu = "swiglu" if gated else "none"
    options = {"class_token": class_token, "layer_scale": layer_scale, "gelu": gelu, **options}
    with torch.device("meta"):
        image_size = math.isqrt(num_patches) * patch_size
        return ViT(image_size, patch_size, embed_dim, depth, embed_dim // 64, registers, **options)


def normalize_keys(state):
    """Published encoder keys under ViT's names: blocks.0.{i}. is blocks.{i}.; the mask token is left out."""
    normalized = {}
    for key, value in state.items():
        if not key.endswith("mask_token"):
            normalized[re.sub(r"\bblocks\.\d+\.(?=\d+\.)", "blocks.", key)] = value
    return normalized


def strip_prefix(state, prefix):
    """The entries of a state dict whose keys start with `prefix`, without it."""
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}


def load_strict(module, state):
    """Load `state` as fp32, also into a module on "meta". Keys and shapes must match, values be finite."""
    weights = {key: value.float() for key, value in state.items()}
    module.load_state_dict(weights, assign=True)
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{key} contains non-finite values")
    return module


def load_checkpoint(path):
    """The content of a checkpoint or a .safetensors file, tensors on the CPU. UserError if it is none.

    path may be a folder that holds model.safetensors, as Hugging Face's. No code in the file is executed:
    weights_only=True, and argparse.Namespace as the only class besides tensors.
    """
    path = str(path)
    if os.path.isdir(path):
        path = os.path.join(path, "model.safetensors")
    if not os.path.isfile(path):
        if os.path.exists(f"{path}.index.json"):
            raise UserError(f"{path} is split into several files: save it as one, by max_shard_size")
        raise UserError(f"no such file: {path}")
    with user_errors(path):
        if path.endswith(".safetensors"):
            return load_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"the file is damaged: wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def load_safetensors(path):
    """{name: tensor} of a .safetensors file: length of the header (8 bytes), header (JSON), data."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    with open(path, "rb") as file:
        content = bytearray(file.read())
    start = 8 + int.from_bytes(content[:8], "little")
    cut_short = UserError("the file is cut short: get it again")
    if start > len(content):
        raise cut_short
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > len(content):
            raise cut_short
        values = torch.frombuffer(content[start + begin:start + end], dtype=dtypes[entry["dtype"]])
        tensors[name] = values.view(entry["shape"])
    return tensors


@contextlib.contextmanager
def user_errors(path):
    """Turn whatever goes wrong while loading an external file into a UserError with its path."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        message = f"missing key {error}" if isinstance(error, KeyError) else str(error).strip()
        message = re.sub(r"^Error\(s\) in loading state_dict for \w+:\s*", "", message)
        message = message.partition("\n")[0][:300] or type(error).__name__
        if "weights_only" in message:  # torch's advice is to switch it off
            message = "not a torch checkpoint, or one that holds code"
        if not message.startswith(str(path)):
            message = f"{path}: {message}"
        raise UserError(message) from error


def download(url):
    """The path of a published file in torch's hub cache, downloaded if it is not there yet."""
    path = cached_path(url)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"failed to download {url} ({error}); download it manually to {path}") from None
    return path


def cached_path(url):
    """Where download() keeps a file. Hugging Face's often share a name, so the repository is prepended."""
    parts = url.split("/")
    name = parts[-1]
    if parts[2] == "huggingface.co":
        name = f"{parts[4]}-{name}"
    return os.path.join(torch.hub.get_dir(), "checkpoints", name)
