"""What the encoder knows: losses, probes of frozen features, matching, two photographs to 3D, pictures, tables.

    python eval.py study --run out/tiny      # procedural scenes: is the student as good as each teacher at its own job?
    python eval.py ablate                    # the tiny student again, over projector x sharing x dropping
    python eval.py pca --run out/tiny        # also loss, spectrum, alignment: what distillation did
    python eval.py two-view a.jpg b.jpg      # two photographs to 3D: point cloud, pose, matches
    python eval.py people photo.jpg          # one photograph to people in 3D: joints in metres
    python eval.py knn --train in1k/train --test in1k/val --run out/dune     # also linear, seg, depth, match

A command looks at the student's encoder, at the student through projectors (--through dinov2) and at bare teachers
(--teacher dinov2), each a row of one table. None of them is trained: on folders of images their features are computed
once and kept in the cache folder. A new command is a function and an entry in COMMANDS, at the end.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
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
from dune import Oops, option

# ---- Losses ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_losses(model, teachers, images, grid, chunk=16, running=False):
    """{teacher: {"cls_cos", "cls_sl1", "patch_cos", "patch_sl1", "loss"}} of uint8 images [n, 3, S, S].

    The teachers are standardised by these images' own statistics, so that a student that has learned nothing yet can be
    compared; running=True: by the running averages.
    """
    training = model.training
    device = next(model.eval().parameters()).device
    parts = [data.normalise(part.to(device)) for part in images.split(chunk)]
    student = [model(part) for part in parts]
    result = {}
    for t, teacher in teachers.items():
        features = joined([teacher(part, grid) for part in parts])
        norm = model.teacher_norms[t]
        statistics = {}
        for kind in norm.normalizers:
            tokens = features[kind].flatten(0, -2)
            std, mean = torch.std_mean(tokens, 0, correction=min(1, len(tokens) - 1))  # one image has one class token
            statistics[kind] = norm.statistics(kind) if running else (mean, std.clamp(min=1e-3))
        loss, values = dune.image_losses(joined([part[t] for part in student]), features, statistics)
        result[t] = {name: value.mean().item() for name, value in {**values, "loss": loss}.items()}
    model.train(training)
    return result

def joined(parts):
    """The features of several batches as one: {"cls": [n, D] or None, "patch": [n, N, D]}, fp32."""
    return {kind: None if parts[0][kind] is None else torch.cat([part[kind].float() for part in parts])
            for kind in ("cls", "patch")}

def held_out(specs, groups, teachers, size):
    """Images that a run is judged by: {"image": uint8 [n, 3, size, size], "show": which in pictures, "what": in words}.
    specs: as for --data; without any the groups' own that no run trains on, if they have such."""
    each = 32 if size <= 128 else 8
    what = "held-out images"
    if specs:
        groups = data.parse_data(specs, teachers)
    else:
        unseen = [replace(group, sources=[source.held_out(each) for source in group.sources]) for group in groups]
        seen = any(set(old.sources) & set(new.sources) for old, new in zip(groups, unseen))
        what = "training images (held-out ones: --val)" if seen else "held-out scenes"
        groups = unseen
    n = min(each, *(group.count for group in groups))
    batch = next(data.batches(groups, size, n * len(groups), workers=0, train=False))
    return {"image": batch["image"], "show": slice(6), "what": what}

def command_loss(args):
    look = subject(args)
    if look.model is None or look.teachers.keys() - look.model.projectors.keys():
        raise Oops("eval.py loss needs a student (--run FOLDER, --checkpoint FILE), and teachers that it learned from")
    held = some_images(args, look)
    losses = held_out_losses(look.model, look.teachers, held["image"], look.grid, running=True)
    print(f"loss on {len(held['image'])} {held['what']}")
    report(args, look, losses)

# ---- The study: linear probes on procedural scenes -------------------------------------------------------------------

COLUMNS = {  # which domain it tests, whether more is better
    "k-NN": ("objects", True), "accuracy": ("objects", True), "mIoU": ("objects", True),
    "depth RMSE": ("rooms", False), "delta1": ("rooms", True), "normals": ("rooms", False), "matching": ("rooms", True),
    "joints 2D": ("people", True), "joints 3D": ("people", False),
}
STUDY = dict(train=1200, test=300, pairs=60)  # scenes of each domain and seed
CHUNK, PROBE_STEPS = 120, 500
# No teacher and no student has seen these: what probes learn from, what they are tested on, what decoders learn from.
PROBE_SEEDS, UNSEEN_SEEDS, ROOM_SEEDS = 5 * 10**8, data.TEST_SCENES + 10**8, 2 * 10**8

def command_study(args):
    look = subject(args)
    readers = look.readers
    if look.model:
        encoder, *bare = readers
        blank = random_encoder(look, args.seed)
        through = [student_reader(look.model, t) for t in look.model.projectors]
        readers = [Reader("random encoder", blank, look.patch, [blank]), *bare, encoder, *through]
    values, pictures = {reader.name: [] for reader in readers}, []
    for seed in range(args.seed, args.seed + args.seeds):
        scenes = study_scenes(seed, look, **STUDY)
        for reader in tqdm(readers, f"study, seed {seed}", leave=False):
            row, said = study_row(reader, scenes, look.grid, seed, PROBE_STEPS)
            values[reader.name].append(row)
            if reader.name == "encoder" and seed == args.seed:
                pictures.append(study_picture(output(args, ".png"), scenes, said, look.grid))
    mean, spread = mean_and_spread(values)
    parameters = {r.name: sum(p.numel() for module in r.modules for p in module.parameters()) for r in readers}
    print(f"linear probes on frozen features, mean ± spread of {args.seeds} seeds, in %; "
          "depth RMSE in m, normals in degrees, joints 3D in cm")
    table({name: {"M params": parameters[name] / 1e6, **row} for name, row in mean.items()}, spread=spread)
    ratios = {"encoder": {}, "through its projector": {}, "best other teacher": {}} if look.model else {}
    for column, own, beside in beside_own_teachers(mean, look.teachers):
        if f"through {own}" in beside:
            ratios["encoder"][column] = beside["encoder"]
            ratios["through its projector"][column] = beside[f"through {own}"]
            ratios["best other teacher"][column] = max((beside[t] for t in look.teachers if t != own), default=math.nan)
    if any(ratios.values()):
        print("\nbeside the teacher whose job it is (1: equal, more is better)")
        table(ratios)
    content = {"seeds": args.seeds, "image_size": look.size, "parameters": parameters, "values": values}
    path = write_json(args, {**content, "mean": mean, "spread": spread, "ratios": ratios})
    print("wrote", ", ".join([path, *pictures]))

def beside_own_teachers(mean, teachers):
    """(column, the teacher whose job it is, {row of mean: how good it is beside that teacher}) of each column that is
    some teacher's job; 1 is equal, more is better."""
    for column, (domain, more) in COLUMNS.items():
        own = next((t for t in teachers if zoo.TEACHERS[t].domain == domain), None)
        if own:
            beside = {}
            for name, row in mean.items():
                above, below = (row, mean[own]) if more else (mean[own], row)
                beside[name] = above[column] / max(below[column], 1e-9)
            yield column, own, beside

def study_scenes(seed, look, train, test, pairs):
    """What study_row needs: {domain: (train images, their targets in chunks, test images, their targets)}; "own": which
    patches of the training rooms' two views belong together (zoo.patch_pairs); "pairs": test rooms (room_views)."""
    scenes = {}
    first, unseen = PROBE_SEEDS + 10**6 * seed, UNSEEN_SEEDS + 10**6 * seed
    for domain in data.SCENES:
        if domain == "rooms":  # both views of half as many
            views = on(look.device, zoo.room_pairs(first, train // 2, look.size))
            known = {label: values.flatten(0, 1) for label, values in views.items()}
            scenes["own"] = zoo.patch_pairs(views, look.grid)
        else:
            known = on(look.device, data.labelled_scenes(domain, first, train, look.size))
        new = on(look.device, data.labelled_scenes(domain, unseen, test, look.size))
        targets = zoo.PROBES[domain](1, look.grid).targets
        scenes[domain] = known["image"], [targets(part) for part in chunks(known)], new["image"], targets(new)
    scenes["pairs"] = room_views(unseen + 10**8, pairs, look.size)
    return scenes

def on(device, batch):
    return {name: values.to(device) for name, values in batch.items()}

def chunks(values):
    """{name: [n, ...]} in parts of CHUNK."""
    return [dict(zip(values, part)) for part in zip(*(x.split(CHUNK) for x in values.values()))]

def study_row(reader, scenes, grid, seed, steps):
    """({column: value}, {domain: what its probe says of the test images}): probes of one frozen encoder on all domains,
    each trained for `steps`."""
    row, said = {}, {}
    for domain in data.SCENES:
        train, targets, test, truth = scenes[domain]
        x, y = reader(train), reader(test)
        if x["cls"] is None:
            x["cls"], y["cls"] = x["patch"].mean(1), y["patch"].mean(1)
        if domain == "objects":
            labels = torch.cat([part["kind"] for part in targets])
            row["k-NN"] = top(knn(x["cls"], labels, y["cls"], len(data.KINDS)), truth["kind"])["top-1"]
        scale = {kind: mean_and_std(x[kind]) for kind in x}
        x, y = ({kind: (z[kind] - mean) / std for kind, (mean, std) in scale.items()} for z in (x, y))
        parts = list(zip(chunks(x), targets))
        torch.manual_seed(seed)
        probe = zoo.PROBES[domain](x["patch"].shape[-1], grid).to(x["patch"].device)

        def loss(step):
            part, labels = parts[step % len(parts)]
            return probe.loss(probe(part), labels)
        zoo.fit(list(probe.parameters()), loss, steps, 1e-1)
        with torch.no_grad():
            said[domain] = probe(y)
        row.update(probe.metrics(said[domain], truth))
        if domain == "rooms":
            views = x["patch"].unflatten(0, (-1, 2))
            describes = with_descriptor(reader, views, *scenes["own"], *scale["patch"], steps)
            found = [match(describes, images, flow, images.shape[-2:]) for images, flow in scenes["pairs"]]
            # Of all patches that both views see: of the matches alone, an encoder that finds few would look good. 10 %
            # of the side is less than a patch.
            row["matching"] = correct(found, shares=(0.1,))["found"]
    return row, said

def with_descriptor(reader, views, own, seen, mean, std, steps):
    """The reader with a linear layer behind it that has learned which patches of two views are of one place.

    views [n, 2, N, D]: features standardised by mean and std; own, seen [n, N]: see zoo.patch_pairs.
    """
    head = nn.Linear(views.shape[-1], 64, bias=False).to(views.device)

    def loss(step):
        first = step * 60 % len(views)
        rows = slice(first, first + 60)
        return zoo.contrast(head(views[rows, 0]), head(views[rows, 1]), own[rows])[seen[rows]].mean()
    zoo.fit(list(head.parameters()), loss, steps, 1e-2)

    def read(images):
        return {"cls": None, "patch": head((reader.function(images)["patch"].float() - mean) / std)}
    return replace(reader, function=read)

def random_encoder(look, seed):
    """A ViT of the student's shape with random weights: what any network knows before it learns."""
    torch.manual_seed(seed)
    like = look.model.encoder
    shape = like.embed_dim, len(like.blocks), like.blocks[0].attn.heads, like.registers
    return dune.ViT(like.grid * like.patch_size, like.patch_size, *shape, layer_scale=None).eval().to(look.device)

# ---- The ablation ----------------------------------------------------------------------------------------------------

FACTORS = {"projector": ("sp", "lp", "tp"), "sharing": ("own", "own+generic", "all"), "drop": (0.0, 0.5)}
PAPERS = {"projector": "tp", "sharing": "all", "drop": 0.5}

def command_ablate(args):
    configs = [dict(zip(FACTORS, levels)) for levels in itertools.product(*FACTORS.values())]
    steps = args.steps
    if args.quick:  # the paper's choice, and one thing changed
        configs = [config for config in configs if sum(config[factor] != PAPERS[factor] for factor in FACTORS) <= 1]
        steps = max(1, steps // 2)
    runs, values = [], {}
    jobs = list(itertools.product(configs, range(args.seed, args.seed + args.seeds)))
    for config, seed in tqdm(jobs, "ablate", leave=False):
        name = " ".join(map(str, config.values()))
        folder = f"{output(args, '')}/{name.replace(' ', '-')}-seed{seed}-steps{steps}"
        rate = train_tiny(folder, config, seed, steps, args.device)
        run = argparse.Namespace(run=folder, teacher=[], weights=[], image_size=0, device=args.device, data=[])
        look = subject(run)
        encoder, *bare = look.readers
        if not runs:  # what all runs are judged by
            images = some_images(run, look)["image"]
            scenes = study_scenes(0, look, train=540, test=240, pairs=20)
            own = {reader.name: study_row(reader, scenes, look.grid, 0, 200)[0] for reader in bare}
        parts = held_out_losses(look.model, look.teachers, images, look.grid)
        losses = {t: parts[t]["loss"] for t in parts}
        probes, _ = study_row(encoder, scenes, look.grid, 0, 200)
        ratios = [beside["encoder"] for *_, beside in beside_own_teachers({**own, "encoder": probes}, own)]
        row = {"loss": np.mean(list(losses.values())).item(), "imbalance": max(losses.values()) - min(losses.values()),
               "study": np.mean(ratios).item(), "images/s": rate}
        values.setdefault(name, []).append(row)
        runs.append({**config, "seed": seed, "steps": steps, **row, "losses": losses, "probes": probes})
        path = write_json(args, {"runs": runs})  # at once: half an hour may be interrupted
    print(f"{len(runs)} runs of {steps} steps, mean ± spread of {args.seeds} seeds; loss: held-out, mean over all;\n"
          "imbalance: largest - smallest teacher's; study: encoder's probes / own teacher's, mean over columns")
    mean, spread = mean_and_spread(values)
    table(mean, "projector sharing drop", spread)
    print(f"wrote {path}")

def train_tiny(folder, config, seed, steps, device):
    """Train the tiny student in a process of its own: images/s. A run that is there, finished, is not repeated."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    options = {**config, "seed": seed, "steps": steps, "out": folder, "device": device.type, "log-every": 5}
    words = [f"--{name}={value}" for name, value in options.items()]
    # Scenes without end: a short run need not draw the preset's thousands.
    words += [f"--data={t}=scenes:{zoo.TEACHERS[t].domain}" for t in zoo.SPECIALISTS]
    result = subprocess.run([sys.executable, script, "--preset", "tiny", *words], capture_output=True, text=True)
    if result.returncode:
        raise Oops(f"train.py failed for {folder}: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(np.median([number(line, "images_per_s") for line in read_log(folder)][1:] or [math.nan]))

# ---- Folders of images -----------------------------------------------------------------------------------------------

def extract(reader, samples, size, dense, batch=32):
    """Frozen features of images, fp16: [n, 1 + N, D], the class token (zeros if there is none) before the patch tokens;
    dense=False: [n, 2, D], the class token and the mean patch. They stay in a file in the cache folder.

    samples: (path, box (x0, y0, x1, y1) in pixels or None for the centre square), resized to size x size. The file's
    name is a hash of the weights, of each image's path, size and time of change, of the boxes and of the image size.
    """
    stamps = [[os.path.realpath(path), *data.stamp(path), box] for path, box in samples]
    what = json.dumps([reader.name, reader.key, size, dense, stamps])
    path = f"{data.cache_folder()}/features/{hashlib.sha1(what.encode()).hexdigest()}.npy"

    def load(sample):
        image = data.load_image(sample[0])
        return data.crop_resize(image, sample[1] or data.centre(*image.size), size, size)
    if not os.path.exists(path):
        parts = [samples[i:i + batch] for i in range(0, len(samples), batch)]
        bar = tqdm(read_ahead(load, parts), f"features of {reader.name}", len(parts), leave=False)
        with dune.writing(path) as file:
            for images in bar:
                x = reader(torch.stack(images))
                rest = x["patch"] if dense else x["patch"].mean(1, keepdim=True)
                cls = torch.zeros_like(rest[:, :1]) if x["cls"] is None else x["cls"][:, None]
                x = torch.cat([cls, rest], 1).clamp(-65504, 65504).half().cpu().numpy()
                if file.tell() == 0:
                    head = {"descr": "<f2", "fortran_order": False, "shape": (len(samples), *x.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, head)
                file.write(x.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that nobody may write there
        return torch.from_numpy(np.load(path, mmap_mode="r"))

def read_ahead(read, batches):
    """[read(item) of a batch] for each batch, by threads, the next batch while this one is in use."""
    with ThreadPool(min(16, data.cores())) as pool:
        ahead = None
        for batch in itertools.chain(batches, [[]]):
            ready, ahead = ahead, pool.map_async(read, batch)
            if ready:
                yield ready.get()

def mean_and_std(x):
    """Mean and std per channel of features [..., D] (of a sample of them, if there are very many)."""
    x = x[::max(1, len(x) // 2000)]
    std, mean = torch.std_mean(x.float().flatten(0, -2), 0, correction=0)
    return mean, std + 1e-6

def listing(folder, suffixes=""):
    """The names in a folder that are not hidden, sorted. Oops if it is none."""
    if not folder or not os.path.isdir(folder):
        raise Oops(f"{folder or 'nothing'} is not a folder: --train and --test want one, with a folder of images for "
                   "each class, or with images/ and a folder of targets")
    return sorted(f for f in os.listdir(folder) if f[0] != "." and f.lower().endswith(suffixes))

# ---- Classification: k-NN, linear probe ------------------------------------------------------------------------------

def command_classify(args):
    train, labels, names = class_folders(args.train)
    test, truth, _ = class_folders(args.test, names)
    look = subject(args)
    labels, truth = labels.to(look.device), truth.to(look.device)
    rows = {}
    for reader in look.readers:
        has_cls = reader(torch.zeros(1, 3, look.size, look.size, dtype=torch.uint8))["cls"] is not None
        token = args.token or ("cls" if has_cls else "patch")
        if token != "patch" and not has_cls:
            raise Oops(f"{reader.name} has no class token: take --token patch")
        columns = {"cls": slice(0, 1), "patch": slice(1, 2), "both": slice(0, 2)}[token]
        x, y = (extract(reader, samples, look.size, dense=False) for samples in (train, test))
        x, y = (z[:, columns].float().flatten(1).to(look.device) for z in (x, y))
        if args.command == "knn":
            rows[reader.name] = top(knn(x, labels, y, len(names), args.k, args.temperature), truth)
        else:
            scores, rate = linear_probe(x, labels, y, len(names), args.steps, args.seed)
            rows[reader.name] = {**top(scores, truth), "lr": f"{rate:g}"}
        rows[reader.name]["token"] = token
    report(args, look, rows, train=args.train, test=args.test, images=[len(train), len(test)])

def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Scores [m, classes] of DINO's weighted k-NN: each of the k nearest (cosine) of train [n, D] votes with
    exp(similarity / temperature)."""
    train = F.normalize(train, dim=-1)
    scores = []
    for part in F.normalize(test, dim=-1).split(256):
        near, index = (part @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(part), classes, device=train.device)
        scores.append(votes.scatter_add_(1, labels[index], (near / temperature).exp()))
    return torch.cat(scores)

def top(scores, labels):
    """{"top-1", "top-5"} in % of scores [m, classes]."""
    hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return {"top-1": 100 * hit[:, 0].float().mean().item(), "top-5": 100 * hit.any(1).float().mean().item()}

def linear_probe(x, labels, y, classes, steps, seed, rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)):
    """(scores [m, classes] of y, rate) of the best, on a tenth of x, of linear heads trained at these rates."""
    torch.manual_seed(seed)
    mean, std = mean_and_std(x)
    x, y = (x - mean) / std, (y - mean) / std
    held, rest = torch.randperm(len(x)).tensor_split([max(1, len(x) // 10)])
    heads = [nn.Linear(x.shape[1], classes).to(x.device) for _ in rates]

    def loss(step):
        rows = rest[torch.randint(len(rest), (min(1024, len(rest)),))]
        return sum(F.cross_entropy(head(x[rows]), labels[rows]) for head in heads)
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates)]
    zoo.fit(groups, loss, steps, max(rates), what="linear probes")
    with torch.no_grad():
        losses = [F.cross_entropy(head(x[held]), labels[held]).item() for head in heads]
        best = losses.index(min(losses))
        return heads[best](y), rates[best]

def class_folders(path, names=None):
    """([(path, None)] for extract, labels [n], class names) of a folder with one folder of images for each class;
    names: those allowed."""
    classes = {name: listing(os.path.join(path, name), data.SUFFIXES)
               for name in listing(path) if os.path.isdir(os.path.join(path, name))}
    if len(classes) < (1 if names else 2):
        raise Oops(f"{path} must hold a folder for each of at least two classes")
    names = names or list(classes)
    samples, labels = [], []
    for name, images in classes.items():
        if name not in names:
            raise Oops(f"{path}: the class {name} is not among those of --train")
        if not images:
            raise Oops(f"the class {path}/{name} is empty: add images ({' '.join(data.SUFFIXES)}) or remove the folder")
        samples += [(os.path.join(path, name, image), None) for image in images]
        labels += [names.index(name)] * len(images)
    return samples, torch.tensor(labels), names

# ---- Dense: segmentation, depth --------------------------------------------------------------------------------------

def labelled_images(args, folders, clean):
    """For --train and for --test: [(path, target [H, W], boxes (x0, y0, x1, y1) that the image is seen through)].

    folders: what that of the targets may be called; clean(target fp64 [H, W], its path) -> what is learned. A target of
    another size than its image, but of the same shape, is resized (nearest) with one warning for all.
    """
    resized = []

    def item(pair):
        image, path = pair
        width, height = data.load_image(image).size
        target = torch.from_numpy(read_array(path).astype(np.float64))
        h, w = target.shape
        sizes = f"{path} is {w}x{h}, its image {width}x{height}"
        if abs(math.log(w * height / (h * width))) > 0.03:
            raise Oops(f"{sizes}: of another shape, so not of this image")
        if (h, w) != (height, width) and not resized:
            resized.append(path)
            print(f"warning: {sizes}: such targets are resized", file=sys.stderr)
        target = clean(nearest_size(target, (height, width)), path)
        boxes = windows(width, height, image) if args.sliding else [data.whole(width, height)]
        return image, target, boxes
    return list(read_ahead(item, [find_pairs(folder, folders) for folder in (args.train, args.test)]))

def dense(args, look, train, test, outputs, bins, loss_of):
    """The common part of seg and depth: trains a linear layer on each reader's standardised patch tokens of `train` and
    yields (reader's name, path, target [H, W], maps [C, H, W]) of each image of `test`.

    outputs, bins: so many classes and None, or see binned(); loss_of(maps [b, C, h, w], targets [b, h, w]).
    """
    side = 4 * look.grid[0]
    targets = torch.stack([nearest_size(target[y0:y1, x0:x1], (side, side))
                           for _, target, boxes in train for x0, y0, x1, y1 in boxes])
    for reader in look.readers:
        x, y = (extract(reader, [(path, box) for path, _, boxes in part for box in boxes], look.size, dense=True)
                for part in (train, test))
        torch.manual_seed(args.seed)
        mean, std = (value.to(look.device) for value in mean_and_std(x[:, 1:]))
        layer = nn.Linear(len(mean), outputs).to(look.device)

        def maps_of(features, size):
            tokens = features[:, 1:].float().to(look.device)
            maps = layer((tokens - mean) / std).mT.unflatten(2, look.grid)
            return F.interpolate(maps if bins is None else binned(maps, bins), size, mode="bilinear")

        def loss(step):
            rows = torch.randperm(len(targets))[:16].sort().values
            return loss_of(maps_of(x[rows], (side, side)), targets[rows].to(look.device))
        zoo.fit(list(layer.parameters()), loss, args.steps, 3e-3, what=f"{args.command} head on {reader.name}")
        rows = iter(y)
        for path, target, boxes in tqdm(test, f"{args.command}, {reader.name}", unit=" images", leave=False):
            total, seen = 0, torch.zeros(target.shape)
            for x0, y0, x1, y1 in boxes:
                with torch.no_grad():
                    maps = maps_of(next(rows)[None], (y1 - y0, x1 - x0))[0].cpu()
                maps = maps.softmax(0) if bins is None else maps
                total = total + F.pad(maps, (x0, target.shape[1] - x1, y0, target.shape[0] - y1))
                seen[y0:y1, x0:x1] += 1
            yield reader.name, path, target, total / seen

def binned(weights, bins):
    """Depth [b, 1, h, w] as DINOv2's linear head gives it: the mean of bins [C], metres, by weights [b, C, h, w]."""
    weights = weights.relu() + 0.1
    return (weights * bins[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

def windows(width, height, path=""):
    """Boxes that an image is seen through: squares of its short side along the long one that overlap by at least a
    third."""
    side, slack = min(width, height), abs(width - height)
    n = 1 + math.ceil(slack / (side * 2 / 3))
    if n > 100:
        raise Oops(f"{path} is {width}x{height}: too long for --sliding, which would need {n} windows")
    starts = [round(i * slack / max(1, n - 1)) for i in range(n)]
    return [(s, 0, s + side, side) if width > height else (0, s, side, s + side) for s in starts]

def find_pairs(folder, names):
    """[(image, target)] by file stem: folder/images beside folder/NAME, or ADE20K's layout, images/x beside NAME/x."""
    at = os.path.abspath(folder or "")
    if "images" in listing(folder):
        at = os.path.join(at, "images")
    head, _, tail = at.rpartition(f"{os.sep}images")
    places = [place for name in names if os.path.isdir(place := f"{head}{os.sep}{name}{tail}")]
    if not places:
        raise Oops(f"{folder}: expected the folders images/ and {' or '.join(f'{name}/' for name in names)} in it")
    images, targets = ({os.path.splitext(f)[0]: os.path.join(place, f) for f in listing(place, suffixes)}
                       for place, suffixes in ((at, data.SUFFIXES), (places[0], (".png", ".npy"))))
    alone = sorted(images.keys() ^ targets.keys())
    if alone or not images:
        what = f"'{alone[0]}' has no partner" if alone else "add some"
        raise Oops(f"{at} holds {len(images)} images, {places[0]} {len(targets)} targets; {what}")
    return [(images[stem], targets[stem]) for stem in sorted(images)]

def nearest_size(target, size):
    return F.interpolate(target[None, None], size, mode="nearest-exact")[0, 0]

def command_seg(args):
    def clean(y, path):
        y = torch.where(torch.isin(y, torch.tensor(args.ignore, dtype=y.dtype)), -1, y)
        if not ((y == y.round()) & (y >= -1) & (y < MOST_CLASSES)).all():
            raise Oops(f"{path} holds values that are no labels: whole numbers from 0 to {MOST_CLASSES - 1}")
        return y.float()

    def loss(maps, y):
        return F.cross_entropy(maps, y.long(), ignore_index=-1, reduction="sum") / (y >= 0).sum().clamp(min=1)
    train, test = labelled_images(args, ("masks", "annotations", "labels"), clean)
    classes = count_classes(args, train, test)
    look = subject(args)
    counts, pictures = {}, {}
    for name, path, target, maps in dense(args, look, train, test, classes, None, loss):
        guess, truth = maps.argmax(0), target.long()
        both = torch.bincount((truth * classes + guess)[truth >= 0], minlength=classes**2)
        counts[name] = counts.get(name, 0) + both.view(classes, classes)
        if len(pictures.setdefault(name, [])) < PICTURES:
            pictures[name].append((path, *(palette(classes)[x.numpy()] for x in (truth, guess))))
    iou = {name: 100 * class_iou(count) for name, count in counts.items()}
    right = {name: 100 * (count.diag().sum() / count.sum()).item() for name, count in counts.items()}
    rows = {name: {"mIoU": x.nanmean().item(), "pixel accuracy": right[name]} for name, x in iou.items()}
    report(args, look, rows, side_by_side(args, pictures), classes={name: x.tolist() for name, x in iou.items()})

MOST_CLASSES, PICTURES = 10_000, 4

def count_classes(args, train, test):
    """--classes, or as many as the training masks show. Oops if a mask shows more, or all pixels are ignored."""
    highest = [max((int(target.max()), path) for path, target, _ in part) for part in (train, test)]
    if min(highest)[0] < 0:
        raise Oops(f"{args.train} or {args.test}: every pixel is ignored (--ignore {' '.join(map(str, args.ignore))})")
    classes = args.classes or highest[0][0] + 1
    label, path = max(highest)
    if label >= classes:
        raise Oops(f"the mask of {path} holds the label {label}, but there are {classes} classes: "
                   f"--classes {label + 1}, or --ignore {label}")
    return classes

def class_iou(confusion):
    """IoU of each class [C] from counts [truth, prediction]; NaN for a class that the truth does not hold."""
    hit, truth = confusion.diag().double(), confusion.sum(1)
    return torch.where(truth > 0, hit / (confusion.sum(0) + truth - hit), math.nan)

def command_depth(args):
    low, high = 1e-3, args.max_depth

    def clean(y, path):
        y = y / (1 if path.endswith(".npy") else args.depth_scale)
        y = torch.where(y.isfinite() & (y > low) & (y <= high), y, 0).float()
        if not y.any():
            raise Oops(f"{path} holds no depth between 0 and {high:g} m: is --depth-scale {args.depth_scale:g} "
                       "(units per metre) right, or --max-depth?")
        return y
    train, test = labelled_images(args, ("depth", "depths"), clean)
    look = subject(args)
    errors, pictures = {}, {}
    bins = torch.linspace(low, high, 256, device=look.device)
    for name, path, truth, maps in dense(args, look, train, test, len(bins), bins, silog):
        errors.setdefault(name, []).append(depth_errors(maps[0], truth))
        span = truth[truth > 0].min().item(), truth.max().item()
        if len(pictures.setdefault(name, [])) < PICTURES:
            pictures[name].append((path, *(depth_colours(x, *span) for x in (truth, maps[0]))))
    report(args, look, mean_and_spread(errors)[0], side_by_side(args, pictures))

def silog(guess, truth):
    """Scale-invariant log loss (Eigen et al. 2014) over the measured pixels: guess [b, 1, h, w], truth [b, h, w]."""
    gap = (guess[:, 0].log() - truth.clamp(min=1e-3).log())[truth > 0]
    n = max(1, len(gap))
    return (gap.square().sum() / n - 0.5 * (gap.sum() / n).square() + 1e-8).sqrt()

def depth_errors(guess, truth):
    """{"RMSE" (m), "AbsRel", "delta1" (%)} over the pixels with truth > 0."""
    g, t = guess[truth > 0].double(), truth[truth > 0].double()
    return {"RMSE": (g - t).square().mean().sqrt().item(), "AbsRel": ((g - t).abs() / t).mean().item(),
            "delta1": 100 * (torch.maximum(g / t, t / g) < 1.25).double().mean().item()}

# ---- Matching --------------------------------------------------------------------------------------------------------

@dataclass
class Matches:
    """Mutual nearest neighbours of the patch features of two images A and B."""
    a: torch.Tensor           # places in A [m, 2], (x, y) fractions of its sides
    b: torch.Tensor           # in B
    similarity: torch.Tensor  # [m], cosine
    error: torch.Tensor       # [m]: distance from the truth as a share of B's longer side, NaN where it is not known
    findable: int             # of how many places of A, matched or not, it is known

def match(reader, images, flow, size, upsample=1):
    """The Matches of two uint8 images [3, H, W], judged by a flow map, see follow(); size (width, height): that of B of
    which the flow speaks; upsample: features are interpolated to a grid so many times finer first."""
    flat, places = [], []
    for image in images:
        rows, cols = (side // reader.patch_size for side in image.shape[1:])
        x = reader(image[None])["patch"].mT.unflatten(2, (rows, cols))
        x = F.interpolate(x, scale_factor=upsample, mode="bilinear")
        flat.append(F.normalize(x[0].flatten(1).T, dim=-1))
        places.append(zoo.centres(*x.shape[-2:]))
    similarity, there = (x.cpu() for x in nearest(flat[0], flat[1]))
    back = nearest(flat[1], flat[0])[1].cpu()
    mutual = (back[there] == torch.arange(len(there))).nonzero()[:, 0]
    size = torch.tensor(size)
    goal = follow(flow, places[0], size)
    b = places[1][there[mutual]]
    error = ((b - goal[mutual]) * size).norm(dim=1) / size.max()
    return Matches(places[0][mutual], b, similarity[mutual], error, int(goal.isfinite().all(1).sum()))

def nearest(a, b):
    """For each row of a [n, D]: the largest dot product with a row of b [m, D], and which row that is."""
    best = [(part @ b.T).max(1) for part in a.split(max(1, 2**26 // len(b)))]  # the whole matrix may be large
    return torch.cat([x.values for x in best]), torch.cat([x.indices for x in best])

def follow(flow, places, size):
    """Where places [m, 2] of image A lie in image B, both fractions of the sides; NaN where it is not known or outside.

    flow [H, W, 2]: for each pixel of A its place in B in pixels (x, y), whose centres are at integer + 0.5; NaN: not
    known. size [2] (width, height): B's.
    """
    at = places * torch.tensor(flow.shape[1::-1])
    x, y = at.long().unbind(1)
    goal = (flow[y, x] + at.frac() - 0.5) / size  # a pixel's flow is that of its centre
    return torch.where(((goal >= 0) & (goal < 1)).all(1, keepdim=True), goal, math.nan).float()

def correct(found, shares=(0.01, 0.03, 0.05)):
    """Of [Matches]: how many, and % of those whose truth is known that lie within these shares of the image side;
    "found": the last, as % of all places that could have been matched."""
    error = torch.cat([matches.error for matches in found])
    known = error[~error.isnan()]
    findable = sum(matches.findable for matches in found)
    row = {"matches": str(len(error))}
    if findable:
        row.update({f"{100 * s:g} %": 100 * (known <= s).float().mean().item() for s in shares if len(known)})
        row["found"] = 100 * (known <= shares[-1]).sum().item() / findable
    return row

def room_views(start, count, size):
    """[(two views uint8 [2, 3, size, size], flow map [size, size, 2] from one to the other)] of procedural rooms."""
    views = zoo.room_pairs(start, count, size)
    _, _, place, seen = zoo.pair_geometry(views)
    return list(zip(views["image"], torch.where(seen[..., None], place, math.nan)))

def command_match(args):
    lines = read_pairs(args)
    look = subject(args)
    pairs = itertools.starmap(load_pair, lines)
    if not lines:
        print("no --pair: matching the two views of procedural rooms")
        pairs = [([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], flow)
                 for images, flow in room_views(data.TEST_SCENES, STUDY["pairs"], look.size)]
    found, picture = {}, None
    for images, flow in tqdm(pairs, "match", len(lines) or None, leave=False):
        small = [data.fit_image(image, look.size, look.patch) for image in images]
        for reader, upsample in itertools.product(look.readers, sorted({1, args.upsample})):
            name = reader.name if upsample == 1 else f"{reader.name}, {upsample}x finer"
            found.setdefault(name, []).append(match(reader, small, flow, images[1].size, upsample))
            if picture is None and upsample == args.upsample:
                picture = match_picture(images, found[name][0], output(args, ".png"))
    report(args, look, {name: correct(matches) for name, matches in found.items()}, picture)

def read_pairs(args):
    """[[path a, path b, perhaps that of a flow map]] of --pair, and of the lines of the file --pairs."""
    pairs = [args.pair] if args.pair else []
    if args.pairs:
        home = os.path.dirname(args.pairs)
        with open(dune.regular(args.pairs), encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file if line.strip() and line[0] != "#"]
        if not lines:
            raise Oops(f"{args.pairs} holds no pairs: --pairs wants a text file, each line: A B [FLOW.npy]")
        pairs += [[os.path.join(home, path) for path in line] for line in lines]
    for pair in pairs:
        if not 2 <= len(pair) <= 3:
            raise Oops(f"a pair needs two images, and perhaps a flow map; this has {len(pair)}: {' '.join(pair)[:100]}")
    return [[dune.regular(path) for path in pair] for pair in pairs]

def load_pair(a, b, path=None):
    """(two PIL images, flow map [H, W, 2], all NaN if there is none) of the paths of a pair."""
    images = [data.load_image(a), data.load_image(b)]
    shape = (images[0].height, images[0].width, 2)
    if path is None:
        return images, torch.tensor(math.nan).expand(shape)
    flow = torch.from_numpy(read_array(path, 3).astype(np.float64))
    if flow.shape != shape:
        raise Oops(f"{path} is {list(flow.shape)}, expected {list(shape)}: for each pixel of A its place in B")
    return images, flow

# ---- What distillation did: spectrum, alignment ----------------------------------------------------------------------

def command_spectrum(args):
    look = subject(args)
    images = some_images(args, look)["image"]
    panels, curves, rows = {}, {}, {}
    for first in tqdm(look.readers, "spectrum", leave=False):
        readers = [first]
        if look.model and first.name in look.model.projectors:
            readers.append(student_reader(look.model, first.name))
        panel = panels[f"variance explained: {first.name}"] = {}
        for reader in readers:
            x = explained(reader(images)["patch"])
            needed = {f"{percent} % of variance": str(1 + int((x < percent / 100).sum())) for percent in (50, 90, 99)}
            rows[reader.name] = {**needed, "dimensions": str(len(x))}
            curves[reader.name] = x.tolist()
            panel[reader.name] = itertools.count(1), curves[reader.name]
    report(args, look, rows, draw_curves(output(args, ".png"), panels, width=380), curves=curves)

def explained(features):
    """Cumulative share [D] of the variance of features [..., D] that their first principal components explain."""
    flat = features.double().flatten(0, -2).cpu()
    values = torch.linalg.eigvalsh(torch.cov(flat.T)).clamp(min=0).flip(0)
    return values.cumsum(0) / values.sum().clamp(min=1e-30)

def command_alignment(args):
    lines = read_log(args.run) if args.run else []
    names = teachers_of(lines)
    losses = np.array([[number(line, t, "loss") for t in names] for line in lines], ndmin=2)
    changes = np.diff(losses, axis=0)
    changes = changes[np.isfinite(changes).all(1)]
    if len(names) < 2 or len(changes) < 4:
        raise Oops(f"eval.py alignment needs --run with at least two teachers and five lines of log.jsonl; {args.run} "
                   f"has {len(names)} and {len(lines)} (--log-every)")
    window = min(len(changes), max(8, len(changes) // 8))
    steps = [line["step"] for line in lines[window:len(changes) + 1]]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for what does not change
        whole = np.corrcoef(changes.T).tolist()
        parts = [np.corrcoef(part).tolist() for part in np.lib.stride_tricks.sliding_window_view(changes, window, 0)]
    curves = {f"{names[j]} and {names[i]}": (steps, [part[i][j] for part in parts])
              for j, i in itertools.combinations(range(len(names)), 2)}
    table({name: dict(zip(names, row)) for name, row in zip(names, whole)}, "correlation")
    picture = draw_curves(output(args, ".png"), {f"correlation of loss changes, {window} lines of the log": curves})
    path = write_json(args, {"teachers": names, "correlation": whole, "over training": curves})
    print(f"wrote {path}, {picture}")

# ---- Two photographs to 3D -------------------------------------------------------------------------------------------
# Points are [..., 3] in metres, x right, y down, z forward; pixels are (x, y) with centres at integer + 0.5.

def command_two_view(args):
    if not args.images and (args.run or args.checkpoint):
        model, pairs = head_study(args, "two-view decoder", "mast3r", two_view_pairs, train_two_view, judge_two_view,
                                  zoo.two_view_layout)
        images = pairs[0]["image"]
        picture = two_view_picture(output(args, ".png"), images, reconstruct(model, *images, stride=4))
        return print(f"wrote {picture}")
    if len(args.images) != 2:
        raise Oops(f"two-view takes two images, not {len(args.images)}, or --run FOLDER alone to train a decoder")
    pictures = [data.load_image(path) for path in args.images]
    weights = args.weights[-1] if args.weights else f"{args.run}/two-view.pt" if args.run else None
    model = zoo.load_two_view(weights, args.device)
    longest = args.image_size or (512 if model.norm is None else model.encoder.grid * model.patch)
    images = [data.fit_image(picture, longest, model.patch) for picture in pictures]
    result = reconstruct(model, *images)
    keep = [(view["conf"] >= view["conf"].median().clamp(max=1.5)).cpu() for view in result["views"]]
    points = torch.cat([view["pts3d"].cpu()[k] for view, k in zip(result["views"], keep)]).numpy()
    colours = torch.cat([image.permute(1, 2, 0)[k] for image, k in zip(images, keep)]).numpy()
    cloud = write_ply(output(args, ".ply"), points, colours)
    picture = two_view_picture(output(args, ".png"), images, result)
    matches, agree = len(result["inside"]), int(result["inside"].sum())
    print(f"wrote {cloud} ({len(points):,} points) and {picture}\n{matches} matches, {agree} agree on one pose")
    if agree < max(12, 0.2 * matches) or min(result["focal"]) <= 1:
        raise Oops(f"only {agree} of {matches} matches agree, focal length {min(result['focal']):.0f} px: no pose; "
                   "do the two images overlap, has the decoder learned?")
    for path, focal, image in zip(args.images, result["focal"], images):
        height, width = image.shape[1:]
        field = 2 * math.degrees(math.atan(width / 2 / focal))
        print(f"focal length of {path}: {focal:.1f} px at {width}x{height} (field of view {field:.1f} degrees)")
    pose = result["pose"]
    turn, move = angle(pose[:3, :3]), pose[:3, 3].norm()
    print(f"camera 2 in camera 1's frame: turned by {turn:.2f} degrees, moved by {move:.3f} m")
    print(np.array2string(pose.numpy(), precision=4, suppress_small=True))

@torch.no_grad()
def reconstruct(model, image1, image2, stride=8):
    """What a zoo.TwoView says about two images, uint8 [3, H, W]: {"views": its two dictionaries, without the batch
    dimension; "focal": [f1, f2] pixels; "matches": flat pixel indices ([n], [n]), best first; "pose": camera 2 in
    camera 1 [4, 4]; "inside": which matches agree with it, bool [n]}."""
    device = model.dec_norm.weight.device
    one, two = (image[None].to(device) / 127.5 - 1 for image in (image1, image2))
    first, second = ({k: v[0] for k, v in view.items()} for view in model(one, two))
    own = {k: v[0] for k, v in model(two, one)[0].items()}  # view 2 in its own camera's frame
    focal = [estimate_focal(view["pts3d"], view["conf"]) for view in (first, own)]
    a, b = reciprocal_matches(first["desc"], second["desc"], stride)
    best = (first["desc_conf"].flatten()[a] * second["desc_conf"].flatten()[b]).argsort(descending=True)
    a, b = a[best], b[best]

    def lifted(view, focal, at):  # by depth along the pixels' rays, from which the points stray: a fifth better poses
        pixels = centred_pixels(*view["conf"].shape, device)[at]
        depth = view["pts3d"].flatten(0, 1)[at, 2:]
        return torch.cat([pixels / focal * depth, depth], 1), pixels
    pose, inside = relative_pose(lifted(first, focal[0], a)[0], *lifted(own, focal[1], b), focal[1], model.patch / 2)
    return {"views": (first, second), "focal": focal, "matches": (a, b), "pose": pose, "inside": inside}

def centred_pixels(height, width, device=None):
    """[height * width, 2]: the centres of the pixels, from the principal point, which is the image's centre."""
    return (zoo.centres(height, width, device) - 0.5) * torch.tensor([width, height], device=device)

def estimate_focal(points, weight):
    """Focal length in pixels that explains a point map [H, W, 3] in its own camera's frame: the median of what each
    pixel says; far from the centre, and by weight [H, W], it says more. 1 is as good as none: no camera sees it so."""
    pixels = centred_pixels(*points.shape[:2]).double()
    points, weight = points.flatten(0, 1).double().cpu(), weight.flatten().double().cpu()
    ahead = points[:, 2] > 1e-6
    if not ahead.any():
        return 1.0
    pixels, rays = pixels[ahead], points[ahead, :2] / points[ahead, 2:]
    says, order = ((pixels * rays).sum(-1) / rays.square().sum(-1).clamp(min=1e-12)).sort()
    share = (pixels.norm(dim=-1) * weight[ahead])[order].cumsum(0)
    middle = torch.searchsorted(share, share[-1:] / 2).clamp(max=len(says) - 1)
    return max(1.0, says[middle].item())

def reciprocal_matches(desc1, desc2, stride=8, rounds=8):
    """Pixels of two descriptor maps [H, W, D] that are each other's nearest neighbour: flat indices [n], [n]. Seeds on
    a grid of `stride` go to their nearest neighbour and back until they do not move any more (MASt3R)."""
    height, width, _ = desc1.shape
    every = torch.arange(height * width, device=desc1.device).view(height, width)
    here = every[stride // 2::stride, stride // 2::stride].flatten()
    one, two = desc1.flatten(0, 1), desc2.flatten(0, 1)
    found = []
    for _ in range(rounds):
        there = nearest(one[here], two)[1]
        back = nearest(two[there], one)[1]
        found.append(torch.stack([here, there], 1)[back == here])
        here = back[back != here].unique()
    return torch.cat(found).unique(dim=0).unbind(1)

def rigid_fit(a, b):
    """Rotations [..., 3, 3], translations [..., 3] with R a + t = b in the least squares (Kabsch); a, b [..., n, 3]."""
    ca, cb = a.mean(-2, keepdim=True), b.mean(-2, keepdim=True)
    u, _, vt = torch.linalg.svd((b - cb).mT @ (a - ca))
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt)
    rotation = (u * sign[..., None, :]) @ vt
    return rotation, (cb - ca @ rotation.mT).squeeze(-2)

def relative_pose(points1, points2, pixels2, focal2, tolerance, hypotheses=1000):
    """Camera 2 in camera 1's frame, [4, 4], and which matches agree with it, bool [n]: none if there are fewer than 4.

    points1, points2 [n, 3]: the matched points, each in its own camera's frame; pixels2 [n, 2]: where camera 2 sees
    them, from its principal point; tolerance: pixels. RANSAC over rigid fits of three matches, judged by where they
    project into view 2; the best one is refined there (PnP by Gauss-Newton), so that the depth of view 2 only has to be
    roughly right.
    """
    points1, points2, pixels2 = points1.double().cpu(), points2.double().cpu(), pixels2.double().cpu()
    camera = torch.eye(4, dtype=torch.double)
    finite = (points1 + points2).isfinite().all(-1).nonzero()[:, 0]
    if len(finite) < 4:
        return camera, torch.zeros(len(points1), dtype=torch.bool)

    def error(rotation, translation):
        moved = points1 @ rotation.mT + translation[..., None, :]
        return (focal2 * moved[..., :2] / moved[..., 2:] - pixels2).where(moved[..., 2:] > 1e-6, math.inf)

    def agrees(pose):
        return error(*pose).norm(dim=-1) < tolerance
    pick = finite[torch.randint(len(finite), (hypotheses, 3), generator=torch.Generator().manual_seed(0))]
    rotation, translation = rigid_fit(points1[pick], points2[pick])
    best = agrees((rotation, translation)).sum(-1).argmax()
    pose = rotation[best], translation[best]
    for _ in range(10):
        inside = agrees(pose)
        if inside.sum() < 4:
            break
        better = gauss_newton(pose, lambda *pose: error(*pose)[..., inside, :].flatten(-2))
        if agrees(better).sum() < inside.sum():
            break
        pose = better
    camera[:3, :3], camera[:3, 3] = pose[0].T, -pose[0].T @ pose[1]
    return camera, agrees(pose)

def gauss_newton(pose, error):
    """The pose (rotation, translation) after a step towards the least squares of error(rotations, translations) [m]."""
    def moved(steps):  # [n, 6]: turns about the axes, moves along them
        turn = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3, dtype=torch.double)[None], steps[:, None, :3]))
        return turn @ pose[0], turn @ pose[1] + steps[:, 3:]
    small = 1e-6 * torch.eye(6, dtype=torch.double)
    jacobian = (error(*moved(small)) - error(*moved(-small))).T / 2e-6
    step = torch.linalg.lstsq(jacobian, -error(*pose)[:, None]).solution.T
    return [x[0] for x in moved(step)]

def angle(rotation):
    """Of a rotation [3, 3], in degrees."""
    return torch.rad2deg(((rotation.trace() - 1) / 2).clamp(-1, 1).acos()).item()

def write_ply(path, points, colours):
    """A point cloud, points [n, 3] and colours uint8 [n, 3], as a binary PLY file."""
    rows = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"], rows["rgb"] = points, colours
    names = [f"property float {c}" for c in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *names, "end_header\n"]
    with dune.writing(path) as file:
        file.write("\n".join(head).encode() + rows.tobytes())
    return path

# ---- Heads on a frozen encoder: the common part of two-view and people -----------------------------------------------

def head_study(args, what, teacher, read, train, judge, layout):
    """A head on the frozen student, a teacher and a random encoder, for each seed: paper section 4 in miniature.
    Returns the student's first, which is kept in a file, and what it has not seen.

    read(args, look) -> what to learn from, what is unseen, how much; train(encoder, known, look, args, title) -> model;
    judge(model, unseen) -> {metric: value}; layout(model): its file.
    """
    args.teacher = args.teacher or [teacher]
    look = subject(args)
    known, unseen, amount = read(args, look)
    encoders = {"student": look.model.encoder, **{f"teacher {t}": teacher.vit for t, teacher in look.teachers.items()},
                "random encoder": random_encoder(look, args.seed)}
    values = {name: [] for name in encoders}
    path = output(args, ".pt")
    for name, seed in itertools.product(encoders, range(args.seed, args.seed + args.seeds)):
        torch.manual_seed(seed)
        model = train(encoders[name], known, look, args, f"{what} on the {name}")
        values[name].append(judge(model, unseen))
        if name == "student" and seed == args.seed:
            first = model
            with dune.writing(path) as file:
                torch.save(layout(first), file)
    mean, spread = mean_and_spread(values)
    print(f"a {what} on each frozen encoder, {args.steps} steps, {amount}")
    report(args, look, mean, f"{path} (the student with its head, for --weights)", spread, values=values)
    return first, unseen

def with_labels(root):
    """[[(NAME.jpg (.png, .webp), the NAME.npz beside it)] of each folder in `root`, itself too], as paths."""
    return [[(os.path.join(folder, name), os.path.join(folder, labels)) for name in listing(folder, data.SUFFIXES)
             if (labels := os.path.splitext(name)[0] + ".npz") in names] for folder, _, names in sorted(os.walk(root))]

def known_and_unseen(items, root, what, between=0):
    """Of what a folder holds: what to learn from, and the last fifth (32 at most), `between` of them in neither."""
    if len(items) < 2:
        raise Oops(f"{root} holds fewer than two {what}")
    held = min(32, len(items) // 5 + 1)
    return items[:max(1, len(items) - held - between)], items[-held:]

# The arrays of an .npz file; a letter is one number wherever it stands, H and W are the image's.
LABELS = {"K": "3 3", "pose": "4 4", "depth": "H W", "joints3d": "P J 3", "visible": "P"}

def labelled_square(image, labels, size, names):
    """An image's centre square and labels (names of LABELS; "visible" may be missing): {"image": uint8 [3, size, size];
    "K" in its pixels; "depth" [size, size], 0 where it is not known; others as they are}."""
    picture = data.load_image(image)
    try:
        with np.load(dune.regular(labels)) as file:
            names = [name for name in names if name in file or name != "visible"]
            found = {name: torch.from_numpy(file[name].astype(np.float32)) for name in names}
    except Exception as error:  # numpy's errors for foreign files are of many types
        raise Oops(f"cannot read {labels}: {data.reason(error)}") from None
    known = {"3": 3, "4": 4, "H": picture.height, "W": picture.width}
    for name, x in found.items():
        sides = LABELS[name].split()
        fits = x.ndim == len(sides) and all(known.setdefault(side, n) == n for side, n in zip(sides, x.shape))
        finite = name == "depth" or x.isfinite().all()
        if not (fits and finite) or name in ("K", "pose") and not x.det().abs() > 1e-6:
            raise Oops(f"{labels}: {name} is {list(x.shape)}, expected [{', '.join(sides)}], H and W as the image, "
                       "finite, a camera's with an inverse; leave out frames without")
    x0, y0, x1, y1 = box = data.centre(*picture.size)
    scale = size / (x1 - x0)
    found["K"] = torch.tensor([[scale, 0, -x0 * scale], [0, scale, -y0 * scale], [0, 0, 1]]) @ found["K"]
    if "depth" in found:
        depth = found["depth"][y0:y1, x0:x1]
        depth = torch.where((depth > 0) & (depth < 1e4), depth, 0)
        if not depth.any():
            raise Oops(f"{labels}: no depth between 0 and 10,000 m in the centre square")
        found["depth"] = nearest_size(depth, (size, size))
    return {**found, "image": data.crop_resize(picture, box, size, size)}

# ---- Two views: a decoder on a frozen encoder, with MASt3R's losses (see zoo.pair_geometry for what a pair holds) ----

ROOM_PAIRS, UNSEEN_PAIRS = 200, 128
TINY_DECODER = dict(dim=64, depth=2, maps=(16, 16, 24, 32), features=16, last=16, hidden=128, descriptor=8)

def two_view_pairs(args, look):
    """Pairs to learn from, unseen ones, how many: rooms, or neighbours by name in each sub-folder, see read_pair."""
    if args.data:
        pairs = [pair for paths in with_labels(args.data[0]) for pair in itertools.pairwise(paths)]
        what = "pairs: neighbours by name in each sub-folder, NAME.jpg beside NAME.npz (depth, K, pose)"
        known, unseen = known_and_unseen(pairs, args.data[0], what, between=1)  # two neighbours share an image
        unseen = [read_pair(look.size, pair) for pair in unseen]
    else:
        places = (ROOM_SEEDS, ROOM_PAIRS), (data.TEST_SCENES, UNSEEN_PAIRS)
        batches = [zoo.room_pairs(start, count, look.size) for start, count in places]
        known, unseen = ([dict(zip(batch, pair)) for pair in zip(*batch.values())] for batch in batches)
    return known, unseen, f"{len(known)} pairs, judged on {len(unseen)} not seen"

def read_pair(size, pair):
    """A pair as it is, or read from its files ((image, labels), (image, labels))."""
    if isinstance(pair, dict):
        return pair
    one, two = (labelled_square(*files, size, ("depth", "K", "pose")) for files in pair)
    return {key: torch.stack([one[key], two[key]]) for key in one}

def train_two_view(encoder, pairs, look, args, title, batch=8):
    """A zoo.TwoView on a frozen encoder whose decoder has learned from `pairs` (see read_pair), its patches the
    student's, whatever the encoder's own; encoders narrower than ViT-S get a tiny one."""
    read = functools.partial(read_pair, look.size)
    tiny = encoder.embed_dim < 384
    model = zoo.TwoView(encoder, patch=look.patch, **(TINY_DECODER if tiny else {})).to(look.device)
    begin_two_view(model, torch.cat([read(pair)["image"] for pair in pairs[:32]]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = 0.3 if tiny else 0.05  # tiny: for the few pairs that it learns from
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    chance = torch.utils.data.RandomSampler(pairs, replacement=True, num_samples=args.steps * batch)
    batches = read_ahead(read, torch.utils.data.DataLoader(pairs, batch, sampler=chance, collate_fn=list))

    def loss(step):
        part = next(batches)
        part = {key: torch.stack([pair[key] for pair in part]).to(look.device) for key in part[0]}
        if torch.rand(()) < 0.5:  # either view may come first
            part = {key: x.flip(1) for key, x in part.items()}
        views = model(*(part["image"] / 127.5 - 1).unbind(1))
        # In a few hundred steps 0.075, MASt3R's, teaches no descriptors.
        return two_view_loss(views, zoo.pair_geometry(part), matching=1.0 if tiny else 0.075)
    zoo.fit(groups, loss, args.steps, 6e-3 if tiny else 1e-4, beta2=0.95, clip=1.0, what=title)
    return model.eval()

@torch.no_grad()
def begin_two_view(model, images):
    """Initial weights from which a decoder learns in a few hundred steps; images: some of those it will see."""
    for head in (model.downstream_head1, model.downstream_head2):
        for conv in head.modules():
            if isinstance(conv, nn.Conv2d):  # torch's own start lets a signal shrink by 0.58 in each of a dozen layers
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        last, local = head.dpt.head[4], head.head_local_features.fc2
        nn.init.normal_(last.weight, std=1e-3)  # all points begin three metres ahead
        last.bias.copy_(torch.tensor([0.0, 0.0, math.log(4), 0.0]))
        weight = local.weight.view(-1, model.patch**2, local.in_features)
        weight.copy_(weight[:, :1].clone())  # a patch's pixels begin with one descriptor: places come before details
        nn.init.zeros_(local.bias)
    images = images.to(model.norm.weight.device) / 127.5 - 1
    standardise(model.norm, model.encode(images, (images.shape[-1] // model.patch,) * 2).float())

@torch.no_grad()
def standardise(norm, features):
    """Lets a LayerNorm give features [n, N, D], its outputs so far, mean 0 and variance 1, as for every probe here."""
    std, mean = torch.std_mean(features, (0, 1))
    norm.weight.copy_(1 / (std + 1e-6))
    norm.bias.copy_(-mean / (std + 1e-6))

def two_view_loss(views, geometry, matching=0.075, samples=512):
    """MASt3R's training loss: point regression weighted by confidence, metric, and `matching` times InfoNCE over true
    correspondences."""
    points, known, place, seen = geometry
    loss = 0
    for k, view in enumerate(views):
        error = (view["pts3d"] - points[:, k]).norm(dim=-1)
        loss = loss + (view["conf"] * error - 0.2 * view["conf"].log())[known[:, k]].mean()
    size, seen = place.shape[1], seen.flatten(1).float()
    pick = torch.multinomial(seen + 1e-9, samples, replacement=True)
    at = place.flatten(1, 2).take_along_dim(pick[..., None], 1).clamp(0, size - 1).long()
    picks = pick, at[..., 1] * size + at[..., 0]
    one, two = (view["desc"].flatten(1, 2).take_along_dim(p[..., None], 1) for view, p in zip(views, picks))
    trust = sum(view["desc_conf"].flatten(1).gather(1, p) for view, p in zip(views, picks)) / 2
    nce = zoo.contrast(one, two, torch.arange(samples, device=pick.device).expand(len(pick), -1))
    # Apart from nce: else doubt would silence the descriptors before they learn.
    trusted = trust * nce.detach() - 0.2 * trust.log()
    counts = seen.gather(1, pick)
    return loss + matching * ((nce + trusted) * counts).sum() / counts.sum().clamp(min=1)

def judge_two_view(model, pairs):
    """{metric: value} on pairs that it has not seen; errors of the pose are medians."""
    rows = []
    for pair in pairs:
        result = reconstruct(model, *pair["image"], stride=4)
        points, known, place, seen = (x[0] for x in zoo.pair_geometry({key: x[None] for key, x in pair.items()}))
        guess = torch.stack([view["pts3d"] for view in result["views"]]).cpu()
        depth = (guess[0, ..., 2] - pair["depth"][0])[known[0]].square().mean().sqrt()
        a, b = (index.cpu() for index in result["matches"])
        side, judged = pair["depth"].shape[-1], seen.flatten()[a]  # what both views see
        gap = (place.flatten(0, 1)[a] - side * zoo.centres(side, side)[b]).norm(dim=-1)[judged]
        true = pair["pose"][0].inverse().double() @ pair["pose"][1].double()
        turn, move = result["pose"][:3, :3], result["pose"][:3, 3]
        rows.append([(guess - points)[known].norm(dim=-1).mean(), depth, 100 * (gap < 0.05 * side).float().mean(),
                     angle(turn @ true[:3, :3].T), 100 * (move - true[:3, 3]).norm()])
    rows = torch.tensor(rows)
    names = "points m", "depth RMSE m", "matches %", "rotation °", "translation cm"
    return dict(zip(names, [*rows[:, :3].nanmean(0).tolist(), *rows[:, 3:].median(0).values.tolist()]))

# ---- People in one photograph: a head on a frozen encoder, see zoo.People --------------------------------------------

PEOPLE_SEEDS, PEOPLE, UNSEEN_PEOPLE = 6 * 10**8, 3000, 500

def command_people(args):
    if not args.images and (args.run or args.checkpoint):
        if args.pelvis is None and not args.data:
            args.pelvis = data.JOINTS.index("pelvis")
        judge = functools.partial(judge_people, pelvis=args.pelvis)
        head_study(args, "people head", "multihmr", people_scenes, train_people, judge, zoo.people_layout)
        return
    if len(args.images) != 1:
        raise Oops(f"people takes one image, not {len(args.images)}, or --run FOLDER alone to train a head")
    photo = args.images[0]
    picture, fov = data.load_image(photo), args.fov or exif_fov(photo) or 60
    path = args.weights[-1] if args.weights else f"{args.run or '.'}/people.pt"
    if not args.weights and not os.path.exists(path):
        raise Oops(f"no {path} yet: eval.py people --run FOLDER trains it; or pass --weights FILE")
    model = zoo.load_people(path, args.device)
    image = data.fit_image(picture, args.image_size or model.size, model.patch)
    (width, height), focal = picture.size, max(picture.size) / 2 / math.tan(math.radians(fov) / 2)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    shrink = torch.tensor([[image.shape[2] / width], [image.shape[1] / height], [1]])
    images, cameras = data.normalise(image[None].to(args.device)), (shrink * K)[None].to(args.device)
    people = [on("cpu", person) for person in model(images, cameras)[0]]
    print(f"{len(people) or 'no'} people; the view is {fov:.1f} degrees wide (the longer side)")
    for person in people:  # in the photograph's pixels
        person["joints2d"] = zoo.project(person["joints3d"], K)
        person["head"] = person["joints2d"][model.head]
        print(f"  {person['distance']:.2f} m away, score {person['score']:.2f}")
    args.out = args.out or f"{args.run or '.'}/people-{os.path.splitext(os.path.basename(photo))[0]}"
    drawn = people_picture(output(args, ".png"), picture, people, K, model.bones.tolist())
    content = [{key: value.tolist() for key, value in person.items()} for person in people]
    print(f"wrote {drawn}, {write_json(args, {'fov': fov, 'K': K.tolist(), 'people': content})}")

def exif_fov(path):
    """Degrees across the longer side, from the EXIF focal length (of 35 mm film); None if there is none."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # none, or broken in a whole picture
        focal = float(image.getexif().get_ifd(0x8769)[0xA405])
        return math.degrees(2 * math.atan(18 / focal)) if 0.2 < focal < 2000 else None

def people_scenes(args, look):
    """Scenes to learn from, unseen ones, how many; both {"image" uint8 [n, 3, S, S], "K" [n, 3, 3], "joints3d"
    [n, P, J, 3], "visible" bool [n, P]}: procedural people, or a folder's NAME.jpg beside NAME.npz."""
    if args.data:
        files = itertools.chain(*with_labels(args.data[0]))
        scenes = [labelled_square(*pair, look.size, ("joints3d", "K", "visible")) for pair in files]
        for scene in scenes:
            scene.setdefault("visible", torch.ones(len(scene["joints3d"])))
        if len({scene["joints3d"].shape[1] for scene in scenes}) > 1:
            raise Oops(f"{args.data[0]} holds people with different numbers of joints")
        what = "pairs: NAME.jpg beside NAME.npz with joints3d, K and perhaps visible"
        pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)  # of as many people
        parts = known_and_unseen(scenes, args.data[0], what)
        parts = [{key: pad([scene[key] for scene in part]) for key in part[0]} for part in parts]
    else:
        places = (PEOPLE_SEEDS, PEOPLE), (data.TEST_SCENES + 3 * 10**8, UNSEEN_PEOPLE)
        parts = [data.labelled_scenes("people", start + 10**6 * args.seed, n, look.size) for start, n in places]
    for part in parts:
        if max(args.head, args.pelvis or 0) >= part["joints3d"].shape[2]:
            raise Oops(f"people have {part['joints3d'].shape[2]} joints here, counted from 0: --head, --pelvis")
        heads = part["joints3d"][:, :, args.head]
        place = zoo.project(heads, part["K"])
        inside = (heads[..., 2] > 0.1) & ((place >= 0) & (place < look.size)).all(-1)
        part["visible"] = (part["visible"] > 0) & inside
        if not part["visible"].any():
            raise Oops("no head is visible in the centre squares: are joints3d in the camera's frame, in metres?")
    known, unseen = (len(part["image"]) for part in parts)
    return *parts, f"{known} images, judged on {unseen} not seen; in % and cm; errors of those found / F1"

def train_people(encoder, scenes, look, args, title, batch=32):
    """A zoo.People on a frozen encoder, whose tokens are computed once."""
    model = zoo.People(encoder, scenes["joints3d"].shape[2], args.head, look.size, look.patch).to(look.device)
    model.bones.copy_(torch.tensor(bones_of(scenes["joints3d"][scenes["visible"]])).reshape(-1, 2))
    parts = (data.normalise(part.to(look.device)) for part in scenes["image"].split(50))
    tokens = torch.cat([model.tokens(part).half() for part in parts])
    standardise(model.norm, model.norm(tokens[::8].float()))
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(1 + args.steps * batch // len(tokens))])

    def loss(step):
        rows = order[step * batch:(step + 1) * batch]
        labels = [scenes[key][rows].to(look.device) for key in ("K", "joints3d", "visible")]
        with torch.autocast(look.device.type, torch.bfloat16, enabled=dune.fast_bf16(look.device)):
            return people_loss(model, tokens[rows.to(look.device)].float(), look.grid, *labels)
    deep = nn.ModuleList([model.norm, model.embed, model.blocks, model.last, model.out])
    groups = [{"params": list(deep.parameters())},
              {"params": list(model.score.parameters()), "lr": 3e-2}]  # linear: as fast as a probe
    zoo.fit(groups, loss, args.steps, 3e-3, weight_decay=0.05, clip=1.0, what=title)
    return model.eval()

def people_loss(model, tokens, grid, K, joints, visible):
    """Cross-entropy of which patches hold heads; L1 of heads (patches), log distance, joints (metres, image sides)."""
    image, person = visible.nonzero(as_tuple=True)
    K_of, true, head = K[image], joints[image, person], model.head
    seen = zoo.project(true, K_of)
    col, row = (seen[:, head] / model.patch).long().unbind(-1)
    patch = row * grid[1] + col
    tokens, scores = model.read(tokens, K, grid)
    guess = model.decode(model.query(tokens, image, patch, grid), patch, K_of, grid[1])
    holds = torch.zeros_like(scores)
    holds[image, patch] = 1
    pairs = [(1 / model.patch, guess["head"], seen[:, head]), (1, guess["distance"].log(), true[:, head, 2].log()),
             (10, guess["joints3d"] - guess["joints3d"][:, head, None], true - true[:, head, None]),
             (10 / model.size, guess["joints2d"].clamp(-model.size, 2 * model.size), seen)]
    apart = sum(weight * (a - b).abs().sum() / max(1, a.numel()) for weight, a, b in pairs)
    return apart + F.binary_cross_entropy_with_logits(scores, holds, reduction="sum") / len(scores)

def bones_of(joints):
    """Pairs of joints to connect in pictures: the tree of those whose distance varies least in people [n, J, 3]."""
    varies = torch.cdist(joints[:1000], joints[:1000]).std(0, correction=0)
    bones, reached = [], [0]
    while len(reached) < len(varies):
        left = varies[reached].index_fill(1, torch.tensor(reached), math.inf)
        a, b = divmod(left.argmin().item(), len(varies))
        bones.append((reached[a], b))
        reached.append(b)
    return bones

def judge_people(model, scenes, pelvis=None):
    """{metric: value} on scenes as of people_scenes(), in % and cm. Who is surest is matched first, with the nearest
    head that is left, if within 5 % of the side; 3D errors are of those found, aligned at the pelvis (None: the mean of
    the joints) or, PA, also by rotation and scale. They are divided by F1, as AGORA (CVPR 2021) does, so that finding
    only easy people is no virtue."""
    device, rows, guesses = model.norm.weight.device, [], 0
    for image, K, joints, visible in zip(*(scenes[key] for key in ("image", "K", "joints3d", "visible"))):
        found = model(data.normalise(image[None].to(device)), K[None].to(device))[0]
        guesses += len(found)
        seen, free = zoo.project(joints, K), visible.nonzero()[:, 0].tolist()
        for person in (on("cpu", person) for person in found):
            gap = (seen - person["joints2d"]).norm(dim=-1) / model.size
            best = min(free, key=lambda k: gap[k, model.head], default=None)
            if best is None or gap[best, model.head] > 0.05:
                continue
            free.remove(best)
            a, b = (x - (x.mean(0) if pelvis is None else x[pelvis]) for x in (person["joints3d"], joints[best]))
            ahead = joints[best, model.head, 2]
            rows.append([(gap[best] <= 0.05).float().mean(), (a - b).norm(dim=-1).mean(), aligned_error(a, b),
                         (person["distance"] - ahead).abs() / ahead])
    there, hits = int(scenes["visible"].sum()), len(rows)
    near, apart, aligned, off = torch.tensor(rows or [[0.0, *[math.nan] * 3]]).T
    f1 = 2 * hits / (guesses + there)
    result = {"precision": hits / max(1, guesses), "recall": hits / there, "F1": f1, "2D": near.sum().item() / there}
    for metric, error in (("3D", apart.mean()), ("PA", aligned.mean()), ("distance", off.median())):
        result[f"{metric} / F1"] = error.item() / max(f1, 1e-9)
    return {metric: 100 * value for metric, value in result.items()}

def aligned_error(a, b):
    """Mean distance of points a from b [n, 3] once a is turned, scaled and moved as near as can be (Procrustes)."""
    rotation, _ = rigid_fit(a, b)
    a, b = (a - a.mean(0)) @ rotation.mT, b - b.mean(0)
    scale = (a * b).sum() / a.square().sum().clamp(min=1e-12)
    return (scale * a - b).norm(dim=-1).mean()

# ---- What is looked at -----------------------------------------------------------------------------------------------

@dataclass
class Reader:
    """Frozen features under one name: function(normalised images [B, 3, H, W]) -> {"cls": [B, D] or None, "patch":
    [B, N, D]}; modules: those whose weights the features depend on."""
    name: str
    function: object
    patch_size: int
    modules: list

    @torch.no_grad()
    def __call__(self, images):
        """uint8 images [B, 3, H, W] -> features, fp32, on the device of the weights: what follows is computed there."""
        device = next((p.device for module in self.modules for p in module.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, torch.bfloat16, enabled=dune.fast_bf16(device)):
            return joined([self.function(data.normalise(part.to(device))) for part in images.split(32)])

    @property
    def key(self):
        """A hash of the weights, for the cache."""
        sha = hashlib.sha1(str(self.patch_size).encode())
        for tensor in (x for module in self.modules for _, x in sorted(module.state_dict().items())):
            sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return sha.hexdigest()

def student_reader(model, name):
    """The student's encoder (name "encoder"), or the student through a projector (a teacher's name)."""
    t = dune.ALIASES.get(name, name)
    if t == "encoder":
        return Reader(t, model.encoder, model.encoder.patch_size, [model.encoder])
    if t not in model.projectors:
        raise Oops(f"the student has no projector for {t}: it has {', '.join(model.projectors)}")
    projector = model.projectors[t]

    def read(images):
        return model.project(t, model.encoder.tokens(images, every_block=projector.reads_every_block))
    return Reader(f"through {t}", read, model.encoder.patch_size, [model.encoder, projector])

def teacher_reader(name, teacher, patch):
    """A teacher on the token grid of this patch size, whatever its own is."""
    def read(images):
        return teacher(images, (images.shape[-2] // patch, images.shape[-1] // patch))
    return Reader(name, read, patch, [teacher])

def subject(args):
    """What a command looks at: .model (a student or None), .teachers {name: FrozenTeacher}, .readers of both, .size and
    .patch (pixels), .grid (tokens), .device. Without --teacher: all of the student's; none if there is --through."""
    model, weights, size = None, {}, 336
    through = getattr(args, "through", None)
    path = f"{args.run}/checkpoint.pt" if args.run else args.checkpoint
    if path:
        path = dune.fetch(dune.PUBLISHED.format(path)) if path in dune.PUBLISHED_NAMES else path
        file = dune.read_checkpoint(path)
        model = dune.model_from(file, path).to(args.device)
        size = model.encoder.grid * model.encoder.patch_size
        weights = dict(dune.entry(file, "weights", dict, path, {}))
    if any("=" not in item for item in args.weights):
        raise Oops("--weights: write TEACHER=FILE")
    weights.update(item.split("=", 1) for item in args.weights)
    names = args.teacher or (list(model.projectors) if model and through is None else [])
    if not model and (through or not names):
        raise Oops("say what to look at: --run FOLDER or --checkpoint FILE (with --through TEACHER if you like), "
                   "--teacher NAME, or both")
    teachers = {}
    for t in names:
        teachers[t] = zoo.load_teacher(t, dune.entry(weights, t, str, path, None), args.device)
        if weights.get(t) == "random":
            print(f"{t}'s weights are random, as in the run (--random-teachers)", file=sys.stderr)
        norm = model.teacher_norms[t].normalizers["patch"] if model and t in model.projectors else None
        if norm and len(norm.mean) != teachers[t].dim:
            raise Oops(f"{weights.get(t, t)} has features of {teachers[t].dim} channels; the student learned from a "
                       f"{t} with {len(norm.mean)}: is it the right file?")
    patch = (model.encoder if model else teachers[names[0]]).patch_size
    size = args.image_size or size
    if size < patch or size % patch:
        fits = max(1, round(size / patch)) * patch
        raise Oops(f"--image-size {size} is no multiple of the patch size {patch}: take {fits}")
    readers = [student_reader(model, name) for name in through or ["encoder"]] if model else []
    readers += [teacher_reader(t, teacher, patch) for t, teacher in teachers.items()]
    return argparse.Namespace(model=model, teachers=teachers, readers=readers, size=size, patch=patch,
                              grid=(size // patch,) * 2, device=args.device)

def some_images(args, look):
    """As held_out(): --image, else some held-out images of --data or of the procedural scenes."""
    if not getattr(args, "image", ()):
        rows = {t: zoo.TEACHERS[t] for t in look.teachers}
        return held_out([], data.parse_data(args.data, rows), rows, look.size)
    pictures = [data.load_image(path) for path in args.image]
    images = [data.fit_image(picture, look.size, look.patch) for picture in pictures]
    if len({image.shape for image in images}) > 1:
        images = [data.crop_resize(x, data.centre(*x.size), look.size, look.size) for x in pictures]
    return {"image": torch.stack(images), "show": slice(None)}

# ---- Pictures --------------------------------------------------------------------------------------------------------

def save_picture(image, path):
    with dune.writing(path) as file:
        image.save(file, "PNG")
    return path

def command_pca(args):
    look = subject(args)
    images = some_images(args, look)
    path = pca_sheet(look.model, look.teachers, images["image"][images["show"]], output(args, ".png"))
    print(f"wrote {path}")

@torch.no_grad()
def pca_sheet(model, teachers, images, path):
    """Write the paper's Figure 2 for uint8 images [n, 3, H, W]: image, the student's own features, for each teacher its
    features (standardised) and what the student says through that projector, in the same colours. model may be None.
    Returns the path."""
    first = model or next(iter(teachers.values()))
    x = data.normalise(images.to(next(first.eval().parameters()).device))
    patch = (model.encoder if model else first).patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    projected = model(x) if model else {}
    groups = [{"student": model.encoder(x)["patch"]}] if model else []
    for t, teacher in teachers.items():
        features = teacher(x, grid)
        groups.append({f"teacher\n{t}": features["patch"]})
        if t in projected:
            standard = model.teacher_norms[t](features)["patch"]
            groups[-1] = {f"teacher\n{t}": standard, f"student as\n{t}": projected[t]["patch"]}
    columns = {"image": images.permute(0, 2, 3, 1).numpy()}
    for group in groups:
        columns.update(zip(group, pca_colours(list(group.values()), grid, patch)))
    cell = max(112, min(256, *images.shape[-2:]))
    return data.contact_sheet(list(zip(*columns.values())), path, columns=list(columns), cell=cell)

def pca_colours(features, grid, scale):
    """Several patch features [n, N, D] as colours, uint8 [n, rows*scale, cols*scale, 3] each: three principal
    components of the first."""
    flat = features[0].float().flatten(0, 1)
    mean = flat.mean(0)
    _, _, directions = torch.pca_lowrank(flat - mean, q=min(6, *flat.shape), center=False, niter=4)
    colours = (flat - mean) @ directions[:, :3]
    sign = colours.pow(3).sum(0).sign()  # a component's sign is arbitrary: fix it
    low, high = (colours * sign).quantile(torch.tensor([0.02, 0.98], device=colours.device), dim=0)
    colours = [((x.float() - mean) @ directions[:, :3] * sign - low) / (high - low).clamp(min=1e-9) for x in features]
    small = [(x.clamp(0, 1) * 255).byte().unflatten(1, grid).cpu().numpy() for x in colours]
    return [x.repeat(scale, 1).repeat(scale, 2) for x in small]

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b"]

def draw_curves(path, panels, width=560, height=300):
    """Write a PNG of line plots side by side and return its path. panels {title: {label: (x values, y values)}}; y is
    logarithmic where it spans 30x."""
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, curves) in enumerate(panels.items()):
        left, top, right, bottom = width * i + 62, 30, width * (i + 1) - 14, height - 28
        draw.text((left, 8), title, fill="black", font_size=14)
        draw.rectangle((left, top, right, bottom), outline="#999")
        curves = {label: [(x, y) for x, y in zip(*line) if abs(y) < 1e30] for label, line in curves.items()}  # not NaN
        points = list(itertools.chain(*curves.values())) or [(0, 0)]
        (x0, y0), (x1, y1) = np.min(points, 0).tolist(), np.max(points, 0).tolist()
        log = y0 > 0 and y1 > 30 * y0
        y1 = y1 if y1 > y0 else y0 + (abs(y0) or 1)

        def place(x, y):
            up = math.log(y / y0, y1 / y0) if log else (y - y0) / (y1 - y0)
            return left + (x - x0) / (x1 - x0 or 1) * (right - left), bottom - 4 - up * (bottom - top - 8)
        for value in (np.geomspace if log else np.linspace)(y0, y1, 5).tolist():
            y = place(x0, value)[1]
            draw.line((left, y, right, y), fill="#eee")
            draw.text((left - 6, y), f"{value:.3g}", fill="#555", font_size=11, anchor="rm")
        for x in (x0, x1):
            draw.text((place(x, y0)[0], bottom + 6), f"{x:g}", fill="#555", font_size=11, anchor="ma")
        for k, (label, line) in enumerate(curves.items()):
            colour = COLOURS[k % len(COLOURS)]
            draw.line([place(*point) for point in line[:1] + line], fill=colour, width=2)
            draw.text((right - 6, top + 5 + 14 * k), label, fill=colour, font_size=12, anchor="ra")
    return save_picture(image, path)

def plot_logs(folders):
    """Draw the logs of runs over each other (teachers' losses, lr, images/s) into plot.png of the first's folder."""
    losses, rates, speeds = {}, {}, {}
    for folder in folders:
        lines = read_log(folder)
        if not lines:
            raise Oops(f"{folder} holds no log.jsonl of a run")
        run = "" if len(folders) == 1 else f"{os.path.basename(os.path.normpath(folder))} "
        steps = [line["step"] for line in lines]
        for t in teachers_of(lines):
            losses[run + t] = steps, [number(line, t, "loss") for line in lines]
        rates[f"{run}lr"] = steps, [number(line, "lr") for line in lines]
        speeds[f"{run}images/s"] = steps, [number(line, "images_per_s") for line in lines]
    panels = {"loss of each teacher, by step": losses, "learning rate": rates, "images/s": speeds}
    return draw_curves(os.path.join(folders[0], "plot.png"), panels)

def palette(n):
    """uint8 [n + 1, 3]: colours that differ, the last one (of what is ignored) black."""
    colours = np.random.default_rng(2).integers(40, 256, (n + 1, 3), dtype=np.uint8)
    colours[n] = 0
    return colours

def depth_colours(depth, low, high):
    """[H, W] metres -> uint8 [H, W, 3], near is warm; nothing measured is black."""
    x = 1 - (depth.clamp(low, high).log() - math.log(low)) / max(1e-6, math.log(high / low))
    stops = np.array([[48, 18, 90], [40, 100, 230], [30, 200, 160], [200, 225, 60], [250, 130, 30], [150, 10, 10]])
    colours = np.stack([np.interp(x.numpy(), np.linspace(0, 1, 6), stops[:, c]) for c in range(3)], -1)
    return (colours * (depth > 0).numpy()[..., None]).astype(np.uint8)

def side_by_side(args, pictures):
    """Write {reader: [(image path, truth, prediction)]}: a row for each of the first images; returns the path."""
    rows = []
    for same in zip(*pictures.values()):
        image = np.asarray(data.load_image(same[0][0]))
        rows.append([image, same[0][1], *(guess for _, _, guess in same)])
    return data.contact_sheet(rows, output(args, ".png"), columns=["image", "truth", *pictures], cell=256)

def match_picture(images, matches, path):
    """Write two PIL images side by side with some of their matches, from the best to the worst."""
    best = matches.similarity.argsort(descending=True)
    looks = [np.asarray(x.resize([max(1, round(s * 480 / max(x.size))) for s in x.size])) for x in images]
    return draw_matches(path, [looks], matches.a[best], matches.b[best], matches.error[best])

def draw_matches(path, rows, places_a, places_b, error, count=50):
    """Write pairs of pictures, uint8 [h, w, 3], side by side, with lines between some matches over the first pair:
    green within 5 % of the side, red beyond, blue if nothing is known. places [n, 2]: fractions of the sides; error as
    in Matches. Returns the path."""
    a, b = rows[0]
    left, height = a.shape[1] + 8, max(a.shape[0], b.shape[0]) + 8
    sheet = Image.new("RGB", (left + b.shape[1], height * len(rows) - 8), "white")
    for i, row in enumerate(rows):
        sheet.paste(Image.fromarray(row[0]), (0, i * height))
        sheet.paste(Image.fromarray(row[1]), (left, i * height))
    draw = ImageDraw.Draw(sheet)
    for k in np.linspace(0, len(error) - 1, min(count, len(error))).astype(int):
        (x, y), (u, v) = places_a[k].tolist(), places_b[k].tolist()
        colour = "#3af" if error[k].isnan() else "#2d3" if error[k] <= 0.05 else "#f33"
        ends = (x * a.shape[1], y * a.shape[0]), (left + u * b.shape[1], v * b.shape[0])
        draw.line(ends, fill=colour, width=1)
        for end in ends:
            draw.circle(end, 3, outline=colour, width=2)
    return save_picture(sheet, path)

def two_view_picture(path, images, result):
    """Write a PNG: both images with the best matches that agree drawn between them, depth below (near is warm),
    confidence below (high is warm). Returns the path."""
    best = torch.stack(result["matches"]).cpu()[:, result["inside"]][:, :160]
    places = [zoo.centres(*image.shape[1:])[at] for image, at in zip(images, best)]
    scale = max(1, 320 // max(images[0].shape))

    def colours(values):
        low, high = np.percentile(values.cpu(), (2, 98))
        return depth_colours(values.cpu(), max(low, 1e-6), max(high, 2e-6))
    rows = [[image.permute(1, 2, 0).numpy() for image in images],
            [colours(view["pts3d"][..., 2].clamp(min=1e-3)) for view in result["views"]],
            [colours(1 / view["conf"]) for view in result["views"]]]
    larger = [[picture.repeat(scale, 0).repeat(scale, 1) for picture in row] for row in rows]
    return draw_matches(path, larger, *places, torch.full((len(places[0]),), math.nan))

def study_picture(path, scenes, said, grid, side=168, count=3):
    """Write DUNE's Figure 1 in miniature: test images, the truth, and what linear probes say. Returns the path.
    scenes, said: see study_row()."""
    objects, rooms, people = ([on("cpu", scenes[domain][3]), on("cpu", said[domain])] for domain in data.SCENES)
    kinds = objects[0]["kind"], objects[1]["kind"].argmax(-1)
    masks = F.one_hot(objects[0]["patch"], len(data.KINDS) + 1), objects[1]["patch"].softmax(-1)
    image, _, joint = people[0]["at"]
    true = torch.full((len(people[0]["near"]), len(data.JOINTS), 2), math.nan)
    true[image, joint] = people[0]["truth"]
    share = (3 * people[1]["near"]).softmax(1)[..., None]  # each joint where its surest patches say, on the average
    places = true, (share * people[1]["place"]).sum(1)
    bones = bones_of(data.labelled_scenes("people", 0, 60, 28)["joints3d"][:, 0])

    def picture(domain, i):
        return Image.fromarray(scenes[domain][2][i].cpu().permute(1, 2, 0).numpy()).resize((side, side))

    def large(x):  # [N, C] -> [side, side, C]
        maps = x.float().unflatten(0, grid).permute(2, 0, 1)[None]
        return F.interpolate(maps, (side, side), mode="bilinear")[0].permute(1, 2, 0)

    def mask(look, kind, patch):
        colours = palette(len(data.KINDS))[large(patch).argmax(-1).numpy() - 1]  # the last is the background's
        look = Image.fromarray((0.4 * np.asarray(look) + 0.6 * colours).astype(np.uint8))
        ImageDraw.Draw(look).text((6, side - 4), list(data.KINDS)[kind], "white", font_size=18, anchor="ls")
        return look

    def person(look, joints):
        look = look.copy()
        draw_skeleton(ImageDraw.Draw(look), side * joints, bones, "#d22")
        return look
    seen = image.bincount(minlength=len(true))  # joints in each image
    alone = torch.where(seen <= len(data.JOINTS), seen, 0).topk(count).indices.tolist()  # one person, all in the image
    rows = []
    for i, k in enumerate(alone):
        thing, room, body = picture("objects", i), picture("rooms", i), picture("people", k)
        ends = rooms[0]["depth"][i].exp().aminmax()
        rows.append([thing, *(mask(thing, kind[i], patch[i]) for kind, patch in zip(kinds, masks)), room,
                     *(depth_colours(large(x["depth"][i])[..., 0].exp(), *ends) for x in rooms),
                     *((127.5 + 127.5 * large(x["normals"][i])).byte() for x in rooms),
                     body, *(person(body, place[k]) for place in places)])
    columns = "object truth student room depth student normals student people truth student".split()
    return data.contact_sheet(rows, path, columns)

def people_picture(path, picture, people, K, bones, height=480):
    """Write a PNG: the photograph with skeletons, and people from above, lines a metre apart. Returns the path."""
    picture = picture.resize([max(1, round(side * height / picture.height)) for side in picture.size])
    sheet = Image.new("RGB", (picture.width + height, height), "white")
    photo, draw = ImageDraw.Draw(picture), ImageDraw.Draw(sheet)
    ends = torch.cat([torch.tensor([[1.5, 0.0, 3.0]]), *(person["joints3d"] for person in people)]).abs().amax(0)
    reach = math.ceil(max(2 * ends[0], ends[2])) + 1
    metre = (height - 30) / reach
    x, y = picture.width + height / 2, height - 20  # the camera's place
    for k in range(reach):
        draw.line((picture.width, y - k * metre, sheet.width, y - k * metre), "#ddd")
        draw.text((picture.width + 6, y - k * metre), f"{k} m", "#777", font_size=12, anchor="lb")
    for side in (-1, 1):  # what the camera sees
        edge = x + side * reach * metre * (K[0, 2] / K[0, 0]).item()
        draw.line((x, y, edge, y - reach * metre), "#aaa")
    draw.text((x, y + 4), "camera", "#777", font_size=12, anchor="mt")
    for k, person in reversed(list(enumerate(people))):  # the surest on top
        colour = COLOURS[k % len(COLOURS)]
        above = torch.tensor([x, y]) + metre * person["joints3d"][:, [0, 2]] * torch.tensor([1, -1])
        draw_skeleton(draw, above, bones, colour)
        draw_skeleton(photo, person["joints2d"] * height / (2 * K[1, 2]), bones, colour)
        draw.text(above.amax(0).tolist(), f"{person['distance']:.1f} m", colour, font_size=15)
    sheet.paste(picture)
    return save_picture(sheet, path)

def draw_skeleton(draw, joints, bones, colour):
    """Joints [J, 2], pixels (NaN: not drawn), and the bones between them, with a light edge."""
    known = {k: tuple(place) for k, place in enumerate(joints.tolist()) if not math.isnan(place[0])}
    for fill, width in (("white", 5), (colour, 3)):
        for a, b in bones:
            if a in known and b in known:
                draw.line((known[a], known[b]), fill, width)
        for place in known.values():
            draw.circle(place, 0.8 * width, fill)

# ---- Tables and files ------------------------------------------------------------------------------------------------

def report(args, look, rows, picture=None, spread=None, **more):
    """The end of a command: the table, the JSON file, what was written."""
    table(rows, f"{args.command}, {look.size} px", spread)
    path = write_json(args, {"command": args.command, "image_size": look.size, "results": rows, **more})
    print(f"wrote {path}{f', {picture}' if picture else ''}")

def table(rows, first="", spread=None):
    """Print {row: {column: number or text}} aligned; spread: the same shape, printed behind a ± where there is any."""
    columns = [[first, *rows]]
    for column in dict.fromkeys(column for row in rows.values() for column in row):
        values = [row.get(column, "-") for row in rows.values()]
        most = max((abs(value) for value in values if not isinstance(value, str)), default=0)
        digits = 3 if most < 2 else 2 if most < 10 else 1
        around = [(spread or {}).get(name, {}).get(column, 0) for name in rows]
        cells = [value if isinstance(value, str) else f"{value:.{digits}f}" for value in values]
        if any(x > 0 for x in around):
            cells = [f"{cell} ±{x:.{digits}f}" for cell, x in zip(cells, around)]
        columns.append([column, *cells])
    left, *widths = [max(map(len, column)) for column in columns]
    for name, *cells in zip(*columns):
        print(name.ljust(left) + "".join(cell.rjust(2 + width) for cell, width in zip(cells, widths)))

def mean_and_spread(values):
    """{row: [{column: value} of each seed]} -> {row: {column: mean}}, {row: {column: standard deviation}}."""
    def over_seeds(of, rows):
        return {column: float(of([row[column] for row in rows])) for column in rows[0]}
    return [{name: over_seeds(of, rows) for name, rows in values.items()} for of in (np.mean, np.std)]

def write_json(args, content):
    """Write a command's result file; what is not a finite number is null. Returns the path."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    path = output(args, ".json")
    with dune.writing(path, "w") as file:
        json.dump(content, file, indent=1)
    return path

def read_array(path, dimensions=2):
    """A picture that holds numbers (index or 16-bit PNG), or an .npy file, as an array."""
    try:
        if dune.regular(path).endswith(".npy"):
            array = np.asarray(np.load(path))
        else:
            with Image.open(path, formats=data.FORMATS) as image:
                if image.width * image.height > data.MAX_PIXELS:
                    raise Oops(f"{image.width} x {image.height} pixels are too many")
                array = np.asarray(image)
    except Exception as error:  # Pillow's and numpy's errors for foreign files are of many types
        raise Oops(f"cannot read {path}: {data.reason(error)}") from None
    if array.ndim != dimensions or array.size == 0 or array.dtype.kind not in "buif":
        what = "one number" if dimensions == 2 else "a place (x, y)"
        raise Oops(f"{path} holds {list(array.shape)} values of {array.dtype}; expected {what} for each pixel")
    return array

def read_log(folder):
    """The lines of a run's log.jsonl, dictionaries with a "step"; a last line that a crash cut short is left out."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return []
    lines = []
    with open(dune.regular(path), encoding="utf-8", errors="replace") as file:
        for n, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if text.endswith("\n"):
                lines.append(line)
                if math.isnan(number(line, "step")):
                    raise Oops(f"{path}, line {n}: this is no line of a run's log")
    return lines

def number(line, *keys):
    """line[key][key]… of a line of a log, NaN if there is no number."""
    for key in keys:
        line = line.get(key) if isinstance(line, dict) else None
    return float(line) if isinstance(line, (int, float)) and abs(line) < 1e300 else math.nan

def teachers_of(lines):
    """The teachers that a log tells of."""
    return [t for t, value in lines[0].items() if isinstance(value, dict)] if lines else []

def output(args, suffix):
    """Where a command writes: --out, or beside the run, or here, under the command's name."""
    stem = re.sub(r"\.(png|json|ply|pt)$", "", args.out or "")
    if not stem or stem.endswith("/"):
        stem = os.path.join(stem or args.run or ".", args.command)
    return stem + suffix

def check_places(args):
    """That what a command writes can be written, and the cache too, is known before the work, not after it."""
    dune.check_folder(os.path.dirname(output(args, "")) or ".")
    if "train" in args:
        dune.check_folder(f"{data.cache_folder()}/features")
    for path in (output(args, suffix) for suffix in (".json", ".png", ".ply", ".pt")):
        if os.path.isdir(path):
            raise Oops(f"cannot write {path}: there is a folder of that name; choose another --out")

# ---- Commands and their options --------------------------------------------------------------------------------------

COMMON = {
    "run": option(None, "folder of a run"),
    "checkpoint": option(None, "one of our checkpoints, or a published DUNE or UNIC file or name"),
    "teacher": option([], "a bare teacher (pca, loss, spectrum, study: only these of the student's); may be repeated",
                      choices=tuple(zoo.TEACHERS), metavar="NAME"),
    "weights": option([], "a teacher's weights, instead of downloading them", metavar="TEACHER=FILE"),
    "image_size": option(0, "pixels; 0: the size the student was trained at, 336 for a teacher alone", high=2048),
    "out": option(None, "where to write, without .json, .png; without: beside the run, or here"),
    "device": option("auto", "auto: cuda if there is one", choices=("auto", "cpu", "cuda")),
    "seed": option(0, "of the probes and of all else that is random", high=2**31),
}
IMAGES = {
    "image": option((), "photographs to look at", nargs="+"),
    "data": option([], "images, as for train.py; none: procedural scenes", metavar="TEACHER=SOURCE"),
}
PROBED = {
    **COMMON,
    "through": option([], "look at the student through this projector; may be repeated; also: encoder",
                      metavar="TEACHER"),
    "train": option(None, "folder to train the probe on"),
    "test": option(None, "folder to test it on"),
}
STEPS = option(1000, "training steps of the probe", 1, 1e6)
TOKEN = option(None, "without: the class token if there is one", choices=("cls", "patch", "both"))
DENSE = {
    **PROBED, "steps": STEPS,
    "sliding": option(False, "look through square windows, not at the whole image squeezed to a square"),
}
COMMANDS = {  # name: (function, its options, what it tells)
    "study": (command_study, {**COMMON, "seeds": option(3, "how many", 1, 1000)},
              "Linear probes, k-NN, matching on procedural scenes."),
    "ablate": (command_ablate, {
        "steps": option(60, "training steps of the student", 1, 1e6),
        "quick": option(False, "only the paper's choice and single changes of it, half as long"),
        "out": option("out/ablate", "where to write, without .json; the runs lie in a folder of that name"),
        "seeds": option(2, "how many", 1, 1000), "seed": COMMON["seed"], "device": COMMON["device"],
    }, "The tiny student again, over projector x sharing x dropping."),
    "pca": (command_pca, {**COMMON, **IMAGES}, "Features as colours, side by side in one PNG."),
    "loss": (command_loss, {**COMMON, "data": IMAGES["data"]}, "Cosine and smooth-L1 loss by the running statistics."),
    "spectrum": (command_spectrum, {**COMMON, **IMAGES}, "Figure 4: what share of the variance n components explain."),
    "alignment": (command_alignment, {"run": COMMON["run"], "out": COMMON["out"]},
                  "Figure 5, from a run's log.jsonl: do the teachers' losses change together?"),
    "knn": (command_classify, {
        **PROBED, "token": TOKEN, "k": option(20, "neighbours", 1),
        "temperature": option(0.07, "of their votes", 0.001, 100),
    }, "A folder of images for each class: weighted k-NN as DINO does it, top-1 and top-5."),
    "linear": (command_classify, {**PROBED, "token": TOKEN, "steps": STEPS},
               "A folder of images for each class: linear probes, the best of five learning rates on held-out images."),
    "seg": (command_seg, {
        **DENSE, "classes": option(0, "how many; 0: as many as --train shows", high=MOST_CLASSES),
        "ignore": option([255], "labels that count for nothing (ADE20K: 0)", -1, kind=int, nargs="+"),
    }, "Images and index masks: a linear head on patch tokens; mIoU, IoU of each class, a picture."),
    "depth": (command_depth, {
        **DENSE, "max_depth": option(10.0, "metres", 0.01, 1000),
        "depth_scale": option(1000.0, "units of a depth PNG per metre", 1e-3, 1e6),
    }, "Images and depth (16-bit PNG, or .npy in metres; 0: not measured): a linear head; errors, a picture."),
    "match": (command_match, {
        **COMMON, "through": PROBED["through"],
        "pair": option((), "A B [FLOW.npy]: two images, perhaps with a flow map [H, W, 2]: for each pixel of A its "
                       "place in B in pixels, centres at + 0.5, NaN: not known", nargs="+", metavar="FILE"),
        "pairs": option(None, "a text file with such lines", metavar="LIST"),
        "upsample": option(4, "how many times finer the second row's features are interpolated", 1, 16),
    }, "Mutual nearest neighbours of two images' patch features, a picture; without images: the two views of rooms."),
    "two-view": (command_two_view, {
        **COMMON, "data": option([], "folder of pairs to train on, instead of rooms", metavar="FOLDER"),
        "steps": option(250, "training steps of the decoder", 1, 1e6), "seeds": option(1, "how many", 1, 1000),
    }, "Two photographs to 3D; with --run alone: a decoder trained on the run's frozen student."),
    "people": (command_people, {
        **COMMON, "data": option([], "folder to train on, instead of procedural people: NAME.jpg beside NAME.npz with "
                                     "joints3d [P, J, 3], metres in the camera's frame, K, perhaps visible [P]",
                                 metavar="FOLDER"),
        "head": option(0, "which joint is the head", high=1000),
        "pelvis": option(None, "at which joint 3D errors are aligned; without: a folder's at the mean of all joints",
                         kind=int, high=1000),
        "fov": option(None, "degrees across the photograph's longer side; without: from EXIF, else 60", 1, 179,
                      kind=float),
        "steps": option(1000, "training steps of the head", 1, 1e6), "seeds": option(1, "how many", 1, 1000),
    }, "People of a photograph in 3D; with --run alone: a head trained on the run's frozen student."),
}

def main(argv=None):
    parser = dune.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text).add(options)
        if name in ("two-view", "people"):
            command.add_argument("images", nargs="*", help="two photographs" if name == "two-view" else "a photograph")
    args = parser.parse_args(argv)
    if "device" in args:
        args.device = dune.pick_device(args.device)
    if args.out or os.path.isdir(args.run or "."):
        check_places(args)
    COMMANDS[args.command][0](args)

if __name__ == "__main__":
    dune.run(main)
