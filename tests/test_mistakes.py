"""No mistake ends in a traceback, a hang or a ruined run: generated cases for the four places through which all passes.

Options, files from outside, our own files, and the way out (see the end of dune.py). What is wrong is one line (Oops).
"""
import errno
import io
import json
import os
import resource
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import data
import dune
import eval as evaluation
import teachers
import train

SMALL = ("--teachers dinov2 --arch tiny --image-size 28 --batch 4 --workers 0 --device cpu --dtype fp32 "
         "--compile no").split()


def one_line(action):
    """What action() gives, or the line of its Oops; anything else fails the test."""
    try:
        return action()
    except dune.Oops as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return str(error)


# ---- Files from outside

def tiny_student():
    torch.manual_seed(0)
    encoder = dune.ViT(28, 14, 64, 1, 1, registers=1)
    return dune.DUNE(encoder, {"dinov2": (64, True), "mast3r": (64, False)})


def content():
    model = tiny_student()
    return {"model": model.state_dict(), "optimizer": {}, "step": 3, "args": {"projector": "tp", "norm": "dune"},
            "weights": {}, "held_out": {}}


def works(model):
    """A load that succeeds gives a model that works."""
    if isinstance(model, dune.DUNE):
        out = model.eval()(torch.randn(1, 3, 28, 28))
        assert all(x.isfinite().all() for parts in out.values() for x in parts.values() if x is not None)
    return isinstance(model, dune.DUNE)


def bytes_of(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def safetensors(tensors, change=lambda header: None):
    header, blob = {}, b""
    for name, x in tensors.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_bytes(form, tmp_path):
    """Flipped bits, cuts and zeroed stretches, 250 of each kind of file: told, or without consequence."""
    state = {f"encoder.{k}": v for k, v in tiny_student().encoder.state_dict().items()}
    raw = {"zip": lambda: bytes_of(content()), "safetensors": lambda: safetensors(state),
           "legacy": lambda: bytes_of(content(), _use_new_zipfile_serialization=False)}[form]()
    rng = np.random.default_rng(0)
    told = 0
    for i in range(250):
        damaged = bytearray(raw)
        at = int(rng.integers(len(raw) if i % 2 else min(3000, len(raw))))
        if i % 5 == 0:
            damaged = damaged[:at]
        elif i % 5 == 1:
            damaged[at:at + 50] = bytes(len(damaged[at:at + 50]))
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "file.pt").write_bytes(damaged)
        if form == "safetensors":
            found = one_line(lambda: dune.load_strictly(tiny_student().encoder, dune.below(
                dune.read_checkpoint(tmp_path / "file.pt"), "encoder."), "file.pt"))
            told += isinstance(found, str)
        else:
            told += not works(one_line(lambda: dune.load(tmp_path / "file.pt")))
    assert told > (240 if form == "zip" else 50)


ODD = [None, True, 5, -1, 10**9, float("nan"), "x", b"x", [], {}, {5: 5}, {"x": {}}, torch.zeros(0), torch.zeros(3),
       torch.zeros(()), torch.full((64,), torch.nan), torch.ones(64, dtype=torch.int64), torch.ones(64) > 0,
       torch.ones(64, dtype=torch.complex64), torch.ones(1).expand(2**40), torch.eye(64).to_sparse(),
       torch.empty(64, device="meta"), torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)]


def test_odd_values_in_every_place(tmp_path):
    """Each entry of a checkpoint, and one tensor of each kind, replaced by what does not belong there."""
    path = tmp_path / "file.pt"
    whole = content()
    keys = ["encoder.cls_token", "encoder.pos_embed", "encoder.register_tokens", "encoder.patch_embed.proj.weight",
            "encoder.norm.weight", "encoder.blocks.0.attn.qkv.weight", "projectors.dinov2.linear.weight",
            "teacher_norms.dinov2.normalizers.patch.mean"]
    count = 0
    for odd in ODD:
        for place in ("model", "args", "teacher_ft_stats", *keys):
            changed = {**whole, place: odd} if place not in keys else {**whole, "model": {**whole["model"], place: odd}}
            torch.save(changed, path)
            works(one_line(lambda: dune.load(path)))
            count += 1
    for key in ("encoder.blocks.9999999.norm1.weight", "encoder.blocks.1.norm1.weight", 5, "", "projectors.sam.x"):
        torch.save({**whole, "model": {**whole["model"], key: torch.ones(64)}}, path)
        assert isinstance(one_line(lambda: dune.load(path)), str)
        count += 1
    for args in ({"projector": "new"}, {"projector": ["tp"]}, {"norm": 5}, {"norm": {}}):
        torch.save({**whole, "args": args}, path)
        assert isinstance(one_line(lambda: dune.load(path)), str)
    assert count > 200


def test_pickle_protocols_bombs_and_files_that_are_none(tmp_path):
    path = tmp_path / "file.pt"
    for protocol in (0, 1, 2, 3, 4, 5):
        torch.save(content(), path, pickle_protocol=protocol)
        found = one_line(lambda: dune.load(path))
        assert works(found) or "protocol" in found or "damaged" in found
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert "damaged" in one_line(lambda: dune.load(path))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"." )
    assert isinstance(one_line(lambda: dune.load(path)), str)
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path / "fifo", tmp_path, "/dev/zero", tmp_path / "none", tmp_path / "file.pt" / "none"):
        assert isinstance(one_line(lambda: dune.load(other)), str)
    for change in (lambda h: h["a"].update(data_offsets=[0, 10**12]), lambda h: h["a"].update(shape=[-1, 3]),
                   lambda h: h["a"].update(dtype="F8"), lambda h: h.update(a=5), lambda h: h["a"].update(shape="x"),
                   lambda h: h["a"].update(shape=[2**40, 2**40]), lambda h: h["a"].update(data_offsets=[4, 0])):
        path.write_bytes(safetensors({"a": torch.ones(3)}, change))
        assert isinstance(one_line(lambda: dune.read_checkpoint(path)), str)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert isinstance(one_line(lambda: dune.read_checkpoint(path)), str)


def test_damaged_logs(tmp_path):
    """Lines that no run has written are told or left out, wherever a log is read."""
    good = {"step": 1, "dinov2": {"loss": 0.5}, "mast3r": {"loss": 0.4}, "lr": 1e-3, "images_per_s": 5.0}
    lines = [json.dumps({**good, "step": n}) for n in range(1, 13)]
    odd = ["5", "{}", "[]", "null", '"x"', "{", "\x00", json.dumps({"step": "x"}), json.dumps({"step": 3, "dinov2": 5}),
           json.dumps({"step": 4, "dinov2": {"loss": "x"}}), json.dumps({**good, "step": None}), "NaN", "1e999"]
    for k, line in enumerate(odd * 3):
        at = (0, 5, 12)[k // len(odd)]
        (tmp_path / "log.jsonl").write_text("\n".join([*lines[:at], line, *lines[at:]]) + "\n")
        one_line(lambda: evaluation.plot_logs([str(tmp_path)]))
        one_line(lambda: evaluation.main(["alignment", "--run", str(tmp_path)]))


@pytest.mark.parametrize("change", [
    {"model": None}, {"optimizer": None}, {"held_out": 5}, {"step": -5}, {"step": "x"}, {"step": 10**9}, {"args": []},
    {"optimizer": {}}, {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}},
    {"model": {}}, {"held_out": {}}])
def test_a_damaged_run_is_not_continued(change, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_teachers", lambda args, processes: {
        "dinov2": teachers.FrozenTeacher("dinov2", dune.ViT(28, 14, 64, 1, 1))})
    argv = [*SMALL, "--steps", "2", "--save-every", "1", "--keep", "2", "--out", str(tmp_path)]
    train.main(argv)
    state = torch.load(tmp_path / "checkpoint-00000001.pt", weights_only=False)
    torch.save({**state, **change}, tmp_path / "checkpoint.pt")
    found = one_line(lambda: train.main(argv))
    assert isinstance(found, str) or change == {"held_out": {}}


# ---- Options

WORDS = ["nan", "inf", "-inf", "-1", "0", "1e30", "99999999999999999999", "x", "", " ", "\x1b[31m", "0.5"]


class Reached(Exception):
    """The arguments were taken: here the work would begin."""


def reached(*args, **kwargs):
    raise Reached


def scripts(monkeypatch):
    """(main, words before the option, table) of every command, its work cut off."""
    monkeypatch.setattr(evaluation, "held_out", reached)
    monkeypatch.setattr(evaluation, "plot_logs", reached)
    monkeypatch.setattr(data, "inspect", reached)
    monkeypatch.setattr(data, "bench", reached)
    yield train.main, ["--device", "cpu"], {**train.RECIPE, **train.MACHINE}
    yield data.main, [], data.OPTIONS
    for name, (_, *rest) in list(evaluation.COMMANDS.items()):
        monkeypatch.setitem(evaluation.COMMANDS, name, (reached, *rest))
        yield evaluation.main, [name], rest[0]


def test_every_option_with_words_that_do_not_fit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    count = 0
    for main, words, table in scripts(monkeypatch):
        for name, how in table.items():
            number = "type" in how and isinstance(how["default"], (int, float)) and how["default"] is not None
            for word in WORDS if "type" in how else ():
                try:
                    found = one_line(lambda: main([*words, f"--{name.replace('_', '-')}={word}"]))
                    assert isinstance(found, str), (name, word)
                except Reached:
                    assert not (number and word in ("nan", "inf", "-inf", "1e30", "x", "", " ")), (name, word)
                count += 1
        for argv in (["--nonsense"], ["x", "y"], ["--seed"]):
            with pytest.raises((dune.Oops, Reached)):
                main([*words, *argv])
    assert count > 1000
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_help_of_every_command(capsys):
    for main, words in [(train.main, []), (data.main, []), (evaluation.main, []),
                        *((evaluation.main, [name]) for name in evaluation.COMMANDS)]:
        with pytest.raises(SystemExit) as leaving:
            main([*words, "--help"])
        assert leaving.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("environment", ["WORLD_SIZE=2", "RANK=x", "RANK=0", "RANK=5 WORLD_SIZE=2", "WORLD_SIZE=0",
                                         "RANK=0 MASTER_ADDR=localhost MASTER_PORT=abc"])
def test_a_place_among_processes_that_is_none(environment, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    assert "start with torchrun" in one_line(lambda: train.main(["--device", "cpu"]))


# ---- Our own files

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny run that has ended, and its one teacher as an argument."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    weights = folder / "teacher.pth"
    torch.save(dune.ViT(28, 14, 64, 1, 1).state_dict(), weights)
    options = ["--steps", "8", "--log-every", "1", "--weights", f"dinov2={weights}", "--out", str(folder / "out")]
    train.main([*SMALL, *options])
    for kind in "ab":
        (folder / "classes" / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(data.SCENES["objects"](i, 56)["image"]).save(folder / "classes" / kind / f"{i}.png")
    for kind in ("images", "masks", "depth"):
        (folder / "dense" / kind).mkdir(parents=True)
    for i in range(3):
        scene, room = data.SCENES["objects"](i, 56), data.SCENES["rooms"](i, 56)
        Image.fromarray(scene["image"]).save(folder / "dense" / "images" / f"{i}.png")
        Image.fromarray(scene["mask"].astype(np.uint8)).save(folder / "dense" / "masks" / f"{i}.png")
        np.save(folder / "dense" / "depth" / f"{i}.npy", room["depth"])
    return folder


def evaluate(name, run, out, *more):
    device = [] if name == "alignment" else ["--device", "cpu"]
    evaluation.main([name, "--run", f"{run}/out", "--out", f"{out}/x", *device, *more])


def probed(run, what):
    return ["--train", f"{run}/{what}", "--test", f"{run}/{what}"]


COMMANDS = {
    "train": lambda run, out: train.main(
        [*SMALL, "--steps", "1", "--weights", f"dinov2={run}/teacher.pth", "--out", str(out)]),
    "data": lambda run, out: data.main(
        f"--data dinov2={run}/classes --teachers dinov2 --image-size 56 --out {out}/sheet.png".split()),
    "pca": lambda run, out: evaluate("pca", run, out),
    "loss": lambda run, out: evaluate("loss", run, out),
    "spectrum": lambda run, out: evaluate("spectrum", run, out),
    "alignment": lambda run, out: evaluate("alignment", run, out),
    "match": lambda run, out: evaluate("match", run, out),
    "knn": lambda run, out: evaluate("knn", run, out, *probed(run, "classes")),
    "linear": lambda run, out: evaluate("linear", run, out, "--steps", "1", *probed(run, "classes")),
    "seg": lambda run, out: evaluate("seg", run, out, "--steps", "1", *probed(run, "dense")),
    "depth": lambda run, out: evaluate("depth", run, out, "--steps", "1", *probed(run, "dense")),
    "study": lambda run, out: evaluate("study", run, out, "--seeds", "1"),
    "two-view": lambda run, out: evaluate("two-view", run, out, "--steps", "1", "--teacher", "dinov2"),
    "people": lambda run, out: evaluate("people", run, out, "--steps", "1", "--teacher", "dinov2"),
    "ablate": lambda run, out: evaluation.main(["ablate", "--quick", "--device", "cpu", "--out", f"{out}/x"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("disk", ["full", "read-only", "a folder in the way"])
def test_a_disk_that_takes_nothing(command, disk, run_folder, tmp_path, monkeypatch, capsys):
    """One line, and nothing half-written stays behind; what is there stays what it was."""
    if (command, disk) == ("ablate", "full"):
        pytest.skip("trains in processes of its own: they are tested as train")
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation, "STUDY", dict(train=120, test=12, pairs=2))
    for name in ("PROBE_STEPS", "ROOM_PAIRS", "UNSEEN_PAIRS", "PEOPLE", "UNSEEN_PEOPLE"):
        monkeypatch.setattr(evaluation, name, 2)
    (run_folder / "classes.dune-index").unlink(missing_ok=True)
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if disk == "read-only":
        out.write_text("a file, where a folder would have to be made")
    elif disk == "a folder in the way":
        for name in ("checkpoint.pt", "sheet.png", "x.json", "x.png"):
            (out / name / "inside").mkdir(parents=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # semaphores are files of 32 bytes
    try:
        found = one_line(lambda: COMMANDS[command](run_folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(found, str)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != out and path.name != "log.jsonl"]
    assert not left and not list(run_folder.rglob("*.part"))


def test_a_cache_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_CACHE", "/dev/null/cache")
    monkeypatch.setattr(teachers, "make_specialist", reached)
    found = one_line(lambda: train.main(["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "run")]))
    assert "cannot write /dev/null/cache" in found


# ---- The way out

def outcome(action, tmp_path, encoding="utf-8"):
    """(exit code, what it printed to stderr) of dune.run(action) in a process of its own."""
    pid = os.fork()
    if not pid:
        with open(tmp_path / "err", "w") as file:
            os.dup2(file.fileno(), 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, io.TextIOWrapper(open(number, "wb", 0), encoding, write_through=True))
        try:
            dune.run(action)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            code = 1
        os._exit(code or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (tmp_path / "err").read_bytes().decode(encoding)


def bar_and_oops():
    bar = tqdm(total=10)
    bar.update(3)
    raise dune.Oops("several\nlines, \x1b[31m colours and ±")


@pytest.mark.parametrize("action, code, words", [
    (bar_and_oops, 2, "several lines, ?[31m colours and ?"),
    (lambda: open("/nowhere/at/all"), 2, "/nowhere/at/all"),
    (lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")), 2, "No space left"),
    (lambda: (_ for _ in ()).throw(MemoryError()), 2, "not enough memory"),
    (lambda: torch.empty(2**55), 2, "not enough memory"),
    (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), 130, "interrupted"),
    (lambda: (_ for _ in ()).throw(BrokenPipeError()), 0, ""),
    (lambda: print("±"), 0, ""),
    (lambda: 1 / 0, 1, ""),  # a defect of ours stays one
])
def test_the_way_out(action, code, words, tmp_path):
    got, text = outcome(action, tmp_path, "ascii")
    last = text.split("\r")[-1]
    assert got == code and words in last and last.count("\n") <= 1
