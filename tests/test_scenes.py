"""The procedural scenes: the same picture at any size, and labels that agree with the geometry they claim."""
import sys
import numpy as np
import pytest
import data
from data import JOINTS, KINDS, SCENES, objects, people, rooms

def halve(a):
    return a[0::2, 0::2] / 4 + a[1::2, 0::2] / 4 + a[0::2, 1::2] / 4 + a[1::2, 1::2] / 4

@pytest.mark.parametrize("name", SCENES)
def test_seeded_and_the_same_picture_at_any_size(name):
    images = [SCENES[name](seed)["image"] for seed in range(6)]
    assert images[0].shape == (112, 112, 3) and images[0].dtype == np.uint8
    assert np.array_equal(images[0], SCENES[name](0)["image"]) and len({image.tobytes() for image in images}) == 6
    for seed in range(6):
        small, large = SCENES[name](seed), SCENES[name](seed, 224)
        assert np.abs(halve(large["image"].astype(float)) - small["image"]).mean() < 6
        assert all(np.array_equal(small[key], large[key]) for key in {"label", "joints2d", "joints3d", "pose", "visible"} & set(small))

def test_objects_show_every_kind_within_its_limits():
    scenes = [objects(seed) for seed in range(300)]
    assert len(KINDS) >= 10 and {s["label"] for s in scenes} == set(range(len(KINDS)))
    ratios = []
    for s in scenes:
        step, seam = np.abs(np.diff(s["image"].astype(float), axis=1)).sum(-1), s["mask"][:, 1:] != s["mask"][:, :-1]
        ratios.append(step[seam].mean() / step[~seam].mean())
        rows, cols = np.nonzero(s["mask"])
        assert 0.2 * 112 < max(np.ptp(rows), np.ptp(cols)) + 1 <= 0.86 * 112 and s["mask"].mean() < 0.56
    assert np.mean(ratios) > 4, np.mean(ratios)  # the mask ends where the thing does

@pytest.mark.parametrize("seed", range(5))
def test_rooms_depth_normals_and_views_agree(seed):
    a, b, size = rooms(seed), rooms(seed, view=1), 112
    assert np.allclose(np.linalg.norm(a["normals"], axis=-1), 1, atol=1e-4) and a["depth"].min() > 0.2
    c = np.arange(size) + 0.5
    points = np.stack(np.broadcast_arrays(c[None], c[:, None], 1.0), -1) @ np.linalg.inv(a["K"]).T * a["depth"][..., None]
    assert ((points * a["normals"]).sum(-1) < 1e-3).mean() > 0.9998  # towards the camera; a pixel on an edge may have the hidden side's
    facets = np.cross(points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2])
    facets /= np.linalg.norm(facets, axis=-1, keepdims=True)
    assert ((facets * a["normals"][1:-1, 1:-1]).sum(-1) > 0.99).mean() > 0.85
    fine = rooms(seed, 224)["depth"]
    assert (np.abs(halve(fine) / a["depth"] - 1) < 0.01).mean() > 0.85
    moved = (points @ a["pose"][:3, :3].T + a["pose"][:3, 3] - b["pose"][:3, 3]) @ b["pose"][:3, :3]
    u, v = np.floor((moved @ b["K"].T)[..., :2] / moved[..., 2:]).astype(int).transpose(2, 0, 1)
    inside = (u >= 0) & (u < size) & (v >= 0) & (v < size) & (moved[..., 2] > 0)
    u, v = u.clip(0, size - 1), v.clip(0, size - 1)
    ratio = b["depth"][v, u] / moved[..., 2]
    seen = inside & (np.abs(ratio - 1) < 0.05)
    assert seen.mean() > 0.4 and (ratio[inside] > 1.05).mean() < 0.02  # nothing is seen through something nearer
    assert 0.2 < np.linalg.norm(a["pose"][:3, 3] - b["pose"][:3, 3]) < 1.2
    alike = lambda other: np.median([np.corrcoef(a["image"][seen][:, k], other[seen][:, k])[0, 1] for k in range(3)])  # the light differs
    assert alike(b["image"][v, u]) > 0.95 and alike(b["image"]) < 0.9

def test_two_photographs_of_a_room_differ_in_light_and_colour():
    means = np.log([[rooms(seed, 56, view)["image"].mean((0, 1)) for view in (0, 1)] for seed in range(20)])
    light, colour = np.diff(means.mean(2), axis=1), np.diff(means[..., 0] - means[..., 2], axis=1)
    assert light.std() > 0.2 and colour.std() > 0.1, (light.std(), colour.std())

def test_people_joints_project_and_the_first_is_visible():
    counts, hidden, pelvis = set(), 0, JOINTS.index("pelvis")
    for seed in range(100):
        s = people(seed)
        j2, j3 = s["joints2d"], s["joints3d"]
        assert j2.shape == (*j3.shape[:2], 2) == (len(s["visible"]), len(JOINTS), 2)
        assert np.allclose((j3 @ s["K"].T)[..., :2] / j3[..., 2:] / 112, j2, atol=1e-4)
        assert s["visible"][0] and (np.diff(j3[:, pelvis, 2]) >= 0).all() and (j3[..., 2] > 0.3).all()
        assert 0.3 < np.ptp(j2[0, :, 1]) < 0.95 and ((j2 > 0) & (j2 < 1)).mean() > 0.7
        thigh = np.linalg.norm(j3[:, JOINTS.index("left hip")] - j3[:, JOINTS.index("left knee")], axis=-1)
        assert (0.3 < thigh).all() and (thigh < 0.55).all()
        counts.add(len(j2))
        hidden += (~s["visible"]).sum()
    assert counts == {1, 2, 3} and 1 <= hidden <= 30

def test_people_are_drawn_where_their_joints_are(monkeypatch):
    scenes = [people(seed) for seed in range(10)]
    monkeypatch.setattr(sys.modules[people.__module__], "_bar", lambda *_: None)
    for seed, s in enumerate(scenes):
        drawn = (s["image"] != people(seed)["image"]).any(-1)  # against the empty stage
        at = np.floor(s["joints2d"][((s["joints2d"] > 0) & (s["joints2d"] < 1)).all(-1)] * 112).astype(int)
        assert drawn[at[:, 1], at[:, 0]].mean() > 0.95 and drawn.mean() < 0.6


def test_a_small_source_is_drawn_once_and_stays_what_it_was():
    source, fresh = (data.Scenes("scenes:people:7-80") for _ in range(2))
    source.keep(56)
    assert source.kept.shape == (73, 56, 56, 3)
    for i, size in ((0, 56), (72, 56), (5, 84)):  # another size is drawn as ever
        assert np.array_equal(source.read(i, size)[0], fresh.read(i, size)[0])
    endless = data.Scenes("scenes:people")
    endless.keep(56)
    assert endless.kept is None
