"""How fast, and how near to the memory's own speed:  python -m kernels.bench [--quick] [--compiled]

Prints the measured copy bandwidth, then for every shape and for moments, forward, backward and the three together:
time, bytes that must move, GB/s, their share of the copy, the GB/s within this card's reach, how many times as long
the published way of writing it and torch.compile of that take, and the memory each holds beyond inputs and gradient.

--compiled needs no GPU: what the compiler makes of the kernels for four GPUs, and the share of the bandwidth on their
data sheets that is within reach, from instructions and bytes under way (`reach`).
"""

import argparse
import itertools
import pathlib
import re
import subprocess
import tempfile
import timeit
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import channel_moments, distill_loss

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
    mean, m2 = channel_moments(teacher)
    return mean, (m2 / (teacher[..., 0].numel() - 1)).sqrt()


def stages(moments, loss, student, teacher):
    """The four things to measure, as functions without arguments."""
    mean, std = moments(teacher)
    losses = loss(student, teacher, mean, std)
    upstream = [torch.rand_like(x) for x in losses]
    return {"moments": lambda: moments(teacher),
            "forward": lambda: loss(student, teacher, mean, std),
            "backward": lambda: torch.autograd.grad(losses, student, upstream, retain_graph=True),
            "together": lambda: torch.autograd.grad(loss(student, teacher, *moments(teacher)), student, upstream)}


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
        return min(timeit.repeat(fn, number=1, repeat=5)), None
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


def bench(shape, dtype, device, copy, reachable):
    """Measures one shape and prints a line for each stage."""
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()
    teacher = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    ways = {"ours": (our_moments, distill_loss), "published": (published_moments, published_loss)}
    if device == "cuda":
        torch._dynamo.reset()
        ways["compiled"] = (torch.compile(published_moments), torch.compile(published_loss))
    measured = {}
    for way, functions in ways.items():
        for name, fn in stages(*functions, student, teacher).items():
            measured[way, name] = measure(fn, device)
    for name, moved in traffic(shape, dtype).items():
        seconds = measured["ours", name][0]
        speed = moved / seconds
        cells = [f"{'x'.join(map(str, shape)):>14} {str(dtype)[6:]:>8} {name:>9} {seconds * 1e6:10.1f}",
                 f"{moved / 1e6:8.1f} {speed / 1e9:8.1f} {speed / copy:6.0%}",
                 f"{reachable[name] / 1e9:8.1f}" if name in reachable else "       -"]
        cells += [f"{measured[way, name][0] / seconds:8.2f}x" for way in ways if way != "ours"]
        if device == "cuda":
            kept = student.nbytes if name in ("backward", "together") else 0
            cells += [f"{max(0, measured[way, name][1] - kept) / 2**20:8.1f}" for way in ways]
        print(*cells, flush=True)


class Sheet(NamedTuple):
    """Of a GPU's data sheet."""
    target: tuple            # backend, architecture, lanes of a warp
    multiprocessors: int
    clock: float             # Hz
    bandwidth: float         # bytes a second


SHEETS = {"H100": Sheet(("cuda", 90, 32), 132, 1.755e9, 3.35e12),
          "H200": Sheet(("cuda", 90, 32), 132, 1.755e9, 4.8e12),
          "B200": Sheet(("cuda", 100, 32), 148, 1.85e9, 8e12),
          "MI300X": Sheet(("hip", "gfx942", 64), 304, 2.1e9, 5.3e12)}
LATENCY = 0.7e-6   # seconds until memory answers: bandwidth times this must be under way
ISSUE = 0.6        # share of its cycles in which a scheduler is taken to start an instruction, with two to four warps
TYPES = {"bf16": ("i32", 4, 2), "fp16": ("fp16", 2, 1), "fp32": ("fp32", 4, 1)}   # a word, its bytes, channels in it


def compile_ahead(D, dtype, target=("cuda", 90, 32), tokens=(128, 576), ones=(), names=(*STAGES[:3], "merge")):
    """{name: compiled kernel} as launched for contiguous features [*tokens, D]; needs Triton, but no GPU.

    dtype: "bf16", "fp16" or "fp32"; target: backend, architecture, lanes of a warp; ones: arguments that are 1, which
    Triton compiles in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import distill, moments
    kind, word, pair = (dtype, 2, 1) if dtype == "bf16" and D % 2 else TYPES[dtype]
    common = {"D": D, "PACK": pair, "VECTOR": 16 // word if D * pair % 16 == 0 else 1} | dict.fromkeys(ones, 1)
    rows, tile, _, _, _, sets = moments.plan(*tokens, D, pair, target[2])
    sets = triton.next_power_of_2(sets)
    kernels = {"moments": (moments._partial_kernel, moments.WARPS, common | {
                   "ROWS": rows, "UNROLL": moments.UNROLL, "TILE": tile}),
               "merge": (moments._merge_kernel, moments.WARPS, {"SETS": sets, "COLS": 4096 // sets})}
    for name in "forward", "backward":
        backward = name == "backward"
        rows, tile, warps, _ = distill.plan(backward, D, word, pair, distill.Card(target[2]))
        constants = common | {"BACKWARD": backward, "BETA": 1.0, "ROWS": rows, "TILE": tile}
        kernels[name] = distill._kernel, warps, constants if backward else constants | {"grad": None}
    pointers = dict.fromkeys(("mean", "std", "means", "m2s", "counts", "m2", "cos", "smooth"), "*fp32")
    pointers |= dict.fromkeys(("x", "student", "teacher"), f"*{kind}") | {"grad": f"*{dtype}"}
    result = {}
    for name in names:
        kernel, warps, constants = kernels[name]
        signature = {n: pointers.get(n, "fp32" if n == "eps" else "i32") for n in kernel.arg_names}
        constants = {n: value for n, value in constants.items() if n in signature}
        signature |= dict.fromkeys(constants, "constexpr")
        pointed = [i for i, type_ in enumerate(signature.values()) if type_[0] == "*"]
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointed})
        options = {"num_warps": warps, "enable_fp_fusion": True}
        result[name] = triton.compile(source, target=GPUTarget(*target), options=options)
    return result


def accesses(ptx):
    """Counter of (load or store, bytes that a lane moves) over the instructions on global memory in a kernel's PTX."""
    found = Counter()
    for op, kinds in re.findall(r"\b(ld|st)\.global((?:[.:]\w+)*)", ptx):
        vector = int((re.findall(r"\.v(\d)", kinds) or [1])[0])
        found["load" if op == "ld" else "store", vector * int(re.findall(r"\.[bfsu](\d+)", kinds)[0]) // 8] += 1
    for size in re.findall(r"cp\.async\.c\w\.shared\.global(?:[.:]\w+)* [^;]*?\], (0x[0-9a-f]+|\d+)", ptx):
        found["load", int(size, 0)] += 1
    return found


def code(kernel):
    """(registers of a lane, bytes or on ROCm registers spilled, instructions of the longest loop) of a compiled kernel.

    From GCN, where instructions are those for all lanes, or from SASS by Triton's cuobjdump; None without that."""
    import triton
    loops = [0]
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        vector = [m.start() for m in re.finditer(r"(?m)^[ \t]+(v|ds|global|buffer|flat)_", text)]
        labels = {m[1]: m.start() for m in re.finditer(r"(?m)^(\.L\w+):", text)}
        for m in re.finditer(r"(?m)^[ \t]+s_c?branch\w* +(\S+)", text):
            begin = labels.get(m[1], m.start())
            loops.append(sum(begin < at < m.start() for at in vector))
        used, spilled = (int(re.search(rf"\.vgpr_{what}: +(\d+)", text)[1]) for what in ("count", "spill_count"))
        return used, spilled, max(loops)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", "-sass", file.name], text=True)
    for at, to in re.findall(r"/\*([0-9a-f]{4,})\*/[^;\n]*\bBRA\b[^;\n]* 0x([0-9a-f]+)\s*;", text):
        loops.append((int(at, 16) - int(to, 16)) // 16 + 1)
    used, stack, local = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))
    return used, stack + local, max(loops)


def reach(card, D, dtype):
    """What of the bandwidth is within reach of each kernel on a card of SHEETS, {} without cuobjdump. As {name: (row of
    the table, bytes a second)}."""
    from . import distill, moments
    sheet = SHEETS[card]
    lanes = sheet.target[2]
    _, word, pair = TYPES[dtype]
    size = word // pair
    starts = sheet.multiprocessors * sheet.clock * (128 if lanes == 32 else 64)   # instructions of lanes, a second
    found = {}
    for name, kernel in compile_ahead(D, dtype, sheet.target, names=STAGES[:3]).items():
        compiled = code(kernel)
        if compiled is None:
            continue
        registers, spilled, loop = compiled
        if name == "moments":
            warps, programs = moments.WARPS, moments.PROGRAMS // sheet.multiprocessors
            elements = loads = 8 * moments.UNROLL   # of a lane in a turn of the loop; and under way
        else:
            gpu = distill.Card(lanes) if lanes == 32 else distill.Card(lanes, 1, 131072, 0)
            rows, _, warps, programs = distill.plan(name == "backward", D, word, pair, gpu)
            elements = rows * D / (lanes * warps)
            loads = 2 * 2 * elements                # two turns of student and teacher
        under_way = programs * warps * lanes * loads * size
        moved = {"moments": 1, "forward": 2, "backward": 3}[name] * size
        busy = sheet.bandwidth / moved * loop / elements / starts
        share = min(1, ISSUE / busy, under_way * sheet.multiprocessors / (sheet.bandwidth * LATENCY))
        row = f"{card:>6} {name:>8} {D:4} {dtype} {loop / elements:12.1f} {registers:9} {spilled:7}"
        row += f" {programs * warps:5} {under_way / 1e3:12.0f} {busy:4.0%} {share:5.0%}  "
        moves = sorted(accesses(kernel.asm.get("ptx", "")).items())
        found[name] = row + ", ".join(f"{n} {kind}s of {b}" for (kind, b), n in moves), share * sheet.bandwidth
    return found


def print_compiled(channels, dtypes):
    print("instructions: in the loop, for each element. busy: the share of cycles that they take at the bandwidth of\n"
          "the data sheet. reach: share of that within reach. At the end: loads and stores of so many bytes a lane.")
    print("  card   kernel    D type instructions registers spilled warps KB under way busy reach")
    for card, D, dtype in itertools.product(SHEETS, channels, dtypes):
        for row, _ in reach(card, D, dtype).values():
            print(row)


def run(quick):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = copy_bandwidth(device)
    sheet = None
    if device == "cuda":
        where = torch.cuda.get_device_name()
        sheet = next((card for card in SHEETS if card in where and "PCIe" not in where), None)
        torch._functorch.config.donated_buffer = False   # lets a compiled backward run twice on one graph
        channels, batches, tokens = (768, 1024, 1536), (32, 128), ((), (576,), (1024,))
    else:
        where = f"a CPU ({torch.get_num_threads()} threads): PyTorch path, small sizes, without torch.compile"
        channels, batches, tokens = (768, 1024), (2, 8), ((), (576,))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if quick:
        channels, dtypes = (1024,), {"bf16": torch.bfloat16}
    print(f"{where}\ncopy bandwidth, read and written: {copy / 1e9:.1f} GB/s")
    print("         shape     type     stage         us       MB     GB/s  share    reach published",
          " compiled  extra MB: ours, published, compiled" if device == "cuda" else "")
    for short, dtype in dtypes.items():
        for D, batch, N in itertools.product(channels, batches, tokens):
            found = reach(sheet, D, short) if sheet else {}
            reachable = {name: speed for name, (_, speed) in found.items()}
            bench((batch, *N, D), dtype, device, copy, reachable)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    parser = Parser(prog=f"python -m {__spec__.name}", description="measures the kernels against the speed of memory")
    parser.add_argument("--quick", action="store_true", help="D 1024 in bf16 only")
    parser.add_argument("--compiled", action="store_true", help="print what is compiled and within reach: no GPU")
    args = parser.parse_args()
    if args.compiled:
        print_compiled([1024] if args.quick else [384, 768, 1024, 1536], ["bf16"] if args.quick else ["bf16", "fp32"])
    else:
        run(args.quick)


if __name__ == "__main__":
    main()
