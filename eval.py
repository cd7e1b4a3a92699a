"""What the encoder knows: probes of frozen features, losses, pictures, matches, two photographs to 3D.

    python eval.py study --run out/tiny         # is the student as good as each teacher at its own job?
    python eval.py pca --run out/tiny           # features as colors; also loss, spectrum, alignment
    python eval.py knn --train in1k/train --test in1k/val --run out/dune     # also linear, seg, depth
    python eval.py match a.jpg b.jpg --run out/tiny
    python eval.py two-view a.jpg b.jpg         # a point cloud and the pose of the cameras
    python eval.py export --run out/dune --to hf --out dune-hf         # the encoder for transformers or timm

A table has a row for the student's encoder, for the student through each projector (--through dinov2) and for
each teacher (--teacher dinov2). All of them stay frozen.
"""

import argparse
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from tqdm import tqdm

import data
import dune
import teachers
from dune import UserError
from train import HeldOut, add_options, parse_sizes, pick_device, read_log, run_main


# ---- The commands ----------------------------------------------------------------------------------------

@dataclass
class Command:
    """A command is a row of COMMANDS and the function command_NAME(args), which does the work."""
    help: str
    options: dict    # {name: (default, help[, limits or choices])}, see train.add_options
    photos: int = 0  # number of photographs that are named without an option


MODEL = {
    "run": (None, "folder of a run"),
    "checkpoint": (None, "a checkpoint, or a published DUNE or UNIC file or name, instead of --run"),
    "teacher": ([], "evaluate this teacher, may be repeated; if not given: all the student learned from"),
    "weights": ([], "TEACHER=FILE, may be repeated; if not given: as in the run, or downloaded"),
    "image_size": (0, "pixels; 0: as the student was trained, 336 for a teacher alone", (0, 2048)),
    "out": (None, "where to write, without .png or .json; if not given: in the run's folder, or here"),
    "device": ("auto", "auto: a GPU if there is one", ("auto", "cpu", "cuda")),
    "seed": (0, "random seed", (0, 2**31)),
}
IMAGES = {
    **MODEL,
    "image": ([], "a photograph to look at, may be repeated"),
    "data": ([], "[TEACHER=]SOURCE of images, as for train.py; if not given: procedural scenes"),
}
THROUGH = {
    **MODEL,
    "through": ([], "also evaluate the student through this teacher's projector, may be repeated"),
}
FOLDERS = {
    **THROUGH,
    "train": (None, "folder to train the probe on"),
    "test": (None, "folder to test it on"),
}
CLASSIFY = {
    **FOLDERS,
    "token": ("auto", "auto: the class token if there is one, else the mean patch", ("auto", "cls", "patch")),
}
STEPS = {"steps": (1000, "training steps of the probe", (1, 10**6))}

COMMANDS = {
    "study": Command("Probes on procedural scenes (objects, rooms, people): a table and a picture.", {
        **MODEL,
        "seeds": (3, "number of probes of each kind, for mean and spread", (1, 1000)),
    }),
    "loss": Command("Distillation losses on held-out images, by the running statistics.", {
        **MODEL,
        "data": IMAGES["data"],
        "image_size": ("0", "pixels, several: 224,336; 0: the largest size of the training"),
    }),
    "knn": Command("A folder of images for each class: weighted k-NN as in DINO, top-1 and top-5.", {
        **CLASSIFY,
        "k": (20, "number of neighbors", (1, 10**6)),
        "temperature": (0.07, "of the neighbors' votes", (0.001, 100.0)),
    }),
    "linear": Command("A folder of images for each class: linear classification, top-1 and top-5.", {
        **CLASSIFY,
        **STEPS,
    }),
    "seg": Command("Segmentation, from images/ and masks/ (index PNG, .npy): mIoU and a picture.", {
        **FOLDERS,
        **STEPS,
        "classes": (0, "number of classes; 0: as many as --train shows", (0, 10**4)),
        "ignore": (255, "label that does not count (ADE20K: 0)", (-1, 65535)),
    }),
    "depth": Command("Depth, from images/ and depth/ (16-bit PNG, .npy in meters; 0: unknown).", {
        **FOLDERS,
        **STEPS,
        "max_depth": (10.0, "meters", (0.01, 1000.0)),
        "depth_scale": (1000.0, "units of a depth PNG per meter", (0.001, 1e6)),
    }),
    "pca": Command("Features as colors, the student's and the teachers' (the paper's Figure 2).", IMAGES),
    "spectrum": Command("Share of the variance that n principal components explain (Figure 4).", IMAGES),
    "alignment": Command("Do the teachers' losses fall together? From a run's log (Figure 5).", {
        "run": MODEL["run"],
        "out": MODEL["out"],
    }),
    "match": Command("Patches of two photographs that are each other's nearest neighbor: a picture.",
                     THROUGH, photos=2),
    "two-view": Command("Two photographs to 3D by a published decoder: point cloud, focal lengths, pose.", {
        "weights": ("dune", f"a MASt3R or DUNE-MASt3R file, or one of {', '.join(teachers.TWO_VIEW)}"),
        "image_size": (0, "longest side in pixels; 0: as the decoder was trained", (0, 2048)),
        "out": MODEL["out"],
        "device": MODEL["device"],
    }, photos=2),
    "export": Command("The student's encoder as a file of transformers, timm or DINOv2.", {
        "run": MODEL["run"],
        "checkpoint": MODEL["checkpoint"],
        "to": ("hf", "transformers, timm, or DINOv2's own code", ("hf", "timm", "dinov2")),
        "out": (None, "folder to write; if not given: export in the run's folder, or here"),
    }),
}


# ---- The models ------------------------------------------------------------------------------------------

@dataclass
class Models:
    """What a command evaluates."""
    student: dune.DUNE | None
    teachers: dict     # {name: FrozenTeacher}
    extractors: dict   # {row of the table: function from uint8 images to features, see extract()}
    image_size: int    # pixels
    patch_size: int    # pixels
    device: torch.device

    @property
    def grid(self):
        """Rows and columns of the patch tokens of a square image."""
        side = self.image_size // self.patch_size
        return side, side


def load_models(args):
    """Load the models to evaluate: the student (--run or --checkpoint) and the teachers (--teacher; default:
    those the student was distilled from, none with --through)."""
    student = None
    path = f"{args.run}/checkpoint.pt" if args.run else args.checkpoint
    if path:
        student = dune.load(path).to(args.device)
    through = getattr(args, "through", [])
    names = args.teacher
    if student and not names and not through:
        names = list(student.projectors)
    if not student and (through or not names):
        raise UserError("specify a model: --run, --checkpoint or --teacher")

    frozen = load_teachers(args, names, student)
    encoder = student.encoder if student else frozen[names[0]]
    patch_size = encoder.patch_size
    image_size = args.image_size
    if not image_size:
        image_size = encoder.grid * patch_size if student else 336
    if image_size % patch_size:
        raise UserError(f"image size {image_size} is not divisible by the patch size {patch_size}")

    functions = {}
    if student:
        functions["student"] = encoder
    for name in through:
        if name not in student.projectors:
            raise UserError(f"no projector for {name}; available: {', '.join(student.projectors)}")
        functions[f"through {name}"] = partial(project, student, name)
    for name, teacher in frozen.items():
        functions[name] = partial(on_grid, teacher, patch_size)
    extractors = {}
    for name, function in functions.items():
        extractors[name] = partial(extract, function, args.device)
    return Models(student, frozen, extractors, image_size, patch_size, args.device)


def load_teachers(args, names, student):
    """{name: FrozenTeacher}; the weights: of --weights, else of the student's run, else downloaded."""
    files = dict(student.teacher_weights) if student else {}
    for item in args.weights:
        name, equals, path = item.partition("=")
        if not equals:
            raise UserError(f"--weights {item}: write TEACHER=FILE")
        files[name] = path
    frozen = {}
    for name in names:
        path = files.get(name)
        frozen[name] = teachers.load_teacher(name, path, args.device)
        if path == "random":
            print(f"warning: the weights of {name} are random, as in the run", file=sys.stderr)
        if student and name in student.projectors:
            expected = len(student.teacher_norms[name].normalizers["patch"].mean)
            if frozen[name].dim != expected:
                raise UserError(f"{path or name} has {frozen[name].dim} channels, but the student learned "
                                f"from a {name} with {expected}")
    return frozen


@torch.no_grad()
def extract(function, device, images, batch=32):
    """Frozen features of uint8 images [n, 3, H, W]: {"cls": [n, D] or None, "patch": [n, N, D]}, fp32.

    function  does this for a batch of normalized images on the device
    """
    outputs = []
    with torch.autocast(device.type, torch.bfloat16, enabled=teachers.fast_bf16(device)):
        for part in images.split(batch):
            outputs.append(function(data.normalize(part.to(device))))
    features = {"cls": None}
    for token_type in dune.token_types(outputs[0]["cls"] is not None):
        features[token_type] = torch.cat([output[token_type].float() for output in outputs])
    return features


def project(student, teacher, images):
    """The student's features through its projector for a teacher."""
    all_blocks = student.projectors[teacher].uses_all_blocks
    return student.project(teacher, student.encoder.tokens(images, return_all_blocks=all_blocks))


def on_grid(teacher, patch_size, images):
    """A teacher's features on the token grid of another patch size, the student's."""
    return teacher(images, dune.token_grid(images, patch_size))


def sample_images(args, models, count):
    """Images to look at, uint8 [n, 3, H, W]: --image, else `count` held-out ones of each group of --data."""
    if getattr(args, "image", None):
        photos = [data.load_image(path) for path in args.image]
        if len(photos) == 1:
            image = data.fit_image(photos[0], models.image_size, models.patch_size)
            if image[0].numel() == models.patch_size**2:
                raise UserError("one patch has nothing to compare with: use a larger --image-size")
            return image[None]
        return torch.stack([data.center_crop(photo, models.image_size) for photo in photos])
    rows = {name: teachers.TEACHERS[name] for name in models.teachers}
    groups = data.parse_data(args.data, rows)
    return data.held_out_images(groups, models.image_size, count)


# ---- Losses ----------------------------------------------------------------------------------------------

def command_loss(args):
    text, args.image_size = args.image_size, 0
    models = load_models(args)
    student = models.student
    if not student or models.teachers.keys() - student.projectors.keys():
        raise UserError("loss needs a student (--run or --checkpoint) and teachers that it learned from")
    sizes = [models.image_size] if text == "0" else parse_sizes(text, models.patch_size)
    images = []
    for size in sizes:
        models.image_size = size
        batch = sample_images(args, models, 32 if max(sizes) <= 128 else 8)
        images.append(batch.to(models.device))
    losses = HeldOut(images, models.teachers, models.patch_size).losses(student, running=True)
    print(f"losses on {len(batch)} images")
    write_results(args, losses, image_size=sizes)


# ---- The study: linear probes on procedural scenes -------------------------------------------------------

STUDY = {"train": 900, "test": 400, "steps": 300}  # scenes of a domain, training steps of a probe
# The first seeds of scenes that no teacher and no student has seen.
TRAIN_SEED = 5 * 10**8
TEST_SEED = data.TEST_SCENES + 10**8
PROBE_BATCH = 50


@dataclass
class StudyScenes:
    """Scenes of one domain to train and to test probes on."""
    domain: str
    train_images: torch.Tensor  # uint8 [n, 3, S, S]
    train_targets: dict         # on the token grid, see teachers.PROBES
    test: dict                  # see data.labelled_scenes
    test_targets: dict


def command_study(args):
    models = load_models(args)
    extractors, parameters = study_rows(models, args.seed)
    values = {name: {} for name in extractors}
    scenes = {}
    predictions = {}
    for domain in data.SCENES:
        scenes[domain] = study_scenes(domain, models, args.seed)
        for name, extractor in tqdm(extractors.items(), f"study: {domain}", leave=False):
            metrics, prediction = probe_domain(extractor, scenes[domain], models.grid, args)
            values[name].update(metrics)
            if name == "student":
                predictions[domain] = prediction

    print(f"probes on frozen features, mean ± spread of {args.seeds} seeds; in %, RMSE in m, normals in °")
    rows = {}
    spread = {}
    for name, row in values.items():
        rows[name] = {"M params": parameters[name] / 1e6, **over_seeds(np.mean, row)}
        spread[name] = over_seeds(np.std, row)
    picture = None
    if predictions:
        picture = study_picture(output_path(args, ".png"), scenes, predictions, models.grid)
    heads = own_heads(models, scenes)
    write_results(args, rows, picture, spread, image_size=models.image_size, values=values, own_heads=heads)


def own_heads(models, scenes):
    """How well the head that each teacher was trained with works on the teacher, and unchanged on the student
    in the teacher's scale: {row: {column: number}}. Only the files of tiny specialists hold a head."""
    student = models.student
    rows = {}
    for name, teacher in models.teachers.items():
        if not teacher.head:
            continue
        domain = teachers.TEACHERS[name].domain
        head = teachers.PROBES[domain](teacher.dim, models.grid)
        dune.load_strict(head, teacher.head).to(models.device)
        extractors = {"teacher": models.extractors[name]}
        if student and name in student.projectors:
            extractors["student"] = partial(extract, partial(student.as_teacher, teacher=name), models.device)
        for row, extractor in extractors.items():
            with torch.no_grad():
                predictions = head(extractor(scenes[domain].test["image"]))
            for metric, value in head.metrics(predictions, scenes[domain].test_targets).items():
                rows.setdefault(row, {})[f"{name} {metric}"] = value
    return rows


def study_rows(models, seed):
    """({row of the table: extractor}, {row: number of parameters}).

    Besides the models there is an encoder of the student's shape with random weights: what any network knows
    before it learns; and the student through each of its projectors.
    """
    parameters = {name: num_parameters(teacher) for name, teacher in models.teachers.items()}
    student = models.student
    if not student:
        return models.extractors, parameters
    encoder = student.encoder
    torch.manual_seed(seed)
    random = dune.ViT(encoder.grid * encoder.patch_size, encoder.patch_size, encoder.embed_dim,
                      len(encoder.blocks), encoder.num_heads, encoder.registers, layer_scale=None)
    random = random.eval().to(models.device)
    extractors = {"random encoder": partial(extract, random, models.device), **models.extractors}
    parameters["random encoder"] = num_parameters(random)
    parameters["student"] = num_parameters(encoder)
    for name, projector in student.projectors.items():
        row = f"through {name}"
        extractors[row] = partial(extract, partial(project, student, name), models.device)
        parameters[row] = num_parameters(encoder) + num_parameters(projector)
    return extractors, parameters


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def study_scenes(domain, models, seed):
    """The StudyScenes of one domain: scenes on the CPU, targets on the device."""
    probe = teachers.PROBES[domain](1, models.grid)
    first = 10**6 * seed
    train = data.labelled_scenes(domain, TRAIN_SEED + first, STUDY["train"], models.image_size)
    test = data.labelled_scenes(domain, TEST_SEED + first, STUDY["test"], models.image_size)
    train_targets = move(probe.targets(train), models.device)
    test_targets = move(probe.targets(test), models.device)
    return StudyScenes(domain, train["image"], train_targets, test, test_targets)


def probe_domain(extractor, scenes, grid, args):
    """Probes of one encoder in one domain: ({column: [value of each seed]}, predictions of the first probe).

    Every seed has its own initial weights and its own random two thirds of the training scenes.
    """
    train = extractor(scenes.train_images)
    test = extractor(scenes.test["image"])
    for features in (train, test):
        if features["cls"] is None:
            features["cls"] = features["patch"].mean(1)
    standard_train, standard_test = standardize(train, test)
    values = {}
    first_predictions = None
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        index = torch.randperm(len(train["cls"]), device=train["cls"].device)
        index = index[:max(1, len(index) * 2 // 3)]
        probe = train_probe(scenes.domain, standard_train, scenes.train_targets, index, grid)
        with torch.no_grad():
            predictions = probe(standard_test)
        first_predictions = first_predictions or move(predictions, "cpu")
        metrics = probe.metrics(predictions, scenes.test_targets)
        if scenes.domain == "objects":
            kinds = scenes.train_targets["kind"][index]
            scores = knn(train["cls"][index], kinds, test["cls"], len(data.KINDS))
            accuracy = topk_accuracy(scores, scenes.test_targets["kind"])
            metrics = {"k-NN": accuracy["top-1"], **metrics}
        for metric, value in metrics.items():
            values.setdefault(f"{scenes.domain} {metric}", []).append(value)
    return values, first_predictions


def standardize(train, test):
    """Both sets of features, standardized per channel by mean and std of the first."""
    standard_train = {}
    standard_test = {}
    for token_type, x in train.items():
        mean, std = mean_and_std(x)
        standard_train[token_type] = (x - mean) / std
        standard_test[token_type] = (test[token_type] - mean) / std
    return standard_train, standard_test


def mean_and_std(x):
    """fp32 [D] each, of features [..., D]; of a sample of them if there are very many."""
    sample = x[::max(1, len(x) // 2000)].float()
    std, mean = torch.std_mean(sample.flatten(0, -2), 0, correction=0)
    return mean, std + 1e-6


def train_probe(domain, features, targets, index, grid):
    """A probe of the domain (teachers.PROBES), trained on the images `index` of standardized features."""
    batches = index.split(PROBE_BATCH)
    dim = features["patch"].shape[-1]
    probe = teachers.PROBES[domain](dim, grid).to(index.device)

    def loss(step):
        batch = batches[step % len(batches)]
        return probe.loss(probe(take(features, batch)), take(targets, batch))
    teachers.train(probe, loss, STUDY["steps"], 1e-1)
    return probe


def take(batch, index):
    return {name: x[index] for name, x in batch.items()}


def move(batch, device):
    return {name: x.to(device) for name, x in batch.items()}


def over_seeds(function, row):
    return {column: float(function(numbers)) for column, numbers in row.items()}


# ---- The picture of the study: DUNE's Figure 1 in miniature ----------------------------------------------

CELL = 168  # pixels of a picture


def study_picture(path, scenes, predictions, grid, count=2):
    """Write a row for each of the first test scenes: image, truth, and what the probes read off the student.

    scenes {domain: StudyScenes}; predictions {domain: its probe's of the test scenes}. Returns the path.
    """
    captions = ["object", "truth", "student", "room", "depth:\ntruth", "depth:\nstudent",
                "normals:\ntruth", "normals:\nstudent", "people", "truth", "student"]
    rows = []
    for i in range(count):
        row = []
        for domain, draw in (("objects", draw_object), ("rooms", draw_room), ("people", draw_people)):
            truth = take(scenes[domain].test, i)
            row += draw(truth, take(predictions[domain], i), grid)
        rows.append(row)
    return data.contact_sheet(rows, path, captions, CELL)


def draw_object(truth, prediction, grid):
    """Three pictures: the image; mask and kind of the object; mask and kind that the probe predicts."""
    image = truth["image"]
    colors = label_colors(len(data.KINDS))
    kind = data.KINDS[truth["kind"]]
    predicted_kind = data.KINDS[prediction["kind"].argmax()]
    predicted_labels = upsample(prediction["patch"], grid).argmax(0)
    return [image,
            label_map_to_image(truth["labels"], colors, image, kind),
            label_map_to_image(predicted_labels, colors, image, predicted_kind)]


def draw_room(truth, prediction, grid):
    """Five pictures: the image; depth, predicted depth; normals, predicted normals."""
    limits = depth_limits(truth["depth"])
    predicted_depth = upsample(prediction["depth"], grid)[0].exp()
    predicted_normals = upsample(prediction["normals"], grid).permute(1, 2, 0)
    return [truth["image"],
            data.depth_colors(truth["depth"], *limits),
            data.depth_colors(predicted_depth, *limits),
            normals_to_image(truth["normals"]),
            normals_to_image(predicted_normals)]


def draw_people(truth, prediction, grid):
    """Three pictures: the image; parts of the bodies; predicted parts."""
    image = truth["image"]
    colors = label_colors(len(data.PARTS) - 1)
    predicted_labels = upsample(prediction["patch"], grid).argmax(0)
    return [image,
            label_map_to_image(truth["labels"], colors, image),
            label_map_to_image(predicted_labels, colors, image)]


def upsample(tokens, grid):
    """A map on the token grid, [N, C], as a map of the picture's size: [C, CELL, CELL]."""
    maps = tokens.float().T.unflatten(1, grid)
    return F.interpolate(maps[None], (CELL, CELL), mode="bilinear")[0]


def label_colors(count):
    """uint8 [1 + count, 3]: black for the background, then `count` hues."""
    colors = [(0, 0, 0)]
    for k in range(count):
        colors.append(ImageColor.getrgb(f"hsl({360 * k // count}, 90%, 55%)"))
    return np.array(colors, np.uint8)


def label_map_to_image(labels, colors, image, caption=""):
    """Labels [H, W] as colors over a pale uint8 image [3, H', W']: uint8 [CELL, CELL, 3]."""
    size = CELL, CELL
    overlay = Image.fromarray(colors[labels.numpy()])
    overlay = overlay.resize(size, Image.Resampling.NEAREST)
    picture = Image.blend(to_pil(image).resize(size), overlay, 0.6)
    ImageDraw.Draw(picture).text((6, CELL - 24), caption, "white", font_size=18)
    return np.array(picture)


def normals_to_image(normals):
    """Unit normals [H, W, 3] as uint8 colors: -1..1 becomes 0..255."""
    return (127.5 + 127.5 * normals).byte().numpy()


def depth_limits(depth):
    """Smallest and largest known depth in meters; 0 is unknown."""
    known = depth[depth > 0]
    return known.min().item(), known.max().item()


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


# ---- Folders of images: k-NN and linear classification ---------------------------------------------------

def command_knn(args):
    classify(args, partial(knn, k=args.k, temperature=args.temperature))


def command_linear(args):
    classify(args, partial(linear_scores, steps=args.steps, seed=args.seed))


def classify(args, score):
    """score(train features [n, D], labels [n], test features [m, D], number of classes) -> [m, classes]."""
    train = class_folder(args.train)
    test = class_folder(args.test, train.names)
    models = load_models(args)
    rows = {}
    for name, extractor in models.extractors.items():
        token = choose_token(args.token, name, extractor, models)
        train_x, train_labels = folder_features(extractor, train.examples, models, token)
        test_x, test_labels = folder_features(extractor, test.examples, models, token)
        scores = score(train_x, train_labels, test_x, len(train.names))
        rows[name] = {**topk_accuracy(scores, test_labels), "token": token}
    write_results(args, rows, image_size=models.image_size)


@dataclass
class ClassFolder:
    """A folder with a folder of images for each class."""
    examples: list  # (path, index into names)
    names: list


def class_folder(root, names=None):
    """names: the classes of the training folder, for one to test on."""
    folders = [name for name in list_dir(root) if os.path.isdir(os.path.join(root, name))]
    if len(folders) < (1 if names else 2):
        raise UserError(f"{root} must hold a folder of images for each of at least two classes")
    names = names or folders
    examples = []
    for name in folders:
        if name not in names:
            raise UserError(f"{root}: the class {name} is not among those of --train")
        images = list_dir(os.path.join(root, name), data.SUFFIXES)
        if not images:
            raise UserError(f"{os.path.join(root, name)} is empty: add images or remove the folder")
        examples += [(os.path.join(root, name, image), names.index(name)) for image in images]
    return ClassFolder(examples, names)


def list_dir(folder, suffixes=""):
    """The sorted names in a folder that are not hidden and have one of the suffixes."""
    if not folder:
        raise UserError("give --train FOLDER and --test FOLDER")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder")
    names = []
    for name in sorted(os.listdir(folder)):
        if name[0] != "." and name.lower().endswith(suffixes):
            names.append(name)
    return names


def choose_token(token, name, extractor, models):
    """"cls" or "patch": --token, or the class token if there is one."""
    blank = torch.zeros(1, 3, models.image_size, models.image_size, dtype=torch.uint8)
    has_cls = extractor(blank)["cls"] is not None
    if token == "cls" and not has_cls:
        raise UserError(f"{name} has no class token: use --token patch")
    return token if token != "auto" else "cls" if has_cls else "patch"


def folder_features(extractor, examples, models, token):
    """Class token or mean patch token of each image's central square, fp16 [n, D], and labels, int64 [n]."""
    parts = []
    all_labels = []
    load = partial(load_square, models.image_size)
    for batch in read_ahead(load, examples, "features"):
        images, labels = zip(*batch)
        features = extractor(torch.stack(images))
        x = features["cls"] if token == "cls" else features["patch"].mean(1)
        parts.append(x.half())
        all_labels += labels
    return torch.cat(parts), torch.tensor(all_labels, device=models.device)


def load_square(image_size, example):
    path, label = example
    return data.center_crop(data.load_image(path), image_size), label


def read_ahead(read, items, title, batch=32):
    """Yield [read(item), ...] of batch after batch of the items; threads read the next one meanwhile.

    Items whose image cannot be read are counted and removed. UserError if they are more than one in ten.
    """
    pending = {}
    errors = {}
    with ThreadPoolExecutor(min(16, data.cores())) as pool:  # it waits for its threads
        for start in tqdm(range(0, len(items) + batch, batch), title, leave=False):
            ready = pending
            pending = {pool.submit(read, item): item for item in items[start:start + batch]}
            results = []
            for future, item in ready.items():
                error = future.exception()
                if isinstance(error, data.ImageError):
                    errors[item] = error
                else:
                    results.append(future.result())
            if results:
                yield results
    if errors:
        line = f"{len(errors)} of {len(items)} images cannot be read; the last: {[*errors.values()][-1]}"
        if len(errors) > len(items) / 10 + 0.5:
            raise UserError(line)
        print(f"left out: {line}", file=sys.stderr)
        items[:] = [item for item in items if item not in errors]


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Weighted k-NN as in DINO: scores [m, classes] of test features [m, D].

    Each of the k training features [n, D] with the largest cosine similarity votes for its label [n] with
    exp(similarity / temperature).
    """
    train = F.normalize(train.float(), dim=-1)
    scores = []
    for part in test.split(256):
        similarity = F.normalize(part.float(), dim=-1) @ train.T
        nearest, index = similarity.topk(min(k, len(train)))
        votes = (nearest / temperature).exp()
        empty = torch.zeros(len(part), classes, device=train.device)
        scores.append(empty.scatter_add(1, labels[index], votes))
    return torch.cat(scores)


def topk_accuracy(scores, labels):
    """{"top-1", "top-5"} in % of scores [m, classes]."""
    best = scores.topk(min(5, scores.shape[1])).indices
    hits = best == labels[:, None]
    top1 = hits[:, 0].float().mean().item()
    top5 = hits.any(1).float().mean().item()
    return {"top-1": 100 * top1, "top-5": 100 * top5}


LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def linear_scores(train, labels, test, classes, steps, seed):
    """Scores [m, classes] of test features [m, D] by a linear layer on standardized features.

    One layer is trained with each of LEARNING_RATES; the best on a held-out tenth of the images counts.
    """
    torch.manual_seed(seed)
    mean, std = mean_and_std(train)
    train = (train.float() - mean) / std
    test = (test.float() - mean) / std
    order = torch.randperm(len(train))
    count = max(1, len(train) // 10)
    held_out, rest = order[:count], order[count:]
    best_loss = math.inf
    for lr in LEARNING_RATES:
        layer = nn.Linear(train.shape[1], classes).to(train.device)

        def loss(step):
            batch = rest[torch.randint(len(rest), (min(1024, len(rest)),))]
            return F.cross_entropy(layer(train[batch]), labels[batch])
        teachers.train(layer, loss, steps, lr, description=f"linear layer, lr {lr:g}")
        with torch.no_grad():
            held_out_loss = F.cross_entropy(layer(train[held_out]), labels[held_out])
            if held_out_loss < best_loss:
                best_loss = held_out_loss
                scores = layer(test)
    return scores


# ---- Dense: segmentation, depth --------------------------------------------------------------------------
# A linear layer on the standardized patch tokens of whole images, squeezed to a square.

EXAMPLES = 4  # test images in the picture


@dataclass
class DenseFolder:
    """Images with a target for each pixel."""
    paths: list
    targets: list  # tensors [H, W], each of its own size


def command_seg(args):
    read_target = partial(read_mask, args.ignore)
    train, test = dense_folders(args, ("masks", "annotations", "labels"), read_target)
    classes = count_classes(args, train, test)
    models = load_models(args)
    colors = data.palette(classes)
    columns = image_and_truth(test)
    columns["truth"] = [colors[mask.numpy()] for mask in columns["truth"]]
    rows = {}
    ious = {}
    for name, extractor in models.extractors.items():
        layer = train_dense(args, models, extractor, train, classes, mask_loss)
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
        columns[name] = []
        for maps, truth in predict_dense(layer, models, extractor, test):
            guess = maps.argmax(0)
            confusion += count_pairs(truth, guess, classes)
            if len(columns[name]) < EXAMPLES:
                columns[name].append(colors[guess.numpy()])
        iou = 100 * class_iou(confusion)
        accuracy = 100 * confusion.diag().sum() / confusion.sum()
        rows[name] = {"mIoU": iou.nanmean().item(), "pixel accuracy": accuracy.item()}
        ious[name] = iou.tolist()
    picture = picture_of_columns(args, columns)
    write_results(args, rows, picture, image_size=models.image_size, class_iou=ious)


def command_depth(args):
    read_target = partial(read_depth, args.depth_scale, args.max_depth)
    train, test = dense_folders(args, ("depth", "depths"), read_target)
    models = load_models(args)
    columns = image_and_truth(test)
    columns["truth"] = [data.depth_colors(depth, *depth_limits(depth)) for depth in columns["truth"]]
    rows = {}
    for name, extractor in models.extractors.items():
        layer = train_dense(args, models, extractor, train, 1, depth_loss)
        errors = {}
        columns[name] = []
        for maps, truth in predict_dense(layer, models, extractor, test):
            guess = maps[0].exp().clamp(max=args.max_depth)
            for metric, value in depth_errors(guess, truth).items():
                errors.setdefault(metric, []).append(value)
            if len(columns[name]) < EXAMPLES:
                columns[name].append(data.depth_colors(guess, *depth_limits(truth)))
        rows[name] = over_seeds(np.mean, errors)
    write_results(args, rows, picture_of_columns(args, columns), image_size=models.image_size)


def dense_folders(args, names, read_target):
    """The DenseFolders of --train and --test. names: what the folder of targets may be called."""
    folders = []
    for root in (args.train, args.test):
        pairs = find_pairs(root, names)
        examples = []
        for part in read_ahead(partial(read_pair, read_target), pairs, f"targets of {root}"):
            examples += part
        folders.append(DenseFolder(*map(list, zip(*examples))))
    return folders


def find_pairs(root, names):
    """[(image, target)] of root/images/X.jpg and root/NAME/X.png (or .npy).

    root may also be a folder within images/, as in ADE20K: images/training beside annotations/training.
    """
    folder = os.path.abspath(root) if root else ""
    if "images" in list_dir(root):
        folder = os.path.join(folder, "images")
    head, images, tail = folder.rpartition(f"{os.sep}images")
    candidates = [f"{head}{os.sep}{name}{tail}" for name in names]
    found = [candidate for candidate in candidates if images and os.path.isdir(candidate)]
    if not found:
        raise UserError(f"{root}: expected folders images/ and {' or '.join(f'{name}/' for name in names)}")
    targets = {}
    for name in list_dir(found[0], (".png", ".npy")):
        stem = os.path.splitext(name)[0]
        targets[stem] = os.path.join(found[0], name)
    pairs = []
    for name in list_dir(folder, data.SUFFIXES):
        stem = os.path.splitext(name)[0]
        if stem not in targets:
            raise UserError(f"{os.path.join(folder, name)} has no target in {found[0]}")
        pairs.append((os.path.join(folder, name), targets[stem]))
    if not pairs:
        raise UserError(f"{folder} holds no images")
    return pairs


def read_pair(read_target, pair):
    """(image, [H, W]) of a pair of paths (image, target), if their shapes fit together."""
    width, height = data.load_image(pair[0]).size
    target = read_target(pair[1])
    rows, cols = target.shape
    if abs(math.log(width * rows / (height * cols))) > 0.03:
        raise UserError(f"{pair[1]} is {cols}x{rows}, its image {width}x{height}: aspect ratios differ")
    return pair[0], target


def read_map(path):
    """An index or 16-bit PNG, or an .npy file, as an array [H, W]."""
    try:
        if path.endswith(".npy"):
            array = np.load(path)
        else:
            array = np.asarray(Image.open(path, formats=data.FORMATS))
    except Exception as error:  # Pillow's and numpy's errors for damaged files are of many types
        raise UserError(f"cannot read {path}: {str(error).partition(chr(10))[0][:200]}") from None
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise UserError(f"{path} has shape {list(array.shape)} and type {array.dtype}; expected one number "
                        "for each pixel")
    return array


def read_mask(ignore, path):
    """Labels int16 [H, W]; -1 is ignored."""
    array = read_map(path).astype(np.float64)
    labels = np.where(array == ignore, -1, array)
    valid = (labels >= -1) & (labels < 10**4) & (labels % 1 == 0)
    if not valid.all():
        raise UserError(f"{path} contains values that are not labels (0 to 9999)")
    return torch.from_numpy(labels.astype(np.int16))


def read_depth(scale, max_depth, path):
    """Depth fp32 [H, W] in meters; 0 is unknown."""
    array = read_map(path).astype(np.float32)
    if not path.endswith(".npy"):
        array = array / scale
    known = (array > 1e-3) & (array <= max_depth)
    if not known.any():
        raise UserError(f"{path} has no depth between 0 and {max_depth:g} m: "
                        "check --depth-scale and --max-depth")
    return torch.from_numpy(np.where(known, array, 0))


def count_classes(args, train, test):
    """--classes, or as many as the training masks show. UserError if a mask shows more, or nothing."""
    highest = {}
    for root, folder in ((args.train, train), (args.test, test)):
        highest[root] = max(int(target.max()) for target in folder.targets)
        if highest[root] < 0:
            raise UserError(f"{root}: all pixels have the label --ignore {args.ignore}")
    classes = args.classes or highest[args.train] + 1
    for root, label in highest.items():
        if label >= classes:
            raise UserError(f"{root} contains label {label}, but there are {classes} classes: "
                            f"use --classes {label + 1} or --ignore {label}")
    return classes


class DenseLayer(nn.Module):
    """Linear layer on standardized patch tokens [b, N, D] -> maps [b, outputs, *size]."""

    def __init__(self, tokens, outputs, grid):
        super().__init__()
        mean, std = mean_and_std(tokens)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(len(mean), outputs)
        self.grid = grid

    def forward(self, tokens, size):
        x = self.linear((tokens.float() - self.mean) / self.std)  # [b, N, outputs]
        maps = x.mT.unflatten(2, self.grid)                       # [b, outputs, rows, cols]
        return F.interpolate(maps, size, mode="bilinear")


def train_dense(args, models, extractor, folder, outputs, loss_of):
    """A DenseLayer for one encoder. loss_of(maps [b, outputs, h, w], targets [b, h, w])."""
    load = partial(load_whole, models.image_size)
    parts = []
    for images in read_ahead(load, folder.paths, f"{args.command}: features"):
        parts.append(extractor(torch.stack(images))["patch"].half().cpu())
    tokens = torch.cat(parts)  # [n, N, D]
    side = 4 * models.grid[0], 4 * models.grid[1]
    targets = torch.stack([resize_nearest(target, side) for target in folder.targets])
    torch.manual_seed(args.seed)
    layer = DenseLayer(tokens, outputs, models.grid).to(models.device)

    def loss(step):
        batch = torch.randint(len(tokens), (min(16, len(tokens)),))
        maps = layer(tokens[batch].to(models.device), side)
        return loss_of(maps, targets[batch].to(models.device))
    teachers.train(layer, loss, args.steps, 1e-2, description=args.command)
    return layer


@torch.no_grad()
def predict_dense(layer, models, extractor, folder):
    """Yield (maps [outputs, H, W], target [H, W]) of each image, at the size of the target, on the CPU."""
    targets = iter(folder.targets)
    for images in read_ahead(partial(load_whole, models.image_size), folder.paths, "test"):
        for tokens in extractor(torch.stack(images))["patch"]:
            target = next(targets)
            yield layer(tokens[None], target.shape)[0].cpu(), target


def load_whole(image_size, path):
    """A whole image squeezed to a square, uint8 [3, S, S]."""
    image = data.load_image(path).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_nearest(target, size):
    images = target[None, None].float()
    return F.interpolate(images, size, mode="nearest-exact")[0, 0]


def mask_loss(maps, labels):
    """Cross-entropy of the pixels that are not ignored."""
    total = F.cross_entropy(maps, labels.long(), ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def depth_loss(maps, depth):
    """Mean absolute difference of log depth where it is known."""
    known = depth > 0
    log_depth = depth.clamp(min=1e-3).log()
    difference = (maps[:, 0] - log_depth)[known]
    return difference.abs().sum() / max(1, len(difference))


def count_pairs(truth, guess, classes):
    """Counts [true class, predicted class] of the pixels that are not ignored."""
    known = truth >= 0
    pairs = truth[known].long() * classes + guess[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(confusion):
    """Intersection over union of each class [C], from counts [true class, predicted class].

    NaN for a class that the truth does not show.
    """
    hits = confusion.diag().double()
    truth = confusion.sum(1)
    union = truth + confusion.sum(0) - hits
    return torch.where(truth > 0, hits / union, math.nan)


def depth_errors(guess, truth):
    """{"RMSE" (m), "AbsRel", "delta1" (%)} over the pixels whose true depth is known."""
    known = truth > 0
    guess = guess[known].double()
    truth = truth[known].double()
    error = guess - truth
    ratio = torch.maximum(guess / truth, truth / guess)
    rmse = error.square().mean().sqrt()
    abs_rel = (error.abs() / truth).mean()
    delta1 = 100 * (ratio < 1.25).double().mean()
    return {"RMSE": rmse.item(), "AbsRel": abs_rel.item(), "delta1": delta1.item()}


def image_and_truth(folder):
    """The first two columns of the picture: images, and targets as they are."""
    images = [np.array(data.load_image(path)) for path in folder.paths[:EXAMPLES]]
    return {"image": images, "truth": folder.targets[:EXAMPLES]}


def picture_of_columns(args, columns):
    """Write {caption: pictures}, a column each. Returns the path."""
    rows = list(zip(*columns.values()))
    return data.contact_sheet(rows, output_path(args, ".png"), list(columns), 256)


# ---- Pictures of features --------------------------------------------------------------------------------

def command_pca(args):
    models = load_models(args)
    images = sample_images(args, models, 2)
    print("wrote", data.pca_sheet(models.student, models.teachers, images, output_path(args, ".png")))


def command_spectrum(args):
    models = load_models(args)
    images = sample_images(args, models, 8)
    extractors, _ = study_rows(models, args.seed)
    panels = {}
    rows = {}
    for name, extractor in extractors.items():
        share = explained_variance(extractor(images)["patch"])
        components = list(range(1, len(share) + 1))
        title = "through projectors" if name.startswith("through") else "encoders"
        panel = panels.setdefault(f"share of variance by components: {title}", {})
        panel[name] = components, share.tolist()
        rows[name] = {"dimensions": str(len(share))}
        for percent in (50, 90, 99):
            needed = 1 + int((share < percent / 100).sum())
            rows[name][f"{percent} % of variance"] = str(needed)
    picture = data.line_plot(output_path(args, ".png"), panels)
    write_results(args, rows, picture, image_size=models.image_size, curves=panels)


def explained_variance(features):
    """Cumulative share [D] of the variance of features [n, N, D] that their principal components explain."""
    flat = features.double().flatten(0, -2).cpu()
    covariance = torch.cov(flat.T, correction=0)
    variances = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0)
    return variances.cumsum(0) / variances.sum().clamp(min=1e-30)


def command_alignment(args):
    if not args.run:
        raise UserError("alignment needs --run FOLDER")
    lines = [line for line in read_log(args.run) if "held_out" not in line]
    names = []
    if lines:
        names = [name for name, value in lines[0].items() if isinstance(value, dict)]
    if len(names) < 2 or len(lines) < 5:
        raise UserError(f"{args.run}/log.jsonl has {len(lines)} lines of {len(names)} teachers; "
                        "alignment needs at least 5 lines of 2 teachers")
    losses = []
    for name in names:
        losses.append([line[name]["loss"] for line in lines])
    changes = np.diff(np.array(losses, float))  # [teachers, lines - 1]
    changes = changes[:, np.isfinite(changes).all(0)]
    if changes.shape[1] < 4 or not np.ptp(changes, 1).all():
        raise UserError(f"{args.run}/log.jsonl: alignment needs losses that change and are finite")
    correlation = np.corrcoef(changes)
    window = max(4, changes.shape[1] // 8)
    curves = {}
    for i in range(len(names)):
        for j in range(i):
            curves[f"{names[j]} and {names[i]}"] = moving_correlation(changes[i], changes[j], window)
    rows = {}
    for name, row in zip(names, correlation):
        rows[name] = dict(zip(names, row.tolist()))
    panels = {f"correlation of loss changes, {window} lines of the log": curves}
    picture = data.line_plot(output_path(args, ".png"), panels)
    write_results(args, rows, picture, curves=curves)


def moving_correlation(x, y, window):
    """(first lines, correlations) of every `window` consecutive changes."""
    starts = list(range(len(x) - window + 1))
    correlations = []
    for start in starts:
        part = slice(start, start + window)
        matrix = np.corrcoef(x[part], y[part])
        correlations.append(matrix[0, 1].item())
    return starts, correlations


# ---- Matches of two photographs --------------------------------------------------------------------------

def command_match(args):
    models = load_models(args)
    photos = [data.load_image(path) for path in args.photos]
    images = [data.fit_image(photo, models.image_size, models.patch_size) for photo in photos]
    pictures = []
    rows = {}
    for name, extractor in models.extractors.items():
        descriptors = [extractor(image[None])["patch"][0] for image in images]
        index1, index2, similarity = mutual_nearest(*descriptors)
        rows[name] = {"matches": str(len(index1)), "mean cosine": similarity.mean().item()}
        best = similarity.argsort(descending=True)
        shown = best[::max(1, len(best) // 50)]
        places = []
        for image, index in ((images[0], index1), (images[1], index2)):
            centers = patch_centers(image, models.patch_size)
            places.append(centers[index[shown].cpu()])
        pictures.append(draw_matches(images, places, name))
    picture = Image.fromarray(np.concatenate(pictures))
    path = data.save_png(picture, output_path(args, ".png"))
    write_results(args, rows, path, image_size=models.image_size)


def mutual_nearest(a, b):
    """Rows of a [n, D] and b [m, D] that are each other's nearest neighbor by cosine similarity.

    Returns (index into a, index into b, similarity), [matches] each.
    """
    a = F.normalize(a, dim=-1)
    b = F.normalize(b, dim=-1)
    similarity = a @ b.T  # [n, m]
    nearest_b = similarity.argmax(1)
    nearest_a = similarity.argmax(0)
    index_a = torch.arange(len(a), device=a.device)
    mutual = nearest_a[nearest_b] == index_a
    index_a = index_a[mutual]
    index_b = nearest_b[mutual]
    return index_a, index_b, similarity[index_a, index_b]


def patch_centers(image, patch_size):
    """[N, 2]: (x, y) in pixels of the patches of an image [3, H, W]."""
    rows, cols = dune.token_grid(image, patch_size)
    y = torch.arange(rows).repeat_interleave(cols)
    x = torch.arange(cols).repeat(rows)
    return patch_size * (torch.stack([x, y], 1) + 0.5)


def draw_matches(images, places, caption, side=480):
    """Two images, uint8 [3, H, W], side by side with lines from places in one to places in the other.

    places: pixels (x, y) [n, 2] in each image. Returns uint8 [h, w, 3].
    """
    photos = []
    scaled = []
    for image, pixels in zip(images, places):
        photo = to_pil(image)
        scale = side / max(photo.size)
        width = max(1, round(photo.width * scale))
        height = max(1, round(photo.height * scale))
        photos.append(photo.resize((width, height)))
        scaled.append((pixels * scale).tolist())
    left, right = photos
    offset = left.width + 8
    sheet = Image.new("RGB", (offset + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (offset, 0))
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 6), caption, "white", font_size=18, stroke_width=2, stroke_fill="black")
    for k, ((x1, y1), (x2, y2)) in enumerate(zip(*scaled)):
        color = data.COLORS[k % len(data.COLORS)]
        draw.line((x1, y1, offset + x2, y2), color)
        draw.circle((x1, y1), 3, outline=color, width=2)
        draw.circle((offset + x2, y2), 3, outline=color, width=2)
    return np.array(sheet)


# ---- Two photographs to 3D -------------------------------------------------------------------------------
# Points are in meters in a camera's frame: x right, y down, z forward. The principal point is the center.

@dataclass
class Reconstruction:
    """Two views in 3D. All tensors are on the CPU."""
    points: list         # of each view in camera 1's frame, fp64 [H, W, 3]
    confidence: list     # of each view, fp64 [H, W], > 1
    focals: list         # of each view, pixels
    pose: torch.Tensor   # [4, 4]: camera 2 in camera 1's frame
    residual: float      # meters: median distance of view 2's points in both frames after the fit


def command_two_view(args):
    photos = [data.load_image(path) for path in args.photos]
    model = teachers.load_two_view(args.weights, args.device)
    longest = args.image_size
    if not longest:  # MASt3R: 512; DUNE-MASt3R, which has its own norm: as DUNE
        longest = model.encoder.grid * model.patch_size if model.norm else 512
    images = [data.fit_image(photo, longest, model.patch_size) for photo in photos]
    result = reconstruct(model, images, args.device)
    for path, focal, image in zip(args.photos, result.focals, images):
        height, width = image.shape[1:]
        field_of_view = 2 * math.degrees(math.atan(width / 2 / focal))
        print(f"{path}: focal length {focal:.1f} px at {width}x{height}, field of view {field_of_view:.1f}°")
    angle = rotation_angle(result.pose[:3, :3])
    distance = result.pose[:3, 3].norm()
    print(f"camera 2 in camera 1's frame: rotated by {angle:.2f}°, moved by {distance:.3f} m")
    print(f"view 2's points in both frames fit to {result.residual:.3f} m (median)")
    print(np.array2string(result.pose.numpy(), precision=4, suppress_small=True))
    cloud = write_point_cloud(output_path(args, ".ply"), images, result)
    print("wrote", cloud, two_view_picture(output_path(args, ".png"), images, result))


@torch.no_grad()
def reconstruct(model, images, device):
    """A Reconstruction of two uint8 images [3, H, W] by a teachers.TwoView."""
    image1, image2 = [image[None].to(device) / 127.5 - 1 for image in images]
    view1, view2 = [to_cpu(view) for view in model(image1, image2)]
    own_view2 = to_cpu(model(image2, image1)[0])  # view 2 in camera 2's frame
    own_points = own_view2["pts3d"].flatten(0, 1)
    points = view2["pts3d"].flatten(0, 1)
    weight = own_view2["conf"] * view2["conf"]
    rotation, translation = rigid_fit(own_points, points, weight.flatten())
    pose = torch.eye(4, dtype=torch.double)
    pose[:3, :3] = rotation
    pose[:3, 3] = translation
    residuals = own_points @ rotation.T + translation - points
    return Reconstruction(
        points=[view1["pts3d"], view2["pts3d"]],
        confidence=[view1["conf"], view2["conf"]],
        focals=[estimate_focal(view["pts3d"], view["conf"]) for view in (view1, own_view2)],
        pose=pose,
        residual=residuals.norm(dim=-1).median().item(),
    )


def to_cpu(view):
    """One view of a TwoView's output without the batch dimension, fp64 on the CPU."""
    return {name: x[0].double().cpu() for name, x in view.items()}


def estimate_focal(points, confidence, steps=10):
    """Focal length in pixels of a point map [H, W, 3] in its own camera's frame.

    Minimizes the sum of confidence * |pixel - focal * (x / z, y / z)| by Weiszfeld's steps, as DUSt3R does.
    """
    height, width = confidence.shape
    x = torch.arange(width) + 0.5 - width / 2
    y = torch.arange(height) + 0.5 - height / 2
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [H, W, 2]
    ahead = points[..., 2] > 1e-6
    pixels = pixels[ahead].double()
    rays = points[ahead][:, :2] / points[ahead][:, 2:]
    pixel_ray = (pixels * rays).sum(-1)
    ray_ray = rays.square().sum(-1)
    weight = confidence[ahead]
    for _ in range(steps):
        focal = (weight * pixel_ray).sum() / (weight * ray_ray).sum()
        distance = (pixels - focal * rays).norm(dim=-1)
        weight = confidence[ahead] / distance.clamp(min=1e-6)
    if not focal > 0:
        raise UserError("no camera sees the points like this: does the decoder fit these photographs?")
    return focal.item()


def rigid_fit(a, b, weight):
    """Rotation R [3, 3] and translation t [3] that minimize the sum of weight * |R a + t - b|^2 (Kabsch).

    a, b [n, 3]; weight [n]. With points of one view in two frames: the relative pose, DUSt3R section 3.3.
    """
    weight = (weight / weight.sum())[:, None]
    center_a = (weight * a).sum(0)
    center_b = (weight * b).sum(0)
    covariance = (weight * (b - center_b)).T @ (a - center_a)
    u, _, vt = torch.linalg.svd(covariance)
    sign = torch.ones(3, dtype=a.dtype)
    sign[2] = torch.linalg.det(u @ vt)  # -1: a reflection would fit better, but is no rotation
    rotation = u * sign @ vt
    return rotation, center_b - rotation @ center_a


def rotation_angle(rotation):
    """Degrees by which a rotation [3, 3] turns."""
    cosine = (rotation.trace() - 1) / 2
    return torch.rad2deg(cosine.clamp(-1, 1).acos()).item()


def write_point_cloud(path, images, result):
    """Write the more confident points of both views with their colors, binary PLY. Returns the path."""
    points = []
    colors = []
    for image, view, confidence in zip(images, result.points, result.confidence):
        keep = confidence >= confidence.median().clamp(max=1.5)
        points.append(view[keep])
        colors.append(image.permute(1, 2, 0)[keep])
    count = sum(map(len, points))
    vertices = np.empty(count, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"] = torch.cat(points)
    vertices["rgb"] = torch.cat(colors)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header += ["end_header", ""]
    with data.atomic_write(path) as file:
        file.write("\n".join(header).encode() + vertices.tobytes())
    return path


def two_view_picture(path, images, result):
    """Write both images with depth (near is warm) and confidence (high is warm). Returns the path."""
    rows = []
    for image, points, confidence in zip(images, result.points, result.confidence):
        depth = points[..., 2].clamp(min=1e-3)
        rows.append([image, percentile_colors(depth), percentile_colors(1 / confidence)])
    return data.contact_sheet(rows, path, ["image", "depth", "confidence"], 336)


def percentile_colors(values):
    low, high = np.percentile(values, (2, 98))
    return data.depth_colors(values, low, high)


# ---- Export ----------------------------------------------------------------------------------------------

HF_KEYS = {  # DINOv2's keys -> those of transformers
    r"^(cls_token|register_tokens|mask_token)$": r"embeddings.\1",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.ls(\d)\.gamma$": r".layer_scale\1.lambda1",
    r"^norm\.": "layernorm.",
}


def command_export(args):
    path = f"{args.run}/checkpoint.pt" if args.run else args.checkpoint
    if not path:
        raise UserError("specify a model: --run or --checkpoint")
    encoder = dune.load(path, encoder_only=True)
    size = encoder.grid * encoder.patch_size
    shape = (f"img_size={size}, patch_size={encoder.patch_size}, embed_dim={encoder.embed_dim}, "
             f"depth={len(encoder.blocks)}, num_heads={encoder.num_heads}")
    state = dinov2_state(encoder)
    folder = args.out or output_path(args, "")
    path = os.path.join(folder, "model.safetensors")
    if args.to == "hf":
        write_safetensors(path, hf_state(state))
        for name, content in hf_configs(encoder, size).items():
            write_json(os.path.join(folder, name), content)
        call = f"transformers.AutoModel.from_pretrained({folder!r})"
    elif args.to == "timm":
        write_safetensors(path, timm_state(state))
        call = (f"timm.create_model('vit_base_patch14{'_reg4' * bool(encoder.registers)}_dinov2', {shape}, "
                f"reg_tokens={encoder.registers}, checkpoint_path={path!r})")
    else:
        path = os.path.join(folder, "model.pth")
        with data.atomic_write(path) as file:
            torch.save(state, file)
        call = (f"dinov2.models.vision_transformer.DinoVisionTransformer({shape}, init_values=1.0, "
                f"num_register_tokens={encoder.registers}, block_chunks=0) and load_state_dict")
    print(f"wrote {path}\nopen it by {call}")
    if args.to != "dinov2":
        print(f"Its features are the student's at {size}x{size}. At other sizes they are some percent off, "
              "because that code resizes positions in another way.")


def dinov2_state(encoder):
    """A ViT's state dict as DINOv2's own code knows it: with a mask token, and LayerScale in any case."""
    state = {**encoder.state_dict(), "mask_token": torch.zeros(1, encoder.embed_dim)}
    for i in range(len(encoder.blocks)):
        for name in ("ls1", "ls2"):
            state.setdefault(f"blocks.{i}.{name}.gamma", torch.ones(encoder.embed_dim))
    return state


def timm_state(state):
    """Changes `state`. With registers timm has positions of patches only; the class token holds its own."""
    state.pop("mask_token")
    if "register_tokens" in state:
        cls_position, state["pos_embed"] = state["pos_embed"].tensor_split([1], 1)
        state["cls_token"] = state["cls_token"] + cls_position
        state["reg_token"] = state.pop("register_tokens")
    return state


def hf_state(state):
    """Under the keys of transformers, which keeps q, k and v in three tensors."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in HF_KEYS.items():
            key = re.sub(pattern, replacement, key)
        keys = [key]
        if ".attn.qkv." in key:
            keys = [key.replace("attn.qkv", f"attention.attention.{x}") for x in ("query", "key", "value")]
        renamed.update(zip(keys, value.chunk(len(keys))))
    return renamed


def hf_configs(encoder, size):
    """{name of a file: its content}. What is not said is as in the defaults of transformers."""
    config = {
        "model_type": "dinov2_with_registers" if encoder.registers else "dinov2",
        "image_size": size,
        "patch_size": encoder.patch_size,
        "num_register_tokens": encoder.registers,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
    }
    preprocessor_config = {
        "image_processor_type": "BitImageProcessor",
        "size": size,
        "crop_size": size,
        "image_mean": data.IMAGENET_MEAN,
        "image_std": data.IMAGENET_STD,
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor_config}


def write_safetensors(path, tensors):
    """Write {name: fp32 tensor}, see dune.load_safetensors."""
    header = {"__metadata__": {"format": "pt"}}
    content = bytearray()
    for name, x in tensors.items():
        begin = len(content)
        content += x.numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": (begin, len(content))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with data.atomic_write(path) as file:
        file.writelines([len(text).to_bytes(8, "little"), text, content])


# ---- Tables and files ------------------------------------------------------------------------------------

def write_results(args, rows, picture=None, spread=None, **more):
    """The end of a command: print the table, write the JSON file."""
    print_table(rows, spread)
    if more.get("own_heads"):
        print("the head that each teacher was trained with, unchanged, on the teacher and on the student")
        print_table(more["own_heads"])
    path = output_path(args, ".json")
    content = {"command": args.command, "results": rows, "spread": spread, **more}
    content = json.loads(json.dumps(content), parse_constant=lambda word: None)  # NaN is not JSON
    write_json(path, content)
    print("wrote", *filter(None, (path, picture)))


def write_json(path, content):
    with data.atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def print_table(rows, spread=None):
    """Print {row: {column: number or text}}, aligned. spread: the same shape, printed after a ±."""
    names = {}  # in the order of their first appearance
    for row in rows.values():
        names.update(dict.fromkeys(row))
    lines = {name: [name] for name in rows}
    header = [""]
    for name in names:
        header.append(name)
        for line, cell in zip(lines.values(), column_cells(name, rows, spread or {})):
            line.append(cell)
    table = [header, *lines.values()]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print(first.ljust(widths[0]), *aligned, sep="  ")


def column_cells(column, rows, spread):
    """The cells of one column as text; all numbers have the same number of digits."""
    values = [row.get(column, "-") for row in rows.values()]
    numbers = [abs(value) for value in values if not isinstance(value, str)]
    largest = max(numbers, default=0)
    digits = 3 if largest < 2 else 2 if largest < 10 else 1
    cells = []
    for name, value in zip(rows, values):
        cell = value if isinstance(value, str) else f"{value:.{digits}f}"
        around = spread.get(name, {}).get(column)
        if around:
            cell += f" ±{around:.{digits}f}"
        cells.append(cell)
    return cells


def output_path(args, suffix):
    """Where a command writes: --out, or the command's name in the run's folder or here."""
    stem = re.sub(r"\.(png|json|ply)$", "", args.out or "")
    if not stem or stem.endswith("/"):
        folder = stem or getattr(args, "run", None) or "."
        stem = os.path.join(folder, args.command)
    return stem + suffix


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help,
                                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_options(subparser, command.options)
        if command.photos:
            subparser.add_argument("photos", nargs=command.photos, metavar="PHOTO")
    args = parser.parse_args(argv)
    if "device" in args:
        args.device = pick_device(args.device)
    data.check_writable(os.path.dirname(output_path(args, "")) or ".")
    function = globals()[f"command_{args.command.replace('-', '_')}"]
    function(args)


if __name__ == "__main__":
    run_main(main)
