"""The procedural scenes: the same picture at any size, and labels that agree with the geometry they claim."""
import numpy as np
import pytest

import data
from data import JOINTS, KINDS, SCENES, objects, people, rooms

def halve(a):
    return a[0::2, 0::2] / 4 + a[1::2, 0::2] / 4 + a[0::2, 1::2] / 4 + a[1::2, 1::2] / 4

@pytest.mark.parametrize("name", SCENES)
def test_seeded_and_the_same_picture_at_any_size(name):
    scenes = [SCENES[name](seed) for seed in range(6)]
    assert scenes[0]["image"].shape == (112, 112, 3)
    assert scenes[0]["image"].dtype == np.uint8
    assert np.array_equal(scenes[0]["image"], SCENES[name](0)["image"])
    assert len({scene["image"].tobytes() for scene in scenes}) == 6
    for seed, small in enumerate(scenes):
        large = SCENES[name](seed, 224)
        assert np.abs(halve(large["image"].astype(float)) - small["image"]).mean() < 6
        for key in {"label", "joints2d", "joints3d", "pose", "visible"} & set(small):
            assert np.array_equal(small[key], large[key])

def test_objects_show_every_kind_within_its_limits():
    scenes = [objects(seed) for seed in range(300)]
    assert len(KINDS) >= 10
    assert {scene["label"] for scene in scenes} == set(range(len(KINDS)))
    ratios = []
    for scene in scenes:
        mask = scene["mask"]
        step = np.abs(np.diff(scene["image"].astype(float), axis=1)).sum(-1)
        seam = mask[:, 1:] != mask[:, :-1]
        ratios.append(step[seam].mean() / step[~seam].mean())
        rows, cols = np.nonzero(mask)
        assert 0.2 * 112 < max(np.ptp(rows), np.ptp(cols)) + 1 <= 0.86 * 112
        assert mask.mean() < 0.56
    assert np.mean(ratios) > 4  # the mask ends where the thing does

@pytest.mark.parametrize("seed", range(5))
def test_rooms_depth_normals_and_views_agree(seed):
    size = 112
    a, b = rooms(seed), rooms(seed, view=1)
    assert np.allclose(np.linalg.norm(a["normals"], axis=-1), 1, atol=1e-4)
    assert a["depth"].min() > 0.2
    c = np.arange(size) + 0.5
    pixels = np.stack(np.broadcast_arrays(c[None], c[:, None], 1.0), -1)
    points = pixels @ np.linalg.inv(a["K"]).T * a["depth"][..., None]
    towards = (points * a["normals"]).sum(-1) < 1e-3  # the camera; a pixel on an edge may have the hidden side's
    assert towards.mean() > 0.9998
    facets = np.cross(points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2])
    facets /= np.linalg.norm(facets, axis=-1, keepdims=True)
    assert ((facets * a["normals"][1:-1, 1:-1]).sum(-1) > 0.99).mean() > 0.85
    fine = rooms(seed, 224)["depth"]
    assert (np.abs(halve(fine) / a["depth"] - 1) < 0.01).mean() > 0.85

    world = points @ a["pose"][:3, :3].T + a["pose"][:3, 3]
    moved = (world - b["pose"][:3, 3]) @ b["pose"][:3, :3]
    u, v = np.floor((moved @ b["K"].T)[..., :2] / moved[..., 2:]).astype(int).transpose(2, 0, 1)
    inside = (u >= 0) & (u < size) & (v >= 0) & (v < size) & (moved[..., 2] > 0)
    u, v = u.clip(0, size - 1), v.clip(0, size - 1)
    ratio = b["depth"][v, u] / moved[..., 2]
    seen = inside & (np.abs(ratio - 1) < 0.05)
    assert seen.mean() > 0.4
    assert (ratio[inside] > 1.05).mean() < 0.02  # nothing is seen through something nearer
    assert 0.2 < np.linalg.norm(a["pose"][:3, 3] - b["pose"][:3, 3]) < 1.2

    def alike(other):  # the light differs
        return np.median([np.corrcoef(a["image"][seen][:, k], other[seen][:, k])[0, 1] for k in range(3)])

    assert alike(b["image"][v, u]) > 0.95
    assert alike(b["image"]) < 0.9

def test_two_photographs_of_a_room_differ_in_light_and_colour():
    means = np.log([[rooms(seed, 56, view)["image"].mean((0, 1)) for view in (0, 1)] for seed in range(20)])
    light = np.diff(means.mean(2), axis=1)
    tint = np.diff(means[..., 0] - means[..., 2], axis=1)
    assert light.std() > 0.2
    assert tint.std() > 0.1

def test_people_joints_project_and_the_first_is_visible():
    counts = set()
    hidden = 0
    pelvis, hip, knee = (JOINTS.index(name) for name in ("pelvis", "left hip", "left knee"))
    for seed in range(100):
        scene = people(seed)
        flat, joints = scene["joints2d"], scene["joints3d"]
        assert flat.shape == (*joints.shape[:2], 2) == (len(scene["visible"]), len(JOINTS), 2)
        assert np.allclose((joints @ scene["K"].T)[..., :2] / joints[..., 2:] / 112, flat, atol=1e-4)
        assert scene["visible"][0]
        assert (np.diff(joints[:, pelvis, 2]) >= 0).all()
        assert (joints[..., 2] > 0.3).all()
        assert 0.3 < np.ptp(flat[0, :, 1]) < 0.95
        assert ((flat > 0) & (flat < 1)).mean() > 0.7
        thigh = np.linalg.norm(joints[:, hip] - joints[:, knee], axis=-1)
        assert (0.3 < thigh).all() and (thigh < 0.55).all()
        counts.add(len(flat))
        hidden += (~scene["visible"]).sum()
    assert counts == {1, 2, 3}
    assert 1 <= hidden <= 30

def test_people_are_drawn_where_their_joints_are(monkeypatch):
    scenes = [people(seed) for seed in range(10)]
    monkeypatch.setattr(data, "bar", lambda *_: None)
    for seed, scene in enumerate(scenes):
        drawn = (scene["image"] != people(seed)["image"]).any(-1)  # against the empty stage
        joints = scene["joints2d"]
        at = np.floor(joints[((joints > 0) & (joints < 1)).all(-1)] * 112).astype(int)
        assert drawn[at[:, 1], at[:, 0]].mean() > 0.95
        assert drawn.mean() < 0.6

def test_a_small_source_is_drawn_once_and_stays_what_it_was():
    source, fresh = (data.Scenes("scenes:people:7-80") for _ in range(2))
    source.prepare(56)
    assert source.kept[56].shape == (73, 56, 56, 3)
    for i, size in ((0, 56), (72, 56), (5, 84)):  # another size is drawn as ever
        assert np.array_equal(source.read(i, size)[0], fresh.read(i, size)[0])
    endless = data.Scenes("scenes:people")
    endless.prepare(56)
    assert not endless.kept

def test_labelled_scenes_are_the_scenes_as_tensors():
    batch = data.labelled_scenes("people", 5, 70, 56)  # so many that several processes draw
    assert batch["image"].shape == (70, 3, 56, 56)
    for i in (0, 33, 69):
        scene = people(5 + i, 56)
        count = len(scene["visible"])
        assert np.array_equal(batch["image"][i].permute(1, 2, 0), scene["image"])
        assert np.array_equal(batch["joints3d"][i, :count], scene["joints3d"])
        assert batch["visible"][i].tolist() == [*scene["visible"].tolist(), *[False] * (3 - count)]
    other = data.labelled_scenes("rooms", 5, 2, 56, view=1)
    assert np.array_equal(other["pose"][1], rooms(6, 56, view=1)["pose"])
    assert list(data.labelled_scenes("rooms", 5, 2, 56, keys=("image",))) == ["image"]

@pytest.mark.parametrize("name, channels, spread", [
    ("objects", (123.314, 115.013, 127.466), 42.937),
    ("rooms", (135.403, 127.645, 122.819), 62.140),
    ("people", (124.601, 128.074, 129.664), 44.065),
])
def test_a_seed_gives_the_picture_that_it_always_gave(name, channels, spread):
    """Runs are compared over years: a random number drawn more, or in another order, would change every picture."""
    images = np.stack([SCENES[name](seed, 56)["image"] for seed in range(20)]).astype(float)
    assert np.allclose(images.mean((0, 1, 2)), channels, atol=0.01)
    assert np.allclose(images.std(), spread, atol=0.01)
