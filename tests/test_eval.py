"""eval.py: each command on made-up data whose answer is known, and what it says to wrong input."""
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import dune
import eval as ev
import teachers
from conftest import ROOT
from dune import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path):
    """The arguments that evaluate a small random DINOv2 at 64 px."""
    torch.manual_seed(0)
    torch.save(dune.ViT(64, 8, 64, 1, 1, 0, layer_scale=0.1).state_dict(), "vit.pth")
    return ["--teacher", "dinov2", "--weights", "dinov2=vit.pth", "--image-size", "64", "--device", "cpu"]


@pytest.fixture
def run(tmp_path):
    """A run folder as train.py leaves it, with tiny random teachers: (its arguments, the student)."""
    torch.manual_seed(0)
    vits = {"dinov2": dune.ViT(112, 14, 64, 1, 1, 4),
            "mast3r": dune.ViT(112, 16, 64, 1, 1, 0, class_token=False, layer_scale=None, position="rope")}
    weights = {}
    for name, vit in vits.items():
        weights[name] = str(tmp_path / f"{name}.pth")
        torch.save(teachers.published_layout(name, vit.state_dict()), weights[name])
    student = dune.DUNE(dune.ViT(112, 14, 64, 1, 1, 4), {"dinov2": (64, True), "mast3r": (64, False)})
    for norm in student.teacher_norms.values():
        norm.normalizers["patch"].mean.fill_(0.5)
    content = {"model": student.state_dict(), "args": {"projector": "tp", "norm": "dune"}, "weights": weights}
    torch.save(content, "checkpoint.pt")
    return ["--run", ".", "--device", "cpu"], student.eval()


def result(name, key="results"):
    with open(f"{name}.json") as file:
        return json.load(file)[key]


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- Folders of images

def test_knn_is_dinos_formula():
    torch.manual_seed(0)
    train, labels, test = torch.randn(50, 8), torch.randint(5, (50,)), torch.randn(7, 8)
    scores = ev.knn(train, labels, test, 5, k=4, temperature=0.07)
    for x, row in zip(test, scores):
        similarity = F.cosine_similarity(x[None], train)
        nearest = similarity.argsort(descending=True)[:4]
        for c in range(5):
            votes = sum(math.exp(similarity[i] / 0.07) for i in nearest if labels[i] == c)
            assert math.isclose(row[c].item(), votes, rel_tol=1e-3, abs_tol=1e-3)
    assert ev.topk_accuracy(torch.eye(6), torch.arange(6)) == {"top-1": 100.0, "top-5": 100.0}
    assert ev.topk_accuracy(torch.eye(6), torch.arange(6).roll(1))["top-1"] == 0


def test_knn_and_linear_tell_colors_apart(tmp_path, teacher, capsys):
    for split in ("train", "test"):
        for c, color in enumerate(([200, 30, 30], [30, 200, 30], [30, 30, 200])):
            for i in range(6):
                pixels = noise(i + 10 * (split == "test"), 40, 50) * 0.2 + np.array(color) * 0.8
                picture(tmp_path / split / f"class{c}" / f"{i}.png", pixels.astype(np.uint8))
    folders = ["--train", "train", "--test", "test", *teacher]
    for token in ("auto", "patch"):
        ev.main(["knn", *folders, "--token", token, "--k", "5"])
        used = "cls" if token == "auto" else token
        assert result("knn")["dinov2"] == {"top-1": 100.0, "top-5": 100.0, "token": used}
    ev.main(["linear", *folders, "--steps", "60", "--out", "deep/er.json"])
    assert result("deep/er")["dinov2"]["top-1"] == 100.0
    for name in ("train/class0/3.png", "test/class1/0.png"):  # are left out
        (tmp_path / name).write_bytes(b"")
    capsys.readouterr()
    ev.main(["knn", *folders, "--k", "5"])
    assert result("knn")["dinov2"]["top-1"] == 100.0
    assert "left out: 1 of 18 images cannot be read; the last: train/class0/3.png" in capsys.readouterr().err
    for path in tmp_path.glob("train/class*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="18 of 18 images cannot be read"):
        ev.main(["knn", *folders])


def test_no_thread_reads_on_after_an_error():
    """A process that ends while one does is aborted by torch."""
    threads = threading.active_count()
    batches = ev.read_ahead(time.sleep, [0.01] * 99, "x")
    next(batches)
    batches.close()
    assert threading.active_count() == threads


# ---- Dense

def test_class_iou_by_hand():
    truth, guess = torch.tensor([0, 0, 0, 0, 1, 1, 2, -1]), torch.tensor([0, 0, 1, 3, 1, 1, 0, 0])
    iou = ev.class_iou(ev.count_pairs(truth, guess, 4))
    assert torch.allclose(iou[:3], torch.tensor([2 / 5, 2 / 3, 0.0], dtype=torch.double))
    assert iou[3].isnan()  # it is not in the truth


def test_depth_errors_by_hand():
    truth = torch.tensor([[1.0, 2.0], [0.0, 2.5]])  # 0: unknown
    errors = ev.depth_errors(torch.tensor([[1.0, 3.0], [9.0, 2.6]]), truth)
    assert errors["RMSE"] == pytest.approx(math.sqrt((0 + 1 + 0.01) / 3), rel=1e-5)
    assert errors["AbsRel"] == pytest.approx((0 + 0.5 + 0.04) / 3, rel=1e-5)
    assert errors["delta1"] == pytest.approx(200 / 3)
    maps = torch.tensor([1.0, 3.0, 9.0, 2.5]).log().view(1, 1, 2, 2)
    assert ev.depth_loss(maps, truth[None]).item() == pytest.approx(math.log(1.5) / 3)


def halves(root, name, values, count=4, size=(48, 64), suffix="png"):
    """Images whose left part is red and right part blue, and a target that says which: values."""
    for i in range(count):
        edge = size[1] * (i + 2) // (count + 3)
        left = np.arange(size[1])[None, :, None] < edge
        colors = np.where(left, [180, 20, 20], [20, 20, 180]) * np.ones((*size, 1))
        picture(root / "images" / f"{i}.png", (noise(i, *size) * 0.2 + colors * 0.8).astype(np.uint8))
        target = np.where(left[..., 0], *values) * np.ones(size)
        if suffix == "npy":
            (root / name).mkdir(exist_ok=True)
            np.save(root / name / f"{i}.npy", target)
        else:
            picture(root / name / f"{i}.png", target.astype(np.uint16 if max(values) > 255 else np.uint8))


def test_seg_finds_the_halves(tmp_path, teacher):
    halves(tmp_path / "a", "masks", (0, 2))
    halves(tmp_path / "b" / "x", "annotations", (0, 2), count=6)
    for name in ("images", "annotations"):  # ADE20K's layout: images/validation beside annotations/validation
        (tmp_path / "b" / name).mkdir()
        (tmp_path / "b" / "x" / name).rename(tmp_path / "b" / name / "validation")
    (tmp_path / "b/images/validation/1.png").write_bytes(b"")  # is left out
    ev.main(["seg", "--train", "a", "--test", "b/images/validation", *teacher, "--steps", "300"])
    assert result("seg")["dinov2"]["mIoU"] > 85
    iou = result("seg", "class_iou")["dinov2"]
    assert len(iou) == 3 and iou[1] is None  # a class that is nowhere has no IoU
    assert Image.open("seg.png").width > 3 * 256


@pytest.mark.parametrize("suffix, values", (("png", (2000, 6000)), ("npy", (2.0, 6.0))))
def test_depth_finds_the_halves(tmp_path, teacher, suffix, values):
    for name in ("a", "b"):
        halves(tmp_path / name, "depth", values, suffix=suffix)
    ev.main(["depth", "--train", "a", "--test", "b", *teacher, "--steps", "300"])
    row = result("depth")["dinov2"]
    assert row["delta1"] > 80 and row["RMSE"] < 1.2 and Image.open("depth.png")


# ---- The study, losses, pictures of features

def test_study_tells_every_encoder_by_the_same_columns(run, monkeypatch, capsys):
    args, student = run
    for name, value in (("train", 60), ("test", 30), ("steps", 4)):
        monkeypatch.setitem(ev.STUDY, name, value)
    ev.main(["study", *args, "--seeds", "2"])
    rows, values = result("study"), result("study", "values")
    assert set(rows) == {"random encoder", "student", "dinov2", "mast3r", "through dinov2", "through mast3r"}
    columns = ["M params", "objects k-NN", "objects linear", "objects mIoU", "rooms depth RMSE",
               "rooms delta1", "rooms normals", "people mIoU"]
    assert all(list(row) == columns and all(map(math.isfinite, row.values())) for row in rows.values())
    assert rows["student"]["M params"] == sum(p.numel() for p in student.encoder.parameters()) / 1e6
    first, second = values["student"]["objects linear"]
    assert rows["student"]["objects linear"] == pytest.approx((first + second) / 2)
    assert result("study", "spread")["student"]["objects linear"] == pytest.approx(abs(first - second) / 2)
    assert Image.open("study.png").width > 11 * ev.CELL
    assert "own head" not in capsys.readouterr().out


def test_a_teachers_own_head_is_only_read(run, monkeypatch, capsys):
    """As trained with the teacher: on its features, and on the student's in its scale."""
    args, student = run
    for name, value in (("train", 10), ("test", 6), ("steps", 1)):
        monkeypatch.setitem(ev.STUDY, name, value)
    head = teachers.RoomsProbe(64, (8, 8))
    content = torch.load("mast3r.pth")
    torch.save({**content, "probe": head.state_dict()}, "mast3r.pth")
    ev.main(["study", *args, "--seeds", "1"])
    scenes = data.labelled_scenes("rooms", ev.TEST_SEED, 6, 112)
    images = data.normalize(scenes["image"])
    rows = result("study", "own_heads")
    with torch.no_grad():
        for row, features in (("teacher", teachers.load_teacher("mast3r", "mast3r.pth")(images, (8, 8))),
                              ("student", student.as_teacher(images, "mast3r"))):
            metrics = head.metrics(head(features), head.targets(scenes))
            assert rows[row] == pytest.approx({f"mast3r {name}": x for name, x in metrics.items()}, rel=0.05)
    assert "mast3r normals" in capsys.readouterr().out


def test_losses_are_by_the_running_statistics(run):
    args, student = run
    ev.main(["loss", *args])
    losses = result("loss")
    assert list(losses["dinov2"]) == ["cls_cos", "cls_smooth_l1", "patch_cos", "patch_smooth_l1", "loss"]
    groups = data.parse_data([], {name: teachers.TEACHERS[name] for name in losses})
    images = data.normalize(data.held_out_images(groups, 112, 32))
    with torch.no_grad():
        truth = teachers.load_teacher("mast3r", "mast3r.pth")(images, (8, 8))["patch"] - 0.5
        guess = student(images)["mast3r"]["patch"]
    cos = 1 - F.cosine_similarity(guess, truth, dim=-1).mean().item()
    smooth_l1 = F.smooth_l1_loss(guess, truth).item()
    assert losses["mast3r"]["loss"] == pytest.approx((cos + smooth_l1) / 2, abs=1e-4)
    ev.main(["loss", *args, "--image-size", "84,112"])
    rows = result("loss")
    assert rows["mast3r 112 px"] == losses["mast3r"] and len(rows) == 4
    with pytest.raises(UserError, match="write a multiple of the patch size 14"):
        ev.main(["loss", *args, "--image-size", "84,85"])
    with pytest.raises(UserError, match="loss needs a student .* that it learned from"):
        ev.main(["loss", *args, "--teacher", "dino", "--weights", "dino=dinov2.pth"])


def test_the_student_through_a_projector(run):
    args, student = run
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for name, expected in student(data.normalize(images)).items():
        features = ev.extract(ev.partial(ev.project, student, name), torch.device("cpu"), images, batch=1)
        assert torch.allclose(features["patch"], expected["patch"], atol=2e-2)
        assert (features["cls"] is None) == (expected["cls"] is None)


def test_pca_and_spectrum(tmp_path, run):
    args, _ = run
    picture(tmp_path / "photo.png", noise(0, 50, 90))
    for command in ("pca", "spectrum"):
        ev.main([command, *args, "--image", "photo.png"])
        with pytest.raises(UserError, match="one patch .*use a larger --image-size"):
            ev.main([command, *args, "--image", "photo.png", "--image-size", "14"])
    assert {"student", "dinov2", "through mast3r"} < set(result("spectrum"))
    assert Image.open("pca.png").width > 5 * 112 and Image.open("spectrum.png")
    colors, = data.pca_colors([{"patch": torch.ones(1, 1, 8)}], (1, 1))
    assert colors.eq(127).all()  # nothing differs: gray
    torch.manual_seed(0)
    x = torch.randn(400, 3) * torch.tensor([3.0, 1.0, 0.0]) @ torch.linalg.qr(torch.randn(3, 3))[0]
    share = ev.explained_variance(x[:, None])
    assert abs(share[0] - 0.9) < 0.03 and abs(share[1] - 1) < 1e-6


def test_alignment_is_the_correlation_of_loss_changes(tmp_path):
    with open("log.jsonl", "w") as file:
        for step, value in enumerate(np.random.default_rng(0).normal(size=12)):
            losses = {"a": {"loss": value}, "b": {"loss": 2 * value}, "c": {"loss": -value}}
            for line in ({"loss": 1, **losses}, {"held_out": {"a": 1}}):
                file.write(json.dumps({"step": step, **line}) + "\n")
    ev.main(["alignment", "--run", "."])
    matrix = [list(row.values()) for row in result("alignment").values()]
    assert np.allclose(matrix, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    steps, correlations = result("alignment", "curves")["a and c"]
    assert len(steps) == len(correlations) > 1 and np.allclose(correlations, -1)
    lines = [json.dumps({"step": step, "a": {"loss": 1}, "b": {"loss": 2}}) for step in range(9)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="needs losses that change"):
        ev.main(["alignment", "--run", "."])


# ---- Matches, two views

def test_match_finds_a_shift(tmp_path, teacher):
    wide = torch.from_numpy(noise(0, 64, 96)).permute(2, 0, 1)[None] / 255
    a, b = [F.unfold(wide[..., x:x + 64], 8, stride=8)[0].T for x in (0, 16)]
    index_a, index_b, similarity = ev.mutual_nearest(a - 0.5, b - 0.5)
    places = ev.patch_centers(torch.zeros(3, 64, 64), 8)
    exact = similarity > 0.999
    assert exact.sum() == 8 * 6  # all that both see
    moved = places[index_a[exact]] - places[index_b[exact]]
    assert moved.equal(torch.tensor([16.0, 0.0]).expand(48, 2))
    picture(tmp_path / "a.png", noise(0, 64, 96))
    ev.main(["match", "a.png", "a.png", *teacher])
    row = result("match")["dinov2"]
    assert row["matches"] == str(8 * 5) and row["mean cosine"] > 0.999 and Image.open("match.png").width > 960


def point_map(focal, height, width):
    """Points [height, width, 3] at random depths, as a camera of this focal length in pixels sees them."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rays = torch.stack([x + 0.5 - width / 2, y + 0.5 - height / 2, torch.full(x.shape, focal)], -1) / focal
    return rays * (1 + 4 * torch.rand(height, width, 1, generator=generator))


def test_focal_length_with_outliers():
    points = point_map(87.5, 40, 60).double()
    ones = torch.ones(40, 60).double()
    assert ev.estimate_focal(points, ones) == pytest.approx(87.5, rel=1e-6)
    points[:, ::4, :2] *= 1.5
    assert ev.estimate_focal(points, ones) == pytest.approx(87.5, rel=1e-3)
    with pytest.raises(UserError, match="no camera sees the points"):
        ev.estimate_focal(-points.abs(), ones)


class Known:
    """A two-view model that knows the points of a landscape and a portrait image."""
    patch_size = 14
    sin, cos = math.sin(math.radians(25)), math.cos(math.radians(25))
    rotation = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    translation = torch.tensor([0.8, -0.1, 0.3])

    def __call__(self, image1, image2):
        landscape, portrait = point_map(100, 84, 112), point_map(130, 112, 84)
        if image1.shape[-1] > image1.shape[-2]:
            maps = landscape, portrait @ self.rotation.T + self.translation
        else:
            maps = portrait, (landscape - self.translation) @ self.rotation
        views = []
        for points in maps:
            confidence = torch.full(points.shape[:2], 2.0)
            confidence[:9, :9] = 1e-7
            points[:9, :9] = 7
            views.append({"pts3d": points[None], "conf": confidence[None]})
        return views


def test_two_photographs_to_3d(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teachers, "load_two_view", lambda *_: Known())
    picture(tmp_path / "a.png", noise(0, 84, 112))
    picture(tmp_path / "b.png", noise(1, 112, 84))
    ev.main(["two-view", "a.png", "b.png", "--image-size", "112", "--device", "cpu", "--out", "out/room"])
    text = capsys.readouterr().out
    assert "a.png: focal length 100.0 px" in text and "b.png: focal length 130.0 px" in text
    assert "rotated by 25.00°, moved by 0.860 m" in text
    header, body = (tmp_path / "out" / "room.ply").read_bytes().split(b"end_header\n")
    count = 2 * (84 * 112 - 81)
    assert f"element vertex {count}".encode() in header and len(body) == 15 * count
    assert Image.open("out/room.png").width > 3 * 300
    a = point_map(50, 4, 5).flatten(0, 1)
    b = a @ Known.rotation.T + Known.translation
    b[0] = 100
    rotation, translation = ev.rigid_fit(a, b, (torch.arange(20) > 0).float())
    assert torch.allclose(rotation, Known.rotation, atol=1e-4)
    assert torch.allclose(translation, Known.translation, atol=1e-4)


# ---- Export

@pytest.mark.parametrize("to", ("hf", "timm", "dinov2"))
@pytest.mark.parametrize("registers", (4, 0))
def test_an_export_is_what_its_package_writes(to, registers, golden, capsys, close):
    """Names and shapes are those of files of that package. Read back as a teacher: the same features."""
    torch.manual_seed(0)
    encoder = dune.ViT(56, 14, 64, 2, 1, registers, layer_scale=None if registers else 0.1).eval()
    for x in encoder.parameters():
        nn.init.normal_(x, std=0.2)
    torch.save({"model": {f"encoder.{key}": x for key, x in encoder.state_dict().items()}}, "student.pt")
    ev.main(["export", "--checkpoint", "student.pt", "--to", to, "--out", "there"])
    assert ("At other sizes" in capsys.readouterr().out) == (to != "dinov2")
    path = "there/model.pth" if to == "dinov2" else "there/model.safetensors"
    ours = dune.load_checkpoint(path)
    if to == "dinov2":
        assert ours.keys() ^ golden("dinov2_reg")["checkpoint"].keys() <= {"register_tokens"}
    else:
        name = f"{to}_dinov2_reg" if registers else f"{to}_dinov2"
        theirs = dune.load_checkpoint(f"{ROOT}/tests/golden/hub/{name}.safetensors")
        assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    images = torch.randn(2, 3, 56, 84)
    features = teachers.load_teacher("dinov2", path)(images)
    for token_type, x in encoder(images).items():
        close(features[token_type], x)
    if to == "hf":
        with open("there/config.json") as file:
            config = json.load(file)
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 56}
        assert config == {**config, **sizes, "patch_size": 14, "num_register_tokens": registers}
        assert config["model_type"] == "dinov2" + "_with_registers" * bool(registers)


# ---- Wrong input

def test_wrong_input_is_one_line(tmp_path, teacher):
    for name, values in (("ok", (0, 2)), ("one_less", (0, 2)), ("other_shape", (0, 2)), ("beyond", (0, 9)),
                         ("colors", (0, 1)), ("text", (0, 1)), ("ignored", (255, 255)), ("part", (0, 1))):
        halves(tmp_path / name, "masks", values, count=2)
    halves(tmp_path / "zeros", "depth", (0, 0), count=1)
    (tmp_path / "one_less/masks/1.png").unlink()
    picture(tmp_path / "other_shape/masks/0.png", np.zeros((48, 48), np.uint8))
    picture(tmp_path / "colors/masks/0.png", noise(0, 48, 64))
    (tmp_path / "text/masks/0.png").write_text("no picture")
    (tmp_path / "part/masks/0.png").unlink()
    np.save(tmp_path / "part/masks/0.npy", np.full((48, 64), 0.5))
    for name in ("classes/a/1.png", "classes/b/1.png", "single/a/1.png"):
        picture(tmp_path / name, noise(0, 32, 32))
    for name in ("empty_class/a", "empty_class/b", "other_class/z", "nothing"):
        (tmp_path / name).mkdir(parents=True)
    for command, message in (
        ("seg --train one_less --test ok", "images/1.png has no target in .*one_less/masks"),
        ("seg --train other_shape --test ok", "48x48, its image 64x48: aspect ratios differ"),
        ("seg --train ok --test beyond", "label 9, but there are 3 classes: use --classes 10"),
        ("seg --train ok --test ok --classes 2", "label 2, but there are 2 classes"),
        ("seg --train colors --test ok", "one number for each pixel"),
        ("seg --train ignored --test ok", "ignored: all pixels have the label"),
        ("seg --train text --test ok", "cannot read .*text/masks/0.png"),
        ("seg --train part --test ok", "values that are not labels"),
        ("seg --train ok", "give --train FOLDER and --test FOLDER"),
        ("depth --train zeros --test zeros", "no depth between 0 and 10 m"),
        ("depth --train ok --test ok", "expected folders images/ and depth/"),
        ("knn --train nowhere --test nowhere", "nowhere is not a folder"),
        ("knn --train empty_class --test classes", "empty_class/a is empty"),
        ("knn --train classes --test other_class", "class z is not among"),
        ("knn --train classes --test nothing", "must hold a folder of images for each"),
        ("linear --train single --test single", "at least two classes"),
        ("linear --train nowhere --test nowhere --out vit.pth/x", "vit.pth"),  # before the work
        ("match vit.pth vit.pth", "vit.pth"),
        ("match nowhere.png nowhere.png --image-size 60", "60 is not divisible by the patch size 8"),
        ("pca --weights x", "write TEACHER=FILE"),
        ("two-view vit.pth vit.pth", "vit.pth"),
    ):
        words = command.split()
        options = ["--device", "cpu"] if words[0] == "two-view" else [*teacher]
        with pytest.raises(UserError, match=message) as error:
            ev.main([words[0], *options, *words[1:]])
        assert "\n" not in str(error.value)
    for words in (["study"], ["knn", "--train", "classes", "--test", "classes", "--through", "dinov2"],
                  ["export"]):
        with pytest.raises(UserError, match="specify a model: --run"):
            ev.main(words)
    with pytest.raises(UserError, match="at least 5 lines of 2 teachers"):
        ev.main(["alignment", "--run", "."])


def test_help_of_every_command(capsys):
    for command in ev.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            ev.main([command, "--help"])
        assert stop.value.code == 0 and "--out" in capsys.readouterr().out
