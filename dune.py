"""DUNE: distil several frozen vision teachers that have nothing in common into one ViT encoder.

This file is the method (DUNE, CVPR 2025, arXiv 2503.14405; UNIC, ECCV 2024, arXiv 2408.05088): the ViT that student and teachers
share, the projectors, the standardisation of the teachers' features, teacher dropping, the loss, and reading of checkpoints.

    student = dune.load("dune_vitbase14_448_paper")           # or a path: our checkpoints and the published ones
    tokens = student.encoder(images)                          # {"cls": [B, D], "patch": [B, N, D]}
    dinov2 = student(images)["dinov2"]["patch"]               # what DINOv2 would have said, standardised
"""

import argparse
import math
import os
import re
import sys
import urllib.error

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import kernels


class Oops(ValueError):
    """A mistake that a person can mend: one line that says what is wrong and what to do about it."""


# Several processes that are started together all make the same mistake: the first one tells it. train.py ends this where they part.
quiet = os.environ.get("RANK", "0") != "0"


def run(main):
    """Run a script's main(): a mistake is told in one line on stderr with exit code 2, Ctrl-C exits with 130."""
    try:
        main()
    except Oops as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def fail(message):
    """For argparse's parser.error: its complaints are told as all others are."""
    raise Oops(message)


def fast_bf16(device):
    """Whether the device multiplies bf16 in hardware: GPUs do, CPUs only with AVX512-BF16 or AMX (others would be slower than in fp32)."""
    return torch.device(device).type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ---------------------------------------------------------------------------------------------------------------- the ViT

def rope_table(rows, cols, prefix, dim, device):
    """(cos, sin), each [prefix + rows*cols, dim], of MASt3R's RoPE: half of the channels turn with the row, half with the column.

    The prefix tokens (class and registers) have no place in the image: they turn by zero.
    """
    frequency = 100.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    y, x = (torch.arange(n, device=device)[:, None] * frequency for n in (rows, cols))
    y, x = y[:, None].expand(rows, cols, -1), x[None].expand(rows, cols, -1)
    angle = F.pad(torch.cat([y, y, x, x], -1).flatten(0, 1), (0, 0, prefix, 0))
    return angle.cos(), angle.sin()


def rotate(x, table):
    """Turn q or k, [B, heads, N, d], by rope_table's angles, in fp32; channel j of each half pairs with channel j + d/4."""
    cos, sin = table
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return (x * cos + torch.stack([-b, a], -2).flatten(-3) * sin).to(x.dtype)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of [B, heads, N, d]."""
    if q.device.type != "cpu" or not q.requires_grad or k.shape[-2] > 512:
        return F.scaled_dot_product_attention(q, k, v)
    # Training on CPUs: the fused one takes eight times as long in bf16 (69 tokens, forward and backward), but for many tokens less memory.
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, out=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. `drop_path`: in training, each image skips each half of the block with this probability."""

    def __init__(self, dim, heads, layer_scale=None, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))

    def skip(self, x):
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep) / keep

    def forward(self, x, rope=None):
        x = x + self.skip(self.ls1(self.attn(self.norm1(x), rope)))
        return x + self.skip(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """The one Vision Transformer of this project: the student and every teacher.

    image_size, patch_size   pixels; the learned position embedding covers (image_size // patch_size)^2 patches
    registers, class_token   how many register tokens; whether there is a class token
    position    "offset": learned, resized as DINOv2 without registers (and the DUNE student) does; "antialias": learned, resized
                as DINOv2 with registers does; "rope": none is learned, MASt3R's rotary embedding acts on q and k
    layer_scale initial value of LayerScale, or None for none;   drop_path  stochastic depth of the last block (linear from 0)
    pooled      the class feature is norm(mean of the patch tokens) and the patch tokens stay without norm (dBOT fine-tuned)
    """

    def __init__(self, image_size=336, patch_size=14, embed_dim=768, depth=12, num_heads=12, registers=4, *, class_token=True,
                 position="offset", layer_scale=1e-4, drop_path=0.0, pooled=False):
        super().__init__()
        self.patch_size, self.embed_dim, self.registers, self.position, self.pooled = patch_size, embed_dim, registers, position, pooled
        self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = None if position == "rope" else nn.Parameter(torch.zeros(1, class_token + self.grid**2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layer_scale, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.checkpoint_blocks = False  # recompute each block in the backward pass: slower, far less memory
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def positions(self, rows, cols):
        """The learned position embedding [1, rows*cols, D] for this grid; at exactly the trained size it is used as it is."""
        grid = self.pos_embed[:, -self.grid**2:]
        if (rows, cols) == (self.grid, self.grid):
            return grid
        grid = grid.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if self.position == "antialias":
            grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", antialias=True)
        else:  # the 0.1 is DINOv2's own, kept because its weights were used with it ever since
            grid = F.interpolate(grid, scale_factor=((rows + 0.1) / self.grid, (cols + 0.1) / self.grid), mode="bicubic")
        return grid.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)

    def tokens(self, images, every_block=False):
        """Class and patch tokens before the last norm, [B, 1 + N, D] (no class token: [B, N, D]): what the projectors read.

        images [B, 3, H, W], ImageNet-normalised. every_block: a list with the output of each block instead of the last alone.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise Oops(f"image size {height}x{width} is no multiple of the patch size {self.patch_size}")
        rows, cols = height // self.patch_size, width // self.patch_size
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + self.positions(rows, cols)
        # Registers first, then class and patches: attention does not see the order, and what the projectors read is a plain slice.
        front = [] if self.register_tokens is None else [self.register_tokens]
        if self.cls_token is not None:
            front.append(self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1])
        x = torch.cat([t.expand(len(x), -1, -1).to(x.dtype) for t in front] + [x], 1)
        head_dim = self.embed_dim // self.blocks[0].attn.heads
        rope = rope_table(rows, cols, x.shape[1] - rows * cols, head_dim, x.device) if self.position == "rope" else None
        outputs = []
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
            if every_block:
                outputs.append(x[:, self.registers:])
        return outputs if every_block else x[:, self.registers:]

    def forward(self, images, norm=True):
        """images [B, 3, H, W] -> {"cls": [B, D] or None, "patch": [B, N, D]}; norm=False leaves out the last LayerNorm."""
        x = self.tokens(images)
        if self.pooled:
            patch = x if self.cls_token is None else x[:, 1:]
            pooled = patch.mean(1)
            return {"cls": self.norm(pooled) if norm else pooled, "patch": patch}
        return split_tokens(self.norm(x) if norm else x, self.cls_token is not None)


SIZES = {  # the field's ViT sizes; tiny is this project's own, for the laptop
    "tiny": dict(embed_dim=128, depth=3, num_heads=2),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


def split_tokens(x, has_cls):
    """[B, (1+)N, D] -> {"cls": [B, D] or None, "patch": [B, N, D]}, as views."""
    return {"cls": x[:, 0], "patch": x[:, 1:]} if has_cls else {"cls": None, "patch": x}


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- projectors
# Each maps the student's tokens (before its last norm) to one teacher's dimension: [B, 1 + N, D] -> [B, 1 + N, T].

class TransformerProjector(nn.Module):
    """TP, DUNE's own (paper section 3.2): one ViT block at the student's width, then Linear; class and patch tokens together."""
    reads_every_block = False

    def __init__(self, encoder, out, has_cls=True):
        super().__init__()
        self.blocks = nn.ModuleList([Block(encoder.embed_dim, encoder.blocks[0].attn.heads, layer_scale=1e-4)])
        self.linear = nn.Linear(encoder.embed_dim, out)
        self.apply(init_linear)

    def forward(self, tokens):
        return self.linear(self.blocks[0](tokens))


class SimpleProjector(nn.Module):
    """SP, the ablation: an MLP on each token, own weights for class and patch tokens (only those that the teacher has)."""
    reads_every_block = False

    def __init__(self, encoder, out, has_cls=True):
        super().__init__()
        dim = encoder.embed_dim
        self.mlps = nn.ModuleDict({kind: Mlp(dim, dim, out) for kind in (("cls", "patch") if has_cls else ("patch",))})
        self.apply(init_linear)

    def forward(self, tokens):
        # Without a class teacher the class column still goes through, so that every projector returns the same shape.
        cls = self.mlps["cls" if "cls" in self.mlps else "patch"]
        return torch.cat([cls(tokens[:, :1]), self.mlps["patch"](tokens[:, 1:])], 1)


class LadderProjector(nn.Module):
    """LP, UNIC's: a small MLP on the output of every encoder block, summed, own weights for class and patch tokens."""
    reads_every_block = True

    def __init__(self, encoder, out, has_cls=True, hidden=768, last_hidden=3072):
        super().__init__()
        sizes = [hidden] * (len(encoder.blocks) - 1) + [last_hidden]
        self.rungs = nn.ModuleDict({kind: nn.ModuleList(Mlp(encoder.embed_dim, size, out) for size in sizes)
                                    for kind in (("cls", "patch") if has_cls else ("patch",))})
        self.apply(init_linear)

    def forward(self, tokens):
        cls = self.rungs["cls" if "cls" in self.rungs else "patch"]
        return torch.cat([sum(mlp(x[:, :1]) for mlp, x in zip(cls, tokens)),
                          sum(mlp(x[:, 1:]) for mlp, x in zip(self.rungs["patch"], tokens))], 1)


PROJECTORS = {"tp": TransformerProjector, "sp": SimpleProjector, "lp": LadderProjector}


# -------------------------------------------------------------------------------------------------- teacher standardisation

class Stats(nn.Module):
    """The running mean and std of one token type of one teacher, [dim] fp32 each."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))


class TeacherNorm(nn.Module):
    """Standardisation of one teacher's features per channel, class and patch tokens apart (DUNE section 3.3).

    style "dune": in training by this batch's mean and std, at evaluation by the running average: (x - mean) / max(std, 1e-3);
    style "unic": always by the running average so far, before this batch joins it: (x - mean) / (std + 1e-6).
    """

    def __init__(self, dim, has_cls, style="dune"):
        super().__init__()
        self.style = style
        self.normalizers = nn.ModuleDict({kind: Stats(dim) for kind in (("cls", "patch") if has_cls else ("patch",))})

    def statistics(self, kind, batch=None):
        """(mean, divisor) to standardise `kind` ("cls" or "patch") by; batch = this batch's (mean, std), if there is one."""
        stats = self.normalizers[kind]
        if self.style == "unic":
            return stats.mean.clone(), stats.std + 1e-6
        mean, std = (stats.mean, stats.std) if batch is None else batch
        return mean, std.clamp(min=1e-3)

    def forward(self, features):
        """Standardised features by the running average, fp32: {"cls": [B, D] or None, "patch": [B, N, D]} -> the same."""
        scale = {kind: self.statistics(kind) for kind in self.normalizers}
        return {kind: None if x is None or kind not in scale else (x.float() - scale[kind][0]) / scale[kind][1] for kind, x in features.items()}


def update_norms(norms, features, momentum):
    """One training step of standardisation for all teachers: {teacher: {kind: (mean, divisor)}} to standardise this batch by.

    norms {teacher: TeacherNorm}; features {teacher: {"cls": [b, D] or None, "patch": [b, N, D]}}, this process's part of the
    batch, raw. The batch statistics are those of the tokens of all processes, from one message of 2 D + 1 numbers per teacher and
    token type (count, mean, m2: Chan et al. 1979 merge them exactly). The running averages move by `momentum`
    (stat <- (1 - m) stat + m batch_stat); at momentum 0 nothing is computed and the running averages are used.
    """
    kinds = [(t, k) for t in norms for k in norms[t].normalizers]
    if momentum == 0:
        return {t: {k: norms[t].statistics(k) for k in norms[t].normalizers} for t in norms}
    message = []
    for t, k in kinds:
        x = features[t][k]
        moments = kernels.channel_moments(x) if len(x) else (x.new_zeros(x.shape[-1], dtype=torch.float32),) * 2
        message += [torch.full((1,), x[..., 0].numel(), device=x.device, dtype=torch.float32), *moments]
    message = torch.cat(message)[None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = message.new_empty(dist.get_world_size(), message.shape[1])
        dist.all_gather_into_tensor(gathered, message)
        message = gathered
    statistics, start = {t: {} for t in norms}, 0
    for t, k in kinds:
        stats = norms[t].normalizers[k]
        dim = len(stats.mean)
        part = message[:, start:start + 2 * dim + 1]
        start += 2 * dim + 1
        count, mean, m2 = kernels.merge_moments(part[:, 0], part[:, 1:dim + 1], part[:, dim + 1:])
        std = (m2 / (count - 1).clamp(min=1)).sqrt()
        statistics[t][k] = norms[t].statistics(k, (mean, std))  # before the update: UNIC standardises by the average so far
        known = (count > 1) & mean.isfinite().all() & std.isfinite().all()  # one bad batch must not spoil the average for good
        for running, new in ((stats.mean, mean), (stats.std, std)):
            running.lerp_(torch.where(known, new, running), momentum)
    return statistics


# --------------------------------------------------------------------------------------------------- loss, teacher dropping

def image_losses(student, teacher, statistics):
    """The distillation loss of one teacher for every image: [b], and its parts {"cls_cos", "cls_sl1", "patch_cos", "patch_sl1"}.

    student, teacher: {"cls": [b, D] or None, "patch": [b, N, D]}, the teacher's raw; statistics {kind: (mean, divisor)}.
    Token loss (UNIC eq. 2): half cosine loss, half smooth L1. Patch tokens are averaged; with a class token, so are the two kinds.
    """
    parts, losses = {}, []
    for kind, (mean, divisor) in statistics.items():
        cos, sl1 = kernels.distill_loss(student[kind], teacher[kind], mean, divisor, eps=0.0)
        parts[f"{kind}_cos"], parts[f"{kind}_sl1"] = (x.mean(1) if kind == "patch" else x for x in (cos, sl1))
        losses.append(0.5 * parts[f"{kind}_cos"] + 0.5 * parts[f"{kind}_sl1"])
    return sum(losses) / len(losses), parts


def teacher_coefficients(losses, allowed, drop, uniform):
    """Which teachers count for which images, [B, T] of 0 and 1 (teacher dropping, UNIC section 3.3).

    losses [B, T] (no gradient flows back through the choice), allowed [B, T] bool: data sharing. Of the teachers allowed for an image
    the one with the largest loss always counts; each other one is dropped with probability `drop`: where uniform [B, T] < drop.
    """
    worst = losses.detach().masked_fill(~allowed, -math.inf).argmax(1, keepdim=True)
    keep = (uniform >= drop).scatter(1, worst, True)
    return (keep & allowed).to(losses.dtype)


def weighted_sum(losses, coefficients):
    """(sum(c * l), sum(c)): their ratio over the whole batch, all processes and parts together, is the loss (UNIC eq. 3).

    where() and not a product: a teacher that does not count for an image must not matter, not even as NaN.
    """
    return torch.where(coefficients > 0, coefficients * losses, 0).sum(), coefficients.sum()


# ------------------------------------------------------------------------------------------------------------- the student

# The published files' names for the teachers, and ours.
ALIASES = {"dino2reg_vitlarge_14": "dinov2", "mast3r_vitlarge_16": "mast3r", "multihmr_vitlarge_14_672": "multihmr",
           "dino_vitbase_16": "dino", "deit3_vitbase_16": "deit3", "ibot_vitbase_16": "ibot", "dbotft_vitbase_16": "dbotft"}


class ByTeacher(nn.ModuleDict):
    """A ModuleDict by teacher name that also answers to the published files' names."""

    def __getitem__(self, name):
        return super().__getitem__(ALIASES.get(name, name))


class DUNE(nn.Module):
    """The student: encoder, one projector and one TeacherNorm per teacher.

    teachers {name: (dimension, has a class token)}; projector "tp", "sp" or "lp"; norm "dune" or "unic" (see TeacherNorm).
    """

    def __init__(self, encoder, teachers, projector="tp", norm="dune", **projector_options):
        super().__init__()
        self.encoder = encoder
        self.projectors = ByTeacher({t: PROJECTORS[projector](encoder, dim, cls, **projector_options) for t, (dim, cls) in teachers.items()})
        self.teacher_norms = ByTeacher({t: TeacherNorm(dim, cls, norm) for t, (dim, cls) in teachers.items()})
        # The projectors read the tokens before the last norm, so it never gets a gradient: DDP must not wait for one.
        encoder.norm.requires_grad_(False)

    def forward(self, images, rows=None):
        """images [B, 3, H, W] -> {teacher: {"cls": [B, T] or None, "patch": [B, N, T]}}, in the teachers' standardised features.

        rows {teacher: index tensor or None}: project only these images for this teacher (None: all of them).
        """
        ladder = any(p.reads_every_block for p in self.projectors.values())
        tokens = self.encoder.tokens(images, every_block=ladder)
        out = {}
        for t, projector in self.projectors.items():
            index = rows and rows[t]
            pick = (lambda x: x) if index is None else (lambda x: x[index])
            x = projector([pick(x) for x in tokens] if ladder else pick(tokens))
            out[t] = {**split_tokens(x, True)}
            if "cls" not in self.teacher_norms[t].normalizers:
                out[t]["cls"] = None
        return out


# ------------------------------------------------------------------------------------------------------------- checkpoints

def fetch(url):
    """The path of a published file in torch's hub cache, downloaded (with a bar, written beside and renamed) if it is not there."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
        except (OSError, urllib.error.URLError, RuntimeError) as error:
            raise Oops(f"cannot download {url} ({error}); get it by hand and put it at {path}") from None
    return path


def read_checkpoint(path):
    """A checkpoint file on the CPU. Only tensors, plain containers and argparse.Namespace are read: no code of the file is run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Oops(f"no such file: {path}") from None
    except IsADirectoryError:
        raise Oops(f"{path} is a folder, not a checkpoint file") from None
    except Exception as error:  # torch.load's errors for foreign files are of many types, and long
        found = re.search(r"(?i)unsupported (?:global|class):? (?:global )?([a-z_][\w.]*)", str(error))
        why = f"it wants to run {found[1]}, which is not allowed" if found else "it is damaged, or not one"
        raise Oops(f"cannot read {path} as a checkpoint: {why}") from None


def load_strictly(module, state, path):
    """Load `state` into `module`; a missing, extra or mis-shaped tensor is an Oops that names it."""
    want = module.state_dict()
    for problem, names in (("lacks", want.keys() - state.keys()), ("has the unknown", state.keys() - want.keys()),
                           ("has the wrong shape for", {k for k in want.keys() & state.keys() if want[k].shape != state[k].shape})):
        if names:
            name, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            shapes = f" ({list(state[name].shape)}, expected {list(want[name].shape)})" if "shape" in problem else ""
            raise Oops(f"{path}: the file {problem} tensor {name}{shapes}{more}; is it the right file for this model?")
    module.load_state_dict(state)
    return module


def vit_from_state(state, path, **options):
    """A ViT (weights not yet loaded) with the sizes that the tensors of `state`, in DINOv2's layout, show; head dimension 64."""
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        cls = "cls_token" in state
        grid = math.isqrt(state["pos_embed"].shape[1] - cls) if "pos_embed" in state else 1
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    except (KeyError, ValueError, AttributeError):
        raise Oops(f"{path} holds no ViT: patch_embed.proj.weight or the blocks are missing") from None
    scale = 1e-4 if "blocks.0.ls1.gamma" in state else None
    return ViT(grid * patch, patch, dim, depth, max(1, dim // 64), registers, class_token=cls, layer_scale=scale, **options)


def plain_keys(state):
    """Published encoder keys in ViT's own names: blocks.0.{i}.… is blocks.{i}.…, and the unused mask token goes."""
    nested = any(re.match(r"blocks\.\d+\.\d+\.", k) for k in state)
    return {re.sub(r"^blocks\.\d+\.", "blocks.", k) if nested else k: v for k, v in state.items() if k != "mask_token"}


PUBLISHED = "https://download.europe.naverlabs.com/dune/{}.pth"
PUBLISHED_NAMES = [f"dune_{n}" for n in ("vitbase14_336", "vitbase14_448", "vitbase14_448_paper", "vitsmall14_336", "vitsmall14_448")]


def load(path_or_name, encoder_only=False):
    """A trained student: DUNE (or, with encoder_only, its ViT) in eval mode on the CPU, every size read off the tensors.

    Takes our checkpoints, the published DUNE and UNIC files, and published names (PUBLISHED_NAMES), which are downloaded.
    Raises Oops if the file cannot be read or holds anything else than such a model.
    """
    path = str(path_or_name)
    if path in PUBLISHED_NAMES and not os.path.exists(path):
        path = fetch(PUBLISHED.format(path))
    return model_from(read_checkpoint(path), path, encoder_only)


def model_from(file, path, encoder_only=False):
    """load() for a checkpoint that has been read: {"model": state, …}, of ours, DUNE's or UNIC's."""
    if not isinstance(file, dict) or not isinstance(file.get("model"), dict):
        raise Oops(f"{path} is no DUNE checkpoint: it has no 'model'")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", k): v for k, v in file["model"].items()}
    encoder_state = plain_keys({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})
    if not encoder_state:
        raise Oops(f"{path} is no DUNE checkpoint: it holds no 'encoder.…' tensors")
    encoder = load_strictly(vit_from_state(encoder_state, path), encoder_state, path)
    if encoder_only:
        return encoder.eval()

    rest = {}  # everything beside the encoder, in our names
    for key, value in state.items():
        key = re.sub(r"^lp\.heads\.(\w+)\.(cls|patch)\.(\d+)\.layers\.(0|2)\.",
                     lambda m: f"projectors.{m[1]}.rungs.{m[2]}.{m[3]}.fc{1 if m[4] == '0' else 2}.", key)
        if not key.startswith("encoder."):
            parts = key.split(".")
            rest[".".join([parts[0], ALIASES.get(parts[1], parts[1]), *parts[2:]])] = value
    for teacher, kinds in file.get("teacher_ft_stats", {}).items():
        for kind, stats in kinds.items():
            for name in ("mean", "std"):
                rest[f"teacher_norms.{ALIASES.get(teacher, teacher)}.normalizers.{kind}.{name}"] = stats[name].flatten().float()
    teachers = {}
    for key, value in rest.items():
        if key.endswith("normalizers.patch.mean"):
            teacher = key.split(".")[1]
            teachers[teacher] = (len(value), key.replace(".patch.", ".cls.") in rest)
    rungs = [v for k, v in rest.items() if re.search(r"rungs\.patch\.\d+\.fc1\.bias", k)]
    depth = len(encoder.blocks)
    options = {"hidden": len(rungs[0]), "last_hidden": len(rungs[depth - 1])} if rungs else {}
    kind = "lp" if rungs else "sp" if any(".mlps." in k for k in rest) else "tp"
    unic = "teacher_ft_stats" in file or (isinstance(file.get("args"), dict) and file["args"].get("norm") == "unic")
    model = DUNE(encoder, teachers, kind, "unic" if unic else "dune", **options)
    return load_strictly(model, {**{f"encoder.{k}": v for k, v in encoder_state.items()}, **rest}, path).eval()
