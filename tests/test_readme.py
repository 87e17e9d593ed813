"""README's table is what results/tiny.json says, and that file is of the shape that docs and notebooks read."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "results" / "tiny.json").read_text())
COLUMNS = (
    "image_cls", "image_qa", "image_ret", "image_gd", "video_cls", "video_qa", "video_ret", "video_mret", "visdoc",
    "text_ret", "sts", "cross_lingual",
)  # fmt: skip


def test_the_table_is_what_the_script_writes():
    script = [sys.executable, str(ROOT / "scripts" / "update_readme.py"), "--check"]
    assert subprocess.run(script, cwd=ROOT).returncode == 0, "run scripts/update_readme.py"


def test_the_table_shows_the_means_of_the_results():
    table = re.search(r"stage-table:begin -->(.*?)<!-- stage-table:end", (ROOT / "README.md").read_text(), re.S)[1]
    for name, row in RESULTS["models"].items():
        line = re.search(rf"^\| {re.escape(name)} \|.*$", table, re.M)[0]
        assert f"{100 * row['mean']['score']:.1f}" in line


def test_the_results_have_every_model_and_column():
    assert list(RESULTS["models"]) == ["raw", "s0", "s1", "s2", "s3", "s3+reranker"]
    for row in RESULTS["models"].values():
        assert set(COLUMNS) <= set(row)
        for column in COLUMNS:
            low, high = row[column]["ci"]
            assert low <= row[column]["score"] <= high and row[column]["n_queries"] >= 300
    assert set(RESULTS["unseen_styles"]["s3"]) == {"hit@1", "hit@10", "n"}
