"""eval.py two-view: focal length, pose and matches of point maps that are known, point clouds, decoders that learn."""
import argparse
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dune
import eval as ev
import teachers as zoo
from dune import Oops

# ---- The geometry ----------------------------------------------------------------------------------------------------

def turn(axis, degrees):
    x, y, z = F.normalize(torch.tensor(axis, dtype=torch.double), dim=0) * math.radians(degrees)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.double))

def point_map(focal, height, width, generator):
    """[height, width, 3] points at random depths, as a camera of this focal length sees them."""
    pixels = ev.centred_pixels(height, width).double()
    depth = 1 + 4 * torch.rand(height * width, 1, generator=generator, dtype=torch.double)
    return torch.cat([pixels / focal * depth, depth], 1).view(height, width, 3)

@pytest.mark.parametrize("height, width", [(40, 60), (71, 33)])
def test_focal_length_with_a_third_of_the_points_wrong(height, width):
    g = torch.Generator().manual_seed(0)
    points = point_map(87.5, height, width, g)
    ones = torch.ones(height, width)
    assert ev.estimate_focal(points, ones) == pytest.approx(87.5, rel=1e-6)
    wrong = torch.rand(height, width, generator=g) < 0.3
    points[wrong] = torch.randn(int(wrong.sum()), 3, generator=g, dtype=torch.double) + torch.tensor([0, 0, 3])
    assert ev.estimate_focal(points, ones) == pytest.approx(87.5, rel=0.02)
    assert ev.estimate_focal(points * torch.tensor([0, 0, 1]), ones) == 1
    assert ev.estimate_focal(-points.abs(), ones) == 1

@pytest.mark.parametrize("wrong", [0.0, 0.3])
@pytest.mark.parametrize("depth_error", [0.0, 0.03])
def test_relative_pose_exact_and_with_outliers(wrong, depth_error):
    """Points in both cameras' frames, matches wrong, depths of view 2 off: what view 2 sees tells the pose."""
    g, focal, n = torch.Generator().manual_seed(1), 300.0, 300
    spread, nearest = torch.tensor([3, 2, 3]), torch.tensor([-1.5, -1, 2.5])
    points1 = torch.rand(n, 3, generator=g, dtype=torch.double) * spread + nearest
    camera = torch.eye(4, dtype=torch.double)
    camera[:3, :3], camera[:3, 3] = turn((0.2, 1, 0.1), 25), torch.tensor([0.8, -0.1, 0.3])
    points2 = (points1 - camera[:3, 3]) @ camera[:3, :3]
    pixels = focal * points2[:, :2] / points2[:, 2:]
    points2 = points2 * (1 + depth_error * torch.randn(n, 1, generator=g, dtype=torch.double))
    bad = torch.rand(n, generator=g) < wrong
    points2[bad], pixels[bad] = points2[bad].flip(0), pixels[bad].flip(0)
    points1[7], points2[9], bad[[7, 9]] = math.inf, math.nan, True
    pose, inside = ev.relative_pose(points1, points2, pixels, focal, tolerance=5)
    assert torch.allclose(pose, camera, atol=2e-2 if wrong else 1e-6)
    assert (inside & ~bad).sum() == (~bad).sum()
    assert ev.angle(pose[:3, :3]) == pytest.approx(25, abs=0.3 if wrong else 1e-4)
    pose, inside = ev.relative_pose(points1[:3], points2[:3], pixels[:3], focal, 5)
    assert pose.equal(torch.eye(4, dtype=torch.double)) and not inside.any()

def test_descriptors_find_each_other():
    """View 2 is view 1 moved by (3, 5) pixels: every match says so, whatever the seed it began from."""
    g = torch.Generator().manual_seed(0)
    scene = F.normalize(torch.randn(40, 40, 24, generator=g), dim=-1)
    a, b = ev.reciprocal_matches(scene[:32, :32], scene[5:37, 3:35], stride=4)
    good = ((a % 32 - b % 32) == 3) & ((a // 32 - b // 32) == 5)
    assert good.float().mean() > 0.95 and good.sum() > 30

# ---- The command -----------------------------------------------------------------------------------------------------

def photo(path, height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)

class Knows(torch.nn.Module):
    """A two-view model that knows all about a pair of rooms, cut to landscape and portrait; blind: but for matches."""

    def __init__(self, pair, blind=False):
        super().__init__()
        self.norm, self.patch, self.dec_norm = None, 14, torch.nn.LayerNorm(1)
        self.pair, self.blind, self.asked = pair, blind, 0

    def forward(self, one, two):
        pair, boxes = self.pair, [(slice(14, 98), slice(0, 112)), (slice(0, 112), slice(14, 98))]
        if self.asked:  # the second time it is for view 2 in its own frame
            pair, boxes = {key: x.flip(1) for key, x in pair.items()}, boxes[::-1]
        self.asked += 1
        turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
        views = []
        for points, box in zip(zoo.pair_geometry(pair)[0][0], boxes):
            place = points @ turned
            desc = torch.cat([(8 * place).sin(), (8 * place).cos(), (3 * place).sin(), (3 * place).cos()], -1)
            desc = F.normalize(torch.randn_like(desc) if self.blind else desc, dim=-1)
            ones = torch.ones(1, *points[box].shape[:2])
            views.append({"pts3d": points[box][None], "conf": 2 * ones, "desc": desc[box][None], "desc_conf": ones})
        return views

def test_two_photographs_to_a_point_cloud(tmp_path, monkeypatch, capsys):
    pair = zoo.room_pairs(5, 1, 112)
    for name, view, box in (("a", 0, (0, 14, 112, 98)), ("b", 1, (14, 0, 98, 112))):
        image = Image.fromarray(pair["image"][0, view].permute(1, 2, 0).numpy())
        image.crop(box).save(tmp_path / f"{name}.png")
    arguments = ["two-view", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--image-size", "112", "--device", "cpu",
                 "--out", str(tmp_path / "out" / "room")]
    monkeypatch.setattr(zoo, "load_two_view", lambda *_: Knows(pair, blind=True))
    with pytest.raises(Oops, match="only .* agree, .* no pose; do the two images overlap"):
        ev.main(arguments)
    assert "turned by" not in capsys.readouterr().out
    monkeypatch.setattr(zoo, "load_two_view", lambda *_: Knows(pair))
    with monkeypatch.context() as no_camera, pytest.raises(Oops, match="focal length 1 px: no pose"):
        no_camera.setattr(ev, "estimate_focal", lambda *_: 1.0)
        ev.main(arguments)
    capsys.readouterr()
    ev.main(arguments)
    text = capsys.readouterr().out
    header, body = (tmp_path / "out" / "room.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 18816" in header and len(body) == 15 * 18816
    # Small pictures are shown twice as large.
    assert Image.open(tmp_path / "out" / "room.png").size == (224 + 8 + 168, 3 * 232 - 8)
    true = pair["pose"][0, 0].inverse().double() @ pair["pose"][0, 1].double()

    def told(before):
        return float(text.split(before)[1].split()[0])
    assert told("turned by ") == pytest.approx(ev.angle(true[:3, :3]), abs=1)
    assert told("moved by ") == pytest.approx(true[:3, 3].norm().item(), rel=0.05)
    assert told("a.png: ") == pytest.approx(pair["K"][0, 0, 0, 0].item(), rel=0.01)

def tiny():
    torch.manual_seed(0)
    encoder = dune.ViT(28, 14, 64, 1, 1, 0, layer_scale=None)
    return zoo.TwoView(encoder, dim=64, depth=1, maps=(8, 8, 8, 8), features=8, last=8, hidden=16).eval()

def test_two_view_mistakes_are_one_line(tmp_path):
    torch.save(zoo.two_view_layout(tiny()), tmp_path / "ours.pt")
    a, b = photo(tmp_path / "a.jpg", 28, 42), photo(tmp_path / "b.jpg", 42, 28, 1)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "file").write_text("")
    defaults = {"--weights": str(tmp_path / "ours.pt"), "--out": str(tmp_path / "out"), "--device": "cpu"}
    for images, changed, message in (
        ([a], {}, "takes two images, not 1"),
        ([a, str(tmp_path / "text.jpg")], {}, "text.jpg"),
        ([a, b], {"--weights": a}, "cannot read"),
        ([a, b], {"--out": str(tmp_path / "file" / "x")}, "cannot write"),
        ([], {}, "takes two images, not 0.*or --run FOLDER"),
        ([], {"--seeds": "0"}, "--seeds: 0 is not"),
    ):
        options = [word for option in {**defaults, **changed}.items() for word in option]
        with pytest.raises(Oops, match=message) as error:
            ev.main(["two-view", *images, *options])
        assert "\n" not in str(error.value)

def alike(pairs, place, mask):
    """Correlation of the colours of view 1's pixels with those of view 2 at `place`, whatever the light."""
    at = place.clamp(0, 111).long()
    flat = (at[..., 1] * 112 + at[..., 0]).flatten(1)[:, None].expand(-1, 3, -1)
    one = pairs["image"][:, 0]
    there = pairs["image"][:, 1].flatten(2).gather(2, flat).view_as(one)
    return np.median([np.corrcoef(a[c][m], b[c][m])[0, 1] for a, b, m in zip(one, there, mask) for c in range(3)])

@pytest.fixture
def folder(tmp_path):
    """Four rooms in the README's layout, NAME.png beside NAME.npz, of another size than networks want."""
    for seed in range(4):
        place = tmp_path / "d" / f"room{seed}"
        place.mkdir(parents=True)
        for view in (0, 1):
            scene = data.rooms(seed, 140, view=view)
            Image.fromarray(scene["image"]).crop((0, 14, 140, 126)).save(place / f"{view}.png")
            scene["K"][1, 2] -= 14
            np.savez(place / f"{view}.npz", depth=scene["depth"][14:126], K=scene["K"], pose=scene["pose"])
    return tmp_path / "d"

def pairs_of(folder):
    """Those to learn from, and to judge by, of a folder."""
    known, unseen, _ = ev.two_view_pairs(argparse.Namespace(data=[str(folder)]), argparse.Namespace(size=112))
    return known + unseen

def test_the_camera_is_cut_and_scaled_with_the_image(folder):
    pairs = pairs_of(folder)
    batch = {key: x[None] for key, x in ev.read_pair(112, pairs[0]).items()}
    _, _, place, seen = zoo.pair_geometry(batch)
    assert len(pairs) == 3 and alike(batch, place, seen) > 0.95 > 0.85 > alike(batch, place.roll(4, 2), seen)

def test_a_decoder_learns_from_a_folder_of_pairs(folder, tmp_path):
    torch.set_num_threads(1)
    encoder = dune.ViT(112, 16, 64, 1, 1, 0, layer_scale=None)
    model = dune.DUNE(encoder, {"mast3r": (64, False)})
    torch.save({"model": model.state_dict(), "args": {"image_size": 112}}, tmp_path / "checkpoint.pt")
    vit = dune.ViT(112, 14, 64, 1, 1, 0, class_token=False, layer_scale=None, position="rope")
    torch.save(zoo.published_layout("mast3r", vit.state_dict()), tmp_path / "mast3r.pth")
    ev.main(["two-view", "--run", str(tmp_path), "--weights", f"mast3r={tmp_path}/mast3r.pth", "--data", str(folder),
             "--steps", "2", "--seeds", "2", "--device", "cpu"])
    result = json.loads((tmp_path / "two-view.json").read_text())
    rows, seeds = result["results"], [row["points m"] for row in result["values"]["student"]]
    assert seeds[0] != seeds[1] and math.isclose(rows["student"]["points m"], sum(seeds) / 2)
    assert list(rows) == ["student", "teacher mast3r", "random encoder"]
    assert all(math.isfinite(row["points m"]) for row in rows.values())
    assert (tmp_path / "two-view.png").exists()
    assert isinstance(zoo.load_two_view(tmp_path / "two-view.pt"), zoo.TwoView)

def test_what_is_wrong_with_a_folder_of_pairs_is_told(folder, tmp_path):
    with pytest.raises(Oops, match="fewer than two pairs"):
        pairs_of(tmp_path / "nowhere")
    pair = pairs_of(folder)[0]
    camera = folder / "room0" / "0.npz"
    with np.load(camera) as file:
        good = dict(file)
    for wrong, words in (({"pose": np.full((4, 4), -np.inf)}, r"0.npz: pose is \[4, 4\], .* finite"),
                         ({"K": np.zeros((3, 3))}, r"0.npz: K is \[3, 3\], .* with an inverse"),
                         ({"depth": np.full_like(good["depth"], np.nan)}, "0.npz: no depth between"),
                         ({"depth": good["depth"][1:]}, r"0.npz: depth is \[111, 140\], expected \[H, W\]"),
                         ({"pose": np.array(["a"])}, "cannot read .*0.npz")):
        np.savez(camera, **{**good, **wrong})
        with pytest.raises(Oops, match=words):
            ev.read_pair(112, pair)
    good["depth"][:40] = np.nan  # not measured
    good["depth"][40:50] = 1e30
    np.savez(camera, **good)
    depth = ev.read_pair(112, pair)["depth"][0]
    assert depth.isfinite().all() and (depth[:30] == 0).all()
    with pytest.raises(Oops, match="0.npz"):  # also from the threads that read ahead
        camera.write_text("no cameras")
        list(ev.read_ahead(functools.partial(ev.read_pair, 112), [[pair]]))
