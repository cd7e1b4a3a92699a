"""--compile yes: the same losses, and nothing is compiled again once all shapes have been seen."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import dune
import teachers
import train

SMALL = ("--arch tiny --image-size 56 --batch 12 --steps 5 --lr 1e-2 --workers 0 --random-teachers "
         "--device cpu --dtype fp32 --log-every 1 --eval-every 1000 ")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("options", [
    "--sharing own --recompute --projector lp",
    "--teachers dinov2,mast3r --batch 10 --accumulate 3",  # micro-batches of 3, 3 and 4 images
    "--image-size 28,56",
])
def test_a_compiled_run_is_the_run(options, device, tmp_path, monkeypatch):
    """On a CPU by backend "aot_eager", which traces as always and runs the operations as they are: quick."""
    tiny = dict(embed_dim=64, depth=1, num_heads=1)
    monkeypatch.setitem(dune.SIZES, "tiny", tiny)
    for name, row in teachers.TEACHERS.items():
        shape = {**row.shape, **tiny, "image_size": 126}
        monkeypatch.setitem(teachers.TEACHERS, name, replace(row, shape=shape))
    step, compile = train.train_step, torch.compile
    graphs = []

    def counted(*args):
        metrics = step(*args)
        graphs.append(counters["stats"]["unique_graphs"])
        return metrics

    monkeypatch.setattr(train, "train_step", counted)
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", lambda what, **how: compile(what, backend="aot_eager", **how))
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for compiled in ("no", "yes"):
        out = tmp_path / compiled
        train.main(f"{SMALL} {options} --device {device} --compile {compiled} --out {out}".split())
        lines = [line for line in train.read_log(out) if "held_out" not in line]
        losses.append([line["loss"] for line in lines])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    plain, compiled = graphs[:len(graphs) // 2], graphs[len(graphs) // 2:]
    assert max(plain) == 0 < compiled[0] and compiled[-1] == compiled[:3][-1], graphs
