"""The loop: it learns, resumes to the last bit, several processes are one, mistakes are one line."""

import functools
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dune
import teachers
import train

ROOT = os.path.dirname(os.path.abspath(dune.__file__))
NAMES = ["dinov2", "mast3r", "multihmr"]
SMALL = ("--arch tiny --image-size 56 --batch 12 --lr 1e-2 --layer-scale 0 --log-every 1 --eval-every 1000 "
         "--workers 0 --device cpu --dtype fp32 --compile no ")


@pytest.fixture(scope="session")
def argv(tmp_path_factory, golden):
    """argv(out, options): arguments of a small run: a few images, three teachers in published layouts."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "images").mkdir()
    for seed in range(8):
        Image.fromarray(data.SCENES["objects"](seed, 64)["image"]).save(folder / f"images/{seed}.png")
    words = SMALL
    for name, fixture in zip(NAMES, ("dinov2_reg", "mast3r", "multihmr")):
        torch.save(golden(fixture)["checkpoint"], folder / name)
        images = f"{name}={folder}/images"
        words += f"--weights {name}={folder}/{name} --data {images} --val {images} "
    return lambda out, options="": f"{words}--out {out} {options}".split()


def log_lines(folder):
    return [line for line in train.read_log(folder) if "held_out" not in line]


def losses(folder):
    return [[line["loss"]] + [line[name]["loss"] for name in NAMES] for line in log_lines(folder)]


def load_model(folder):
    return dune.load_checkpoint(f"{folder}/checkpoint.pt")["model"]


# ---- Several processes

FORKS = multiprocessing.get_context("forkserver")  # torch is imported once, before the processes part
FORKS.set_forkserver_preload(["train", "torch._dynamo"])


def run_process(rank, world, port, output, main, argv):
    """One process of a run, in the environment that torchrun gives it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.run_main(functools.partial(main, argv))


def start(world, output, argv, main=train.main):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        processes.append(FORKS.Process(target=run_process, args=(rank, world, port, output, main, argv)))
        processes[-1].start()
    return processes


def end(processes, output):
    """(exit codes, what all processes printed)."""
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs must not keep pytest from ending
    return codes, output.read_text()


def wait_for(condition):
    deadline = time.time() + 300
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("world, options, own_options", [
    (1, "--sharing own+generic", "--accumulate 4"),
    (2, "--sharing own", "--accumulate 2"),
    (4, "", ""),
    (2, "--optimizer muon --image-size 28,56", "--accumulate 2"),
])
def test_several_processes_and_micro_batches_are_one(world, options, own_options, argv, tmp_path):
    options += " --steps 10"
    train.main(argv(tmp_path / "one", options))
    processes = start(world, tmp_path / "output", argv(tmp_path / "several", f"{options} {own_options}"))
    codes, text = end(processes, tmp_path / "output")
    assert codes == [0] * world, text
    one, several = torch.tensor([losses(tmp_path / name) for name in ("one", "several")])
    torch.testing.assert_close(several, one, rtol=1e-4, atol=0)


def test_sigterm_ends_all_processes_with_a_checkpoint_and_exit_code_0(argv, tmp_path):
    processes = start(2, tmp_path / "output", argv(tmp_path, "--steps 100000"))
    wait_for(lambda: log_lines(tmp_path))
    os.kill(processes[1].pid, signal.SIGTERM)  # one is told, both stop
    codes, text = end(processes, tmp_path / "output")
    assert codes == [0, 0] and "the same command continues" in text, text
    assert dune.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == len(log_lines(tmp_path))


def test_a_mistake_of_several_processes_is_told_once(argv, tmp_path):
    mistakes = {"--batch 13": "--batch 13 must be divisible by 2 processes",
                "--weights dinov2=/no.pth": "no such file: /no.pth"}
    for options, message in mistakes.items():
        output = tmp_path / options[2:5]
        codes, text = end(start(2, output, argv(tmp_path, options)), output)
        assert codes == [2, 2] and text.count(message) == 1 and "Traceback" not in text, text


def test_a_killed_worker_starts_again_and_the_run_is_the_undisturbed_one(argv, tmp_path):
    options = "--steps 14 --save-every 5"
    undisturbed = start(2, tmp_path / "output", argv(tmp_path / "whole", options))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1",
                "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "train.py"]
    with subprocess.Popen([*torchrun, *argv(tmp_path / "killed", options)], cwd=ROOT) as run:
        wait_for(lambda: len(log_lines(tmp_path / "killed")) >= 7)
        workers = subprocess.check_output(["pgrep", "-P", str(run.pid)], text=True).split()
        os.kill(int(workers[1]), signal.SIGKILL)
    assert end(undisturbed, tmp_path / "output")[0] == [0, 0] and run.returncode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_another_machine_changes_nothing_in_a_run(argv, tmp_path, monkeypatch, capsys):
    """Batch, steps and dtype stay, unless the option is given. A process with one image gets no warning."""
    left_to_the_machine = "--steps 0 --epochs 1 --epoch-images 3 --dtype auto"
    bf16 = not teachers.fast_bf16("cpu")
    monkeypatch.setattr(train, "fast_bf16", lambda device: bf16)
    monkeypatch.setattr(train.StopSignal, "requested", lambda self, step: True)
    train.main(argv(tmp_path, f"{left_to_the_machine} --batch 2"))
    assert "stopped at step 1 of 2" in capsys.readouterr().out
    with pytest.raises(dune.UserError, match="was trained with --batch 2, not 4"):
        train.main(argv(tmp_path, f"{left_to_the_machine} --batch 4"))
    command = argv(tmp_path, f"{left_to_the_machine} --batch 0")
    codes, text = end(start(2, tmp_path / "output", command), tmp_path / "output")
    dtype = "bf16" if bf16 else "fp32"
    config = f"2 steps of 2 images at 56 px (32 patch tokens a step), 2 process(es) on cpu, {dtype}"
    assert codes == [0, 0] and config in text, text
    assert "Warning" not in text and len(log_lines(tmp_path)) == 2, text


def test_a_second_run_in_a_folder_is_told_and_a_killed_one_does_not_keep_it(argv, tmp_path, monkeypatch):
    options = "--steps 100000 --save-every 1"
    first = start(1, tmp_path / "first", argv(tmp_path / "run", f"{options} --workers 2"))
    wait_for(lambda: log_lines(tmp_path / "run"))
    codes, text = end(start(2, tmp_path / "second", argv(tmp_path / "run", options)), tmp_path / "second")
    assert codes == [2, 2] and text.count("another run is writing to") == 1 == text.count("\n"), text
    workers = subprocess.check_output(["pgrep", "-P", str(first[0].pid)], text=True).split()
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)  # they outlive the run, with its files open
    first[0].kill()
    first[0].join()
    monkeypatch.setattr(train.StopSignal, "requested", lambda self, step: True)
    try:
        train.main(argv(tmp_path / "run", options))
    finally:
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)


class Sent(TorchDispatchMode):
    """Counts the numbers that this process gives to collectives."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            given = [args[1]] if "allgather" in function.name() else args[0]
            self.count += sum(x.numel() for x in given)
        return function(*args, **(kwargs or {}))


def count_what_is_sent(argv):
    """A run of four steps, of which the last one is counted; DDP agrees on its buckets in the second one."""
    step = train.train_step

    def counted(args, number, *rest):
        with Sent() as sent:
            metrics = step(args, number, *rest)
        if number == 3:
            print(f"sent {sent.count} numbers")
        return metrics

    train.train_step = counted
    train.main(argv)


def test_a_step_sends_the_statistics_one_number_and_the_gradients(argv, tmp_path):
    arguments = argv(tmp_path, "--steps 4")
    codes, text = end(start(2, tmp_path / "output", arguments, count_what_is_sent), tmp_path / "output")
    model = dune.load(tmp_path / "checkpoint.pt")
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stats = [module for module in model.modules() if isinstance(module, dune.RunningStats)]
    statistics = sum(2 * len(x.mean) + 1 for x in stats)
    assert codes == [0, 0] and text.count(f"sent {statistics + 1 + gradients} numbers") == 2, text


# ---- One process

def test_a_run_learns_and_leaves_its_files(argv, tmp_path, capsys):
    train.main(argv(tmp_path, "--steps 40 --warmup 0.1 --log-every 5 --eval-every 10 --beta2 0.98"))
    text = capsys.readouterr().out
    for name in ("checkpoint.pt", "log.jsonl", "plot.png", "pca.png"):
        assert f"{tmp_path}/{name}" in text and (tmp_path / name).stat().st_size > 1000
    for line in text.splitlines():
        if line.startswith(tuple(NAMES)):
            _, first, last = line.split()
            assert float(last) < 0.97 * float(first), line
    held_out = [line for line in train.read_log(tmp_path) if "held_out" in line]
    assert [line["step"] for line in held_out] == [0, 10, 20, 30, 40]
    last = log_lines(tmp_path)[-1]
    assert last["step"] == 40 and {"lr", "images_per_s", "grad_norm", "skipped"} < set(last)
    assert {"cls_cos", "cls_smooth_l1", "patch_cos", "patch_smooth_l1", "loss"} == set(last["dinov2"])
    recipe = dune.load(tmp_path / "checkpoint.pt").recipe
    assert set(recipe) == set(train.RECIPE) and recipe["beta2"] == 0.98
    (tmp_path / "plot.png").unlink()
    train.main(["--plot", str(tmp_path)])
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("own_options", ["--drop-path 0.2 --sharing own+generic", "--optimizer muon",
                                         "--image-size 28,56,84"])
def test_a_run_stopped_twice_is_the_undisturbed_run_to_the_last_bit(own_options, argv, tmp_path, monkeypatch):
    options = f"--steps 6 {own_options}"
    train.main(argv(tmp_path / "whole", options))
    for stop in (2, 4, 6):
        monkeypatch.setattr(train.StopSignal, "requested", lambda self, step: step == stop)
        train.main(argv(tmp_path / "parts", options))
        assert log_lines(tmp_path / "parts")[-1]["step"] == stop
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = load_model(tmp_path / "whole"), load_model(tmp_path / "parts")
    assert all(parts[key].equal(x) for key, x in whole.items())
    content = dune.load_checkpoint(tmp_path / "parts/checkpoint.pt")
    rates = [group["lr"] for group in content["optimizer"]["param_groups"]]
    assert rates[1:] == ([rates[0], 2 * rates[0]] if "muon" in own_options else rates[:1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_are_not_finite_are_skipped_and_ten_end_the_run(optimizer, argv, tmp_path, monkeypatch):
    update_norms = dune.update_norms
    poisoned = [False, True, False, False] + 2 * [False] + 10 * [True]  # steps of both runs

    def poison(norms, features, momentum):
        if poisoned.pop(0):
            features["dinov2"]["cls"] *= math.nan
        return update_norms(norms, features, momentum)

    monkeypatch.setattr(dune, "update_norms", poison)
    train.main(argv(tmp_path / "a", f"--steps 4 --optimizer {optimizer}"))
    assert [line["skipped"] for line in log_lines(tmp_path / "a")] == [0, 1, 0, 0]
    assert all(x.isfinite().all() for x in load_model(tmp_path / "a").values())
    with pytest.raises(dune.UserError, match="not finite for ten steps until step 12 .losses: dinov2 nan"):
        train.main(argv(tmp_path / "b", "--steps 50"))


def test_a_run_of_several_sizes_tells_each(argv, tmp_path, capsys):
    train.main(argv(tmp_path, "--steps 6 --image-size 28,56,84 --log-every 1"))
    text = capsys.readouterr().out
    assert "12 images at 28,56,84 px (48 or 192 or 432 patch tokens a step)" in text
    rows = re.findall(r"(\d+) px +\d.\d+ +\d.\d+", text)
    assert rows == 3 * ["28"] + 3 * ["56"] + 3 * ["84"], text
    with pytest.raises(dune.UserError, match="was trained with --image-size 28,56,84, not 28,84"):
        train.main(argv(tmp_path, "--steps 6 --image-size 28,84"))
    assert dune.load(tmp_path / "checkpoint.pt").encoder.grid == 6


def test_runs_from_before_newer_options_are_continued(argv, tmp_path):
    train.main(argv(tmp_path, "--steps 1"))
    checkpoint = dune.load_checkpoint(tmp_path / "checkpoint.pt")
    del checkpoint["args"]["optimizer"], checkpoint["args"]["muon_lr"]
    checkpoint["args"]["image_size"] = 56
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    train.main(argv(tmp_path, "--steps 1"))
    with pytest.raises(dune.UserError, match="was trained with --optimizer adamw, not muon"):
        train.main(argv(tmp_path, "--steps 1 --optimizer muon"))


# ---- Checkpoints

def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(argv, tmp_path, monkeypatch, capsys):
    save = train.save_checkpoint

    def full(*args):
        raise OSError(28, "No space left on device")

    def save_once(*args):
        save(*args)
        monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr(train, "save_checkpoint", save_once)
    with pytest.raises(SystemExit) as leaving:
        train.run_main(lambda: train.main(argv(tmp_path, "--steps 4 --save-every 2")))
    text = capsys.readouterr().err
    assert leaving.value.code == 2 and len(re.findall("error: .*No space left", text)) == 1, text
    assert dune.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "lock", "log.jsonl"]


def save_until_killed(path, written):
    recipe = dict.fromkeys(train.RECIPE)
    args = Namespace(**recipe, checkpoint=path, weights={}, images="")
    model = torch.nn.Linear(1, 30_000)
    for step in range(10**6):
        model.weight.data.fill_(step)
        train.save_checkpoint(args, 0, step, model, torch.optim.SGD(model.parameters()), {})
        written.value = step


def test_killed_while_saving_there_is_always_a_whole_checkpoint(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    for attempt in range(20):
        written = FORKS.Value("q", -1, lock=False)
        process = FORKS.Process(target=save_until_killed, args=(path, written))
        process.start()
        wait_for(lambda: written.value >= 0)
        time.sleep(0.0017 * attempt)
        process.kill()
        process.join()
        content = dune.load_checkpoint(path)
        assert content["step"] >= written.value and content["model"]["weight"].eq(content["step"]).all()


def test_a_run_with_another_recipe_is_not_continued(argv, tmp_path):
    train.main(argv(tmp_path, "--steps 1"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(dune.UserError, match="was trained with --projector tp, not sp: use another --out"):
        train.main(argv(tmp_path, "--steps 1 --projector sp"))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_resumed_run_has_the_same_teachers_and_tells_of_other_data(argv, tmp_path, capsys):
    words = argv(tmp_path / "run", "--steps 1")
    path = next(word for word in words if word.startswith("dinov2=")).partition("=")[2]
    train.main(words)
    assert f"teacher dinov2: {path}\n" in capsys.readouterr().out
    content = dune.load_checkpoint(path)
    torch.save(content, tmp_path / "same")
    train.main([*words, "--weights", f"dinov2={tmp_path}/same", "--data", "mast3r=scenes:rooms:0-9"])
    line, = re.findall("data: not as before.*\n", capsys.readouterr().out)
    assert line.count("mast3r: 8 images") == line.count("mast3r: 17 images") == 1
    content["norm.weight"][3] += 1e-3
    torch.save(content, tmp_path / "other")
    other = [*words, "--weights", f"dinov2={tmp_path}/other"]
    with pytest.raises(dune.UserError, match="another dinov2 than .*/other: give it by --weights"):
        train.main(other)
    checkpoint = dune.load_checkpoint(tmp_path / "run/checkpoint.pt")
    del checkpoint["fingerprints"], checkpoint["images"]  # as of a run of before
    torch.save(checkpoint, tmp_path / "run/checkpoint.pt")
    train.main(other)
    exact, bf16 = (teachers.load_teacher("dinov2", path, dtype=x) for x in (torch.float32, torch.bfloat16))
    assert exact.fingerprint == bf16.fingerprint


def test_stage_two_starts_from_stage_one_at_another_size(argv, tmp_path):
    with pytest.raises(dune.UserError, match="no such file: /nowhere.pt"):  # told before teachers are loaded
        train.main(argv(tmp_path, "--init /nowhere.pt --weights dinov2=/none.pth"))
    train.main(argv(tmp_path / "1", "--steps 2"))
    options = f"--preset stage2 --steps 1 --lr 1e-12 --image-size 84 --init {tmp_path}/1/checkpoint.pt"
    train.main(argv(tmp_path / "2", options))
    one, two = (dune.load(tmp_path / stage / "checkpoint.pt") for stage in "12")
    assert two.encoder.grid == 6 and one.encoder.grid == 4
    one.encoder.position = "size"  # as stage 2 resizes the positions, once
    images = torch.randn(1, 3, 84, 84)
    for name in NAMES:
        torch.testing.assert_close(one(images)[name], two(images)[name], rtol=1e-3, atol=1e-3)


def test_the_preset_of_unic_and_mixed_patch_sizes(argv, tmp_path, golden):
    weights = ""
    for name in ("dino", "deit3", "dbotft", "ibot"):
        content = golden("unic_dino" if name == "ibot" else f"unic_{name}")["checkpoint"]
        torch.save({"state_dict": content} if name == "ibot" else content, tmp_path / name)
        weights += f"--weights {name}={tmp_path / name} "
    small = "--arch tiny --image-size 64 --batch 8 --workers 0 --device cpu --steps 2 --lr 1e-2"
    train.main(f"--preset unic {small} {weights} --out {tmp_path / 'unic'}".split())
    model = dune.load(tmp_path / "unic" / "checkpoint.pt")
    assert list(model.projectors) == ["dino", "deit3", "ibot", "dbotft"]
    assert isinstance(model.projectors["dino"], dune.LadderProjector)
    assert model.teacher_norms["dino"].style == "unic" and model.encoder.register_tokens is None
    mixed = f"--steps 1 --teachers deit3,dinov2,mast3r,multihmr --weights deit3={tmp_path}/deit3"
    train.main(argv(tmp_path / "mixed", f"{mixed} --data scenes:rooms:0-9 --val scenes:rooms"))
    assert all(math.isfinite(line["deit3"]["loss"]) for line in log_lines(tmp_path / "mixed"))


@pytest.mark.parametrize("registers", [0, 2])
def test_a_student_starts_as_a_teachers_encoder(registers, argv, tmp_path, monkeypatch):
    """At another image size, and with registers of its own if the encoder has none."""
    options = f"--arch multihmr --layer-scale 1 --registers {registers} --lr 1e-12 --steps 1"
    arguments = argv(tmp_path, options)
    file = next(word for word in arguments if word.startswith("multihmr=")).partition("=")[2]
    source = teachers.load_teacher("multihmr", file).vit
    shape = dict(embed_dim=source.embed_dim, depth=len(source.blocks), num_heads=source.num_heads)
    monkeypatch.setitem(dune.SIZES, "multihmr", shape)
    train.main([*arguments, "--init", "multihmr"])
    student = dune.load(tmp_path / "checkpoint.pt").encoder
    assert student.grid == 4 != source.grid and student.registers == registers
    source.position = "size"
    images = torch.randn(1, 3, 56, 56)
    expected = source(images)["patch"]
    error = (student(images)["patch"] - expected).norm() / expected.norm()
    assert error < (0.5 if registers else 1e-4)
    with pytest.raises(dune.UserError, match="mast3r is of --arch multihmr"):
        train.main([*argv(tmp_path / "other", "--steps 1"), "--init", "mast3r"])


# ---- Other commands, mistakes

def test_bench_counts_what_runs(argv, tmp_path, monkeypatch, capsys):
    """Under --sharing own a teacher runs on a third of the images; of several sizes a step of each counts."""
    counters = []

    def counter(**options):
        counters.append(FlopCounterMode(**options))
        return counters[-1]

    FlopCounterMode = train.FlopCounterMode
    monkeypatch.setattr(train, "FlopCounterMode", counter)
    for options in ("--sharing all", "--sharing own", "--image-size 28,56"):
        train.main(argv(tmp_path / "out", f"--bench 1 {options}"))
        assert "images/s" in (text := capsys.readouterr().out) and "(MFU)" in text
    flops = [x.get_total_flops() for x in counters]
    assert 0.3 < flops[1] / flops[0] < 0.9 and 1.1 < flops[2] / flops[0] < 1.4
    assert not (tmp_path / "out").exists()


def test_lists_and_samples(argv, tmp_path, capsys):
    train.main(["--list-teachers"])
    text = capsys.readouterr().out
    assert all(name in text for name in teachers.TEACHERS)
    train.main(argv(tmp_path / "out", f"--show-data {tmp_path}/samples.png"))
    assert os.listdir(tmp_path) == ["samples.png"]


@pytest.mark.parametrize("options, message", [
    ("--teachers dinov2,dinov9", "unknown or repeated teacher 'dinov9'"),
    ("--image-size 100", "--image-size 100: write a multiple of the patch size 14, up to 4096"),
    ("--image-size 56,84,56", "--image-size 56,84,56: write a multiple"),
    ("--image-size 56,", "--image-size 56,: write a multiple"),
    ("--arch huge", "argument --arch: invalid choice: 'huge'"),
    ("--arch odd", "--arch odd: embed_dim must be 64 * num_heads"),
    ("--drop 1.5", "argument --drop: '1.5' is not float from 0 to 1"),
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--steps many", "argument --steps: 'many' is not int"),
    ("--teachers dinov2 --data dinov2=/nowhere", "/nowhere"),
    ("--data dinov2=scenes:rooms", "no --data for teacher mast3r"),
    ("--data mast3r=. --teachers dinov2", "--data names mast3r"),
    ("--weights dinov2=/nowhere.pth", "no such file: /nowhere.pth"),
    ("--weights /file.pth", "write TEACHER=FILE"),
    ("--preset stage2", "--preset stage2 requires --init"),
    ("--preset tiny --teachers dino", "no tiny teacher for dino"),
    ("--out /proc/nowhere", "/proc/nowhere"),
    ("--accumulate 1000", "change their number, --batch or --accumulate"),
    ("--plot /nowhere", "no log.jsonl with losses of a run in /nowhere"),
])
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dune.SIZES, "odd", dict(embed_dim=96, depth=1, num_heads=3))
    with pytest.raises(SystemExit) as leaving:
        train.run_main(lambda: train.main([*options.split(), "--device", "cpu"]))
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("*.pt"))


def test_tasks_of_srun_are_told_how_to_start(argv, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(dune.UserError, match="srun --ntasks-per-node=1 torchrun"):
        train.main(argv(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun's, or separate runs
    train.main(argv(tmp_path, "--steps 1"))
