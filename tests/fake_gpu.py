"""The GPU path, line by line, on a machine without a GPU. Run by test_gpu.py in a process of its own.

Tensors are fake: they have a shape, a type and a device, "cuda" too, and no numbers. Two devices in one operation are an
error, as on a GPU, and so is what makes the host wait for the device where no wait belongs.
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

class Host(TorchDispatchMode):
    """What the host may do: while `strict` nothing that waits for the device; else what it reads is ones and zeros."""
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
        return x.to(device) if torch.is_tensor(x) else x
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
    to_numpy, to_file, constant = torch.Tensor.numpy, torch.save, data.constant
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
            with _disable_current_modes():
                return to_numpy(x)
        return np.ones(x.shape, str(x.dtype).removeprefix("torch."))
    def save(content, file):
        with _disable_current_modes():
            to_file(pytree.tree_map(made_up, content), file)

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
    monkeypatch.setattr(torch, "save", save)
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
    waiting, step = train.Log.waiting, train.Log.step

    def begin(log, batches):
        gpu.strict = True
        return waiting(log, batches)

    def end(log, done, *args):
        gpu.strict = done < log.args.steps
        return step(log, done, *args)
    monkeypatch.setattr(train.Log, "waiting", begin)
    monkeypatch.setattr(train.Log, "step", end)
    return gpu

@pytest.mark.parametrize("options", [
    "",
    "--sharing own",
    "--sharing own --batch 2",  # one teacher has no image
    "--accumulate 3",
    "--sharing own --accumulate 5",
    "--projector lp --norm unic --drop-path 0.1",
    "--projector sp",
    "--recompute",
    "--recompute --sharing own --dtype bf16",
    "--dtype bf16",
    "--clip 0",
])
def test_a_run(options, strict, tmp_path):
    train.main([*SMALL, *options.split(), "--out", str(tmp_path)])
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["step"] == 2
    assert {"checkpoint.pt", "log.jsonl", "pca.png"} == set(os.listdir(tmp_path))
