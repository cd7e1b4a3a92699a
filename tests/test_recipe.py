"""The published recipes' numbers, copied here with their sources, hold for each preset; the README says what differs"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dune
import teachers
import train

# naver/dune (arXiv 2503.14405, section 4 and supplement; its training code), naver/unic (arXiv 2408.05088).
DUNE = dict(teachers=["dinov2", "mast3r", "multihmr"], arch="base", patch_size=14, image_size=336, registers=4,
            layer_scale=1e-4, drop_path=0.0, projector="tp", norm="dune", sharing="all", drop=0.5, epochs=100.0,
            epoch_images=1_281_167, lr=3e-4, min_lr=1e-6, warmup=0.2, weight_decay=0.03, eps=1e-15, clip=1.0, crop=0.4,
            colour=1.0)
PUBLISHED = {
    "stage1": DUNE,
    "small": {**DUNE, "arch": "small"},
    "stage2": {**DUNE, "image_size": 448, "epochs": 50.0, "lr": 5e-5},
    "unic": {**DUNE, "teachers": ["dino", "deit3", "ibot", "dbotft"], "patch_size": 16, "image_size": 224,
             "registers": 0, "layer_scale": 0.0, "drop_path": 0.1, "projector": "lp", "norm": "unic", "epochs": 200.0,
             "warmup": 10 / 200, "crop": 0.08, "clip": 0.0, "eps": 1e-8},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_recipes(preset):
    args = train.parse(["--preset", preset])
    assert {name: getattr(args, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]
    args.init, args.batch = "x", 0
    train.check(args, type("Four", (), dict(world=4, device=torch.device("cpu"), cores=8)))
    assert args.batch == 4 * 128  # images per GPU, both papers
    peak = args.lr * args.batch / 256
    assert train.lr_at(args.steps - 1, args.steps, peak, args.min_lr, args.warmup) == pytest.approx(1e-6, rel=0.1)
    assert train.lr_at(int(args.warmup * args.steps), args.steps, peak, args.min_lr, args.warmup) == pytest.approx(peak)
    assert train.momentum_at(0, args.steps) == 1 and train.momentum_at(args.steps, args.steps) == pytest.approx(0.001)


@pytest.mark.parametrize("projector", ["tp", "lp"])
def test_initial_weights(projector):
    """Trunc-normal 0.02 and zero biases in the encoder and UNIC's ladder, torch's own in the transformer projector."""
    torch.manual_seed(0)
    encoder = dune.ViT(**dict(dune.SIZES["base"], depth=2))
    model = dune.DUNE(encoder, {"dinov2": (1024, True)}, projector)
    assert encoder.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert encoder.register_tokens.std().item() == pytest.approx(1e-6, rel=0.2)
    assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert encoder.blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(1e-4)]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            as_published = name.startswith("encoder.") or projector == "lp"
            bound = 1 / math.sqrt(module.in_features)  # torch's default: uniform within this, weights and biases
            std = 0.02 if as_published else bound / math.sqrt(3)
            assert module.weight.std().item() == pytest.approx(std, rel=0.03), name
            bias = 0 if as_published else std
            assert module.bias.std().item() == pytest.approx(bias, rel=0.1), name


def test_optimiser():
    encoder = dune.ViT(56, 14, 64, 1, 1)
    model = dune.DUNE(encoder, {"dinov2": (64, True)})
    matrices, vectors = train.parameter_groups(model, 0.03)
    assert matrices["weight_decay"] == 0.03 and {p.ndim for p in matrices["params"]} == {2, 3, 4}
    assert vectors["weight_decay"] == 0.0 and {p.ndim for p in vectors["params"]} == {1}
    learned = sum(p.requires_grad for p in model.parameters())
    assert len(matrices["params"]) + len(vectors["params"]) == learned


def test_each_gradient_is_clipped_on_its_own_and_not_at_all_without_clip():
    for clip, norms in ((1.0, [1.0, 0.5]), (0.0, [4.0, 0.5])):
        parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
        parameters[0].grad, parameters[1].grad = torch.full((4,), 4.0), torch.full((4,), 0.5)
        taken = []
        optimizer = torch.optim.SGD(parameters, lr=1, fused=True)
        optimizer.register_step_pre_hook(lambda *_: taken.extend(p.grad.norm().item() for p in parameters))
        train.update(parameters, optimizer, torch.tensor(0.5), clip)
        assert taken == pytest.approx(norms, rel=1e-5)


def test_how_positions_are_resized():
    """The student and DINOv2 without registers: by the factor, with the 0.1; stage 2: to the size."""
    vit = dune.ViT(56, 14, 64, 1, 1)
    grid = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    by_factor = F.interpolate(grid, scale_factor=(6.1 / 4, 5.1 / 4), mode="bicubic")
    to_size = F.interpolate(grid, size=(6, 5), mode="bicubic")
    for how, resized in ((None, by_factor), ("size", to_size)):
        found = vit.positions(6, 5, how)
        assert found[:, :1].equal(vit.pos_embed[:, :1])
        assert found[:, 1:].equal(resized.permute(0, 2, 3, 1).flatten(1, 2))
    assert not vit.positions(6, 5).equal(vit.positions(6, 5, "size"))


def test_colours_and_crops():
    """Colour jitter p 0.8 (0.4, 0.4, 0.2, 0.1), grey p 0.2, blur p 0.2 (sigma 0.1 to 5), solarise p 0.2."""
    rng = np.random.default_rng(0)
    drawn = np.stack([data.draw_colour(rng) for _ in range(4000)])
    jittered = drawn[drawn[:, 0] >= 0]
    assert len(jittered) / len(drawn) == pytest.approx(0.8, abs=0.02)
    limits = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for column, (low, high) in zip(jittered[:, 4:8].T, limits):
        assert low <= column.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < column.max() <= high
    for column in (8, 9, 10):
        assert (drawn[:, column] > 0).mean() == pytest.approx(0.2, abs=0.02)
    assert 0.1 <= drawn[drawn[:, 9] > 0, 9].min() and drawn[:, 9].max() <= 5
    areas = [(x1 - x0) * (y1 - y0) / 1e6 for x0, y0, x1, y1 in
             (data.random_crop(1000, 1000, rng, (0.4, 1.0)) for _ in range(500))]
    assert 0.39 < min(areas) < 0.42 and max(areas) <= 1


def test_teachers_are_the_published_ones():
    """Which tokens are distilled, and in which normalisation a teacher's images come."""
    for name, cls, mean in (("dinov2", True, data.IMAGENET_MEAN), ("mast3r", False, (0.5, 0.5, 0.5)),
                            ("multihmr", False, data.IMAGENET_MEAN)):
        row = teachers.TEACHERS[name]
        shape = dict(row.shape, depth=1, embed_dim=64, num_heads=1)
        teacher = teachers.FrozenTeacher(name, dune.ViT(**shape))
        assert (teacher.has_cls, row.images[0]) == (cls, mean)
    assert "position" not in teachers.TEACHERS["dinov2"].vit  # "offset", as DUNE builds it, not as the hub does
