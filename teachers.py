"""The frozen teachers: one table, one loader, and the tiny specialists that stand in for them on a laptop.

    teacher = load_teacher("mast3r")                     # downloads MASt3R once, keeps its encoder
    tokens = teacher(images, grid=(24, 24))              # {"cls": None, "patch": [B, 576, 1024]}, whatever its own patch size
"""

import argparse
import ast
import hashlib
import math
import os
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from data import IMAGENET_MEAN, IMAGENET_STD, JOINTS, KINDS
from dune import Attention, Mlp, Oops, SIZES, ViT, attend, fast_bf16, fetch, load_strictly, plain_keys, read_checkpoint, rope_table, rotate, vit_from_state
from dune import load as load_encoder



@dataclass(frozen=True)
class Teacher:
    """One row of TEACHERS: where the weights are, how to find the encoder in the file, and how it differs from a plain ViT."""
    url: str
    license: str
    inside: str = ""             # the key of the file that holds the state dict ("" = the file is it)
    prefix: str = ""             # only keys that begin so belong to the encoder, the rest of the file to other things
    rename: dict = field(default_factory=dict)   # regular expression -> replacement, towards DINOv2's key names
    ignore: str = r"$^"          # keys (regular expression) that belong to the published file and not to the encoder
    position: str = ""           # see ViT; "" = as DINOv2: "antialias" with registers, "offset" without
    pooled: bool = False         # see ViT
    distil_cls: bool = True      # whether its class token, if it has one, is worth learning: Multi-HMR never trained its own
    mean: tuple = IMAGENET_MEAN  # the normalisation that this teacher's images want
    std: tuple = IMAGENET_STD
    shape: dict = field(default_factory=dict)    # the published size, for random weights; a file's own size is read off its tensors


DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"
NAVER = "https://download.europe.naverlabs.com/ComputerVision/"
VIT_L = dict(patch_size=14, image_size=518, **SIZES["large"])
VIT_B16 = dict(patch_size=16, image_size=224, registers=0, layer_scale=None, **SIZES["base"])

TEACHERS = {
    # DUNE's three: 2D, 3D scenes, 3D people
    "dinov2": Teacher(DINOV2.format("dinov2_vitl14", "_reg4"), "Apache-2.0", shape=dict(registers=4, position="antialias", **VIT_L)),
    "mast3r": Teacher(NAVER + "MASt3R/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth", "CC BY-NC-SA 4.0", inside="model",
                      prefix=r"(patch_embed|enc_blocks|enc_norm)\.", rename={r"^enc_": ""}, position="rope",
                      mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                      shape=dict(VIT_L, patch_size=16, registers=0, class_token=False, layer_scale=None, position="rope")),
    "multihmr": Teacher(NAVER + "MultiHMR/multiHMR_672_L.pt", "CC BY-NC-SA 4.0", inside="model_state_dict",
                        prefix=r"backbone\.encoder\.", rename={r"^backbone\.encoder\.": ""}, distil_cls=False,
                        shape=dict(registers=0, **VIT_L)),
    # smaller DINOv2s, without registers
    "dinov2_vits14": Teacher(DINOV2.format("dinov2_vits14", ""), "Apache-2.0", shape=dict(VIT_L, registers=0, **SIZES["small"])),
    "dinov2_vitb14": Teacher(DINOV2.format("dinov2_vitb14", ""), "Apache-2.0", shape=dict(VIT_L, registers=0, **SIZES["base"])),
    # UNIC's four, all ViT-B/16 at 224 px
    "dino": Teacher("https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "Apache-2.0", shape=VIT_B16),
    "ibot": Teacher("https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitb_16_rand_mask/checkpoint_teacher.pth",
                    "Apache-2.0", inside="state_dict", shape=VIT_B16),
    "deit3": Teacher("https://dl.fbaipublicfiles.com/deit/deit_3_base_224_1k.pth", "Apache-2.0", inside="model",
                     rename={r"\.gamma_(\d)$": r".ls\1.gamma"}, ignore=r"head\.", shape=dict(VIT_B16, layer_scale=1e-4)),
    "dbotft": Teacher("https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/mmodal/dbot/84.5_dbot_base_finetune.pth", "CC BY-NC 4.0",
                      inside="model", rename={r"^fc_norm\.": "norm."}, ignore=r"head\.", pooled=True, shape=dict(VIT_B16, pooled=True)),
}


class FrozenTeacher(nn.Module):
    """A teacher's encoder behind one interface: ImageNet-normalised images in, tokens on the asked grid out, no gradient."""

    def __init__(self, name, vit):
        super().__init__()
        self.name, self.vit, self.dim, self.patch_size = name, vit, vit.embed_dim, vit.patch_size
        row = TEACHERS[name]
        self.has_cls = row.distil_cls and (vit.pooled or vit.cls_token is not None)  # whether a student learns a class token from it
        # ImageNet's normalisation into the teacher's own, as one multiplication and one addition
        for key, value in (("gain", [s / t for s, t in zip(IMAGENET_STD, row.std)]),
                           ("offset", [(m - n) / t for m, n, t in zip(IMAGENET_MEAN, row.mean, row.std)])):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)
        self.renormalise = (row.mean, row.std) != (IMAGENET_MEAN, IMAGENET_STD)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, grid=None):
        """images [B, 3, H, W], ImageNet-normalised -> {"cls": [B, D] or None, "patch": [B, rows*cols, D]}.

        grid (rows, cols): the wanted token grid; the image is resized to it if it has another size (bicubic). None: as the image is.
        """
        return self.features(images, grid)

    def features(self, images, grid=None):
        """forward(), with gradient: for a specialist that still learns."""
        if grid is not None:
            size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bicubic", align_corners=True)
        if self.renormalise:
            images = images * self.gain + self.offset
        return self.vit(images.to(self.vit.norm.weight.dtype))


def encoder_state(name, file, path):
    """The encoder's tensors of a published file, under ViT's key names."""
    row = TEACHERS[name]
    state = file.get(row.inside) if row.inside and isinstance(file, dict) else file
    if not isinstance(state, dict):
        raise Oops(f"{path} is no file of teacher {name}: it has no '{row.inside}'")
    state = {k: v for k, v in state.items() if torch.is_tensor(v)}
    if row.prefix:
        state = {k: v for k, v in state.items() if re.match(row.prefix, k)}
    state = {k: v for k, v in state.items() if not re.match(row.ignore, k)}
    for old, new in row.rename.items():
        state = {re.sub(old, new, k): v for k, v in state.items()}
    state = plain_keys(state)
    if not state:
        raise Oops(f"{path} is no file of teacher {name}: nothing in it belongs to the encoder")
    if row.position != "rope" and "cls_token" in state and "pos_embed" in state:
        patches = state["pos_embed"].shape[1]
        if round(patches**0.5) ** 2 == patches:  # DeiT-III's covers the patches only: its class token has none, which is a zero
            state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], 1)
    return state


def load_teacher(name, weights=None, device="cpu", dtype=torch.float32):
    """A frozen teacher (FrozenTeacher), its size read off the weights.

    name     a row of TEACHERS
    weights  a file in the published layout; "random" for random weights of the published size; None: the published file, downloaded
    Raises Oops for an unknown name and for a file that is missing, unreadable or of another layout (naming the tensor).
    """
    if name not in TEACHERS:
        raise Oops(f"unknown teacher '{name}'; there are: {', '.join(TEACHERS)}")
    row = TEACHERS[name]
    if weights == "random":
        vit = ViT(**row.shape)
    else:
        path = weights or fetch(row.url)
        state = encoder_state(name, read_checkpoint(path), path)
        position = row.position or ("antialias" if "register_tokens" in state else "offset")
        vit = load_strictly(vit_from_state(state, path, position=position, pooled=row.pooled), state, path)
    return FrozenTeacher(name, vit).to(device, dtype)


# ------------------------------------------------------------------------------------------------------------ training
def fit(parameters, loss, steps, lr, weight_decay=1e-2, betas=(0.9, 0.999), clip=0.0, what=None):
    """The training loop of all small things (probes, specialists, decoders): AdamW with a one-cycle learning rate.

    parameters  a list of tensors, or of param groups, which may have their own "lr" (its peak) and "weight_decay"
    loss        loss(step) gives what this step minimises, a scalar
    betas       the first swings by 0.05 around its value while the rate rises and falls, as one-cycle wants
    clip        the largest norm of the gradient of all parameters together; 0: any
    what        a name for a progress bar; None: no bar
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)
    groups = optimizer.param_groups
    swing = {"base_momentum": betas[0] - 0.05, "max_momentum": betas[0] + 0.05}
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], total_steps=steps + 1, pct_start=0.1, **swing)
    for step in tqdm(range(steps), what, leave=False, disable=what is None):
        optimizer.zero_grad()
        loss(step).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        optimizer.step()
        schedule.step()


# -------------------------------------------------------------------------------------------------------------- the probes
# What can be read off features on the procedural scenes by linear layers. With a frozen encoder this measures it (eval.py study);
# with an encoder that learns along it makes a tiny specialist.


def centres(rows, cols):
    """[rows * cols, 2]: the middle of each cell of a grid as (x, y) fractions of the sides."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


class Probe(nn.Module):
    """Linear heads for one domain of procedural scenes, on the features {"cls": [B, D] or None, "patch": [B, rows*cols, D]}.

    objects  its kind (from the class token, or the mean patch) and each patch's kind or background
    rooms    each patch's log depth and surface normal
    people   for each joint: which patches hold one, where exactly (fractions of the image), and where in 3D (metres from the pelvis)
    """

    def __init__(self, domain, dim, grid):
        super().__init__()
        self.domain, self.grid = domain, grid
        self.head = nn.Linear(dim, {"objects": len(KINDS) + 1, "rooms": 4, "people": 6 * len(JOINTS)}[domain])
        self.kind = nn.Linear(dim, len(KINDS)) if domain == "objects" else None

    def targets(self, scenes):
        """Labels on the token grid from a batch of scenes (see data.py), tensors on the CPU."""
        rows, cols = self.grid
        if self.domain == "objects":
            cover = F.adaptive_avg_pool2d(scenes["mask"].float()[:, None], self.grid).flatten(1)
            return {"kind": scenes["label"], "patch": torch.where(cover > 0.5, scenes["label"][:, None] + 1, 0)}
        if self.domain == "rooms":
            depth = F.adaptive_avg_pool2d(scenes["depth"].log()[:, None], self.grid).flatten(2).transpose(1, 2)
            normals = F.adaptive_avg_pool2d(scenes["normals"].permute(0, 3, 1, 2), self.grid).flatten(2).transpose(1, 2)
            return {"depth": depth, "normals": F.normalize(normals, dim=-1)}
        joints, size = scenes["joints2d"], torch.tensor([cols, rows])
        inside = scenes["visible"][..., None] & ((joints >= 0) & (joints < 1)).all(-1)  # [n, figures, joints]
        metres = scenes["joints3d"] - scenes["joints3d"][:, :, 2:3]
        middle = centres(rows, cols)
        # For every patch and kind of joint the nearest one: a soft spot around it (1 at it, 0.6 a patch away), its place in 2D and 3D
        near, place, xyz = (torch.zeros(len(inside), rows * cols, len(JOINTS), n) for n in (1, 2, 3))
        for figure in range(inside.shape[1]):
            gap = (joints[:, figure, None] - middle[:, None]) * size
            spot = (torch.exp(-gap.square().sum(-1) / 2) * inside[:, figure, None])[..., None]
            place = torch.where(spot > near, joints[:, figure, None], place)
            xyz = torch.where(spot > near, metres[:, figure, None], xyz)
            near = torch.maximum(near, spot)
        image, figure, joint = inside.nonzero(as_tuple=True)
        cell = (joints[image, figure, joint] * size).long()
        return {"near": near[..., 0], "place": place, "xyz": xyz, "centres": middle, "truth": joints[image, figure, joint],
                "metres": metres[image, figure, joint], "at": torch.stack([image, cell[:, 1] * cols + cell[:, 0], joint])}

    def forward(self, features, targets):
        """The predictions that belong to the targets."""
        patch = features["patch"]
        if self.domain == "objects":
            return {"kind": self.kind(features["cls"] if features["cls"] is not None else patch.mean(1)), "patch": self.head(patch)}
        if self.domain == "rooms":
            depth, normals = self.head(patch).split([1, 3], -1)
            return {"depth": depth, "normals": F.normalize(normals, dim=-1)}
        near, offset, xyz = self.head(patch).unflatten(-1, (len(JOINTS), 6)).split([1, 2, 3], -1)
        return {"near": near[..., 0], "place": offset + targets["centres"][:, None], "xyz": xyz}

    def loss(self, out, targets):
        if self.domain == "objects":
            return F.cross_entropy(out["kind"], targets["kind"]) + F.cross_entropy(out["patch"].transpose(1, 2), targets["patch"])
        if self.domain == "rooms":
            return (out["depth"] - targets["depth"]).abs().mean() * 2 + 1 - (out["normals"] * targets["normals"]).sum(-1).mean()
        weight = targets["near"] * (targets["near"] > 0.3)
        apart = {k: ((out[k] - targets[k]).abs().mean(-1) * weight).sum() / weight.sum() for k in ("place", "xyz")}
        spots = F.binary_cross_entropy_with_logits(out["near"], targets["near"], pos_weight=torch.tensor(3.0))
        return 10 * spots + 10 * apart["place"] + 3 * apart["xyz"]

    def metrics(self, out, targets):
        """{name: value}: accuracy and mIoU in %; depth RMSE in m, delta1 in %, normals in degrees; joints within 5 % of the side in %, cm."""
        if self.domain == "objects":
            guess, truth = out["patch"].argmax(-1), targets["patch"]
            iou = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum().clamp(min=1) for k in range(len(KINDS) + 1) if (truth == k).any()]
            return {"accuracy": 100 * (out["kind"].argmax(-1) == targets["kind"]).float().mean().item(), "mIoU": 100 * torch.stack(iou).mean().item()}
        if self.domain == "rooms":
            ratio = (out["depth"] - targets["depth"]).abs()
            angle = (out["normals"] * targets["normals"]).sum(-1).clamp(-1, 1).acos()
            return {"depth RMSE": (out["depth"].exp() - targets["depth"].exp()).square().mean().sqrt().item(),
                    "delta1": 100 * (ratio < 0.2231).float().mean().item(),  # log 1.25
                    "normals": torch.rad2deg(angle).mean().item()}
        # A joint is found if one of the three best guesses for its kind in the image lies within 5 % of the side.
        image, patch, joint = targets["at"]
        best = out["near"].topk(3, dim=1).indices  # [n, 3, joints]
        guess = out["place"].gather(1, best[..., None].expand(-1, -1, -1, 2))[image, :, joint]
        found = (guess - targets["truth"][:, None]).norm(dim=-1).amin(1) < 0.05
        apart = (out["xyz"][image, patch, joint] - targets["metres"]).norm(dim=-1)
        return {"joints 2D": 100 * found.float().mean().item(), "joints 3D": 100 * apart.mean().item()}


# ------------------------------------------------------------------------------------------------------- pairs of views
# A pair: image uint8 [2, 3, S, S], depth [2, S, S] metres along z (0: unknown), K [2, 3, 3] pixels (centres at integer + 0.5), pose
# [2, 4, 4] camera to world. Camera frame: x right, y down, z forward.


def room_pairs(start, count, size):
    """`count` procedural rooms, each seen by both of its cameras, as one batch of pairs."""
    views = [data.labelled_scenes("rooms", start, count, size, view=view) for view in (0, 1)]
    return {k: torch.stack([view[k] for view in views], 1) for k in views[0]}


def pair_geometry(pairs):
    """What a batch of pairs knows: both views' points in view 1's frame [B, 2, S, S, 3], which of them are measured [B, 2, S, S] bool, where
    view 2 sees view 1's pixels [B, S, S, 2], and which of these it does see [B, S, S] bool (before it, inside the image, not hidden)."""
    depth, size = pairs["depth"], pairs["depth"].shape[-1]
    pixels = F.pad(centres(size, size) * size, (0, 1), value=1.0).view(size, size, 3).to(depth.device)
    rays = pixels @ pairs["K"].inverse().mT[:, :, None]
    move = pairs["pose"][:, :1].inverse() @ pairs["pose"]
    points = (rays * depth[..., None]) @ move[:, :, None, :3, :3].mT + move[:, :, None, None, :3, 3]
    back = move[:, 1].inverse()[:, None]
    there = points[:, 0] @ back[..., :3, :3].mT + back[:, :, None, :3, 3]
    z = there[..., 2]
    place = ((there @ pairs["K"][:, 1, None].mT)[..., :2] / z[..., None].clamp(min=1e-6)).nan_to_num(-1)
    at = place.clamp(0, size - 1).long()
    surface = depth[:, 1].flatten(1).gather(1, (at[..., 1] * size + at[..., 0]).flatten(1)).view_as(z)
    seen = (depth[:, 0] > 0) & (surface > 0) & (z > 0) & ((place >= 0) & (place < size)).all(-1) & ((surface - z).abs() < 0.05 * z)
    return points, depth > 0, place, seen


def patch_pairs(pairs, grid):
    """For the middle of each patch of view 1: the patch of view 2 that shows it, int64 [B, rows*cols], and whether one does, bool."""
    (rows, cols), size = grid, pairs["depth"].shape[-1]
    _, _, place, seen = pair_geometry(pairs)
    middle = tuple(torch.arange(n) * size // n + size // (2 * n) for n in grid)
    place, seen = (x[:, middle[0]][:, :, middle[1]] for x in (place, seen))
    at = (place / size * torch.tensor([cols, rows])).long().clamp(min=0)
    at = (at[..., 1].clamp(max=rows - 1) * cols + at[..., 0].clamp(max=cols - 1)).flatten(1)
    return at, seen.flatten(1)


def contrast(one, two, own, temperature=0.07):
    """InfoNCE both ways, [B, n]: row i of one [B, n, D] belongs to row own[i] of two [B, m, D]; own int64 [B, n]."""
    similar = F.normalize(one, dim=-1) @ F.normalize(two, dim=-1).mT / temperature
    right = similar.gather(2, own[..., None])[..., 0]
    return (similar.logsumexp(2) + similar.logsumexp(1).gather(1, own)) / 2 - right


# ---------------------------------------------------------------------------------------------------- the tiny specialists
# Stand-ins for the three teachers that differ as they do (class token and registers or not, RoPE or learned positions, patch 16
# or 14), each trained on its own domain only, from labels. Written in the published layouts: everything after this is the same code.

TINY = dict(image_size=112, embed_dim=192, depth=3, num_heads=3, layer_scale=None)
SPECIALISTS = {  # teacher: (domain, shape, learning rate, scenes, passes over them)
    "dinov2": ("objects", dict(TINY, patch_size=14, registers=4, position="antialias"), 1e-3, 6000, 1),
    "mast3r": ("rooms", dict(TINY, patch_size=16, registers=0, class_token=False, position="rope"), 1e-3, 4000, 1),
    "multihmr": ("people", dict(TINY, patch_size=14, registers=0), 2e-3, 3900, 2),
}
TINY_GRID = (8, 8)
MATCHING, FINE = 1.0, 2  # weight of the matching loss beside that of depth and normals; descriptors along a patch's side


def published_layout(name, state):
    """A specialist's state dict as the published file of that teacher would hold it."""
    if name == "mast3r":
        return {"args": argparse.Namespace(), "model": {re.sub(r"^(blocks|norm)\.", r"enc_\1.", k): v for k, v in state.items()}}
    if name == "multihmr":
        return {"model_state_dict": {f"backbone.encoder.{k}": v for k, v in state.items()}}
    return state


def specialist_path(name):
    """Where the tiny specialist of a teacher lies once it is made: its name tells the recipe and how its scenes are drawn and labelled, so
    that after a change it is made anew."""
    key = hashlib.sha1(repr((SPECIALISTS[name], MATCHING, FINE)).encode())
    for label in specialist_scenes(name, 2).values():
        key.update(label.numpy().tobytes())
    return os.path.join(data.cache_folder(), f"tiny-{name}-{key.hexdigest()[:8]}.pth")


def specialist_scenes(name, count):
    """The first `count` of the images that a specialist learns from, with their labels: {label: tensor [count, ...]}, of rooms pairs."""
    domain, size = SPECIALISTS[name][0], TINY["image_size"]
    return room_pairs(0, count // 2, size) if domain == "rooms" else data.labelled_scenes(domain, 0, count, size)


def prepare_specialists(names):
    """Train the tiny specialists that are not in the cache yet: about half a minute each on two cores."""
    for name in names:
        if not os.path.exists(specialist_path(name)):
            make_specialist(name, specialist_scenes(name, SPECIALISTS[name][3]), specialist_path(name))


def make_specialist(name, scenes, path, batch=16, seed=0):
    """Train a tiny specialist on its own domain, from labels, and write it to `path` in the published layout.

    scenes: {label: tensor [n, ...]} with "image" uint8 [n, 3, S, S] and the labels that Probe reads; of rooms pairs [n, 2, ...]: like
    MASt3R itself the tiny one also learns to tell which places of two views are the same, finer than a patch.
    """
    domain, shape, lr, _, epochs = SPECIALISTS[name]
    torch.manual_seed(seed)
    vit = ViT(**shape)
    teacher = FrozenTeacher(name, vit).train().requires_grad_(True)
    probe, pairs = Probe(domain, vit.embed_dim, TINY_GRID), domain == "rooms"
    params = [*vit.parameters(), *probe.parameters()]
    if pairs:
        describe = nn.Linear(vit.embed_dim, FINE**2 * 16, bias=False)
        params += describe.parameters()
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.03, betas=(0.9, 0.99), fused=True)
    count, batch = len(scenes["image"]), batch // 2 if pairs else batch
    steps = epochs * count // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    order = torch.cat([torch.randperm(count) for _ in range(epochs)])
    for rows in tqdm(order[:steps * batch].split(batch), f"tiny {name}: learns {domain}", unit_scale=batch * (1 + pairs), unit=" images", leave=False):
        part = {k: v[rows] for k, v in scenes.items()}
        single = {k: v.flatten(0, 1) for k, v in part.items()} if pairs else part
        targets = probe.targets(single)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
            features = teacher.features(data.normalise(single["image"]), TINY_GRID)
            out = probe(features, targets)
        loss = probe.loss({k: v.float() for k, v in out.items()}, targets)
        if pairs:
            own, seen = patch_pairs(part, tuple(FINE * n for n in TINY_GRID))
            maps = F.pixel_shuffle(describe(features["patch"].float()).mT.unflatten(2, TINY_GRID), FINE).flatten(2).mT
            loss = loss + MATCHING * contrast(*maps.unflatten(0, (-1, 2)).unbind(1), own)[seen].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(published_layout(name, vit.state_dict()), path + ".part")
    os.replace(path + ".part", path)


# --------------------------------------------------------------------------------------------- two photographs to 3D: MASt3R
# MASt3R's two-view decoder and heads (arXiv 2406.09756), on its own encoder or on a frozen DUNE (DUNE section 4). Modules are named
# as the published files name them.

TWO_VIEW = {"dune": "https://download.europe.naverlabs.com/dune/dunemast3r_cvpr25_vitbase.pth",
            "dune_small": "https://download.europe.naverlabs.com/dune/dunemast3r_cvpr25_vitsmall.pth",
            "mast3r": TEACHERS["mast3r"].url}


class CrossAttention(nn.Module):
    """Queries from one view, keys and values from the other, each turned by its own positions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, y, rope_x, rope_y):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.projq(x), self.projk(y), self.projv(y)))
        x = attend(rotate(q, rope_x), rotate(k, rope_y), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Block that looks at the other view y between attention and MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attn, self.cross_attn, self.mlp = Attention(dim, heads), CrossAttention(dim, heads), Mlp(dim, 4 * dim)

    def forward(self, x, y, rope_x, rope_y):
        x = x + self.attn(self.norm1(x), rope_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rope_x, rope_y)
        return x + self.mlp(self.norm3(x))


class ResidualConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Joins a finer map (skip) to the coarser ones and doubles the resolution."""

    def __init__(self, dim):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualConv(dim), ResidualConv(dim)  # the coarsest has no skip: its first is idle

    def forward(self, x, skip=None):
        x = x if skip is None else x[..., :skip.shape[-2], :skip.shape[-1]] + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DPT(nn.Module):
    """Dense prediction (Ranftl et al. 2021): four layers of tokens -> [B, 4, rows*patch, cols*patch].

    dims: channels of the four layers' tokens; maps: their channels as maps at 4, 2, 1 and 1/2 times the token grid.
    """

    def __init__(self, dims, patch, maps=(96, 192, 384, 768), features=256, last=128):
        super().__init__()
        self.patch = patch
        resize = nn.ConvTranspose2d(maps[0], maps[0], 4, 4), nn.ConvTranspose2d(maps[1], maps[1], 2, 2), None, nn.Conv2d(maps[3], maps[3], 3, 2, 1)
        self.act_postprocess = nn.ModuleList(nn.Sequential(nn.Conv2d(d, m, 1), *([r] if r else [])) for d, m, r in zip(dims, maps, resize))
        self.layer_rn = nn.ModuleList(nn.Conv2d(m, features, 3, padding=1, bias=False) for m in maps)
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (Fusion(features) for _ in range(4))
        self.head = nn.ModuleDict({"0": nn.Conv2d(features, features // 2, 3, padding=1),
                                   "2": nn.Conv2d(features // 2, last, 3, padding=1), "4": nn.Conv2d(last, 4, 1)})

    def forward(self, layers, grid):
        rows, cols = grid
        maps = [rn(post(x.transpose(1, 2).unflatten(2, grid))) for x, post, rn in zip(layers, self.act_postprocess, self.layer_rn)]
        x = self.refinenet3(self.refinenet4(maps[3]), maps[2])
        x = self.head["0"](self.refinenet1(self.refinenet2(x, maps[1]), maps[0]))
        x = F.interpolate(x, (rows * self.patch, cols * self.patch), mode="bilinear", align_corners=True)
        return self.head["4"](F.relu(self.head["2"](x)))


class TwoViewHead(nn.Module):
    """One view's outputs, per pixel, from [encoder tokens, output of each decoder block]; see TwoView."""

    def __init__(self, encoder_dim, dim, depth, patch, hidden=None, descriptor=24, **dpt_sizes):
        super().__init__()
        self.patch, self.hooks = patch, (0, depth // 2, depth * 3 // 4, depth)
        self.dpt = DPT((encoder_dim, dim, dim, dim), patch, **dpt_sizes)
        joined = encoder_dim + dim
        self.head_local_features = Mlp(joined, hidden or 4 * joined, (descriptor + 1) * patch**2)

    def forward(self, layers, grid):
        raw = self.dpt([layers[i] for i in self.hooks], grid).permute(0, 2, 3, 1)
        local = self.head_local_features(torch.cat([layers[0], layers[-1]], -1)).transpose(1, 2).unflatten(2, grid)
        local = F.pixel_shuffle(local, self.patch).permute(0, 2, 3, 1)
        distance = raw[..., :3].norm(dim=-1, keepdim=True)
        return {"pts3d": raw[..., :3] / distance.clamp(min=1e-8) * distance.expm1(), "conf": 1 + raw[..., 3].exp(),
                "desc": F.normalize(local[..., :-1], dim=-1), "desc_conf": local[..., -1].exp()}


class TwoView(nn.Module):
    """MASt3R on a frozen encoder: its own, or a DUNE.

    dim, depth       of the decoder: `depth` pairs of blocks, heads of 64 channels
    patch            pixels that the heads put in the place of a token; the image is resized if the encoder's patch is another
    norm             whether a LayerNorm of the decoder's stands for the encoder's last one (DUNE-MASt3R: yes; MASt3R: no)
    head_sizes       maps, features, last, hidden, descriptor: see DPT and TwoViewHead
    """

    def __init__(self, encoder, dim=768, depth=12, patch=None, norm=True, **head_sizes):
        super().__init__()
        self.encoder, self.patch, self.head_dim = encoder.eval().requires_grad_(False), patch or encoder.patch_size, 64
        self.norm = nn.LayerNorm(encoder.embed_dim) if norm else None
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        self.dec_blocks, self.dec_blocks2 = (nn.ModuleList(DecoderBlock(dim, dim // self.head_dim) for _ in range(depth)) for _ in range(2))
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)
        self.downstream_head1, self.downstream_head2 = (TwoViewHead(encoder.embed_dim, dim, depth, self.patch, **head_sizes) for _ in range(2))
        for key, value in (("gain", [0.5 / s for s in IMAGENET_STD]), ("offset", [(0.5 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD)])):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)  # MASt3R's normalisation into ImageNet's

    def encode(self, images, grid):
        """[B, 3, H, W] in MASt3R's normalisation -> the tokens that the decoder reads, [B, rows*cols, D]."""
        size = tuple(n * self.encoder.patch_size for n in grid)
        with torch.no_grad():
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bicubic", align_corners=True)
            if self.encoder.position != "rope":
                images = images * self.gain + self.offset
            tokens = self.encoder(images, norm=self.norm is None)["patch"]
        return tokens if self.norm is None else self.norm(tokens)

    def forward(self, view1, view2):
        """Two image batches [B, 3, H, W] in MASt3R's normalisation (2 x - 1 of images in 0..1), the two of any size -> two dictionaries.

        pts3d [B, H, W, 3] metres, both views' in view 1's camera frame (x right, y down, z forward); conf [B, H, W] > 1, the points'
        confidence; desc [B, H, W, 24] unit descriptors; desc_conf [B, H, W] > 0, theirs. fp32; on a GPU all but the heads runs in bf16.
        Raises Oops if a side is no multiple of the patch size.
        """
        for view in (view1, view2):
            if view.shape[-2] % self.patch or view.shape[-1] % self.patch:
                raise Oops(f"image size {view.shape[-2]}x{view.shape[-1]} is no multiple of the patch size {self.patch}")
        grids = [(view.shape[-2] // self.patch, view.shape[-1] // self.patch) for view in (view1, view2)]
        with torch.autocast(view1.device.type, torch.bfloat16, enabled=view1.device.type == "cuda"):
            a, b = layers = [[self.encode(view, grid)] for view, grid in zip((view1, view2), grids)]
            x, y = self.decoder_embed(a[0]), self.decoder_embed(b[0])
            rope_x, rope_y = (rope_table(*grid, 0, self.head_dim, view1.device) for grid in grids)
            for block1, block2 in zip(self.dec_blocks, self.dec_blocks2):
                x, y = block1(x, y, rope_x, rope_y), block2(y, x, rope_y, rope_x)
                a.append(x), b.append(y)
            a[-1], b[-1] = self.dec_norm(x), self.dec_norm(y)
        with torch.autocast(view1.device.type, enabled=False):
            heads = self.downstream_head1, self.downstream_head2
            return tuple(head([t.float() for t in tokens], grid) for head, tokens, grid in zip(heads, layers, grids))


# What the code above computes, as the published constructor calls spell it.
TWO_VIEW_OPTIONS = {"head_type": "catmlp+dpt", "output_mode": "pts3d+desc24", "depth_mode": ("exp", -math.inf, math.inf),
                    "conf_mode": ("exp", 1, math.inf), "desc_conf_mode": ("exp", 0, math.inf), "two_confs": True, "pos_embed": "RoPE100"}


def parse_call(text):
    """The keyword arguments of a constructor call with literal values (and inf), read and not evaluated. ValueError if it is anything else."""
    class Infinity(ast.NodeTransformer):
        def visit_Name(self, node):
            return ast.Constant(math.inf) if node.id == "inf" else node
    try:
        call = Infinity().visit(ast.parse(text.strip(), mode="eval").body)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"not a constructor call: {text[:80]}")


def two_view_layout(model):
    """The state dict of a TwoView on a DUNE encoder as the published files lay it out, with the encoder in it."""
    rename = lambda k: k.replace("encoder.", "dune_backbone.", 1) if k.startswith("encoder.") else k if k.startswith("norm.") else f"mast3r.{k}"
    return {"model": {rename(k): v for k, v in model.state_dict().items()}}


def load_two_view(weights=None, device="cpu", encoder=None):
    """TwoView in eval mode, every size read off the tensors.

    weights  a published MASt3R or DUNE-MASt3R file, one of this class's own, a name of TWO_VIEW (downloaded), None: "dune"
    encoder  the DUNE encoder's file, for a DUNE-MASt3R file that does not hold it; None: the published one that the file names
    Raises Oops for a file that is missing, unreadable or of another architecture (naming the tensor or the option).
    """
    path = str(weights or "dune")
    path = fetch(TWO_VIEW[path]) if path in TWO_VIEW and not os.path.exists(path) else path
    file = read_checkpoint(path)
    state = file.get("model") if isinstance(file, dict) else None
    if not isinstance(state, dict) or not any(k.endswith("decoder_embed.weight") for k in state):
        raise Oops(f"{path} holds no two-view model: neither MASt3R's nor DUNE-MASt3R's decoder is in it")
    if "mast3r_model_str" in file:
        try:
            options = parse_call(file["mast3r_model_str"])
        except ValueError as error:
            raise Oops(f"{path}: cannot read its mast3r_model_str ({error})") from None
        for key, value in TWO_VIEW_OPTIONS.items():
            if options.get(key, value) != value:
                raise Oops(f"{path} is another architecture: {key} is {options[key]!r}, expected {value!r}")

    if "mast3r.decoder_embed.weight" in state:  # the DUNE encoder is a file of its own, what is left of MASt3R's is idle
        own = plain_keys({k[len("dune_backbone."):]: v for k, v in state.items() if k.startswith("dune_backbone.")})
        vit = load_strictly(vit_from_state(own, path), own, path) if own else load_encoder(
            encoder or re.sub("_encoder$", "", str(file.get("dune_backbone_name")).replace("_14_", "14_")), encoder_only=True)
        rest = {re.sub(r"^mast3r\.", "", k): v for k, v in state.items() if k.startswith("norm.") or re.match(r"mast3r\.(dec|down)", k)}
        foreign = next((k for k in state if not re.match(r"(norm|dune_backbone|imagenet_(mean|std)$|mast3r\.(dec|down|mask_token$|patch_embed|enc_norm))", k)), None)
        if foreign:
            raise Oops(f"{path}: the file has the unknown tensor {foreign}; is it the right file for this model?")
    else:
        own = encoder_state("mast3r", file, path)
        vit = load_strictly(vit_from_state(own, path, position="rope"), own, path)
        rest = {k: v for k, v in state.items() if k != "mask_token" and not re.match(TEACHERS["mast3r"].prefix, k)}
    if not any(k.startswith("dec_blocks2.") for k in rest):
        rest.update({k.replace("dec_blocks.", "dec_blocks2."): v for k, v in rest.items() if k.startswith("dec_blocks.")})
    rest = {k.replace("dpt.scratch.", "dpt."): v for k, v in rest.items() if not re.search(r"scratch\.layer\d_rn\.", k)}
    size = {k: len(v) for k, v in rest.items() if k.startswith("downstream_head1.") and v.ndim > 0}
    try:
        head = "downstream_head1.{}.weight".format
        model = TwoView(vit, len(rest["decoder_embed.weight"]), 1 + max(int(k.split(".")[1]) for k in rest if k.startswith("dec_blocks.")),
                        maps=[size[head(f"dpt.act_postprocess.{j}.0")] for j in range(4)], features=size[head("dpt.layer_rn.0")],
                        norm="mast3r.decoder_embed.weight" in state, last=size[head("dpt.head.2")], hidden=size[head("head_local_features.fc1")],
                        descriptor=size[head("head_local_features.fc2")] // vit.patch_size**2 - 1)
    except (KeyError, ValueError, RuntimeError) as error:
        raise Oops(f"{path} is no two-view model of a known layout ({error})") from None
    return load_strictly(model, {**{f"encoder.{k}": v for k, v in vit.state_dict().items()}, **rest}, path).eval().to(device)
