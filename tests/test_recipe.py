"""The published recipes' numbers, copied here with their sources, hold for each preset."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dune
import teachers
import train

# naver/dune (arXiv 2503.14405, section 4, supplement, its code) and naver/unic (arXiv 2408.05088)
DUNE = dict(teachers=["dinov2", "mast3r", "multihmr"], arch="base", patch_size=14, image_size="336",
            registers=4, layer_scale=1e-4, drop_path=0.0, projector="tp", norm="dune", sharing="all",
            drop=0.5, epochs=100.0, epoch_images=1_281_167, lr=3e-4, min_lr=1e-6, warmup=0.2,
            weight_decay=0.03, beta1=0.9, beta2=0.99, eps=1e-15, clip=1.0, crop=0.4, color=1.0)
STAGE2 = dict(image_size="448", epochs=50.0, lr=5e-5)
UNIC = dict(teachers=["dino", "deit3", "ibot", "dbotft"], patch_size=16, image_size="224", registers=0,
            layer_scale=0.0, drop_path=0.1, projector="lp", norm="unic", epochs=200.0, warmup=10 / 200,
            crop=0.08, clip=0.0, eps=1e-8)


@pytest.mark.parametrize("preset, changes", [("stage1", {}), ("stage2", STAGE2), ("unic", UNIC)])
def test_presets_are_the_published_recipes(preset, changes):
    args = train.parse_args(["--preset", preset, "--init", "stage1.pt"])
    expected = {**DUNE, **changes}
    assert {name: getattr(args, name) for name in expected} == expected
    train.resolve_args(args, 4, torch.device("cpu"), torch.ones(3, 3).bool())
    assert args.batch == 4 * 128  # images per GPU, both papers
    schedule = args.steps, args.lr * args.batch / 256, args.min_lr, args.warmup
    assert train.schedule(int(args.warmup * args.steps), *schedule) == pytest.approx(2 * args.lr)
    assert train.schedule(args.steps - 1, *schedule) == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("projector", ["tp", "lp"])
def test_initial_weights(projector):
    """Trunc-normal 0.02 and zero biases in the encoder and UNIC's ladder, torch's own in DUNE's projector."""
    torch.manual_seed(0)
    encoder = dune.ViT(**{**dune.SIZES["base"], "depth": 2})
    model = dune.DUNE(encoder, {"dinov2": (1024, True)}, projector)
    assert encoder.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert encoder.register_tokens.std().item() == pytest.approx(1e-6, rel=0.2)
    assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert encoder.blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(1e-4)]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            std, bias_std = 0.02, 0
            if projector == "tp" and name.startswith("projectors."):
                std = bias_std = 1 / math.sqrt(3 * module.in_features)
            assert module.weight.std().item() == pytest.approx(std, rel=0.03), name
            assert module.bias.std().item() == pytest.approx(bias_std, rel=0.1), name


def test_weight_decay_is_for_matrices():
    model = dune.DUNE(dune.ViT(56, 14, 64, 1, 1), {"dinov2": (64, True)})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, _ = train.build_optimizer(train.parse_args([]), model, None)
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2, 3, 4} and {p.ndim for p in vectors["params"]} == {1}
    assert matrices["weight_decay"] == 0.03 and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(params)


@pytest.mark.parametrize("projector, taken", [
    ("tp", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
    ("sp", {"mlps.cls.fc1", "mlps.cls.fc2", "mlps.patch.fc1", "mlps.patch.fc2"}),
])
def test_muon_takes_the_matrices_of_attention_and_mlps(projector, taken):
    model = dune.DUNE(dune.ViT(56, 14, 64, 1, 1), {"dinov2": (64, True)}, projector)
    args = train.parse_args("--optimizer muon --dtype fp32".split())
    optimizer, _ = train.build_optimizer(args, model, None)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p].removesuffix(".weight") for p in optimizer.param_groups[2]["params"]}
    wanted = {f"encoder.blocks.0.{x}" for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    prefix = "projectors.dinov2.blocks.0" if projector == "tp" else "projectors.dinov2"
    assert found == wanted | {f"{prefix}.{x}" for x in taken}
    rest = sum(len(group["params"]) for group in optimizer.param_groups[:2])
    assert rest + len(found) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("clip, norms", [(1.0, [1.0, 0.5]), (0.0, [4.0, 0.5])])
def test_each_gradient_is_clipped_on_its_own(clip, norms):
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in norms]
    for p, gradient in zip(params, (4.0, 0.5)):
        p.grad = torch.full((4,), gradient)
    optimizer = torch.optim.SGD(params, lr=1, fused=True)
    train.update(params, optimizer, torch.tensor(0.5), clip)
    assert [p.norm().item() for p in params] == pytest.approx(norms, rel=1e-5)


def test_how_positions_are_resized():
    """The student: by the factor, with DINOv2's 0.1; stage 2, once: to the size."""
    vit = dune.ViT(56, 14, 64, 1, 1)
    grid = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    by_factor = F.interpolate(grid, scale_factor=(6.1 / 4, 5.1 / 4), mode="bicubic")
    to_size = F.interpolate(grid, (6, 5), mode="bicubic")
    for mode, expected in ((None, by_factor), ("size", to_size)):
        found = vit.interpolate_pos_embed(6, 5, mode)
        assert found[:, 1:].equal(expected.flatten(2).mT) and found[:, :1].equal(vit.pos_embed[:, :1])
    assert not by_factor.equal(to_size)


def test_colors_and_crops():
    """Jitter p 0.8 (0.4, 0.4, 0.2, 0.1), gray p 0.2, blur p 0.2 (sigma 0.1 to 5), solarize p 0.2."""
    rng = np.random.default_rng(0)
    drawn = np.stack([data.draw_color(rng) for _ in range(4000)])
    jittered = drawn[(drawn[:, :8] != data.NO_COLOR[:8]).any(1)]
    assert len(jittered) / 4000 == pytest.approx(0.8, abs=0.02)
    factors = np.take_along_axis(jittered[:, 4:8], jittered[:, :4].argsort(1).astype(int), 1)
    assert factors.min(0) == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=0.01)
    assert factors.max(0) == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=0.01)
    assert (drawn[:, 8:] > 0).mean(0) == pytest.approx([0.2, 0.2, 0.2], abs=0.02)
    assert 0.1 <= drawn[drawn[:, 9] > 0, 9].min() < 0.2 and 4.9 < drawn[:, 9].max() <= 5
    boxes = np.array([data.random_crop(1000, 1000, rng, (0.4, 1.0)) for _ in range(500)])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / 1e6
    assert 0.39 < areas.min() < 0.42 and areas.max() <= 1


def test_teachers_are_the_published_ones():
    """Which class tokens are distilled, and how a teacher's images are normalized."""
    rows = [teachers.TEACHERS[name] for name in DUNE["teachers"]]
    assert [row.distill_cls and row.shape.get("class_token", True) for row in rows] == [True, False, False]
    assert [row.mean_std[0] for row in rows] == [data.IMAGENET_MEAN, (0.5, 0.5, 0.5), data.IMAGENET_MEAN]
    assert "position" not in rows[0].vit_kwargs  # "offset", as in DUNE; DINOv2's own code differs
