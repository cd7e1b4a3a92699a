"""Every published layout loads, and the loaded encoders compute what the published code computes."""

import dataclasses
import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import data
import dune
import teachers
import train
from dune import UserError

# The published form of the file; most of the text tower is cut off.
SIGLIP = os.path.join(os.path.dirname(__file__), "golden", "siglip2.safetensors")


def save(content, tmp_path):
    path = str(tmp_path / "teacher.pth")
    torch.save(content, path)
    return path


# ---- What the published code computes ----------------------------------------------------------------------

@pytest.mark.parametrize("name, weights, outputs", [
    ("dinov2", "dinov2_reg", "dinov2_reg_dune"),
    ("dinov2_reg", "dinov2_reg", "dinov2_reg"),
    ("mast3r", "mast3r", "mast3r"),
    ("multihmr", "multihmr", "multihmr"),
    ("siglip2_vitb16", "siglip2", "siglip2"),
    ("dinov3_vitl16", "dinov3", "dinov3"),
    ("eupe_vitb16", "dinov3", "dinov3"),
])
def test_published_encoders(name, weights, outputs, golden, close, tmp_path):
    file = golden(weights)
    path = SIGLIP if weights == "siglip2" else save(file["checkpoint"], tmp_path)
    teacher = teachers.load_teacher(name, path)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    for case, inputs in zip(golden(outputs)["cases"], file["cases"]):  # trained size, landscape, portrait
        # The fixtures' images are in the teacher's own normalization.
        image = teachers.renormalize(inputs["image"], teacher.mean_std, teachers.MEAN_STD_IMAGENET)
        out = teacher(image)
        close(out["patch"], case["patch"])
        if "cls" in case:
            close(out["cls"], case["cls"])
        else:
            assert out["cls"] is None


@pytest.mark.parametrize("name", ["dino", "deit3", "dbotft", "ibot"])
def test_encoders_of_unic(name, golden, close, tmp_path):
    file = golden(f"unic_{'dino' if name == 'ibot' else name}")
    content = {"state_dict": file["checkpoint"]} if name == "ibot" else file["checkpoint"]
    out = teachers.load_teacher(name, save(content, tmp_path))(file["image"])
    close(out["cls"], file["cls"])
    close(out["patch"], file["patch"])


def test_nested_block_names_and_half_precision(golden, close, tmp_path):
    file = golden("multihmr")
    state = file["checkpoint"]["model_state_dict"]
    nested = {key.replace("blocks.", "blocks.0."): value.half() for key, value in state.items()}
    teacher = teachers.load_teacher("multihmr", save({"model_state_dict": nested}, tmp_path))
    case = file["cases"][0]
    close(teacher(case["image"])["patch"], case["patch"], 2e-3)


HUB = os.path.join(os.path.dirname(SIGLIP), "hub")


@pytest.mark.parametrize("name, file", [
    ("dinov2_vits14", "hf_dinov2"), ("dinov2_reg", "hf_dinov2_reg"), ("dinov2_vitg14", "hf_dinov2_swiglu"),
    ("dinov3_vits16", "hf_dinov3"), ("dinov2_vits14", "timm_dinov2"), ("dinov2_reg", "timm_dinov2_reg"),
    ("dinov3_vits16", "timm_dinov3"),
])
def test_layouts_of_the_hub(name, file, golden, close, tmp_path):
    """A file, and a folder that holds it as Hugging Face's do."""
    path = f"{HUB}/{file}.safetensors"
    shutil.copy(path, tmp_path / "model.safetensors")
    for weights in (path, tmp_path):
        teacher = teachers.load_teacher(name, weights)
        for case in golden(f"hub/{file}")["cases"]:
            out = teacher(case["image"])
            close(out["cls"], case["cls"])
            close(out["patch"], case["patch"])


def test_a_training_checkpoint_of_ones_own(golden, close, tmp_path):
    """Of DINO or DINOv2: the teacher's backbone, not its heads, nor the student."""
    file = golden("dinov2_reg")
    state = {f"module.backbone._orig_mod.{key}": value for key, value in file["checkpoint"].items()}
    state = {key.replace("blocks.", "blocks.0."): value for key, value in state.items()}
    state["module.dino_head.mlp.0.bias"] = torch.zeros(1)
    student = {key: torch.zeros_like(value) for key, value in state.items()}
    path = save({"student": student, "teacher": state, "epoch": 3}, tmp_path)
    case = file["cases"][0]
    close(teachers.load_teacher("dinov2", path)(case["image"])["patch"], case["patch"])


# ---- Every row ---------------------------------------------------------------------------------------------

PUBLISHED_NAMES = {  # ours -> the file's, by how the teacher's name begins
    "deit3": [(r"\.ls(\d)\.gamma", r".gamma_\1")],
    "dbotft": [(r"^norm\.", "fc_norm.")],
    "dinov2_vitg": [("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")],
    ("dinov3", "eupe"): [("^register_tokens", "storage_tokens"), ("^rope_periods", "rope_embed.periods")],
    "siglip": [(r"^pool\.", "head."), (r"^patch_embed\.proj", "embeddings.patch_embedding"),
               (r"^blocks", "encoder.layers"), ("^pos_embed", "embeddings.position_embedding.weight"),
               (r"\.norm(\d)", r".layer_norm\1"), (r"(?<!self_)attn\.proj", "self_attn.out_proj"),
               (r"^norm\.", "post_layernorm.")],
}


def as_published(name, teacher):
    """The content of the published file that would hold this teacher."""
    row = teachers.TEACHERS[name]
    siglip = name.startswith("siglip")
    state = {}
    for key, value in teacher.vit.state_dict().items():
        if "rope_periods" in teacher.vit.state_dict() and ".qkv." in key:
            q, k, v = value.unflatten(0, (3, -1, 4, 16))
            value = torch.stack([q[:, [0, 2, 1, 3]], k[:, [0, 2, 1, 3]], v]).flatten(0, 3)
        if siglip and ".qkv." in key:
            for x, part in zip("qkv", value.chunk(3)):
                state[key.replace("attn.qkv", f"self_attn.{x}_proj")] = part
        else:
            state[key] = value[0] if siglip and key == "pos_embed" else value
    for start, names in PUBLISHED_NAMES.items():
        for pattern, replacement in names if name.startswith(start) else ():
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    if name == "deit3":
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if row.prefix.startswith("enc_"):
        return teachers.published_layout("mast3r", state)
    prefix = "module.encoder." if name.startswith("dune") else re.sub(r"\(.*\)|\\", "", row.prefix)
    state = {prefix + key: value for key, value in state.items()}
    if prefix:
        state["other.weight"] = torch.zeros(1)
    return {row.state_dict_key: state} if row.state_dict_key else state


@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_published_size_and_layout(name, tmp_path, monkeypatch):
    """Random weights of the published size (one block) in the published layout load as what they were."""
    row = teachers.TEACHERS[name]
    assert row.domain in data.SCENES and row.license
    assert set(row.vit_kwargs) <= {"position", "eps", "gelu"}
    monkeypatch.setitem(teachers.TEACHERS, name, dataclasses.replace(row, shape=row.shape | {"depth": 1}))
    first = teachers.load_teacher(name, "random")
    if name == "deit3":
        first.vit.pos_embed.data[:, 0] = 0
    again = teachers.load_teacher(name, save(as_published(name, first), tmp_path))
    assert again.dim == row.shape["embed_dim"] and again.patch_size == row.shape["patch_size"]
    image = torch.randn(1, 3, 56, 84)
    one, two = first(image, grid=(4, 6)), again(image, grid=(4, 6))
    assert two["patch"].shape == (1, 24, again.dim) and two["patch"].equal(one["patch"])
    if name in ("mast3r", "dust3r", "croco"):
        assert two["cls"] is None and not again.has_cls
    else:
        assert two["cls"].equal(one["cls"])
        assert again.has_cls == (not name.startswith(("multihmr", "vggt", "mae", "depth")))


def test_random_weights_depend_on_the_name_alone(monkeypatch):
    def first_weight(name):
        return teachers.load_teacher(name, "random").vit.blocks[0].mlp.fc1.weight
    small = dict(embed_dim=64, depth=1, num_heads=1)
    table = {}
    for name in ("dinov2_vits14", "dino"):
        table[name] = dataclasses.replace(teachers.TEACHERS[name], shape=small)
    monkeypatch.setattr(teachers, "TEACHERS", table)
    before = first_weight("dino")
    monkeypatch.setattr(teachers, "TEACHERS", dict(reversed(table.items())))
    assert first_weight("dino").equal(before) and not first_weight("dinov2_vits14").equal(before)


def test_the_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(teachers, "ViT", None)  # no model is built
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "siglip2-base-patch16-256-model.safetensors").write_text("")
    teachers.list_teachers()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(teachers.TEACHERS) < set(lines)
    for word in ("objects", "yes", "Apache-2.0", teachers.TEACHERS["dinov2"].url):
        assert word in lines["dinov2"]
    assert f"{folder}/siglip2-base" in lines["siglip2_vitb16"] and "yes" in lines["siglip2_vitb16"]
    assert "https://ai.meta.com" in lines["dinov3_vits16"]
    assert "none" in lines["mast3r"] and "not distilled" in lines["multihmr"]


# ---- The interface -----------------------------------------------------------------------------------------

def test_any_patch_size_gives_the_requested_grid(golden, tmp_path):
    teacher = teachers.load_teacher("mast3r", save(golden("mast3r")["checkpoint"], tmp_path))
    image = torch.randn(2, 3, 56, 84)  # a student's, of patch 14: 4 x 6 tokens
    out = teacher(image, grid=(4, 6))["patch"]
    assert out.shape == (2, 24, 64)
    resized = F.interpolate(image, (64, 96), mode="bicubic", align_corners=True)
    assert out.equal(teacher(resized)["patch"])
    with pytest.raises(UserError, match="56x84 is not divisible by the patch size 16"):
        teacher(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mast3r", "multihmr"])
def test_no_images(name, dtype, golden, tmp_path, monkeypatch):
    teacher = teachers.load_teacher(name, save(golden(name)["checkpoint"], tmp_path), dtype=dtype)
    some = teacher(torch.randn(1, 3, 28, 42), grid=(2, 3))
    monkeypatch.setattr(teacher.vit, "forward", None)  # it does not run
    for none in (teacher(torch.zeros(0, 3, 28, 42), grid=(2, 3)),
                 teacher(torch.zeros(0, 3, 2 * teacher.patch_size, 3 * teacher.patch_size))):
        for token_type in ("cls", "patch"):
            if some[token_type] is None:
                assert none[token_type] is None
            else:
                assert none[token_type].shape == (0, *some[token_type].shape[1:])
                assert none[token_type].dtype == some[token_type].dtype == dtype


# With learned positions and LayerScale; without both.
@pytest.mark.parametrize("name", ["multihmr", "mast3r"])
def test_bf16_is_as_near_as_fp32_weights_under_autocast(name, tmp_path):
    """Error of standardized features: ours, the published way (fp32 weights, autocast), bf16 throughout."""
    torch.manual_seed(0)
    row = teachers.TEACHERS[name]
    shape = dict(row.shape, embed_dim=128, depth=8, num_heads=2, image_size=112)
    if name == "multihmr":
        shape["layer_scale"] = 1.0
    vit = dune.ViT(**shape, **row.vit_kwargs)
    for module in vit.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    if vit.pos_embed is not None:
        torch.nn.init.normal_(vit.pos_embed)
    path = save(teachers.published_layout(name, vit.state_dict()), tmp_path)
    exact = teachers.load_teacher(name, path)
    ours = teachers.load_teacher(name, path, dtype=torch.bfloat16)
    for module in ours.modules():
        is_product = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        assert all((p.dtype == torch.bfloat16) == is_product for p in module.parameters(recurse=False))
    image = torch.randn(4, 3, 7 * exact.patch_size, 9 * exact.patch_size)
    prepared = teachers.renormalize(image, teachers.MEAN_STD_IMAGENET, row.mean_std)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            autocast = exact.vit(prepared)["patch"]
        cast = vit.bfloat16()(prepared.bfloat16())["patch"]
    true = exact(image)["patch"]

    def error(features):
        return ((features - true) / true.std((0, 1))).norm().item()
    between = []
    ours.vit.blocks[-1].register_forward_pre_hook(lambda block, inputs: between.append(inputs[0].dtype))
    mine = ours(image)["patch"]
    assert mine.dtype == torch.bfloat16 and between == [torch.float32]
    assert error(mine) < 1.1 * error(autocast) and error(mine) < 0.9 * error(cast)


# ---- Mistakes ----------------------------------------------------------------------------------------------

def put(key, value):
    """A change of a state dict."""
    return lambda state: state.update({key: value})


@pytest.mark.parametrize("name, change, message", [
    ("dinov2", lambda f: f.pop("norm.bias"), 'Missing key.*"norm.bias"'),
    ("dinov2", put("head.weight", torch.zeros(2)), 'Unexpected key.*"head.weight"'),
    ("dinov2", put("norm.bias", torch.zeros(2)), "size mismatch for norm.bias"),
    ("dinov2", put("norm.bias", torch.full((64,), math.nan)), "norm.bias contains non-finite values"),
    ("dinov2", put("norm.bias", [0.0] * 64), 'Missing key.*"norm.bias"'),
    ("dinov2", put("pos_embed", torch.zeros(7)), "size mismatch for pos_embed"),
    ("dinov2", put("blocks.99999999.norm1.bias", torch.zeros(64)), 'Missing key.*"blocks.2.norm1.weight"'),
    ("deit3", lambda f: f["model"].pop("pos_embed"), 'Missing key.*"pos_embed"'),
    ("mast3r", lambda f: f["model"].pop("enc_blocks.1.mlp.fc2.bias"), 'Missing key.*"blocks.1.mlp.fc2.bias"'),
    ("mast3r", lambda f: f.pop("model"), "missing key 'model'"),
    ("mast3r", put("model", [1, 2]), "'list' object"),
    ("multihmr", put("model_state_dict", {"head": torch.zeros(1)}), "its first keys: head"),
    ("dinov3_vits16", lambda f: f.pop("rope_embed.periods"), 'Missing key.*"rope_periods"'),
    ("dinov3_vits16", lambda f: f.pop("blocks.1.attn.qkv.bias"), "key.*blocks.1.attn.qkv.bias"),
    ("dinov3_vits16", put("pos_embed", torch.zeros(1, 17, 64)), 'Unexpected key.*"pos_embed"'),
    ("dinov3_vits16", put("blocks.0.attn.qkv.weight", torch.zeros(100, 128)), "unflatten"),
    ("siglip2_vitb16", lambda f: f.pop("vision_model.encoder.layers.0.self_attn.k_proj.weight"),
     "missing key 'blocks.0.attn.k.weight'"),
    ("siglip2_vitb16", put("vision_model.encoder.layers.0.mlp.fc1.bias", torch.zeros(239)), "mismatch.*fc1"),
    ("siglip2_vitb16", lambda f: f.pop("vision_model.head.probe"), 'Missing key.*"pool.probe"'),
])
def test_another_layout_is_one_line(name, change, message, golden, tmp_path):
    fixture = {"dinov2": "dinov2_reg", "deit3": "unic_deit3", "dinov3_vits16": "dinov3"}.get(name, name)
    content = dune.load_checkpoint(SIGLIP) if name == "siglip2_vitb16" else golden(fixture)["checkpoint"]
    change(content)
    path = save(content, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        teachers.load_teacher(name, path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_weights_and_one_in_parts(tmp_path):
    with pytest.raises(UserError, match="no such file: .*model.safetensors"):
        teachers.load_teacher("dinov2", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="model.safetensors is split into several files"):
        teachers.load_teacher("dinov2", tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "mast3r", "siglip2_vitb16"])
def test_files_that_hold_something_else(name, tmp_path):
    for content in ([1, 2], {}, {3: torch.zeros(3)}):
        with pytest.raises(UserError, match="teacher.pth: "):
            teachers.load_teacher(name, save(content, tmp_path))


def test_unknown_name_gated_and_unreachable_weights(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown teacher 'dinov9'; available: dinov2, mast3r, multihmr"):
        teachers.load_teacher("dinov9")
    with pytest.raises(UserError, match="gated: request .*lvd1689m.* at http.*--weights dinov3_vitb16=FILE"):
        teachers.load_teacher("dinov3_vitb16")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(url, path, progress):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for name in ("mast3r", "siglip2_vitl16"):
        with pytest.raises(UserError) as error:
            teachers.load_teacher(name)
        assert teachers.TEACHERS[name].url in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("options, message", [
    ("--arch small", "file is of --arch tiny, the student of small"),
    ("--patch-size 16 --image-size 64", "file is of --patch-size 14, the student of 16"),
    ("--registers 0", "file is of --registers 4, the student of 0"),
    ("--layer-scale 0", "file is of --layer-scale 0.0001, the student of 0"),
    ("--projector sp", "file is of --projector tp; for its encoder alone .* --weights dune_base=file"),
])
def test_init_names_the_option_to_change(options, message):
    source = dune.DUNE(dune.ViT(56, **dune.SIZES["tiny"]), {})
    args = train.parse_args(f"--arch tiny --image-size 56 --init file {options}".split())
    with pytest.raises(UserError, match=message):
        train.build_student(args, source, {}, None)


# ---- Specialists, and three of the newest in one run -------------------------------------------------------

@pytest.mark.parametrize("name", teachers.SPECIALISTS)
def test_a_specialist_is_a_teacher_like_others(name, tmp_path, monkeypatch):
    """Its file is in the published layout and also holds the probe of its domain."""
    monkeypatch.setattr(data, "cache_folder", lambda: str(tmp_path))
    train = teachers.train_specialist
    monkeypatch.setattr(teachers, "train_specialist", lambda name: train(name, 32))
    teacher = teachers.load_teacher(name, "tiny")
    features = teacher(torch.randn(1, 3, 112, 112), grid=(8, 8))
    assert features["patch"].shape == (1, 64, teacher.dim) and teacher.has_cls == (name == "dinov2")
    probe = teachers.PROBES[teachers.TEACHERS[name].domain](teacher.dim, (8, 8))
    probe.load_state_dict(dune.load_checkpoint(teachers.specialist_path(name))["probe"])
    scenes = data.labelled_scenes(teachers.TEACHERS[name].domain, 0, 1)
    out, targets = probe(features), probe.targets(scenes)
    assert probe.loss(out, targets).isfinite() and probe.metrics(out, targets)
    monkeypatch.setattr(teachers, "train_specialist", None)
    teachers.load_teacher(name, "tiny")  # it is there
    with pytest.raises(UserError, match="no tiny teacher for dino; available: dinov2, mast3r, multihmr"):
        teachers.load_teacher("dino", "tiny")


def test_three_of_the_newest(golden, tmp_path, monkeypatch):
    """From files in their published layouts: a run learns, is stopped and resumed."""
    vggt = dune.ViT(112, 14, 64, 2, 1, registers=4).state_dict()
    vggt = {f"aggregator.patch_embed.{key}": value for key, value in vggt.items()}
    vggt["aggregator.frame_blocks.0.norm1.weight"] = torch.zeros(64)
    torch.save(vggt, tmp_path / "vggt.pt")
    paths = {"dinov3_vits16": save(golden("dinov3")["checkpoint"], tmp_path), "siglip2_vitb16": SIGLIP,
             "vggt": tmp_path / "vggt.pt"}
    run = str(tmp_path / "run")
    options = ("--arch tiny --image-size 56 --batch 6 --lr 1e-2 --layer-scale 0 --log-every 1 --steps 8 "
               "--workers 0 --eval-every 99 --device cpu --dtype fp32 --compile no --sharing "
               "own+generic").split()
    argv = [*options, "--teachers", ",".join(paths), "--out", run]
    argv += [f"--weights={name}={path}" for name, path in paths.items()]
    with monkeypatch.context() as patch:
        patch.setattr(train.StopSignal, "requested", lambda self, step, *world: step == 3)
        train.main(argv)
    train.main(argv)
    log = train.read_log(run)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    first, *_, last = [line["held_out"] for line in log if "held_out" in line]
    assert all(last[name] < 0.95 * first[name] for name in paths)
    model = dune.load(f"{run}/checkpoint.pt")
    assert ["cls" in norm.normalizers for norm in model.teacher_norms.values()] == [True, True, False]
