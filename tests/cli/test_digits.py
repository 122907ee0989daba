"""The data: the split is complete, disjoint, balanced, and depends on the key only."""

import torch

from peft_func.cli.digits import load_digits


def test_split():
    data = load_digits(0, per_class=7)
    assert torch.bincount(data.new.labels).tolist() == [7] * 5
    assert len(data.old) + len(data.old_test) + len(data.new) + len(data.new_test) == 1797
    assert data.new.images.shape == (35, 8, 8)
    assert data.new.images.dtype == torch.float32
    assert 0 <= data.new.images.min() < data.new.images.max() <= 1
    learned = {image.numpy().tobytes() for image in data.new.images}
    assert not learned & {image.numpy().tobytes() for image in data.new_test.images}


def test_the_key_decides():
    state = torch.get_rng_state()
    first, again, other = load_digits(1), load_digits(1), load_digits(2)
    assert torch.equal(first.new.images, again.new.images)
    assert not torch.equal(first.new.images, other.new.images)
    assert torch.equal(state, torch.get_rng_state())
