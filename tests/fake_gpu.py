"""The GPU path on a machine without a GPU. Run by test_gpu.py in a process of its own.

A GpuTensor says that it is on "cuda" and keeps its numbers on the CPU. Here every operation is looked at:
two devices in one operation are an error, as on a GPU, and so is what makes the host wait in a step.
"""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dune
import eval as evaluation
import kernels
import train
from test_train import argv, losses  # noqa: F401 (argv is a fixture)


class Waits(RuntimeError):
    """The host would wait for the device here."""


class GpuTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, numbers):
        x = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(),
            dtype=numbers.dtype, device="cuda:0")
        x.numbers = numbers
        return x

    def __reduce_ex__(self, protocol):  # into a file
        return self.numbers.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = None  # FakeGpu sees everything before


def numbers_of(tree):
    return pytree.tree_map(lambda x: x.numbers if isinstance(x, GpuTensor) else x, tree)


class FakeGpu(TorchDispatchMode):
    """in_step: nothing may wait for the device."""
    in_step = False
    needs_values = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2",
                    "repeat_interleave"}

    def step(self, function):
        """The function as part of a step."""
        def run(*args):
            self.in_step = True
            result = function(*args)
            self.in_step = False
            return result
        return run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim or x.is_cuda}
        name = function.overloadpacket.__name__
        target = torch.device(kwargs.get("device") or (max(devices) if devices else "cpu")).type
        if name in ("_to_copy", "copy_"):
            devices.add(target)
            if len(devices) == 2 and self.in_step and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                raise Waits(f"{name} waits for its copy")
        elif len(devices) == 2:
            raise RuntimeError(f"{name}: tensors on two devices")
        elif "cuda" in devices and self.in_step:
            mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
            if mask or name in self.needs_values:
                raise Waits(f"{name} needs values")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        result = function(*numbers_of(args), **numbers_of(kwargs))
        if target == "cpu":
            return result
        return pytree.tree_map(lambda x: GpuTensor(x) if isinstance(x, torch.Tensor) else x, result)


@pytest.fixture
def gpu(monkeypatch):
    """A FakeGpu that is on."""
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
                        "_lazy_init": None, "max_memory_allocated": 0, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: x)
    monkeypatch.setattr(kernels, "_installed", False)  # Triton has no fake GPU: the same in plain PyTorch
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    gpu = FakeGpu()
    monkeypatch.setattr(train, "train_step", gpu.step(train.train_step))
    monkeypatch.setattr(train.Log, "add", gpu.step(train.Log.add))
    with gpu:
        yield gpu


RUNS = {
    "defaults": "",
    "own images, micro-batches": "--sharing own --accumulate 3",
    "UNIC's ladder": "--projector lp --norm unic --drop-path 0.1 --clip 0",
    "recompute": "--recompute --projector sp",
    "bf16": "--dtype bf16",
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_is_the_run_on_the_cpu(options, argv, gpu, tmp_path):
    options += " --steps 3"
    train.main(argv(tmp_path / "cuda", f"{options} --device cuda"))
    train.main(argv(tmp_path / "cpu", options))
    on_cuda, on_cpu = torch.tensor([losses(tmp_path / device) for device in ("cuda", "cpu")])
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-2 if "bf16" in options else 1e-4, atol=0)


def test_commands_of_eval(argv, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "STUDY", dict(train=12, test=6, steps=2))
    train.main(argv(tmp_path, "--steps 1 --device cuda"))
    for command in ("loss", "pca", "spectrum", "study --seeds 1"):
        evaluation.main([*command.split(), "--run", str(tmp_path), "--device", "cuda"])


def left_on_the_cpu(losses, coefficients):
    return losses.sum() + torch.ones(1), coefficients.sum()


def read_on_the_host(losses, coefficients):
    return losses.sum() * losses.sum().item(), coefficients.sum()


def copied_to_the_host(losses, coefficients):
    return losses.sum(), coefficients.cpu().sum()


def asks_how_many(losses, coefficients):
    return losses[coefficients > 0].sum(), coefficients.sum()


@pytest.mark.parametrize("wrong, message", [
    (left_on_the_cpu, "two devices"),
    (read_on_the_host, "needs values"),
    (copied_to_the_host, "waits for its copy"),
    (asks_how_many, "needs values"),
])
def test_what_would_fail_or_wait_on_a_gpu_is_seen(wrong, message, argv, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(dune, "weighted_sum", wrong)
    with pytest.raises(RuntimeError, match=message):
        train.main(argv(tmp_path, "--steps 1 --device cuda"))


def test_bf16_is_taken_where_the_gpu_multiplies_it(gpu, monkeypatch):
    """Not where torch emulates it."""
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                            including_emulation or supported)
        assert train.fast_bf16(torch.device("cuda")) == supported
