"""No mistake ends in a traceback, a hang or a ruined run: damaged files, odd values and words, full disks.

What is wrong is told in one line, which says what to do.
"""

import io
import json
import os
import resource
import runpy
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dune
import eval as evaluation
import train


def one_line(action):
    """What action() returns, or the line that run_main prints. A defect of ours fails the test."""
    try:
        return action()
    except Exception as error:
        line = train.format_error(error)
        if line is None:
            raise
        assert "\n" not in line and len(line) < 600
        return line


# ---- Files from outside

@pytest.fixture(scope="module")
def content():
    """A checkpoint of ours."""
    torch.manual_seed(0)
    encoder = dune.ViT(28, 14, 64, 1, 1, registers=1)
    model = dune.DUNE(encoder, {"dinov2": (64, True), "mast3r": (64, False)})
    recipe = {"projector": "tp", "norm": "dune"}
    return {"model": model.state_dict(), "step": 3, "args": recipe, "weights": {}}


def loads(path):
    """Whether the file is taken for a student. If so, it must run."""
    model = one_line(lambda: dune.load(path))
    if isinstance(model, str):
        return False
    model(torch.zeros(1, 3, 28, 28))
    return True


def safetensors(tensors, **changes):
    """The bytes of a .safetensors file. changes: of the last tensor's header."""
    header = {}
    blob = b""
    for name, x in tensors.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": (len(blob), len(blob) + len(raw))}
        blob += raw
    header[name].update(changes)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_bytes(form, content, tmp_path):
    """Flipped bits, cuts and zeroed stretches: told, or without consequence."""
    if form == "safetensors":
        path, raw = tmp_path / "file.safetensors", safetensors(content["model"])
    else:
        path, buffer = tmp_path / "file.pt", io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
        raw = buffer.getvalue()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(150):
        damaged = bytearray(raw)
        at = int(rng.integers(len(raw) if i % 2 else 3000))
        if i % 5 == 0:
            damaged = damaged[:at]
        elif i % 5 == 1:
            damaged[at:at + 50] = bytes(50)
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if form == "safetensors":
            refused += isinstance(one_line(lambda: dune.load_checkpoint(path)), str)
        else:
            refused += not loads(path)
    assert refused > (140 if form == "zip" else 40)


ODD = [None, True, -1, 10**9, float("nan"), "x", b"x", [], {}, {5: 5}, {"x": {}},
       torch.zeros(0), torch.zeros(()), torch.full((64,), torch.nan),
       torch.ones(64, dtype=torch.int64), torch.ones(64, dtype=torch.complex64),
       torch.ones(1).expand(2**40), torch.eye(64).to_sparse(), torch.empty(64, device="meta"),
       torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [
    "model", "args", "weights", "teacher_ft_stats", "encoder.cls_token", "encoder.pos_embed",
    "encoder.patch_embed.proj.weight", "encoder.norm.weight", "projectors.dinov2.linear.weight",
    "teacher_norms.dinov2.normalizers.patch.mean", "encoder.blocks.9999999.norm1.weight", "", 5])
def test_odd_values_in_every_place(place, content, tmp_path):
    for odd in ODD:
        changed = {**content, place: odd}
        if place not in ("model", "args", "weights", "teacher_ft_stats"):
            changed = {**content, "model": {**content["model"], place: odd}}
        torch.save(changed, tmp_path / "file.pt")
        loads(tmp_path / "file.pt")
    for value in ("new", ["tp"], {}):
        torch.save({**content, "args": {"projector": value}}, tmp_path / "file.pt")
        assert not loads(tmp_path / "file.pt")


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_checkpoint(content, tmp_path):
    path = tmp_path / "file.pt"
    for protocol in range(6):
        torch.save(content, path, pickle_protocol=protocol)
        loads(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert not loads(path)
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b".")
    os.mkfifo(tmp_path / "fifo")
    for other in (path, tmp_path / "fifo", tmp_path, "/dev/zero", tmp_path / "none", path / "none"):
        assert not loads(other)
    path = tmp_path / "file.safetensors"
    for raw in (b"", (2**60).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"):
        path.write_bytes(raw)
        assert not loads(path)
    path.write_bytes(safetensors({"x": torch.ones(3)})[:-1])
    assert "cut short" in one_line(lambda: dune.load_checkpoint(path))
    for changes in ({"data_offsets": (4, 10**12)}, {"data_offsets": (4, 0)}, {"data_offsets": 5},
                    {"dtype": "F8"}, {"shape": "x"}, {"shape": (2**40, 2**40)}, {"shape": (-1, 5)}):
        path.write_bytes(safetensors({"x": torch.ones(3)}, **changes))
        assert isinstance(one_line(lambda: dune.load_checkpoint(path)), str)


def test_a_foreign_package_named_kernels_is_told_at_import(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("relu = None")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    with pytest.raises(ImportError, match=f"{tmp_path}/kernels.py is another package named kernels"):
        runpy.run_path(dune.__file__)


# ---- Our own files

TINY = ("--teachers dinov2 --arch tiny --image-size 28 --batch 4 --workers 0 --device cpu --dtype fp32 "
        "--steps 8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, images, and a run that has ended: teacher.pth, dense, run."""
    folder = tmp_path_factory.mktemp("folder")
    torch.save(dune.ViT(28, 14, 64, 1, 1).state_dict(), folder / "teacher.pth")
    for name in ("images", "masks"):  # two classes, and images with their masks
        (folder / "dense" / name).mkdir(parents=True)
        for seed in range(3):
            image = Image.fromarray(data.SCENES["objects"](seed, 56)["image"])
            image = image if name == "images" else image.convert("L")
            image.save(folder / "dense" / name / f"{seed}.png")
    train.main(train_argv(folder, folder / "run"))
    return folder


def train_argv(folder, out, *options):
    files = f"--weights dinov2={folder}/teacher.pth --data {folder}/dense --val {folder}/dense --out {out}"
    return [*TINY.split(), *files.split(), *options]


@pytest.mark.parametrize("line", ["5", "{}", "[]", "null", "{", "\0", "NaN", "1e999", '{"step": "x"}',
                                  '{"step": 3, "dinov2": 5}'])
def test_damaged_logs(line, folder, tmp_path):
    lines = (folder / "run/log.jsonl").read_text().splitlines()
    for at in (0, 5, len(lines)):
        (tmp_path / "log.jsonl").write_text("\n".join([*lines[:at], line, *lines[at:]]))
        one_line(lambda: train.plot_logs([str(tmp_path)]))
        one_line(lambda: evaluation.main(["alignment", "--run", str(tmp_path)]))


@pytest.mark.parametrize("losses", ['"high"', '"0.5"', "[1]", "null", "NaN", "1e999"])
def test_a_log_without_losses_makes_no_picture(losses, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "dinov2": {"loss": %s}}' % losses)
    assert f"{tmp_path}" in one_line(lambda: train.plot_logs([str(tmp_path)]))
    (tmp_path / "log.jsonl").write_text('{"step": 3, "held_out": %s}' % losses)
    assert f"{tmp_path}" in one_line(lambda: train.plot_logs([str(tmp_path)]))
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("change", [
    {"model": None}, {"model": {}}, {"step": -5}, {"step": "x"}, {"step": 10**9}, {"args": []},
    {"args": None}, {"fingerprints": 5}, {"optimizer": None}, {"optimizer": {}}, {"optimizer": {"state": {},
    "param_groups": [{"params": [0]}]}}])
def test_a_damaged_run_is_not_continued(change, folder, tmp_path):
    checkpoint = dune.load_checkpoint(folder / "run/checkpoint.pt")
    torch.save({**checkpoint, **change}, tmp_path / "checkpoint.pt")
    line = one_line(lambda: train.main(train_argv(folder, tmp_path)))
    assert str(tmp_path / "checkpoint.pt") in line


PROBE = "--run {folder}/run --device cpu --out {out}/x --train {folder}/dense --test {folder}/dense"
COMMANDS = {
    "train": (train, "--steps 1 --out {out}"),
    "show-data": (train, "--show-data {out}/samples.png"),
    "plot": (train, "--plot {folder}/run"),
    "pca": (evaluation, "pca --run {folder}/run --device cpu --out {out}/x"),
    "alignment": (evaluation, "alignment --run {folder}/run --out {out}/x"),
    "knn": (evaluation, f"knn {PROBE}"),
    "seg": (evaluation, f"seg {PROBE} --steps 1"),
    "export": (evaluation, "export --run {folder}/run --out {out}"),
}


@pytest.mark.parametrize("disk", ["full", "a file in the way", "a folder in the way"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_takes_nothing(command, disk, folder, tmp_path, monkeypatch):
    """One line, and nothing half-written is left."""
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path / "cache"))
    module, words = COMMANDS[command]
    out = tmp_path / "out"
    argv = words.format(folder=folder, out=out).split()
    argv = train_argv(folder, out, *argv) if module is train else argv
    if disk == "a file in the way":
        out.write_text("")
    elif disk == "a folder in the way":
        for name in ("checkpoint.pt", "samples.png", "x.json", "x.png", "model.safetensors"):
            (out / name / "inside").mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if disk == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes; semaphores are files of 32
    try:
        line = one_line(lambda: module.main(argv))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(line, str) or command == "plot" and disk != "full"
    left = {path.name for place in (tmp_path, folder) for path in place.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith(".part")]


# ---- Options

class Reached(Exception):
    """The arguments were taken: here the work would begin."""


def reached(*args, **options):
    raise Reached


SCRIPTS = [(train.main, [], {**train.RECIPE, **train.RUN_OPTIONS})]
for name, command in evaluation.COMMANDS.items():
    SCRIPTS.append((evaluation.main, [name, *["x.png"] * command.photos], command.options))


@pytest.mark.parametrize("main, words, table", SCRIPTS)
def test_every_option_with_words_that_do_not_fit(main, words, table, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for module, name in ((train, "init_distributed"), (train, "list_teachers"), (data, "show_data")):
        monkeypatch.setattr(module, name, reached)
    if main is evaluation.main:
        monkeypatch.setattr(evaluation, f"command_{words[0].replace('-', '_')}", reached)
    for name, (default, *_) in table.items():
        number = isinstance(default, (int, float)) and default is not False
        for word in ("nan", "inf", "1e30", "x", "", "-1", "0.5") if number else ("x", ""):
            try:
                main([*words, f"--{name.replace('_', '-')}={word}"])
            except (Reached, dune.UserError):
                assert not number or word in ("-1", "0.5"), (name, word)
            except SystemExit as leaving:
                assert leaving.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert "show this help" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
