"""Scaling and thresholding of maps, checked value by value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peft_func as pf
from peft_func.report.maps import is_images, scaled, thresholded


def maps_of(raw: Tensor) -> pf.ClusterMaps:
    return pf.ClusterMaps("place", raw, 2 * raw + 1, -raw)


def test_every_map_runs_from_0_to_1_by_itself():
    raw = torch.tensor([[[[0.0, 2.0], [4.0, 1.0]], [[-3.0, -3.0], [-1.0, -2.0]]]], dtype=torch.float64)
    values = maps_of(raw).scaled(when="before")
    assert values.tolist() == [[[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [1.0, 0.5]]]]
    assert maps_of(raw).thresholded(when="before").tolist() == [[[[0.0, 0.5], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.5]]]]
    torch.testing.assert_close(maps_of(raw).scaled(), values)  # what is linear in the map does not matter
    torch.testing.assert_close(maps_of(raw).scaled(when="chance"), 1 - values)


def test_a_flat_map_is_zero():
    raw = torch.full((1, 2, 3, 3), 7.0)
    assert not scaled(raw).any()
    assert not thresholded(raw, (6, 6)).any()


def test_resizing_is_bilinear_and_comes_before_the_scaling():
    raw = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)
    # Centres of four pixels over two: 0, 1/4, 3/4, 1 of the way, held at the borders.
    torch.testing.assert_close(scaled(raw, (1, 4)), raw.new_tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))
    peak = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    peak[..., 1, 2] = 5.0
    assert scaled(peak, (2, 2)).amax() == 1  # although the peak itself is averaged away


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_scaled_maps_stay_in_range(batch, rank, h, w, height, width):
    raw = torch.randn(batch, rank, h, w, dtype=torch.float64)
    values = scaled(raw, (height, width))
    assert values.shape == (batch, rank, height, width)
    assert values.min() >= 0
    assert values.max() <= 1
    cut = thresholded(raw, (height, width))
    assert ((cut == 0) | (cut >= 0.5)).all()
    assert torch.equal(cut[values >= 0.5], values[values >= 0.5])


def test_padding_counts_for_nothing():
    raw = torch.tensor([[[1.0], [3.0], [99.0]]])
    maps = pf.TokenMaps("place", raw, -raw, torch.tensor([[True, True, False]]))
    assert maps.scaled("before").tolist() == [[[0.0], [1.0], [0.0]]]
    assert maps.scaled().tolist() == [[[1.0], [0.0], [0.0]]]
    alone = pf.TokenMaps("place", raw, raw, torch.tensor([[False, True, False]]))
    assert not alone.scaled().any()
    nothing = pf.TokenMaps("place", raw, raw, torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.scaled().tolist() == [[[0.0], [0.0], [0.0]]]
    assert maps.rank == 1


def test_bad_options():
    maps = maps_of(torch.randn(1, 2, 2, 2))
    tokens = pf.TokenMaps("place", torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    for call in (
        lambda: maps.raw("later"),
        lambda: maps.scaled(when="present"),
        lambda: maps.thresholded(threshold=0.0),
        lambda: maps.thresholded(threshold=1.5),
        lambda: tokens.scaled("chance"),
        lambda: tokens.thresholded(threshold=0.0),
    ):
        with pytest.raises(pf.OptionError):
            call()


def test_what_is_an_image():
    assert is_images(torch.rand(2, 8, 8))
    assert is_images(torch.rand(2, 3, 8, 8))
    assert not is_images(torch.rand(2, 8))
    assert not is_images(torch.zeros(2, 8, 8, dtype=torch.int64))


def test_reprs_tell_the_sizes():
    assert repr(maps_of(torch.randn(2, 3, 4, 5))) == "ClusterMaps('place': 2 images, 3 clusters, 4 x 5)"
