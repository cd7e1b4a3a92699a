"""DUNE: distil several frozen vision teachers that have nothing in common into one ViT encoder.

This file is the method (DUNE, CVPR 2025, arXiv 2503.14405; UNIC, ECCV 2024, arXiv 2408.05088), in the order in which an
image meets it: the ViT that student and teachers share, the projectors, standardisation of the teachers' features, loss
and teacher dropping, the student as a whole. Then checkpoints, and the places through which all else passes: files from
outside, our own files, options, the way out.

    student = dune.load("dune_vitbase14_448_paper")           # or a path: our checkpoints and the published ones
    tokens = student.encoder(images)                          # {"cls": [B, D], "patch": [B, N, D]}
    dinov2 = student(images)["dinov2"]["patch"]               # what DINOv2 would have said, standardised
"""

import argparse
import contextlib
import json
import math
import os
import re
import stat
import sys
import warnings
import zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels

# ---- The ViT ---------------------------------------------------------------------------------------------------------

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
    """gelu: "none" for the exact one, "tanh" for its approximation."""

    def __init__(self, dim, hidden, out=None, gelu="none"):
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))

class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x):
        return x * self.gamma

class Block(nn.Module):
    """Pre-norm transformer block. `drop_path`: in training, each image skips each half of it with this probability."""

    def __init__(self, dim, heads, layer_scale=None, drop_path=0.0, eps=1e-6, gelu="none"):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, gelu=gelu)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x, rope=None):
        x = x + self.skip(self.ls1(self.attn(self.norm1(x), rope)))
        return x + self.skip(self.ls2(self.mlp(self.norm2(x))))

    def skip(self, x):
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep) / keep

class ViT(nn.Module):
    """The one Vision Transformer of this project: the student and every teacher.

    image_size, patch_size   pixels; the learned position embedding covers (image_size // patch_size)^2 patches
    registers, class_token   how many register tokens; whether there is a class token
    position    a learned embedding, or none but a rotary one on q and k of every block: "rope" MASt3R's, "rope_centred"
                DINOv3's with its periods in the file. How a learned one is resized to other grids: "offset" DUNE's and
                that of DINOv2 without registers, "antialias" of DINOv2 with them, "size" SigLIP's
    layer_scale initial value of LayerScale, or None for none
    drop_path   stochastic depth of the last block, rising linearly from 0 at the first
    eps, gelu   of the LayerNorms and MLPs, see Mlp
    """

    def __init__(self, image_size=336, patch_size=14, embed_dim=768, depth=12, num_heads=12, registers=4, *,
                 class_token=True, position="offset", layer_scale=1e-4, drop_path=0.0, eps=1e-6,
                 gelu="none"):
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
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
        centred = position == "rope_centred"
        self.register_buffer("rope_periods", 100 ** (torch.arange(quarter) / quarter) if centred else None)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layer_scale, rate, eps, gelu) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def forward(self, images, norm=True):
        """images [B, 3, H, W] -> {"cls": [B, D] or None, "patch": [B, N, D]}; norm=False: without the last norm."""
        x = self.tokens(images)
        return split_tokens(self.norm(x) if norm else x, self.cls_token is not None)

    def tokens(self, images, every_block=False):
        """Class and patch tokens before the last norm, [B, 1 + N, D] (no class token: [B, N, D]): what projectors read.

        images [B, 3, H, W], ImageNet-normalised. every_block: a list with each block's output, not the last alone.
        """
        rows, cols = token_grid(images, self.patch_size)
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = x.to(self.norm.weight.dtype)  # under autocast, too, what goes from block to block is fp32
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.pos_embed is not None:
            x = x + self.positions(rows, cols)
        # Registers first, then class and patches: attention does not see the order, and projectors read a plain slice.
        if self.register_tokens is not None:
            x = torch.cat([self.register_tokens.expand(len(x), -1, -1), x], 1)
        rope = None
        if self.pos_embed is None:
            head_dim = self.embed_dim // self.blocks[0].attn.heads
            rope = rope_table(rows, cols, x.shape[1] - rows * cols, head_dim, x.device, self.rope_periods)
        outputs = []
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
            if every_block:
                outputs.append(x[:, self.registers:])
        return outputs if every_block else x[:, self.registers:]

    def positions(self, rows, cols, how=None):
        """The learned position embedding [1, (1 +) rows*cols, D] for this grid; at the trained size as it is."""
        how = how or self.position
        if (rows, cols) == (self.grid, self.grid):
            return self.pos_embed
        cls, grid = self.pos_embed.tensor_split([-self.grid**2], 1)
        if how == "offset":  # the 0.1 is DINOv2's own, kept because its weights are used with it
            to = {"scale_factor": ((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)}
        else:
            to = {"size": (rows, cols), "antialias": how == "antialias"}
        grid = grid.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, mode="bicubic", **to).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([cls, grid.to(cls.dtype)], 1)

SIZES = {  # the field's ViT sizes; tiny is this project's own, for the laptop
    "tiny": dict(embed_dim=128, depth=3, num_heads=2),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}

def token_grid(images, patch):
    """(rows, cols) of the tokens of images [..., H, W]. Oops if a side is no multiple of the patch size."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise Oops(f"image size {height}x{width} is no multiple of the patch size {patch}")
    return height // patch, width // patch

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of [B, heads, N, d]."""
    if q.device.type != "cpu" or not q.requires_grad or k.shape[-2] > 512:
        return F.scaled_dot_product_attention(q, k, v)
    # Training on CPUs: torch's fused one takes eight times as long in bf16 (69 tokens); for many, it saves memory.
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v

def rope_table(rows, cols, prefix, dim, device, periods=None):
    """(cos, sin), each [prefix + rows*cols, dim], of a rotary embedding: half of the channels turn with the row, half
    with the column. The prefix tokens (class and registers) have no place in the image: they turn by zero.

    periods None: MASt3R's, places count from 0; [dim / 4]: DINOv3's, places from -1 to 1.
    """
    places = [torch.arange(n, device=device) for n in (rows, cols)]
    if periods is None:
        frequency = 100.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    else:
        frequency = 2 * math.pi / periods.float()
        places = [(2 * place + 1) / len(place) - 1 for place in places]
    y, x = torch.meshgrid(*places, indexing="ij")
    angle = torch.stack([y, y, x, x], -1)[..., None] * frequency  # [rows, cols, 4, dim / 4]
    angle = F.pad(angle.flatten(2).flatten(0, 1), (0, 0, prefix, 0))
    return angle.cos(), angle.sin()

def rotate(x, table):
    """Turn q or k, [B, heads, N, d], by rope_table's angles, in fp32; in each half channel j pairs with j + d/4."""
    cos, sin = table
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return (x * cos + torch.stack([-b, a], -2).flatten(-3) * sin).to(x.dtype)

def split_tokens(x, has_cls):
    """[B, (1+)N, D] -> {"cls": [B, D] or None, "patch": [B, N, D]}, as views."""
    return {"cls": x[:, 0], "patch": x[:, 1:]} if has_cls else {"cls": None, "patch": x}

def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

# ---- Projectors ------------------------------------------------------------------------------------------------------
# Each maps the student's tokens (before its last norm) to one teacher's dimension: [B, 1 + N, D] -> [B, 1 + N, T].
# A new one is a class and its entry in PROJECTORS. All teachers of a student have projectors of one kind.

class Projector(nn.Module):
    """What a projector is beside its constructor(encoder, out, has_cls) and its forward(tokens)."""
    reads_every_block = False  # else `tokens` is a list: the output of each block of the encoder
    sizes = {}                 # to load a file: the constructor's other options, and the tensor as long as each says

class TransformerProjector(Projector):
    """TP, DUNE's own (paper section 3.2): one ViT block at the student's width, then Linear; all tokens together.

    It starts from torch's own initialisation of Linear, as published, unlike the encoder.
    """

    def __init__(self, encoder, out, has_cls=True):
        super().__init__()
        self.blocks = nn.ModuleList([Block(encoder.embed_dim, encoder.blocks[0].attn.heads, layer_scale=1e-4)])
        self.linear = nn.Linear(encoder.embed_dim, out)

    def forward(self, tokens):
        return self.linear(self.blocks[0](tokens))

class SimpleProjector(Projector):
    """SP, the ablation: an MLP on each token, own weights for class and patch tokens (those that the teacher has)."""

    def __init__(self, encoder, out, has_cls=True):
        super().__init__()
        dim = encoder.embed_dim
        self.mlps = nn.ModuleDict({kind: Mlp(dim, dim, out) for kind in token_kinds(has_cls)})
        self.apply(init_linear)

    def forward(self, tokens):
        return apart(list(self.mlps.values()), tokens)

class LadderProjector(Projector):
    """LP, UNIC's: a small MLP on the output of every encoder block, summed, own weights for class and patch tokens."""
    reads_every_block = True
    sizes = {"hidden": "rungs.patch.0.fc1.bias", "last_hidden": "rungs.patch.{last}.fc1.bias"}

    def __init__(self, encoder, out, has_cls=True, hidden=768, last_hidden=3072):
        super().__init__()
        widths = [hidden] * (len(encoder.blocks) - 1) + [last_hidden]
        self.rungs = nn.ModuleDict()
        for kind in token_kinds(has_cls):
            self.rungs[kind] = nn.ModuleList(Mlp(encoder.embed_dim, width, out) for width in widths)
        self.apply(init_linear)

    def forward(self, tokens):
        return sum(apart(mlps, x) for x, *mlps in zip(tokens, *self.rungs.values()))

PROJECTORS = {"tp": TransformerProjector, "sp": SimpleProjector, "lp": LadderProjector}

def token_kinds(has_cls):
    return ("cls", "patch") if has_cls else ("patch",)

def apart(mlps, tokens):
    """The class token through the first MLP, the patches through the last. For a teacher without a class token there is
    one: the class column still goes through it, so that every projector returns the same shape."""
    return torch.cat([mlps[0](tokens[:, :1]), mlps[-1](tokens[:, 1:])], 1)

# ---- Standardisation of the teachers' features -----------------------------------------------------------------------

class Stats(nn.Module):
    """The running mean and std of one token type of one teacher, [dim] fp32 each."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

class TeacherNorm(nn.Module):
    """Standardisation of one teacher's features per channel, class and patch tokens apart (DUNE section 3.3).

    style "dune": in training by this batch's mean and std, at evaluation by their running averages:
                  (x - mean) / max(std, 1e-3);
    style "unic": always by the running averages so far, before this batch joins them: (x - mean) / (std + 1e-6).
    """

    def __init__(self, dim, has_cls, style="dune"):
        super().__init__()
        self.style = style
        self.normalizers = nn.ModuleDict({kind: Stats(dim) for kind in token_kinds(has_cls)})

    def statistics(self, kind, batch=None):
        """(mean, divisor) to standardise `kind` ("cls", "patch") by; batch = this batch's (mean, std), if there."""
        running = self.normalizers[kind]
        if self.style == "unic":
            return running.mean.clone(), running.std + 1e-6
        mean, std = batch or (running.mean, running.std)
        return mean, std.clamp(min=1e-3)

    def forward(self, features):
        """Evaluation: features standardised by the running averages, fp32; a kind of token without any is None."""
        out = {"cls": None, "patch": None}
        for kind in self.normalizers:
            mean, divisor = self.statistics(kind)
            out[kind] = None if features.get(kind) is None else (features[kind].float() - mean) / divisor
        return out

def update_norms(norms, features, momentum):
    """One training step of standardisation: {teacher: {kind: (mean, divisor)}} to standardise this batch by.

    norms {teacher: TeacherNorm}; features {teacher: {"cls": [b, D] or None, "patch": [b, N, D]}}, raw, this process's.
    The statistics are those of the tokens of all processes: each sends one message, for every teacher and token type
    2 D + 1 numbers (count, mean, m2), and they merge exactly (Chan et al. 1979). The running averages move by
    `momentum`: stat <- (1 - m) stat + m batch_stat.
    """
    keys = [(t, kind) for t in norms for kind in norms[t].normalizers]
    mine = [moments(features[t][kind]) for t, kind in keys]
    sent = torch.cat(mine)[None]
    gathered = sent
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = sent.new_empty(dist.get_world_size(), sent.shape[1])
        dist.all_gather_into_tensor(gathered, sent)
    statistics = {t: {} for t in norms}
    for (t, kind), part in zip(keys, gathered.split([len(x) for x in mine], 1)):
        running = norms[t].normalizers[kind]
        means, m2s = part[:, 1:].chunk(2, 1)
        count, mean, m2 = kernels.merge_moments(part[:, 0], means, m2s)
        std = (m2 / (count - 1).clamp(min=1)).sqrt()
        statistics[t][kind] = norms[t].statistics(kind, (mean, std))  # before the update: UNIC takes the average so far
        # One bad batch must not spoil the averages for good.
        known = (count > 1) & mean.isfinite().all() & std.isfinite().all()
        running.mean.lerp_(torch.where(known, mean, running.mean), momentum)
        running.std.lerp_(torch.where(known, std, running.std), momentum)
    return statistics

def moments(x):
    """[1 + 2 D] fp32: how many tokens x [..., D] holds, their mean, and their sum of squared deviations per channel."""
    if x.numel() == 0:
        return torch.zeros(1 + 2 * x.shape[-1], device=x.device)
    count = torch.full((1,), x.numel() // x.shape[-1], device=x.device, dtype=torch.float32)
    return torch.cat([count, *kernels.channel_moments(x)])

# ---- The loss, and teacher dropping ----------------------------------------------------------------------------------

WEIGHTS = {"cos": 0.5, "sl1": 0.5}  # a token's loss is the weighted sum of these terms (UNIC eq. 2)

def token_losses(student, teacher, mean, divisor):
    """{term: [...] fp32} of every token: student and raw teacher [..., D], which is standardised by mean, divisor [D].

    cos: 1 - cosine similarity; sl1: smooth L1, mean over channels. A new term: one more entry here and in WEIGHTS.
    """
    cos, sl1 = kernels.distill_loss(student, teacher, mean, divisor, beta=1.0, eps=0.0)  # eps: divisor has its own
    return {"cos": cos, "sl1": sl1}

def image_losses(student, teacher, statistics):
    """The loss of one teacher for every image [b], and its terms {"cls_cos", "cls_sl1", "patch_cos", …}, [b] each.

    student, teacher: {"cls": [b, D] or None, "patch": [b, N, D]}, the teacher's raw; statistics {kind: (mean, divisor)}
    Patch tokens are averaged; if the teacher has a class token, so are the two kinds of token.
    """
    terms = {}
    total = 0
    for kind, (mean, divisor) in statistics.items():
        for term, value in token_losses(student[kind], teacher[kind], mean, divisor).items():
            terms[f"{kind}_{term}"] = value.mean(1) if kind == "patch" else value
            total = total + WEIGHTS[term] * terms[f"{kind}_{term}"]
    return total / len(statistics), terms

def batch_losses(outputs, features, statistics, rows, count):
    """image_losses of every teacher: losses [count, T], and {teacher: terms}.

    outputs, features {teacher: tokens of the images rows[teacher]}; rows {teacher: index tensor or slice}: which of the
    `count` images are judged by it, those it teaches (or a filler, see train.parts). The others' losses are 0.
    """
    losses, terms = [], {}
    for t, index in rows.items():
        loss, terms[t] = image_losses(outputs[t], features[t], statistics[t])
        losses.append(loss if isinstance(index, slice) else loss.new_zeros(count).index_copy(0, index, loss))
    return torch.stack(losses, 1), terms

def teacher_coefficients(losses, allowed, drop, noise):
    """Which teachers count for which images, [B, T] of 0 and 1 (teacher dropping, UNIC section 3.3).

    losses [B, T] (no gradient flows back through the choice), allowed [B, T] bool: data sharing. Of the teachers
    allowed for an image the one with the largest loss always counts; each other one is dropped where noise [B, T],
    uniform in 0..1, is below `drop`: with that probability, independently.
    """
    worst = losses.detach().masked_fill(~allowed, -math.inf).argmax(1, keepdim=True)
    keep = (noise >= drop).scatter(1, worst, True)
    return (keep & allowed).to(losses.dtype)

def weighted_sum(losses, coefficients):
    """(sum(c * l), sum(c)): their ratio over the whole batch, all processes and parts together, is the loss.

    UNIC eq. 3. where() and not a product: a teacher that does not count for an image must not matter, not even as NaN
    (kernels.distill_loss gives a token whose gradient is 0 the gradient 0, whatever it holds).
    """
    return torch.where(coefficients > 0, coefficients * losses, 0).sum(), coefficients.sum()

# ---- The student -----------------------------------------------------------------------------------------------------

# The published files' names for the teachers, and ours.
ALIASES = {"dino2reg_vitlarge_14": "dinov2", "mast3r_vitlarge_16": "mast3r", "multihmr_vitlarge_14_672": "multihmr",
           "dino_vitbase_16": "dino", "deit3_vitbase_16": "deit3", "ibot_vitbase_16": "ibot",
           "dbotft_vitbase_16": "dbotft"}

class ByTeacher(nn.ModuleDict):
    """A ModuleDict by teacher name that also answers to the published files' names."""

    def __getitem__(self, name):
        return super().__getitem__(ALIASES.get(name, name))

class DUNE(nn.Module):
    """The student: encoder, one projector and one TeacherNorm per teacher.

    teachers {name: (dimension, has a class token)}; projector: a name of PROJECTORS; norm: see TeacherNorm.
    """

    def __init__(self, encoder, teachers, projector="tp", norm="dune", **projector_options):
        super().__init__()
        self.encoder = encoder
        self.projectors, self.teacher_norms = ByTeacher(), ByTeacher()
        for t, (dim, has_cls) in teachers.items():
            self.projectors[t] = PROJECTORS[projector](encoder, dim, has_cls, **projector_options)
            self.teacher_norms[t] = TeacherNorm(dim, has_cls, norm)
        # The projectors read the tokens before the last norm, so it gets no gradient (and stays 1 and 0): DDP must not
        # wait for one.
        encoder.norm.requires_grad_(False)

    def forward(self, images, rows=None):
        """images [B, 3, H, W] -> {teacher: {"cls": [B, T] or None, "patch": [B, N, T]}}, in standardised features.

        rows {teacher: index tensor or slice}: project only these images for this teacher; None: all of them for each.
        """
        ladder = any(projector.reads_every_block for projector in self.projectors.values())
        tokens = self.encoder.tokens(images, every_block=ladder)
        return {t: self.project(t, tokens, rows[t] if rows else slice(None)) for t in self.projectors}

    def project(self, teacher, tokens, rows=slice(None)):
        """encoder.tokens(…) of images `rows` through one projector: {"cls": [b, T] or None, "patch": [b, N, T]}."""
        tokens = [x[rows] for x in tokens] if isinstance(tokens, list) else tokens[rows]
        out = split_tokens(self.projectors[teacher](tokens), True)
        if "cls" not in self.teacher_norms[teacher].normalizers:
            out["cls"] = None
        return out

# ---- Checkpoints -----------------------------------------------------------------------------------------------------

PUBLISHED = "https://download.europe.naverlabs.com/dune/{}.pth"
PUBLISHED_NAMES = ["dune_vitbase14_336", "dune_vitbase14_448", "dune_vitbase14_448_paper",
                   "dune_vitsmall14_336", "dune_vitsmall14_448"]

def load(path_or_name, encoder_only=False):
    """A trained student: DUNE (or, with encoder_only, its ViT) in eval mode on the CPU, sizes read off the tensors.

    Takes our checkpoints, the published DUNE and UNIC files, and PUBLISHED_NAMES, which are downloaded.
    Raises Oops if the file cannot be read or holds anything else than such a model.
    """
    path = str(path_or_name)
    if path in PUBLISHED_NAMES and not os.path.exists(path):
        path = fetch(PUBLISHED.format(path))
    return model_from(read_checkpoint(path), path, encoder_only)

RENAMED = {  # what published files call otherwise
    r"^((module|_orig_mod)\.)+": "",
    r"^lp\.heads\.(\w+)\.(cls|patch)\.(\d+)\.layers\.0\.": r"projectors.\1.rungs.\2.\3.fc1.",
    r"^lp\.heads\.(\w+)\.(cls|patch)\.(\d+)\.layers\.2\.": r"projectors.\1.rungs.\2.\3.fc2.",
    r"^teacher_ft_stats\.(\w+)\.": r"teacher_norms.\1.normalizers.",
}

def model_from(file, path, encoder_only=False):
    """load() for a checkpoint that has been read: {"model": state, …}, of ours, DUNE's or UNIC's."""
    tensors = dict(entry(file, "model", dict, path))
    averages = dict(tensors_in(file.get("teacher_ft_stats"), "teacher_ft_stats"))  # UNIC keeps them apart
    tensors.update((key, x.flatten()) for key, x in averages.items())
    state = {}
    for key, value in tensors.items():
        for published, ours in RENAMED.items():
            key = re.sub(published, ours, key)
        key = re.sub(r"^(projectors|teacher_norms)\.(\w+)", lambda m: f"{m[1]}.{ALIASES.get(m[2], m[2])}", key)
        state[key] = value
    state = plain_keys(state)
    encoder_state = below(state, "encoder.")
    if not encoder_state:
        raise Oops(f"{path} is no DUNE checkpoint: it holds no 'encoder.…' tensors")
    encoder = vit_from_state(encoder_state, path)
    if encoder_only:
        return load_strictly(encoder, encoder_state, path).eval()

    teachers = {}
    for key, value in state.items():
        match = re.fullmatch(r"teacher_norms\.(\w+)\.normalizers\.patch\.mean", key)
        if match and torch.is_tensor(value):
            teachers[match[1]] = (value.numel(), key.replace(".patch.", ".cls.") in state)
    recipe = file.get("args")
    if not isinstance(recipe, dict):  # a bare state dict, or a published one, whose words mean other things
        recipe = {}
    keys = " ".join(state)
    guess = "lp" if ".rungs." in keys else "sp" if ".mlps." in keys else "tp"
    projector = str(recipe.get("projector", guess))
    norm = recipe.get("norm", "unic" if averages else "dune")
    if projector not in PROJECTORS or norm not in ("dune", "unic"):
        raise Oops(f"{path} was trained with --projector {projector} --norm {norm}, which this code does not know")
    sizes = {}
    for name, key in PROJECTORS[projector].sizes.items():
        x = state.get(f"projectors.{next(iter(teachers), '')}.{key.format(last=len(encoder.blocks) - 1)}")
        if torch.is_tensor(x):
            sizes[name] = x.numel()
    with torch.device("meta"):
        model = DUNE(encoder, teachers, projector, norm, **sizes)
    return load_strictly(model, state, path).eval()

def vit_from_state(state, path, **options):
    """A ViT without content (on "meta") of the sizes that `state`, in DINOv2's layout, shows; head dimension 64."""
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        places = state["pos_embed"].shape[1] - ("cls_token" in state) if "pos_embed" in state else 1
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        if dim % 64 or min(dim, patch, depth, places) < 1:
            raise ValueError
    except (KeyError, ValueError, IndexError, AttributeError):
        raise Oops(f"{path} holds no ViT: patch_embed.proj.weight or blocks are missing or of another kind") from None
    scale = 1e-4 if "blocks.0.ls1.gamma" in state else None
    options = {"class_token": "cls_token" in state, "layer_scale": scale, **options}
    with torch.device("meta"):
        return ViT(math.isqrt(places) * patch, patch, dim, depth, dim // 64, registers, **options)

def plain_keys(state):
    """Published encoder keys in ViT's own names: blocks.0.{i}.… is blocks.{i}.…, and the unused mask token goes."""
    kept = [key for key in state if not key.endswith("mask_token")]
    return {re.sub(r"\bblocks\.\d+\.(?=\d+\.)", "blocks.", key): state[key] for key in kept}

def below(state, prefix):
    """The entries of a state dict whose keys begin with `prefix`, without it."""
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}

def load_strictly(module, state, path):
    """Load `state` into `module` (also one on "meta"), as fp32. Oops for a tensor that is missing, extra, of another
    shape, not of a floating type or not finite, naming it."""
    want = module.state_dict()
    weights = {}
    for key in {**want, **state}:
        x, place = state.get(key), want.get(key)
        if key not in state:
            problem = f"lacks tensor {key}"
        elif place is None:
            problem = f"has the unknown tensor {key}"
        elif not torch.is_tensor(x) or not x.is_floating_point():
            problem = f"has no numbers in tensor {key}"
        elif x.shape != place.shape:
            problem = f"has the wrong shape for tensor {key} ({list(x.shape)}, expected {list(place.shape)})"
        # Beyond 1e8 no weight was ever learned: a bit has been flipped in a format without checksums.
        elif not (x.float().abs() <= 1e8).all():
            problem = f"has NaN, infinity or senseless numbers in tensor {key}"
        else:
            weights[key] = x.to(torch.float32, copy=True)
            continue
        raise Oops(f"{path}: the file {problem}; is it the right file for this model?")
    module.load_state_dict(weights, assign=True)
    return module

def fetch(url):
    """The path of a published file in torch's hub cache, downloaded (with a bar, beside, renamed) if it is missing."""
    path = cached(url)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise Oops(f"cannot download {url} ({error}); get it by hand and put it at {path}") from None
    return path

def cached(url):
    """Where fetch() keeps a published file: in torch's hub cache; Hugging Face's, many of one name, by repository."""
    parts = url.split("/")
    name = f"{parts[4]}-{parts[-1]}" if parts[2] == "huggingface.co" else parts[-1]
    return os.path.join(torch.hub.get_dir(), "checkpoints", name)

# ---- The four places through which all else passes: files from outside, our files, options, the way out --------------

class Oops(ValueError):
    """A mistake that a person can mend: one line that says what is wrong and what to do about it."""

def read_checkpoint(path):
    """What a checkpoint, a file of weights or a .safetensors file holds, its tensors on the CPU.

    Nothing in the file is trusted: no code of it is run (tensors, plain containers and argparse.Namespace are read), it
    is a regular file, its checksums hold, every tensor is dense and no larger than its bytes. Oops if not.
    """
    path = regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            return read_safetensors(path)
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() or any(item.compress_type for item in archive.infolist()):
                    raise ValueError("checksum")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what it cannot read is told below
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name, x in tensors_in(content):
            plain = x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
            if not plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
                raise Oops(f"cannot read {path}: {name} is sparse, quantised, or larger than its bytes")
        return content
    except (Oops, OSError, MemoryError):
        raise
    except Exception as error:  # torch.load's errors for foreign files are of many types, and long
        found = re.search(r"(?i)unsupported (?:global|class):? (?:global )?([a-z_][\w.]*)", str(error))
        why = "it is damaged, not one, or in a pickle protocol that torch.load refuses (torch.save's own, 2, is fine)"
        if found:
            why = f"it wants to run {found[1]}, which is not allowed"
        raise Oops(f"cannot read {path} as a checkpoint: {why}") from None

def regular(path):
    """str(path) of a regular file: no folder, and nothing that would make us wait, such as a fifo."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        missing = isinstance(error, (FileNotFoundError, ValueError))
        raise Oops(f"no such file: {path}" if missing else f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise Oops(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, expected a file")
    return str(path)

def tensors_in(content, name=""):
    """(name, tensor) of every tensor in nested dicts, lists and tuples; the name holds all keys on the way, dotted."""
    if torch.is_tensor(content):
        yield name, content
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, part in content.items():
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes for the header's length, the header in JSON, all numbers."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    with open(path, "rb") as file:
        content = bytearray(file.read())
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("the header is longer than the file")
    tensors = {}
    for name, item in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = item["data_offsets"]
        shape, dtype = torch.Size(item["shape"]), types[item["dtype"]]
        if not 0 <= begin < end <= len(content) - start or shape.numel() * dtype.itemsize != end - begin:
            raise ValueError("a tensor lies outside of the file")
        tensors[name] = torch.frombuffer(content, dtype=dtype, count=shape.numel(), offset=start + begin).view(shape)
    return tensors

def entry(file, key, kind, path, *default):
    """file[key] of a file from outside, if it is of this type (a dict: with strings as keys); if it is missing, the
    default. Oops otherwise."""
    if default and isinstance(file, dict) and key not in file:
        return default[0]
    value = file.get(key) if isinstance(file, dict) else None
    if not isinstance(value, kind) or isinstance(value, dict) and not all(isinstance(k, str) for k in value):
        raise Oops(f"{path} is not the kind of file expected here: it has no '{key}', or something else of that name")
    return value

@contextlib.contextmanager
def writing(path, mode="wb"):
    """Write a file so that it is whole or not there: `with writing(path) as file:` writes beside, syncs and renames.

    Folders on the way are made. Whatever fails, nothing stays behind; what the disk refuses is an Oops.
    """
    part = f"{path}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.isdir(path):
            raise IsADirectoryError(0, "there is a folder of that name")
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what the disk says
        if isinstance(reason, OSError):
            raise Oops(f"cannot write {path}: {reason.strerror or reason}") from None
        raise

def check_folder(path):
    """Make a folder and see that it can be written, before the work whose results go there. Oops if not."""
    with writing(f"{path}/.write"):
        pass
    os.remove(f"{path}/.write")

class Parser(argparse.ArgumentParser):
    """argparse, fed with tables {name: option(…)}; its complaints are told as all others are."""

    def error(self, message):
        raise Oops(message.removeprefix("argument "))

    def add(self, table):
        for name, how in table.items():
            self.add_argument(f"--{name.replace('_', '-')}", **how)
        return self

def option(default, text, low=0, high=1e9, choices=None, kind=None, **how):
    """One option: its default, what it is, and what it takes; for a number its limits, inclusive and finite.

    kind: the type of one value, if it is not the default's; how: argparse's own (action, nargs, metavar).
    """
    kind = kind or (str if isinstance(default, (list, tuple, type(None))) else type(default))

    def read(word):
        value = kind(word)
        if kind is not str and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{word} is not between {low:g} and {high:g}")
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{word!r}: choose one of {', '.join(choices)}")
        if kind is str and not (word and word.isprintable()):
            raise argparse.ArgumentTypeError(f"{word!r} is empty, or no text")
        return value
    read.__name__ = kind.__name__  # a ValueError is told by argparse as "invalid int value"
    text = text.replace("%", "%%") + ("" if default in (None, False, [], ()) else f" (default: {default})")
    if kind is bool:
        return {"action": "store_true", "help": text}
    if default == []:
        how = {"action": "append", **how}
    return {"default": default, "type": read, "help": text, "metavar": "|".join(choices or ()) or None, **how}

def pick_device(name, index=0):
    """--device auto, cpu or cuda (GPU `index` of this machine) as a torch.device. Oops if there is no such GPU."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise Oops(f"--device cuda: torch sees {torch.cuda.device_count()} GPUs, this process wants number {index}")
    return torch.device("cuda", index)

def fast_bf16(device):
    """Whether the device multiplies bf16 in hardware: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()

def run(main):
    """Run a script's main(). What a person or a machine did wrong is one line on stderr and exit code 2, Ctrl-C is 130;
    an unexpected exception is a defect of ours, and looks like one."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None: closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no ± shows a ?
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        line = in_a_line(error)
        if line is None:
            raise
        from tqdm import tqdm
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.leave = False  # clears what it has drawn
            bar.close()
        if first_to_tell():
            print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)

def in_a_line(error):
    """An exception as a line for people; None if it is a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Oops):
        return f"error: {text}"
    if isinstance(error, OSError):
        return f"error: {error.filename or 'the system says'}: {error.strerror or text}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "error: not enough memory: take a smaller --batch or --image-size, or --accumulate"
    if dist.is_initialized() and re.search(r"(?i)gloo|nccl|connection (closed|reset)|by peer", text):
        return "error: another process of this run has left"
    return None

def first_to_tell():
    """Among processes that torchrun started together, whether nobody has told a mistake yet: others follow from it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE") == "1":
        return os.environ.get("RANK", "0") == "0" or dist.is_initialized()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.add(f"told {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
