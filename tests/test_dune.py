"""The method agrees with the published code (fixtures in golden/), and with itself where there is no fixture."""
import argparse
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import dune
import kernels
import train

TEACHERS = {"dinov2": (96, True), "mast3r": (80, False)}


def small(projector="tp", norm="dune", **options):
    torch.manual_seed(0)
    encoder = dune.ViT(56, 14, 64, 3, 1, registers=2, layer_scale=None, **options)
    sizes = {"hidden": 32, "last_hidden": 48} if projector == "lp" else {}
    return dune.DUNE(encoder, TEACHERS, projector, norm, **sizes)


def test_published_dune_checkpoint(golden, close, tmp_path):
    file = golden("dune_encoder")
    state = {**file["checkpoint"]["model"], **golden("dune_projectors")}
    torch.save({**file["checkpoint"], "model": state}, tmp_path / "dune.pth")
    model = dune.load(tmp_path / "dune.pth")
    assert list(model.projectors) == ["dinov2", "mast3r"] and not model.training
    for case in file["cases"]:
        for norm, name in ((True, "norm"), (False, "raw")):
            out = model.encoder(case["image"], norm=norm)
            close(out["cls"], case[f"{name}_cls"])
            close(out["patch"], case[f"{name}_patch"])
        out = model(case["image"])
        for teacher, want in case["projected"].items():
            close(model.projectors[teacher](model.encoder.tokens(case["image"])), want)  # published names answer too
            close(out[dune.ALIASES[teacher]]["patch"], want[:, 1:])
    assert out["mast3r"]["cls"] is None
    encoder = dune.load(tmp_path / "dune.pth", encoder_only=True)
    close(encoder(case["image"])["patch"], case["norm_patch"])


@pytest.mark.parametrize("tokens", [(9, 7), (9, 600)])  # few, and too many for the plain products
def test_attention_gives_the_same_with_and_without_gradient(tokens, close):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (tokens[0], tokens[1], tokens[1]))
    learns = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", *learns[:2]) / 4, -1) @ learns[2]
    got = dune.attend(*learns)
    close(dune.attend(q, k, v), want)
    close(got, want)
    for a, b in zip(torch.autograd.grad(got.square().sum(), learns), torch.autograd.grad(want.square().sum(), learns)):
        close(a, b)


def test_published_unic_checkpoint(golden, close, tmp_path):
    student, ladder = golden("unic_student")["student"], golden("unic_ladder")
    torch.save({**student["checkpoint"], "model": {**student["checkpoint"]["model"], **ladder}}, tmp_path / "unic.pth")
    model = dune.load(tmp_path / "unic.pth")
    out = model(student["image"])
    close(model.encoder(student["image"])["patch"], student["patch"])
    for teacher, want in student["outputs"].items():
        for kind in want:
            close(out[dune.ALIASES[teacher]][kind], want[kind])
    stats = student["checkpoint"]["teacher_ft_stats"]["dino_vitbase_16"]["cls"]
    raw = torch.randn(2, 72)
    out = model.teacher_norms["dino"]({"cls": raw, "patch": None})["cls"]
    close(out, (raw - stats["mean"]) / (stats["std"] + 1e-6))


def standardise(norm, features, momentum):
    scale = dune.update_norms({"t": norm}, {"t": features}, momentum)["t"]
    return {k: (features[k] - mean) / divisor for k, (mean, divisor) in scale.items()}


def test_teacher_norm_follows_the_published_steps(golden, close):
    file, norm = golden("teacher_norm"), dune.TeacherNorm(96, True)
    for step in file["train_steps"]:
        out = standardise(norm, step, step["momentum"])
        close(out["cls"], step["out_cls"])
        close(out["patch"], step["out_patch"])
        for name, want in step["state"].items():
            close(norm.state_dict()[name], want)
    last = file["eval_step"]
    close(norm(last)["cls"], last["out_cls"])
    close(norm(last)["patch"], last["out_patch"])

    norm = dune.TeacherNorm(72, False, style="unic")
    for step in golden("unic_student")["standardise"]:
        close(standardise(norm, {"patch": step["feature"]}, step["momentum"])["patch"], step["out"])
        close(norm.normalizers["patch"].std, step["std"].flatten())


def test_a_batch_that_is_not_finite_leaves_the_running_average_alone():
    norm = dune.TeacherNorm(8, False)
    dune.update_norms({"t": norm}, {"t": {"patch": torch.full((2, 3, 8), torch.nan)}}, 0.5)
    dune.update_norms({"t": norm}, {"t": {"patch": torch.empty(0, 3, 8)}}, 0.5)
    assert norm.normalizers["patch"].mean.equal(torch.zeros(8)) and norm.normalizers["patch"].std.equal(torch.ones(8))


SETS = ["in1k", "Niantic", "bedlam", "gldv2", "Habitat512", "agora"]


@pytest.mark.parametrize("rule", ["none", "own_data", "own+generic_data"])
def test_loss_and_gradient(golden, close, rule):
    file = golden("loss")
    assert file["dataset_of_each_image"] == SETS
    own = torch.eye(3, dtype=torch.bool)[[0, 1, 2, 0, 1, 2]]
    allowed = {"none": torch.ones(6, 3, dtype=torch.bool), "own_data": own, "own+generic_data": own | own[:, :1]}[rule]
    student = {t: {k: x.clone().requires_grad_() for k, x in parts.items()} for t, parts in file["student"].items()}
    want, losses = file["results"][rule], []
    for t in student:
        statistics = {k: (torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])) for k, x in student[t].items()}
        loss, parts = dune.image_losses(student[t], file["target"][t], statistics)
        losses.append(loss)
        for name, value in parts.items():
            kind, part = name.split("_")
            close(value.mean(), torch.tensor(want["metrics"][f"loss/dist_{kind}_{part}_{t}"]))
    losses = torch.stack(losses, 1)
    coefficients = dune.teacher_coefficients(losses, allowed, 0.0, torch.rand(6, 3))
    total, count = dune.weighted_sum(losses, coefficients)
    close(total / count, want["loss"])
    for t, share in zip(student, coefficients.sum(0) / count):
        assert share.item() == pytest.approx(want["metrics"][f"t_coeff_{t}"])
    if "grads" in want:
        (total / count).backward()
        for t, parts in want["grads"].items():
            for k, grad in parts.items():
                close(student[t][k].grad, grad)


def test_teacher_dropping():
    torch.manual_seed(0)
    losses = torch.rand(20_000, 3)
    allowed = torch.ones(20_000, 3, dtype=torch.bool)
    kept = dune.teacher_coefficients(losses, allowed, 0.5, torch.rand(20_000, 3))
    worst = F.one_hot(losses.argmax(1), 3).bool()
    assert kept[worst].min() == 1 and abs(kept[~worst].mean() - 0.5) < 0.01
    both = kept[~worst].view(-1, 2)
    assert abs(both.prod(1).mean() - 0.25) < 0.015  # independently
    allowed[:, 0] = False  # a teacher that may not teach never counts, and is never the worst
    kept = dune.teacher_coefficients(losses, allowed, 1.0, torch.rand(20_000, 3))
    assert kept[:, 0].sum() == 0 and kept.sum(1).eq(1).all() and kept[losses[:, 1] > losses[:, 2], 1].all()
    nan = torch.tensor([[torch.nan, 1.0]], requires_grad=True)
    total, _ = dune.weighted_sum(nan, torch.tensor([[0.0, 1.0]]))
    total.backward()
    assert total == 1 and nan.grad.equal(torch.tensor([[0.0, 1.0]]))


def test_schedules(golden, close):
    file = golden("schedules")
    rates = [train.lr_at(i, 1000, 3e-4 * 1024 / 256, 1e-6, 0.2) for i in range(1000)]
    close(torch.tensor(rates, dtype=torch.float64), file["lr"])
    momenta = [train.momentum_at(i, 1000) for i in range(1000)]
    close(torch.tensor(momenta, dtype=torch.float64), file["ema_momentum"])


@pytest.mark.parametrize("projector", dune.PROJECTORS)
def test_own_checkpoint_round_trip(projector, close, tmp_path):
    model = small(projector).eval()
    for stats in (m for m in model.modules() if isinstance(m, dune.Stats)):
        stats.mean.normal_()
    torch.save({"model": model.state_dict(), "step": 1, "args": {"norm": "unic"}}, tmp_path / "checkpoint.pt")
    again = dune.load(tmp_path / "checkpoint.pt").eval()
    image = torch.randn(2, 3, 56, 84)
    for t, parts in model(image).items():
        for k, x in parts.items():
            assert (x is None and again(image)[t][k] is None) or close(again(image)[t][k], x, 0) is None
    assert again.teacher_norms["dinov2"].style == "unic"


@pytest.mark.parametrize("projector", dune.PROJECTORS)
def test_every_parameter_learns_and_rows_pick_images(projector, close):
    """DDP waits for the gradient of every parameter: none may be left out."""
    model = small(projector, drop_path=0.3).train()
    out = model(torch.randn(4, 3, 56, 56), rows={"dinov2": slice(None), "mast3r": torch.tensor([2])})
    assert out["mast3r"]["patch"].shape == (1, 16, 80)
    sum((x**2).sum() for parts in out.values() for x in parts.values() if x is not None).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    model.eval()
    image = torch.randn(4, 3, 56, 56)
    picked = model(image, rows={"dinov2": slice(None), "mast3r": torch.tensor([2])})
    close(picked["mast3r"]["patch"], model(image)["mast3r"]["patch"][2:3])


def test_recomputing_blocks_changes_nothing(close):
    grads = []
    for recompute in (False, True):
        model = small().train()
        model.encoder.checkpoint_blocks = recompute
        torch.manual_seed(1)
        model(torch.randn(2, 3, 56, 56))["dinov2"]["patch"].square().sum().backward()
        grads.append(model.encoder.patch_embed["proj"].weight.grad)
    close(*grads, 1e-6)


def test_registers_have_no_position_and_images_may_have_any_shape():
    vit = dune.ViT(56, 14, 64, 2, 1, registers=4)
    assert vit.pos_embed.shape == (1, 17, 64)
    for shape in ((56, 56), (28, 84), (112, 14)):
        out = vit(torch.randn(1, 3, *shape))
        assert out["cls"].shape == (1, 64) and out["patch"].shape == (1, shape[0] * shape[1] // 196, 64)
    with pytest.raises(dune.Oops, match="no multiple of the patch size 14"):
        vit(torch.randn(1, 3, 57, 56))


class Evil:
    def __reduce__(self):
        return os.system, ("echo run > /tmp/never",)


@pytest.mark.parametrize("content, message", [
    (None, "no such file"),
    (b"", "damaged"),
    (b"not a checkpoint", "damaged"),
    (pickle.dumps(Evil()), "damaged|not allowed"),
    ({"model": {"encoder.cls_token": torch.zeros(1, 1, 64)}}, "holds no ViT"),
    ({"weights": 1}, "no 'model'"),
    ({"model": {"head.weight": torch.zeros(3)}}, "no 'encoder"),
    (Evil(), "wants to run"),
])
def test_foreign_files_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(dune.Oops, match=message) as error:
        dune.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_changed_tensor_is_named(tmp_path):
    state = small().state_dict()
    changes = {"lacks tensor encoder.norm.weight": lambda s: s.pop("encoder.norm.weight"),
               "unknown tensor encoder.extra": lambda s: s.update({"encoder.extra": torch.zeros(1)}),
               r"wrong shape for tensor encoder.norm.weight \(\[1\], expected \[64\]\)":
                   lambda s: s.update({"encoder.norm.weight": torch.zeros(1)}),
               "no numbers in tensor encoder.norm.weight":
                   lambda s: s.update({"encoder.norm.weight": torch.ones(64, dtype=torch.int64)}),
               "NaN, infinity or senseless numbers in tensor encoder.norm.weight":
                   lambda s: s.update({"encoder.norm.weight": torch.full((64,), torch.nan)})}
    for message, change in changes.items():
        other = dict(state)
        change(other)
        torch.save({"model": other, "args": argparse.Namespace(arch="tiny")}, tmp_path / "file.pth")
        with pytest.raises(dune.Oops, match=message):
            dune.load(tmp_path / "file.pth")


MERGE = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import dune
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
whole = {"a": {"cls": torch.randn(8, 5) * 3 + 7, "patch": torch.randn(8, 6, 5)},
         "b": {"cls": None, "patch": torch.randn(8, 6, 4)}}
one = {"a": dune.TeacherNorm(5, True), "b": dune.TeacherNorm(4, False)}
many = {"a": dune.TeacherNorm(5, True), "b": dune.TeacherNorm(4, False)}
sent, gather = [], dist.all_gather_into_tensor
dist.all_gather_into_tensor = lambda out, x, **k: (sent.append(x.numel()), gather(out, x, **k))
cuts = {2: [0, 3, 8], 4: [0, 3, 3, 4, 8]}[world]           # uneven, one process with nothing
share = slice(cuts[rank], cuts[rank + 1])
mine = {t: {k: x if x is None else x[share] for k, x in parts.items()} for t, parts in whole.items()}
got = dune.update_norms(many, mine, 0.3)
assert sent == [3 * (2 * 0 + 1) + 2 * (5 + 5 + 4)], sent      # one message: 2 D + 1 numbers per teacher and token type
started, dist.is_initialized = dist.is_initialized, lambda: False
want = dune.update_norms(one, whole, 0.3)
dist.is_initialized = started
for t in want:
    for k in want[t]:
        for x, y in zip(got[t][k], want[t][k]):
            assert torch.allclose(x, y, rtol=1e-6, atol=1e-6), (t, k)
    for x, y in zip(many[t].state_dict().values(), one[t].state_dict().values()):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)
dist.barrier()                                             # nobody leaves while another still talks
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_statistics_of_several_processes_are_those_of_the_whole_batch(world, tmp_path):
    script = tmp_path / "merge.py"
    script.write_text(MERGE)
    root = os.path.dirname(os.path.abspath(dune.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script), root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_kernels_answer_to_their_names():
    assert kernels.reference.channel_moments and kernels.reference.distill_loss
