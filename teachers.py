"""The frozen teachers: one table, one loader, tiny specialists for a laptop, and MASt3R's two-view model.

    teacher = load_teacher("mast3r")              # downloads MASt3R once and keeps its encoder
    tokens = teacher(images, grid=(24, 24))       # {"cls": None, "patch": [B, 576, 1024]}, for any patch size

A new teacher is a row of TEACHERS. `python train.py --list-teachers` prints the table.
"""

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
from data import KINDS, PARTS
from dune import Attention, Mlp, UserError, ViT, token_grid
from kernels.muon import Muon

# ---- The table ---------------------------------------------------------------------------------------------

HEAD_DIM = 64  # channels of an attention head, in every encoder and decoder here
MEAN_STD_IMAGENET = data.IMAGENET_MEAN, data.IMAGENET_STD
MEAN_STD_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Teacher:
    """One row of TEACHERS: where the weights are, and how the encoder differs from a DINOv2 ViT.

    url             address of the weights; of a gated teacher: the page where one requests them
    license         license of the weights
    access_note     gated teachers only: the file to request at `url`
    state_dict_key  key of the state dict in the file; "": the file is the state dict
    prefix          regular expression: how the encoder's keys begin. It is cut off; other keys are ignored
    rename          {regular expression: replacement}, where keys are in none of LAYOUTS
    vit_kwargs      options of ViT that the tensors do not show: position, eps, gelu
    pool            how the class feature is computed. "": the class token, if there is one. "attention": an
                    AttentionPool of the patch tokens (SigLIP). "mean": norm(mean of the patch tokens), and
                    the patch tokens are returned before the norm (dBOT)
    distill_cls     False: the student does not learn the class token, because the teacher never trained it
    mean_std        (mean, std) of the normalization that the teacher expects, per color channel
    domain          what the teacher knows, a name of data.SCENES: its images where there is no --data
    generic         its data covers everything: with --sharing own+generic all teachers see its images
    shape           published size, for random weights. The size of a file is read off its tensors
    """
    url: str
    license: str
    access_note: str = ""
    state_dict_key: str = ""
    prefix: str = ""
    rename: dict = field(default_factory=dict)
    vit_kwargs: dict = field(default_factory=dict)
    pool: str = ""
    distill_cls: bool = True
    mean_std: tuple = MEAN_STD_IMAGENET
    domain: str = "objects"
    generic: bool = False
    shape: dict = field(default_factory=dict)


def vit_shape(size, patch_size, registers=0, **options):
    """Arguments of ViT for a published size. DINOv2 and DINOv3 (patch 14, or registers) have LayerScale."""
    shape = dict(dune.SIZES[size], patch_size=patch_size, registers=registers)
    shape["image_size"] = 518 if patch_size == 14 else 224
    shape["layer_scale"] = 1e-4 if patch_size == 14 or registers else None
    return shape | options


GIANT = dict(embed_dim=1536, depth=40, num_heads=24, gelu="swiglu")  # for teachers only
META = "https://dl.fbaipublicfiles.com/"
DINOV2 = META + "dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"
NAVER = "https://download.europe.naverlabs.com/ComputerVision/"
BYTEDANCE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/"
HUB = "https://huggingface.co/"
DEPTH_ANYTHING_V2 = HUB + "depth-anything/Depth-Anything-V2-{}/resolve/main/depth_anything_v2_{}.pth"
SIGLIP2 = HUB + "google/siglip2-{}-patch16-256/resolve/main/model.safetensors"

# What the rows of one family share.
CROCO = dict(
    license="CC BY-NC-SA 4.0",
    state_dict_key="model",
    prefix=r"enc_(?=blocks|norm)|(?=patch_embed\.)",  # enc_blocks.0 becomes blocks.0; patch_embed is kept
    vit_kwargs=dict(position="rope"),
    domain="rooms",
    shape=vit_shape("large", 16, class_token=False),
)
DUNE = dict(
    license="CC BY-NC-SA 4.0",
    state_dict_key="model",
    prefix=r"((module|_orig_mod)\.)*encoder\.",
)
DEPTH_ANYTHING = dict(
    prefix=r"pretrained\.",
    distill_cls=False,  # its head reads the patch tokens only
    domain="rooms",
)
SIGLIP = dict(
    license="Apache-2.0",
    prefix=r"vision_model\.",
    rename={r"^head\.": "pool."},
    vit_kwargs=dict(position="size", gelu="tanh"),
    pool="attention",
    mean_std=MEAN_STD_HALF,
    generic=True,
)
DINOV3 = dict(
    prefix=r"(?!local_cls_norm\.)",
    vit_kwargs=dict(position="rope_centered", eps=1e-5),
    generic=True,
)
DINOV3_GATED = dict(
    DINOV3,
    url="https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
    license="DINOv3 License",
)
EUPE = dict(DINOV3, license="FAIR noncommercial", access_note="its .pt file")

WRAPPERS = r"((module|_orig_mod|backbone|dinov[23]\w*)\.)*"  # what trainers put before an encoder's keys
# How files name an encoder's tensors: {layout: (the key that shows it, {regular expression: replacement})}
LAYOUTS = {
    "the original or timm's": (
        r"patch_embed\.proj\.weight",
        {
            r"^(storage_tokens|reg_token)$": "register_tokens",
            r"^rope_embed\.periods$": "rope_periods",
            r"\.gamma_(\d)$": r".ls\1.gamma",
            r"\.mlp\.w12\.": ".mlp.fc1.",
            r"\.mlp\.w3\.": ".mlp.fc2.",
        },
    ),
    "Hugging Face's": (
        r"embeddings\.patch_embeddings?\.(projection\.)?weight",
        {
            r"^embeddings\.patch_embeddings?\.(projection\.)?": "patch_embed.proj.",
            r"^embeddings\.position_embeddings?(\.weight)?$": "pos_embed",
            r"^embeddings\.": "",
            r"^((encoder|model)\.)?layers?\.": "blocks.",
            r"\.layer_norm(\d)\.": r".norm\1.",
            r"\.(self_attn|attention|attention\.attention)\.([qkv])(_proj|uery|ey|alue)\.": r".attn.\2.",
            r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.": ".attn.proj.",
            r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
            r"\.mlp\.(weights_in|up_proj)\.": ".mlp.fc1.",
            r"\.mlp\.(weights_out|down_proj)\.": ".mlp.fc2.",
            r"^(post_)?layernorm\.": "norm.",
        },
    ),
}

TEACHERS = {
    # DUNE's three: images of objects, 3D scenes, people. Its DINOv2 resizes positions with the 0.1 offset.
    "dinov2": Teacher(
        url=DINOV2.format("vitl14", "_reg4"),
        license="Apache-2.0",
        generic=True,
        shape=vit_shape("large", 14, registers=4),
    ),
    "mast3r": Teacher(
        url=NAVER + "MASt3R/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth",
        mean_std=MEAN_STD_HALF,
        **CROCO,
    ),
    "multihmr": Teacher(
        url=NAVER + "MultiHMR/multiHMR_672_L.pt",
        license="CC BY-NC-SA 4.0",
        state_dict_key="model_state_dict",
        prefix=r"backbone\.encoder\.",
        distill_cls=False,  # its head reads the patch tokens only
        domain="people",
        shape=vit_shape("large", 14),
    ),
    # DINOv2 as its hub builds it, and other sizes.
    "dinov2_reg": Teacher(
        url=DINOV2.format("vitl14", "_reg4"),
        license="Apache-2.0",
        vit_kwargs=dict(position="antialias"),
        generic=True,
        shape=vit_shape("large", 14, registers=4),
    ),
    "dinov2_vits14": Teacher(
        url=DINOV2.format("vits14", ""),
        license="Apache-2.0",
        generic=True,
        shape=vit_shape("small", 14),
    ),
    "dinov2_vitb14": Teacher(
        url=DINOV2.format("vitb14", ""),
        license="Apache-2.0",
        generic=True,
        shape=vit_shape("base", 14),
    ),
    "dinov2_vitg14": Teacher(
        url=DINOV2.format("vitg14", ""),
        license="Apache-2.0",
        generic=True,
        shape=vit_shape("large", 14, **GIANT),
    ),
    "dinov2_vitg14_reg": Teacher(
        url=DINOV2.format("vitg14", "_reg4"),
        license="Apache-2.0",
        vit_kwargs=dict(position="antialias"),
        generic=True,
        shape=vit_shape("large", 14, registers=4, **GIANT),
    ),
    # UNIC's four.
    "dino": Teacher(
        url=META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        license="Apache-2.0",
        shape=vit_shape("base", 16),
    ),
    "ibot": Teacher(
        url=BYTEDANCE + "archive/2022/ibot/vitb_16_rand_mask/checkpoint_teacher.pth",
        license="Apache-2.0",
        state_dict_key="state_dict",
        shape=vit_shape("base", 16),
    ),
    "deit3": Teacher(
        url=META + "deit/deit_3_base_224_1k.pth",
        license="Apache-2.0",
        state_dict_key="model",
        prefix=r"(?!head\.)",
        shape=vit_shape("base", 16, layer_scale=1e-4),
    ),
    "dbotft": Teacher(
        url=BYTEDANCE + "mmodal/dbot/84.5_dbot_base_finetune.pth",
        license="CC BY-NC 4.0",
        state_dict_key="model",
        prefix=r"(?!head\.)",
        rename={r"^fc_norm\.": "norm."},
        pool="mean",
        shape=vit_shape("base", 16),
    ),
    # A DUNE as teacher of the next one: these, or any checkpoint of ours by --weights dune_base=FILE.
    "dune_base": Teacher(
        url=dune.PUBLISHED_URL.format("dune_vitbase14_448"),
        shape=vit_shape("base", 14, registers=4),
        **DUNE,
    ),
    "dune_small": Teacher(
        url=dune.PUBLISHED_URL.format("dune_vitsmall14_448"),
        shape=vit_shape("small", 14, registers=4),
        **DUNE,
    ),
    # 3D scenes and depth.
    "dust3r": Teacher(
        url=NAVER + "DUSt3R/DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth",
        mean_std=MEAN_STD_HALF,
        **CROCO,
    ),
    "croco": Teacher(
        url=NAVER + "CroCo/CroCo_V2_ViTLarge_BaseDecoder.pth",
        **CROCO,
    ),
    "vggt": Teacher(
        url=HUB + "facebook/VGGT-1B/resolve/main/model.pt",
        license="VGGT, non-commercial",
        prefix=r"aggregator\.patch_embed\.",
        vit_kwargs=dict(position="antialias"),
        distill_cls=False,
        domain="rooms",
        shape=vit_shape("large", 14, registers=4),
    ),
    "depth_anything_v2_vits": Teacher(
        url=DEPTH_ANYTHING_V2.format("Small", "vits"),
        license="Apache-2.0",
        shape=vit_shape("small", 14),
        **DEPTH_ANYTHING,
    ),
    "depth_anything_v2_vitb": Teacher(
        url=DEPTH_ANYTHING_V2.format("Base", "vitb"),
        license="CC BY-NC 4.0",
        shape=vit_shape("base", 14),
        **DEPTH_ANYTHING,
    ),
    "depth_anything_v2_vitl": Teacher(
        url=DEPTH_ANYTHING_V2.format("Large", "vitl"),
        license="CC BY-NC 4.0",
        shape=vit_shape("large", 14),
        **DEPTH_ANYTHING,
    ),
    # Trained on images alone, or on images and text.
    "mae_vitl16": Teacher(
        url=META + "mae/pretrain/mae_pretrain_vit_large.pth",
        license="CC BY-NC 4.0",
        state_dict_key="model",
        vit_kwargs=dict(position="size"),
        distill_cls=False,
        shape=vit_shape("large", 16),
    ),
    "siglip2_vitb16": Teacher(
        url=SIGLIP2.format("base"),
        shape=vit_shape("base", 16, image_size=256, class_token=False),
        **SIGLIP,
    ),
    "siglip2_vitl16": Teacher(
        url=SIGLIP2.format("large"),
        shape=vit_shape("large", 16, image_size=256, class_token=False),
        **SIGLIP,
    ),
    "dinov3_vits16": Teacher(
        access_note="dinov3_vits16_pretrain_lvd1689m-*.pth",
        shape=vit_shape("small", 16, registers=4),
        **DINOV3_GATED,
    ),
    "dinov3_vitb16": Teacher(
        access_note="dinov3_vitb16_pretrain_lvd1689m-*.pth",
        shape=vit_shape("base", 16, registers=4),
        **DINOV3_GATED,
    ),
    "dinov3_vitl16": Teacher(
        access_note="dinov3_vitl16_pretrain_lvd1689m-*.pth",
        shape=vit_shape("large", 16, registers=4),
        **DINOV3_GATED,
    ),
    "eupe_vitt16": Teacher(
        url=HUB + "facebook/EUPE-ViT-T",
        shape=vit_shape("small", 16, registers=4, embed_dim=192, num_heads=3),
        **EUPE,
    ),
    "eupe_vits16": Teacher(
        url=HUB + "facebook/EUPE-ViT-S",
        shape=vit_shape("small", 16, registers=4),
        **EUPE,
    ),
    "eupe_vitb16": Teacher(
        url=HUB + "facebook/EUPE-ViT-B",
        shape=vit_shape("base", 16, registers=4),
        **EUPE,
    ),
}


def list_teachers():
    """Print each teacher's domain, class token and license, and its file if it is here, else its address."""
    template = "{:23} {:8} {:13} {:21} {}".format
    print(template("teacher", "domain", "class token", "license", "file or address"))
    for name, row in TEACHERS.items():
        path = dune.cached_path(row.url) if row.url else ""
        place = path if os.path.isfile(path) else row.url
        cls = "yes" if row.distill_cls else "not distilled"
        if not row.pool and not row.shape.get("class_token", True):
            cls = "none"
        print(template(name, row.domain, cls, row.license, place))


# ---- The frozen teacher ------------------------------------------------------------------------------------

class FrozenTeacher(nn.Module):
    """A frozen encoder behind one interface: ImageNet-normalized images in, tokens on the requested grid out.

    name   row of TEACHERS: its pool, distill_cls and mean_std are used
    vit    the encoder, with an AttentionPool as vit.pool if the row says so
    dtype  type of the features. bf16: the weights of matrix products are bf16 too, and run under autocast;
           all else is fp32, also the residual stream

    gives_cls: it returns a class feature; has_cls: the student learns it.
    head: state dict of the probe that a tiny specialist was trained with; None: the file holds none.
    file: where the weights are from; fingerprint: a number that other weights do not have.
    """

    head = None
    file = "random weights"

    def __init__(self, name, vit, dtype=torch.float32):
        super().__init__()
        row = TEACHERS[name]
        self.vit = vit
        self.dim = vit.embed_dim
        self.patch_size = vit.patch_size
        self.pool = row.pool
        self.mean_std = row.mean_std
        self.gives_cls = bool(row.pool) or vit.cls_token is not None
        self.has_cls = self.gives_cls and row.distill_cls
        self.dtype = dtype
        self.eval().requires_grad_(False)
        # Of the fp32 weights, before they are cast: the same for every dtype.
        hashes = [torch.hash_tensor(x.cpu()).item() for x in vit.state_dict().values()]
        self.fingerprint = data.hash64(*hashes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)

    @torch.no_grad()
    def forward(self, images, grid=None):
        """Features {"cls": [B, D_t] or None, "patch": [B, N, D_t]}.

        images  [B, 3, H, W], ImageNet-normalized; B may be 0
        grid    (rows, cols), N = rows * cols: the images are resized to this token grid. None: they are not
                resized, and UserError if a side is not divisible by the patch size
        """
        grid = grid or token_grid(images, self.patch_size)
        if len(images) == 0:
            patch = images.new_empty(0, grid[0] * grid[1], self.dim, dtype=self.dtype)
            cls = images.new_empty(0, self.dim, dtype=self.dtype)
            return {"cls": cls if self.gives_cls else None, "patch": patch}
        images = resize_to_grid(images, grid, self.patch_size)
        images = renormalize(images, MEAN_STD_IMAGENET, self.mean_std)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.vit(images, norm=self.pool != "mean")
            if self.pool == "mean":
                features["cls"] = self.vit.norm(features["patch"].mean(1))
            if self.pool == "attention":
                features["cls"] = self.vit.pool(features["patch"])
        for token_type, feature in features.items():
            if feature is not None:
                features[token_type] = feature.to(self.dtype)
        return features


def resize_to_grid(images, grid, patch_size):
    """Resize images [B, 3, H, W] to grid = (rows, cols) patches of this size; bicubic, as in DUNE."""
    size = grid[0] * patch_size, grid[1] * patch_size
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=True)


def renormalize(images, source, target):
    """Images [B, 3, H, W] from one normalization into another; each is (mean, std) per color channel."""
    if source == target:
        return images
    channels = []
    # Python numbers: a tensor would have to be copied to the device at each call, and the host would wait.
    for channel, mean, std, new_mean, new_std in zip(images.unbind(1), *source, *target):
        channels.append(channel * (std / new_std) + (mean - new_mean) / new_std)
    return torch.stack(channels, 1)


class AttentionPool(nn.Module):
    """SigLIP's class feature: a learned query (the probe) attends to the patch tokens. [B, N, D] -> [B, D]"""

    def __init__(self, dim):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.probe, std=0.02)  # torch.randn on "meta" imports torch._dynamo: slow
        self.attention = nn.MultiheadAttention(dim, dim // HEAD_DIM, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, gelu="tanh")

    def forward(self, tokens):
        query = self.probe.expand(len(tokens), -1, -1)
        x, _ = self.attention(query, tokens, tokens, need_weights=False)  # [B, 1, D]
        x = x[:, 0]
        return x + self.mlp(self.layernorm(x))


# ---- Loading -----------------------------------------------------------------------------------------------

def load_teacher(name, weights=None, device="cpu", dtype=torch.float32):
    """A FrozenTeacher, its size read off the weights.

    name     a row of TEACHERS
    weights  a file in a layout of LAYOUTS, or a folder with model.safetensors. None: the published file,
             downloaded. "random": random weights of the published size, the same ones every time. "tiny": a
             specialist, trained if it is missing

    Raises UserError for an unknown name, and for a file that is missing, damaged or of another layout.
    """
    if name not in TEACHERS:
        raise UserError(f"unknown teacher '{name}'; available: {', '.join(TEACHERS)}")
    row = TEACHERS[name]
    if weights == "random":
        vit = random_encoder(name, row, device)
        return FrozenTeacher(name, vit, dtype).to(device)
    if row.access_note and not weights:
        raise UserError(f"the weights of {name} are gated: request {row.access_note} at {row.url}, "
                        f"then pass --weights {name}=FILE")
    if not row.url and not weights:
        raise UserError(f"{name} has no url: pass --weights {name}=FILE")
    if weights == "tiny":
        weights = prepare_specialist(name)
    path = str(weights or dune.download(row.url))
    with dune.user_errors(path):
        content = dune.load_checkpoint(path)
        vit = load_encoder(row, content)
    teacher = FrozenTeacher(name, vit, dtype).to(device)
    teacher.head = content.get("probe")
    teacher.file = path
    return teacher


def random_encoder(name, row, device):
    """A ViT of the published size. Its seed depends on the name alone: a new row changes no other teacher."""
    with torch.device(device), torch.random.fork_rng([]):
        torch.manual_seed(data.hash64(*name.encode()))
        vit = ViT(**row.shape, **row.vit_kwargs)
        if row.pool == "attention":
            vit.pool = AttentionPool(vit.embed_dim)
    return vit


def load_encoder(row, content):
    """The ViT in the content of a published file."""
    state = encoder_state(row, content)
    with torch.device("meta"):  # nothing is initialized, nor any random number drawn
        vit = dune.vit_from_state(state, **row.vit_kwargs)
        if row.pool == "attention":
            vit.pool = AttentionPool(vit.embed_dim)
    return dune.load_strict(vit, state)


def encoder_state(row, content):
    """The encoder's tensors in the content of a file, under the names of ViT and AttentionPool."""
    if row.state_dict_key:
        content = content[row.state_dict_key]
    elif "teacher" in content:  # a training checkpoint of DINO or DINOv2
        content = content["teacher"]
    state = {}
    for key, value in content.items():
        match = re.match(row.prefix, key)
        if match and torch.is_tensor(value):
            state[rename(key[match.end():], row.rename)] = value
    prefix, patterns = recognize(state, content)
    state = {rename(key, patterns): value for key, value in dune.strip_prefix(state, prefix).items()}
    state = dune.normalize_keys(state)
    join_qkv(state)
    if "pos_embed" in state:
        add_class_position(state)
    if row.vit_kwargs.get("position") == "rope_centered":
        from_dinov3(state)
    return state


def rename(key, patterns):
    for pattern, replacement in patterns.items():
        key = re.sub(pattern, replacement, key)
    return key


def recognize(state, content):
    """(what to cut off the keys of `state`, the patterns of its layout). UserError if it has none of them.

    content: the file's, to name its keys.
    """
    for key in state:
        for shown_by, patterns in LAYOUTS.values():
            match = re.fullmatch(f"({WRAPPERS}){shown_by}", key)
            if match:
                return match[1], patterns
    keys = ", ".join(map(str, list(content)[:3]))
    raise UserError(f"unknown layout, its first keys: {keys}; known layouts: {', '.join(LAYOUTS)}")


def join_qkv(state):
    """Hugging Face keeps q, k and v in three tensors; DINOv3's k has no bias, which would change nothing."""
    for key in list(state):
        if ".attn.q." in key:
            keys = [key.replace(".q.", f".{x}.") for x in "qkv"]
            if state[key].ndim == 1:
                state.setdefault(keys[1], torch.zeros_like(state[key]))
            state[key.replace(".q.", ".qkv.")] = torch.cat([state.pop(key) for key in keys])


def add_class_position(state):
    """timm's and DeiT-3's positions are of patches alone: the class token gets 0. SigLIP's lack an axis."""
    position = state["pos_embed"]
    position = position.reshape(1, -1, position.shape[-1])
    if "cls_token" in state and math.isqrt(position.shape[1])**2 == position.shape[1]:
        position = F.pad(position, (0, 0, 1, 0))
    state["pos_embed"] = position


def from_dinov3(state):
    """A mask multiplies the bias of q, k and v. DINOv3's RoPE pairs channel j of a head with j + 32, ours j
    with j + 16 in each half of a head: with the middle quarters of q's and k's rows swapped they agree.

    Without masks the file is Hugging Face's or timm's. They leave out the periods, and timm a bias of zero.
    """
    quarter = HEAD_DIM // 4
    if "blocks.0.attn.qkv.bias_mask" not in state:
        state.setdefault("rope_periods", 100 ** (torch.arange(quarter) / quarter))
        for key in list(state):
            if key.endswith(".attn.qkv.weight"):
                state.setdefault(key.replace("weight", "bias"), torch.zeros(len(state[key])))
    for key in list(state):
        if key.endswith((".attn.qkv.weight", ".attn.qkv.bias")):
            qkv = state[key] * state.pop(f"{key}_mask", 1)
            qkv = qkv.unflatten(0, (3, -1, 4, quarter))  # [3, heads, 4 quarters, 16, ...]
            qkv[:2] = qkv[:2, :, [0, 2, 1, 3]]
            state[key] = qkv.flatten(0, 3)


# ---- Probes and tiny specialists ---------------------------------------------------------------------------

def fast_bf16(device):
    """Whether the device multiplies bf16 in hardware: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def train(
    module,
    loss,
    steps,
    lr,
    weight_decay=1e-2,
    beta2=0.999,
    clip=0.0,
    description=None,
):
    """Training loop of everything small: AdamW (Muon for matrices in blocks) with a one-cycle learning rate.

    module       what is trained: a probe, or a specialist and its probe
    loss         loss(step) returns the scalar to minimize at this step
    lr           the highest learning rate of the cycle; twice as high for Muon
    clip         largest gradient norm, 0: no clipping
    description  label of a progress bar, None: no bar
    """
    matrices, others = dune.split_matrices(module)
    optimizer = Muon(
        [{"params": others}, {"params": matrices, "muon": torch.float32}],
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, beta2),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [lr, 2 * lr],
        total_steps=steps + 1,
        pct_start=0.1,
    )
    for step in tqdm(range(steps), description, leave=False, disable=description is None):
        optimizer.zero_grad()
        loss(step).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        schedule.step()


class Probe(nn.Module):
    """Linear layers that predict the labels of one domain from features on a token grid (rows, cols).

    features: {"cls": [B, dim] or None, "patch": [B, N, dim]}. A subclass defines `outputs` and the methods
    targets(scenes)         {name: labels on the grid} of a batch of data.labelled_scenes
    forward(features)       {name: predictions}
    loss(out, targets)      a scalar
    metrics(out, targets)   {column of the study: number}
    """
    outputs = {}  # {head: number of channels}

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.heads = nn.ModuleDict()
        for name, channels in self.outputs.items():
            self.heads[name] = nn.Linear(dim, channels)

    def pool(self, maps):
        """Average maps [B, C, S, S] over each patch -> [B, N, C]."""
        return F.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT


class PeopleProbe(Probe):
    """The body part of each patch."""
    outputs = {"patch": len(PARTS)}

    def targets(self, scenes):
        """"share" [B, N, classes]: how much of each patch has each label. The background counts half, so that
        patches with a thin part are not lost.
        """
        one_hot = F.one_hot(scenes["labels"], self.outputs["patch"])
        maps = one_hot.permute(0, 3, 1, 2).float()
        maps[:, 0] /= 2
        share = self.pool(maps)
        return {"share": share / share.sum(-1, keepdim=True)}

    def forward(self, features):
        return {"patch": self.heads["patch"](features["patch"])}

    def loss(self, out, targets):
        logits = out["patch"].flatten(0, 1)
        share = targets["share"].flatten(0, 1)
        return F.cross_entropy(logits, share)

    def metrics(self, out, targets):
        """Mean intersection over union of the labels that occur, in %."""
        truth = targets["share"].argmax(-1)
        guess = out["patch"].argmax(-1)
        ious = []
        for label in truth.unique():
            both = (truth == label) & (guess == label)
            either = (truth == label) | (guess == label)
            ious.append(both.sum() / either.sum())
        return {"mIoU": 100 * torch.stack(ious).mean().item()}


class ObjectsProbe(PeopleProbe):
    """The kind of the object, from the class token or the mean patch; background or kind of each patch."""
    outputs = {"patch": len(KINDS) + 1, "kind": len(KINDS)}

    def targets(self, scenes):
        return {**super().targets(scenes), "kind": scenes["kind"]}

    def forward(self, features):
        cls = features["cls"]
        if cls is None:
            cls = features["patch"].mean(1)
        kind = self.heads["kind"](cls)
        return {**super().forward(features), "kind": kind}

    def loss(self, out, targets):
        kind_loss = F.cross_entropy(out["kind"], targets["kind"])
        return super().loss(out, targets) + kind_loss

    def metrics(self, out, targets):
        """And the accuracy of the kind, in %."""
        correct = out["kind"].argmax(-1) == targets["kind"]
        accuracy = 100 * correct.float().mean().item()
        return {"linear": accuracy, **super().metrics(out, targets)}


class RoomsProbe(Probe):
    """The mean log depth [B, N, 1] and the mean surface normal [B, N, 3] of each patch."""
    outputs = {"depth": 1, "normals": 3}

    def targets(self, scenes):
        depth = self.pool(scenes["depth"].log()[:, None])
        normals = self.pool(scenes["normals"].permute(0, 3, 1, 2))
        return {"depth": depth, "normals": F.normalize(normals, dim=-1)}

    def forward(self, features):
        depth = self.heads["depth"](features["patch"])
        normals = self.heads["normals"](features["patch"])
        return {"depth": depth, "normals": F.normalize(normals, dim=-1)}

    def loss(self, out, targets):
        cosine = (out["normals"] * targets["normals"]).sum(-1)
        depth_loss = F.l1_loss(out["depth"], targets["depth"])
        return 2 * depth_loss + (1 - cosine).mean()

    def metrics(self, out, targets):
        """Depth: RMSE in meters, share within a factor of 1.25 in %. Normals: mean error in degrees."""
        error = out["depth"].exp() - targets["depth"].exp()
        log_error = (out["depth"] - targets["depth"]).abs()
        cosine = (out["normals"] * targets["normals"]).sum(-1)
        close = log_error < math.log(1.25)
        angle = cosine.clamp(-1, 1).acos()
        return {
            "depth RMSE": error.square().mean().sqrt().item(),
            "delta1": 100 * close.float().mean().item(),
            "normals": torch.rad2deg(angle).mean().item(),
        }


PROBES = {"objects": ObjectsProbe, "rooms": RoomsProbe, "people": PeopleProbe}


# Tiny specialists: stand-ins for the three teachers, as different as these (class token and registers or not,
# RoPE or learned positions, patch 14 or 16). Each is trained on its own domain only, from labels.

TINY = dict(image_size=112, embed_dim=128, depth=4, num_heads=2, layer_scale=None)
SPECIALISTS = {  # what ViT is built with
    "dinov2": dict(TINY, patch_size=14, registers=4),
    "mast3r": dict(TINY, patch_size=16, registers=0, class_token=False),
    "multihmr": dict(TINY, patch_size=14, registers=0),
}
SPECIALIST_VERSION = 2  # of scenes and training: the next number makes everybody train them again
SPECIALIST_SCENES = 1500
SPECIALIST_IMAGES = {"dinov2": 3375, "mast3r": 2250, "multihmr": 2250}  # seen in training
SPECIALIST_BATCH = 16
SPECIALIST_LR = 2e-3
TINY_GRID = 8, 8


def prepare_specialist(name):
    """Path of a tiny specialist. It is trained first if it is not in the cache folder yet: half a minute."""
    if name not in SPECIALISTS:
        raise UserError(f"no tiny teacher for {name}; available: {', '.join(SPECIALISTS)}")
    path = specialist_path(name)
    if not os.path.exists(path):
        data.check_writable(data.cache_folder())
        train_specialist(name)
    return path


def specialist_path(name):
    file = f"tiny-{name}-{SPECIALIST_VERSION}.pth"
    return os.path.join(data.cache_folder(), file)


def train_specialist(name, count=SPECIALIST_SCENES):
    """Train a specialist on `count` scenes of its domain, together with the probe of the domain.

    Writes the encoder in the layout of the published file, and the probe's state dict under the key "probe".
    """
    row = TEACHERS[name]
    scenes = data.labelled_scenes(row.domain, 0, count, TINY["image_size"])
    torch.manual_seed(0)
    vit = ViT(**SPECIALISTS[name], **row.vit_kwargs)
    probe = PROBES[row.domain](vit.embed_dim, TINY_GRID)
    order = torch.cat([torch.randperm(count) for _ in range(3)])
    batches = order[:SPECIALIST_IMAGES[name]].split(SPECIALIST_BATCH)

    def loss(step):
        index = batches[step]
        batch = {key: value[index] for key, value in scenes.items()}
        images = data.normalize(batch["image"])
        images = renormalize(images, MEAN_STD_IMAGENET, row.mean_std)
        images = resize_to_grid(images, TINY_GRID, vit.patch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
            out = probe(vit(images))
        out = {key: value.float() for key, value in out.items()}
        return probe.loss(out, probe.targets(batch))

    train(
        nn.ModuleList([vit, probe]),
        loss,
        len(batches),
        SPECIALIST_LR,
        weight_decay=0.03,
        beta2=0.99,
        clip=1.0,
        description=f"tiny {name}: learns {row.domain}",
    )
    content = published_layout(name, vit.state_dict())
    content["probe"] = probe.state_dict()
    with data.atomic_write(specialist_path(name)) as file:
        torch.save(content, file)


def published_layout(name, state):
    """A specialist's state dict as the published file of that teacher would hold it."""
    if name == "mast3r":
        renamed = {}
        for key, value in state.items():
            key = re.sub(r"^(blocks|norm)\.", r"enc_\1.", key)
            renamed[key] = value
        return {"model": renamed}
    if name == "multihmr":
        prefixed = {f"backbone.encoder.{key}": value for key, value in state.items()}
        return {"model_state_dict": prefixed}
    return dict(state)


# ---- Two photographs to 3D ---------------------------------------------------------------------------------
# MASt3R's decoder and heads (arXiv 2406.09756), on its own encoder or on a DUNE (DUNE section 4). They are
# for inference only. Modules have the names of the published files.

class TwoView(nn.Module):
    """MASt3R on a frozen encoder: its own, or a DUNE.

    dim, depth  width of the decoder, and how many pairs of blocks it has (one block for each view)
    own_norm    True (DUNE-MASt3R): the decoder's own LayerNorm replaces the last one of the encoder, which
                expects ImageNet-normalized images
    """

    def __init__(self, encoder, dim=768, depth=12, own_norm=True):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.embed_dim) if own_norm else None
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dim) for _ in range(depth))
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(dim) for _ in range(depth))
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)
        self.downstream_head1 = TwoViewHead(encoder, dim, depth)
        self.downstream_head2 = TwoViewHead(encoder, dim, depth)

    @torch.no_grad()
    def forward(self, view1, view2):
        """Two batches [B, 3, H, W] with values -1..1 (MASt3R's normalization); the views may differ in size.

        Returns a dict for each view, all in fp32 (on a GPU encoder and decoder run in bf16):
        pts3d      [B, H, W, 3] points in meters, those of both views in the camera frame of view 1 (x right,
                   y down, z forward)
        conf       [B, H, W] their confidence, > 1
        desc       [B, H, W, 24] unit descriptors for matching
        desc_conf  [B, H, W] their confidence, > 0
        Raises UserError if a side is not divisible by the patch size.
        """
        grid1 = token_grid(view1, self.patch_size)
        grid2 = token_grid(view2, self.patch_size)
        rope1 = dune.rope_cos_sin(*grid1, 0, HEAD_DIM, view1.device)
        rope2 = dune.rope_cos_sin(*grid2, 0, HEAD_DIM, view2.device)
        with torch.autocast(view1.device.type, torch.bfloat16, enabled=view1.is_cuda):
            layers1 = [self.encode(view1)]
            layers2 = [self.encode(view2)]
            x1 = self.decoder_embed(layers1[0])
            x2 = self.decoder_embed(layers2[0])
            for block1, block2 in zip(self.dec_blocks, self.dec_blocks2):
                # Both blocks read the outputs of the previous pair.
                x1, x2 = block1(x1, x2, rope1, rope2), block2(x2, x1, rope2, rope1)
                layers1.append(x1)
                layers2.append(x2)
            layers1[-1] = self.dec_norm(x1)
            layers2[-1] = self.dec_norm(x2)
        return self.downstream_head1(layers1, grid1), self.downstream_head2(layers2, grid2)

    def encode(self, images):
        """Images [B, 3, H, W] in MASt3R's normalization -> the tokens that the decoder reads, [B, N, D]."""
        if self.norm is None:
            return self.encoder(images)["patch"]
        images = renormalize(images, MEAN_STD_HALF, MEAN_STD_IMAGENET)
        tokens = self.encoder(images, norm=False)["patch"]
        return self.norm(tokens)


class DecoderBlock(nn.Module):
    """A pre-norm block with cross-attention to the other view y. RoPE: each view has its own positions."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim // HEAD_DIM)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_y = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, y, rope_x, rope_y):
        """x [B, N, D], y [B, M, D] -> [B, N, D]"""
        x = x + self.attn(self.norm1(x), rope_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rope_x, rope_y)
        return x + self.mlp(self.norm3(x))


class CrossAttention(nn.Module):
    """Queries from x, keys and values from y."""

    def __init__(self, dim):
        super().__init__()
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, rope_x, rope_y):
        q = dune.apply_rope(split_heads(self.projq(x)), rope_x)
        k = dune.apply_rope(split_heads(self.projk(y)), rope_y)
        v = split_heads(self.projv(y))
        out = dune.attention(q, k, v)  # [B, heads, N, 64]
        out = out.transpose(1, 2)      # [B, N, heads, 64]
        return self.proj(out.flatten(2))


def split_heads(x):
    """[B, N, D] -> [B, D / 64, N, 64]"""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class TwoViewHead(nn.Module):
    """The outputs of one view (see TwoView.forward) from the list [encoder tokens, output of each block]."""

    def __init__(self, encoder, dim, depth):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.dpt_layers = 0, depth // 2, depth * 3 // 4, depth
        self.dpt = DPT(encoder.embed_dim, dim, self.patch_size)
        joined = encoder.embed_dim + dim
        self.head_local_features = Mlp(joined, 4 * joined, (24 + 1) * self.patch_size**2)

    def forward(self, layers, grid):
        layers = [layer.float() for layer in layers]
        dense = self.dpt([layers[i] for i in self.dpt_layers], grid)  # [B, 4, H, W]
        dense = dense.permute(0, 2, 3, 1)                             # [B, H, W, 4]
        points = dense[..., :3]
        distance = points.norm(dim=-1, keepdim=True)

        joined = torch.cat([layers[0], layers[-1]], -1)
        local = self.head_local_features(joined)           # [B, N, 25 * patch_size^2]
        local = local.transpose(1, 2).unflatten(2, grid)   # [B, 25 * patch_size^2, rows, cols]
        local = F.pixel_shuffle(local, self.patch_size)    # [B, 25, H, W]
        local = local.permute(0, 2, 3, 1)                  # [B, H, W, 25]
        return {
            "pts3d": points / distance.clamp(min=1e-8) * distance.expm1(),
            "conf": 1 + dense[..., 3].exp(),
            "desc": F.normalize(local[..., :24], dim=-1),
            "desc_conf": local[..., 24].exp(),
        }


class DPT(nn.Module):
    """Dense prediction transformer (Ranftl et al. 2021): four layers of tokens -> [B, 4, H, W].

    The first layer has encoder_dim channels, the others dim. Their maps: 4, 2, 1, 1/2 times the token grid.
    """

    def __init__(self, encoder_dim, dim, patch_size):
        super().__init__()
        self.act_postprocess = nn.ModuleList([
            nn.Sequential(nn.Conv2d(encoder_dim, 96, 1), nn.ConvTranspose2d(96, 96, 4, 4)),
            nn.Sequential(nn.Conv2d(dim, 192, 1), nn.ConvTranspose2d(192, 192, 2, 2)),
            nn.Sequential(nn.Conv2d(dim, 384, 1)),
            nn.Sequential(nn.Conv2d(dim, 768, 1), nn.Conv2d(768, 768, 3, 2, 1)),
        ])
        widths = 96, 192, 384, 768
        self.layer_rn = nn.ModuleList(nn.Conv2d(width, 256, 3, padding=1, bias=False) for width in widths)
        self.refinenet1 = Fusion(256)
        self.refinenet2 = Fusion(256)
        self.refinenet3 = Fusion(256)
        self.refinenet4 = Fusion(256)
        self.head = nn.Sequential(
            nn.Conv2d(256, 128, 3, padding=1),
            nn.Upsample(scale_factor=patch_size / 8, mode="bilinear", align_corners=True),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 4, 1),
        )

    def forward(self, layers, grid):
        maps = []
        for tokens, resize, reduce in zip(layers, self.act_postprocess, self.layer_rn):
            x = tokens.transpose(1, 2)         # [B, D, N]
            x = resize(x.unflatten(2, grid))   # [B, 96 ... 768, rows * 4 ... 1/2, cols * 4 ... 1/2]
            maps.append(reduce(x))             # [B, 256, ...]
        x = self.refinenet4(maps[3])
        x = self.refinenet3(x, maps[2])
        x = self.refinenet2(x, maps[1])
        x = self.refinenet1(x, maps[0])
        return self.head(x)


class Fusion(nn.Module):
    """Add a finer map (skip) to the coarser one, and double the resolution."""

    def __init__(self, dim):
        super().__init__()
        self.resConfUnit1 = ResidualConv(dim)  # unused in refinenet4, which has no skip
        self.resConfUnit2 = ResidualConv(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x, skip=None):
        if skip is not None:
            rows, cols = skip.shape[-2:]
            x = x[..., :rows, :cols] + self.resConfUnit1(skip)  # an odd grid was halved upwards
        x = self.resConfUnit2(x)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class ResidualConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        hidden = self.conv1(F.relu(x))
        return x + self.conv2(F.relu(hidden))


TWO_VIEW = {
    "dune": dune.PUBLISHED_URL.format("dunemast3r_cvpr25_vitbase"),
    "dune_small": dune.PUBLISHED_URL.format("dunemast3r_cvpr25_vitsmall"),
    "mast3r": TEACHERS["mast3r"].url,
}
# Keys of published files that belong to the encoder, or to nothing (layer1_rn is a copy of layer_rn.0, ...).
IGNORED_KEYS = (r"imagenet_(mean|std)$|(mast3r\.)?(mask_token$|patch_embed\.|enc_(blocks|norm)\.)|"
                r".*\.scratch\.layer\d_rn\.")


def load_two_view(weights=None, device="cpu"):
    """A TwoView in eval mode, its size read off the tensors.

    weights  a published MASt3R or DUNE-MASt3R file, or a name of TWO_VIEW, which is downloaded. None: "dune"

    A DUNE-MASt3R file names its encoder, a published DUNE, which is downloaded too.
    Raises UserError for a file that is missing, damaged or of another architecture.
    """
    path = str(weights or "dune")
    if path in TWO_VIEW and not os.path.exists(path):
        path = dune.download(TWO_VIEW[path])
    with dune.user_errors(path):
        content = dune.load_checkpoint(path)
        on_dune = "dune_backbone_name" in content
        if on_dune:  # "dune_vitbase_14_448_paper_encoder" is in dune_vitbase14_448_paper.pth
            name = content["dune_backbone_name"].removesuffix("_encoder").replace("_14_", "14_")
            encoder = dune.load(name, encoder_only=True)
        else:
            encoder = load_encoder(TEACHERS["mast3r"], content)
        state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        for key, value in content["model"].items():
            if not re.match(IGNORED_KEYS, key):
                name = key.removeprefix("mast3r.").replace("dpt.scratch.", "dpt.")
                state[name] = value
        blocks = {key.split(".")[1] for key in state if key.startswith("dec_blocks.")}
        twins = {}  # a file with one set of blocks uses them for both views
        for key, value in state.items():
            if key.startswith("dec_blocks."):
                twins[key.replace("dec_blocks", "dec_blocks2")] = value
        if not twins.keys() & state.keys():
            state.update(twins)
        with torch.device("meta"):
            model = TwoView(encoder, len(state["decoder_embed.bias"]), len(blocks), own_norm=on_dune)
        dune.load_strict(model, state)
    return model.eval().to(device)
