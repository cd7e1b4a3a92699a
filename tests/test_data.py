"""Sources, order, decoding, color and batches, against the definitions and against Pillow."""
import colorsys
import functools
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import tarfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from PIL.PngImagePlugin import PngInfo

import data
from data import UserError

Row = namedtuple("Row", "domain generic")
TEACHERS = {"dinov2": Row("objects", True), "mast3r": Row("rooms", False), "multihmr": Row("people", False)}
TWO = {name: TEACHERS[name] for name in ("dinov2", "mast3r")}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DUNE_CACHE", str(folder))
    torch.set_num_threads(1)
    return folder


def photo(seed=0, width=60, height=48):
    """A picture with smooth parts, edges and some grain."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height))) + rng.normal(0, 6, (height, width, 1))
    pixels[height // 3:height // 2, width // 4:width // 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folder_of(path, count, start=0):
    """A folder of `count` small JPEGs, in two levels."""
    for i in range(start, start + count):
        (path / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        photo(i).save(path / f"class{i % 3}" / f"{i:04}.jpg", quality=95)
    return path


def tar_of(path, folder):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "inside")
    return path


def open_path(path):
    return data.open_source(str(path))


def count_images(path):
    return open_path(path).count


def read_all(source):
    return [np.asarray(source.read(i)) for i in range(source.count)]


def take(n, groups, size, batch, **options):
    return list(itertools.islice(data.batches(groups, [size], batch, **options), n))


def test_each_round_of_steps_takes_every_size_once():
    """Whatever the processes, and wherever a run is resumed."""
    sizes = [28, 42, 56]
    taken = [data.size_at(step, sizes, seed=3) for step in range(60)]
    rounds = [tuple(taken[k:k + 3]) for k in range(0, 60, 3)]
    assert all(sorted(lap) == sizes for lap in rounds) and len(set(rounds)) == 6
    assert [data.size_at(step, [56], seed=3) for step in range(3)] == [56] * 3
    groups = data.parse_data([], {"dinov2": TEACHERS["dinov2"]}, ":0-20")
    options = dict(seed=3, world=2, rank=1, workers=0, start_step=4)
    batches = list(itertools.islice(data.batches(groups, sizes, 4, **options), 5))
    assert [batch["image"].shape[2:] for batch in batches] == [(size, size) for size in taken[4:9]]


# ---- Sources -----------------------------------------------------------------------------------------------

def test_folder_tar_and_list_hold_the_same_images(tmp_path):
    root = folder_of(tmp_path / "x", 7)
    (root / "notes.md").write_text("no image")
    (root / ".hidden.jpg").write_bytes(b"junk")
    (root / "class0").rename(root / ".class0")
    folder_of(root, 7)
    (root / "loop").symlink_to(root)
    (tmp_path / "shards").mkdir()
    for k in range(3):
        tar_of(tmp_path / "shards" / f"{k}.tar", root / f"class{k}")
    names = sorted(root.glob("class*/*.jpg"))
    relative = [str(path.relative_to(tmp_path)) for path in names[:3]]
    (tmp_path / "list.txt").write_text("\n".join(["# paths", "", *relative, *map(str, names[3:])]))
    folder, shards, listed = (read_all(open_path(tmp_path / name)) for name in ("x", "shards", "list.txt"))
    assert len(folder) == 7
    for images in zip(folder, shards, listed, strict=True):
        assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


def test_every_suffix_is_read_and_the_rest_is_counted(tmp_path, capfd):
    for suffix in data.SUFFIXES:
        photo(1).save(tmp_path / f"photo{suffix.upper()}")
        error = np.asarray(open_path(tmp_path).read(0)).astype(int) - np.asarray(photo(1))
        assert np.abs(error).mean() < 7, suffix
        (tmp_path / f"photo{suffix.upper()}").unlink()
    photo().save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "a.jpg")
    for name in ("x.heic", "y.HEIC", "b.tar.gz", "c.tgz", "README"):
        (tmp_path / name).write_bytes(b"")
    capfd.readouterr()
    source = open_path(tmp_path)
    line = "1 images; left out: 2 .heic, 1 without a suffix, 1 .tar.gz, 1 .tgz"
    assert line in capfd.readouterr().err and source.left_out in line
    with pytest.raises(UserError, match="a.jpg: cannot identify"):
        source.read(0)


def test_a_tar_of_any_dialect(tmp_path, capfd):
    """Hard links lead to their file, sparse files are left out, an archive of archives says so."""
    root = folder_of(tmp_path / "x", 3)
    os.link(root / "class0/0000.jpg", root / "z.png")
    with open(root / "class0/hole.jpg", "wb") as file:
        file.truncate(10**6)
    expect = np.asarray(data.load_image(root / "z.png"))
    for dialect in ("gnu", "posix", "oldgnu"):
        path = tmp_path / f"{dialect}.TAR"
        subprocess.run(["tar", "--sparse", f"--format={dialect}", "-cf", path, "-C", root, "."], check=True)
        capfd.readouterr()
        source = open_path(path)
        assert source.count == 4 and "left out: 1 links or sparse" in capfd.readouterr().err
        assert sum(np.array_equal(image, expect) for image in read_all(source)) == 2
    outer = tar_of(tmp_path / "outer.tar", tar_of(tmp_path / "inner.tar", root))
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "gone.jpg"
    with tarfile.open(outer, "w") as archive:
        archive.add(tmp_path / "inner.tar")
        archive.addfile(link)
    with pytest.raises(UserError, match="outer.tar holds no images.*: 1 .tar in archives, 1 links or sparse"):
        open_path(outer)


def test_an_index_of_before_stays_until_its_folder_changes(tmp_path, monkeypatch, capfd, cache):
    """A run that goes on sees its images in its order, though today more kinds are read."""
    photo(1).save(tmp_path / "b.png")
    with monkeypatch.context() as before:
        before.setattr(data, "SUFFIXES", (".png",))
        photo(2).save(tmp_path / "a.bmp")
        assert count_images(tmp_path) == 1
    path, = cache.glob("*.index")
    index = torch.load(path)
    del index["left_out"]  # it did not have one
    torch.save(index, path)
    capfd.readouterr()
    source = open_path(tmp_path)
    assert source.count == 1 and source.read(0) == photo(1) and capfd.readouterr().err == ""
    os.utime(tmp_path, (0, 0))
    assert count_images(tmp_path) == 2


def test_a_disk_without_mmap_and_locks(tmp_path, monkeypatch, capfd):
    """As some network and container mounts: the index is in memory, and still written once."""
    root = folder_of(tmp_path / "x", 3)
    no_device = functools.partial(raise_error, OSError(19, "No such device"))
    monkeypatch.setattr(torch.UntypedStorage, "from_file", no_device)
    monkeypatch.setattr("fcntl.flock", no_device)
    for _ in range(2):
        assert len(read_all(open_path(root))) == 3
    assert capfd.readouterr().err.count("listing") == 1


def raise_error(error, *args, **options):
    raise error


def test_what_exists_as_a_path_is_that_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a,b", "x@turn:y", "dinov2=z", "scenes:rooms", "plain"]
    for i, name in enumerate(names):
        folder_of(Path(name), 1 + i)
        group, = data.parse_data([name], TWO)
        assert (group.name, group.count, group.sources[0].turn) == ("shared", 1 + i, "")
    specs = ["dinov2=a,b@turn:class0", "mast3r=plain@turn:class1,scenes:people:0-9"]
    turned, others = data.parse_data(specs, TWO)
    assert [source.spec for source in others.sources] == ["plain", "scenes:people:0-9"]
    assert np.array_equal(turned.sources[0].read(0), np.rot90(Image.open("a,b/class0/0000.jpg"), -1))


def test_a_list_names_the_line_and_spaces_belong_to_a_name(tmp_path):
    odd = "\u00a0no\u202fbreak\u200d \t\u3000.png"
    photo().save(tmp_path / odd)
    (tmp_path / "list.txt").write_text(f"# odd\n{odd}\r\n\n  {odd}\x1b[2J\n", encoding="utf-8-sig")
    source = open_path(tmp_path / "list.txt")
    assert source.read(0) == photo()
    with pytest.raises(UserError) as error:
        source.read(1)
    place = f"{tmp_path}/list.txt, line 4: {tmp_path}/{odd}".replace("\t", "\\t")
    assert str(error.value).startswith(place + "\\x1b[2J: no such file")


def test_names_that_are_not_utf8(tmp_path):
    root = folder_of(tmp_path / os.fsdecode(b"n\xff"), 2)
    (root / os.fsdecode(b"a\xfe\n.jpg")).write_bytes(b"")
    source = open_path(root)
    assert [source.read(i).size for i in (1, 2)] == [(60, 48)] * 2
    with pytest.raises(UserError, match="cannot identify image") as error:
        source.read(0)
    assert str(error.value).isprintable()


def test_index_is_reused_and_changes_are_noticed(tmp_path, capfd, cache):
    root = folder_of(tmp_path / "x", 4)
    shard = tar_of(tmp_path / "x.tar", root)
    assert open_path(root).count == 4
    folder_of(root, 1, start=4)
    assert open_path(root).count == 5
    (root / "class0" / "0000.jpg").unlink()
    assert open_path(root).count == 4
    capfd.readouterr()
    assert open_path(root).count == 4
    assert capfd.readouterr().err == ""  # this time the index was read
    assert open_path(shard).count == 4
    tar_of(shard, root / "class1")
    assert open_path(shard).count == 2
    for index in cache.glob("*.index"):
        index.write_bytes(index.read_bytes()[:-99])
    assert open_path(root).count == 4


def test_of_processes_that_start_together_one_writes_the_index(tmp_path, capfd):
    root = folder_of(tmp_path / "x", 40)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(count_images, [root] * 3) == [40] * 3
    assert capfd.readouterr().err.count("listing") == 1


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_CACHE", "/dev/null/no")
    with pytest.raises(UserError, match="cannot write to /dev/null/no: .*DUNE_CACHE"):
        open_path(folder_of(tmp_path / "x", 1))


def test_images_of_a_turned_source(tmp_path):
    root = folder_of(tmp_path / "x", 3)
    upright = read_all(open_path(root))
    for path in (root, tar_of(tmp_path / "x.tar", root)):
        images = read_all(open_path(f"{path}@turn:class1"))
        assert np.array_equal(images[0], upright[0])
        assert np.array_equal(images[1], np.rot90(upright[1], -1))


def test_a_new_kind_of_source_and_the_picture_of_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.SOURCES, "flat:", Flat)
    groups = data.parse_data(["dinov2=flat:0-30,scenes:objects:0-10", "mast3r=flat:0-20"], TWO)
    assert [(g.name, g.count, g.generic) for g in groups] == [("dinov2", 40, True), ("mast3r", 20, False)]
    assert all(item["image"].shape == (8, 3, 28, 28) for item in take(3, groups, 28, 8, workers=2))
    held_out = data.held_out_images(groups, 28, 3)
    assert torch.equal(held_out[3], data.center_crop(groups[1].sources[0].read(0), 28))
    data.show_data(groups, TWO, 28, tmp_path / "data.png")
    assert "30 images in flat:0-30" in capsys.readouterr().out
    assert Image.open(tmp_path / "data.png").height > 200


def test_teacher_mask_and_default_scenes():
    groups = data.parse_data([], TEACHERS)
    assert [g.sources[0].spec for g in groups] == ["scenes:objects", "scenes:rooms", "scenes:people"]
    masks = [data.teacher_mask(groups, TEACHERS, sharing).int().tolist() for sharing in data.SHARING]
    assert masks[0] == [[1, 1, 1]] * 3
    assert masks[1] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert masks[2] == [[1, 1, 1], [0, 1, 0], [0, 0, 1]]
    both, = data.parse_data([], {"dino": Row("objects", False), "deit3": Row("objects", False)}, ":0-5")
    assert (both.name, both.count, both.teachers, both.generic) == ("objects", 5, ("dino", "deit3"), False)
    unseen = both.sources[0].held_out(8)
    assert (unseen.count, unseen.start) == (8, data.TEST_SCENES)


def test_bad_input_is_one_clear_line(tmp_path):
    root = folder_of(tmp_path / "x", 5)
    (tmp_path / "empty").mkdir()
    whole = tar_of(tmp_path / "whole.tar", root).read_bytes()
    (tmp_path / "inside.tar").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 999)
    (tmp_path / "list.txt").write_text("gone.jpg\nx/class0/0000.jpg\n")
    (tmp_path / "junk.txt").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "file.zip").write_bytes(b"zip")
    os.mkfifo(tmp_path / "fifo.tar")
    wrong = {
        "nowhere": "does not exist",
        "empty": "holds no images",
        "file.zip": "is not a folder, an uncompressed .tar or a .txt list",
        "fifo.tar": "holds no images",
        "inside.tar": "not a complete, uncompressed tar",
        "junk.tar": "not a complete, uncompressed tar",
        "list.txt": "line 1: .*gone.jpg does not exist .relative paths are relative to the list",
        "junk.txt": "line 1: .* does not exist",
    }
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words) as error:
            data.parse_data([f"dinov2={tmp_path / name}"], {"dinov2": TEACHERS["dinov2"]})
        assert str(error.value).isprintable() and name in str(error.value)
    os.mkfifo(root / "y.tar")
    wrong = {
        str(root): "y.tar is not a complete, .* not a regular",
        "sam=x": "sam, which is not",
        "dinov2=scenes:rooms": "no --data for teacher mast3r",
        "dinov2=": "does not exist",
        "scenes:cars": "objects, rooms, people",
        "scenes:rooms:0-9@turn:x": "objects, rooms, people",
        "scenes:rooms:9-9": "no images",
        "scenes:people:0-9,scenes:rooms": "scenes:rooms is unbounded; give a range",
    }
    for spec, words in wrong.items():
        with pytest.raises(UserError, match=words):
            data.parse_data([spec], TEACHERS)


# ---- Order and batches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_permuted_index_is_a_permutation(n):
    once, again = ([data.permuted_index(i, n, 3, epoch) for i in range(n)] for epoch in (0, 1))
    assert sorted(once) == sorted(again) == list(range(n))
    assert n < 64 or once != again and abs(np.corrcoef(once, range(n))[0, 1]) < 0.3


class Flat(data.Source):
    """Images of one value, "flat:START-STOP"; a ramp over the columns is added."""

    def __init__(self, spec):
        super().__init__(spec)
        self.start, stop = map(int, spec[5:].split("-"))
        self.count = stop - self.start

    def read(self, i, size=0):
        ramp = self.start + i + np.zeros((40, 1, 3)) + 2 * np.arange(40)[:, None]
        return Image.fromarray(ramp.astype(np.uint8))


def test_every_batch_is_balanced_every_epoch_complete_and_half_is_flipped(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "flat:", Flat)
    groups = data.parse_data(["dinov2=flat:0-7,flat:7-12", "mast3r=flat:20-29"], TWO)
    items = take(60, groups, 10, 6, workers=0, scale=(1, 1))
    assert all(item["group"].tolist() == [0, 1] * 3 for item in items)
    images = torch.cat([item["image"] for item in items]).float()
    flipped = images[..., 0].mean((1, 2)) > images[..., -1].mean((1, 2))
    assert 0.4 < flipped.float().mean() < 0.6
    values = (images[..., 4:6].mean((1, 2, 3)) - 39).round().int()
    for group, expect in enumerate((range(12), range(20, 29))):
        drawn = values[group::2].tolist()
        for k in range(0, len(drawn) - len(expect), len(expect)):
            assert sorted(drawn[k:k + len(expect)]) == list(expect)


def test_batches_are_a_pure_function_of_the_step(tmp_path):
    """Any number of ranks, any start, any number of workers: the same global batches, to the last bit."""
    specs = [f"dinov2={folder_of(tmp_path / 'a', 20)}", "mast3r=scenes:rooms", "multihmr=scenes:people"]
    groups = data.parse_data(specs, TEACHERS)
    whole = take(4, groups, 28, 12, seed=5, workers=0)
    resumed = take(2, groups, 28, 12, seed=5, workers=2, start_step=2)
    ranks = [take(4, groups, 28, 12, seed=5, workers=0, rank=r, world=4) for r in range(4)]
    for key in ("image", "group", "params"):
        for k in range(4):
            assert torch.equal(whole[k][key], torch.cat([rank[k][key] for rank in ranks]))
        assert all(torch.equal(whole[k + 2][key], resumed[k][key]) for k in range(2))
    assert len({x.numpy().tobytes() for item in whole for x in item["image"]}) == 48
    assert not torch.equal(take(1, groups, 28, 12, seed=6, workers=0)[0]["params"], whole[0]["params"])


def test_a_killed_worker_does_not_end_the_run(capfd):
    groups = data.parse_data([], TEACHERS)
    list(torch.utils.data.DataLoader([0], num_workers=1))  # leaves a handler that raises when a child dies
    stream = data.batches(groups, [28], 6, workers=2)
    seen = [next(stream)]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    time.sleep(0.3)  # it dies while the caller is doing something else
    seen += [next(stream) for _ in range(7)]
    expect = take(8, groups, 28, 6, workers=0)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(seen, expect))
    assert "starting again at step" in capfd.readouterr().err


def test_a_small_shared_memory_is_told_and_enough(monkeypatch, capfd):
    """Docker gives 64 MB: workers then send their images through pipes."""
    groups = data.parse_data([], TEACHERS)
    expect = take(3, groups, 28, 12, workers=0)
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device")
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", functools.partial(raise_error, full))
    items = take(3, groups, 28, 12, workers=2)
    for a, b in zip(items, expect, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "group", "params"))
    told = capfd.readouterr().err
    assert "data: /dev/shm is full, workers use pipes, starting again at step 0\n" in told
    assert told.count("data:") == 1 and "Traceback" not in told


def test_damaged_images_are_replaced_and_too_many_stop_the_run(tmp_path):
    root = folder_of(tmp_path / "x", 60)
    paths = sorted(root.glob("*/*.jpg"))
    groups = data.parse_data([str(root)], TWO)
    paths[0].unlink()  # vanished after the index was written
    paths[1].unlink()
    os.mkfifo(paths[1])  # must not be waited for
    paths[2].write_bytes(paths[2].read_bytes()[:300])
    items = take(9, groups, 28, 20, workers=0)
    bad = [line for item in items for line in item["bad"]]
    assert all(item["image"].shape == (20, 3, 28, 28) for item in items)
    assert {line.split(": ")[0] for line in bad} == set(map(str, paths[:3]))
    for count, words in ((30, "more than one in ten; the last: .*cannot identify image .*$"),
                         (60, f"^{root}: 24 consecutive images could not be read; the last: .*jpg: ")):
        for path in paths[2:count]:
            path.write_bytes(b"")
        for workers in (0, 2):
            with pytest.raises(UserError, match=words):
                take(40, groups, 28, 20, workers=workers)
    few = open_path(folder_of(tmp_path / "few", 3))
    for path in (tmp_path / "few").glob("*/*.jpg"):
        assert all(data.read_or_next(few, k, 0)[0] for k in range(3))  # the last one is found
        path.write_bytes(b"")
    with pytest.raises(UserError, match="few: 3 consecutive images could not be read"):
        data.read_or_next(few, 1, 0)


# ---- Decoding ----------------------------------------------------------------------------------------------

def test_mutated_files_give_an_image_or_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(150):
        buffer = io.BytesIO()
        photo(i).save(buffer, ("JPEG", "PNG", "WEBP")[i % 3])
        raw = bytearray(buffer.getvalue())
        if i % 5 == 0:  # cut short
            raw = raw[:int(rng.integers(len(raw)))]
        elif i % 5 == 1:  # junk, or nothing
            raw = bytearray(rng.bytes(500)) if i % 2 else b""
        elif i % 5 > 2:  # wrong bits, anywhere or at the beginning
            for place in rng.integers(len(raw) if i % 5 == 3 else 40, size=9):
                raw[place] ^= 1 << int(rng.integers(8))
        (tmp_path / f"{i:03}{('.png', '.webp', '.jpg')[i % 3]}").write_bytes(raw)  # always the wrong suffix
    source = open_path(tmp_path)
    assert source.count == 150
    for i in range(source.count):
        try:
            image = data.resize(source.read(i, 28), (0, 0, 20, 10), 28, 28)
            assert image.shape == (3, 28, 28) and i % 5 != 1
        except UserError as error:
            assert str(error).startswith(str(tmp_path)) and str(error).isprintable() and i % 5 != 2


def test_odd_images_come_out_as_sensible_rgb(tmp_path):
    base = photo(1, 64, 40)
    rgb = np.asarray(base).astype(int)

    def error(name, image, expect=rgb, **options):
        image.save(tmp_path / name, **options)
        out = np.asarray(data.load_image(tmp_path / name)).astype(int)
        assert out.shape == expect.shape, name
        return np.abs(out - expect).mean()

    gray = np.asarray(base.convert("L")).astype(int)[..., None].repeat(3, 2)
    assert error("gray.png", base.convert("L"), gray) == 0
    assert error("16bit.png", Image.fromarray((gray[..., 0] * 257).astype(np.uint16)), gray) < 1
    assert error("cmyk.jpg", base.convert("CMYK"), quality=95) < 6
    clear = base.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 32, 40))
    white = np.where(np.arange(64)[None, :, None] < 32, 255, rgb)
    assert error("alpha.png", clear, white) == 0
    text = PngInfo()
    text.add_text("prompt", "x" * 2**21, zip=True)
    assert error("text.png", base, pnginfo=text, icc_profile=bytes(2**21)) == 0
    assert error("alpha-palette.png", clear.quantize(256, method=Image.Quantize.FASTOCTREE), white) < 12
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        base.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        expect = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
        assert np.array_equal(np.asarray(data.load_image(tmp_path / "turned.jpg")), np.asarray(expect))
    assert data.center_crop(base.resize((1, 300)), 28).shape == (3, 28, 28)
    assert data.fit_image(base.resize((1, 300)), 56, 14).shape == (3, 56, 14)
    assert data.fit_image(photo(0, 200, 100), 100, 14).shape == (3, 56, 98)
    os.mkfifo(tmp_path / "fifo.jpg")
    for name in ("none.jpg", "fifo.jpg"):
        with pytest.raises(UserError, match=f"{name}: no such file, or not a regular one"):
            data.load_image(tmp_path / name)


def test_enormous_images_are_refused(tmp_path, monkeypatch):
    photo(0, 800, 600).save(tmp_path / "big.png")
    assert data.load_image(tmp_path / "big.png").size == (800, 600)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    with pytest.raises(UserError, match="big.png: .*exceeds limit of 400000 pixels"):
        data.load_image(tmp_path / "big.png")
    photo().save(tmp_path / "claim.jpg")
    raw = (tmp_path / "claim.jpg").read_bytes()
    assert raw.count(b"\0\x30\0\x3c") == 1  # height, width
    (tmp_path / "claim.jpg").write_bytes(raw.replace(b"\0\x30\0\x3c", 2 * b"\xff\xdc"))
    with pytest.raises(UserError, match="claim.jpg: Image size .4290250000 pixels. exceeds"):
        data.load_image(tmp_path / "claim.jpg")


def test_reduced_decoding_stays_within_the_resampling_error(tmp_path):
    photo(3, 1003, 757).save(tmp_path / "large.jpg", quality=92)
    full = data.load_image(tmp_path / "large.jpg")
    reduced = open_path(tmp_path).read(0, 112 / 0.4**0.5)
    assert (full.width, reduced.width) == (1003, 502)
    expect = data.resize(full, (150, 50, 800, 700), 112, 112).float()
    out = data.resize(reduced, (75, 25, 400, 350), 112, 112)
    lanczos = np.array(full.resize((112, 112), Image.LANCZOS, (150, 50, 800, 700)))
    limit = (expect - torch.from_numpy(lanczos).permute(2, 0, 1)).abs().mean()
    assert (out - expect).abs().mean() < max(0.8, limit)


def test_crop_follows_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_crop(500, 375, rng, (0.4, 1.0)) for _ in range(3000)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area = w * h / (500 * 375)
    aspect = np.log(w / h)
    assert boxes.min() >= 0 and (boxes.max(0) <= [500, 375, 500, 375]).all()
    assert area.min() > 0.39 and area.max() <= 1 and 0.6 < area.mean() < 0.7
    assert np.abs(aspect).max() < np.log(1.35) and abs(aspect.mean()) < 0.07
    x0, y0, x1, y1 = data.random_crop(1, 900, rng, (0.4, 1.0))
    assert (x0, x1, y1 - y0) == (0, 1, 1)


# ---- Color -------------------------------------------------------------------------------------------------

def pillow_augment(image, params):
    """The color augmentation as published pipelines do it, one 8-bit PIL image at a time. float [3, H, W]."""
    p = params.tolist()
    for op, factor in zip(p[:4], p[4:8]):
        if op == 3:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(np.asarray(h) + np.uint8(int(factor * 255) % 256))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[int(op)]
            image = enhance(image).enhance(factor)
    if p[8]:
        image = image.convert("L").convert("RGB")
    if p[9]:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        x = gaussian(x, p[9]).round().clamp(0, 255).byte()
        image = Image.fromarray(x.permute(1, 2, 0).numpy())
    if p[10]:
        image = ImageOps.solarize(image, 128)
    return data.normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]


def gaussian(x, sigma):
    """[3, H, W] under the Gaussian kernel of 9 pixels, reflected at the border."""
    taps = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / sigma) ** 2)
    taps = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x[None], (4, 4, 4, 4), mode="reflect")
    return F.conv2d(padded, taps.expand(3, 1, 9, 9), groups=3)[0]


def color_row(**columns):
    """Parameters that change nothing but the columns named c0 to c10."""
    params = torch.tensor(data.NO_COLOR, dtype=torch.float32)
    for name, value in columns.items():
        params[int(name[1:])] = value
    return params


def test_color_agrees_with_pillow():
    """One by one and in one batch. Pillow rounds to 8 bits after each step: a few levels."""
    rng = np.random.default_rng(1)
    rows = [color_row(), color_row(c8=1), color_row(c9=0.3), color_row(c9=4.5), color_row(c10=1)]
    rows += [color_row(c4=f) for f in (1.35, 0.65)] + [color_row(c5=f) for f in (1.4, 0.6)]
    rows += [color_row(c6=f) for f in (1.2, 0.8)] + [color_row(c7=f) for f in (0.1, -0.1)]
    singles = len(rows)
    rows += [torch.from_numpy(data.draw_color(rng)) for _ in range(40)]
    params = torch.stack(rows)
    pictures = [photo(i, 70, 56) for i in range(len(rows))]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    std = torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    together = data.normalize(data.recolor(images / 255, params))  # as on a GPU: all at once
    alone = data.augment(images, params)
    assert (together - alone).abs().max() < 1e-4
    assert torch.equal(alone[0], data.normalize(images[:1])[0])
    for i, (p, picture) in enumerate(zip(params, pictures)):
        difference = ((pillow_augment(picture, p) - alone[i]) * std * 255).abs()
        if p[10]:  # at the threshold a rounding becomes a jump of the whole scale
            difference = difference[difference < 100]
        assert difference.mean() < (1.5 if i < singles else 2.5), (i, p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_color_on_a_gpu_agrees_and_is_not_waited_for():
    item = next(data.batches(data.parse_data([], TEACHERS), [56], 24, workers=0))
    expect = data.augment(item["image"], item["params"])
    image = item["image"].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = data.augment(image, item["params"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (out.cpu() - expect).abs().max() < 1e-4


def test_hue_agrees_with_colorsys():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (64, 3))
    turn = rng.uniform(-0.1, 0.1, 64)
    x[:8] = x[:8, :1]  # grays have no hue
    hsv = [colorsys.rgb_to_hsv(*v) for v in x]
    expect = np.array([colorsys.hsv_to_rgb((h + t) % 1, s, v) for (h, s, v), t in zip(hsv, turn)])
    turn = torch.from_numpy(turn).float().view(64, 1, 1, 1)
    out = data.shift_hue(torch.from_numpy(x).float().view(64, 3, 1, 1), turn)
    assert np.abs(out.view(64, 3).numpy() - expect).max() < 1e-5


def test_color_parameters_follow_the_recipe():
    rng = np.random.default_rng(0)
    none = np.array(data.NO_COLOR, np.float32)
    params = np.stack([data.draw_color(rng) for _ in range(5000)])
    jittered = params[(params[:, :8] != none[:8]).any(1)]
    order = jittered[:, :4]
    assert abs(len(jittered) / 5000 - 0.8) < 0.02
    assert len(np.unique(order, axis=0)) == 24 and (np.sort(order, 1) == np.arange(4)).all()
    for operation, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
        factor = jittered[:, 4:8][order == operation]
        found = factor.min(), factor.mean(), factor.max()
        assert np.allclose(found, [low, (low + high) / 2, high], atol=0.02)
    assert np.abs((params[:, 8:] > 0).mean(0) - 0.2).max() < 0.02
    sigma = params[params[:, 9] > 0, 9]
    assert 0.1 <= sigma.min() < 0.15 and 4.9 < sigma.max() <= 5
    for share in (0, 0.5):  # of the images; 0.2 * 0.8**3 of these come out unchanged
        changed = np.stack([data.draw_color(rng, share) for _ in range(5000)]) != none
        assert abs(changed.any(1).mean() - share * (1 - 0.2 * 0.8**3)) <= 0.04 * share


# ---- Files and pictures ------------------------------------------------------------------------------------

def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "new" / "x.pt"
    with data.atomic_write(path) as file:
        torch.save(torch.ones(3), file)
    with pytest.raises(KeyError), data.atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert torch.load(path).tolist() == [1, 1, 1]
    assert os.listdir(tmp_path / "new") == ["x.pt"]
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="x: No space left"), data.atomic_write(tmp_path / "x") as file:
        torch.save(torch.ones(9**6), file)


def test_pictures(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8) + np.uint8([255, 0, 0])
    rows = [[red, torch.tensor(red)], [red.transpose(2, 0, 1)]]
    data.contact_sheet(rows, tmp_path / "s.png", ("a", "b\nc"), 60)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (172, 132, 3)
    assert (sheet == red[0, 0]).all(2).sum() == 3 * 60 * 40
    colors, same = data.pca_colors([{"patch": torch.randn(2, 12, 8)}] * 2, (3, 4))
    assert colors.shape == (2, 3, 4, 3) and torch.equal(colors, same) and colors.float().std() > 30
    depth = data.depth_colors(torch.tensor([[0.0, 1.0, 4.0]]), 1, 4)
    assert depth.tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 255]]]
    curves = {"falls": ([0, 1, 2], [3, 2, float("nan")]), "none": ([], [])}
    image = Image.open(data.line_plot(tmp_path / "p.png", {"loss": curves, "empty": {}}))
    assert image.size == (1120, 300)
