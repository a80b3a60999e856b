"""Layout of a treemap: rectangles of given areas, as near to squares as the squarified algorithm makes them.

Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000).
"""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, width, height."""


def squarified(sizes: Sequence[float], box: Box) -> list[Box]:
    """Divides a box into rectangles, one for each size, with areas in their proportions.

    Args:
        sizes: Positive numbers; the result is nicest if they fall.
        box: The box to divide.

    Example:
        >>> squarified([3.0, 1.0], (0.0, 0.0, 4.0, 1.0))
        [(0.0, 0.0, 3.0, 1.0), (3.0, 0.0, 1.0, 1.0)]
    """
    left, top, width, height = box
    total = sum(sizes)
    areas = [size / total * width * height for size in sizes] if total else []
    result: list[Box] = []
    while areas:
        side = min(width, height)
        count = 1
        while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(areas[:count], side):
            count += 1
        row, areas = areas[:count], areas[count:]
        thickness = sum(row) / side
        along = 0.0
        for area in row:
            length = area / thickness
            result.append(
                (left, top + along, thickness, length) if width >= height else (left + along, top, length, thickness)
            )
            along += length
        if width >= height:
            left, width = left + thickness, width - thickness
        else:
            top, height = top + thickness, height - thickness
    return result


def _worst(row: Sequence[float], side: float) -> float:
    """Largest ratio of the sides in a row of rectangles along a side."""
    total = sum(row)
    return max(max(side**2 * area / total**2, total**2 / (side**2 * area)) for area in row)
