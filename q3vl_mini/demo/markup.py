"""What the page shows as HTML. Every word that comes from an item, a file or an error is escaped here.

gr.HTML takes a value as it is; its {{...}} templates would not do, since what they insert is read as a template again.
"""

import base64
from collections.abc import Container, Iterable, Sequence
from html import escape

from .collections import Collection
from .engine import Answer, Comparison, Map, PairScore, Result
from .items import Item, thumbnail

WIDTH, HEIGHT, MARK = 1000, 680, 32  # of the map and of its marks, in the map's own units
TOLD = 10  # files that were left out
STEPS = {
    "collate": "prepare the query",
    "embed": "embed it",
    "search": "search",
    "rescore": "rescore",
    "rerank": "rerank",
}


def status(text: str, bad: bool = False) -> str:
    """One line that screen readers announce."""
    return f'<p class="q3-status{" q3-bad" if bad else ""}" role="status">{"⚠ " if bad else ""}{escape(text)}</p>'


def progress(done: int, total: int, text: str) -> str:
    """A bar with its words."""
    bar = f'<progress max="{total}" value="{done}" aria-label="{escape(text)}"></progress>'
    return f'<div class="q3-status" role="status">{bar} {escape(text)}: {done} of {total}</div>'


def cards(results: Sequence[Result], also: Container[str] = (), pick: bool = False) -> str:
    """Results as a numbered list of cards.

    also: ids that a second list has too, which is said. pick: a card is a button, to search for more like it.
    """
    rows = []
    for rank, result in enumerate(results, 1):
        both = '<span class="q3-tag">in both</span>' if result.item.id in also else ""
        rows.append(_card(result.item, _scores(result, rank) + both, rank, pick))
    return _list(rows)


def plain_cards(items: Iterable[Item], pick: bool = False) -> str:
    """Items without scores. pick: as for `cards`."""
    return _list(_card(item, pick=pick) for item in items)


def found(answer: Answer) -> str:
    """What was searched, and how, in a line."""
    settings = answer.settings
    how = f"{settings.model}, {answer.dim} dimensions, {settings.precision}"
    if "rescore" in answer.ms:
        how += ", rescored"
    if "rerank" in answer.ms:
        how += ", reranked"
    return status(f"{len(answer.results)} of {answer.n_items} items in {sum(answer.ms.values()):.0f} ms: {how}.")


def indexed(collection: Collection, files: int, left_out: Sequence[str]) -> str:
    """How an indexing went, with the first files that were left out."""
    line = status(
        f"“{collection.name}” has {len(collection)} items. {files - len(left_out)} of {files} files are in it. "
        "Choose it under “Search in”."
    )
    told = [f"Left out: {problem}" for problem in left_out[:TOLD]]
    if len(left_out) > TOLD:
        told.append(f"and {len(left_out) - TOLD} more files")
    return line + "".join(status(text, bad=True) for text in told)


def picture(item: Item) -> str:
    """The item's picture with its title as alternative text; for a text its first words. A clip stands still for those
    who have asked their system for less motion."""
    content = thumbnail(item)
    if content is None:
        return f'<span class="q3-words">{escape(str(item.instance["text"])[:160])}</span>'
    image = f'<img src="{_data_uri(content)}" alt="{escape(item.title)}">'
    if item.kind != "clip":
        return image
    still = f'<source media="(prefers-reduced-motion: reduce)" srcset="{_data_uri(thumbnail(item, still=True))}">'
    return f"<picture>{still}{image}</picture>"


def one_card(item: Item) -> str:
    """An item by itself, large."""
    return f'<div class="q3-one">{_card(item)}</div>'


def _list(rows: Iterable[str]) -> str:
    return f'<ol class="q3-cards">{"".join(f"<li>{row}</li>" for row in rows)}</ol>'


def _card(item: Item, below: str = "", rank: int | None = None, pick: bool = False) -> str:
    number = f'<span class="q3-rank" aria-hidden="true">{rank}</span>' if rank else ""
    content = (
        f'{number}{picture(item)}<span class="q3-title">{escape(item.title)}</span>'
        f'<span class="q3-tag">{item.kind}</span>{below}'
    )
    if not pick:
        return f'<div class="q3-card">{content}</div>'
    return f'<button class="q3-card" data-id="{escape(item.id)}" title="Search for more like this">{content}</button>'


def _scores(result: Result, rank: int) -> str:
    out = _bar("cosine", result.score)
    if result.relevance is not None:
        moved = result.found_at - rank
        arrow = f"▲ up {moved}" if moved > 0 else f"▼ down {-moved}" if moved < 0 else "= same place"
        was = f" (was {result.found_at})" if moved else ""
        out += _bar("reranker", result.relevance) + f'<span class="q3-move">{arrow}{was}</span>'
    return out


def _bar(name: str, share: float) -> str:
    return f'<span class="q3-score">{name} {share:.3f}{_filled_bar(share)}</span>'


def _filled_bar(share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="q3-bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'


def cost(answer: Answer) -> str:
    """Milliseconds by step and bytes by precision, as two small tables with bars."""
    total = sum(answer.ms.values())
    steps = [(STEPS[step], f"{ms:.2f} ms", ms / max(answer.ms.values()), False) for step, ms in answer.ms.items()]
    most = max(answer.bytes_scanned.values())
    sizes = [
        (precision, _bytes(size), size / max(most, 1), precision == answer.settings.precision)
        for precision, size in answer.bytes_scanned.items()
    ]
    if answer.settings.rescore and answer.settings.precision != "float32":
        sizes.append(("kept to rescore by", _bytes(answer.bytes_kept), answer.bytes_kept / max(most, 1), False))
    what = f"Bytes scanned for {answer.n_items} items of {answer.dim} dimensions"
    return _table(f"Time: {total:.0f} ms", steps) + _table(what, sizes)


def _table(title: str, rows: Iterable[tuple[str, str, float, bool]]) -> str:
    lines = "".join(
        f'<tr{" class=q3-used" if used else ""}><th scope="row">{name}{" ← in use" if used else ""}</th>'
        f'<td>{value}</td><td aria-hidden="true">{_filled_bar(share)}</td></tr>'
        for name, value, share, used in rows
    )
    return f'<table class="q3-table"><caption>{title}</caption>{lines}</table>'


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1024 else f"{n / 1024:.1f} kB" if n < 1024**2 else f"{n / 1024**2:.1f} MB"


def comparison(compared: Comparison) -> str:
    """What two answers have in common, in a sentence."""
    left, right = compared.left.results, compared.right.results
    firsts = {side[0].item.id for side in (left, right) if side}
    return status(
        f"{len(compared.shared)} of {len(left)} results are in both; the first result is "
        f"{'the same' if len(firsts) == 1 else 'another one'}."
    )


def pair(score: PairScore) -> str:
    """The scores of a pair, each with what it means."""
    rows = [("cosine of the two embeddings", f"{score.cosine:.3f}", max(score.cosine, 0.0), False)]
    if score.relevance is not None:
        rows += [
            ("reranker: logit(yes)", f"{score.yes:.3f}", None, False),
            ("reranker: logit(no)", f"{score.no:.3f}", None, False),
            ("margin: logit(yes) − logit(no)", f"{score.yes - score.no:+.3f}", None, False),
            ("relevance: sigmoid of the margin", f"{score.relevance:.3f}", score.relevance, False),
        ]
    return _table("Score", [(name, value, share or 0.0, used) for name, value, share, used in rows])


def scatter(drawn: Map) -> str:
    """The map as a picture of pictures: round ones are single things, square ones scenes, those with a ▶ clips, tall
    ones pages; a click on one selects it."""
    low, high = drawn.points.min(axis=0), drawn.points.max(axis=0)
    if drawn.query is not None:
        low, high = low.clip(max=drawn.query), high.clip(min=drawn.query)
    room = (WIDTH - 2 * MARK, HEIGHT - 2 * MARK)

    def place(point: Sequence[float]) -> tuple[float, float]:
        x, y = (point - low) / (high - low).clip(min=1e-9)
        return MARK + x * room[0], MARK + (1 - y) * room[1]

    marks = "".join(_mark(item, *place(point)) for item, point in zip(drawn.items, drawn.points, strict=True))
    if drawn.query is not None:
        x, y = place(drawn.query)
        star = "M0,-22 6,-7 22,-7 9,3 14,19 0,9 -14,19 -9,3 -22,-7 -6,-7Z"
        marks += (
            f'<g class="q3-query" transform="translate({x:.0f},{y:.0f})"><path d="{star}"/>'
            '<text y="38">your query</text></g>'
        )
    first, second = (100 * share for share in drawn.explained)
    return (
        f'<svg class="q3-map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Map of {len(drawn.items)} items">'
        f"{marks}</svg>"
        f'<p class="q3-note">The two axes hold {first:.0f} % and {second:.0f} % of the variance: what looks close here '
        "may be far apart in the other dimensions.</p>"
    )


def legend(kinds: Iterable[str]) -> str:
    """What the marks of the map mean."""
    marks = {
        "picture": '<circle cx="12" cy="12" r="9"/>',
        "scene": '<rect x="3" y="3" width="18" height="18"/>',
        "clip": '<rect x="3" y="3" width="18" height="18" rx="6"/><path d="M9 7 17 12 9 17Z"/>',
        "page": '<rect x="5" y="2" width="14" height="20"/>',
        "text": '<text x="12" y="18">T</text>',
    }
    parts = (f'<span class="q3-{kind}"><svg viewBox="0 0 24 24">{marks[kind]}</svg>{kind}</span>' for kind in kinds)
    return f'<p class="q3-legend">{"".join(parts)}</p>'


def _mark(item: Item, x: float, y: float) -> str:
    wide, tall = (0.76 * MARK, 1.05 * MARK) if item.kind == "page" else (MARK, MARK)
    box = f'x="{-wide / 2:.0f}" y="{-tall / 2:.0f}" width="{wide:.0f}" height="{tall:.0f}"'
    content = thumbnail(item, 48, still=True)
    inside = f'<image {box} href="{_data_uri(content)}"/>' if content else '<text y="8">T</text>'
    round_corners = {"picture": MARK / 2, "clip": 8}.get(item.kind, 0)
    frame = f'<rect {box} rx="{round_corners}"/>' + ('<path d="M-4,-6 7,0 -4,6Z"/>' if item.kind == "clip" else "")
    return (
        f'<g class="q3-mark q3-{item.kind}" data-id="{escape(item.id)}" transform="translate({x:.0f},{y:.0f})">'
        f"{inside}{frame}<title>{escape(item.title)}</title></g>"
    )


def _data_uri(content: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(content).decode()
