"""The loader reads the published layouts, and what it loads computes what the published code computes."""
import pytest
import torch

import dune
import teachers
from data import IMAGENET_MEAN, IMAGENET_STD


def save(content, tmp_path):
    torch.save(content, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


@pytest.mark.parametrize("name, fixture", [("dinov2", "dinov2_reg"), ("dinov2_reg", "dinov2_reg"),
                                           ("multihmr", "multihmr"), ("mast3r", "mast3r")])
def test_published_encoders(name, fixture, golden, close, tmp_path):
    file = golden(fixture)
    teacher = teachers.load_teacher(name, save(file["checkpoint"], tmp_path))
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    cases = golden("dinov2_reg_dune")["cases"] if name == "dinov2" else file["cases"]  # of the same images and weights
    for case, image in zip(cases, [case["image"] for case in file["cases"]]):  # native size, landscape, portrait
        if name == "mast3r":  # the fixture's image is in MASt3R's own normalisation, the teacher takes ImageNet's
            image = (image * 0.5 + 0.5 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        out = teacher(image)
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


def test_any_patch_size_gives_the_asked_grid(golden, tmp_path):
    teacher = teachers.load_teacher("mast3r", save(golden("mast3r")["checkpoint"], tmp_path))
    image = torch.randn(2, 3, 56, 84)  # a student's, of patch 14: 4 x 6 tokens
    assert teacher(image, grid=(4, 6))["patch"].shape == (2, 24, 64)
    resized = torch.nn.functional.interpolate(image, (64, 96), mode="bicubic", align_corners=True)
    assert teacher(image, grid=(4, 6))["patch"].equal(teacher(resized)["patch"])


def test_nested_block_names_and_half_precision(golden, close, tmp_path):
    file = golden("multihmr")
    inner = file["checkpoint"]["model_state_dict"]
    nested = {k.replace("blocks.", "blocks.0."): v.half() for k, v in inner.items()}
    teacher = teachers.load_teacher("multihmr", save({"model_state_dict": nested}, tmp_path))
    case = file["cases"][0]
    close(teacher(case["image"])["patch"], case["patch"], 2e-3)


@pytest.mark.parametrize("name, change, message", [
    ("dinov2", lambda f: f.pop("norm.bias"), "lacks tensor norm.bias"),
    ("dinov2", lambda f: f.update({"head.weight": torch.zeros(2)}), "unknown tensor head.weight"),
    ("dinov2", lambda f: f.update({"norm.bias": torch.zeros(2)}), "wrong shape for tensor norm.bias"),
    ("mast3r", lambda f: f["model"].pop("enc_blocks.1.mlp.fc2.bias"), "lacks tensor blocks.1.mlp.fc2.bias"),
    ("mast3r", lambda f: f.pop("model"), "no 'model'"),
    ("multihmr", lambda f: f.update(model_state_dict={"head": torch.zeros(1)}), "nothing in it belongs to the encoder"),
])
def test_another_layout_is_an_error_that_names_the_tensor(name, change, message, golden, tmp_path):
    content = golden({"dinov2": "dinov2_reg"}.get(name, name))["checkpoint"]
    change(content)
    with pytest.raises(dune.Oops, match=message):
        teachers.load_teacher(name, save(content, tmp_path))


def test_unknown_name_and_unreachable_weights(tmp_path, monkeypatch):
    with pytest.raises(dune.Oops, match="unknown teacher 'dinov3'; there are: dinov2, mast3r, multihmr"):
        teachers.load_teacher("dinov3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(url, path, progress):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(dune.Oops) as error:
        teachers.load_teacher("mast3r")
    assert teachers.TEACHERS["mast3r"].url in str(error.value) and str(tmp_path) in str(error.value)


def test_published_sizes(tmp_path):
    """Random weights of the published size, written in the published layout, load again. (ViT-S here: the L ones take minutes.)"""
    for name, row in teachers.TEACHERS.items():
        torch.manual_seed(0)
        shape = dict(row.shape, depth=1, position=row.position)
        vit = dune.ViT(**shape)
        state = teachers.published_layout(name, vit.state_dict()) if name in teachers.SPECIALISTS else vit.state_dict()
        if name == "deit3":
            state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}
            state["pos_embed"] = state["pos_embed"][:, 1:]
        if name == "dbotft":
            state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in state.items()}
        if row.inside and name not in teachers.SPECIALISTS:
            state = {row.inside: state}
        teacher = teachers.load_teacher(name, save(state, tmp_path))
        assert teacher.dim == row.shape["embed_dim"] and teacher.patch_size == row.shape["patch_size"]
        out = teacher(torch.randn(1, 3, 56, 56), grid=(4, 4))
        assert out["patch"].shape == (1, 16, teacher.dim) and teacher.has_cls == (name not in ("mast3r", "multihmr"))
