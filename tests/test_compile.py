"""--compile yes: the same losses, the encoder compiled, and nothing compiled again once all shapes have been seen."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.convert_frame import register_bytecode_hook

import dune
import teachers as zoo
import train

SMALL = ("--arch tiny --image-size 56 --batch 12 --steps 5 --lr 1e-2 --workers 0 --random-teachers --device cpu "
         "--dtype fp32 --log-every 1").split()
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

def losses(path, *options):
    """The loss of each step of a run, and those of its teachers."""
    torch.manual_seed(0)
    train.main([*SMALL, *options, "--out", str(path)])
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    teachers = [name for name, value in lines[0].items() if isinstance(value, dict)]
    return torch.tensor([[line["loss"], *(line[t]["loss"] for t in teachers)] for line in lines])

@pytest.fixture
def compiled(monkeypatch):
    """[(step, code)] of what torch.compile compiles in a run; of small random teachers."""
    tiny = dict(embed_dim=128, depth=1, num_heads=2)
    monkeypatch.setitem(dune.SIZES, "tiny", tiny)
    for name, row in zoo.TEACHERS.items():
        monkeypatch.setitem(zoo.TEACHERS, name, replace(row, shape={**row.shape, **tiny, "image_size": 126}))
    found = []
    steps = iter(range(1, 100))
    next_batch = train.Log.next

    def begin(log, batches):
        begin.step = next(steps)
        return next_batch(log, batches)
    monkeypatch.setattr(train.Log, "next", begin)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other in loops, and the networks are tiny
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    torch._dynamo.reset()
    hook = register_bytecode_hook(lambda code, new: found.append((begin.step, code)))
    yield found
    hook.remove()
    torch._dynamo.reset()
    monkeypatch.undo()
    torch.set_num_threads(threads)

@pytest.mark.parametrize("backend, options", [
    ("inductor", "--steps 2 --teachers mast3r"),
    ("eager", "--sharing own --recompute --projector lp"),
    ("eager", "--teachers dinov2,mast3r --batch 10 --accumulate 3"),  # parts of 3, 3 and 4 images
])
def test_a_compiled_run_is_the_run(backend, options, compiled, tmp_path, monkeypatch):
    """Backend "eager" compiles frames as always, and runs the operations as they are: quick."""
    if backend == "inductor" and not COMPILER:
        pytest.skip("torch.compile's inductor needs a C++ compiler")
    expected = losses(tmp_path / "plain", *options.split(), "--compile", "no")
    assert not compiled
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda what, **how: compile(what, backend=backend, **how))
    found = losses(tmp_path / "compiled", *options.split(), "--compile", "yes")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert dune.ViT.tokens.__code__ in [code for step, code in compiled]
    assert max(step for step, code in compiled) - len(expected) <= 3
