"""Draw a folder of example images for training without images of your own. They show houses or photographs."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hparams.environment import require_packages

require_packages("numpy", "PIL", "tqdm")

from PIL import Image, ImageDraw

from hparams.parser import OneLineParser, whole_between
from utils.core.errors import UserError, run_main
from utils.core.progress import say, track
from utils.display.grids import write_picture

SIDE = 128  # the side of a picture in pixels
S = 4 * SIDE  # the side of the canvas on which a house is drawn
SKIES = {  # each sky has a colour at the top and a colour at the horizon
    "day": ((90, 160, 230), (210, 235, 250)),
    "evening": ((60, 60, 120), (250, 170, 110)),
    "night": ((10, 15, 50), (60, 70, 130)),
    "clouds": ((150, 170, 190), (220, 225, 230)),
}
GROUND = [(90, 160, 70), (130, 170, 60), (60, 120, 70), (200, 190, 130), (235, 240, 245)]
WALLS = [
    (235, 220, 190),
    (200, 90, 70),
    (240, 240, 235),
    (120, 150, 190),
    (230, 190, 90),
    (150, 110, 80),
    (170, 200, 160),
]
ROOFS = [(150, 50, 40), (80, 80, 90), (110, 70, 50), (60, 90, 70), (180, 100, 50)]
LEAVES = [(50, 110, 50), (80, 140, 60), (190, 120, 40), (40, 90, 70)]


def between(a, b, t):
    """Mix two colours. The share t of the result is b, and the share 1 - t is a."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def draw_tree(draw, rng, x, foot):
    """Draw a tree whose trunk ends at (x, foot)."""
    height, leaves = rng.randint(S // 6, S // 3), rng.choice(LEAVES)
    draw.rectangle((x - height // 16, foot - height // 2, x + height // 16, foot), fill=(100, 70, 45))
    left, right, top = x - height // 3, x + height // 3, foot - height
    if rng.random() < 0.5:
        draw.polygon([(left, foot - height // 4), (right, foot - height // 4), (x, top)], fill=leaves)
    else:
        draw.ellipse((left, top, right, foot - height // 3), fill=leaves)


def draw_landscape(draw, rng, time, horizon):
    """Draw a sky with sun or moon, hills, ground and up to two trees."""
    sky, ground = SKIES[time], rng.choice(GROUND)
    for y in range(horizon):
        draw.line((0, y, S, y), fill=between(*sky, y / horizon))
    x, y, radius = rng.randint(0, S), rng.randint(0, horizon // 2), rng.randint(S // 20, S // 10)
    light = (245, 245, 220) if time == "night" else (255, 220, 90)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=light)
    for _ in range(rng.randint(0, 3)):
        x, width, height = rng.randint(0, S), rng.randint(S // 4, S // 2), rng.randint(S // 10, S // 4)
        colour = between(ground, sky[1], rng.uniform(0.3, 0.6))
        draw.ellipse((x - width, horizon - height, x + width, horizon + height), fill=colour)
    draw.rectangle((0, horizon, S, S), fill=ground)
    for _ in range(rng.randint(0, 2)):
        draw_tree(draw, rng, rng.randint(0, S), horizon + rng.randint(0, S // 12))


def draw_house(draw, rng, time, horizon):
    """Draw a house on the ground, and sometimes a tree beside the house."""
    width, height = rng.randint(S // 4, S // 2), rng.randint(S // 5, S // 3)
    x = rng.randint(S // 12, S - S // 12 - width)
    foot = rng.randint(horizon + S // 30, min(S - S // 20, horizon + S // 6))
    top, peak, over = foot - height, foot - height - rng.randint(height // 2, height), S // 30
    roof = rng.choice(ROOFS)
    if rng.random() < 0.5:
        chimney = x + rng.randint(width // 6, width // 3)
        draw.rectangle((chimney, top - height, chimney + width // 10, top), fill=between(roof, (0, 0, 0), 0.3))
    draw.rectangle((x, top, x + width, foot), fill=rng.choice(WALLS))
    ridge = [x + width // 2] if rng.random() < 0.6 else [x + width - width // 6, x + width // 6]
    draw.polygon([(x - over, top), (x + width + over, top), *((end, peak) for end in ridge)], fill=roof)
    pane = width // 6
    door = x + rng.choice([width // 2 - pane // 2, width // 8, width - width // 8 - pane])
    draw.rectangle((door, foot - height * 55 // 100, door + pane, foot), fill=rng.choice(ROOFS))
    lit = time == "night" or rng.random() < 0.2
    for left in (x + width // 8, x + width // 2 - pane // 2, x + width - width // 8 - pane):
        if abs(left - door) > pane:
            glass = (255, 225, 120) if lit else (150, 200, 225)
            box = (left, top + height // 5, left + pane, top + height // 2)
            draw.rectangle(box, fill=glass, outline=(250, 250, 250), width=S // 100)
    if rng.random() < 0.5:
        draw_tree(draw, rng, rng.choice([x - S // 8, x + width + S // 8]), foot)


def house(rng):
    """Return one picture of a house in a landscape."""
    image = Image.new("RGB", (S, S))
    draw, time, horizon = ImageDraw.Draw(image), rng.choice(list(SKIES)), rng.randint(S * 55 // 100, S * 72 // 100)
    draw_landscape(draw, rng, time, horizon)
    draw_house(draw, rng, time, horizon)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def photographs():
    """Return the two photographs of scikit-learn (CC BY 2.0; the README of scikit-learn's images names the authors)."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("photographs need scikit-learn: make .venv/.ready-dev") from None
    return [Image.fromarray(image) for image in load_sample_images().images]


def part(photograph, rng):
    """Cut a random square from a photograph."""
    side = rng.randint(SIDE, 2 * SIDE)
    left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    square = photograph.crop((left, top, left + side, top + side))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main():
    parser = OneLineParser(description=__doc__)
    parser.add_argument("kind", choices=["houses", "photographs"], help="what to draw")
    parser.add_argument("--target", required=True, metavar="DIR", help="folder, created if necessary")
    parser.add_argument(
        "--count", type=whole_between(1, 10**6), default=600, metavar="N", help="images (default: %(default)s)"
    )
    args = parser.parse_args()
    target = Path(args.target).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    sources = photographs() if args.kind == "photographs" else []
    for i in track(range(args.count), "drawing", unit="img"):
        rng = random.Random(i)  # picture i is the same for any number of pictures
        image = part(sources[i % len(sources)], rng) if sources else house(rng)
        write_picture(target / f"{args.kind}_{i:05}.png", image)
    say(f"{args.count} images of {SIDE} x {SIDE} pixels in {target}")


if __name__ == "__main__":
    run_main(main)
