"""MASt3R's two-view decoder, on its own encoder and on DUNE's: what the published code computes."""
import argparse
import zlib

import numpy as np
import pytest
import torch

import dune
import teachers


def published(case):
    """The fixture's weights, made from each tensor's name and shape: {name: tensor}."""
    state = {}
    for line in case["keys"].splitlines():
        key, *shape = line.split()
        r = torch.randn([int(n) for n in shape], generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        state[key] = r * (1 / r[0].numel()) ** 0.5 if r.ndim > 1 else 1 + 0.1 * r if key.endswith(("weight", "gamma")) else 0.1 * r
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of both published files, as they are laid out, and of the DUNE encoder, which is one of its own."""
    folder, root = tmp_path_factory.mktemp("two-view"), teachers.__file__.replace("teachers.py", "tests/golden/two_view.pt")
    golden = dune.read_checkpoint(root)
    paths = {name: str(folder / f"{name}.pth") for name in ("mast3r", "dune_mast3r", "encoder")}
    torch.save({"args": argparse.Namespace(), "model": published(golden["mast3r"])}, paths["mast3r"])
    state = published(golden["dune_mast3r"])
    torch.save({"model": {k.replace("dune_backbone.", "encoder."): v for k, v in state.items() if k.startswith("dune_backbone.")}}, paths["encoder"])
    torch.save({**golden["dune_mast3r"]["layout"], "model": {k: v for k, v in state.items() if not k.startswith(("dune_backbone.", "imagenet"))}}, paths["dune_mast3r"])
    return golden, paths


@pytest.mark.parametrize("name", ["mast3r", "dune_mast3r"])
def test_published_decoders(name, files, close):
    golden, paths = files
    model = teachers.load_two_view(paths[name], encoder=paths["encoder"])
    one, two = golden[name]["views"][:, None]
    with torch.no_grad():
        outputs = model(one, two)
    for ours, theirs in zip(outputs, golden[name]["outputs"]):
        assert ours.keys() == theirs.keys() == {"pts3d", "conf", "desc", "desc_conf"}
        for key in theirs:
            close(ours[key][0, ::4, 1::4], theirs[key], 1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda f: f["model"].pop("mast3r.dec_norm.bias"), "lacks tensor dec_norm.bias"),
    (lambda f: f["model"].update({"mast3r.head.weight": torch.zeros(1)}), "unknown tensor mast3r.head.weight"),
    (lambda f: f.update(mast3r_model_str=f["mast3r_model_str"].replace("'catmlp+dpt'", "'linear'")), "head_type is 'linear', expected 'catmlp.dpt'"),
    (lambda f: f.update(mast3r_model_str="AsymmetricMASt3R(head_type=print('run'))"), "cannot read its mast3r_model_str"),
    (lambda f: f.update(model={"norm.weight": torch.zeros(1)}), "holds no two-view model"),
])
def test_another_architecture_is_an_error(change, message, files, tmp_path, capsys):
    file = dune.read_checkpoint(files[1]["dune_mast3r"])
    change(file)
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(dune.Oops, match=message):
        teachers.load_two_view(tmp_path / "other.pth", encoder=files[1]["encoder"])
    assert capsys.readouterr().out == ""


def tiny(seed=0):
    torch.manual_seed(seed)
    encoder = dune.ViT(28, 14, 64, 1, 1, 0, layer_scale=None)
    return teachers.TwoView(encoder, dim=64, depth=1, maps=(8, 8, 8, 8), features=8, last=8, hidden=16).eval()


def test_one_set_of_decoder_blocks_serves_both_views_and_our_file_loads_again(tmp_path):
    model = tiny()
    model.dec_blocks2.load_state_dict(model.dec_blocks.state_dict())
    state = teachers.two_view_layout(model)["model"]
    torch.save({"model": {k: v for k, v in state.items() if ".dec_blocks2." not in k}}, tmp_path / "ours.pt")
    again, one, two = teachers.load_two_view(tmp_path / "ours.pt"), torch.randn(1, 3, 28, 42), torch.randn(1, 3, 56, 14)  # landscape, portrait
    with torch.no_grad():
        for a, b, size in zip(model(one, two), again(one, two), ((28, 42), (56, 14))):
            assert all(a[k].equal(b[k]) for k in a) and a["pts3d"].shape == (1, *size, 3) and a["desc"].shape == (1, *size, 24)
    with pytest.raises(dune.Oops, match="30x28 is no multiple of the patch size 14"):
        model(torch.zeros(1, 3, 30, 28), two)


# ------------------------------------------------------------------------------------------------------------ the geometry

def alike(pairs, place, mask):
    """Correlation of the colours of view 1's pixels with those that view 2 has at `place`: the light is not the same, its pattern is."""
    at = place.clamp(0, 111).long()
    there = pairs["image"][:, 1].flatten(2).gather(2, (at[..., 1] * 112 + at[..., 0]).flatten(1)[:, None].expand(-1, 3, -1)).view_as(pairs["image"][:, 0])
    return np.median([np.corrcoef(a[c][m], b[c][m])[0, 1] for a, b, m in zip(pairs["image"][:, 0], there, mask) for c in range(3)])


def test_geometry_of_a_pair_of_rooms():
    """What both views see looks alike but for light and white balance, and the points of view 2 lie on the surfaces of view 1."""
    pairs = teachers.room_pairs(0, 4, 112)
    points, known, place, seen = teachers.pair_geometry(pairs)
    assert known.all() and 0.4 < seen.float().mean() < 0.95
    assert alike(pairs, place, seen) > 0.95 and alike(pairs, place, ~seen) < 0.7
    torch.testing.assert_close(points[:, 0, ..., 2], pairs["depth"][:, 0])
    own, where = teachers.patch_pairs(pairs, (8, 8))
    assert own.shape == (4, 64) and abs(where.float().mean() - seen.float().mean()) < 0.1


def test_contrast_is_least_for_true_pairs():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 16)
    order = torch.stack([torch.randperm(10) for _ in range(2)])
    y = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
    assert teachers.contrast(x, y, order).max() < 0.5 < 3 < teachers.contrast(x, y, order.roll(1, 1)).min()
