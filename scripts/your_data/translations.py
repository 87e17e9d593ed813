"""A glossary: short messages of a program and their translations, from Django, as a CSV for finetune().

    python scripts/your_data/translations.py --out runs/your_data/translations [--languages de fr es] \\
        [--longest 40]

Source: the PyPI package Django 5.2.8 (Django Software Foundation and translators, djangoproject.com), its gettext
files. Licence: BSD-3-Clause. Taken: every translated message of at most 40 characters in both languages; of plurals
the singular. Needs babel, which comes with the extra "test".

A query is the translation, what it should find is the English message; one message is on one side of the split.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from babel.messages.mofile import read_mo
from packages import fetch, state_source

PACKAGE = ("pypi", "Django", "5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f")


def messages(file: Path) -> dict[str, str]:
    """{English: translation} of a compiled gettext file, which holds what is translated and not marked as fuzzy."""
    with open(file, "rb") as opened:
        entries = [(entry.id, entry.string) for entry in read_mo(opened) if entry.id and entry.string]
    return {x if isinstance(x, str) else x[0]: y if isinstance(y, str) else y[0] for x, y in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--languages", nargs="+", default=["de", "fr", "es"])
    parser.add_argument("--longest", type=int, default=40, help="characters (default 40)")
    parser.add_argument("--file", type=Path, help="the wheel, if it is there already")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = fetch(*PACKAGE, Path(scratch), options.file)
        for language in options.languages:
            files = sorted(root.rglob(f"locale/{language}/LC_MESSAGES/*.mo"))
            if not files:
                raise SystemExit(f"Django has no translation {language!r}")
            found: dict[str, str] = {}
            for file in files:
                found = messages(file) | found
            short = {x: y for x, y in found.items() if max(len(x), len(y)) <= options.longest}
            rows += [(translated, said, language) for said, translated in short.items() if translated not in ("", said)]
    state_source(options.out, *PACKAGE[:3], "djangoproject.com", "BSD-3-Clause")
    with open(options.out / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("query", "positive", "language"), *rows])
    print(f"{options.out}: {len(rows)} pairs in {', '.join(options.languages)}")


if __name__ == "__main__":
    main()
