"""Sample grids on the page: the first and the last whole, and some images of each place side by side; all marked."""

import base64
import io
from pathlib import Path

from PIL import Image

from shared.storage.files import write_atomically
from shared.storage.synthetic_mark import SyntheticMark, marked_png, read_mark

GRID_COLUMNS, GRID_GAP = 8, 2
"""How `shared.evaluation.generate.save_grid` lays out the grids that evaluations write."""
STRIP_IMAGES, STRIP_PLACES = 8, 12


def ends(grids: list[tuple[int, Path]]) -> list[tuple[int, str]]:
    """The first and the last grid, embedded, with their places."""
    chosen = [grids[0], grids[-1]] if len(grids) > 1 else grids
    return [(number, _embed(_marked(path))) for number, path in chosen]


def strip(grids: list[tuple[int, Path]], side: int) -> tuple[list[int], str]:
    """A picture with one column per place and one row per seed, embedded, and the places in it.

    Args:
        grids: (place, PNG), in order.
        side: of one image in pixels.
    """
    kept = [grids[index] for index in _spread(len(grids), STRIP_PLACES)]
    step = side + GRID_GAP
    canvas = Image.new("RGB", (len(kept) * step - GRID_GAP, STRIP_IMAGES * step - GRID_GAP), "white")
    for column, (_, path) in enumerate(kept):
        with Image.open(path) as grid:
            for row in range(STRIP_IMAGES):
                left, top = row % GRID_COLUMNS * step, row // GRID_COLUMNS * step
                canvas.paste(grid.crop((left, top, left + side, top + side)), (column * step, row * step))
    return [number for number, _ in kept], _embed(marked_png(canvas, _mark_of_all([path for _, path in kept])))


def stack(rows: list[Path], out: Path) -> None:
    """One picture of several of the same width, from top to bottom.

    Args:
        rows: PNG files.
        out: PNG file to write.
    """
    opened = [Image.open(io.BytesIO(path.read_bytes())).convert("RGB") for path in rows]
    canvas = Image.new("RGB", (opened[0].width, sum(row.height + GRID_GAP for row in opened) - GRID_GAP), "white")
    top = 0
    for row in opened:
        canvas.paste(row, (0, top))
        top += row.height + GRID_GAP
    write_atomically(out, marked_png(canvas, _mark_of_all(rows)))


def _marked(grid: Path) -> bytes:
    """The file; a grid of an older version without a mark gets one that names no model."""
    if read_mark(grid) is not None:
        return grid.read_bytes()
    with Image.open(grid) as picture:
        return marked_png(picture, SyntheticMark())


def _mark_of_all(grids: list[Path]) -> SyntheticMark:
    """The mark of a picture that is put together of others: every model once, the seeds where all agree."""
    marks = [read_mark(path) or SyntheticMark() for path in grids]
    models = dict.fromkeys(mark.model for mark in marks if mark.model)
    seeds = {mark.seeds for mark in marks}
    return SyntheticMark(", ".join(models), seeds.pop() if len(seeds) == 1 else "")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
