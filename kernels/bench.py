"""The kernels' speed beside the memory bandwidth and the published expression:  python -m kernels.bench

Prints the bandwidth of a large copy. Then, for each shape, for moments, forward, backward and all three:
us         time
MB         bytes that must be read and written
GB/s       their ratio
copy       GB/s as a share of the copy bandwidth
published  how many times as long the published expression takes in eager mode
extra MB   on a GPU: peak memory beyond inputs and gradient, ours and the published expression's
"""

import argparse
import itertools
import timeit

import torch
import torch.nn.functional as F

from . import channel_moments, distill_loss

HEADER = "         shape     type    stage         us       MB     GB/s   copy published"


def published_moments(teacher):
    """Mean and std of every channel, as the published code computes them."""
    tokens = teacher.flatten(0, -2).float()
    return tokens.mean(0), tokens.std(0)


def published_loss(student, teacher, mean, std):
    """Standardization, cosine and smooth L1, as the published code writes them."""
    s = student.float()
    t = (teacher.float() - mean) / std.clamp(min=1e-3)
    cos = 1 - F.cosine_similarity(s, t, dim=-1)
    smooth = F.smooth_l1_loss(s, t, reduction="none").mean(-1)
    return cos, smooth


def our_moments(teacher):
    mean, m2 = channel_moments(teacher)
    tokens = teacher[..., 0].numel()
    return mean, (m2 / (tokens - 1)).sqrt()


def stages(moments, loss, student, teacher):
    """{stage: function without arguments to measure}."""
    mean, std = moments(teacher)
    losses = loss(student, teacher, mean, std)
    grad_losses = [torch.rand_like(x) for x in losses]
    return {
        "moments": lambda: moments(teacher),
        "forward": lambda: loss(student, teacher, mean, std),
        "backward": lambda: torch.autograd.grad(losses, student, grad_losses, retain_graph=True),
        "together": lambda: torch.autograd.grad(
            loss(student, teacher, *moments(teacher)), student, grad_losses),
    }


def traffic(shape, dtype):
    """{stage: bytes to read and write}: features, gradient, a number for each token and loss, statistics."""
    *lead, D = shape
    tokens = torch.Size(lead).numel()
    features = tokens * D * dtype.itemsize
    numbers = 8 * tokens + 8 * D
    result = {
        "moments": features + 8 * D,
        "forward": 2 * features + numbers,
        "backward": 3 * features + numbers,
    }
    result["together"] = sum(result.values())
    return result


def measure(function, device):
    """(seconds, peak memory in bytes beyond what was allocated before; 0 on a CPU)"""
    function()
    if device == "cpu":
        return min(timeit.repeat(function, number=1, repeat=5)), 0
    from triton.testing import do_bench
    seconds = do_bench(function, return_mode="median") / 1000   # clears the L2 cache between runs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return seconds, torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device):
    """Bytes a second, read and written, of a large copy."""
    size = 2**30 if device == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds, _ = measure(lambda: target.copy_(source), device)
    return 2 * size / seconds


def bench(shape, dtype, device, copy):
    """Measure one shape, print a line for each stage."""
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()
    teacher = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    ours = stages(our_moments, distill_loss, student, teacher)
    published = stages(published_moments, published_loss, student, teacher)
    name = "x".join(map(str, shape))
    for stage, moved in traffic(shape, dtype).items():
        seconds, held = measure(ours[stage], device)
        published_seconds, published_held = measure(published[stage], device)
        speed = moved / seconds
        line = f"{name:>14} {str(dtype)[6:]:>8} {stage:>8} {seconds * 1e6:10.1f} {moved / 1e6:8.1f}"
        line += f" {speed / 1e9:8.1f} {speed / copy:6.0%} {published_seconds / seconds:8.2f}x"
        if device == "cuda":
            grad = student.nbytes if stage in ("backward", "together") else 0
            line += f" {(held - grad) / 2**20:8.1f} {(published_held - grad) / 2**20:8.1f}"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description="Measures the kernels beside the memory's speed.")
    parser.add_argument("--quick", action="store_true", help="D 1024 in bf16 only")
    args = parser.parse_args()
    device, header = "cpu", HEADER
    where = f"a CPU ({torch.get_num_threads()} threads): the PyTorch path, small sizes"
    dtypes, widths = (torch.bfloat16, torch.float32), (768, 1024)
    batches, tokens = (2, 8), ((), (576,))
    if torch.cuda.is_available():
        device, header = "cuda", HEADER + "  extra MB: ours, published"
        where = torch.cuda.get_device_name()
        widths = (768, 1024, 1536)
        batches, tokens = (32, 128), ((), (576,), (1024,))
    if args.quick:
        dtypes, widths = (torch.bfloat16,), (1024,)
    copy = copy_bandwidth(device)
    print(f"{where}\ncopy bandwidth, read and written: {copy / 1e9:.1f} GB/s\n{header}")
    for dtype, D, B, N in itertools.product(dtypes, widths, batches, tokens):
        bench((B, *N, D), dtype, device, copy)


if __name__ == "__main__":
    main()
