"""Training all members at once: each becomes what it would have become alone."""

import pytest
import torch

import peft_func as pf
from peft_func.cli.demo import Adaptation, method_for
from peft_func.cli.digits import Examples, load_digits
from peft_func.cli.train import batches, distort, distortions, draw_members, fit_members, pretrain, warm_cosine
from peft_func.cli.vit import vision_transformer
from peft_func.trees.paths import leaves


@pytest.fixture(scope="module")
def data():
    return load_digits(0)


def in_double(examples):
    return Examples(examples.images.double(), examples.labels)


@pytest.mark.parametrize("adaptation", list(Adaptation))
def test_stacked_training_is_training_alone(data, adaptation):
    model = pf.functionalize(vision_transformer(1, 5)).to(torch.float64)
    adapter = pf.bind(method_for(adaptation), model)
    keys, examples = [11, 12, 13], in_double(data.new)

    def fit(some):
        frozen, first = draw_members(adapter, some)
        return fit_members(adapter, frozen, first, some, examples, steps=8, size=10)

    together, curves = fit(keys)
    for i, key in enumerate(keys):
        alone, curve = fit([key])
        for (path, a), (other, b) in zip(leaves(pf.unstack(together)[i]), leaves(pf.unstack(alone)[0]), strict=True):
            assert path == other
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        torch.testing.assert_close(curves.loss[:, i], curve.loss[:, 0], rtol=0, atol=1e-9)


def test_stacked_training_is_an_ordinary_loop(data):
    """The same member, trained with autograd on the merged weights and without any vmap."""
    model = pf.functionalize(vision_transformer(1, 5)).to(torch.float64)
    adapter = pf.bind(method_for(Adaptation.BOTH), model)
    keys, examples, steps, size = [5, 6], in_double(data.new), 6, 10
    frozen, first = draw_members(adapter, keys)
    trained, _ = fit_members(adapter, frozen, first, keys, examples, steps=steps, size=size)

    tree = pf.map_leaves(lambda leaf: leaf.clone().requires_grad_(), pf.unstack(first)[1])
    optimizer = torch.optim.AdamW([leaf for _, leaf in leaves(tree)], weight_decay=0.01)
    order = batches(pf.split(6, "order"), len(examples), steps, size)
    maps = distortions(pf.split(6, "distortions"), steps, size)
    for step in range(steps):
        batch = examples.take(order[step])
        optimizer.param_groups[0]["lr"] = 1e-2 * warm_cosine(step, steps)
        optimizer.zero_grad()
        logits = model(pf.merge(adapter.apply(frozen, tree)), distort(batch.images, maps[step]))
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
    found = dict(leaves(pf.unstack(trained)[1]))
    for path, leaf in leaves(tree):
        torch.testing.assert_close(found[path], leaf.detach(), rtol=0, atol=1e-9)


def test_training_writes_to_nothing_that_it_was_given(data):
    model = pf.functionalize(vision_transformer(1, 5))
    adapter = pf.bind(method_for(Adaptation.BOTH), model)
    frozen, first = draw_members(adapter, [1, 2])
    before = pf.map_leaves(torch.clone, {"frozen": frozen, "first": first})
    state = torch.get_rng_state()
    fit_members(adapter, frozen, first, [1, 2], data.new, steps=2)
    assert torch.equal(state, torch.get_rng_state())
    for (_, a), (_, b) in zip(leaves({"frozen": frozen, "first": first}), leaves(before), strict=True):
        assert torch.equal(a, b)


def test_members_differ_and_a_curve_has_its_ends(data):
    model = pf.functionalize(vision_transformer(1, 5))
    adapter = pf.bind(method_for(Adaptation.BOTH), model)
    frozen, first = draw_members(adapter, [1, 2])
    some = data.new_test.take(torch.arange(40))
    _, curves = fit_members(adapter, frozen, first, [1, 2], data.new, steps=3, held_out=some)
    assert not torch.equal(curves.loss[:, 0], curves.loss[:, 1])
    assert curves.evaluated.tolist() == [0, 1, 2, 3]
    assert curves.accuracy.shape == (4, 2)
    assert curves.accuracy[0, 0] == curves.accuracy[0, 1]  # every adapter is the identity at init


def test_batches_go_through_all_examples_before_any_comes_again():
    order = batches(3, 10, 6, 5)
    for epoch in order.reshape(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert torch.equal(order, batches(3, 10, 6, 5))
    assert not torch.equal(order, batches(4, 10, 6, 5))


def test_the_identity_map_distorts_nothing():
    images = torch.rand(2, 3, 8, 8)
    identity = torch.eye(2, 3).expand(2, 3, 2, 3)
    torch.testing.assert_close(distort(images, identity), images, rtol=0, atol=1e-5)


def test_pretraining_learns(data):
    net = vision_transformer(0, 5)
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(net(data.old_test.images), data.old_test.labels)
    pretrain(net, data.old, 0, steps=20)
    with torch.no_grad():
        after = torch.nn.functional.cross_entropy(net(data.old_test.images), data.old_test.labels)
    assert after < 0.8 * before
