"""The loop: it learns, resumes to the last bit, several processes are one, no step waits, mistakes are one line."""
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dune
import teachers as zoo
import train

ROOT = os.path.dirname(os.path.abspath(dune.__file__))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Three small teachers in the published layouts, as --weights arguments."""
    folder, args = tmp_path_factory.mktemp("weights"), []
    for name, fixture in (("dinov2", "dinov2_reg"), ("mast3r", "mast3r"), ("multihmr", "multihmr")):
        file = dune.read_checkpoint(os.path.join(ROOT, "tests", "golden", f"{fixture}.pt"))
        torch.save(file["checkpoint"], folder / f"{name}.pth")
        args += ["--weights", f"{name}={folder / name}.pth"]
    return args


SMALL = ("--arch tiny --image-size 56 --batch 12 --lr 1e-2 --layer-scale 0 --log-every 1 --workers 0 "
         "--device cpu --dtype fp32 --compile no").split()


def log_of(folder):
    with open(folder / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def losses(folder):
    return [[line["loss"]] + [line[t]["loss"] for t in ("dinov2", "mast3r", "multihmr")] for line in log_of(folder)]


def torchrun(processes, *args, restarts=0, script="train.py"):
    options = [f"--nproc_per_node={processes}", f"--max-restarts={restarts}", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers_of(run):
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(run, ready):
    while not ready():
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(0.05)


def test_a_run_learns_and_leaves_what_it_says(weights, tmp_path, capsys):
    options = "--steps 40 --warmup 0.1 --log-every 5 --keep 2 --save-every 15".split()
    train.main([*SMALL, *weights, *options, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "procedural scenes" in text
    for name in ("checkpoint.pt", "log.jsonl", "pca.png"):
        assert str(tmp_path / name) in text and (tmp_path / name).stat().st_size > 1000
    for line in text.splitlines():
        if line.startswith(("dinov2 ", "mast3r ", "multihmr ")):
            _, before, after = line.split()
            assert float(after) < 0.97 * float(before), line
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000030.pt", "checkpoint-00000040.pt"]
    last = log_of(tmp_path)[-1]
    assert last["step"] == 40 and last["images"] == 480 and last["skipped"] == 0 and last["bad_images"] == 0
    assert set(last["dinov2"]) == {"cls_cos", "cls_sl1", "patch_cos", "patch_sl1", "share", "loss"}
    assert sum(last[t]["share"] for t in ("dinov2", "mast3r", "multihmr")) == pytest.approx(1)
    assert {"lr", "momentum", "grad_norm", "images_per_s", "data_wait", "memory_gb"} <= set(last)
    assert isinstance(dune.load(tmp_path / "checkpoint.pt"), dune.DUNE)
    train.main(["--plot", str(tmp_path)])
    assert (tmp_path / "plot.png").exists()


def test_a_run_stopped_twice_is_the_undisturbed_run_to_the_last_bit(weights, tmp_path, monkeypatch):
    args = [*SMALL, *weights, "--steps", "6", "--drop-path", "0.2", "--sharing", "own+generic"]
    train.main([*args, "--out", str(tmp_path / "whole")])
    asked = train.Processes.stop_asked
    for stop_at in (2, 4):  # as a signal would
        count = iter(range(100))
        monkeypatch.setattr(train.Processes, "stop_asked", lambda self: next(count) == 1)
        train.main([*args, "--out", str(tmp_path / "parts")])
        assert log_of(tmp_path / "parts")[-1]["step"] == stop_at
    monkeypatch.setattr(train.Processes, "stop_asked", asked)
    train.main([*args, "--out", str(tmp_path / "parts")])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    a, b = (dune.read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("options", [[], ["--sharing", "own", "--accumulate", "3"]])
def test_several_processes_and_parts_are_one(options, weights, tmp_path):
    """The same global batch gives the same losses on 1, 2 and 4 processes, and with --accumulate."""
    common = [*SMALL, *weights, "--steps", "20"]
    train.main([*common, *options[:2], "--out", str(tmp_path / "1")])
    runs = {n: torchrun(n, *common, *options, "--out", tmp_path / str(n)) for n in (2, 4)}
    for n, run in runs.items():
        text, _ = run.communicate(timeout=300)
        assert run.returncode == 0, text[-3000:]
        several, one = (torch.tensor(losses(tmp_path / name)) for name in (str(n), "1"))
        torch.testing.assert_close(several, one, rtol=1e-4, atol=0)


def test_gradients_sent_in_bf16_leave_the_losses_alone(weights, tmp_path):
    for n, options in enumerate(([], ["--compress"])):
        run = torchrun(2, *SMALL, *weights, *options, "--steps", "30", "--out", tmp_path / str(n))
        assert not run.wait(120), run.communicate()[0][-3000:]
    plain, compressed = (torch.tensor(losses(tmp_path / n)) for n in "01")
    assert not torch.equal(plain, compressed)
    torch.testing.assert_close(compressed, plain, rtol=1e-2, atol=0)


def test_sigterm_ends_all_processes_with_a_checkpoint_and_exit_code_0(weights, tmp_path):
    run = torchrun(2, *SMALL, *weights, "--steps", "100000", "--out", tmp_path)
    wait_for(run, lambda: (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").read_text())
    os.kill(workers_of(run)[0], signal.SIGUSR1)  # one is told, both stop
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "the same command continues" in text, text[-3000:]
    assert dune.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == log_of(tmp_path)[-1]["step"]


def test_processes_meet_in_a_store_that_remembers_dead_ones(monkeypatch):
    """Each start of two processes meets by itself, whoever comes first, whatever earlier starts have left."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(train.dist, "rendezvous", lambda url: iter([(store, None, 2)]))
    for start, late in enumerate((0, 1, 1, 0)):
        met = {}

        def meet(rank):
            time.sleep(0.2 * (rank == late))
            met[rank] = train.fresh_store(rank)
        threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert set(met) == {0, 1}, f"start {start}: only {list(met)} came through"
        assert not met[0].check(["address"])  # what the last start wrote
        met[0].set("address", str(start))
        assert met[1].get("address") == str(start).encode()


def test_killed_workers_are_started_again_and_the_run_is_the_undisturbed_one(weights, tmp_path):
    common = [*SMALL, *weights, "--steps", "24", "--save-every", "5"]
    whole = torchrun(2, *common, "--out", tmp_path / "whole")
    assert not whole.wait(120), whole.communicate()[0][-3000:]
    run = torchrun(2, *common, "--out", tmp_path / "killed", restarts=3)
    log = tmp_path / "killed" / "log.jsonl"
    wait_for(run, lambda: log.exists() and log.read_text().count("\n") >= 8)
    first = workers_of(run)
    os.kill(first[1], signal.SIGKILL)                                            # in the middle of a step
    wait_for(run, lambda: len(set(workers_of(run)) - set(first)) == 2)
    second = set(workers_of(run)) - set(first)
    os.kill(max(second), signal.SIGKILL)                                         # before it has begun
    wait_for(run, lambda: len(set(workers_of(run)) - set(first) - second) == 2)
    time.sleep(3)
    os.kill(min(set(workers_of(run)) - set(first) - second), signal.SIGKILL)     # while they meet, or a little later
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 0, text[-3000:]
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, 25))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


COUNT = """
import sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import train
names = "all_reduce", "all_gather_into_tensor", "broadcast", "all_gather", "reduce_scatter_tensor"
sent, inner = 0, {name: getattr(dist, name) for name in names}
def counting(name):
    def collective(*args, **options):
        global sent
        sent += args[-1 if name == "all_gather_into_tensor" else 0].numel()
        return inner[name](*args, **options)
    return collective
for name in inner:
    setattr(dist, name, counting(name))
train.main(sys.argv[3:])
if train.os.environ["RANK"] == "0":
    open(sys.argv[2], "w").write(str(sent))
"""


def test_a_step_sends_the_statistics_and_two_numbers_besides_the_gradients(weights, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    for steps in (2, 6):
        options = "--log-every", 100, "--steps", steps, "--out", tmp_path / str(steps)
        run = torchrun(2, ROOT, tmp_path / f"sent-{steps}", *SMALL, *weights, *options, script=tmp_path / "count.py")
        assert not run.wait(120), run.communicate()[0][-3000:]
    model = dune.load(tmp_path / "6" / "checkpoint.pt")
    statistics = sum(2 * len(part.mean) + 1 for part in model.modules() if isinstance(part, dune.Stats))
    sent = [int((tmp_path / f"sent-{steps}").read_text()) for steps in (2, 6)]
    assert (sent[1] - sent[0]) / 4 == statistics + 2  # how many losses count, and whether somebody was told to stop


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a value, and what needs values to know its shape."""
    operators = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.operators
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device_but_the_log_step(weights, tmp_path):
    """Six more steps read no value and ask for no shape that depends on values."""
    counts = {}
    for steps in (3, 9):
        options = "--workers", "1", "--log-every", "1000", "--steps", str(steps), "--out", str(tmp_path / str(steps))
        with Waits() as waits:
            train.main([*SMALL, *weights, *options])
        counts[steps] = waits.count
    assert counts[9] == counts[3] > 0


def test_a_step_that_is_not_finite_is_skipped_and_ten_stop_the_run(weights, tmp_path, monkeypatch):
    original, poisoned = train.dune.update_norms, {2}

    def poison(norms, features, momentum):  # after the teachers, before anything is made of what they say
        poison.calls += 1
        if poison.calls in poisoned:
            features["dinov2"]["cls"] *= math.nan
        return original(norms, features, momentum)
    poison.calls = 0
    monkeypatch.setattr(train.dune, "update_norms", poison)
    train.main([*SMALL, *weights, "--steps", "4", "--out", str(tmp_path / "a")])
    assert [line["skipped"] for line in log_of(tmp_path / "a")] == [0, 1, 1, 1]
    assert all(x.isfinite().all() for x in dune.read_checkpoint(tmp_path / "a" / "checkpoint.pt")["model"].values())
    poison.calls, poisoned = 0, set(range(3, 100))
    with pytest.raises(dune.Oops, match="not finite for 10 steps until step 12 .dinov2, cls tokens"):
        train.main([*SMALL, *weights, "--steps", "50", "--out", str(tmp_path / "b")])


def test_a_full_disk_is_told_and_the_older_checkpoint_stays(tmp_path, monkeypatch):
    path = str(tmp_path / "checkpoint.pt")
    train.save(path, {"step": 1})

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(dune.Oops, match="No space left"):
        train.save(path, {"step": 2})
    assert dune.read_checkpoint(path) == {"step": 1} and os.listdir(tmp_path) == ["checkpoint.pt"]


def save_for_ever(path, written):
    for step in range(1, 10**6):
        train.save(path, {"step": step, "model": torch.full((30_000,), step)}, keep=2)
        written.value = step


def test_killed_while_saving_there_is_always_one_that_loads(tmp_path):
    path, fork = tmp_path / "checkpoint.pt", multiprocessing.get_context("fork")
    for attempt in range(50):
        written = fork.RawValue("q", 0)  # without a lock: it would die with who holds it
        process = fork.Process(target=save_for_ever, args=(str(path), written))
        process.start()
        while not written.value:
            time.sleep(0.001)
        time.sleep(0.0007 * attempt)
        process.kill()
        process.join()
        for found in tmp_path.glob("checkpoint*.pt"):
            file = dune.read_checkpoint(found)
            assert file["model"].eq(file["step"]).all()
        assert dune.read_checkpoint(path)["step"] >= written.value


@pytest.mark.parametrize("args, message", [
    ("--teachers dinov2,dinov9", "unknown or repeated teacher"),
    ("--image-size 100", "no multiple of the patch size"),
    ("--arch huge", "--arch: 'huge': choose one of tiny"),
    ("--drop 1.5", "--drop: 1.5 is not between 0 and 1"),
    ("--nonsense", "unrecognized arguments"),
    ("--steps many", "invalid int value"),
    ("--teachers dinov2 --data dinov2=/nowhere", "/nowhere"),
    ("--data dinov2=/tmp", "no images for mast3r"),
    ("--data mast3r=/tmp --teachers dinov2", "mast3r"),
    ("--weights dinov2=/nowhere.pth", "no such file: /nowhere.pth"),
    ("--weights /file.pth", "write TEACHER=FILE"),
    ("--preset stage2", "--init"),
    ("--preset tiny --teachers dino", "no specialist for dino"),
    ("--init /nowhere.pt --preset tiny --random-teachers --steps 1", "no such file: /nowhere.pt"),
    ("--out /proc/nowhere", "cannot write /proc/nowhere"),
    ("--accumulate 1000", "--accumulate 1000"),
    ("--plot /nowhere", "log.jsonl"),
])
def test_mistakes_are_one_line(args, message, tmp_path):
    arguments = args.split()
    if "--out" not in arguments and "--plot" not in arguments:
        arguments += ["--out", str(tmp_path)]
    with pytest.raises(dune.Oops, match=message.replace(".", r"\.")) as error:
        train.main([*arguments, "--device", "cpu"])
    assert "\n" not in str(error.value)
    assert not [name for name in os.listdir(tmp_path) if name != "log.jsonl"]


def test_a_mistake_ends_a_script_with_code_2_and_no_traceback():
    done = subprocess.run([sys.executable, "train.py", "--teachers", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown") and done.stderr.count("\n") == 1


def test_a_mistake_of_several_processes_is_told_once_and_ends_them_all(weights, tmp_path):
    for wrong, message in ((["--batch", 13], "--batch 13 does not divide"),
                           (["--weights", "dinov2=/nowhere.pth"], "no such file: /nowhere.pth")):
        run = torchrun(2, *SMALL, *weights, "--out", tmp_path, *wrong)
        text, _ = run.communicate(timeout=60)
        assert run.returncode and text.count("error: ") == text.count(message) == 1, text[-3000:]


def test_a_run_with_other_settings_is_not_continued(weights, tmp_path):
    train.main([*SMALL, *weights, "--steps", "1", "--out", str(tmp_path)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(dune.Oops, match="holds a run with --projector tp, not sp"):
        train.main([*SMALL, *weights, "--steps", "1", "--out", str(tmp_path), "--projector", "sp"])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_stage_two_starts_from_stage_one_at_another_size(weights, tmp_path):
    train.main([*SMALL, *weights, "--steps", "2", "--out", str(tmp_path / "1")])
    options = "--steps", "2", "--lr", "1e-9", "--image-size", "84", "--init", str(tmp_path / "1" / "checkpoint.pt")
    train.main([*SMALL, *weights, *options, "--out", str(tmp_path / "2")])
    one, two = (dune.load(tmp_path / n / "checkpoint.pt") for n in "12")
    assert two.encoder.grid == 6 and one.encoder.grid == 4
    image = torch.randn(1, 3, 84, 84)
    one.encoder.position = "size"  # as stage 2 resizes the positions, once
    torch.testing.assert_close(one.encoder(image)["patch"], two.encoder(image)["patch"], rtol=1e-3, atol=1e-3)


def test_unics_preset_and_mixed_teachers(weights, tmp_path):
    """UNIC's four teachers and ladder, and any teacher beside any other, whatever their patch sizes."""
    args, golden = [], os.path.join(ROOT, "tests", "golden")
    for name in ("dino", "deit3", "dbotft", "ibot"):
        path = os.path.join(golden, f"unic_{'dino' if name == 'ibot' else name}.pt")
        content = dune.read_checkpoint(path)["checkpoint"]
        torch.save({"state_dict": content} if name == "ibot" else content, tmp_path / f"{name}.pth")
        args += ["--weights", f"{name}={tmp_path / name}.pth"]
    small = "--arch tiny --image-size 64 --batch 8 --workers 0 --device cpu --steps 3 --log-every 1 --lr 1e-2".split()
    train.main(["--preset", "unic", *small, *args, "--out", str(tmp_path / "unic")])
    model = dune.load(tmp_path / "unic" / "checkpoint.pt")
    assert list(model.projectors) == ["dino", "deit3", "ibot", "dbotft"] and model.teacher_norms["dino"].style == "unic"
    assert isinstance(model.projectors["dino"], dune.LadderProjector) and model.encoder.register_tokens is None
    mixed = [*weights[:4], "--weights", f"deit3={tmp_path}/deit3.pth", "--teachers", "dinov2,deit3,mast3r"]
    train.main([*SMALL, *mixed, "--steps", "2", "--out", str(tmp_path / "mixed")])
    last = log_of(tmp_path / "mixed")[-1]
    assert all(math.isfinite(last[t]["loss"]) for t in ("dinov2", "deit3", "mast3r"))


@pytest.mark.parametrize("registers", [0, 2])
def test_a_student_starts_as_a_published_encoder(registers, weights, tmp_path, monkeypatch):
    """At another image size, and with registers of its own if the encoder has none."""
    published = zoo.load_teacher("multihmr", weights[-1].split("=")[1]).vit
    shape = dict(embed_dim=published.embed_dim, depth=len(published.blocks), num_heads=published.embed_dim // 64)
    monkeypatch.setitem(dune.SIZES, "published", shape)
    options = ["--arch", "published", "--layer-scale", "1", "--registers", str(registers), "--lr", "1e-12"]
    train.main([*SMALL, *weights, *options, "--init", "multihmr", "--steps", "1", "--out", str(tmp_path)])
    student = dune.load(tmp_path / "checkpoint.pt").encoder
    assert student.grid == 4 != published.grid and student.registers == registers
    image = torch.randn(1, 3, 56, 56)
    published.position = "size"  # the student's positions were resized so
    gap = (student(image)["patch"] - published(image)["patch"]).norm() / published(image)["patch"].norm()
    assert (gap < 1e-4) == (registers == 0) and gap < 0.5
    with pytest.raises(dune.Oops, match="wrong shape for tensor|lacks tensor|unknown tensor"):
        train.main([*SMALL, *weights, "--init", "mast3r", "--steps", "1", "--out", str(tmp_path / "other")])
