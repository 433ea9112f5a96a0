"""The Pareto front of a search as a picture: SVG, written by hand, so that nothing is needed."""

import math
from collections.abc import Callable

from gptopt.export.search import Found

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 50, 60
_INK, _OURS, _FOUND = "#1c2b33", "#0b7a75", "#d1495b"
_LEAST = 1e-9  # nats


def front_svg(found: Found, title: str) -> str:
    """Bytes of the weights against divergence: what was foretold, what was built, what was chosen.

    Each mix that was built stands where its measured divergence is, over its place on the front.
    """
    front = found.front
    sizes = [mix.bytes / 1e6 for mix in front]
    built = [(sizes[each.place], each.quality.mean_kl) for each in found.measured]
    heights = [max(value, _LEAST) for value in [*(mix.divergence for mix in front)]]
    logs = [math.log10(max(value, _LEAST)) for value in [*heights, *(kl for _, kl in built)]]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    least, most = min(sizes), max(max(sizes), min(sizes) * 1.001)

    def x(size: float) -> float:
        return _LEFT + (size - least) / (most - least) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        part = (math.log10(max(value, _LEAST)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(sizes, heights, strict=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{title}</text>',
        *_axes(x, y, (least, most), range(low, high + 1)),
        f'<polyline points="{line}" fill="none" stroke="{_OURS}" stroke-width="2"/>',
        *(
            f'<circle cx="{x(size):.1f}" cy="{y(kl):.1f}" r="4" fill="none" stroke="{_FOUND}" '
            f'stroke-width="1.5"/>'
            for size, kl in built
        ),
        *(
            f'<circle cx="{x(sizes[each.place]):.1f}" cy="{y(each.quality.mean_kl):.1f}" r="5" '
            f'fill="{_FOUND}"/>'
            for each in found.measured
            if each.place == found.place
        ),
        f'<text x="{_WIDTH - _RIGHT}" y="40" text-anchor="end">line: foretold; rings: measured; '
        f"full: chosen for {found.budget}</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axes(
    x: Callable[[float], float], y: Callable[[float], float],
    sizes: tuple[float, float], decades: range,
) -> list[str]:  # fmt: skip
    left, right = _LEFT, _WIDTH - _RIGHT
    parts = []
    for decade in decades:
        height = y(10.0**decade)
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="#dde3e6"/>'
            f'<text x="{left - 8}" y="{height + 4:.1f}" text-anchor="end">1e{decade}</text>'
        )
    for part in range(5):
        size = sizes[0] + (sizes[1] - sizes[0]) * part / 4
        parts.append(
            f'<text x="{x(size):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">'
            f"{size:.4g}</text>"
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        *parts,
        f'<text x="{(left + right) / 2}" y="{_HEIGHT - 14}" text-anchor="middle">'
        f"quantised weights, MB</text>",
        f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        f"KL divergence, nats per token</text>",
    ]
