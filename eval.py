"""What the encoder knows: losses, pictures, probes of frozen features, tables.

    python eval.py study --run out/tiny                   # procedural scenes: is the student as good as each teacher at its own job?
    python eval.py ablate                                 # retrains the tiny student over projector x sharing x dropping
    python eval.py pca --run out/tiny                     # also loss, spectrum, alignment: what distillation did
    python eval.py two-view a.jpg b.jpg                    # two photographs to 3D: point cloud, pose, matches
    python eval.py knn --train in1k/train --test in1k/val --run out/dune --teacher dinov2      # also linear, seg, depth, match

A command looks at the student's encoder, at the student through projectors (--through dinov2) and at bare teachers (--teacher dinov2),
each a row of one table. Nothing that is looked at is trained: its features are computed once and kept in the cache folder.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import data
import dune
import teachers as zoo
from dune import Oops


# ------------------------------------------------------------------------------------------------------------------ losses

@torch.no_grad()
def held_out_losses(model, teachers, images, grid, chunk=16, running=False):
    """{teacher: {"cls_cos", "cls_sl1", "patch_cos", "patch_sl1", "loss"}} of uint8 images [n, 3, S, S], standardised by these images'
    own statistics, so that a student that has learned nothing yet can be compared; running=True: by the running averages."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = [data.normalise(part.to(device)) for part in images.split(chunk)]
    student = [model(part) for part in parts]
    result = {}
    for t, teacher in teachers.items():
        raw = [teacher(part, grid) for part in parts]
        kinds = list(model.teacher_norms[t].normalizers)
        joined = {k: torch.cat([r[k].float() for r in raw]) for k in kinds}
        norm = copy.deepcopy(model.teacher_norms[t])
        if not running:
            for k in kinds:
                flat = joined[k].flatten(0, -2)
                norm.normalizers[k].mean, norm.normalizers[k].std = flat.mean(0), flat.std(0)
        loss, values = dune.image_losses({k: torch.cat([s[t][k].float() for s in student]) for k in kinds}, joined, {k: norm.statistics(k) for k in kinds})
        result[t] = {**{k: v.mean().item() for k, v in values.items()}, "loss": loss.mean().item()}
    model.train(training)
    return result


def held_out(specs, groups, teachers, size, each=0):
    """Images that a run is judged by: {"image": uint8 [n, 3, size, size], "show": indices of a few for pictures, "what": in words}.

    specs: as for --data. Without any, scenes that no run trains on stand for each group of scenes (the seeds from 10^9 down), and the
    first images of the group itself for any other.
    """
    each = each or (32 if size <= 128 else 8)
    what = "held-out images"
    if specs:
        groups = data.parse_data(specs, teachers)
    else:
        real = any(not isinstance(source, data.Scenes) for group in groups for source in group.sources)
        what = "training images (held-out ones: --val)" if real else "held-out scenes"
        groups = [group if any(not isinstance(s, data.Scenes) for s in group.sources) else data.Group(group.name, [held_out_scenes(group.sources[0].kind, each)], group.teachers)
                  for group in groups]
    n = min(each, *(group.count for group in groups)) if len(groups) > 1 else min(each, groups[0].count)
    batch = next(data.batches(groups, size, n * len(groups), workers=0, train=False))
    image = batch["image"]
    return {"image": image, "group": batch["group"], "show": list(range(min(6, len(image)))), "what": what}


def held_out_scenes(kind, count):
    """Scenes of the last seeds, which no training source reaches."""
    return data.Scenes(f"scenes:{kind}:{data.TEST_SCENES}-{data.TEST_SCENES + count}")


# ---------------------------------------------------------------------------------------------------------------- pictures

def pca_basis(features):
    """What pca_colours shows of [n, N, D] patch features: (mean [D], three directions [D, 3], low [3], high [3]), shared by the images."""
    flat = features.float().flatten(0, 1)
    mean = flat.mean(0)
    _, _, directions = torch.pca_lowrank(flat - mean, q=min(6, *flat.shape), center=False, niter=4)
    colours = (flat - mean) @ directions[:, :3]
    sign = colours.pow(3).sum(0).sign()  # a component's sign is arbitrary: fix it
    low, high = (colours * sign).quantile(torch.tensor([0.02, 0.98], device=colours.device), dim=0)
    return mean, directions[:, :3] * sign, low, high


def pca_colours(features, rows, scale, basis=None):
    """[n, N, D] patch features -> uint8 [n, rows*scale, cols*scale, 3]: three principal components (their own, or pca_basis of others)."""
    mean, directions, low, high = basis or pca_basis(features)
    colours = (((features.float() - mean) @ directions - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    small = (colours * 255).byte().unflatten(1, (rows, -1)).cpu().numpy()
    return small.repeat(scale, 1).repeat(scale, 2)


@torch.no_grad()
def pca_sheet(model, teachers, images, path):
    """Write the paper's Figure 2 for uint8 images [n, 3, H, W]: image, the student's own features, then for each teacher its features
    (standardised) and what the student says through that projector, in the same colours. Returns the path. model may be None."""
    device = next((model or next(iter(teachers.values()))).parameters()).device
    x = data.normalise(images.to(device))
    training = model is not None and model.training
    patch = model.encoder.patch_size if model else next(iter(teachers.values())).patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    names, columns = ["image"], [list(images.permute(0, 2, 3, 1).numpy())]
    if model:
        model.eval()
        projected = model(x)
        names.append("student")
        columns.append(pca_colours(model.encoder(x)["patch"], grid[0], patch))
    for t, teacher in teachers.items():
        features = teacher(x, grid)["patch"]
        if model and t in projected:
            features = model.teacher_norms[t]({"patch": features})["patch"]
        basis = pca_basis(features)
        names.append(f"teacher\n{t}")
        columns.append(pca_colours(features, grid[0], patch, basis))
        if model and t in projected:
            names.append(f"student as\n{t}")
            columns.append(pca_colours(projected[t]["patch"], grid[0], patch, basis))
    if training:
        model.train()
    data.contact_sheet([list(row) for row in zip(*columns)], path, columns=names, cell=max(112, min(256, *images.shape[-2:])))
    return path


def read_log(folder):
    """The lines of a run's log.jsonl, as dictionaries; a last line that was cut short by a crash is left out."""
    lines = []
    try:
        with open(os.path.join(folder, "log.jsonl")) as file:
            for line in file:
                if line.endswith("\n"):
                    lines.append(json.loads(line))
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            raise Oops(f"cannot read {folder}/log.jsonl: {error}") from None
    return lines


COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b"]


def draw_curves(path, panels, width=560, height=300):
    """Write a PNG of line plots side by side. panels: list of (title, {label: (x values, y values)}); y logarithmic where it spans 30x."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, curves) in enumerate(panels):
        points = [(x, y) for xs, ys in curves.values() for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]
        left, top, right, bottom = width * i + 62, 30, width * (i + 1) - 14, height - 28
        draw.text((left, 8), title, fill="black", font_size=14)
        draw.rectangle((left, top, right, bottom), outline="#999")
        if not points:
            continue
        x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
        y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
        log = y0 > 0 and y1 / y0 > 30
        scale = math.log if log else float
        span = scale(y1) - scale(y0) or abs(y1) or 1

        def place(x, y):
            return left + (x - x0) / ((x1 - x0) or 1) * (right - left), bottom - 4 - (scale(y) - scale(y0)) / span * (bottom - top - 8)
        for k in range(5):
            value = scale(y0) + span * k / 4
            value = math.exp(value) if log else value
            y = place(x0, value)[1]
            draw.line((left, y, right, y), fill="#eee")
            draw.text((left - 6, y), f"{value:.3g}", fill="#555", font_size=11, anchor="rm")
        for x in (x0, x1):
            draw.text((place(x, y0)[0], bottom + 6), f"{x:g}", fill="#555", font_size=11, anchor="ma")
        for k, (label, (xs, ys)) in enumerate(curves.items()):
            line = [place(x, y) for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]
            colour = COLOURS[k % len(COLOURS)]
            draw.line(line * (2 if len(line) == 1 else 1), fill=colour, width=2)
            draw.text((right - 6, top + 5 + 14 * k), label, fill=colour, font_size=12, anchor="ra")
    image.save(path)
    return path


def plot_logs(folders):
    """Draw the logs of runs over each other (losses of each teacher, lr, images/s) into plot.png of the first one's folder."""
    logs = {folder: read_log(folder) for folder in folders}
    for folder, lines in logs.items():
        if not lines:
            raise Oops(f"{folder} holds no log.jsonl of a run")
    one = len(logs) == 1

    def curves(pick):
        return {name if one else f"{os.path.basename(os.path.normpath(folder))} {name}": ([line["step"] for line in lines], [get(line) for line in lines])
                for folder, lines in logs.items() for name, get in pick(lines[0]).items()}
    panels = [("loss of each teacher, by step", curves(lambda line: {t: lambda r, t=t: r.get(t, {}).get("loss") for t in line if isinstance(line[t], dict)})),
              ("learning rate", curves(lambda line: {"lr": lambda r: r["lr"]})),
              ("images/s", curves(lambda line: {"images/s": lambda r: r["images_per_s"]}))]
    return draw_curves(os.path.join(folders[0], "plot.png"), panels)


# ---------------------------------------------------------------------------------------------------- what is looked at, and results

@dataclass
class Reader:
    """Frozen features under one name: function(normalised images [B, 3, H, W]) -> {"cls": [B, D] or None, "patch": [B, N, D]}."""
    name: str
    function: object
    patch_size: int
    modules: list  # whose weights the features depend on

    @torch.no_grad()
    def __call__(self, images):
        """uint8 images [B, 3, H, W] -> features, fp32."""
        device = next((p.device for m in self.modules for p in m.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, torch.bfloat16, enabled=dune.fast_bf16(device)):
            return {k: v if v is None else v.float() for k, v in self.function(data.normalise(images.to(device))).items()}

    @property
    def parameters(self):
        return sum(p.numel() for m in self.modules for p in m.parameters())

    @property
    def key(self):
        """A hash of the weights, for the cache."""
        sha = hashlib.sha1(str(self.patch_size).encode())
        for tensor in (v for m in self.modules for _, v in sorted(m.state_dict().items())):
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return sha.hexdigest()


def read_through(model, teacher):
    """The student through one projector, as a Reader's function."""
    projector, has_cls = model.projectors[teacher], "cls" in model.teacher_norms[teacher].normalizers

    def read(x):
        out = dune.split_tokens(projector(model.encoder.tokens(x, every_block=projector.reads_every_block)), True)
        return out if has_cls else {**out, "cls": None}
    return read


def student_readers(model, names):
    """Readers of the student's encoder (name "encoder") or through projectors (teachers' names)."""
    for t in set(names) - {"encoder"} - set(model.projectors) - set(dune.ALIASES):
        raise Oops(f"the student has no projector for {t}: it has {', '.join(model.projectors)}")
    return [Reader("encoder", model.encoder, model.encoder.patch_size, [model.encoder]) if t == "encoder" else
            Reader(f"through {t}", read_through(model, t), model.encoder.patch_size, [model.encoder, model.projectors[t]]) for t in names]


def teacher_reader(name, teacher, patch):
    """A teacher on the token grid of this patch size, whatever its own is."""
    return Reader(name, lambda x: teacher(x, (x.shape[-2] // patch, x.shape[-1] // patch)), patch, [teacher.vit])


def student_of(args):
    """(model or None, recipe, {teacher: weights}) of --run or --checkpoint."""
    weights = dict(item.split("=", 1) for item in args.weights if "=" in item)
    if len(weights) < len(args.weights):
        raise Oops("--weights: write TEACHER=FILE")
    source = f"{args.run}/checkpoint.pt" if args.run else args.checkpoint
    if not source:
        return None, {}, weights
    model, file = dune.load(source).to(args.device), {} if source in dune.PUBLISHED_NAMES else dune.read_checkpoint(source)
    return model, file["args"] if isinstance(file.get("args"), dict) else {}, {**file.get("weights", {}), **weights}


def subject(args):
    """(model or None, {teacher: FrozenTeacher}, image size): what pca, loss, spectrum and study look at. No --teacher: all of the student's."""
    model, recipe, weights = student_of(args)
    names = args.teacher or list(model.projectors if model else ())
    if not names:
        raise Oops("say what to look at: --run FOLDER, --checkpoint FILE or --teacher NAME")
    teachers = {t: zoo.load_teacher(t, weights.get(t), args.device) for t in names}
    patch = (model.encoder if model else next(iter(teachers.values()))).patch_size
    return model, teachers, image_side(args, recipe, model, patch)


def image_side(args, recipe, model, patch):
    size = args.image_size or recipe.get("image_size") or (model.encoder.grid * patch if model else 336)
    if size < patch or size % patch:
        raise Oops(f"--image-size {size} is no multiple of the patch size {patch}: take {max(1, round(size / patch)) * patch}")
    return size


def readers_of(args):
    """([Reader], image size): what the commands on real data look at. The student's encoder, or --through, and each --teacher."""
    model, recipe, weights = student_of(args)
    if not model and (args.through or not args.teacher):
        raise Oops("say what to look at: --run FOLDER or --checkpoint FILE (with --through TEACHER if you like), --teacher NAME, or both")
    teachers = {t: zoo.load_teacher(t, weights.get(t), args.device) for t in args.teacher}
    patch = (model.encoder if model else next(iter(teachers.values()))).patch_size
    readers = student_readers(model, args.through or ["encoder"]) if model else []
    return readers + [teacher_reader(t, teacher, patch) for t, teacher in teachers.items()], image_side(args, recipe, model, patch)


def output(args, suffix):
    """Where a command writes: --out, or beside the run, or here, under the command's name."""
    stem = re.sub(r"\.(png|json|ply|pt)$", "", args.out) if args.out else os.path.join(args.run or ".", args.command)
    folder = os.path.dirname(stem) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise Oops(f"cannot write in {folder}: {error.strerror}; choose another --out") from None
    return stem + suffix


def table(rows, first="", spread=None):
    """Print {row: {column: number or text}} aligned; spread: the same shape, printed behind a ±."""
    def cell(r, c):
        value, most = rows[r].get(c), max((abs(row[c]) for row in rows.values() if isinstance(row.get(c), (int, float))), default=0)
        digits = 3 if most < 2 else 2 if most < 10 else 1
        return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}" + (f" ±{spread[r][c]:.{digits}f}" if spread and c in spread[r] else "")
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[first, *columns]] + [[r, *(cell(r, c) for c in columns)] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(line[0].ljust(widths[0]), *(text.rjust(w + 1) for text, w in zip(line[1:], widths[1:])))


def write_json(path, content):
    """Write a result file; what is not a finite number is null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w") as file:
        json.dump(clean(content), file, indent=1)
    os.replace(path + ".part", path)
    return path


def mean_and_spread(values):
    """{row: [{column: value} of each seed]} -> {row: {column: mean}}, {row: {column: standard deviation}}."""
    return [{r: {c: float(f([row[c] for row in rows])) for c in rows[0]} for r, rows in values.items()} for f in (np.mean, np.std)]


def report(args, size, rows, picture=None, spread=None, **more):
    """The end of a command: the table, the JSON file, what was written."""
    table(rows, f"{args.command}, {size} px", spread)
    path = write_json(output(args, ".json"), {"command": args.command, "image_size": size, "results": rows, **more})
    print(f"wrote {path}{f', {picture}' if picture else ''}")


# ------------------------------------------------------------------------------------------ frozen features, and linear heads on them

def extract(reader, samples, size, dense, batch=32):
    """Frozen features of images, fp16, computed once: [n, 1 + N, D], class token (zeros if there is none) before the patch tokens;
    dense=False: [n, 2, D], class token and the mean of the patch tokens. A memory map of a file in the cache folder.

    samples: (path, box (x0, y0, x1, y1) in pixels or None for the centre square), resized to size x size. Its name is a hash of the
    weights, of each image's path, size and time of change, of the boxes and of the image size.
    """
    files = {path: [os.path.realpath(path), *data.stamp(path)] for path, _ in samples}
    what = [reader.name.startswith("through"), reader.key, size, dense, [[*files[path], box] for path, box in samples]]
    path = os.path.join(data.cache_folder(), "features", hashlib.sha1(json.dumps(what).encode()).hexdigest() + ".npy")
    if os.path.exists(path):
        return np.load(path, mmap_mode="r")

    def load(sample):
        image = data.load_image(sample[0])
        return data.crop_resize(image, sample[1] or data.centre(*image.size), size, size)
    out = None
    with ThreadPool(min(16, os.cpu_count())) as pool, tqdm(total=len(samples), desc=f"features of {reader.name}", unit=" images", leave=False) as bar:
        for start in range(0, len(samples), batch):
            x = reader(torch.stack(pool.map(load, samples[start:start + batch])))
            rest = x["patch"] if dense else x["patch"].mean(1, keepdim=True)
            x = torch.cat([torch.zeros_like(rest[:, :1]) if x["cls"] is None else x["cls"][:, None], rest], 1)
            if out is None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                need, free = 2 * len(samples) * x[0].numel(), shutil.disk_usage(os.path.dirname(path)).free
                if need > free:
                    raise Oops(f"the features need {need / 1e9:.1f} GB in {os.path.dirname(path)}, where {free / 1e9:.1f} are free: "
                               f"set DUNE_CACHE to another folder, or take a smaller --image-size")
                out = np.lib.format.open_memmap(path + ".part", "w+", np.float16, (len(samples), *x.shape[1:]))
            out[start:start + len(x)] = x.clamp(-65504, 65504).cpu().numpy()
            bar.update(len(x))
    out.flush()
    os.replace(path + ".part", path)
    return np.load(path, mmap_mode="r")


def moments(x):
    """Mean and std per channel of features [..., D] (a sample of them, if there are very many)."""
    x = x[:: max(1, len(x) // 2000)]
    x = (x if torch.is_tensor(x) else torch.from_numpy(np.array(x))).float().flatten(0, -2)
    std, mean = torch.std_mean(x, 0, correction=0)
    return mean, std + 1e-6


def fit(head, loss, steps, rates, what=None):
    """Train linear heads on frozen features: AdamW, one-cycle learning rate; loss(step) is what step minimises.

    rates: the learning rate, or one for each child of `head`: many probes trained at once. what: a name for the progress bar.
    """
    groups = [{"params": child.parameters(), "lr": r} for child, r in zip(head.children(), rates)] if isinstance(rates, (list, tuple)) else head.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.1)
    for step in tqdm(range(steps), what, leave=False, disable=what is None):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


# ------------------------------------------------------------------------------------------------- classification: k-NN, linear probe

def class_folders(path, names=None):
    """(paths, labels [n], class names) of a folder with one folder of images for each class. names: the classes there must be."""
    if not path or not os.path.isdir(path):
        raise Oops(f"{path or 'nothing'} is not a folder: --train and --test want one with a folder of images for each class")
    found = sorted(f for f in os.listdir(path) if f[0] != "." and os.path.isdir(os.path.join(path, f)))
    unknown = [f for f in found if names and f not in names]
    if unknown or len(names or found) < 2:
        raise Oops(f"{path}: the class {unknown[0]} is not among those of --train" if unknown else f"{path} must hold a folder for each of at least two classes")
    paths, labels = [], []
    for name in found:
        images = sorted(os.path.join(path, name, f) for f in os.listdir(os.path.join(path, name)) if f.lower().endswith(data.SUFFIXES) and f[0] != ".")
        if not images:
            raise Oops(f"the class {os.path.join(path, name)} is empty: add images ({' '.join(data.SUFFIXES)}) or remove the folder")
        paths += images
        labels += [(names or found).index(name)] * len(images)
    return paths, torch.tensor(labels), names or found


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Scores [m, classes] of DINO's weighted k-NN: each of the k nearest (cosine) of train [n, D] votes with exp(similarity / temperature)."""
    train, scores = F.normalize(train, dim=-1), []
    for part in F.normalize(test, dim=-1).split(256):
        near, index = (part @ train.T).topk(min(k, len(train)))
        scores.append(torch.zeros(len(part), classes, device=train.device).scatter_add_(1, labels.to(train.device)[index], (near / temperature).exp()))
    return torch.cat(scores)


def top(scores, labels):
    """{"top-1", "top-5"} in % of scores [m, classes]."""
    hit = scores.topk(min(5, scores.shape[1])).indices == labels.to(scores.device)[:, None]
    return {"top-1": 100 * hit[:, 0].float().mean().item(), "top-5": 100 * hit.any(1).float().mean().item()}


def classification(args, judge):
    """The common part of knn and linear: judge(train features, labels, test features, labels, classes) -> {column: value} for each reader."""
    train, train_labels, names = class_folders(args.train)
    test, test_labels, _ = class_folders(args.test, names)
    readers, size = readers_of(args)
    rows = {}
    for reader in readers:
        has_cls = reader(torch.zeros(1, 3, size, size, dtype=torch.uint8))["cls"] is not None
        token = args.token or ("cls" if has_cls else "patch")
        if token != "patch" and not has_cls:
            raise Oops(f"{reader.name} has no class token: take --token patch")
        pick = {"cls": slice(0, 1), "patch": slice(1, 2), "both": slice(0, 2)}[token]
        x, y = (torch.from_numpy(np.array(extract(reader, [(p, None) for p in paths], size, dense=False)[:, pick])).float().flatten(1).to(args.device)
                for paths in (train, test))
        rows[reader.name] = {**judge(x, train_labels, y, test_labels, len(names)), "token": token}
    report(args, size, rows, train=args.train, test=args.test, images=[len(train), len(test)])


def command_knn(args):
    """ImageNet-style folders: weighted k-NN as DINO does it, top-1 and top-5."""
    classification(args, lambda x, a, y, b, classes: top(knn(x, a, y, classes, args.k, args.temperature), b))


def command_linear(args):
    """ImageNet-style folders: linear probes at several learning rates trained at once, the best on a tenth of the training set."""
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    def judge(x, a, y, b, classes):
        torch.manual_seed(args.seed)
        mean, std = moments(x.cpu())
        x, y, a = ((z - mean.to(z.device)) / std.to(z.device) for z in (x, y)), None, a.to(args.device)
        x, y = x
        order = torch.randperm(len(x))
        held, rest = order[:max(1, len(x) // 10)], order[max(1, len(x) // 10):]
        heads = nn.ModuleList(nn.Linear(x.shape[1], classes) for _ in rates).to(args.device)

        def loss(step):
            rows = rest[torch.randint(len(rest), (min(1024, len(rest)),))]
            return sum(F.cross_entropy(head(x[rows]), a[rows]) for head in heads)
        fit(heads, loss, args.steps, rates, "linear probes")
        with torch.no_grad():
            best = max(range(len(rates)), key=lambda i: -F.cross_entropy(heads[i](x[held]), a[held]).item())
            return {**top(heads[best](y), b), "lr": f"{rates[best]:g}"}
    classification(args, judge)


# --------------------------------------------------------------------------------------------------- dense: segmentation, depth

def find_pairs(folder, names):
    """[(image, target)] by file stem: folder/images beside folder/NAME, or ADE20K's layout: …/images/x beside …/NAME/x. Oops if they do not pair."""
    if not folder or not os.path.isdir(folder):
        raise Oops(f"{folder or 'nothing'} is not a folder: --train and --test want one that holds images/ and {names[0]}/")
    at = os.path.abspath(folder)
    inside, head, sep, tail = os.path.isdir(os.path.join(at, "images")), *at.rpartition(f"{os.sep}images")
    images = os.path.join(at, "images") if inside else at
    places = [os.path.join(at, n) if inside else f"{head}{os.sep}{n}{tail}" for n in names]
    targets = next((p for p in places if os.path.isdir(p)), None)
    if targets is None or not (inside or sep):
        raise Oops(f"{folder}: expected the folders images/ and {' or '.join(f'{n}/' for n in names)} in it")
    a, b = ({os.path.splitext(f)[0]: os.path.join(p, f) for f in sorted(os.listdir(p)) if f.lower().endswith(s) and f[0] != "."}
            for p, s in ((images, data.SUFFIXES), (targets, (".png", ".npy"))))
    if a.keys() != b.keys() or not a:
        alone = sorted(a.keys() ^ b.keys())
        raise Oops(f"{images} holds {len(a)} images, {targets} {len(b)} targets; " + (f"'{alone[0]}' has no partner" if alone else "add some"))
    return [(a[stem], b[stem]) for stem in sorted(a)]


def read_array(path):
    """An index or 16-bit PNG, or an .npy, as a 2-D array."""
    try:
        array = np.load(path) if path.endswith(".npy") else np.asarray(Image.open(path))
    except Exception as error:
        raise Oops(f"cannot read {path}: {data.reason(error)}") from None
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise Oops(f"{path} holds {list(array.shape)} values of {array.dtype}; expected one number for each pixel")
    return array


def read_target(image_path, path, warned):
    """read_array(path) as a tensor [H, W] of the image's size. Another size of the same shape is resized (nearest) with one warning for all."""
    with Image.open(image_path) as image:
        width, height = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
    target = torch.from_numpy(read_array(path).astype(np.float32))
    h, w = target.shape
    if abs(math.log(w * height / (h * width))) > 0.03:
        raise Oops(f"{path} is {w}x{h}, its image {width}x{height}: of another shape, so not of this image")
    if (h, w) != (height, width) and not warned:
        warned.add(1)
        print(f"warning: {path} is {w}x{h}, its image {width}x{height}: such targets are resized", file=sys.stderr)
    return F.interpolate(target[None, None], (height, width), mode="nearest-exact")[0, 0]


def windows(width, height, sliding):
    """Boxes (x0, y0, x1, y1) that an image is seen through: the whole of it (squeezed to a square), or squares of its short side along the
    long one that overlap by at least a third."""
    if not sliding:
        return [(0, 0, width, height)]
    side, slack = min(width, height), abs(width - height)
    n = 1 + math.ceil(slack / (side * 2 / 3))
    starts = [round(i * slack / max(1, n - 1)) for i in range(n)]
    return [(s, 0, s + side, side) if width > height else (0, s, side, s + side) for s in starts]


class DenseHead(nn.Module):
    """One linear layer on standardised patch tokens [b, N, D] -> maps [b, C, h, w]: class logits, or with bins (their centres) depth in metres,
    the mean of the bins under the layer's weights, as DINOv2's linear depth head."""

    def __init__(self, features, outputs, bins=None):
        super().__init__()
        mean, std = moments(features[:, 1:])
        self.linear = nn.Linear(len(mean), outputs)
        for name, value in (("mean", mean), ("std", std), ("bins", bins)):
            self.register_buffer(name, value)

    def forward(self, tokens, size):
        side = math.isqrt(tokens.shape[1])
        maps = self.linear((tokens - self.mean) / self.std).transpose(1, 2).unflatten(2, (side, side))
        if self.bins is not None:
            weight = maps.relu() + 0.1
            maps = (weight * self.bins[:, None, None]).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return F.interpolate(maps, size, mode="bilinear")


def dense(args, names, read, outputs, bins, loss_of):
    """The common part of seg and depth: yields (reader name, size, image path, truth [H, W], prediction [C or 1, H, W]) for each test image.

    read(image path, target path) -> [H, W]; outputs(training targets): how many the head has; loss_of(maps [b, C, h, w], truth [b, h, w]).
    """
    sets = {}
    for split in ("train", "test"):
        pairs = find_pairs(getattr(args, split), names)
        truth = [read(*pair) for pair in tqdm(pairs, f"targets of {split}", leave=False)]
        sets[split] = [(image, y, windows(*y.shape[::-1], args.sliding)) for (image, _), y in zip(pairs, truth)]
    readers, size = readers_of(args)
    for reader in readers:
        side = 4 * size // reader.patch_size
        features = {split: extract(reader, [(image, box) for image, _, boxes in items for box in boxes], size, dense=True) for split, items in sets.items()}
        small = torch.stack([F.interpolate(y[None, None, y0:y1, x0:x1], (side, side), mode="nearest-exact")[0, 0]
                             for _, y, boxes in sets["train"] for x0, y0, x1, y1 in boxes])
        torch.manual_seed(args.seed)
        head = DenseHead(features["train"], outputs(small), bins).to(args.device)

        def tokens(rows):
            return torch.from_numpy(features_of[rows][:, 1:]).float().to(args.device)

        def loss(step):
            rows = torch.randperm(len(small))[:16].sort().values
            return loss_of(head(tokens(rows.numpy()), (side, side)), small[rows].to(args.device))
        features_of = features["train"]
        fit(head, loss, args.steps, 3e-3, f"{args.command} head on {reader.name}")
        features_of, row = features["test"], 0
        for image, y, boxes in tqdm(sets["test"], f"{args.command}, {reader.name}", unit=" images", leave=False):
            total, seen = 0, torch.zeros(y.shape)
            for x0, y0, x1, y1 in boxes:
                with torch.no_grad():
                    maps = head(tokens(np.arange(row, row + 1)), (y1 - y0, x1 - x0))[0].cpu()
                maps = maps.softmax(0) if bins is None else maps
                total = total + F.pad(maps, (x0, y.shape[1] - x1, y0, y.shape[0] - y1))
                seen[y0:y1, x0:x1] += 1
                row += 1
            yield reader.name, size, image, y, total / seen


def class_iou(confusion):
    """IoU of each class [C] from counts [truth, prediction]; NaN for a class that the truth does not hold."""
    hit, truth = confusion.diag().double(), confusion.sum(1)
    return torch.where(truth > 0, hit / (confusion.sum(0) + truth - hit), math.nan)


def palette(n):
    """uint8 [n + 1, 3]: colours that differ, the last one (of what is ignored) black."""
    hue = np.arange(n) * 0.381966 % 1
    channels = [np.clip(np.abs((hue * 6 - shift) % 6 - 3) - 1, 0, 1) for shift in (0, 2, 4)]
    return np.append((np.stack(channels, 1) * (0.95 - 0.35 * (np.arange(n) % 3)[:, None] / 2) * 255).astype(np.uint8), np.zeros((1, 3), np.uint8), 0)


def small_picture(image):
    """uint8 [h, w, 3] with its longest side at most 256: for contact sheets, by leaving out pixels."""
    step = max(1, math.ceil(max(image.shape[:2]) / 256))
    return image[::step, ::step]


def side_by_side(pictures, path):
    """Write {row of the table: [(image path, truth, prediction)]}: one picture row per image, one prediction per reader."""
    per_image = list(zip(*pictures.values()))
    rows = [[small_picture(x) for x in (np.asarray(data.load_image(same[0][0])), same[0][1], *(p[2] for p in same))] for same in per_image]
    data.contact_sheet(rows, path, columns=["image", "truth", *pictures])
    return path


def command_seg(args):
    """Images and index masks: a linear head on patch tokens; mIoU, IoU of each class, and a picture."""
    counts, pictures, classes, warned = {}, {}, args.classes, set()

    def read(image, path):
        y = read_target(image, path, warned)
        return torch.where(torch.isin(y, torch.tensor(args.ignore, dtype=y.dtype)), -1, y)

    def outputs(y):
        nonlocal classes
        top_label = int(y.max())
        if top_label < 0:
            raise Oops(f"{args.train}: every pixel is ignored (--ignore {' '.join(map(str, args.ignore))})")
        classes = args.classes or top_label + 1
        if top_label >= classes:
            raise Oops(f"{args.train} holds the label {top_label}, but --classes {classes} ends at {classes - 1}: more classes, or --ignore {top_label}")
        return classes
    for name, size, image, y, maps in dense(args, ("masks", "annotations", "labels"), read, outputs, None,
                                            lambda maps, y: F.cross_entropy(maps, y.long(), ignore_index=-1, reduction="sum") / (y >= 0).sum().clamp(min=1)):
        guess, truth = maps.argmax(0), y.long()
        if truth.max() >= classes:
            raise Oops(f"the mask of {image} holds the label {truth.max()}, but there are {classes} classes: --classes {truth.max() + 1}, or --ignore {truth.max()}")
        valid = truth >= 0
        counts[name] = counts.get(name, 0) + torch.bincount(truth[valid] * classes + guess[valid], minlength=classes**2).view(classes, classes)
        if len(pictures.setdefault(name, [])) < 4:
            pictures[name].append((image, *(palette(classes)[x.numpy()] for x in (truth, guess))))
    iou = {name: 100 * class_iou(c) for name, c in counts.items()}
    absent = [c for c in range(classes) if all(count[c].sum() == 0 for count in counts.values())]
    if absent:
        print(f"{len(absent)} of {classes} classes are in no test mask (the first: {absent[0]})")
    rows = {name: {"mIoU": x[~x.isnan()].mean().item(), "pixel accuracy": 100 * (counts[name].diag().sum() / counts[name].sum()).item()} for name, x in iou.items()}
    report(args, size, rows, side_by_side(pictures, output(args, ".png")), classes={name: x.tolist() for name, x in iou.items()})


def depth_errors(guess, truth):
    """{"RMSE" (m), "AbsRel", "delta1" (%)} over the pixels with truth > 0."""
    g, t = guess[truth > 0].double(), truth[truth > 0].double()
    return {"RMSE": (g - t).square().mean().sqrt().item(), "AbsRel": ((g - t).abs() / t).mean().item(),
            "delta1": 100 * (torch.maximum(g / t, t / g) < 1.25).double().mean().item()}


def depth_colours(depth, low, high):
    """[H, W] metres -> uint8 [H, W, 3], near is warm; nothing measured is black."""
    x = 1 - ((depth.clamp(low, high).log() - math.log(low)) / max(1e-6, math.log(high / low)))
    stops = np.array([[48, 18, 90], [40, 100, 230], [30, 200, 160], [200, 225, 60], [250, 130, 30], [150, 10, 10]])
    colours = np.stack([np.interp(x.numpy(), np.linspace(0, 1, 6), stops[:, c]) for c in range(3)], -1)
    return (colours * (depth > 0).numpy()[..., None]).astype(np.uint8)


def silog(guess, truth):
    """Scale-invariant log loss (Eigen et al. 2014) over the measured pixels: guess [b, 1, h, w], truth [b, h, w]."""
    gap = (guess[:, 0].log() - truth.clamp(min=1e-3).log())[truth > 0]
    return (gap.square().mean() - 0.5 * gap.mean().square() + 1e-8).sqrt() if len(gap) else guess.sum() * 0


def command_depth(args):
    """Images and depth (16-bit PNG / --depth-scale, or .npy in metres; 0: not measured): a linear head with 256 bins; RMSE, AbsRel, delta1, a picture."""
    low, high = 1e-3, args.max_depth
    errors, pictures, warned = {}, {}, set()

    def read(image, path):
        y = read_target(image, path, warned) / (1 if path.endswith(".npy") else args.depth_scale)
        y = torch.where(y.isfinite() & (y > low) & (y <= high), y, 0)
        if not (y > 0).any():
            raise Oops(f"{path} holds no depth between 0 and {high:g} m: is --depth-scale {args.depth_scale:g} (units per metre) right, or --max-depth?")
        return y
    for name, size, image, y, guess in dense(args, ("depth", "depths"), read, lambda y: 256, torch.linspace(low, high, 256), silog):
        errors.setdefault(name, []).append(depth_errors(guess[0], y))
        if len(pictures.setdefault(name, [])) < 4:
            span = y[y > 0].min().item(), y.max().item()
            pictures[name].append((image, *(depth_colours(x, *span) for x in (y, guess[0]))))
    rows = {name: {k: float(np.mean([e[k] for e in each])) for k in each[0]} for name, each in errors.items()}
    report(args, size, rows, side_by_side(pictures, output(args, ".png")))


# ---------------------------------------------------------------------------------------------------------------- matching

def nearest(a, b):
    """For each row of a [n, D]: the largest dot product with a row of b [m, D], and which row that is. In parts: the whole matrix may be large."""
    best = [(part @ b.T).max(1) for part in a.split(max(1, 2**26 // len(b)))]
    return torch.cat([x.values for x in best]), torch.cat([x.indices for x in best])


def match(reader, images, upsample=1):
    """Mutual nearest neighbours (cosine) of two images' patch features: (places in a, places in b, similarity), places [m, 2] as (x, y)
    fractions of the sides. images: two uint8 [3, H, W]; upsample: features are interpolated to a grid so many times finer first."""
    flat, places = [], []
    for image in images:
        rows, cols = (side // reader.patch_size for side in image.shape[1:])
        x = reader(image[None])["patch"].transpose(1, 2).unflatten(2, (rows, cols))
        x = F.interpolate(x, scale_factor=upsample, mode="bilinear") if upsample > 1 else x
        flat.append(F.normalize(x[0].flatten(1).T, dim=-1))
        places.append(zoo.centres(*x.shape[-2:]))

    (similarity, ab), (_, ba) = ([x.cpu() for x in nearest(*pair)] for pair in (flat, flat[::-1]))
    mutual = (ba[ab] == torch.arange(len(ab))).nonzero()[:, 0]
    return places[0][mutual], places[1][ab[mutual]], similarity[mutual]


def warp(places, sizes, truth):
    """Where places [m, 2] (fractions) of image a are in image b by the ground truth: (fractions [m, 2], known [m] bool).

    sizes: (width, height) of a and b; truth: {"homography": [3, 3] of pixels} or {"disparity": [h, w], x_b = x_a - d} or {"depth": [h, w] of a,
    "camera": (K_a [3, 3], K_b [3, 3], a to b [4, 4])}, with "depth_b" what is hidden in b is told apart. Depth and disparity 0: unknown.
    """
    a, b = (torch.tensor(size, dtype=torch.float64) for size in sizes)
    p = F.pad(places.double() * a, (0, 1), value=1.0)

    def look(array, at):  # the value of an array at fractions of its sides
        array = torch.as_tensor(np.asarray(array, np.float64))
        x, y = ((at[:, i] * n).long().clamp(0, n - 1) for i, n in ((0, array.shape[1]), (1, array.shape[0])))
        return array[y, x]
    known = torch.ones(len(p), dtype=torch.bool)
    if "homography" in truth:
        q = p @ torch.as_tensor(truth["homography"], dtype=torch.float64).T
        known = q[:, 2] > 1e-9
        q = q[:, :2] / q[:, 2:].clamp(min=1e-9)
    elif "disparity" in truth:
        d = look(truth["disparity"], places)
        q, known = torch.stack([p[:, 0] - d, p[:, 1]], 1), d.isfinite() & (d > 0)
    else:
        ka, kb, move = (torch.as_tensor(np.asarray(m, np.float64)) for m in truth["camera"])
        z = look(truth["depth"], places)
        points = (p @ ka.inverse().T * z[:, None]) @ move[:3, :3].T + move[:3, 3]
        q = points @ kb.T
        known = z.isfinite() & (z > 0) & (points[:, 2] > 1e-6)
        q = q[:, :2] / q[:, 2:].clamp(min=1e-6)
        if "depth_b" in truth:  # hidden behind something else there
            known &= (look(truth["depth_b"], (q / b).clamp(0, 1)) - points[:, 2]).abs() < 0.05 * points[:, 2]
    q = q / b
    return q, known & ((q >= 0) & (q < 1)).all(1)


def match_errors(reader, images, sizes, truth, upsample):
    """(places a, places b, similarity, error [m]: distance from the truth as a share of b's longer side, NaN where it is not known, and of how
    many places of a, matched or not, it is known)."""
    a, b, similarity = match(reader, images, upsample)
    if not truth:
        return a, b, similarity, torch.full((len(a),), math.nan), 0
    everywhere = zoo.centres(*(upsample * (side // reader.patch_size) for side in images[0].shape[1:]))
    goal, known = warp(a, sizes, truth)
    gap = ((b.double() - goal) * torch.tensor(sizes[1], dtype=torch.float64)).norm(dim=1) / max(sizes[1])
    return a, b, similarity, torch.where(known, gap, math.nan).float(), int(warp(everywhere, sizes, truth)[1].sum())


def correct(error, findable, shares=(0.01, 0.03, 0.05)):
    """{"1 %": …}: % of the matches whose truth is known that lie within these shares of the image side; "found": the last, as % of all places
    that could have been matched."""
    known = error[~error.isnan()]
    found = {f"{100 * s:g} %": 100 * (known <= s).float().mean().item() for s in shares} if len(known) else {}
    return {**found, "found": 100 * (known <= shares[-1]).sum().item() / findable} if findable else {}


def read_pairs(args):
    """[(path a, path b, truth)] of --pair A B [WORD=FILE …], or of --pairs, a file with such lines. Paths in it are relative to it."""
    if args.pair and args.pairs:
        raise Oops("eval.py match takes --pair A B [homography=FILE | disparity=FILE | depth=FILE camera=FILE [depth_b=FILE]], or --pairs LIST with such lines, not both")
    lines, home = [args.pair], ""
    if args.pairs:
        if not os.path.isfile(args.pairs):
            raise Oops(f"{args.pairs} does not exist: --pairs wants a text file, each line: A B homography=FILE")
        home = os.path.dirname(args.pairs)
        with open(args.pairs) as file:
            lines = [line.split() for line in file if line.strip() and line[0] != "#"]
    found = []
    for line in lines:
        images, truth = [os.path.join(home, w) for w in line if "=" not in w], {}
        for word, path in (w.split("=", 1) for w in line if "=" in w):
            truth[word] = path = os.path.join(home, path)
            if word in ("homography", "camera"):
                try:
                    with open(path) as file:
                        numbers = np.array(file.read().replace(",", " ").split(), float)
                    truth[word] = numbers.reshape(3, 3) if word == "homography" else (numbers[:9].reshape(3, 3), numbers[9:18].reshape(3, 3), numbers[18:].reshape(4, 4))
                except (OSError, ValueError) as error:
                    raise Oops(f"{path} must hold {'9 numbers' if word == 'homography' else 'K of a, K of b (3x3), a to b (4x4)'}: {data.reason(error)}") from None
            elif word in ("disparity", "depth", "depth_b"):
                truth[word] = read_array(path).astype(float) / (1 if path.endswith(".npy") else args.depth_scale)
            else:
                raise Oops(f"{word}={path}: the words are homography, disparity, depth, depth_b, camera")
        if len(images) != 2:
            raise Oops(f"a pair needs two images, this has {len(images)}: {' '.join(line)}")
        if ("depth" in truth) != ("camera" in truth):
            raise Oops(f"depth=FILE and camera=FILE go together: {' '.join(line)}")
        found.append((*images, truth))
    return found


def draw_matches(a, b, places_a, places_b, error, path, below=()):
    """Write two uint8 [h, w, 3] side by side with lines between matches: green within 5 % of the side, red beyond, blue if nothing is known.
    places: [n, 2] fractions of the sides; below: more such pairs of pictures, under the first."""
    rows, left = [(a, b), *below], a.shape[1] + 8
    height = max(a.shape[0], b.shape[0]) + 8
    sheet = Image.new("RGB", (left + b.shape[1], height * len(rows) - 8), "white")
    for i, row in enumerate(rows):
        for x, picture in zip((0, left), row):
            sheet.paste(Image.fromarray(picture), (x, i * height))
    draw = ImageDraw.Draw(sheet)
    for p, q, e in zip(places_a.tolist(), places_b.tolist(), error.tolist()):
        colour = "#3af" if math.isnan(e) else "#2d3" if e <= 0.05 else "#f33"
        ends = p[0] * a.shape[1], p[1] * a.shape[0], left + q[0] * b.shape[1], q[1] * b.shape[0]
        draw.line(ends, fill=colour, width=1)
        for x, y in (ends[:2], ends[2:]):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour, width=2)
    sheet.save(path)
    return path


def command_match(args):
    """Pairs of images: mutual nearest neighbours of patch features, correct within 1, 3, 5 % of the side; a picture. One pair is enough;
    without any: the two views of procedural rooms."""
    pairs = read_pairs(args) if args.pair or args.pairs else None
    readers, size = readers_of(args)
    if pairs is None:
        print("no --pair: matching the two views of procedural rooms")
        pairs = [(a["image"], b["image"], room_truth(a, b)) for a, b in room_views(data.TEST_SCENES, STUDY["pairs"], size)]
    rows, picture = {}, None
    for reader in readers:
        for name, upsample in ((reader.name, 1), (f"{reader.name}, {args.upsample}x finer", args.upsample)):
            errors, count, findable = [], 0, 0
            for i, (one, two, truth) in enumerate(tqdm(pairs, f"match, {name}", leave=False)):
                a, b = (Image.fromarray(x.permute(1, 2, 0).numpy()) if torch.is_tensor(x) else data.load_image(x) for x in (one, two))
                found = match_errors(reader, [data.fit_image(x, size, reader.patch_size) for x in (a, b)], (a.size, b.size), truth, upsample)
                errors.append(found[3])
                count, findable = count + len(found[0]), findable + found[4]
                if not i and upsample == args.upsample and picture is None:
                    best = found[2].argsort(descending=True)
                    shown = best[torch.linspace(0, len(best) - 1, min(60, len(best))).long()]
                    looks = [np.asarray(x.resize([round(s * 480 / max(x.size)) for s in x.size])) for x in (a, b)]
                    picture = draw_matches(*looks, found[0][shown], found[1][shown], found[3][shown], output(args, ".png"))
            rows[name] = {"matches": str(count), **correct(torch.cat(errors), findable)}
    report(args, size, rows, picture)


# ---------------------------------------------------------------------------------------------------------------- the study

@dataclass
class Column:
    """A column of the study: its heading, which domain it tests, whether more is better."""
    heading: str
    domain: str
    rises: bool = True

    def ratio(self, value, reference):
        """How good value is beside the reference, 1 = equal, more = better."""
        return value / max(reference, 1e-9) if self.rises else reference / max(value, 1e-9)


COLUMNS = {"k-NN": Column("k-NN %", "objects"), "accuracy": Column("linear %", "objects"), "mIoU": Column("mIoU %", "objects"),
           "depth RMSE": Column("RMSE m", "rooms", False), "delta1": Column("delta1 %", "rooms"), "normals": Column("normals °", "rooms", False),
           "matching": Column("match %", "rooms"), "joints 2D": Column("2D %", "people"), "joints 3D": Column("3D cm", "people", False)}
ROOM_SEEDS = 2 * 10**8  # where the rooms begin that two-view decoders learn from: no teacher and no student has seen them
STUDY = dict(train=1200, test=300, pairs=60)  # scenes of each domain and seed
CHUNK, PROBE_STEPS = 120, 500


def study_scenes(seed, size, grid, train, test, pairs):
    """What study_row needs: {domain: (train scenes, targets of each CHUNK of them, test scenes, their targets)}, "own": which patches of the
    training rooms' two views belong together (patch_pairs), "pairs": test rooms. Probes train on seeds from 5*10^8, test from 1.1*10^9:
    no teacher and no student has seen either."""
    scenes = {}
    for domain in data.SCENES:
        if domain == "rooms":  # both views of half as many
            views = zoo.room_pairs(5 * 10**8 + 10**6 * seed, train // 2, size)
            known, scenes["own"] = {k: v.flatten(0, 1) for k, v in views.items()}, zoo.patch_pairs(views, grid)
        else:
            known = data.labelled_scenes(domain, 5 * 10**8 + 10**6 * seed, train, size)
        new = data.labelled_scenes(domain, data.TEST_SCENES + 10**8 + 10**6 * seed, test, size)
        probe = zoo.Probe(domain, 1, grid)
        chunks = [probe.targets({k: v[i:i + CHUNK] for k, v in known.items()}) for i in range(0, train, CHUNK)]
        scenes[domain] = known, chunks, new, probe.targets(new)
    scenes["pairs"] = room_views(data.TEST_SCENES + 2 * 10**8 + 10**6 * seed, pairs, size)
    return scenes


def study_features(reader, images):
    """Features of uint8 images; where there is no class token the mean of the patch tokens takes its place."""
    parts = [reader(part) for part in images.split(100)]
    patch = torch.cat([p["patch"] for p in parts])
    return {"cls": patch.mean(1) if parts[0]["cls"] is None else torch.cat([p["cls"] for p in parts]), "patch": patch}


def study_row(reader, scenes, grid, seed, steps=0):
    """{column: value}: probes of one frozen encoder on all domains, each trained for `steps` (0: PROBE_STEPS)."""
    row, steps = {}, steps or PROBE_STEPS
    for domain in data.SCENES:
        train, chunks, test, truth = scenes[domain]
        x, y = study_features(reader, train["image"]), study_features(reader, test["image"])
        if domain == "objects":
            row["k-NN"] = top(knn(x["cls"], train["label"], y["cls"], len(data.KINDS)), test["label"])["top-1"]
        for kind in x:
            mean, std = moments(x[kind])
            x[kind], y[kind] = (x[kind] - mean) / std, (y[kind] - mean) / std
        torch.manual_seed(seed)
        probe = zoo.Probe(domain, x["patch"].shape[-1], grid)
        parts = [{k: v[i:i + CHUNK] for k, v in x.items()} for i in range(0, len(x["cls"]), CHUNK)]
        fit(probe, lambda step: probe.loss(probe(parts[step % len(parts)], chunks[step % len(parts)]), chunks[step % len(parts)]), steps, 1e-1)
        with torch.no_grad():
            row.update(probe.metrics(probe(y, truth), truth))
        if domain == "rooms":
            describes = with_descriptor(reader, x["patch"].unflatten(0, (-1, 2)), *scenes["own"], mean, std, steps)
    pairs = [room_matches(describes, a, b, upsample=1) for a, b in scenes["pairs"]]
    # Of all patches that both views see: of the matches alone, an encoder that finds few would look good. 10 % of the side is less than a patch.
    row["matching"] = correct(torch.cat([p[3] for p in pairs]), sum(p[4] for p in pairs), (0.1,))["found"]
    return {c: row[c] for c in COLUMNS}


def with_descriptor(reader, pairs, own, seen, mean, std, steps):
    """The reader with a linear layer behind it that has learned which patches of two views [n, 2, N, D] (standardised) are of one place."""
    head = nn.Linear(pairs.shape[-1], 64, bias=False)

    def loss(step):
        rows = slice(step * 60 % len(pairs), step * 60 % len(pairs) + 60)
        return zoo.contrast(head(pairs[rows, 0]), head(pairs[rows, 1]), own[rows])[seen[rows]].mean()
    fit(head, loss, steps, 1e-2)

    def read(images):
        return {"cls": None, "patch": head((reader.function(images)["patch"].float() - mean) / std)}
    return replace(reader, function=read)


def room_views(start, count, size):
    """[(view, view)] of procedural rooms, each {label: tensor}; see data.labelled_scenes."""
    views = zoo.room_pairs(start, count, size)
    return [tuple({k: v[i, j] for k, v in views.items()} for j in (0, 1)) for i in range(count)]


def room_truth(a, b):
    """What is known of two views of a room, as match_errors wants it."""
    return {"depth": a["depth"], "depth_b": b["depth"], "camera": (a["K"], b["K"], b["pose"].double().inverse() @ a["pose"].double())}


def room_matches(reader, a, b, upsample):
    """match_errors() of the two views of a room."""
    size = (a["image"].shape[-1],) * 2
    return match_errors(reader, (a["image"], b["image"]), (size, size), room_truth(a, b), upsample)


def random_encoder(like):
    """A ViT of the same shape with random weights: what any network knows before it learns."""
    return dune.ViT(like.grid * like.patch_size, like.patch_size, like.embed_dim, len(like.blocks), like.blocks[0].attn.heads, like.registers, layer_scale=None).eval()


def command_study(args):
    """Procedural scenes: linear probes, k-NN and matching of a random encoder, each teacher, the student's encoder and through each projector."""
    model, teachers, size = subject(args)
    patch = (model.encoder if model else next(iter(teachers.values()))).patch_size
    readers, grid = [teacher_reader(t, teacher, patch) for t, teacher in teachers.items()], (size // patch,) * 2
    if model:
        torch.manual_seed(args.seed)
        blank = random_encoder(model.encoder).to(args.device)
        readers = [Reader("random encoder", blank, patch, [blank]), *readers, *student_readers(model, ["encoder", *(t for t in model.projectors)])]
    values = {reader.name: [] for reader in readers}
    bar = tqdm(total=args.seeds * len(readers), desc="study: scenes", leave=False)
    for seed in range(args.seed, args.seed + args.seeds):
        scenes = study_scenes(seed, size, grid, **STUDY)
        for reader in readers:
            bar.set_description(f"study: {reader.name}")
            values[reader.name].append(study_row(reader, scenes, grid, seed))
            bar.update()
    bar.close()
    mean, spread = mean_and_spread(values)
    head = lambda rows: {r: {COLUMNS[c].heading: v for c, v in row.items()} for r, row in rows.items()}
    sizes = {reader.name: reader.parameters for reader in readers}
    print(f"linear probes on frozen features, {args.seeds} seeds (mean ± spread); 3 domains: objects, rooms, people")
    table({r: {"M params": sizes[r] / 1e6, **row} for r, row in head(mean).items()}, "", head(spread) if args.seeds > 1 else None)
    ratios = {}
    for c, column in COLUMNS.items() if model else ():
        own = next((t for t in teachers if data.domain_of(t) == column.domain), None)
        if own in model.projectors:
            best = max((column.ratio(mean[t][c], mean[own][c]) for t in teachers if t != own), default=0)
            for r in ("encoder", f"through {own}"):
                ratio = column.ratio(mean[r][c], mean[own][c])
                name = "through its projector" if r != "encoder" else "encoder"
                ratios.setdefault(f"{name} / own teacher", {})[column.heading] = ratio
                ratios.setdefault(f"{name}: within 10 %, ahead of the others", {})[column.heading] = ("yes" if ratio >= 0.9 else "no") + (", yes" if ratio > best else ", no")
    if ratios:
        print("\nthe student beside each column's own teacher (above 1: better)")
        table({r: row for r, row in ratios.items()})
    path = write_json(output(args, ".json"), {"seeds": args.seeds, "image_size": size, "parameters": sizes, "values": values, "mean": mean, "spread": spread, "ratios": ratios})
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------------------- ablation

FACTORS = {"projector": ("sp", "lp", "tp"), "sharing": ("own", "own+generic", "all"), "drop": (0.0, 0.5)}
PAPER = {"projector": "the transformer projector is best", "sharing": "all data for all teachers is best", "drop": "dropping balances the teachers"}
RECIPE = {"projector": "tp", "sharing": "all", "drop": 0.5}  # the paper's: with the tiny preset's own images only there is nothing to drop


def train_one(args, config, seed, steps):
    """Train the tiny student in a process of its own: (its checkpoint, images/s). A run that is there already, finished, is not repeated."""
    out = os.path.join(args.out or "out/ablate", f"{config['projector']}-{config['sharing']}-{config['drop']:g}-seed{seed}-steps{steps}")
    options = [f"--{k}={v}" for k, v in {**config, "seed": seed, "steps": steps, "out": out, "log-every": 5}.items()]
    options += [f"--data={t}=scenes:{domain}" for t, (domain, *_) in zoo.SPECIALISTS.items()]  # without end: a short run need not draw the preset's thousands
    result = subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), "--preset", "tiny", *options], capture_output=True, text=True)
    if result.returncode:
        raise Oops(f"train.py failed for {out}: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return f"{out}/checkpoint.pt", float(np.median([line["images_per_s"] for line in read_log(out)][1:] or [1]))


def effects(runs, metric):
    """[(factor, level a, level b, difference of means a - b, its standard error)]: main effects over paired cells, noise from seeds within cells."""
    cells = {}
    for run in runs:
        cells.setdefault(tuple(run[f] for f in FACTORS), []).append(run[metric])
    degrees = sum(len(v) - 1 for v in cells.values())
    noise = math.sqrt(sum(np.var(v) * len(v) for v in cells.values()) / degrees) if degrees else math.nan
    found = []
    for i, (factor, levels) in enumerate(FACTORS.items()):
        for a, b in [(a, b) for n, a in enumerate(levels) for b in levels[n + 1:]]:
            pairs = [(cells[cell], cells[other]) for cell in cells if cell[i] == a and (other := (*cell[:i], b, *cell[i + 1:])) in cells]
            if pairs:  # only cells that exist at both levels
                gap = np.mean([np.mean(x) - np.mean(y) for x, y in pairs])
                error = noise * math.sqrt(sum(1 / len(x) + 1 / len(y) for x, y in pairs)) / len(pairs)
                found.append((factor, a, b, float(gap), error))
    return found


def command_ablate(args):
    """Retrain the tiny student over projector x sharing x dropping at equal steps and equal time: which differences exceed the noise?"""
    every = [dict(zip(FACTORS, (p, s, d))) for p in FACTORS["projector"] for s in FACTORS["sharing"] for d in FACTORS["drop"]]
    near = [c for c in every if sum(c[f] != RECIPE[f] for f in FACTORS) <= 1]  # the recipe, and one thing changed
    steps, scenes, result, path_of_result = args.steps // 2 if args.quick else args.steps, None, {}, os.path.join(args.out or "out/ablate", "ablate.json")
    for equal, configs in (("steps", near if args.quick else every), ("time", [] if args.quick else near)):
        runs = []
        for config, seed in (bar := tqdm([(c, s) for c in configs for s in range(args.seeds)], leave=False)):
            bar.set_description(f"equal {equal}: {' '.join(map(str, config.values()))}, seed {seed}")
            length = steps
            if equal == "time":
                speed = {tuple(run[f] for f in FACTORS): [] for run in result["steps"]}
                for run in result["steps"]:
                    speed[tuple(run[f] for f in FACTORS)].append(run["images/s"])
                length = max(2, round(steps * np.mean(speed[tuple(config.values())]) / np.mean(speed[tuple(RECIPE.values())])))
            path, rate = train_one(args, config, seed, length)
            model, weights = dune.load(path), dune.read_checkpoint(path)["weights"]
            teachers = {t: zoo.load_teacher(t, w) for t, w in weights.items()}
            size, patch = model.encoder.grid * model.encoder.patch_size, model.encoder.patch_size
            grid = (model.encoder.grid,) * 2
            if scenes is None:
                scenes = study_scenes(0, size, grid, train=540, test=240, pairs=20)
                own = {t: study_row(teacher_reader(t, x, patch), scenes, grid, 0, 200) for t, x in teachers.items()}
                owner = {c: own[next(t for t in teachers if data.domain_of(t) == column.domain)][c] for c, column in COLUMNS.items()}
                held = held_out([], data.parse_data([], list(teachers)), list(teachers), size)["image"]
            losses = {t: parts["loss"] for t, parts in held_out_losses(model, teachers, held, grid).items()}
            probes = study_row(student_readers(model, ["encoder"])[0], scenes, grid, 0, 200)
            runs.append({**config, "seed": seed, "steps": length, "images/s": rate, "loss": float(np.mean(list(losses.values()))),
                         "imbalance": max(losses.values()) - min(losses.values()),
                         "study": float(np.mean([COLUMNS[c].ratio(v, owner[c]) for c, v in probes.items()])), "losses": losses, "probes": probes})
            write_json(path_of_result, {**result, equal: runs})  # at once: half an hour may be interrupted
        if not runs:
            continue
        result[equal] = runs
        print(f"\nequal {equal}: {len(runs)} runs of {args.seeds} seeds, recipe's length {steps} steps\n"
              "loss: held-out, mean over teachers; imbalance: largest - smallest teacher's; study: encoder's probes / own teacher's, mean over columns")
        rows, spread = {}, {}
        for config in configs:
            same = [run for run in runs if all(run[f] == config[f] for f in FACTORS)]
            name = " ".join(map(str, config.values()))
            rows[name], spread[name] = ({k: float(f([run[k] for run in same])) for k in ("loss", "imbalance", "study", "images/s", "steps")} for f in (np.mean, np.std))
        table(rows, "projector sharing drop", spread)
        print()
        lines = {f"{f}: {a} - {b}": {} for f, a, b, *_ in effects(runs, "loss")}
        for metric in ("loss", "imbalance", "study"):
            for factor, a, b, gap, error in effects(runs, metric):
                lines[f"{factor}: {a} - {b}"][metric] = f"{gap:+.4f} ±{error:.4f} {'differs' if abs(gap) > 2 * error else 'noise'}"
        for name, line in lines.items():
            line["the paper"] = PAPER[name.split(":")[0]]
        table(lines, "difference ± standard error")
    print(f"wrote {path_of_result}")


# ---------------------------------------------------------------------------------------------------------------- commands

def some_pictures(args, teachers, size, patch):
    """uint8 [n, 3, h, w] to look at: --image, else some held-out images of --data or of the procedural scenes."""
    if not args.image:
        return held_out([], data.parse_data(args.data, list(teachers)), list(teachers), size)
    images = [data.fit_image(data.load_image(path), size, patch) for path in args.image]
    if len({image.shape for image in images}) > 1:
        images = [data.val_transform(data.load_image(path), size - size % patch) for path in args.image]
    return {"image": torch.stack(images), "show": list(range(len(images))), "what": "photographs"}


def command_pca(args):
    """Each teacher's features and the student's, as colours, side by side in one PNG."""
    model, teachers, size = subject(args)
    patch = (model.encoder if model else next(iter(teachers.values()))).patch_size
    images = some_pictures(args, teachers, size, patch)
    print(f"wrote {pca_sheet(model, teachers, images['image'][images['show']], output(args, '.png'))}")


def command_loss(args):
    """Cosine and smooth-L1 loss for each teacher and token type, by the student's running statistics."""
    model, teachers, size = subject(args)
    if model is None:
        raise Oops("eval.py loss needs a student: --run FOLDER or --checkpoint FILE")
    held = held_out(args.data, data.parse_data(args.data, list(teachers)), list(teachers), size)
    losses = held_out_losses(model, teachers, held["image"], (size // model.encoder.patch_size,) * 2, running=True)
    print(f"loss on {len(held['image'])} {held['what']}")
    report(args, size, losses)


def explained(features):
    """Cumulative share [D] of the variance of features [..., D] that their first principal components explain."""
    flat = features.double().flatten(0, -2)
    values = torch.linalg.eigvalsh(torch.cov(flat.T)).clamp(min=0).flip(0)
    return values.cumsum(0) / values.sum().clamp(min=1e-30)


def command_spectrum(args):
    """The paper's Figure 4: how much variance the first components of each teacher's features and of the student's explain."""
    model, teachers, size = subject(args)
    patch = (model.encoder if model else next(iter(teachers.values()))).patch_size
    images = some_pictures(args, teachers, size, patch)["image"]
    readers = {t: [teacher_reader(t, teacher, patch)] + (student_readers(model, [t]) if model and t in model.projectors else []) for t, teacher in teachers.items()}
    encoder = student_readers(model, ["encoder"]) if model else []
    read = lambda r: explained(torch.cat([r(part)["patch"].cpu() for part in images.split(16)]))
    curves = {t: {r.name: read(r) for r in tqdm(rs, f"spectrum of {t}", leave=False)} for t, rs in readers.items()}
    if encoder:
        curves["the student's encoder"] = {r.name: read(r) for r in encoder}
    share = {name: {f"{p} % of variance": str(1 + int((x < p / 100).sum())) for p in (50, 90, 99)} | {"dimensions": str(len(x))} for c in curves.values() for name, x in c.items()}
    picture = draw_curves(output(args, ".png"), [(f"variance explained: {t}", {name: (list(range(1, len(x) + 1)), x.tolist()) for name, x in c.items()})
                                                 for t, c in curves.items()], width=380)
    report(args, size, share, picture, curves={name: x.tolist() for c in curves.values() for name, x in c.items()})


def command_alignment(args):
    """The paper's Figure 5, from a run's log.jsonl: do the teachers' losses change together? Correlation of the changes, over training."""
    lines = read_log(args.run) if args.run else []
    names = [t for t in (lines[0] if lines else ()) if isinstance(lines[0][t], dict)]
    losses = np.array([[line[t]["loss"] if line[t].get("loss") is not None else math.nan for t in names] for line in lines])
    changes = np.diff(losses, axis=0)
    changes = changes[np.isfinite(changes).all(1)] if len(changes) else changes
    if len(names) < 2 or len(changes) < 4:
        raise Oops(f"eval.py alignment needs --run with at least two teachers and five lines of log.jsonl; {args.run} has {len(names)} and {len(lines)} (--log-every)")
    correlation = lambda part: np.corrcoef(part.T)
    window = max(8, len(changes) // 8)
    whole, curves = correlation(changes), {}
    for i, j in [(i, j) for i in range(len(names)) for j in range(i)]:
        ends = range(min(window, len(changes)), len(changes) + 1)
        curves[f"{names[j]} and {names[i]}"] = [lines[e]["step"] for e in ends], [float(correlation(changes[max(0, e - window):e])[i, j]) for e in ends]
    table({a: {b: float(whole[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}, "correlation")
    picture = draw_curves(output(args, ".png"), [(f"correlation of loss changes, {window} lines of the log", curves)])
    path = write_json(output(args, ".json"), {"teachers": names, "correlation": whole.tolist(), "over training": curves})
    print(f"wrote {path}, {picture}")


# ---------------------------------------------------------------------------------------------------- two photographs to 3D
# Points are [..., 3] in metres, x right, y down, z forward; pixels are (x, y) with centres at integer + 0.5.

def pixel_grid(height, width, device="cpu"):
    """[height * width, 2]: the centres of the pixels."""
    return (zoo.centres(height, width) * torch.tensor([width, height])).to(device)


def estimate_focal(points, weight):
    """Focal length in pixels that explains a point map [H, W, 3] in its own camera's frame, the image's centre being the principal point.

    The median of what each pixel says; far from the centre, and by weight [H, W], it says more. At least 1, which is as good as none (points
    that lie where no camera would see them). Oops if no point is before the camera.
    """
    height, width = points.shape[:2]
    points, weight = points.flatten(0, 1).double().cpu(), weight.flatten().double().cpu()
    keep = points[:, 2] > 1e-6
    if not keep.any():
        raise Oops("no focal length: every point lies behind the camera; other weights than the model's, or a decoder that has not learned?")
    pixels, rays = (pixel_grid(height, width) - torch.tensor([width, height]) / 2)[keep].double(), points[keep, :2] / points[keep, 2:]
    says, order = ((pixels * rays).sum(-1) / rays.square().sum(-1).clamp(min=1e-12)).sort()
    share = (pixels.norm(dim=-1) * weight[keep])[order].cumsum(0)
    return max(1.0, says[torch.searchsorted(share, share[-1:] / 2)].item())


def reciprocal_matches(desc1, desc2, stride=8, rounds=8):
    """Pixels of two descriptor maps [H, W, D] that are each other's nearest neighbour: flat indices (first [n], second [n]).

    Seeds on a grid of `stride` go to their nearest neighbour in the other image and back until they do not move any more (MASt3R).
    """
    height, width, _ = desc1.shape
    here = torch.arange(height * width, device=desc1.device).view(height, width)[stride // 2::stride, stride // 2::stride].flatten()
    one, two = desc1.flatten(0, 1), desc2.flatten(0, 1)
    found = []
    for _ in range(rounds):
        there = nearest(one[here], two)[1]
        back = nearest(two[there], one)[1]
        found.append(torch.stack([here, there], 1)[back == here])
        here = back[back != here].unique()
        if not len(here):
            break
    return torch.cat(found).unique(dim=0).unbind(1)


def rigid_fit(a, b):
    """Rotations [..., 3, 3] and translations [..., 3] with R a + t = b in the least squares (Kabsch); a, b [..., n, 3]."""
    ca, cb = a.mean(-2, keepdim=True), b.mean(-2, keepdim=True)
    u, _, vt = torch.linalg.svd((b - cb).mT @ (a - ca))
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt)
    rotation = (u * sign[..., None, :]) @ vt
    return rotation, (cb - ca @ rotation.mT).squeeze(-2)


def relative_pose(points1, points2, pixels2, focal2, tolerance, hypotheses=1000):
    """Camera 2 in camera 1's frame, [4, 4], and which matches agree with it, bool [n].

    points1, points2 [n, 3]: the matched points, each in its own camera's frame; pixels2 [n, 2]: where camera 2 sees them, from its
    principal point; tolerance: pixels. RANSAC over rigid fits of three matches, judged by where they project into view 2; the best one is
    refined there (PnP by Gauss-Newton), so that the depth of view 2 only has to be roughly right. Fewer than 4 matches: (None, none).
    """
    points1, points2, pixels2 = points1.double().cpu(), points2.double().cpu(), pixels2.double().cpu()
    finite = (points1 + points2).isfinite().all(-1).nonzero()[:, 0]
    if len(finite) < 4:
        return None, torch.zeros(len(points1), dtype=torch.bool)
    pick = finite[torch.randint(len(finite), (hypotheses, 3), generator=torch.Generator().manual_seed(0))]

    def residual(rotation, translation):
        moved = points1 @ rotation.mT + translation[..., None, :]
        return moved, focal2 * moved[..., :2] / moved[..., 2:].clamp(min=1e-6) - pixels2

    def agrees(rotation, translation):
        moved, error = residual(rotation, translation)
        return (error.norm(dim=-1) < tolerance) & (moved[..., 2] > 1e-6)
    rotation, translation = rigid_fit(points1[pick], points2[pick])
    best = agrees(rotation, translation).sum(-1).argmax()
    pose = rotation[best], translation[best]
    for _ in range(10):
        inside = agrees(*pose)
        if inside.sum() < 4:
            break
        moved, error = (x[inside] for x in residual(*pose))
        x, y, z = moved.unbind(1)
        zero, one = torch.zeros_like(z), torch.ones_like(z)
        by_point = focal2 * torch.stack([one / z, zero, -x / z**2, zero, one / z, -y / z**2], -1).view(-1, 2, 3)
        by_turn = torch.stack([zero, z, -y, -z, zero, x, y, -x, zero], -1).view(-1, 3, 3)
        step = torch.linalg.lstsq(torch.cat([by_point @ by_turn, by_point], -1).flatten(0, 1), -error.flatten()[:, None]).solution[:, 0]
        a, b, c = step[:3].tolist()
        turn = torch.linalg.matrix_exp(torch.tensor([[0, -c, b], [c, 0, -a], [-b, a, 0]], dtype=torch.double))
        better = turn @ pose[0], turn @ pose[1] + step[3:]
        if agrees(*better).sum() < inside.sum():
            break
        pose = better
    camera = torch.eye(4, dtype=torch.double)
    camera[:3, :3], camera[:3, 3] = pose[0].T, -pose[0].T @ pose[1]
    return camera, agrees(*pose)


def angle(rotation):
    """Of a rotation [3, 3], in degrees."""
    return torch.rad2deg(((rotation.trace() - 1) / 2).clamp(-1, 1).acos()).item()


@torch.no_grad()
def reconstruct(model, image1, image2, stride=8):
    """All that a TwoView says about two images, uint8 [3, H, W]: {"views": its two dictionaries, without the batch dimension, "focal":
    [f1, f2] pixels, "matches": flat pixel indices ([n], [n]), best first, "pose": camera 2 in camera 1 [4, 4], "inside": bool [n]}."""
    device = model.dec_norm.weight.device
    one, two = (image[None].to(device) / 127.5 - 1 for image in (image1, image2))
    first, second = ({k: v[0] for k, v in view.items()} for view in model(one, two))
    own = {k: v[0] for k, v in model(two, one)[0].items()}  # view 2 in its own camera's frame
    focal = [estimate_focal(view["pts3d"], view["conf"]) for view in (first, own)]
    a, b = reciprocal_matches(first["desc"], second["desc"], stride)
    best = (first["desc_conf"].flatten()[a] * second["desc_conf"].flatten()[b]).argsort(descending=True)
    a, b = a[best], b[best]

    def lifted(view, focal, at):  # by their depth along their pixels' rays, from which the points of a map stray: poses are a fifth better
        height, width = view["conf"].shape
        pixels = (pixel_grid(height, width, device) - torch.tensor([width, height], device=device) / 2)[at]
        depth = view["pts3d"].flatten(0, 1)[at, 2:]
        return torch.cat([pixels / focal * depth, depth], 1), pixels
    pose, inside = relative_pose(lifted(first, focal[0], a)[0], *lifted(own, focal[1], b), focal[1], model.patch / 2)
    return {"views": (first, second), "focal": focal, "matches": (a, b), "pose": pose, "inside": inside}


def write_ply(path, points, colours):
    """A point cloud, points [n, 3] and colours uint8 [n, 3], as a binary PLY file."""
    rows = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"], rows["rgb"] = points, colours
    names = [*(f"property float {c}" for c in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue"))]
    with open(path, "wb") as file:
        file.write("\n".join(["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *names, "end_header\n"]).encode())
        file.write(rows.tobytes())


def two_view_picture(path, images, result, lines=40):
    """Write a PNG: both images with the best matches that agree drawn between them, depth below (near is warm), confidence below (high is warm)."""
    pairs = torch.stack(result["matches"], 1).cpu()[result["inside"]][:4 * lines]
    pairs = pairs[::max(1, len(pairs) // lines)][:lines]  # the best ones, thinned out
    places = [pixel_grid(*image.shape[1:])[p] / torch.tensor(image.shape[:0:-1]) for image, p in zip(images, pairs.T)]

    scale = max(1, 320 // max(images[0].shape))

    def colours(values):
        low, high = np.percentile(values, (2, 98))
        return larger(depth_colours(values, max(low, 1e-6), max(high, 2e-6)))

    def larger(picture):
        return picture.repeat(scale, 0).repeat(scale, 1)
    below = [[colours(look(view).cpu()) for view in result["views"]] for look in (lambda v: v["pts3d"][..., 2].clamp(min=1e-3), lambda v: 1 / v["conf"])]
    return draw_matches(*(larger(image.permute(1, 2, 0).numpy()) for image in images), *places, torch.full((len(pairs),), math.nan), path, below)


# Training a decoder, with MASt3R's losses, on pairs of views (see teachers.py for what a pair holds).

class FolderPairs(torch.utils.data.Dataset):
    """Pairs of neighbours by name in each sub-folder of `root`: NAME.jpg (.png, .webp) beside NAME.npz with depth, K and pose."""

    def __init__(self, root, size):
        self.size, self.pairs = size, []
        for folder, _, names in sorted(os.walk(root)):
            names = sorted(n for n in names if n.lower().endswith(data.SUFFIXES) and os.path.splitext(n)[0] + ".npz" in names)
            self.pairs += [(os.path.join(folder, a), os.path.join(folder, b)) for a, b in zip(names, names[1:])]
        if len(self.pairs) < 2:
            raise Oops(f"{root} holds fewer than two pairs: neighbours by name in each sub-folder, NAME.jpg beside NAME.npz (depth, K, pose)")

    def __len__(self):
        return len(self.pairs)

    def view(self, path):
        image, camera = data.load_image(path), os.path.splitext(path)[0] + ".npz"
        try:
            with np.load(camera, allow_pickle=False) as file:
                depth, K, pose = (torch.from_numpy(np.asarray(file[k], np.float32)) for k in ("depth", "K", "pose"))
        except Exception as error:  # numpy's errors for foreign files are of many types
            raise Oops(f"cannot read {camera}: {data.reason(error)}") from None
        if depth.shape != (image.height, image.width) or K.shape != (3, 3) or pose.shape != (4, 4):
            raise Oops(f"{camera}: expected depth {[image.height, image.width]} as the image, K [3, 3] and pose [4, 4]")
        if not all(x.isfinite().all() and x.det() != 0 for x in (K, pose)):
            raise Oops(f"{camera}: K and pose must be finite and have an inverse; a frame whose camera was lost has no place here")
        x0, y0, x1, y1 = box = data.centre(*image.size)
        scale = self.size / (x1 - x0)
        K = torch.tensor([[scale, 0, -x0 * scale], [0, scale, -y0 * scale], [0, 0, 1]]) @ K
        depth = F.interpolate(depth[None, None, y0:y1, x0:x1], (self.size, self.size), mode="nearest-exact")[0, 0]
        return data.crop_resize(image, box, self.size, self.size), depth.nan_to_num(0, 0, 0).clamp(min=0), K, pose

    def __getitem__(self, i):
        return dict(zip(("image", "depth", "K", "pose"), map(torch.stack, zip(*map(self.view, self.pairs[i])))))


def two_view_loss(views, geometry, matching=0.075, samples=512):
    """MASt3R's training loss: point regression weighted by confidence, metric, and `matching` times InfoNCE over true correspondences."""
    points, known, place, seen = geometry
    loss = 0
    for k, view in enumerate(views):
        error = (view["pts3d"] - points[:, k]).norm(dim=-1)
        loss = loss + (view["conf"] * error - 0.2 * view["conf"].log())[known[:, k]].mean()
    size, seen = place.shape[1], seen.flatten(1).float()
    pick = torch.multinomial(seen + 1e-9, samples, replacement=True)
    at = place.flatten(1, 2).gather(1, pick[..., None].expand(-1, -1, 2)).clamp(0, size - 1).long()
    picks = pick, at[..., 1] * size + at[..., 0]
    one, two = (view["desc"].flatten(1, 2).gather(1, p[..., None].expand(-1, -1, view["desc"].shape[-1])) for view, p in zip(views, picks))
    trust = sum(view["desc_conf"].flatten(1).gather(1, p) for view, p in zip(views, picks)) / 2
    nce, counts = zoo.contrast(one, two, torch.arange(samples, device=pick.device).expand(len(pick), -1)), seen.gather(1, pick)
    trusted = trust * nce.detach() - 0.2 * trust.log()  # apart from nce: else doubt would silence the descriptors before they learn
    return loss + matching * ((nce + trusted) * counts).sum() / counts.sum().clamp(min=1)


TINY_DECODER = dict(dim=64, depth=2, maps=(16, 16, 24, 32), features=16, last=16, hidden=128, descriptor=8)  # for encoders narrower than ViT-S


def train_two_view(encoder, pairs, name, patch, steps, batch=8, device="cpu", seed=0):
    """A TwoView on a frozen encoder whose decoder has learned from `pairs` (a sequence or dataset), its patches those of an encoder with
    this patch size, whatever its own; narrow encoders get a tiny one."""
    torch.manual_seed(seed)
    tiny = encoder.embed_dim < 384
    model = zoo.TwoView(encoder, patch=patch, **(TINY_DECODER if tiny else {})).to(device)
    for head in (model.downstream_head1, model.downstream_head2):
        for conv in head.modules():
            if isinstance(conv, nn.Conv2d):  # torch's own start lets a signal shrink by 0.58 in each of a dozen layers
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        last, local = head.dpt.head["4"], head.head_local_features.fc2
        nn.init.normal_(last.weight, std=1e-3)  # all points begin three metres ahead
        last.bias.data = torch.tensor([0.0, 0.0, math.log(4), 0.0], device=device)
        weight = local.weight.data.view(-1, model.patch**2, local.in_features)
        weight.copy_(weight[:, :1])  # and the pixels of a patch with one descriptor: places are learned sooner than differences within them
        nn.init.zeros_(local.bias)
    with torch.no_grad():  # and with features of mean 0 and variance 1, like every probe here, whichever encoder they are from
        images = torch.cat([pairs[i]["image"] for i in range(min(32, len(pairs)))]).to(device)
        std, mean = torch.std_mean(model.encode(images / 127.5 - 1, (images.shape[-1] // patch,) * 2).float(), (0, 1))
        model.norm.weight.copy_(1 / (std + 1e-6))
        model.norm.bias.copy_(-mean / (std + 1e-6))
    params, lr = [p for p in model.parameters() if p.requires_grad], 6e-3 if tiny else 1e-4
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.3 if tiny else 0.05},  # tiny: for the few pairs it learns from
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    workers = 0 if isinstance(pairs, list) else min(8, data.cores())
    order = torch.utils.data.RandomSampler(pairs, replacement=True, num_samples=steps * batch)
    for part in tqdm(torch.utils.data.DataLoader(pairs, batch, sampler=order, num_workers=workers), f"two-view decoder on the {name}", leave=False):
        swap = torch.rand(()) < 0.5  # either view may come first
        part = {k: (v.flip(1) if swap else v).to(device) for k, v in part.items()}
        images = part["image"] / 127.5 - 1
        loss = two_view_loss(model(images[:, 0], images[:, 1]), zoo.pair_geometry(part), 1.0 if tiny else 0.075)  # in a few hundred steps 0.075 teaches no descriptors
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge_two_view(model, pairs):
    """{metric: value} on pairs that it has not seen; errors of the pose are medians."""
    rows = []
    for i in range(len(pairs)):
        pair = pairs[i]
        result = reconstruct(model, *pair["image"], stride=4)
        points, known, place, seen = (x[0] for x in zoo.pair_geometry({k: v[None] for k, v in pair.items()}))
        guess = torch.stack([view["pts3d"] for view in result["views"]]).cpu()
        depth, truth = guess[0, ..., 2][known[0]], pair["depth"][0][known[0]]
        a, b = (index.cpu() for index in result["matches"])
        side, mine = pair["depth"].shape[-1], seen.flatten()[a]  # only matches of what both views see can be judged
        gap = (place.flatten(0, 1)[a] - pixel_grid(side, side)[b]).norm(dim=-1)[mine]
        true = pair["pose"][0].inverse().double() @ pair["pose"][1].double()
        pose = torch.eye(4, dtype=torch.double) if result["pose"] is None else result["pose"]
        rows.append([(guess - points)[known].norm(dim=-1).mean(), (depth - truth).square().mean().sqrt(), 100 * (gap < 0.05 * side).float().mean(),
                     angle(pose[:3, :3] @ true[:3, :3].T), 100 * (pose[:3, 3] - true[:3, 3]).norm()])
    table = torch.tensor(rows)
    names = "points m", "depth RMSE m", "matches %", "rotation °", "translation cm"
    return dict(zip(names, [*table[:, :3].nanmean(0).tolist(), *table[:, 3:].median(0).values.tolist()]))


ROOM_PAIRS, UNSEEN_PAIRS = 200, 128


def two_view_study(args):
    """Paper section 4 in miniature: a decoder on the frozen student, on the mast3r teacher, and on a random encoder, in one table."""
    if not (args.run or args.checkpoint):
        raise Oops("eval.py two-view wants two photographs, or --run FOLDER to train a decoder on that run's student")
    args.teacher = args.teacher or ["mast3r"]
    model, teachers, size = subject(args)
    if args.data:
        pairs = FolderPairs(args.data[0], size)
        held = min(32, len(pairs) // 5 + 1)
        learn = max(1, len(pairs) - held - 1)  # the pair between shares an image with those that are judged
        pairs, unseen = (torch.utils.data.Subset(pairs, r) for r in (range(learn), range(len(pairs) - held, len(pairs))))
    else:
        pairs, unseen = ([{k: v[i] for k, v in batch.items()} for i in range(len(batch["image"]))]
                         for batch in (zoo.room_pairs(ROOM_SEEDS, ROOM_PAIRS, size), zoo.room_pairs(data.TEST_SCENES, UNSEEN_PAIRS, size)))
    torch.manual_seed(args.seed)
    blank = random_encoder(model.encoder).to(args.device)
    values, shown = {}, unseen[0]["image"]
    for name, encoder in {"student": model.encoder, **{f"teacher {t}": x.vit for t, x in teachers.items()}, "random encoder": blank}.items():
        for seed in range(args.seed, args.seed + args.seeds):
            trained = train_two_view(encoder, pairs, name, model.encoder.patch_size, args.steps, device=args.device, seed=seed)
            values.setdefault(name, []).append(judge_two_view(trained, unseen))
            if name == "student" and seed == args.seed:
                picture = two_view_picture(output(args, ".png"), shown, reconstruct(trained, *shown, stride=4))
                path = output(args, ".pt")
                torch.save(zoo.two_view_layout(trained), path + ".part")
                os.replace(path + ".part", path)
    mean, spread = mean_and_spread(values)
    print(f"a two-view decoder on each frozen encoder, {len(pairs)} pairs, {args.steps} steps, judged on {len(unseen)} pairs{'' if args.data else ' of rooms'} not seen")
    report(args, size, mean, f"{picture}, {path} (the student with its decoder: eval.py two-view A B --weights {path})", spread if args.seeds > 1 else None, values=values)


def command_two_view(args):
    """Two photographs to 3D: point cloud, picture, focal length and pose; with --run, a decoder trained on the run's frozen student."""
    if not args.images:
        return two_view_study(args)
    if len(args.images) != 2:
        raise Oops(f"two-view takes two images, not {len(args.images)}: eval.py two-view a.jpg b.jpg (or --run FOLDER)")
    pictures = [data.load_image(path) for path in args.images]
    cloud, picture = output(args, ".ply"), output(args, ".png")
    weights = args.weights[-1] if args.weights else f"{args.run}/two-view.pt" if args.run else None
    model = zoo.load_two_view(weights, args.device)
    longest = args.image_size or (512 if model.norm is None else model.encoder.grid * model.patch)
    images = [data.fit_image(x, longest, model.patch) for x in pictures]
    result = reconstruct(model, *images)
    points, colours = [], []
    for image, view in zip(images, result["views"]):
        keep = view["conf"] >= view["conf"].median().clamp(max=1.5)
        points.append(view["pts3d"][keep].cpu()), colours.append(image.permute(1, 2, 0)[keep.cpu()])
    write_ply(cloud, torch.cat(points).numpy(), torch.cat(colours).numpy())
    two_view_picture(picture, images, result)
    matches, agree = len(result["inside"]), int(result["inside"].sum())
    print(f"wrote {cloud} ({sum(map(len, points)):,} points) and {picture}\n{matches} matches, {agree} agree on one pose")
    if agree < max(12, 0.2 * matches):
        raise Oops(f"only {agree} of {matches} matches agree: no pose; do the two images overlap?")
    if min(result["focal"]) <= 1:
        raise Oops("no focal length: the points lie where no camera sees them; other weights than the model's, or a decoder that has not learned?")
    for path, focal, image in zip(args.images, result["focal"], images):
        height, width = image.shape[1:]
        print(f"focal length of {path}: {focal:.1f} px at {width}x{height} (field of view {2 * math.degrees(math.atan(width / 2 / focal)):.1f} degrees)")
    pose = result["pose"]
    print(f"camera 2 in camera 1's frame: turned by {angle(pose[:3, :3]):.2f} degrees, moved by {pose[:3, 3].norm():.3f} m\n{np.array2string(pose.numpy(), precision=4, suppress_small=True)}")


COMMON = {  # name: how argparse reads it
    "run": dict(help="folder of a run"),
    "checkpoint": dict(help="one of our checkpoints, or a published DUNE or UNIC file or name"),
    "teacher": dict(action="append", default=[], metavar="NAME", help="a bare teacher (pca, loss, spectrum, study: only these of the student's); may be repeated"),
    "weights": dict(action="append", default=[], metavar="TEACHER=FILE", help="a teacher's weights, instead of downloading them"),
    "image-size": dict(type=int, default=0, help="pixels; default: the size the student was trained at, 336 for a teacher alone"),
    "out": dict(help="where to write (the name without .json, .png; ablate: a folder); default: beside the run, or here"),
    "device": dict(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda"),
    "seed": dict(type=int, default=0, help="of the probes"),
}
OPTIONS = {
    "through": dict(action="append", default=[], metavar="TEACHER", help="look at the student through this projector; may be repeated (also: encoder)"),
    "train": dict(help="folder to train the probe on"),
    "test": dict(help="folder to test it on"),
    "token": dict(choices=("cls", "patch", "both"), help="class token, mean patch token, both; default: class token if there is one"),
    "k": dict(type=int, default=20, help="neighbours"),
    "temperature": dict(type=float, default=0.07, help="of their votes"),
    "steps": dict(type=int, default=1000, help="training steps of the probe (ablate: of the student, default 60)"),
    "sliding": dict(action="store_true", help="look through square windows instead of at the whole image squeezed to a square"),
    "classes": dict(type=int, default=0, help="how many; default: as many as --train shows"),
    "ignore": dict(type=int, nargs="+", default=[255], help="labels that count for nothing (ADE20K: 0)"),
    "depth-scale": dict(type=float, default=1000.0, help="units of a depth or disparity PNG per metre or pixel"),
    "max-depth": dict(type=float, default=10.0, help="metres"),
    "pair": dict(nargs="+", metavar="A B [WORD=FILE]", help="two images and what is known: homography=, disparity=, or depth= camera= [depth_b=]"),
    "pairs": dict(metavar="LIST", help="a text file with such lines"),
    "upsample": dict(type=int, default=4, help="how many times finer the second row's features are interpolated"),
    "image": dict(nargs="+", default=[], help="photographs to look at"),
    "data": dict(action="append", default=[], metavar="TEACHER=SOURCE", help="images, as for train.py; none: procedural scenes"),
    "seeds": dict(type=int, default=3, help="how many"),
    "images": dict(nargs="*", help="two photographs"),
    "quick": dict(action="store_true", help="only the recipe and single changes of it, half as long, at equal steps"),
}
COMMANDS = {  # name: (function, its own options, its own defaults)
    "study": (command_study, "seeds", {}), "ablate": (command_ablate, "steps seeds quick", dict(steps=60, seeds=2)),
    "pca": (command_pca, "image data", {}), "loss": (command_loss, "data", {}),
    "spectrum": (command_spectrum, "image data", {}), "alignment": (command_alignment, "", {}),
    "knn": (command_knn, "train test through token k temperature", {}), "linear": (command_linear, "train test through token steps", {}),
    "seg": (command_seg, "train test through steps sliding classes ignore", {}),
    "depth": (command_depth, "train test through steps sliding depth-scale max-depth", {}),
    "match": (command_match, "pair pairs through upsample depth-scale", {}),
    "two-view": (command_two_view, "images data steps seeds", dict(steps=250, seeds=1)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = dune.fail
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, own, defaults) in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.error = dune.fail
        for option in [*COMMON, *own.split()]:
            command.add_argument(option if option == "images" else f"--{option}", **{**COMMON, **OPTIONS}[option])
        command.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise Oops("--device cuda, but torch sees no GPU here")
    for option in ("steps", "seeds", "k", "upsample"):
        if getattr(args, option, 1) < 1:
            raise Oops(f"--{option} {getattr(args, option)}: at least 1")
    if args.out or os.path.isdir(args.run or "."):
        output(args, "")  # a place that cannot be written is told before the work, not after it
    COMMANDS[args.command][0](args)


if __name__ == "__main__":
    dune.run(main)
