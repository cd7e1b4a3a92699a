"""The kernels' speed beside the memory bandwidth and the published expression:  python -m kernels.bench

Prints the bandwidth of a large copy. Then, for each shape, for moments, forward, backward and all three:
us         time
MB         bytes that must be read and written
GB/s       their ratio
copy       GB/s as a share of the copy bandwidth
published  how many times as long the published expression takes in eager mode
compiled   on a GPU: the same, under torch.compile
extra MB   on a GPU: peak memory beyond inputs and gradient, of all three
"""

import timeit

import torch
import torch.nn.functional as F

from . import channel_moments, distill_loss

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {   # patch tokens of a batch, and class tokens
    "cuda": [
        ((128, 576, 768), BF16),
        ((128, 576, 1024), BF16),
        ((128, 576, 1536), BF16),
        ((128, 576, 1024), FP32),
        ((128, 1024), BF16),
    ],
    "cpu": [
        ((2, 576, 768), BF16),
        ((8, 576, 1024), BF16),
        ((2, 576, 1024), FP32),
        ((8, 1024), BF16),
    ],
}
HEADER = "         shape     type    stage         us       MB     GB/s   copy published"
GPU_HEADER = " compiled  extra MB: ours published  compiled"


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


def ways(device):
    """[(moments, loss)]: ours, the published expression in eager mode and, on a GPU, compiled."""
    result = [(our_moments, distill_loss), (published_moments, published_loss)]
    if device == "cuda":
        from torch._functorch import config
        config.donated_buffer = False   # backward runs more than once
        compiled = [torch.compile(function, dynamic=False) for function in result[1]]
        result.append(compiled)
    return result


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
    size = 2**28 if device == "cuda" else 2**25
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    seconds, _ = measure(lambda: target.copy_(source), device)
    return 2 * source.nbytes / seconds


def bench(shape, dtype, device, copy):
    """Measure one shape, print a line for each stage."""
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()
    teacher = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    all_stages = [stages(*way, student, teacher) for way in ways(device)]
    name = "x".join(map(str, shape))
    for stage, moved in traffic(shape, dtype).items():
        measured = [measure(functions[stage], device) for functions in all_stages]
        (seconds, _), *others = measured
        speed = moved / seconds
        line = f"{name:>14} {str(dtype)[6:]:>8} {stage:>8} {seconds * 1e6:10.1f} {moved / 1e6:8.1f}"
        line += f" {speed / 1e9:8.1f} {speed / copy:6.0%}"
        for other_seconds, _ in others:
            line += f" {other_seconds / seconds:8.2f}x"
        if device == "cuda":
            grad = student.nbytes if stage in ("backward", "together") else 0
            line += "     "
            for _, held in measured:
                line += f" {(held - grad) / 2**20:9.1f}"
        print(line, flush=True)


def main():
    device, header = "cpu", HEADER
    where = f"a CPU ({torch.get_num_threads()} threads): the PyTorch path, small sizes"
    if torch.cuda.is_available():
        device, header = "cuda", HEADER + GPU_HEADER
        where = torch.cuda.get_device_name()
    copy = copy_bandwidth(device)
    print(f"{where}, torch {torch.__version__}")
    print(f"copy bandwidth, read and written: {copy / 1e9:.1f} GB/s\n{header}")
    for shape, dtype in SHAPES[device]:
        bench(shape, dtype, device, copy)


if __name__ == "__main__":
    main()
