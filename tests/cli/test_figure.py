"""The figure: nothing in it overlaps, whatever the numbers are."""

import matplotlib.figure
import pytest
import torch

from peft_func.cli.figure import DISPUTED, Disputed, Story, write_figure
from peft_func.cli.scores import Scores, reliability
from peft_func.cli.train import Curves


@pytest.mark.parametrize(("members", "steps"), [(1, 1), (100, 30)])
def test_titles_do_not_overlap(tmp_path, monkeypatch, members, steps):
    kept = []
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, path, **options: (kept.append(self), self.draw_without_rendering(), path.write_bytes(b"x")),
    )
    log_probs = torch.log_softmax(torch.randn(200, 5), -1)
    bins = reliability(log_probs, torch.randint(5, (200,)))
    votes = dict.fromkeys(range(5, 10), members) if members > 1 else {5: 1}
    item = Disputed(torch.rand(8, 8), 5, votes, right=True)
    curves = Curves(torch.rand(steps, members), torch.arange(steps + 1), torch.rand(steps + 1, members))
    story = Story(
        title="A title",
        curves=curves,
        base=Scores(0.2, 0.5, 3.0),
        ensemble=Scores(0.9, 0.1, 0.3),
        reliability={"members, all together": bins, "ensemble": bins},
        disputed=[item] * DISPUTED,
        members=members,
    )
    write_figure(tmp_path / "a.png", story)
    (figure,) = kept
    boxes = [axes.title.get_window_extent() for part in figure.subfigs for axes in part.axes if axes.get_title()]
    assert len(boxes) == 3 + DISPUTED
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    whole = figure.bbox
    assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 for box in boxes)
