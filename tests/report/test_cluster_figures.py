"""Figures of clusters: what is drawn where, and the files."""

import importlib

import matplotlib as mpl
import pytest
import torch

import peft_func as pf
from peft_func.report.cluster_figures import image_figure, overlay, pictures, token_figure


@pytest.fixture
def clusters():
    raw = torch.rand(3, 2, 4, 4)
    maps = {"blocks.0.proj": pf.ClusterMaps("blocks.0.proj", raw, 1 - raw, raw)}
    maps["a/b#1"] = pf.ClusterMaps("a/b#1", raw, raw**2, raw)
    return pf.Clusters(maps, torch.rand(3, 3, 8, 8))


@pytest.fixture
def texts():
    raw = torch.rand(2, 5, 3)
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    maps = {"encoder": pf.TokenMaps("encoder", raw, 1 - raw, present)}
    return pf.Clusters(maps, torch.arange(10).reshape(2, 5))


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_one_file_for_each_place(clusters, tmp_path, format, start):
    folder = tmp_path / "new" / "folder"
    files = clusters.save(folder, format=format, limit=1)
    assert [file.name for file in files] == [f"1-blocks.0.proj.{format}", f"2-a_b#1.{format}"]
    assert sorted(folder.iterdir()) == sorted(files)
    assert all(file.read_bytes().startswith(start) for file in files)
    first = files[0].read_bytes()
    clusters.save(folder, format=format, limit=1)
    assert files[0].read_bytes() == first  # the maps tell every byte


def test_text_is_drawn_with_its_tokens(texts, tmp_path):
    words = [["the", "white", "sparrow", "sings", "."], ["a", "$tyre_", "."]]
    [file] = texts.save(tmp_path, format="svg", tokens=words)
    drawn = file.read_text()
    assert all(word in drawn for word in ("white", "sparrow", "tyre", "before", "after"))
    [file] = texts.save(tmp_path, format="svg")
    assert ">9<" not in file.read_text()  # padding is not drawn
    assert ">7<" in file.read_text()


def test_rows_are_images_and_columns_clusters(clusters):
    maps = clusters["blocks.0.proj"]
    figure = image_figure(maps, pictures(clusters.inputs), limit=2)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * 2 * (1 + maps.rank)
    assert [axes.get_title() for axes in panels[:3]] == ["input", "#1", "#2"]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["before", "after"] * 2
    # The third row is the second image, before; its last panel the second cluster.
    shown = torch.from_numpy(panels[8].images[0].get_array().copy()).float()
    large = pictures(clusters.inputs)[1:2].repeat_interleave(12, 1).repeat_interleave(12, 2)
    wanted = overlay(large, maps.thresholded((96, 96), "before")[1:2])[0, 1]
    torch.testing.assert_close(shown, wanted)


def test_nothing_is_clipped(clusters, texts):
    for place in (clusters["a/b#1"], texts["encoder"]):
        if isinstance(place, pf.ClusterMaps):
            figure = image_figure(place, pictures(clusters.inputs))
        else:
            figure = token_figure(place, [["word"] * 5, ["other"] * 5])
        mpl.backends.backend_agg.FigureCanvasAgg(figure).draw()
        width, height = figure.canvas.get_width_height()
        for text in figure.findobj(mpl.text.Text):
            box = text.get_window_extent()
            if text.get_text() and text.get_visible():
                assert box.x0 >= -1, text
                assert box.y0 >= -1, text
                assert box.x1 <= width + 1, text
                assert box.y1 <= height + 1, text


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.output.dense", "x" * 300])
def test_a_long_name_fits_above_one_cluster(name):
    raw = torch.rand(1, 1, 2, 2)
    figure = image_figure(pf.ClusterMaps(name, raw, raw, raw))
    mpl.backends.backend_agg.FigureCanvasAgg(figure).draw()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.canvas.get_width_height()[0]


def test_pictures():
    grey = torch.tensor([[[2.0, 4.0], [3.0, 2.0]]])
    assert pictures(grey)[0, ..., 0].tolist() == [[0.0, 1.0], [0.5, 0.0]]
    assert torch.equal(pictures(grey)[..., 0], pictures(grey)[..., 2])
    many = torch.rand(2, 5, 3, 4)
    assert pictures(many).shape == (2, 3, 4, 3)
    assert not pictures(torch.full((1, 2, 2), 7.0)).any()
    normal = (torch.tensor([0.2, 0.4, 0.9]) - 0.5) / 0.25
    again = pictures(normal.reshape(1, 3, 1, 1), mean=[0.5] * 3, std=[0.25] * 3)
    torch.testing.assert_close(again.flatten(), torch.tensor([0.2, 0.4, 0.9]))


def test_an_overlay_shows_the_picture_where_the_map_is_zero():
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 1, 0, 0] = 1.0
    shown = overlay(torch.rand(1, 2, 2, 3), maps)
    assert shown.shape == (1, 2, 2, 2, 3)
    assert torch.equal(shown[0, 0, 1], shown[0, 1, 1])
    assert torch.equal(shown[0, 0, 0, 0, :1].expand(3), shown[0, 0, 0, 0])  # grey
    assert not torch.allclose(shown[0, 1, 0, 0], shown[0, 0, 0, 0])


def test_bad_options(clusters, texts, tmp_path):
    for call in (
        lambda: clusters.save(tmp_path, format="jpeg"),
        lambda: clusters.save(tmp_path, limit=0),
        lambda: clusters.save(tmp_path, mean=[0.5] * 3),
        lambda: clusters.save(tmp_path, mean=[0.5], std=[0.5]),
        lambda: texts.save(tmp_path, tokens=[["a"] * 5]),
        lambda: texts.save(tmp_path, tokens=[["a"] * 5, ["b"] * 2]),
        lambda: texts.save(tmp_path, tokens=[["a"] * 6, ["b"] * 3]),
        lambda: texts.save(tmp_path, tokens="ab"),
        lambda: texts.save(tmp_path, tokens=[]),
    ):
        with pytest.raises(pf.OptionError):
            call()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_what_was_there(clusters, tmp_path, monkeypatch):
    [first, _] = clusters.save(tmp_path, limit=1)
    before = first.read_bytes()

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        clusters.save(tmp_path, limit=1)
    assert first.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_the_error_tells_how_to_install_it(clusters, tmp_path, monkeypatch):
    def missing(name, *args):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(pf.MissingExtraError, match=r"pip install 'peft_func\[demo\]'"):
        clusters.save(tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_inputs_that_are_no_images_leave_the_maps_alone(tmp_path):
    raw = torch.rand(2, 2, 2, 2)
    maps = pf.Clusters({"p": pf.ClusterMaps("p", raw, raw, raw)}, torch.rand(2, 16))
    assert maps.save(tmp_path)[0].exists()
