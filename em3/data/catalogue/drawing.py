"""Pictures of the items: silhouettes of products in a colour and a pattern, on a background, with clutter and noise."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from .attributes import NAMES, STYLES

SIDE = 64  # pixels, after halving the canvas: drawing has no anti-aliasing of its own
_CANVAS = 2 * SIDE
_QUALITY = 90

# Index = the attribute's value.
_COLOURS = np.array(
    [
        [205, 40, 45],
        [240, 130, 30],
        [245, 205, 50],
        [55, 150, 75],
        [45, 95, 200],
        [140, 70, 175],
        [125, 80, 50],
        [45, 45, 50],
    ]
)
_BACKGROUNDS = np.array([[242, 242, 240], [226, 208, 176], [178, 208, 232], [238, 190, 196], [122, 132, 146]])
_SIZES = (0.58, 0.78, 1.0)
_PLACES = ((0.0,), (-0.42, 0.42), (-0.6, 0.0, 0.6))  # of the 1, 2 or 3 things, in half canvases from the centre
_SHRINK = (1.0, 0.72, 0.58)

_Y, _X = np.mgrid[0:_CANVAS, 0:_CANVAS].astype(np.float32)


def _rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([left + 1j * top, right + 1j * top, right + 1j * bottom, left + 1j * bottom])


def _ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return x + 1j * y + width * np.cos(angle) + 1j * height * np.sin(angle)


def _mirrored(*half: tuple[float, float]) -> np.ndarray:
    """A closed outline from its right half, top to bottom, as (x, y)."""
    right = np.array([x + 1j * y for x, y in half])
    return np.concatenate([right, -right[::-1].conj()])


# A silhouette is outlines in the square from -1-1j to 1+1j (y points down), painted in turn: 1 adds, 0 cuts out.
_SILHOUETTES: tuple[tuple[tuple[int, np.ndarray], ...], ...] = (
    (  # mug
        (1, _ellipse(0.45, 0.0, 0.42, 0.42)),
        (0, _ellipse(0.45, 0.0, 0.22, 0.24)),
        (1, _rectangle(-0.7, -0.65, 0.42, 0.65)),
    ),
    (  # bottle
        (1, _mirrored((0.15, -0.95), (0.15, -0.4), (0.38, -0.1), (0.38, 0.95))),
        (0, _rectangle(-0.2, -0.76, 0.2, -0.7)),
    ),
    (  # vase
        (1, _mirrored((0.42, -0.9), (0.2, -0.6), (0.24, -0.4), (0.6, 0.1), (0.56, 0.5), (0.28, 0.9))),
    ),
    (  # lamp
        (1, _mirrored((0.32, -0.9), (0.72, -0.05))),
        (1, _rectangle(-0.07, -0.1, 0.07, 0.8)),
        (1, _ellipse(0.0, 0.82, 0.45, 0.13)),
    ),
    (  # chair
        (1, _rectangle(-0.6, -0.95, -0.4, 0.95)),
        (1, _rectangle(-0.6, -0.85, -0.25, -0.2)),
        (1, _rectangle(-0.6, 0.05, 0.62, 0.28)),
        (1, _rectangle(0.45, 0.1, 0.62, 0.95)),
    ),
    (  # bag
        (1, _ellipse(0.0, -0.25, 0.42, 0.65)),
        (0, _ellipse(0.0, -0.25, 0.28, 0.5)),
        (1, _mirrored((0.62, -0.25), (0.8, 0.85))),
    ),
    (  # shirt
        (1, _mirrored((0.35, -0.85), (0.98, -0.45), (0.78, -0.1), (0.5, -0.25), (0.5, 0.85))),
        (0, _ellipse(0.0, -0.88, 0.24, 0.2)),
    ),
    (  # clock
        (1, _ellipse(0.0, 0.0, 0.85, 0.85)),
        (0, _ellipse(0.0, 0.0, 0.62, 0.62)),
        (1, _rectangle(-0.06, -0.55, 0.06, 0.06)),
        (1, _rectangle(-0.06, -0.06, 0.42, 0.06)),
    ),
)


def draw_picture(rng: np.random.Generator, values: np.ndarray, styles: np.ndarray) -> bytes:
    """A JPEG of ``SIDE x SIDE`` pixels of the item with these attribute values and styles."""
    from PIL import Image, ImageDraw

    value = {name: int(v) for name, v in zip(NAMES, values, strict=True)}
    image = _backdrop(rng, _BACKGROUNDS[value["background"]])
    mask, shadow = Image.new("L", (_CANVAS, _CANVAS)), Image.new("L", (_CANVAS, _CANVAS))
    _paint_things(rng, ImageDraw.Draw(mask), ImageDraw.Draw(shadow), value)
    image.paste((60, 60, 70), mask=shadow)
    image.paste(Image.fromarray(_cloth(rng, _COLOURS[value["colour"]], value["pattern"])), mask=mask)
    if rng.random() < 0.2:  # a sale sticker, of no meaning
        x, y = rng.integers(4, _CANVAS - 34, size=2)
        ImageDraw.Draw(image).ellipse((x, y, x + 26, y + 26), fill=tuple(int(c) for c in rng.integers(256, size=3)))
    pixels = np.asarray(image.reduce(2), np.float32)  # [64, 64, 3]
    pixels = pixels * (0.6 + 0.5 * styles[STYLES.index("light")])
    pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * rng.uniform(3, 10)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _backdrop(rng: np.random.Generator, colour: np.ndarray) -> Any:
    """A wall that darkens to one side, a floor, and a few faint things that belong to no product."""
    from PIL import Image, ImageDraw

    colour = (colour + rng.integers(-9, 10, size=3)).astype(np.float32)
    slope = rng.uniform(-0.12, 0.12, size=2).tolist()
    shade: np.ndarray = 1 + slope[0] * (_X / _CANVAS - 0.5) + slope[1] * (_Y / _CANVAS - 0.5)
    floor = rng.integers(6 * _CANVAS // 10, _CANVAS)
    shade[floor:] *= rng.uniform(0.86, 0.95)
    image = Image.fromarray((shade[..., None] * colour).clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        fill = tuple(int(c) for c in (colour * rng.uniform(0.78, 1.12) + rng.integers(-12, 13, size=3)).clip(0, 255))
        x, y = rng.integers(-20, _CANVAS, size=2)
        width, height = rng.integers(8, 50, size=2)
        shape = canvas.ellipse if rng.random() < 0.5 else canvas.rectangle
        shape((x, y, x + width, y + height), fill=fill)
    return image


def _paint_things(rng: np.random.Generator, mask: Any, shadow: Any, value: dict[str, int]) -> None:
    """The silhouettes on the mask, each at its own angle and nearly in its place; their shadows beside it."""
    half = _CANVAS / 2
    count = value["count"]
    scale = half * 0.82 * _SIZES[value["size"]] * _SHRINK[count] * rng.uniform(0.9, 1.1)
    shift = rng.uniform(-0.12, 0.12, size=2) * half
    for place in _PLACES[count]:
        centre = half * (1 + place) + 1j * half + complex(*shift) + complex(*rng.uniform(-0.05, 0.05, size=2)) * half
        angle = rng.uniform(-0.3, 0.3)
        turn = scale * np.exp(1j * angle)
        shadow.ellipse(_box(centre + 0.95j * scale, 0.75 * scale, 0.12 * scale), fill=90)
        for adds, outline in _SILHOUETTES[value["kind"]]:
            points = centre + turn * outline
            mask.polygon([(p.real, p.imag) for p in points.tolist()], fill=255 * adds)


def _box(centre: complex, width: float, height: float) -> tuple[float, float, float, float]:
    return centre.real - width, centre.imag - height, centre.real + width, centre.imag + height


def _cloth(rng: np.random.Generator, colour: np.ndarray, pattern: int) -> np.ndarray:
    """``[128, 128, 3]`` uint8: the colour, with its pattern in a lighter or (for light colours) a darker shade of it."""
    colour = (colour + rng.integers(-14, 15, size=3)).clip(0, 255)
    other = colour + 0.6 * (255 - colour) if colour.mean() < 130 else 0.55 * colour
    palette = np.array([colour, other], np.uint8)
    return palette[_woven(rng, pattern).astype(np.intp)]


def _woven(rng: np.random.Generator, pattern: int) -> np.ndarray:
    """``[128, 128]`` bool: where a pattern (plain, striped, dotted, checked) shows its second shade."""
    angle, period, (phase, phase2) = rng.uniform(0, np.pi), rng.uniform(13, 20), rng.uniform(0, 1, size=2).tolist()
    if pattern == 0:
        return np.zeros((_CANVAS, _CANVAS), bool)
    cos, sin = math.cos(angle) / period, math.sin(angle) / period
    along = (cos * _X + sin * _Y + phase) % 1
    if pattern == 1:
        return along < 0.42
    across = (cos * _Y - sin * _X + phase2) % 1
    if pattern == 2:
        return (along - 0.5) ** 2 + (across - 0.5) ** 2 < 0.08
    return (along < 0.5) ^ (across < 0.5)
