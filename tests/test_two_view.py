"""MASt3R's two-view decoder, on its own encoder and on DUNE's: what the published code computes; pairs of views."""
import argparse
import json
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dune
import eval as ev
import teachers

def published(case):
    """The fixture's weights, made from each tensor's name and shape: {name: tensor}."""
    state = {}
    for line in case["keys"].splitlines():
        key, *shape = line.split()
        r = torch.randn([int(n) for n in shape], generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if r.ndim > 1:
            state[key] = r * (1 / r[0].numel()) ** 0.5
        else:
            state[key] = 1 + 0.1 * r if key.endswith(("weight", "gamma")) else 0.1 * r
    return state

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of both published files, as they are laid out, and of the DUNE encoder, which is one of its own."""
    folder = tmp_path_factory.mktemp("two-view")
    golden = dune.read_checkpoint(teachers.__file__.replace("teachers.py", "tests/golden/two_view.pt"))
    paths = {name: str(folder / f"{name}.pth") for name in ("mast3r", "dune_mast3r", "encoder")}
    torch.save({"args": argparse.Namespace(), "model": published(golden["mast3r"])}, paths["mast3r"])
    state = published(golden["dune_mast3r"])
    encoder = {f"encoder.{key}": value for key, value in dune.below(state, "dune_backbone.").items()}
    torch.save({"model": encoder}, paths["encoder"])
    decoder = {key: value for key, value in state.items() if not key.startswith(("dune_backbone.", "imagenet"))}
    torch.save({**golden["dune_mast3r"]["layout"], "model": decoder}, paths["dune_mast3r"])
    return golden, paths

@pytest.mark.parametrize("name", ["mast3r", "dune_mast3r"])
def test_published_decoders(name, files, close):
    golden, paths = files
    model = teachers.load_two_view(paths[name], encoder=paths["encoder"])
    one, two = golden[name]["views"][:, None]
    with torch.no_grad():
        outputs = model(one, two)
    for ours, theirs in zip(outputs, golden[name]["outputs"]):
        assert ours.keys() == theirs.keys() == {"pts3d", "conf", "desc", "desc_conf"}
        for key in theirs:
            close(ours[key][0, ::4, 1::4], theirs[key], 1e-4)

def option(old, new):
    """A change of a file: another word in its constructor call."""
    return lambda file: file.update(mast3r_model_str=file["mast3r_model_str"].replace(old, new))

@pytest.mark.parametrize("change, message", [
    (lambda f: f["model"].pop("mast3r.dec_norm.bias"), "lacks tensor dec_norm.bias"),
    (lambda f: f["model"].update({"mast3r.head.weight": torch.zeros(1)}), "unknown tensor head.weight"),
    (lambda f: f["model"].update({"mast3r.decoder_embed.weight": torch.zeros(70, 64)}), "heads are missing or odd"),
    (lambda f: f["model"].update({"mast3r.downstream_head1.dpt.head.2.weight": "none"}), "heads are missing or odd"),
    (lambda f: f["model"].update({"mast3r.dec_norm.bias": [1, 2]}), "no numbers in tensor dec_norm.bias"),
    (lambda f: f["model"].update({1: torch.zeros(1)}), "'model', or something else"),
    (lambda f: f.update(model={"norm.weight": torch.zeros(1)}), "holds no two-view model"),
    (lambda f: f.update(model=[1, 2]), "'model', or something else"),
    (option("'catmlp+dpt'", "'linear'"), "head_type is 'linear', expected 'catmlp.dpt'"),
    (option("'catmlp+dpt'", "print('run')"), "head_type is print"),
    (option("('exp', 1, inf)", "('sigmoid', 1, inf)"), "conf_mode is .'sigmoid',1,inf."),
    (option("(", "\0" * 1000), "cannot read its mast3r_model_str"),
    (option("(", "(" + "a" * 10**6), "cannot read its mast3r_model_str"),
    (lambda f: f.update(mast3r_model_str={"head_type": 1}), "'mast3r_model_str', or something else"),
])
def test_another_architecture_is_one_line(change, message, files, tmp_path, capsys):
    file = dune.read_checkpoint(files[1]["dune_mast3r"])
    change(file)
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(dune.Oops, match=message) as error:
        teachers.load_two_view(tmp_path / "other.pth", encoder=files[1]["encoder"])
    assert capsys.readouterr().out == "" and len(str(error.value)) < 400

def test_the_encoder_that_a_file_names_is_looked_for(files, tmp_path, monkeypatch):
    """Without --encoder: the published file of that name; a name that is none is no file."""
    asked = []
    monkeypatch.setattr(dune, "fetch", lambda url: asked.append(url) or files[1]["encoder"])
    teachers.load_two_view(files[1]["dune_mast3r"])
    assert asked == ["https://download.europe.naverlabs.com/dune/dune_vitbase14_448_paper.pth"]
    file = dune.read_checkpoint(files[1]["dune_mast3r"])
    for name, message in (("another", "no such file: another"), (7, "'dune_backbone_name', or something else")):
        torch.save({**file, "dune_backbone_name": name}, tmp_path / "other.pth")
        with pytest.raises(dune.Oops, match=message):
            teachers.load_two_view(tmp_path / "other.pth")

def tiny(seed=0):
    torch.manual_seed(seed)
    encoder = dune.ViT(28, 14, 64, 1, 1, 0, layer_scale=None)
    return teachers.TwoView(encoder, dim=64, depth=1, maps=(8, 8, 8, 8), features=8, last=8, hidden=16).eval()

def test_one_set_of_decoder_blocks_serves_both_views_and_our_file_loads_again(tmp_path):
    model = tiny()
    model.dec_blocks2.load_state_dict(model.dec_blocks.state_dict())
    state = teachers.two_view_layout(model)["model"]
    torch.save({"model": {k: v for k, v in state.items() if ".dec_blocks2." not in k}}, tmp_path / "ours.pt")
    again = teachers.load_two_view(tmp_path / "ours.pt")
    one, two = torch.randn(1, 3, 28, 42), torch.randn(1, 3, 56, 14)  # landscape, portrait
    with torch.no_grad():
        for a, b, size in zip(model(one, two), again(one, two), ((28, 42), (56, 14))):
            assert all(a[k].equal(b[k]) for k in a)
            assert a["pts3d"].shape == (1, *size, 3) and a["desc"].shape == (1, *size, 24)
    with pytest.raises(dune.Oops, match="30x28 is no multiple of the patch size 14"):
        model(torch.zeros(1, 3, 30, 28), two)

# ---- Pairs of views --------------------------------------------------------------------------------------------------

def alike(pairs, place, mask):
    """Correlation of the colours of view 1's pixels with those of view 2 at `place`: not the light, but its pattern."""
    at = place.clamp(0, 111).long()
    at = (at[..., 1] * 112 + at[..., 0]).flatten(1)[:, None].expand(-1, 3, -1)
    one, two = pairs["image"].unbind(1)
    there = two.flatten(2).gather(2, at).view_as(one)
    return np.median([np.corrcoef(a[c][m], b[c][m])[0, 1] for a, b, m in zip(one, there, mask) for c in range(3)])

def test_geometry_of_a_pair_of_rooms():
    """What both views see looks alike but for light and white balance; view 2's points lie on view 1's surfaces."""
    pairs = teachers.room_pairs(0, 4, 112)
    points, known, place, seen = teachers.pair_geometry(pairs)
    assert known.all() and 0.4 < seen.float().mean() < 0.95
    assert alike(pairs, place, seen) > 0.95 and alike(pairs, place, ~seen) < 0.7
    torch.testing.assert_close(points[:, 0, ..., 2], pairs["depth"][:, 0])
    own, where = teachers.patch_pairs(pairs, (8, 8))
    assert own.shape == (4, 64) and abs(where.float().mean() - seen.float().mean()) < 0.1

def test_contrast_is_least_for_true_pairs():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 16)
    order = torch.stack([torch.randperm(10) for _ in range(2)])
    y = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
    assert teachers.contrast(x, y, order).max() < 0.5 < 3 < teachers.contrast(x, y, order.roll(1, 1)).min()

# ---- Tests of eval.py, below this line -------------------------------------------------------------------------------

# ------------------------------------------------------------------------------------------------------------ the geometry

def turn(axis, degrees):
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.double), dim=0) * math.radians(degrees)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.double))


def point_map(focal, height, width, generator):
    """[height, width, 3] points at random depths, as a camera of this focal length sees them."""
    pixels = ev.pixel_grid(height, width).double() - torch.tensor([width, height]) / 2
    depth = 1 + 4 * torch.rand(height * width, 1, generator=generator, dtype=torch.double)
    return torch.cat([pixels / focal * depth, depth], 1).view(height, width, 3)


@pytest.mark.parametrize("height, width", [(40, 60), (71, 33)])
def test_focal_length_with_a_third_of_the_points_wrong(height, width):
    g = torch.Generator().manual_seed(0)
    points = point_map(87.5, height, width, g)
    assert ev.estimate_focal(points, torch.ones(height, width)) == pytest.approx(87.5, rel=1e-6)
    wrong = torch.rand(height, width, generator=g) < 0.3
    points[wrong] = torch.randn(int(wrong.sum()), 3, generator=g, dtype=torch.double) + torch.tensor([0, 0, 3])
    assert ev.estimate_focal(points, torch.ones(height, width)) == pytest.approx(87.5, rel=0.02)
    assert ev.estimate_focal(points * torch.tensor([0, 0, 1]), torch.ones(height, width)) == 1
    with pytest.raises(dune.Oops, match="behind the camera"):
        ev.estimate_focal(-points.abs(), torch.ones(height, width))


@pytest.mark.parametrize("wrong", [0.0, 0.3])
@pytest.mark.parametrize("depth_error", [0.0, 0.03])
def test_relative_pose_exact_and_with_outliers(wrong, depth_error):
    """Points in the frames of both cameras, 30 % of the matches wrong, depths of view 2 off: the pose comes from where view 2 sees them."""
    g, focal, n = torch.Generator().manual_seed(1), 300.0, 300
    points1 = torch.rand(n, 3, generator=g, dtype=torch.double) * torch.tensor([3, 2, 3]) + torch.tensor([-1.5, -1, 2.5])
    camera = torch.eye(4, dtype=torch.double)
    camera[:3, :3], camera[:3, 3] = turn((0.2, 1, 0.1), 25), torch.tensor([0.8, -0.1, 0.3])
    points2 = (points1 - camera[:3, 3]) @ camera[:3, :3]
    pixels = focal * points2[:, :2] / points2[:, 2:]
    points2 = points2 * (1 + depth_error * torch.randn(n, 1, generator=g, dtype=torch.double))
    bad = torch.rand(n, generator=g) < wrong
    points2[bad], pixels[bad] = points2[bad].flip(0), pixels[bad].flip(0)
    points1[7], points2[9], bad[[7, 9]] = math.inf, math.nan, True
    pose, inside = ev.relative_pose(points1, points2, pixels, focal, tolerance=5)
    assert torch.allclose(pose, camera, atol=2e-2 if wrong else 1e-6) and (inside & ~bad).sum() == (~bad).sum()
    assert ev.angle(pose[:3, :3]) == pytest.approx(25, abs=0.3 if wrong else 1e-4)
    assert ev.relative_pose(points1[:3], points2[:3], pixels[:3], focal, 5)[0] is None


def test_descriptors_find_each_other():
    """View 2 is view 1 moved by (3, 5) pixels: every match says so, whatever the seed it began from."""
    g = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.normalize(torch.randn(40, 40, 24, generator=g), dim=-1)
    a, b = ev.reciprocal_matches(scene[:32, :32], scene[5:37, 3:35], stride=4)
    good = ((a % 32 - b % 32) == 3) & ((a // 32 - b // 32) == 5)
    assert good.float().mean() > 0.95 and good.sum() > 30


# -------------------------------------------------------------------------------------------------------------- the command

def photo(path, height, width, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_two_photographs_to_a_point_cloud(tmp_path, monkeypatch, capsys):
    """The whole command on a model that knows the answer: two views of one room, cut to landscape and portrait."""
    class Knows(torch.nn.Module):
        def __init__(self, pair, blind=False):
            super().__init__()
            self.norm, self.patch, self.dec_norm, self.pair, self.swapped, self.blind = None, 14, torch.nn.LayerNorm(1), pair, False, blind

        def forward(self, one, two):
            swapped, self.swapped = self.swapped, True  # asked a second time it is for view 2 in its own frame
            points = teachers.pair_geometry({k: (v.flip(1) if swapped else v) for k, v in self.pair.items()})[0]
            world = [p @ torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0] for p in points[0]]
            desc = [torch.cat([(8 * w).sin(), (8 * w).cos(), (3 * w).sin(), (3 * w).cos()], -1) for w in world]
            desc = [torch.randn_like(d) for d in desc] if self.blind else desc
            boxes = (slice(14, 98), slice(0, 112)), (slice(0, 112), slice(14, 98))
            return tuple({"pts3d": p[b][None], "conf": torch.full((1, *p[b].shape[:2]), 2.0), "desc": torch.nn.functional.normalize(d[b], dim=-1)[None],
                          "desc_conf": torch.ones(1, *p[b].shape[:2])} for p, d, b in zip(points[0], desc, boxes[::-1] if swapped else boxes))
    pair = teachers.room_pairs(5, 1, 112)
    for name, view, box in (("a", 0, (0, 14, 112, 98)), ("b", 1, (14, 0, 98, 112))):
        Image.fromarray(pair["image"][0, view].permute(1, 2, 0).numpy()).crop(box).save(tmp_path / f"{name}.png")
    arguments = ["two-view", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--image-size", "112", "--device", "cpu", "--out", str(tmp_path / "out" / "room")]
    monkeypatch.setattr(teachers, "load_two_view", lambda *_: Knows(pair, blind=True))
    with pytest.raises(dune.Oops, match="no pose; do the two images overlap"):
        ev.main(arguments)
    assert "turned by" not in capsys.readouterr().out
    monkeypatch.setattr(teachers, "load_two_view", lambda *_: Knows(pair))
    ev.main(arguments)
    text = capsys.readouterr().out
    header, body = (tmp_path / "out" / "room.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 18816" in header and len(body) == 15 * 18816 and Image.open(tmp_path / "out" / "room.png").size == (224 + 8 + 168, 3 * 232 - 8)  # small pictures are shown twice as large
    true = pair["pose"][0, 0].inverse().double() @ pair["pose"][0, 1].double()
    assert float(text.split("turned by ")[1].split()[0]) == pytest.approx(ev.angle(true[:3, :3]), abs=1)
    assert float(text.split("moved by ")[1].split()[0]) == pytest.approx(true[:3, 3].norm().item(), rel=0.05)
    assert float(text.split("a.png: ")[1].split()[0]) == pytest.approx(pair["K"][0, 0, 0, 0].item(), rel=0.01)


def test_two_view_mistakes_are_one_line(tmp_path):
    torch.save(teachers.two_view_layout(tiny()), tmp_path / "ours.pt")
    weights, a, b = str(tmp_path / "ours.pt"), photo(tmp_path / "a.jpg", 28, 42), photo(tmp_path / "b.jpg", 42, 28, 1)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "file").write_text("")
    for arguments, message in (([a], "takes two images, not 1"), ([a, str(tmp_path / "text.jpg")], "text.jpg"), ([a, b, "--weights", a], "cannot read"),
                               ([a, b, "--out", str(tmp_path / "file" / "x")], "cannot write"), ([], "two photographs, or --run"), (["--seeds", "0"], "at least 1")):
        with pytest.raises(dune.Oops, match=message) as error:
            ev.main(["two-view", *arguments, *([] if "--weights" in arguments else ["--weights", weights]), "--device", "cpu",
                     *([] if "--out" in arguments else ["--out", str(tmp_path / "out")])])
        assert "\n" not in str(error.value)


def test_a_decoder_learns_from_a_folder_of_pairs(tmp_path, monkeypatch, capsys):
    """The README's layout: NAME.png beside NAME.npz with depth, K and pose, of other sizes than the networks want."""
    torch.set_num_threads(1)
    for seed in range(4):
        (tmp_path / "d" / f"room{seed}").mkdir(parents=True)
        for view in (0, 1):
            scene = data.rooms(seed, 140, view=view)
            Image.fromarray(scene["image"]).crop((0, 14, 140, 126)).save(tmp_path / "d" / f"room{seed}" / f"{view}.png")
            scene["K"][1, 2] -= 14
            np.savez(tmp_path / "d" / f"room{seed}" / f"{view}.npz", depth=scene["depth"][14:126], K=scene["K"], pose=scene["pose"])
    pairs = ev.FolderPairs(str(tmp_path / "d"), 112)
    batch = {k: v[None] for k, v in pairs[0].items()}
    points, _, place, seen = teachers.pair_geometry(batch)
    assert alike(batch, place, seen) > 0.95 > 0.85 > alike(batch, place.roll(4, 2), seen)  # the camera was cut and scaled with the image
    encoder = dune.ViT(112, 16, 64, 1, 1, 0, layer_scale=None)  # decoders have the student's patch, whatever the teacher's
    model = dune.DUNE(encoder, {"mast3r": (64, False)})
    torch.save({"model": model.state_dict(), "args": {"image_size": 112}}, tmp_path / "checkpoint.pt")
    vit = dune.ViT(112, 14, 64, 1, 1, 0, class_token=False, layer_scale=None, position="rope")
    torch.save(teachers.published_layout("mast3r", vit.state_dict()), tmp_path / "mast3r.pth")
    ev.main(["two-view", "--run", str(tmp_path), "--weights", f"mast3r={tmp_path}/mast3r.pth", "--data", str(tmp_path / "d"), "--steps", "2", "--seeds", "2", "--device", "cpu"])
    result = json.loads((tmp_path / "two-view.json").read_text())
    rows, seeds = result["results"], [row["points m"] for row in result["values"]["student"]]
    assert seeds[0] != seeds[1] and math.isclose(rows["student"]["points m"], sum(seeds) / 2)
    assert list(rows) == ["student", "teacher mast3r", "random encoder"] and all(math.isfinite(row["points m"]) for row in rows.values())
    assert (tmp_path / "two-view.png").exists() and isinstance(teachers.load_two_view(tmp_path / "two-view.pt"), teachers.TwoView)
    with pytest.raises(dune.Oops, match="fewer than two pairs"):
        ev.FolderPairs(str(tmp_path / "mast3r.pth"), 112)
    np.savez(tmp_path / "d" / "room0" / "0.npz", depth=scene["depth"][14:126], K=scene["K"], pose=np.full((4, 4), -np.inf, np.float32))
    with pytest.raises(dune.Oops, match="0.npz: K and pose must be finite"):
        pairs[0]
