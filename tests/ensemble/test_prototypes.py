"""Nearest class means, against scikit-learn and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestCentroid

import peft_func as pf


def drawn(seed, n=20, dim=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return features, torch.arange(n) % classes


@given(seed=st.integers(0, 2**31), n=st.integers(4, 30), dim=st.integers(1, 6))
def test_euclidean_is_the_nearest_centroid_of_sklearn(seed, n, dim):
    features, labels = drawn(seed, n, dim)
    peer = NearestCentroid().fit(features.numpy(), labels.numpy())
    means = pf.class_means(features, labels)
    np.testing.assert_allclose(means.numpy(), peer.centroids_, atol=1e-12)
    queries, _ = drawn(seed + 1, 10, dim)
    scores = pf.nearest_class_mean(queries, means)
    expected = -((queries.numpy()[:, None] - peer.centroids_) ** 2).sum(-1)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-10)
    assert scores.argmax(-1).tolist() == peer.predict(queries.numpy()).tolist()


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("transform", ["none", "l1", "l2", "zscore", "tukey", "boxcox"])
def test_metrics_and_transforms_are_those_of_numpy(metric, transform):
    features, labels = drawn(3)
    features = features.abs() + 0.1
    means = pf.class_means(features, labels)
    do = {
        "none": lambda v: v,
        "l1": lambda v: v / np.abs(v).sum(),
        "l2": lambda v: v / np.linalg.norm(v),
        "zscore": lambda v: (v - v.mean()) / v.std(),
        "tukey": np.cbrt,
        "boxcox": lambda v: (np.cbrt(v) - 1) * 3,
    }[transform]
    compare = {
        "euclidean": lambda a, b: -(np.linalg.norm(a - b) ** 2),
        "cosine": lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "dot": lambda a, b: a @ b,
    }[metric]
    expected = [[compare(do(z), do(m)) / 0.5 for m in means.numpy()] for z in features.numpy()]
    found = pf.nearest_class_mean(features, means, metric=metric, transform=transform, temperature=0.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_far_from_the_origin_distances_do_not_cancel():
    features, labels = drawn(5)
    near = pf.nearest_class_mean(features.float(), pf.class_means(features, labels).float())
    far = pf.nearest_class_mean(features.float() + 1000, pf.class_means(features.float() + 1000, labels))
    torch.testing.assert_close(far, near, atol=5e-3, rtol=0)


def test_simpleshot_on_digits():
    data, target = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    features, labels = data.double(), target.long()
    shots = torch.cat([(labels[:1000] == c).nonzero()[:5, 0] for c in range(10)])
    center = features[shots].mean(0)
    train, test = (pf.transform_features(f, "l2", center) for f in (features[shots], features[1000:]))
    means = pf.class_means(train, labels[shots], classes=10)
    accuracy = (pf.nearest_class_mean(test, means).argmax(-1) == labels[1000:]).double().mean()
    assert accuracy > 0.75  # 0.82 with five labelled images a digit


def test_the_center_is_subtracted_first():
    features, _ = drawn(1)
    found = pf.transform_features(features, "l2", center=features.mean(0))
    moved = features.numpy() - features.numpy().mean(0)
    np.testing.assert_allclose(found.numpy(), moved / np.linalg.norm(moved, axis=-1, keepdims=True), atol=1e-12)


def test_gradients_vmap_shapes_and_dtypes():
    features, labels = drawn(7, 6)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: pf.nearest_class_mean(f, pf.class_means(f, labels)), features)
    many = torch.stack([drawn(i, 6)[0] for i in range(3)])
    means = torch.vmap(lambda f: pf.class_means(f, labels, classes=3))(many)
    torch.testing.assert_close(means, torch.stack([pf.class_means(f, labels) for f in many]))
    scores = torch.vmap(lambda f, m: pf.nearest_class_mean(f, m, metric="cosine"))(many, means)
    torch.testing.assert_close(scores[1], pf.nearest_class_mean(many[1], means[1], metric="cosine"))
    assert pf.nearest_class_mean(many, means[0]).shape == (3, 6, 3)
    assert pf.class_means(features.detach().bfloat16(), labels).dtype == torch.float32
    missing = torch.vmap(lambda f: pf.class_means(f, labels, classes=4))(many)
    assert missing[:, 3].isnan().all()  # nothing can be raised inside vmap


def test_classes_without_samples_are_named():
    features, labels = drawn(0)
    with pytest.raises(pf.OptionError, match=r"2 of 5 classes have no samples: 3, 4"):
        pf.class_means(features, labels, classes=5)
    with pytest.raises(pf.OptionError, match=r"1 of 4 classes have no samples: 0"):
        pf.class_means(features, labels + 1)


def test_bad_input():
    features, labels = drawn(0)
    means = pf.class_means(features, labels)
    with pytest.raises(pf.TreeError, match="from 0 to 2"):
        pf.class_means(features, labels, classes=2)
    with pytest.raises(pf.TreeError, match="-1"):
        pf.class_means(features, labels - 1)
    with pytest.raises(pf.TreeError, match="int64"):
        pf.class_means(features, labels.float())
    with pytest.raises(pf.TreeError, match=r"\(19,\)"):
        pf.class_means(features, labels[1:])
    with pytest.raises(pf.TreeError, match="one sample"):
        pf.class_means(features[:0], labels[:0])
    with pytest.raises(pf.OptionError, match="classes=0"):
        pf.class_means(features, labels, classes=0)
    with pytest.raises(pf.OptionError, match="classes=10"):
        torch.vmap(lambda f: pf.class_means(f, labels))(features[None])
    with pytest.raises(pf.OptionError, match="euclidean"):
        pf.nearest_class_mean(features, means, metric="manhattan")
    with pytest.raises(pf.OptionError, match="zscore"):
        pf.nearest_class_mean(features, means, transform="magic")
    with pytest.raises(pf.OptionError, match="negative"):
        pf.nearest_class_mean(features, means, transform="tukey")
    for temperature in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(pf.OptionError, match="temperature"):
            pf.nearest_class_mean(features, means, temperature=temperature)
    with pytest.raises(pf.TreeError, match=r"\(3, 3\)"):
        pf.nearest_class_mean(features, means[:, :3])
    with pytest.raises(pf.TreeError, match="center"):
        pf.transform_features(features, "l2", center=torch.zeros(3))
    with pytest.raises(pf.TreeError, match="floating"):
        pf.transform_features(labels)
