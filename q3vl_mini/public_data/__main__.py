"""`q3vl-mini public-data`: list the public sets, or prepare some of them.

    q3vl-mini public-data                                      what there is
    q3vl-mini public-data mmeb/MSCOCO_t2i --rows 60000         prepare one set
    q3vl-mini public-data --preset full                        prepare all that a preset names
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
    example = "example: q3vl-mini public-data nli/triplets --rows 10000"
    parser = argparse.ArgumentParser(prog="q3vl-mini public-data", description=main.__doc__, epilog=example)
    parser.add_argument("names", nargs="*", help="sets to prepare, e.g. nli/triplets; none lists them all")
    parser.add_argument("--rows", type=int, default=10_000, help="queries of each named set (default 10000)")
    parser.add_argument("--preset", help="prepare all public sets that a preset's stages name")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows; a preset brings its own")
    parser.add_argument("--folder", type=Path, help=f"local copies and results (default {DataConfig.public})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, one object a set and line")
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
            row = {"name": name, "task": public.task, "repository": public.repo, "licence": public.licence}
            print(json.dumps(row) if options.json else "{name:30}{task:12}{repository:44}{licence}".format(**row))
    for name, rows in sorted(wanted.items()):
        try:
            find(name)
        except ValueError as error:
            parser.error(str(error))
        card = json.loads((prepare(name, rows, seed, options.folder or folder) / "card.json").read_text("utf-8"))
        skipped = {reason: entry["count"] for reason, entry in card["meta"]["report"]["skipped"].items()}
        row = {"name": name, "queries": card["n_queries"], "documents": card["n_documents"], "skipped": skipped}
        told = f"{name}: {row['queries']} queries, {row['documents']} documents, skipped {skipped or 'none'}"
        print(json.dumps(row) if options.json else told)


if __name__ == "__main__":
    main()
