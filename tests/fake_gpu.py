"""A GPU for a machine that has none; fake_cuda.cpp must be loaded before torch, see test_gpu.py.

A GpuTensor says that it is on "cuda" and keeps its numbers on the CPU. Here every operation is looked at:
two devices in one operation are an error, as on a GPU, and so is what makes the host wait in a step.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels


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
    needs_values = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2",
                    "repeat_interleave"}
    copies_index = {"index", "index_put_"}  # a CPU tensor may index one on the GPU, which waits for it

    def __init__(self, monkeypatch):
        super().__init__()
        self.in_step = False
        for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
                            "_lazy_init": None, "max_memory_allocated": 0, "is_bf16_supported": True}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
        tensor = torch.tensor  # it does not come to __torch_dispatch__
        monkeypatch.setattr(torch, "tensor", lambda x, device=None, **how: tensor(x, **how).to(device=device))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: x)
        monkeypatch.setattr(kernels, "_installed", False)  # Triton has no fake GPU: the same in plain PyTorch
        monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)

    def watch(self, in_step):
        self.in_step = in_step

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
        elif len(devices) == 2 and (self.in_step or name not in self.copies_index or not tensors[0].is_cuda):
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
