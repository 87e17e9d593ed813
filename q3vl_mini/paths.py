"""Paths that a table or a file of labels names: where they count from, and where they must lie.

A table may come from somebody else, who decides by its paths what is opened here. So they are read below one folder
alone, the table's own unless a person names another. Links inside that folder are followed: who makes a folder of links
means it, and archives are unpacked without links that lead outside.
"""

import os
from pathlib import Path


def below(path: str | Path, folder: str | Path, root: str | Path | None) -> Path:
    """`path`, counted from `folder`.

    Args:
        root: where it must lie; None is anywhere.

    Raises ValueError for a path that leads outside of `root`, by `..` or because it is absolute.
    """
    place = Path(folder, path)
    if root is not None and not Path(os.path.abspath(place)).is_relative_to(os.path.abspath(root)):
        raise ValueError(
            f"{str(path)!r} leads outside of {str(root)!r}, and a table's paths are read below its own folder alone; "
            "copy the file there, or name the folder that holds both (root=..., --root)"
        )
    return place
