"""Distil frozen teachers into one student.

    torchrun train.py --preset tiny                      # a laptop, minutes, nothing to download: see what it is about
    torchrun --nproc_per_node=8 train.py --teachers dinov2,mast3r,multihmr \\
        --data dinov2=/d/in1k --data mast3r=/d/habitat --data multihmr=/d/bedlam              # the published stage 1
    torchrun --nproc_per_node=8 train.py --preset stage2 --init out/stage1/checkpoint.pt --data ...      # and stage 2
    python train.py ...                                  # the same on one process

A run writes into its folder: checkpoint.pt, log.jsonl (a line per log step), bad_images.txt, pca.png. The same command
started again continues where it stopped. SIGTERM and SIGUSR1 finish the step, write a checkpoint and leave with code 0.
"""

import contextlib
import copy
import glob
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import dune
import eval as evaluation
import teachers as zoo
from dune import Oops, option

# ---- The recipe: what makes a run. The defaults are the published first stage. ---------------------------------------

RECIPE = {
    "teachers": option("dinov2,mast3r,multihmr", f"which teachers, of: {', '.join(zoo.TEACHERS)}"),
    "arch": option("base", "the student's size", choices=dune.SIZES),
    "patch_size": option(14, "the student's patch size, pixels", 1, 64),
    "image_size": option(336, "side of the training images, pixels", 1, 4096),
    "registers": option(4, "the student's register tokens", 0, 1000),
    "layer_scale": option(1e-4, "initial LayerScale of the student, 0 = none", 0, 1),
    "drop_path": option(0.0, "stochastic depth of the student's last block", 0, 0.99),
    "projector": option("tp", "tp: transformer, sp: simple, lp: UNIC's ladder", choices=dune.PROJECTORS),
    "norm": option("dune", "standardise teachers by the batch (dune) or their running average (unic)",
                   choices=("dune", "unic")),
    "sharing": option("all", "who teaches an image: all, its own teachers, or all if it is generic (own+generic)",
                      choices=data.SHARING),
    "drop": option(0.5, "teacher dropping probability", 0, 1),
    "batch": option(0, "images per step over all processes; 0 = 128 per process", 0, 1e6),
    "epochs": option(100.0, "epochs of --epoch-images", 1e-6, 1e6),
    "epoch_images": option(1_281_167, "images in an epoch", 1, 1e11),
    "steps": option(0, "length of the run in steps, instead of --epochs"),
    "lr": option(3e-4, "learning rate for a batch of 256; scaled linearly with the batch", 1e-12, 1e3),
    "min_lr": option(1e-6, "learning rate at the end", 0, 1e3),
    "warmup": option(0.2, "share of the run in which the learning rate rises", 0, 1),
    "weight_decay": option(0.03, "weight decay of matrices; biases and 1-D parameters have none", 0, 10),
    "eps": option(1e-15, "AdamW's", 0, 1),
    "clip": option(1.0, "largest gradient norm of each parameter tensor on its own; 0 = no clipping"),
    "crop": option(0.4, "smallest share of the image's area that a random crop keeps", 0.01, 1),
    "colour": option(1.0, "share of the images that get the random colours, blur and so on", 0, 1),
    "seed": option(0, "of everything random: weights, order, crops, dropping", 0, 2**31),
    "dtype": option("auto", "bf16: autocast; auto: where the hardware multiplies it", choices=("auto", "fp32", "bf16")),
}
PRESETS = {
    "stage1": {},
    "stage2": dict(image_size=448, epochs=50.0, lr=5e-5),          # with --init out/stage1/checkpoint.pt
    "small": dict(arch="small"),
    "unic": dict(teachers="dino,deit3,ibot,dbotft", patch_size=16, image_size=224, registers=0, layer_scale=0.0,
                 drop_path=0.1, projector="lp", norm="unic", epochs=200.0, warmup=0.05, crop=0.08,
                 clip=0.0, eps=1e-8),
    "tiny": dict(arch="tiny", image_size=112, batch=32, steps=1500, sharing="own", lr=28e-3, warmup=0.1,
                 layer_scale=0.0, crop=1.0, colour=0.0),
}
TINY_SCENES = ":1000000-1003000"  # the tiny preset's, of each domain: few enough to be drawn once, new to its teachers

# What may change between the parts of one run: its result stays the same, but for rounding (--compress: in bf16), and
# for stochastic depth, which each process draws for each part.
MACHINE = {
    "preset": option("stage1", "a set of defaults, see PRESETS in this file", choices=PRESETS),
    "data": option([], "images: folders, .tar, .txt lists, or a file of such lines; none: procedural scenes",
                   metavar="TEACHER=SOURCE[,SOURCE]"),
    "val": option([], "held-out images for the table at the end, like --data", metavar="TEACHER=SOURCE"),
    "weights": option([], "a teacher's weights, instead of downloading them", metavar="TEACHER=FILE"),
    "random_teachers": option(False, "random weights of the published size: for measuring only"),
    "init": option(None, "start from this student, or a teacher's encoder of its shape (another image size is fine)",
                   metavar="CHECKPOINT|TEACHER"),
    "out": option(None, "folder of the run; default out/PRESET", metavar="FOLDER"),
    "resume": option("yes", "continue the run that --out holds, or begin anew", choices=("yes", "no")),
    "log_every": option(10, "steps between lines of the log (the only place that waits for the device)", 1),
    "save_every": option(1000, "steps between checkpoints", 1),
    "keep": option(1, "how many of the latest checkpoints to keep", 1, 1e6),
    "milestone_epochs": option(0, "keep a checkpoint for good every so many epochs; 0 = never", 0, 1e6),
    "workers": option(-1, "data processes for each training process; -1 = cores / processes (less two on the CPU), "
                          "at most 16", -1, 256),
    "accumulate": option(1, "split each process's batch into so many parts to save memory", 1, 1e6),
    "recompute": option(False, "recompute the student's blocks in the backward pass to save memory"),
    "compile": option("auto", "torch.compile for teachers and student; auto = on GPUs", choices=("auto", "yes", "no")),
    "compress": option(False, "send gradients between processes in bf16"),
    "device": option("auto", "auto = cuda if there is one", choices=("auto", "cpu", "cuda")),
    "bench": option(0, "measure so many steps, print where the time goes, write nothing", 0, 1e5, metavar="STEPS"),
    "plot": option(None, "draw the logs of these run folders over each other and leave", nargs="+", metavar="RUN"),
}

# ---- The loop --------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse(argv)
    if args.plot:
        return print(f"wrote {evaluation.plot_logs(args.plot)}")
    processes = Processes(args.device)
    device = processes.device
    check(args, processes)
    checkpoint = Checkpoint(args, processes)
    table = {t: zoo.TEACHERS[t] for t in args.teachers}
    # A group: the images of one owner, or of several; every batch holds equally many of each.
    groups = data.parse_data(args.data, table, TINY_SCENES if args.preset == "tiny" else "")
    held_out = evaluation.held_out(args.val, groups, table, args.image_size)
    teachers = build_teachers(args, processes)
    model = build_student(args, teachers, checkpoint.state).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups_of_parameters = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups_of_parameters, args.lr, betas=(0.9, 0.99), eps=args.eps, fused=True)
    start = checkpoint.restore(optimizer)
    describe(args, processes, model)
    if not checkpoint.before and not args.bench:
        checkpoint.before = evaluation.held_out_losses(model, teachers, held_out["image"], args.grid)
    clock = Clock(args, processes, model, teachers)
    ddp = processes.distribute(compiled(args, model, teachers, device), args.compress)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    may_teach = data.teacher_mask(groups, args.teachers, args.sharing).numpy()
    batches = data.batches(groups, args.image_size, args.batch, args.seed, processes.rank, processes.world, start,
                           args.workers, scale=(args.crop, 1.0), colour=args.colour)
    log = Log(args, processes, start)
    processes.listen()

    for step in range(start, args.steps):
        seed = args.seed + 7919 * step
        with clock.span("data"):
            batch = log.next(batches)                                # this process's share of global batch `step`
            torch.manual_seed(seed + 1 + processes.rank)             # for stochastic depth: nothing to save
            images = data.augment(batch["image"].to(device, non_blocking=True), batch["params"])
            allowed = may_teach[batch["group"].numpy()]              # [b, T]: may teacher j teach image i?
            rows = {t: rows_where(allowed[:, j], device) for j, t in enumerate(args.teachers)}
            noise = drop_noise(args, processes, seed)                # [b, T]
        with clock.span("teachers"):                                 # 1. the frozen teachers, each on its images
            features = {t: teacher(images[rows[t]], args.grid) for t, teacher in teachers.items()}
        with clock.span("statistics"):                               # 2. mean and std per channel, over all processes
            statistics = dune.update_norms(model.teacher_norms, features, momentum_at(step, args.steps))

        weight = 0                                                   # sum(c) so far
        for part in parts(args.accumulate, images, features, allowed, noise, ddp):
            with clock.span("student"), part.sync, autocast:         # 3. the student
                outputs = ddp(part.images, part.rows)
            with clock.span("loss"):                                 # sum(c * l) / sum(c), divided below
                losses, terms = dune.batch_losses(outputs, part.features, statistics, part.rows, len(part.images))
                coefficients = dune.teacher_coefficients(losses, part.allowed, args.drop, part.noise)
                total, part_weight = dune.weighted_sum(losses, coefficients)
            with clock.span("backward"):
                total.backward()
            weight = weight + part_weight
            log.add(part, losses.detach(), terms, coefficients, total.detach(), part_weight)

        with clock.span("optimiser"):                                # 4. one update
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args.steps, args.lr * args.batch / 256, args.min_lr, args.warmup)
            scale = processes.world / processes.sum(weight)          # undoes DDP's average, divides by sum(c)
            norm, skipped = update(parameters, optimizer, scale, args.clip)

        stop = processes.stop_asked()                                # 5. what is not distillation
        log.step(step + 1, optimizer, norm, skipped, batch["bad"])
        checkpoint.step(step + 1, stop, model, optimizer)
        if stop:
            break

    log.bar.close()
    batches.close()
    processes.barrier()
    if args.bench:
        clock.report()
    elif processes.rank == 0 and checkpoint.done < args.steps:
        print(f"stopped at step {checkpoint.done} of {args.steps}; the same command continues")
    elif processes.rank == 0:
        finish(args, model, teachers, held_out, checkpoint.before, log)
    processes.leave()

# ---- A step's parts --------------------------------------------------------------------------------------------------

def drop_noise(args, processes, seed):
    """Uniform numbers for teacher dropping, [b, T]: this process's rows of those of the global batch."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.rand(args.batch, len(args.teachers), generator=chance)
    return noise.chunk(processes.world)[processes.rank]

def rows_where(allowed, device):
    """Which images a teacher teaches, an index into them: slice(None) if all. `allowed` [b] is a numpy array, for the
    host must know: asking a device would wait for it."""
    return slice(None) if allowed.all() else there(np.flatnonzero(allowed), device)

def there(array, device):
    return torch.from_numpy(array).to(device, non_blocking=True)

@dataclass
class Part:
    """A part of a process's batch: what the student sees at once. rows, features by teacher; allowed, noise [b, T]."""
    images: torch.Tensor
    rows: dict
    features: dict
    allowed: torch.Tensor
    noise: torch.Tensor
    sync: object  # a context: only the last part sends gradients

def parts(number, images, features, allowed, noise, ddp):
    """A process's batch in so many parts, as equal as may be; features stay views.

    A teacher without an image in a part gets the first one and a feature of zeros, which counts for nothing, for it may
    not teach that image: its projector must take part in every backward pass, or DDP would wait for it for ever.
    """
    device = images.device
    edges = [len(images) * i // number for i in range(number + 1)]
    for first, last in zip(edges, edges[1:]):
        rows, targets = {}, {}
        for j, (t, tokens) in enumerate(features.items()):
            low, high = allowed[:first, j].sum(), allowed[:last, j].sum()  # features: a teacher's own images alone
            rows[t] = rows_where(allowed[first:last, j], device)
            targets[t] = {kind: x[low:high] for kind, x in tokens.items() if x is not None}
            if low == high:
                rows[t] = torch.zeros(1, dtype=torch.int64, device=device)
                targets[t] = {kind: x.new_zeros(1, *x.shape[1:]) for kind, x in targets[t].items()}
        wait = last < len(images) and isinstance(ddp, DistributedDataParallel)
        yield Part(images[first:last], rows, targets, there(allowed[first:last], device),
                   noise[first:last].to(device, non_blocking=True),
                   ddp.no_sync() if wait else contextlib.nullcontext())

def update(parameters, optimizer, scale, clip):
    """Scale the gradients, clip each tensor's norm on its own, step; what is not finite is skipped, all on the device.

    The gradients are the same on all processes by now, so all skip together. Returns (gradient norm, 1.0 if skipped).
    """
    gradients = [p.grad for p in parameters]
    norms = torch.stack(torch._foreach_norm(gradients)) * scale
    if clip:
        gain = scale * (clip / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, list(gain.unbind()))
    else:
        torch._foreach_mul_(gradients, scale)  # one number for all: one launch
    norm = norms.norm()
    skipped = 1 - norm.isfinite().float()
    optimizer.grad_scale = None  # the fused AdamW's own hook for loss scalers: it does nothing where found_inf is 1
    optimizer.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad()
    return norm, skipped

def lr_at(step, steps, peak, floor, warmup):
    """Learning rate of a step: linear from 0 to `peak` over the first warmup * steps, then a cosine to `floor`."""
    rise = int(warmup * steps)
    if step < rise:
        return peak * step / max(1, rise - 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

def momentum_at(step, steps):
    """How far the running statistics move towards the batch's at a step: a cosine from 1 to 0.001 over the run."""
    return 0.001 + 0.999 * (1 + math.cos(math.pi * step / steps)) / 2

def parameter_groups(model, weight_decay):
    learned = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0}]

# ---- What a run is made of -------------------------------------------------------------------------------------------

def build_teachers(args, processes):
    """The frozen teachers on the device. The first process of each machine fetches or makes weights, others wait."""
    if args.preset == "tiny" and not args.random_teachers:
        own = [t for t in args.teachers if t not in args.weights]
        for t in own:
            if t not in zoo.SPECIALISTS:
                raise Oops(f"--preset tiny has no specialist for {t}: it has {', '.join(zoo.SPECIALISTS)}; "
                           f"or give --weights {t}=FILE")
        if processes.local == 0:
            zoo.prepare_specialists(own)
        args.weights.update({t: zoo.specialist_path(t) for t in own})
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if processes.local > 0:
        processes.barrier()
    weights = dict.fromkeys(args.teachers, "random") if args.random_teachers else args.weights
    found = {t: zoo.load_teacher(t, weights.get(t), processes.device, dtype) for t in args.teachers}
    if processes.local == 0:
        processes.barrier()
    return found

def build_student(args, teachers, state):
    """The student: a new one, --init's, or the one that a run resumes."""
    torch.manual_seed(args.seed)
    encoder = dune.ViT(args.image_size, args.patch_size, registers=args.registers, layer_scale=args.layer_scale or None,
                       drop_path=args.drop_path, **dune.SIZES[args.arch])
    shapes = {t: (teacher.dim, teacher.has_cls) for t, teacher in teachers.items()}
    model = dune.DUNE(encoder, shapes, args.projector, args.norm)
    encoder.checkpoint_blocks = args.recompute
    if state:
        dune.load_strictly(model, state["model"], f"{args.out}/checkpoint.pt")
    elif args.init in zoo.TEACHERS:
        start_from(encoder, zoo.load_teacher(args.init, args.weights.get(args.init)).vit, args.init)
    elif args.init:
        start = dune.load(args.init)
        start_from(encoder, start.encoder, args.init)
        for t in set(teachers) & set(start.projectors):
            dune.load_strictly(model.projectors[t], start.projectors[t].state_dict(), args.init)
            dune.load_strictly(model.teacher_norms[t], start.teacher_norms[t].state_dict(), args.init)
    return model

def start_from(encoder, other, path):
    """Load another encoder of the same shape. Positions of another grid are resized, to the size; registers that it
    lacks stay the new ones."""
    state = other.state_dict()
    if other.pos_embed is not None:
        state["pos_embed"] = other.positions(encoder.grid, encoder.grid, "size")
    if other.register_tokens is None and encoder.register_tokens is not None:
        state["register_tokens"] = encoder.register_tokens.detach()
    dune.load_strictly(encoder, state, path)

def compiled(args, model, teachers, device):
    """The model, it and the teachers compiled for the shapes of training alone; nothing else may run through them."""
    if args.compile == "yes" or args.compile == "auto" and device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # a graph for each teacher, projector and number of images
        model.encoder.tokens = torch.compile(model.encoder.tokens, dynamic=False)
        for module in (*model.projectors.values(), *(teacher.vit for teacher in teachers.values())):
            module.compile(dynamic=False)
    return model

def describe(args, processes, model):
    if processes.rank == 0:
        if args.random_teachers:
            print("the teachers' weights are random (--random-teachers): speed is real, losses mean nothing")
        if not args.data:
            print("no --data: training on procedural scenes")
        size = sum(p.numel() for p in model.encoder.parameters()) / 1e6
        print(f"{len(args.teachers)} teachers, student {size:.1f} M parameters, {args.steps} steps of {args.batch} "
              f"images at {args.image_size} px, {processes.world} process(es) on {processes.device.type}, {args.dtype}",
              flush=True)

def finish(args, model, teachers, held_out, before, log):
    """The table and the paths that a run ends with."""
    with torch.compiler.set_stance("force_eager"):
        after = evaluation.held_out_losses(model, teachers, held_out["image"], args.grid)
        shown = held_out["image"][held_out["show"]]
        picture = evaluation.pca_sheet(model, teachers, shown, f"{args.out}/pca.png")
    print(f"\nloss on {len(held_out['image'])} {held_out['what']}")
    print(f"{'teacher':12}{'at the start':>14}{'at the end':>12}")
    for t in teachers:
        print(f"{t:12}{before[t]['loss']:14.4f}{after[t]['loss']:12.4f}")
    if log.totals["bad_images"]:
        print(f"{log.totals['bad_images']} unreadable images were replaced by others, listed in {log.bad_path}")
    print(f"\nwrote {args.out}/checkpoint.pt, {log.path}, {picture}")

# ---- The log ---------------------------------------------------------------------------------------------------------

class Log:
    """log.jsonl, a line per log step, bad_images.txt, and the progress bar. Sums stay on the device until a line is
    due. What a resumed run is about to write again is cut off first."""

    def __init__(self, args, processes, start):
        self.args, self.processes = args, processes
        self.path = f"{args.out}/log.jsonl"
        self.bad_path = f"{args.out}/bad_images.txt"
        self.enabled = processes.rank == 0 and not args.bench
        self.totals = {"skipped": 0, "bad_images": 0}
        self.sums = {}
        self.streak = torch.zeros((), device=processes.device)
        self.bar = tqdm(initial=start * args.batch, total=args.steps * args.batch, unit=" images", unit_scale=True,
                        disable=processes.rank != 0, dynamic_ncols=True)
        self.seen, self.began, self.waited = start, time.perf_counter(), 0.0
        if self.enabled:
            lines = [line for line in evaluation.read_log(args.out) if line["step"] <= start] if start else []
            if lines:
                self.totals = {name: lines[-1].get(name, 0) for name in self.totals}
            with dune.writing(self.path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            if not start:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.bad_path)

    def next(self, batches):
        """The next batch, and how long it was waited for."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, part, losses, terms, coefficients, total, count):
        """What one part of a batch has to say; losses, coefficients [b, T]. Images that do not count are left out."""
        sums = {"loss": (total, count)}
        for j, t in enumerate(terms):
            real = part.allowed[:, j][part.rows[t]]
            for name, value in {**terms[t], "loss": losses[:, j][part.rows[t]]}.items():
                sums[f"{t}/{name}"] = (torch.where(real, value.detach(), 0).sum(), real.sum().float())
            sums[f"{t}/share"] = (coefficients[:, j].sum(), count)
        self.tally(sums)

    def tally(self, sums):
        """Add up {name: (sum, count)}, on the device."""
        for name, pair in sums.items():
            self.sums[name] = self.sums.get(name, 0) + torch.stack(pair)

    def step(self, done, optimizer, norm, skipped, bad):
        """The end of a step: the bar, and every so often a line of the log. Ten skipped steps in a row end the run."""
        self.streak = (self.streak + 1) * skipped
        self.tally({"grad_norm": (torch.where(skipped > 0, 0, norm), 1 - skipped), "skipped": (skipped, skipped),
                   "bad_images": (skipped.new_full((), len(bad)), skipped)})
        if bad and not self.args.bench:
            self.append(self.bad_path, "".join(f"{name}\n" for name in bad))
        self.bar.update(self.args.batch)
        if done % self.args.log_every and done < self.args.steps:
            return
        record = self.record(done, optimizer.param_groups[0]["lr"])
        self.bar.set_postfix_str(" ".join(f"{t} {record[t]['loss']:.3f}" for t in self.args.teachers), refresh=False)
        if self.enabled:
            self.append(self.path, json.dumps(record) + "\n")
        streak = int(self.streak.item())
        if streak >= 10:
            saved = f"{self.args.out}/checkpoint.pt"
            saved = f"the last good state is in {saved}" if os.path.exists(saved) else "nothing has been saved yet"
            raise Oops(f"the loss was not finite for {streak} steps until step {done} ({fault(record)}); {saved}")

    def record(self, done, lr):
        """A line of the log: means over all processes since the last one; a name teacher/… goes under its teacher."""
        sums = self.processes.sum(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, sums))
        self.totals["skipped"] += round(sums.pop("skipped")[0] / self.processes.world)
        self.totals["bad_images"] += round(sums.pop("bad_images")[0])
        now = time.perf_counter()
        spent = now - self.began
        record = {"step": done, "images": done * self.args.batch, "lr": lr,
                  "momentum": momentum_at(done - 1, self.args.steps),
                  "images_per_s": (done - self.seen) * self.args.batch / spent, "data_wait": self.waited / spent,
                  "memory_gb": memory(self.processes.device), **self.totals}
        for name, (total, count) in sums.items():
            teacher, _, part = name.rpartition("/")
            place = record.setdefault(teacher, {}) if teacher else record
            place[part] = total / count if count else None
        self.sums = {}
        self.seen, self.began, self.waited = done, now, 0.0
        return record

    def append(self, path, text):
        """Add to a file; what the disk refuses is told, and the run goes on."""
        try:
            with open(path, "a") as file:
                file.write(text)
        except OSError as error:
            self.bar.write(f"warning: cannot write {path}: {error.strerror}", file=sys.stderr)

def fault(record):
    """Which teacher and token type is not finite in a line of the log."""
    bad = set()
    for t, parts in record.items():
        for name, value in parts.items() if isinstance(parts, dict) else ():
            kind, _, term = name.partition("_")
            if term and (value is None or not math.isfinite(value)):
                bad.add(f"{t}, {kind} tokens")
    return "; ".join(sorted(bad)) or "the gradients alone: try a lower --lr"

def memory(device):
    """Peak memory in GB so far: the device's, or on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

# ---- Checkpoints -----------------------------------------------------------------------------------------------------

class Checkpoint:
    """The checkpoint of a run: what it resumes from, when it is written, and that it is never lost."""

    def __init__(self, args, processes):
        self.args, self.processes = args, processes
        self.path = f"{args.out}/checkpoint.pt"
        self.recipe = {name: getattr(args, name) for name in RECIPE}
        self.state = None
        self.before = None      # held-out losses at the start of the run
        self.done = 0
        if args.resume == "yes" and not args.bench and os.path.exists(self.path):
            self.state = self.read()
        if processes.rank == 0 and not args.bench:  # a place that cannot be written is told before the work
            dune.check_folder(args.out)

    def read(self):
        state = dune.read_checkpoint(self.path)
        for name in ("model", "optimizer", "held_out", "args"):
            dune.entry(state, name, dict, self.path)
        for name, value in self.recipe.items():
            held = state["args"].get(name, value)
            if held != value:
                raise Oops(f"{self.args.out} holds a run with --{name.replace('_', '-')} {held}, not {value}: "
                           f"choose another --out, or --resume no to begin anew there")
        if not 0 <= dune.entry(state, "step", int, self.path) <= self.args.steps:
            raise Oops(f"{self.path} says it is of step {state['step']} of {self.args.steps}: it is damaged")
        return state

    def restore(self, optimizer):
        """Bring the optimiser to where the run stopped; returns the step to go on from."""
        if not self.state:
            return 0
        try:
            optimizer.load_state_dict(self.state["optimizer"])
            if any(state["exp_avg"].shape != p.shape for p, state in optimizer.state.items()):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Oops(f"{self.path}: the optimiser's state is not of this model; --resume no begins anew") from None
        self.before = self.state["held_out"]
        self.done = self.state["step"]
        return self.done

    def step(self, done, stop, model, optimizer):
        """Called at the end of each step: write a checkpoint if one is due."""
        self.done = done
        last = done == self.args.steps
        milestone = None
        images = done * self.args.batch
        every = self.args.milestone_epochs * self.args.epoch_images
        if every and images % every < self.args.batch:
            milestone = f"milestone-{images // every * self.args.milestone_epochs:04d}"
        due = stop or last or milestone or done % self.args.save_every == 0
        if not due or self.args.bench or self.processes.rank:
            return
        weights = {t: os.path.abspath(path) for t, path in self.args.weights.items()}
        if self.args.random_teachers:
            weights = dict.fromkeys(self.args.teachers, "random")
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "args": self.recipe,
                   "weights": weights, "held_out": self.before}
        try:
            save(self.path, content, self.args.keep, milestone)
        except Oops as error:
            if stop or last or not os.path.exists(self.path):
                raise
            tqdm.write(f"warning: {error}. The run goes on; {self.path} is whole, perhaps older.", file=sys.stderr)

def save(path, content, keep=1, milestone=None):
    """Write a checkpoint beside, read it back, and only then give it its name: it is complete or absent.

    keep > 1 keeps the latest ones also as checkpoint-STEP.pt; milestone: a name under which this one is kept for good.
    """
    with dune.writing(path) as file:
        torch.save(content, file)
        file.flush()
        dune.read_checkpoint(file.name)  # Oops if it does not read back, as when another run writes there, too
    stem = path.removesuffix(".pt")
    copies = [f"{stem}-{content['step']:08d}.pt"] if keep > 1 else []
    if milestone:
        copies.append(f"{os.path.dirname(path)}/{milestone}.pt")
    for name in copies:
        with open(path, "rb") as whole, dune.writing(name) as file:
            shutil.copyfileobj(whole, file)
    for name in sorted(glob.glob(f"{glob.escape(stem)}-????????.pt"))[:-keep]:
        os.remove(name)

# ---- Processes -------------------------------------------------------------------------------------------------------

class Processes:
    """This process's place among those that torchrun started (or alone), its device, what they say to each other."""

    def __init__(self, device="auto"):
        started = "RANK" in os.environ  # by torchrun
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        try:
            self.rank, self.world, self.local = [int(os.environ.get(name, alone[name])) for name in alone]
            known = 0 <= self.rank < self.world and self.local >= 0
            if not known or self.world > 1 and not started:
                raise ValueError
            store = fresh_store(self.rank) if started else None
        except ValueError:
            os.environ.pop("RANK", None)  # else a rank other than 0 keeps silent
            raise Oops("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment do not fit together: "
                       "start with torchrun, which sets them, or unset them") from None
        self.device = dune.pick_device(device, self.local)
        self.cores = data.cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.signalled = 0
        self.asked = None
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions have it by default
        else:
            torch.set_num_threads(max(1, int(self.cores)))
        # torch 2.13 has new names for what 2.11 knows by these alone
        warnings.filterwarnings("ignore", r".*(broadcast_buffers|all_gather_into_tensor).*", FutureWarning)
        if started:
            if cuda and not dist.is_nccl_available():
                raise Oops("this torch has no NCCL, which several GPUs need; use one process, or --device cpu")
            patience = timedelta(hours=1)  # the others wait while the first one downloads
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world,
                                    timeout=patience)
            self.hosts = dist.new_group(backend="gloo", timeout=patience)

    def distribute(self, model, compress):
        """The model behind DistributedDataParallel, if there are several processes."""
        if self.world == 1:
            return model
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if compress:
            ddp.register_comm_hook(None, average_in_bf16)
        return ddp

    def sum(self, x):
        """x summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.hosts)

    def listen(self):
        """From here on SIGTERM and SIGUSR1 end the run after its step. Before, they end the process at once."""
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.catch)

    def catch(self, number, frame):
        self.signalled = 1

    def stop_asked(self):
        """True on all processes at the same step once one of them was told to stop.

        The flag of one step is read at the next, on the hosts only: nobody waits for it, and no device is involved.
        """
        if self.world == 1:
            return bool(self.signalled)
        answer = False
        if self.asked:
            work, flag = self.asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([self.signalled])
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts, async_op=True), flag
        return answer

    def leave(self):
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

def fresh_store(rank):
    """torchrun's store, under a prefix that only the processes of this start use.

    The store outlives a restart, and holds what dead processes left: addresses where nobody answers. So each process
    signs in under a new name, the first one publishes the list of names until everybody has found itself in it, and its
    own name is the prefix.
    """
    store, _, world = next(dist.rendezvous("env://"))
    name = os.urandom(8).hex()
    store.set(f"name/{rank}", name)
    while True:
        if rank == 0:
            store.set("team", " ".join(store.get(f"name/{r}").decode() for r in range(world)))
        team = store.get("team").decode().split()
        if name in team:
            # An earlier start has met others: its first one had another name.
            store.set(f"{team[0]} has met {name}", "yes")
            if rank or store.check([f"{team[0]} has met {other}" for other in team]):
                return dist.PrefixStore(team[0], store)
        time.sleep(0.05)

def average_in_bf16(_, bucket):
    """A communication hook of DDP: half the bytes. (torch's own refuses gloo, so the CPU could not test it.)"""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: gradients.copy_(done.value()[0]))

# ---- Where the time goes (--bench) -----------------------------------------------------------------------------------

WARM = 5  # steps before --bench measures

class Clock:
    """Times the spans of a step under --bench, on a GPU by events, so that measuring does not wait."""

    def __init__(self, args, processes, model, teachers):
        self.args, self.processes = args, processes
        self.cuda = processes.device.type == "cuda"
        self.marks = []
        if args.bench:
            image = torch.empty(1, 3, args.image_size, args.image_size, device="meta")
            self.student = 3 * count_flops(model, image)  # forward and backward
            self.teachers = sum(count_flops(teacher, image, args.grid) for teacher in teachers.values())

    @contextlib.contextmanager
    def span(self, name):
        begin = self.now()
        yield
        if self.args.bench:
            self.marks.append((name, begin, self.now()))

    def now(self):
        if not self.args.bench or not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin, end):
        if not self.cuda:
            return 1000 * (end - begin)
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def matmul_rate(self):
        """The device's measured rate of large matrix products, FLOP/s: what MFU is a share of."""
        n = 8192 if self.cuda else 1024
        dtype = torch.bfloat16 if self.args.dtype == "bf16" else torch.float32
        a, b = torch.randn(2, n, n, device=self.processes.device, dtype=dtype)
        times = []
        for _ in range(50):
            begin = self.now()
            a @ b
            times.append((begin, self.now()))
        return 2 * n**3 / min(self.ms(*time) for time in times) * 1000

    def report(self):
        """Print where a step's time goes, and how much of the hardware's arithmetic it uses."""
        steps = self.args.bench
        rate = self.matmul_rate()
        if self.processes.rank:
            return
        marks = self.marks[len(self.marks) // (WARM + steps) * WARM:]
        spent = {}
        for name, begin, end in marks:
            spent[name] = spent.get(name, 0) + self.ms(begin, end) / steps
        total = self.ms(marks[0][1], marks[-1][2]) / steps
        work = self.args.batch // self.processes.world * (self.student + self.teachers)
        print(f"\n{'part':16}{'ms/step':>10}{'share':>8}")
        for name, ms in {**spent, "rest": total - sum(spent.values())}.items():
            print(f"{name:16}{ms:10.2f}{ms / total:8.1%}")
        rate_of_images = self.args.batch / total * 1000
        print(f"{'all':16}{total:10.2f}   {rate_of_images:.1f} images/s, {self.processes.world} process(es)")
        print(f"{work / 1e12:.3f} TFLOP per step and process ({self.student / 1e9:.1f} GFLOP an image for the "
              f"student, forward and backward, {self.teachers / 1e9:.1f} for the teachers)")
        print(f"{work / total / 1e9:.2f} TFLOP/s, {work / total * 1000 / rate:.1%} of the {rate / 1e12:.2f} TFLOP/s "
              f"that large {self.args.dtype} matrix products reach here (MFU)\n"
              f"peak memory {memory(self.processes.device) or math.nan:.2f} GB")

def count_flops(module, *inputs):
    """Floating-point operations of module(*inputs), on tensors without content."""
    module = copy.deepcopy(module).to("meta", torch.float32)
    # A teacher's forward() asks for autocast, which "meta" has none of.
    forward = getattr(module, "features", module)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(*inputs)
    return counter.get_total_flops()

# ---- The command line ------------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = dune.Parser(description="Distil frozen teachers into one student.").add(RECIPE).add(MACHINE)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    args.teachers = args.teachers.split(",")
    args.out = args.out or f"out/{args.preset}"
    return args

def check(args, processes):
    """Settle what depends on the machine; what contradicts itself in the arguments is an Oops."""
    args.batch = args.batch or 128 * processes.world
    args.grid = (args.image_size // args.patch_size,) * 2  # of tokens: teachers resize their images to have the same
    args.steps = args.steps or math.ceil(args.epochs * args.epoch_images / args.batch)
    if args.bench:
        args.steps = WARM + args.bench
    if args.dtype == "auto":
        args.dtype = "bf16" if dune.fast_bf16(processes.device) else "fp32"
    if args.workers < 0:  # on the CPU the networks need the cores: with two or three, drawing in between is the fastest
        cores = int(processes.cores)
        args.workers = min(16, cores if processes.device.type == "cuda" else max(0, cores - 2))
    unknown = [t for t in args.teachers if t not in zoo.TEACHERS]
    if unknown or len(set(args.teachers)) < len(args.teachers):
        raise Oops(f"unknown or repeated teacher in '{','.join(args.teachers)}'; there are: {', '.join(zoo.TEACHERS)}")
    if args.image_size % args.patch_size:
        raise Oops(f"--image-size {args.image_size} is no multiple of the patch size {args.patch_size}")
    each, rest = divmod(args.batch, processes.world)
    if rest or not each:
        raise Oops(f"--batch {args.batch} does not divide among {processes.world} processes")
    if args.accumulate > each:
        raise Oops(f"--accumulate {args.accumulate} is more than the {each} images of each process")
    if args.preset == "stage2" and not args.init:
        raise Oops("--preset stage2 starts from stage 1: add --init out/stage1/checkpoint.pt")
    args.weights = dict(item.partition("=")[::2] for item in args.weights)
    for name, path in args.weights.items():
        if not path or name not in (*args.teachers, args.init):
            raise Oops(f"--weights {name}: write TEACHER=FILE, of the run's teachers: {', '.join(args.teachers)}")
    if args.random_teachers and args.weights:
        raise Oops("--random-teachers and --weights contradict each other")

if __name__ == "__main__":
    dune.run(main)
