"""Computes the positions of images in a sheet, and makes pictures from parts of sheets (progress strips, labelled rows,
GIFs).

This module uses only Pillow and numpy, so that programs that only inspect a run need not import torch.
"""

import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from utils.core.errors import DamagedFile
from utils.core.files import atomic_write, parse_json
from utils.display.run_files import pictures_by_step

NOTE = "grid"  # the name of the PNG text field that describes the grid
CELLS = (64, 128)  # the smallest and the largest side of an image in strips, in pixels
INK, PAPER = (70, 70, 70), (255, 255, 255)
MOST_ROWS, MOST_COLUMNS = 8, 8  # the most rows and columns of a progress strip
AMPLIFIED = 4  # the factor by which differences are multiplied in pictures
TRIPLES_CAPTION = f"original, reconstruction, difference x {AMPLIFIED}"
MOST_STRIPS = 24  # the most strips that are drawn; runs of this program need fewer
MOST_PIXELS = 1 << 26  # the most pixels of a picture that is read


@dataclass(frozen=True)
class Grid:
    """The positions of `count` images of height x width in rows of `columns`, with `padding` pixels between and around
    them. `group` neighbouring columns form a group, such as (original, reconstruction, difference). After each group
    there are `gap` additional pixels."""

    count: int
    height: int
    width: int
    columns: int
    padding: int = 2
    group: int = 1
    gap: int = 0

    def place(self, i: int) -> tuple[int, int]:
        """Return the position (top, left) of image i."""
        row, column = divmod(i, self.columns)
        left = column * (self.width + self.padding) + self.padding + column // self.group * self.gap
        return row * (self.height + self.padding) + self.padding, left

    def size(self) -> tuple[int, int]:
        """Return the size (height, width) of the sheet."""
        rows = -(-self.count // self.columns)
        left = self.place(self.columns - 1)[1]
        return rows * (self.height + self.padding) + self.padding, left + self.width + self.padding

    def scaled(self, factor: int) -> "Grid":
        """Return the grid of the sheet after it is enlarged by a factor."""
        sizes = ("height", "width", "padding", "gap")
        return replace(self, **{name: factor * getattr(self, name) for name in sizes})

    def note(self) -> PngImagePlugin.PngInfo:
        """Return this grid as PngInfo, which is stored in the file of the sheet."""
        info = PngImagePlugin.PngInfo()
        info.add_text(NOTE, json.dumps(asdict(self)))
        return info

    @classmethod
    def of(cls, image: Image.Image) -> "Grid":
        """Return the grid that is recorded in a Pillow image. Raises ValueError if the grid does not fit the image."""
        values = parse_json(image.info[NOTE])
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("no grid")
        if any(type(v) is not int or not 0 <= v < 1 << 20 for v in values.values()):
            raise ValueError("the grid has no sizes")
        grid = cls(**values)
        least = min(grid.count, grid.height, grid.width, grid.columns, grid.group)
        if least < 1 or grid.group > MOST_COLUMNS or grid.size() != image.size[::-1]:
            raise ValueError("the grid does not fit the picture")
        return grid


def open_picture(path: str | Path) -> Image.Image:
    """Read the first frame of a PNG, GIF or JPEG file as a Pillow image. Raises DamagedFile if the file cannot be
    read."""
    try:
        image = Image.open(path, formats=("PNG", "GIF", "JPEG"))
        if image.size[0] * image.size[1] > MOST_PIXELS:
            raise ValueError("too many pixels")
        image.load()
        return image
    except Exception as error:  # Pillow's readers can raise any exception for damaged files
        raise DamagedFile(f"{path} cannot be shown: {' '.join(str(error).split())[:120]}") from None


def read_cells(path: str | Path, most: int = MOST_COLUMNS) -> list[list[Image.Image]]:
    """Read the first groups of images of a saved sheet. Returns a list of groups, each a list of Pillow images. The
    list is empty if the file has no grid.

    Raises ValueError if the grid of the file is damaged.
    """
    image = open_picture(path)
    if NOTE not in image.info:
        return []
    grid = Grid.of(image)
    cells = []
    for i in range(min(grid.count, most * grid.group)):
        top, left = grid.place(i)
        cells.append(image.crop((left, top, left + grid.width, top + grid.height)).convert("RGB"))
    return [cells[i : i + grid.group] for i in range(0, len(cells), grid.group)]


def fitted(image: Image.Image) -> Image.Image:
    """Resize a Pillow image to the bounds in CELLS. Small images are enlarged by integer factors, and large images are
    reduced."""
    least, most = CELLS
    longest = max(image.size)
    if longest > most:
        return ImageOps.contain(image, (most, most), Image.Resampling.LANCZOS)
    factor = max(1, least // longest)
    return image.resize([n * factor for n in image.size], Image.Resampling.NEAREST)


def labelled(
    rows: list[list[Image.Image]], row_labels: Sequence[str] = (), column_labels: Sequence[str] = (), padding: int = 4
) -> Image.Image:
    """Make one picture of rows of equally large Pillow images, with a word before each row and above each column."""
    width, height = rows[0][0].size
    font_size = max(11, height // 6)
    font = ImageFont.load_default(font_size)
    left = max((int(font.getlength(text)) for text in row_labels), default=-2 * padding) + 2 * padding + padding
    top = font_size + 2 * padding if column_labels else padding
    n_columns = max(map(len, rows))
    size = left + n_columns * (width + padding), top + len(rows) * (height + padding)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        y = top + i * (height + padding)
        if row_labels:
            pen.text((left - 2 * padding, y + height / 2), row_labels[i], INK, font, anchor="rm")
        for j, image in enumerate(row):
            picture.paste(image, (left + j * (width + padding), y))
    for j, text in enumerate(column_labels):
        pen.text((left + j * (width + padding) + width / 2, padding), text, INK, font, anchor="mt")
    return picture


def write_picture(path: str | Path, picture: Image.Image, **options: Any) -> None:
    """Write a Pillow image to a file, which is complete or absent. The file's extension gives the format. options:
    arguments of Pillow's save."""
    buffer = io.BytesIO()  # Pillow does not write GIFs from start to end
    picture.save(buffer, format=os.path.splitext(path)[1][1:].upper(), **options)
    with atomic_write(path) as f:
        f.write(buffer.getvalue())


def write_gif(path: str | Path, frames: list[Image.Image], milliseconds: int = 350, hold: int = 2000) -> None:
    """Write Pillow images to an animation that repeats. The last frame is shown for longer (hold)."""
    first, *others = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * len(others) + [hold]
    write_picture(path, first, save_all=True, append_images=others, duration=durations, loop=0)


def progress_strip(pictures: list[tuple[int, str]], say: Callable[[str], object]) -> Image.Image | None:
    """Make one picture of the pictures of one name. The picture has a row for each step. Each row shows the same
    images.

    pictures: [(step, path), ...] by rising step. At most MOST_ROWS pictures are used. More of them are from early
    steps, because images change faster there. For comparisons, the first row shows the originals, and the other rows
    show the reconstructions. Returns None if there are fewer than two steps. say: called with one line for each
    unreadable picture.
    """
    found = []
    for i in np.unique(np.geomspace(1, len(pictures), MOST_ROWS).round().astype(int) - 1):
        step, path = pictures[i]
        try:
            found.append((step, read_cells(path)))
        except ValueError as error:
            say(f"note: {path} is left out of the strip: {' '.join(str(error).split())[:120]}")
    found = [(step, groups) for step, groups in found if groups]
    if not found:
        return None
    newest = found[-1][1]
    found = [(step, groups) for step, groups in found if _shape(groups) == _shape(newest)]
    if len(found) < 2:
        return None
    labels = [f"step {step}" for step, _ in found]
    rows = [[group[min(1, len(group) - 1)] for group in groups] for _, groups in found]
    if len(newest[0]) > 1:
        labels, rows = ["original", *labels], [[group[0] for group in newest], *rows]
    return labelled([[fitted(image) for image in row] for row in rows], labels)


def _shape(groups: list[list[Image.Image]]) -> tuple[int, int, tuple[int, int]]:
    return len(groups), len(groups[0]), groups[0][0].size


def write_strips(folder: str, say: Callable[[str], object]) -> list[str]:
    """Write <name>_progress.png for the first MOST_STRIPS series of pictures in a folder. Returns the paths."""
    paths = []
    for name, pictures in itertools.islice(pictures_by_step(folder).items(), MOST_STRIPS):
        strip = progress_strip(pictures, say) if len(pictures) > 1 else None
        if strip is not None:
            paths.append(os.path.join(folder, f"{name}_progress.png"))
            write_picture(paths[-1], strip)
    return paths
