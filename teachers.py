"""The frozen teachers: one table, one loader, and the tiny specialists that stand in for three of them on a laptop.

    teacher = load_teacher("mast3r")              # downloads MASt3R once, keeps its encoder
    tokens = teacher(images, grid=(24, 24))       # {"cls": None, "patch": [B, 576, 1024]}, whatever its own patch size

Then MASt3R's two-view decoder, on its own encoder or on a DUNE, and a head for people on any encoder.
`python teachers.py` prints the table.
"""

import hashlib
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

IMAGENET = IMAGENET_MEAN, IMAGENET_STD  # two normalisations of images
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

@dataclass(frozen=True)
class Teacher:
    """One row of TEACHERS: where its weights are, where the encoder is in the file, how it differs from a plain ViT."""
    url: str                     # of its file; of a gated one: of the page to ask for it
    license: str
    gated: str = ""              # what to ask for there
    inside: str = ""             # the key of the file that holds the state dict ("" = the file is it)
    prefix: str = ""             # regular expression: the encoder's keys begin so, which is cut off; others are not its
    rename: dict = field(default_factory=dict)  # regular expression -> replacement, towards DINOv2's key names
    layout: str = ""             # what renaming cannot do: a name of LAYOUTS
    vit: dict = field(default_factory=dict)     # options of ViT that the tensors do not show: position, eps, gelu
    pool: str = ""               # what its class feature is: "" = its class token, or see FrozenTeacher
    distil_cls: bool = True      # whether its class token is worth learning: Multi-HMR never trained its own
    images: tuple = IMAGENET     # (mean, std): the normalisation in which it wants them
    domain: str = "objects"      # what it knows, a name of data.SCENES
    generic: bool = False        # its data shows everything there is: with --sharing own+generic all teachers see it
    shape: dict = field(default_factory=dict)   # published size, for random weights; a file's is read off its tensors

META = "https://dl.fbaipublicfiles.com/"
DINOV2 = META + "dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"
NAVER = "https://download.europe.naverlabs.com/ComputerVision/"
BYTE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/"
HUB = "https://huggingface.co/"
DEPTH = HUB + "depth-anything/Depth-Anything-V2-{}/resolve/main/depth_anything_v2_{}.pth"

# Published sizes, and what families have in common
S14, B14, L14 = [SIZES[size] | dict(patch_size=14, image_size=518, registers=0) for size in ("small", "base", "large")]
S16, B16, L16 = [vit | dict(patch_size=16, image_size=224, layer_scale=None) for vit in (S14, B14, L14)]
REGISTERS = dict(registers=4, layer_scale=1e-4)
CROCO = dict(license="CC BY-NC-SA 4.0", inside="model", prefix=r"enc_(?=blocks|norm)|(?=patch_embed\.)", domain="rooms",
             vit=dict(position="rope"), shape=L16 | dict(class_token=False))
OURS = dict(license="CC BY-NC-SA 4.0", inside="model", prefix=r"((module|_orig_mod)\.)*encoder\.")
DEPTH_ANY = dict(prefix=r"pretrained\.", distil_cls=False, domain="rooms")  # its head reads patches alone
SIGLIP = dict(license="Apache-2.0", layout="siglip", prefix=r"vision_model\.", pool="attention", generic=True,
              images=HALF, vit=dict(position="size", gelu="tanh"),
              rename={r"^embeddings\.patch_embedding\.": "patch_embed.proj.", r"^encoder\.layers\.": "blocks.",
                      r"^embeddings\.position_embedding\.weight$": "pos_embed", r"\.layer_norm(\d)\.": r".norm\1.",
                      r"\.self_attn\.out_proj\.": ".attn.proj.", r"^post_layernorm\.": "norm.", r"^head\.": "pool."})
V3 = dict(layout="dinov3", prefix=r"(?!local_cls_norm\.)", vit=dict(position="rope_centred", eps=1e-5), generic=True,
          rename={r"^storage_tokens$": "register_tokens", r"^rope_embed\.periods$": "rope_periods"})
DINOV3 = dict(V3, url="https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/", license="DINOv3 License")
EUPE = dict(V3, license="FAIR noncommercial", gated="its .pt file")

TEACHERS = {
    # DUNE's three: 2D, 3D scenes, 3D people. Its DINOv2 resizes positions as those without registers do.
    "dinov2": Teacher(DINOV2.format("vitl14", "_reg4"), "Apache-2.0", generic=True, shape=L14 | REGISTERS),
    "mast3r": Teacher(NAVER + "MASt3R/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth", images=HALF, **CROCO),
    "multihmr": Teacher(NAVER + "MultiHMR/multiHMR_672_L.pt", "CC BY-NC-SA 4.0", inside="model_state_dict",
                        prefix=r"backbone\.encoder\.", distil_cls=False, domain="people", shape=L14),
    # DINOv2 as its hub builds it, and smaller ones without registers
    "dinov2_reg": Teacher(DINOV2.format("vitl14", "_reg4"), "Apache-2.0", generic=True, vit=dict(position="antialias"),
                          shape=L14 | REGISTERS),
    "dinov2_vits14": Teacher(DINOV2.format("vits14", ""), "Apache-2.0", generic=True, shape=S14),
    "dinov2_vitb14": Teacher(DINOV2.format("vitb14", ""), "Apache-2.0", generic=True, shape=B14),
    # UNIC's four
    "dino": Teacher(META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "Apache-2.0", shape=B16),
    "ibot": Teacher(BYTE + "archive/2022/ibot/vitb_16_rand_mask/checkpoint_teacher.pth", "Apache-2.0",
                    inside="state_dict", shape=B16),
    "deit3": Teacher(META + "deit/deit_3_base_224_1k.pth", "Apache-2.0", inside="model", prefix=r"(?!head\.)",
                     layout="deit3", rename={r"\.gamma_(\d)$": r".ls\1.gamma"}, shape=B16 | dict(layer_scale=1e-4)),
    "dbotft": Teacher(BYTE + "mmodal/dbot/84.5_dbot_base_finetune.pth", "CC BY-NC 4.0", inside="model",
                      prefix=r"(?!head\.)", rename={r"^fc_norm\.": "norm."}, pool="mean", shape=B16),
    # DUNE, as teacher of the next one: these, or any checkpoint of ours by --weights
    "dune_base": Teacher(dune.PUBLISHED.format("dune_vitbase14_448"), shape=B14 | REGISTERS, **OURS),
    "dune_small": Teacher(dune.PUBLISHED.format("dune_vitsmall14_448"), shape=S14 | REGISTERS, **OURS),
    # 3D scenes and depth
    "dust3r": Teacher(NAVER + "DUSt3R/DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth", images=HALF, **CROCO),
    "croco": Teacher(NAVER + "CroCo/CroCo_V2_ViTLarge_BaseDecoder.pth", **CROCO),
    "vggt": Teacher(HUB + "facebook/VGGT-1B/resolve/main/model.pt", "VGGT, non-commercial", domain="rooms",
                    prefix=r"aggregator\.patch_embed\.", vit=dict(position="antialias"), distil_cls=False,
                    shape=L14 | REGISTERS),
    "depth_anything_v2_vits": Teacher(DEPTH.format("Small", "vits"), "Apache-2.0", shape=S14, **DEPTH_ANY),
    "depth_anything_v2_vitb": Teacher(DEPTH.format("Base", "vitb"), "CC BY-NC 4.0", shape=B14, **DEPTH_ANY),
    "depth_anything_v2_vitl": Teacher(DEPTH.format("Large", "vitl"), "CC BY-NC 4.0", shape=L14, **DEPTH_ANY),
    # Of images alone, or of images and text
    "mae_vitl16": Teacher(META + "mae/pretrain/mae_pretrain_vit_large.pth", "CC BY-NC 4.0", inside="model",
                          distil_cls=False, vit=dict(position="size"), shape=L16),
    "siglip2_vitb16": Teacher(HUB + "google/siglip2-base-patch16-256/resolve/main/model.safetensors",
                              shape=B16 | dict(image_size=256, class_token=False), **SIGLIP),
    "siglip2_vitl16": Teacher(HUB + "google/siglip2-large-patch16-256/resolve/main/model.safetensors",
                              shape=L16 | dict(image_size=256, class_token=False), **SIGLIP),
    "dinov3_vits16": Teacher(gated="dinov3_vits16_pretrain_lvd1689m-*.pth", shape=S16 | REGISTERS, **DINOV3),
    "dinov3_vitb16": Teacher(gated="dinov3_vitb16_pretrain_lvd1689m-*.pth", shape=B16 | REGISTERS, **DINOV3),
    "dinov3_vitl16": Teacher(gated="dinov3_vitl16_pretrain_lvd1689m-*.pth", shape=L16 | REGISTERS, **DINOV3),
    "eupe_vitt16": Teacher(HUB + "facebook/EUPE-ViT-T",
                           shape=S16 | REGISTERS | dict(embed_dim=192, num_heads=3), **EUPE),
    "eupe_vits16": Teacher(HUB + "facebook/EUPE-ViT-S", shape=S16 | REGISTERS, **EUPE),
    "eupe_vitb16": Teacher(HUB + "facebook/EUPE-ViT-B", shape=B16 | REGISTERS, **EUPE),
}

# ---- The frozen teacher ----------------------------------------------------------------------------------------------

class FrozenTeacher(nn.Module):
    """A teacher's encoder behind one interface: ImageNet-normalised images in, tokens on the asked grid out, frozen.

    vit     of a teacher whose class feature is an AttentionPool of the patch tokens (SigLIP): with it, as vit.pool; the
            other class feature that is no token is their "mean", through the norm, which they then stay without (dBOT)
    dtype   bf16: so are the weights of matrix products, which run under autocast; all else is fp32, also what goes from
            block to block. The features have this type.
    """

    def __init__(self, name, vit, dtype=torch.float32):
        super().__init__()
        row = TEACHERS[name]
        self.vit = vit
        self.pool = row.pool
        self.dtype = dtype
        self.dim = vit.embed_dim
        self.patch_size = vit.patch_size
        self.gives_cls = bool(row.pool) or vit.cls_token is not None
        self.has_cls = self.gives_cls and row.distil_cls  # whether a student learns a class token from it
        self.prepare = Prepare(vit, IMAGENET, row.images)
        self.eval().requires_grad_(False)
        if dtype != torch.float32:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)

    @torch.no_grad()
    def forward(self, images, grid=None):
        """images [B, 3, H, W], ImageNet-normalised -> {"cls": [B, D] or None, "patch": [B, rows*cols, D]}; B may be 0.

        grid (rows, cols): the token grid that is wanted; images of another size are resized to it. None: as they are.
        """
        if len(images) == 0:
            rows, cols = grid or dune.token_grid(images, self.patch_size)
            cls = images.new_empty(0, self.dim, dtype=self.dtype) if self.gives_cls else None
            return {"cls": cls, "patch": images.new_empty(0, rows * cols, self.dim, dtype=self.dtype)}
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.features(images, grid)
        return {kind: None if x is None else x.to(self.dtype) for kind, x in features.items()}

    def features(self, images, grid=None):
        """forward() without autocast, which is not on every device."""
        features = self.vit(self.prepare(images, grid), norm=self.pool != "mean")
        if self.pool == "mean":
            features["cls"] = self.vit.norm(features["patch"].mean(1))
        elif self.pool == "attention":
            features["cls"] = self.vit.pool(features["patch"])
        return features

class Prepare(nn.Module):
    """Images [B, 3, H, W] as an encoder wants them: resized (bicubic) to the token grid that is asked for, if any, and
    from one normalisation into another.

    given, wanted  (mean, std); wanted None: MASt3R's for an encoder with its positions, else ImageNet's
    """

    def __init__(self, encoder, given, wanted=None):
        super().__init__()
        self.patch_size = encoder.patch_size
        wanted = wanted or (HALF if encoder.position == "rope" else IMAGENET)
        both = torch.tensor([given, wanted], dtype=torch.double, device="cpu")  # also in a model that is made on "meta"
        (mean, std), (new_mean, new_std) = both[..., None, None]
        self.register_buffer("gain", (std / new_std).float(), persistent=False)
        self.register_buffer("offset", ((mean - new_mean) / new_std).float(), persistent=False)

    def forward(self, images, grid=None):
        size = tuple(n * self.patch_size for n in grid) if grid else images.shape[-2:]
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=True)
        return images * self.gain + self.offset

class AttentionPool(nn.Module):
    """SigLIP's class feature: a learned query (the probe) looks at the patch tokens. [B, N, D] -> [B, D]"""

    def __init__(self, dim):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attention = nn.MultiheadAttention(dim, dim // 64, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, gelu="tanh")

    def forward(self, tokens):
        query = self.probe.expand(len(tokens), -1, -1)
        x = self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]
        return x + self.mlp(self.layernorm(x))

def load_teacher(name, weights=None, device="cpu", dtype=torch.float32):
    """A frozen teacher (FrozenTeacher), its size read off the weights.

    name     a row of TEACHERS
    weights  a file in the published layout; None: the published one, downloaded; "random": random, of published size,
             the same ones every time
    Raises Oops for an unknown name and for a file that is missing, unreadable or of another layout (naming the tensor).
    """
    if name not in TEACHERS:
        raise Oops(f"unknown teacher '{name}'; there are: {', '.join(TEACHERS)}")
    row = TEACHERS[name]
    if row.gated and not weights:
        raise Oops(f"{name} is not open to all: ask for {row.gated} at {row.url} and pass it, --weights {name}=FILE")
    random = weights == "random"
    if not random:
        path = weights or dune.fetch(row.url)
        state = encoder_state(name, dune.read_checkpoint(path), path)
    with torch.device(device if random else "meta"), torch.random.fork_rng([]):
        torch.manual_seed(list(TEACHERS).index(name))
        vit = ViT(**row.shape, **row.vit) if random else dune.vit_from_state(state, path, **row.vit)
        if row.pool == "attention":
            vit.pool = AttentionPool(vit.embed_dim)
    if not random:
        dune.load_strictly(vit, state, path)
    return FrozenTeacher(name, vit, dtype).to(device)

def encoder_state(name, file, path):
    """The encoder's tensors of a published file, under ViT's key names, those of an AttentionPool under "pool."."""
    row = TEACHERS[name]
    part = dune.entry(file, row.inside, dict, path) if row.inside else file
    state = {}
    for key, value in part.items() if isinstance(part, dict) else ():
        found = re.match(row.prefix, str(key))
        if found and torch.is_tensor(value):
            key = str(key)[found.end():]
            for old, new in row.rename.items():
                key = re.sub(old, new, key)
            state[key] = value
    state = dune.plain_keys(state)
    try:
        if row.layout:
            LAYOUTS[row.layout](state)
    except (KeyError, RuntimeError, TypeError, IndexError):
        raise Oops(f"{path} is no file of teacher {name}, or its heads have other than 64 channels") from None
    return state

def from_deit3(state):
    """Its positions are those of the patches: the class token has none, which is a zero."""
    state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))

def from_dinov3(state):
    """A mask multiplies the bias of q, k and v. The rotation pairs channel j of a head with j + 32, ours j with j + 16
    in each half: it is the same after swapping the middle quarters of the rows of q and k."""
    for key in [key for key in state if re.search(r"\.attn\.qkv\.(weight|bias)$", key)]:
        rows = state[key] * state.pop(f"{key}_mask", 1)
        q, k, v = rows.unflatten(0, (3, -1, 4, 16))
        state[key] = torch.stack([q[:, [0, 2, 1, 3]], k[:, [0, 2, 1, 3]], v]).flatten(0, 3)

def from_siglip(state):
    """q, k and v are apart, and the positions have no batch dimension."""
    state["pos_embed"] = state["pos_embed"][None]
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        state[key.replace(".self_attn.q_proj.", ".attn.qkv.")] = torch.cat(parts)

LAYOUTS = {"deit3": from_deit3, "dinov3": from_dinov3, "siglip": from_siglip}

# ---- Probes, and the training of small things ------------------------------------------------------------------------

def fit(parameters, loss, steps, lr, weight_decay=1e-2, beta2=0.999, clip=0.0, what=None):
    """The training loop of all small things (probes, specialists, decoders): AdamW with a one-cycle learning rate.

    parameters  a list of tensors, or of param groups, which may have their own "lr" (its peak) and "weight_decay"
    loss        loss(step) gives what this step minimises, a scalar
    beta2       AdamW's (its beta1 swings from 0.95 to 0.85 and back, against the rate)
    clip        the gradient's largest norm, 0: any
    what        a name for a progress bar; None: no bar
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, beta2), fused=True)
    groups = optimizer.param_groups
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=0.1)
    for step in tqdm(range(steps), what, leave=False, disable=what is None):
        optimizer.zero_grad()
        loss(step).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        optimizer.step()
        schedule.step()

class Probe(nn.Module):
    """Linear layers that read one domain's labels off features {"cls": [B, dim] or None, "patch": [B, rows*cols, dim]}
    on a grid (rows, cols): in an encoder's study, in a specialist's training. Each has targets(scenes): labels on the
    grid, where the scenes are; forward(features): predictions of them; loss(out, targets); metrics(out, targets):
    {name: number}."""
    outputs = {}  # {head: its channels}

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.heads = nn.ModuleDict({name: nn.Linear(dim, channels) for name, channels in self.outputs.items()})

class ObjectsProbe(Probe):
    """The kind of the object (from the class token, or the mean patch), and each patch's kind or background."""
    outputs = {"patch": len(KINDS) + 1, "kind": len(KINDS)}

    def targets(self, scenes):
        cover = F.adaptive_avg_pool2d(scenes["mask"].float()[:, None], self.grid).flatten(1)
        return {"kind": scenes["label"], "patch": torch.where(cover > 0.5, scenes["label"][:, None] + 1, 0)}

    def forward(self, features):
        whole = features["patch"].mean(1) if features["cls"] is None else features["cls"]
        return {"kind": self.heads["kind"](whole), "patch": self.heads["patch"](features["patch"])}

    def loss(self, out, targets):
        return F.cross_entropy(out["kind"], targets["kind"]) + F.cross_entropy(out["patch"].mT, targets["patch"])

    def metrics(self, out, targets):
        """Accuracy of the kind and mean IoU of the patches, over the kinds that there are, in %."""
        right = (out["kind"].argmax(-1) == targets["kind"]).float().mean()
        truth, guess = targets["patch"], out["patch"].argmax(-1)
        overlap = [((truth == k) & (guess == k)).sum() / ((truth == k) | (guess == k)).sum() for k in truth.unique()]
        return {"accuracy": 100 * right.item(), "mIoU": 100 * torch.stack(overlap).mean().item()}

class RoomsProbe(Probe):
    """Each patch's log depth and surface normal."""
    outputs = {"patch": 4}

    def targets(self, scenes):
        maps = torch.cat([scenes["depth"].log()[:, None], scenes["normals"].permute(0, 3, 1, 2)], 1)
        return self.parts(F.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT)

    def forward(self, features):
        return self.parts(self.heads["patch"](features["patch"]))

    def parts(self, x):
        depth, normals = x.split([1, 3], -1)
        return {"depth": depth, "normals": F.normalize(normals, dim=-1)}

    def loss(self, out, targets):
        alike = (out["normals"] * targets["normals"]).sum(-1).mean()
        return (out["depth"] - targets["depth"]).abs().mean() * 2 + 1 - alike

    def metrics(self, out, targets):
        """RMSE of the depth in metres, delta1 (within a factor of 1.25) in %, mean error of the normals in degrees."""
        metres = out["depth"].exp() - targets["depth"].exp()
        close = (out["depth"] - targets["depth"]).abs() < 0.2231  # log 1.25
        angle = (out["normals"] * targets["normals"]).sum(-1).clamp(-1, 1).acos()
        return {"depth RMSE": metres.square().mean().sqrt().item(), "delta1": 100 * close.float().mean().item(),
                "normals": torch.rad2deg(angle).mean().item()}

class PeopleProbe(Probe):
    """For each joint: which patches hold one, where in the image (fractions), where in 3D (metres from the pelvis)."""
    outputs = {"patch": 6 * len(JOINTS)}

    def targets(self, scenes):
        rows, cols = self.grid
        joints = scenes["joints2d"]  # [n, figures, joints, 2]
        metres = scenes["joints3d"] - scenes["joints3d"][:, :, 2:3]
        inside = scenes["visible"][..., None] & ((joints >= 0) & (joints < 1)).all(-1)
        size = torch.tensor([cols, rows], device=joints.device)
        # For every patch and kind of joint the nearest one: a soft spot around it (1 at it, 0.6 a patch away), and its
        # place in 2D and 3D.
        gap = (joints[:, :, None] - centres(rows, cols, joints.device)[:, None]) * size
        near, figure = (torch.exp(-gap.square().sum(-1) / 2) * inside[:, :, None]).max(1)
        place, xyz = [x.take_along_dim(figure[..., None], 1) for x in (joints, metres)]
        image, _, joint = inside.nonzero(as_tuple=True)
        col, row = (joints[inside] * size).long().unbind(-1)
        return {"near": near, "place": place, "xyz": xyz, "truth": joints[inside], "metres": metres[inside],
                "at": torch.stack([image, row * cols + col, joint])}

    def forward(self, features):
        heads = self.heads["patch"](features["patch"]).unflatten(-1, (len(JOINTS), 6))
        near, offset, xyz = heads.split([1, 2, 3], -1)
        return {"near": near[..., 0], "place": offset + centres(*self.grid, near.device)[:, None], "xyz": xyz}

    def loss(self, out, targets):
        weight = targets["near"] * (targets["near"] > 0.3)
        apart = {k: ((out[k] - targets[k]).abs().mean(-1) * weight).sum() / weight.sum() for k in ("place", "xyz")}
        spots = F.binary_cross_entropy_with_logits(out["near"], targets["near"], pos_weight=weight.new_tensor(3.0))
        return 10 * spots + 10 * apart["place"] + 3 * apart["xyz"]

    def metrics(self, out, targets):
        """Joints that one of the three best guesses of their kind finds to 5 % of the side, in %; 3D error in cm."""
        image, patch, joint = targets["at"]
        best = out["near"].topk(3, dim=1).indices  # [n, 3, joints]
        guess = out["place"].take_along_dim(best[..., None], 1)[image, :, joint]
        found = (guess - targets["truth"][:, None]).norm(dim=-1).amin(1) < 0.05
        apart = (out["xyz"][image, patch, joint] - targets["metres"]).norm(dim=-1)
        return {"joints 2D": 100 * found.float().mean().item(), "joints 3D": 100 * apart.mean().item()}

PROBES = {"objects": ObjectsProbe, "rooms": RoomsProbe, "people": PeopleProbe}

# ---- Geometry --------------------------------------------------------------------------------------------------------
# Camera frame: x right, y down, z forward, in metres. K [3, 3] is of pixels (x, y) with centres at integer + 0.5.

def centres(rows, cols, device=None):
    """[rows * cols, 2]: the middle of each cell of a grid as (x, y) fractions of the sides."""
    y, x = [(torch.arange(n, device=device) + 0.5) / n for n in (rows, cols)]
    return torch.cartesian_prod(y, x).flip(-1)

def rays(pixels, K):
    """[..., n, 2] -> [..., n, 3], as long as to have z = 1."""
    return transform(K.inverse(), F.pad(pixels, (0, 1), value=1.0))

def project(points, K):
    """[..., n, 3] in the camera's frame -> pixels [..., n, 2]; what is not before the camera is taken as 5 cm ahead."""
    flat = transform(K, points)
    return flat[..., :2] / flat[..., 2:].clamp(min=0.05)

def transform(matrix, points):
    """Matrices [..., 3, 3] times points [..., n, 3]; in fp32 under autocast too: places want more digits than bf16."""
    with torch.autocast(points.device.type, enabled=False):
        return points.float() @ matrix.float().mT

# ---- Pairs of views --------------------------------------------------------------------------------------------------
# A pair: image uint8 [2, 3, S, S], depth [2, S, S] along z (0: unknown), K [2, 3, 3], pose [2, 4, 4] camera to world.

def room_pairs(start, count, size):
    """`count` procedural rooms, each seen by both of its cameras, as one batch of pairs."""
    views = [data.labelled_scenes("rooms", start, count, size, view=view) for view in (0, 1)]
    return {key: torch.stack([view[key] for view in views], 1) for key in views[0]}

def pair_geometry(pairs):
    """What a batch of pairs knows: (points, known, place, seen).

    points [B, 2, S, S, 3]  both views' points in view 1's frame; known [B, 2, S, S] bool: which of them are measured
    place [B, S, S, 2]      where in view 2 (pixels) view 1's points are; seen [B, S, S] bool: which of them it sees:
                            before it, inside its image and not hidden
    """
    size = pairs["depth"].shape[-1]
    depth, K = pairs["depth"].flatten(2), pairs["K"]
    move = pairs["pose"][:, :1].inverse() @ pairs["pose"]  # [B, 2, 4, 4]: from each view's frame into view 1's
    back = move[:, 1].inverse()
    points = rays(centres(size, size, depth.device) * size, K) * depth[..., None]
    points = transform(move[..., :3, :3], points) + move[..., None, :3, 3]
    there = transform(back[:, :3, :3], points[:, 0]) + back[:, None, :3, 3]
    place, z = project(there, K[:, 1]), there[..., 2]
    col, row = place.clamp(0, size - 1).long().unbind(-1)
    surface = depth[:, 1].gather(1, row * size + col)
    inside = (z > 0) & ((place >= 0) & (place < size)).all(-1)
    seen = inside & (depth[:, 0] > 0) & (surface > 0) & ((surface - z).abs() < 0.05 * z)
    square = size, size
    return points.unflatten(2, square), pairs["depth"] > 0, place.unflatten(1, square), seen.unflatten(1, square)

def patch_pairs(pairs, grid):
    """For the middle of each patch of view 1: which patch of view 2 shows it, int64 [B, rows*cols]; does any, bool."""
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
# patch 16 or 14), each trained on its own domain only, from labels, and written in the published layout.

TINY = dict(image_size=112, embed_dim=192, depth=3, num_heads=3, layer_scale=None)
SPECIALISTS = {
    "dinov2": dict(shape=dict(TINY, patch_size=14, registers=4), lr=1e-3, scenes=6000, passes=1),
    "mast3r": dict(shape=dict(TINY, patch_size=16, registers=0, class_token=False), lr=1e-3, scenes=4000, passes=1),
    "multihmr": dict(shape=dict(TINY, patch_size=14, registers=0), lr=2e-3, scenes=3900, passes=2),
}
TINY_GRID = (8, 8)
MATCHING, FINE = 1.0, 2  # weight of the matching loss beside depth's and normals'; descriptors along a patch's side

def prepare_specialists(names):
    """Train the tiny specialists that are not in the cache yet: about half a minute each on two cores."""
    for name in names:
        if not os.path.exists(specialist_path(name)):
            dune.check_folder(data.cache_folder())
            make_specialist(name, SPECIALISTS[name]["scenes"])

def specialist_path(name):
    """Where a tiny specialist lies. The name tells the recipe and how scenes look: after a change it is made anew."""
    key = hashlib.sha1(repr((SPECIALISTS[name], TEACHERS[name].vit, MATCHING, FINE)).encode())
    for label in specialist_scenes(name, 2).values():
        key.update(label.numpy().tobytes())
    return os.path.join(data.cache_folder(), f"tiny-{name}-{key.hexdigest()[:8]}.pth")

def specialist_scenes(name, count):
    """The first `count` images that a specialist learns from with their labels, {label: tensor}; of rooms as pairs."""
    domain, size = TEACHERS[name].domain, TINY["image_size"]
    return room_pairs(0, count // 2, size) if domain == "rooms" else data.labelled_scenes(domain, 0, count, size)

def make_specialist(name, count, batch=16):
    """Train a tiny specialist on its own domain, from the labels of `count` images, and write it to specialist_path.

    Like MASt3R itself the tiny one also learns which places of two views are the same, finer than a patch.
    """
    recipe, row = SPECIALISTS[name], TEACHERS[name]
    scenes = specialist_scenes(name, count)
    torch.manual_seed(0)
    vit = ViT(**recipe["shape"], **row.vit)
    prepare = Prepare(vit, IMAGENET, row.images)
    probe = PROBES[row.domain](vit.embed_dim, TINY_GRID)
    parameters = [*vit.parameters(), *probe.parameters()]
    pairs = row.domain == "rooms"
    if pairs:
        describe = nn.Linear(vit.embed_dim, FINE**2 * 16, bias=False)
        parameters += describe.parameters()
        batch = batch // 2
    order = torch.cat([torch.randperm(len(scenes["image"])) for _ in range(recipe["passes"])])

    def loss(step):
        part = {key: value[order[step * batch:(step + 1) * batch]] for key, value in scenes.items()}
        single = {key: value.flatten(0, 1) for key, value in part.items()} if pairs else part
        with torch.autocast("cpu", torch.bfloat16, enabled=dune.fast_bf16("cpu")):
            features = vit(prepare(data.normalise(single["image"]), TINY_GRID))
            out = probe(features)
        total = probe.loss({key: value.float() for key, value in out.items()}, probe.targets(single))
        if pairs:
            own, seen = patch_pairs(part, tuple(FINE * n for n in TINY_GRID))
            maps = describe(features["patch"].float()).mT.unflatten(2, TINY_GRID)
            one, two = F.pixel_shuffle(maps, FINE).flatten(2).mT.unflatten(0, (-1, 2)).unbind(1)
            total = total + MATCHING * contrast(one, two, own)[seen].mean()
        return total
    fit(parameters, loss, len(order) // batch, recipe["lr"], weight_decay=0.03, beta2=0.99, clip=1.0,
        what=f"tiny {name}: learns {row.domain}")
    with dune.writing(specialist_path(name)) as file:
        torch.save(published_layout(name, vit.state_dict()), file)

def published_layout(name, state):
    """A specialist's state dict as the published file of that teacher would hold it."""
    if name == "mast3r":
        return {"model": {re.sub(r"^(blocks|norm)\.", r"enc_\1.", key): value for key, value in state.items()}}
    if name == "multihmr":
        return {"model_state_dict": {f"backbone.encoder.{key}": value for key, value in state.items()}}
    return state

# ---- Two photographs to 3D -------------------------------------------------------------------------------------------
# MASt3R's two-view decoder and heads (arXiv 2406.09756), on its own encoder or on a frozen DUNE (DUNE section 4).
# Modules are named as the published files name them.

class TwoView(nn.Module):
    """MASt3R on a frozen encoder: its own, or a DUNE.

    dim, depth    of the decoder: `depth` pairs of blocks, heads of 64 channels
    patch         pixels that the heads put in a token's place; images are resized if the encoder's patch is another
    norm          whether the decoder has a LayerNorm instead of the encoder's last one (DUNE-MASt3R: yes; MASt3R: no)
    head_sizes    maps, features, last, hidden, descriptor: see DPT and TwoViewHead
    """

    def __init__(self, encoder, dim=768, depth=12, patch=None, norm=True, **head_sizes):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.patch = patch or encoder.patch_size
        self.norm = nn.LayerNorm(encoder.embed_dim) if norm else None
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dim, dim // 64) for _ in range(depth))
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(dim, dim // 64) for _ in range(depth))
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)
        self.downstream_head1 = TwoViewHead(encoder.embed_dim, dim, depth, self.patch, **head_sizes)
        self.downstream_head2 = TwoViewHead(encoder.embed_dim, dim, depth, self.patch, **head_sizes)
        self.prepare = Prepare(encoder, HALF)

    def forward(self, view1, view2):
        """Two image batches [B, 3, H, W] in MASt3R's normalisation (2 x - 1 of 0..1), of any two sizes -> two dicts.

        pts3d [B, H, W, 3] metres, both views' in view 1's camera frame (x right, y down, z forward); their confidence
        conf [B, H, W] > 1; desc [B, H, W, 24] unit descriptors; theirs, desc_conf [B, H, W] > 0. fp32; on a GPU all but
        the heads runs in bf16. Raises Oops if a side is no multiple of the patch size.
        """
        views = view1, view2
        grids = [dune.token_grid(view, self.patch) for view in views]
        device = view1.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            layers = [[self.encode(view, grid) for view, grid in zip(views, grids)]]  # of both views
            x, y = [self.decoder_embed(tokens) for tokens in layers[0]]
            rope_x, rope_y = [dune.rope_table(*grid, 0, 64, view1.device) for grid in grids]
            for block1, block2 in zip(self.dec_blocks, self.dec_blocks2):
                x, y = block1(x, y, rope_x, rope_y), block2(y, x, rope_y, rope_x)  # both read what was before
                layers.append([x, y])
            layers[-1] = [self.dec_norm(x), self.dec_norm(y)]
        with torch.autocast(device, enabled=False):
            layers1, layers2 = [[tokens.float() for tokens in view] for view in zip(*layers)]
            return self.downstream_head1(layers1, grids[0]), self.downstream_head2(layers2, grids[1])

    def encode(self, images, grid):
        """[B, 3, H, W] in MASt3R's normalisation -> the tokens that the decoder reads, [B, rows*cols, D]."""
        with torch.no_grad():
            tokens = self.encoder(self.prepare(images, grid), norm=self.norm is None)["patch"]
        return tokens if self.norm is None else self.norm(tokens)

class DecoderBlock(nn.Module):
    """Block that looks at the other view y between attention and MLP, each view turned by its own positions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = [nn.LayerNorm(dim, eps=1e-6) for _ in range(4)]
        self.attn = Attention(dim, heads)
        self.cross_attn = nn.ModuleDict({key: nn.Linear(dim, dim) for key in ("projq", "projk", "projv", "proj")})
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, y, rope_x, rope_y):
        x = x + self.attn(self.norm1(x), rope_x)
        x = x + self.look(self.norm2(x), self.norm_y(y), rope_x, rope_y)
        return x + self.mlp(self.norm3(x))

    def look(self, x, y, rope_x, rope_y):
        flat = [self.cross_attn[f"proj{key}"](tokens) for key, tokens in (("q", x), ("k", y), ("v", y))]
        q, k, v = [t.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for t in flat]
        x = dune.attend(dune.rotate(q, rope_x), dune.rotate(k, rope_y), v)
        return self.cross_attn["proj"](x.transpose(1, 2).flatten(2))

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
    dims, maps: the layers' channels as tokens, and as maps at 4, 2, 1 and 1/2 times the token grid."""

    def __init__(self, dims, patch, maps=(96, 192, 384, 768), features=256, last=128):
        super().__init__()
        resize = ([nn.ConvTranspose2d(maps[0], maps[0], 4, 4)], [nn.ConvTranspose2d(maps[1], maps[1], 2, 2)], [],
                  [nn.Conv2d(maps[3], maps[3], 3, 2, 1)])
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, channels, 1), *then) for dim, channels, then in zip(dims, maps, resize))
        self.layer_rn = nn.ModuleList(nn.Conv2d(channels, features, 3, padding=1, bias=False) for channels in maps)
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = [Fusion(features) for _ in range(4)]
        self.head = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=patch / 8, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, last, 3, padding=1), nn.ReLU(), nn.Conv2d(last, 4, 1))

    def forward(self, layers, grid):
        maps = [post(x.transpose(1, 2).unflatten(2, grid)) for x, post in zip(layers, self.act_postprocess)]
        fine, middle, coarse, coarsest = [rn(x) for x, rn in zip(maps, self.layer_rn)]
        x = self.refinenet3(self.refinenet4(coarsest), coarse)
        return self.head(self.refinenet1(self.refinenet2(x, middle), fine))

class Fusion(nn.Module):
    """Joins a finer map (skip) to the coarser ones and doubles the resolution."""

    def __init__(self, dim):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualConv(dim), ResidualConv(dim)  # the coarsest's first is idle

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

TWO_VIEW = {"dune": dune.PUBLISHED.format("dunemast3r_cvpr25_vitbase"),
            "dune_small": dune.PUBLISHED.format("dunemast3r_cvpr25_vitsmall"),
            "mast3r": TEACHERS["mast3r"].url}

def load_two_view(weights=None, device="cpu"):
    """TwoView in eval mode, every size read off the tensors.

    weights  a published MASt3R or DUNE-MASt3R file, one of two_view_layout, a name of TWO_VIEW; None: "dune"
    A DUNE-MASt3R file without its encoder names it: a published one, which is downloaded, or a file.
    Raises Oops for a file that is missing, unreadable or of another architecture (naming the tensor or the option).
    """
    path = str(weights or "dune")
    if path in TWO_VIEW and not os.path.exists(path):
        path = dune.fetch(TWO_VIEW[path])
    file = dune.read_checkpoint(path)
    published = dune.entry(file, "model", dict, path)
    on_dune = "mast3r.decoder_embed.weight" in published
    if on_dune:
        call = re.sub(r"\s", "", dune.entry(file, "mast3r_model_str", str, path, "")).replace('"', "'")
        for option in TWO_VIEW_CALL if call else ():
            if option.partition("=")[0] in call and option not in call:
                raise Oops(f"{path} is another architecture: its mast3r_model_str has no {option}")
        encoder = dune.plain_keys(dune.below(published, "dune_backbone."))
        if not encoder:
            name = dune.entry(file, "dune_backbone_name", str, path).removesuffix("_encoder").replace("_14_", "14_")
            encoder = dune.load(name, encoder_only=True).state_dict()
    elif "decoder_embed.weight" in published:
        encoder = encoder_state("mast3r", file, path)
    else:
        raise Oops(f"{path} holds no two-view model: neither MASt3R's nor DUNE-MASt3R's decoder is in it")
    vit = dune.vit_from_state(encoder, path, position="offset" if on_dune else "rope")
    state = {key.removeprefix("mast3r.").replace("dpt.scratch.", "dpt."): value
             for key, value in published.items() if not re.match(NOT_DECODER, key)}
    if not dune.below(state, "dec_blocks2."):  # one set of blocks for both views
        state.update({f"dec_blocks2.{key}": value for key, value in dune.below(state, "dec_blocks.").items()})
    try:
        with torch.device("meta"):
            model = TwoView(vit, norm=on_dune, **two_view_sizes(state, vit.patch_size))
    except Exception:  # whatever foreign tensors do to it
        raise Oops(f"{path} holds no two-view model of a known layout: parts of its heads are missing or odd") from None
    state.update({f"encoder.{key}": value for key, value in encoder.items()})
    return dune.load_strictly(model, state, path).eval().to(device)

# Keys of published files that are the encoder's or nobody's (of layer1_rn to layer4_rn there are copies in layer_rn).
NOT_DECODER = (r"dune_backbone\.|imagenet_(mean|std)$|(mast3r\.)?(mask_token$|patch_embed\.|enc_(blocks|norm)\.)|"
               r".*\.scratch\.layer\d_rn\.")
# What TwoView computes, as a DUNE-MASt3R file's constructor call spells it, which is compared and never run.
TWO_VIEW_CALL = ("head_type='catmlp+dpt'", "output_mode='pts3d+desc24'", "depth_mode=('exp',-inf,inf)",
                 "conf_mode=('exp',1,inf)", "desc_conf_mode=('exp',0,inf)", "two_confs=True", "pos_embed='RoPE100'")

def two_view_sizes(state, patch):
    """TwoView's sizes, read off its tensors."""
    def rows(key):
        return len(state[f"{key}.weight"])
    head = "downstream_head1.dpt"
    local = "downstream_head1.head_local_features"
    return {"dim": rows("decoder_embed") // 64 * 64,
            "depth": len({key.split(".")[1] for key in state if key.startswith("dec_blocks.")}),
            "maps": [rows(f"{head}.act_postprocess.{j}.0") for j in range(4)],
            "features": rows(f"{head}.layer_rn.0"), "last": rows(f"{head}.head.2"),
            "hidden": rows(f"{local}.fc1"), "descriptor": rows(f"{local}.fc2") // patch**2 - 1}

def two_view_layout(model):
    """The file of a TwoView on a DUNE encoder as the published ones are laid out, with the encoder in it."""
    def published(key):
        key = re.sub(r"^encoder\.", "dune_backbone.", key)
        return key if key.startswith(("dune_backbone.", "norm.")) else f"mast3r.{key}"
    return {"model": {published(key): value for key, value in model.state_dict().items()}}

# ---- A photograph to people in 3D ------------------------------------------------------------------------------------

HEAD_DIM = 16  # of each attention head in a people head

class People(nn.Module):
    """Multi-HMR's head (arXiv 2402.14654, section 3) on any frozen encoder, with joints in place of a body model: each
    patch says whether it holds a person's head; the token of each that does looks at all tokens of its image.

    joints, head  how many joints a person has, and which of them is the head
    size          pixels of the images' longer side; f60 is the focal length of a view of 60 degrees across it
    patch         pixels in a token's place; images are resized if the encoder's own patch is another
    dim, depth    of the decoder blocks
    """

    def __init__(self, encoder, joints, head, size, patch, dim=128, depth=2):
        super().__init__()
        self.options = dict(joints=joints, head=head, size=size, patch=patch, dim=dim, depth=depth)
        self.encoder = encoder.eval().requires_grad_(False)
        self.head = range(joints)[head]
        self.size = size
        self.patch = patch
        self.f60 = size / 2 * 3**0.5
        self.norm = nn.LayerNorm(encoder.embed_dim)
        self.score = nn.Linear(encoder.embed_dim, 1)
        self.embed = nn.Linear(encoder.embed_dim + 4, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, dim // HEAD_DIM) for _ in range(depth))
        self.last = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, 3 + 3 * joints)
        self.register_buffer("bones", torch.zeros(joints - 1, 2))  # pairs of joints, for pictures
        self.prepare = Prepare(encoder, IMAGENET)

    @torch.no_grad()
    def forward(self, images, K, least=0.3):
        """images [B, 3, H, W], ImageNet-normalised; K [B, 3, 3] of their pixels, with centres at integer + 0.5 -> for
        each image a list of people, the surest first: {"score": at least `least`; "head" [2]: pixels; "distance": of
        the head along z, metres; "joints3d" [J, 3]: metres in the camera's frame (x right, y down, z forward);
        "joints2d" [J, 2]: pixels}. Raises Oops if a side is no multiple of the patch size.
        """
        grid = dune.token_grid(images, self.patch)
        tokens, scores = self.read(self.tokens(images), K, grid)
        scores = scores.sigmoid()
        highest = F.max_pool2d(scores.unflatten(1, grid), 3, 1, 1).flatten(1)  # two patches may share a head
        image, patch = ((scores >= least) & (scores == highest)).nonzero(as_tuple=True)
        people = self.decode(self.query(tokens, image, patch, grid), patch, K[image], grid[1])
        people["score"] = scores[image, patch]
        found = [[] for _ in images]
        for q in people["score"].argsort(descending=True).tolist():
            found[image[q]].append({key: value[q] for key, value in people.items()})
        return found

    @torch.no_grad()
    def tokens(self, images):
        """The frozen encoder's patch tokens, [B, N, D]."""
        return self.encoder(self.prepare(images, dune.token_grid(images, self.patch)))["patch"]

    def read(self, tokens, K, grid):
        """tokens() with their places and their rays, [B, N, dim]; whether they hold heads, logits [B, N]"""
        tokens, place = self.norm(tokens), centres(*grid, tokens.device)
        pixels = place * self.patch * place.new_tensor([grid[1], grid[0]])
        where = torch.cat([(2 * place - 1).expand(len(K), -1, -1), rays(pixels, K)[..., :2]], -1)
        return self.embed(torch.cat([tokens, where], -1)), self.score(tokens)[..., 0].float()

    def query(self, tokens, image, patch, grid):
        """What the tokens at Q places (image [Q], patch [Q]) have seen of their images, [Q, 3 + 3 J]: see decode()."""
        x, y = tokens[image, patch][:, None], tokens[image]
        rope = dune.rope_table(*grid, 0, HEAD_DIM, y.device)  # so it is easy to look at a place beside one's own
        rope_x = [table[patch][:, None, None] for table in rope]
        for block in self.blocks:
            x = block(x, y, rope_x, rope)
        return self.out(self.last(x[:, 0])).float()

    def decode(self, raw, patch, K, cols):
        """People as tensors [Q, ...], named as in forward(), of raw [Q, 3 + 3 J] from these patches [Q] of a row of
        `cols`: the head's offset from the patch's middle, in patches; log(distance f60 / f); joints beside the head."""
        offset, far, beside = raw.tensor_split([2, 3], -1)
        head = (torch.stack([patch % cols, patch // cols], -1) + 0.5 + offset) * self.patch
        distance = far[:, 0].exp() * K[:, 0, 0] / self.f60
        beside = beside.unflatten(-1, (-1, 3))
        joints = rays(head[:, None], K) * distance[:, None, None] + beside - beside[:, self.head, None]
        return {"head": head, "distance": distance, "joints3d": joints, "joints2d": project(joints, K)}

def people_layout(model):
    """The file of a People on a DUNE encoder, with the encoder in it."""
    return {"people": model.options, "model": model.state_dict()}

def load_people(path, device="cpu"):
    """A People in eval mode from the file of people_layout. Raises Oops for any other file."""
    file = dune.read_checkpoint(path)
    options, state = dune.entry(file, "people", dict, path), dune.entry(file, "model", dict, path)
    vit = dune.vit_from_state(dune.below(state, "encoder."), path)
    try:
        if min(options["size"], options["patch"]) < 1 or options["dim"] % HEAD_DIM or options["depth"] > len(state):
            raise ValueError
        with torch.device("meta"):
            model = People(vit, **options)
    except Exception:  # whatever foreign options do to modules without content
        raise Oops(f"{path} holds no people head of a known layout: its options are odd or missing") from None
    return dune.load_strictly(model, state, path).eval().to(device)

# ---- The command -----------------------------------------------------------------------------------------------------

def main():
    """python teachers.py: the table."""
    dune.Parser(description="The teachers, their licences, and where their files are looked for.").parse_args()
    line = "{:23} {:8} {:>4} {:>5}  {:9} {:8}  {:20} {} {}".format
    print(line("teacher", "knows", "M", "patch", "class", "images", "licence", "", "file (+: is here)"))
    for name, row in TEACHERS.items():
        teacher = load_teacher(name, "random", device="meta")
        millions = round(sum(p.numel() for p in teacher.parameters()) / 1e6)
        cls = "distilled" if teacher.has_cls else "unused" if teacher.gives_cls else "none"
        images = "ImageNet" if row.images == IMAGENET else "0.5"
        path = f"ask at {row.url}" if row.gated else dune.cached(row.url)
        here = "+" if os.path.exists(path) else "-"
        print(line(name, row.domain, millions, teacher.patch_size, cls, images, row.license, here, path))

if __name__ == "__main__":
    dune.run(main)
