"""The frozen teachers: one table, one loader, and the tiny specialists that stand in for three of them on a laptop.

    teacher = load_teacher("mast3r")              # downloads MASt3R once, keeps its encoder
    tokens = teacher(images, grid=(24, 24))       # {"cls": None, "patch": [B, 576, 1024]}, whatever its own patch size

Then how the specialists learn from labelled scenes, and MASt3R's two-view decoder, on its own encoder or on a DUNE.
"""

import argparse
import contextlib
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
import dune
from data import IMAGENET_MEAN, IMAGENET_STD, JOINTS, KINDS
from dune import Attention, Mlp, Oops, SIZES, ViT

# ---- The table -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Teacher:
    """One row of TEACHERS: where the weights are, how to find the encoder in the file, how it differs from a plain ViT."""
    url: str
    license: str
    inside: str = ""             # the key of the file that holds the state dict ("" = the file is it)
    prefix: str = ""             # regular expression: the encoder's keys begin so, which is cut off; others stay out
    rename: dict = field(default_factory=dict)  # regular expression -> replacement, towards DINOv2's key names
    ignore: str = r"$^"          # then: keys (regular expression) in the published file that are not the encoder's
    position: str = "offset"     # see ViT
    pool: str = ""               # what its class feature is: "" = its class token, or see FrozenTeacher
    distil_cls: bool = True      # whether its class token is worth learning: Multi-HMR never trained its own
    mean: tuple = IMAGENET_MEAN  # the normalisation that this teacher's images want
    std: tuple = IMAGENET_STD
    domain: str = "objects"      # what it knows, a name of data.SCENES
    generic: bool = False        # its data shows everything there is: with --sharing own+generic all teachers see it
    shape: dict = field(default_factory=dict)   # published size, for random weights; a file's is read off its tensors

META = "https://dl.fbaipublicfiles.com/"
DINOV2 = META + "dinov2/{0}/{0}{1}_pretrain.pth"
NAVER = "https://download.europe.naverlabs.com/ComputerVision/"
BYTE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/"
HALF = (0.5, 0.5, 0.5)
VIT_L14 = dict(patch_size=14, image_size=518, registers=0, **SIZES["large"])
VIT_B16 = dict(patch_size=16, image_size=224, registers=0, layer_scale=None, **SIZES["base"])

TEACHERS = {
    # DUNE's three: 2D, 3D scenes, 3D people. Its DINOv2 has positions as those without registers; the hub's is dinov2_reg.
    "dinov2": Teacher(DINOV2.format("dinov2_vitl14", "_reg4"), "Apache-2.0", generic=True,
                      shape=dict(VIT_L14, registers=4)),
    "mast3r": Teacher(NAVER + "MASt3R/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth", "CC BY-NC-SA 4.0",
                      domain="rooms", inside="model", prefix=r"enc_(?=blocks|norm)|(?=patch_embed\.)", position="rope",
                      mean=HALF, std=HALF, shape=dict(VIT_L14, patch_size=16, class_token=False, layer_scale=None)),
    "multihmr": Teacher(NAVER + "MultiHMR/multiHMR_672_L.pt", "CC BY-NC-SA 4.0", domain="people",
                        inside="model_state_dict", prefix=r"backbone\.encoder\.", distil_cls=False, shape=VIT_L14),
    # DINOv2 as the hub builds it, and smaller ones without registers
    "dinov2_reg": Teacher(DINOV2.format("dinov2_vitl14", "_reg4"), "Apache-2.0", generic=True, position="antialias",
                          shape=dict(VIT_L14, registers=4)),
    "dinov2_vits14": Teacher(DINOV2.format("dinov2_vits14", ""), "Apache-2.0", generic=True,
                             shape=dict(VIT_L14, **SIZES["small"])),
    "dinov2_vitb14": Teacher(DINOV2.format("dinov2_vitb14", ""), "Apache-2.0", generic=True,
                             shape=dict(VIT_L14, **SIZES["base"])),
    # UNIC's four, all ViT-B/16 at 224 px
    "dino": Teacher(META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "Apache-2.0", shape=VIT_B16),
    "ibot": Teacher(BYTE + "archive/2022/ibot/vitb_16_rand_mask/checkpoint_teacher.pth", "Apache-2.0",
                    inside="state_dict", shape=VIT_B16),
    "deit3": Teacher(META + "deit/deit_3_base_224_1k.pth", "Apache-2.0", inside="model", ignore=r"head\.",
                     rename={r"\.gamma_(\d)$": r".ls\1.gamma"}, shape=dict(VIT_B16, layer_scale=1e-4)),
    "dbotft": Teacher(BYTE + "mmodal/dbot/84.5_dbot_base_finetune.pth", "CC BY-NC 4.0", inside="model",
                      rename={r"^fc_norm\.": "norm."}, ignore=r"head\.", pool="mean", shape=VIT_B16),
}

# ---- The frozen teacher ----------------------------------------------------------------------------------------------

class FrozenTeacher(nn.Module):
    """A teacher's encoder behind one interface: ImageNet-normalised images in, tokens on the asked grid out, no gradient.

    pool "mean": the class feature is norm(mean of the patch tokens), and the patch tokens stay without norm (dBOT).
    dtype bf16: the weights of matrix products are bf16 and run under autocast; all else, what goes from block to block
    too, is fp32. The features have this dtype.
    """

    def __init__(self, name, vit, dtype=torch.float32):
        super().__init__()
        row = TEACHERS[name]
        self.name = name
        self.vit = vit
        self.pool = row.pool
        self.dtype = dtype
        self.dim = vit.embed_dim
        self.patch_size = vit.patch_size
        self.gives_cls = bool(row.pool) or vit.cls_token is not None
        self.has_cls = self.gives_cls and row.distil_cls  # whether a student learns a class token from it
        self.renormalise = Renormalise(IMAGENET_MEAN, IMAGENET_STD, row.mean, row.std)
        self.eval().requires_grad_(False)
        if dtype != torch.float32:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)

    @torch.no_grad()
    def forward(self, images, grid=None):
        """images [B, 3, H, W], ImageNet-normalised -> {"cls": [B, D] or None, "patch": [B, rows*cols, D]}.

        grid (rows, cols): the token grid that is wanted; images of another size are resized to it (bicubic). None: as the
        images are. No images: empty features.
        """
        if len(images) == 0:
            rows, cols = grid or [side // self.patch_size for side in images.shape[-2:]]
            cls = images.new_empty(0, self.dim, dtype=self.dtype) if self.gives_cls else None
            return {"cls": cls, "patch": images.new_empty(0, rows * cols, self.dim, dtype=self.dtype)}
        autocast = contextlib.nullcontext()
        if self.dtype != torch.float32:
            autocast = torch.autocast(images.device.type, self.dtype)
        with autocast:
            features = self.features(images, grid)
        return {kind: None if x is None else x.to(self.dtype) for kind, x in features.items()}

    def features(self, images, grid=None):
        """forward(), with gradient: for a specialist that still learns."""
        if grid is not None:
            size = tuple(n * self.patch_size for n in grid)
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bicubic", align_corners=True)
        features = self.vit(self.renormalise(images), norm=self.pool != "mean")
        if self.pool == "mean":
            features["cls"] = self.vit.norm(features["patch"].mean(1))
        return features

class Renormalise(nn.Module):
    """Images [B, 3, H, W] from one normalisation into another, as one multiplication and one addition, in fp32."""

    def __init__(self, mean, std, new_mean, new_std):
        super().__init__()
        gain = [s / t for s, t in zip(std, new_std)]
        offset = [(m - n) / t for m, n, t in zip(mean, new_mean, new_std)]
        # "cpu": real numbers also where a model is made without content
        self.register_buffer("gain", torch.tensor(gain, device="cpu")[:, None, None], persistent=False)
        self.register_buffer("offset", torch.tensor(offset, device="cpu")[:, None, None], persistent=False)

    def forward(self, images):
        return images * self.gain + self.offset

def load_teacher(name, weights=None, device="cpu", dtype=torch.float32):
    """A frozen teacher (FrozenTeacher), its size read off the weights.

    name     a row of TEACHERS
    weights  a file in the published layout; "random" for random weights of the published size; None: the published
             file, downloaded
    Raises Oops for an unknown name and for a file that is missing, unreadable or of another layout (naming the tensor).
    """
    if name not in TEACHERS:
        raise Oops(f"unknown teacher '{name}'; there are: {', '.join(TEACHERS)}")
    row = TEACHERS[name]
    if weights == "random":
        vit = ViT(position=row.position, **row.shape)
    else:
        path = weights or dune.fetch(row.url)
        state = encoder_state(name, dune.read_checkpoint(path), path)
        vit = dune.load_strictly(dune.vit_from_state(state, path, position=row.position), state, path)
    return FrozenTeacher(name, vit, dtype).to(device)

def encoder_state(name, file, path):
    """The encoder's tensors of a published file, under ViT's key names."""
    row = TEACHERS[name]
    part = dune.entry(file, row.inside, dict, path) if row.inside else file
    state = {}
    for key, value in part.items() if isinstance(part, dict) else ():
        found = re.match(row.prefix, str(key))
        if found and torch.is_tensor(value):
            key = key[found.end():]
            for old, new in row.rename.items():
                key = re.sub(old, new, key)
            if not re.match(row.ignore, key):
                state[key] = value
    if not state:
        raise Oops(f"{path} is no file of teacher {name}: nothing in it belongs to the encoder")
    state = dune.plain_keys(state)
    if "cls_token" in state and "pos_embed" in state and state["pos_embed"].ndim == 3:
        patches = state["pos_embed"].shape[1]
        if math.isqrt(patches)**2 == patches:  # DeiT-III's are of patches only: its class token has none, i.e. a zero
            state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state

# ---- Training of small things ----------------------------------------------------------------------------------------

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

# ---- Probes ----------------------------------------------------------------------------------------------------------
# What linear layers can read off features on the procedural scenes. With a frozen encoder this measures it (eval.py
# study); with an encoder that learns along it makes a tiny specialist. Each domain's probe has
#   targets(scenes)           labels on the token grid from a batch of scenes (see data.py), on the scenes' device
#   forward(features, targets)  the predictions that belong to them, from {"cls": [B, D] or None, "patch": [B, N, D]}
#   loss(out, targets)        a scalar
#   metrics(out, targets)     {name: number}

def Probe(domain, dim, grid):
    """The linear heads for one domain, for features with `dim` channels on a grid (rows, cols) of tokens."""
    return PROBES[domain](dim, grid)

class ObjectsProbe(nn.Module):
    """The kind of the object (from the class token, or the mean patch), and each patch's kind or background."""

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.patch = nn.Linear(dim, len(KINDS) + 1)
        self.kind = nn.Linear(dim, len(KINDS))

    def targets(self, scenes):
        cover = F.adaptive_avg_pool2d(scenes["mask"].float()[:, None], self.grid).flatten(1)
        return {"kind": scenes["label"], "patch": torch.where(cover > 0.5, scenes["label"][:, None] + 1, 0)}

    def forward(self, features, targets):
        whole = features["patch"].mean(1) if features["cls"] is None else features["cls"]
        return {"kind": self.kind(whole), "patch": self.patch(features["patch"])}

    def loss(self, out, targets):
        patch = F.cross_entropy(out["patch"].transpose(1, 2), targets["patch"])
        return F.cross_entropy(out["kind"], targets["kind"]) + patch

    def metrics(self, out, targets):
        """Accuracy of the kind and mean IoU of the patches over the kinds that there are, in %."""
        guess, truth = out["patch"].argmax(-1), targets["patch"]
        overlaps = []
        for kind in truth.unique():
            both = (guess == kind) & (truth == kind)
            either = (guess == kind) | (truth == kind)
            overlaps.append(both.sum() / either.sum())
        right = out["kind"].argmax(-1) == targets["kind"]
        return {"accuracy": 100 * right.float().mean().item(), "mIoU": 100 * torch.stack(overlaps).mean().item()}

class RoomsProbe(nn.Module):
    """Each patch's log depth and surface normal."""

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.patch = nn.Linear(dim, 4)

    def targets(self, scenes):
        maps = torch.cat([scenes["depth"].log()[:, None], scenes["normals"].permute(0, 3, 1, 2)], 1)
        depth, normals = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT.split([1, 3], -1)
        return {"depth": depth, "normals": F.normalize(normals, dim=-1)}

    def forward(self, features, targets):
        depth, normals = self.patch(features["patch"]).split([1, 3], -1)
        return {"depth": depth, "normals": F.normalize(normals, dim=-1)}

    def loss(self, out, targets):
        alike = (out["normals"] * targets["normals"]).sum(-1).mean()
        return (out["depth"] - targets["depth"]).abs().mean() * 2 + 1 - alike

    def metrics(self, out, targets):
        """RMSE of the depth in metres, delta1 (within a factor of 1.25) in %, mean error of the normals in degrees."""
        ratio = (out["depth"] - targets["depth"]).abs()
        metres = out["depth"].exp() - targets["depth"].exp()
        angle = (out["normals"] * targets["normals"]).sum(-1).clamp(-1, 1).acos()
        return {"depth RMSE": metres.square().mean().sqrt().item(),
                "delta1": 100 * (ratio < 0.2231).float().mean().item(),  # log 1.25
                "normals": torch.rad2deg(angle).mean().item()}

class PeopleProbe(nn.Module):
    """For each joint: which patches hold one, where in the image (fractions), where in 3D (metres from the pelvis)."""

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.patch = nn.Linear(dim, 6 * len(JOINTS))

    def targets(self, scenes):
        rows, cols = self.grid
        joints = scenes["joints2d"]  # [n, figures, joints, 2]
        size = torch.tensor([cols, rows], device=joints.device)
        inside = scenes["visible"][..., None] & ((joints >= 0) & (joints < 1)).all(-1)
        metres = scenes["joints3d"] - scenes["joints3d"][:, :, 2:3]
        middle = centres(rows, cols, joints.device)
        # For every patch and kind of joint the nearest one: a soft spot around it (1 at it, 0.6 a patch away), and where
        # it is in 2D and 3D.
        gap = (joints[:, :, None] - middle[:, None]) * size
        spots = torch.exp(-gap.square().sum(-1) / 2) * inside[:, :, None]
        near, figure = spots.max(1)
        image = torch.arange(len(joints), device=joints.device)[:, None, None]
        joint = torch.arange(len(JOINTS), device=joints.device)
        place, xyz = joints[image, figure, joint], metres[image, figure, joint]
        image, figure, joint = inside.nonzero(as_tuple=True)
        truth = joints[image, figure, joint]
        cell = (truth * size).long()
        at = torch.stack([image, cell[:, 1] * cols + cell[:, 0], joint])
        return {"near": near, "place": place, "xyz": xyz, "centres": middle,
                "truth": truth, "metres": metres[image, figure, joint], "at": at}

    def forward(self, features, targets):
        heads = self.patch(features["patch"]).unflatten(-1, (len(JOINTS), 6))
        near, offset, xyz = heads.split([1, 2, 3], -1)
        return {"near": near[..., 0], "place": offset + targets["centres"][:, None], "xyz": xyz}

    def loss(self, out, targets):
        weight = targets["near"] * (targets["near"] > 0.3)
        apart = {k: ((out[k] - targets[k]).abs().mean(-1) * weight).sum() / weight.sum() for k in ("place", "xyz")}
        rare = torch.tensor(3.0, device=weight.device)
        spots = F.binary_cross_entropy_with_logits(out["near"], targets["near"], pos_weight=rare)
        return 10 * spots + 10 * apart["place"] + 3 * apart["xyz"]

    def metrics(self, out, targets):
        """Joints that one of the three best guesses of their kind finds to 5 % of the side, in %; 3D error in cm."""
        image, patch, joint = targets["at"]
        best = out["near"].topk(3, dim=1).indices  # [n, 3, joints]
        guess = out["place"].gather(1, best[..., None].expand(-1, -1, -1, 2))[image, :, joint]
        found = (guess - targets["truth"][:, None]).norm(dim=-1).amin(1) < 0.05
        apart = (out["xyz"][image, patch, joint] - targets["metres"]).norm(dim=-1)
        return {"joints 2D": 100 * found.float().mean().item(), "joints 3D": 100 * apart.mean().item()}

PROBES = {"objects": ObjectsProbe, "rooms": RoomsProbe, "people": PeopleProbe}

def centres(rows, cols, device=None):
    """[rows * cols, 2]: the middle of each cell of a grid as (x, y) fractions of the sides."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(cols, device=device) + 0.5) / cols
    return torch.cartesian_prod(y, x).flip(-1)

# ---- Pairs of views --------------------------------------------------------------------------------------------------
# A pair: image uint8 [2, 3, S, S], depth [2, S, S] metres along z (0: unknown), K [2, 3, 3] pixels (centres at integer
# + 0.5), pose [2, 4, 4] camera to world. Camera frame: x right, y down, z forward.

def room_pairs(start, count, size):
    """`count` procedural rooms, each seen by both of its cameras, as one batch of pairs."""
    views = [data.labelled_scenes("rooms", start, count, size, view=view) for view in (0, 1)]
    return {key: torch.stack([view[key] for view in views], 1) for key in views[0]}

def pair_geometry(pairs):
    """What a batch of pairs knows: (points, known, place, seen).

    points [B, 2, S, S, 3]  both views' points in view 1's frame;  known [B, 2, S, S] bool  which of them are measured
    place [B, S, S, 2]      where in view 2 (pixels) view 1's points are
    seen [B, S, S] bool     which of these view 2 sees: before it, inside its image, not hidden
    """
    depth = pairs["depth"]
    size = depth.shape[-1]
    pixels = F.pad(centres(size, size, depth.device) * size, (0, 1), value=1.0).view(size, size, 3)
    rays = pixels @ pairs["K"].inverse().mT[:, :, None]
    move = pairs["pose"][:, :1].inverse() @ pairs["pose"]  # [B, 2, 4, 4]: from each view's frame into view 1's
    points = (rays * depth[..., None]) @ move[:, :, None, :3, :3].mT + move[:, :, None, None, :3, 3]
    back = move[:, 1].inverse()[:, None]
    there = points[:, 0] @ back[..., :3, :3].mT + back[:, :, None, :3, 3]
    z = there[..., 2]
    place = ((there @ pairs["K"][:, 1, None].mT)[..., :2] / z[..., None].clamp(min=1e-6)).nan_to_num(-1)
    at = place.clamp(0, size - 1).long()
    surface = depth[:, 1].flatten(1).gather(1, (at[..., 1] * size + at[..., 0]).flatten(1)).view_as(z)
    inside = (z > 0) & ((place >= 0) & (place < size)).all(-1)
    seen = inside & (depth[:, 0] > 0) & (surface > 0) & ((surface - z).abs() < 0.05 * z)
    return points, depth > 0, place, seen

def patch_pairs(pairs, grid):
    """For the middle of each patch of view 1: which patch of view 2 shows it, int64 [B, rows*cols]; whether any does."""
    rows, cols = grid
    size = pairs["depth"].shape[-1]
    _, _, place, seen = pair_geometry(pairs)
    y, x = [torch.arange(n, device=place.device) * size // n + size // (2 * n) for n in grid]
    cell = place[:, y][:, :, x] / size * torch.tensor([cols, rows], device=place.device)
    col, row = cell.long().clamp(min=0).unbind(-1)
    own = row.clamp(max=rows - 1) * cols + col.clamp(max=cols - 1)
    return own.flatten(1), seen[:, y][:, :, x].flatten(1)

def contrast(one, two, own, temperature=0.07):
    """InfoNCE both ways, [B, n]: row i of one [B, n, D] belongs to row own[i] of two [B, m, D]; own int64 [B, n]."""
    similar = F.normalize(one, dim=-1) @ F.normalize(two, dim=-1).mT / temperature
    right = similar.gather(2, own[..., None])[..., 0]
    return (similar.logsumexp(2) + similar.logsumexp(1).gather(1, own)) / 2 - right

# ---- The tiny specialists --------------------------------------------------------------------------------------------
# Stand-ins for the three teachers that differ as they do (class token and registers or not, RoPE or learned positions,
# patch 16 or 14), each trained on its own domain only, from labels. Their files have the published layouts: whatever
# comes after this is the same code.

TINY = dict(image_size=112, embed_dim=192, depth=3, num_heads=3, layer_scale=None)
SPECIALISTS = {
    "dinov2": dict(shape=dict(TINY, patch_size=14, registers=4), lr=1e-3, scenes=6000, passes=1),
    "mast3r": dict(shape=dict(TINY, patch_size=16, registers=0, class_token=False), lr=1e-3, scenes=4000, passes=1),
    "multihmr": dict(shape=dict(TINY, patch_size=14, registers=0), lr=2e-3, scenes=3900, passes=2),
}
TINY_GRID = (8, 8)
MATCHING = 1.0  # the weight of the matching loss beside that of depth and normals
FINE = 2        # how many descriptors lie along a patch's side

def prepare_specialists(names):
    """Train the tiny specialists that are not in the cache yet: about half a minute each on two cores."""
    for name in names:
        path = specialist_path(name)
        if not os.path.exists(path):
            make_specialist(name, specialist_scenes(name, SPECIALISTS[name]["scenes"]), path)

def specialist_path(name):
    """Where a tiny specialist lies once it is made. Its name tells the recipe and how its scenes are drawn and labelled:
    after a change it is made anew."""
    key = hashlib.sha1(repr((SPECIALISTS[name], TEACHERS[name].position, MATCHING, FINE)).encode())
    for label in specialist_scenes(name, 2).values():
        key.update(label.numpy().tobytes())
    return os.path.join(data.cache_folder(), f"tiny-{name}-{key.hexdigest()[:8]}.pth")

def specialist_scenes(name, count):
    """The first `count` images that a specialist learns from and their labels, {label: tensor [count, ...]}; of rooms
    pairs."""
    if TEACHERS[name].domain == "rooms":
        return room_pairs(0, count // 2, TINY["image_size"])
    return data.labelled_scenes(TEACHERS[name].domain, 0, count, TINY["image_size"])

def make_specialist(name, scenes, path, batch=16, seed=0):
    """Train a tiny specialist on its own domain, from labels, and write it to `path` in the published layout.

    scenes: {label: tensor [n, ...]}, "image" uint8 [n, 3, S, S] and the labels that its probe reads; of rooms pairs
    [n, 2, ...]: like MASt3R itself the tiny one also learns which places of two views are the same, finer than a patch.
    """
    recipe, domain = SPECIALISTS[name], TEACHERS[name].domain
    torch.manual_seed(seed)
    vit = ViT(position=TEACHERS[name].position, **recipe["shape"])
    teacher = FrozenTeacher(name, vit).train().requires_grad_(True)
    probe = Probe(domain, vit.embed_dim, TINY_GRID)
    parameters = [*vit.parameters(), *probe.parameters()]
    pairs = domain == "rooms"
    if pairs:
        describe = nn.Linear(vit.embed_dim, FINE**2 * 16, bias=False)
        parameters += describe.parameters()
        batch = batch // 2
    order = torch.cat([torch.randperm(len(scenes["image"])) for _ in range(recipe["passes"])])

    def loss(step):
        rows = order[step * batch:(step + 1) * batch]
        part = {key: value[rows] for key, value in scenes.items()}
        single = {key: value.flatten(0, 1) for key, value in part.items()} if pairs else part
        targets = probe.targets(single)
        with torch.autocast("cpu", torch.bfloat16, enabled=dune.fast_bf16("cpu")):
            features = teacher.features(data.normalise(single["image"]), TINY_GRID)
            out = probe(features, targets)
        total = probe.loss({key: value.float() for key, value in out.items()}, targets)
        if pairs:
            fine = tuple(FINE * n for n in TINY_GRID)
            own, seen = patch_pairs(part, fine)
            maps = describe(features["patch"].float()).mT.unflatten(2, TINY_GRID)
            one, two = F.pixel_shuffle(maps, FINE).flatten(2).mT.unflatten(0, (-1, 2)).unbind(1)
            total = total + MATCHING * contrast(one, two, own)[seen].mean()
        return total
    fit(parameters, loss, len(order) // batch, recipe["lr"], weight_decay=0.03, betas=(0.9, 0.99), clip=1.0,
        what=f"tiny {name}: learns {domain}")
    with dune.writing(path) as file:
        torch.save(published_layout(name, vit.state_dict()), file)

def published_layout(name, state):
    """A specialist's state dict as the published file of that teacher would hold it."""
    if name == "mast3r":
        state = {re.sub(r"^(blocks|norm)\.", r"enc_\1.", key): value for key, value in state.items()}
        return {"args": argparse.Namespace(), "model": state}
    if name == "multihmr":
        return {"model_state_dict": {f"backbone.encoder.{key}": value for key, value in state.items()}}
    return state

# ---- Two photographs to 3D -------------------------------------------------------------------------------------------
# MASt3R's two-view decoder and heads (arXiv 2406.09756), on its own encoder or on a frozen DUNE (DUNE section 4). Modules
# are named as the published files name them.

class TwoView(nn.Module):
    """MASt3R on a frozen encoder: its own, or a DUNE.

    dim, depth       of the decoder: `depth` pairs of blocks, heads of 64 channels
    patch            pixels that the heads put in the place of a token; images are resized if the encoder's patch is another
    norm             whether a LayerNorm of the decoder's stands for the encoder's last one (DUNE-MASt3R: yes; MASt3R: no)
    head_sizes       maps, features, last, hidden, descriptor: see DPT and TwoViewHead
    """

    def __init__(self, encoder, dim=768, depth=12, patch=None, norm=True, **head_sizes):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.patch = patch or encoder.patch_size
        self.norm = nn.LayerNorm(encoder.embed_dim) if norm else None
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        blocks = [nn.ModuleList(DecoderBlock(dim, dim // 64) for _ in range(depth)) for view in (1, 2)]
        self.dec_blocks, self.dec_blocks2 = blocks
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)
        heads = [TwoViewHead(encoder.embed_dim, dim, depth, self.patch, **head_sizes) for view in (1, 2)]
        self.downstream_head1, self.downstream_head2 = heads
        wanted = (HALF, HALF) if encoder.position == "rope" else (IMAGENET_MEAN, IMAGENET_STD)
        self.renormalise = Renormalise(HALF, HALF, *wanted)

    def forward(self, view1, view2):
        """Two image batches [B, 3, H, W] in MASt3R's normalisation (2 x - 1 of images in 0..1), the two of any size -> two
        dictionaries.

        pts3d [B, H, W, 3] metres, both views' in view 1's camera frame (x right, y down, z forward); conf [B, H, W] > 1,
        the points' confidence; desc [B, H, W, 24] unit descriptors; desc_conf [B, H, W] > 0, theirs. fp32; on a GPU all
        but the heads runs in bf16. Raises Oops if a side is no multiple of the patch size.
        """
        device = view1.device
        grids = [self.grid_of(view) for view in (view1, view2)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            layers1 = [self.encode(view1, grids[0])]
            layers2 = [self.encode(view2, grids[1])]
            x, y = self.decoder_embed(layers1[0]), self.decoder_embed(layers2[0])
            rope_x, rope_y = [dune.rope_table(*grid, 0, 64, device) for grid in grids]
            for block1, block2 in zip(self.dec_blocks, self.dec_blocks2):
                x, y = block1(x, y, rope_x, rope_y), block2(y, x, rope_y, rope_x)  # both read what was before
                layers1.append(x)
                layers2.append(y)
            layers1[-1] = self.dec_norm(x)
            layers2[-1] = self.dec_norm(y)
        with torch.autocast(device.type, enabled=False):
            return (self.downstream_head1([t.float() for t in layers1], grids[0]),
                    self.downstream_head2([t.float() for t in layers2], grids[1]))

    def grid_of(self, view):
        height, width = view.shape[-2:]
        if height % self.patch or width % self.patch:
            raise Oops(f"image size {height}x{width} is no multiple of the patch size {self.patch}")
        return height // self.patch, width // self.patch

    def encode(self, images, grid):
        """[B, 3, H, W] in MASt3R's normalisation -> the tokens that the decoder reads, [B, rows*cols, D]."""
        size = tuple(n * self.encoder.patch_size for n in grid)
        with torch.no_grad():
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bicubic", align_corners=True)
            tokens = self.encoder(self.renormalise(images), norm=self.norm is None)["patch"]
        return tokens if self.norm is None else self.norm(tokens)

class DecoderBlock(nn.Module):
    """Block that looks at the other view y between attention and MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = [nn.LayerNorm(dim, eps=1e-6) for _ in range(4)]
        self.attn = Attention(dim, heads)
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, y, rope_x, rope_y):
        x = x + self.attn(self.norm1(x), rope_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rope_x, rope_y)
        return x + self.mlp(self.norm3(x))

class CrossAttention(nn.Module):
    """Queries from one view, keys and values from the other, each turned by its own positions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.projq, self.projk, self.projv, self.proj = [nn.Linear(dim, dim) for _ in range(4)]

    def forward(self, x, y, rope_x, rope_y):
        by_head = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.projq(x), self.projk(y), self.projv(y))]
        q, k, v = by_head
        x = dune.attend(dune.rotate(q, rope_x), dune.rotate(k, rope_y), v)
        return self.proj(x.transpose(1, 2).flatten(2))

class TwoViewHead(nn.Module):
    """One view's outputs, per pixel, from [encoder tokens, output of each decoder block]; see TwoView."""

    def __init__(self, encoder_dim, dim, depth, patch, hidden=None, descriptor=24, **dpt_sizes):
        super().__init__()
        self.patch = patch
        self.hooks = (0, depth // 2, depth * 3 // 4, depth)
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

class DPT(nn.Module):
    """Dense prediction (Ranftl et al. 2021): four layers of tokens -> [B, 4, rows*patch, cols*patch].

    dims: channels of the four layers' tokens; maps: their channels as maps at 4, 2, 1 and 1/2 times the token grid.
    """

    def __init__(self, dims, patch, maps=(96, 192, 384, 768), features=256, last=128):
        super().__init__()
        self.patch = patch
        resize = [[nn.ConvTranspose2d(maps[0], maps[0], 4, 4)], [nn.ConvTranspose2d(maps[1], maps[1], 2, 2)], [],
                  [nn.Conv2d(maps[3], maps[3], 3, 2, 1)]]
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, channels, 1), *then) for dim, channels, then in zip(dims, maps, resize))
        self.layer_rn = nn.ModuleList(nn.Conv2d(channels, features, 3, padding=1, bias=False) for channels in maps)
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = [Fusion(features) for _ in range(4)]
        self.head = nn.ModuleDict({"0": nn.Conv2d(features, features // 2, 3, padding=1),
                                   "2": nn.Conv2d(features // 2, last, 3, padding=1),
                                   "4": nn.Conv2d(last, 4, 1)})

    def forward(self, layers, grid):
        maps = []
        for x, postprocess, rn in zip(layers, self.act_postprocess, self.layer_rn):
            maps.append(rn(postprocess(x.transpose(1, 2).unflatten(2, grid))))
        x = self.refinenet4(maps[3])
        x = self.refinenet3(x, maps[2])
        x = self.refinenet2(x, maps[1])
        x = self.head["0"](self.refinenet1(x, maps[0]))
        x = F.interpolate(x, tuple(n * self.patch for n in grid), mode="bilinear", align_corners=True)
        return self.head["4"](F.relu(self.head["2"](x)))

class Fusion(nn.Module):
    """Joins a finer map (skip) to the coarser ones and doubles the resolution."""

    def __init__(self, dim):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        self.resConfUnit1 = ResidualConv(dim)  # the coarsest has no skip: its first is idle
        self.resConfUnit2 = ResidualConv(dim)

    def forward(self, x, skip=None):
        if skip is not None:
            x = x[..., :skip.shape[-2], :skip.shape[-1]] + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)

class ResidualConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = [nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2)]

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))

# ---- The two-view model's files --------------------------------------------------------------------------------------

TWO_VIEW = {"dune": "https://download.europe.naverlabs.com/dune/dunemast3r_cvpr25_vitbase.pth",
            "dune_small": "https://download.europe.naverlabs.com/dune/dunemast3r_cvpr25_vitsmall.pth",
            "mast3r": TEACHERS["mast3r"].url}

def load_two_view(weights=None, device="cpu", encoder=None):
    """TwoView in eval mode, every size read off the tensors.

    weights  a published MASt3R or DUNE-MASt3R file, one of two_view_layout, a name of TWO_VIEW (downloaded), None: "dune"
    encoder  the DUNE encoder's file, for a DUNE-MASt3R file that does not hold it; None: the published one that it names
    Raises Oops for a file that is missing, unreadable or of another architecture (naming the tensor or the option).
    """
    path = str(weights or "dune")
    if path in TWO_VIEW and not os.path.exists(path):
        path = dune.fetch(TWO_VIEW[path])
    file = dune.read_checkpoint(path)
    state = dune.entry(file, "model", dict, path)
    check_options(file, path)
    on_dune = "mast3r.decoder_embed.weight" in state
    if on_dune:
        vit, encoder_weights = dune_encoder(file, path, encoder)
        idle = r"dune_backbone\.|imagenet_(mean|std)$|mast3r\.(mask_token$|patch_embed\.|enc_norm\.)"
    elif "decoder_embed.weight" in state:
        encoder_weights = encoder_state("mast3r", file, path)
        vit = dune.vit_from_state(encoder_weights, path, position="rope")
        idle = r"mask_token$|patch_embed\.|enc_(blocks|norm)\."
    else:
        raise Oops(f"{path} holds no two-view model: neither MASt3R's nor DUNE-MASt3R's decoder is in it")
    rest = {}
    for key, value in state.items():
        if not re.match(idle, key) and not re.search(r"scratch\.layer\d_rn\.", key):  # of what is there twice: layer_rn
            rest[key.removeprefix("mast3r.").replace("dpt.scratch.", "dpt.")] = value
    if not any(key.startswith("dec_blocks2.") for key in rest):  # one set of blocks for both views
        shared = dune.below(rest, "dec_blocks.")
        rest.update({f"dec_blocks2.{key}": value for key, value in shared.items()})
    sizes = two_view_sizes(rest, vit.patch_size, path)
    with torch.device("meta"):
        model = TwoView(vit, norm=on_dune, **sizes)
    rest.update({f"encoder.{key}": value for key, value in encoder_weights.items()})
    return dune.load_strictly(model, rest, path).eval().to(device)

def two_view_layout(model):
    """The file of a TwoView on a DUNE encoder as the published ones are laid out, with the encoder in it."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("encoder."):
            key = key.replace("encoder.", "dune_backbone.", 1)
        elif not key.startswith("norm."):
            key = f"mast3r.{key}"
        state[key] = value
    return {"model": state}

def dune_encoder(file, path, encoder):
    """(ViT, its weights) of a DUNE-MASt3R file: from itself, from the file `encoder`, or from the one that it names."""
    weights = dune.plain_keys(dune.below(file["model"], "dune_backbone."))
    if weights:
        return dune.vit_from_state(weights, path), weights
    if encoder is None:
        name = dune.entry(file, "dune_backbone_name", str, path)
        encoder = name.removesuffix("_encoder").replace("_14_", "14_")
    vit = dune.load(encoder, encoder_only=True)
    return vit, vit.state_dict()

def two_view_sizes(state, patch, path):
    """TwoView's sizes, read off its tensors."""
    shapes = {key: value.shape for key, value in state.items() if torch.is_tensor(value)}

    def channels(key):
        return shapes[f"downstream_head1.{key}.weight"][0]
    try:
        sizes = {"dim": shapes["decoder_embed.weight"][0],
                 "depth": len({key.split(".")[1] for key in state if key.startswith("dec_blocks.")}),
                 "features": channels("dpt.layer_rn.0"),
                 "last": channels("dpt.head.2"),
                 "hidden": channels("head_local_features.fc1"),
                 "descriptor": channels("head_local_features.fc2") // patch**2 - 1}
        maps = [channels(f"dpt.act_postprocess.{j}.0") for j in range(4)]
        if sizes["dim"] % 64 or min(*sizes.values(), *maps) < 1:
            raise ValueError
    except (KeyError, IndexError, ValueError):
        raise Oops(f"{path} holds no two-view model of a known layout: parts of its heads are missing or odd") from None
    return {"maps": maps, **sizes}

# What the code above computes, as the published constructor calls spell it, without spaces.
TWO_VIEW_OPTIONS = {"head_type": "'catmlp+dpt'", "output_mode": "'pts3d+desc24'", "depth_mode": "('exp',-inf,inf)",
                    "conf_mode": "('exp',1,inf)", "desc_conf_mode": "('exp',0,inf)", "two_confs": "True",
                    "pos_embed": "'RoPE100'"}

def check_options(file, path):
    """Oops if a DUNE-MASt3R file's constructor call asks for something else than TwoView is. It is compared, never run."""
    text = dune.entry(file, "mast3r_model_str", str, path, "AsymmetricMASt3R()")
    call = re.fullmatch(r"\w+\((.*)\)", re.sub(r"\s", "", text).replace('"', "'"))
    if not call:
        raise Oops(f"{path}: cannot read its mast3r_model_str, {text[:80]!r}")
    for key, value in re.findall(r"(\w+)=(\([^()]*\)|[^,]*)", call[1]):
        if value != TWO_VIEW_OPTIONS.get(key, value):
            raise Oops(f"{path} is another architecture: {key} is {value:.80}, expected {TWO_VIEW_OPTIONS[key]}")
