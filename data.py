"""Images: where they are, in which order they are drawn, and how they become batches.

The file follows an image: `parse_data` opens sources and assigns them to teachers, `Samples` decides which
image comes when, `decode` and `resize` make it uint8 [3, S, S], `batches` hands out balanced batches, and
`augment` changes colors on the device. Then come pictures for people, and procedural scenes: training images
that need no download.

A source, as in --data [TEACHER=]SOURCE,SOURCE… is one of

    /d/in19k                a folder, searched recursively for images and .tar archives
    /d/habitat.tar          an uncompressed archive
    /d/list.txt             one path per line, absolute or relative to the list
    scenes:rooms:0-5000     procedural scenes with these seeds; scenes:rooms is unbounded
    …@turn:closeup          images with "closeup" in their path are turned by -90 degrees

What exists as a path is that path, whatever its name holds.
"""

import array
import colorsys
import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import random
import re
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, default_collate

import dune
from dune import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = "JPEG PNG WEBP TIFF BMP GIF PPM".split()  # of Pillow; not those that start programs, as EPS does
SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm".split())
SHARING = ("all", "own", "own+generic")
TEST_SCENES = 10**9  # procedural scenes with seeds from here on are never trained on


class ImageError(UserError):
    """An image that cannot be read."""


# ---- Sources -----------------------------------------------------------------------------------------------

class Source:
    """Where images come from. A new kind defines `count`, `read` and an entry in SOURCES.

    spec      as written in --data
    count     number of images
    left_out  in words, what is there besides
    """

    left_out = ""

    def __init__(self, spec):
        self.spec = spec

    def read(self, i, size=0):
        """Image i as an upright PIL RGB image. UserError if it cannot be read.

        size: it may be decoded at a lower resolution, with both sides at least 2 * size. 0: in full.
        """
        raise NotImplementedError

    def prepare(self, size):
        """Called before worker processes start. size: the side to which images will be resized."""

    def held_out(self, count):
        """A source of `count` images that no run trains on. Itself if there is none."""
        return self


class Files(Source):
    """A folder, a .tar archive or a .txt list. Images with `turn` in their path are turned by -90 degrees."""

    def __init__(self, spec, turn=""):
        super().__init__(spec)
        self.turn = turn
        if not os.path.exists(spec):
            raise UserError(f"{spec} does not exist (expected a folder, a .tar, a .txt list or scenes:NAME)")
        if not os.path.isdir(spec) and kind(spec) not in (".tar", ".txt"):
            raise UserError(f"{spec} is not a folder, an uncompressed .tar or a .txt list")
        self.index = open_index(os.path.realpath(spec))
        self.count = len(self.index["offsets"]) - 1
        self.left_out = self.index.get("left_out", "; listed when only JPEG, PNG and WebP were read")

    def read(self, i, size=0):
        offsets = self.index["offsets"]
        raw = self.index["entries"][offsets[i]:offsets[i + 1]].numpy()
        entry = os.fsdecode(raw.tobytes()).split("\0", 3)
        line = f"{self.spec}, line {entry.pop()}: " if len(entry) == 2 else ""
        path = os.path.join(*entry[:2])
        return load_image(entry[0], size, self.turn and self.turn in path, line + path, *entry[2:])


class Scenes(Source):
    """`scenes:NAME[:START-STOP]`: procedural images. Image i has seed START + i. Unbounded without STOP."""

    size = 224  # until `prepare` sets it
    drawn = ()

    def __init__(self, spec):
        super().__init__(spec)
        match = re.fullmatch(r"scenes:(\w+)(?::(\d{1,18})-(\d{1,18}))?", spec)
        if not match or match[1] not in SCENES:
            raise UserError(f"{spec}: write scenes:NAME[:START-STOP], NAME one of {', '.join(SCENES)}")
        self.domain = match[1]
        self.start = int(match[2] or 0)
        self.count = int(match[3] or TEST_SCENES) - self.start
        if self.count < 1:
            raise UserError(f"{spec} holds no images: START must be less than STOP")

    def draw(self, i):
        return SCENES[self.domain](self.start + i, self.size)["image"]

    def prepare(self, size):
        """Scenes are drawn at this size: now, if they take at most 192 MB, and the workers share them."""
        self.size = size
        self.drawn = ()
        if 3 * self.count * size**2 <= 192e6:
            self.drawn = run_parallel(self.draw, range(self.count))

    def read(self, i, size=0):
        return Image.fromarray(self.drawn[i] if self.drawn else self.draw(i))

    def held_out(self, count):
        return Scenes(f"scenes:{self.domain}:{TEST_SCENES}-{TEST_SCENES + count}")


SOURCES = {"scenes:": Scenes}  # by how a spec begins; all others are Files


def split_turn(spec):
    """(path, WORD) of `path[@turn:WORD]`. What exists as a path is not split."""
    match = re.fullmatch(r"([\s\S]*)@turn:([^,]*)", spec)
    return match.groups() if match and not os.path.exists(spec) else (spec, "")


def is_path(spec):
    return os.path.exists(split_turn(spec)[0])


def open_source(spec):
    """A spec without commas -> Source. UserError if there is nothing to open."""
    for prefix, source in SOURCES.items():
        if spec.startswith(prefix) and not os.path.exists(spec):
            return source(spec)
    return Files(*split_turn(spec))


def run_parallel(function, items):
    """[function(item) for each item], on all cores if there are many items."""
    if len(items) < 64:
        return list(map(function, items))
    with ProcessPoolExecutor(cores(), initializer=ignore_signals) as pool:
        return list(pool.map(function, items, chunksize=16))


def cores():
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ignore_signals(worker=0):
    """For worker processes: the main process alone handles Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_file(path):
    """A file, opened for reading. UserError for what is not a regular file: a named pipe would block."""
    if not os.path.isfile(path):
        raise UserError("no such file, or not a regular one")
    return open(path, "rb")


def printable(text):
    """Any text, such as a path or an error, as one line that leaves a terminal whole: control characters and
    bytes that are not UTF-8 as escapes. Spaces and joiners of all kinds stay."""
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", lambda c: ascii(c[0])[1:-1], str(text))


# ---- Index: the images of a source in one memory-mapped file, shared by all processes ----------------------
# It is a dictionary of
#   containers  {path of a folder, an archive or a list: when it was last changed, in seconds}
#   entries     uint8, one after the other: a path; a path and its line in a list; or archive, name, offset
#               and length; separated by "\0"
#   offsets     int64 [N + 1], where the entry of each image begins, and the end of the last
#   left_out    in words, what is there besides
# An index stays until a container changes, even if today more would be found: a resumed run sees its images.

def cache_folder():
    """Where indexes and the tiny specialists are kept: $DUNE_CACHE, or ~/.cache/dune."""
    return os.environ.get("DUNE_CACHE", os.path.expanduser("~/.cache/dune"))


def open_index(root):
    """The index of a source, from the cache folder. Written if there is none or the source has changed."""
    key = hashlib.sha1(os.fsencode(root)).hexdigest()
    path = f"{cache_folder()}/{key[:16]}.index"
    index = current_index(path)
    if not index:
        check_writable(cache_folder())
        with open(f"{path}.lock", "w") as lock:
            with contextlib.suppress(ImportError, OSError):  # on Windows, or the disk has no locks
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process writes the index, the others wait here
            index = current_index(path) or write_index(path, root)
    return index


def load_index(path):
    """An index, mapped, or in memory if the disk cannot be mapped: some network and container mounts."""
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except (RuntimeError, OSError):
        return torch.load(path, weights_only=True)


def current_index(path):
    """An index if it is there, undamaged, and its folders, archives and lists have not changed since."""
    with contextlib.suppress(Exception):
        index = load_index(path)
        if all(os.path.getmtime(place) == changed for place, changed in index["containers"].items()):
            return index


def write_index(path, root):
    """Writes the index of a source, and returns it. UserError if the source holds no images."""
    print(f"data: listing the images of {printable(root)}, once", file=sys.stderr)
    containers = {}
    offsets = array.array("q", [0])  # as Python objects, 20 million entries would take gigabytes
    entries = bytearray()
    kinds = Counter()
    for container, found in scan(root, kinds):
        containers[container] = os.path.getmtime(container)
        for entry in found:
            entries += os.fsencode(entry)
            offsets.append(len(entries))
    most = [f"{count:,} {name}" for name, count in (+kinds).most_common(9)]
    left_out = f"; left out: {', '.join(most) or 'nothing'}"
    if not entries:
        raise UserError(f"{printable(root)} holds no images ({' '.join(SUFFIXES)}){left_out}")
    print(f"data: {len(offsets) - 1:,} images{left_out}", file=sys.stderr)
    with atomic_write(path) as file:
        torch.save({
            "containers": containers,
            "entries": torch.frombuffer(entries, dtype=torch.uint8),
            "offsets": torch.frombuffer(offsets, dtype=torch.int64),
            "left_out": left_out,
        }, file)
    return load_index(path)


def scan(root, kinds):
    """Yields (path of a folder, an archive or a list, entries of its images). Counts what else there is."""
    if os.path.isfile(root):
        yield root, archive_entries(root, kinds) if kind(root) == ".tar" else list_entries(root)
        return
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=print):
        real = os.path.realpath(folder)
        if real in seen:  # links may form circles
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        paths = [os.path.join(folder, name) for name in sorted(names) if name[0] != "."]
        yield folder, filter(is_image, paths)
        for path in paths:
            suffix = kind(path)
            if suffix == ".tar":
                yield path, archive_entries(path, kinds)
            elif suffix not in SUFFIXES:
                kinds[suffix] += 1


def kind(path):
    """The suffix of a path."""
    return (re.search(r"\.(tar\.(gz|xz|bz2|zst)|\w{1,9})\Z", path.lower()) or ["without a suffix"])[0]


def is_image(path):
    return kind(path) in SUFFIXES


def archive_members(path):
    """The members of an uncompressed tar archive, from its headers. UserError if it is broken.

    Yields names, the files to which they are hard links or "", offset and length of what is stored or "".
    """
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep them all in memory
                is_stored = member.isreg() and not member.issparse()
                place = f"{member.offset_data}\0{member.size}" if is_stored else ""
                if not member.isdir():
                    yield member.name, member.islnk() and member.linkname, place
    except (tarfile.TarError, OSError, UserError) as error:
        raise UserError(f"{printable(path)} is not a complete, uncompressed tar archive ({error})") from None


def archive_entries(path, kinds):
    """The entries of an archive; at its end those of hard links, which lead to the file that is linked."""
    links = {}  # {name of a file: names of the links to it}
    for name, target, place in archive_members(path):
        if not is_image(name):
            kinds[f"{kind(name)} in archives"] += 1
        elif target:
            links.setdefault(target, []).append(name)
        elif place:
            yield f"{path}\0{name}\0{place}"
        else:
            kinds["links or sparse files in archives"] += 1
    for name, _, place in archive_members(path) if links else ():
        for link in links.pop(name, ()) if place else ():
            yield f"{path}\0{link}\0{place}"
    kinds["links or sparse files in archives"] += sum(map(len, links.values()))


def list_entries(path):
    """The entries of a text file with a path on each line. UserError if the first path does not exist."""
    folder = os.path.dirname(path)
    with open_file(path) as file:
        lines = os.fsdecode(file.read()).removeprefix("\ufeff").split("\n")  # Windows marks UTF-8 by it
    entries = []
    for number, line in enumerate(lines, 1):
        line = line.strip(" \t\r")  # no other spaces: they may belong to a name
        image = os.path.join(folder, line)
        if line[:1] in "#":  # empty, or a comment
            continue
        if not entries and not os.path.exists(image):
            raise UserError(f"{printable(path)}, line {number}: {printable(image)} does not exist "
                            "(relative paths are relative to the list)")
        entries.append(f"{image}\0{number}")
    return entries


# ---- Groups: which teacher learns from which source --------------------------------------------------------

@dataclass
class Group:
    """Sources that belong together. Every group has an equal share of every batch."""

    name: str
    sources: list  # of Source
    teachers: tuple  # names of the teachers whose own data this is
    generic: bool = False  # with --sharing own+generic it is for all teachers

    @property
    def count(self):
        return sum(source.count for source in self.sources)

    def locate(self, i):
        """(source, index in it) of image i of the group."""
        for source in self.sources:
            if i < source.count:
                return source, i
            i -= source.count


def parse_data(specs, teachers, seeds=""):
    """The groups that --data describes: one for each teacher that it names, and one for the sources of all.

    specs     list of "teacher=source,source…" or "source,source…" (for all teachers). If it is empty:
              procedural scenes, a group for each domain of the teachers
    teachers  {name: row}; a row has `domain` (a key of SCENES) and `generic` (its data shows all kinds of
              things, and helps all teachers)
    seeds     of these scenes, as ":START-STOP"
    UserError if a source is missing, empty or broken, or a teacher is unknown or has no source.
    """
    groups = {}
    for spec in specs:
        owner, paths = re.fullmatch(r"(?:([\w.-]+)=)?([\s\S]*)", spec).groups()
        if is_path(spec):
            owner, paths = None, spec
        if owner and owner not in teachers:
            raise UserError(f"--data names {owner}, which is not one of --teachers {','.join(teachers)}")
        owners = (owner,) if owner else tuple(teachers)
        for path in [paths] if is_path(paths) else paths.split(","):
            group = groups.setdefault(owner, Group(owner or "shared", [], owners))
            group.sources.append(open_source(path))
    if not specs:
        for name, row in teachers.items():
            scenes = open_source(f"scenes:{row.domain}{seeds}")
            group = groups.setdefault(row.domain, Group(row.domain, [scenes], ()))
            group.teachers += (name,)
    for group in groups.values():
        group.generic = any(teachers[name].generic for name in group.teachers)
        for source in group.sources:
            if source.count >= TEST_SCENES and len(group.sources) > 1:  # the others would never be drawn
                raise UserError(f"{source.spec} is unbounded; give a range, {source.spec}:0-100000")
    for name in teachers:
        if not any(name in group.teachers for group in groups.values()):
            raise UserError(f"no --data for teacher {name}: add {name}=PATH, or a PATH for all teachers")
    return list(groups.values())


def teacher_mask(groups, teachers, sharing):
    """bool [G, T] on the CPU: which teacher supervises the images of which group. sharing: one of SHARING."""
    mask = []
    for group in groups:
        is_shared = sharing == "all" or sharing == "own+generic" and group.generic
        mask.append([is_shared or name in group.teachers for name in teachers])
    return torch.tensor(mask)


# ---- Order: a pure function of the seed and the position ---------------------------------------------------

def hash64(*numbers):
    """A 64-bit hash of integers (the finalizer of splitmix64, chained)."""
    h = 0
    for n in numbers:
        h = (h ^ n) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def permuted_index(i, n, *key):
    """Element i of a pseudo-random permutation of range(n), without storing it: a Feistel network."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)  # bits
    mask = (1 << half) - 1
    while True:  # until the result is below n again
        left, right = i >> half, i & mask
        for layer in range(4):
            left, right = right, left ^ hash64(right, layer, *key) & mask
        i = left << half | right
        if i < n:
            return i


# ---- Decode, crop, resize: on the CPU, to uint8 ------------------------------------------------------------

Image.MAX_IMAGE_PIXELS = 45_000_000  # by their headers Pillow refuses images of more than twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # profiles and prompts of megabytes are common


def to_rgb(image):
    """Any PIL image as RGB: of 16 bits the upper 8, and white where it is transparent."""
    if image.mode == "F":
        raise ValueError("pixels in floating point, of unknown range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(file, size=0, turn=False):
    """The first frame of an image file as an upright PIL RGB image; then turned by -90 degrees if `turn`.

    size: a JPEG is decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least 2 * size. If it is then
    resized to `size`, the difference is smaller than between two good filters.
    """
    image = Image.open(file, formats=FORMATS)  # whatever its suffix
    if size:
        side = math.ceil(2 * size)
        image.draft(None, (side, side))
    image = to_rgb(image)
    with contextlib.suppress(Exception):  # a broken EXIF block, the image itself is good
        ImageOps.exif_transpose(image, in_place=True)
    return image.transpose(Image.Transpose.ROTATE_270) if turn else image


def load_image(path, size=0, turn=False, name="", offset=0, length=2**30):
    """An image file, or a part of a file, decoded. ImageError, which begins with `name`, if that fails."""
    try:
        with open_file(path) as file:
            file.seek(int(offset))
            content = file.read(int(length))
        return decode(io.BytesIO(content), size, turn)
    except Exception as error:  # Pillow's decoders raise nearly everything
        raise ImageError(f"{printable(name or path)}: {printable(error).partition(' <')[0]}") from None


def resize(image, box, height, width):
    """The part `box` (x0, y0, x1, y1) of a PIL RGB image, bicubic, antialiased: uint8 [3, height, width]."""
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """The largest centered square of a PIL RGB image, resized: uint8 [3, size, size]."""
    square = ImageOps.fit(image, (size, size))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def fit_image(image, longest, multiple):
    """The whole PIL RGB image, resized: uint8 [3, h, w]. The longest side is near `longest`, both are
    divisible by `multiple`, the aspect ratio nearly stays."""
    scale = longest / max(image.size) / multiple
    width, height = [multiple * max(1, round(side * scale)) for side in image.size]
    return resize(image, (0, 0, *image.size), height, width)


def random_crop(width, height, rng, scale):
    """The box (x0, y0, x1, y1) of a random resized crop, as in torchvision: its share of the area lies in
    `scale`, its aspect ratio between 3/4 and 4/3 (log-uniform)."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a very long image
        w = h = min(width, height)
    x = rng.integers(width - w + 1)
    y = rng.integers(height - h + 1)
    return x, y, x + w, y + h


# ---- Color: on the device, the whole batch at once ---------------------------------------------------------
# Each image has a row of 11 parameters: the four operations of the jitter in their order, the factor of each
# (hue: turns of the color circle), grayscale (0 or 1), sigma of the blur (0: none), solarize (0 or 1).

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_COLOR = (BRIGHTNESS, CONTRAST, SATURATION, HUE, 1, 1, 1, 0, 0, 0, 0)


def draw_color(rng, share=1.0):
    """The recipe's random color parameters of one image, float32 [11]. `share` of the images are changed."""
    params = np.array(NO_COLOR, np.float32)
    if rng.random() >= share:
        return params
    if rng.random() < 0.8:
        order = rng.permutation(4)
        factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1])
        params[:8] = [*order, *factors[order]]
    params[8] = rng.random() < 0.2
    if rng.random() < 0.2:
        params[9] = rng.uniform(0.1, 5.0)
    params[10] = rng.random() < 0.2
    return params


def is_needed(mask):
    """Whether an operation changes any image. A GPU does them all: to ask it, the host would have to wait."""
    return mask.is_cuda or mask.any()


def to_gray(x):
    """[b, 3, H, W] -> [b, 1, H, W]"""
    red, green, blue = x.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust(x, operation, factor):
    """Brightness, contrast or saturation: away from black, from the mean gray, or from the gray image.

    operation, factor [b, 1, 1, 1], for each image its own; factor 1 changes nothing.
    """
    if not is_needed(factor != 1):
        return x
    gray = to_gray(x)
    mean = gray.mean((2, 3), keepdim=True)
    base = gray * (operation == SATURATION) + mean * (operation == CONTRAST)
    return torch.lerp(base, x, factor).clamp_(0, 1)


def shift_hue(x, turn):
    """Shifts the hue of x [b, 3, H, W], keeps value and chroma (HSV). turn [b, 1, 1, 1]: -1/6 to 1/6."""
    if not is_needed(turn != 0):
        return x
    red, green, blue = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    scale = 1 / chroma.clamp(min=1e-12)
    hue = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    hue = torch.where(value == red, (green - blue) * scale, hue)  # sixths of a turn: red 0, green 2, blue 4
    primary = torch.arange(0, 5, 2, device=x.device).view(3, 1, 1)
    distance = hue + 6 * turn - primary  # [b, 3, H, W]
    opposite = (distance.abs_() - 3).abs_()  # 3 minus the distance by the shorter way around the circle
    return value - chroma * (2 - opposite).clamp_(0, 1)


def jitter(x, params):
    """Brightness, contrast, saturation and hue of each image, in its own order."""
    order, factors = params[:, :8, None, None, None].split(4, 1)  # [b, 4, 1, 1, 1]
    for operation, factor in zip(order.unbind(1), factors.unbind(1)):
        is_hue = operation == HUE
        x = adjust(x, operation, torch.where(is_hue, 1, factor))
        x = shift_hue(x, factor * is_hue)
    return x


def blur(x, sigma):
    """Gaussian blur, 9 x 9 pixels, reflected at the border. sigma [b, 1, 1, 1]; 0 changes nothing."""
    if not is_needed(sigma > 0):
        return x
    offset = torch.arange(-4, 5, device=x.device)
    taps = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)) ** 2)
    first, *others = (taps / taps.sum(-1, keepdim=True)).split(1, -1)  # [b, 1, 1, 1] each
    x = F.pad(x, (4,) * 4, mode="reflect")
    for dim in (2, 3):
        size = x.shape[dim] - 8
        blurred = x.narrow(dim, 0, size) * first
        for k, tap in enumerate(others, 1):
            blurred.addcmul_(x.narrow(dim, k, size), tap)
        x = blurred
    return x


def recolor(x, params):
    """The recipe's color augmentation of x [b, 3, H, W] in 0..1. params [b, 11] on the same device."""
    x = jitter(x, params)
    gray, sigma, solarize = params[:, 8:, None, None, None].unbind(1)
    if is_needed(gray > 0):
        x = torch.lerp(x, to_gray(x), gray)
    x = blur(x, sigma)
    if is_needed(solarize > 0):
        x = torch.lerp(x, torch.minimum(x, 1 - x), solarize)
    return x


def normalize(image):
    """uint8 [b, 3, H, W], or float in 0..1 -> float32 with ImageNet's mean and std, on the same device."""
    x = image / (255 if image.dtype == torch.uint8 else 1)
    for channel, mean, std in zip(x.unbind(1), IMAGENET_MEAN, IMAGENET_STD):
        channel.sub_(mean).div_(std)
    return x


def augment(image, params):
    """Color augmentation and normalization, on the image's device and without waiting for it.

    image: uint8 [b, 3, H, W]; params: float32 [b, 11] from `batches`, on the CPU. -> float32 [b, 3, H, W]
    """
    params = params.to(image.device, non_blocking=True)
    chunk = len(image) if image.is_cuda else 1  # one by one they stay in the cache of a CPU
    parts = zip(image.split(chunk), params.split(chunk))
    return torch.cat([normalize(recolor(x / 255, p)) for x, p in parts])


# ---- Batches -----------------------------------------------------------------------------------------------

def read_or_next(source, i, size):
    """Image i of a source, or one after it if it cannot be read. -> (PIL image, ["path: reason"] of those)"""
    bad = []
    for attempt in range(min(24, source.count)):
        try:
            return source.read(i, size), bad
        except UserError as error:
            bad.append(str(error))
            i += 2**attempt if source.count > 24 else 1  # ever further: damage comes in runs
            i %= source.count
    raise UserError(f"{source.spec}: {len(bad)} consecutive images could not be read; the last: {bad[-1]}")


@dataclass
class Samples(Dataset):
    """Random samples, indexed by their position among all that a run ever sees. Position p is of group p % G.
    A sample is a pure function of its position and of the fields below."""

    groups: list
    image_sizes: list
    batch: int
    seed: int
    scale: tuple  # smallest and largest share of the area that a crop takes
    color: float  # share of the images that get other colors

    def __getitem__(self, position):
        size = size_at(position // self.batch, self.image_sizes, self.seed)
        draw, g = divmod(position, len(self.groups))
        group = self.groups[g]
        epoch, i = divmod(draw, group.count)
        source, i = group.locate(permuted_index(i, group.count, self.seed, g, epoch))
        image, bad = read_or_next(source, i, size / math.sqrt(self.scale[0]))
        rng = np.random.default_rng((self.seed, position))
        params = draw_color(rng, self.color)
        box = random_crop(*image.size, rng, self.scale)
        pixels = resize(image, box, size, size)
        if rng.random() < 0.5:
            pixels = pixels.flip(2)
        return {
            "image": pixels.numpy(),
            "group": np.array(g),
            "params": params,
            "source": source.spec,
            "bad": "\n".join(bad),
        }


def size_at(step, image_sizes, seed):
    """The image size of a step. Each size comes once in a round of as many steps, in random order."""
    n = len(image_sizes)
    return image_sizes[permuted_index(step % n, n, seed, step // n)]


def positions(step, batch, rank, world):
    """The sampler: for each step from `step` on, the positions of this process's part of the global batch."""
    for first in itertools.count(step * batch + rank * batch // world, batch):
        yield range(first, first + batch // world)


def batches(
    groups,
    image_sizes,
    batch,
    seed=0,
    rank=0,
    world=1,
    start_step=0,
    workers=4,
    scale=(0.4, 1.0),
    color=1.0,
):
    """Endlessly, this process's part of each global batch from `start_step` on: b = batch // world images.

    image_sizes: sides in pixels; a step takes one of them, see size_at.
    Yields {"image": uint8 [b, 3, S, S], "group": int64 [b] (index into groups), "params": float32 [b, 11] for
    `augment`, "bad": ["path: reason"] of images that others replaced}, pinned if there is a GPU and enough
    /dev/shm. What step k holds depends on groups, image_sizes, batch, seed, scale and color alone.
    UserError if more than one in ten images of a source cannot be read.
    """
    for group in groups:
        for source in group.sources:
            source.prepare(max(image_sizes))
    workers *= hasattr(os, "fork")  # on Windows the main process reads the images
    samples = Samples(groups, image_sizes, batch, seed, scale, color)
    num_read, num_failed = Counter(), Counter()  # by source
    step = start_step
    restarts = 0
    shared = True  # workers put batches into shared memory; else they send images through pipes
    while True:
        try:
            for item in DataLoader(
                samples,
                batch_sampler=positions(step, batch, rank, world),
                num_workers=workers,
                collate_fn=default_collate if shared else list,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_signals,
                multiprocessing_context="fork" if workers else None,
            ):
                if workers:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in the caller
                item = item if shared else default_collate(item)
                check_readable(item, num_read, num_failed)
                item["bad"] = "\n".join(filter(None, item["bad"])).splitlines()
                yield item
                step += 1
                restarts = 0
        except UserError as error:  # of a worker: with a traceback before the message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        except (RuntimeError, OSError, EOFError) as error:  # how a killed worker shows
            is_full = "shared memory" in str(error)
            if not workers or "in DataLoader worker process" in str(error) and not is_full:  # a defect
                raise
            restarts += 1
            if restarts > 3:
                raise UserError("data workers keep crashing: use fewer --workers, or 0") from error
            error.with_traceback(None)  # frees the loader: its workers, its memory
            shared &= not is_full
            print(f"data: {'/dev/shm is full, workers use pipes' if is_full else 'a worker was killed'}, "
                  f"starting again at step {step}", file=sys.stderr)


def check_readable(batch, num_read, num_failed):
    """UserError if more than one in ten images of a source could not be read. The counters are by source."""
    num_read.update(batch["source"])
    for source, bad in zip(batch["source"], batch["bad"]):
        num_failed[source] += bad != ""
        if bad and num_failed[source] > max(10, num_read[source] / 10):
            raise UserError(f"{source}: {num_failed[source]} of {num_read[source]} reads failed, "
                            f"more than one in ten; the last: {bad.splitlines()[-1]}")


def held_out_images(groups, image_size, count):
    """`count` images of each group, spread over the held-out images of its sources, as center crops:
    uint8 [count * G, 3, S, S]."""
    images = []
    for group in groups:
        sources = [source.held_out(count) for source in group.sources]
        for source in sources:
            source.prepare(image_size)
        for k in range(count):
            source = sources[k % len(sources)]
            image, _ = read_or_next(source, k * source.count // count, image_size)
            images.append(center_crop(image, image_size))
    return torch.stack(images)


# ---- Files and pictures for people -------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """`with atomic_write(path) as file:` writes a file that is complete or not there: under another name,
    which it then renames. Makes its folder. If the disk refuses: a UserError, and nothing is left behind.
    """
    temporary = f"{path}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        raise


def check_writable(folder):
    """Makes a folder and writes into it, before the work whose results go there. UserError if that fails."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder (of the cache: "
                        "DUNE_CACHE)") from None


def save_png(image, path):
    with atomic_write(path) as file:
        image.save(file, "PNG")
    return path


def contact_sheet(rows, path, columns=(), cell=224):
    """Pictures in a grid of equal square cells, on white, as PNG. Returns the path.

    rows: lists of uint8 arrays or tensors, [3, h, w] or [h, w, 3]; columns: captions of one or two lines;
    cell: side of a cell in pixels, to which each picture is scaled.
    """
    step = cell + 6
    sheet = Image.new("RGB", (step * len(rows[0]), 40 + step * len(rows)), "white")
    for c, text in enumerate(columns):
        ImageDraw.Draw(sheet).text((step * (c + 0.5), 38), text, "#222", font_size=14, anchor="md")
    for r, row in enumerate(rows):
        for c, pixels in enumerate(map(torch.as_tensor, row)):
            if len(pixels) == 3:
                pixels = pixels.permute(1, 2, 0)
            picture = Image.fromarray(pixels.contiguous().numpy())
            square = ImageOps.pad(picture, (cell, cell), color="white")
            sheet.paste(square, (step * c + 3, 40 + step * r))
    return save_png(sheet, path)


@torch.no_grad()
def pca_sheet(student, teachers, images, path):
    """Features as colors, as in the paper's Figure 2: the student's own, and of each teacher its features and
    what the student predicts of them, in the same colors. Returns the path of the PNG.

    student: a DUNE or None; teachers: {name: FrozenTeacher}; images: uint8 [B, 3, H, W].
    """
    encoder = student.eval().encoder if student else next(iter(teachers.values()))
    x = normalize(images.to(next(encoder.parameters()).device))
    grid = dune.token_grid(x, encoder.patch_size)
    columns = {"image": images.cpu()}
    if student:
        predictions = student(x)
        columns["student"], = pca_colors([encoder(x)], grid)
    for name, teacher in teachers.items():
        features = [teacher(x, grid)]
        if student and name in predictions:
            features = [student.teacher_norms[name](features[0]), predictions[name]]
        columns.update(zip((f"teacher\n{name}", f"student as\n{name}"), pca_colors(features, grid)))
    return contact_sheet(list(zip(*columns.values())), path, list(columns))


def pca_colors(features, grid):
    """Patch features as colors: three principal components of the first entry, the same for all entries.

    features: list of {"patch": [B, N, D]}; grid: (rows, columns). -> list of uint8 [B, rows, columns, 3]
    """
    flat = features[0]["patch"].float().flatten(0, 1)
    mean = flat.mean(0)
    variances, directions = torch.linalg.eigh(flat.T.cov(correction=0))  # the largest are the last
    spread = 4 * variances[-3:].clamp(min=1e-12).sqrt()  # gray, if nothing differs
    pictures = []
    for tokens in features:
        colors = (tokens["patch"].float() - mean) @ directions[:, -3:] / spread + 0.5
        colors = (colors.clamp(0, 1) * 255).byte()
        pictures.append(colors.unflatten(1, grid).cpu())
    return pictures


COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #bcbd22".split()


def palette(n):
    """uint8 [n + 1, 3]: n colors that differ, then black for what is ignored."""
    colors = np.random.default_rng(2).integers(40, 256, (n + 1, 3), dtype=np.uint8)
    colors[n] = 0
    return colors


def depth_colors(depth, low, high):
    """[H, W] in meters -> uint8 [H, W, 3], red at `low` to blue at `high` on a log scale. 0 is black."""
    depth = np.asarray(depth)
    near = np.interp(np.log(depth.clip(low)), np.log([low, high]), [1, 0])
    colors = np.stack([near, 2 * np.minimum(near, 1 - near), 1 - near], -1)
    return (255 * colors * (depth > 0)[..., None]).astype(np.uint8)


def line_plot(path, panels):
    """Line plots side by side, as PNG. Axes begin at 0, or below. Returns the path.

    panels {title: {label: (x values, y values)}}; points with None, NaN or infinity are left out.
    """
    image = Image.new("RGB", (560 * len(panels), 300), "white")
    draw = ImageDraw.Draw(image)
    for k, (title, curves) in enumerate(panels.items()):
        left = 560 * k + 60
        draw.text((left, 8), title, "black")
        draw_curves(draw, left, curves)
    return save_png(image, path)


def draw_curves(draw, left, curves):
    """The curves, ticks and labels of one panel. Its lower left corner is (left, 270), its size 480 x 240."""
    lines = []
    for values in curves.values():
        line = np.array(values, float).T  # [points, 2]
        lines.append(line[np.isfinite(line).all(1)])
    points = np.concatenate([*lines, [[0, 0]]])
    low = points.min(0)
    span = np.maximum(points.max(0) - low, 1e-9)
    for share in np.linspace(0, 1, 5):
        x, y = low + span * share
        height = 270 - 240 * share
        draw.text((left - 6, height), f"{y:.3g}", "#555", anchor="rm")
        draw.text((left + 480 * share, 276), f"{x:.4g}", "#555", anchor="ma")
    for k, (label, line) in enumerate(zip(curves, lines)):
        color = COLORS[k % len(COLORS)]
        pixels = (left, 270) + (line - low) / span * (480, -240)
        draw.line(pixels.flatten().tolist(), color, width=2)
        draw.text((left + 474, 35 + 14 * k), label, color, anchor="ra")


def show_data(groups, teachers, size, path):
    """Prints what the sources hold and who learns from it, writes a picture of samples, group by group."""
    for group in groups:
        print(f"{group.name}: for {', '.join(group.teachers)}; with --sharing own+generic for "
              f"{'all teachers' if group.generic else 'nobody else'}")
        for source in group.sources:
            print(f"    {source.count:,} images in {source.spec}{source.left_out}")
    batch = next(batches(groups, [size], 32 * len(groups), workers=0))
    print(f"unreadable: {len(batch['bad'])} of {len(batch['image'])}", *batch["bad"], sep="\n  ")
    pixels = recolor(batch["image"] / 255, batch["params"])
    rows = (pixels * 255).byte().split(len(groups))  # position p is of group p % G
    contact_sheet(rows[:8], path, [group.name for group in groups])
    print(f"wrote {path}: samples as the networks see them")


# Procedural scenes: three domains, one ray caster. A seed gives the same scene at any image size.
# World frame: meters, y down, the floor at y = 0. Camera frame: x right, y down, z forward.

TURN = 2 * math.pi
PATTERNS = {  # shares of the second color; one period per unit
    "plain": lambda u, v: 0 * u,
    "stripes": lambda u, v: 0.5 + 3 * np.sin(TURN * v),
    "checks": lambda u, v: 0.5 + 9 * np.sin(math.pi * u) * np.sin(math.pi * v),
    "dots": lambda u, v: 3 * np.cos(TURN * u) + 3 * np.cos(TURN * v) - 2,
    "rings": lambda u, v: 0.5 + 3 * np.sin(TURN * np.hypot(u, v)),
}


@dataclass
class Solid:
    """A box or a ball with half axes `half` (meters); the columns of `rotation` are their directions."""
    shape: str
    center: np.ndarray
    half: np.ndarray
    rotation: np.ndarray
    label: int = 0

    def paint(self, color, pattern, period):
        """color: hue, saturation, value; the pattern's second color is darker; its period is in meters."""
        hue, saturation, value = color
        light = colorsys.hsv_to_rgb(*color)
        dark = colorsys.hsv_to_rgb(hue, saturation, 0.55 * value)
        self.colors = np.array([light, dark], np.float32)[..., None]
        self.pattern = PATTERNS[pattern]
        self.period = period

    def place(self, rotation, eye):
        """Express the solid in a camera's frame: matrix @ point + origin maps it to the unit box or ball."""
        self.position = rotation @ (self.center - eye)
        matrix = rotation @ self.rotation / self.half
        self.matrix = np.float32(matrix.T)
        self.origin = -self.matrix @ np.float32(self.position)

    def window(self, ray):
        """Slices (rows, cols) of pixels whose rays may meet the solid. ray [S]: x / z of pixel centers."""
        radius = np.linalg.norm(self.half)  # of a ball around the solid
        x, y, z = self.position
        if z - radius < 0.1:
            return slice(None), slice(None)
        reach = np.array([-radius, radius])
        window = []
        for center in (y, x):
            ends = np.divide.outer(center + reach, z + reach)
            first, last = ray.searchsorted([ends.min(), ends.max()])
            window.append(slice(first, last))
        return tuple(window)

    def intersect(self, x, y):
        """Depths at which the rays (x, y, 1) enter and leave the solid. enter >= leave: they miss it."""
        right, down, forward = self.matrix.T[..., None, None]
        d = right * x + down * y + forward  # [3, rows, cols]
        o = self.origin[:, None, None]
        if self.shape == "box":
            d[d == 0] = 1e-6
            middle = -o / d
            reach = np.abs(1 / d)
            return (middle - reach).max(0), (middle + reach).min(0)
        a = (d * d).sum(0)
        b = (o * d).sum(0)
        c = (o * o).sum(0) - 1
        root = np.sqrt(np.maximum(b * b - a * c, 0))
        return (-b - root) / a, (-b + root) / a

    def surface(self, points):
        """Unit normals [3, n] in the camera's frame, and texture coordinates in meters, of points [3, n]."""
        q = self.matrix @ points + self.origin[:, None]
        half = np.float32(self.half)
        texture = q * half[:, None]
        u, v = texture[:2]
        outward = q
        if self.shape == "box":
            x, y, z = np.abs(q)
            on_x = x > np.maximum(y, z)
            on_y = ~on_x & (y > z)
            on_z = ~(on_x | on_y)
            outward = q * [on_x, on_y, on_z]
            u = np.where(on_x, texture[2], u)
            v = np.where(on_y, texture[2], v)
        normals = self.matrix.T @ outward
        normals = normals / np.linalg.norm(normals, axis=0)
        return normals, u, v


def render(solids, eye, target, focal, lamp, size):
    """Cast a ray per pixel. The first solid is the room, seen from inside. focal is in image sides.

    Returns "image" uint8 [S, S, 3], "depth" fp32 [S, S] in meters along z, "normals" fp32 [S, S, 3] in the
    camera's frame, "labels" int64 [S, S].
    """
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross([0, 1, 0], forward)
    right = right / np.linalg.norm(right)
    down = np.cross(forward, right)
    rotation = np.stack([right, down, forward])
    pixel = (np.arange(size) + 0.5) / size
    ray = (pixel - 0.5) / focal
    x = ray.astype(np.float32)[None]
    y = x.T
    room = solids[0]
    room.place(rotation, eye)
    depth = room.intersect(x, y)[1]
    nearest = np.zeros((size, size), np.uint8)
    for i, solid in enumerate(solids[1:], 1):
        solid.place(rotation, eye)
        window = solid.window(ray)
        rows, cols = window
        enter, leave = solid.intersect(x[:, cols], y[rows])
        hit = (enter < leave) & (enter > 0.05)
        hit &= enter < depth[window]
        depth[window][hit] = enter[hit]
        nearest[window][hit] = i

    points = np.stack([x * depth, y * depth, depth])
    points = points.reshape(3, -1)
    normals = np.zeros_like(points)
    image = np.zeros_like(points)
    light = np.float32(rotation @ (lamp - eye))
    for i, solid in enumerate(solids):
        pixels = np.flatnonzero(nearest == i)
        visible = points[:, pixels]
        normal, u, v = solid.surface(visible)
        if solid is room:
            normal = -normal
        beam = light[:, None] - visible
        facing = (normal * beam).sum(0)
        facing = facing / np.linalg.norm(beam, axis=0)
        share = solid.pattern(u / solid.period, v / solid.period)
        first, second = solid.colors
        color = first + share.clip(0, 1) * (second - first)
        shade = 0.5 + 0.5 * np.maximum(facing, 0)
        image[:, pixels] = color * shade
        normals[:, pixels] = normal
    image = (255 * image).astype(np.uint8)
    labels = np.array([solid.label for solid in solids])
    return {
        "image": image.T.reshape(size, size, 3),
        "depth": depth,
        "normals": normals.T.reshape(size, size, 3),
        "labels": labels[nearest],
    }


def any_turn(rng):
    """A random rotation about the vertical axis."""
    angle = rng.uniform(0, TURN)
    c, s = math.cos(angle), math.sin(angle)
    return np.array([
        [c, 0, s],
        [0, 1, 0],
        [-s, 0, c],
    ])


def any_color(rng):
    return rng.uniform((0, 0.3, 0.5), (1, 0.8, 1))


def furnished_room(rng, count, distance, spread, patterns):
    """A room of about 6 x 6 meters. The furniture stands at least `distance` from its middle, and within the
    angle `spread` (radians) of the direction in which the camera looks."""
    half = rng.uniform((2.8, 1.2, 2.8), (3.6, 1.5, 3.6))
    center = half * [0, -1, 0]
    solids = [Solid("box", center, half, any_turn(rng))]
    for i in range(count):
        angle = spread * (2 * (i + rng.random()) / count - 1)
        half = rng.uniform(0.2, 0.5, 3)
        away = rng.uniform(distance, distance + 1)
        x = away * math.sin(angle)
        z = away * math.cos(angle)
        center = np.array([x, -half[1], z])
        shape = rng.choice(["box", "ball"])
        solids.append(Solid(shape, center, half, any_turn(rng)))
    for solid in solids:
        pattern = rng.choice(patterns)
        period = rng.uniform(0.25, 0.5)
        solid.paint(any_color(rng), pattern, period)
    return solids


def photograph(rng, solids, distance, height, size):
    """Look at the middle of the room, `height` above the floor, from at least `distance`."""
    eye = np.array([0, rng.uniform(-1.7, -0.9), -distance - rng.uniform(0, 0.4)])
    target = np.array([rng.uniform(-0.2, 0.2), -height, 0])
    lamp = np.array([0, -2.2, 0])
    focal = rng.uniform(0.7, 0.9)
    return render(solids, eye, target, focal, lamp, size)


def rooms(seed, size=112):
    """A furnished room. Its depth and normals are the labels."""
    rng = np.random.default_rng((0, seed))
    count = rng.integers(4, 8)
    solids = furnished_room(rng, count, 0.6, math.pi, list(PATTERNS))
    height = rng.uniform(0.3, 0.9)
    return photograph(rng, solids, 2.1, height, size)


KIND_TABLE = """
kind      pattern  shape  center              half axes
table     dots     box    0.00 -0.70  0.00    0.60 0.08 0.45
table     dots     box    0.00 -0.31  0.00    0.12 0.31 0.12
chair     stripes  box    0.00 -0.40  0.00    0.35 0.08 0.35
chair     stripes  box    0.00 -0.75  0.30    0.35 0.40 0.07
chair     stripes  box    0.00 -0.20  0.00    0.12 0.20 0.12
lamp      checks   ball   0.00 -0.95  0.00    0.40 0.25 0.40
lamp      checks   box    0.00 -0.40  0.00    0.07 0.40 0.07
lamp      checks   ball   0.00 -0.06  0.00    0.25 0.06 0.25
mushroom  rings    ball   0.00 -0.70  0.00    0.55 0.30 0.55
mushroom  rings    ball   0.00 -0.30  0.00    0.20 0.40 0.20
snowman   dots     ball   0.00 -0.35  0.00    0.40 0.35 0.40
snowman   dots     ball   0.00 -0.90  0.00    0.28 0.28 0.28
tower     stripes  box    0.00 -0.20  0.00    0.50 0.20 0.50
tower     stripes  box    0.00 -0.60  0.00    0.33 0.20 0.33
tower     stripes  box    0.00 -0.95  0.00    0.16 0.16 0.16
dumbbell  rings    ball  -0.50 -0.35  0.00    0.33 0.33 0.33
dumbbell  rings    ball   0.50 -0.35  0.00    0.33 0.33 0.33
dumbbell  rings    box    0.00 -0.35  0.00    0.40 0.10 0.10
cross     checks   box    0.00 -0.55  0.00    0.14 0.55 0.14
cross     checks   box    0.00 -0.75  0.00    0.50 0.14 0.14
"""
SOLIDS_OF_KINDS = [line.split() for line in KIND_TABLE.splitlines()[2:]]
KINDS = list(dict.fromkeys(row[0] for row in SOLIDS_OF_KINDS))


def objects(seed, size=112):
    """An object in the middle of a room. Its kind and its mask are the labels."""
    rng = np.random.default_rng((1, seed))
    count = rng.integers(1, 4)
    solids = furnished_room(rng, count, 1.2, 1, ["plain"])
    kind = rng.integers(len(KINDS))
    turn = any_turn(rng)
    scale = rng.uniform(1.0, 1.3)
    hue = kind / len(KINDS) + rng.uniform(-0.06, 0.06)
    for name, pattern, shape, *numbers in SOLIDS_OF_KINDS:
        if name == KINDS[kind]:
            center, half = scale * np.array(numbers, float).reshape(2, 3)
            solid = Solid(shape, turn @ center, half, turn, 1 + kind)
            solid.paint((hue % 1, 0.8, 1), pattern, 0.25)
            solids.append(solid)
    scene = photograph(rng, solids, 1.7, 0.5, size)
    return {**scene, "kind": kind}


PARTS = "background head torso arm leg".split()


def bone(frame, length, swing, spread):
    """A vector that hangs down, swung forward and spread to the left (radians), in a frame [3, 3]."""
    down = math.cos(spread) * math.cos(swing)
    forward = math.cos(spread) * math.sin(swing)
    return length * frame @ [math.sin(spread), down, forward]


def limb(part, start, end, radius):
    """A ball stretched from start to end."""
    length = np.linalg.norm(end - start)
    w = (end - start) / length - [0, 1, 0]
    reflection = 2 * np.outer(w, w) / (w @ w)
    rotation = np.eye(3) - reflection  # maps the y axis to end - start
    half = np.array([radius, 0.55 * length, radius])
    middle = (start + end) / 2
    label = PARTS.index(part)
    return Solid("ball", middle, half, rotation, label)


def body(rng, x):
    """The solids of a person in some pose, who stands at (x, 0)."""
    tall = rng.uniform(1.5, 1.9)
    frame = tall * any_turn(rng)
    hips = np.array([x, -0.5 * tall, 0])
    lean = rng.uniform(-0.3, 0.2)
    nod = rng.uniform(-0.3, 0.3)
    neck = hips - bone(frame, 0.3, lean, 0)
    crown = neck - bone(frame, 0.2, nod, 0)
    limbs = [
        limb("torso", hips, neck, 0.12 * tall),
        limb("head", neck, crown, 0.08 * tall),
    ]
    for side in (-1, 1):
        shoulder = neck + frame @ [0.14 * side, 0.03, 0]
        swing = rng.uniform(-0.5, 2.5)
        bend = rng.uniform(0, 1.5)
        spread = side * rng.uniform((0.1, -0.3), (0.8, 0.5))
        elbow = shoulder + bone(frame, 0.18, swing, spread[0])
        wrist = elbow + bone(frame, 0.2, swing + bend, spread[1])
        hip = hips + frame @ [0.08 * side, 0, 0]
        swing = rng.uniform(-0.5, 0.9)
        bend = rng.uniform(0, 0.8)
        spread = side * rng.uniform(0, (0.4, 0.2))
        knee = hip + bone(frame, 0.25, swing, spread[0])
        ankle = knee + bone(frame, 0.26, swing - bend, spread[1])
        limbs += [
            limb("arm", shoulder, elbow, 0.05 * tall),
            limb("arm", elbow, wrist, 0.045 * tall),
            limb("leg", hip, knee, 0.08 * tall),
            limb("leg", knee, ankle, 0.06 * tall),
        ]
    return limbs


def dress(rng, limbs):
    """Paint a person: a T-shirt and trousers."""
    skin = rng.uniform((0.03, 0.3, 0.4), (0.1, 0.6, 1))
    shirt = any_color(rng)
    trousers = any_color(rng)
    colors = [shirt, skin]
    colors += 2 * [shirt, skin, trousers, trousers]
    for solid, color in zip(limbs, colors):
        solid.paint(color, "plain", 1)


def people(seed, size=112):
    """One or two people in a room. The parts of their bodies are the labels."""
    rng = np.random.default_rng((2, seed))
    count = rng.integers(3)
    solids = furnished_room(rng, count, 1.2, 1, ["plain"])
    places = [0]
    if rng.random() < 0.3:
        places = [-0.45, 0.45]
    for x in places:
        limbs = body(rng, x)
        dress(rng, limbs)
        solids += limbs
    return photograph(rng, solids, 1.7, 0.85, size)


SCENES = {
    "objects": objects,
    "rooms": rooms,
    "people": people,
}


def labelled_scenes(domain, start, count, size=112):
    """The scenes of seeds `start` to `start + count`, drawn by all cores, as tensors.

    "image" uint8 [n, 3, S, S]; "depth" fp32 [n, S, S], meters along z; "normals" fp32 [n, S, S, 3] in the
    camera's frame; "labels" int64 [n, S, S]: 0 is the background, the rest 1 + kind or an index in PARTS; of
    objects also "kind" int64 [n], an index in KINDS.
    """
    draw = functools.partial(SCENES[domain], size=size)
    scenes = run_parallel(draw, range(start, start + count))
    batch = default_collate(scenes)
    images = batch["image"].permute(0, 3, 1, 2)
    return {**batch, "image": images.contiguous()}
