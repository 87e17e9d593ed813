"""Pages of the R manuals, with the titles of their own tables of contents as questions.

    python scripts/your_data/manual_pages.py --out runs/your_data/pages

Source: the Debian package r-doc-pdf 4.2.2.20221110-2 (R Core Team, cran.r-project.org/manuals.html), fetched with
`apt-get download` on Debian 12, or given by --file (snapshot.debian.org keeps it). Licence: GPL-2 or later; the
manuals may be copied verbatim. Taken: seven manuals; not the reference of all functions.

Writes the PDF files and pairs.jsonl: {"query": title, "positive": "R-intro.pdf#page=9"}.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from packages import fetch, state_source

from q3vl_mini.pages import open_pdf

PACKAGE = (
    "debian", "r-doc-pdf", "4.2.2.20221110-2", "beb104ad5818d261f280a868294645ca31d7c63365f2c9a55aa3ca9aad5aa71d",
)  # fmt: skip
MANUALS = ("R-FAQ", "R-admin", "R-data", "R-exts", "R-intro", "R-ints", "R-lang")


def contents(pdf: Path) -> list[tuple[str, int]]:
    """(title, page from 1) of every entry of a PDF's outline that has a page, chapters without number or letter."""
    found = []
    with open_pdf(pdf) as document:
        for entry in document.get_toc():
            target, title = entry.get_dest(), (entry.get_title() or "").strip()
            if entry.level == 0:
                title = re.sub(r"^(\d+|[A-Z]) (?=[A-Z])", "", title)
            if target is not None and target.get_index() is not None and len(title) > 3:
                found.append((title, target.get_index() + 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--file", type=Path, help="the .deb file, if it is there already")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        manuals = fetch(*PACKAGE, Path(scratch), options.file) / "usr" / "share" / "R" / "doc" / "manual"
        for name in MANUALS:
            shutil.copy(manuals / f"{name}.pdf", options.out)
            entries = contents(options.out / f"{name}.pdf")
            rows += [{"query": title, "positive": f"{name}.pdf#page={page}"} for title, page in entries]
    state_source(options.out, *PACKAGE[:3], "cran.r-project.org/manuals.html", "GPL-2 or later")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.out / "pairs.jsonl").write_text(lines, encoding="utf-8")
    pages = {row["positive"] for row in rows}
    print(f"{options.out}: {len(rows)} titles, {len(pages)} pages of {len(MANUALS)} manuals")


if __name__ == "__main__":
    main()
