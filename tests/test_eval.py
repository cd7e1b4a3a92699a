"""eval.py: each command on made-up data whose answer is known, and what it says to wrong input."""
import argparse
import json
import math
import os
import subprocess
import sys

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

# ---- Classification --------------------------------------------------------------------------------------------------

def test_knn_is_dinos_formula():
    torch.manual_seed(0)
    train, labels, test = torch.randn(50, 8), torch.randint(5, (50,)), torch.randn(7, 8)
    scores = ev.knn(train, labels, test, 5, k=4, temperature=0.07)
    for x, row in zip(test, scores):
        similarity = [(F.cosine_similarity(x, t, dim=0).item(), int(c)) for t, c in zip(train, labels)]
        nearest = sorted(similarity, reverse=True)[:4]
        for c in range(5):
            votes = sum(math.exp(s / 0.07) for s, k in nearest if k == c)
            assert math.isclose(row[c].item(), votes, rel_tol=1e-3, abs_tol=1e-3)
    assert ev.top(torch.eye(6)[:, [5, 0, 1, 2, 3, 4]], torch.arange(6))["top-1"] == 0
    assert ev.top(torch.eye(6), torch.arange(6)) == {"top-1": 100.0, "top-5": 100.0}

def test_knn_and_linear_tell_colours_apart_and_features_are_kept(tmp_path, teacher, capsys, monkeypatch):
    for split in ("train", "test"):
        for c, colour in enumerate(([200, 30, 30], [30, 200, 30], [30, 30, 200])):
            for i in range(6):
                pixels = noise(i + 10 * (split == "test"), 40, 50) * 0.2 + np.array(colour) * 0.8
                picture(tmp_path / split / f"class{c}" / f"{i}.png", pixels.astype(np.uint8))
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

# ---- Dense -----------------------------------------------------------------------------------------------------------

def test_class_iou_by_hand():
    truth, guess = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 3, 1, 1, 0])
    iou = ev.class_iou(torch.bincount(truth * 4 + guess, minlength=16).view(4, 4))
    assert torch.allclose(iou[:3], torch.tensor([2 / 5, 2 / 3, 0.0], dtype=torch.double))
    assert iou[3].isnan()  # it is only ever guessed

def test_depth_errors_by_hand_leave_out_what_was_not_measured():
    errors = ev.depth_errors(torch.tensor([[1.0, 3.0], [9.0, 2.6]]), torch.tensor([[1.0, 2.0], [0.0, 2.5]]))
    assert errors["RMSE"] == pytest.approx(math.sqrt((0 + 1 + 0.01) / 3), rel=1e-5)
    assert errors["AbsRel"] == pytest.approx((0 + 0.5 + 0.04) / 3, rel=1e-5)
    assert errors["delta1"] == pytest.approx(200 / 3)

def test_depth_bins_give_their_weighted_mean():
    maps = torch.tensor([-5.0, 0.9, 0.4]).view(1, 3, 1, 1).expand(-1, -1, 4, 4)  # relu + 0.1: 0.1, 1.0, 0.5
    depth = ev.binned(maps, torch.tensor([1.0, 2.0, 6.0]))
    assert torch.allclose(depth, torch.full((1, 1, 4, 4), (0.1 + 2 + 3) / 1.6))

def test_windows_cover_the_image_and_are_the_whole_of_a_square_one():
    assert ev.windows(64, 64) == [(0, 0, 64, 64)]
    for width, height in ((100, 41), (30, 95), (64, 65)):
        boxes, seen = ev.windows(width, height), np.zeros((height, width))
        for x0, y0, x1, y1 in boxes:
            assert x1 - x0 == y1 - y0 == min(width, height) and x1 <= width and y1 <= height
            seen[y0:y1, x0:x1] += 1
        starts = sorted(max(b[:2]) for b in boxes)
        assert seen.all() and max(np.diff(starts)) <= min(width, height) * 2 / 3 + 1

def halves(root, names, values, count=4, size=(48, 64), suffix="png"):
    """Images whose left part is red and right part blue, at other places, and a target that says which: values."""
    for i in range(count):
        edge = size[1] * (i + 2) // (count + 3)
        left = np.arange(size[1])[None, :, None] < edge
        colours = np.where(left, [180, 20, 20], [20, 20, 180]) * np.ones((*size, 1))
        picture(root / "images" / f"{i}.png", (noise(i, *size) * 0.2 + colours * 0.8).astype(np.uint8))
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

# ---- Matching --------------------------------------------------------------------------------------------------------

def shifted(by):
    """Two pictures 64 px wide of which the second shows what is 16 px further right, and a flow map that says `by`."""
    wide = noise(0, 64, 96)
    images = [torch.from_numpy(wide[:, x:x + 64].copy()).permute(2, 0, 1) for x in (0, 16)]
    return images, 64 * zoo.centres(64, 64).view(64, 64, 2) - torch.tensor([by, 0])

def test_match_finds_a_shift_and_the_flow_map_judges_it():
    images, flow = shifted(by=16)
    found = ev.match(pixels(8), images, flow, (64, 64))
    there = found.a[:, 0] > 0.25
    assert there.sum() == found.findable == 48
    assert found.error[~there].isnan().all()  # what left the image does not count
    assert (found.error[there] < 1e-6).all() and (found.similarity[there] > 0.999).all()
    assert ev.correct([found]) == {"matches": str(len(found.a)), "1 %": 100, "3 %": 100, "5 %": 100, "found": 100}
    assert len(ev.match(pixels(8), images, flow, (64, 64), upsample=2).a) > 0

def test_wrong_and_unknown_matches_are_told_apart():
    images, flow = shifted(by=16 - 2)  # 2 of 64 pixels off: 3.1 %
    wrong = ev.correct([ev.match(pixels(8), images, flow, (64, 64))])
    assert wrong["3 %"] == 0 and wrong["5 %"] == 100
    flow[:, :32] = math.nan
    half = ev.match(pixels(8), images, flow, (64, 64))
    assert half.findable == 32 and (half.error.isnan() == (half.a[:, 0] < 0.5)).all()
    unknown = ev.match(pixels(8), images, torch.full_like(flow, math.nan), (64, 64))
    assert unknown.error.isnan().all() and ev.correct([unknown]) == {"matches": str(len(unknown.a))}

def test_a_flow_map_speaks_of_pixels_of_images_of_any_size():
    """B is twice as large as A: the place of each pixel of A is the middle of four of B's."""
    flow = zoo.centres(30, 50).view(30, 50, 2).double() * torch.tensor([100, 60])
    places = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ev.follow(flow, places, torch.tensor([100, 60])), places, atol=0.5 / 30)
    outside = ev.follow(flow + 1e300, places, torch.tensor([100, 60]))
    assert outside.isnan().all() and outside.shape == places.shape

def test_match_command_on_one_pair_and_on_a_list(tmp_path, teacher):
    picture(tmp_path / "a.png", noise(0, 64, 64))
    np.save("flow.npy", 64 * zoo.centres(64, 64).view(64, 64, 2))
    with open("list.txt", "w") as file:
        file.write("# a comment\na.png a.png flow.npy\na.png a.png\n")
    ev.main(["match", "--pair", "a.png", "a.png", "flow.npy", *teacher])
    assert result("match")["dinov2"] == {"matches": "64", "1 %": 100.0, "3 %": 100.0, "5 %": 100.0, "found": 100.0}
    ev.main(["match", "--pairs", "list.txt", *teacher])
    assert result("match")["dinov2"]["matches"] == "128" and Image.open("match.png")

def test_match_without_a_pair_takes_rooms(tmp_path, teacher, monkeypatch, capsys):
    pairs = zoo.room_pairs
    same = lambda *where: {label: x[:, :1].expand(-1, 2, *x.shape[2:]) for label, x in pairs(*where).items()}
    monkeypatch.setattr(zoo, "room_pairs", same)  # the second camera stands where the first does
    monkeypatch.setattr(ev, "STUDY", dict(pairs=2))
    ev.main(["match", *teacher])
    assert result("match")["dinov2"]["1 %"] == 100 and result("match")["dinov2"]["found"] > 80
    assert "rooms" in capsys.readouterr().out

# ---- Analyses, the study ---------------------------------------------------------------------------------------------

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
    for t, recipe in zoo.SPECIALISTS.items():
        vit = dune.ViT(**{**recipe["shape"], **zoo.TEACHERS[t].vit, "depth": 1, "embed_dim": 64, "num_heads": 1})
        weights[t] = str(path / f"{t}.pth")
        torch.save(zoo.published_layout(t, vit.state_dict()), weights[t])
        sizes[t] = 64, zoo.load_teacher(t, weights[t]).has_cls
    model = dune.DUNE(dune.ViT(112, 14, 64, 1, 1, 4), sizes)
    file = {"model": model.state_dict(), "step": 1, "args": {"image_size": 112}, "weights": weights}
    torch.save(file, path / "checkpoint.pt")
    return model.eval()

def test_study_tells_every_encoder_apart_by_the_same_columns(tmp_path, monkeypatch, capsys):
    model = make_run(tmp_path)
    monkeypatch.setattr(ev, "STUDY", dict(train=60, test=30, pairs=2))
    monkeypatch.setattr(ev, "CHUNK", 30)
    monkeypatch.setattr(ev, "PROBE_STEPS", 4)
    ev.main(["study", "--run", str(tmp_path), "--seeds", "2"])
    with open("study.json") as file:
        study = json.load(file)
    mean = study["mean"]
    assert list(mean) == ["random encoder", *model.projectors, "encoder", *(f"through {t}" for t in model.projectors)]
    assert all(list(row) == list(ev.COLUMNS) and all(map(math.isfinite, row.values())) for row in mean.values())
    own, student = mean["mast3r"]["depth RMSE"], mean["encoder"]["depth RMSE"]
    ratios = study["ratios"]
    assert math.isclose(ratios["encoder"]["depth RMSE"], own / student)  # less is better: it is turned
    best = max(mean[t]["k-NN"] for t in ("mast3r", "multihmr")) / max(mean["dinov2"]["k-NN"], 1e-9)
    assert math.isclose(ratios["best other teacher"]["k-NN"], best)
    assert study["parameters"]["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert mean["encoder"]["k-NN"] == pytest.approx(sum(row["k-NN"] for row in study["values"]["encoder"]) / 2)

def test_readers_speak_as_the_student_does(tmp_path):
    model = make_run(tmp_path)
    x = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    names = [*model.projectors, "mast3r_vitlarge_16"]  # also by the published name
    readers = [ev.student_reader(model, name) for name in names]
    assert [reader.name.split()[-1] for reader in readers] == [*model.projectors, "mast3r"]
    for reader in readers:
        want = model(data.normalise(x))[reader.name.split()[-1]]
        assert torch.allclose(reader(x)["patch"], want["patch"], atol=2e-2)
        assert (reader(x)["cls"] is None) == (want["cls"] is None)
    with pytest.raises(Oops, match="no projector for dino: it has dinov2"):
        ev.student_reader(model, "dino")

def test_ablation_is_one_table_of_runs(tmp_path, monkeypatch, capsys):
    """Twice the seeds of the paper's choice and of each single change; what is measured is told as mean and spread."""
    commands, looked = [], []

    def train(folder, config, seed, steps, device):
        commands.append((config, steps))
        return 100.0 + seed

    def look(args):
        looked.append(args.run)
        readers = [ev.Reader(name, None, 14, []) for name in ("encoder", *zoo.SPECIALISTS)]
        return argparse.Namespace(model=None, teachers={t: None for t in zoo.SPECIALISTS}, readers=readers, grid=(8, 8))

    def probes(reader, *rest):  # the student's are 0.9 as good as each teacher's, also where less is better
        return {c: 9.0 if (reader.name == "encoder") == more else 10.0 for c, (_, more) in ev.COLUMNS.items()}, {}
    monkeypatch.setattr(ev, "train_tiny", train)
    monkeypatch.setattr(ev, "subject", look)
    monkeypatch.setattr(ev, "some_images", lambda *args: {"image": None})
    monkeypatch.setattr(ev, "study_scenes", lambda *args, **sizes: None)
    monkeypatch.setattr(ev, "study_row", probes)
    losses = dict(zip(zoo.SPECIALISTS, ({"loss": 0.5}, {"loss": 0.45}, {"loss": 0.55})))
    monkeypatch.setattr(ev, "held_out_losses", lambda *args: losses)
    ev.main(["ablate", "--quick", "--steps", "9", "--out", "a/b"])
    assert len(commands) == len(set(looked)) == 2 * (1 + 2 + 2 + 1) and {steps for _, steps in commands} == {4}
    assert all(sum(config[f] != ev.PAPERS[f] for f in config) <= 1 for config, _ in commands)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tp all 0.5"))
    assert row.split()[3:] == ["0.500", "0.100", "0.900", "100.5", "±0.5"]
    with open("a/b.json") as file:
        runs = json.load(file)["runs"]
    assert len(runs) == 12 and runs[0]["losses"]["mast3r"] == 0.45 and runs[0]["probes"]["k-NN"] == 9

# ---- Losses, logs, pictures ------------------------------------------------------------------------------------------

def test_losses_are_those_of_features_standardised_by_these_images(tmp_path):
    model = make_run(tmp_path)
    teachers = {t: zoo.load_teacher(t, str(tmp_path / f"{t}.pth")) for t in model.projectors}
    images = torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8)
    found = ev.held_out_losses(model.train(), teachers, images, (8, 8), chunk=2)
    assert model.training and list(found["dinov2"]) == ["cls_cos", "cls_sl1", "patch_cos", "patch_sl1", "loss"]
    x = data.normalise(images)
    with torch.no_grad():
        teacher, student = teachers["mast3r"](x, (8, 8))["patch"], model(x)["mast3r"]["patch"]
    flat = teacher.flatten(0, 1)
    standard = (teacher - flat.mean(0)) / flat.std(0).clamp(min=1e-3)
    cos = 1 - F.cosine_similarity(student, standard, dim=-1).mean().item()
    sl1 = F.smooth_l1_loss(student, standard).item()
    assert found["mast3r"]["patch_cos"] == pytest.approx(cos, abs=1e-5)
    assert found["mast3r"]["loss"] == pytest.approx((cos + sl1) / 2, abs=1e-5)
    running = ev.held_out_losses(model, teachers, images, (8, 8), running=True)
    assert abs(running["mast3r"]["loss"] - found["mast3r"]["loss"]) > 1e-5

def test_loss_pca_and_spectrum_of_a_run(tmp_path, capsys):
    make_run(tmp_path)
    for command in ("loss", "pca", "spectrum"):
        ev.main([command, "--run", str(tmp_path), *([] if command == "loss" else ["--image", photo(tmp_path)])])
    assert list(result("loss")) == list(zoo.SPECIALISTS)
    assert set(result("spectrum")) == {*zoo.SPECIALISTS, *(f"through {t}" for t in zoo.SPECIALISTS), "encoder"}
    assert Image.open("pca.png").width > 8 * 112 and Image.open("spectrum.png").width == 4 * 380
    with pytest.raises(Oops, match="needs a student .* that it learned from"):
        ev.main(["loss", "--run", str(tmp_path), "--teacher", "dino", "--weights", f"dino={tmp_path}/dinov2.pth"])

def test_a_teacher_without_a_file_is_the_published_one(tmp_path, monkeypatch):
    make_run(tmp_path)
    file, load, asked = dune.read_checkpoint(tmp_path / "checkpoint.pt"), zoo.load_teacher, []
    stored = file.pop("weights")
    torch.save(file, tmp_path / "checkpoint.pt")  # as of a run that downloaded its teachers
    monkeypatch.setattr(zoo, "load_teacher", lambda t, path, device: asked.append(path) or load(t, stored[t], device))
    ev.main(["loss", "--run", str(tmp_path)])
    ev.main(["pca", "--teacher", "mast3r", "--image-size", "112"])
    assert asked == [None] * 4

def photo(folder):
    picture(folder / "photo.png", noise(0, 50, 90))
    return str(folder / "photo.png")

@pytest.mark.parametrize("line", ["5", "{}", "[]", "null", "{", '{"step": "x"}', '{"step": NaN}', "[" * 10**5])
def test_a_log_of_another_shape_is_told(tmp_path, line):
    with open("log.jsonl", "w") as file:
        file.write('{"step": 1, "a": {"loss": 1.0}}\n' + line + "\n")
    for command in (lambda: ev.main(["alignment", "--run", str(tmp_path)]), lambda: ev.plot_logs([str(tmp_path)])):
        with pytest.raises(Oops, match="log.jsonl, line 2: this is no line of a run's log"):
            command()

def test_curves_of_a_log_with_holes_are_drawn(tmp_path):
    with open("log.jsonl", "w") as file:
        for step, loss in enumerate((1.0, None, "x", 1e400, 0.5)):
            file.write(json.dumps({"step": step, "a": {"loss": loss}, "lr": step}) + "\n")
        file.write('{"step": 9, "a"')  # cut short by a crash
    assert len(ev.read_log(str(tmp_path))) == 5
    assert Image.open(ev.plot_logs([str(tmp_path)])).size == (3 * 560, 300)
    assert ev.read_log(str(tmp_path / "nowhere")) == []

# ---- Wrong input -----------------------------------------------------------------------------------------------------

def test_wrong_input_is_told_in_one_line(tmp_path, teacher):
    for name, kind, values in (("ok", "masks", (0, 2)), ("one_less", "masks", (0, 2)), ("other_shape", "masks", (0, 2)),
                               ("beyond", "masks", (0, 9)), ("colours", "masks", (0, 1)), ("text", "masks", (0, 1)),
                               ("ignored", "masks", (255, 255)), ("zeros", "depth", (0, 0)),
                               ("broken", "masks", (0, 1)),
                               ("long", "masks", (0, 1)), ("fifo", "masks", (0, 1))):
        halves(tmp_path / name, kind, values, count=2)
    for name, value in (("nan", np.nan), ("huge", 2**62), ("part", 0.5), ("infinite", np.inf), ("empty", None)):
        array = np.zeros((0, 5)) if value is None else np.full((48, 64), value)
        for kind in ("masks", "depth"):
            halves(tmp_path / name, kind, (0, 1), count=1)
            (tmp_path / name / kind / "0.png").unlink()
            np.save(tmp_path / name / kind / "0.npy", array)
    (tmp_path / "one_less" / "masks" / "1.png").unlink()
    picture(tmp_path / "other_shape" / "masks" / "0.png", np.zeros((48, 48), np.uint8))
    picture(tmp_path / "colours" / "masks" / "0.png", noise(0, 48, 64))
    (tmp_path / "text" / "masks" / "0.png").write_text("no picture")
    (tmp_path / "broken" / "images" / "0.png").write_text("no picture")
    (tmp_path / "fifo" / "masks" / "0.png").unlink()
    os.mkfifo(tmp_path / "fifo" / "masks" / "0.png")
    picture(tmp_path / "long" / "images" / "0.png", noise(0, 1, 20000))
    picture(tmp_path / "long" / "masks" / "0.png", np.zeros((1, 20000), np.uint8))
    for name in ("classes/a/1.png", "classes/b/1.png", "single/a/1.png", "a.png"):
        picture(tmp_path / name, noise(0, 32, 32))
    for name in ("empty_class/a", "empty_class/b", "other_class/z", "nothing", "taken.json"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "short.txt").write_text("a.png\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    np.save("flow.npy", np.zeros((31, 32, 2)))
    np.save("flat.npy", np.zeros((32, 32)))
    pair = ["match", "--pair", "a.png", "a.png"]
    for command, words in (
        (["seg", "--train", "one_less", "--test", "ok"], "2 images.*1 targets.*'1' has no partner"),
        (["seg", "--train", "other_shape", "--test", "ok"], "of another shape"),
        (["seg", "--train", "ok", "--test", "beyond"], "label 9.*3 classes"),
        (["seg", "--train", "ok", "--test", "ok", "--classes", "2"], "label 2.*--classes 3"),
        (["seg", "--train", "colours", "--test", "ok"], "one number for each pixel"),
        (["seg", "--train", "ignored", "--test", "ok"], "every pixel is ignored"),
        (["seg", "--train", "text", "--test", "ok"], "cannot read .*not an image"),
        (["seg", "--train", "broken", "--test", "ok"], "images/0.png"),
        (["seg", "--train", "fifo", "--test", "ok"], "masks/0.png is no regular file"),
        (["seg", "--train", "ok"], "nothing is not a folder"),
        (["seg", "--train", "ok", "--test", "long", "--sliding"], "20000x1: too long for --sliding"),
        *((["seg", "--train", "ok", "--test", name], "no labels") for name in ("nan", "huge", "part", "infinite")),
        (["seg", "--train", "ok", "--test", "empty"], r"\[0, 5\] values"),
        *((["depth", "--train", name, "--test", name], "no depth between") for name in ("zeros", "nan", "infinite")),
        (["depth", "--train", "huge", "--test", "huge"], "no depth between"),
        (["depth", "--train", "ok", "--test", "ok"], "images/ and depth/"),
        (["depth", "--train", "ok", "--test", "ok", "--max-depth", "nan"], "--max-depth: nan is not between"),
        (["knn", "--train", "empty_class", "--test", "classes"], "empty_class/a is empty"),
        (["knn", "--train", "classes", "--test", "other_class"], "class z is not among"),
        (["knn", "--train", "classes", "--test", "nothing"], "must hold a folder for each"),
        (["knn", "--train", "classes", "--test", "classes", "--k", "0"], "--k: 0 is not between"),
        (["linear", "--train", "single", "--test", "single"], "at least two classes"),
        (["linear", "--train", "nowhere", "--test", "nowhere", "--out", "a.png/x"], "cannot write a.png/"),  # first
        (["linear", "--train", "nowhere", "--test", "nowhere", "--out", "taken"], "taken.json: there is a folder"),
        (["match", "--pair", "a.png"], "needs two images.*this has 1"),
        ([*pair, "x.npy"], "no such file: x.npy"),
        ([*pair, "a.png"], r"a.png is \[32, 32, 3\], expected \[32, 32, 2\]"),
        ([*pair, "flow.npy"], r"flow.npy is \[31, 32, 2\], expected \[32, 32, 2\]"),
        ([*pair, "flat.npy"], "expected a place"),
        (["match", "--pairs", "short.txt"], "needs two images"),
        (["match", "--pairs", "empty.txt"], "empty.txt holds no pairs"),
        (["match", "--pairs", "binary.txt"], "a pair needs two images"),
        ([*pair, "--pairs", "short.txt"], "this has 1"),
        (["knn", "--train", "classes", "--test", "classes", "--through", "dinov2"], "say what to look at"),
        (["alignment"], "at least two teachers"),
    ):
        common = [] if "--through" in command or command == ["alignment"] else teacher
        with pytest.raises(Oops, match="(?s)" + words) as told:
            ev.main([*command, *common])
        assert "\n" not in str(told.value)
    with pytest.raises(Oops, match="no multiple of the patch size 8: take 64"):
        ev.main([*pair, *teacher[:-1], "60"])

def test_a_cache_that_cannot_be_written_is_told_before_the_work(tmp_path, teacher, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Oops, match="cannot write .*file/cache/features/.write: "):
        ev.main(["knn", "--train", "nowhere", "--test", "nowhere", *teacher])

def test_a_strip_is_matched_and_drawn(tmp_path, teacher):
    picture(tmp_path / "strip.png", noise(0, 1, 20000))
    ev.main(["match", "--pair", "strip.png", "strip.png", *teacher])
    assert result("match")["dinov2"]["matches"] == "8" and Image.open("match.png").width == 2 * 480 + 8

def test_a_mask_of_another_size_is_resized_with_one_warning(tmp_path, capsys):
    halves(tmp_path, "masks", (0, 2), count=2)
    for i in range(2):
        quarters = np.array([[0, 1], [2, 3]], np.uint8).repeat(12, 0).repeat(16, 1)
        picture(tmp_path / "masks" / f"{i}.png", quarters)
    args = argparse.Namespace(train=str(tmp_path), test=str(tmp_path), sliding=False)
    for part in ev.labelled_images(args, ("masks",), lambda target, path: target):
        assert all(target[::24, ::32].tolist() == [[0, 1], [2, 3]] for _, target, _ in part)
        assert all(target.shape == (48, 64) and boxes == [(0, 0, 64, 48)] for _, target, boxes in part)
    assert capsys.readouterr().err.count("resized") == 1

def test_every_command_has_help_also_without_docstrings(capsys):
    for command in ev.COMMANDS:
        with pytest.raises(SystemExit) as left:
            ev.main([command, "--help"])
        assert left.value.code == 0 and "--out" in capsys.readouterr().out
    run = subprocess.run([sys.executable, "-OO", ev.__file__, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and all(command in run.stdout for command in ev.COMMANDS)
