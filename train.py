"""Distill frozen teachers into one student.

    torchrun train.py --preset tiny                 # a quick demo on a laptop, no download
    torchrun --nproc_per_node=8 train.py --teachers dinov2,mast3r,multihmr \\
        --data dinov2=/d/in1k --data mast3r=/d/habitat --data multihmr=/d/bedlam     # the published stage 1
    torchrun --nproc_per_node=8 train.py --preset stage2 --init out/stage1/checkpoint.pt --data ...

`python train.py ...` runs a single process. A run writes into its folder: checkpoint.pt, log.jsonl,
plot.png, pca.png, bad_images.txt, and lock, which keeps a second run out. The same command started again
continues where it stopped. SIGTERM and SIGUSR1 end a run within ten steps, with a checkpoint and exit code 0.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.utils.benchmark
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import dune
from dune import UserError
from kernels.muon import Muon
from teachers import TEACHERS, fast_bf16, list_teachers, load_teacher


# ---- Options -----------------------------------------------------------------------------------------------
# {name: (default, help[, (lowest, highest) or choices])}; numbers are at least 0 by default.

RECIPE = {  # options that affect the result; the defaults are the published first stage
    "teachers": ("dinov2,mast3r,multihmr", "comma-separated names, see --list-teachers"),
    "arch": ("base", "size of the student", dune.SIZES),
    "patch_size": (14, "patch size of the student, pixels", (1, 64)),
    "image_size": ("336", "side of the training images, pixels; several: 224,336,448, one in each step"),
    "registers": (4, "register tokens of the student"),
    "layer_scale": (1e-4, "initial LayerScale of the student, 0 = none"),
    "drop_path": (0.0, "stochastic depth of the student's last block", (0, 0.99)),
    "projector": ("tp", "tp: transformer, sp: simple, lp: UNIC's ladder", dune.PROJECTORS),
    "norm": ("dune", "standardize by batch statistics (dune) or running averages (unic)", ("dune", "unic")),
    "sharing": ("all", "which teachers supervise an image: all, own, or all if it is generic", data.SHARING),
    "drop": (0.5, "teacher dropping probability", (0, 1)),
    "batch": (0, "images per step over all processes; 0 = 128 per process"),
    "epochs": (100.0, "length of the run, in epochs of --epoch-images", (1e-6, 1e6)),
    "epoch_images": (1_281_167, "images in an epoch", (1, 1e11)),
    "steps": (0, "length of the run in steps, instead of --epochs"),
    "optimizer": ("adamw", "muon: Muon for the matrices of attention and MLPs", ("adamw", "muon")),
    "muon_lr": (2.0, "learning rate of Muon, as a multiple of --lr"),
    "lr": (3e-4, "learning rate for a batch of 256; scaled linearly with the batch"),
    "min_lr": (1e-6, "learning rate at the end"),
    "warmup": (0.2, "fraction of the run in which the learning rate rises", (0, 1)),
    "weight_decay": (0.03, "weight decay of matrices; biases and 1-D parameters have none"),
    "beta1": (0.9, "AdamW beta1", (0, 0.99999)),
    "beta2": (0.99, "AdamW beta2", (0, 0.99999)),
    "eps": (1e-15, "AdamW eps"),
    "clip": (1.0, "max gradient norm, per parameter tensor; 0 = no clipping"),
    "crop": (0.4, "smallest fraction of the image's area that a random crop keeps", (0.01, 1)),
    "color": (1.0, "fraction of the images with color augmentation", (0, 1)),
    "seed": (0, "random seed of weights, order, crops and dropping"),
    "dtype": ("auto", "bf16: autocast; auto: bf16 if supported natively", ("auto", "fp32", "bf16")),
}
PRESETS = {
    "stage1": {},
    "stage2": dict(image_size="448", epochs=50.0, lr=5e-5),          # with --init out/stage1/checkpoint.pt
    "unic": dict(teachers="dino,deit3,ibot,dbotft", patch_size=16, image_size="224", registers=0,
                 layer_scale=0.0, drop_path=0.1, projector="lp", norm="unic", epochs=200.0, warmup=0.05,
                 crop=0.08, clip=0.0, eps=1e-8),
    "tiny": dict(arch="tiny", image_size="112", batch=24, steps=600, sharing="own", optimizer="muon",
                 muon_lr=4.0, lr=26e-3, warmup=0.1, projector="sp", layer_scale=0.0, crop=1.0, color=0.0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_THE_MACHINE = {"batch": 0, "steps": 0, "dtype": "auto"}  # settled by resolve_args(), then kept by the run
TINY_SCENES = ":1000000-1002500"  # seeds of the tiny preset's scenes; its teachers have not seen them
RUN_OPTIONS = {  # options that do not affect the result, up to rounding: a resumed run may change them
    "preset": ("stage1", "a set of defaults, see PRESETS in this file", PRESETS),
    "data": ([], "TEACHER=SOURCE[,SOURCE]: folders, .tar, .txt lists; without any: procedural scenes"),
    "val": ([], "held-out images for --eval-every, like --data; without any: unseen procedural scenes"),
    "weights": ([], "TEACHER=FILE: weights of a teacher, instead of downloading them"),
    "random_teachers": (False, "random weights of the published size: for measuring only"),
    "init": (None, "start from this student, at any image size, or from a teacher's encoder of its shape"),
    "out": (None, "folder of the run (default: out/PRESET)"),
    "resume": ("yes", "continue the run in --out, or start over", ("yes", "no")),
    "log_every": (10, "steps between lines of the log", (1, 1e9)),
    "eval_every": (0, "steps between evaluations on held-out images; 0 = steps / 20"),
    "save_every": (1000, "steps between checkpoints", (1, 1e9)),
    "workers": (-1, "data workers per process; -1 = all cores; on a CPU, all but two", (-1, 256)),
    "accumulate": (1, "number of micro-batches of each process, to save memory", (1, 1e6)),
    "recompute": (False, "recompute the student's blocks in the backward pass to save memory"),
    "compile": ("auto", "torch.compile teachers and student; auto = on GPUs", ("auto", "yes", "no")),
    "device": ("auto", "auto = cuda if there is one", ("auto", "cpu", "cuda")),
    "bench": (0, "measure this number of steps of each image size, write nothing"),
    "plot": (None, "comma-separated run folders: draw their logs into one plot and exit"),
    "show_data": (None, "print what --data holds, write samples to this PNG and exit"),
    "list_teachers": (False, "print the teachers, their licenses and files, and exit"),
}


# ---- The loop ----------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    if args.list_teachers:
        return list_teachers()
    if args.plot:
        return print("wrote", plot_logs(args.plot.split(",")))

    # Data. A group is a set of images of the same teachers. Every batch has equally many of each group.
    specs = {name: TEACHERS[name] for name in args.teachers}
    groups = data.parse_data(args.data, specs, TINY_SCENES if args.preset == "tiny" else "")
    group_mask = data.teacher_mask(groups, args.teachers, args.sharing)   # bool [groups, T]
    held_out_groups = data.parse_data(args.val, specs)
    args.images = "; ".join([*args.data, *[f"{group.name}: {group.count} images" for group in groups]])
    if args.show_data:
        return data.show_data(groups, args.teachers, max(args.image_sizes), args.show_data)

    # Teachers, student, optimizer
    rank, world, device = init_distributed(args.device)
    lock = lock_folder(args, rank)                                    # held until this process ends
    checkpoint = read_checkpoint(args, rank)                          # None: a new run
    resolve_args(args, world, device, group_mask)
    source, teachers = load_networks(args, device, checkpoint)
    student = build_student(args, source, teachers, checkpoint).to(device)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer, start = build_optimizer(args, student, checkpoint)     # start: number of steps already done
    count = 32 if max(args.image_sizes) <= 128 else 8                 # held-out images of each group
    images = [data.held_out_images(held_out_groups, size, count).to(device) for size in args.image_sizes]
    held_out = HeldOut(images, teachers, args.patch_size)
    model = compile_and_wrap(args, student, teachers, world, device)
    loader = data.batches(groups, args.image_sizes, args.batch, args.seed, rank, world, start, args.workers,
                          (args.crop, 1.0), args.color)
    parts = model, student, teachers, optimizer, params, group_mask, rank, world
    print_config(args, rank, world, device, teachers)
    if args.bench:
        return bench(args, loader, parts)
    log = Log(args, rank, start)
    stop = StopSignal()

    for step in range(start, args.steps):
        if step % args.eval_every == 0:
            log.evaluate(step, student, held_out)
        batch = next(loader)
        log.add(batch, train_step(args, step, batch, *parts))         # accumulated on the device: no sync
        done = step + 1
        last = done == args.steps or stop.requested(done)             # the same on all processes
        if done % args.log_every == 0 or last:
            log.write(done, optimizer)                                # syncs with the device
        if done % args.save_every == 0 or last:
            save_checkpoint(args, rank, done, student, optimizer, teachers)
        if last:
            break
    finish(args, log, student, teachers, held_out)


def train_step(args, step, batch, model, student, teachers, optimizer, params, group_mask, rank, world):
    """One update of the student. Returns metrics for the log, {(teacher, term): [sum, count]}, on the device.

    The teacher of what concerns the whole step is "".
    Shapes: b images on this process, b_t of them supervised by teacher t, T teachers, N patch tokens.
    """
    device = params[0].device
    images = data.augment(batch["image"].to(device, non_blocking=True), batch["params"])   # [b, 3, S, S]
    teacher_mask = group_mask[batch["group"]]   # bool [b, T], on the CPU: may teacher t supervise image i?
    index = {name: teacher_mask[:, t].nonzero()[:, 0] for t, name in enumerate(teachers)}  # [b_t], sorted
    uniform = dropping_uniform(args, step, rank, world)                                    # [b, T], U(0, 1)
    torch.manual_seed(step_seed(args, step) + 1 + rank)  # of stochastic depth: resuming is reproducible

    # 1. The frozen teachers, each on the images it supervises: {"cls": [b_t, D_t] or None, "patch"}
    grid = dune.token_grid(images, args.patch_size)
    features = {name: teachers[name](images[to_device(index[name], device)], grid) for name in teachers}

    # 2. Mean and std per channel, teacher and token type, over the images of all processes
    momentum = schedule(step, args.steps, 1, 0.001)  # of the running averages
    statistics = dune.update_norms(student.teacher_norms, features, momentum)

    # 3. Student, loss, backward, one micro-batch after the other. The loss of the step is sum(c * l) / sum(c)
    #    over all images of all processes. The coefficients c depend on the losses, so sum(c) is known only
    #    after the last micro-batch: the gradients of sum(c * l) are accumulated, and divided in step 4.
    metrics = {}
    coefficient_total = 0
    for begin, end in micro_batches(len(images), args.accumulate):
        part_index, targets = select(index, features, begin, end)
        part_mask = to_device(teacher_mask[begin:end], device)
        part_uniform = to_device(uniform[begin:end], device)
        model.require_backward_grad_sync = end == len(images)         # DDP: communicate in the last one only
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            outputs = model(images[begin:end], part_index)
        losses, terms = dune.batch_losses(outputs, targets, statistics, part_index, end - begin)   # [b, T]
        coefficients = dune.teacher_coefficients(losses, part_mask, args.drop, part_uniform)       # [b, T]
        loss_sum, coefficient_sum = dune.weighted_sum(losses, coefficients)
        loss_sum.backward()
        coefficient_total = coefficient_total + coefficient_sum
        add_metrics(metrics, losses, terms, part_index, loss_sum, coefficient_sum)

    # 4. An update. DDP leaves grad(sum(c * l)) / world: times world / sum(c) it is the gradient of the loss.
    for group in optimizer.param_groups:
        lr = schedule(step, args.steps, args.lr * args.batch / 256, args.min_lr, args.warmup)
        group["lr"] = lr * args.muon_lr if group.get("muon") else lr
    grad_norm, skipped = update(params, optimizer, world / all_sum(coefficient_total), args.clip)
    metrics["", "grad_norm"] = torch.stack([torch.where(skipped > 0, 0, grad_norm), 1 - skipped])
    metrics["", "skipped"] = torch.stack([skipped, torch.ones_like(skipped)])
    return metrics


# ---- What a step consists of -------------------------------------------------------------------------------

def step_seed(args, step):
    return args.seed + 7919 * step


def dropping_uniform(args, step, rank, world):
    """Uniform numbers for teacher dropping, [b, T]: this process's part of those of the global batch.

    They are drawn for the global batch, so that any number of processes gives the same run.
    """
    generator = torch.Generator().manual_seed(step_seed(args, step))
    uniform = torch.rand(args.batch, len(args.teachers), generator=generator)
    return uniform.chunk(world)[rank]


def to_device(x, device):
    """Copy a CPU tensor to the device. The host does not wait for it, which takes pinned memory."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def micro_batches(count, number):
    """(begin, end) of `number` nearly equal parts of `count` images."""
    bounds = [count * i // number for i in range(number + 1)]
    return zip(bounds, bounds[1:])


def select(index, features, begin, end):
    """For images begin..end of a batch: {teacher: which of them it supervises}, {teacher: its features}."""
    part_index = {}
    targets = {}
    for name, supervised in index.items():
        first, last = torch.searchsorted(supervised, torch.tensor([begin, end])).tolist()
        tokens = {token_type: x[first:last] for token_type, x in features[name].items() if x is not None}
        part_index[name] = to_device(supervised[first:last] - begin, tokens["patch"].device)
        targets[name] = tokens
    return part_index, targets


def add_metrics(metrics, losses, terms, index, loss_sum, coefficient_sum):
    """Add [sum, count] of a micro-batch's losses and their terms to `metrics`, all on the device."""
    pairs = {("", "loss"): (loss_sum, coefficient_sum)}
    for t, name in enumerate(terms):
        rows = index[name]
        values = {**terms[name], "loss": losses[rows, t]}
        for term, value in values.items():
            pairs[name, term] = value.sum(), value.new_full((), len(value))
    for key, pair in pairs.items():
        metrics[key] = metrics.get(key, 0) + torch.stack(pair).detach()


def all_sum(x):
    """x summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def update(params, optimizer, scale, clip):
    """Scale the gradients, clip the norm of each tensor on its own (as published), one step of the optimizer.

    A gradient that is not finite skips the step on the device, as GradScaler does: fused AdamW and Muon do
    nothing where found_inf is 1. The gradients are the same on all processes by now, so all skip together.
    Returns (norm of all gradients before clipping, 1.0 if the step was skipped else 0.0), tensors on the
    device.
    """
    grads = [p.grad for p in params]
    norms = torch.stack(torch._foreach_norm(grads)) * scale
    factors = scale.expand(len(grads))
    if clip:
        factors = scale * (clip / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(grads, list(factors.unbind()))
    grad_norm = norms.norm()
    skipped = 1 - grad_norm.isfinite().float()
    optimizer.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm, skipped


def schedule(step, steps, high, low, warmup=0):
    """Linear from 0 to high over the first warmup * steps steps, then a cosine to low."""
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return high * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


# ---- Building teachers and student -------------------------------------------------------------------------

def load_networks(args, device, checkpoint):
    """(what a new student starts from: a DUNE, a ViT or None; {name: FrozenTeacher} on the device).

    The first process of a machine downloads, others wait.
    """
    first = local_rank() == 0
    if not first:
        wait_for_all()
    source = None
    if args.init and not checkpoint:  # before the teachers: a mistake is told before their download
        is_teacher = args.init in TEACHERS
        source = load_teacher(args.init, args.weights[args.init]).vit if is_teacher else dune.load(args.init)
    teachers = {}
    for name in args.teachers:
        teachers[name] = load_teacher(name, args.weights[name], device, DTYPES[args.dtype])
    if first:
        wait_for_all()
    return source, teachers


def build_student(args, source, teachers, checkpoint):
    """The student on the CPU: a new one, one that starts from --init, or that of the run to resume."""
    torch.manual_seed(args.seed)                              # the same initial weights on every process
    encoder = dune.ViT(max(args.image_sizes), args.patch_size, registers=args.registers,
                       drop_path=args.drop_path, layer_scale=args.layer_scale or None,
                       **dune.SIZES[args.arch])
    encoder.checkpoint_blocks = args.recompute
    dims = {name: (teacher.dim, teacher.has_cls) for name, teacher in teachers.items()}
    student = dune.DUNE(encoder, dims, args.projector, args.norm)
    if checkpoint:
        with dune.user_errors(args.checkpoint):
            for name, fingerprint in checkpoint.get("fingerprints", {}).items():
                if fingerprint != teachers[name].fingerprint:
                    raise UserError(f"the run has had another {name} than {teachers[name].file}: give it by "
                                    "--weights, or use another --out")
            dune.load_strict(student, checkpoint["model"])
    elif source:
        init_encoder(encoder, getattr(source, "encoder", source), args.init)
        projector = getattr(source, "projector", args.projector)
        if projector != args.projector:
            raise UserError(f"{args.init} is of --projector {projector}; for its encoder alone write "
                            f"--init dune_base --weights dune_base={args.init}")
        state = {key: x for key, x in source.state_dict().items() if not key.startswith("encoder.")}
        with dune.user_errors(args.init):
            student.load_state_dict(state, strict=False)  # projectors and statistics of the same teachers
    return student


def init_encoder(encoder, source, path):
    """Load the weights of another encoder of the same shape. UserError names the option of another one.

    Positions of another grid are interpolated to the size; registers that the source lacks keep their initial
    values.
    """
    ours = encoder_options(encoder)
    for option, value in encoder_options(source).items():
        if value != ours[option] and (value or option != "--registers"):
            raise UserError(f"{path} is of {option} {value}, the student of {ours[option]}")
    state = source.state_dict()
    if source.pos_embed is not None:
        state["pos_embed"] = source.interpolate_pos_embed(encoder.grid, encoder.grid, "size")
    if source.register_tokens is None and encoder.register_tokens is not None:
        state["register_tokens"] = encoder.register_tokens.detach()
    with dune.user_errors(path):
        dune.load_strict(encoder, state)


def encoder_options(vit):
    """{option: its value} of a student with such an encoder."""
    shape = dict(embed_dim=vit.embed_dim, depth=len(vit.blocks), num_heads=vit.num_heads)
    names = [name for name, size in dune.SIZES.items() if size == shape]
    layer_scale = 1e-4 if isinstance(vit.blocks[0].ls1, dune.LayerScale) else 0
    return {
        "--arch": ", ".join(names) or shape,
        "--patch-size": vit.patch_size,
        "--registers": vit.registers,
        "--layer-scale": layer_scale,
    }


def build_optimizer(args, student, checkpoint):
    """(AdamW, perhaps with Muon; number of steps already done). No weight decay for 1-D parameters."""
    matrices, others = dune.split_matrices(student)
    if args.optimizer == "adamw":
        others = student.parameters()
    params = [p for p in others if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "muon":
        groups.append({"params": matrices, "weight_decay": args.weight_decay, "muon": DTYPES[args.dtype]})
    optimizer = Muon(groups, args.lr, (args.beta1, args.beta2), args.eps, fused=True)
    if checkpoint is None:
        return optimizer, 0
    with dune.user_errors(args.checkpoint):
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = int(checkpoint["step"])
        if not 0 <= step <= args.steps:
            raise UserError(f"step {step} > --steps {args.steps}")
    return optimizer, step


def compile_and_wrap(args, student, teachers, world, device):
    """The student as train_step calls it: compiled if asked for, and in DistributedDataParallel."""
    if args.compile == "yes" or args.compile == "auto" and device.type == "cuda":
        # Blocks of the same shape share a graph: a ViT-L is compiled in a fourth of the time.
        torch._dynamo.config.recompile_limit = 256   # for each shape of a block, number of images and size
        modules = [*student.encoder.blocks, *student.projectors.values()]
        for teacher in teachers.values():
            modules += teacher.vit.blocks
        for module in modules:
            module.compile(dynamic=False)
    if world == 1:
        return student
    return DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)


def print_config(args, rank, world, device, teachers):
    if rank == 0:
        for name, teacher in teachers.items():
            print(f"teacher {name}: {data.printable(teacher.file)}")
        note = "; random teacher weights: losses are meaningless" if args.random_teachers else ""
        tokens = [f"{args.batch * (size // args.patch_size)**2:,}" for size in args.image_sizes]
        print(f"{len(args.teachers)} teachers, {args.steps} steps of {args.batch} images at {args.image_size}"
              f" px ({' or '.join(tokens)} patch tokens a step), {world} process(es) on {device.type}, "
              f"{args.dtype}{note}")


# ---- Evaluation on held-out images, pictures ---------------------------------------------------------------

class HeldOut:
    """Images that no run trains on, and their teachers' features, computed once.

    images: a list, for each image size uint8 [n, 3, H, W]
    """

    def __init__(self, images, teachers, patch_size):
        self.images = images
        self.inputs = [data.normalize(batch) for batch in images]
        self.features = []
        for inputs in self.inputs:
            grid = dune.token_grid(inputs, patch_size)
            self.features.append({name: teacher(inputs, grid) for name, teacher in teachers.items()})

    @torch.no_grad()
    def losses(self, student, running=False):
        """{teacher: {"loss", "cls_cos", "cls_smooth_l1", "patch_cos", "patch_smooth_l1"}}, means over images.

        With several sizes there is one for each, with the size in its name.
        The features are standardized by their own statistics, so that a student that has learned nothing yet
        can be compared. running=True: by the running averages.
        """
        results = {}
        training = student.training
        student.eval()
        for inputs, features in zip(self.inputs, self.features):
            with torch.compiler.set_stance("force_eager"):  # this batch size is not worth a compilation
                outputs = student(inputs)
            size = f" {inputs.shape[-1]} px" if len(self.inputs) > 1 else ""
            for name, tokens in features.items():
                norm = student.teacher_norms[name]
                statistics = {}
                for token_type in norm.normalizers:
                    flat = tokens[token_type].float().flatten(0, -2)  # [tokens, D_t]
                    std, mean = torch.std_mean(flat, 0, correction=0)
                    batch = mean, std.clamp(min=1e-3)
                    statistics[token_type] = norm.statistics(token_type) if running else batch
                loss, terms = dune.image_losses(outputs[name], tokens, statistics)
                terms["loss"] = loss
                results[name + size] = {term: value.mean().item() for term, value in terms.items()}
        student.train(training)
        return results


def finish(args, log, student, teachers, held_out):
    """Print the held-out losses at the start and the end of a run, and write its pictures."""
    log.bar.close()
    if log.rank == 0 and log.last_step < args.steps:
        print(f"stopped at step {log.last_step} of {args.steps}; the same command continues")
    elif log.rank == 0:
        log.evaluate(args.steps, student, held_out)
        evaluations = [line["held_out"] for line in read_log(args.out) if "held_out" in line]
        images = held_out.images[0]
        print(f"\nloss on {len(images)} held-out images\n"
              f"{'teacher':16}{'at the start':>14}{'at the end':>12}")
        for name, loss in evaluations[-1].items():
            print(f"{name:16}{evaluations[0][name]:14.4f}{loss:12.4f}")
        images = images[::len(images) // 6 or 1]  # of all groups
        with torch.compiler.set_stance("force_eager"):
            picture = data.pca_sheet(student, teachers, images, f"{args.out}/pca.png")
        print(f"\nwrote {args.checkpoint}, {args.out}/log.jsonl, {plot_logs([args.out])}, {picture}")
    leave()


# ---- The log -----------------------------------------------------------------------------------------------

class Log:
    """log.jsonl, bad_images.txt and the progress bar. Metrics are accumulated on the device between lines."""

    def __init__(self, args, rank, start):
        self.args = args
        self.rank = rank
        self.sums = {}                 # {(teacher or "", term): [sum, count]}
        self.bad_images = []
        self.consecutive_skips = 0
        self.last_step = start
        self.last_time = time.perf_counter()
        self.bar = tqdm(initial=start * args.batch, total=args.steps * args.batch, unit=" images",
                        disable=rank > 0)
        if rank == 0 and start == 0:
            open(f"{args.out}/log.jsonl", "w").close()

    def add(self, batch, metrics):
        for key, pair in metrics.items():
            self.sums[key] = self.sums.get(key, 0) + pair
        self.consecutive_skips = (self.consecutive_skips + 1) * metrics["", "skipped"][0]
        self.bad_images += batch["bad"]
        self.bar.update(self.args.batch)

    def write(self, step, optimizer):
        """A line of the log: means over all processes since the last one. Ten skipped steps raise."""
        sums = all_sum(torch.stack(list(self.sums.values()))).tolist()
        now = time.perf_counter()
        line = {
            "step": step,
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_s": (step - self.last_step) * self.args.batch / (now - self.last_time),
        }
        for (teacher, term), (total, count) in zip(self.sums, sums):
            place = line.setdefault(teacher, {}) if teacher else line
            place[term] = total / count if count else None
        self.append(line)
        if self.bad_images:
            with open(f"{self.args.out}/bad_images.txt", "a") as file:
                file.writelines(f"{reason}\n" for reason in self.bad_images)
        losses = " ".join(f"{name} {line[name]['loss']:.3f}" for name in self.args.teachers)
        self.bar.set_postfix_str(losses, refresh=False)
        if self.consecutive_skips >= 10:
            raise UserError(f"gradients were not finite for ten steps until step {step} (losses: {losses}); "
                            f"the last good state, if any, is in {self.args.checkpoint}")
        self.sums = {}
        self.bad_images = []
        self.last_step = step
        self.last_time = now

    def evaluate(self, step, student, held_out):
        """Log the loss of every teacher on held-out images (first process). Syncs with the device."""
        if self.rank == 0:
            losses = {name: terms["loss"] for name, terms in held_out.losses(student).items()}
            self.append({"step": step, "held_out": losses})
            self.bar.set_description(f"held-out loss {sum(losses.values()) / len(losses):.3f}")

    def append(self, line):
        if self.rank == 0:
            with open(f"{self.args.out}/log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(folder):
    """The lines of a run's log.jsonl, dicts with a "step", in order; [] if there is no log.

    A resumed run writes the steps after its checkpoint again: of several lines of a step the last one counts,
    and lines of steps that the run has not reached again are left out. So is a line that a crash has cut
    short.
    """
    path = f"{folder}/log.jsonl"
    if not os.path.exists(path):
        return []
    lines = {}
    with open(path, errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                last_step = int(line["step"])
            except (ValueError, TypeError, KeyError):
                continue
            lines[last_step, "held_out" in line] = line
    return [lines[key] for key in sorted(lines) if key[0] <= last_step]


def plot_logs(folders):
    """Draw the losses of runs over each other, into plot.png of the first one's folder. Returns its path."""
    panels = {"training loss": {}, "held-out loss": {}}
    for folder in folders:
        run = f"{os.path.basename(os.path.abspath(folder))} " if len(folders) > 1 else ""
        with dune.user_errors(f"{folder}/log.jsonl"):
            for line in read_log(folder):
                held_out = "held_out" in line
                panel = panels["held-out loss" if held_out else "training loss"]
                for name, value in line.get("held_out", line).items():
                    loss = value if held_out else isinstance(value, dict) and value["loss"]
                    if loss and math.isfinite(loss):  # None: the teacher had no image
                        steps, losses = panel.setdefault(run + name, ([], []))
                        steps.append(line["step"])
                        losses.append(loss)
    if not panels["training loss"]:
        raise UserError(f"no log.jsonl with losses of a run in {', '.join(folders)}")
    return data.line_plot(os.path.join(folders[0], "plot.png"), panels)


# ---- Checkpoints -------------------------------------------------------------------------------------------

def lock_folder(args, rank):
    """The open file that keeps other runs out of --out while this process lives. UserError if one is in."""
    if args.bench:  # writes nothing
        return
    data.check_writable(args.out)
    lock = open(f"{args.out}/lock", "w")
    busy = 0
    try:
        import fcntl
        if rank == 0:  # lockf: data workers inherit the file, and with flock they would inherit the lock
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = 1
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    if all_sum(torch.tensor(busy)):
        raise UserError(f"another run is writing to {args.out}: wait until it ends, or use another --out")
    return lock


def read_checkpoint(args, rank):
    """The checkpoint of the run in --out, None if there is none. UserError if its recipe is another one.

    What args leaves to the machine becomes what the run began with, on whatever machine.
    """
    if args.resume == "no" or args.bench or not os.path.exists(args.checkpoint):
        return None
    checkpoint = dune.load_checkpoint(args.checkpoint)
    with dune.user_errors(args.checkpoint):
        for name in RECIPE:
            trained_with = checkpoint["args"].get(name, RECIPE[name][0])  # older runs lack newer options
            value = getattr(args, name)
            if value == OF_THE_MACHINE.get(name) and type(value) is type(trained_with):
                setattr(args, name, trained_with)
            elif str(value) != str(trained_with):  # --image-size was a number
                before, now = [",".join(x) if isinstance(x, list) else x for x in (trained_with, value)]
                raise UserError(f"was trained with --{name.replace('_', '-')} {before}, not {now}: "
                                "use another --out, or --resume no to start over")
        images = checkpoint.get("images", args.images)
        if rank == 0 and images != args.images:
            print(data.printable(f"data: not as before. Before: {images}. Now: {args.images}"))
    return checkpoint


def save_checkpoint(args, rank, step, student, optimizer, teachers):
    """Write a temporary file, then rename it: a crash never leaves half a checkpoint."""
    if rank == 0:
        content = {
            "model": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "args": {name: getattr(args, name) for name in RECIPE},
            "weights": args.weights,
            "images": args.images,
            "fingerprints": {name: teacher.fingerprint for name, teacher in teachers.items()},
        }
        with data.atomic_write(args.checkpoint) as file:
            torch.save(content, file)


# ---- Processes ---------------------------------------------------------------------------------------------

def init_distributed(device_name):
    """(rank, world size, device): from torchrun's environment, or of a single process."""
    if "WORLD_SIZE" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise UserError("srun has started several tasks, which do not know of each other: start one on each "
                        "node, srun --ntasks-per-node=1 torchrun --nnodes=... (separate runs: WORLD_SIZE=1)")
    device = pick_device(device_name, local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(cores_per_process() or 1)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device
    # torch 2.13 has new names for what 2.11 knows by these alone.
    warnings.filterwarnings("ignore", r".*(broadcast_buffers|all_gather_into_tensor).*", FutureWarning)
    # Two backends in one group. gloo is for tensors on the hosts, which then need not wait for a device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # After a restart torchrun's store still holds keys of the previous attempt: prefix ours with its number.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    timeout = timedelta(hours=1)  # others wait while the first process downloads
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return rank, world, device


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def cores_per_process():
    return data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def wait_for_all():
    all_sum(torch.zeros(1))  # between the hosts


def leave():
    """Processes end together: the first one keeps the store that the others need."""
    wait_for_all()
    if dist.is_initialized():
        time.sleep(0.1)  # gloo's thread may need the GIL, while the destructor waits for it with the GIL held
        dist.destroy_process_group()


class StopSignal:
    """SIGTERM and SIGUSR1 end the run after a step. Before training they end the process at once."""

    def __init__(self):
        self.received = 0
        for name in {"SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), self.handler)

    def handler(self, number, frame):
        self.received = 1

    def requested(self, step):
        """True on all processes at the same step if one has got a signal. Asked every ten steps."""
        return step % 10 == 0 and all_sum(torch.tensor(self.received)).item() > 0


# ---- Benchmark ---------------------------------------------------------------------------------------------

WARMUP_STEPS = 5


def bench(args, loader, parts):
    """Print images/s, MFU and peak memory of --bench steps of each image size, without loading images.

    FLOPs are counted in a step of each: what really runs."""
    model, *_, rank, world = parts
    device = next(model.parameters()).device
    sizes = len(args.image_sizes)
    warmup_steps = WARMUP_STEPS * sizes
    batches = [next(loader) for _ in range(warmup_steps)]   # of every number of images for a teacher
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        for batch in batches[:sizes]:
            metrics = train_step(args, 0, batch, *parts)
    for step in range(warmup_steps + args.bench * sizes):
        if step == warmup_steps:
            metrics["", "loss"].tolist()  # waits for the device
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of the eager step, and of compiling
            begin = time.perf_counter()
        metrics = train_step(args, step, batches[step % warmup_steps], *parts)
    metrics["", "loss"].tolist()
    seconds = (time.perf_counter() - begin) / args.bench / sizes
    n = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(n, n, device=device, dtype=DTYPES[args.dtype])
    timer = torch.utils.benchmark.Timer("matrix @ matrix", globals={"matrix": matrix})
    rate = 2 * n**3 / timer.blocked_autorange().median
    flops = counter.get_total_flops() / sizes / seconds
    if rank == 0:
        print(f"{args.batch / seconds:.1f} images/s, {1000 * seconds:.1f} ms a step, {world} process(es), "
              f"{flops / 1e12:.3f} TFLOP/s each, {flops / rate:.1%} of large {args.dtype} matmuls here (MFU)")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on {device}")
    leave()


# ---- The command line --------------------------------------------------------------------------------------

def add_options(parser, table):
    """Add an --option for every {name: (default, help[, (lowest, highest) or choices])}.

    Its type is that of the default: False a flag, [] an option that may be repeated, None a string.
    """
    for name, (default, text, *limits) in table.items():
        flag = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(flag, action="store_true", help=text)
        elif default == []:
            parser.add_argument(flag, action="append", default=[], help=text)
        elif isinstance(default, str | None):
            parser.add_argument(flag, default=default, choices=limits[0] if limits else None, help=text)
        else:
            convert = functools.partial(parse_number, type(default), *(limits[0] if limits else (0, 1e9)))
            parser.add_argument(flag, default=default, type=convert, help=text)


def parse_number(number_type, lowest, highest, text):
    try:
        value = number_type(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {number_type.__name__} from {lowest:g} to {highest:g}")
    return value


def parse_args(argv=None):
    """The options, with the preset's defaults. resolve_args() settles what depends on the machine."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_options(parser, {**RECIPE, **RUN_OPTIONS})
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.preset}"
    args.checkpoint = f"{args.out}/checkpoint.pt"
    args.image_sizes = parse_sizes(args.image_size, args.patch_size)
    args.teachers = args.teachers.split(",")
    for name in args.teachers:
        if name not in TEACHERS or args.teachers.count(name) > 1:
            raise UserError(f"unknown or repeated teacher '{name}'; available: {', '.join(TEACHERS)}")
    weights = "random" if args.random_teachers else "tiny" if args.preset == "tiny" else None
    weights = {args.init: None, **dict.fromkeys(args.teachers, weights)}
    for item in args.weights:
        name, _, file = item.partition("=")
        if not file or name not in weights:
            raise UserError(f"--weights {item}: write TEACHER=FILE, with one of {', '.join(args.teachers)}")
        weights[name] = file
    args.weights = weights
    size = dune.SIZES[args.arch]
    if size["embed_dim"] != 64 * size["num_heads"]:  # the number of heads is read off the width when loading
        raise UserError(f"--arch {args.arch}: embed_dim must be 64 * num_heads in dune.SIZES")
    if args.preset == "stage2" and not args.init:
        raise UserError("--preset stage2 requires --init out/stage1/checkpoint.pt")
    return args


def parse_sizes(text, patch_size):
    """Sides of images in pixels, "224,336" -> [224, 336]. UserError if one is no multiple of the patch."""
    sizes = []
    for word in text.split(","):
        size = int(word) if word.isdecimal() else 0
        if not 0 < size <= 4096 or size % patch_size or size in sizes:
            raise UserError(f"--image-size {text}: write a multiple of the patch size {patch_size}, up to "
                            "4096, or several different ones, as 224,336")
        sizes.append(size)
    return sizes


def resolve_args(args, world, device, group_mask):
    """Settle the options that depend on the machine, and check the batch."""
    args.batch = args.batch or 128 * world
    args.steps = args.steps or math.ceil(args.epochs * args.epoch_images / args.batch)
    args.eval_every = args.eval_every or max(1, args.steps // 20)
    if args.dtype == "auto":
        args.dtype = "bf16" if fast_bf16(device) else "fp32"
    if args.workers < 0:
        networks = 0 if device.type == "cuda" else 2
        args.workers = min(16, max(0, cores_per_process() - networks))
    micro_batch = args.batch // world // args.accumulate
    if args.batch % world or micro_batch < (1 if group_mask.all() else len(group_mask)):
        raise UserError(f"--batch {args.batch} must be divisible by {world} processes, a micro-batch must "
                        "hold an image of each group: change their number, --batch or --accumulate")


def pick_device(name, index=0):
    """--device auto, cpu or cuda (GPU `index` of this machine) as a torch.device. UserError if missing."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise UserError(f"CUDA device {index} requested, {torch.cuda.device_count()} available")
    return torch.device("cuda", index)


def run_main(main):
    """Run a script's main(). A user's error is one line and exit code 2; a defect of ours a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = format_error(error)
        if line is None:
            raise
        # All processes of a machine make the same mistake: it is told once.
        if local_rank() == 0 or not isinstance(error, UserError):
            tqdm.write(line, file=sys.stderr)
        code = 2
    sys.exit(code)  # here the error is gone, and with it the threads of the loader


def format_error(error):
    """An exception as one line for the user; None if it is a defect of this program."""
    message = data.printable(" ".join(str(error).splitlines()))
    if isinstance(error, (UserError, OSError)):
        return f"error: {message}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message:
        return "error: out of memory: use a smaller --batch or --image-size, or --accumulate"
    if dist.is_initialized() and re.search(r"(?i)gloo|nccl|connection", message):
        return "error: another process exited"
    return None


if __name__ == "__main__":
    run_main(main)
