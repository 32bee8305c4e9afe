"""The page of a run: the pair decodes its images, its texts are escaped, its sliders work."""

import io
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
import torch
from PIL import Image

from pvae import build, evaluate, page, plots, results, run
from pvae.data import Dataset, Split, observe, pixels
from pvae.evaluate import Estimate
from pvae.explorer import explore
from pvae.results import Row


def tiny(latent_dim=3, shape=(1, 8, 8), **options):
    return build(shape, latent_dim, "mlp", hidden=16, **options)


def made(shape=(1, 8, 8), images=12):
    """Returns data with grey levels and three classes; all splits are the same."""
    x = torch.randint(256, (images, *shape), dtype=torch.uint8)
    return observe(Dataset("made", *[Split(x, torch.arange(images) % 3)] * 3, ""), "grey")


def cells(explorer):
    """Returns the images of the sprite, `(N, H, W)` or `(N, H, W, 3)`, in [0, 1]."""
    canvas = np.asarray(Image.open(io.BytesIO(explorer.sprite))) / 255
    height, width = (explorer.layout[key] for key in ("height", "width"))
    rows = [np.split(row, canvas.shape[1] // width, 1) for row in split(canvas, height)]
    return np.stack([cell for row in rows for cell in row])


def split(canvas, size):
    return np.split(canvas, len(canvas) // size, 0)


def lively(vae):
    """Makes the codes vary from image to image, so that units are active."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3)
    return vae


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("latent_dim", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 6)])
def test_each_cell_is_what_the_pair_decodes(shape, latent_dim, conditional):
    classes = 3 if conditional else None
    vae = lively(tiny(latent_dim, shape, num_classes=classes))
    data = made(shape)
    explorer = explore(vae, data)
    layout, found = explorer.layout, cells(explorer)
    values = torch.tensor(layout["values"])
    units = [int(name[1:]) for name in explorer.units]
    assert len(units) == len(set(units)) == min(latent_dim, 6)
    side, joined, x, y = layout["side"], layout["joined"], pixels(data.test.images), data.test.y

    def decoded(start, changed):
        z = evaluate.posterior_means(vae.guide, x, vae.given(y))[start].clone()
        for unit, step in changed.items():
            z[units[unit]] = values[unit, step]
        with torch.no_grad():
            image = vae.decode(z[None], y[start] if conditional else None).mean[0]
        return image.permute(1, 2, 0).squeeze(2).numpy()

    for text, place in zip(explorer.starts, layout["starts"], strict=True):
        start = int(text.split()[2].strip(","))
        assert text == f"test image {start}, label {int(y[start])}"
        first = place["first"]
        wanted = {
            first: x[start].permute(1, 2, 0).squeeze(2).numpy(),
            first + 1: decoded(start, {}),
        }
        corner = {unit: side - 1 - unit for unit in range(joined)}
        at = sum(step * side**unit for unit, step in corner.items())
        wanted[first + 2 + at] = decoded(start, corner)
        for unit in range(joined, len(units)):
            at = first + 2 + side**joined + (unit - joined) * side
            wanted[at + 4] = decoded(start, {unit: 4})
        for number, image in wanted.items():
            np.testing.assert_allclose(found[number], image, atol=0.51 / 255)


def test_starts_are_of_other_classes_and_the_plane_of_two_units_is_all_there_is():
    x = torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([2, 2, 0, 0, 5, 5, 1, 1, 1])
    data = observe(Dataset("made", *[Split(x, labels)] * 3, ""), "grey")
    explorer = explore(tiny(), data, class_names="abcdef")
    assert explorer.starts == ["test image 0, c", "test image 2, a", "test image 4, f"]
    assert explorer.classes == ["a", "b", "c", "f"]
    assert len(explore(tiny(2), data).starts) == 1


def test_standardised_images_are_shown_in_their_own_units():
    x = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)
    dataset = Dataset("made", *[Split(x, None)] * 3, "")
    vae = tiny(likelihood="gaussian")
    explorer = explore(vae, data := observe(dataset, "grey", standardize=True))
    found = cells(explorer)
    np.testing.assert_allclose(found[0], x[0, 0] / 255, atol=0.51 / 255)
    with torch.no_grad():
        z = evaluate.posterior_means(vae.guide, data.test.images[:1])
        mean = data.scaling.undo(vae.decode(z).mean)[0, 0].clamp(0, 1)
    np.testing.assert_allclose(found[1], mean, atol=0.51 / 255)


def test_the_plane_shows_where_codes_are():
    vae, data = lively(tiny(2)), made(images=50)
    explorer = explore(vae, data)
    codes = evaluate.posterior_means(vae.guide, pixels(data.test.images))
    low, high = (torch.tensor(explorer.layout["values"])[:, i] for i in (0, -1))
    torch.testing.assert_close((low + high) / 2, codes.mean(0))
    torch.testing.assert_close(high - low, 6 * codes.std(0, correction=0))
    steps = (codes - low) / (high - low) * (explorer.layout["side"] - 1)
    shown = [i for i in range(50) if explorer.points and steps[i].min() > 0]
    assert len(explorer.points) >= 49  # hardly a code is beyond three standard deviations
    i = shown[0]
    assert any(
        abs(a - steps[i, 0]) < 0.01 and abs(b - steps[i, 1]) < 0.01 and k == i % 3
        for a, b, k in explorer.points
    )


def test_large_images_shrink_until_they_have_room():
    explorer = explore(tiny(8, (3, 64, 64)), made((3, 64, 64), images=4))
    assert explorer.shrunk == 2
    assert explorer.layout["width"] == 32
    assert len(explorer.sprite) < 500_000


def test_what_is_no_image_has_no_explorer():
    data = made()
    flat = Split(data.test.images.flatten(1), None)
    observed = type(data)("grey", flat, flat, flat, None)
    assert explore(tiny(), observed) is None


def test_every_number_of_a_run_says_what_it_means():
    vae = tiny(likelihood="categorical")
    rows = results.end_of_run(results.Subject(vae, made(), quiet=True))
    assert len(rows) == 7
    for row in rows:
        assert row.meaning.endswith(".")


NASTY = "</script><b>&\"'<!--"


def written(folder, vae=None, **options):
    """Writes the page of an untrained pair, and takes a piece of hostile HTML for every text."""
    folder.mkdir()
    data = made()
    config = {
        "commands": [f"python {NASTY}"],
        "arguments": {"seed": 0, "note": NASTY, "sizes": [1, NASTY], "none": None},
        "dataset": {"name": NASTY, "sha256": "0", "observed": "grey"},
        "seed": 0,
        "versions": {"pvae": NASTY},
    }
    run.write_json(folder / "config.json", config)
    path = folder / "samples.png"
    plots.save(plots.samples(torch.rand(4, 1, 8, 8)), path)
    rows = [
        Row("elbo", NASTY, Estimate(-94.05, 0.5), 1000, meaning=NASTY),
        Row("active_units", "active", Estimate(3, float("nan")), 1000, 0, 8),
    ]
    explorer = None if vae is None else explore(vae, data, class_names=[NASTY] * 3)
    page.write(folder, rows, NASTY, [path], explorer, remarks=[NASTY], pair=NASTY)
    return folder / "report.html"


def test_a_configuration_with_damaged_commands_is_refused(tmp_path):
    config = {"commands": "rm", "arguments": {}, "dataset": {}, "seed": 0}
    config["dataset"] = {"name": "a", "sha256": "b", "observed": "grey"}
    run.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="commands must be a list of texts"):
        page.write(tmp_path, [], "", [], None)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names, self.text, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_text_is_text_and_nothing_is_fetched(tmp_path):
    path = written(tmp_path / NASTY.replace("/", ""), lively(tiny(4)))
    tags = Tags(path.read_text())
    legend = {"b"}  # the coloured dots of the classes
    assert set(tags.names) - legend == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "small", "table"),
        *("thead", "tbody", "tr", "th", "td", "figure", "figcaption", "div", "img", "pre"),
        *("label", "input", "canvas", "svg", "circle", "rect", "span", "output", "button"),
        *("noscript", "script"),
    }
    assert tags.names.count("b") == 3
    assert tags.text.count(NASTY) >= 10
    assert tags.sources
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert "-94.05 ± 0.50" in tags.text
    assert f"seed 0, note {NASTY}, sizes 1 {NASTY}\n" in tags.text  # no argument that is None
    assert "Latent explorer" not in written(tmp_path / "plain").read_text()


@pytest.mark.slow
@pytest.mark.skipif(chromium.FOUND is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_works_in_a_browser(tmp_path):
    path = written(tmp_path / "r", lively(tiny(4)))
    decoded = "document.getElementById('decoded').toDataURL()"
    values = "[...document.querySelectorAll('output')].map((o) => o.textContent)"
    with chromium.browsing(tmp_path) as tab:
        tab.look(1200)
        tab.open(path)
        own, texts = tab.get(decoded), tab.get(values)
        assert own != tab.get("document.getElementById('image').toDataURL()")
        assert all(text.endswith(" (own)") for text in texts)
        seen = {own}
        for number in range(1, 5):  # moves each slider by the keyboard
            tab.get(f"document.querySelectorAll('.slider input')[{number - 1}].focus()")
            tab.press("Home")
            tab.press("ArrowRight")
            moved = tab.get(values)
            assert not moved[number - 1].endswith("(own)")
            # a slider of a single unit resets all others; the first two units move together
            assert sum(not text.endswith("(own)") for text in moved) == (2 if number < 3 else 1)
            seen.add(tab.get(decoded))
        tab.point("#plane", 0.95, 0.05)
        layout = tab.get("JSON.parse(document.getElementById('explored').textContent)")
        assert tab.get(values)[:2] == [f"{row[-1]:.2f}" for row in layout["values"][:2]]
        seen.add(tab.get(decoded))
        assert len(seen) == 6
        tab.click("#back")
        assert tab.get(values) == texts
        assert tab.get(decoded) == own
        tab.click("label:nth-child(2) input")
        assert tab.get(decoded) not in seen
        for width in (1200, 400):
            for dark in (False, True):
                tab.look(width, dark=dark)
                assert tab.get("document.documentElement.scrollWidth") <= width
                back = tab.get("getComputedStyle(document.body).backgroundColor")
                assert back == ("rgb(21, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert tab.errors == []
