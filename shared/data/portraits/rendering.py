# ruff: noqa: N803, N806
"""Portraits drawn: numbers in, small pictures of faces out; every shape is an implicit curve with soft edges.

Shapes: N portraits, 3 channels, H = W = size. Coordinates run from -1 to 1 over the image, x to the right, y down;
the head has coordinates u, v of its own (moved, turned and zoomed). Colours are linear mixes of sRGB values in [0, 1].
"""

import numpy as np
from numpy.typing import NDArray

from shared.data.portraits.traits import Array, Portraits


class _Canvas:
    """The picture so far, the coordinates in the head's frame, and the two ways to put paint on it."""

    def __init__(self, portraits: Portraits, size: int) -> None:
        axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
        self.y_NHW, self.x_NHW = (
            np.broadcast_to(part, (1, size, size)) for part in np.meshgrid(axis, axis, indexing="ij")
        )
        # Edges are a little softer than one pixel, as a lens makes them.
        self.edge = 1.2 * 2 / size
        cos, sin = np.cos(_col(portraits.roll)), np.sin(_col(portraits.roll))
        x, y = self.x_NHW - _col(portraits.x), self.y_NHW - _col(portraits.y)
        self.u_NHW = (cos * x + sin * y) / _col(portraits.zoom)
        self.v_NHW = (cos * y - sin * x) / _col(portraits.zoom)
        self.image_N3HW = np.empty((len(portraits), 3, size, size), np.float32)

    def cover(self, distance_NHW: Array) -> Array:
        """Share of each pixel inside a shape, from the signed distance to its edge (inside negative)."""
        covered: Array = np.clip(0.5 - distance_NHW / self.edge, 0, 1)
        return covered

    def ellipse(self, u: Array | float, v: Array | float, a: Array | float, b: Array | float) -> Array:
        """Coverage of an ellipse with centre (u, v) and half axes a, b (head coordinates)."""
        return self.cover(_ellipse_distance(self.u_NHW - u, self.v_NHW - v, a, b))

    def blob(self, u: Array | float, v: Array | float, a: Array | float, b: Array | float) -> Array:
        """A soft spot: exp of minus half the squared distance in units of a, b."""
        spot: Array = np.exp(-0.5 * (((self.u_NHW - u) / a) ** 2 + ((self.v_NHW - v) / b) ** 2))
        return spot

    def paint(self, cover_NHW: Array, colour: Array, shade_NHW: Array | float = 1.0) -> None:
        """Lay `colour` (N, 3), times `shade`, over the picture where `cover` is 1."""
        for channel in range(3):
            plane = self.image_N3HW[:, channel]
            plane += cover_NHW * (_col(colour[:, channel]) * shade_NHW - plane)

    def darken(self, amount_NHW: Array) -> None:
        """Multiply by 1 - amount; a negative amount lightens."""
        self.image_N3HW *= 1 - amount_NHW[:, None]


def render(portraits: Portraits, size: int) -> NDArray[np.uint8]:
    """Draw the portraits.

    Args:
        portraits: N of them.
        size: height and width in pixels.

    Returns:
        uint8 (N, 3, size, size).
    """
    canvas = _Canvas(portraits, size)
    lit_NHW = _light(canvas, portraits)
    _draw_backdrop(canvas, portraits)
    _draw_body(canvas, portraits, lit_NHW)
    head_NHW = _draw_head(canvas, portraits, lit_NHW)
    _draw_nose(canvas, portraits)
    _draw_mouth(canvas, portraits, head_NHW)
    for side in (-1.0, 1.0):
        _draw_eye(canvas, portraits, side)
    _draw_hair(canvas, portraits, lit_NHW)
    image_N3HW = canvas.image_N3HW * portraits.tint[:, :, None, None]
    pixels: NDArray[np.uint8] = np.rint(np.clip(image_N3HW, 0, 1) * 255).astype(np.uint8)
    return pixels


def _col(value_N: Array) -> Array:
    return value_N[:, None, None]


def _ellipse_distance(u: Array, v: Array, a: Array | float, b: Array | float) -> Array:
    # First-order distance k (k - 1) / |gradient|, exact on the edge, where it matters for coverage.
    p, q = u / a, v / b
    k = np.sqrt(p * p + q * q) + 1e-6
    distance: Array = k * (k - 1) / (np.sqrt((p / a) ** 2 + (q / b) ** 2) + 1e-6)
    return distance


def _light(canvas: _Canvas, p: Portraits) -> Array:
    """Brightness of a ball in the place of the head: ambient plus Lambert's cosine."""
    u = canvas.u_NHW / (1.25 * _col(p.head_width))
    v = canvas.v_NHW / (1.25 * _col(p.head_height))
    w = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
    l_x, l_y = _col(p.light_x), _col(p.light_y)
    cosine = (u * l_x + v * l_y + w) / np.sqrt(l_x**2 + l_y**2 + 1)
    ambient = _col(p.ambient)
    lit_NHW: Array = ambient + (1.12 - ambient) * np.clip(cosine, 0, 1)
    return lit_NHW


def _draw_backdrop(canvas: _Canvas, p: Portraits) -> None:
    angle = _col(p.backdrop_angle)
    blend = np.clip(0.5 + 0.45 * (canvas.x_NHW * np.cos(angle) + canvas.y_NHW * np.sin(angle)), 0, 1)
    for channel in range(3):
        start, end = _col(p.backdrop[:, channel]), _col(p.backdrop_end[:, channel])
        canvas.image_N3HW[:, channel] = start + blend * (end - start)


def _draw_body(canvas: _Canvas, p: Portraits, lit_NHW: Array) -> None:
    """Hair behind the shoulders, shoulders, neck, ears."""
    width, height = _col(p.head_width), _col(p.head_height)
    # Length 0 ends at the ears and hides behind the head; 1 falls to the shoulders.
    length = _col(p.hair_length)
    bottom = -0.1 + 1.15 * length
    half = (bottom + 1.13 * height) / 2
    across = width * (1.02 + 0.26 * np.minimum(2 * length, 1))
    # Round above, square below, where long hair hangs.
    dome = _ellipse_distance(canvas.u_NHW, canvas.v_NHW - bottom + half, across, half)
    fourth = ((canvas.u_NHW / across) ** 4 + ((canvas.v_NHW - bottom + half) / half) ** 4) ** 0.25
    hang = np.where(canvas.v_NHW > bottom - half, (fourth - 1) * across, dome)
    canvas.paint(canvas.cover(hang), p.hair, 0.75 * lit_NHW)
    canvas.paint(canvas.ellipse(0.0, 1.32, 0.95, 0.46), p.clothes, 0.6 + 0.4 * lit_NHW)
    neck = canvas.cover(np.maximum(np.abs(canvas.u_NHW) - 0.52 * width, np.abs(canvas.v_NHW - 0.7) - 0.3))
    canvas.paint(neck, p.skin, 0.78 * lit_NHW)
    for side in (-1.0, 1.0):
        ear = canvas.ellipse(side * width * 1.0 - 0.05 * _col(p.yaw), 0.02, 0.09, 0.17)
        canvas.paint(ear, p.skin, 0.86 * lit_NHW)


def _draw_head(canvas: _Canvas, p: Portraits, lit_NHW: Array) -> Array:
    width, height = _col(p.head_width), _col(p.head_height)
    # A chin: below the centre the head narrows with depth.
    u = canvas.u_NHW * (1 + _col(p.chin) * np.clip(canvas.v_NHW, 0, 1) ** 2)
    head_NHW = canvas.cover(_ellipse_distance(u, canvas.v_NHW, width, height))
    canvas.paint(head_NHW, p.skin, lit_NHW)
    yaw, pitch = _col(p.yaw), _col(p.pitch)
    for side in (-1.0, 1.0):
        blush = canvas.blob(side * 0.33 + 0.12 * yaw, 0.22 + 0.06 * pitch, 0.13, 0.1)
        canvas.paint(0.25 * blush, p.lip)
    # Beard: below a curve from ear to ear, around the mouth.
    rise = canvas.v_NHW - (0.3 + 0.08 * pitch) + 0.9 * np.abs(canvas.u_NHW - 0.1 * yaw) ** 3
    around = 1 - canvas.blob(0.16 * yaw, 0.43 + 0.08 * pitch, 0.12, 0.05)
    canvas.paint(head_NHW * np.clip(rise / 0.12, 0, 1) * around * _col(p.beard), p.hair, 0.9 * lit_NHW)
    return head_NHW


def _draw_nose(canvas: _Canvas, p: Portraits) -> None:
    yaw, pitch = _col(p.yaw), _col(p.pitch)
    tip_u, tip_v = 0.2 * yaw, _col(p.nose_length) + 0.1 * pitch
    width = _col(p.nose_width)
    # The side away from the light is darker, the ridge lighter.
    away = -np.sign(_col(p.light_x) + 1e-6)
    strength = 0.06 + 0.12 * np.abs(_col(p.light_x))
    canvas.darken(strength * canvas.blob(0.15 * yaw + away * 0.8 * width, tip_v - 0.12, 0.5 * width, 0.14))
    canvas.darken(-0.16 * canvas.blob(0.15 * yaw, tip_v - 0.14, 0.035, 0.14))
    canvas.darken(-0.12 * canvas.blob(tip_u, tip_v - 0.02, 0.06, 0.05))
    canvas.darken(0.3 * canvas.blob(tip_u, tip_v + 0.055, width, 0.025))
    for side in (-1.0, 1.0):
        canvas.darken(0.45 * canvas.blob(tip_u + side * 0.62 * width, tip_v + 0.04, 0.03, 0.022))


def _draw_mouth(canvas: _Canvas, p: Portraits, head_NHW: Array) -> None:
    u = canvas.u_NHW - 0.16 * _col(p.yaw)
    width = _col(p.mouth_width) * (1 + 0.18 * _col(p.smile))
    along = np.clip(1 - (u / width) ** 2, 0, 1)
    # Corners rise with a smile; `v` is the height above or below the line between the lips.
    v = canvas.v_NHW - 0.43 - 0.08 * _col(p.pitch) - 0.13 * _col(p.smile) * (along - 0.6)
    gap, lip = 0.11 * _col(p.mouth_open) * along, _col(p.lip_height) * along**0.6
    inside = canvas.cover(np.abs(u) - width) * head_NHW
    canvas.paint(inside * canvas.cover(np.maximum(-v - 0.75 * lip - gap / 2, v - lip - gap / 2)), p.lip)
    canvas.darken(0.55 * inside * canvas.cover(np.abs(v) - 0.012))
    opening = inside * canvas.cover(np.abs(v) - gap / 2 + 0.25 * canvas.edge)
    dark, teeth = np.full_like(p.lip, 0.2) * p.lip, np.full_like(p.lip, 0.92)
    canvas.paint(opening * (_col(p.mouth_open) > 0), dark)
    canvas.paint(opening * canvas.cover(v + gap * 0.05) * (_col(p.mouth_open) > 0), teeth)
    canvas.darken(0.12 * canvas.blob(0.16 * _col(p.yaw), 0.56 + 0.08 * _col(p.pitch), 0.12, 0.025))


def _draw_eye(canvas: _Canvas, p: Portraits, side: float) -> None:
    yaw = _col(p.yaw)
    # The eye on the far side of a turned head is nearer the edge and narrower.
    width = _col(p.eye_size) * (1 - 0.22 * np.clip(side * yaw, 0, 1))
    u = canvas.u_NHW - side * _col(p.eye_gap) * (1 - 0.12 * np.clip(side * yaw, 0, 1)) - 0.13 * yaw
    v = canvas.v_NHW + 0.1 - 0.08 * _col(p.pitch)
    canvas.darken(0.2 * np.exp(-0.5 * ((u / (1.2 * width)) ** 2 + ((v + 0.02) / 0.09) ** 2)))
    arc = np.clip(1 - (u / width) ** 2, 0, 1)
    upper, lower = 0.62 * width * _col(p.eye_open) * arc, 0.36 * width * arc
    eye = canvas.cover(np.maximum(-v - upper, v - lower)) * canvas.cover(np.abs(u) - width)
    canvas.paint(eye, np.full_like(p.skin, 0.93), 0.75 + 0.25 * _col(p.ambient))
    at_u, radius = u - 0.35 * width * _col(p.gaze), 0.5 * width
    r = np.sqrt(at_u**2 + (v + 0.06 * width) ** 2)
    canvas.paint(eye * canvas.cover(r - radius), p.iris)
    canvas.paint(eye * canvas.cover(r - 0.5 * radius), np.full_like(p.skin, 0.03))
    glint = np.sqrt((at_u - 0.2 * width) ** 2 + (v + 0.25 * width) ** 2)
    canvas.paint(0.9 * eye * canvas.cover(glint - 0.02), np.full_like(p.skin, 1.0))
    canvas.darken(0.75 * canvas.cover(np.abs(v + upper) - 0.016) * canvas.cover(np.abs(u) - 1.08 * width))
    # The brow: a bow that thins out to the temple and rises with a smile.
    out = side * u / width
    height = v + _col(p.brow_height) + 0.02 * _col(p.smile) - 0.05 * out**2 - 0.012 * out
    brow = canvas.cover(np.abs(height) - _col(p.brow_width) * (1.15 - 0.35 * out)) * canvas.cover(
        np.abs(u) - 1.3 * width
    )
    canvas.paint(0.85 * brow, p.hair, 0.7)
    ring = canvas.cover(np.abs(np.sqrt(u**2 + (v * 1.1) ** 2) - 1.42 * width) - 0.016)
    bridge = canvas.cover(np.abs(v + 0.02) - 0.016) * canvas.cover(np.abs(side * u + 1.65 * width) - 0.25 * width)
    canvas.darken(0.85 * np.maximum(ring, bridge) * _col(p.glasses))


def _draw_hair(canvas: _Canvas, p: Portraits, lit_NHW: Array) -> None:
    """The hair in front: inside a cap around the skull, above the hairline, which falls at the temples."""
    width, height = _col(p.head_width), _col(p.head_height)
    cap = _ellipse_distance(canvas.u_NHW, canvas.v_NHW + 0.05, 1.1 * width, 1.1 * height)
    across = (canvas.u_NHW - 0.06 * _col(p.yaw) - _col(p.parting)) / width
    line = _col(p.hairline) + 0.06 * _col(p.pitch) + 0.5 * across**2 + 0.5 * across**4
    hair = canvas.cover(np.maximum(cap, canvas.v_NHW - np.minimum(line, -0.06 + 0.8 * _col(p.hair_length))))
    sheen = 1 + 0.2 * np.exp(-0.5 * ((cap + 0.14) / 0.06) ** 2) * np.clip(1 - 1.3 * canvas.v_NHW, 0, 1)
    canvas.paint(hair, p.hair, lit_NHW * sheen)
