"""On a GPU: runs there are the runs on the CPU, a step never waits, what is left on the CPU is an error.

Without a GPU all of this runs in a process of its own on the fake one of fake_gpu.py.
"""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch

import dune
import eval as evaluation
import train
from test_eval import halves, noise, picture
from test_train import argv, losses  # noqa: F401 (argv is a fixture)
from test_two_view import cases, paths  # noqa: F401 (fixtures)

HERE = os.path.dirname(os.path.abspath(__file__))
FAKE = "FAKE_GPU" in os.environ
RUN = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, which asks for CUDA while it is imported
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(FAKE, reason="once is enough")
def test_all_of_this_on_a_fake_gpu(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or torch.version.cuda or torch.version.hip:
        pytest.skip("needs a C++ compiler and a torch that knows no real GPU")
    root = os.path.dirname(torch.__file__)
    library = tmp_path / "fake_cuda.so"
    options = f"-std=c++20 -shared -fPIC -I{root}/include -L{root}/lib -Wl,-rpath,{root}/lib"
    options += " -lc10 -ltorch_cpu"
    subprocess.run([compiler, f"{HERE}/fake_cuda.cpp", *options.split(), "-o", library], check=True)
    command = [sys.executable, "-c", RUN, library, "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FAKE_GPU": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


class NoWaiting(contextlib.ContextDecorator):
    """In here the host must not wait for the device. watch(True) makes it an error."""

    def __init__(self, watch):
        self.watch = watch

    def __enter__(self):
        self.watch(True)

    def __exit__(self, *error):
        self.watch(False)


def watch_cuda(on):
    torch.cuda.set_sync_debug_mode("error" if on else "default")


@pytest.fixture
def gpu(monkeypatch):
    """--device cuda, on which only the lines of the log may wait."""
    with contextlib.ExitStack() as stack:
        if FAKE:
            import fake_gpu
            watch = stack.enter_context(fake_gpu.FakeGpu(monkeypatch)).watch
        elif torch.cuda.is_available():
            watch = watch_cuda
        else:
            pytest.skip("no GPU")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(train, "train_step", NoWaiting(watch)(train.train_step))
        monkeypatch.setattr(train.Log, "add", NoWaiting(watch)(train.Log.add))
        yield


RUNS = {
    "defaults": "",
    "own images, micro-batches": "--sharing own --accumulate 3",
    "UNIC's ladder": "--projector lp --norm unic --clip 0",
    "recompute": "--recompute --projector sp",
    "bf16": "--dtype bf16",
    "Muon, several sizes": "--optimizer muon --image-size 28,56",
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_is_the_run_on_the_cpu(options, argv, gpu, tmp_path):
    options += " --steps 2"
    train.main(argv(tmp_path / "cuda", f"{options} --device cuda"))
    train.main(argv(tmp_path / "cpu", options))
    on_cuda, on_cpu = torch.tensor([losses(tmp_path / device) for device in ("cuda", "cpu")])
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-2 if "bf16" in options else 1e-4, atol=0)


def test_a_run_stopped_and_continued_is_the_undisturbed_run(argv, gpu, tmp_path, monkeypatch):
    options = "--steps 2 --drop-path 0.2 --device cuda"
    train.main(argv(tmp_path / "whole", options))
    for stop in (1, 2):
        monkeypatch.setattr(train.StopSignal, "requested", lambda self, step: step == stop)
        train.main(argv(tmp_path / "parts", options))
    whole, parts = torch.tensor([losses(tmp_path / name) for name in ("whole", "parts")])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=0)


def test_commands_of_eval(argv, gpu, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "STUDY", dict(train=12, test=6, steps=2))
    train.main(argv(".", "--steps 1 --device cuda"))
    for name, values in (("masks", (0, 2)), ("depth", (2000, 6000))):
        halves(tmp_path / name, name, values)
    for name in ("a/1.png", "b/1.png"):
        picture(tmp_path / "classes" / name, noise(0, 56, 70))
    commands = ["loss", "pca", "spectrum", "study --seeds 1", "match classes/a/1.png classes/b/1.png"]
    for command, folder in (("knn", "classes"), ("linear", "classes"), ("seg", "masks"), ("depth", "depth")):
        steps = "" if command == "knn" else "--steps 2"
        commands.append(f"{command} --train {folder} --test {folder} {steps}")
    for command in commands:
        evaluation.main([*command.split(), "--run", ".", "--device", "cuda"])
    weights = f"--weights {paths['mast3r']} --image-size 64"
    evaluation.main(f"two-view classes/a/1.png classes/b/1.png {weights} --device cuda".split())


def left_on_the_cpu(losses, coefficients):
    return losses.sum() + torch.ones(1), coefficients.sum()


def read_on_the_host(losses, coefficients):
    return losses.sum() * losses.sum().item(), coefficients.sum()


def copied_to_the_host(losses, coefficients):
    return losses.sum(), coefficients.cpu().sum()


def asks_how_many(losses, coefficients):
    return losses[coefficients > 0].sum(), coefficients.sum()


@pytest.mark.parametrize("wrong, message", [
    (left_on_the_cpu, "two devices|same device"),
    (read_on_the_host, "needs values|synchronizing"),
    (copied_to_the_host, "waits for its copy|synchronizing"),
    (asks_how_many, "needs values|synchronizing"),
])
def test_what_fails_or_waits_is_seen(wrong, message, argv, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(dune, "weighted_sum", wrong)
    with pytest.raises(RuntimeError, match=message):
        train.main(argv(tmp_path, "--steps 1 --device cuda"))


def test_bf16_is_taken_where_the_gpu_multiplies_it(gpu, monkeypatch):
    """Not where torch emulates it."""
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                            including_emulation or supported)
        assert train.fast_bf16(torch.device("cuda")) == supported
