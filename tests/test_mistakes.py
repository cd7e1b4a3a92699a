"""No mistake ends in a traceback, a hang or a ruined run: generated cases for the four places through which all passes.

Options, files from outside, our own files, and the way out (see the end of dune.py). What is wrong is one line (Oops).
"""
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import dune
import teachers

ROOT = os.path.dirname(os.path.abspath(dune.__file__))


def one_line(action):
    """What action() gives, or the line of its Oops; anything else fails the test."""
    try:
        return action()
    except dune.Oops as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return str(error)


# ---- Files from outside

def tiny_student():
    torch.manual_seed(0)
    encoder = dune.ViT(28, 14, 64, 1, 1, registers=1)
    return dune.DUNE(encoder, {"dinov2": (64, True), "mast3r": (64, False)})


def content():
    model = tiny_student()
    return {"model": model.state_dict(), "optimizer": {}, "step": 3, "args": {"projector": "tp", "norm": "dune"},
            "weights": {}, "held_out": {}}


def works(model):
    """A load that succeeds gives a model that works."""
    if isinstance(model, dune.DUNE):
        out = model.eval()(torch.randn(1, 3, 28, 28))
        assert all(x.isfinite().all() for parts in out.values() for x in parts.values() if x is not None)
    return isinstance(model, dune.DUNE)


def bytes_of(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def safetensors(tensors, change=lambda header: None):
    header, blob = {}, b""
    for name, x in tensors.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_bytes(form, tmp_path):
    """Flipped bits, cuts and zeroed stretches, 250 of each kind of file: told, or without consequence."""
    state = {f"encoder.{k}": v for k, v in tiny_student().encoder.state_dict().items()}
    raw = {"zip": lambda: bytes_of(content()), "safetensors": lambda: safetensors(state),
           "legacy": lambda: bytes_of(content(), _use_new_zipfile_serialization=False)}[form]()
    rng = np.random.default_rng(0)
    told = 0
    for i in range(250):
        damaged = bytearray(raw)
        at = int(rng.integers(len(raw) if i % 2 else min(3000, len(raw))))
        if i % 5 == 0:
            damaged = damaged[:at]
        elif i % 5 == 1:
            damaged[at:at + 50] = bytes(len(damaged[at:at + 50]))
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "file.pt").write_bytes(damaged)
        if form == "safetensors":
            found = one_line(lambda: dune.load_strictly(tiny_student().encoder, dune.below(
                dune.read_checkpoint(tmp_path / "file.pt"), "encoder."), "file.pt"))
            told += isinstance(found, str)
        else:
            told += not works(one_line(lambda: dune.load(tmp_path / "file.pt")))
    assert told > (240 if form == "zip" else 50)


ODD = [None, True, 5, -1, 10**9, float("nan"), "x", b"x", [], {}, {5: 5}, {"x": {}}, torch.zeros(0), torch.zeros(3),
       torch.zeros(()), torch.full((64,), torch.nan), torch.ones(64, dtype=torch.int64), torch.ones(64, dtype=torch.bool),
       torch.ones(64, dtype=torch.complex64), torch.ones(1).expand(2**40), torch.eye(64).to_sparse(),
       torch.empty(64, device="meta"), torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)]


def test_odd_values_in_every_place(tmp_path):
    """Each entry of a checkpoint, and one tensor of each kind, replaced by what does not belong there."""
    path = tmp_path / "file.pt"
    whole = content()
    keys = ["encoder.cls_token", "encoder.pos_embed", "encoder.register_tokens", "encoder.patch_embed.proj.weight",
            "encoder.norm.weight", "encoder.blocks.0.attn.qkv.weight", "projectors.dinov2.linear.weight",
            "teacher_norms.dinov2.normalizers.patch.mean"]
    count = 0
    for odd in ODD:
        for place in ("model", "args", "teacher_ft_stats", *keys):
            changed = {**whole, place: odd} if place not in keys else {**whole, "model": {**whole["model"], place: odd}}
            torch.save(changed, path)
            works(one_line(lambda: dune.load(path)))
            count += 1
    for key in ("encoder.blocks.9999999.norm1.weight", "encoder.blocks.1.norm1.weight", 5, "", "projectors.sam.x"):
        torch.save({**whole, "model": {**whole["model"], key: torch.ones(64)}}, path)
        assert isinstance(one_line(lambda: dune.load(path)), str)
        count += 1
    for args in ({"projector": "new"}, {"projector": ["tp"]}, {"norm": 5}, {"norm": {}}):
        torch.save({**whole, "args": args}, path)
        assert isinstance(one_line(lambda: dune.load(path)), str)
    assert count > 200


def test_pickle_protocols_bombs_and_files_that_are_none(tmp_path):
    path = tmp_path / "file.pt"
    for protocol in (0, 1, 2, 3, 4, 5):
        torch.save(content(), path, pickle_protocol=protocol)
        found = one_line(lambda: dune.load(path))
        assert works(found) or "protocol" in found or "damaged" in found
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert "damaged" in one_line(lambda: dune.load(path))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"." )
    assert isinstance(one_line(lambda: dune.load(path)), str)
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path / "fifo", tmp_path, "/dev/zero", tmp_path / "none", tmp_path / "file.pt" / "none"):
        assert isinstance(one_line(lambda: dune.load(other)), str)
    for change in (lambda h: h["a"].update(data_offsets=[0, 10**12]), lambda h: h["a"].update(shape=[-1, 3]),
                   lambda h: h["a"].update(dtype="F8"), lambda h: h.update(a=5), lambda h: h["a"].update(shape="x"),
                   lambda h: h["a"].update(shape=[2**40, 2**40]), lambda h: h["a"].update(data_offsets=[4, 0])):
        path.write_bytes(safetensors({"a": torch.ones(3)}, change))
        assert isinstance(one_line(lambda: dune.read_checkpoint(path)), str)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert isinstance(one_line(lambda: dune.read_checkpoint(path)), str)
