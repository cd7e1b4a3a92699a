"""Images: where they lie, in which order they are drawn, and how they reach the networks.

    python data.py --data dinov2=/d/in19k,/d/gldv2@0.5 --data mast3r=/d/habitat.tar     # what is there? + a contact sheet
    python data.py --bench                                                              # images/s of each stage

The file follows an image on its way: an index finds it, `parse_data` gives it to teachers, `Order` decides when it is drawn, `decode`
and `crop_resize` make it uint8 in a worker process, `batches` hands out balanced batches, `augment` colours them on the device.
"""
import argparse, array, collections, contextlib, functools, hashlib, io, itertools, math, multiprocessing, operator, os, random, re
import signal, stat, sys, tarfile, tempfile, threading, time, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, get_worker_info

import dune
from dune import Oops

try:
    import fcntl
except ImportError:  # Windows: processes that start together each build the index, which does no harm
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHARING = ("all", "own", "own+generic")

# ---- Index: twenty million paths in one file that all processes share ----------------------------------------------------------------
# A source is a set of containers (folders, tar archives, or one list), each with its entries: names, and in a tar "name\0offset:length".
# The file is int64 [version, entries N, containers C, bytes of paths, bytes of names], first entry of each container [C], path_ends [C+1],
# stamps [C,2], name_ends [N+1], then the paths and the names. Names are read from it by offset, so they live in the page cache, once.
INDEX_VERSION = 1


def stamp(path):
    """[mtime in ns, size] by which a change of a container is noticed; a folder's size says nothing and counts as 0."""
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return [info.st_mtime_ns, 0 if stat.S_ISDIR(info.st_mode) else info.st_size]
    return [0, 0]


def tar_entries(path):
    """b"name\\0offset:length" of every image in an uncompressed tar, from its headers alone. Oops if the archive ends early."""
    entries = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []                                       # tarfile would keep a million objects
                base = os.path.basename(member.name)
                if member.isreg() and base.lower().endswith(SUFFIXES) and base[0] != ".":
                    entries.append(os.fsencode(f"{member.name}\0{member.offset_data}:{member.size}"))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):                    # tarfile says nothing if a header is cut
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise Oops(f"{path}: not a whole, uncompressed tar archive ({error}); copy it again or remove it") from None
    return entries


def list_entries(path):
    """The paths in a text file, one a line, relative to it or absolute. Oops if any of them does not exist."""
    with open(path, "rb") as file:
        entries = [line for line in map(bytes.strip, file) if line and not line.startswith(b"#")]
    missing = [os.fsdecode(e) for e in entries if not os.path.exists(os.path.join(os.fsencode(os.path.dirname(path)), e))]
    if missing:
        raise Oops(f"{path}: {len(missing):,} of its {len(entries):,} paths do not exist, first {', '.join(missing[:3])}")
    return entries


def scan(root):
    """Walks a source and yields (container path, stamp, entries), in an order that depends on names alone."""
    if os.path.isfile(root):
        yield root, stamp(root), (tar_entries if root.endswith(".tar") else list_entries)(root)
        return
    seen = set()                                                       # links may form circles
    complain = lambda error: print(f"data: left out {error.filename}: {error.strerror}", file=sys.stderr)
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=complain):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        subfolders[:] = sorted(s for s in subfolders if s[0] != ".")
        files = sorted(f for f in files if f[0] != ".")
        yield folder, stamp(folder), [os.fsencode(f) for f in files if f.lower().endswith(SUFFIXES)]
        for tar in (os.path.join(folder, f) for f in files if f.endswith(".tar")):
            yield tar, stamp(tar), tar_entries(tar)


def write_index(file, root, containers):
    """Writes the index of (path, stamp, entries) triples beside `file`, then renames it there. Oops if there are no images."""
    names, name_ends, paths, path_ends, firsts, stamps = bytearray(), array.array("q", [0]), bytearray(), [0], [], []
    begun = said = time.time_ns()
    for path, mark, entries in containers:
        if time.time_ns() - said > 10e9:
            said = time.time_ns()
            print(f"data: indexing {root}, once: {len(name_ends) - 1:,} images so far", file=sys.stderr)
        firsts.append(len(name_ends) - 1)
        name_ends.extend(itertools.islice(itertools.accumulate(map(len, entries), initial=len(names)), 1, None))
        names += b"".join(entries)
        paths += os.fsencode(path[len(root):].lstrip("/"))
        path_ends.append(len(paths))
        stamps += mark if mark[0] < begun else [0, 0]                  # changed while we looked: look again next time
    count = len(name_ends) - 1
    if not count:
        raise Oops(f"{root} holds no images (no {' '.join(SUFFIXES)} in {len(firsts)} folders, archives or lists)")
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(file), prefix=".dune-", delete=False) as out:
        try:
            for part in ([INDEX_VERSION, count, len(firsts), len(paths), len(names)], firsts, path_ends, stamps, name_ends):
                out.write(np.asarray(part, np.int64).data)
            out.write(paths), out.write(names), out.flush()
            os.chmod(out.name, 0o644)
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise
    print(f"data: indexed {root}: {count:,} images, {(time.time_ns() - begun) / 1e9:.1f} s, kept as {file}", file=sys.stderr)


class Index:
    """The paths of one source, read from the file `write_index` wrote; takes a few MB in a process, however many images there are."""

    def __init__(self, file, root):
        self.path, self.root, self.file = file, root, open(file, "rb", buffering=0)
        version, self.count, n, path_bytes, name_bytes = self.ints(0, 5).tolist()
        self.ends_at = 5 + n + (n + 1) + 2 * n
        paths_at = 8 * (self.ends_at + self.count + 1)
        self.names_at = paths_at + path_bytes
        if version != INDEX_VERSION or os.fstat(self.file.fileno()).st_size != self.names_at + name_bytes:
            raise ValueError("an index of another version, or cut short")
        self.firsts, self.path_ends, self.stamps = self.ints(5, n), self.ints(5 + n, n + 1), self.ints(6 + 2 * n, 2 * n)
        self.paths = os.pread(self.file.fileno(), path_bytes, paths_at)

    def __reduce__(self):
        return Index, (self.path, self.root)

    def ints(self, at, count):
        return np.frombuffer(os.pread(self.file.fileno(), 8 * count, 8 * at), np.int64)

    def container(self, c):
        a, b = self.path_ends[c:c + 2].tolist()
        return os.path.join(self.root, os.fsdecode(self.paths[a:b])) if b > a else self.root

    def fresh(self):
        """Does the index still fit its source? Looks at folders and archives, not at single images."""
        ends, root = self.path_ends.tolist(), os.fsencode(self.root)
        paths = [os.path.join(root, self.paths[a:b]) if b > a else root for a, b in zip(ends, ends[1:])]
        with ThreadPool(8) as pool:                                    # network file systems answer many at once
            return [*itertools.chain.from_iterable(pool.map(stamp, paths, chunksize=512))] == self.stamps.tolist()

    def locate(self, i):
        """(path, offset, length) of image i; offset and length are None for a file of its own."""
        a, b = self.ints(self.ends_at + i, 2).tolist()
        name, _, span = os.pread(self.file.fileno(), b - a, self.names_at + a).partition(b"\0")
        container = self.container(int(np.searchsorted(self.firsts, i, "right")) - 1)
        if span:
            return (container, *map(int, span.split(b":")))
        folder = os.path.dirname(container) if container is self.root and self.root.endswith(".txt") else container
        return os.path.join(folder, os.fsdecode(name)), None, None


def cache_folder():
    """Where indexes of sources that cannot be written beside, and the tiny specialists, are kept."""
    return os.environ.get("DUNE_CACHE") or os.path.expanduser("~/.cache/dune")


def open_index(root):
    """The index of a source, from beside it or from the cache folder ($DUNE_CACHE, ~/.cache/dune); built if there is none that fits."""
    key = f"{os.path.basename(root)}-{hashlib.sha1(os.fsencode(root)).hexdigest()[:12]}"
    cache = cache_folder()
    places = [f"{root}.dune-index", f"{cache}/{key}.dune-index"]

    def existing():
        for place in places:
            with contextlib.suppress(OSError, ValueError):
                if (index := Index(place, root)).fresh():
                    return index

    if index := existing():
        return index
    lock = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                             # of this machine's processes one builds, the others wait and read
            fcntl and fcntl.flock(lock, fcntl.LOCK_EX)
        if index := existing():
            return index
        with contextlib.suppress(OSError):
            os.makedirs(cache, exist_ok=True)
        for place in places:
            folder = os.path.dirname(place)
            if os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222:  # root may write where nobody is meant to
                write_index(place, root, scan(root))
                return Index(place, root)
    finally:
        os.close(lock)
    raise Oops(f"cannot write an index beside {root} nor in {cache}: set DUNE_CACHE to a folder that can be written")


# ---- Sources, and which teacher learns from which ------------------------------------------------------------------------------------
class Files:
    """The images of a folder, a tar archive, a folder of archives, or a list: `path[@turn:WORD][@WEIGHT]`."""

    def __init__(self, path, weight=1.0, turn=None):
        self.spec, self.weight, self.turn = path, weight, turn
        root = os.path.realpath(path)
        if not os.path.exists(root):
            raise Oops(f"{path} does not exist (a source is a folder, a .tar, a .txt list or scenes:NAME; behind it @turn:WORD, @WEIGHT)")
        if not os.access(root, os.R_OK):
            raise Oops(f"{path} cannot be read: its permissions do not allow it")
        if not (os.path.isdir(root) or root.endswith((".tar", ".txt"))):
            raise Oops(f"{path} is neither a folder nor a .tar archive nor a .txt list of paths")
        self.index = open_index(root)
        self.count = self.index.count

    def name(self, i):
        path, offset, _ = self.index.locate(i)
        return path if offset is None else f"{path}@{offset}"

    def held_out(self, count):
        return self

    def open(self, i):
        """Image i as a binary file. Raises OSError."""
        path, offset, length = self.index.locate(i)
        if offset is None:
            return open(path, "rb")
        with open(path, "rb") as tar:
            return io.BytesIO(os.pread(tar.fileno(), length, offset))

    def read(self, i, size=0, crop=None):
        """Image i as `decode` gives it: (upright RGB image, box). Oops "path: reason" if it cannot be read."""
        try:
            with self.open(i) as file:
                return decode(file, size, crop, turn=bool(self.turn) and self.turn in self.name(i))
        except Exception as error:                                     # Pillow's plugins raise nearly everything
            raise Oops(f"{self.name(i)}: {reason(error)}") from None


class Scenes:
    """Procedural images; image i is the one of seed start + i. Spec: `scenes:NAME[:START-STOP]`, without end unless STOP is given."""

    def __init__(self, spec, weight=1.0):
        parts = re.fullmatch(r"scenes:(\w+)(?::(\d+)-(\d+))?", spec)
        if not parts or parts[1] not in SCENES:
            raise Oops(f"{spec}: write scenes:NAME or scenes:NAME:START-STOP (seeds), NAME one of {', '.join(SCENES)}")
        self.spec, self.weight, self.kind = spec, weight, parts[1]
        self.start, stop = int(parts[2] or 0), int(parts[3] or TEST_SCENES)
        self.count, self.kept = stop - self.start, None
        if self.count < 1:
            raise Oops(f"{spec} holds no images: START must be less than STOP")

    def name(self, i):
        return f"scenes:{self.kind}:{self.start + i}"

    def held_out(self, count):
        return Scenes(f"scenes:{self.kind}:{TEST_SCENES}-{TEST_SCENES + count}")

    def keep(self, size):
        """Draw a source of at most 192 MB once and for all, by all cores, before the worker processes start, which then share it."""
        if 3 * self.count * size**2 <= 192e6 and (self.kept is None or self.kept.shape[1] != size):
            self.kept = np.stack(draw_scenes(self.kind, self.start, self.count, size, operator.itemgetter("image")))

    def read(self, i, size=0, crop=None):
        size = size or 224
        kept = self.kept is not None and self.kept.shape[1] == size
        image = Image.fromarray(self.kept[i] if kept else SCENES[self.kind](self.start + i, size)["image"])
        return image, crop(*image.size) if crop else (0, 0, *image.size)


@dataclass
class Group:
    """The sources that belong together; every group has an equal part of every batch. `teachers` are the owners."""
    name: str
    sources: list
    teachers: tuple

    @property
    def generic(self):
        return any(t.startswith("dinov2") for t in self.teachers)      # DINOv2's sets show everything there is

    @property
    def count(self):
        return sum(s.count for s in self.sources)


def open_source(spec):
    """`path[@turn:WORD][@WEIGHT]` -> Files or Scenes. A weight of 0.5 draws its images half as often; turn rotates those with WORD in
    their path by -90°. Oops if there is nothing to open."""
    path, rules = re.fullmatch(r"(.*?)((?:@turn:[^@]+|@\d*\.?\d+)*)", spec.strip()).groups()
    rules = rules.split("@")[1:]
    weight = float(next((r for r in rules if r[0] != "t"), 1))
    if not weight:
        raise Oops(f"{spec}: a weight is a number above 0, such as @0.5")
    return Scenes(path, weight) if path.startswith("scenes:") else Files(path, weight, next((r[5:] for r in rules if r[0] == "t"), None))


def read_lines(spec):
    """The lines of a data file, or [spec]. A .txt is a data file if its first line names a teacher or a source, else a list of images."""
    if not (spec.endswith(".txt") and os.path.isfile(spec)):
        return [spec]
    with open(spec, errors="replace") as file:
        lines = [line for line in (re.sub(r"(^|\s)#.*", "", raw).strip() for raw in file) if line] or [""]
    source = re.split("[,@]", lines[0])[0]
    listing = source.lower().endswith(SUFFIXES) or not (re.match(r"[\w.-]+=|scenes:|.*\.(tar|txt)$", source) or os.path.isdir(source))
    return [spec] if listing else lines


def domain_of(teacher):
    """Which procedural scenes stand for a teacher's data."""
    return {"mast3r": "rooms", "multihmr": "people"}.get(teacher, "objects")


def parse_data(specs, teachers, scenes=""):
    """The groups that `--data` describes: `teacher=source,source…`, sources for all teachers, or a text file with such lines.

    specs: list of str; empty: each teacher learns from procedural scenes (scenes: ":START-STOP", their seeds). Returns [Group]; opens (and
    if need be builds) every index.
    Oops if a source is missing, empty or broken, or if the teachers in `specs` and `teachers` are not the same.
    """
    if not specs:
        kind = {t: teachers[t].domain for t in teachers}
        return [Group(k, [Scenes(f"scenes:{k}{scenes}")], tuple(t for t in teachers if kind[t] == k)) for k in dict.fromkeys(kind.values())]
    wanted = collections.defaultdict(list)
    for line in itertools.chain.from_iterable(map(read_lines, specs)):
        teacher, sources = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", line).groups()
        if teacher and teacher not in teachers:
            raise Oops(f"--data names {teacher}, which is not one of --teachers {','.join(teachers)}")
        wanted[teacher] += [s for s in sources.split(",") if s.strip()]
    poor = [t for t in teachers if not wanted.get(t) and not wanted.get(None)]
    if poor:
        raise Oops(f"--data has no images for {', '.join(poor)}: add --data {poor[0]}=PATH, or a PATH without a name for all teachers")
    groups = [Group(t or "shared", [open_source(s) for s in s_], (t,) if t else tuple(teachers)) for t, s_ in wanted.items() if s_]
    for group in groups:
        endless = [s.spec for s in group.sources if s.count >= TEST_SCENES]
        if endless and len(group.sources) > 1:                         # sources count by size: it would drown the others
            raise Oops(f"{endless[0]} has no end and cannot be mixed with other sources: say how many, {endless[0]}:0-100000")
    return groups


def teacher_mask(groups, teachers, sharing):
    """bool [groups, teachers] on the CPU: which teacher learns from the images of which group, under --sharing all | own | own+generic."""
    if sharing not in SHARING:
        raise Oops(f"--sharing {sharing}: choose one of {', '.join(SHARING)}")
    return torch.tensor([[sharing == "all" or t in g.teachers or sharing == "own+generic" and g.generic for t in teachers] for g in groups])


# ---- Order: which image is drawn when, a pure function -------------------------------------------------------------------------------
def mix(*numbers):
    """A 64-bit hash of integers (the finaliser of splitmix64, chained)."""
    h = 0
    for n in numbers:
        h = (h ^ n) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def shuffled(i, n, *key):
    """Place i of a pseudo-random permutation of range(n), without holding it: a Feistel network on the next power of 4."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:                                                        # walk until the place is in range again
        left, right = i >> half, i & mask
        for r in range(4):
            left, right = right, left ^ mix(right, r, *key) & mask
        i = left << half | right
        if i < n:
            return i


class Order:
    """The endless order of one group: `order(n)` -> (source, image) of draw n.

    A table of sources, as often as size * weight says, repeats for ever; within a source, pass follows pass, each in an order of its own,
    so no image comes twice before its source is through. `shuffle=False` goes through each source as it is indexed.
    """
    TABLE = 1 << 20

    def __init__(self, group, seed, shuffle=True):
        self.counts, self.seed, self.shuffle = [s.count for s in group.sources], seed, shuffle
        share = np.array([s.count * s.weight for s in group.sources])
        plain = all(s.weight == 1 for s in group.sources) and share.sum() <= self.TABLE
        self.quota = np.maximum(1, np.round(share if plain else share / share.sum() * self.TABLE)).astype(np.int64)
        if len(self.counts) == 1:
            self.quota[:] = 1
        self.table = np.repeat(np.arange(len(share), dtype=np.int32), self.quota)
        np.random.default_rng((seed, 1)).shuffle(self.table)
        self.before = np.empty(len(self.table), np.int32)              # how often this source has come before in the table
        self.before[np.argsort(self.table, kind="stable")] = np.concatenate([np.arange(q) for q in self.quota])

    def __call__(self, n):
        turn, place = divmod(n, len(self.table))
        s = int(self.table[place])
        epoch, i = divmod(turn * int(self.quota[s]) + int(self.before[place]), self.counts[s])
        return s, shuffled(i, self.counts[s], self.seed, s, epoch) if self.shuffle else i


# ---- Decode, crop, resize: on the CPU, to uint8 --------------------------------------------------------------------------------------
MAX_PIXELS = 90_000_000                                                # more than this is never held in memory
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}                   # EXIF orientation -> Image.Transpose
Image.MAX_IMAGE_PIXELS = None                                          # `decode` has its own limit, which knows of reduced scale
warnings.filterwarnings("ignore", module="PIL")


def reason(error):
    """An exception of opening or decoding, in few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__


def to_rgb(image):
    """Any mode as RGB: 16-bit and float are scaled to 8 bits, transparency is laid on white; CMYK, palette and grey as Pillow converts."""
    if image.mode[0] in "IF":
        values = np.asarray(image, np.float32)
        top = 65535 if image.mode[0] == "I" else max(float(values.max()), 1e-12)
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    elif image.mode != "RGB" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(file, size=0, crop=None, turn=False):
    """Decodes the first frame of an image file, upright and RGB.

    crop(width, height) -> (x0, y0, x1, y1), asked with the full size; size: the side to which that box will be resized. A JPEG is then
    decoded at 1/2, 1/4 or 1/8 as long as the box keeps twice that side: the difference stays below that of two good resampling filters.
    turn: rotate by -90° first. Returns (PIL image, box in its pixels). Raises whatever Pillow raises.
    """
    image = Image.open(file, formats=FORMATS)
    jpeg = image.format in ("JPEG", "MPO")
    pixels = image.width * image.height
    if pixels > MAX_PIXELS * (64 if jpeg and not image.info.get("progressive") else 1):
        raise Oops(f"{image.width} x {image.height} pixels are too many")
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:                                                  # broken EXIF in a whole picture
        orientation = 1
    turns = [UPRIGHT[orientation]] if orientation in UPRIGHT else []
    turns += [Image.Transpose.ROTATE_270] if turn else []
    width, height = image.size[::-1] if sum(t in (2, 4, 5, 6) for t in turns) % 2 else image.size  # a quarter turn
    box = crop(width, height) if crop else (0, 0, width, height)
    short, shrink = min(box[2] - box[0], box[3] - box[1]), 1
    while jpeg and shrink < 8 and (size and short >= 4 * shrink * size or pixels > MAX_PIXELS * shrink ** 2):
        shrink *= 2
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image = to_rgb(image)
    for t in turns:
        image = image.transpose(t)
    if image.width != width:
        box = [min(round(v * n / m), n - 1 + k // 2) for k, (v, n, m) in enumerate(zip(box, image.size * 2, (width, height) * 2))]
    return image, box


def load_image(path):
    """Any picture file as an upright PIL RGB image (a JPEG above 90 megapixels at reduced scale). Oops if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return decode(file)[0]
    except Exception as error:
        raise Oops(f"cannot read the image {path}: {reason(error)}") from None


def crop_resize(image, box, height, width):
    """The box (x0, y0, x1, y1) of a PIL RGB image, resized (bicubic, antialiased): uint8 [3, height, width]."""
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def centre(width, height):
    """The largest centred square."""
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def random_crop(width, height, rng, scale):
    """Random resized crop as torchvision defines it: area in `scale` (of the image's), aspect in 3/4..4/3 (log-uniform), any place."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))  # a very long image: its centre
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def val_transform(image, size):
    """Short side to `size`, centre crop: PIL RGB -> uint8 [3, size, size]."""
    return crop_resize(image, centre(*image.size), size, size)


def fit_image(image, longest, multiple):
    """The whole picture, longest side at most `longest`, both sides multiples of `multiple` (aspect kept that far): uint8 [3, h, w]."""
    sides = (image.height, image.width)
    h, w = (min(max(1, round(s * longest / max(sides) / multiple)), max(1, longest // multiple)) * multiple for s in sides)
    return crop_resize(image, (0, 0, *image.size), h, w)


# ---- Colour: on the device, batched, each image with parameters of its own -----------------------------------------------------------
# One row of parameters per image, drawn in the worker: the ops of the colour jitter in their order (-1: none), their factors, then
# greyscale (0/1), sigma of the blur (0: none), solarise (0/1).
NO_COLOUR = (-1, -1, -1, -1, 1, 1, 1, 0, 0, 0, 0)


def draw_colour(rng, share=1.0):
    """The recipe's random colour augmentation of one image, float32 [11]; only `share` of the images get any."""
    p = np.array(NO_COLOUR, np.float32)
    if rng.random() >= share:
        return p
    if rng.random() < 0.8:
        p[:4] = rng.permutation(4)
        p[4:8] = rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)
    p[8], p[9], p[10] = rng.random() < 0.2, rng.uniform(0.1, 5.0) * (rng.random() < 0.2), rng.random() < 0.2
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
    hue = torch.where(value == r, (g - b) * scale, torch.where(value == g, (b - r) * scale + 2, (r - g) * scale + 4))  # in sixths
    k = hue.add_(6 * turn) + constant((5.0, 3.0, 1.0), x.device)
    k -= torch.floor(k / 6).mul_(6)
    return value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)


def blur(x, sigma):
    """Gaussian blur, kernel 9, reflected at the border. Nine shifted sums a direction: on every device, in plain fp32."""
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, device=x.device) / sigma) ** 2)      # sigma [n,1,1,1] -> [n,1,1,9]
    taps = (taps / taps.sum(-1, keepdim=True)).split(1, -1)
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")
    for dim in (2, 3):
        size = x.shape[dim] - 8
        y = x.narrow(dim, 4, size) * taps[4]
        for k in range(4):
            y.addcmul_(x.narrow(dim, k, size) + x.narrow(dim, 8 - k, size), taps[k])
        x = y
    return x


OPS = (lambda x, f: (x * f).clamp_(0, 1),                                                  # brightness
       lambda x, f: torch.lerp(grey(x).mean((2, 3), keepdim=True), x, f).clamp_(0, 1),     # contrast
       lambda x, f: torch.lerp(grey(x).expand_as(x), x, f).clamp_(0, 1),                   # saturation
       shift_hue,
       lambda x, f: grey(x).repeat(1, 3, 1, 1),                                            # greyscale
       blur,
       lambda x, f: torch.where(x >= 0.5, 1 - x, x))                                       # solarise


def colour(x, params):
    """x [n,3,H,W] in [0,1]; params [n,11] on the CPU: no step has to ask the device which images it is for."""
    there = lambda t: t.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else t
    params = params.numpy()
    passes = [(k, params[:, place] == k) for place in range(4) for k in range(4)] + [(k, params[:, 4 + k] > 0) for k in (4, 5, 6)]
    for k, chosen in passes:
        rows = np.flatnonzero(chosen)
        if not len(rows):
            continue
        factor = there(torch.from_numpy(params[rows, 4 + k]).view(-1, 1, 1, 1))
        if len(rows) == len(x):
            x = OPS[k](x, factor)
        else:
            rows = there(torch.from_numpy(rows))
            x.index_copy_(0, rows, OPS[k](x.index_select(0, rows), factor))
    return x


def normalise(image):
    """uint8 [b,3,H,W], or float in [0,1] -> float32 with ImageNet's mean and std, on the same device."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    return image.sub(constant(IMAGENET_MEAN, image.device)).div_(constant(IMAGENET_STD, image.device))


def augment(image, params):
    """The recipe's colour augmentation and normalisation.

    image: uint8 [b,3,H,W] on any device; params: float32 [b,11] from `batches`, on the CPU. Returns float32 [b,3,H,W] on image's device,
    without waiting for it.
    """
    if image.is_cuda:
        return normalise(colour(image.float().div_(255), params))
    each = zip(image.split(1), params.split(1))                        # one by one: stays in cache
    return torch.cat([normalise(colour(x.float().div_(255), p)) for x, p in each])


# ---- Batches -------------------------------------------------------------------------------------------------------------------------
class Steps(Dataset):
    """Step k -> this process's part of the global batch k. Position p of all positions ever is of group p % G: a pure function."""

    def __init__(self, groups, image_size, batch, seed, rank, world, scale, colour, train):
        self.groups, self.size, self.batch, self.seed, self.scale, self.colour, self.train = groups, image_size, batch, seed, scale, colour, train
        self.mine = range(rank * batch // world, (rank + 1) * batch // world)
        self.orders = [Order(g, mix(seed, i), shuffle=train) for i, g in enumerate(groups)]
        self.sources = [s for g in groups for s in g.sources]
        for source in self.sources:
            if isinstance(source, Scenes):
                source.keep(image_size)
        self.first = list(itertools.accumulate((len(g.sources) for g in groups), initial=0))

    def __getitem__(self, step):
        b = len(self.mine)
        image, bad, lost = torch.empty(b, 3, self.size, self.size, dtype=torch.uint8), [], []
        if get_worker_info():
            image.share_memory_()                                      # written where the main process reads it: no copy, no growing heap
        group, source, params = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int64), torch.empty(b, len(NO_COLOUR))
        for row, position in enumerate(step * self.batch + j for j in self.mine):
            g = position % len(self.groups)
            s, i = self.orders[g](position // len(self.groups))
            group[row], source[row] = g, self.first[g] + s
            rng = np.random.default_rng((self.seed, 2, position))
            params[row] = torch.from_numpy(draw_colour(rng, self.colour if self.train else 0))
            flip = self.train and rng.random() < 0.5
            crop = (lambda w, h: random_crop(w, h, rng, self.scale)) if self.train else centre
            for k in range(24):
                try:                                                   # the next one, then ever further: damage comes in runs
                    picture, box = self.sources[source[row]].read((i + (1 << k >> 1)) % self.groups[g].sources[s].count, self.size, crop)
                    break
                except Oops as error:
                    bad.append(str(error))
                    lost += [int(source[row])] if k == 0 else []
            else:
                return {"source": source[:row + 1], "lost": lost[-1:], "bad": bad}  # an exception would arrive as a page of text
            pixels = crop_resize(picture, box, self.size, self.size)
            image[row] = pixels.flip(2) if flip else pixels
        return {"image": image, "group": group, "params": params, "source": source, "lost": lost, "bad": bad}


def start_worker(_):
    """A worker leaves signals to the main process, which may have handlers of its own for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(groups, image_size, batch, seed=0, rank=0, world=1, start_step=0, workers=4, scale=(0.4, 1.0), colour=1.0, train=True):
    """An endless iterator over this process's part of each global batch, from `start_step` on.

    Yields {"image": uint8 [b,3,S,S] (pinned if there is CUDA), "group": int64 [b] (index into groups), "params": float32 [b,11] for
    `augment`, "bad": ["path: reason"] of the images that were replaced by the next readable one of their source}, b = batch / world.
    What step k holds depends on groups, image_size, batch, seed, scale and colour alone, not on world, workers or where one started.
    train=False: each source in its own order, centre crop, no flip, no colour.
    Oops if batch cannot be divided by world, or if more than one image in ten of a source cannot be read.
    """
    if batch % world:
        raise Oops(f"the global batch {batch} cannot be divided among {world} processes: choose a multiple of {world}")
    return stream(Steps(groups, image_size, batch, seed, rank, world, scale, colour, train), start_step, workers)


def stream(steps, step, workers):
    """The batches of `batches`, made by worker processes; begins anew where it was if one of them is killed."""
    reads, bad, deaths = collections.Counter(), collections.Counter(), 0
    fork = workers and "fork" in multiprocessing.get_all_start_methods()  # Windows has none: there the main process reads
    options = dict(num_workers=workers, multiprocessing_context="fork", worker_init_fn=start_worker) if fork else {}
    while True:
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):    # another DataLoader's
            handler = signal.SIG_DFL
        items = iter(DataLoader(steps, None, sampler=itertools.count(step), pin_memory=torch.cuda.is_available(), **options))
        if threading.current_thread() is threading.main_thread():      # torch's handler would raise in the middle of the caller's work
            signal.signal(signal.SIGCHLD, handler)
        try:
            for item in items:
                reads.update(item.pop("source").tolist())
                bad.update(lost := item.pop("lost"))
                for s in lost:
                    if "image" not in item or bad[s] > 10 and bad[s] > reads[s] / 10:
                        raise Oops(f"{steps.sources[s].spec}: {bad[s]} of {reads[s]} images could not be read, more than one in ten; "
                                   f"the last: {item['bad'][-1]}")
                yield item
                step, deaths = step + 1, 0
        except (RuntimeError, OSError, EOFError) as error:             # a killed worker breaks the pipe, or DataLoader sees that it is gone
            if not workers or "Caught" in str(error):                  # an error of our own in a worker
                raise
            deaths += 1
            if deaths > 3:
                raise Oops("loading processes keep dying: too little memory (take fewer --workers), or /dev/shm too small") from None
            print(f"data: a loading process died, starting again at step {step} ({reason(error)})", file=sys.stderr)
        del items


# ---- Pictures ------------------------------------------------------------------------------------------------------------------------
def contact_sheet(rows, path, columns=(), labels=(), cell=None, gap=6):
    """Writes pictures in a grid as PNG, on white.

    rows: lists of uint8 arrays or tensors, [3,h,w] or [h,w,3]; columns: captions above, labels: captions left of the rows;
    cell: longest side to which each picture is scaled (as it is, if None). Oops if the file cannot be written.
    """
    font = ImageFont.load_default(size=14)
    width_of = lambda text: math.ceil(max(map(font.getlength, text.split("\n"))))

    def picture(x):
        x = np.asarray(x)
        image = Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0) if x.shape[0] == 3 else x))
        k = cell / max(image.size) if cell else 1
        return image.resize([max(1, round(s * k)) for s in image.size], Image.Resampling.LANCZOS if k < 1 else Image.Resampling.BICUBIC)

    rows = [[picture(x) for x in row] for row in rows]
    widths = [max([row[c].width for row in rows if c < len(row)] + [width_of(columns[c]) if c < len(columns) else 0])
              for c in range(max(map(len, rows)))]
    left = max(map(width_of, labels)) + 2 * gap if labels else gap
    top = 18 * max(c.count("\n") + 1 for c in columns) + gap if columns else gap
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(rows)), "white")
    draw, y = ImageDraw.Draw(sheet), top
    xs = list(itertools.accumulate((w + gap for w in widths), initial=left))
    for x, w, text in zip(xs, widths, columns):
        draw.multiline_text((x + w / 2, top - 4), text, "#222", font, anchor="md", align="center")
    for r, row in enumerate(rows):
        if r < len(labels):
            draw.multiline_text((left - gap, y + heights[r] / 2), labels[r], "#222", font, anchor="rm", align="right")
        for x, w, image in zip(xs, widths, row):
            sheet.paste(image, (x + (w - image.width) // 2, y + (heights[r] - image.height) // 2))
        y += heights[r] + gap
    try:
        sheet.save(path, "PNG", optimize=True)
    except OSError as error:
        raise Oops(f"cannot write {path}: {reason(error)}") from None


def survey(source):
    """One line about a source: images, bytes, odd sizes, and how many of a sample cannot be read."""
    sizes, stored, broken = [], [], []
    for k in range(min(source.count, 100 if isinstance(source, Files) else 5)):
        i = shuffled(k, source.count, 0)
        try:
            source.read(i, crop=lambda w, h: sizes.append((w, h)) or (0, 0, w, h))
            stored.append(source.open(i).seek(0, 2) if isinstance(source, Files) else 0)
        except Oops as error:
            broken.append(f", such as {error}")
    measures = {"smallest": min, "largest": lambda s: -max(s), "longest": lambda s: -max(s) / min(s)} if stored else {}
    odd = {name: min(sizes, key=measure) for name, measure in measures.items()}
    return (f"{source.count:,} images, about {np.mean(stored or 0) * source.count / 1e9:,.3f} GB, "
            + "".join(f"{k} {w}x{h}, " for k, (w, h) in odd.items())
            + f"unreadable {len(broken)} of {len(stored) + len(broken)}" + "".join(broken[:1]))


def inspect(groups, teachers, size, path):
    """Prints what the sources hold and who learns from it, and writes a contact sheet of augmented samples, one row a group."""
    for group in groups:
        print(f"{group.name}")
        for source in group.sources:
            print(f"  {source.spec} (weight {source.weight:g}): {survey(source)}")
        for sharing in SHARING:
            learners = [t for t, m in zip(teachers, teacher_mask([group], teachers, sharing)[0]) if m]
            print(f"  --sharing {sharing}: {', '.join(learners)}")
    item = next(batches(groups, size, 8 * len(groups), workers=0))
    seen = augment(item["image"], item["params"]) * constant(IMAGENET_STD, "cpu") + constant(IMAGENET_MEAN, "cpu")
    rows = [list((seen[item["group"] == g] * 255).round().to(torch.uint8)) for g in range(len(groups))]
    contact_sheet(rows, path, labels=[g.name for g in groups], cell=min(size, 168))
    parts = " + ".join(str(len(range(g, 128, len(groups)))) for g in range(len(groups)))
    print(f"a batch of 128 holds {parts} images of them; who has one more, rotates")
    print(f"wrote {path}: samples as the networks see them")


def pillow_augment(image, params):
    """The colour augmentation as published pipelines do it, one 8-bit PIL image at a time: the measure for `augment`. float [3,H,W]."""
    from PIL import ImageEnhance, ImageOps
    p = params.tolist()
    for op in p[:4]:
        if op in (0, 1, 2):
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[int(op)](image).enhance(p[4 + int(op)])
        elif op == 3:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(np.asarray(h) + np.uint8(int(p[7] * 255) % 256))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
    image = image.convert("L").convert("RGB") if p[8] else image
    if p[9]:
        taps = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / p[9]) ** 2)
        taps = torch.outer(taps, taps) / taps.sum() ** 2
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        x = F.conv2d(F.pad(x, (4, 4, 4, 4), mode="reflect"), taps.expand(3, 1, 9, 9), groups=3).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    image = ImageOps.solarize(image, 128) if p[10] else image
    return normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]


def bench(size, seconds=2.0):
    """Images/s on one core, from 500x375 JPEGs, of each stage on its own and of the whole, beside the published way."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files, kinds = [], itertools.cycle(SCENES.values())
    for seed in range(24):                                             # with grain: drawn scenes alone decode faster than photographs
        scene = np.asarray(Image.fromarray(next(kinds)(seed, 256)["image"]).resize((500, 375), Image.Resampling.BICUBIC))
        files.append(io.BytesIO())
        scene = scene + np.random.default_rng(seed).normal(0, 7, (375, 500, 1))
        Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(files[-1], "JPEG", quality=90)
    rngs = [np.random.default_rng(i) for i in range(24)]
    params = torch.tensor(np.stack([draw_colour(r) for r in rngs]))
    boxed = lambda i: decode(files[i], size, lambda w, h: random_crop(w, h, rngs[i], (0.4, 1.0)))
    worker = lambda i: crop_resize(*boxed(i), size, size)
    images = torch.stack([worker(i) for i in range(24)]).to(device)

    def published(i):
        image, box = boxed(i)
        return pillow_augment(image.crop(box).resize((size, size), Image.Resampling.BICUBIC), params[i])

    def measure(name, run, count=1):
        run(0)
        begun, n = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds or n < 24:
            run(n % 24)
            n += 1
        if device == "cuda":
            torch.cuda.synchronize()
        spent = (time.perf_counter() - begun) / n / count
        print(f"{name:44}{1 / spent:9,.0f} images/s {spent * 1e3:8.2f} ms")

    print(f"500x375 JPEG, {np.mean([f.getbuffer().nbytes for f in files]) / 1e3:.0f} kB -> {size} px, one core; colour on {device}")
    measure("decode", lambda i: decode(files[i]))
    measure("decode, crop, resize to uint8 (a worker)", worker)
    measure(f"colour and normalise, batched, on {device}", lambda i: augment(images, params), 24)
    measure("all of it", lambda i: augment(worker(i)[None].to(device), params[i:i + 1]))
    measure("all of it, published way (Pillow, each alone)", published)


def main():
    parser = argparse.ArgumentParser(description="What do the sources hold? Or, with --bench: how fast are images read?")
    parser.add_argument("--data", action="append", default=[], help="teacher=source,source… or sources for all, or a file of such lines")
    parser.add_argument("--teachers", help="default: those that --data names, else dinov2,mast3r,multihmr")
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--out", default="data.png", help="the contact sheet")
    parser.add_argument("--bench", action="store_true")
    args = parser.parse_args()
    if args.bench:
        return bench(args.image_size)
    named = [m[1] for line in itertools.chain.from_iterable(map(read_lines, args.data)) if (m := re.match(r"([\w.-]+)=", line))]
    teachers = args.teachers.split(",") if args.teachers else list(dict.fromkeys(named)) or ["dinov2", "mast3r", "multihmr"]
    inspect(parse_data(args.data, teachers), teachers, args.image_size, args.out)


# ---- The procedural scenes -----------------------------------------------------------------------------------------------------------
# Three domains that differ as the real ones do, seeded and endless, with labels from the drawing itself: SCENES[domain](seed, size) gives
# a dict of numpy arrays. Geometry is in fractions of the side or in metres, so a seed gives the same picture at any size. Pictures are
# drawn as planes [3,S,S], fp32, 0..1. Random numbers are Python's floats, which leave fp32 arrays fp32.
TAU = 2 * math.pi

def _noise_table(n=512):
    """[n,n] smooth tileable noise in 0..1: white noise whose spectrum falls as frequency^-1.7."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]) * n
    z = np.fft.irfft2(np.fft.rfft2(np.random.default_rng(0).normal(size=(n, n))) / np.maximum(f, 5) ** 1.7, s=(n, n))
    return np.clip(0.5 + z / z.std() / 5, 0, 1).astype(np.float32)

NOISE = _noise_table()

def _noise(u, v):
    return NOISE[(v * 64).astype(np.int32) & 511, (u * 64).astype(np.int32) & 511]

def _bricks(u, v):
    row = np.floor(v)
    u = u / 2 + row / 2
    u, v = np.abs(u - np.floor(u) - 0.5), np.abs(v - row - 0.5)
    return 3 - 8 * np.maximum(2 * u - 0.5, v)

TEXTURES = {  # about -1..1, one period a unit
    "stripes": lambda u, v: np.sin(TAU * (u + v)),
    "checks": lambda u, v: 2 * np.sin(TAU / 2 * u) * np.sin(TAU / 2 * v),
    "dots": lambda u, v: np.sin(TAU * u) + np.sin(TAU * v) - 0.8,
    "rings": lambda u, v: np.sin(TAU * np.sqrt(u * u + v * v)),
    "zigzag": lambda u, v: np.sin(TAU * (u + np.abs(v - 2 * np.floor(v / 2) - 1))),
    "wood": lambda u, v: np.sin(TAU * (u + 0.4 * np.sin(1.7 * v) + 0.25 * np.sin(3.1 * v + 2.3 * u))),
    "bricks": _bricks,
    "noise": lambda u, v: 2 * _noise(u / 2, v / 2) - 1}
PATTERNS = list(TEXTURES)[:6]

def _texture(kind, u, v, sharp=1.5):
    """A pattern in 0..1; `sharp` (number or array) is the contrast of its edges."""
    return np.clip(0.5 + sharp * TEXTURES[kind](u, v), 0, 1)

def _hsv(hue, saturation, value):
    """RGB as [3,1,1]; the hue turns once a unit."""
    ramps = (min(max(abs((hue * 6 + k) % 6 - 3) - 1, 0), 1) for k in (0, 4, 2))
    return np.array([value * (1 - saturation + saturation * ramp) for ramp in ramps], np.float32).reshape(3, 1, 1)

def _colour(rng, saturation=(0.2, 0.75), value=(0.3, 0.95)):
    return _hsv(rng.uniform(0, 1), rng.uniform(*saturation), rng.uniform(*value))

def _grid(size):
    """Pixel centres as fractions of the side: x [1,S], y [S,1]."""
    c = (np.arange(size, dtype=np.float32) + 0.5) / size
    return c[None], c[:, None]

def _window(size, x0, y0, x1, y1):
    """Slices (rows, columns) of the pixels that a box in fractions of the side touches, and one more for smooth edges; perhaps empty."""
    def cut(a, b): return slice(min(max(math.floor(a * size) - 1, 0), size), min(max(math.ceil(b * size) + 1, 0), size))
    return cut(y0, y1), cut(x0, x1)

def _finish(img):
    return np.ascontiguousarray((np.clip(img, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))

def _capsule(x, y, a, b, ra, rb):
    """Signed distance to a rounded bar from a to b with radius ra to rb, position along it (0..1), offset from its axis over the radius."""
    dx, dy, px, py = b[0] - a[0], b[1] - a[1], x - a[0], y - a[1]
    along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    r = ra + (rb - ra) * along
    px, py = px - along * dx, py - along * dy
    return np.sqrt(px * px + py * py) - r, along, px / r, py / r

def _bar(img, x, y, a, b, ra, rb, colours, light, pattern=None):
    """Draws a shaded rounded bar, plain in colours[0] or with a pattern of both colours that follows the bar."""
    size, r = img.shape[1], max(ra, rb)
    rows, cols = _window(size, min(a[0], b[0]) - r, min(a[1], b[1]) - r, max(a[0], b[0]) + r, max(a[1], b[1]) + r)
    d, along, nx, ny = _capsule(x[:, cols], y[rows], a, b, ra, rb)
    colour, area = colours[0], img[:, rows, cols]
    if pattern:
        length = math.hypot(b[0] - a[0], b[1] - a[1]) + 1e-6
        across = (nx * (a[1] - b[1]) + ny * (b[0] - a[0])) / length
        colour = colour + _texture(pattern, along * (2 * length / r), across * 2) * (colours[1] - colour)
    facing = nx * light[0] + ny * light[1] + np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0)) * light[2]
    area += np.clip(0.5 - d * size, 0, 1) * (colour * (0.55 + 0.5 * np.maximum(facing, 0)) - area)

def _backdrop(rng, x, y):
    """[3,S,S]: a gradient between two related colours under a texture, darker towards the corners."""
    turn, hue, value = rng.uniform(0, TAU), rng.uniform(0, 1), rng.uniform(0.4, 0.95)
    x, y = x - 0.5, y - 0.5
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    a = _hsv(hue, rng.uniform(0.1, 0.5), value)
    b = _hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.1, 0.5), value * rng.uniform(0.6, 1.1))
    kind, scale, strength = rng.choice([*TEXTURES, "noise"]), rng.uniform(4, 12), rng.uniform(0.08, 0.25)
    texture = _texture(kind, u * scale + 7, v * scale + 3, 0.8) + _noise(u * 3 + 1, v * 3 + 2) - 1
    return (a + (u + 0.5) * (b - a)) * (1 + strength * texture) * (1.06 - 0.5 * (x * x + y * y))

# objects

def _outlines():
    """{kind: (radius [512] of its outline at angles -pi..pi, at most 1; hole (x, y, radius) or None; pattern, its periods
    per side of the picture along x and y)}; y down."""
    t = np.arange(360) / 360 * TAU
    circle = np.exp(1j * t)
    heart = 16 * np.sin(t) ** 3 - 1j * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    kinds = {
        "ring": (circle, (0, 0, 0.5), "stripes", 10, 0), "moon": (circle, (0.5, 0, 0.78), "wood", 8, 12),
        "heart": (heart, None, "checks", 14, 14),
        "gear": ((0.85 + 0.15 * np.clip(3 * np.sin(8 * t), -1, 1)) * circle, (0, 0, 0.32), "checks", 10, 26),
        "flower": ((0.68 + 0.32 * np.cos(5 * t)) * circle, None, "rings", 10, 10),
        "star": (np.where(np.arange(10) % 2, 0.42, 1) * np.exp(1j * (np.arange(10) - 2.5) * TAU / 10), None, "dots", 8, 8),
        "drop": (0.9 * np.sin(t) * np.sin(t / 2) ** 1.5 - 1j * np.cos(t), None, "zigzag", 8, 8),
        "cross": ([a * 1j ** k for k in range(4) for a in (1 - .33j, 1 + .33j, .33 + .33j)], None, "zigzag", 15, 8),
        "arrow": ([1, -.1+.85j, -.15+.32j, -1+.32j, -1-.32j, -.15-.32j, -.1-.85j], None, "stripes", 0, 10),
        "house": ([-1j, 1-.15j, .7-.05j, .7+.9j, -.7+.9j, -.7-.05j, -1-.15j], None, "bricks", 14, 14),
        "mushroom": ([*circle[180:], 1+.1j, .3+.15j, .38+.9j, -.38+.9j, -.3+.15j, -1+.1j], None, "dots", 15, 15),
        "hourglass": ([-.75-1j, .75-1j, .16, .75+1j, -.75+1j, -.16], None, "stripes", 6, 6)}
    for name, (z, hole, *pattern) in kinds.items():
        z = np.asarray(z, complex) / np.abs(z).max()
        z = (z[:, None] + np.arange(32) / 32 * (np.roll(z, -1) - z)[:, None]).ravel()  # points along each edge
        radius = np.interp(np.linspace(-math.pi, math.pi, 512), np.angle(z), np.abs(z), period=TAU)
        kinds[name] = radius.astype(np.float32), hole, *pattern
    return kinds

KINDS = _outlines()

def objects(seed, size=112):
    """One textured thing on a cluttered background: image uint8 [S,S,3], label int (index in KINDS), mask bool [S,S] of the thing."""
    rng = random.Random(f"objects {seed}")
    x, y = _grid(size)
    img, light = _backdrop(rng, x, y), (rng.uniform(-0.6, 0.6), -0.5, 0.7)
    for _ in range(rng.randrange(2, 6)):  # clutter: pills and lines
        a, turn, thin = (rng.uniform(0, 1), rng.uniform(0, 1)), rng.uniform(0, TAU), rng.choice([0.12, 1])
        r, length = rng.uniform(0.03, 0.12) * thin, rng.uniform(0.02, 0.2) / thin ** 0.5
        b = a[0] + length * math.cos(turn), a[1] + length * math.sin(turn)
        _bar(img, x, y, a, b, r, r, (_colour(rng),), light)
    label = rng.randrange(len(KINDS))
    radius, hole, pattern, across, down = list(KINDS.values())[label]
    r, turn, flip, scale = rng.triangular(0.27, 0.42, 0.38), rng.uniform(-0.4, 0.4), rng.choice([-1, 1]), rng.uniform(0.9, 1.1)
    cx, cy, hue, value = rng.uniform(r, 1 - r), rng.uniform(r, 1 - r), rng.uniform(0, 1), rng.uniform(0.5, 1)
    rows, cols = _window(size, cx - 1.2 * r, cy - 1.2 * r, cx + 1.2 * r, cy + 1.2 * r)
    px, py = (x[:, cols] - cx) / r, (y[rows] - cy) / r
    u, v = (px * math.cos(turn) + py * math.sin(turn)) * flip, py * math.cos(turn) - px * math.sin(turn)
    d = np.sqrt(u * u + v * v) - radius[((np.arctan2(v, u) + math.pi) * (511 / TAU) + 0.5).astype(np.int32)]
    if hole: d = np.maximum(d, hole[2] - np.sqrt((u - hole[0]) ** 2 + (v - hole[1]) ** 2))
    a = _hsv(hue, rng.uniform(0.35, 0.85), value)
    b = _hsv(hue + rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.7), value + (-0.45 if value > 0.7 else 0.45))
    bevel = np.clip(1 + d * 4, 0, 1) * (0.35 * (px * light[0] + py * light[1]) - 0.1)
    area, mask = img[:, rows, cols], np.zeros((size, size), bool)
    area *= 0.6 + 0.4 * np.clip(d * 7, 0, 1)  # its shadow
    colour = a + _texture(pattern, u * (r * scale * across), v * (r * scale * down)) * (b - a)
    area += np.clip(0.5 - d * (r * size), 0, 1) * (colour * (0.93 + bevel) - area)
    mask[rows, cols] = d < 0
    return {"image": _finish(img), "label": label, "mask": mask}

def _intrinsics(focal, size):
    return np.array([[focal * size, 0, size / 2], [0, focal * size, size / 2], [0, 0, 1]], np.float32)

# rooms: metres, y down, the floor at y = 0

ROUND = {"box": [], "cylinder": [0, 2], "ball": [0, 1, 2]}  # the axes in which a unit solid is round

def _interval(kind, o, d):
    """Where rays o + t d (three arrays each) enter and leave a unit solid at 0; enter >= leave where they miss. Cylinders stand along y."""
    enter, leave = np.float32(-1e9), np.float32(1e9)
    for i in {0, 1, 2} - set(ROUND[kind]):
        inverse = 1 / d[i]
        middle, reach = -o[i] * inverse, np.abs(inverse)
        enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
    if ROUND[kind]:
        a, b, c = (sum(p[i] * q[i] for i in ROUND[kind]) for p, q in ((d, d), (o, d), (o, o)))
        root = b * b - a * (c - 1)
        hit, root = root > 0, np.sqrt(np.maximum(root, 0))
        enter, leave = np.maximum(enter, np.where(hit, (-b - root) / a, 1e9)), np.minimum(leave, (root - b) / a)
    return enter, leave

def _axis(q):
    """Index of the largest of three arrays' absolute values, int8 (much faster than argmax)."""
    x, y, z = np.abs(q)
    return np.where(x > np.maximum(y, z), np.int8(0), np.where(y > z, np.int8(1), np.int8(2)))

def _surface(kind, q, half):
    """Normal (in the unit solid's space, not normalised) and texture coordinates (metres) at points q [3,n] on a unit solid."""
    if kind == "box":
        axis = _axis(q)
        n = np.where(axis == np.arange(3)[:, None], np.sign(q), np.float32(0))
        return n, np.where(axis == 0, q[2] * half[2], q[0] * half[0]), np.where(axis == 1, q[2] * half[2], q[1] * half[1])
    u, v = np.arctan2(q[0], q[2]) * half[0], q[1] * half[1]
    if kind == "ball": return q, u, v
    lid = q[1] * q[1] > q[0] * q[0] + q[2] * q[2]
    n = np.where(lid == np.array([[False], [True], [False]]), q, np.float32(0))
    return n, np.where(lid, q[0] * half[0], u), np.where(lid, q[2] * half[2], v)

def _solid(kind, centre, half, turn=0.0):
    """(kind, centre [3], half sizes [3], M [3,3]): M (p - centre) are a point's coordinates in the unit solid."""
    c, s, half = math.cos(turn), math.sin(turn), np.array(half, np.float32)
    return kind, np.array(centre, np.float32), half, np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32) / half[:, None]

def _furnish(rng):
    """The room's solids: itself, a rug, four pictures, then 3 to 7 things, all within 1.8 m of the middle: balls also stand on boxes."""
    w, h, l = rng.uniform(2.8, 3.6), rng.uniform(1.2, 1.5), rng.uniform(2.8, 3.6)
    rug = (rng.uniform(0.8, 1.5), 0.01, rng.uniform(0.8, 1.5))
    solids = [_solid("box", (0, -h, 0), (w, h, l)), _solid("box", (0, -0.01, 0), rug, rng.uniform(0, TAU))]
    for side in (-1, 1):
        a, b, at, high = rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.5), rng.uniform(-1, 1), rng.uniform(-1.7, -1.3)
        solids += [_solid("box", (side * w, high, at), (0.03, b, a)), _solid("box", (at, high, side * l), (a, b, 0.03))]
    n, start = rng.randrange(3, 6), rng.uniform(0, TAU)
    for i in range(n):
        angle, r, kind = start + (i + rng.uniform(-0.3, 0.3)) * TAU / n, rng.uniform(0.5, 1.2), rng.choice(list(ROUND))
        x, z = r * math.sin(angle), r * math.cos(angle)
        a, b, c = rng.uniform(0.15, 0.42), rng.uniform(0.15, 0.7), rng.uniform(0.15, 0.42)
        half = {"box": (a, b, c), "cylinder": (a * 0.8, b, a * 0.8), "ball": (a, a, a)}[kind]
        solids.append(_solid(kind, (x, -half[1], z), half, rng.uniform(0, TAU)))
        top = min(a, c) * rng.uniform(0.5, 0.95)
        if kind == "box" and i % 2: solids.append(_solid("ball", (x, -2 * b - top, z), (top, top, top)))
    return solids

def _camera(rng, view):
    """Pose [4,4] (camera to world; x right, y down, z forward) of a look across the things from outside them; view 1 stands aside of view 0 and looks elsewhere."""
    angle = rng.uniform(0, TAU) + view * rng.uniform(0.2, 0.45) * rng.choice([-1, 1])
    spots = [[rng.uniform(*r) for r in ((2.1, 2.5), (-1.7, -0.9), (-0.7, 0.7), (-1.1, -0.5), (-0.7, 0.7))] for _ in range(2)]
    away, height, *target = [(a + b) / 2 for a, b in zip(*spots)][:2] + spots[1][2:] if view else spots[0]
    eye = np.array([away * math.sin(angle), height, away * math.cos(angle)])
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross([0, 1, 0], z) / math.hypot(z[0], z[2])
    return np.vstack([np.stack([x, np.cross(z, x), z, eye], 1), [0, 0, 0, 1]]).astype(np.float32)

def _material(rng, code, hue):
    """(pattern, period in metres, two colours [3,1]) of surface `code`: two walls, floor, two walls, ceiling, then solids."""
    room = [(hue, 0.3, 0.9), (0.08, 0.4, 0.75), (hue + 0.06, 0.3, 0.9), (hue, 0.06, 1.0)]
    h, saturation, value = room[code] if code < 4 else (rng.uniform(0, 1), rng.uniform(0.3, 0.8), rng.uniform(0.55, 1))
    h2, value2 = h + rng.uniform(-0.2, 0.2) * (code > 3), value * (rng.uniform(0.72, 0.88) if code < 4 else rng.uniform(0.4, 0.7))
    pattern, period = "noise" if code == 3 else rng.choice(list(TEXTURES)), rng.uniform(0.2, 0.45)
    return pattern, period, _hsv(h, saturation, value)[..., 0], _hsv(h2, saturation, value2)[..., 0]

def _smooth_seams(img, which):
    """Averages the pixels of img [3,S*S] where two surfaces meet with their neighbours, in place."""
    size, middle, edge = len(which), which[1:-1, 1:-1], np.zeros(which.shape, bool)
    edge[1:-1, 1:-1] = sum(middle != side for side in (which[2:, 1:-1], which[:-2, 1:-1], which[1:-1, 2:], which[1:-1, :-2]))
    at = np.flatnonzero(edge)
    img[:, at] = img[:, at] / 3 + (img[:, at - 1] + img[:, at + 1] + img[:, at - size] + img[:, at + size]) / 6

def _cast(solids, pose, focal, rays):
    """Depth [S,S] along the rays [3,S,S] from the camera, and the surface that each meets, int8 [S,S]: 0..3 the room's, 4.. solids[1:]."""
    rotation, eye, size = pose[:3, :3], pose[:3, 3], rays.shape[1]
    _, centre, half, m = solids[0]
    o, d = (m @ (eye - centre))[:, None, None], rays / half[:, None, None]
    depth = _interval("box", o, d)[1]
    q = o + d * depth
    which = _axis(q)
    which[(which == 1) & (q[1] < 0)] = 3  # the ceiling
    corners = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], np.float32)
    for code, (kind, centre, half, m) in enumerate(solids[1:], 4):
        seen = (corners * half @ (m * half[:, None]) + centre - eye) @ rotation
        flat, front = seen[:, :2] / np.maximum(seen[:, 2:], 0.05) * focal + 0.5, seen[:, 2].min() > 0.05
        window = _window(size, *flat.min(0).tolist(), *flat.max(0).tolist()) if front else np.s_[:, :]
        enter, leave = _interval(kind, m @ (eye - centre), np.tensordot(m, rays[(slice(None), *window)], 1))
        hit = (enter < leave) & (enter > 0) & (enter < depth[window])
        depth[window][hit], which[window][hit] = enter[hit], code
    return depth, which

def rooms(seed, size=112, view=0):
    """A furnished room photographed by one of two cameras (view 0, 1): image uint8 [S,S,3], depth f4 [S,S] (along z, metres), normals f4 [S,S,3]
    (unit, towards the camera), K f4 [3,3] (pixels, centres at integer + 0.5), pose f4 [4,4] (camera to world).
    Camera frame: x right, y down, z forward."""
    rng = random.Random(f"rooms {seed}")
    solids, pose, x, y = _furnish(rng), _camera(rng, view), *_grid(size)
    rotation, eye, focal = pose[:3, :3], pose[:3, 3], 0.5 / math.tan(math.radians(rng.uniform(55, 80)) / 2)
    light = np.array([rng.uniform(-1.2, 1.2), -2.0, rng.uniform(-1.2, 1.2)], np.float32)[:, None]
    hue, ambient = rng.uniform(0, 1), rng.uniform(0.45, 0.65)
    materials = [_material(rng, code, hue) for code in range(len(solids) + 3)]
    rays = sum(axis[:, None, None] * step for axis, step in zip(rotation.T, ((x - 0.5) / focal, (y - 0.5) / focal, 1)))
    rays[np.abs(rays) < 1e-6] = 1e-6  # a ray's parameter is its z-depth

    depth, which = _cast(solids, pose, focal, rays)
    order = np.argsort(which, axis=None, kind="stable")  # each surface draws its own pixels: sorted, they are a slice
    points = (eye[:, None, None] + rays * depth).reshape(3, -1).take(order, 1)
    normals, img, ends = np.empty_like(points), np.empty_like(points), np.cumsum(np.bincount(which.ravel(), minlength=len(materials)))
    for code, (pattern, period, a, b) in enumerate(materials):
        (kind, centre, half, m), at = solids[max(0, code - 3)], slice(ends[code - 1] if code else 0, ends[code])
        if at.start == at.stop: continue
        p = points[:, at]
        q = m @ (p - centre[:, None])
        n, u, v = _surface(kind, q, half)
        n = m.T @ (n if code > 3 else -n)
        n /= np.sqrt((n * n).sum(0))
        beam, sight = light - p, eye[:, None] - p
        far, away = np.sqrt((beam * beam).sum(0)), np.sqrt((sight * sight).sum(0))
        lit = np.maximum((n * beam).sum(0), 0) / far / (0.7 + 0.06 * far * far)
        pixel = away * away / (focal * size) / np.maximum(np.abs((n * sight).sum(0)), 0.1 * away)  # metres; fine patterns fade
        colour = a + _texture(pattern, u / period + 20, v / period + 20, np.clip(0.15 * period / pixel - 0.3, 0, 1.5)) * (b - a)
        dark = 1.0
        if code < 4: dark = 1 - 0.35 * np.exp(-4 * np.delete((1 - np.abs(q)) * half[:, None], (0, 1, 2, 1)[code], 0).min(0))  # corners
        elif code > 8: dark = 0.65 + 0.35 * np.minimum(-3 * p[1], 1)  # feet
        if code in (1, 4):  # soft shadows on floor and rug: how long a beam runs through things
            for kind, centre, _, m in solids[6:]:
                enter, leave = _interval(kind, m @ (p - centre[:, None]), m @ beam)
                lit *= 1 - 0.85 * np.clip((np.minimum(leave, 1) - np.maximum(enter, 0)) * far * 5, 0, 1)
        normals[:, at] = n
        img[:, at] = colour * (0.82 + 0.36 * _noise(u + 9, v + 9)) * (ambient * dark + (1.2 - ambient) * lit)

    back = np.empty_like(order)
    back[order] = np.arange(size * size)
    normals, img = (rotation.T @ normals).T.take(back, 0).reshape(size, size, 3), img.take(back, 1)
    _smooth_seams(img, which)
    photo = random.Random(f"photo {seed} {view}")  # taken with a contrast, an exposure and a white balance of its own
    img = np.clip(img, 0, 1) ** np.float32(math.exp(photo.uniform(-0.4, 0.4))) * np.float32(photo.uniform(0.6, 1.4))
    img *= np.array([[photo.uniform(0.75, 1.25)] for _ in range(3)], np.float32)
    return {"image": _finish(img.reshape(3, size, size)), "depth": depth, "normals": normals, "K": _intrinsics(focal, size), "pose": pose}

# people: camera frame, metres, y down

JOINTS = ("head", "neck", "pelvis", *(f"{side} {name}" for side in ("left", "right")
                                      for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")))

def _skeleton(rng):
    """A posed person: joints [J,3] (lowest foot at y = 0), forward [3], left [3], height, girth (1 is usual)."""
    tall, girth, heading = rng.uniform(1.5, 1.95), rng.uniform(0.8, 1.25), rng.triangular(0, TAU, math.pi)
    down, forward, left = np.array([[0, 1, 0], [math.sin(heading), 0, math.cos(heading)], [-math.cos(heading), 0, math.sin(heading)]])
    def aim(swing, spread, side=1):  # down, swung forward, spread to a side (radians)
        return tall * (math.cos(spread) * (math.cos(swing) * down + math.sin(swing) * forward) + math.sin(spread) * side * left)
    lean, bow, stride = rng.uniform(-0.35, 0.1), rng.uniform(-0.15, 0.15), rng.uniform(-0.7, 0.7)
    stance, neck = rng.choice(["stand", "walk", "sit"]), -0.29 * aim(lean, bow)
    joints = [neck - 0.105 * aim(lean + rng.uniform(-0.3, 0.3), bow + rng.uniform(-0.25, 0.25)), neck, 0 * neck]
    for side in (1, -1):
        raised = rng.random() < 0.3
        swing, spread = rng.uniform(1.2, 2.9) if raised else rng.uniform(-0.5, 0.9), rng.uniform(0.02, 0.75)
        shoulder = 0.915 * neck + side * 0.105 * tall * (0.6 + 0.4 * girth) * left
        elbow = shoulder + 0.165 * aim(swing, spread, side)
        wrist = elbow + 0.15 * aim(swing + rng.uniform(0.1, 2), spread * rng.uniform(-0.3, 1), side)
        bend, spread = rng.uniform(0, 0.4), rng.uniform(0.02, 0.3)
        if stance == "stand": swing = 0.4 * bend
        elif stance == "walk": swing, bend = side * stride, bend + max(0, -side * stride)
        else: swing, bend = 1.2 + bend, 1.1 + bend
        hip = side * 0.052 * tall * left
        knee = hip + 0.245 * aim(swing, spread, side)
        joints += [shoulder, elbow, wrist, hip, knee, knee + 0.24 * aim(swing - bend, 0.6 * spread, side)]
    joints = np.array(joints)
    return joints - [0, joints[:, 1].max() + 0.035 * tall, 0], forward, left, tall, girth

def _dress(rng, joints, forward, left, tall, girth):
    """The bars of a person, far ones first: (ends a, b [3], their radii, colours, pattern)."""
    (head, neck, pelvis), forward, left = joints[:3], forward * tall, left * tall  # all sizes below are shares of the height
    up, crown, wide = (neck - pelvis) / 0.29, (head - neck) / 0.105, girth * (0.075 + 0.03 * abs(left[0]) / tall)  # wider than deep
    skin, hair = _hsv(rng.uniform(0.04, 0.09), rng.uniform(0.25, 0.6), rng.uniform(0.35, 1)), _hsv(0.08, 0.5, rng.uniform(0.08, 0.75))
    shirt, second, trousers, shoes = (_colour(rng) for _ in range(4))
    sleeve, leg, locks = rng.choice([shirt, skin]), rng.choice([trousers, skin]), rng.uniform(0, 0.09)
    bars = [(neck - 0.09 * up, pelvis, wide, 0.86 * wide, shirt, rng.choice([None, *PATTERNS[:3]])),
            (pelvis, pelvis, 0.84 * wide, 0.84 * wide, trousers, None),
            (neck, head, 0.032, 0.03, skin, None), (head - 0.022 * crown + 0.008 * forward, head + 0.02 * crown, 0.044, 0.056, skin, None),
            (head + 0.036 * crown - 0.008 * forward, head - locks * crown - 0.03 * forward, 0.056, 0.045, hair, None)]
    bars += [(eye, eye, 0.008, 0.008, 0 * hair, None) for eye in (head + 0.054 * forward + side * 0.022 * left for side in (-1, 1))]
    for shoulder, elbow, wrist, hip, knee, ankle in (joints[3:9], joints[9:]):
        r = (0.5 + 0.5 * girth) * np.array([0.036, 0.029, 0.022, 0.06, 0.042, 0.028])
        bars += [(shoulder, elbow, r[0], r[1], shirt, None), (elbow, wrist, r[1], r[2], sleeve, None),
                 (wrist, wrist + (wrist - elbow) * 0.35, 0.02, 0.021, skin, None), (hip, knee, r[3], r[4], trousers, None),
                 (knee, ankle, r[4], r[5], leg, None), (ankle, ankle + 0.1 * forward + [0, 0.02, 0], 0.03, 0.022, shoes, None)]
    bars.sort(key=lambda bar: -bar[0][2] - bar[1][2] - 0.1 * (bar[2] > 0.062))  # the trunk is thick: limbs beside it come after
    return [(a, b, ra * tall, rb * tall, (colour, second), pattern) for a, b, ra, rb, colour, pattern in bars]

def _stage(rng, x, y, floor):
    """[3,S,S]: a wall with framed pictures and furniture-like blocks, and a floor from `floor` (fraction of the side) down."""
    img, size = _backdrop(rng, x, y), x.size
    for block in range(rng.randrange(1, 6)):
        w, h, cx, cy, a, b = *(rng.uniform(*r) for r in ((0.05, 0.2), (0.08, 0.3), (0, 1), (0.1, 0.5))), _colour(rng), _colour(rng)
        if block % 2: cy = floor - h
        rows, cols = _window(size, cx - w, cy - h, cx + w, cy + h)
        u, v = (x[:, cols] - cx) / w, (y[rows] - cy) / h
        def box(reach): return np.clip((reach - np.abs(u)) * (w * size) + 0.5, 0, 1) * np.clip((reach - np.abs(v)) * (h * size) + 0.5, 0, 1)
        inner = 0.4 * _texture(rng.choice(list(TEXTURES)), 2 * u, 2 * v) if block % 2 else box(0.86)
        img[:, rows, cols] += box(1) * (a + inner * (b * (0.9 + 0.1 * v) - a) - img[:, rows, cols])
    top = min(int(floor * size), size)
    down, ground = np.maximum(y[top:] - floor, 0) + 0.06, _colour(rng, (0.1, 0.45), (0.4, 0.8))  # 1 / distance
    texture = _texture(rng.choice(list(TEXTURES)), (x - 0.5) / down + 30, 0.4 / down + 0 * x, np.clip(2 * down, 0.1, 1))
    img[:, top:] += np.clip((y[top:] - floor) * size + 0.5, 0, 1) * (ground * (0.9 + 0.25 * texture) - img[:, top:])
    return img

def people(seed, size=112):
    """One to three people, nearest first: image uint8 [S,S,3], joints2d f4 [P,J,2] (fractions of the side, may lie outside 0..1),
    joints3d f4 [P,J,3] (metres), visible bool [P] (head inside and not behind another person), K f4 [3,3] in pixels.
    Camera frame: x right, y down, z forward."""
    rng = random.Random(f"people {seed}")
    x, y = _grid(size)
    focal, count, light, figures = rng.uniform(0.9, 1.8), rng.choice((1, 1, 1, 2, 2, 3)), (rng.uniform(-0.6, 0.6), -0.5, 0.7), []
    def flat(p): return float(p[0] / p[2] * focal + 0.5), float(p[1] / p[2] * focal + 0.5)
    for slot in rng.sample(range(count), count):
        joints, forward, left, tall, girth = _skeleton(rng)
        extent = 0.08 * tall - joints[:, 1].min()  # from the lowest foot to the crown
        share = rng.uniform(0.55, 0.8) if figures else rng.uniform(0.7, 0.94)
        z = focal * extent / share
        if figures: z = max(z, focal * (extent - ground) / 0.46)  # every head stays in the picture
        else: ground = (rng.uniform(max(share + 0.04, 0.8), 0.97) - 0.5) * z / focal
        joints += [0, ground, z + max(0, -0.3 - joints[:, 2].min())]
        across = 0.15 + 0.7 * (slot + rng.uniform(0, 1)) / count  # of the head
        joints[:, 0] += (across - 0.5) * joints[0, 2] / focal - joints[0, 0]
        figures.append((joints, _dress(rng, joints, forward, left, tall, girth)))
    figures.sort(key=lambda figure: figure[0][2, 2])
    joints3d, hidden = np.array([joints for joints, _ in figures], np.float32), np.zeros(count, bool)
    joints2d = joints3d[..., :2] / joints3d[..., 2:] * np.float32(focal) + np.float32(0.5)
    img = _stage(rng, x, y, 0.5 + focal * ground / (joints3d[-1, 2, 2].item() * rng.uniform(1.1, 1.8)))
    for k in reversed(range(count)):
        joints, bars = figures[k]
        (fx, fy), w = flat((joints[:, 0].mean(), ground, joints[2, 2])), float(0.45 * focal / joints[2, 2])
        rows, cols = _window(size, fx - w, fy - w / 3, fx + w, fy + w / 3)
        img[:, rows, cols] *= 1 - 0.5 * np.clip(1 - ((x[:, cols] - fx) / w) ** 2 - ((y[rows] - fy) / w * 3) ** 2, 0, 1)  # its shadow
        for a, b, ra, rb, colours, pattern in bars:
            bar = flat(a), flat(b), float(ra * focal / a[2]), float(rb * focal / b[2])
            _bar(img, x, y, *bar, colours, light, pattern)
            hidden |= (np.arange(count) > k) & (_capsule(*joints2d[:, 0].T, *bar)[0] < 0)
    visible = ((joints2d[:, 0] > 0) & (joints2d[:, 0] < 1)).all(1) & ~hidden
    return {"image": _finish(img), "joints2d": joints2d, "joints3d": joints3d, "visible": visible, "K": _intrinsics(focal, size)}

SCENES = {"objects": objects, "rooms": rooms, "people": people}


TEST_SCENES = 10 ** 9                                                  # seeds from here on are never trained on


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_part(kind, size, options, pick, seeds):
    return [pick(SCENES[kind](seed, size, **options)) for seed in seeds]


def draw_scenes(kind, start, count, size, pick, **options):
    """[pick(scene)] of `count` scenes, drawn by all cores."""
    draw = functools.partial(draw_part, kind, size, options, pick)
    parts = [range(first, min(first + 16, start + count)) for first in range(start, start + count, 16)]
    if count < 64 or "fork" not in multiprocessing.get_all_start_methods():
        return [scene for part in map(draw, parts) for scene in part]
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("fork"), start_worker, (0,)) as pool:
        return [scene for part in pool.map(draw, parts) for scene in part]


def pad_figures(scene):
    """People: one to three figures, room for three."""
    for key in {"joints2d", "joints3d", "visible"} & set(scene):
        scene[key] = np.concatenate([scene[key], np.zeros((3 - len(scene[key]), *scene[key].shape[1:]), scene[key].dtype)])
    return scene


def labelled_scenes(kind, start, count, size=112, **options):
    """`count` scenes with their labels, as tensors [count, ...]: "image" uint8 [count,3,size,size] and what SCENES[kind] gives (people: up
    to three figures, "visible" false where there is none). Drawn by all cores; options: view=1 for rooms."""
    scenes = draw_scenes(kind, start, count, size, pad_figures, **options)
    out = {key: torch.from_numpy(np.stack([scene[key] for scene in scenes])) for key in scenes[0]}
    out["image"] = out["image"].permute(0, 3, 1, 2).contiguous()
    return out


if __name__ == "__main__":
    dune.run(main)
