"""The kernels against their definition in fp64.

Every test runs on the PyTorch path. Those without @plain run a second time on the Triton kernels, in a
process with TRITON_INTERPRET=1; those with `device` once more on a GPU, if there is one, on the compiled
kernels. Some compile the kernels for GPUs and look at the code, without a GPU.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import muon, reference

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
plain = pytest.mark.skipif(INTERPRETED, reason="once is enough")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
VIEWS = ["whole", "tail", "swapped"]
# Relative error of a gradient; Triton's interpreter truncates to bf16.
ROUNDING = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 2e-6}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[needs_gpu, plain])])
def device(request):
    """Where a test's tensors lie, if it says nothing else."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def features(shape, dtype, view="whole"):
    """Channels of different mean and std. view: whole; tail of one more token; swapped dimensions."""
    x = torch.randn(shape) * (0.1 + torch.rand(shape[-1]))
    x = (x + torch.randn(shape[-1])).to(dtype)
    if view == "tail":
        return torch.cat([x[..., :1, :], x], -2)[..., 1:, :]
    if view == "swapped":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    return x


def check_moments(x, mean, m2, mean_tolerance, m2_tolerance):
    tokens = x.double().flatten(0, -2)
    assert mean.dtype == m2.dtype == torch.float32
    assert (mean - tokens.mean(0)).norm() < mean_tolerance * tokens.square().mean(0).sqrt().norm()
    assert error(m2, (tokens - tokens.mean(0)).square().sum(0)) < m2_tolerance


def loss_and_gradient(function, student, teacher, mean, std, upstream, *options):
    student = student.detach().requires_grad_()
    losses = function(student, teacher, mean, std, *options)
    grad, = torch.autograd.grad(losses, student, list(upstream))
    return losses[0].detach(), losses[1].detach(), grad


@pytest.fixture(params=["large", "small"])
def blocks(request, device, monkeypatch):
    """small: a few dozen tokens fill a block of the PyTorch path, and few programs take many tiles."""
    if request.param == "small":
        monkeypatch.setattr(reference, "BLOCK", 300)
        if INTERPRETED or device == "cuda":
            from kernels import distill, moments
            lanes, _ = distill.device_limits(torch.device(device))
            monkeypatch.setattr(moments, "PROGRAMS", 3)
            monkeypatch.setattr(distill, "device_limits", lambda device: (lanes, 1))
    return request.param


@pytest.mark.parametrize("D", [3, 7, 64, 65, 384, 1000, 1024, 1536])
def test_agrees_with_the_definition_in_fp64(D, blocks, device):
    """On a GPU with several draws, wider features, and so many tokens that a program takes many blocks."""
    widths, scale = ([D], 1) if device == "cpu" else ([D, D, 4 * D], 250)
    for case, width in enumerate(widths):
        check_case(width, scale, random.Random(f"{blocks}{D}{case}"))


def check_case(D, scale, rng):
    *shape, tokens = rng.choices([1, 2, 3], k=rng.randint(1, 3))
    shape = [*shape, scale * tokens, D]
    s_type, t_type = rng.choices(list(ROUNDING), k=2)
    student = features(shape, s_type, rng.choice(VIEWS))
    teacher = features(shape, t_type, rng.choice(VIEWS))
    mean, m2 = kernels.channel_moments(teacher)
    check_moments(teacher, mean, m2, 1e-6, 5e-6)
    shift, eps = rng.choice([(0.0, 1e-3), (0.1, 0.5), (0.1, 0.0)])
    std = (m2 / teacher[..., 0].numel()).sqrt() + shift
    options = rng.choice([1.0, 0.2, 3.0, 0.0]), eps
    dropped = torch.rand(shape[:-1]) < 0.3
    upstream = torch.randn(2, *shape[:-1]).masked_fill(dropped, 0)
    arguments = student, teacher, mean, std, upstream
    cos, smooth, grad = loss_and_gradient(kernels.distill_loss, *arguments, *options)
    wide = [x.double() for x in arguments]
    wanted_cos, wanted_smooth, wanted_grad = loss_and_gradient(reference.definition, *wide, *options)
    assert cos.dtype == smooth.dtype == torch.float32 and cos.shape == wanted_cos.shape
    assert (cos - wanted_cos).abs().max() < 2e-6 and error(smooth, wanted_smooth) < 1e-6
    assert error(grad, wanted_grad) < ROUNDING[s_type]
    student[dropped], teacher[dropped] = torch.nan, torch.nan
    again = loss_and_gradient(kernels.distill_loss, *arguments, *options)[2]
    assert torch.equal(again, grad)   # the same bits, and dropped tokens are not read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_of_a_large_mean_and_of_an_outlier(dtype, blocks, device):
    flat = (100 + 0.01 * torch.randn(700, 40)).to(dtype)
    outlier = torch.randn(5, 130, 24).to(dtype)
    outlier[0, 0] = 1e4
    for x in (flat, outlier, outlier[:, 1:]):
        moments = kernels.channel_moments(x)
        check_moments(x, *moments, 3e-6, 1e-4)
        torch.testing.assert_close(kernels.channel_moments(x), moments, rtol=0, atol=0)   # the same bits


def test_merged_moments_are_those_of_the_union(device):
    x = features((97, 33), torch.float32) + 100
    empty = torch.full((2, 33), torch.nan)
    sets = [*map(kernels.channel_moments, (x[:1], x[1:40], x[40:])), empty]
    means, m2s = map(torch.stack, zip(*sets))
    count, *moments = kernels.merge_moments(torch.tensor([1.0, 39.0, 57.0, 0.0]), means, m2s)
    assert count == 97
    check_moments(x, *moments, 1e-7, 2e-6)
    assert not any(x.any() for x in kernels.merge_moments(torch.zeros(4), means, m2s))


def test_vectors_of_length_0_behave_as_in_torch(device):
    student, teacher = torch.randn(2, 6, 32)
    student[::2], teacher[1:3] = 0, 0
    student[3] *= 1e-10 / student[3].norm()
    student[5] *= 1e-20 / student[5].norm()
    arguments = student, teacher, torch.zeros(32), torch.ones(32), torch.rand(2, 6)
    got = loss_and_gradient(kernels.distill_loss, *arguments)
    wanted = loss_and_gradient(reference.definition, *arguments)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_nan_and_infinity_show_and_stay_in_their_token(device):
    student, teacher = torch.randn(2, 6, 32)
    mean, std, upstream = torch.zeros(32), torch.ones(32), torch.ones(2, 6)
    student[1, 3], teacher[2, 5], student[3, 0], teacher[4, 31] = torch.nan, torch.nan, torch.inf, -torch.inf
    cos, smooth, grad = loss_and_gradient(kernels.distill_loss, student, teacher, mean, std, upstream)
    bad = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(cos.isnan(), bad) and torch.equal(grad.isnan().any(-1), bad)
    assert torch.equal(~smooth.isfinite(), bad)
    upstream[:, bad] = 0
    dropped = loss_and_gradient(kernels.distill_loss, student, teacher, mean, std, upstream)[2]
    assert not dropped[bad].any() and torch.equal(dropped[~bad], grad[~bad])
    assert kernels.distill_loss(student, teacher, mean, std * torch.nan)[1].isnan().all()
    x = torch.randn(50, 8)
    x[40, 2], x[0, 5] = torch.nan, torch.inf
    for moment in kernels.channel_moments(x):
        assert (~moment.isfinite()).nonzero().flatten().tolist() == [2, 5]


def test_views_are_not_copied_and_may_reach_past_2_to_the_31(device):
    tokens = torch.zeros(4, 7, 16)
    for view in (tokens, tokens[:, 1:], tokens[:, 0], tokens[:, :1], tokens.transpose(0, 1), tokens[0]):
        folded, = reference.fold(view)
        assert folded.data_ptr() == view.data_ptr() and folded.numel() == view.numel()
    storage = torch.empty(2**31 + 8, dtype=torch.bfloat16)   # 4 GiB of which few pages are touched
    far = storage.as_strided((3, 8), (2**30, 1))
    far.copy_(torch.arange(24.0).view(3, 8))
    near = far.clone()
    moments = kernels.channel_moments(near)
    torch.testing.assert_close(kernels.channel_moments(far), moments, rtol=0, atol=0)
    results = [loss_and_gradient(kernels.distill_loss, x, x, *moments, torch.ones(2, 3)) for x in (far, near)]
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-6)


X, V = torch.ones(2, 3, 8), torch.ones(8)
MANY = torch.ones(1, 1).expand(2**31 - 1, 1)
BAD = {
    "student is torch.int64": (X.long(), X, V, V),
    "student has shape [0, 8]": (X[0, :0], X[0, :0], V, V),
    "teacher has shape [2, 2, 8], expected the student's": (X, X[:, :2], V, V),
    "student has strides [24, 1, 3], expected a contiguous last": (torch.ones(2, 8, 3).mT, X, V, V),
    "mean has shape [7]": (X, X, V[:7], V),
    "std is torch.bfloat16": (X, X, V, V.bfloat16()),
    "teacher is on meta, expected cpu": (X, X.to("meta"), V, V),
    "beta is -1": (X, X, V, V, -1.0),
    "eps is nan": (X, X, V, V, 1.0, float("nan")),
    "student has 2147483647 tokens": (MANY, MANY, V[:1], V[:1]),
    "x is torch.int64": (X.long(),),
    "x has shape []": (X[0, 0, 0],),
    "split it": (MANY,),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_named(message):
    arguments = BAD[message]
    function = kernels.distill_loss if len(arguments) > 1 else kernels.channel_moments
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*arguments)


def step(student, teacher):
    mean, m2 = kernels.channel_moments(teacher)
    cos, smooth = kernels.distill_loss(student, teacher, mean, m2.sqrt())
    return (cos + 2 * smooth).mean()


def test_compiles_without_a_graph_break_and_is_differentiable_once(device):
    student = features((2, 3, 16), torch.bfloat16).requires_grad_()
    teacher = features((2, 3, 16), torch.bfloat16, "tail")
    eager, = torch.autograd.grad(step(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError):
        eager.sum().backward()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled_step = torch.compile(step, fullgraph=True, backend=backend)
    compiled, = torch.autograd.grad(compiled_step(student, teacher), student)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=1e-5)
    if INTERPRETED or device == "cuda":
        moments = torch.ops.dune.channel_moments.default
        loss, backward = torch.ops.dune.distill_loss.default, torch.ops.dune.distill_loss_backward.default
        arguments = student, teacher, torch.zeros(16), torch.ones(16)
        *upstream, coefs = [x.detach() for x in loss(*arguments)]
        torch.library.opcheck(moments, (teacher,))
        torch.library.opcheck(loss, arguments)
        torch.library.opcheck(backward, (*upstream, student.detach(), *arguments[1:], coefs, 1.0, 1e-3))


@plain
def test_gradient_of_the_definition():
    student, teacher = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    mean, std = torch.rand(2, 9, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernels.distill_loss(s, teacher, mean, std, 0.3), student)


MEMORY = """
import resource, torch, kernels
def step(n):
    teacher = torch.ones(n, 64, 1024, dtype=torch.bfloat16)
    student = torch.ones_like(teacher, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mean, m2 = kernels.channel_moments(teacher)
    sum(x.sum() for x in kernels.distill_loss(student, teacher, mean, m2.sqrt())).backward()
    inputs = 2 * teacher.nbytes / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - inputs / 2, inputs
step(1)
extra, inputs = step(256)
assert extra < inputs, f"{extra} KiB beyond the gradient, for inputs of {inputs} KiB"
"""
NO_TRITON = """
import sys, torch
sys.modules["triton"] = None
from kernels import channel_moments, distill_loss
student, teacher = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 10, 64).bfloat16()[:, 1:]
mean, m2 = channel_moments(teacher)
cos, smooth_l1 = distill_loss(student, teacher, mean, (m2 / (2 * 9 - 1)).sqrt())
(cos + smooth_l1).mean().backward()
assert student.grad.abs().sum() > 0
"""


def python(folder, *arguments, **variables):
    """What `python ARGUMENTS` prints."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TRITON_INTERPRET": "0"} | variables
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@plain
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_the_cpu_path_needs_less_memory_than_its_inputs():
    python(ROOT, "-c", MEMORY)


@plain
def test_the_folder_works_elsewhere_without_triton_and_inside_a_package(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    python(tmp_path, "-c", NO_TRITON)
    (tmp_path / "package").mkdir()
    (tmp_path / "kernels").rename(tmp_path / "package" / "kernels")
    table = python(tmp_path, "-m", "package.kernels.bench", CUDA_VISIBLE_DEVICES="")
    assert table.count("together") == 4


class Ahead:
    """Stands in for a kernel: a launch compiles it for its arguments as always, and runs nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        self.code = self.kernel.run(*arguments, grid=None, warmup=True, **constants).asm
        self.constants = constants


def compile_ahead(monkeypatch, target, x):
    """{kernel's name: Ahead}, launched on features x for a GPU: target = (backend, architecture, lanes)."""
    pytest.importorskip("triton", reason="no Triton on this system")
    from kernels import distill, moments
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*target),
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0)
    monkeypatch.setattr(driver, "_active", gpu)
    found = {}
    for name in ("_forward_kernel", "_backward_kernel", "_partial_kernel", "_merge_kernel"):
        module = distill if hasattr(distill, name) else moments
        found[name] = Ahead(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
        monkeypatch.setattr(module, "device_limits", lambda device: (target[2], 132))
    statistics = moments.channel_moments(x)
    *losses, coefs = distill.distill_loss(x, x, *statistics)
    distill.distill_loss_backward(*losses, x, x, *statistics, coefs, 1.0, 1e-3)
    return found


def spills_and_loop(code, folder):
    """(spills, instructions of the longest loop); (None, 0) if Triton comes without cuobjdump."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, 0
    (folder / "kernel.cubin").write_bytes(code["cubin"])
    text = subprocess.check_output([tool, "-res-usage", "-sass", folder / "kernel.cubin"], text=True)
    spills = re.search(r"(STACK|LOCAL):[1-9]", text)
    jumps = re.findall(r"/\*(\w{4,})\*/[^;\n]*\bBRA\b[^;\n]* 0x(\w+)\s*;", text)
    return spills, max((int(at, 16) - int(to, 16)) // 16 + 1 for at, to in jumps)


# Accesses of less than 16 bytes.
NARROW = r"(?:ld|st)\.global(?!\S*(?:\.v4\.[bf]32|\.v2\.b64))|cp\.async\S+ [^;]*\], (?:0x)?[48]\b"


@plain
@pytest.mark.parametrize("arch, D, dtype", [(80, 1024, torch.bfloat16), (90, 768, torch.bfloat16),
                                            (90, 1024, torch.bfloat16), (90, 1024, torch.float32)])
def test_compiles_for_cuda_to_wide_accesses_and_few_instructions(arch, D, dtype, monkeypatch, tmp_path):
    x = torch.empty(128, 577, D, dtype=dtype)[:, 1:]
    found = compile_ahead(monkeypatch, ("cuda", arch, 32), x)
    # Features are read wide; narrow are the numbers of a token or a channel.
    for name, narrow in ("_partial_kernel", 4), ("_forward_kernel", 4), ("_backward_kernel", 16):
        ahead = found[name]
        assert len(re.findall(NARROW, ahead.code["ptx"])) <= narrow
        spills, loop = spills_and_loop(ahead.code, tmp_path)
        assert not spills
        if name != "_partial_kernel":
            tokens, channels = ahead.constants["BLOCK_N"], ahead.constants["BLOCK_D"]
            lanes = 32 * ahead.constants["num_warps"]
            assert D % channels == 0 and tokens * channels * dtype.itemsize == 16 * lanes
            assert loop <= 16 * tokens * D / lanes


@plain
def test_compiles_for_rocm_without_spills(monkeypatch):
    x = torch.empty(128, 577, 1024).bfloat16()[:, 1:]
    found = compile_ahead(monkeypatch, ("hip", "gfx942", 64), x)
    for name, ahead in found.items():
        assert re.search(r"\.vgpr_spill_count: +0\b", ahead.code["amdgcn"])
        if name != "_merge_kernel":
            assert re.search(r"(global|buffer)_load_(dwordx4|b128)", ahead.code["amdgcn"])


@plain
def test_compiles_for_one_channel(monkeypatch):
    """Every size and stride is 1 here, so that Triton makes constants of them."""
    compile_ahead(monkeypatch, ("cuda", 90, 32), torch.ones(1, 1, 1).half())


@plain
def test_all_of_this_on_the_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton on this system")
    python(ROOT, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")


# ---- Muon

@plain
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (300, 80)])
def test_an_update_keeps_the_singular_vectors_and_makes_the_values_one(shape, device):
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(-1, 1, len(vt))
    x = muon.orthogonalize(1e-10 * (u * values) @ vt)
    inner = u.mT @ x @ vt.mT
    assert inner.diag().sub(1).abs().max() < 0.5
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


@plain
def test_muon_is_torchs_and_a_bad_update_is_skipped(device):
    """torch's runs in bf16, and waits for the device to skip."""
    ours, torchs = (torch.nn.Parameter(torch.ones(48, 32)) for _ in range(2))
    optimizer = muon.Muon([{"params": [ours], "muon": torch.float32}], lr=0.1, weight_decay=0.2)
    reference_optimizer = torch.optim.Muon([torchs], 0.1, 0.2, adjust_lr_fn="match_rms_adamw")
    for bad in (0, 1, 0):
        before = ours.detach().clone()
        optimizer.found_inf = torch.tensor(float(bad))
        ours.grad = torchs.grad = torch.randn(48, 32)
        if bad:
            ours.grad = ours.grad * float("nan")
        else:
            reference_optimizer.step()
        optimizer.step()
        assert ours.equal(before) == bool(bad)
    assert error(ours - 1, torchs.double() - 1) < 0.02
