"""Augmentation of sprites towards styles that were never drawn: warp, recolour, outline, flatten.

Three styles teach a vision tower three styles. To carry over to unseen ones it must see variety that
nobody drew: other proportions (affine, smooth warp), other colours (matrix, permutation, grey), other
rendering (outline, posterised, flat palette, blur). Everything works on whole batches in torch.
"""

import math

import torch
import torch.nn.functional as F

IDENTITY_GRAY = (0.299, 0.587, 0.114)


def _pick(n: int, p: float, g: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=g) < p


def _uniform(shape, low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=g) * (high - low) + low


def warp(
    rgba: torch.Tensor, size: int, strength: float, g: torch.Generator, flip: torch.Tensor, shrunk: float = 0.25
) -> torch.Tensor:
    """Rotate, scale, shear, shift, flip where `flip` (B,) says so, and bend smoothly; (B, 4, size, size).

    A share `shrunk` (at full strength) becomes about half as large.
    """
    b = len(rgba)
    angle = _uniform(b, -1, 1, g) * strength * math.radians(25)
    size_of = _uniform(b, 1 - 0.3 * strength, 1 + 0.15 * strength, g)
    small = _pick(b, shrunk * strength, g)
    size_of = torch.where(small, _uniform(b, 0.4, 0.7, g), size_of)
    scale = 1 / size_of
    stretch = _uniform(b, 1 - 0.2 * strength, 1 + 0.2 * strength, g)
    shear = _uniform(b, -0.2, 0.2, g) * strength
    room = (1 - size_of).clamp(min=0.12 * strength)  # shift as far as the drawing stays in the picture
    cos, sin = angle.cos() * scale, angle.sin() * scale
    sign = torch.where(flip, -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([cos * stretch * sign, -sin + shear, _uniform(b, -1, 1, g) * room * scale], -1),
            torch.stack([sin * sign, cos / stretch, _uniform(b, -1, 1, g) * room * scale], -1),
        ],
        1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, [b, 4, size, size], align_corners=False)
    bend = F.interpolate(torch.randn(b, 2, 4, 4, generator=g), size=(size, size), mode="bicubic", align_corners=True)
    amount = 0.05 * strength * torch.rand(b, 1, 1, 1, generator=g)
    grid = grid + (bend * amount).permute(0, 2, 3, 1)
    return F.grid_sample(rgba, grid, align_corners=False)


def recolour(rgba: torch.Tensor, strength: float, g: torch.Generator) -> torch.Tensor:
    """Change the colours inside the drawing (premultiplied RGBA in [0, 1]); alpha stays."""
    b, alpha = len(rgba), rgba[:, 3:]
    rgb = rgba[:, :3] / alpha.clamp(min=1e-3)
    # one random 3x3 matrix near the identity covers hue, saturation and channel mixing
    mix = torch.eye(3) + torch.randn(b, 3, 3, generator=g) * 0.12 * strength
    permute = _pick(b, 0.12 * strength, g)
    order = torch.argsort(torch.rand(b, 3, generator=g), -1)
    mix = torch.where(permute[:, None, None], torch.eye(3)[order], mix)
    grey = torch.tensor(IDENTITY_GRAY).expand(3, 3)
    mix = torch.where(_pick(b, 0.12 * strength, g)[:, None, None], grey, mix)
    rgb = torch.einsum("bij,bjhw->bihw", mix, rgb)
    contrast = _uniform((b, 1, 1, 1), 1 - 0.4 * strength, 1 + 0.4 * strength, g)
    rgb = ((rgb - 0.5) * contrast + 0.5 + _uniform((b, 1, 1, 1), -0.2, 0.2, g) * strength).clamp(0, 1)
    gamma = torch.exp(_uniform((b, 1, 1, 1), -0.5, 0.5, g) * strength)
    rgb = rgb.clamp(1e-3, 1) ** gamma
    luminance = (rgb * torch.tensor(IDENTITY_GRAY)[None, :, None, None]).sum(1, keepdim=True)
    # flat palette: three to five levels of luminance, each mapped to a random colour blended with its own
    flat = _pick(b, 0.1 * strength, g)
    if flat.any():
        levels = torch.randint(3, 6, (b, 1, 1, 1), generator=g)[flat]
        code = (luminance[flat] * levels).floor().clamp(max=4).long()[:, 0]  # (F, H, W)
        palette = torch.rand(int(flat.sum()), 5, 3, generator=g).sort(dim=1).values
        colour = palette[torch.arange(len(code))[:, None, None], code].permute(0, 3, 1, 2)
        rgb[flat] = 0.6 * colour + 0.4 * rgb[flat]
    posterise = _pick(b, 0.1 * strength, g)
    rgb[posterise] = (rgb[posterise] * 4).round() / 4
    invert = _pick(b, 0.04 * strength, g)
    rgb[invert] = 1 - rgb[invert]
    return torch.cat([rgb * alpha, alpha], 1)


def outline(rgba: torch.Tensor) -> torch.Tensor:
    """Dark lines where luminance or alpha change, on a pale fill: a line drawing of the sprite."""
    grey = (rgba[:, :3] * torch.tensor(IDENTITY_GRAY)[None, :, None, None]).sum(1, keepdim=True)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([kernel, kernel.T])[:, None]
    edge = sum(
        F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernels).pow(2).sum(1, keepdim=True)
        for x in (grey, rgba[:, 3:])
    ).sqrt()
    line = (edge * 0.8).clamp(0, 1)
    alpha = torch.maximum(rgba[:, 3:], line)
    return torch.cat([(alpha * 0.95 * (1 - line)).expand(-1, 3, -1, -1), alpha], 1)


def redraw(
    rgba: torch.Tensor,
    size: int,
    strength: float,
    g: torch.Generator,
    flip: torch.Tensor,
    keep_colour: torch.Tensor,
    shrunk: float = 0.25,
) -> torch.Tensor:
    """Drawings as by another hand: bent, recoloured, some as line drawings. Float (B, 4, h, w) in and out.

    flip: bool (B,), which to mirror. keep_colour: bool (B,), whose colours are a label.
    """
    x = warp(rgba, size, strength, g, flip, shrunk)
    x = torch.where(keep_colour[:, None, None, None], x, recolour(x, strength, g))
    lines = _pick(len(x), 0.08 * strength, g) & ~keep_colour
    if lines.any():
        x[lines] = outline(x[lines])
    return x


def pattern(b: int, size: int, g: torch.Generator) -> torch.Tensor:
    """Stripes at any angle, or dots: 1 where they are, (B, 1, size, size)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    period, shift = _uniform((b, 1, 1), 8, 24, g), _uniform((2, b, 1, 1), 0, 24, g)
    angle, thick = _uniform((b, 1, 1), 0, math.pi, g), _uniform((b, 1, 1), 0.15, 0.5, g)
    across = x * angle.cos() + y * angle.sin() + shift[0]
    stripes = across % period < thick * period
    dots = ((x + shift[0]) % period / period - 0.5) ** 2 + ((y + shift[1]) % period / period - 0.5) ** 2 < thick**2 / 2
    return torch.where(_pick(b, 0.5, g)[:, None, None], stripes, dots)[:, None].float()


def backgrounds(b: int, size: int, strength: float, g: torch.Generator) -> torch.Tensor:
    """Plain, graded, mottled, striped or dotted backgrounds, (B, 3, size, size) in [0, 1]; white and grey are common.

    Scenes have all of them, and a tower that was trained without stripes and dots hardly knows a thing in front of
    them (docs/pretraining.md).
    """
    plain = torch.rand(b, 3, 1, 1, generator=g)
    common = _pick(b, 0.4, g)
    plain[common] = torch.rand(int(common.sum()), 1, 1, 1, generator=g).sqrt().expand(-1, 3, 1, 1)
    graded = F.interpolate(torch.rand(b, 3, 2, 2, generator=g), size=(size, size), mode="bilinear", align_corners=True)
    mottled = F.interpolate(torch.rand(b, 3, 6, 6, generator=g), size=(size, size), mode="bilinear", align_corners=True)
    kind = torch.rand(b, 1, 1, 1, generator=g)
    busy = torch.where(kind < 0.15 * strength, mottled, graded)
    out = torch.where(kind < 0.4 * strength, plain * 0.5 + busy * 0.5, plain.expand(-1, -1, size, size))
    tone = (plain + _uniform((b, 3, 1, 1), -0.1, 0.1, g) + _uniform((b, 1, 1, 1), -0.25, 0.25, g)).clamp(0, 1)
    shown = pattern(b, size, g) * _pick(b, 0.4 * strength, g)[:, None, None, None]
    return torch.where(shown > 0, tone, out)


def augment(
    rgba: torch.Tensor,
    size: int,
    strength: float,
    g: torch.Generator,
    flippable: torch.Tensor | None = None,
    keep_colour: torch.Tensor | None = None,
) -> torch.Tensor:
    """Augmented pictures of sprites.

    rgba: premultiplied uint8 (B, h, w, 4). strength: 0 (none) to 1 (full). flippable: bool (B,), which
    drawings mean the same when mirrored. keep_colour: bool (B,), whose colours are a label. Returns float
    (B, 3, size, size) in [0, 1].
    """
    x = rgba.permute(0, 3, 1, 2).float() / 255
    b = len(x)
    mirrored = _pick(b, 0.3, g)
    flip = mirrored & flippable if flippable is not None else torch.zeros(b, dtype=torch.bool)
    kept = torch.zeros(b, dtype=torch.bool) if keep_colour is None else keep_colour
    x = redraw(x, size, strength, g, flip, kept)
    x = x[:, :3] + (1 - x[:, 3:]) * backgrounds(b, size, strength, g)
    blurred = _pick(b, 0.2 * strength, g)
    if blurred.any():
        small = F.interpolate(x[blurred], scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True)
        x[blurred] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    noise = torch.randn(x.shape, generator=g) * _uniform((b, 1, 1, 1), 0, 0.04, g) * strength
    return (x + noise).clamp(0, 1)
