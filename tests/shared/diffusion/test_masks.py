import math
from collections import Counter

import pytest
import torch

from shared.diffusion.losses import draw_noise
from shared.diffusion.masks import draw_num_visible, sample_visible
from shared.errors import InputError
from shared.experiment.config import Experiment, parse_experiment
from shared.experiment.sections import MaskConfig


def draw(kind, ratio, grid_size, batch, block_size=4, seed=0):
    experiment = Experiment.model_validate(
        {
            "train": {"objective": "dsm" if kind == "none" else "msm"},
            "model": {"image_size": 4 * grid_size, "patch_size": 4},
            "mask": {"kind": kind, "ratio": ratio, "block_size": block_size},
        }
    )
    ids = sample_visible(experiment.mask, grid_size, experiment.num_visible, batch, torch.Generator().manual_seed(seed))
    return experiment, ids


CASES = [
    ("none", 0.0, 16, 4),
    ("patch", 0.9, 16, 4),
    ("patch", 0.5, 7, 4),
    ("block", 0.9, 16, 4),
    ("block", 0.5, 16, 2),
    ("block", 0.9, 64, 4),
    ("crop", 0.9, 16, 4),
    ("crop", 0.5, 9, 4),
]


@pytest.mark.parametrize(("kind", "ratio", "grid_size", "block_size"), CASES)
def test_every_image_shows_the_same_number_of_different_patches(kind, ratio, grid_size, block_size):
    experiment, ids = draw(kind, ratio, grid_size, 64, block_size)
    assert ids.shape == (64, experiment.num_visible)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < grid_size**2
    assert all(len(set(row)) == experiment.num_visible for row in ids.tolist())


@pytest.mark.parametrize(
    ("kind", "ratio", "grid_size", "visible"),
    [
        ("block", 0.9, 16, 32),
        ("block", 0.5, 16, 128),
        ("patch", 0.9, 16, 26),
        ("block", 0.9, 64, 416),
        ("block", 0.9, 32, 112),
    ],
)
def test_visible_counts_are_the_authors(kind, ratio, grid_size, visible):
    experiment, ids = draw(kind, ratio, grid_size, 2)
    assert ids.shape[1] == visible
    assert experiment.realised_mask_ratio == 1 - visible / grid_size**2


@pytest.mark.parametrize(
    ("kind", "ratio", "block_size"), [("patch", 0.9, 4), ("patch", 0.3, 4), ("block", 0.9, 4), ("block", 0.5, 2)]
)
def test_every_patch_is_visible_equally_often(kind, ratio, block_size):
    batch = 20_000
    experiment, ids = draw(kind, ratio, 16, batch, block_size)
    share = ids.flatten().bincount(minlength=256) / batch
    expected = experiment.num_visible / 256
    # Five standard deviations of a binomial share.
    assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / batch)


def test_patches_are_chosen_independently_of_each_other():
    batch = 20_000
    _, ids = draw("patch", 0.5, 4, batch)
    visible = torch.zeros(batch, 16).scatter_(1, ids, 1.0)
    # Drawing 8 of 16 without repetition: two patches are visible together with probability (8 / 16) (7 / 15).
    together = (visible.T @ visible / batch)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 8 / 16 * 7 / 15).abs().max() < 5 * math.sqrt(0.233 * 0.767 / batch)


def test_crop_positions_are_uniform():
    batch, grid_size = 20_000, 8
    experiment, ids = draw("crop", 0.75, grid_size, batch)
    places = grid_size - math.isqrt(experiment.num_visible) + 1
    counts = torch.stack([ids[:, 0] // grid_size, ids[:, 0] % grid_size], 1)
    share = (counts[:, 0] * places + counts[:, 1]).bincount(minlength=places**2) / batch
    assert share.shape == (places**2,)
    assert (share - 1 / places**2).abs().max() < 5 * math.sqrt(1 / places**2 / batch)


def test_a_crop_is_a_full_square_in_row_major_order():
    experiment, ids = draw("crop", 0.7, 10, 50)
    side = math.isqrt(experiment.num_visible)
    row, column = ids // 10, ids % 10
    assert (row - row[:, :1] == torch.arange(side).repeat_interleave(side)).all()
    assert (column - column[:, :1] == torch.arange(side).repeat(side)).all()


def test_a_block_mask_shows_whole_blocks_on_the_raster():
    _, ids = draw("block", 0.9, 16, 50)
    blocks = ids.view(50, 2, 16)
    row, column = blocks // 16, blocks % 16
    assert (row[..., 0] % 4 == 0).all()
    assert (column[..., 0] % 4 == 0).all()
    assert (row - row[..., :1] == torch.arange(4).repeat_interleave(4)).all()
    assert (column - column[..., :1] == torch.arange(4).repeat(4)).all()


@pytest.mark.parametrize(("kind", "ratio"), [("none", 0.0), ("patch", 0.9), ("block", 0.9), ("crop", 0.9)])
def test_an_empty_batch_has_an_empty_mask(kind, ratio):
    experiment, ids = draw(kind, ratio, 16, 0)
    assert ids.shape == (0, experiment.num_visible)


def test_masks_repeat_with_their_seed_and_differ_with_another():
    assert torch.equal(draw("block", 0.5, 16, 8, seed=3)[1], draw("block", 0.5, 16, 8, seed=3)[1])
    assert not torch.equal(draw("block", 0.5, 16, 8, seed=3)[1], draw("block", 0.5, 16, 8, seed=4)[1])


@pytest.mark.parametrize(
    ("kind", "visible", "message"),
    [
        ("patch", 0, "leaves 0 of 256"),
        ("patch", 257, "leaves 257 of 256"),
        ("block", 20, "cannot be"),
        ("crop", 5, "cannot be"),
    ],
)
def test_a_count_that_does_not_fit_is_refused(kind, visible, message):
    with pytest.raises(InputError, match=message):
        sample_visible(MaskConfig(kind=kind, ratio=0.9), 16, visible, 2, torch.Generator())


def test_a_mask_without_a_visible_patch_is_refused_when_the_experiment_is_read():
    with pytest.raises(ValueError, match="leaves 0 of 4 patches visible"):
        draw("crop", 0.9, 2, 1)


def test_crops_are_whole_half_or_a_quarter_as_often_as_patch_diffusion_has_them():
    text = '[train]\nobjective = "msm"\n[mask]\nkind = "crops"\nratio = 0.4125\n'
    experiment, random = parse_experiment(text), torch.Generator().manual_seed(0)
    assert experiment.mask.crop_sides == pytest.approx({1: 0.5, 2: 0.3, 4: 0.2})
    counts = Counter(draw_num_visible(experiment, random) for _ in range(4000))
    # Six standard deviations of a share of 4000 draws.
    for visible, share in ((64, 0.5), (16, 0.3), (4, 0.2)):
        assert abs(counts[visible] / 4000 - share) < 6 * (share * (1 - share) / 4000) ** 0.5
    assert counts.total() == 4000 and len(counts) == 3
    hidden = 1 - sum(visible * count for visible, count in counts.items()) / 4000 / 64
    assert hidden == pytest.approx(0.4125, abs=0.03)


def test_crops_of_a_batch_are_squares_of_one_side():
    text = '[train]\nobjective = "msm"\n[mask]\nkind = "crops"\nratio = 0.8\n'
    experiment, seen = parse_experiment(text), set()
    for seed in range(20):
        draw = draw_noise(experiment, 5, torch.Generator().manual_seed(seed))
        visible = draw.ids_BL.shape[1]
        assert draw.eps_BVP.shape == (5, visible, 48)
        rows, columns = draw.ids_BL // 8, draw.ids_BL % 8
        side = round(visible**0.5)
        for each in (rows, columns):
            assert (each.max(1).values - each.min(1).values == side - 1).all()
        seen.add(side)
    assert seen == {2, 4, 8}
