"""Figures show the data that they were given: checks of drawn data and of rendered pixels."""

import ast
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from pvae import plots


def canvas(figure):
    """Returns the array that `imshow` was given, `(rows * H, columns * W, 3)`."""
    (image,) = figure.axes[0].images
    return torch.from_numpy(np.array(image.get_array()))


def cell(figure, row, column, like):
    """Returns one image `(3, H, W)` of the canvas; `like` has images of the same size."""
    h, w = like.shape[-2:]
    drawn = canvas(figure)[row * h : (row + 1) * h, column * w : (column + 1) * w]
    return drawn.permute(2, 0, 1)


def rgb(image):
    return image.expand(3, -1, -1)


def render(figure):
    """Returns the screen pixels `(height, width, 3)` in [0, 1], top row first."""
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3] / 255


def texts(labels):
    return [label.get_text() for label in labels]


def assert_nothing_cut(figure):
    render(figure)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def epoch(number, elbo, **others):
    values = {"epoch": number, "train_objective": elbo + 1, "validation_elbo": elbo, "beta": 1.0}
    return values | {"validation_reconstruction": elbo + 25, "validation_kl": 25.0} | others


def converging(epochs, first):
    return [epoch(1, first)] + [epoch(e, -100 - 20 / e) for e in range(2, epochs + 1)]


SHAPES = [(1, 8, 8), (1, 13, 7), (3, 6, 10), (3, 40, 30)]

# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_grid_places_images_row_by_row_and_leaves_the_rest_white(shape):
    images = torch.rand(5, *shape)
    figure = plots.grid(images, columns=3)
    assert canvas(figure).shape == (2 * shape[1], 3 * shape[2], 3)
    for i, image in enumerate(images):
        assert torch.equal(cell(figure, i // 3, i % 3, images), rgb(image))
    assert (cell(figure, 1, 2, images) == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_rendered_pixels_are_the_image_upright_undistorted_and_sharp(shape):
    torch.manual_seed(0)
    images = torch.rand(6, *shape)
    figure = plots.grid(images, 3, title="title", row_labels="ab", column_labels="cde")
    pixels = render(figure)
    box = figure.axes[0].get_window_extent()
    scale = box.width / (3 * shape[2])
    assert scale == pytest.approx(round(scale))  # whole screen pixels for each image pixel
    assert box.height == pytest.approx(2 * shape[1] * scale)  # and they are square
    assert scale >= 3
    x0, top, scale = round(box.x0), len(pixels) - round(box.y1), round(scale)
    # compare the inside of each image pixel: a line along its edge covers its border
    for offset in (1, scale // 2, scale - 2):
        rows = top + offset + scale * np.arange(2 * shape[1])
        columns = x0 + offset + scale * np.arange(3 * shape[2])
        inner = pixels[np.ix_(rows, columns)]
        np.testing.assert_allclose(inner, canvas(figure).numpy(), atol=0.03)


def test_a_thin_line_separates_neighbours():
    figure = plots.grid(torch.zeros(2, 1, 8, 8), 2)
    pixels = render(figure)
    box = figure.axes[0].get_window_extent()
    middle = len(pixels) - round((box.y0 + box.y1) / 2)
    lit = pixels[middle, round(box.x0) + 3 : round(box.x1) - 3].max(axis=1) > 0.2
    assert 1 <= lit.sum() <= 2
    assert abs(int(np.flatnonzero(lit).mean()) - len(lit) // 2) <= 1


def test_labels_stand_at_the_middle_of_their_rows_and_columns():
    figure = plots.grid(
        torch.rand(6, 3, 9, 14), 3, title="T", row_labels=["r0", "r1"], column_labels="abc"
    )
    axes = figure.axes[0]
    assert axes.get_title() == "T"
    assert texts(axes.get_yticklabels()) == ["r0", "r1"]
    assert texts(axes.get_xticklabels(which="major")) == ["a", "b", "c"]
    assert list(axes.get_yticks()) == [0.5, 1.5]
    assert list(axes.get_xticks()) == [0.5, 1.5, 2.5]
    assert axes.images[0].get_extent() == [0, 3, 2, 0]  # in units of cells, first row on top
    render(figure)
    image = axes.get_window_extent()
    assert all(label.get_window_extent().x1 <= image.x0 for label in axes.get_yticklabels())
    above = [label for label in axes.xaxis.get_majorticklabels() if label.get_window_extent().width]
    assert len(above) == 3
    assert all(label.get_window_extent().y0 >= image.y1 for label in above)
    assert axes.title.get_window_extent().y0 >= max(a.get_window_extent().y1 for a in above)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_no_label_is_cut_and_long_column_labels_do_not_overlap(count):
    figure = plots.grid(
        torch.rand(count, 1, 8, 8),
        count,
        title="a title much longer than the images beneath it are wide",
        row_labels=["a row label that is long"],
        column_labels=[f"column label {i}" for i in range(count)],
    )
    assert_nothing_cut(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))


def test_many_or_large_images_keep_the_figure_within_bounds():
    for images, columns in ((torch.rand(900, 1, 28, 28), 30), (torch.rand(16, 3, 300, 200), 8)):
        pixels = render(plots.grid(images, columns))
        assert max(pixels.shape) <= 1700
    large = plots.grid(torch.rand(16, 3, 300, 200), 8).axes[0].get_window_extent()
    assert large.height / large.width == pytest.approx(2 * 300 / (8 * 200), rel=0.01)


def test_real_digits_come_out_as_they_are():
    digits = torch.from_numpy(load_digits().images[:10]).float()[:, None] / 16
    figure = plots.samples(digits, title="digits")
    assert canvas(figure).shape == (3 * 8, 4 * 8, 3)  # 10 images: 4 columns, 3 rows
    assert torch.equal(cell(figure, 2, 1, digits), rgb(digits[9]))


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (3, 2, 2), (9, 3, 3), (60, 8, 8)]
)
def test_samples_are_about_square(count, rows, columns):
    figure = plots.samples(torch.rand(count, 1, 5, 4), title="prior")
    assert canvas(figure).shape == (5 * rows, 4 * columns, 3)
    assert figure.axes[0].get_title() == "prior"


@pytest.mark.parametrize(
    ("count", "blocks", "columns"), [(1, 1, 1), (16, 1, 16), (17, 2, 9), (32, 2, 16)]
)
def test_each_reconstruction_stands_below_its_original(count, blocks, columns):
    x, y = torch.rand(2, count, 3, 6, 9)
    figure = plots.reconstructions(x, y)
    assert canvas(figure).shape == (2 * blocks * 6, columns * 9, 3)
    for i in range(count):
        row = 2 * (i // columns)
        assert torch.equal(cell(figure, row, i % columns, x), x[i])
        assert torch.equal(cell(figure, row + 1, i % columns, x), y[i])
    assert texts(figure.axes[0].get_yticklabels()) == ["x", "reconstruction"] * blocks
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [2, 4, 6][: blocks - 1]


def test_manifold_has_z1_to_the_right_and_z2_upward():
    images, axis = torch.rand(5, 5, 3, 6, 4), torch.tensor([-2.0, -1.0, 1e-8, 1.0, 2.0])
    figure = plots.manifold(images, axis, title="plane")
    axes = figure.axes[0]
    for i in range(5):
        for j in range(5):
            assert torch.equal(cell(figure, 4 - i, j, images), images[i, j])
    assert texts(axes.get_xticklabels()) == ["-2", "-1", "0", "1", "2"]
    assert texts(axes.get_yticklabels()) == ["2", "1", "0", "-1", "-2"]  # from the top
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z0", "z1")
    assert_nothing_cut(figure)
    image = axes.get_window_extent()
    heights = [label.get_window_extent().y0 for label in axes.get_yticklabels()]
    assert heights == sorted(heights, reverse=True)
    assert all(label.get_window_extent().y1 <= image.y0 for label in axes.get_xticklabels())


def test_a_large_manifold_labels_only_as_many_cells_as_have_room():
    axis = torch.linspace(-3, 3, 30)
    figure = plots.manifold(torch.rand(30, 30, 1, 8, 8), axis)
    labels = texts(figure.axes[0].get_xticklabels())
    assert labels[:4] == ["-3", "", "-2.59", ""]
    assert len([label for label in labels if label]) == 15
    assert figure.axes[0].get_xticklabels()[0].get_rotation() == 0


def test_traversals_have_a_row_for_each_unit_and_a_column_for_each_value():
    images, values = torch.rand(3, 7, 1, 5, 8), torch.linspace(-3, 3, 7) * 0.01
    names = ["z7  KL 3.21", "z2  KL 1.00", "z0  KL 0.02"]
    figure = plots.traversals(images, values, names, title="units")
    for unit in range(3):
        for step in range(7):
            assert torch.equal(cell(figure, unit, step, images), rgb(images[unit, step]))
    assert texts(figure.axes[0].get_yticklabels()) == names
    labels = texts(figure.axes[0].get_xticklabels())
    assert labels == ["-0.03", "-0.02", "-0.01", "0", "0.01", "0.02", "0.03"]


def test_interpolations_run_from_0_to_1_along_each_row():
    images = torch.rand(2, 4, 3, 5, 8)
    figure = plots.interpolations(images)
    for pair in range(2):
        for step in range(4):
            assert torch.equal(cell(figure, pair, step, images), images[pair, step])
    assert texts(figure.axes[0].get_xticklabels()) == ["0", "0.33", "0.67", "1"]


def test_rounding_outside_of_0_to_1_is_clamped_silently(caplog):
    figure = plots.samples(torch.tensor([-5e-5, 1 + 5e-5]).reshape(1, 1, 1, 2))
    assert canvas(figure)[0, :, 0].tolist() == [0, 1]
    assert caplog.records == []  # matplotlib would clip too, but log a warning


def test_any_tensor_goes_in():
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(cell(plots.samples(x), 0, 1, x), rgb(x[1].detach().float()))
    assert canvas(plots.samples(torch.rand(4, 6, 6, 3).permute(0, 3, 1, 2))).shape == (12, 12, 3)
    assert canvas(plots.samples(x.detach().bfloat16())).shape == (12, 12, 3)
    grad = torch.randn(9, 2, requires_grad=True)
    assert len(plots.latents(grad, None).axes[0].collections[0].get_offsets()) == 9


# --- latents -------------------------------------------------------------------------------------


def points(figure):
    """Returns all `(x, y, colour, marker)` drawn; a marker is its number of vertices."""
    drawn = []
    for collection in figure.axes[0].collections:
        (path,) = collection.get_paths()
        colours = [to_hex(c) for c in collection.get_facecolors()]
        offsets = np.asarray(collection.get_offsets())
        drawn += [(x, y, c, len(path)) for (x, y), c in zip(offsets, colours, strict=True)]
    return drawn


@pytest.mark.parametrize("classes", [1, 2, 10, 11, 20])
def test_every_class_has_its_own_colour_and_marker_and_its_name_in_the_legend(classes):
    torch.manual_seed(0)
    labels = torch.arange(100) % classes + 3
    means = torch.stack([labels.float(), torch.randn(100)], dim=1)  # z0 is the label
    figure = plots.latents(means, labels, title="means")
    drawn = points(figure)
    assert len(drawn) == 100
    assert sorted(y for _, y, _, _ in drawn) == pytest.approx(means[:, 1].sort().values.tolist())
    styles = {(x, colour, marker) for x, _, colour, marker in drawn}
    assert len(styles) == classes  # each class has one style
    assert len({style[1:] for style in styles}) == classes  # each style is of one class
    legend = figure.axes[0].get_legend()
    assert texts(legend.get_texts()) == [str(3 + c) for c in range(classes)]
    by_class = {x: colour for x, colour, _ in styles}
    for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
        assert to_hex(handle.get_color()) == by_class[float(text.get_text())]
    for text in figure.axes[0].texts:  # each class has its name at its points
        assert text.get_position()[0] == float(text.get_text())
    assert_nothing_cut(figure)


def test_classes_go_by_their_names():
    labels = torch.tensor([2, 0, 2, 0])
    means = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0], [5.0, 5.0]])
    figure = plots.latents(means, labels, names=["Shirt", "Bag", "Coat"])
    axes = figure.axes[0]
    assert texts(axes.get_legend().get_texts()) == ["Shirt", "Coat"]
    assert {t.get_text(): t.get_position() for t in axes.texts} == {"Shirt": (5, 5), "Coat": (0, 0)}


def test_a_name_that_would_lie_on_another_is_in_the_legend_alone():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    means = torch.randn(300, 2) + torch.tensor([0.0, 20.0, 0.1])[labels, None]
    figure = plots.latents(means, labels, names=["Sandal", "Bag", "Sneaker"])
    axes = figure.axes[0]
    assert texts(axes.texts) == ["Sandal", "Bag"]
    assert texts(axes.get_legend().get_texts()) == ["Sandal", "Bag", "Sneaker"]
    render(figure)
    first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)


def test_few_points_are_larger_than_many():
    sizes = []
    for count in (1, 1500, 100_000):
        (scatter,) = plots.latents(torch.randn(count, 2), None).axes[0].collections
        sizes.append(scatter.get_sizes().item())
    assert sizes == [30, 10, 5]


@pytest.mark.parametrize("labels", [torch.arange(84) % 21, torch.linspace(0, 20, 84)])
def test_more_classes_or_real_labels_get_a_colour_bar(labels):
    means = torch.randn(84, 2)
    figure = plots.latents(means, labels)
    scatter = figure.axes[0].collections[0]
    assert figure.axes[0].get_legend() is None
    assert figure.axes[1].get_ylim() == pytest.approx((0, 20))
    assert np.asarray(scatter.get_array()) == pytest.approx(labels.numpy())
    assert np.asarray(scatter.get_offsets()) == pytest.approx(means.numpy())


def test_latents_have_equal_scales_and_the_given_names():
    means = torch.randn(50, 2) * torch.tensor([10.0, 1.0])
    figure = plots.latents(means, None, title="wide", axis_labels=("PC1", "PC2"))
    axes = figure.axes[0]
    render(figure)
    per_unit = axes.transData.transform([(0, 0), (1, 1)])
    (x0, y0), (x1, y1) = per_unit
    assert x1 - x0 == pytest.approx(y1 - y0, rel=5e-3)
    low, high = axes.get_xlim()
    assert low <= means[:, 0].min()
    assert means[:, 0].max() <= high
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("wide", "PC1", "PC2")
    assert axes.get_legend() is None


# --- curves --------------------------------------------------------------------------------------


def line(axes, label):
    (found,) = [drawn for drawn in axes.lines if drawn.get_label() == label]
    return np.asarray(found.get_xydata())


def panel(figure, start):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(start)]
    return found


def notes(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_curves_draw_every_series_and_mark_the_best_validation_epoch():
    elbos = [-120.0, -105.0, -101.5, -103.0]
    history = [
        epoch(e, v, validation_kl=20.0 + e, seconds=3.0) for e, v in enumerate(elbos, start=1)
    ]
    figure = plots.curves(history, title="MNIST")
    elbo = panel(figure, "ELBO")
    assert line(elbo, "train").tolist() == [[e, v + 1] for e, v in enumerate(elbos, 1)]
    assert line(elbo, "validation").tolist() == [[e, v] for e, v in enumerate(elbos, 1)]
    assert line(elbo, "best: -101.50, epoch 3").tolist() == [[3, -101.5]]
    assert "best: -101.50, epoch 3" in texts(elbo.get_legend().get_texts())
    reconstruction = panel(figure, "validation reconstruction: -76.50 at epoch 3")
    assert line(reconstruction, "validation")[:, 1].tolist() == [v + 25 for v in elbos]
    kl = panel(figure, "validation KL: 23.00 at epoch 3")
    assert line(kl, "validation")[:, 1].tolist() == [21, 22, 23, 24]
    (beta,) = [axes for axes in figure.axes if axes.get_ylabel() == "beta"]
    assert beta.lines[0].get_ydata().tolist() == [1, 1, 1, 1]
    assert beta.get_ylim()[1] > 1
    assert all(a.get_ylabel() == "nats per image" for a in (elbo, reconstruction, kl))
    assert elbo.get_xlabel() == kl.get_xlabel() == "epoch"
    assert texts(figure.texts) == ["MNIST"]
    assert_nothing_cut(figure)


@pytest.mark.parametrize(
    ("objective", "betas", "title"),
    [
        ("IWAE, 5 particles", [1.0, 1.0, 1.0], "train: IWAE, 5 particles"),
        ("free bits", [0.5, 1.0, 1.0], "train: free bits"),
        ("ELBO", [0.5, 0.75, 1.0], "train: ELBO at the beta of each epoch"),
        ("ELBO", [2.0, 2.0, 2.0], "train: ELBO at the beta of each epoch"),
    ],
)
def test_what_is_not_the_elbo_is_never_drawn_on_its_panel(objective, betas, title):
    history = [epoch(e, -100.0 + e, beta=beta) for e, beta in enumerate(betas, 1)]
    figure = plots.curves(history, objective=objective)
    elbo, own = panel(figure, "ELBO (beta = 1)"), panel(figure, title)
    assert {drawn.get_label() for drawn in elbo.lines} == {"validation", "best: -97.00, epoch 3"}
    assert line(own, "train").tolist() == [[1, -98], [2, -97], [3, -96]]
    assert [drawn.get_label() for drawn in own.lines] == ["train"]
    (shade,) = [axes for axes in figure.axes if axes.get_ylabel() == "beta"]
    assert shade.lines[0].get_ydata().tolist() == betas
    assert_nothing_cut(figure)


@pytest.mark.parametrize("elbos", [[-500.0], [-500.0, -100.0], [-105.0, -102.0, -101.0]])
def test_a_short_run_shows_every_point_on_whole_epochs(elbos):
    figure = plots.curves([epoch(e, elbo) for e, elbo in enumerate(elbos, 1)])
    render(figure)
    for axes in figure.axes:
        for drawn in axes.lines:
            low, high = axes.get_ylim()
            values = np.asarray(drawn.get_ydata(), dtype=float)
            assert drawn.get_linestyle() == ":" or ((low <= values) & (values <= high)).all()
        low, high = axes.get_xlim()
        ticks = [t for t in axes.get_xticks() if low <= t <= high]
        assert ticks == list(range(1, len(elbos) + 1))
    assert notes(figure) == []


@pytest.mark.parametrize("epochs", [3, 5, 50])
def test_a_terrible_first_epoch_is_out_of_view_and_the_panel_says_so(epochs):
    figure = plots.curves(converging(epochs, first=-5e6))
    elbo = panel(figure, "ELBO")
    low, high = elbo.get_ylim()
    assert -200 < low < -110
    assert -110 < high < -90
    rest = line(elbo, "validation")[1:, 1]
    assert ((low < rest) & (rest < high)).all()
    assert texts(elbo.texts) == ["2 early values out of view, farthest -5e+06"]


def test_an_ordinary_first_epoch_stays_in_view():
    figure = plots.curves(converging(20, first=-115.0))
    assert panel(figure, "ELBO").get_ylim()[0] < -115
    assert notes(figure) == []


def test_a_collapse_at_the_end_is_never_out_of_view():
    figure = plots.curves([*converging(20, first=-115.0), epoch(21, -9000.0)])
    assert panel(figure, "ELBO").get_ylim()[0] < -9000
    assert notes(figure) == []


def test_beta_above_one_stays_in_view():
    figure = plots.curves([epoch(1, -100.0, beta=4.0)])
    assert figure.axes[-1].get_ylim()[1] > 4


# --- files ---------------------------------------------------------------------------------------


def test_save_writes_what_was_drawn_and_nothing_else(tmp_path):
    figure = plots.samples(torch.rand(4, 1, 8, 8))
    path = tmp_path / "samples.png"
    path.write_text("an older file")
    plots.save(figure, path)
    assert os.listdir(tmp_path) == ["samples.png"]
    np.testing.assert_allclose(matplotlib.image.imread(path)[..., :3], render(figure), atol=1 / 255)
    plots.save(figure, str(tmp_path / "samples.pdf"))
    assert (tmp_path / "samples.pdf").read_bytes().startswith(b"%PDF")


def test_a_failed_save_leaves_the_older_file_alone(tmp_path, monkeypatch):
    def half_written(self, file, **kwargs):
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "samples.png"
    path.write_text("an older file")
    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        plots.save(Figure(), path)
    assert os.listdir(tmp_path) == ["samples.png"]
    assert path.read_text() == "an older file"


def test_files_are_small(tmp_path):
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
    torch.manual_seed(0)
    figures = {
        "manifold": plots.manifold(digits[:400].unflatten(0, (20, 20)), torch.linspace(-3, 3, 20)),
        "latents": plots.latents(torch.randn(10_000, 2) * 2, torch.arange(10_000) % 10),
        "curves": plots.curves(converging(100, first=-5000.0)),
    }
    for name, figure in figures.items():
        plots.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size < 250_000, name


def test_it_imports_only_torch_and_matplotlib_and_never_pyplot():
    names = set()
    for node in ast.walk(ast.parse(Path(plots.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {
        "matplotlib",
        "pvae",
        "torch",
    }
    assert {name for name in names if name.startswith("pvae")} == {"pvae.files.write_atomically"}
    assert not any("pyplot" in name for name in names)


# --- the smallest input, and empty input ---


ONE = torch.rand(1, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "smallest"),
    [
        (lambda x: plots.grid(x, 3), ONE),
        (lambda x: plots.reconstructions(x, x), ONE),
        (plots.samples, ONE),
        (lambda x: plots.manifold(x, torch.zeros(len(x))), ONE[None]),
        (lambda x: plots.traversals(x, torch.zeros(1), ["z0"] * len(x)), ONE[None]),
        (plots.interpolations, torch.cat([ONE, ONE])[None]),
        (lambda x: plots.latents(x, None), torch.zeros(1, 2)),
        (lambda x: plots.latents(x, torch.zeros(len(x)).long()), torch.zeros(1, 2)),
        (lambda x: plots.latents(x, torch.zeros(len(x))), torch.zeros(1, 2)),
        (lambda x: plots.posterior(x, x, (0, 0)), torch.randn(2, 1)),
        (lambda x: plots.posterior(x, torch.zeros(2, 1), (0, 0)), torch.zeros(2, 1)),
        (plots.curves, [epoch(1, -100.0)]),
    ],
)
def test_one_image_or_pair_is_enough_and_none_is_refused(call, smallest):
    assert_nothing_cut(call(smallest))
    with pytest.raises(ValueError, match=r"must (have|hold) .*, not (none|\(0, )"):
        call(smallest[:0])


# --- what is refused -----------------------------------------------------------------------------

IMAGES = torch.rand(6, 1, 4, 5)
NAN = IMAGES.clone()
NAN[1] = math.nan
GOOD = epoch(1, -100.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.samples(torch.rand(1, 4, 5)), r"images .*\(N, C, H, W\).*not \(1, 4, 5\)"),
        (lambda: plots.samples(torch.rand(())), r"images .*\(N, C, H, W\).*not \(\)"),
        (lambda: plots.samples(torch.rand(6, 2, 4, 5)), r"C = 1 or 3.*not \(6, 2, 4, 5\)"),
        (lambda: plots.samples(torch.rand(0, 1, 4, 5)), r"size at least 1, not \(0, 1, 4, 5\)"),
        (lambda: plots.samples(NAN), r"images must lie in \[0, 1\], not nan at \(1, 0, 0, 0\)"),
        (lambda: plots.samples(IMAGES * 0 + 1.001), r"\[0, 1\], not 1.001 at \(0, 0, 0, 0\)"),
        (lambda: plots.samples(IMAGES * 0 - 0.5), r"\[0, 1\], not -0.5 at"),
        (lambda: plots.grid(IMAGES, 0), "columns must be at least 1, not 0"),
        (lambda: plots.grid(IMAGES, 3, row_labels="abc"), "row_labels must hold 2 labels, not 3"),
        (lambda: plots.grid(IMAGES, 3, column_labels="ab"), "column_labels must hold 3 .*not 2"),
        (lambda: plots.reconstructions(IMAGES, IMAGES[:4]), r"\(6, 1, 4, 5\) and \(4, 1, 4, 5\)"),
        (lambda: plots.reconstructions(IMAGES, IMAGES + 2), r"reconstructed must lie in \[0, 1\]"),
        (lambda: plots.reconstructions(IMAGES + 2, IMAGES), r"originals must lie in \[0, 1\]"),
        (
            lambda: plots.manifold(IMAGES.unflatten(0, (2, 3)), torch.zeros(2)),
            r"not \(2, 3, 1, 4, 5\) and \(2,\)",
        ),
        (
            lambda: plots.manifold(IMAGES[:4].unflatten(0, (2, 2)), torch.zeros(3)),
            r"not \(2, 2, 1, 4, 5\) and \(3,\)",
        ),
        (
            lambda: plots.manifold(IMAGES[:4].unflatten(0, (2, 2)), torch.tensor([0.0, math.inf])),
            r"axis must be finite, not inf at \(1,\)",
        ),
        (
            lambda: plots.traversals(IMAGES.unflatten(0, (2, 3)), torch.zeros(2), "ab"),
            r"not \(2, 3, 1, 4, 5\) and \(2,\)",
        ),
        (
            lambda: plots.traversals(IMAGES.unflatten(0, (2, 3)), torch.zeros(3), "abc"),
            r"labels must hold 2 labels, not 3: \['a', 'b', 'c'\]",
        ),
        (lambda: plots.interpolations(IMAGES[:, None]), r"T >= 2 .*not \(6, 1, 1, 4, 5\)"),
        (lambda: plots.latents(torch.rand(5, 3), None), r"means must have .*not \(5, 3\)"),
        (lambda: plots.latents(torch.rand(0, 2), None), r"means must have .*not \(0, 2\)"),
        (lambda: plots.latents(torch.rand(5, 2), torch.zeros(4)), r"not \(5, 2\) and \(4,\)"),
        (
            lambda: plots.latents(torch.tensor([[0, 1], [2, math.nan]]), None),
            r"means must be finite, not nan at \(1, 1\)",
        ),
        (
            lambda: plots.latents(torch.rand(3, 2), torch.tensor([0, 2, 1]), names=["a", "b"]),
            r"labels must be from 0 to 1, .* not from 0 to 2",
        ),
        (
            lambda: plots.latents(torch.rand(2, 2), torch.tensor([-1, 1]), names=["a", "b"]),
            r"not from -1 to 1",
        ),
        (
            lambda: plots.posterior(torch.rand(5, 3), torch.rand(5, 3), (0, 3)),
            r"units must be from 0 to 2, not \(0, 3\)",
        ),
        (
            lambda: plots.posterior(torch.rand(5, 3), torch.rand(5, 2), (0, 1)),
            r"not \(5, 3\) and \(5, 2\)",
        ),
        (lambda: plots.curves([]), "at least one epoch"),
        (lambda: plots.curves([GOOD, {"epoch": 2}]), r"history\[1\] .*lacks \['train_objective'"),
        (
            lambda: plots.curves([epoch(1, -100.0, validation_kl=math.nan)]),
            r"history\[0\]\['validation_kl'\] must be finite, not nan",
        ),
        (lambda: plots.save(Figure(), "figure.txt"), "path must end in .*png.*not 'figure.txt'"),
        (lambda: plots.save(Figure(), "figure"), "path must end in .*not 'figure'"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_with_dollar_signs_are_no_formulas(tmp_path):
    """A label may be any folder's name; as a formula, `\\frac` alone would be an error."""
    names = ["$\\frac$", "a_$x$", "_"]
    figures = [
        plots.latents(torch.randn(30, 2), torch.arange(30) % 3, names=names),
        plots.grid(torch.rand(9, 1, 4, 4), 3, row_labels=names, column_labels=names),
    ]
    for i, figure in enumerate(figures):
        plots.save(figure, tmp_path / f"{i}.png")
