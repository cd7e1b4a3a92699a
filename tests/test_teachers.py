"""The loader reads the published layouts, and what it loads computes what the published code computes."""
import dataclasses
import math
import os
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dune
import eval as evaluation
import teachers
import train
from data import IMAGENET_MEAN, IMAGENET_STD

SIGLIP = os.path.join(os.path.dirname(__file__), "golden", "siglip2.safetensors")  # with most of its text tower cut off

def save(content, tmp_path):
    torch.save(content, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"

def imagenet(image):
    """An image in the normalisation of mean and std 0.5, in ImageNet's."""
    return (image * 0.5 + 0.5 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]

# ---- What the published code computes --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, fixture, outputs", [
    ("dinov2", "dinov2_reg", "dinov2_reg_dune"), ("dinov2_reg", "dinov2_reg", "dinov2_reg"), ("mast3r",) * 3,
    ("multihmr",) * 3, ("siglip2_vitb16", "siglip2", "siglip2")])
def test_published_encoders(name, fixture, outputs, golden, close, tmp_path):
    file = golden(fixture)
    path = SIGLIP if fixture == "siglip2" else save(file["checkpoint"], tmp_path)
    teacher = teachers.load_teacher(name, path)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    for case, images in zip(golden(outputs)["cases"], file["cases"]):  # native size, landscape, portrait
        image = images["image"]
        out = teacher(imagenet(image) if name in ("mast3r", "siglip2_vitb16") else image)
        close(out["patch"], case["patch"])
        if "cls" in case:
            close(out["cls"], case["cls"])
        else:
            assert out["cls"] is None

@pytest.mark.parametrize("name", ["dino", "deit3", "dbotft", "ibot"])
def test_unics_encoders(name, golden, close, tmp_path):
    file = golden(f"unic_{'dino' if name == 'ibot' else name}")
    content = {"state_dict": file["checkpoint"]} if name == "ibot" else file["checkpoint"]
    out = teachers.load_teacher(name, save(content, tmp_path))(file["image"])
    close(out["cls"], file["cls"])
    close(out["patch"], file["patch"])

def dinov3_file(dim, depth, g):
    """A file in DINOv3's layout with random weights."""
    def weight(*shape):
        return torch.randn(shape, generator=g) / math.sqrt(shape[-1])
    state = {"cls_token": weight(1, 1, dim), "storage_tokens": weight(1, 4, dim), "mask_token": weight(1, dim),
             "patch_embed.proj.weight": weight(dim, 3, 16, 16) / 10, "patch_embed.proj.bias": weight(dim),
             "rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16().float()}
    for norm in ("norm", "local_cls_norm", *[f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)]):
        state.update({f"{norm}.weight": 1 + weight(dim), f"{norm}.bias": weight(dim)})
    for i in range(depth):
        for name, rows, cols in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            state[f"blocks.{i}.{name}.weight"] = weight(rows * dim, cols * dim)
            state[f"blocks.{i}.{name}.bias"] = weight(rows * dim)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(dim)
        state.update({f"blocks.{i}.ls{j}.gamma": weight(dim) for j in (1, 2)})
    return state

def dinov3(state, image, depth):
    """DINOv3 from its description: (class, patch) features. It agrees with the published code to 3e-7."""
    def linear(x, name, mask=1):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"] * mask)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    rows, cols = x.shape[-2:]
    tokens = x.flatten(2).mT
    x = torch.cat([state[k].expand(len(image), -1, -1) for k in ("cls_token", "storage_tokens")] + [tokens], 1)
    angles = torch.zeros(5 + rows * cols, 32)
    for n in range(rows * cols):
        place = torch.tensor([2 * (n // cols + 0.5) / rows - 1, 2 * (n % cols + 0.5) / cols - 1])
        angles[5 + n] = (2 * math.pi * place[:, None] / state["rope_embed.periods"]).flatten()
    turn = torch.polar(torch.ones_like(angles), angles)
    for i in range(depth):
        block = f"blocks.{i}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv", state[block + "attn.qkv.bias_mask"])
        q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        q, k = [torch.complex(z[..., :32], z[..., 32:]) * turn for z in (q, k)]  # channel j turns with j + 32
        score = (q @ k.mH).real / 8
        mixed = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, block + "attn.proj") * state[block + "ls1.gamma"]
        hidden = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + linear(hidden, block + "mlp.fc2") * state[block + "ls2.gamma"]
    x = norm(x, "norm")
    return x[:, 0], x[:, 5:]

@pytest.mark.parametrize("name, dim, size", [("dinov3_vitl16", 128, (48, 80)), ("eupe_vitt16", 192, (96, 16))])
def test_dinov3_and_eupe(name, dim, size, close, tmp_path):
    g = torch.Generator().manual_seed(0)
    state, image = dinov3_file(dim, 2, g), torch.randn(2, 3, *size, generator=g)
    out = teachers.load_teacher(name, save(state, tmp_path))(image)
    for ours, theirs in zip((out["cls"], out["patch"]), dinov3(state, image, 2)):
        close(ours, theirs)

# ---- Every row -------------------------------------------------------------------------------------------------------

def as_published(name, teacher):
    """The file that would hold this teacher."""
    row, state = teachers.TEACHERS[name], {}
    for key, value in teacher.vit.state_dict().items():
        if row.layout == "dinov3" and ".qkv." in key:
            q, k, v = value.unflatten(0, (3, -1, 4, 16))
            value = torch.stack([q[:, [0, 2, 1, 3]], k[:, [0, 2, 1, 3]], v]).flatten(0, 3)
        if row.layout == "siglip" and ".qkv." in key:
            for x, part in zip("qkv", value.chunk(3)):
                state[key.replace("attn.qkv", f"self_attn.{x}_proj")] = part
        else:
            state[key] = value[0] if row.layout == "siglip" and key == "pos_embed" else value
    if row.pool == "attention":
        state.update({f"head.{key}": value for key, value in teacher.vit.pool.state_dict().items()})
    words = {"deit3": [(r"\.ls(\d)\.gamma", r".gamma_\1")], "dbotft": [(r"^norm\.", "fc_norm.")],
             "dinov3": [("^register_tokens", "storage_tokens"), ("^rope_periods", "rope_embed.periods")],
             "siglip": [(r"^patch_embed\.proj", "embeddings.patch_embedding"), (r"^blocks", "encoder.layers"),
                        ("^pos_embed", "embeddings.position_embedding.weight"), (r"\.norm(\d)", r".layer_norm\1"),
                        (r"(?<!self_)attn\.proj", "self_attn.out_proj"), (r"^norm\.", "post_layernorm.")]}
    for old, new in words.get(name, words.get(row.layout, [])):
        state = {re.sub(old, new, key): value for key, value in state.items()}
    if name == "deit3":
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if row.prefix.startswith("enc_"):
        return teachers.published_layout("mast3r", state)
    prefix = "module.encoder." if name.startswith("dune") else re.sub(r"\(.*\)|\\", "", row.prefix)
    state = {prefix + key: value for key, value in state.items()}
    if prefix:
        state["other.weight"] = torch.zeros(1)
    return {row.inside: state} if row.inside else state

@pytest.mark.parametrize("name", teachers.TEACHERS)
def test_published_size_and_layout(name, tmp_path, monkeypatch):
    """Random weights of the published size (one block), written in the published layout, load as what they were."""
    row = teachers.TEACHERS[name]
    assert row.domain in data.SCENES and row.license
    assert set(row.vit) <= {"position", "eps", "gelu"}
    monkeypatch.setitem(teachers.TEACHERS, name, dataclasses.replace(row, shape=row.shape | {"depth": 1}))
    torch.manual_seed(0)
    first, same = (teachers.load_teacher(name, "random") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
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

def test_the_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "siglip2-base-patch16-256-model.safetensors").write_text("")
    monkeypatch.setattr("sys.argv", ["teachers.py"])
    teachers.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(teachers.TEACHERS) < set(lines)
    for word in ("objects", "304", "14", "distilled", "ImageNet", "Apache-2.0", f"- {tmp_path}"):
        assert word in lines["dinov2"]
    assert f"+ {tmp_path}" in lines["siglip2_vitb16"] and " 93 " in lines["siglip2_vitb16"]
    assert "ask at https://ai.meta.com" in lines["dinov3_vits16"] and "unused" in lines["multihmr"]

# ---- The interface ---------------------------------------------------------------------------------------------------

def test_any_patch_size_gives_the_asked_grid(golden, tmp_path):
    teacher = teachers.load_teacher("mast3r", save(golden("mast3r")["checkpoint"], tmp_path))
    image = torch.randn(2, 3, 56, 84)  # a student's, of patch 14: 4 x 6 tokens
    assert teacher(image, grid=(4, 6))["patch"].shape == (2, 24, 64)
    resized = F.interpolate(image, (64, 96), mode="bicubic", align_corners=True)
    assert teacher(image, grid=(4, 6))["patch"].equal(teacher(resized)["patch"])

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_no_run(dtype, golden, tmp_path, monkeypatch):
    for name in ("mast3r", "multihmr"):
        teacher = teachers.load_teacher(name, save(golden(name)["checkpoint"], tmp_path), dtype=dtype)
        some = teacher(torch.randn(1, 3, 28, 42), grid=(2, 3))
        monkeypatch.setattr(teacher.vit, "forward", None)
        for none in (teacher(torch.zeros(0, 3, 28, 42), grid=(2, 3)),
                     teacher(torch.zeros(0, 3, 2 * teacher.patch_size, 3 * teacher.patch_size))):
            for kind in ("cls", "patch"):
                if some[kind] is None:
                    assert none[kind] is None
                else:
                    assert none[kind].shape == (0, *some[kind].shape[1:])
                    assert none[kind].dtype == some[kind].dtype == dtype

def test_nested_block_names_and_half_precision(golden, close, tmp_path):
    file = golden("multihmr")
    inner = file["checkpoint"]["model_state_dict"]
    nested = {k.replace("blocks.", "blocks.0."): v.half() for k, v in inner.items()}
    teacher = teachers.load_teacher("multihmr", save({"model_state_dict": nested}, tmp_path))
    case = file["cases"][0]
    close(teacher(case["image"])["patch"], case["patch"], 2e-3)

@pytest.mark.parametrize("name", ["multihmr", "mast3r"])  # with learned positions; without, and without LayerScale
def test_bf16_is_as_near_as_fp32_weights_under_autocast(name, tmp_path):
    """Per channel standardised features against fp32's: ours, the published way (autocast), and all weights in bf16."""
    torch.manual_seed(0)
    shape = dict(teachers.TEACHERS[name].shape, embed_dim=128, depth=8, num_heads=2, image_size=112)
    if name == "multihmr":
        shape["layer_scale"] = 1.0
    vit = dune.ViT(**shape, **teachers.TEACHERS[name].vit)
    for module in vit.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    if vit.pos_embed is not None:
        torch.nn.init.normal_(vit.pos_embed)
    path = save(teachers.published_layout(name, vit.state_dict()), tmp_path)
    exact, ours = teachers.load_teacher(name, path), teachers.load_teacher(name, path, dtype=torch.bfloat16)
    kinds = {type(module) for module in ours.modules() for p in module.parameters(False) if p.dtype != torch.float32}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}
    image = torch.randn(4, 3, 7 * exact.patch_size, 9 * exact.patch_size)
    prepared, true = exact.prepare(image), exact(image)["patch"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = exact.vit(prepared)["patch"]
    with torch.no_grad():
        cast = vit.bfloat16()(prepared.bfloat16())["patch"]

    def error(features):
        return ((features - true) / true.std((0, 1))).norm().item()
    between = []
    ours.vit.blocks[-1].register_forward_pre_hook(lambda block, inputs: between.append(inputs[0].dtype))
    mine = ours(image)["patch"]
    assert mine.dtype == torch.bfloat16 and between == [torch.float32]
    assert error(mine) < 1.1 * error(autocast) and error(mine) < 0.9 * error(cast)

# ---- Mistakes --------------------------------------------------------------------------------------------------------

def grow(file, key, *shape):
    file[key] = torch.zeros(shape)

@pytest.mark.parametrize("name, change, message", [
    ("dinov2", lambda f: f.pop("norm.bias"), "lacks tensor norm.bias"),
    ("dinov2", lambda f: f.update({"head.weight": torch.zeros(2)}), "unknown tensor head.weight"),
    ("dinov2", lambda f: f.update({"norm.bias": torch.zeros(2)}), "wrong shape for tensor norm.bias"),
    ("dinov2", lambda f: f.update({"norm.bias": torch.full((64,), math.nan)}), "NaN, infinity .* in tensor norm.bias"),
    ("dinov2", lambda f: f.update({"norm.bias": [0.0] * 64, 7: torch.zeros(1)}), "lacks tensor norm.bias"),
    ("dinov2", lambda f: f.update({"pos_embed": torch.zeros(7)}), "holds no ViT"),
    ("dinov2", lambda f: f.update({"blocks.99999999.norm1.bias": torch.zeros(64)}), "lacks tensor blocks.2"),
    ("deit3", lambda f: f["model"].update({"pos_embed": torch.zeros(())}), "is no file of teacher deit3"),
    ("mast3r", lambda f: f["model"].pop("enc_blocks.1.mlp.fc2.bias"), "lacks tensor blocks.1.mlp.fc2.bias"),
    ("mast3r", lambda f: f.pop("model"), "no 'model'"),
    ("mast3r", lambda f: f.update(model=[1, 2]), "no 'model'"),
    ("multihmr", lambda f: f.update(model_state_dict={"head": torch.zeros(1)}), "holds no ViT"),
    ("dinov3_vits16", lambda f: f.pop("rope_embed.periods"), "lacks tensor rope_periods"),
    ("dinov3_vits16", lambda f: f.pop("blocks.0.mlp.fc1.weight"), "lacks tensor blocks.0.mlp.fc1.weight"),
    ("dinov3_vits16", lambda f: grow(f, "blocks.0.attn.qkv.weight", 100, 128), "64 channels"),
    ("siglip2_vitb16", lambda f: grow(f, "vision_model.encoder.layers.0.mlp.fc1.weight", 239, 64), "wrong shape.*fc1"),
    ("siglip2_vitb16", lambda f: f.pop("vision_model.encoder.layers.1.self_attn.k_proj.bias"), "is no file of teacher"),
    ("siglip2_vitb16", lambda f: f.pop("vision_model.head.probe"), "lacks tensor pool.probe"),
])
def test_another_layout_is_one_line(name, change, message, golden, tmp_path):
    if name == "siglip2_vitb16":
        content = dune.read_checkpoint(SIGLIP)
    elif name == "dinov3_vits16":
        content = dinov3_file(128, 1, torch.Generator().manual_seed(0))
    else:
        content = golden({"dinov2": "dinov2_reg", "deit3": "unic_deit3"}.get(name, name))["checkpoint"]
    change(content)
    with pytest.raises(dune.Oops, match=message) as error:
        teachers.load_teacher(name, save(content, tmp_path))
    assert "\n" not in str(error.value)

def test_files_that_are_no_dictionaries(tmp_path):
    for content in ([1, 2], torch.zeros(3), {}, {3: torch.zeros(3)}):
        for name in ("dinov2", "mast3r", "siglip2_vitb16"):
            with pytest.raises(dune.Oops, match="holds no ViT|is no file of teacher|no 'model'"):
                teachers.load_teacher(name, save(content, tmp_path))

def test_unknown_name_gated_and_unreachable_weights(tmp_path, monkeypatch):
    with pytest.raises(dune.Oops, match="unknown teacher 'dinov9'; there are: dinov2, mast3r, multihmr"):
        teachers.load_teacher("dinov9")
    with pytest.raises(dune.Oops, match="ask for .*lvd1689m.* at https://ai.meta.com/.*--weights dinov3_vitb16=FILE"):
        teachers.load_teacher("dinov3_vitb16")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(url, path, progress):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for name in ("mast3r", "siglip2_vitl16"):  # the latter's file has a name that others have too
        with pytest.raises(dune.Oops) as error:
            teachers.load_teacher(name)
        assert teachers.TEACHERS[name].url in str(error.value) and str(tmp_path) in str(error.value)
    assert dune.cached(teachers.TEACHERS["siglip2_vitl16"].url) != dune.cached(teachers.TEACHERS["siglip2_vitb16"].url)

# ---- What small things learn from ------------------------------------------------------------------------------------

def test_labels_stay_on_their_device():
    """With another default device, every tensor that is made on the way must say where it belongs."""
    scenes = {domain: data.labelled_scenes(domain, 0, 2, 56) for domain in data.SCENES}
    pairs = teachers.room_pairs(0, 2, 56)

    def labels():
        torch.manual_seed(0)
        out = [*teachers.pair_geometry(pairs), *teachers.patch_pairs(pairs, (4, 4))]
        for domain in data.SCENES:
            probe = teachers.PROBES[domain](8, (4, 4)).to_empty(device="cpu")
            for head in probe.heads.values():
                torch.nn.init.constant_(head.weight, 0.1)
                torch.nn.init.zeros_(head.bias)
            targets = probe.targets(scenes[domain])
            predicted = probe({"cls": None, "patch": torch.ones(2, 16, 8, device="cpu")})
            out += [*targets.values(), probe.loss(predicted, targets), *probe.metrics(predicted, targets).values()]
        return out
    expected = labels()
    with torch.device("meta"):
        found = labels()
    for one, two in zip(expected, found):
        torch.testing.assert_close(one, two, equal_nan=True)

def test_fit_has_groups_of_its_own_and_clips():
    target, rates = torch.tensor([1.0, -2.0]), []
    for clip in (0.0, 1e-9):
        weight, other = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)

        def loss(step):
            rates.append(step)
            return (weight - target).square().sum() + 0 * other.sum()
        groups = [{"params": [weight]}, {"params": [other], "lr": 1e-2, "weight_decay": 0.5}]
        teachers.fit(groups, loss, 200, lr=0.1, weight_decay=0.0, clip=clip)
        near = (weight - target).abs().max() < 1e-2
        assert near == (clip == 0) and 0.2 < other.item() < 0.8  # decayed by its own rate, though it has no gradient
    assert rates == [*range(200)] * 2

@pytest.mark.parametrize("name", teachers.SPECIALISTS)
def test_a_specialist_is_a_teacher_like_others(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cache_folder", lambda: str(tmp_path))
    path = teachers.specialist_path(name)
    teachers.make_specialist(name, 32)
    teacher = teachers.load_teacher(name, path)
    features = teacher(torch.randn(1, 3, 112, 112), grid=(8, 8))
    assert features["patch"].shape == (1, 64, 192) and teacher.has_cls == (name == "dinov2")
    teachers.prepare_specialists([name])  # there already
    with monkeypatch.context() as patch:
        patch.setitem(teachers.SPECIALISTS, name, teachers.SPECIALISTS[name] | {"passes": 9})
        assert teachers.specialist_path(name) != path

# ---- Three of the newest in one run ----------------------------------------------------------------------------------

NEWEST = ["dinov3_vits16", "siglip2_vitb16", "vggt"]

def newest_files(folder):
    """--weights of tiny files with random weights."""
    torch.manual_seed(0)
    torch.save(dinov3_file(64, 2, torch.Generator().manual_seed(0)), folder / "dinov3.pth")
    vggt = dune.ViT(112, 14, 64, 2, 1, registers=4).state_dict()
    vggt = {f"aggregator.patch_embed.{key}": value for key, value in vggt.items()}
    torch.save({**vggt, "aggregator.frame_blocks.0.norm1.weight": torch.zeros(64)}, folder / "vggt.pt")
    paths = [folder / "dinov3.pth", SIGLIP, folder / "vggt.pt"]
    return [f"--weights={name}={path}" for name, path in zip(NEWEST, paths)]

def test_three_of_the_newest(tmp_path, monkeypatch, capsys):
    """From files in their published layouts: it learns, resumes, and is evaluated."""
    files = newest_files(tmp_path)
    run = str(tmp_path / "run")
    common = ("--arch tiny --image-size 56 --batch 9 --lr 1e-2 --layer-scale 0 --log-every 1 --workers 0 --steps 12 "
              "--device cpu --dtype fp32 --compile no --sharing own+generic").split()
    argv = [*common, "--teachers", ",".join(NEWEST), *files, "--out", run]
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:  # as a signal would, after three steps
        patch.setattr(train.Processes, "stop_asked", lambda self: next(asked))
        train.main(argv)
    train.main(argv)
    log = evaluation.read_log(run)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert all(log[-1][t]["loss"] < log[0][t]["loss"] for t in NEWEST)
    model = dune.load(f"{run}/checkpoint.pt")
    assert {t: "cls" in norm.normalizers for t, norm in model.teacher_norms.items()} == {
        "dinov3_vits16": True, "siglip2_vitb16": True, "vggt": False}

    monkeypatch.setattr(evaluation, "STUDY", dict(train=120, test=24, pairs=2))
    monkeypatch.setattr(evaluation, "PROBE_STEPS", 2)
    for kind in "ab":
        (tmp_path / "classes" / kind).mkdir(parents=True)
        for i in range(4):
            scene = data.SCENES["objects"](i, 56)["image"]
            Image.fromarray(scene).save(tmp_path / "classes" / kind / f"{i}.png")
    classes = [f"--train={tmp_path}/classes", f"--test={tmp_path}/classes"]
    for command in (["loss"], ["pca"], ["spectrum"], ["alignment"], ["study", "--seeds", "1"],
                    ["match", "--through", "siglip2_vitb16"], ["knn", *classes, "--teacher", "dinov3_vits16"],
                    ["linear", *classes, "--steps", "2", "--through", "vggt"]):
        device = [] if command[0] == "alignment" else ["--device", "cpu"]
        evaluation.main([*command, "--run", run, *device])
        assert f"wrote {run}" in capsys.readouterr().out, command
