"""How fast, and how near to the memory's own speed:  python -m kernels.bench [--quick] [--compiled] [--out kernels_bench.png]

Prints the measured copy bandwidth, then for every shape and for moments, forward, backward and the three together: time, bytes that must
move, GB/s and their share of the copy, the ratio to the published way of writing it and to torch.compile of that, and the most memory
held beyond inputs and gradient. --compiled prints instead, with no GPU needed, what the compiler makes of the kernels for sm_90.
"""

import argparse
import pathlib
import re
import subprocess
import tempfile
import time
from collections import Counter

import torch
import torch.nn.functional as F

import kernels

STAGES = ("moments", "forward", "backward", "together")


def published_moments(teacher):
    """Mean and std of every channel, as the published code takes them."""
    tokens = teacher.flatten(0, -2).float()
    return tokens.mean(0), tokens.std(0)


def published_loss(student, teacher, mean, std):
    """Standardisation, cosine and smooth L1, as the published code writes them."""
    s, t = student.float(), (teacher.float() - mean) / std.clamp(min=1e-3)
    return 1 - F.cosine_similarity(s, t, dim=-1), F.smooth_l1_loss(s, t, reduction="none").mean(-1)


def our_moments(teacher):
    mean, m2 = kernels.channel_moments(teacher)
    return mean, (m2 / (teacher[..., 0].numel() - 1)).sqrt()


def stages(moments, loss, student, teacher):
    """The four things to measure, as functions without arguments."""
    mean, std = moments(teacher)
    losses = loss(student, teacher, mean, std)
    upstream = [torch.rand_like(x) for x in losses]

    def together():
        torch.autograd.grad(loss(student, teacher, *moments(teacher)), student, upstream)

    return {"moments": lambda: moments(teacher), "forward": lambda: loss(student, teacher, mean, std),
            "backward": lambda: torch.autograd.grad(losses, student, upstream, retain_graph=True), "together": together}


def traffic(shape, dtype):
    """Bytes that each stage cannot avoid to move: features, gradient, one number a token and loss, statistics."""
    features, D, size = torch.Size(shape).numel(), shape[-1], dtype.itemsize
    tokens = features // D
    each = {"moments": features * size + 8 * D, "forward": 2 * features * size + 8 * tokens + 8 * D,
            "backward": 3 * features * size + 8 * tokens + 8 * D}
    return each | {"together": sum(each.values())}


def measure(fn, device):
    """(seconds, bytes held at the peak beyond what was held before, or None on a CPU)."""
    fn()
    if device == "cpu":
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
        return min(times), None
    from triton.testing import do_bench
    seconds = do_bench(fn, return_mode="median") / 1000   # clears the L2 cache between runs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return seconds, torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device):
    """Bytes a second, read and written, of a large copy."""
    source = torch.zeros(1 << (30 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device)[0]


def bench(shape, dtype, device, copy):
    """Measures one shape, prints a line for each stage and returns {stage: share of the copy bandwidth}."""
    student, teacher = torch.randn(shape, device=device).to(dtype).requires_grad_(), (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    ways = {"ours": (our_moments, kernels.distill_loss), "published": (published_moments, published_loss)}
    if device == "cuda":
        torch._dynamo.reset()
        ways["compiled"] = (torch.compile(published_moments), torch.compile(published_loss))
    result = {way: {name: measure(fn, device) for name, fn in stages(*fns, student, teacher).items()} for way, fns in ways.items()}
    moved, gradient = traffic(shape, dtype), student.numel() * dtype.itemsize
    for name in STAGES:
        seconds, peak = result["ours"][name]
        ratio = [f"{result[way][name][0] / seconds:8.2f}x" if way in result else "        -" for way in ("published", "compiled")]
        peaks = [result[way][name][1] if way in result else None for way in ("ours", "published", "compiled")]
        kept = gradient if name in ("backward", "together") else 0
        memory = ["       -" if p is None else f"{max(0, p - kept) / 2**20:8.1f}" for p in peaks]
        print(f"{'x'.join(map(str, shape)):>14} {str(dtype)[6:]:>8} {name:>9} {seconds * 1e6:10.1f} {moved[name] / 1e6:8.1f} "
              f"{moved[name] / seconds / 1e9:8.1f} {moved[name] / seconds / copy:6.0%} {' '.join(ratio)}  {' '.join(memory)}", flush=True)
    return {name: moved[name] / result["ours"][name][0] / copy for name in STAGES}


def draw(points, title, path):
    """points: (MB of one feature tensor, {stage: share}) -> a PNG of share of the copy bandwidth against size."""
    from PIL import Image, ImageDraw
    W, H, left, top, right, bottom = 900, 520, 70, 50, 870, 460
    image = Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(image)
    sizes = sorted(size for size, _ in points)
    ceiling = max(1.0, 0.2 * -(-max(max(share.values()) for _, share in points) // 0.2))
    span = max(1.01, sizes[-1] / sizes[0])
    spot = lambda size, share: (left + (right - left) * torch.tensor(size / sizes[0]).log().item() / torch.tensor(span).log().item(),
                                bottom - (bottom - top) * share / ceiling)
    pen.text((left, 18), title, "black")
    for k in range(round(ceiling / 0.2) + 1):
        y = spot(sizes[0], 0.2 * k)[1]
        pen.line((left, y, right, y), "#dddddd")
        pen.text((left - 40, y - 6), f"{20 * k} %", "black")
    shown = left - 100
    for size in sizes:
        x = spot(size, 0)[0]
        if x - shown > 60:
            pen.text((x - 12, bottom + 8), f"{size:.3g}", "black")
            shown = x
    pen.text((right - 150, H - 24), "MB of one feature tensor", "black")
    for k, (name, colour) in enumerate(zip(STAGES, ("#1f77b4", "#2ca02c", "#d62728", "#555555"))):
        for size, share in points:
            x, y = spot(size, share[name])
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        pen.ellipse((left + 120 * k, H - 22, left + 120 * k + 8, H - 14), fill=colour)
        pen.text((left + 120 * k + 14, H - 24), name, "black")
    image.save(path)


def compile_ahead(D, dtype, target=("cuda", 90, 32)):
    """{name: compiled kernel} as the launchers would have it for features of D channels; needs Triton, but no GPU.

    dtype: "bf16", "fp16" or "fp32"; target: backend, architecture, lanes of a warp. The strides are taken to be multiples of D.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from kernels import distill, moments
    block, warps, _, _ = distill.plan(D)
    rows, cols = moments.blocks(D)
    loss = {"BLOCK": block, "L1": False}
    plans = {"moments": (moments._partial_kernel, moments.WARPS, {"ROWS": rows, "UNROLL": moments.UNROLL, "COLS": cols}),
             "merge": (moments._merge_kernel, moments.WARPS, {"SETS": 256, "COLS": 16}),
             "forward": (distill._forward_kernel, warps, loss), "backward": (distill._backward_kernel, warps, loss)}
    types = {"x": dtype, "student": dtype, "teacher": dtype, "grad": dtype}
    integers = {"N", "D", "P", "rows", "tiles", "tiles_per_outer"} | {f"{x}_{y}" for x in ("x", "s", "t") for y in ("outer", "row")}
    result = {}
    for name, (kernel, num_warps, constants) in plans.items():
        scalar = {n: "i32" if n in integers else "fp32" for n in kernel.arg_names if n in integers | {"beta", "eps"}}
        signature = {n: "constexpr" if n in constants else scalar.get(n, "*" + types.get(n, "fp32")) for n in kernel.arg_names}
        aligned = [i for i, n in enumerate(kernel.arg_names)
                   if signature[n][0] == "*" or D % 16 == 0 and (n == "D" or n.endswith(("_outer", "_row")))]
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()},
                           {(i,): [["tt.divisibility", 16]] for i in aligned})
        result[name] = triton.compile(source, target=GPUTarget(*target), options={"num_warps": num_warps, "enable_fp_fusion": True})
    return result


def accesses(ptx):
    """Counter of (kind, bytes a thread moves) over the instructions that touch global memory in a kernel's PTX; kind: load or store."""
    found = Counter()
    for op, kinds in re.findall(r"\b(ld|st)\.global((?:[.:]\w+)*)", ptx):
        vector = int((re.findall(r"\.v(\d)", kinds) or [1])[0])
        found["load" if op == "ld" else "store", vector * int(re.findall(r"\.[bfsu](\d+)", kinds)[0]) // 8] += 1
    for size in re.findall(r"cp\.async\.c\w\.shared\.global(?:[.:]\w+)* [^;]*?\], (0x[0-9a-f]+|\d+)", ptx):
        found["load", int(size, 0)] += 1
    return found


def resources(cubin):
    """(registers of a thread, bytes of its stack, which is where spills go) by the cuobjdump that comes with Triton, or None without."""
    import triton
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1])


def print_compiled():
    print("compiled for sm_90; loads and stores of global memory: instructions x bytes a thread moves")
    print(f"{'kernel':>9} {'D':>5} {'type':>5} {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7}   loads; stores")
    for D in (768, 1024, 1536):
        for dtype in ("bf16", "fp32"):
            for name, kernel in compile_ahead(D, dtype).items():
                registers, stack = resources(kernel.asm["cubin"]) or ("-", "-")
                found = accesses(kernel.asm["ptx"])
                text = "; ".join(" ".join(f"{found[k]}x{k[1]}" for k in sorted(found) if k[0] == kind) for kind in ("load", "store"))
                print(f"{name:>9} {D:5} {dtype:>5} {kernel.metadata.num_warps:5} {registers:>9} {stack:>7} "
                      f"{kernel.metadata.shared:7}   {text}")


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="measures the kernels against the speed of memory")
    parser.add_argument("--out", default="kernels_bench.png", help="where to write the figure")
    parser.add_argument("--quick", action="store_true", help="D 1024 in bf16 only")
    parser.add_argument("--compiled", action="store_true", help="print registers, spills and access widths for sm_90; needs no GPU")
    args = parser.parse_args()
    if args.compiled:
        return print_compiled()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = copy_bandwidth(device)
    if device == "cuda":
        where = torch.cuda.get_device_name()
        torch._functorch.config.donated_buffer = False   # lets a compiled backward run twice on one graph
        shapes = [(B, *N, D) for D in (768, 1024, 1536) for B in (32, 128) for N in ((), (576,), (1024,))]
    else:
        where = f"a CPU ({torch.get_num_threads()} threads): PyTorch path, small sizes, no torch.compile, memory not measured"
        shapes = [(B, *N, D) for D in (768, 1024) for B in (2, 8) for N in ((), (576,))]
    dtypes = [torch.bfloat16, torch.float32]
    if args.quick:
        shapes, dtypes = [shape for shape in shapes if shape[-1] == 1024], dtypes[:1]
    print(f"{where}\ncopy bandwidth, read and written: {copy / 1e9:.1f} GB/s")
    print(f"{'shape':>14} {'type':>8} {'stage':>9} {'us':>10} {'MB':>8} {'GB/s':>8} {'share':>6} {'published':>9} {'compiled':>9}"
          f"   extra MB: ours, published, compiled")
    points = [(torch.Size(shape).numel() * dtype.itemsize / 1e6, bench(shape, dtype, device, copy)) for dtype in dtypes for shape in shapes]
    draw(points, f"share of copy bandwidth ({copy / 1e9:.0f} GB/s) on {where}", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
