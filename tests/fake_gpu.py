"""The GPU path, line by line, on a machine without a GPU. Run by test_gpu.py in a process of its own.

Tensors are fake: they have a shape, a type and a device, "cuda" too, and no numbers. Two devices in one operation are
an error, as on a GPU, and so is what makes the host wait for the device where no wait belongs.
"""

import contextlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException, FakeTensor,
                                           FakeTensorMode)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import data
import dune
import eval as evaluation
import kernels
import teachers as zoo
import train

CUDA = torch.device("cuda", 0)

# ---- The fake GPU ----------------------------------------------------------------------------------------------------

class Waits(RuntimeError):
    """The host would wait for the device here."""

class FakeNumbers(FakeTensorMode):
    avoid_device_init = True  # torch.cuda.is_available() is the test's own, there is nothing to initialise

    def __deepcopy__(self, memo):  # a copied tensor brings its mode along
        return self

class Host(TorchDispatchMode):
    """What the host may do: while `strict` nothing that waits for the device; else what it reads is made up."""
    strict = False

    @contextlib.contextmanager
    def at_ease(self):
        strict, self.strict = self.strict, False
        yield
        self.strict = strict

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if self.strict:
                raise Waits(f"{function} needs values") from error
            if function is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].dtype.is_floating_point else 1
            return invented(function, args, kwargs)
        if self.strict and copies_and_waits(args, kwargs, result):
            raise Waits(f"{function} waits for its copy")
        return result

def copies_and_waits(args, kwargs, result):
    devices = {x.device.type for x in pytree.tree_leaves((args, result)) if torch.is_tensor(x) and x.ndim}
    return devices == {"cpu", "cuda"} and not kwargs.get("non_blocking")

def made_up(x):
    """A fake tensor with numbers on the CPU: 1, for integers 0, so that they are good as indices. Else x."""
    if not isinstance(x, FakeTensor):
        return x
    one = x.dtype.is_floating_point or x.dtype == torch.bool
    return torch.full(x.shape, one, dtype=x.dtype)

def invented(function, args, kwargs):
    """The function's result for made-up numbers."""
    def back(x):
        return torch.empty_like(x, device=device) if torch.is_tensor(x) else x
    device = next(x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor))
    with _disable_current_modes():
        result = function(*pytree.tree_map(made_up, args), **pytree.tree_map(made_up, kwargs))
    return pytree.tree_map(back, result)

def apply(module, function, recurse=True):
    """Module.to() by new parameters: fake ones cannot take over another device's content."""
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = torch.nn.Parameter(function(x.detach()), x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = function(x)
    return module

@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU as the only device; returns the Host. What follows is what faking alone breaks."""
    host = Host()

    def real(function):
        """The function among real tensors: files and scenes are read and drawn on the CPU."""
        def run(*args, **options):
            with _disable_current_modes():
                return function(*args, **options)
        return run
    to_numpy, to_file, to_tensor, constant = real(torch.Tensor.numpy), torch.save, torch.tensor, data.constant
    constant.cache_clear()

    def batches(groups, size, batch, *args, train=True, **options):
        """Batches like data.batches', of black images."""
        chance = np.random.default_rng(0)
        batch = batch if train else 6  # a few held-out ones
        while True:
            with _disable_current_modes():
                image = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
                group = torch.arange(batch) % len(groups)
                params = torch.stack([torch.from_numpy(data.draw_colour(chance, float(train))) for _ in image])
            yield {"image": image, "group": group, "params": params, "bad": []}

    def numpy(x):
        assert x.device.type == "cpu", "numpy() of a tensor on the GPU"
        if not isinstance(x, FakeTensor):
            return to_numpy(x)
        return np.ones(x.shape, str(x.dtype).removeprefix("torch."))
    def save(content, file):
        to_file(pytree.tree_map(made_up, content), file)

    def tensor(values, **options):
        """torch.tensor reads tensors among the values past all modes."""
        return to_tensor(pytree.tree_map(lambda x: x.item() if isinstance(x, FakeTensor) else x, values), **options)

    def remembered(*args):
        """data.constant waits, but once in a run."""
        with host.at_ease():
            return constant(*args)
    for name, value in {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
                        "set_device": lambda device: None, "_lazy_init": lambda: None, "synchronize": lambda: None,
                        "manual_seed_all": lambda seed: None, "max_memory_allocated": lambda device: 0,
                        "is_bf16_supported": lambda **options: True}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(data, "batches", batches)
    monkeypatch.setattr(data, "constant", remembered)
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "save", real(save))
    for module, name in ((dune, "read_checkpoint"), (dune, "model_from"), (dune, "load_strictly"),
                         (data, "labelled_scenes"), (zoo, "room_pairs")):
        monkeypatch.setattr(module, name, real(getattr(module, name)))
    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **options: x)
    monkeypatch.setattr(kernels, "_installed", False)  # Triton has no fake GPU: the same in plain PyTorch
    tiny = dict(embed_dim=128, depth=2, num_heads=2)   # the student's size, and that of --random-teachers
    monkeypatch.setitem(dune.SIZES, "tiny", tiny)
    for name, row in zoo.TEACHERS.items():
        shape = {**row.shape, **tiny, "image_size": 126}
        monkeypatch.setitem(zoo.TEACHERS, name, replace(row, shape=shape))
    with FakeNumbers(allow_non_fake_inputs=True), host:
        yield host
    constant.cache_clear()

# ---- Training --------------------------------------------------------------------------------------------------------

SMALL = ("--arch tiny --image-size 56 --batch 12 --steps 2 --random-teachers --workers 0 --device cuda "
         "--dtype fp32 --compile no --log-every 100").split()

@pytest.fixture
def strict(gpu, monkeypatch):
    """Refuses to wait in the steps of training, until the last one's line of the log is due."""
    next_batch, step = train.Log.next, train.Log.step

    def begin(log, batches):
        gpu.strict = True
        return next_batch(log, batches)

    def end(log, done, *args):
        gpu.strict = done < log.args.steps
        return step(log, done, *args)
    monkeypatch.setattr(train.Log, "next", begin)
    monkeypatch.setattr(train.Log, "step", end)
    return gpu

RUNS = {
    "defaults": "",
    "own images": "--sharing own",
    "a teacher without an image": "--sharing own --batch 2",
    "parts": "--sharing own --accumulate 5",
    "UNIC's ladder": "--projector lp --norm unic --drop-path 0.1",
    "recompute": "--recompute --projector sp",
    "bf16": "--dtype bf16",
    "no clipping": "--clip 0",
}

@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run(options, strict, tmp_path):
    train.main([*SMALL, *options.split(), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 2
    assert set(os.listdir(tmp_path)) == {"checkpoint.pt", "log.jsonl", "pca.png"}

def test_a_run_goes_on_where_it_stopped(gpu, tmp_path, monkeypatch):
    arguments = [*SMALL, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Processes, "stop_asked", lambda processes: True)
        train.main(arguments)
    train.main(arguments)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 2

def left_on_the_cpu(losses, coefficients):
    return losses.sum() + torch.ones(1), coefficients.sum()

def read_on_the_host(losses, coefficients):
    return losses.sum() * losses.sum().item(), coefficients.sum()

def copied_to_the_host(losses, coefficients):
    return losses.sum(), coefficients.cpu().sum()

def asks_how_many(losses, coefficients):
    return losses[coefficients > 0].sum(), coefficients.sum()

@pytest.mark.parametrize("wrong, error", [
    (left_on_the_cpu, "at least two devices"),
    (read_on_the_host, "needs values"),
    (asks_how_many, "needs values"),
    (copied_to_the_host, "waits for its copy"),
])
def test_what_would_fail_or_wait_on_a_gpu_is_seen(wrong, error, strict, tmp_path, monkeypatch):
    monkeypatch.setattr(dune, "weighted_sum", wrong)
    with pytest.raises(RuntimeError, match=error):
        train.main([*SMALL, "--out", str(tmp_path)])

# ---- What a GPU is asked ---------------------------------------------------------------------------------------------

class Event:
    """In place of torch.cuda.Event: each takes place 1 ms after the one before."""
    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.time = Event.recorded

    def elapsed_time(self, end):
        return float(end.time - self.time)

@pytest.mark.parametrize("steps", [0, 2])
def test_events_are_recorded_for_bench_alone(steps, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "recorded", 0)
    train.main([*SMALL, "--bench", str(steps), "--out", str(tmp_path)])
    assert bool(Event.recorded) == ("ms/step" in capsys.readouterr().out) == bool(steps)

def test_bf16_is_taken_where_the_gpu_multiplies_it(gpu, monkeypatch):
    """Not where torch emulates it."""
    for supported in (True, False):

        def multiplies(including_emulation=True):
            return including_emulation or supported
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", multiplies)
        assert dune.fast_bf16(CUDA) == supported

def test_processes_on_gpus_talk_by_nccl_and_wait_for_each_other_as_hosts(gpu, monkeypatch):
    """The first one may take long, to fetch weights: all groups are patient."""
    groups = {}

    def group(backend, timeout, **options):
        groups[backend] = timeout.total_seconds()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(train, "fresh_store", lambda rank: None)
    monkeypatch.setattr(train.dist, "init_process_group", group)
    monkeypatch.setattr(train.dist, "new_group", group)
    train.Processes("cuda")
    assert groups.keys() == {"nccl", "gloo"} and min(groups.values()) >= 3600

# ---- Evaluation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["study --seeds 1", "loss", "pca", "two-view --seeds 1 --steps 1",
                                     "people --seeds 1 --steps 1"])
def test_a_command_of_eval(command, gpu, tmp_path, monkeypatch):
    train.main([*SMALL, "--steps", "1", "--teachers", "mast3r", "--out", str(tmp_path)])
    monkeypatch.setattr(evaluation, "STUDY", dict(train=8, test=4, pairs=1))
    for name, few in {"CHUNK": 4, "PROBE_STEPS": 2, "ROOM_PAIRS": 4, "UNSEEN_PAIRS": 1}.items():
        monkeypatch.setattr(evaluation, name, few)
    monkeypatch.setattr(evaluation, "judge_people", lambda *args, pelvis: {"found": 1.0})  # reads an index
    weights = ["--weights=mast3r=random", "--weights=multihmr=random"]
    evaluation.main([*command.split(), "--run", str(tmp_path), *weights, "--device", "cuda"])
