"""What the README says can be changed in one place, as it stands there: it trains, loads and is evaluated."""

import os
import re

import pytest
import torch

import data
import dune
import eval as evaluation
import teachers
import train
from conftest import ROOT

SMALL = ("--image-size 56 --batch 6 --lr 1e-2 --layer-scale 0 --log-every 1 --workers 0 --steps 3 "
         "--device cpu --dtype fp32 --compile no").split()
TABLES = dune.PROJECTORS, dune.LOSS_WEIGHTS, dune.SIZES, teachers.TEACHERS, data.SOURCES


@pytest.fixture
def change(monkeypatch):
    """change("projector") runs that snippet of the README's section; afterwards all is as it was."""
    with open(os.path.join(ROOT, "README.md")) as file:
        section = file.read().split("## Change one thing")[1].split("\n## ")[0]
    snippets = dict(re.findall(r"\nA (\w+)(?:[^\n]+\n)+\n```python\n(.*?)```", section, re.S))
    assert list(snippets) == ["projector", "term", "teacher", "source", "size"]
    before = [dict(table) for table in TABLES]
    monkeypatch.setattr(dune, "token_losses", dune.token_losses)
    yield lambda what: exec(snippets[what], {})
    for table, rows in zip(TABLES, before):
        table.clear()
        table.update(rows)


@pytest.fixture
def train_and_load(golden, tmp_path):
    def go(*options, teacher="dinov2", content=golden("dinov2_reg")["checkpoint"]):
        run = str(tmp_path / "run")
        torch.save(content, tmp_path / "teacher.pth")
        weights = f"{teacher}={tmp_path}/teacher.pth"
        train.main([*SMALL, "--teachers", teacher, "--weights", weights, "--out", run, *options])
        evaluation.main(["loss", "--run", run, "--device", "cpu"])
        return dune.load(f"{run}/checkpoint.pt"), train.read_log(run)
    return go


def test_a_projector(change, train_and_load):
    change("projector")
    model, _ = train_and_load("--arch", "tiny", "--projector", "linear")
    assert type(model.projectors["dinov2"]).__name__ == "LinearProjector"


def test_a_term_of_the_loss(change, train_and_load):
    """What is logged is what was minimized: the loss holds the new term with its weight."""
    change("term")
    _, log = train_and_load("--arch", "tiny")
    for line in log:
        if "dinov2" in line:
            terms = line["dinov2"]
            loss = 0
            for token_type in ("cls", "patch"):
                cos, smooth_l1, l2 = [terms[f"{token_type}_{term}"] for term in ("cos", "smooth_l1", "l2")]
                loss += (0.5 * cos + 0.5 * smooth_l1 + 0.1 * l2) / 2
            assert line["loss"] == pytest.approx(loss, rel=1e-5) == terms["loss"]


def test_a_teacher(change, train_and_load, golden, tmp_path, capsys):
    change("teacher")
    state = {f"trunk.{key}": value for key, value in golden("unic_dino")["checkpoint"].items()}
    content = {"weights": {**state, "head.weight": torch.zeros(2)}}
    model, _ = train_and_load("--arch", "tiny", teacher="mine", content=content)
    assert list(model.projectors) == ["mine"]
    groups = data.parse_data([], {name: teachers.TEACHERS[name] for name in ("dinov2", "mine")})
    found = [(group.sources[0].spec, group.generic) for group in groups]
    assert found == [("scenes:objects", True), ("scenes:rooms", False)]
    out = str(tmp_path / "random")
    train.main([*SMALL, "--arch", "tiny", "--teachers", "mine", "--random-teachers", "--out", out])
    assert "random teacher weights" in capsys.readouterr().out
    evaluation.main(["loss", "--run", out, "--device", "cpu"])  # by the same teacher: nothing is downloaded


def test_a_source_of_images(change, train_and_load, tmp_path, capsys):
    change("source")
    train_and_load("--arch", "tiny", "--data", "noise:1000")
    sheet = str(tmp_path / "sheet.png")
    train.main(["--data", "noise:1000", "--teachers", "dinov2", "--image-size", "56", "--show-data", sheet])
    assert "1,000 images" in capsys.readouterr().out and os.path.exists(sheet)


def test_a_size_of_the_student(change, train_and_load):
    change("size")
    model, _ = train_and_load("--arch", "nano")
    assert model.encoder.embed_dim == 64 and len(model.encoder.blocks) == 2
