"""The procedural scenes: the same picture at any size, and labels that agree with the geometry they claim."""
import numpy as np
import pytest
import torch

import data
from data import KINDS, PARTS, SCENES


def halve(a):
    return (a[0::2, 0::2] + a[1::2, 0::2] + a[0::2, 1::2] + a[1::2, 1::2]) / 4


def draw(domain, count=12, size=112):
    """Scenes as lists of numpy arrays."""
    batch = data.labelled_scenes(domain, 0, count, size)
    return {key: values.numpy() for key, values in batch.items()}


@pytest.mark.parametrize("domain", SCENES)
def test_seeded_and_the_same_scene_at_any_size(domain):
    small, large = draw(domain, 6), draw(domain, 6, 224)
    again = draw(domain, 6)
    for key in small:
        assert np.array_equal(small[key], again[key])
    assert len({image.tobytes() for image in small["image"]}) == 6
    for i in range(6):
        image = large["image"][i].transpose(1, 2, 0).astype(float)
        difference = halve(image) - small["image"][i].transpose(1, 2, 0)
        assert np.abs(difference).mean() < 8
        assert (np.abs(halve(large["depth"][i]) / small["depth"][i] - 1) < 0.01).mean() > 0.85
        assert (large["labels"][i][::2, ::2] == small["labels"][i]).mean() > 0.9


@pytest.mark.parametrize("domain", SCENES)
def test_depth_and_normals_agree(domain):
    """Normals are those of the surface that the depth describes, at one of the focal lengths in use."""
    scenes = draw(domain, 4)
    offset = (np.arange(112) + 0.5) / 112 - 0.5
    for depth, normals in zip(scenes["depth"], scenes["normals"]):
        assert depth.min() > 0.2
        assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-4)
        agreement = []
        for focal in np.arange(0.7, 0.91, 0.01):
            x, y = depth * offset / focal, depth * offset[:, None] / focal
            points = np.stack([x, y, depth], -1)
            right = points[1:-1, 2:] - points[1:-1, :-2]
            down = points[2:, 1:-1] - points[:-2, 1:-1]
            facets = np.cross(down, right)
            facets /= np.linalg.norm(facets, axis=-1, keepdims=True)
            cosine = (facets * normals[1:-1, 1:-1]).sum(-1)
            towards = ((points * normals).sum(-1) < 1e-3).mean()
            agreement.append(min((cosine > 0.99).mean() / 0.85, towards / 0.999))
        assert max(agreement) > 1


def test_objects_show_every_kind():
    scenes = draw("objects", 200)
    assert set(scenes["kind"]) == set(range(len(KINDS)))
    for labels, kind in zip(scenes["labels"], scenes["kind"]):
        assert set(labels.flat) == {0, 1 + kind}
        assert 0.02 < (labels > 0).mean() < 0.5


def test_the_mask_ends_where_the_object_does():
    scenes = draw("objects", 40)
    step = np.abs(np.diff(scenes["image"].astype(float), axis=-1)).sum(1)
    seam = np.diff(scenes["labels"] > 0, axis=-1)
    assert step[seam].mean() > 3 * step[~seam].mean()


def test_people_have_all_parts_head_up():
    scenes = draw("people", 100)
    labels = scenes["labels"]
    assert set(labels.flat) == set(range(len(PARTS)))
    above = []
    for picture in labels:
        head = np.nonzero(picture == PARTS.index("head"))[0]
        leg = np.nonzero(picture == PARTS.index("leg"))[0]
        if len(head) and len(leg):
            above.append(head.mean() < leg.mean())
    assert len(above) > 80 and np.mean(above) > 0.95
    for depth, picture in zip(scenes["depth"], labels):
        assert np.median(depth[picture > 0]) < depth[picture == 0].max()


def test_labelled_scenes_are_tensors_whoever_draws():
    batch = data.labelled_scenes("objects", 5, 70, 56)  # so many that several processes draw
    assert batch["image"].shape == (70, 3, 56, 56) and batch["image"].dtype == torch.uint8
    assert batch["depth"].shape == (70, 56, 56) and batch["depth"].dtype == torch.float32
    assert batch["normals"].shape == (70, 56, 56, 3) and batch["normals"].dtype == torch.float32
    assert batch["labels"].dtype == batch["kind"].dtype == torch.int64
    few = data.labelled_scenes("objects", 74, 1, 56)
    for key in batch:
        assert torch.equal(few[key][0], batch[key][69])


@pytest.mark.parametrize("domain", SCENES)
def test_domains_differ_and_pictures_are_well_lit(domain):
    images = draw(domain, 20, 56)["image"].astype(float)
    assert 40 < images.mean() < 215
    assert images.std(axis=(2, 3)).mean() > 15
