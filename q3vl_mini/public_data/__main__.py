"""`python -m q3vl_mini.public_data`: list the public sets, or prepare some of them.

    python -m q3vl_mini.public_data                                      what there is
    python -m q3vl_mini.public_data mmeb/MSCOCO_t2i --rows 60000         prepare one set
    python -m q3vl_mini.public_data --preset full                        prepare all that a preset names
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..config import DataConfig, load_preset
from .gather import prepare
from .sets import SETS, find


def main(arguments: Sequence[str] | None = None) -> None:
    """List the public sets, or save some of them as quadruples in FOLDER/prepared."""
    example = "example: python -m q3vl_mini.public_data nli/triplets --rows 10000"
    parser = argparse.ArgumentParser(prog="python -m q3vl_mini.public_data", description=main.__doc__, epilog=example)
    parser.add_argument("names", nargs="*", help="sets to prepare, e.g. nli/triplets; none lists them all")
    parser.add_argument("--rows", type=int, default=10_000, help="queries of each named set (default 10000)")
    parser.add_argument("--preset", help="prepare all public sets that a preset's stages name")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows; a preset brings its own")
    parser.add_argument("--folder", type=Path, help=f"local copies and results (default {DataConfig.public})")
    options = parser.parse_args(arguments)
    wanted, folder, seed = dict.fromkeys(options.names, options.rows), DataConfig.public, options.seed
    if options.preset:
        preset = load_preset(options.preset)
        folder, seed = preset.data.public, preset.seed
        for stage in preset.stages.values():
            for name in stage.tasks.keys() & SETS.keys():
                wanted[name] = max(wanted.get(name, 0), stage.tasks[name])
    if not wanted:
        for name, public in SETS.items():
            print(f"{name:30}{public.task:12}{public.repo:44}{public.licence}")
    for name, rows in sorted(wanted.items()):
        try:
            find(name)
        except ValueError as error:
            parser.error(str(error))
        card = json.loads((prepare(name, rows, seed, options.folder or folder) / "card.json").read_text("utf-8"))
        skipped = {reason: entry["count"] for reason, entry in card["meta"]["report"]["skipped"].items()}
        print(f"{name}: {card['n_queries']} queries, {card['n_documents']} documents, skipped {skipped or 'none'}")


if __name__ == "__main__":
    main()
