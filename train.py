"""Distil frozen teachers into one student.

    torchrun train.py --preset tiny                      # a laptop, minutes, nothing to download: see what it is about
    torchrun --nproc_per_node=8 train.py --teachers dinov2,mast3r,multihmr \\
        --data dinov2=/d/in1k --data mast3r=/d/habitat --data multihmr=/d/bedlam          # the published stage 1
    torchrun --nproc_per_node=8 train.py --preset stage2 --init out/stage1/checkpoint.pt --data …    # and stage 2
    python train.py …                                    # the same on one process

A run writes into its folder: checkpoint.pt, log.jsonl (a line per log step), bad_images.txt, pca.png. The same command started again
continues where it stopped. SIGTERM and SIGUSR1 finish the step, write a checkpoint and leave with exit code 0.
"""

import argparse
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
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import dune
import eval as evaluation
import teachers as zoo
from dune import Oops

# name: (default, what it is). The defaults are the published recipe's first stage.
RECIPE = {
    "teachers": ("dinov2,mast3r,multihmr", f"which teachers, of: {', '.join(zoo.TEACHERS)}"),
    "arch": ("base", f"the student's size: {', '.join(dune.SIZES)}"),
    "patch_size": (14, "the student's patch size, pixels"),
    "image_size": (336, "side of the training images, pixels"),
    "registers": (4, "the student's register tokens"),
    "layer_scale": (1e-4, "initial LayerScale of the student, 0 = none"),
    "drop_path": (0.0, "stochastic depth of the student's last block"),
    "projector": ("tp", "tp: transformer, sp: simple, lp: UNIC's ladder"),
    "norm": ("dune", "standardise teachers by the batch (dune) or by the running average (unic)"),
    "sharing": ("all", "which teacher learns from which image: all, own, own+generic"),
    "drop": (0.5, "teacher dropping probability"),
    "batch": (0, "images per step over all processes; 0 = 128 per process"),
    "epochs": (100.0, "epochs of --epoch-images"),
    "epoch_images": (1_281_167, "images in an epoch"),
    "steps": (0, "length of the run in steps, instead of --epochs"),
    "lr": (3e-4, "learning rate for a batch of 256; scaled linearly with the batch"),
    "min_lr": (1e-6, "learning rate at the end"),
    "warmup": (0.2, "share of the run in which the learning rate rises"),
    "weight_decay": (0.03, "weight decay of matrices; biases and 1-D parameters have none"),
    "clip": (1.0, "largest gradient norm of each parameter tensor on its own; 0 = no clipping"),
    "crop": (0.4, "smallest share of the image's area that a random crop keeps"),
    "colour": (1.0, "share of the images that get the random colours, blur and so on"),
    "seed": (0, "of everything random: weights, order, crops, dropping"),
    "dtype": ("auto", "fp32, bf16 (autocast, teachers wholly), auto: bf16 where the hardware multiplies it"),
}
PRESETS = {
    "stage1": {},
    "stage2": dict(image_size=448, epochs=50.0, lr=5e-5),          # with --init out/stage1/checkpoint.pt
    "small": dict(arch="small"),
    "unic": dict(teachers="dino,deit3,ibot,dbotft", patch_size=16, image_size=224, registers=0, layer_scale=0.0, drop_path=0.1,
                 projector="lp", norm="unic", epochs=200.0, warmup=0.05, crop=0.08),
    "tiny": dict(arch="tiny", image_size=112, batch=32, steps=1500, sharing="own", lr=28e-3, warmup=0.1, layer_scale=0.0, crop=1.0, colour=0.0),
}
TINY_SCENES = ":1000000-1003000"  # of each domain for the tiny preset: few enough to be drawn once; the specialists learned from others
WARM = 5  # steps before --bench measures
# What may change between the parts of one run without changing its result is not in the recipe.


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="stage1", help="a set of defaults, see PRESETS in this file")
    for name, (default, text) in RECIPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    parser.add_argument("--data", action="append", default=[], metavar="TEACHER=SOURCE[,SOURCE]", help="images: folders, .tar, .txt lists, or a file of such lines; none: procedural scenes")
    parser.add_argument("--val", action="append", default=[], metavar="TEACHER=SOURCE", help="held-out images for the table at the end, like --data")
    parser.add_argument("--weights", action="append", default=[], metavar="TEACHER=FILE", help="a teacher's weights, instead of downloading them")
    parser.add_argument("--random-teachers", action="store_true", help="random weights of the published size: for measuring only")
    parser.add_argument("--init", metavar="CHECKPOINT", help="start from this student (another image size is fine)")
    parser.add_argument("--out", help="folder of the run; default out/PRESET")
    parser.add_argument("--resume", choices=("yes", "no"), default="yes", help="continue the run that --out holds, or begin anew")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of the log (the only place that waits for the device)")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=1, help="how many of the latest checkpoints to keep")
    parser.add_argument("--milestone-epochs", type=int, default=0, help="keep a checkpoint for good every so many epochs; 0 = never")
    parser.add_argument("--workers", type=int, default=-1, help="data processes for each training process; -1 = cores / processes (less two on the CPU), at most 16")
    parser.add_argument("--accumulate", type=int, default=1, help="split each process's batch into so many parts to save memory")
    parser.add_argument("--recompute", action="store_true", help="recompute the student's blocks in the backward pass to save memory")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help="torch.compile for teachers and student; auto = on GPUs")
    parser.add_argument("--compress", action="store_true", help="send gradients between processes in bf16")
    parser.add_argument("--device", default="auto", help="cpu, cuda, auto")
    parser.add_argument("--bench", type=int, default=0, metavar="STEPS", help="measure so many steps, print where the time goes, write nothing")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="draw the logs of these run folders over each other and leave")
    parser.error = dune.fail
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    args.teachers = args.teachers.split(",")
    args.out = args.out or f"out/{args.preset}"
    return args


# ----------------------------------------------------------------------------------------------------------------- schedules

def lr_at(step, steps, peak, floor, warmup):
    """Learning rate of a step: linear from 0 to `peak` over the first warmup * steps steps, then a cosine to `floor`."""
    rise = int(warmup * steps)
    if step < rise:
        return peak * step / max(1, rise - 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def momentum_at(step, steps):
    """How far the running statistics move towards the batch's at a step: a cosine from 1 to 0.001 over the run."""
    return 0.001 + 0.999 * (1 + math.cos(math.pi * step / steps)) / 2


def parameter_groups(model, weight_decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------------------------------------- processes

def fresh_store(rank):
    """torchrun's store, under a prefix that only the processes of this start use.

    The store outlives a restart, and holds what dead processes left: addresses where nobody answers. So each process signs in under a
    new name, the first one publishes the list of names until everybody has found itself in it, and its own name is the prefix.
    """
    store, _, world = next(dist.rendezvous("env://"))
    name = os.urandom(8).hex()
    store.set(f"name/{rank}", name)
    while True:
        if rank == 0:
            store.set("team", " ".join(store.get(f"name/{r}").decode() for r in range(world)))
        team = store.get("team").decode().split()
        if name in team:
            store.set(f"{team[0]} has met {name}", "yes")  # an earlier start has met others: its first one had another name
            if rank or store.check([f"{team[0]} has met {other}" for other in team]):
                return dist.PrefixStore(team[0], store)
        time.sleep(0.05)


class Processes:
    """This process's place among those that torchrun started (or alone), its device, and what they say to each other."""

    def __init__(self, device="auto"):
        self.rank, self.world, self.local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        if cuda and not torch.cuda.is_available():
            raise Oops("--device cuda, but torch sees no GPU here")
        if cuda and here > torch.cuda.device_count():
            raise Oops(f"{here} processes on this machine, but only {torch.cuda.device_count()} GPUs: use --nproc_per_node={torch.cuda.device_count()}")
        if cuda and self.world > 1 and not dist.is_nccl_available():
            raise Oops("this torch has no NCCL, which several GPUs need; use one process, or --device cpu")
        self.device = torch.device("cuda", self.local) if cuda else torch.device("cpu")
        self.cores = data.cores() / here
        self.stopping = None
        self.signalled = 0
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        else:
            torch.set_num_threads(max(1, int(self.cores)))
        # torch 2.13 has new names for what 2.11 knows by these alone
        warnings.filterwarnings("ignore", r".*(broadcast_buffers|all_gather_into_tensor).*", FutureWarning)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo", store=fresh_store(self.rank), rank=self.rank, world_size=self.world,
                                    timeout=timedelta(hours=1))
            self.hosts = dist.new_group(backend="gloo") if self.world > 1 else None

    def listen(self):
        """From here on SIGTERM and SIGUSR1 end the run after its step. Before, there is nothing to save: they end the process at once."""
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.catch)

    def catch(self, number, frame):
        self.signalled = 1

    def stop_asked(self):
        """True on all processes at the same step once one of them was told to stop.

        The flag of one step is read at the next, on the hosts only, so that nobody waits for it and no device is involved.
        """
        if self.world == 1:
            return bool(self.signalled)
        asked = False
        if self.stopping:
            work, flag = self.stopping
            work.wait()
            asked = bool(flag.item())
        flag = torch.tensor([self.signalled])
        self.stopping = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts, async_op=True), flag
        return asked

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.hosts)


# --------------------------------------------------------------------------------------------------------------- checkpoints

def save(path, content, keep=1, milestone=None):
    """Write a checkpoint beside, sync it to disk, read it back, and only then give it its name: it is complete or absent.

    keep > 1 keeps the latest ones also as checkpoint-STEP.pt; milestone: a name under which this one is kept for good.
    """
    part, stem = f"{path}.part", path.removesuffix(".pt")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(part) as archive:
            if archive.testzip():
                raise OSError("what was written does not read back")
        os.replace(part, path)
        for name in [f"{stem}-{content['step']:08d}.pt"] * (keep > 1) + [f"{os.path.dirname(path)}/{milestone}.pt"] * bool(milestone):
            with contextlib.suppress(FileNotFoundError):
                os.remove(name)
            try:
                os.link(path, name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, name)
        for name in sorted(glob.glob(f"{glob.escape(stem)}-????????.pt"))[:-keep]:
            os.remove(name)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise Oops(f"cannot write {path}: {str(error).splitlines()[0]}; is the disk full?") from None


def resume(args, recipe, path):
    """The checkpoint that --out holds, or None; an Oops if it is of a run with other settings."""
    if args.resume == "no" or args.bench or not os.path.exists(path):
        return None
    state = dune.read_checkpoint(path)
    if not isinstance(state, dict) or "args" not in state or "step" not in state:
        raise Oops(f"{path} is no checkpoint of a run; choose another --out, or --resume no")
    for name, value in recipe.items():
        if state["args"].get(name, value) != value:
            raise Oops(f"{args.out} holds a run with --{name.replace('_', '-')} {state['args'][name]}, not {value}: "
                       f"choose another --out, or --resume no to begin anew there")
    return state


# ---------------------------------------------------------------------------------------------------------------- the set-up

def check(args, processes):
    """Settle what depends on the machine; a contradiction in the arguments is an Oops. Returns the recipe: what makes the run."""
    args.batch = args.batch or 128 * processes.world
    args.dtype = {"auto": "bf16" if dune.fast_bf16(processes.device) else "fp32"}.get(args.dtype, args.dtype)
    args.steps = WARM + args.bench if args.bench else args.steps or math.ceil(args.epochs * args.epoch_images / args.batch)
    for name, allowed in (("arch", dune.SIZES), ("projector", dune.PROJECTORS), ("norm", ("dune", "unic")), ("dtype", ("fp32", "bf16")),
                          ("sharing", ("all", "own", "own+generic"))):
        if getattr(args, name) not in allowed:
            raise Oops(f"--{name} {getattr(args, name)}: choose one of {', '.join(allowed)}")
    for name, low, high in (("drop", 0, 1), ("drop_path", 0, 0.99), ("crop", 0.01, 1), ("colour", 0, 1), ("warmup", 0, 1), ("batch", 1, 1e9), ("lr", 1e-12, 1e3),
                            ("steps", 1, 1e12), ("accumulate", 1, 1e6), ("log_every", 1, 1e9), ("save_every", 1, 1e9), ("keep", 1, 1e6), ("registers", 0, 1e3)):
        if not low <= getattr(args, name) <= high:
            raise Oops(f"--{name.replace('_', '-')} {getattr(args, name)} is not between {low:g} and {high:g}")
    unknown = [t for t in args.teachers if t not in zoo.TEACHERS]
    if unknown or len(set(args.teachers)) < len(args.teachers):
        raise Oops(f"unknown or repeated teacher in '{','.join(args.teachers)}'; there are: {', '.join(zoo.TEACHERS)}")
    if args.image_size < args.patch_size or args.image_size % args.patch_size:
        raise Oops(f"--image-size {args.image_size} is no multiple of the patch size {args.patch_size}")
    if args.batch % processes.world:
        raise Oops(f"--batch {args.batch} does not divide among {processes.world} processes")
    if args.accumulate > args.batch // processes.world:
        raise Oops(f"--accumulate {args.accumulate} is more than the {args.batch // processes.world} images of each process")
    if args.preset == "stage2" and not args.init:
        raise Oops("--preset stage2 starts from stage 1: add --init out/stage1/checkpoint.pt")
    args.weights = dict(named(item, "--weights", args.teachers) for item in args.weights)
    if args.random_teachers and args.weights:
        raise Oops("--random-teachers and --weights contradict each other")
    return {name: getattr(args, name) for name in RECIPE}


def make_folder(path):
    """Make the run's folder and see that it can be written, before anything is downloaded or computed."""
    try:
        os.makedirs(path, exist_ok=True)
        with open(f"{path}/.write", "w"):
            pass
        os.remove(f"{path}/.write")
    except OSError as error:
        raise Oops(f"cannot write in --out {path}: {error.strerror}") from None


def named(item, option, teachers):
    name, equals, value = item.partition("=")
    if not equals or name not in teachers:
        raise Oops(f"{option} {item}: write TEACHER=FILE, with one of the run's teachers: {', '.join(teachers)}")
    return name, value


def build_teachers(args, processes):
    """The frozen teachers on the device. The first process of each machine fetches or makes the weights, the others wait for it."""
    if args.preset == "tiny" and not args.random_teachers:
        for name in args.teachers:
            if name not in zoo.SPECIALISTS and name not in args.weights:
                raise Oops(f"--preset tiny has no specialist for {name}: it has {', '.join(zoo.SPECIALISTS)}; or give --weights {name}=FILE")
        if processes.local == 0:
            zoo.prepare_specialists([t for t in args.teachers if t not in args.weights])
        args.weights = {**{t: zoo.specialist_path(t) for t in args.teachers}, **args.weights}
    for mine in (processes.local == 0, processes.local != 0):
        if mine:
            found = {t: zoo.load_teacher(t, "random" if args.random_teachers else args.weights.get(t), processes.device,
                                         torch.bfloat16 if args.dtype == "bf16" else torch.float32) for t in args.teachers}
        processes.barrier()
    return found


def build_student(args, teachers, state):
    """The student: a new one, --init's, or the one that a run resumes."""
    torch.manual_seed(args.seed)
    encoder = dune.ViT(args.image_size, args.patch_size, registers=args.registers, layer_scale=args.layer_scale or None,
                       drop_path=args.drop_path, **dune.SIZES[args.arch])
    model = dune.DUNE(encoder, {t: (teacher.dim, teacher.has_cls) for t, teacher in teachers.items()}, args.projector, args.norm)
    if state:
        dune.load_strictly(model, state["model"], f"{args.out}/checkpoint.pt")
    elif args.init:
        start = dune.load(args.init)
        if start.encoder.grid != encoder.grid:  # another image size: the position embedding is resized once and for all
            grid = start.encoder.positions(encoder.grid, encoder.grid)
            start.encoder.pos_embed = nn.Parameter(torch.cat([start.encoder.pos_embed[:, :1], grid], 1).detach())
        dune.load_strictly(encoder, start.encoder.state_dict(), args.init)
        for t in set(teachers) & set(start.projectors):
            dune.load_strictly(model.projectors[t], start.projectors[t].state_dict(), args.init)
            dune.load_strictly(model.teacher_norms[t], start.teacher_norms[t].state_dict(), args.init)
    return model


class Meter:
    """Sums of per-image values since the last log step. What lies on the device stays there; only read() waits for it."""

    def __init__(self, processes):
        self.processes, self.device, self.host = processes, None, {}

    def add(self, values):
        """values {name: [sum, count]}, each a tensor or a number, the same names and kinds at every step."""
        flat = {(name, i): x for name, pair in values.items() for i, x in enumerate(pair)}
        self.tensors = [key for key, x in flat.items() if torch.is_tensor(x)]
        new = torch.stack([flat[key].float() for key in self.tensors])
        self.device = new if self.device is None else self.device + new
        for key, x in flat.items():  # a number that went to the device would make it wait
            if not torch.is_tensor(x):
                self.host[key] = self.host.get(key, 0) + x

    def read(self):
        """{name: (sum, count)} over all processes since the last reading."""
        sums = torch.cat([self.device, torch.tensor(list(self.host.values()), dtype=torch.float32, device=self.device.device)])
        if self.processes.world > 1:
            dist.all_reduce(sums)
        found = dict(zip([*self.tensors, *self.host], sums.tolist()))
        self.device, self.host = None, {}
        return {name: (found[name, 0], found[name, 1]) for name, i in found if i == 0}


class Clock:
    """Where a step's time goes (--bench): mark(name) ends a part. On a GPU by events, so that measuring does not wait either."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self, name):
        event = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            event.record()
        self.marks.append((name, event))

    def table(self, steps):
        """{part: ms per step}, of the last `steps` steps."""
        if self.cuda:
            torch.cuda.synchronize()
        spent = {}
        first = [i for i, (name, _) in enumerate(self.marks) if name == "begin"][-steps]
        for (_, a), (name, b) in zip(self.marks[first:], self.marks[first + 1:]):
            if name != "begin":
                spent[name] = spent.get(name, 0) + (a.elapsed_time(b) if self.cuda else 1000 * (b - a)) / steps
        return spent


def update(parameters, optimizer, scale, clip):
    """Scale the gradients, clip each tensor's norm on its own, and step; an update that is not finite is skipped, all on the device.

    The gradients are the same on all processes by now, so all skip together. Returns (gradient norm, 1.0 if skipped else 0.0).
    """
    grads = [p.grad for p in parameters]
    norms = torch.stack(torch._foreach_norm(grads)) * scale
    gain = scale * (clip / (norms + 1e-6)).clamp(max=1) if clip else scale.expand(len(grads))
    torch._foreach_mul_(grads, list(gain.to(grads[0].dtype).unbind()))
    norm = norms.norm()
    skipped = 1 - norm.isfinite().float()
    optimizer.grad_scale, optimizer.found_inf = None, skipped
    optimizer.step()
    optimizer.zero_grad()
    return norm, skipped


class Log:
    """log.jsonl, a line per log step, and bad_images.txt. What a resumed run is about to write again is cut off first."""

    def __init__(self, folder, start, enabled):
        self.path, self.bad_path, self.enabled = f"{folder}/log.jsonl", f"{folder}/bad_images.txt", enabled
        self.totals = {"skipped": 0, "bad_images": 0}
        if enabled:
            lines = [line for line in evaluation.read_log(folder) if line["step"] <= start] if start else []
            self.totals = {k: lines[-1][k] for k in self.totals} if lines else self.totals
            with open(self.path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            if not start and os.path.exists(self.bad_path):
                os.remove(self.bad_path)

    def append(self, path, text):
        try:
            with open(path, "a") as file:
                file.write(text)
        except OSError as error:
            print(f"warning: cannot write {path}: {error.strerror}", file=sys.stderr)

    def bad(self, names):
        if names:
            self.append(self.bad_path, "".join(f"{name}\n" for name in names))

    def line(self, sums, **record):
        """Write one line from the meter's {name: (sum, count)}: what is named teacher/… goes under its teacher."""
        for name, (total, count) in sums.items():
            teacher, _, part = name.rpartition("/")
            if part in self.totals:
                record[part] = self.totals[part] = self.totals[part] + round(total)
            else:
                (record.setdefault(teacher, {}) if teacher else record)[part] = total / count if count else None
        for parts in record.values():
            if isinstance(parts, dict):
                kinds = [k for k in ("cls", "patch") if f"{k}_cos" in parts]
                known = [parts[f"{k}_{p}"] for k in kinds for p in ("cos", "sl1")]
                parts["loss"] = float("nan") if None in known else sum(known) / len(known)
        if self.enabled:
            self.append(self.path, json.dumps(record) + "\n")
        return record

    @staticmethod
    def fault(record):
        """Which teacher and token type is not finite in a line of the log."""
        bad = {f"{t}, {k.split('_')[0]} tokens" for t, parts in record.items() if isinstance(parts, dict)
               for k, v in parts.items() if k.endswith(("cos", "sl1")) and not (v is not None and math.isfinite(v))}
        return "; ".join(sorted(bad)) or "the gradients alone: try a lower --lr"


def teach(teacher, images, rows, grid):
    """One teacher's raw features for the images it teaches (rows: None = all); for none of them it is not run at all."""
    if rows is None:
        return teacher(images, grid)
    if len(rows) == 0:
        dtype = teacher.vit.norm.weight.dtype
        return {"cls": images.new_empty(0, teacher.dim, dtype=dtype) if teacher.has_cls else None,
                "patch": images.new_empty(0, grid[0] * grid[1], teacher.dim, dtype=dtype)}
    return teacher(images[torch.from_numpy(rows).to(images.device, non_blocking=True)], grid)


def part_of(rows, features, part, device):
    """For a part (slice) of the batch: the rows of each teacher, its features for them (as views), and how many there are.

    A teacher with no image in the part gets the first one with a feature of zeros, which counts for nothing: its projector
    must take part in every backward pass, or DDP would wait for it for ever.
    """
    mine, targets, real = {}, {}, {}
    for t, index in rows.items():
        low, high = (part.start, part.stop) if index is None else np.searchsorted(index, (part.start, part.stop))
        mine[t] = None if index is None else torch.from_numpy(index[low:high] - part.start).to(device, non_blocking=True)
        targets[t] = {k: x if x is None else x[low:high] for k, x in features[t].items()}
        real[t] = high - low
        if low == high:
            mine[t] = torch.zeros(1, dtype=torch.int64, device=device)
            targets[t] = {k: x if x is None else x.new_zeros(1, *x.shape[1:]) for k, x in features[t].items()}
    return mine, targets, real


def average_in_bf16(_, bucket):
    """A communication hook of DDP: half the bytes. (torch's own refuses gloo, so it could not be tested on the CPU.)"""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    return dist.all_reduce(sent, async_op=True).get_future().then(lambda done: gradients.copy_(done.value()[0]))


def add(values, name, total, count):
    """values[name] += (total, count), where values {name: (sum, count)} is what Meter.add takes."""
    old = values.get(name, (0, 0))
    values[name] = (old[0] + total, old[1] + count)


def memory(device):
    """Peak memory in GB so far: the device's, or on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def count_flops(model, teachers, args):
    """Floating-point operations of one image: {"student": forward, "teachers": forward}, counted on tensors without content."""
    counts, grid = {}, (args.image_size // args.patch_size,) * 2
    image = torch.empty(1, 3, args.image_size, args.image_size, device="meta")
    for name, modules in (("student", [model]), ("teachers", list(teachers.values()))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for module in modules:
                module = copy.deepcopy(module).to("meta", torch.float32)
                module(image) if name == "student" else module(image, grid)
        counts[name] = counter.get_total_flops()
    return counts


def matmul_rate(device, dtype):
    """The device's measured rate of large matrix products, FLOP/s: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        clock = Clock(device)
        clock.mark("begin")
        for _ in range(5):
            a @ b
        clock.mark("end")
        best = max(best, 5 * 2 * n**3 / (clock.table(1)["end"] / 1000))
    return best


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, wherever that is: reading a value, and what needs values to know its shape."""
    operators = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        to_host = function.overloadpacket.__name__ in ("_to_copy", "copy_") and out.device.type == "cpu" and args[-1 if len(args) == 2 and torch.is_tensor(args[1]) else 0].is_cuda
        self.count += function.overloadpacket.__name__ in self.operators or to_host
        return out


class Probe:
    """Counts device waits and kernel launches of one step each, before --bench starts its clock."""

    def __init__(self, device):
        self.waits, self.launches, self.device = Waits(), None, device
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=activities)

    def watch(self, step):
        if step == WARM - 2:
            self.waits.__enter__()
        elif step == WARM - 1:
            self.waits.__exit__(None, None, None)
            self.profiler.start()
        elif step == WARM:
            self.profiler.stop()
            events = self.profiler.key_averages()
            self.launches = sum(e.count for e in events if "LaunchKernel" in e.key) if self.device.type == "cuda" else "none (CPU)"


def bench_report(args, processes, clock, flops, probe, say):
    """What --bench prints: where a step's time goes, and how much of the hardware's arithmetic it uses."""
    spent = clock.table(args.bench)
    total = sum(spent.values())
    share = args.batch // processes.world
    work = share * (3 * flops["student"] + flops["teachers"])  # the backward pass is twice the forward
    rate = matmul_rate(processes.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    say(f"\n{'part':16}{'ms/step':>10}{'share':>8}")
    for name, ms in spent.items():
        say(f"{name:16}{ms:10.2f}{ms / total:8.1%}")
    say(f"{'all':16}{total:10.2f}   {args.batch / total * 1000:.1f} images/s over {processes.world} process(es)"
        f"{' (gradients are sent while the backward pass runs)' if processes.world > 1 else ''}")
    say(f"{work / 1e12:.3f} TFLOP per step and process ({3 * flops['student'] / 1e9:.1f} GFLOP an image for the student, {flops['teachers'] / 1e9:.1f} for the teachers)")
    say(f"{work / total / 1e9:.2f} TFLOP/s, {work / total * 1000 / rate:.1%} of the {rate / 1e12:.2f} TFLOP/s that large {args.dtype} matrix products reach here (MFU)")
    say(f"peak memory {memory(processes.device):.2f} GB; device waits in a step: {probe.waits.count}; kernel launches in a step: {probe.launches}")
    if args.random_teachers:
        say("the teachers' weights are random (--random-teachers): speed is real, losses mean nothing")


def finish(args, model, teachers, held_out, before, grid, log):
    """The table and the paths that a run ends with."""
    after = evaluation.held_out_losses(model, teachers, held_out["image"], grid)
    picture = evaluation.pca_sheet(model, teachers, held_out["image"][held_out["show"]], f"{args.out}/pca.png")
    print(f"\nloss on {len(held_out['image'])} {held_out['what']}\n{'teacher':12}{'at the start':>14}{'at the end':>12}")
    for t in teachers:
        print(f"{t:12}{before[t]['loss']:14.4f}{after[t]['loss']:12.4f}")
    if log.totals["bad_images"]:
        print(f"{log.totals['bad_images']} unreadable images were replaced by others, listed in {log.bad_path}")
    print(f"\nwrote {args.out}/checkpoint.pt, {log.path}, {picture}")


def main(argv=None):
    args = parse(argv)
    if args.plot:
        return print(f"wrote {evaluation.plot_logs(args.plot)}")
    processes = Processes(args.device)
    rank0, device = processes.rank == 0, processes.device
    say = (lambda *text: print(*text, flush=True)) if rank0 else (lambda *text: None)
    recipe = check(args, processes)
    path = f"{args.out}/checkpoint.pt"
    state = resume(args, recipe, path)
    groups = data.parse_data(args.data, args.teachers, TINY_SCENES if args.preset == "tiny" else "")
    held_out = evaluation.held_out(args.val, groups, args.teachers, args.image_size)
    if rank0 and not args.bench:
        make_folder(args.out)
    teachers = build_teachers(args, processes)
    model = build_student(args, teachers, state).to(device)
    model.encoder.checkpoint_blocks = args.recompute
    if not args.data:
        say("no --data: training on procedural scenes")
    say(f"{len(args.teachers)} teachers, student {sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f} M parameters, "
        f"{args.steps} steps of {args.batch} images at {args.image_size} px, {processes.world} process(es) on {device.type}, {args.dtype}")

    flops = count_flops(model, teachers, args) if args.bench else None  # before they are compiled

    # ---- the student, its optimiser, and what the processes share
    if args.compile == "yes" or (args.compile == "auto" and device.type == "cuda"):
        for module in (model.encoder, *model.projectors.values(), *(t.vit for t in teachers.values())):
            module.compile()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.99), eps=1e-15, fused=True)
    start = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    ddp = model
    if processes.world > 1:
        ddp = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True)
        if args.compress:
            ddp.register_comm_hook(None, average_in_bf16)
    mask = data.teacher_mask(groups, args.teachers, args.sharing).numpy()
    grid = (args.image_size // args.patch_size,) * 2
    share = args.batch // processes.world
    first = processes.rank * share                          # this process's slice of the global batch
    peak_lr = args.lr * args.batch / 256
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    # On the CPU the networks need every core: with two or three, drawing images in between is the fastest.
    workers = args.workers if args.workers >= 0 else min(16, int(processes.cores) - (0 if device.type == "cuda" else min(2, int(processes.cores))))
    batches = data.batches(groups, args.image_size, args.batch, args.seed, processes.rank, processes.world, start, scale=(args.crop, 1.0),
                           colour=args.colour, workers=workers)
    log = Log(args.out, start, enabled=rank0 and not args.bench)
    before = state["held_out"] if state else {} if args.bench else evaluation.held_out_losses(model, teachers, held_out["image"], grid)
    meter, clock, streak, unsaved, done = Meter(processes), Clock(device), torch.zeros((), device=device), False, start
    began, waited, seen = time.perf_counter(), 0.0, start
    bar = tqdm(initial=start * args.batch, total=args.steps * args.batch, unit=" images", unit_scale=True, disable=not rank0, dynamic_ncols=True)

    probe = Probe(device)
    dune.quiet = False  # from here on an error may be this process's alone
    processes.listen()

    # ---- the loop
    for step in range(start, args.steps):
        if args.bench:
            probe.watch(step)
        clock.mark("begin")
        t = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - t
        torch.manual_seed(args.seed + 7919 * step + processes.rank)  # every random thing is a function of the step: nothing to save
        images = data.augment(batch["image"].to(device, non_blocking=True), batch["params"])
        allowed = mask[batch["group"]]                               # [b, T] on the host: which teacher learns from which image
        rows = {t: None if allowed[:, j].all() else np.flatnonzero(allowed[:, j]) for j, t in enumerate(args.teachers)}
        clock.mark("data")

        # the teachers, on their images only; raw features and this batch's statistics
        features = {t: teach(teacher, images, rows[t], grid) for t, teacher in teachers.items()}
        clock.mark("teachers")
        statistics = dune.update_norms(model.teacher_norms, features, momentum_at(step, args.steps))
        clock.mark("statistics")

        # the student, in `accumulate` parts; gradients of sum(c * l), divided by sum(c) once that is known over all processes
        everyone = torch.from_numpy(allowed).to(device, non_blocking=True)
        uniform = torch.rand(args.batch, len(teachers), generator=torch.Generator().manual_seed(args.seed + 7919 * step))
        uniform = uniform[first:first + share].to(device, non_blocking=True)
        values, counted = {}, 0
        for part in np.array_split(np.arange(share), args.accumulate):
            part = slice(part[0], part[-1] + 1)
            last = part.stop == share
            with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                mine, targets, real = part_of(rows, features, part, device)
                with autocast:
                    outputs = ddp(images[part], mine)
                clock.mark("student")
                losses = []
                for t in teachers:
                    loss, parts = dune.image_losses(outputs[t], targets[t], statistics[t])
                    losses.append(loss if mine[t] is None else loss.new_zeros(part.stop - part.start).index_copy(0, mine[t], loss))
                    for name, value in parts.items():
                        add(values, f"{t}/{name}", value.detach().sum() * (real[t] > 0), real[t])
                losses = torch.stack(losses, 1)
                coefficients = dune.teacher_coefficients(losses, everyone[part], args.drop, uniform[part])
                total, count = dune.weighted_sum(losses, coefficients)
                clock.mark("loss")
                total.backward()
                clock.mark("backward")
            counted = counted + count
            add(values, "loss", total.detach(), count)
            for j, t in enumerate(teachers):
                add(values, f"{t}/share", coefficients[:, j].sum(), count)
        if processes.world > 1:
            dist.all_reduce(counted)
        clock.mark("communication")

        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, peak_lr, args.min_lr, args.warmup)
        norm, skipped = update(parameters, optimizer, processes.world / counted, args.clip)  # DDP has divided by the processes
        streak = (streak + 1) * skipped
        add(values, "grad_norm", torch.where(skipped > 0, 0, norm), 1 - skipped)
        add(values, "skipped", skipped / processes.world, 0)
        add(values, "bad_images", len(batch["bad"]), 0)
        meter.add(values)
        log.bad(batch["bad"])
        clock.mark("optimiser")

        done, now = step + 1, time.perf_counter()
        bar.update(args.batch)
        if done % args.log_every == 0 or done == args.steps:
            record = log.line(meter.read(), step=done, images=done * args.batch, lr=optimizer.param_groups[0]["lr"],
                              momentum=momentum_at(step, args.steps), images_per_s=(done - seen) * args.batch / (now - began),
                              data_wait=waited / (now - began), memory_gb=memory(device))
            bar.set_postfix_str(" ".join(f"{t} {record[t]['loss']:.3f}" for t in args.teachers), refresh=False)
            began, waited, seen = now, 0.0, done
            if streak.item() >= 10:
                raise Oops(f"the loss was not finite for {int(streak.item())} steps until step {done} ({log.fault(record)}); the last good state is in {path}")
        stop = processes.stop_asked()
        milestone = args.milestone_epochs and (done * args.batch // args.epoch_images) // args.milestone_epochs
        reached = milestone and ((done - 1) * args.batch // args.epoch_images) // args.milestone_epochs < milestone
        if not args.bench and (stop or unsaved or reached or done % args.save_every == 0 or done == args.steps):
            if rank0:
                try:
                    save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "args": recipe,
                                "weights": {t: os.path.abspath(w) for t, w in args.weights.items()}, "held_out": before},
                         args.keep, f"milestone-{milestone * args.milestone_epochs:04d}" if reached else None)
                    unsaved = False
                except Oops as error:
                    if stop or done == args.steps or not os.path.exists(path):
                        raise
                    unsaved = done % args.save_every == 0 or unsaved
                    bar.write(f"warning: {error} The run goes on, {path} is the older one; trying again.")
        if stop:
            break
    bar.close()
    batches.close()
    processes.barrier()
    if args.bench and done == args.steps:
        bench_report(args, processes, clock, flops, probe, say)
    elif done < args.steps:
        say(f"stopped at step {done} of {args.steps}" + ("" if args.bench else "; the same command continues"))
    elif rank0:
        finish(args, model, teachers, held_out, before, grid, log)
    processes.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    dune.run(main)
