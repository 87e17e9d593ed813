"""What a backbone answers about pictures that it never saw, as shares of right answers.

    python benchmarks/backbone_answers.py --out results/backbone_answers.json

On the validation and on the test split. What is asked is in q3vl_mini/answers.py; besides, for each task, how often it
judges the right document best of sixteen (pretrain_judge.first_of).
"""

import argparse
import json
from pathlib import Path

from q3vl_mini.answers import answer_scores
from q3vl_mini.backbone import load
from q3vl_mini.pretrain_judge import first_of
from q3vl_mini.pretrain_language import BUDGET
from q3vl_mini.reranker import Reranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="q3vl-tiny", help="the shipped one, or a folder")
    parser.add_argument("--n", type=int, default=500, help="pictures of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone = load(options.backbone, device="cpu")
    parts, reranker = (backbone.model, backbone.processor), Reranker.from_backbone(backbone, budget=BUDGET)
    scores = {
        split: answer_scores(*parts, split, options.n) | first_of(reranker, options.n // 5, split=split)
        for split in ("validation", "test")
    }
    text = json.dumps({"n": options.n, **scores}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
