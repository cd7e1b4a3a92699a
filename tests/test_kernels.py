"""The kernels against their definition in fp64. Every test here runs on the PyTorch path; those without @plain run a
second time, in one process with TRITON_INTERPRET=1, on the Triton kernels. The @plain tests compile the kernels for
GPUs, with none at hand, and count."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from kernels import reference  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
plain = pytest.mark.skipif(INTERPRETED, reason="once is enough")
ROUNDING = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 2e-6}   # the interpreter truncates to bf16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def features(shape, dtype, generator, view="whole"):
    """Features with channels of unlike mean and spread; view: whole, tail of one more token, or swapped in front."""
    lead, D = list(shape[:-1]), shape[-1]
    if view == "tail":
        lead[-1] += 1
    x = torch.randn(*(lead[::-1] if view == "swapped" else lead), D, generator=generator)
    x = (x * (0.1 + torch.rand(D, generator=generator)) + torch.randn(D, generator=generator)).to(dtype)
    if view == "swapped":
        return x.permute(*range(len(lead))[::-1], len(lead))
    return x[..., 1:, :] if view == "tail" else x


def cut_small(monkeypatch):
    """Makes a few dozen rows fill a block of the PyTorch path, and a few programs walk over many tiles."""
    monkeypatch.setattr(reference, "BLOCK", 1000)
    if INTERPRETED:
        from kernels import moments
        monkeypatch.setattr(moments, "PROGRAMS", 3)


def loss_and_gradient(function, student, teacher, mean, std, upstream, **options):
    student = student.detach().requires_grad_()
    losses = function(student, teacher, mean, std, **options)
    return [x.detach() for x in losses] + list(torch.autograd.grad(losses, student, upstream))


@pytest.mark.parametrize("seed", range(16))
def test_agrees_with_the_definition_in_fp64(seed, monkeypatch):
    if seed % 2:
        cut_small(monkeypatch)
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    D = (1, 7, 65, 256, 384, 1000, 1024, 1536)[seed % 8]
    shape = [rng.randint(1, 6 if D < 500 else 3) for _ in range(rng.randint(1, 3))] + [D]
    s_type, t_type = rng.choices([torch.bfloat16, torch.float16, torch.float32], k=2)
    student = features(shape, s_type, g, rng.choice(["whole", "tail", "swapped"]))
    teacher = features(shape, t_type, g, rng.choice(["whole", "tail", "swapped"]))
    mean, m2 = kernels.channel_moments(teacher)
    rows = teacher.double().reshape(-1, D)
    assert mean.dtype == m2.dtype == torch.float32 and mean.shape == m2.shape == (D,)
    assert error(mean, rows.mean(0)) < 1e-6 and error(m2, (rows - rows.mean(0)).square().sum(0)) < 2e-6
    std = (m2 / max(1, len(rows) - 1)).sqrt() + (0.0 if seed % 3 else 0.1)
    options = {"beta": rng.choice([1.0, 0.2, 3.0, 0.0]), "eps": rng.choice([1e-3, 0.5]) if seed % 3 else 0.0}
    upstream = torch.randn(2, *shape[:-1], generator=g)
    got = loss_and_gradient(kernels.distill_loss, student, teacher, mean, std, upstream.unbind(0), **options)
    wanted = loss_and_gradient(reference.definition, student.double(), teacher.double(), mean.double(), std.double(),
                               upstream.double().unbind(0), **options)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[0].shape == tuple(shape[:-1])
    assert got[2].dtype == s_type and got[2].shape == student.shape
    assert (got[0] - wanted[0]).abs().max() < 1e-6 and error(got[1], wanted[1]) < 1e-6
    assert error(got[2], wanted[2]) < ROUNDING[s_type] or D == 1 and (got[2] - wanted[2]).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_of_a_large_mean_and_after_an_outlier_and_the_same_bits_twice(dtype, monkeypatch):
    cut_small(monkeypatch)
    g = torch.Generator().manual_seed(0)
    flat = (100 + 0.01 * torch.randn(700, 40, generator=g)).to(dtype)
    outlier = torch.randn(5, 130, 24, generator=g).to(dtype)
    outlier[0, 0] = 1e4
    for x in (flat, outlier, outlier[:, 1:]):
        rows = x.double().reshape(-1, x.shape[-1])
        mean, m2 = kernels.channel_moments(x)
        again = kernels.channel_moments(x)
        assert (mean - rows.mean(0)).norm() < 3e-6 * rows.square().mean(0).sqrt().norm()
        assert error(m2, (rows - rows.mean(0)).square().sum(0)) < 1e-4
        assert torch.equal(mean, again[0]) and torch.equal(m2, again[1])
    ones = kernels.channel_moments(torch.full((3, 50, 9), 0.1).to(dtype))
    assert torch.equal(ones[0], torch.full((9,), 0.1).to(dtype).float()) and torch.equal(ones[1], torch.zeros(9))


def test_sets_merge_to_the_moments_of_their_union():
    x = features((97, 33), torch.float32, torch.Generator().manual_seed(1)) + 100
    parts = [x[:1], x[1:40], x[40:]]
    empty = torch.full((33,), torch.nan), torch.full((33,), torch.inf)
    moments = [kernels.channel_moments(p) for p in parts] + [empty]
    counts = torch.tensor([1.0, 39.0, 57.0, 0.0])
    count, mean, m2 = kernels.merge_moments(counts, *(torch.stack(m) for m in zip(*moments)))
    rows = x.double()
    assert count == 97 and error(mean, rows.mean(0)) < 1e-7 and error(m2, (rows - rows.mean(0)).square().sum(0)) < 2e-6
    nothing = kernels.merge_moments(torch.zeros(2), torch.full((2, 3), torch.nan), torch.ones(2, 3))
    assert [x.tolist() for x in nothing] == [0, [0, 0, 0], [0, 0, 0]]


def test_vectors_of_no_length_behave_as_in_torch():
    g = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 6, 32, generator=g).unbind(0)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    student[3] *= 1e-10 / student[3].norm()
    upstream = torch.rand(2, 6, generator=g).unbind(0)
    got = loss_and_gradient(kernels.distill_loss, student, teacher, torch.zeros(32), torch.ones(32), upstream)
    s = student.clone().requires_grad_()
    losses = 1 - F.cosine_similarity(s, teacher, dim=-1), F.smooth_l1_loss(s, teacher, reduction="none").mean(-1)
    for mine, wanted in zip(got, [*losses, *torch.autograd.grad(losses, s, upstream)]):
        assert torch.allclose(mine, wanted.detach(), rtol=1e-5, atol=1e-6)


def test_nan_and_infinity_show_and_stay_in_their_token():
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 32, generator=g).unbind(0)
    mean, std, upstream = torch.zeros(32), torch.ones(32), torch.ones(2, 6)
    student[1, 3], teacher[2, 5], student[3, 0], teacher[4, 31] = torch.nan, torch.nan, torch.inf, -torch.inf
    cos, smooth, gradient = loss_and_gradient(kernels.distill_loss, student, teacher, mean, std, upstream.unbind(0))
    assert cos.isnan().tolist() == [False, True, True, True, True, False]
    assert smooth.isfinite().tolist() == [True, False, False, False, False, True]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, True, True, False]
    upstream[:, 1:5] = 0
    dropped = loss_and_gradient(kernels.distill_loss, student, teacher, mean, std, upstream.unbind(0))[2]
    assert torch.equal(dropped[1:5], torch.zeros(4, 32)) and torch.equal(dropped[[0, 5]], gradient[[0, 5]])
    assert kernels.distill_loss(student, teacher, mean, std * torch.nan)[1].isnan().all()
    x = torch.randn(50, 8, generator=g)
    x[40, 2], x[0, 5] = torch.nan, torch.inf
    mean, m2 = kernels.channel_moments(x)
    assert [i for i in range(8) if not mean[i].isfinite()] == [i for i in range(8) if not m2[i].isfinite()] == [2, 5]


def test_views_are_not_copied_and_rows_reach_past_2_to_the_31():
    tokens = torch.zeros(4, 7, 6, 16)
    for view in (tokens[:, 1:], tokens[:, :, 1:], tokens[:, 0], tokens[:, :1, 2:3], tokens.transpose(0, 1)[..., 0, :]):
        folded, = reference.fold(view)
        assert folded.data_ptr() == view.data_ptr() and torch.equal(folded.reshape(view.shape), view)
    try:
        storage = torch.empty(2**31 + 8, dtype=torch.bfloat16)   # 4 GiB of address space; three pages are touched
    except RuntimeError:
        pytest.skip("not enough address space")
    far = storage.as_strided((3, 8), (2**30, 1))
    far.copy_(torch.arange(24.0).view(3, 8))
    near = far.clone()
    mean, std, upstream = torch.ones(8), torch.ones(8), torch.ones(2, 3).unbind(0)
    assert torch.equal(kernels.channel_moments(far)[0], kernels.channel_moments(near)[0])
    for a, b in zip(loss_and_gradient(kernels.distill_loss, far, far, mean, std, upstream),
                    loss_and_gradient(kernels.distill_loss, near, near, mean, std, upstream)):
        assert torch.equal(a, b)


X, V = torch.ones(2, 3, 8), torch.ones(8)
BAD = {
    "student is torch.int64": (X.long(), X, V, V), "teacher is torch.int32": (X, X.int(), V, V),
    "student has shape [0, 8]": (X[0, :0], X[0, :0], V, V),
    "teacher has shape [2, 2, 8], expected the student's": (X, X[:, :2], V, V),
    "student has strides [24, 1, 3], expected a contiguous last": (torch.ones(2, 8, 3).mT, X, V, V),
    "mean has shape [7]": (X, X, V[:7], V), "std has shape [1, 8]": (X, X, V, V[None]),
    "std is torch.bfloat16": (X, X, V, V.bfloat16()),
    "mean has shape [8] and strides [0]": (X, X, torch.ones(1).expand(8), V),
    "teacher is on meta, expected cpu": (X, X.to("meta"), V, V),
    "std is on meta, expected cpu": (X, X, V, V.to("meta")),
    "beta is -1": (X, X, V, V, -1.0), "eps is nan": (X, X, V, V, 1.0, float("nan")),
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError) as caught:
        kernels.distill_loss(*BAD[message])
    assert message in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("x, message", [(X.long(), "x is torch.int64"), (X[:0], "x has shape [0, 3, 8]"),
                                        (X[0, 0, 0], "x has shape []"), (X.mT, "x has strides")])
def test_moments_of_what_has_none(x, message):
    with pytest.raises(ValueError) as caught:
        kernels.channel_moments(x)
    assert message in str(caught.value)


def test_operators_register_well_and_do_not_break_the_graph():
    pytest.importorskip("triton", reason="without Triton there are no operators")
    from kernels import distill, moments  # noqa: F401: they register
    g = torch.Generator().manual_seed(4)
    student = features((2, 3, 16), torch.bfloat16, g).requires_grad_()
    teacher = features((2, 3, 16), torch.bfloat16, g, "tail")
    mean, std, upstream = torch.zeros(16), torch.ones(16), torch.rand(2, 2, 3, generator=g)
    torch.library.opcheck(torch.ops.dune.channel_moments.default, (teacher,))
    torch.library.opcheck(torch.ops.dune.distill_loss.default, (student, teacher, mean, std, 1.0, 1e-3))
    torch.library.opcheck(torch.ops.dune.distill_loss_backward.default,
                          (*upstream.unbind(0), student.detach(), teacher, mean, std, 1.0, 1e-3))

    def step(student, teacher):
        mean, m2 = kernels.channel_moments(teacher)
        cos, smooth = kernels.distill_loss(student, teacher, mean, m2.sqrt())
        return (cos + smooth * upstream[0]).mean()

    eager, = torch.autograd.grad(step(student, teacher), student)
    compiled, = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(student, teacher), student)
    assert torch.allclose(compiled.float(), eager.float(), rtol=2e-2, atol=1e-5)


@plain
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_gradient_of_the_definition(beta):
    g = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, 4, 9, generator=g, dtype=torch.float64).unbind(0)
    mean, std = torch.rand(2, 9, generator=g, dtype=torch.float64).unbind(0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernels.distill_loss(s, teacher, mean, std, beta), student)


MEMORY = """
import resource, torch, kernels
torch.set_num_threads(1)
def step(n):
    teacher = torch.ones(n, 64, 1024, dtype=torch.bfloat16)
    student = torch.ones_like(teacher, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mean, m2 = kernels.channel_moments(teacher)
    sum(x.sum() for x in kernels.distill_loss(student, teacher, mean, m2.sqrt())).backward()
    gradient = student.grad.nbytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - gradient / 1024, 2 * gradient / 1024
step(1)
extra, inputs = step(256)
assert extra < inputs, f"{extra} KiB beyond the gradient, for inputs of {inputs} KiB"
"""
LIFTED = """
import torch
from kernels import channel_moments, distill_loss
student, teacher = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 10, 64).bfloat16()[:, 1:]
mean, m2 = channel_moments(teacher)
cos, smooth_l1 = distill_loss(student, teacher, mean, (m2 / (2 * 9 - 1)).sqrt())
(cos + smooth_l1).mean().backward()
assert student.grad.abs().sum() > 0
"""


def python(arguments, cwd):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)


@plain
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory the way Linux counts it")
def test_the_cpu_path_needs_less_memory_than_its_inputs():
    done = python(["-c", MEMORY], ROOT)
    assert done.returncode == 0, done.stderr


@plain
def test_the_folder_alone_works_elsewhere_with_and_without_triton(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for code in (LIFTED, "import sys; sys.modules['triton'] = None" + LIFTED):
        done = python(["-c", code], tmp_path)
        assert done.returncode == 0, done.stderr


@plain
def test_within_a_package_it_works_as_well_and_the_bench_measures(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "pkg" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    done = python(["-c", LIFTED.replace("from kernels", "from pkg.kernels")], tmp_path)
    assert done.returncode == 0, done.stderr
    if torch.cuda.is_available():
        pytest.skip("measures for minutes on a GPU")
    done = python(["-m", "pkg.kernels.bench", "--quick"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PyTorch path" in done.stdout and "together" in done.stdout


@plain
@pytest.mark.parametrize("options, code", [(["--help"], 0), (["--fast"], 2)])
def test_the_bench_says_what_it_takes_and_a_wrong_option_is_one_line(options, code, monkeypatch, capsys):
    from kernels import bench
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit) as left:
        bench.main()
    out, err = capsys.readouterr()
    assert left.value.code == code
    assert "--compiled" in out if code == 0 else out == "" and len(err.splitlines()) == 1 and options[0] in err


def test_blocks_are_large_on_a_gpu_without_triton():
    whole = SimpleNamespace(shape=(128, 576, 1024), is_cuda=True)
    assert len(list(reference._blocks(whole))) < 10


@plain
@pytest.mark.parametrize("D", [384, 768, 1024, 1536])
def test_no_lane_is_masked(D):
    pytest.importorskip("triton", reason="no Triton on this system")
    from kernels import distill, moments
    for word, pair in (4, 2), (4, 1), (2, 1):
        for backward in False, True:
            rows, tile, warps, _ = distill.plan(backward, D, word, pair)
            assert D % (tile * pair) == 0 and rows * tile * word == 32 * warps * 16   # 16 bytes for each lane
        assert D % (moments.plan(128, 576, D, pair)[1] * pair) == 0


@plain
def test_instructions_for_each_element_and_programs_that_fit():
    pytest.importorskip("triton", reason="no Triton on this system")
    from kernels import bench, distill
    for D, dtype, arch in (768, "bf16", 90), (1024, "bf16", 90), (1024, "fp32", 90), (768, "bf16", 100):
        compiled = bench.compile_ahead(D, dtype, ("cuda", arch, 32), names=("forward", "backward"))
        _, word, pair = bench.TYPES[dtype]
        for name, most in ("forward", 14), ("backward", 18):
            code = bench.code(compiled[name])
            if code is None:
                pytest.skip("this Triton comes without cuobjdump")
            rows, _, warps, programs = distill.plan(name == "backward", D, word, pair)
            registers, _, loop = code
            assert dtype == "fp32" or 8 < loop / (rows * D / (32 * warps)) <= most
            fit = 65536 // (-(-registers // 8) * 8 * 32 * warps)
            fit = min(fit, 233472 // (compiled[name].metadata.shared + 1024))
            assert 0.8 * fit <= programs <= fit, (name, D, dtype, arch, code, fit)


@plain
def test_what_is_within_reach_is_printed(monkeypatch, capsys):
    pytest.importorskip("triton", reason="no Triton on this system")
    from kernels import bench
    slow = bench.SHEETS["H100"]._replace(clock=1e9)
    monkeypatch.setattr(bench, "SHEETS", {"H100": bench.SHEETS["H100"], "slow": slow})
    bench.print_compiled([1024], ["bf16"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    if not rows:
        pytest.skip("this Triton comes without cuobjdump")
    assert [row[:2] for row in rows] == [[card, name] for card in ("H100", "slow") for name in bench.STAGES[:3]]
    busy = [float(row[9][:-1]) for row in rows]
    share = [float(row[10][:-1]) for row in rows]
    assert share[:3] == [100, 100, 100] and all(b == pytest.approx(a * 1.755, abs=2) for a, b in zip(busy, busy[3:]))
    assert share[4] == pytest.approx(100 * bench.ISSUE / busy[4] * 100, abs=2)


ONES = ("N", "rows", "tiles", "tiles_per_outer", "s_outer", "s_row", "t_outer", "t_row", "x_outer", "x_row")
TARGETS = [("cuda", 90, 32), ("cuda", 80, 32), ("hip", "gfx942", 64)]


@plain
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}-{t[1]}")
def test_compiles_ahead_to_wide_accesses_without_spills(target):
    pytest.importorskip("triton", reason="no Triton on this system")
    from kernels import bench
    bench.compile_ahead(65, "fp16", target, ones=ONES)
    class_tokens = bench.compile_ahead(1024, "bf16", target, tokens=(1, 128), names=("moments", "merge"))
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        compiled = bench.compile_ahead(1024, dtype, target)
        if target[0] == "hip":
            for kernel in [*compiled.values(), *class_tokens.values()]:
                assert bench.code(kernel)[1] == 0
            widths = Counter(re.findall(r"(?:global|buffer)_load_(\w+)", compiled["moments"].asm["amdgcn"]))
            assert widths["dwordx4"] + widths["b128"] >= 4 * size
            assert sum(widths.values()) <= 5 * size                     # and the row that deviations start from
            continue
        found = {name: bench.accesses(kernel.asm["ptx"]) for name, kernel in compiled.items()}
        per_thread = 32 * size // 16                                    # a warp takes 1024 channels: 32 for each thread
        assert found["moments"]["load", 16] == 4 * size                 # and a narrow one: where deviations start
        assert sum(n for (kind, _), n in found["moments"].items() if kind == "load") == 4 * size + 1
        assert {width for kind, width in found["forward"] if kind == "load"} == {16}
        assert {width for kind, width in found["backward"] if kind == "load"} == {16, 4}   # 4: the incoming gradients
        assert {k: n for k, n in found["backward"].items() if k[0] == "store"} == {("store", 16): per_thread}
        for name, kernel in [*compiled.items(), *class_tokens.items()]:
            code = bench.code(kernel)
            assert code is None or code[1] == 0, f"{name} spills {code[1]} bytes"


@plain
def test_all_of_this_on_the_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton on this system")
    import numpy
    import triton
    if triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of this Triton needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
