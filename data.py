"""Images: where they lie, in which order they are drawn, and how they reach the networks.

    python data.py --data dinov2=/d/in19k,/d/gldv2@0.5 --data mast3r=/d/habitat.tar   # what is there? + a contact sheet
    python data.py --bench                                                            # images/s of each stage

The file follows an image on its way: `parse_data` gives sources to teachers, `Order` decides when an image is drawn,
`decode` and `crop_resize` make it uint8, `batches` hands out balanced batches, `augment` colours them on the device.
Then come the procedural scenes, and the index by which a source knows its files.
"""

import array
import collections
import colorsys
import contextlib
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import stat
import sys
import tarfile
import time
import timeit
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, default_collate

import dune
from dune import Oops, option

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHARING = ("all", "own", "own+generic")
TEST_SCENES = 10**9  # seeds of procedural scenes from here on are never trained on
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()  # not on Windows: there the main process does all

# ---- Sources ---------------------------------------------------------------------------------------------------------

def whole(width, height):
    """A crop, (width, height) -> box (x0, y0, x1, y1), that takes all."""
    return 0, 0, width, height

class Source:
    """Where images come from, and all that is asked of it. A new kind needs `count`, `read` and an entry in SOURCES.

    spec: as written behind --data; weight: 0.5 draws its images half as often as their number says; count: of images.
    """

    def __init__(self, spec, weight=1.0):
        self.spec, self.weight = spec, weight

    def read(self, i, size=0, crop=whole):
        """(image i as upright PIL RGB image, the box in it that crop(width, height) takes). Oops if it cannot be read.

        size: the side to which that box will be resized, 0 if unknown."""
        raise NotImplementedError

    def prepare(self, size):
        """Called before worker processes start that read at this size."""

    def held_out(self, count):
        """A source of `count` images that no run trains on; itself if there is none."""
        return self

class Files(Source):
    """A folder, a tar archive, or a text file of paths. turn: images with this word in their path turn by -90°."""

    def __init__(self, spec, weight=1.0, turn=None):
        super().__init__(spec, weight)
        self.turn = turn
        root = os.path.realpath(spec)
        if not root.isprintable():
            raise Oops(f"{spec}: its folder has a name that is no text in UTF-8; rename it")
        if not os.path.exists(root):
            raise Oops(f"{spec} does not exist (a source is a folder, a .tar, a .txt list or scenes:NAME)")
        if not os.path.isdir(root) and not dune.regular(root).endswith((".tar", ".txt")):
            raise Oops(f"{spec} is neither a folder nor a .tar archive nor a .txt list of paths")
        self.index = open_index(root)
        self.count = len(self.index.images)

    def read(self, i, size=0, crop=whole):
        path, archive, offset, length = self.index.find(i)
        try:
            with open(dune.regular(archive or path), "rb") as file:
                if archive:
                    file.seek(offset)
                    file = io.BytesIO(file.read(length))
                return decode(file, size, crop, turn=self.turn is not None and self.turn in path)
        except Exception as error:  # Pillow's plugins raise nearly everything
            raise Oops(f"{path}: {reason(error)}") from None

class Scenes(Source):
    """`scenes:NAME[:START-STOP]`: procedural images, i of seed START + i; without end unless STOP is given."""

    def __init__(self, spec, weight=1.0):
        super().__init__(spec, weight)
        parts = re.fullmatch(r"scenes:(\w+)(?::(\d{1,18})-(\d{1,18}))?", spec)
        if not parts or parts[1] not in SCENES:
            raise Oops(f"{spec}: write scenes:NAME or scenes:NAME:START-STOP (seeds), NAME one of {', '.join(SCENES)}")
        self.kind = parts[1]
        self.start = int(parts[2] or 0)
        self.count = int(parts[3] or TEST_SCENES) - self.start
        self.kept = {}  # {size: images uint8 [count, size, size, 3]}
        if self.count < 1:
            raise Oops(f"{spec} holds no images: START must be less than STOP")

    def prepare(self, size):
        """Draws a source of at most 192 MB once and for all; the worker processes then share it."""
        if 3 * self.count * size**2 <= 192e6 and size not in self.kept:
            scenes = labelled_scenes(self.kind, self.start, self.count, size, keys=("image",))
            self.kept = {size: scenes["image"].permute(0, 2, 3, 1).numpy()}

    def read(self, i, size=0, crop=whole):
        size = size or 224
        pixels = self.kept[size][i] if size in self.kept else SCENES[self.kind](self.start + i, size)["image"]
        return Image.fromarray(pixels), crop(size, size)

    def held_out(self, count):
        return Scenes(f"scenes:{self.kind}:{TEST_SCENES}-{TEST_SCENES + count}")

SOURCES = {"scenes:": Scenes}  # by how a spec begins; all others are Files

# ---- Which teacher learns from which source --------------------------------------------------------------------------

@dataclass
class Group:
    """Sources that belong together: every group has an equal part of every batch."""
    name: str
    sources: list
    teachers: tuple  # names of the owners
    generic: bool = False  # an owner's data shows everything there is, see --sharing own+generic

    @property
    def count(self):
        return sum(source.count for source in self.sources)

def open_source(spec):
    """`path[@turn:WORD][@WEIGHT]` -> Source. Oops if there is nothing to open."""
    path, weight, turn = re.fullmatch(r"(.*?)(?:@(\d*\.?\d+)|@turn:([^@]+))*", spec.strip()).groups()
    weight = float(weight or 1)
    if not 0 < weight < 1e9:
        raise Oops(f"{spec}: a weight is a number above 0, such as @0.5")
    for prefix, kind in SOURCES.items():
        if path.startswith(prefix):
            if turn:
                raise Oops(f"{spec}: @turn:{turn} is for files, which have a path")
            return kind(path, weight)
    return Files(path, weight, turn)

def data_lines(spec):
    """The lines of a data file, without comments; [spec] if it is none: a line itself, or a list of images."""
    if not is_list(spec):
        return [spec]
    lines = text_lines(spec, r"(^|\s)#.*")
    first = next(lines, "")
    file_there = os.path.isfile(os.path.join(os.path.dirname(spec), first))  # in a list, an image has any name
    if first.lower().endswith(SUFFIXES) or file_there and not first.endswith((".tar", ".txt")) or not first:
        return [spec]
    return [first, *lines]

def text_lines(path, comment):
    """The lines of a text file, one by one, without comments and empty ones. Oops if one is no text."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = re.sub(comment, "", line).strip()
            if not line.isprintable():
                raise Oops(f"{path}: line {number} is no text in UTF-8 (a list of images has a path in each)")
            if line:
                yield line

def is_list(path):
    return path.endswith(".txt") and os.path.isfile(path)

def parse_data(specs, teachers, seeds=""):
    """[Group] that `--data` describes: `teacher=source,source…`, sources for all, or a text file of such lines.

    specs: list of str; empty: each teacher learns from the procedural scenes of its domain (seeds: ":START-STOP").
    teachers: {name: row}, a row has `domain` (of SCENES) and `generic` (bool). Opens all indexes.
    Oops if a source is missing, empty or broken, or if names and teachers do not fit.
    """
    wanted = {}  # {name of a group: (its teachers, specs of its sources)}
    for line in itertools.chain.from_iterable(map(data_lines, specs)):
        owner, sources = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", line).groups()
        if owner and owner not in teachers:
            raise Oops(f"--data names {owner}, which is not one of --teachers {','.join(teachers)}")
        owners = [owner] if owner else list(teachers)
        for spec in filter(str.strip, sources.split(",")):
            wanted.setdefault(owner or "shared", (owners, []))[1].append(spec)
    if not specs:
        for name, row in teachers.items():
            wanted.setdefault(row.domain, ([], [f"scenes:{row.domain}{seeds}"]))[0].append(name)
    provided = {name for owners, _ in wanted.values() for name in owners}
    poor = [name for name in teachers if name not in provided]
    if poor:
        raise Oops(f"--data has no images for {', '.join(poor)}: "
                   f"add --data {poor[0]}=PATH, or a PATH without a name for all teachers")
    groups = []
    for name, (owners, specs) in wanted.items():
        sources = [open_source(spec) for spec in specs]
        groups.append(Group(name, sources, tuple(owners), any(teachers[owner].generic for owner in owners)))
        endless = [source.spec for source in sources if source.count >= TEST_SCENES]
        if endless and len(sources) > 1:  # sources count by size: it would drown the others
            raise Oops(f"{endless[0]} has no end and cannot be mixed with others: say how many, {endless[0]}:0-100000")
    return groups

def teacher_mask(groups, teachers, sharing):
    """bool [groups, teachers], CPU: which teacher teaches which group's images under --sharing, one of SHARING."""
    def teaches(teacher, group):
        return sharing == "all" or teacher in group.teachers or sharing == "own+generic" and group.generic
    return torch.tensor([[teaches(teacher, group) for teacher in teachers] for group in groups])

# ---- Order: which image is drawn when, a pure function ---------------------------------------------------------------

def mix(*numbers):
    """A 64-bit hash of integers (the finaliser of splitmix64, chained)."""
    h = 0
    for n in numbers:
        h = (h ^ n) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h

def shuffled(i, n, *key):
    """Place i of a pseudo-random permutation of range(n), without holding it: a Feistel network on a power of 4."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:  # walk until the place is in range again
        left, right = i >> half, i & mask
        for r in range(4):
            left, right = right, left ^ mix(right, r, *key) & mask
        i = left << half | right
        if i < n:
            return i

class Order:
    """The endless order of one group: `order(n)` -> (source, image) of draw n.

    A table of sources, as often as size * weight says, repeats for ever; within a source, pass follows pass, each in an
    order of its own, so no image comes twice before its source is through. shuffle=False: each source as it is indexed.
    """
    TABLE = 1 << 20

    def __init__(self, group, seed, shuffle=True):
        self.seed, self.shuffle = seed, shuffle
        self.counts = [source.count for source in group.sources]
        share = np.array([source.count * source.weight for source in group.sources])
        if any(source.weight != 1 for source in group.sources) or share.sum() > self.TABLE:
            share = share / share.sum() * self.TABLE
        quota = np.maximum(1, np.round(share)).astype(np.int64) if len(share) > 1 else 1
        self.table = np.repeat(np.arange(len(share), dtype=np.int32), quota)
        np.random.default_rng((seed, 1)).shuffle(self.table)
        self.places = [np.flatnonzero(self.table == source) for source in range(len(share))]

    def __call__(self, n):
        turn, place = divmod(n, len(self.table))
        source = int(self.table[place])
        places = self.places[source]
        draw = turn * len(places) + int(np.searchsorted(places, place))
        epoch, i = divmod(draw, self.counts[source])
        return source, shuffled(i, self.counts[source], self.seed, source, epoch) if self.shuffle else i

# ---- Decode, crop, resize: on the CPU, to uint8 ----------------------------------------------------------------------

MAX_PIXELS = 90_000_000  # more than this is never held in memory
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
           7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by EXIF orientation
SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # width and height change places
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit, which knows of reduced scale
warnings.filterwarnings("ignore", module="PIL")

def reason(error):
    """An exception of opening or decoding, in few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__

def to_rgb(image):
    """Any mode as RGB: 16-bit and float are scaled to 8 bits, transparency is laid on white."""
    if image.mode[0] in "IF":
        values = np.asarray(image, np.float32)
        top = 65535 if image.mode[0] == "I" else max(float(values.max()), 1e-12)
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    elif image.mode != "RGB" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def decode(file, size=0, crop=whole, turn=False):
    """The first frame of an image file, upright, turned by -90° if asked, RGB, with the crop's box in its pixels.

    crop is asked with the full size; size: the side to which its box will be resized. A JPEG is decoded at 1/2, 1/4 or
    1/8 as long as the box keeps twice that side: the difference stays below that of two good resampling filters.
    """
    image = Image.open(file, formats=FORMATS)
    jpeg = image.format in ("JPEG", "MPO")
    pixels = image.width * image.height
    if pixels > MAX_PIXELS * (64 if jpeg and not image.info.get("progressive") else 1):
        raise Oops(f"{image.width} x {image.height} pixels are too many")
    turns = []
    with contextlib.suppress(Exception):  # no EXIF, or a broken one in a whole picture
        turns.append(UPRIGHT[image.getexif()[0x0112]])
    if turn:
        turns.append(TURN.ROTATE_270)
    lying = sum(step in SIDEWAYS for step in turns) == 1
    width, height = image.size[::-1] if lying else image.size
    box = crop(width, height)
    short = min(box[2] - box[0], box[3] - box[1])
    shrink = 1
    while jpeg and shrink < 8 and (size and short >= 4 * shrink * size or pixels > MAX_PIXELS * shrink**2):
        shrink *= 2
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image = to_rgb(image)
    for step in turns:
        image = image.transpose(step)
    box = [round(v * n / full) for v, n, full in zip(box, image.size * 2, (width, height) * 2)]
    return image, [min(v, limit) for v, limit in zip(box, (image.width - 1, image.height - 1, *image.size))]

def load_image(path):
    """A picture file as upright PIL RGB image (a JPEG above 90 megapixels at reduced scale). Oops if it is none."""
    try:
        with open(dune.regular(path), "rb") as file:
            return decode(file)[0]
    except Exception as error:
        raise Oops(f"cannot read the image {path}: {reason(error)}") from None

def crop_resize(image, box, height, width):
    """The box of a PIL RGB image, resized (bicubic, antialiased): uint8 [3, height, width]."""
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]

def centre(width, height):
    """The largest centred square."""
    return middle(width, height, min(width, height), min(width, height))

def middle(width, height, w, h):
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h

def random_crop(width, height, rng, scale):
    """torchvision's random resized crop: area in `scale` (of the image's), aspect in 3/4..4/3 (log-uniform)."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * 4 / 3)))  # a very long image: its centre
    h = min(height, max(1, round(width * 4 / 3)))
    return middle(width, height, w, h)

def fit_image(image, longest, multiple):
    """The whole picture, longest side at most `longest`, both sides multiples of `multiple` (aspect kept that far):
    uint8 [3, h, w]."""
    def fit(side):
        steps = round(side * longest / max(image.size) / multiple)
        return min(max(1, steps), max(1, longest // multiple)) * multiple
    return crop_resize(image, whole(*image.size), fit(image.height), fit(image.width))

# ---- Colour: on the device, batched, each image with parameters of its own -------------------------------------------
# One row of parameters per image, drawn in the worker: the operations of the colour jitter in their order (-1: none),
# their factors, then greyscale (0/1), sigma of the blur (0: none), solarise (0/1).

NO_COLOUR = (-1, -1, -1, -1, 1, 1, 1, 0, 0, 0, 0)

def draw_colour(rng, share=1.0):
    """The recipe's random colour augmentation of one image, float32 [11]; only `share` of the images get any."""
    p = np.array(NO_COLOUR, np.float32)
    if rng.random() >= share:
        return p
    if rng.random() < 0.8:
        p[:4] = rng.permutation(4)
        p[4:8] = [rng.uniform(*limits) for limits in ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))]
    p[8] = rng.random() < 0.2
    p[9] = rng.uniform(0.1, 5.0) * (rng.random() < 0.2)
    p[10] = rng.random() < 0.2
    return p

@functools.cache
def constant(values, device):
    """A row of numbers as [n,1,1] on a device, made once: each copy to a GPU would wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)

def grey(x):
    return x[:, :1] * 0.2989 + x[:, 1:2] * 0.587 + x[:, 2:] * 0.114

def shift_hue(x, turn):
    """x [n,3,H,W] in [0,1], turn [n,1,1,1] in full turns of the colour circle. Value and chroma stay."""
    r, g, b = x.split(1, 1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    hue = torch.where(value == g, (b - r) * scale + 2, (r - g) * scale + 4)  # in sixths of a turn
    hue = torch.where(value == r, (g - b) * scale, hue)
    k = hue.add_(6 * turn) + constant((5.0, 3.0, 1.0), x.device)
    k -= torch.floor(k / 6).mul_(6)
    return value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)

def blur(x, sigma):
    """Gaussian blur, kernel 9, reflected at the border, as nine shifted sums a direction: plain fp32 everywhere."""
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, device=x.device) / sigma) ** 2)  # sigma [n,1,1,1] -> [n,1,1,9]
    taps = (taps / taps.sum(-1, keepdim=True)).split(1, -1)
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")
    for dim in (2, 3):
        size = x.shape[dim] - 8
        y = x.narrow(dim, 4, size) * taps[4]
        for k in range(4):
            y.addcmul_(x.narrow(dim, k, size) + x.narrow(dim, 8 - k, size), taps[k])
        x = y
    return x

OPS = (
    lambda x, f: (x * f).clamp_(0, 1),                                               # brightness
    lambda x, f: torch.lerp(grey(x).mean((2, 3), keepdim=True), x, f).clamp_(0, 1),  # contrast
    lambda x, f: torch.lerp(grey(x).expand_as(x), x, f).clamp_(0, 1),                # saturation
    shift_hue,
    lambda x, f: grey(x).repeat(1, 3, 1, 1),                                         # greyscale
    blur,
    lambda x, f: torch.where(x >= 0.5, 1 - x, x),                                    # solarise
)

def beside(x, values):
    """A numpy array as a tensor on x's device, without waiting for it."""
    values = torch.from_numpy(values)
    return values.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else values

def recolour(x, params):
    """x [n,3,H,W] in [0,1]; params [n,11] on the CPU: no step has to ask the device which images it is for."""
    params = params.numpy()
    passes = [(op, params[:, place] == op) for place in range(4) for op in range(4)]
    passes += [(op, params[:, 4 + op] > 0) for op in (4, 5, 6)]
    for op, chosen in passes:
        rows = np.flatnonzero(chosen)
        if len(rows) == 0:
            continue
        factor = beside(x, params[rows, 4 + op]).view(-1, 1, 1, 1)
        if len(rows) == len(x):
            x = OPS[op](x, factor)
        else:
            rows = beside(x, rows)
            x.index_copy_(0, rows, OPS[op](x.index_select(0, rows), factor))
    return x

def normalise(image):
    """uint8 [b,3,H,W], or float in [0,1] -> float32 with ImageNet's mean and std, on the same device."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    return image.sub(constant(IMAGENET_MEAN, image.device)).div_(constant(IMAGENET_STD, image.device))

def augment(image, params):
    """The recipe's colour augmentation and normalisation, on the image's device and without waiting for it.

    image: uint8 [b,3,H,W]; params: float32 [b,11] from `batches`, on the CPU. Returns float32 [b,3,H,W].
    """
    chunk = len(image) if image.is_cuda else 1  # one by one, they stay in a CPU's cache
    parts = zip(image.split(chunk), params.split(chunk))
    return torch.cat([normalise(recolour(x.float().div_(255), p)) for x, p in parts])

# ---- Batches ---------------------------------------------------------------------------------------------------------

def batches(groups, image_size, batch, seed=0, rank=0, world=1, start_step=0, workers=4, scale=(0.4, 1.0), colour=1.0,
            train=True):
    """Endlessly, this process's part (b = batch / world images) of each global batch from `start_step` on.

    Yields {"image": uint8 [b,3,S,S] (pinned if there is CUDA), "group": int64 [b] (index into groups), "params":
    float32 [b,11] for `augment`, "bad": ["path: reason"] of images that others of their source replace}. What step k
    holds depends on groups, image_size, batch, seed, scale and colour alone. train=False: each source in its own order,
    centre crop, no flip, no colour. Oops if world does not divide batch, or if over a tenth of what one loading process
    has read of a source is unreadable.
    """
    if batch % world:
        raise Oops(f"the global batch {batch} cannot be divided among {world} processes: choose a multiple of {world}")
    orders = [Order(group, mix(seed, g), train) for g, group in enumerate(groups)]
    asked, lost = collections.Counter(), collections.Counter()  # images by source, as each process counts them
    for group in groups:
        for source in group.sources:
            source.prepare(image_size)

    def draw(position):
        """The image at this position among all images ever."""
        n, g = divmod(position, len(groups))
        s, i = orders[g](n)
        source = groups[g].sources[s]
        rng = np.random.default_rng((seed, 2, position))
        params = draw_colour(rng, colour if train else 0)
        flip = train and rng.random() < 0.5
        crop = functools.partial(random_crop, rng=rng, scale=scale) if train else centre
        picture, reasons = read_near(source, i, image_size, crop)
        image = crop_resize(*picture, image_size, image_size)
        asked[source.spec] += 1
        lost[source.spec] += len(reasons) > 0
        return {"image": image.flip(2) if flip else image, "group": g, "params": params, "bad": reasons}

    def make(step):
        first = step * batch + rank * batch // world
        rows = [draw(position) for position in range(first, first + batch // world)]
        bad = list(itertools.chain.from_iterable(row.pop("bad") for row in rows))
        for spec, count in lost.items():
            if count > max(10, asked[spec] / 10):
                raise Oops(f"{spec}: {count} of {asked[spec]} images could not be read, more than one in ten; "
                           f"the last: {bad[-1]}")
        return {**default_collate(rows), "bad": bad}

    return stream(make, start_step, workers)

def stream(make, step, workers):
    """make(step), make(step + 1), … by worker processes; begins anew where it was if one of them is killed."""
    deaths = 0
    options = {"collate_fn": make, "pin_memory": torch.cuda.is_available()}
    if workers and CAN_FORK:
        options |= {"num_workers": workers, "multiprocessing_context": "fork", "worker_init_fn": start_worker}
    while True:
        items = iter(DataLoader(range(sys.maxsize), None, sampler=itertools.count(step), **options))
        with contextlib.suppress(ValueError):  # torch's handler would raise in the middle of the main thread's work
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for item in items:
                yield item
                step += 1
                deaths = 0
        except Oops as error:  # a worker's comes with its traceback
            raise Oops(str(error).rpartition("Oops: ")[2].strip()) from None
        except (RuntimeError, OSError, EOFError) as error:  # a killed worker breaks the pipe, or DataLoader misses it
            if not workers or "Caught" in str(error):  # an error of our own in a worker
                raise
            deaths += 1
            if deaths > 3:
                raise Oops("loading processes keep dying: take fewer --workers, or a larger /dev/shm") from None
            print(f"data: a loading process died, starting again at step {step} ({reason(error)})", file=sys.stderr)
        del items

def read_near(source, i, size, crop):
    """(what `read` gives of image i or of one after it, the reasons of those that failed). Oops if 24 fail."""
    reasons = []
    for k in range(24):
        try:  # the next one, then ever further: damage comes in runs
            return source.read((i + (1 << k >> 1)) % source.count, size, crop), reasons
        except Oops as error:
            reasons.append(str(error))
    raise Oops(f"{source.spec}: {len(reasons)} images at a stretch could not be read; the last: {reasons[-1]}")

def start_worker(_=None):
    """A worker leaves signals to the main process, which may have handlers of its own for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

# ---- Pictures --------------------------------------------------------------------------------------------------------

GAP = 6  # pixels between pictures

def contact_sheet(rows, path, columns=(), cell=None):
    """Writes pictures in a grid as PNG, on white, and returns the path.

    rows: lists of uint8 arrays or tensors, [3,h,w] or [h,w,3]; columns: captions; cell: longest side to which each
    picture is scaled (as it is, if None). Oops if the file cannot be written.
    """
    def picture(x):
        x = np.asarray(x)
        image = Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0) if x.shape[0] == 3 else x))
        scale = cell / max(image.size) if cell else 1
        return image.resize([max(1, round(side * scale)) for side in image.size])

    rows = [[picture(x) for x in row] for row in rows]
    font = ImageFont.load_default(size=14)
    lines = "\n".join(columns).split("\n")
    sizes = [image.size for row in rows for image in row] + [(math.ceil(font.getlength(line)), 0) for line in lines]
    width, height = (max(sides) + GAP for sides in zip(*sizes))  # of every cell
    top = GAP + 18 * max((text.count("\n") + 1 for text in columns), default=0)
    sheet = Image.new("RGB", (GAP + width * max(map(len, rows)), top + height * len(rows)), "white")
    for c, text in enumerate(columns):
        place = (c * width + (GAP + width) / 2, top - 4)
        ImageDraw.Draw(sheet).multiline_text(place, text, "#222", font, anchor="md", align="center")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (GAP + c * width + (width - GAP - image.width) // 2, top + r * height))
    with dune.writing(path) as file:
        sheet.save(file, "PNG", optimize=True)
    return path

def survey(source):
    """One line about a source: how many images, and from a sample their sizes and how many cannot be read."""
    sizes, broken = [], []
    for k in range(min(source.count, 100)):
        try:
            sizes.append(source.read(shuffled(k, source.count, 0))[0].size)
        except Oops as error:
            broken.append(f", such as {error}")
    line = f"{source.count:,} images, "
    if sizes:
        (w, h), (wide, high) = min(sizes, key=min), max(sizes, key=max)
        line += f"smallest {w}x{h}, largest {wide}x{high}, "
    return line + f"unreadable {len(broken)} of {len(sizes) + len(broken)}" + "".join(broken[:1])

def inspect(groups, teachers, size, path):
    """Prints what the sources hold and who learns from it; writes a contact sheet of samples, a column a group."""
    dune.check_folder(os.path.dirname(path) or ".")
    for group in groups:
        print(group.name)
        for source in group.sources:
            print(f"  {source.spec} (weight {source.weight:g}): {survey(source)}")
        for sharing in SHARING:
            mask = teacher_mask([group], teachers, sharing)[0]
            print(f"  --sharing {sharing}: {', '.join(itertools.compress(teachers, mask))}")
    item = next(batches(groups, size, 8 * len(groups), workers=0))
    rows = recolour(item["image"] / 255, item["params"])
    rows = (rows * 255).round().byte().split(len(groups))  # position p is of group p % G
    contact_sheet(rows, path, [group.name for group in groups], min(size, 168))
    print(f"wrote {path}: samples as the networks see them")

# ---- The procedural scenes -------------------------------------------------------------------------------------------
# Three domains that differ as the real ones do, seeded and endless, labelled by the drawing: SCENES[domain](seed, size)
# gives a dict of numpy arrays. Geometry is in fractions of the side or in metres: a seed gives the same picture at any
# size. Pictures are planes [3,S,S] in 0..1, fp32: random numbers are Python's floats, which leave fp32 arrays fp32.
# Another order of the calls that draw them would give other pictures.

TAU = 2 * math.pi

def noise_table(n=512):
    """[n,n] smooth tileable noise in 0..1: white noise whose spectrum falls as frequency^-1.7."""
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]) * n
    white = np.fft.rfft2(np.random.default_rng(0).normal(size=(n, n)))
    smooth = np.fft.irfft2(white / np.maximum(frequency, 5) ** 1.7, s=(n, n))
    return np.clip(0.5 + smooth / smooth.std() / 5, 0, 1).astype(np.float32)

NOISE = noise_table()

def noise(u, v):
    return NOISE[(v * 64).astype(np.int32) & 511, (u * 64).astype(np.int32) & 511]

def bricks(u, v):
    row = np.floor(v)
    u = u / 2 + row / 2
    u = np.abs(u - np.floor(u) - 0.5)
    return 3 - 8 * np.maximum(2 * u - 0.5, np.abs(v - row - 0.5))

TEXTURES = {  # about -1..1, one period a unit
    "stripes": lambda u, v: np.sin(TAU * (u + v)),
    "checks": lambda u, v: 2 * np.sin(TAU / 2 * u) * np.sin(TAU / 2 * v),
    "dots": lambda u, v: np.sin(TAU * u) + np.sin(TAU * v) - 0.8,
    "rings": lambda u, v: np.sin(TAU * np.sqrt(u * u + v * v)),
    "zigzag": lambda u, v: np.sin(TAU * (u + np.abs(v - 2 * np.floor(v / 2) - 1))),
    "wood": lambda u, v: np.sin(TAU * (u + 0.4 * np.sin(1.7 * v) + 0.25 * np.sin(3.1 * v + 2.3 * u))),
    "bricks": bricks,
    "noise": lambda u, v: 2 * noise(u / 2, v / 2) - 1,
}
PATTERNS = list(TEXTURES)

def texture(kind, u, v, sharp=1.5):
    """A pattern in 0..1; `sharp` (number or array) is the contrast of its edges."""
    return np.clip(0.5 + sharp * TEXTURES[kind](u, v), 0, 1)

def uniform(rng, *ranges):
    return [rng.uniform(low, high) for low, high in ranges]

def hsv(hue, saturation, value):
    """RGB as [3,1,1]; the hue turns once a unit."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32).reshape(3, 1, 1)

def any_colour(rng, saturation=(0.2, 0.75), value=(0.3, 0.95)):
    return hsv(*uniform(rng, (0, 1), saturation, value))

def blend(a, b, share):
    return a + share * (b - a)

def cover(distance, scale):
    """The share of each pixel inside of an outline, from signed distances to it; scale: pixels per unit of distance."""
    return np.clip(0.5 - distance * scale, 0, 1)

@functools.cache
def pixel_grid(size):
    """Pixel centres as fractions of the side: x [1,S], y [S,1]."""
    c = (np.arange(size, dtype=np.float32) + 0.5) / size
    return c[None], c[:, None]

def turned(x, y, angle):
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)

def window(size, x0, y0, x1, y1):
    """np.s_[:, rows, columns] of the pixels that a box touches, and one more for smooth edges; perhaps empty."""
    def cut(low, high):
        first, last = math.floor(low * size) - 1, math.ceil(high * size) + 1
        return slice(min(max(first, 0), size), min(max(last, 0), size))
    return slice(None), cut(y0, y1), cut(x0, x1)

def around(size, cx, cy, w, h, reach=1):
    """(window that reaches that many w and h from a point, its pixels' u [1,n], v [m,1] from there in w and h)."""
    x, y = pixel_grid(size)
    where = window(size, cx - reach * w, cy - reach * h, cx + reach * w, cy + reach * h)
    return where, (x[:, where[2]] - cx) / w, (y[where[1]] - cy) / h

def finish(img):
    """Planes [3,S,S] in 0..1 -> uint8 [S,S,3]."""
    return np.ascontiguousarray((np.clip(img, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))

def intrinsics(focal, size):
    return np.array([[focal * size, 0, size / 2], [0, focal * size, size / 2], [0, 0, 1]], np.float32)

def capsule(x, y, a, b, ra, rb):
    """Signed distance to a bar from a to b with radius ra to rb, place along it (0..1), offset (x, y) in radii."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    px, py = x - a[0], y - a[1]
    along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    r = ra + (rb - ra) * along
    px, py = px - along * dx, py - along * dy
    return np.sqrt(px * px + py * py) - r, along, px / r, py / r

def bar(img, light, a, b, ra, rb, colour, second=None, pattern=None):
    """Draws a shaded rounded bar, plain or with a pattern of both colours that follows it."""
    size = img.shape[1]
    x, y = pixel_grid(size)
    r = max(ra, rb)
    where = window(size, min(a[0], b[0]) - r, min(a[1], b[1]) - r, max(a[0], b[0]) + r, max(a[1], b[1]) + r)
    d, along, nx, ny = capsule(x[:, where[2]], y[where[1]], a, b, ra, rb)
    if pattern:
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy) + 1e-6
        across = (ny * dx - nx * dy) / length
        colour = blend(colour, second, texture(pattern, along * (2 * length / r), across * 2))
    facing = nx * light[0] + ny * light[1] + np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0)) * light[2]
    img[where] = blend(img[where], colour * (0.55 + 0.5 * np.maximum(facing, 0)), cover(d, size))

def backdrop(rng, size):
    """[3,S,S]: a gradient between two related colours under a texture, darker towards the corners."""
    x, y = (c - 0.5 for c in pixel_grid(size))
    turn, hue, value = uniform(rng, (0, TAU), (0, 1), (0.4, 0.95))
    u, v = turned(x, y, turn)
    a = hsv(hue, rng.uniform(0.1, 0.5), value)
    b = hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.1, 0.5), value * rng.uniform(0.6, 1.1))
    kind = rng.choice([*PATTERNS, "noise"])
    scale, strength = uniform(rng, (4, 12), (0.08, 0.25))
    grain = texture(kind, u * scale + 7, v * scale + 3, 0.8) + noise(u * 3 + 1, v * 3 + 2) - 1
    return blend(a, b, u + 0.5) * (1 + strength * grain) * (1.06 - 0.5 * (x * x + y * y))

def outlines():
    """{kind: (radius [512] of its outline at angles -pi..pi, at most 1; hole (x, y, radius) or None; pattern, its
    periods a side of the picture along x and y)}; y down."""
    t = np.arange(360) / 360 * TAU
    circle = np.exp(1j * t)
    heart = 16 * np.sin(t) ** 3 - 1j * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    teeth = 0.85 + 0.15 * np.clip(3 * np.sin(8 * t), -1, 1)
    star = np.where(np.arange(10) % 2, 0.42, 1) * np.exp(1j * (np.arange(10) - 2.5) * TAU / 10)
    drop = 0.9 * np.sin(t) * np.sin(t / 2) ** 1.5 - 1j * np.cos(t)
    mushroom = [*circle[180:], 1+.1j, .3+.15j, .38+.9j, -.38+.9j, -.3+.15j, -1+.1j]
    kinds = {
        "ring": (circle, (0, 0, 0.5), "stripes", 10, 0),
        "moon": (circle, (0.5, 0, 0.78), "wood", 8, 12),
        "heart": (heart, None, "checks", 14, 14),
        "gear": (teeth * circle, (0, 0, 0.32), "checks", 10, 26),
        "flower": ((0.68 + 0.32 * np.cos(5 * t)) * circle, None, "rings", 10, 10),
        "star": (star, None, "dots", 8, 8),
        "drop": (drop, None, "zigzag", 8, 8),
        "cross": ([a * 1j**k for k in range(4) for a in (1-.33j, 1+.33j, .33+.33j)], None, "zigzag", 15, 8),
        "arrow": ([1, -.1+.85j, -.15+.32j, -1+.32j, -1-.32j, -.15-.32j, -.1-.85j], None, "stripes", 0, 10),
        "house": ([-1j, 1-.15j, .7-.05j, .7+.9j, -.7+.9j, -.7-.05j, -1-.15j], None, "bricks", 14, 14),
        "mushroom": (mushroom, None, "dots", 15, 15),
        "hourglass": ([-.75-1j, .75-1j, .16, .75+1j, -.75+1j, -.16], None, "stripes", 6, 6),
    }
    for name, (z, *others) in kinds.items():
        z = np.asarray(z, complex) / np.abs(z).max()
        z = (z[:, None] + np.arange(32) / 32 * (np.roll(z, -1) - z)[:, None]).ravel()  # points along each edge
        radius = np.interp(np.linspace(-math.pi, math.pi, 512), np.angle(z), np.abs(z), period=TAU)
        kinds[name] = (radius.astype(np.float32), *others)
    return kinds

KINDS = outlines()

def objects(seed, size=112):
    """A textured thing on a cluttered background: image uint8 [S,S,3], label int (index in KINDS), mask bool [S,S]."""
    rng = random.Random(f"objects {seed}")
    img = backdrop(rng, size)
    light = (rng.uniform(-0.6, 0.6), -0.5, 0.7)
    for _ in range(rng.randrange(2, 6)):  # clutter: pills and lines
        x, y, turn = uniform(rng, (0, 1), (0, 1), (0, TAU))
        thin = rng.choice([0.12, 1])
        r = rng.uniform(0.03, 0.12) * thin
        length = rng.uniform(0.02, 0.2) / thin ** 0.5
        end = (x + length * math.cos(turn), y + length * math.sin(turn))
        bar(img, light, (x, y), end, r, r, any_colour(rng))

    label = rng.randrange(len(KINDS))
    radius, hole, pattern, across, down = list(KINDS.values())[label]
    r = rng.triangular(0.27, 0.42, 0.38)
    turn = rng.uniform(-0.4, 0.4)
    flip = rng.choice([-1, 1])
    scale, cx, cy, hue, value = uniform(rng, (0.9, 1.1), (r, 1 - r), (r, 1 - r), (0, 1), (0.5, 1))
    a = hsv(hue, rng.uniform(0.35, 0.85), value)
    b = hsv(hue + rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.7), value + (-0.45 if value > 0.7 else 0.45))
    where, px, py = around(size, cx, cy, r, r, reach=1.2)
    u, v = turned(px, py, turn)
    u = u * flip
    angle = ((np.arctan2(v, u) + math.pi) * (511 / TAU) + 0.5).astype(np.int32)
    d = np.sqrt(u * u + v * v) - radius[angle]
    if hole:
        d = np.maximum(d, hole[2] - np.sqrt((u - hole[0]) ** 2 + (v - hole[1]) ** 2))
    bevel = np.clip(1 + d * 4, 0, 1) * (0.35 * (px * light[0] + py * light[1]) - 0.1)
    colour = blend(a, b, texture(pattern, u * (r * scale * across), v * (r * scale * down)))
    img[where] *= 0.6 + 0.4 * np.clip(d * 7, 0, 1)  # its shadow
    img[where] = blend(img[where], colour * (0.93 + bevel), cover(d, r * size))
    mask = np.zeros((size, size), bool)
    mask[where[1:]] = d < 0
    return {"image": finish(img), "label": label, "mask": mask}

# Rooms: metres, y down, the floor at y = 0.

ROUND = {"box": [], "cylinder": [0, 2], "ball": [0, 1, 2]}  # the axes in which a unit solid is round

class Solid:
    """A box, ball or cylinder (along y): m (p - centre) is in the unit solid, which reaches from -1 to 1."""

    def __init__(self, kind, centre, half, turn=0.0):
        self.kind = kind
        self.centre, self.half = np.array([centre, half], np.float32)[..., None]
        c, s = math.cos(turn), math.sin(turn)
        self.m = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32) / self.half

    def inside(self, p):
        return self.m @ (p - self.centre)

    def interval(self, o, d):
        """Where rays o + t d (in the unit solid) enter and leave it; enter >= leave where they miss."""
        enter, leave = np.float32(-1e9), np.float32(1e9)
        axes = ROUND[self.kind]
        for i in {0, 1, 2} - set(axes):
            inverse = 1 / d[i]
            middle, reach = -o[i] * inverse, np.abs(inverse)
            enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
        if axes:
            a, b, c = (sum(p[i] * q[i] for i in axes) for p, q in ((d, d), (o, d), (o, o)))
            square = b * b - a * (c - 1)
            root = np.sqrt(np.maximum(square, 0))
            enter = np.maximum(enter, np.where(square > 0, (-b - root) / a, 1e9))
            leave = np.minimum(leave, (root - b) / a)
        return enter, leave

    def surface(self, q):
        """Normals (in the unit solid, of any length) and texture coordinates (metres) at points q [3,n] on it."""
        x, y, z = q * self.half
        if self.kind == "box":
            axis = largest(q)
            normal = np.where(axis == np.arange(3)[:, None], np.sign(q), np.float32(0))
            return normal, np.where(axis == 0, z, x), np.where(axis == 1, z, y)
        u = np.arctan2(q[0], q[2]) * self.half[0]
        if self.kind == "ball":
            return q, u, y
        lid = q[1] * q[1] > q[0] * q[0] + q[2] * q[2]
        normal = np.where(lid == np.array([[False], [True], [False]]), q, np.float32(0))
        return normal, np.where(lid, x, u), np.where(lid, z, y)

def largest(q):
    """Index of the largest of three arrays' absolute values, int8 (much faster than argmax)."""
    x, y, z = np.abs(q)
    return np.where(x > np.maximum(y, z), np.int8(0), np.where(y > z, np.int8(1), np.int8(2)))

def furnish(rng):
    """The room's solids: itself, a rug, four pictures, then 3 to 7 things within 1.8 m of the middle."""
    w, h, l = uniform(rng, (2.8, 3.6), (1.2, 1.5), (2.8, 3.6))
    a, b = uniform(rng, (0.8, 1.5), (0.8, 1.5))
    solids = [Solid("box", (0, -h, 0), (w, h, l)), Solid("box", (0, -0.01, 0), (a, 0.01, b), rng.uniform(0, TAU))]
    for side in (-1, 1):
        a, b, at, high = uniform(rng, (0.4, 0.9), (0.3, 0.5), (-1, 1), (-1.7, -1.3))
        solids.append(Solid("box", (side * w, high, at), (0.03, b, a)))
        solids.append(Solid("box", (at, high, side * l), (a, b, 0.03)))
    n = rng.randrange(3, 6)
    start = rng.uniform(0, TAU)
    for i in range(n):
        angle = start + (i + rng.uniform(-0.3, 0.3)) * TAU / n
        r = rng.uniform(0.5, 1.2)
        kind = rng.choice(list(ROUND))
        x, z = r * math.sin(angle), r * math.cos(angle)
        a, b, c = uniform(rng, (0.15, 0.42), (0.15, 0.7), (0.15, 0.42))
        half = {"box": (a, b, c), "cylinder": (a * 0.8, b, a * 0.8), "ball": (a, a, a)}[kind]
        solids.append(Solid(kind, (x, -half[1], z), half, rng.uniform(0, TAU)))
        top = min(a, c) * rng.uniform(0.5, 0.95)
        if kind == "box" and i % 2:  # a ball stands on it
            solids.append(Solid("ball", (x, -2 * b - top, z), (top, top, top)))
    return solids

def room_camera(rng, view):
    """Pose [4,4] (camera to world) of a look across the things from outside them; view 1 stands aside of view 0."""
    angle = rng.uniform(0, TAU) + view * rng.uniform(0.2, 0.45) * rng.choice([-1, 1])
    ranges = ((2.1, 2.5), (-1.7, -0.9), (-0.7, 0.7), (-1.1, -0.5), (-0.7, 0.7))
    place, other = np.array([uniform(rng, *ranges) for _ in range(2)])
    if view:
        place = np.append((place[:2] + other[:2]) / 2, other[2:])
    away, height, *target = place
    eye = np.array([away * math.sin(angle), height, away * math.cos(angle)])
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross([0, 1, 0], z) / math.hypot(z[0], z[2])
    return np.vstack([np.stack([x, np.cross(z, x), z, eye], 1), [0, 0, 0, 1]]).astype(np.float32)

def material(rng, code, hue):
    """(pattern, period in metres, two colours [3,1]) of surface `code`: walls, floor, walls, ceiling, then solids."""
    if code < 4:
        room = [(hue, 0.3, 0.9), (0.08, 0.4, 0.75), (hue + 0.06, 0.3, 0.9), (hue, 0.06, 1.0)]
        hue, saturation, value = room[code]
    else:
        hue, saturation, value = uniform(rng, (0, 1), (0.3, 0.8), (0.55, 1))
    shift = rng.uniform(-0.2, 0.2) * (code > 3)
    darker = rng.uniform(0.72, 0.88) if code < 4 else rng.uniform(0.4, 0.7)
    pattern = "noise" if code == 3 else rng.choice(PATTERNS)
    period = rng.uniform(0.2, 0.45)
    return pattern, period, hsv(hue, saturation, value)[..., 0], hsv(hue + shift, saturation, value * darker)[..., 0]

def cast(solids, eye, rays):
    """Depth [S,S] along rays [3,S,S], and which surface each meets, int8 [S,S]: 0..3 the room's, 4.. solids[1:]."""
    room = solids[0]
    o = room.inside(eye)[..., None]
    d = rays / room.half[..., None]
    _, depth = room.interval(o, d)
    q = o + d * depth
    which = largest(q)
    which[(which == 1) & (q[1] < 0)] = 3  # the ceiling
    for code, solid in enumerate(solids[1:], 4):
        enter, leave = solid.interval(solid.inside(eye), np.tensordot(solid.m, rays, 1))
        hit = (enter < leave) & (enter > 0) & (enter < depth)
        depth[hit] = enter[hit]
        which[hit] = code
    return depth, which

def smooth_seams(img, which):
    """Averages the pixels of img [3,S*S] where two surfaces meet with their neighbours, in place."""
    size, middle = len(which), which[1:-1, 1:-1]
    edge = np.zeros(which.shape, bool)
    for side in (which[2:, 1:-1], which[:-2, 1:-1], which[1:-1, 2:], which[1:-1, :-2]):
        edge[1:-1, 1:-1] |= middle != side
    at = np.flatnonzero(edge)
    img[:, at] = img[:, at] / 3 + (img[:, at - 1] + img[:, at + 1] + img[:, at - size] + img[:, at + size]) / 6

def rooms(seed, size=112, view=0):
    """A furnished room photographed by one of two cameras (view 0, 1): image uint8 [S,S,3], depth f4 [S,S] (along z,
    metres), normals f4 [S,S,3] (unit, towards the camera), K f4 [3,3] (pixels, centres at integer + 0.5), pose f4 [4,4]
    (camera to world). Camera frame: x right, y down, z forward."""
    rng = random.Random(f"rooms {seed}")
    solids = furnish(rng)
    pose = room_camera(rng, view)
    rotation, eye = pose[:3, :3], pose[:3, 3:]
    focal = 0.5 / math.tan(math.radians(rng.uniform(55, 80)) / 2)
    light = np.array([rng.uniform(-1.2, 1.2), -2.0, rng.uniform(-1.2, 1.2)], np.float32)[:, None]
    hue, ambient = uniform(rng, (0, 1), (0.45, 0.65))
    materials = [material(rng, code, hue) for code in range(len(solids) + 3)]
    x, y = pixel_grid(size)
    right, down, forward = rotation.T[..., None, None]
    rays = right * ((x - 0.5) / focal) + down * ((y - 0.5) / focal) + forward
    rays[np.abs(rays) < 1e-6] = 1e-6  # a ray's parameter is its z-depth
    depth, which = cast(solids, eye, rays)

    points = (eye[..., None] + rays * depth).reshape(3, -1)
    normals, img = np.empty_like(points), np.empty_like(points)
    for code, (pattern, period, a, b) in enumerate(materials):
        at = np.flatnonzero(which == code)
        if len(at) == 0:
            continue
        solid = solids[max(0, code - 3)]
        p = points.take(at, 1)
        q = solid.inside(p)
        n, u, v = solid.surface(q)
        n = solid.m.T @ (n if code > 3 else -n)
        n /= np.sqrt((n * n).sum(0))
        beam, sight = light - p, eye - p
        far, away = np.sqrt((beam * beam).sum(0)), np.sqrt((sight * sight).sum(0))
        lit = np.maximum((n * beam).sum(0), 0) / far / (0.7 + 0.06 * far * far)
        pixel = away * away / (focal * size) / np.maximum(np.abs((n * sight).sum(0)), 0.1 * away)  # its size, metres
        sharp = np.clip(0.15 * period / pixel - 0.3, 0, 1.5)  # fine patterns fade
        colour = blend(a, b, texture(pattern, u / period + 20, v / period + 20, sharp))
        dark = 1.0
        if code < 4:
            near = np.delete((1 - np.abs(q)) * solid.half, (0, 1, 2, 1)[code], 0).min(0)  # metres to another wall
            dark = 1 - 0.35 * np.exp(-4 * near)
        elif code > 8:  # the feet of things
            dark = 0.65 + 0.35 * np.minimum(-3 * p[1], 1)
        if code in (1, 4):  # soft shadows on floor and rug: how long a beam runs through things
            for thing in solids[6:]:
                enter, leave = thing.interval(thing.inside(p), thing.m @ beam)
                lit *= 1 - 0.85 * np.clip((np.minimum(leave, 1) - np.maximum(enter, 0)) * far * 5, 0, 1)
        normals[:, at] = n
        img[:, at] = colour * (0.82 + 0.36 * noise(u + 9, v + 9)) * (ambient * dark + (1.2 - ambient) * lit)

    smooth_seams(img, which)
    photo = random.Random(f"photo {seed} {view}")  # each with a contrast, an exposure and a white balance of its own
    img = np.clip(img, 0, 1) ** np.float32(math.exp(photo.uniform(-0.4, 0.4))) * np.float32(photo.uniform(0.6, 1.4))
    img *= np.array([[photo.uniform(0.75, 1.25)] for _ in range(3)], np.float32)
    return {"image": finish(img.reshape(3, size, size)), "depth": depth, "K": intrinsics(focal, size), "pose": pose,
            "normals": (rotation.T @ normals).T.reshape(size, size, 3)}

# People: camera frame, metres, y down.

LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
JOINTS = ("head", "neck", "pelvis", *(f"{side} {joint}" for side in ("left", "right") for joint in LIMBS))

class Figure:
    """A posed person: joints [J,3] (lowest foot at y = 0), forward [3], left [3], height, girth (1 is usual)."""

    def __init__(self, rng):
        self.tall, self.girth = uniform(rng, (1.5, 1.95), (0.8, 1.25))
        heading = rng.triangular(0, TAU, math.pi)
        self.forward = np.array([math.sin(heading), 0, math.cos(heading)])
        self.left = np.array([-math.cos(heading), 0, math.sin(heading)])

        def aim(swing, spread, side=1):  # the height as a vector: down, swung forward, spread to a side (radians)
            ahead = np.array([0, math.cos(swing), 0]) + math.sin(swing) * self.forward
            return self.tall * (math.cos(spread) * ahead + math.sin(spread) * side * self.left)

        lean, bow, stride = uniform(rng, (-0.35, 0.1), (-0.15, 0.15), (-0.7, 0.7))
        stance = rng.choice(["stand", "walk", "sit"])
        neck = -0.29 * aim(lean, bow)
        head = neck - 0.105 * aim(lean + rng.uniform(-0.3, 0.3), bow + rng.uniform(-0.25, 0.25))
        joints = [head, neck, 0 * neck]
        for side in (1, -1):
            raised = rng.random() < 0.3
            swing, spread = uniform(rng, (1.2, 2.9) if raised else (-0.5, 0.9), (0.02, 0.75))
            shoulder = 0.915 * neck + side * 0.105 * self.tall * (0.6 + 0.4 * self.girth) * self.left
            elbow = shoulder + 0.165 * aim(swing, spread, side)
            wrist = elbow + 0.15 * aim(swing + rng.uniform(0.1, 2), spread * rng.uniform(-0.3, 1), side)
            bend, spread = uniform(rng, (0, 0.4), (0.02, 0.3))
            swing, more = {"stand": (0.4 * bend, 0), "walk": (side * stride, max(0, -side * stride)),
                           "sit": (1.2 + bend, 1.1)}[stance]
            bend += more
            hip = side * 0.052 * self.tall * self.left
            knee = hip + 0.245 * aim(swing, spread, side)
            ankle = knee + 0.24 * aim(swing - bend, 0.6 * spread, side)
            joints += [shoulder, elbow, wrist, hip, knee, ankle]
        self.joints = np.array(joints)
        self.joints -= [0, self.joints[:, 1].max() + 0.035 * self.tall, 0]

    def dress(self, rng):
        """Its bars, far ones first: (ends a, b [3], their radii, and the colours and pattern for `bar`)."""
        head, neck, pelvis = self.joints[:3]
        forward, left = self.forward * self.tall, self.left * self.tall  # all sizes below are shares of the height
        up, crown = (neck - pelvis) / 0.29, (head - neck) / 0.105
        wide = self.girth * (0.075 + 0.03 * abs(left[0]) / self.tall)  # wider than deep
        skin = hsv(*uniform(rng, (0.04, 0.09), (0.25, 0.6), (0.35, 1)))
        hair = hsv(0.08, 0.5, rng.uniform(0.08, 0.75))
        shirt, second, trousers, shoes = (any_colour(rng) for _ in range(4))
        sleeve, leg = rng.choice([shirt, skin]), rng.choice([trousers, skin])
        locks = rng.uniform(0, 0.09)
        pattern = rng.choice([None, *PATTERNS[:3]])
        bars = [
            (neck - 0.09 * up, pelvis, wide, 0.86 * wide, shirt, second, pattern),
            (pelvis, pelvis, 0.84 * wide, 0.84 * wide, trousers),
            (neck, head, 0.032, 0.03, skin),
            (head - 0.022 * crown + 0.008 * forward, head + 0.02 * crown, 0.044, 0.056, skin),
            (head + 0.036 * crown - 0.008 * forward, head - locks * crown - 0.03 * forward, 0.056, 0.045, hair),
        ]
        for side in (-1, 1):
            eye = head + 0.054 * forward + side * 0.022 * left
            bars.append((eye, eye, 0.008, 0.008, 0 * hair))
        r = (0.5 + 0.5 * self.girth) * np.array([0.036, 0.029, 0.022, 0.06, 0.042, 0.028])
        for shoulder, elbow, wrist, hip, knee, ankle in (self.joints[3:9], self.joints[9:]):
            bars += [
                (shoulder, elbow, r[0], r[1], shirt),
                (elbow, wrist, r[1], r[2], sleeve),
                (wrist, wrist + (wrist - elbow) * 0.35, 0.02, 0.021, skin),
                (hip, knee, r[3], r[4], trousers),
                (knee, ankle, r[4], r[5], leg),
                (ankle, ankle + 0.1 * forward + [0, 0.02, 0], 0.03, 0.022, shoes),
            ]
        bars.sort(key=lambda bar: -bar[0][2] - bar[1][2] - 0.1 * (bar[2] > 0.062))  # limbs after the thick trunk
        return [(a, b, ra * self.tall, rb * self.tall, *colours) for a, b, ra, rb, *colours in bars]

def stage(rng, size, floor):
    """[3,S,S]: a wall with framed pictures and furniture-like blocks, and from `floor` (fraction) down a floor."""
    img = backdrop(rng, size)
    for block in range(rng.randrange(1, 6)):
        w, h, cx, cy = uniform(rng, (0.05, 0.2), (0.08, 0.3), (0, 1), (0.1, 0.5))
        a, b = any_colour(rng), any_colour(rng)
        if block % 2:
            cy = floor - h
        where, u, v = around(size, cx, cy, w, h)
        box, frame = (cover(np.abs(u) - r, w * size) * cover(np.abs(v) - r, h * size) for r in (1, 0.86))
        inner = 0.4 * texture(rng.choice(PATTERNS), 2 * u, 2 * v) if block % 2 else frame
        img[where] = blend(img[where], blend(a, b * (0.9 + 0.1 * v), inner), box)
    top = min(int(floor * size), size)
    x, y = pixel_grid(size)
    below = y[top:] - floor
    down = np.maximum(below, 0) + 0.06  # 1 / distance
    ground = any_colour(rng, (0.1, 0.45), (0.4, 0.8))
    u, v = (x - 0.5) / down + 30, 0.4 / down + 0 * x
    grain = texture(rng.choice(PATTERNS), u, v, np.clip(2 * down, 0.1, 1))
    img[:, top:] = blend(img[:, top:], ground * (0.9 + 0.25 * grain), cover(-below, size))
    return img

def people(seed, size=112):
    """One to three people, nearest first: image uint8 [S,S,3], joints2d f4 [P,J,2] (fractions of the side, may lie
    outside), joints3d f4 [P,J,3] (metres), visible bool [P] (head inside and not behind another person), K f4 [3,3] in
    pixels. Camera frame: x right, y down, z forward."""
    rng = random.Random(f"people {seed}")
    focal = rng.uniform(0.9, 1.8)
    count = rng.choice((1, 1, 1, 2, 2, 3))
    light = (rng.uniform(-0.6, 0.6), -0.5, 0.7)

    def flat(p):
        return float(p[0] / p[2] * focal + 0.5), float(p[1] / p[2] * focal + 0.5)

    figures = []  # (joints, bars)
    for slot in rng.sample(range(count), count):
        figure = Figure(rng)
        joints = figure.joints
        extent = 0.08 * figure.tall - joints[:, 1].min()  # from the lowest foot to the crown
        share = rng.uniform(0.55, 0.8) if figures else rng.uniform(0.7, 0.94)
        z = focal * extent / share
        if figures:
            z = max(z, focal * (extent - ground) / 0.46)  # every head stays in the picture
        else:
            ground = (rng.uniform(max(share + 0.04, 0.8), 0.97) - 0.5) * z / focal
        joints += [0, ground, z + max(0, -0.3 - joints[:, 2].min())]
        across = 0.15 + 0.7 * (slot + rng.uniform(0, 1)) / count  # of the head
        joints[:, 0] += (across - 0.5) * joints[0, 2] / focal - joints[0, 0]
        figures.append((joints, figure.dress(rng)))
    figures.sort(key=lambda figure: figure[0][2, 2])

    joints3d = np.array([joints for joints, _ in figures], np.float32)
    joints2d = joints3d[..., :2] / joints3d[..., 2:] * np.float32(focal) + np.float32(0.5)
    hidden = np.zeros(count, bool)
    wall = joints3d[-1, 2, 2].item() * rng.uniform(1.1, 1.8)
    img = stage(rng, size, 0.5 + focal * ground / wall)
    for k in reversed(range(count)):
        joints, bars = figures[k]
        w = float(0.45 * focal / joints[2, 2])
        where, u, v = around(size, *flat((joints[:, 0].mean(), ground, joints[2, 2])), w, w)
        img[where] *= 1 - 0.5 * np.clip(1 - u**2 - (v * 3) ** 2, 0, 1)  # its shadow
        for a, b, ra, rb, *colours in bars:
            outline = flat(a), flat(b), float(ra * focal / a[2]), float(rb * focal / b[2])
            bar(img, light, *outline, *colours)
            hidden |= (np.arange(count) > k) & (capsule(*joints2d[:, 0].T, *outline)[0] < 0)
    visible = ((joints2d[:, 0] > 0) & (joints2d[:, 0] < 1)).all(1) & ~hidden
    return {"image": finish(img), "joints2d": joints2d, "joints3d": joints3d, "visible": visible,
            "K": intrinsics(focal, size)}

SCENES = {"objects": objects, "rooms": rooms, "people": people}

def draw_scene(kind, size, keys, options, seed):
    scene = SCENES[kind](seed, size, **options)
    return {key: scene[key] for key in keys or scene}

def labelled_scenes(kind, start, count, size=112, keys=(), **options):
    """`count` scenes, drawn by all cores, as tensors [count, ...]: "image" uint8 [count,3,size,size] and what else
    SCENES[kind] gives (people: room for three, "visible" false where there is none), or `keys` alone.

    options: view=1 for rooms."""
    draw = functools.partial(draw_scene, kind, size, keys, options)
    seeds = range(start, start + count)
    if count >= 64 and CAN_FORK:
        with ProcessPoolExecutor(cores(), multiprocessing.get_context("fork"), start_worker) as pool:
            scenes = list(pool.map(draw, seeds, chunksize=16))
    else:
        scenes = list(map(draw, seeds))
    for scene, key in itertools.product(scenes, {"joints2d", "joints3d", "visible"} & set(scenes[0])):
        none = np.zeros_like(scene[key])
        scene[key] = np.concatenate([scene[key], none, none])[:3]
    out = default_collate(scenes)
    out["image"] = out["image"].permute(0, 3, 1, 2).contiguous()
    return out

def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# ---- Index: twenty million paths in one file that all processes share ------------------------------------------------
# A source is a set of containers (folders, tar archives, or a list), each with its images: (name, offset, length), both
# 0 unless it lies in an archive. A container's path begins with the source's, an image's with its container's (in a
# list: its folder's); the index keeps only what follows.

class Index:
    """The images of one source, as `write_index` saved them, memory-mapped: names live in the page cache, once.

    containers: their paths; marks int64 [C,3]: first image, stamp; images int64 [N,3]: where its name ends, offset,
    length; names: uint8, one behind the other.
    """

    def __init__(self, place, root):
        self.place = place
        self.folder = os.path.dirname(root) if is_list(root) else None
        saved = torch.load(dune.regular(place), mmap=True, weights_only=True)
        self.containers = [root + path for path in saved["containers"]]
        self.marks, self.images, self.names = (saved[key].numpy() for key in ("marks", "images", "names"))

    def fits(self):
        """Whether it is whole and its source as it was. Looks at folders and archives, not at single images."""
        whole = self.images.shape[1] == 3 and self.images[-1, 0] == len(self.names)
        with ThreadPool(8) as pool:  # network file systems answer many at once
            return whole and pool.map(stamp, self.containers, chunksize=512) == self.marks[:, 1:].tolist()

    def find(self, i):
        """(path of image i, the archive in which it lies or None, its offset and length there)."""
        begin = self.images[i - 1, 0] if i else 0
        end, offset, length = self.images[i].tolist()
        container = self.containers[np.searchsorted(self.marks[:, 0], i, "right") - 1]
        path = os.path.join(self.folder or container, os.fsdecode(self.names[begin:end].tobytes()))
        return path, container if offset else None, offset, length

def stamp(path):
    """[mtime in ns, size] by which a change is noticed; a folder's size says nothing and counts as 0."""
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return [info.st_mtime_ns, 0 if stat.S_ISDIR(info.st_mode) else info.st_size]
    return [0, 0]

def tar_images(path):
    """(name, offset, length) of every image in an uncompressed tar, from its headers. Oops if it ends early."""
    images = []
    try:
        with tarfile.open(dune.regular(path), "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep a million objects
                if member.isreg() and is_image(os.path.basename(member.name)):
                    images.append((member.name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile says nothing if a header is cut
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise Oops(f"{path}: not a whole, uncompressed tar archive ({error}); copy it again or remove it") from None
    return images

def list_images(path):
    """(name, 0, 0) of each line of a text file of paths. Oops if one does not exist."""
    names = list(text_lines(path, r"^\s*#.*"))
    missing = [name for name in names if not os.path.exists(os.path.join(os.path.dirname(path), name))]
    if missing:
        first = ", ".join(missing[:3])
        raise Oops(f"{path}: {len(missing):,} of its {len(names):,} paths do not exist, first {first}")
    return [(name, 0, 0) for name in names]

def is_image(name):
    return name.lower().endswith(SUFFIXES) and name[0] != "."

def scan(root):
    """Walks a source and yields (path of a container, its images), sorted by names."""
    if os.path.isfile(root):
        yield root, list_images(root) if is_list(root) else tar_images(root)
        return
    seen = set()  # links may form circles
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=leave_out):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        files.sort()
        yield folder, ((name, 0, 0) for name in files if is_image(name))
        for path in (os.path.join(folder, name) for name in files if name.endswith(".tar") and name[0] != "."):
            yield path, tar_images(path)

def leave_out(error):
    print(f"data: left out {error.filename}: {error.strerror}", file=sys.stderr)

def write_index(place, root, containers):
    """Writes and opens the index of `containers`, what `scan` gives of root. Oops if they hold no images."""
    print(f"data: indexing {root}, once", file=sys.stderr)
    begun = time.time_ns()
    paths, marks = [], []
    images, names = array.array("q"), bytearray()
    for container, found in containers:
        mark = stamp(container)
        if mark[0] >= begun:
            mark = [0, 0]  # changed while we looked: look again next time
        marks.append([len(images) // 3, *mark])
        paths.append(container[len(root):])
        for name, offset, length in found:
            names += os.fsencode(name)
            images.extend((len(names), offset, length))
    if not images:
        raise Oops(f"{root} holds no images (no {' '.join(SUFFIXES)} in {len(paths)} folders, archives or lists)")
    images = torch.frombuffer(images, dtype=torch.int64).view(-1, 3)
    names = torch.frombuffer(names, dtype=torch.uint8)
    mine = f"{place}.{os.urandom(6).hex()}"  # other machines may be at it too
    with dune.writing(mine) as file:
        torch.save({"containers": paths, "marks": torch.tensor(marks), "images": images, "names": names}, file)
    os.replace(mine, place)
    seconds = (time.time_ns() - begun) / 1e9
    print(f"data: indexed {len(images):,} images, {seconds:.1f} s, kept as {place}", file=sys.stderr)
    return Index(place, root)

def cache_folder():
    """Where indexes of sources that cannot be written beside, and the tiny specialists, are kept."""
    return os.environ.get("DUNE_CACHE") or os.path.expanduser("~/.cache/dune")

def open_index(root):
    """The index of a source, from beside it or from the cache folder; written if there is none that fits."""
    key = f"{os.path.basename(root)}-{hashlib.sha1(os.fsencode(root)).hexdigest()[:12]}.dune-index"
    places = [f"{root}.dune-index", os.path.join(cache_folder(), key)]
    lock = os.open(root, os.O_RDONLY)
    try:
        for alone in (False, True):  # of this machine's processes all may read at once; one writes, the others wait
            with contextlib.suppress(OSError, ImportError):
                import fcntl  # not on Windows
                fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            for place in places:
                with contextlib.suppress(Exception):  # none there, or damaged in whatever way
                    index = Index(place, root)
                    if index.fits():
                        return index
        return write_index(writable(places), root, scan(root))
    finally:
        os.close(lock)

def writable(places):
    """The first of these paths in whose folder files can be written."""
    with contextlib.suppress(OSError):
        os.makedirs(cache_folder(), exist_ok=True)
    for place in places:
        folder = os.path.dirname(place)
        if os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222:  # root may write where nobody is meant to
            return place
    raise Oops(f"cannot write any of {', '.join(places)}: set DUNE_CACHE to a folder that can be written")

# ---- The command -----------------------------------------------------------------------------------------------------

def bench(size, repeat=10):
    """Prints images/s on one core, from 500x375 JPEGs, of each stage and of all together."""
    torch.set_num_threads(1)
    device = dune.pick_device("auto")
    rng = np.random.default_rng(0)
    files = []
    for seed in range(24):
        scene = SCENES["rooms"](seed, 500)["image"][:375] + rng.normal(0, 7, (375, 500, 1))  # with grain
        files.append(io.BytesIO())
        Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(files[-1], "JPEG", quality=90)
    params = torch.stack([torch.from_numpy(draw_colour(rng)) for _ in files])
    crop = functools.partial(random_crop, rng=rng, scale=(0.4, 1.0))

    def load():
        return torch.stack([crop_resize(*decode(file, size, crop), size, size) for file in files])

    images = load().to(device)
    print(f"500x375 JPEG -> {size} px, one core; colour on {device}")
    for name, work in {
        "decode": lambda: [decode(file) for file in files],
        "decode, crop, resize to uint8 (a worker)": load,
        "colour and normalise": lambda: augment(images, params).mean().item(),  # waits for a GPU
        "all of it": lambda: augment(load().to(device), params).mean().item(),
    }.items():
        timer = timeit.Timer(work)
        runs, _ = timer.autorange()
        spent = min(timer.repeat(repeat, runs)) / runs / len(files)
        print(f"{name:44}{1 / spent:9,.0f} images/s {spent * 1e3:8.2f} ms")

OPTIONS = {
    "data": option([], "teacher=source,source… or sources for all, or a file of such lines"),
    "teachers": option(None, "names, between commas; default: those that --data names, else dinov2,mast3r,multihmr"),
    "image_size": option(336, "side in pixels", 8, 4096),
    "out": option("data.png", "the contact sheet"),
    "bench": option(False, "print images/s of each stage instead"),
}

def main(argv=None):
    from teachers import TEACHERS  # it imports this file: only the command needs it
    args = dune.Parser(description="What do the sources hold?").add(OPTIONS).parse_args(argv)
    if args.bench:
        return bench(args.image_size)
    lines = "\n".join(itertools.chain.from_iterable(map(data_lines, args.data)))
    named = re.findall(r"(?m)^([\w.-]+)=", lines)
    names = args.teachers.split(",") if args.teachers else named or ["dinov2", "mast3r", "multihmr"]
    for name in names:
        if name not in TEACHERS:
            raise Oops(f"unknown teacher {name}: choose among {', '.join(TEACHERS)}")
    teachers = {name: TEACHERS[name] for name in names}
    inspect(parse_data(args.data, teachers), teachers, args.image_size, args.out)

if __name__ == "__main__":
    dune.run(main)
