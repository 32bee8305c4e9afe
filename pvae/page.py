"""The page of a run, `report.html`, which needs no network and no other file."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from pvae import run
from pvae.explorer import Explorer
from pvae.files import write_atomically
from pvae.results import Row

_CHARTS = ("curves", "latents")  # pictures of dark lines on white, not of images
_HUES = 137.5  # degrees between the hues of two classes: the first ten all differ clearly


def write(
    folder: Path,
    rows: Sequence[Row],
    heading: str,
    pictures: Iterable[Path],
    explorer: Explorer | None,
    *,
    units: str = "images",
    remarks: Sequence[str] = (),
    pair: str = "",
) -> None:
    """Writes the page of the run in a folder; its settings come from the folder's `config.json`.

    Args:
        folder: of the run.
        rows: the rows of the table, with the meaning of each number.
        heading: the line that says what the numbers are, and of which data.
        pictures: PNG files, which become part of the page.
        explorer: the explorer of the latent space; None leaves it out.
        units: the word for the data that the numbers are means over, "images" or "data".
        remarks: warnings about the numbers.
        pair: a description of the parts of the pair.

    Raises:
        ValueError: the folder is not that of a run.
        OSError: the page cannot be written.
    """
    config = run.read_config(folder)
    template = Template(resources.files("pvae").joinpath("page.html").read_text("utf-8"))
    text = template.substitute(
        title=escape(folder.resolve().name),
        heading=escape(heading),
        units=units,
        numbers="\n".join(map(_number, rows)),
        remarks=escape(" ".join(remarks)),
        explorer="" if explorer is None else _explorer(explorer),
        pictures="\n".join(map(_picture, pictures)),
        commands=escape("\n".join(config.get("commands", []))),
        settings="\n".join(_setting(*item) for item in _settings(config, pair).items()),
    )
    write_atomically(folder / "report.html", lambda file: file.write(text.encode()))


def _number(row: Row) -> str:
    label, mean, se, images = row.cells()
    value = f"{mean} ± {se}" if se else mean
    return (
        f'<tr><td>{escape(label.strip())}</td><td class="number">{escape(value)}</td>'
        f'<td class="number">{escape(images)}</td></tr>\n'
        f'<tr class="what"><td colspan="3"><small>{escape(row.meaning)}</small></td></tr>'
    )


def _picture(path: Path) -> str:
    name = escape(path.stem.replace("_", " "))
    kind = "wide chart" if path.stem in _CHARTS else "wide"
    with Image.open(path) as image:
        width = image.width * 96 / image.info["dpi"][0]  # in pixels of a page, 96 to an inch
    shown = f'<img alt="{name}" width="{width:.0f}" src="{_png(path.read_bytes())}">'
    return f'<figure><figcaption>{name}</figcaption><div class="{kind}">{shown}</div></figure>'


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _settings(config: Mapping[str, Any], pair: str) -> dict[str, str]:
    """The settings of a run, in words."""
    data = config["dataset"]
    versions = config.get("versions", {})
    given = {k: v for k, v in config["arguments"].items() if v is not None and k != "resume"}
    return {
        "pair": pair,
        "data": f"{data['name']}, {data['observed']}; SHA-256 {data['sha256']}",
        "arguments": ", ".join(f"{name} {_said(value)}" for name, value in given.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "processor": str(config.get("processor")),
        "threads": str(config.get("threads")),
    }


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _setting(name: str, value: str) -> str:
    return f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"


# ---- the explorer ----


def _explorer(explorer: Explorer) -> str:
    layout = explorer.layout
    size = f'width="{layout["width"]}" height="{layout["height"]}"'
    starts = "".join(
        f'<label><input type="radio" name="start"{"" if i else " checked"}> {escape(text)}</label>'
        for i, text in enumerate(explorer.starts)
    )
    # inside a script, "</script>" ends it, and "<!--" may
    data = json.dumps(layout).replace("<", "\\u003c")
    return f"""
<h2>Latent explorer</h2>
<p>{escape(_what(explorer))}</p>
<div>{starts}</div>
<div class="stage">
<figure><canvas id="image" {size}></canvas><figcaption>the test image</figcaption></figure>
<figure><canvas id="decoded" {size}></canvas><figcaption>decoded</figcaption></figure>
{_plane(explorer) if layout["joined"] == 2 else ""}
</div>
{"".join(_slider(unit, layout["side"]) for unit in explorer.units)}
<button id="back">back to the image's own code</button>
<noscript><p>The explorer needs JavaScript.</p></noscript>
<img id="sprite" alt="" hidden src="{_png(explorer.sprite)}">
<script type="application/json" id="explored">{data}</script>"""


def _what(explorer: Explorer) -> str:
    """The text that tells the reader what the explorer shows."""
    joined, others = explorer.units[:2], explorer.units[2:]
    texts = [
        "Mean images, decoded beforehand. A unit's values reach from 3 standard deviations below "
        f"the mean of the codes of {explorer.codes:,} test images to 3 above it."
    ]
    if len(joined) == 2:
        texts.append(f"{' and '.join(joined)}, the most active, move together, on the plane.")
    if others:
        texts.append(f"{', '.join(others)} move one at a time.")
    texts.append(
        "Each starts at the test image's own code (own); what is not moved, or has no slider, "
        "stays there."
    )
    if explorer.shrunk > 1:
        texts.append(f"Images are shown at 1/{explorer.shrunk} of their sides.")
    return " ".join(texts)


def _slider(unit: str, side: int) -> str:
    return (
        f'<div class="slider"><span>{unit}</span><input type="range" aria-label="{unit}" min="0" '
        f'max="{side - 1}" step="1"><output></output></div>'
    )


def _plane(explorer: Explorer) -> str:
    """The plane of the two most active units, with the codes of test images and a marker."""
    side, (across, upward) = explorer.layout["side"], explorer.units[:2]
    points = "".join(
        f'<circle cx="{i + 0.5:g}" cy="{side - 0.5 - j:g}" r="{side / 90:.2f}" '
        f'fill="{_colour(k)}"/>'
        for i, j, k in explorer.points
    )
    classes = "".join(
        f'<span><b style="color: {_colour(k)}">●</b> {escape(name)}</span> '
        for k, name in enumerate(explorer.classes)
    )
    return f"""<figure><svg id="plane" viewBox="0 0 {side} {side}" role="img"
aria-label="the plane of {across} and {upward}">{points}
<rect id="marker" width="1" height="1"/></svg>
<figcaption>{across} grows to the right, {upward} upward; dots are codes of test images
<div class="classes">{classes}</div></figcaption></figure>"""


def _colour(k: int) -> str:
    return f"hsl({k * _HUES % 360:g} 65% 52%)"
