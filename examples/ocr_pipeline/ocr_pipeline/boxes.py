"""From the detection model's map of probabilities to rotated boxes around lines of text.

Source: "Real-time Scene Text Detection with Differentiable Binarization" (Liao et al., 2020) and
PaddleOCR ``ppocr/postprocess/db_postprocess.py`` (Apache-2.0): what is over a threshold hangs
together in areas; each area's smallest rectangle is kept if it is likely enough, and widened by
what the training shrank it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

THRESHOLD = 0.3
BOX_THRESHOLD = 0.6
UNCLIP_RATIO = 1.6
SIDE_MIN_PX = 3.0
BOXES_MAX = 200


def find_boxes(probability: Array, *, height: int, width: int) -> Array:
    """float32 ``(n, 4, 2)``: corners as x, y in an image of ``height`` by ``width``.

    Corners go round from the top left one; boxes stand in reading order.
    probability: ``(h, w)``, the map that the detection model made of that image.
    """
    rows, columns = probability.shape
    scale = np.array([width / columns, height / rows])
    boxes: list[Array] = []
    for points in areas(probability > THRESHOLD):
        rectangle = smallest_rectangle(points)
        if _short_side(rectangle) < SIDE_MIN_PX or _score(probability, rectangle) < BOX_THRESHOLD:
            continue
        boxes.append(_clockwise(widened(rectangle)) * scale)
    limit = np.array([width, height])
    kept = [np.clip(box, 0, limit) for box in boxes[:BOXES_MAX]]
    ordered = sorted(kept, key=lambda box: (round(box[:, 1].mean() / 10), box[:, 0].mean()))
    return np.array(ordered, np.float32).reshape(-1, 4, 2)


def areas(mask: Array) -> list[Array]:
    """The areas of a mask that hang together, corners included, each as its points ``(n, 2)``.

    Of an area's points only the two ends of each run in a row are given: its outline.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    parent: list[int] = []
    ends: list[tuple[int, int, int]] = []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above: list[int] = []
    for y in range(mask.shape[0]):
        starts, stops = np.flatnonzero(edges[y] == 1), np.flatnonzero(edges[y] == -1) - 1
        here: list[int] = []
        first = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            run = len(parent)
            parent.append(run)
            ends.append((y, start, stop))
            here.append(run)
            while first < len(above) and ends[above[first]][2] < start - 1:
                first += 1
            for other in itertools.islice(above, first, None):
                if ends[other][1] > stop + 1:
                    break
                parent[root(run)] = root(other)
        above = here
    grouped: dict[int, list[tuple[int, int]]] = {}
    for run, (y, start, stop) in enumerate(ends):
        grouped.setdefault(root(run), []).extend(((start, y), (stop, y)))
    return [np.array(points, np.float64) for points in grouped.values()]


def smallest_rectangle(points: Array) -> Array:
    """The corners ``(4, 2)`` of the rectangle of least area around ``points``.

    One of its sides lies on a side of the points' convex hull, so only those are tried.
    """
    hull = _convex_hull(points)
    sides = np.roll(hull, -1, axis=0) - hull
    angles = np.unique(np.arctan2(sides[:, 1], sides[:, 0]) % (np.pi / 2)) if len(hull) > 1 else [0]
    best: tuple[float, Array] | None = None
    for angle in angles:
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        turned = hull @ axes.T
        low, high = turned.min(axis=0), turned.max(axis=0)
        area = float(np.prod(high - low))
        if best is None or area < best[0]:
            corners = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
            best = (area, corners @ axes)
    assert best is not None
    return best[1]


def widened(rectangle: Array) -> Array:
    """The rectangle with every side moved out by area x ratio / perimeter."""
    along, down = rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]
    width, height = float(np.linalg.norm(along)), float(np.linalg.norm(down))
    by = width * height * UNCLIP_RATIO / (2 * (width + height))
    along, down = along / width * by, down / height * by
    moved: Array = rectangle + np.array([-along - down, along - down, along + down, down - along])
    return moved


def _convex_hull(points: Array) -> Array:
    """Corners of the hull in turn (Andrew's monotone chain)."""
    ordered = np.unique(points, axis=0)
    if len(ordered) < 3:
        return ordered

    def half(run: Array) -> list[Array]:
        kept: list[Array] = []
        for point in run:
            while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return np.array([*half(ordered), *half(ordered[::-1])])


def _turn(a: Array, b: Array, c: Array) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def _short_side(rectangle: Array) -> float:
    return float(
        min(
            np.linalg.norm(rectangle[1] - rectangle[0]),
            np.linalg.norm(rectangle[3] - rectangle[0]),
        )
    )


def _score(probability: Array, rectangle: Array) -> float:
    """The mean probability inside the rectangle."""
    low = np.maximum(np.floor(rectangle.min(axis=0)), 0).astype(int)
    high = np.ceil(rectangle.max(axis=0)).astype(int) + 1
    window = probability[low[1] : high[1], low[0] : high[0]]
    ys, xs = np.mgrid[low[1] : low[1] + window.shape[0], low[0] : low[0] + window.shape[1]]
    along, down = rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]
    from_corner = np.stack([xs, ys], axis=-1) - rectangle[0]
    inside = np.ones(window.shape, bool)
    for side in (along, down):
        share = from_corner @ side / float(side @ side)
        inside &= (share >= -1e-6) & (share <= 1 + 1e-6)
    return float(window[inside].mean()) if inside.any() else 0.0


def _clockwise(rectangle: Array) -> Array:
    """From the corner that is top left when the text is read from left to right."""
    by_x = rectangle[np.argsort(rectangle[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.array([left[0], right[0], right[1], left[1]])
