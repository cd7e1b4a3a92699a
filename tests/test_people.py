"""People in one photograph: the geometry of the head, what is measured, folders, files, pictures, mistakes."""
import argparse
import json
import math
import re

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

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

def vit(size=112, patch=14):
    torch.manual_seed(0)
    return dune.ViT(size, patch, 64, 1, 1, 0, layer_scale=None)

def tiny(joints=15, head=0):
    return zoo.People(vit(), joints, head, 112, 14, dim=32, depth=1).eval()

def perfect(model, K, joints, cols):
    """What the linear outputs must say of people [Q, J, 3] so that they are where they are: (raw, patches)."""
    head = zoo.project(joints, K)[:, model.head]
    cell = (head / model.patch).floor()
    far = (joints[:, model.head, 2] * model.size / 2 * math.sqrt(3) / K[:, 0, 0]).log()
    beside = joints - joints[:, model.head, None] + 7  # whatever the head's own is: they are beside it
    raw = torch.cat([head / model.patch - cell - 0.5, far[:, None], beside.flatten(1)], 1)
    return raw, (cell[:, 1] * cols + cell[:, 0]).long()

# ---- Geometry --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", [0, 5])
def test_perfect_outputs_give_the_people_exactly(head):
    scenes = data.labelled_scenes("people", 3, 20, 112)
    image, person = scenes["visible"].nonzero(as_tuple=True)
    joints, K = scenes["joints3d"][image, person], scenes["K"][image] * torch.tensor([[1.0], [1.25], [1.0]])
    place = zoo.project(joints, K)[:, head]
    inside = ((place >= 0) & (place < 112)).all(1)  # else no patch holds it
    joints, K = joints[inside], K[inside]
    assert len(joints) > 10
    model = tiny(head=head)
    raw, patch = perfect(model, K, joints, 8)
    people = model.decode(raw, patch, K, 8)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        again = model.decode(raw, patch, K, 8)
    assert all(torch.equal(people[key], again[key]) for key in people)
    assert torch.allclose(people["joints3d"], joints, atol=1e-4)
    assert torch.allclose(people["distance"], joints[:, head, 2], atol=1e-4)
    assert torch.allclose(people["joints2d"], zoo.project(joints, K), atol=1e-2)
    assert torch.allclose(people["head"], people["joints2d"][:, head], atol=1e-2)

def test_distance_grows_with_the_focal_length_and_f60_is_60_degrees():
    model = tiny()
    raw, patch = torch.randn(4, 48), torch.arange(4)
    K = torch.tensor([[56 / math.tan(math.radians(30)), 0, 56], [0, 100, 56], [0, 0, 1]]).expand(4, 3, 3)
    wide, long = (model.decode(raw, patch, K * torch.tensor([[k], [k], [1]]), 8) for k in (1, 3))
    assert torch.allclose(wide["distance"], raw[:, 2].exp())
    assert torch.allclose(long["distance"], 3 * wide["distance"])
    same = [x["joints3d"] - x["joints3d"][:, :1] for x in (wide, long)]
    assert torch.allclose(*same, atol=1e-4)

def test_a_patch_is_asked_with_its_ray_and_looks_at_its_image_alone():
    model, grid = tiny(), (8, 6)
    tokens, K = torch.randn(2, 48, 64), torch.eye(3).repeat(2, 1, 1) * torch.tensor([[60.0], [60.0], [1.0]])
    image, patch = torch.tensor([0, 0, 1]), torch.tensor([3, 40, 3])
    with torch.no_grad():
        read, scores = model.read(tokens, K, grid)
        raw = model.query(read, image, patch, grid)
        other = tokens.clone()
        other[1] = 0
        again = model.query(model.read(other, K, grid)[0], image, patch, grid)
        K[0, 0, 0] *= 2
        zoomed = model.query(model.read(tokens, K, grid)[0], image, patch, grid)
    assert torch.allclose(raw[:2], again[:2], atol=1e-5) and not torch.allclose(raw[2], again[2], atol=1e-3)
    assert torch.allclose(raw[2], zoomed[2], atol=1e-5) and not torch.allclose(raw[:2], zoomed[:2], atol=1e-4)
    assert scores.shape == (2, 48)

def test_alignment_takes_away_what_similarity_explains_and_no_mirror():
    points = torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    turn = turn * turn.det().sign()
    assert ev.aligned_error(2.5 * points @ turn + 4, points) < 1e-5
    assert ev.aligned_error(points * torch.tensor([-1, 1, 1]), points) > 0.3

class Knows(torch.nn.Module):
    """A people model that is asked about these scenes in turn and knows the answers."""

    def __init__(self, scenes):
        super().__init__()
        self.norm, self.head, self.size = torch.nn.LayerNorm(1), 0, 112
        self.said = []
        for K, joints, visible in zip(scenes["K"], scenes["joints3d"], scenes["visible"]):
            flat = zoo.project(joints, K)
            self.said.append([{"score": torch.ones(()), "head": p[0], "distance": j[0, 2], "joints3d": j, "joints2d": p}
                              for j, p in zip(joints[visible], flat[visible])])

    def forward(self, images, K):
        return [self.said.pop(0)]

def test_what_is_measured():
    scenes = data.labelled_scenes("people", 3, 12, 112)
    there = int(scenes["visible"].sum())
    best = ev.judge_people(Knows(scenes), scenes, 2)
    assert [round(best[key], 3) for key in ("precision", "recall", "F1", "2D")] == [100] * 4
    assert max(best["3D / F1"], best["PA / F1"], best["distance / F1"]) < 1e-3
    model = Knows(scenes)
    said = [person for people in model.said for person in people]
    said[0]["joints2d"] = said[0]["joints2d"] + torch.tensor([6.0, 0.0])  # 6 px of 112 are more than 5 %: not found
    said[1]["joints3d"] = said[1]["joints3d"] * 1.5  # PA sees nothing of it
    model.said[0].append(dict(said[0]))
    found = ev.judge_people(model, scenes)
    assert math.isclose(found["recall"], 100 * (there - 1) / there)
    assert math.isclose(found["precision"], 100 * (there - 1) / (there + 1))
    assert math.isclose(found["2D"], 100 * (there - 1) / there, rel_tol=1e-6)
    assert found["3D / F1"] > 0.5 and found["PA / F1"] < 1e-3

    def swollen(images):
        """In these images everybody is half as large again, about the pelvis; in the others nobody is found."""
        model = Knows(scenes)
        model.said = [people if k in images else [] for k, people in enumerate(model.said)]
        for person in (person for people in model.said for person in people):
            person["joints3d"] = 1.5 * person["joints3d"] - 0.5 * person["joints3d"][2]
        return ev.judge_people(model, scenes, 2)["3D / F1"]
    assert swollen(range(0, 12, 2)) > 1.2 * swollen(range(12))  # much the same errors, of fewer people
    nobody = Knows({**scenes, "visible": scenes["visible"] & False})
    none = ev.judge_people(nobody, scenes)
    assert none["F1"] == none["2D"] == 0 and math.isnan(none["3D / F1"])

# ---- Training, files -------------------------------------------------------------------------------------------------

def make_run(path):
    """A run's folder, with a tiny random student and teacher."""
    model = dune.DUNE(vit(), {"multihmr": (64, False)})
    torch.save(zoo.published_layout("multihmr", vit().state_dict()), path / "multihmr.pth")
    torch.save({"model": model.state_dict(), "args": {"image_size": 112},
                "weights": {"multihmr": str(path / "multihmr.pth")}}, path / "checkpoint.pt")
    return ["people", "--run", str(path), "--device", "cpu"]

def test_a_head_learns_and_its_file_says_the_same_again(monkeypatch):
    scenes = data.labelled_scenes("people", 7, 8, 112)
    look = argparse.Namespace(size=112, patch=14, grid=(8, 8), device=torch.device("cpu"))
    encoder = vit()
    torch.manual_seed(0)
    model = ev.train_people(encoder, scenes, look, argparse.Namespace(head=0, steps=150), "a head", batch=8)
    with dune.writing("people.pt") as file:
        torch.save(zoo.people_layout(model), file)
    loaded = zoo.load_people("people.pt")
    asked = data.normalise(scenes["image"]), scenes["K"]
    for one, two in zip(model(*asked), loaded(*asked), strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    known = ev.judge_people(loaded, scenes, 2)
    assert known["F1"] > 45 and known["3D / F1"] < 20 and known["distance / F1"] < 10, known
    bones = {frozenset(bone) for bone in loaded.bones.int().tolist()}
    assert len(bones) == 14
    for a, b in (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee"), ("knee", "ankle")):
        assert frozenset([data.JOINTS.index(f"left {a}"), data.JOINTS.index(f"left {b}")]) in bones
    wide = model(torch.zeros(1, 3, 56, 126), scenes["K"][:1], least=0.0)[0]  # images of other sides
    assert wide and all(person["score"] <= wide[0]["score"] for person in wide)
    with pytest.raises(Oops, match="56x120 is no multiple of the patch size 14"):
        model(torch.zeros(1, 3, 56, 120), scenes["K"][:1])

def write_folder(path, count=6, joints=4, **changed):
    """People of 4 joints, the third being the head, in images that are wider than high."""
    path.mkdir()
    for i in range(count):
        scene = data.people(i, 140)
        pixels = np.pad(scene["image"], ((0, 0), (20, 30), (0, 0)))
        K = scene["K"] + np.array([[0, 0, 20], [0, 0, 0], [0, 0, 0]])
        labels = {"joints3d": scene["joints3d"][:, [1, 2, 0, 3][:joints]], "K": K, "visible": scene["visible"]}
        if i % 2:  # visible is optional
            del labels["visible"]
        Image.fromarray(pixels).save(path / f"{i}.jpg")
        np.savez(path / f"{i}.npz", **{**labels, **(changed if i == 0 else {})})
    return str(path)

def test_a_folder_of_people_is_cut_with_its_camera(tmp_path):
    folder = write_folder(tmp_path / "real")
    run = make_run(tmp_path)
    lone = write_folder(tmp_path / "lone", 3, joints=1)  # no bones
    ev.main([*run, "--data", lone, "--steps", "1"])
    ev.main([*run, "--data", folder, "--head", "2", "--steps", "2", "--seeds", "2"])
    result = json.loads((tmp_path / "people.json").read_text())
    assert list(result["results"]) == ["student", "teacher multihmr", "random encoder"]
    assert len(result["values"]["student"]) == 2 and zoo.load_people("people.pt").head == 2
    scene = ev.labelled_square(f"{folder}/0.jpg", f"{folder}/0.npz", 112, ("joints3d", "K", "visible"))
    drawn = data.labelled_scenes("people", 0, 1, 140)
    there = zoo.project(drawn["joints3d"][0], drawn["K"][0])[:len(scene["joints3d"]), 0]
    place = zoo.project(scene["joints3d"], scene["K"])[:, 2]  # 140 px from the 25th of 190 on, then 112 of them
    assert torch.allclose(place, (there + torch.tensor([20 - 25.0, 0.0])) * 0.8, atol=1e-2)

def test_figure_1_shows_a_perfect_student_as_the_truth():
    scenes, said = {}, {}
    for domain in data.SCENES:
        drawn = data.labelled_scenes(domain, 5, 12, 112)
        truth = zoo.PROBES[domain](1, (8, 8)).targets(drawn)
        scenes[domain], said[domain] = (None, None, drawn["image"], truth), truth
    kinds = {key: F.one_hot(said["objects"][key], len(data.KINDS) + 1) * 99.0 for key in ("kind", "patch")}
    at, near, place = said["people"]["at"], torch.zeros(12, 64, 15), torch.zeros(12, 64, 15, 2)
    near[tuple(at)], place[tuple(at)] = 99, said["people"]["truth"]
    said.update(objects=kinds, people={"near": near, "place": place})

    def cells(path):
        sheet = np.asarray(Image.open(path)).astype(int)
        rows = sheet[-3 * 174:].reshape(3, 174, -1, 3)[:, :168]
        return [rows[:, :, 6 + 174 * c:174 * (c + 1)] for c in range(11)]
    right = cells(ev.study_picture("right.png", scenes, said, (8, 8)))
    for domain, change in (("objects", "patch"), ("rooms", "depth"), ("rooms", "normals"), ("people", "near")):
        said[domain] = {**said[domain], change: said[domain][change].flip(1)}
    wrong = cells(ev.study_picture("wrong.png", scenes, said, (8, 8)))
    for truth, student in ((1, 2), (4, 5), (6, 7), (9, 10)):
        assert np.abs(right[truth] - right[student]).max() <= 1 and np.ptp(right[truth]) > 50
        assert np.abs(wrong[truth] - right[truth]).max() == 0 and np.abs(wrong[student] - right[truth]).mean() > 2

# ---- Photographs, mistakes -------------------------------------------------------------------------------------------

@pytest.fixture
def weights(tmp_path):
    model = tiny()
    torch.nn.init.constant_(model.score.bias, 5.0)
    torch.save(zoo.people_layout(model), tmp_path / "people.pt")
    return model

def photo(path, height=60, width=90, **options):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return str(path)

def test_a_photograph_gives_metres_in_its_own_camera(tmp_path, weights, capsys):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 18  # mm on 36 mm wide film: 90 degrees
    path = photo(tmp_path / "a.jpg", exif=exif)
    for words, fov in (([], 90), (["--fov", "40"], 40)):
        ev.main(["people", path, *words, "--device", "cpu"])
        said = json.loads((tmp_path / "people-a.json").read_text())
        focal = 45 / math.tan(math.radians(fov / 2))
        assert said["fov"] == pytest.approx(fov) and said["people"]
        assert np.allclose(said["K"], [[focal, 0, 45], [0, focal, 30], [0, 0, 1]], atol=1e-3)
        for person in said["people"]:
            joints = torch.tensor(person["joints3d"])
            flat = zoo.project(joints, torch.tensor(said["K"]))
            assert torch.allclose(flat, torch.tensor(person["joints2d"]), atol=1e-2)
            assert joints.shape == (15, 3) and person["distance"] == pytest.approx(joints[0, 2].item(), abs=1e-4)
        assert Image.open("people-a.png").size == (720 + 480, 480)
    assert f"{len(said['people'])} people; the view is 40.0 degrees" in capsys.readouterr().out
    ev.main(["people", photo(tmp_path / "b.png", 90, 60), "--out", "x", "--device", "cpu"])
    assert json.loads((tmp_path / "x.json").read_text())["fov"] == 60

def test_nobody_is_told(tmp_path, weights, capsys):
    torch.nn.init.constant_(weights.score.bias, -50.0)
    torch.save(zoo.people_layout(weights), "people.pt")
    ev.main(["people", photo(tmp_path / "a.png"), "--weights", "people.pt", "--device", "cpu"])
    assert "no people" in capsys.readouterr().out
    assert json.loads((tmp_path / "people-a.json").read_text())["people"] == []

def test_what_is_wrong_is_one_line(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(ev, "PEOPLE", 2)
    monkeypatch.setattr(ev, "UNSEEN_PEOPLE", 2)
    a, run = photo(tmp_path / "a.png"), make_run(tmp_path)[1:]
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "file").write_text("")
    foreign = zoo.people_layout(weights)
    torch.save({**foreign, "people": {**foreign["people"], "joints": 9}}, "nine.pt")
    torch.save({**foreign, "people": {**foreign["people"], "head": 15}}, "head.pt")
    torch.save({**foreign, "people": {"joints": 15}}, "few.pt")
    torch.save({**foreign, "people": {**foreign["people"], "depth": 10**9}}, "deep.pt")
    good = dict(joints3d=np.ones((1, 4, 3)), K=np.eye(3))
    cases = [([a, "--weights", f"{name}.pt"], words) for name, words in (
        ("checkpoint", "no 'people'"), ("nine", "has the wrong shape for tensor"), ("head", "known layout"),
        ("few", "known layout"), ("deep", "known layout"), ("nothing", "no such file"))]
    cases += [
        ([a, a], "takes one image, not 2"), (["text.jpg"], "cannot read the image text.jpg"), ([], "--run FOLDER"),
        ([a, "--fov", "0.5"], "not between 1 and 179"), ([a, "--fov", "180"], "not between 1 and 179"),
        ([a, "--fov", "nan"], "--fov"), ([a, "--out", "file/x"], "cannot write"),
        ([a, "--run", "nowhere"], "trains it"), ([*run, "--head", "15"], "15 joints here, counted from 0"),
        ([*run, "--data", "nowhere"], "fewer than two pairs"),
    ]
    folders = [
        (dict(joints3d=good["joints3d"][0]), r"0.npz: joints3d is \[4, 3\], expected \[P, J, 3\]"),
        (dict(joints3d=good["joints3d"] * np.nan), r"0.npz: joints3d is .*, expected \[P, J, 3\].*, finite"),
        (dict(joints3d=np.ones((1, 7, 3)), visible=np.ones(1)), "different numbers of joints"),
        (dict(visible=np.ones(9)), r"0.npz: visible is \[9\], expected \[P\]"),
        (dict(K=np.zeros((3, 3))), "0.npz: K is .* with an inverse"),
        (dict(K=np.eye(4)), r"0.npz: K is \[4, 4\], expected \[3, 3\]"),
        (dict(K=np.array(["a"])), "cannot read .*0.npz")]
    for i, (changed, words) in enumerate(folders):
        cases.append(([*run, "--data", write_folder(tmp_path / f"folder{i}", 3, **changed)], words))
    cases.append(([*run, "--data", write_folder(tmp_path / "few", 3), "--head", "4"], "4 joints here"))
    for words, message in cases:
        with pytest.raises(Oops) as error:
            ev.main(["people", *words, *([] if "--device" in words else ["--device", "cpu"])])
        assert re.search(message, str(error.value)) and "\n" not in str(error.value), (words, str(error.value))
