"""MASt3R's two-view decoder, on its own encoder and on DUNE's, computes what the published code computes."""

import argparse
import zlib

import pytest
import torch

import dune
import teachers
from dune import UserError


def published(case):
    """The fixture's weights, made from the name and shape of each tensor: {name: tensor}."""
    state = {}
    for line in case["keys"].splitlines():
        key, *shape = line.split()
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        r = torch.randn([int(n) for n in shape], generator=generator)
        if r.ndim > 1:
            state[key] = r * (1 / r[0].numel()) ** 0.5
        else:
            state[key] = 1 + 0.1 * r if key.endswith(("weight", "gamma")) else 0.1 * r
    return state


@pytest.fixture(scope="module")
def cases():
    return dune.load_checkpoint(teachers.__file__.replace("teachers.py", "tests/golden/two_view.pt"))


@pytest.fixture(scope="module")
def paths(cases, tmp_path_factory):
    """{name: path} of the published files; the encoder of DUNE-MASt3R is a file of its own."""
    folder = tmp_path_factory.mktemp("two-view")
    paths = {name: str(folder / f"{name}.pth") for name in ("mast3r", "dune_mast3r", "encoder")}
    torch.save({"args": argparse.Namespace(), "model": published(cases["mast3r"])}, paths["mast3r"])
    encoder, decoder = {}, {}
    for key, value in published(cases["dune_mast3r"]).items():
        if key.startswith("dune_backbone."):
            encoder[key.replace("dune_backbone.", "encoder.")] = value
        else:
            decoder[key] = value
    torch.save({"model": encoder}, paths["encoder"])
    layout = {**cases["dune_mast3r"]["layout"], "dune_backbone_name": paths["encoder"]}
    torch.save({**layout, "model": decoder}, paths["dune_mast3r"])
    return paths


@pytest.fixture(scope="module")
def content(paths):
    return dune.load_checkpoint(paths["dune_mast3r"])


@pytest.mark.parametrize("name", ["mast3r", "dune_mast3r"])
def test_published_decoders(name, cases, paths, close):
    model = teachers.load_two_view(paths[name])
    one, two = cases[name]["views"][:, None]
    outputs = model(one, two)
    for ours, theirs in zip(outputs, cases[name]["outputs"]):
        assert ours.keys() == theirs.keys() == {"pts3d", "conf", "desc", "desc_conf"}
        for key in theirs:
            close(ours[key][0, ::4, 1::4], theirs[key], 1e-4)


def test_views_of_any_two_sizes(paths):
    """Landscape and portrait, odd token grids too."""
    model = teachers.load_two_view(paths["dune_mast3r"])
    sizes = (42, 70), (56, 14)
    one, two = (torch.rand(1, 3, *size) * 2 - 1 for size in sizes)
    for view, size in zip(model(one, two), sizes):
        assert view["pts3d"].shape == (1, *size, 3) and view["desc"].shape == (1, *size, 24)
        assert (view["conf"] > 1).all() and (view["desc_conf"] > 0).all()
        torch.testing.assert_close(view["desc"].norm(dim=-1), torch.ones(1, *size))
    with pytest.raises(UserError, match="30x28 is not divisible by the patch size 14"):
        model(torch.zeros(1, 3, 30, 28), two)


def test_one_set_of_blocks_is_for_both_views(paths, cases, tmp_path):
    content = dune.load_checkpoint(paths["mast3r"])
    both, one = dict(content["model"]), {}
    for key in content["model"]:
        if "dec_blocks2" in key:
            both[key] = both[key.replace("dec_blocks2", "dec_blocks")]
        else:
            one[key] = both[key]
    outputs = []
    for state in (both, one):
        torch.save({"model": state}, tmp_path / "file.pth")
        outputs.append(teachers.load_two_view(tmp_path / "file.pth")(*cases["mast3r"]["views"][:, None]))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def read_as(content, monkeypatch):
    """Let the file "changed.pth" hold this content."""
    load = dune.load_checkpoint
    changed = {"changed.pth": content}
    monkeypatch.setattr(dune, "load_checkpoint", lambda path: changed.get(path) or load(path))


def put(key, value):
    """A change of a state dict."""
    return lambda state: state.update({key: value})


HEAD = "mast3r.downstream_head1.dpt.head.2."


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("mast3r.dec_norm.bias"), 'Missing key.*"dec_norm.bias"'),
    (lambda state: state.pop("mast3r.decoder_embed.bias"), "missing key 'decoder_embed.bias'"),
    (put("mast3r.head.weight", torch.zeros(1)), 'Unexpected key.*"head.weight"'),
    (put(HEAD + "weight", torch.zeros(8, 8, 3, 3)), "size mismatch for downstream_head1.dpt.head.2.weight"),
    (put(HEAD + "weight", "none"), "'str' object"),
    (put(HEAD + "bias", torch.full((128,), torch.inf)), "head.2.bias contains non-finite values"),
    (put(1, torch.zeros(1)), "expected string"),
    (dict.clear, "missing key 'decoder_embed.bias'"),
])
def test_another_architecture_is_one_line(change, message, content, monkeypatch):
    changed = {**content, "model": dict(content["model"])}
    change(changed["model"])
    read_as(changed, monkeypatch)
    with pytest.raises(UserError, match=message) as error:
        teachers.load_two_view("changed.pth")
    assert "changed.pth" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_constructor_call_is_not_run(content, monkeypatch, capsys):
    read_as({**content, "mast3r_model_str": "print('run')"}, monkeypatch)
    teachers.load_two_view("changed.pth")
    assert capsys.readouterr().out == ""


def test_the_encoder_that_a_file_names_is_downloaded(cases, content, paths, monkeypatch):
    urls = []
    monkeypatch.setattr(dune, "download", lambda url: urls.append(url) or paths["encoder"])
    read_as({**content, **cases["dune_mast3r"]["layout"]}, monkeypatch)
    teachers.load_two_view("changed.pth")
    assert urls == ["https://download.europe.naverlabs.com/dune/dune_vitbase14_448_paper.pth"]


@pytest.mark.parametrize("name, message", [("another", "no such file: another"), (7, "'int' object")])
def test_another_encoder_is_one_line(name, message, content, monkeypatch):
    read_as({**content, "dune_backbone_name": name}, monkeypatch)
    with pytest.raises(UserError, match=message):
        teachers.load_two_view("changed.pth")
