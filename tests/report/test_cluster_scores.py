"""Scores against masks, worked out by hand."""

import pytest
import torch

import peft_func as pf
from peft_func.report.cluster_scores import intersection_over_union, pointing_accuracy, score_places

F64 = torch.float64
MASK = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0]]]).bool()  # the left half
HIT = torch.tensor([[1.0, 0.6, 0.5, 0.0], [0.4, 0.7, 0.1, 0.2]], dtype=F64)  # covers 3 inside, 1 outside
MISS = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.4, 0.5, 1.0, 0.2]], dtype=F64)  # covers 1 inside, 2 outside
FLAT = torch.full((2, 4), 3.0, dtype=F64)
MAPS = torch.stack([HIT, MISS, FLAT, MASK[0].to(F64)])[None]


def test_intersection_over_union():
    found = intersection_over_union(MAPS, MASK)
    assert found.tolist() == [[3 / 5, 1 / 6, 0.0, 1.0]]
    assert intersection_over_union(5 * MAPS - 2, MASK).tolist()[0][:2] == pytest.approx([3 / 5, 1 / 6])
    assert intersection_over_union(MAPS, MASK, threshold=0.65).tolist() == [[2 / 4, 0 / 6, 0.0, 1.0]]


def test_the_pointing_game():
    assert pointing_accuracy(MAPS, MASK).tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert pointing_accuracy(MAPS, ~MASK).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    everywhere = torch.ones_like(MASK)
    assert pointing_accuracy(MAPS, everywhere).tolist() == [[1.0, 1.0, 0.0, 1.0]]  # a flat map has no peak


def test_maps_are_compared_in_the_size_of_the_masks():
    mask = MASK.repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert torch.equal(pointing_accuracy(MAPS[:, :2], mask), pointing_accuracy(MAPS[:, :2], MASK))
    assert intersection_over_union(MAPS[:, 3:], mask).item() == 1.0  # the border of a step stays where it was


def test_random_peaks_hit_as_often_as_the_mask_is_large():
    maps = torch.rand(1, 4000, 10, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[:, :3] = True
    assert pointing_accuracy(maps, mask).mean().item() == pytest.approx(0.3, abs=0.03)


def test_the_scores_of_places():
    chance = torch.cat([MAPS[:, :2], MAPS[:, [3, 1]]], 1)  # two draws of two
    place = pf.ClusterMaps("layer", MAPS[:, :2], MAPS[:, [1, 0]], chance)
    scores = score_places([place, pf.ClusterMaps("other", MAPS[:, 1:3], MAPS[:, 2:4], chance)], MASK)
    first, second = scores.iou
    assert first.before == pytest.approx((3 / 5, (3 / 5 + 1 / 6) / 2))
    assert first.after == first.before
    assert (first.best, second.best) == (1, 1)
    assert first.clusters == pytest.approx((1 / 6, 3 / 5))
    assert first.chance == pytest.approx(((3 / 5 + 1.0) / 2, (3 / 5 + 1 / 6 + 1 / 6 + 1.0) / 4))
    assert second.after == pytest.approx((1.0, 0.5))
    assert scores.pointing[0].clusters == (0.0, 1.0)
    assert scores.area == 0.5
    assert str(scores).splitlines() == [
        "place  best  before  after  chance  mean:  before  after  chance",
        "-" * 64,
        "intersection over union",
        "layer    #2    60.0   60.0    80.0           38.3   38.3    48.3",
        "other    #2    16.7  100.0    80.0            8.3   50.0    48.3",
        "-" * 64,
        "pointing accuracy",
        "layer    #2   100.0  100.0   100.0           50.0   50.0    50.0",
        "other    #2     0.0  100.0   100.0            0.0   50.0    50.0",
        "-" * 64,
        "in %; the masks cover 50.0 % of the images; chance: as many random directions",
    ]


def test_means_are_over_the_images():
    maps = torch.cat([MAPS[:, :2], MAPS[:, [1, 0]]])
    mask = MASK.expand(2, -1, -1)
    scores = score_places([pf.ClusterMaps("layer", maps, maps, maps)], mask)
    assert scores.iou[0].clusters == pytest.approx([(3 / 5 + 1 / 6) / 2] * 2)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        MASK.float(),
        MASK[0],
        MASK.expand(2, -1, -1),
        MASK[:, None],
        torch.zeros_like(MASK),
        torch.ones(1, 0, 4, dtype=torch.bool),
    ],
)
def test_what_is_no_mask_is_refused(mask):
    for measure in (intersection_over_union, pointing_accuracy):
        with pytest.raises(pf.OptionError, match="mask"):
            measure(MAPS, mask)


def test_scores_need_no_gradients():
    raw = MAPS[:, :2].clone().requires_grad_()
    assert score_places([pf.ClusterMaps("layer", raw, raw, raw)], MASK).iou[0].best == 0
