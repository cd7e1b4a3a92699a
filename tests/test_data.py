import colorsys, io, itertools, os, pickle, signal, subprocess, sys, tarfile, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from data import Oops

TEACHERS = ["dinov2", "mast3r", "multihmr"]


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


def folder(path, count, start=0, **size):
    """A folder of `count` small JPEGs, in two levels."""
    for i in range(start, start + count):
        (path / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        photo(i, **size).save(path / f"class{i % 3}" / f"{i:04}.jpg", quality=95)
    return path


def tar(path, source):
    with tarfile.open(path, "w") as t:
        t.add(source, "inside")
    return path


def drawn(groups, steps, batch=8, **kw):
    """[(group, source, image)] of every position of the global batches `steps`, as the loader draws them."""
    orders = data.Steps(groups, 14, batch, 0, 0, 1, (0.4, 1), 1, True).orders
    return [(p % len(groups), *orders[p % len(groups)](p // len(groups))) for k in steps for p in range(k * batch, (k + 1) * batch)]


# ---- index and sources
def test_folder_tar_and_list_hold_the_same_images(tmp_path):
    root = folder(tmp_path / "x", 7)
    (root / "notes.md").write_text("no image")
    (root / ".hidden.jpg").write_bytes(b"junk")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "t.jpg").write_bytes(b"junk")
    (root / "loop").symlink_to(root)
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "a.tar", root / "class0"), tar(shards / "b.tar", root / "class1"), tar(shards / "c.tar", root / "class2")
    names = sorted(p for p in root.glob("class*/*.jpg"))
    mixed = [f"x/{p.relative_to(root)}" for p in names[:3]] + [str(p) for p in names[3:]]
    (tmp_path / "list.txt").write_text("# relative and absolute\n" + "\n".join(mixed))
    sources = [data.open_source(str(p)) for p in (root, shards, tmp_path / "list.txt")]
    pixels = [[np.asarray(s.read(i)[0]) for i in range(s.count)] for s in sources]
    assert len(pixels[0]) == 7
    for other in pixels[1:]:
        assert all(np.array_equal(a, b) for a, b in itertools.zip_longest(pixels[0], other))
    assert (tmp_path / "x.dune-index").exists() and not list(root.glob("*index*"))


def test_index_is_reused_and_noticed_when_stale(tmp_path, capfd):
    root = folder(tmp_path / "x", 4)
    shard = tar(tmp_path / "x.tar", root)
    os.utime(root, ns=(1, 1))
    for change, count in ((lambda: None, 4), (lambda: folder(root, 1, start=4), 5), (lambda: (root / "class0" / "0000.jpg").unlink(), 4)):
        change()
        assert data.open_source(str(root)).count == count
    capfd.readouterr()
    assert data.open_source(str(root)).count == 4
    assert "indexed" not in capfd.readouterr().err                     # the second look reads the file
    assert data.open_source(str(shard)).count == 4
    tar(shard, root / "class1")
    assert data.open_source(str(shard)).count == 2
    index = tmp_path / "x.dune-index"
    index.write_bytes(index.read_bytes()[:-9])                         # an index cut short is built again
    assert data.open_source(str(root)).count == 4


def test_index_of_a_read_only_place_goes_to_the_cache(tmp_path, monkeypatch):
    root = folder(tmp_path / "x", 3)
    tmp_path.chmod(0o555)
    assert data.open_source(str(root)).index.path.startswith(os.environ["DUNE_CACHE"])
    monkeypatch.setenv("DUNE_CACHE", "/dev/null/no")
    with pytest.raises(Oops, match="set DUNE_CACHE"):
        data.open_source(str(root))
    tmp_path.chmod(0o755)


def test_sources_hold_no_python_list_of_paths(tmp_path):
    source = data.open_source(str(folder(tmp_path / "x", 30)))
    assert len(pickle.dumps(source)) < 1000
    assert pickle.loads(pickle.dumps(source)).name(29) == source.name(29)


def test_weights_turn_and_data_file(tmp_path):
    a, b = folder(tmp_path / "a", 30), folder(tmp_path / "b", 30)
    (tmp_path / "data.txt").write_text(f"# our sets\ndinov2={a},{b}@turn:class1@0.5\n\nmast3r=scenes:rooms:10-20\n")
    groups = data.parse_data([str(tmp_path / "data.txt")], ["dinov2", "mast3r"])
    assert [(g.name, g.count, g.generic) for g in groups] == [("dinov2", 60, True), ("mast3r", 10, False)]
    assert groups[1].sources[0].name(0) == "scenes:rooms:10"
    order = data.Order(groups[0], 0)
    picks = np.array([order(n)[0] for n in range(3000)])
    assert abs((picks == 1).mean() - 1 / 3) < 0.03
    turned = [groups[0].sources[1].read(i)[0].size for i in range(30)]
    assert turned == [(48, 60) if "class1" in groups[0].sources[1].name(i) else (60, 48) for i in range(30)]
    upright, source = groups[0].sources[0], groups[0].sources[1]
    i = turned.index((48, 60))
    assert np.array_equal(np.asarray(source.read(i)[0]), np.rot90(np.asarray(upright.read(i)[0]), -1))


def test_teacher_mask_and_default_scenes():
    groups = data.parse_data([], TEACHERS)
    assert [g.sources[0].spec for g in groups] == ["scenes:objects", "scenes:rooms", "scenes:people"]
    assert data.teacher_mask(groups, TEACHERS, "all").all()
    assert data.teacher_mask(groups, TEACHERS, "own").int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert data.teacher_mask(groups, TEACHERS, "own+generic").int().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 1]]
    assert data.parse_data([], ["dino", "deit3"])[0].teachers == ("dino", "deit3")


def test_bad_input_is_one_clear_line(tmp_path):
    root = folder(tmp_path / "x", 5)
    (tmp_path / "empty").mkdir()
    whole = tar(tmp_path / "whole.tar", root).read_bytes()
    ends = [m.offset_data + m.size for m in tarfile.open(tmp_path / "whole.tar")]
    for k, cut in enumerate((ends[-1] // 512 * 512 + 512, ends[3] - 300, ends[2] // 512 * 512 + 700)):  # between, inside, in a header
        (tmp_path / f"cut{k}.tar").write_bytes(whole[:cut])
    (tmp_path / "list.txt").write_text("x/class0/0000.jpg\n" + "".join(f"gone{i}.jpg\n" for i in range(5)))
    (tmp_path / "file.zip").write_bytes(b"x")
    for spec, words in {"nowhere": "does not exist", "empty": "holds no images", "file.zip": "neither", "cut0.tar": "not a whole",
                        "cut1.tar": "not a whole", "cut2.tar": "not a whole",
                        "list.txt": "5 of its 6 paths do not exist, first gone0.jpg, gone1.jpg, gone2.jpg"}.items():
        with pytest.raises(Oops, match=words) as error:
            data.parse_data([f"dinov2={tmp_path / spec}"], ["dinov2"])
        assert "\n" not in str(error.value) and spec in str(error.value)
    for specs, teachers, words in ((["sam=x"], ["dinov2"], "sam, which is not"),
                                   ([f"dinov2={root}"], TEACHERS, "no images for mast3r, multihmr"),
                                   (["scenes:cars"], TEACHERS, "objects, rooms, people"), ([f"{root}@-1"], TEACHERS, "does not exist"),
                                   (["scenes:rooms:9-9"], TEACHERS, "no images"), ([f"{root},scenes:rooms"], TEACHERS, "no end"),
                                   ([f"{root}@0"], TEACHERS, "above 0")):
        with pytest.raises(Oops, match=words):
            data.parse_data(specs, teachers)
    with pytest.raises(Oops, match="cannot be divided"):
        data.batches(data.parse_data([], TEACHERS), 14, 8, world=3)
    script = subprocess.run([sys.executable, Path(data.__file__), "--data", str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert script.returncode == 2 and script.stderr.count("\n") == 1 and "does not exist" in script.stderr


# ---- order
@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_shuffled_is_a_permutation(n):
    once, again = ([data.shuffled(i, n, 3, epoch) for i in range(n)] for epoch in (0, 1))
    assert sorted(once) == sorted(again) == list(range(n))
    assert n < 64 or (once != again and np.abs(np.corrcoef(once, range(n))[0, 1]) < 0.3)


def test_every_batch_is_balanced_and_nothing_comes_twice_before_its_source_is_through(tmp_path):
    groups = data.parse_data([f"dinov2={folder(tmp_path / 'a', 12)},{folder(tmp_path / 'b', 5)}@1.7", f"mast3r={folder(tmp_path / 'c', 9)}",
                              "multihmr=scenes:people:0-11"], TEACHERS)
    for batch in range(3, 9):
        counts = [np.bincount([g for g, _, _ in drawn(groups, [k], batch)], minlength=3) for k in range(6)]
        assert all(c.max() - c.min() <= 1 for c in counts) and np.ptp(sum(counts)) <= 1 and np.ptp(sum(counts[:3])) == 0
    draws = drawn(groups, range(60))
    for key, count in {(0, 0): 12, (0, 1): 5, (1, 0): 9, (2, 0): 11}.items():
        images = [i for g, s, i in draws if (g, s) == key]
        assert len(images) > 2 * count
        for k in range(0, len(images) - count + 1, count):
            assert sorted(images[k:k + count]) == list(range(count))


def test_batches_are_a_pure_function_of_the_step(tmp_path):
    """Any number of ranks, any start, any number of workers: the same global batches, to the last bit."""
    groups = data.parse_data([f"dinov2={folder(tmp_path / 'a', 20)}", "mast3r=scenes:rooms", "multihmr=scenes:people"], TEACHERS)
    take = lambda n, **kw: list(itertools.islice(data.batches(groups, 28, 12, seed=5, **kw), n))
    whole = take(4, workers=0)
    resumed = take(2, workers=2, start_step=2)
    ranks = [take(4, workers=0, rank=r, world=4) for r in range(4)]
    for key in ("image", "group", "params"):
        for k in range(4):
            assert torch.equal(whole[k][key], torch.cat([r[k][key] for r in ranks]))
            assert k < 2 or torch.equal(whole[k][key], resumed[k - 2][key])
    assert all(np.bincount(r[k]["group"], minlength=3).tolist() == [1, 1, 1] for r in ranks for k in range(4))
    assert len({x.numpy().tobytes() for item in whole for x in item["image"]}) == 48
    jittered = [p.numpy().tobytes() for item in whole for p in item["params"] if p[0] >= 0]
    assert len(set(jittered)) == len(jittered) > 30
    other = next(data.batches(groups, 28, 12, seed=6, workers=0))
    assert not torch.equal(other["image"], whole[0]["image"]) and not torch.equal(other["params"], whole[0]["params"])


def test_size_decides_in_large_sources():
    groups = data.parse_data(["scenes:rooms:0-3000000,scenes:people:0-1000000"], TEACHERS)
    order = data.Order(groups[0], 0)
    assert len(order.table) <= order.TABLE + 1 and abs(np.mean([order(n)[0] for n in range(4000)]) - 0.25) < 0.03


def test_half_of_the_images_are_flipped(tmp_path):
    for i in range(3):
        Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[:, None], (40, 1, 3))).save(tmp_path / f"{i}.png")
    item = next(data.batches(data.parse_data([str(tmp_path)], TEACHERS), 14, 200, workers=0, scale=(1, 1)))
    left, right = item["image"][..., :7].float().mean((1, 2, 3)), item["image"][..., 7:].float().mean((1, 2, 3))
    assert 70 < (left > right).sum() < 130


def test_validation_batches_are_in_order_and_plain(tmp_path):
    groups = data.parse_data([str(folder(tmp_path / "a", 6))], TEACHERS)
    item = next(data.batches(groups, 28, 6, workers=0, train=False))
    source = groups[0].sources[0]
    assert torch.equal(item["image"], torch.stack([data.val_transform(source.read(i)[0], 28) for i in range(6)]))
    assert torch.equal(data.augment(item["image"], item["params"]), data.normalise(item["image"]))


def test_a_killed_worker_does_not_end_the_run(tmp_path, capfd):
    groups = data.parse_data([], TEACHERS)
    list(torch.utils.data.DataLoader([0], num_workers=1))              # leaves a handler behind that raises when any child dies
    stream = data.batches(groups, 28, 6, workers=2)
    seen = [next(stream)]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    time.sleep(0.3)                                                    # it dies while the caller is doing something else
    seen += [next(stream) for _ in range(7)]
    expect = list(itertools.islice(data.batches(groups, 28, 6, workers=0), 8))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(seen, expect))
    assert "starting again at step" in capfd.readouterr().err


# ---- damage and odd images
def mutants(rng, path):
    """A few hundred files that are images no more, or hardly: truncated, bit-flipped, wrong ending, zero bytes, a directory."""
    path.mkdir()
    for i in range(300):
        form, suffix = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")][i % 3]
        buffer = io.BytesIO()
        photo(i).save(buffer, form, **({} if form == "PNG" else {"quality": 90}))
        raw = bytearray(buffer.getvalue())
        if i % 5 == 0:
            raw = raw[:int(rng.integers(len(raw)))]
        elif i % 5 in (1, 2):
            for at in rng.integers(len(raw) if i % 5 == 1 else 40, size=1 + int(rng.integers(30))):
                raw[at] ^= 1 << int(rng.integers(8))
        elif i % 5 == 3:
            suffix = [".png", ".webp", ".jpg"][i % 3]
        else:
            raw = bytearray() if i % 2 else bytearray(rng.bytes(500))
        (path / f"{i:03}{suffix}").write_bytes(raw)
    return path


def test_mutated_files_give_an_image_or_a_reason(tmp_path):
    path = mutants(np.random.default_rng(0), tmp_path / "bad")
    (path / "x.jpg").mkdir()
    (path / "list.txt").write_text("\n".join(sorted(p.name for p in path.iterdir() if p.suffix != ".txt")))
    source = data.open_source(str(path / "list.txt"))
    outcome = []
    for i in range(source.count):
        rng = np.random.default_rng(i)
        try:
            picture, box = source.read(i, 28, lambda w, h: data.random_crop(w, h, rng, (0.4, 1)))
            outcome.append(data.crop_resize(picture, box, 28, 28).shape == (3, 28, 28))
        except Oops as error:
            assert str(error).startswith(source.name(i) + ": ") and "\n" not in str(error)
            outcome.append(None)
    assert None in outcome and set(outcome) == {None, True}
    assert all(x is True for x, p in zip(outcome, sorted(path.glob("[0-9]*"))) if int(p.stem) % 5 == 3)   # the wrong ending does no harm
    assert all(x is None for x, p in zip(outcome, sorted(path.glob("[0-9]*"))) if int(p.stem) % 5 == 4)


def test_damaged_images_are_replaced_and_too_many_stop_the_run(tmp_path):
    root = folder(tmp_path / "x", 60)
    victims = sorted(root.glob("*/*.jpg"))[:3]
    for v in victims:
        v.write_bytes(v.read_bytes()[:300])
    groups = data.parse_data([str(root)], ["dinov2"])
    victims[0].unlink()                                                # vanished after the index was read
    items = list(itertools.islice(data.batches(groups, 28, 20, workers=0), 9))
    bad = [b for item in items for b in item["bad"]]
    assert all(item["image"].shape == (20, 3, 28, 28) for item in items)
    assert {b.split(": ")[0] for b in bad} == set(map(str, victims)) and len(bad) > 9
    for v in sorted(root.glob("*/*.jpg"))[:30]:
        v.write_bytes(b"")
    with pytest.raises(Oops, match="more than one in ten"):
        list(itertools.islice(data.batches(groups, 28, 20, workers=2), 40))
    for v in root.glob("*/*.jpg"):
        v.write_bytes(b"")
    with pytest.raises(Oops, match="could not be read"):
        next(data.batches(groups, 28, 20, workers=0))


def test_odd_images_come_out_as_sensible_rgb(tmp_path):
    base = photo(1, 64, 40)
    rgb = np.asarray(base).astype(int)

    def error(name, image, expect=rgb, **options):
        image.save(tmp_path / name, **options)
        out = np.asarray(data.load_image(tmp_path / name)).astype(int)
        assert out.shape == expect.shape, name
        return np.abs(out - expect).mean()

    grey = np.asarray(base.convert("L")).astype(int)[..., None].repeat(3, 2)
    assert error("grey.png", base.convert("L"), grey) == 0
    assert error("16bit.png", Image.fromarray((grey[..., 0] * 257).astype(np.uint16)), grey) < 1
    assert error("float.tiff", Image.fromarray(grey[..., 0].astype(np.float32) / 255), grey * 255 / grey.max()) < 1
    assert error("cmyk.jpg", base.convert("CMYK"), quality=95) < 6
    assert error("palette.png", base.quantize(256)) < 8
    clear = base.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 32, 40))
    white = np.where(np.arange(64)[None, :, None] < 32, 255, rgb)
    assert error("alpha.png", clear, white) == 0
    assert error("alpha-palette.png", clear.quantize(256, method=Image.Quantize.FASTOCTREE), white) < 12
    assert error("first.gif", base.quantize(256), save_all=True, append_images=[base.rotate(180).quantize(256)]) < 8
    assert error("first.webp", base, save_all=True, append_images=[base.rotate(180)], lossless=True) == 0
    for orientation in range(1, 9):                                    # Pillow's own way of turning is the measure
        exif = Image.Exif()
        exif[0x0112] = orientation
        base.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        expect = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
        assert np.array_equal(np.asarray(data.load_image(tmp_path / "turned.jpg")), np.asarray(expect))
    thin = base.resize((1, 300))
    thin.save(tmp_path / "thin.png")
    assert data.val_transform(data.load_image(tmp_path / "thin.png"), 28).shape == (3, 28, 28)
    assert data.fit_image(data.load_image(tmp_path / "thin.png"), 56, 14).shape == (3, 56, 14)
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
    buffer = io.BytesIO()
    photo(3, 2003, 1507).save(buffer, "JPEG", quality=92, exif=(exif := Image.Exif()))
    for box in ((0, 0, 1500, 1400), (301, 97, 1507, 1301)):
        sizes, out = [], []
        for size in (0, 224):
            picture, reduced = data.decode(buffer, size, lambda w, h: box)
            sizes.append(picture.width)
            out.append(data.crop_resize(picture, reduced, 224, 224).float())
        lanczos = torch.from_numpy(np.array(data.decode(buffer)[0].crop(box).resize((224, 224), Image.LANCZOS))).permute(2, 0, 1)
        assert sizes == [2003, 1002]
        assert (out[0] - out[1]).abs().mean() < max(0.8, (out[0] - lanczos).abs().mean())


def test_crop_follows_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_crop(500, 375, rng, (0.4, 1.0)) for _ in range(3000)])
    w, h = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
    area, aspect = w * h / (500 * 375), w / h
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    assert area.min() > 0.39 and area.max() <= 1 and aspect.min() > 0.74 and aspect.max() < 1.35
    assert 0.6 < area.mean() < 0.7 and abs(np.log(aspect).mean()) < 0.07
    assert data.random_crop(1, 900, rng, (0.4, 1.0)) == (0, 449, 1, 450)
    square = data.crop_resize(photo(0, 50, 40), (10, 0, 50, 40), 28, 28)
    pillow = photo(0, 50, 40).crop((10, 0, 50, 40)).resize((28, 28), Image.BICUBIC)
    assert np.abs(square.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 2


# ---- colour
def row(**values):
    p = torch.tensor(data.NO_COLOUR, dtype=torch.float32)
    for key, value in values.items():
        p[{"grey": 8, "sigma": 9, "solarise": 10}[key]] = value
    return p


def test_colour_agrees_with_pillow():
    """One by one and mixed in one batch; Pillow rounds to 8 bits after each step (and hue to 256 steps), hence a few levels."""
    rng = np.random.default_rng(1)
    rows = [row(), row(grey=1), row(sigma=0.3), row(sigma=4.5), row(solarise=1)]
    for op, factor in ((0, 1.35), (0, 0.65), (1, 1.4), (1, 0.6), (2, 1.2), (2, 0.8), (3, 0.1), (3, -0.1)):
        rows.append(row())
        rows[-1][0], rows[-1][4 + op] = op, factor
    singles = len(rows)
    rows += [torch.from_numpy(data.draw_colour(rng)) for _ in range(40)]
    params = torch.stack(rows)
    pictures = [photo(i, 70, 56) for i in range(len(rows))]
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    std = torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    together = data.normalise(data.colour(images.float() / 255, params))       # the way of a GPU: all at once
    alone = data.augment(images, params)
    assert (together - alone).abs().max() < 1e-4
    for i, (p, picture) in enumerate(zip(params, pictures)):
        difference = ((data.pillow_augment(picture, p) - alone[i]) * std * 255).abs()
        if p[10]:                                                      # at the threshold a rounding becomes a jump of the whole scale
            difference = difference[difference < 100]
        assert difference.mean() < (1.5 if i < singles else 2.5), (i, p)


def test_hue_agrees_with_colorsys():
    rng = np.random.default_rng(0)
    x, turn = rng.uniform(0, 1, (64, 3)), rng.uniform(-0.1, 0.1, 64)
    x[:8] = x[:8, :1]                                                  # greys have no hue
    hsv = [colorsys.rgb_to_hsv(*v) for v in x]
    expect = np.array([colorsys.hsv_to_rgb((h + t) % 1, s, v) for (h, s, v), t in zip(hsv, turn)])
    out = data.shift_hue(torch.from_numpy(x).float().view(64, 3, 1, 1), torch.from_numpy(turn).float().view(64, 1, 1, 1))
    assert np.abs(out.view(64, 3).numpy() - expect).max() < 1e-5


def test_blur_is_the_gaussian_kernel_of_nine_with_reflection():
    x, sigma = torch.rand(2, 3, 12, 10), torch.tensor([0.4, 3.0])
    for picture, s, out in zip(x, sigma, data.blur(x, sigma.view(2, 1, 1, 1))):
        taps = torch.exp(-0.5 * (torch.linspace(-4, 4, 9) / s) ** 2)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        padded = torch.nn.functional.pad(picture[None], (4, 4, 4, 4), mode="reflect")
        expect = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 9, 9), groups=3)[0]
        assert (out - expect).abs().max() < 1e-5


def test_colour_parameters_follow_the_recipe():
    rng = np.random.default_rng(0)
    p = np.stack([data.draw_colour(rng) for _ in range(5000)])
    jittered = p[:, 0] >= 0
    assert abs(jittered.mean() - 0.8) < 0.02 and (p[~jittered][:, :8] == np.array(data.NO_COLOUR)[:8]).all()
    assert (np.sort(p[jittered][:, :4], 1) == np.arange(4)).all() and len({tuple(x) for x in p[jittered][:, :4]}) == 24
    for column, low, high in ((4, 0.6, 1.4), (5, 0.6, 1.4), (6, 0.8, 1.2), (7, -0.1, 0.1)):
        x = p[jittered, column]
        assert abs(x.min() - low) < 0.01 and abs(x.max() - high) < 0.01 and abs(x.mean() - (low + high) / 2) < 0.02
    assert all(abs((p[:, c] > 0).mean() - 0.2) < 0.02 for c in (8, 9, 10))
    assert p[p[:, 9] > 0, 9].min() > 0.1 - 1e-3 and 4.9 < p[:, 9].max() <= 5
    for share in (0, 0.5, 1):  # of the images; 0.2 * 0.8**3 of these come out unchanged
        changed = np.stack([data.draw_colour(rng, share) for _ in range(5000)]) != np.array(data.NO_COLOUR, np.float32)
        assert abs(changed.any(1).mean() - share * (1 - 0.2 * 0.8**3)) < 0.02 * (share > 0) + 1e-9
    groups = data.parse_data([], TEACHERS)
    plain = [(next(data.batches(groups, 28, 12, workers=0, colour=share))["params"] == torch.tensor(data.NO_COLOUR)).all() for share in (0, 1)]
    assert plain == [True, False]


# ---- pictures and the command
def test_contact_sheet_and_inspection(tmp_path, capsys):
    a = np.zeros((3, 20, 30), np.uint8)
    rows = [[a, a + 255], [a.transpose(1, 2, 0)]]
    data.contact_sheet(rows, tmp_path / "s.png", columns=("one", "two\nlines"), labels=("row", "other"), cell=60)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape[0] > 80 and sheet.shape[1] > 120 and (sheet == 0).all(2).sum() >= 2 * 60 * 40
    with pytest.raises(Oops, match="cannot write"):
        data.contact_sheet([[a]], tmp_path / "no" / "s.png")
    root = folder(tmp_path / "x", 12)
    sorted(root.glob("*/*.jpg"))[0].write_bytes(b"")
    groups = data.parse_data([f"dinov2={root}", "mast3r=scenes:rooms"], TEACHERS[:2])
    data.inspect(groups, TEACHERS[:2], 28, tmp_path / "d.png")
    text = capsys.readouterr().out
    assert "12 images" in text and "60x48" in text and "unreadable 1 of 12" in text and Image.open(tmp_path / "d.png").width > 200
