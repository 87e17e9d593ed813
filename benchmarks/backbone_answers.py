"""What a backbone answers about pictures that it never saw, as shares of right answers.

    python benchmarks/backbone_answers.py --out results/backbone_answers.json

On the validation and on the test split; what is asked is in q3vl_mini/answers.py.
"""

import argparse
import json
from pathlib import Path

from q3vl_mini.answers import answer_scores
from q3vl_mini.backbone import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="q3vl-tiny", help="the shipped one, or a folder")
    parser.add_argument("--n", type=int, default=500, help="pictures of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone = load(options.backbone, device="cpu")
    parts = (backbone.model, backbone.processor)
    scores = {split: answer_scores(*parts, split, options.n) for split in ("validation", "test")}
    text = json.dumps({"n": options.n, **scores}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
