"""MASt3R's two-view decoder, on its own encoder and on DUNE's: what the published code computes; pairs of views."""
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
        if r.ndim > 1:
            state[key] = r * (1 / r[0].numel()) ** 0.5
        else:
            state[key] = 1 + 0.1 * r if key.endswith(("weight", "gamma")) else 0.1 * r
    return state

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of both published files, as they are laid out, and of the DUNE encoder, which is one of its own."""
    folder = tmp_path_factory.mktemp("two-view")
    golden = dune.read_checkpoint(teachers.__file__.replace("teachers.py", "tests/golden/two_view.pt"))
    paths = {name: str(folder / f"{name}.pth") for name in ("mast3r", "dune_mast3r", "encoder")}
    torch.save({"args": argparse.Namespace(), "model": published(golden["mast3r"])}, paths["mast3r"])
    state = published(golden["dune_mast3r"])
    encoder = {f"encoder.{key}": value for key, value in dune.below(state, "dune_backbone.").items()}
    torch.save({"model": encoder}, paths["encoder"])
    decoder = {key: value for key, value in state.items() if not key.startswith(("dune_backbone.", "imagenet"))}
    layout = {**golden["dune_mast3r"]["layout"], "dune_backbone_name": paths["encoder"]}
    torch.save({**layout, "model": decoder}, paths["dune_mast3r"])
    return golden, paths

@pytest.mark.parametrize("name", ["mast3r", "dune_mast3r"])
def test_published_decoders(name, files, close):
    golden, paths = files
    model = teachers.load_two_view(paths[name])
    one, two = golden[name]["views"][:, None]
    with torch.no_grad():
        outputs = model(one, two)
    for ours, theirs in zip(outputs, golden[name]["outputs"]):
        assert ours.keys() == theirs.keys() == {"pts3d", "conf", "desc", "desc_conf"}
        for key in theirs:
            close(ours[key][0, ::4, 1::4], theirs[key], 1e-4)

def option(old, new):
    """A change of a file: another word in its constructor call."""
    return lambda file: file.update(mast3r_model_str=file["mast3r_model_str"].replace(old, new))

@pytest.mark.parametrize("change, message", [
    (lambda f: f["model"].pop("mast3r.dec_norm.bias"), "lacks tensor dec_norm.bias"),
    (lambda f: f["model"].update({"mast3r.head.weight": torch.zeros(1)}), "unknown tensor head.weight"),
    (lambda f: f["model"].update({"mast3r.decoder_embed.weight": torch.zeros(70, 64)}), "shape for .* decoder_embed.w"),
    (lambda f: f["model"].update({"mast3r.downstream_head1.dpt.head.2.weight": "none"}), "no numbers in tensor"),
    (lambda f: f["model"].update({"mast3r.downstream_head1.dpt.head.2.weight": 3}), "heads are missing or odd"),
    (lambda f: f["model"].pop("mast3r.downstream_head1.dpt.scratch.layer_rn.0.weight"), "heads are missing or odd"),
    (lambda f: f["model"].update({"mast3r.dec_norm.bias": [1, 2]}), "no numbers in tensor dec_norm.bias"),
    (lambda f: f["model"].update({1: torch.zeros(1)}), "'model', or something else"),
    (lambda f: f.update(model={"norm.weight": torch.zeros(1)}), "holds no two-view model"),
    (lambda f: f.update(model=[1, 2]), "'model', or something else"),
    (option("'catmlp+dpt'", "'linear'"), "no head_type='catmlp.dpt'"),
    (option("'catmlp+dpt'", "print('run')"), "no head_type="),
    (option("('exp', 1, inf)", "('sigmoid', 1, inf)"), "no conf_mode=.'exp',1,inf."),
    (option("(", "\0" * 1000), "another architecture"),
    (option("(", "(" + "a" * 10**6), "another architecture"),
    (lambda f: f.update(mast3r_model_str={"head_type": 1}), "'mast3r_model_str', or something else"),
])
def test_another_architecture_is_one_line(change, message, files, tmp_path, capsys):
    file = dune.read_checkpoint(files[1]["dune_mast3r"])
    change(file)
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(dune.Oops, match=message) as error:
        teachers.load_two_view(tmp_path / "other.pth")
    assert capsys.readouterr().out == "" and len(str(error.value)) < 400

def test_the_encoder_that_a_file_names_is_looked_for(files, tmp_path, monkeypatch):
    """The published file of that name; a name that is none is no file."""
    asked, (golden, paths) = [], files
    monkeypatch.setattr(dune, "fetch", lambda url: asked.append(url) or paths["encoder"])
    file = dune.read_checkpoint(paths["dune_mast3r"])
    torch.save({**file, **golden["dune_mast3r"]["layout"]}, tmp_path / "published.pth")
    teachers.load_two_view(tmp_path / "published.pth")
    assert asked == ["https://download.europe.naverlabs.com/dune/dune_vitbase14_448_paper.pth"]
    for name, message in (("another", "no such file: another"), (7, "'dune_backbone_name', or something else")):
        torch.save({**file, "dune_backbone_name": name}, tmp_path / "other.pth")
        with pytest.raises(dune.Oops, match=message):
            teachers.load_two_view(tmp_path / "other.pth")

def tiny(seed=0):
    torch.manual_seed(seed)
    encoder = dune.ViT(28, 14, 64, 1, 1, 0, layer_scale=None)
    return teachers.TwoView(encoder, dim=64, depth=1, maps=(8, 8, 8, 8), features=8, last=8, hidden=16).eval()

def test_one_set_of_decoder_blocks_serves_both_views_and_our_file_loads_again(tmp_path):
    model = tiny()
    model.dec_blocks2.load_state_dict(model.dec_blocks.state_dict())
    state = teachers.two_view_layout(model)["model"]
    torch.save({"model": {k: v for k, v in state.items() if ".dec_blocks2." not in k}}, tmp_path / "ours.pt")
    again = teachers.load_two_view(tmp_path / "ours.pt")
    one, two = torch.randn(1, 3, 28, 42), torch.randn(1, 3, 56, 14)  # landscape, portrait
    with torch.no_grad():
        for a, b, size in zip(model(one, two), again(one, two), ((28, 42), (56, 14))):
            assert all(a[k].equal(b[k]) for k in a)
            assert a["pts3d"].shape == (1, *size, 3) and a["desc"].shape == (1, *size, 24)
    with pytest.raises(dune.Oops, match="30x28 is no multiple of the patch size 14"):
        model(torch.zeros(1, 3, 30, 28), two)

# ---- Pairs of views --------------------------------------------------------------------------------------------------

def alike(pairs, place, mask):
    """Correlation of the colours of view 1's pixels with those of view 2 at `place`: not the light, but its pattern."""
    at = place.clamp(0, 111).long()
    at = (at[..., 1] * 112 + at[..., 0]).flatten(1)[:, None].expand(-1, 3, -1)
    one, two = pairs["image"].unbind(1)
    there = two.flatten(2).gather(2, at).view_as(one)
    return np.median([np.corrcoef(a[c][m], b[c][m])[0, 1] for a, b, m in zip(one, there, mask) for c in range(3)])

def test_geometry_of_a_pair_of_rooms():
    """What both views see looks alike but for light and white balance; view 2's points lie on view 1's surfaces."""
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
