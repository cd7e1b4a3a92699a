"""The method agrees with the published code (golden/), and with itself where there is nothing published."""

import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import dune
import train


def small_student(projector="tp", norm="dune", drop_path=0.0):
    torch.manual_seed(0)
    encoder = dune.ViT(56, 14, 64, 3, 1, registers=2, layer_scale=None, drop_path=drop_path)
    widths = {"hidden": 32, "last_hidden": 48} if projector == "lp" else {}
    return dune.DUNE(encoder, {"dinov2": (96, True), "mast3r": (80, False)}, projector, norm, **widths)


# ---- Published checkpoints

def test_published_dune_checkpoint(golden, close, tmp_path):
    file = golden("dune_encoder")
    file["checkpoint"]["model"].update(golden("dune_projectors"))
    torch.save(file["checkpoint"], tmp_path / "dune.pth")
    model = dune.load(tmp_path / "dune.pth")
    assert list(model.projectors) == ["dinov2", "mast3r"] and not model.training
    for case in file["cases"]:
        for norm, name in ((True, "norm"), (False, "raw")):
            out = model.encoder(case["image"], norm=norm)
            close(out["cls"], case[f"{name}_cls"])
            close(out["patch"], case[f"{name}_patch"])
        out = model(case["image"])
        for teacher, expected in case["projected"].items():
            close(out[dune.TEACHER_ALIASES[teacher]]["patch"], expected[:, 1:])
    assert out["mast3r"]["cls"] is None
    encoder = dune.load(tmp_path / "dune.pth", encoder_only=True)
    close(encoder(case["image"])["patch"], case["norm_patch"])


def test_published_unic_checkpoint(golden, close, tmp_path):
    file = golden("unic_student")["student"]
    checkpoint = file["checkpoint"]
    checkpoint["model"].update(golden("unic_ladder"))
    torch.save(checkpoint, tmp_path / "unic.pth")
    model = dune.load(tmp_path / "unic.pth")
    outputs = model(file["image"])
    for teacher, expected in file["outputs"].items():
        for token_type in expected:
            close(outputs[dune.TEACHER_ALIASES[teacher]][token_type], expected[token_type])
    stats = checkpoint["teacher_ft_stats"]["dino_vitbase_16"]["cls"]
    raw = torch.randn(2, 72)
    standardized = model.teacher_norms["dino"]({"cls": raw, "patch": None})
    close(standardized["cls"], (raw - stats["mean"]) / (stats["std"] + 1e-6))


# ---- Standardization

def standardize(norm, features, momentum):
    statistics = dune.update_norms({"t": norm}, {"t": features}, momentum)["t"]
    return {key: (features[key] - mean) / std for key, (mean, std) in statistics.items()}


def test_teacher_norm_follows_the_published_steps(golden, close):
    file = golden("teacher_norm")
    norm = dune.TeacherNorm(96, True)
    for step in file["train_steps"]:
        out = standardize(norm, step, step["momentum"])
        close(out["cls"], step["out_cls"])
        close(out["patch"], step["out_patch"])
        for name, expected in step["state"].items():
            close(norm.state_dict()[name], expected)
    step = file["eval_step"]
    close(norm(step)["cls"], step["out_cls"])
    close(norm(step)["patch"], step["out_patch"])

    norm = dune.TeacherNorm(72, False, "unic")
    for step in golden("unic_student")["standardise"]:
        close(standardize(norm, {"patch": step["feature"]}, step["momentum"])["patch"], step["out"])
        close(norm.normalizers["patch"].std, step["std"].flatten())


def test_a_batch_without_finite_statistics_leaves_the_running_averages_alone():
    norm = dune.TeacherNorm(8, False)
    for features in (torch.full((2, 3, 8), torch.nan), torch.empty(0, 3, 8)):
        dune.update_norms({"t": norm}, {"t": {"patch": features}}, 0.5)
    assert [x.unique().tolist() for x in norm.state_dict().values()] == [[0], [1]]


def test_statistics_of_several_processes_are_those_of_the_whole_batch(monkeypatch):
    """Processes with unequal shares, one with nothing. Each sends 2 D + 1 numbers per token type."""
    torch.manual_seed(0)
    cls, patch, other = 3 * torch.randn(8, 5) + 7, torch.randn(8, 6, 5), torch.randn(8, 6, 4)
    messages = []

    def update(begin, end):
        norms = {"a": dune.TeacherNorm(5, True), "b": dune.TeacherNorm(4, False)}
        features = {"a": {"cls": cls[begin:end], "patch": patch[begin:end]}, "b": {"patch": other[begin:end]}}
        statistics = dune.update_norms(norms, features, 0.3)
        return statistics, [norm.state_dict() for norm in norms.values()]

    def all_gather(gathered, message):
        assert message.numel() == 3 + 2 * (5 + 5 + 4)
        messages.append(message)
        gathered[:len(messages)] = torch.cat(messages)

    expected = update(0, 8)
    monkeypatch.setattr(dune.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dune.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dune.dist, "all_gather_into_tensor", all_gather)
    for begin, end in ((0, 3), (3, 3), (3, 4), (4, 8)):
        found = update(begin, end)
    torch.testing.assert_close(found, expected)  # the last one has heard of all four


# ---- Loss, sharing, dropping, schedules

@pytest.mark.parametrize("sharing", ["none", "own_data", "own+generic_data"])
def test_loss_and_gradient(sharing, golden, close):
    file = golden("loss")
    expected = file["results"][sharing]
    own = torch.eye(3).bool()[[0, 1, 2, 0, 1, 2]]  # whose data each of the six images is
    masks = {"none": own | True, "own_data": own, "own+generic_data": own | own[:, :1]}
    losses = []
    for name, student in file["student"].items():
        statistics = {}
        for token_type, x in student.items():
            x.requires_grad_()
            statistics[token_type] = torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])
        loss, terms = dune.image_losses(student, file["target"][name], statistics)
        losses.append(loss)
        for term, value in terms.items():
            published = term.replace("smooth_l1", "sl1")
            close(value.mean(), torch.tensor(expected["metrics"][f"loss/dist_{published}_{name}"]))
    losses = torch.stack(losses, 1)
    coefficients = dune.teacher_coefficients(losses, masks[sharing], 0.0, torch.rand(6, 3))
    loss_sum, count = dune.weighted_sum(losses, coefficients)
    close(loss_sum / count, expected["loss"])
    (loss_sum / count).backward()
    for name, grads in expected.get("grads", {}).items():
        for token_type, grad in grads.items():
            close(file["student"][name][token_type].grad, grad)


def test_teacher_dropping():
    torch.manual_seed(0)
    losses, uniform = torch.rand(2, 20_000, 3)
    mask = torch.ones(20_000, 3).bool()
    kept = dune.teacher_coefficients(losses, mask, 0.5, uniform)
    hardest = F.one_hot(losses.argmax(1), 3).bool()
    assert kept[hardest].min() == 1 and abs(kept[~hardest].mean() - 0.5) < 0.01
    assert abs(kept[~hardest].view(-1, 2).prod(1).mean() - 0.25) < 0.015  # each one on its own
    mask[:, 0] = False  # may not supervise: never counts, is never the hardest
    kept = dune.teacher_coefficients(losses, mask, 1.0, uniform)
    assert kept.equal(F.one_hot(1 + losses[:, 1:].argmax(1), 3).float())


def test_a_teacher_that_does_not_count_may_have_no_finite_loss():
    losses = torch.tensor([[torch.nan, 1.0]], requires_grad=True)
    loss_sum, _ = dune.weighted_sum(losses, torch.tensor([[0.0, 1.0]]))
    loss_sum.backward()
    assert loss_sum == 1 and losses.grad.tolist() == [[0, 1]]


def test_schedules(golden, close):
    file = golden("schedules")
    rates = [train.schedule(step, 1000, 12e-4, 1e-6, 0.2) for step in range(1000)]
    close(torch.tensor(rates), file["lr"])
    close(torch.tensor([train.schedule(step, 1000, 1, 0.001) for step in range(1000)]), file["ema_momentum"])


# ---- The student

@pytest.mark.parametrize("projector", dune.PROJECTORS)
def test_own_checkpoint_round_trip(projector, tmp_path):
    model = small_student(projector)
    recipe = {"projector": projector, "norm": "unic"}
    torch.save({"model": model.state_dict(), "args": recipe}, tmp_path / "checkpoint.pt")
    loaded = dune.load(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.recipe == recipe and loaded.teacher_norms["dinov2"].style == "unic"


@pytest.mark.parametrize("projector", dune.PROJECTORS)
def test_every_parameter_learns_and_an_index_selects_images(projector, close):
    """DDP waits for the gradient of every parameter: none may be left out."""
    model = small_student(projector, drop_path=0.3).train()
    images = torch.randn(4, 3, 56, 56)
    index = {"dinov2": torch.arange(4), "mast3r": torch.tensor([2])}
    out = model(images, index)
    assert out["mast3r"]["patch"].shape == (1, 16, 80) and out["mast3r"]["cls"] is None
    (out["dinov2"]["cls"].sum() + out["dinov2"]["patch"].sum() + out["mast3r"]["patch"].sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    close(model(images, index)["mast3r"]["patch"], model(images)["mast3r"]["patch"][2:3])


def test_recomputing_blocks_changes_nothing(close):
    grads = []
    for recompute in (False, True):
        model = small_student().train()
        model.encoder.checkpoint_blocks = recompute
        model(torch.ones(2, 3, 56, 56))["dinov2"]["patch"].square().sum().backward()
        grads.append(model.encoder.patch_embed["proj"].weight.grad)
    close(*grads, 1e-6)


@pytest.mark.parametrize("count", [7, 600])  # few tokens, and too many for the plain products
def test_attention_with_and_without_gradient(count, close):
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 3, count, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv
    outputs = (q @ k.mT / 4).softmax(-1) @ v, dune.attention(q, k, v)
    close(*outputs)
    close(*(torch.autograd.grad(x.square().sum(), qkv)[0] for x in outputs))
    close(dune.attention(*qkv.detach()), outputs[0])


@pytest.mark.parametrize("norm", ["dune", "unic"])
@pytest.mark.parametrize("projector", dune.PROJECTORS)
def test_predictions_in_the_teachers_own_scale(projector, norm, close):
    model = small_student(projector, norm).eval()
    images = torch.randn(2, 3, 56, 56)
    for stats in model.teacher_norms.state_dict().values():
        stats.uniform_(5e-4, 2e-3)  # some below the smallest std of "dune"
    for name, expected in model(images).items():
        features = model.as_teacher(images, name)
        standardized = model.teacher_norms[name](features)
        for token_type in ("cls", "patch"):
            assert (features[token_type] is None) == (expected[token_type] is None)
            if features[token_type] is not None:
                close(standardized[token_type], expected[token_type], 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(56, 56), (28, 84)])  # the trained one; another
def test_an_encoder_is_traced_and_exported_for_any_batch(size, close):
    encoder = small_student().encoder.eval()
    images = torch.randn(2, 3, *size)
    traced = torch.jit.trace(encoder, images, strict=False)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(encoder, (images,), dynamic_shapes=(batch,)).module()
    images = torch.randn(5, 3, *size)
    for model in (traced, exported):
        for token_type, expected in encoder(images).items():
            close(model(images)[token_type], expected)


def test_images_may_have_any_shape_and_registers_have_no_position():
    vit = dune.ViT(56, 14, 64, 2, 1, registers=4)
    assert vit.pos_embed.shape == (1, 17, 64)
    assert vit(torch.randn(1, 3, 28, 84))["patch"].shape == (1, 12, 64)
    with pytest.raises(dune.UserError, match="57x56 is not divisible by the patch size 14"):
        vit(torch.randn(1, 3, 57, 56))


# ---- Files that are no student

class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


STATE = small_student().state_dict()
WEIGHT = "encoder.norm.weight"


@pytest.mark.parametrize("content, message", [
    (None, "no such file"),
    (b"not a checkpoint", "file.pth: "),
    (pickle.dumps(Evil(), 2), "not a torch checkpoint"),
    (Evil(), "not a torch checkpoint"),
    ({"weights": 1}, "holds no student; its first keys: weights; a teacher's file is given with its name"),
    ({"model": {"encoder.cls_token": 1}}, "holds no student"),
    ({"model": {key: STATE[key] for key in STATE if key != WEIGHT}}, f"Missing key.* .{WEIGHT}"),
    ({"model": {**STATE, "encoder.extra": torch.zeros(1)}}, "Unexpected key.* .encoder.extra"),
    ({"model": {**STATE, WEIGHT: torch.zeros(1)}}, f"size mismatch for {WEIGHT}"),
    ({"model": {**STATE, WEIGHT: STATE[WEIGHT] * torch.nan}}, f"{WEIGHT} contains non-finite values"),
])
def test_foreign_files_are_refused_in_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(dune.UserError, match=message) as error:
        dune.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not os.path.exists("evil")  # no code of the file has run
