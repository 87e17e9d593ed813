"""What every notebook of the course needs: the checkpoint of a stage, figures with alt text, galleries of results."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import DisplayHandle, display
from IPython.display import Image as Shown
from matplotlib.figure import Figure

from .config import data_dir
from .media import MediaBudget, load_image, load_video
from .records import as_instance

MARKS = {True: ("✓", "#009E73"), False: ("✗", "#D55E00"), None: ("", "#999999")}  # not by colour alone


def artifact(preset: str, stage: str, runs: str | Path = "runs") -> Path:
    """The folder of a stage's model: of your own run if there is one, else the shipped one; prints which.

    preset: "tiny", "colab" or "full". stage: "s0" to "s3" or "reranker". runs: where `q3vl-mini run` wrote, in the
    working directory or a folder above it.

    Raises:
        FileNotFoundError: neither is there; says which command makes it.
    """
    for base in (Path.cwd(), *Path.cwd().parents):
        folder = base / runs / preset / stage
        if (folder / "metrics.json").is_file():
            print(f"{stage}: from your run in {Path(runs) / preset / stage}")
            return folder / "model"
    shipped = data_dir() / "adapters" / stage
    if preset == "tiny" and shipped.is_dir():
        print(f"{stage}: the shipped one (no finished stage {stage} in {Path(runs) / preset})")
        return shipped
    raise FileNotFoundError(
        f"no {stage} of preset {preset!r} in {runs}/{preset}, and none is shipped; run: q3vl-mini run --preset {preset}"
    )


def results(name: str) -> Any:
    """What results/NAME.json holds: of a folder results here or above, else of the shipped one.

    Raises FileNotFoundError where neither has it.
    """
    for place in (*(base / "results" for base in (Path.cwd(), *Path.cwd().parents)), Path(__file__).parent / "results"):
        if (place / f"{name}.json").is_file():
            return json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
    raise FileNotFoundError(f"no results/{name}.json here or above, and none is shipped")


def stage_results(preset: str) -> dict[str, Any]:
    """What `q3vl-mini run` measured (DESIGN: results/tiny.json): your own run's results, or the shipped ones of tiny.

    Raises FileNotFoundError where neither is there.
    """
    try:
        return results(preset)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; run: q3vl-mini run --preset {preset}") from None


class Place:
    """A place in a cell's output: a figure shown there replaces the one before, so that a training can be watched.

    Make it in the cell that draws into it; the saved notebook holds the last figure alone.
    """

    def __init__(self) -> None:
        self.handle: DisplayHandle | None = None  # nothing is there yet


def show(figure: Figure, alt: str, place: Place | None = None) -> None:
    """Display a matplotlib figure as a picture with alt text, and close it.

    place: where it replaces the figure that was shown there before; by default it is a new output of the cell.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    picture, metadata = Shown(buffer.getvalue(), alt=alt), {"image/png": {"alt": alt}}
    if place is None:
        display(picture, metadata=metadata)
    elif place.handle is None:
        place.handle = display(picture, metadata=metadata, display_id=True)
    else:
        place.handle.update(picture, metadata=metadata)


def gallery(
    rows: Sequence[Sequence[Any]],
    marks: Sequence[Sequence[bool | None]] | None = None,
    alt: str = "",
    place: Place | None = None,
) -> None:
    """Instances as rows of tiles: pictures, the first, middle and last frame of clips, texts.

    marks: for each tile True (relevant), False (not) or None (not judged; the query), shown as a frame with a sign.
    A tile may also be a pair (instance, caption). place: as of `show`.
    """
    width = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), width, figsize=(1.25 * width, 1.5 * len(rows)), squeeze=False, dpi=80, layout="constrained"
    )
    for i, row in enumerate(rows):
        for j in range(width):
            axis = axes[i, j]
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if j >= len(row):
                axis.axis("off")
                continue
            tile, caption = row[j] if isinstance(row[j], tuple) else (row[j], "")
            _tile(axis, as_instance(tile))
            sign, colour = MARKS[marks[i][j] if marks else None]
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour, linewidth=2.5 if sign else 1.0)
            axis.set_title(f"{sign} {caption}".strip(), fontsize=7, color="black", loc="center")
    show(figure, alt, place)


def _tile(axis: plt.Axes, instance: Mapping[str, Any]) -> None:
    text = instance.get("text")
    picture = None
    if instance.get("image") is not None:
        picture = load_image(instance["image"])
    elif instance.get("video") is not None:
        frames, _ = load_video(instance["video"], MediaBudget(fps=2.0))
        picture = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]], axis=1)
    if picture is not None:
        axis.imshow(picture)
        if text:
            axis.set_xlabel("\n".join(textwrap.wrap(text, 24)[:6]), fontsize=6)
    else:
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.text(0.5, 0.5, "\n".join(textwrap.wrap(text or "", 16)[:6]), ha="center", va="center", fontsize=7)
