"""Three of the newest teachers in one run, from files in their published layouts: it learns, resumes, is evaluated."""
import torch
from PIL import Image

import data
import dune
import eval as evaluation
import train
from test_teachers import SIGLIP, dinov3_file

TEACHERS = ["dinov3_vits16", "siglip2_vitb16", "vggt"]


def weights(folder):
    """--weights of tiny files with random weights."""
    torch.manual_seed(0)
    torch.save(dinov3_file(64, 2, torch.Generator().manual_seed(0)), folder / "dinov3.pth")
    vggt = dune.ViT(112, 14, 64, 2, 1, registers=4).state_dict()
    vggt = {f"aggregator.patch_embed.{key}": value for key, value in vggt.items()}
    torch.save({**vggt, "aggregator.frame_blocks.0.norm1.weight": torch.zeros(64)}, folder / "vggt.pt")
    paths = [folder / "dinov3.pth", SIGLIP, folder / "vggt.pt"]
    return [f"--weights={name}={path}" for name, path in zip(TEACHERS, paths)]


def test_three_of_the_newest(tmp_path, monkeypatch, capsys):
    files = weights(tmp_path)
    run = str(tmp_path / "run")
    common = ("--arch tiny --image-size 56 --batch 9 --lr 1e-2 --layer-scale 0 --log-every 1 --workers 0 --steps 12 "
              "--device cpu --dtype fp32 --compile no --sharing own+generic").split()
    argv = [*common, "--teachers", ",".join(TEACHERS), *files, "--out", run]
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:  # as a signal would, after three steps
        patch.setattr(train.Processes, "stop_asked", lambda self: next(asked))
        train.main(argv)
    train.main(argv)
    log = evaluation.read_log(run)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert all(log[-1][t]["loss"] < log[0][t]["loss"] for t in TEACHERS)
    model = dune.load(f"{run}/checkpoint.pt")
    assert {t: "cls" in norm.normalizers for t, norm in model.teacher_norms.items()} == {
        "dinov3_vits16": True, "siglip2_vitb16": True, "vggt": False}

    monkeypatch.setattr(evaluation, "STUDY", dict(train=120, test=24, pairs=2))
    monkeypatch.setattr(evaluation, "PROBE_STEPS", 2)
    for kind in "ab":
        (tmp_path / "classes" / kind).mkdir(parents=True)
        for i in range(4):
            scene = data.SCENES["objects"](i, 56)["image"]
            Image.fromarray(scene).save(tmp_path / "classes" / kind / f"{i}.png")
    classes = [f"--train={tmp_path}/classes", f"--test={tmp_path}/classes"]
    for command in (["loss"], ["pca"], ["spectrum"], ["alignment"], ["study", "--seeds", "1"],
                    ["match", "--through", "siglip2_vitb16"], ["knn", *classes, "--teacher", "dinov3_vits16"],
                    ["linear", *classes, "--steps", "2", "--through", "vggt"]):
        device = [] if command[0] == "alignment" else ["--device", "cpu"]
        evaluation.main([*command, "--run", run, *device])
        assert f"wrote {run}" in capsys.readouterr().out, command
