"""eval.py: each command on made-up data whose answer is known, and what it says to wrong input."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import dune
import eval as ev
import teachers as zoo
from dune import Oops


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path):
    """The arguments that make a small random DINOv2 the thing looked at, at 64 px."""
    torch.manual_seed(0)
    vit = dune.ViT(64, 8, 64, 1, 1, 0, layer_scale=0.1)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    return ["--teacher", "dinov2", "--weights", f"dinov2={tmp_path}/vit.pth", "--image-size", "64"]


def pixels(patch, cls=False):
    """A reader that has no weights: a patch's feature is its pixels."""
    def read(x):
        return {"cls": x.mean((2, 3)) if cls else None, "patch": F.unfold(x, patch, stride=patch).transpose(1, 2)}
    return ev.Reader("pixels", read, patch, [nn.Identity()])


def result(name):
    with open(f"{name}.json") as file:
        return json.load(file)["results"]


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------- classification

def test_knn_is_dinos_formula():
    torch.manual_seed(0)
    train, labels, test = torch.randn(50, 8), torch.randint(5, (50,)), torch.randn(7, 8)
    scores = ev.knn(train, labels, test, 5, k=4, temperature=0.07)
    for x, row in zip(test, scores):
        similarity = sorted(((F.cosine_similarity(x, t, dim=0).item(), int(c)) for t, c in zip(train, labels)), reverse=True)[:4]
        for c in range(5):
            assert math.isclose(row[c].item(), sum(math.exp(s / 0.07) for s, k in similarity if k == c), rel_tol=1e-3, abs_tol=1e-3)
    assert ev.top(torch.eye(6)[:, [5, 0, 1, 2, 3, 4]], torch.arange(6))["top-1"] == 0
    assert ev.top(torch.eye(6), torch.arange(6)) == {"top-1": 100.0, "top-5": 100.0}


def test_knn_and_linear_tell_colours_apart_and_features_are_kept(tmp_path, teacher, capsys, monkeypatch):
    for split in ("train", "test"):
        for c, colour in enumerate(([200, 30, 30], [30, 200, 30], [30, 30, 200])):
            for i in range(6):
                picture(tmp_path / split / f"class{c}" / f"{i}.png", (noise(i + 10 * (split == "test"), 40, 50) * 0.2 + colour * np.ones(3) * 0.8).astype(np.uint8))
    sets = ["--train", "train", "--test", "test"]
    for token in ("cls", "patch", "both"):
        ev.main(["knn", *sets, *teacher, "--token", token, "--k", "5"])
        assert result("knn")["dinov2"] == {"top-1": 100.0, "top-5": 100.0, "token": token}
    ev.main(["linear", *sets, *teacher, "--steps", "60"])
    assert result("linear")["dinov2"]["top-1"] == 100.0
    kept = list((tmp_path / "cache" / "features").iterdir())
    assert len(kept) == 2  # one file for the training images, one for the test images, whatever the command
    monkeypatch.setattr(ev.Reader, "__call__", lambda self, x: {"cls": torch.zeros(1), "patch": None})
    ev.main(["knn", *sets, *teacher])  # nothing is computed again
    picture(tmp_path / "test" / "class0" / "0.png", noise(3, 40, 51))
    with pytest.raises(AttributeError):  # a changed image is
        ev.main(["knn", *sets, *teacher])


# ------------------------------------------------------------------------------------------------------------------- dense

def test_class_iou_by_hand():
    truth, guess = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 3, 1, 1, 0])
    iou = ev.class_iou(torch.bincount(truth * 4 + guess, minlength=16).view(4, 4))
    assert torch.allclose(iou[:3], torch.tensor([2 / 5, 2 / 3, 0.0], dtype=torch.double)) and iou[3].isnan()  # 3 is only ever guessed


def test_depth_errors_by_hand_leave_out_what_was_not_measured():
    errors = ev.depth_errors(torch.tensor([[1.0, 3.0], [9.0, 2.6]]), torch.tensor([[1.0, 2.0], [0.0, 2.5]]))
    assert math.isclose(errors["RMSE"], math.sqrt((0 + 1 + 0.01) / 3), rel_tol=1e-5)
    assert math.isclose(errors["AbsRel"], (0 + 0.5 + 0.04) / 3, rel_tol=1e-5) and math.isclose(errors["delta1"], 200 / 3)


def test_depth_bins_give_their_weighted_mean():
    features = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float16)
    head = ev.DenseHead(features, 3, torch.tensor([1.0, 2.0, 6.0]))
    nn.init.zeros_(head.linear.weight)
    head.linear.bias.data = torch.tensor([-5.0, 0.9, 0.4])  # relu + 0.1: 0.1, 1.0, 0.5
    assert torch.allclose(head(torch.zeros(1, 4, 3), (4, 4)), torch.full((1, 1, 4, 4), (0.1 + 2 + 3) / 1.6))


def test_windows_cover_the_image_and_are_the_whole_of_a_square_one():
    assert ev.windows(64, 64, True) == ev.windows(64, 64, False) == [(0, 0, 64, 64)]
    for width, height in ((100, 41), (30, 95), (64, 65)):
        boxes, seen = ev.windows(width, height, True), np.zeros((height, width))
        for x0, y0, x1, y1 in boxes:
            assert x1 - x0 == y1 - y0 == min(width, height) and x1 <= width and y1 <= height
            seen[y0:y1, x0:x1] += 1
        starts = sorted(max(b[:2]) for b in boxes)
        assert seen.all() and max(np.diff(starts)) <= min(width, height) * 2 / 3 + 1


def halves(root, names, values, count=4, size=(48, 64), suffix="png"):
    """Images whose left part is red and right part blue, at other places, and a target that says which: values (left, right)."""
    for i in range(count):
        edge = size[1] * (i + 2) // (count + 3)
        left = np.arange(size[1])[None, :, None] < edge
        picture(root / "images" / f"{i}.png", (noise(i, *size) * 0.2 + np.where(left, [180, 20, 20], [20, 20, 180]) * np.ones((*size, 1)) * 0.8).astype(np.uint8))
        target = np.where(left[..., 0], *values) * np.ones(size)
        if suffix == "npy":
            (root / names).mkdir(exist_ok=True)
            np.save(root / names / f"{i}.npy", target.astype(np.float32))
        else:
            picture(root / names / f"{i}.png", target.astype(np.uint16 if max(values) > 255 else np.uint8))


@pytest.mark.parametrize("sliding", ([], ["--sliding"]))
def test_seg_finds_the_halves(tmp_path, teacher, sliding):
    halves(tmp_path / "a", "masks", (0, 2))
    halves(tmp_path / "b" / "x", "annotations", (0, 2), count=3)
    for kind in ("images", "annotations"):  # ADE20K's layout: images/validation beside annotations/validation
        (tmp_path / "b" / kind).mkdir()
        (tmp_path / "b" / "x" / kind).rename(tmp_path / "b" / kind / "validation")
    ev.main(["seg", "--train", "a", "--test", "b/images/validation", *teacher, "--steps", "300", *sliding])
    assert result("seg")["dinov2"]["mIoU"] > 85
    with open("seg.json") as file:
        iou = json.load(file)["classes"]["dinov2"]
    assert len(iou) == 3 and iou[1] is None  # a class that is nowhere has no IoU
    assert Image.open("seg.png").size[0] > 3 * 64


@pytest.mark.parametrize("suffix, values", (("png", (2000, 6000)), ("npy", (2.0, 6.0))))
def test_depth_finds_the_halves(tmp_path, teacher, suffix, values):
    for name in ("a", "b"):
        halves(tmp_path / name, "depth", values, suffix=suffix)
    ev.main(["depth", "--train", "a", "--test", "b", *teacher, "--steps", "120"])
    row = result("depth")["dinov2"]
    assert row["delta1"] > 80 and row["RMSE"] < 1.2 and Image.open("depth.png")


# ---------------------------------------------------------------------------------------------------------------- matching

def test_match_finds_a_shift_and_warp_agrees_in_all_its_forms(tmp_path):
    wide = noise(0, 64, 96)
    a, b = (torch.from_numpy(wide[:, x:x + 64].copy()).permute(2, 0, 1) for x in (0, 16))  # x_b = x_a - 16
    sizes, ones = ((64, 64), (64, 64)), np.ones((64, 64))
    k = np.array([[32.0, 0, 32], [0, 32, 32], [0, 0, 1]])
    move = np.eye(4)
    move[0, 3] = -1.0  # a camera a metre to the right sees what is 2 m away 16 pixels to the left
    truths = [{"homography": np.array([[1, 0, -16], [0, 1, 0], [0, 0, 1.0]])}, {"disparity": 16 * ones}, {"depth": 2 * ones, "camera": (k, k, move)}]
    for truth in truths:
        pa, pb, similarity, error, findable = ev.match_errors(pixels(8), (a, b), sizes, truth, 1)
        there = pa[:, 0] > 0.25
        assert there.sum() == findable == 48 and error[~there].isnan().all()  # what has left the image is not counted
        assert (error[there] < 1e-6).all() and (similarity[there] > 0.999).all()
        assert ev.correct(error, 60) == {"1 %": 100.0, "3 %": 100.0, "5 %": 100.0, "found": 80.0}
    hidden = {**truths[2], "depth_b": ones}  # something nearer stands before all of it
    assert ev.match_errors(pixels(8), (a, b), sizes, hidden, 1)[3].isnan().all()
    wrong = {"homography": np.array([[1, 0, -16 + 2.0], [0, 1, 0], [0, 0, 1]])}  # 2 of 64 pixels off: 3.1 %
    assert ev.correct(ev.match_errors(pixels(8), (a, b), sizes, wrong, 1)[3], 48)["3 %"] == 0 and ev.correct(torch.tensor([0.031]), 1)["5 %"] == 100
    assert len(ev.match(pixels(8), (a, b), 2)[0]) > 0


def test_match_command_on_one_pair_and_on_a_list(tmp_path, teacher):
    picture(tmp_path / "a.png", noise(0, 64, 64))
    np.savetxt("h.txt", np.eye(3))
    with open("list.txt", "w") as file:
        file.write("a.png a.png homography=h.txt\na.png a.png\n")
    ev.main(["match", "--pair", "a.png", "a.png", "homography=h.txt", *teacher])
    assert result("match")["dinov2"] == {"matches": "64", "1 %": 100.0, "3 %": 100.0, "5 %": 100.0, "found": 100.0}
    ev.main(["match", "--pairs", "list.txt", *teacher])
    assert result("match")["dinov2"]["matches"] == "128" and Image.open("match.png")


def test_match_without_a_pair_takes_rooms(tmp_path, teacher, monkeypatch, capsys):
    views = ev.room_views(data.TEST_SCENES, 2, 64)
    monkeypatch.setattr(ev, "room_views", lambda *_: [(a, a) for a, _ in views])  # the second camera stands where the first does
    ev.main(["match", *teacher])
    assert result("match")["dinov2"]["1 %"] == 100 and result("match")["dinov2"]["found"] > 80 and "rooms" in capsys.readouterr().out


def test_two_rooms_match_themselves():
    room = {k: v[0] for k, v in data.labelled_scenes("rooms", 3, 1, 64).items()}
    error = ev.room_matches(pixels(8), room, room, 1)[3]
    assert (error[~error.isnan()] < 1e-5).all() and (~error.isnan()).sum() > 40


# ------------------------------------------------------------------------------------------------------ analyses, the study

def test_explained_variance_and_alignment(tmp_path):
    x = torch.randn(400, 3) * torch.tensor([3.0, 1.0, 0.0])
    x = (x - x.mean(0)) @ torch.linalg.qr(torch.randn(3, 3))[0]
    share = ev.explained(x[:, None])
    assert abs(share[0] - 0.9) < 0.03 and abs(share[1] - 1) < 1e-6
    values = np.random.default_rng(0).normal(size=12)
    with open("log.jsonl", "w") as file:
        for i, v in enumerate(values):
            file.write(json.dumps({"step": i, "a": {"loss": v}, "b": {"loss": 2 * v}, "c": {"loss": -v}}) + "\n")
    ev.main(["alignment", "--run", str(tmp_path)])
    with open("alignment.json") as file:
        assert np.allclose(json.load(file)["correlation"], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


def make_run(path):
    """A run folder as train.py leaves it, with tiny random teachers."""
    torch.manual_seed(0)
    weights, sizes = {}, {}
    for t, (_, shape, *_) in zoo.SPECIALISTS.items():
        vit = dune.ViT(**{**shape, "depth": 1, "embed_dim": 64, "num_heads": 1})
        weights[t] = str(path / f"{t}.pth")
        torch.save(zoo.published_layout(t, vit.state_dict()), weights[t])
        sizes[t] = 64, zoo.load_teacher(t, weights[t]).has_cls
    model = dune.DUNE(dune.ViT(112, 14, 64, 1, 1, 4), sizes)
    torch.save({"model": model.state_dict(), "step": 1, "args": {"image_size": 112}, "weights": weights}, path / "checkpoint.pt")
    return model.eval()


def test_study_tells_every_encoder_apart_by_the_same_columns(tmp_path, monkeypatch, capsys):
    model = make_run(tmp_path)
    monkeypatch.setattr(ev, "STUDY", dict(train=60, test=30, pairs=2))
    monkeypatch.setattr(ev, "CHUNK", 30)
    monkeypatch.setattr(ev, "PROBE_STEPS", 4)
    ev.main(["study", "--run", str(tmp_path), "--seeds", "2"])
    with open("study.json") as file:
        study = json.load(file)
    assert list(study["mean"]) == ["random encoder", *model.projectors, "encoder", *(f"through {t}" for t in model.projectors)]
    assert all(list(row) == list(ev.COLUMNS) and all(math.isfinite(v) for v in row.values()) for row in study["mean"].values())
    own, student = study["mean"]["mast3r"]["depth RMSE"], study["mean"]["encoder"]["depth RMSE"]
    assert math.isclose(study["ratios"]["encoder / own teacher"]["RMSE m"], own / student)  # less is better: the ratio is turned
    assert study["parameters"]["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    x = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for reader in ev.student_readers(model, list(model.projectors)):
        want = model(data.normalise(x))[reader.name.split()[-1]]
        assert torch.allclose(reader(x)["patch"], want["patch"], atol=2e-2)


def test_effects_compare_like_with_like_and_know_the_noise():
    runs = [{"projector": p, "sharing": s, "drop": d, "loss": {"sp": 0, "lp": 1, "tp": 2}[p] + 10 * (s == "all") + 0.1 * seed}
            for p in ("sp", "lp", "tp") for s in ("own", "all") for d in (0.0, 0.5) for seed in (0, 1) if (p, s) != ("sp", "own")]
    found = {(f, a, b): (gap, error) for f, a, b, gap, error in ev.effects(runs, "loss")}
    assert math.isclose(found["projector", "sp", "tp"][0], -2) and math.isclose(found["projector", "lp", "tp"][0], -1)
    assert math.isclose(found["sharing", "own", "all"][0], -10) and abs(found["drop", 0.0, 0.5][0]) < 1e-9
    noise_of_one = math.sqrt(2 * 0.05**2)  # std (n - 1) of 0 and 0.1
    assert math.isclose(found["sharing", "own", "all"][1], noise_of_one * math.sqrt(4 * (1 / 2 + 1 / 2)) / 4, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------------------ wrong input

def test_wrong_input_is_told_in_one_line(tmp_path, teacher):
    halves(tmp_path / "ok", "masks", (0, 2), count=2)
    halves(tmp_path / "one_less", "masks", (0, 2), count=2)
    (tmp_path / "one_less" / "masks" / "1.png").unlink()
    halves(tmp_path / "other_shape", "masks", (0, 2), count=1)
    picture(tmp_path / "other_shape" / "masks" / "0.png", np.zeros((48, 48), np.uint8))
    halves(tmp_path / "beyond", "masks", (0, 9), count=1)
    halves(tmp_path / "colours", "masks", (0, 1), count=1)
    picture(tmp_path / "colours" / "masks" / "0.png", noise(0, 48, 64))
    halves(tmp_path / "ignored", "masks", (255, 255), count=1)
    halves(tmp_path / "zeros", "depth", (0, 0), count=1)
    for name in ("classes/a/1.png", "classes/b/1.png", "single/a/1.png"):
        picture(tmp_path / name, noise(0, 32, 32))
    (tmp_path / "empty_class" / "a").mkdir(parents=True), (tmp_path / "empty_class" / "b").mkdir()
    (tmp_path / "other_class" / "z").mkdir(parents=True)
    picture(tmp_path / "a.png", noise(0, 64, 64))
    (tmp_path / "short.txt").write_text("1 2 3")
    (tmp_path / "list.txt").write_text("a.png\n")
    halves(tmp_path / "text", "masks", (0, 1), count=1)
    (tmp_path / "text" / "masks" / "0.png").write_text("no picture")
    for command, words in (
        (["seg", "--train", "one_less", "--test", "ok"], "2 images.*1 targets.*'1' has no partner"),
        (["seg", "--train", "other_shape", "--test", "ok"], "of another shape"),
        (["seg", "--train", "ok", "--test", "beyond"], "label 9.*3 classes"),
        (["seg", "--train", "ok", "--test", "ok", "--classes", "2"], "label 2.*--classes 2"),
        (["seg", "--train", "colours", "--test", "ok"], "one number for each pixel"),
        (["seg", "--train", "ignored", "--test", "ok"], "every pixel is ignored"),
        (["seg", "--train", "text", "--test", "ok"], "cannot read .*not an image"),
        (["seg", "--train", "ok"], "nothing is not a folder"),
        (["depth", "--train", "zeros", "--test", "zeros"], "no depth between"),
        (["depth", "--train", "ok", "--test", "ok"], "images/ and depth/"),
        (["knn", "--train", "empty_class", "--test", "classes"], "empty_class/a is empty"),
        (["knn", "--train", "classes", "--test", "other_class"], "class z is not among"),
        (["linear", "--train", "single", "--test", "single"], "at least two classes"),
        (["linear", "--train", "nowhere", "--test", "nowhere", "--out", "a.png/x"], "cannot write in a.png"),  # told before the work
        (["match", "--pair", "a.png"], "needs two images, this has 1"),
        (["match", "--pair", "a.png", "a.png", "homography=short.txt"], "must hold 9 numbers"),
        (["match", "--pair", "a.png", "a.png", "flow=x"], "the words are"),
        (["match", "--pair", "a.png", "a.png", "depth=x.npy"], "cannot read x.npy"),
        (["match", "--pairs", "list.txt"], "needs two images"),
        (["match", "--pair", "a.png", "a.png", "--pairs", "list.txt"], "not both"),
        (["knn", "--train", "classes", "--test", "classes", "--through", "dinov2"], "say what to look at"),
        (["alignment"], "at least two teachers"),
    ):
        with pytest.raises(Oops, match="(?s)" + words) as told:
            ev.main([*command, *(teacher if "--through" not in command else [])])
        assert "\n" not in str(told.value)
    with pytest.raises(Oops, match="no multiple of the patch size 8: take 64"):
        ev.main(["match", "--pair", "a.png", "a.png", *teacher[:-1], "60"])


def test_a_mask_of_another_size_is_resized_with_one_warning(tmp_path, capsys):
    halves(tmp_path, "masks", (0, 2), count=2)
    for i in range(2):
        picture(tmp_path / "masks" / f"{i}.png", np.repeat(np.repeat(np.array([[0, 1], [2, 3]], np.uint8), 12, 0), 16, 1))
    warned = set()
    targets = [ev.read_target(*pair, warned) for pair in ev.find_pairs(str(tmp_path), ("masks",))]
    assert targets[0].shape == (48, 64) and targets[0][::24, ::32].tolist() == [[0, 1], [2, 3]]
    assert capsys.readouterr().err.count("resized") == 1
