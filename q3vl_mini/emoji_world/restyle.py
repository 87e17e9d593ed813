"""Drawings as another house would draw them: the vector shapes of a style with other fills, shading, outlines, details.

What differs between the emoji of two houses is not blur or noise but design: the palette, whether shapes are flat or
shaded, whether they have outlines, how much detail there is. All of it can be changed in the SVG, shape by shape,
before it is drawn; augment.py changes the picture afterwards.
"""

import colorsys
import random
import re

FILL = re.compile(r'fill="(#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})|url\(#[^)]+\))"')
COLOUR = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")
SHAPE = re.compile(r"<(path|circle|ellipse|rect)\b([^<>]*?)(/?)>")
GRADIENT = re.compile(r'<(linear|radial)Gradient\b[^>]*?id="([^"]+)"[^>]*?(?:/>|>(.*?)</\1Gradient>)', re.S)


def rgb(colour: str) -> tuple[float, float, float]:
    """#rgb or #rrggbb as three numbers from 0 to 1."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:4])
    return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))


def hexed(red: float, green: float, blue: float) -> str:
    return "#" + "".join(f"{round(255 * min(max(x, 0.0), 1.0)):02x}" for x in (red, green, blue))


def shaded(colour: str, by: float) -> str:
    """The colour darker (by < 0) or lighter (by > 0), by a share of the way to black or white."""
    goal = 1.0 if by > 0 else 0.0
    return hexed(*(x + (goal - x) * abs(by) for x in rgb(colour)))


class Palette:
    """A house's colours: each colour of a drawing becomes another, the same one everywhere in the drawing."""

    def __init__(self, r: random.Random):
        self.r, self.known = r, {}
        self.turn = r.gauss(0, 0.02)  # of the hue, of all colours alike
        self.vivid = r.uniform(-0.25, 0.25)
        self.light = r.uniform(-0.12, 0.12)
        self.levels = r.choice((0, 0, 3, 4, 5))  # a house with few shades

    def __call__(self, colour: str) -> str:
        colour = colour.lower()
        if colour not in self.known:
            hue, light, vivid = colorsys.rgb_to_hls(*rgb(colour))
            hue += self.turn + self.r.gauss(0, 0.02)
            light += self.light + self.r.gauss(0, 0.05)
            vivid *= 1 + self.vivid + self.r.gauss(0, 0.1)
            if self.levels:
                light = round(light * self.levels) / self.levels * 0.7 + light * 0.3
            light, vivid = min(max(light, 0.0), 1.0), min(max(vivid, 0.0), 1.0)
            self.known[colour] = hexed(*colorsys.hls_to_rgb(hue % 1, light, vivid))
        return self.known[colour]


def flattened(body: str, r: random.Random) -> str:
    """Gradients as one colour: that of one of their stops."""
    flat = {}
    for _, name, stops in GRADIENT.findall(body):
        colours = COLOUR.findall(stops or "")
        if colours and "stop-opacity" not in stops:
            flat[name] = r.choice(colours)
    return FILL.sub(lambda m: f'fill="{flat.get(m[1][5:-1], m[1])}"' if m[1].startswith("url") else m[0], body)


def restyled(body: str, box: float, seed: int) -> str:
    """An SVG body as by another house; the same for the same seed.

    box: the side of its view box, in its units. Shapes keep their places; their number falls by a few small ones.
    """
    r = random.Random(seed)
    if r.random() < 0.5:
        body = flattened(body, r)
    palette = Palette(r)
    body = COLOUR.sub(lambda m: palette(m[0]), body)
    outlined, gradients = r.random() < 0.35, r.random() < 0.35
    ink, width = r.choice((None, "#33333a", "#000000", "#5a4632")), box * r.uniform(0.008, 0.03)
    up, bend, omit = r.uniform(0.05, 0.35), 0.012 * box, r.choice((0, 0, 0.06, 0.12))
    defs, number = [], 0
    inside = [m.span() for m in re.finditer(r"<(defs|clipPath|mask)\b.*?</\1>", body, re.S)]

    def shape(m: re.Match) -> str:
        nonlocal number
        kind, attributes, closed = m.groups()
        if any(a <= m.start() < b for a, b in inside):  # what cuts out or is drawn elsewhere stays
            return m[0]
        number += 1
        if number > 2 and r.random() < omit and len(attributes) < 200:
            return "" if closed else m[0]
        fill = FILL.search(attributes)
        if fill and fill[1].startswith("#"):
            colour = fill[1]
            if outlined and "stroke" not in attributes:
                line = ink or shaded(colour, -0.45)
                attributes += f' stroke="{line}" stroke-width="{width:.3f}" stroke-linejoin="round"'
            if gradients:
                name = f"house{len(defs)}"
                defs.append(
                    f'<linearGradient id="{name}" x2="0" y2="1"><stop stop-color="{shaded(colour, up)}"/>'
                    f'<stop offset="1" stop-color="{shaded(colour, -up)}"/></linearGradient>'
                )
                attributes = attributes.replace(fill[0], f'fill="url(#{name})"', 1)
        if "transform" not in attributes:
            x, y = r.gauss(0, bend), r.gauss(0, bend)
            attributes += f' transform="translate({x:.2f} {y:.2f})"'
        return f"<{kind}{attributes}{closed}>"

    body = SHAPE.sub(shape, body)
    return f"<defs>{''.join(defs)}</defs>{body}" if defs else body
