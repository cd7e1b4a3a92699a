"""Sources, order, decoding, colour and batches, against the definitions and against Pillow."""
import colorsys
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import data
import dune
from data import Oops

Row = namedtuple("Row", "domain generic")
TEACHERS = {"dinov2": Row("objects", True), "mast3r": Row("rooms", False), "multihmr": Row("people", False)}
TWO = {name: TEACHERS[name] for name in ("dinov2", "mast3r")}

@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    torch.set_num_threads(1)

def photo(seed=0, width=60, height=48):
    """A picture with smooth parts, edges and some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., None]
    a = 127 + 90 * np.sin(x * rng.uniform(2, 9, 3) + y * rng.uniform(2, 9, 3)) + rng.normal(0, 6, (height, width, 1))
    a[height // 3:height // 2, width // 4:width // 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(a.clip(0, 255).astype(np.uint8))

def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()

def folder(path, count, start=0, **size):
    """A folder of `count` small JPEGs, in two levels."""
    for i in range(start, start + count):
        (path / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        photo(i, **size).save(path / f"class{i % 3}" / f"{i:04}.jpg", quality=95)
    return path

def tar(path, source):
    with tarfile.open(path, "w") as archive:
        archive.add(source, "inside")
    return path

def open_path(path):
    return data.open_source(str(path))

def read_all(source):
    return [np.asarray(source.read(i)[0]) for i in range(source.count)]

def drawn(groups, steps, batch=8):
    """[(group, source, image)] of every position of the global batches `steps`, as the loader draws them."""
    orders = [data.Order(group, data.mix(0, g)) for g, group in enumerate(groups)]
    positions = itertools.chain.from_iterable(range(k * batch, (k + 1) * batch) for k in steps)
    return [(p % len(groups), *orders[p % len(groups)](p // len(groups))) for p in positions]

def take(n, groups, size, batch, **options):
    return list(itertools.islice(data.batches(groups, size, batch, **options), n))

# ---- Sources ---------------------------------------------------------------------------------------------------------

def test_folder_tar_and_list_hold_the_same_images(tmp_path):
    root = folder(tmp_path / "x", 7)
    (root / "notes.md").write_text("no image")
    (root / ".hidden.jpg").write_bytes(b"junk")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "t.jpg").write_bytes(b"junk")
    (root / "loop").symlink_to(root)
    shards = tmp_path / "shards"
    shards.mkdir()
    for k in range(3):
        tar(shards / f"{k}.tar", root / f"class{k}")
    names = sorted(root.glob("class*/*.jpg"))
    relative = [str(path.relative_to(tmp_path)) for path in names[:3]]
    absolute = [str(path) for path in names[3:]]
    (tmp_path / "list.txt").write_text("\n".join(["# relative and absolute", *relative, *absolute]))
    sources = [open_path(path) for path in (root, shards, tmp_path / "list.txt")]
    pixels = [read_all(source) for source in sources]
    assert len(pixels[0]) == 7
    for other in pixels[1:]:
        assert all(np.array_equal(a, b) for a, b in itertools.zip_longest(pixels[0], other))
    assert (tmp_path / "x.dune-index").exists()
    assert not list(root.glob("*index*"))
    assert sources[0].index.find(0)[0] == sources[2].index.find(0)[0] == str(names[0])
    assert sources[1].index.find(0)[0] == str(shards / "0.tar" / "inside" / names[0].name)

def test_index_is_reused_and_noticed_when_stale(tmp_path, capfd):
    root = folder(tmp_path / "x", 4)
    shard = tar(tmp_path / "x.tar", root)
    os.utime(root, ns=(1, 1))
    assert open_path(root).count == 4
    folder(root, 1, start=4)
    assert open_path(root).count == 5
    (root / "class0" / "0000.jpg").unlink()
    assert open_path(root).count == 4
    capfd.readouterr()
    assert open_path(root).count == 4
    assert "index" not in capfd.readouterr().err  # the second look reads the file
    assert open_path(shard).count == 4
    tar(shard, root / "class1")
    assert open_path(shard).count == 2

def test_a_foreign_or_damaged_index_is_written_again(tmp_path):
    root = folder(tmp_path / "x", 4)
    index = tmp_path / "x.dune-index"
    assert open_path(root).count == 4
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    old = np.array([3, 4, 1, 0, 9] + [0] * 40, np.int64).tobytes()  # the format of earlier days
    other = io.BytesIO()
    torch.save({"names": torch.zeros(4)}, other)
    for junk in (b"", b"junk", rng.bytes(999), rng.bytes(1000), old, other.getvalue(), whole[:-9], whole[:40]):
        index.write_bytes(junk)
        assert open_path(root).count == 4
        assert index.read_bytes() == whole
    for place in range(0, len(whole), 5):  # whatever byte is wrong: a good index, or images that cannot be found
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        index.write_bytes(damaged)
        source = open_path(root)
        for i in range(source.count):
            try:
                source.read(i)
            except Oops as error:
                assert str(error).startswith(source.index.find(i)[0])
    index.unlink()
    os.mkfifo(index)
    assert open_path(root).count == 4

def test_index_of_a_read_only_place_goes_to_the_cache(tmp_path, monkeypatch):
    root = folder(tmp_path / "x", 3)
    tmp_path.chmod(0o555)
    assert open_path(root).index.place.startswith(os.environ["DUNE_CACHE"])
    monkeypatch.setenv("DUNE_CACHE", "/dev/null/no")
    with pytest.raises(Oops, match="set DUNE_CACHE"):
        open_path(root)
    tmp_path.chmod(0o755)

def test_a_large_index_opens_fast_and_takes_no_memory(tmp_path):
    names = ((f"{i:09}.jpg", 0, 0) for i in range(300_000))
    tmp_path = tmp_path.resolve()
    place = str(tmp_path / "large.dune-index")
    data.write_index(place, str(tmp_path), [(str(tmp_path / "sub"), names)])
    tracemalloc.start()
    begun = time.perf_counter()
    index = data.Index(place, str(tmp_path))
    index.fits()
    assert time.perf_counter() - begun < 0.5
    assert index.find(299_999)[0] == str(tmp_path / "sub" / "000299999.jpg")
    assert tracemalloc.get_traced_memory()[1] < 200_000  # bytes, at the most
    tracemalloc.stop()

def test_of_processes_that_start_together_one_writes_the_index(tmp_path):
    root = folder(tmp_path / "x", 40)
    call = f"import data; print(data.open_source({str(root)!r}).count)"
    command = [sys.executable, "-c", call]
    here = os.path.dirname(data.__file__)
    both = [subprocess.Popen(command, cwd=here, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    told = [process.communicate() for process in both]
    assert [out for out, _ in told] == ["40\n"] * 3
    assert "".join(err for _, err in told).count("kept as") == 1
    assert len(list(tmp_path.iterdir())) == 2  # nothing but the folder and its index

def test_weights_turn_and_data_file(tmp_path):
    a, b = folder(tmp_path / "a", 30), folder(tmp_path / "b", 30)
    lines = ["# our sets", f"dinov2={a},{b}@turn:class1@0.5  # half", "", "mast3r=scenes:rooms:10-20"]
    (tmp_path / "data.txt").write_text("\n".join(lines))
    groups = data.parse_data([str(tmp_path / "data.txt")], TWO)
    assert [(g.name, g.count, g.generic) for g in groups] == [("dinov2", 60, True), ("mast3r", 10, False)]
    assert groups[1].sources[0].start == 10
    order = data.Order(groups[0], 0)
    picks = np.array([order(n)[0] for n in range(3000)])
    assert abs((picks == 1).mean() - 1 / 3) < 0.03
    source = groups[0].sources[1]
    upright = open_path(b)
    for i, (image, plain) in enumerate(zip(read_all(source), read_all(upright))):
        expect = np.rot90(plain, -1) if "class1" in source.index.find(i)[0] else plain
        assert np.array_equal(image, expect)
    packed = open_path(f"{tar(tmp_path / 'b.tar', b)}@turn:class1")
    assert [image.shape for image in read_all(packed)] == [image.shape for image in read_all(source)]
    for first in (str(a), f"{a}@0.5", "scenes:rooms:0-30", f"mast3r={a}"):  # the second line is for all
        (tmp_path / "data.txt").write_text(f"{first}\n{a}\n")
        assert sum(group.count for group in data.parse_data([str(tmp_path / "data.txt")], TWO)) == 60

def test_teacher_mask_and_default_scenes():
    groups = data.parse_data([], TEACHERS)
    assert [g.sources[0].spec for g in groups] == ["scenes:objects", "scenes:rooms", "scenes:people"]
    assert data.teacher_mask(groups, TEACHERS, "all").all()
    assert data.teacher_mask(groups, TEACHERS, "own").int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert data.teacher_mask(groups, TEACHERS, "own+generic").int().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 1]]
    both = data.parse_data([], {"dino": Row("objects", False), "deit3": Row("objects", False)}, ":0-5")
    assert [(g.name, g.count, g.teachers, g.generic) for g in both] == [("objects", 5, ("dino", "deit3"), False)]

def test_held_out_images_are_scenes_beyond_those_of_any_run(tmp_path):
    scenes = data.open_source("scenes:rooms:0-50").held_out(8)
    assert (scenes.count, scenes.start) == (8, data.TEST_SCENES)
    files = open_path(folder(tmp_path / "x", 2))
    assert files.held_out(8) is files

class Noise(data.Source):
    """A new kind of source, as the README shows it."""

    def __init__(self, spec, weight=1.0):
        super().__init__(spec, weight)
        self.count = int(spec.removeprefix("noise:"))

    def read(self, i, size=0, crop=data.whole):
        pixels = np.random.default_rng(i).integers(256, size=(64, 64, 3), dtype=np.uint8)
        return Image.fromarray(pixels), crop(64, 64)

def test_a_new_kind_of_source_is_a_class_and_an_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.SOURCES, "noise:", Noise)
    groups = data.parse_data(["dinov2=noise:30@0.5,scenes:objects:0-10", "mast3r=noise:20"], TWO)
    item = next(data.batches(groups, 28, 8, workers=0, train=False))
    first = data.crop_resize(groups[1].sources[0].read(0)[0], (0, 0, 64, 64), 28, 28)
    assert torch.equal(item["image"][1], first)
    assert all(item["image"].shape == (8, 3, 28, 28) for item in take(3, groups, 28, 8, workers=2))
    data.inspect(groups, TWO, 28, tmp_path / "d.png")
    text = capsys.readouterr().out
    assert "noise:30 (weight 0.5): 30 images, smallest 64x64" in text
    (tmp_path / "data.txt").write_text("noise:30")
    assert data.parse_data([str(tmp_path / "data.txt")], TWO)[0].count == 30

# ---- Mistakes --------------------------------------------------------------------------------------------------------

def test_bad_input_is_one_clear_line(tmp_path):
    root = folder(tmp_path / "x", 5)
    (tmp_path / "empty").mkdir()
    whole = tar(tmp_path / "whole.tar", root).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [member.offset_data + member.size for member in archive]
    (tmp_path / "between.tar").write_bytes(whole[:ends[-1] // 512 * 512 + 512])
    (tmp_path / "inside.tar").write_bytes(whole[:ends[3] - 300])
    (tmp_path / "header.tar").write_bytes(whole[:ends[2] // 512 * 512 + 700])
    (tmp_path / "list.txt").write_text("x/class0/0000.jpg\n" + "".join(f"gone{i}.jpg\n" for i in range(5)))
    (tmp_path / "bytes.txt").write_bytes(b"a.jpg\n\xff\xfe.jpg\n")
    (tmp_path / "control.txt").write_bytes(b"a\x1b[2J.jpg\n")
    (tmp_path / "junk.txt").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "file.zip").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo.tar")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "link").symlink_to(os.fsdecode(b"n\xff"))
    os.mkdir(tmp_path / os.fsdecode(b"n\xff"))
    wrong = {
        "link": "no text in UTF-8",
        "nowhere": "does not exist",
        "empty": "holds no images",
        "file.zip": "neither",
        "between.tar": "not a whole",
        "inside.tar": "not a whole",
        "header.tar": "not a whole",
        "list.txt": "5 of its 6 paths do not exist, first gone0.jpg, gone1.jpg, gone2.jpg",
        "bytes.txt": "line 2 is no text",
        "control.txt": "line 1 is no text",
        "junk.txt": "no text in UTF-8",
        "fifo.tar": "no regular file",
        "fifo.txt": "no regular file",
    }
    for spec, words in wrong.items():
        with pytest.raises(Oops, match=words) as error:
            data.parse_data([f"dinov2={tmp_path / spec}"], {"dinov2": TEACHERS["dinov2"]})
        assert str(error.value).isprintable()
        assert spec in str(error.value)

def test_a_wrong_line_is_told(tmp_path):
    root = folder(tmp_path / "x", 5)
    wrong = {
        "sam=x": "sam, which is not",
        f"dinov2={root}": "no images for mast3r, multihmr",
        "scenes:cars": "objects, rooms, people",
        f"{root}@-1": "does not exist",
        "scenes:rooms:9-9": "no images",
        f"{root},scenes:rooms": "no end",
        f"{root}@0": "above 0",
        f"{root}@{'9' * 400}": "above 0",
        "scenes:rooms:0-9@turn:x": "for files",
    }
    for spec, words in wrong.items():
        with pytest.raises(Oops, match=words):
            data.parse_data([spec], TEACHERS)
    for content in (np.random.default_rng(0).bytes(5000), f"{root}\n\x1b[2J".encode(), b"caf\xe9\n"):
        (tmp_path / "data.txt").write_bytes(content)
        with pytest.raises(Oops, match="no text in UTF-8") as error:
            data.parse_data([str(tmp_path / "data.txt")], TEACHERS)
        assert str(error.value).isprintable()
    with pytest.raises(Oops, match="cannot be divided"):
        data.batches(data.parse_data([], TEACHERS), 14, 8, world=3)

@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "nowhere does not exist"),
    (["--data", "sam=scenes:rooms"], "unknown teacher sam"),
    (["--teachers", "sam"], "unknown teacher sam"),
    (["--image-size", "0"], "--image-size: 0 is not between"),
    (["--teachers", "mast3r", "--image-size", "28", "--out", "/dev/null/x.png"], "cannot write /dev/null/"),
])
def test_the_command_tells_a_mistake_in_one_line_before_the_work(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as left:
        dune.run(data.main)
    told = capsys.readouterr()
    assert (left.value.code, told.out) == (2, "")
    assert told.err.count("\n") == 1
    assert words in told.err

def test_the_command_shows_scenes_without_any_data(tmp_path):
    command = [sys.executable, data.__file__, "--teachers", "mast3r", "--image-size", "28"]
    script = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (script.returncode, script.stderr) == (0, "")
    assert "scenes:rooms" in script.stdout
    assert Image.open(tmp_path / "data.png").height > 200

# ---- Order -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_shuffled_is_a_permutation(n):
    once, again = ([data.shuffled(i, n, 3, epoch) for i in range(n)] for epoch in (0, 1))
    assert sorted(once) == sorted(again) == list(range(n))
    if n >= 64:
        assert once != again
        assert np.abs(np.corrcoef(once, range(n))[0, 1]) < 0.3

def test_every_batch_is_balanced_and_nothing_comes_twice_before_its_source_is_through(tmp_path):
    a, b, c = folder(tmp_path / "a", 12), folder(tmp_path / "b", 5), folder(tmp_path / "c", 9)
    groups = data.parse_data([f"dinov2={a},{b}@1.7", f"mast3r={c}", "multihmr=scenes:people:0-11"], TEACHERS)
    for batch in range(3, 9):
        counts = [np.bincount([g for g, _, _ in drawn(groups, [k], batch)], minlength=3) for k in range(6)]
        assert all(np.ptp(count) <= 1 for count in counts)
        assert np.ptp(sum(counts)) <= 1
        assert np.ptp(sum(counts[:3])) == 0
    draws = drawn(groups, range(60))
    for key, count in {(0, 0): 12, (0, 1): 5, (1, 0): 9, (2, 0): 11}.items():
        images = [i for g, s, i in draws if (g, s) == key]
        assert len(images) > 2 * count
        for k in range(0, len(images) - count + 1, count):
            assert sorted(images[k:k + count]) == list(range(count))

def test_batches_are_a_pure_function_of_the_step(tmp_path):
    """Any number of ranks, any start, any number of workers: the same global batches, to the last bit."""
    specs = [f"dinov2={folder(tmp_path / 'a', 20)}", "mast3r=scenes:rooms", "multihmr=scenes:people"]
    groups = data.parse_data(specs, TEACHERS)
    whole = take(4, groups, 28, 12, seed=5, workers=0)
    resumed = take(2, groups, 28, 12, seed=5, workers=2, start_step=2)
    ranks = [take(4, groups, 28, 12, seed=5, workers=0, rank=r, world=4) for r in range(4)]
    for key in ("image", "group", "params"):
        for k in range(4):
            assert torch.equal(whole[k][key], torch.cat([rank[k][key] for rank in ranks]))
        for k in range(2):
            assert torch.equal(whole[k + 2][key], resumed[k][key])
    assert all(np.bincount(rank[k]["group"], minlength=3).tolist() == [1, 1, 1] for rank in ranks for k in range(4))
    assert len({x.numpy().tobytes() for item in whole for x in item["image"]}) == 48
    jittered = [p.numpy().tobytes() for item in whole for p in item["params"] if p[0] >= 0]
    assert len(set(jittered)) == len(jittered) > 30
    other = next(data.batches(groups, 28, 12, seed=6, workers=0))
    assert not torch.equal(other["image"], whole[0]["image"])
    assert not torch.equal(other["params"], whole[0]["params"])

def test_size_decides_in_large_sources():
    groups = data.parse_data(["scenes:rooms:0-3000000,scenes:people:0-1000000"], TEACHERS)
    order = data.Order(groups[0], 0)
    assert len(order.table) <= order.TABLE + 1
    assert abs(np.mean([order(n)[0] for n in range(4000)]) - 0.25) < 0.03

def test_half_of_the_images_are_flipped(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[:, None], (40, 1, 3))
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    groups = data.parse_data([str(tmp_path)], TEACHERS)
    image = next(data.batches(groups, 14, 200, workers=0, scale=(1, 1)))["image"].float()
    flipped = image[..., :7].mean((1, 2, 3)) > image[..., 7:].mean((1, 2, 3))
    assert 70 < flipped.sum() < 130

def test_validation_batches_are_in_order_and_plain(tmp_path):
    groups = data.parse_data([str(folder(tmp_path / "a", 6))], TEACHERS)
    item = next(data.batches(groups, 28, 6, workers=0, train=False))
    source = groups[0].sources[0]
    squares = [data.crop_resize(*source.read(i, 28, data.centre), 28, 28) for i in range(6)]
    assert torch.equal(item["image"], torch.stack(squares))
    assert torch.equal(data.augment(item["image"], item["params"]), data.normalise(item["image"]))

def test_a_killed_worker_does_not_end_the_run(tmp_path, capfd):
    groups = data.parse_data([], TEACHERS)
    list(torch.utils.data.DataLoader([0], num_workers=1))  # leaves a handler behind that raises when any child dies
    stream = data.batches(groups, 28, 6, workers=2)
    seen = [next(stream)]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    time.sleep(0.3)  # it dies while the caller is doing something else
    seen += [next(stream) for _ in range(7)]
    expect = take(8, groups, 28, 6, workers=0)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(seen, expect))
    assert "starting again at step" in capfd.readouterr().err

# ---- Damage and odd images -------------------------------------------------------------------------------------------

def mutants(rng, path):
    """A few hundred files that are images no more, or hardly: i % 5 tells how."""
    path.mkdir()
    for i in range(300):
        form = ("JPEG", "PNG", "WEBP")[i % 3]
        suffix = (".jpg", ".png", ".webp")[i % 3]
        raw = bytearray(encoded(photo(i), form, **({} if form == "PNG" else {"quality": 90})))
        if i % 5 == 0:  # cut short
            raw = raw[:int(rng.integers(len(raw)))]
        elif i % 5 in (1, 2):  # wrong bits, anywhere or at the beginning
            for at in rng.integers(len(raw) if i % 5 == 1 else 40, size=1 + int(rng.integers(30))):
                raw[at] ^= 1 << int(rng.integers(8))
        elif i % 5 == 3:  # whole, but of another name
            suffix = (".png", ".webp", ".jpg")[i % 3]
        else:  # empty, or junk
            raw = bytearray() if i % 2 else bytearray(rng.bytes(500))
        (path / f"{i:03}{suffix}").write_bytes(raw)
    return path

def test_mutated_files_give_an_image_or_a_reason(tmp_path):
    path = mutants(np.random.default_rng(0), tmp_path / "bad")
    (path / "x.jpg").mkdir()
    names = sorted(p.name for p in path.iterdir())
    (path / "list.txt").write_text("\n".join(names))
    source = open_path(path / "list.txt")
    outcome = {}
    for i in range(source.count):
        rng = np.random.default_rng(i)
        try:
            picture, box = source.read(i, 28, lambda w, h: data.random_crop(w, h, rng, (0.4, 1)))
            outcome[names[i]] = data.crop_resize(picture, box, 28, 28).shape == (3, 28, 28)
        except Oops as error:
            assert str(error).startswith(source.index.find(i)[0] + ": ")
            assert "\n" not in str(error)
            outcome[names[i]] = None
    assert set(outcome.values()) == {None, True}
    assert outcome.pop("x.jpg") is None
    assert all(outcome[name] for name in outcome if int(name[:3]) % 5 == 3)  # the wrong ending does no harm
    assert not any(outcome[name] for name in outcome if int(name[:3]) % 5 == 4)

def test_damaged_images_are_replaced_and_too_many_stop_the_run(tmp_path):
    root = folder(tmp_path / "x", 60)
    victims = sorted(root.glob("*/*.jpg"))[:3]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:300])
    groups = data.parse_data([str(root)], TWO)
    victims[0].unlink()  # vanished after the index was read
    victims[1].unlink()
    os.mkfifo(victims[1])  # must not be waited for
    items = take(9, groups, 28, 20, workers=0)
    bad = [line for item in items for line in item["bad"]]
    assert all(item["image"].shape == (20, 3, 28, 28) for item in items)
    assert {line.split(": ")[0] for line in bad} == set(map(str, victims))
    assert len(bad) > 9
    for path in sorted(root.glob("*/*.jpg"))[2:30]:
        path.write_bytes(b"")
    with pytest.raises(Oops, match="more than one in ten"):
        take(40, groups, 28, 20, workers=2)
    for path in sorted(root.glob("*/*.jpg"))[2:]:
        path.write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(Oops, match=f"^{root}: 24 images at a stretch could not be read; the last: .*jpg: not an"):
            next(data.batches(groups, 28, 20, workers=workers))

def test_an_empty_file_in_an_archive_and_a_fifo_are_unreadable_images(tmp_path):
    root = folder(tmp_path / "x", 2)
    (root / "0.jpg").write_bytes(b"")
    with pytest.raises(Oops, match="x.tar/inside/0.jpg: not an image"):
        open_path(tar(tmp_path / "x.tar", root)).read(0)
    (root / "0.jpg").unlink()
    os.mkfifo(root / "a.jpg")
    source = open_path(root)
    assert source.count == 3
    with pytest.raises(Oops, match="a.jpg: .*no regular file"):
        source.read(0)
    with pytest.raises(Oops, match="cannot read the image .*no regular file"):
        data.load_image(root / "a.jpg")
    os.mkfifo(root / "b.tar")
    with pytest.raises(Oops, match="b.tar is no regular file"):
        open_path(root)

def test_odd_images_come_out_as_sensible_rgb(tmp_path):
    base = photo(1, 64, 40)
    rgb = np.asarray(base).astype(int)

    def error(name, image, expect=rgb, **options):
        image.save(tmp_path / name, **options)
        out = np.asarray(data.load_image(tmp_path / name)).astype(int)
        assert out.shape == expect.shape, name
        return np.abs(out - expect).mean()

    grey = np.asarray(base.convert("L")).astype(int)[..., None].repeat(3, 2)
    single = grey[..., 0]
    upside = base.rotate(180)
    assert error("grey.png", base.convert("L"), grey) == 0
    assert error("16bit.png", Image.fromarray((single * 257).astype(np.uint16)), grey) < 1
    assert error("float.tiff", Image.fromarray(single.astype(np.float32) / 255), grey * 255 / grey.max()) < 1
    assert error("cmyk.jpg", base.convert("CMYK"), quality=95) < 6
    assert error("palette.png", base.quantize(256)) < 8
    clear = base.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 32, 40))
    white = np.where(np.arange(64)[None, :, None] < 32, 255, rgb)
    assert error("alpha.png", clear, white) == 0
    assert error("alpha-palette.png", clear.quantize(256, method=Image.Quantize.FASTOCTREE), white) < 12
    assert error("first.gif", base.quantize(256), save_all=True, append_images=[upside.quantize(256)]) < 8
    assert error("first.webp", base, save_all=True, append_images=[upside], lossless=True) == 0
    for orientation in range(1, 9):  # Pillow's own way of turning is the measure
        exif = Image.Exif()
        exif[0x0112] = orientation
        base.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        expect = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
        assert np.array_equal(np.asarray(data.load_image(tmp_path / "turned.jpg")), np.asarray(expect))
    thin = base.resize((1, 300))
    assert data.crop_resize(thin, data.centre(*thin.size), 28, 28).shape == (3, 28, 28)
    assert data.fit_image(thin, 56, 14).shape == (3, 56, 14)
    assert data.fit_image(photo(0, 200, 100), 100, 14).shape == (3, 56, 98)
    with pytest.raises(Oops, match="cannot read the image"):
        data.load_image(tmp_path / "none.jpg")

def test_enormous_images_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 100_000)
    photo(0, 800, 600).save(tmp_path / "big.jpg", quality=90)
    photo(0, 800, 600).save(tmp_path / "slow.jpg", quality=90, progressive=True)
    photo(0, 800, 600).save(tmp_path / "big.png")
    assert data.load_image(tmp_path / "big.jpg").size == (200, 150)
    for name in ("big.png", "slow.jpg"):
        with pytest.raises(Oops, match="pixels are too many"):
            data.load_image(tmp_path / name)

def test_reduced_decoding_stays_within_the_resampling_error():
    raw = encoded(photo(3, 2003, 1507), quality=92)
    for box in ((0, 0, 1500, 1400), (301, 97, 1507, 1301)):
        full, _ = data.decode(io.BytesIO(raw))
        expect = data.crop_resize(full, box, 224, 224).float()
        picture, reduced = data.decode(io.BytesIO(raw), 224, lambda w, h: box)
        out = data.crop_resize(picture, reduced, 224, 224).float()
        lanczos = full.crop(box).resize((224, 224), Image.LANCZOS)
        lanczos = torch.from_numpy(np.array(lanczos)).permute(2, 0, 1)
        assert (full.width, picture.width) == (2003, 1002)
        assert (out - expect).abs().mean() < max(0.8, (expect - lanczos).abs().mean())

def test_crop_follows_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_crop(500, 375, rng, (0.4, 1.0)) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h / (500 * 375)
    aspect = w / h
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    assert area.min() > 0.39 and area.max() <= 1
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert 0.6 < area.mean() < 0.7
    assert abs(np.log(aspect).mean()) < 0.07
    assert data.random_crop(1, 900, rng, (0.4, 1.0)) == (0, 449, 1, 450)
    square = data.crop_resize(photo(0, 50, 40), (10, 0, 50, 40), 28, 28)
    pillow = photo(0, 50, 40).crop((10, 0, 50, 40)).resize((28, 28), Image.BICUBIC)
    assert np.abs(square.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 2

# ---- Colour ----------------------------------------------------------------------------------------------------------

def pillow_augment(image, params):
    """The colour augmentation as published pipelines do it, one 8-bit PIL image at a time. float [3,H,W]."""
    p = params.tolist()
    for op in p[:4]:
        if op in (0, 1, 2):
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[int(op)]
            image = enhance(image).enhance(p[4 + int(op)])
        elif op == 3:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(np.asarray(h) + np.uint8(int(p[7] * 255) % 256))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if p[8]:
        image = image.convert("L").convert("RGB")
    if p[9]:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        x = gaussian(x, p[9]).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(x.permute(1, 2, 0).numpy())
    if p[10]:
        image = ImageOps.solarize(image, 128)
    return data.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]

def gaussian(x, sigma):
    """[3,H,W] under the Gaussian kernel of nine, reflected at the border."""
    taps = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / sigma) ** 2)
    taps = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x[None], (4, 4, 4, 4), mode="reflect")
    return F.conv2d(padded, taps.expand(3, 1, 9, 9), groups=3)[0]

def colour_row(**places):
    """Parameters that change nothing but what is named: grey, sigma, solarise, or op and factor."""
    p = torch.tensor(data.NO_COLOUR, dtype=torch.float32)
    for name, value in places.items():
        p[{"op": 0, "grey": 8, "sigma": 9, "solarise": 10}.get(name, 4 + int(p[0]))] = value
    return p

def test_colour_agrees_with_pillow():
    """One by one and mixed in one batch; Pillow rounds to 8 bits after each step (hue to 256 steps): a few levels."""
    rng = np.random.default_rng(1)
    rows = [colour_row(), colour_row(grey=1), colour_row(sigma=0.3), colour_row(sigma=4.5), colour_row(solarise=1)]
    factors = ((0, 1.35), (0, 0.65), (1, 1.4), (1, 0.6), (2, 1.2), (2, 0.8), (3, 0.1), (3, -0.1))
    rows += [colour_row(op=op, factor=factor) for op, factor in factors]
    singles = len(rows)
    rows += [torch.from_numpy(data.draw_colour(rng)) for _ in range(40)]
    params = torch.stack(rows)
    pictures = [photo(i, 70, 56) for i in range(len(rows))]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    std = torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    together = data.normalise(data.recolour(images.float() / 255, params))  # the way of a GPU: all at once
    alone = data.augment(images, params)
    assert (together - alone).abs().max() < 1e-4
    for i, (p, picture) in enumerate(zip(params, pictures)):
        difference = ((pillow_augment(picture, p) - alone[i]) * std * 255).abs()
        if p[10]:  # at the threshold a rounding becomes a jump of the whole scale
            difference = difference[difference < 100]
        assert difference.mean() < (1.5 if i < singles else 2.5), (i, p)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_colour_on_a_gpu_agrees_and_is_not_waited_for():
    groups = data.parse_data([], TEACHERS)
    item = next(data.batches(groups, 56, 24, workers=0))
    expect = data.augment(item["image"], item["params"])
    image = item["image"].cuda()
    assert (data.augment(image, item["params"]).cpu() - expect).abs().max() < 1e-4
    torch.cuda.set_sync_debug_mode("error")
    try:
        data.augment(image, item["params"])
    finally:
        torch.cuda.set_sync_debug_mode("default")

def test_hue_agrees_with_colorsys():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (64, 3))
    turn = rng.uniform(-0.1, 0.1, 64)
    x[:8] = x[:8, :1]  # greys have no hue
    hsv = [colorsys.rgb_to_hsv(*v) for v in x]
    expect = np.array([colorsys.hsv_to_rgb((h + t) % 1, s, v) for (h, s, v), t in zip(hsv, turn)])
    turn = torch.from_numpy(turn).float().view(64, 1, 1, 1)
    out = data.shift_hue(torch.from_numpy(x).float().view(64, 3, 1, 1), turn)
    assert np.abs(out.view(64, 3).numpy() - expect).max() < 1e-5

def test_blur_is_the_gaussian_kernel_of_nine_with_reflection():
    x = torch.rand(2, 3, 12, 10)
    sigma = torch.tensor([0.4, 3.0])
    for picture, s, out in zip(x, sigma, data.blur(x, sigma.view(2, 1, 1, 1))):
        assert (out - gaussian(picture, s)).abs().max() < 1e-5

def test_colour_parameters_follow_the_recipe():
    rng = np.random.default_rng(0)
    none = np.array(data.NO_COLOUR, np.float32)
    p = np.stack([data.draw_colour(rng) for _ in range(5000)])
    jittered = p[:, 0] >= 0
    assert abs(jittered.mean() - 0.8) < 0.02
    assert (p[~jittered][:, :8] == none[:8]).all()
    assert (np.sort(p[jittered][:, :4], 1) == np.arange(4)).all()
    assert len({tuple(x) for x in p[jittered][:, :4]}) == 24
    for column, low, high in ((4, 0.6, 1.4), (5, 0.6, 1.4), (6, 0.8, 1.2), (7, -0.1, 0.1)):
        x = p[jittered, column]
        assert abs(x.min() - low) < 0.01
        assert abs(x.max() - high) < 0.01
        assert abs(x.mean() - (low + high) / 2) < 0.02
    assert all(abs((p[:, column] > 0).mean() - 0.2) < 0.02 for column in (8, 9, 10))
    assert p[p[:, 9] > 0, 9].min() > 0.1 - 1e-3
    assert 4.9 < p[:, 9].max() <= 5
    for share in (0, 0.5, 1):  # of the images; 0.2 * 0.8**3 of these come out unchanged
        changed = np.stack([data.draw_colour(rng, share) for _ in range(5000)]) != none
        assert abs(changed.any(1).mean() - share * (1 - 0.2 * 0.8**3)) < 0.02 * (share > 0) + 1e-9
    groups = data.parse_data([], TEACHERS)
    for share in (0, 1):
        params = next(data.batches(groups, 28, 12, workers=0, colour=share))["params"]
        assert (params == torch.from_numpy(none)).all() == (share == 0)

# ---- Pictures and the command ----------------------------------------------------------------------------------------

def test_contact_sheet_and_inspection(tmp_path, capsys):
    a = np.zeros((3, 20, 30), np.uint8)
    rows = [[a, a + 255], [a.transpose(1, 2, 0)]]
    data.contact_sheet(rows, tmp_path / "s.png", columns=("one", "two\nlines"), cell=60)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape[0] > 80 and sheet.shape[1] > 120
    assert (sheet == 0).all(2).sum() >= 2 * 60 * 40
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(Oops, match="cannot write"):
        data.contact_sheet([[a]], tmp_path / "taken.png")
    root = folder(tmp_path / "x", 12)
    sorted(root.glob("*/*.jpg"))[0].write_bytes(b"")
    groups = data.parse_data([f"dinov2={root}", "mast3r=scenes:rooms"], TWO)
    data.inspect(groups, TWO, 28, tmp_path / "d.png")
    text = capsys.readouterr().out
    assert "12 images" in text and "60x48" in text and "unreadable 1 of 12" in text
    assert "--sharing own: dinov2\n" in text and "--sharing own+generic: dinov2, mast3r\n" in text
    assert Image.open(tmp_path / "d.png").height > 200

def test_bench_prints_every_stage(capsys):
    data.bench(28, repeat=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all("images/s" in line for line in lines[1:])
