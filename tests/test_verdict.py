"""The verdict: its words, what it recommends, and how many more queries would decide, against a simulation."""

import numpy as np
import pytest

from q3vl_mini.evaluate import ColumnResult, DatasetResult
from q3vl_mini.metrics import PairedDifference
from q3vl_mini.verdict import judge, more_queries, verdict_page, word


def columns(values, column="text_ret", name="own"):
    values = np.asarray(values, dtype=float)
    return {column: ColumnResult(column, (DatasetResult(name, column, "ndcg@10", values, 50, 0.1),))}


def hits(n, share, seed=0):
    """n values of which `share` are 1; a larger share keeps the ones of a smaller."""
    return (np.random.default_rng(seed).random(n) < share).astype(float)


GENERAL = {"base": columns(hits(400, 0.8, 5), name="g"), "merged": columns(hits(400, 0.79, 5), name="g")}
GENERAL["fine-tuned"] = columns(hits(400, 0.6, 5), name="g")


def test_words_are_of_the_whole_interval():
    assert word(PairedDifference(0.1, 0.02, 0.2)) == "better"
    assert word(PairedDifference(-0.1, -0.2, -0.01)) == "worse"
    assert word(PairedDifference(0.1, -0.01, 0.2)) == "undecided" == word(PairedDifference(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("merged", "tuned", "ship"),
    [
        (0.6, 0.62, "merged"),  # both are better, and only the merged one kept its general ability
        (0.6, 0.9, "merged"),  # the fine-tuned one is far better, but it forgot a quarter
        (0.41, 0.9, "base"),  # undecided, or forgot
        (0.2, 0.2, "base"),  # worse
    ],
)
def test_what_is_shipped_is_better_and_has_not_forgotten(merged, tuned, ship):
    own = {"base": columns(hits(400, 0.4)), "merged": columns(hits(400, merged))}
    own["fine-tuned"] = columns(hits(400, tuned))
    verdict = judge(own, GENERAL)
    assert verdict["ship"] == ship
    assert verdict["why"].startswith("Keep the base" if ship == "base" else "The merged model is better")
    lost = verdict["general"]["forgotten"]
    assert not lost["fine-tuned"]["within_limit"] and lost["merged"]["within_limit"]
    base, forgot = (GENERAL[name]["text_ret"].score for name in ("base", "fine-tuned"))
    assert lost["fine-tuned"]["relative_loss"] == pytest.approx((base - forgot) / base)


def test_a_candidate_that_is_better_than_the_preferred_one_is_shipped_if_it_has_not_forgotten():
    own = {"base": columns(hits(400, 0.4)), "merged": columns(hits(400, 0.6)), "fine-tuned": columns(hits(400, 0.9))}
    assert judge(own, GENERAL, forget=0.5)["ship"] == "fine-tuned"
    own["fine-tuned"] = columns(hits(400, 0.605))
    assert judge(own, GENERAL, forget=0.5)["ship"] == "merged"


def test_so_many_more_queries_decide_four_times_in_five():
    rng = np.random.default_rng(3)

    def pair(n):
        base = rng.random(n)
        return base + rng.normal(0.05, 0.5, n), base

    a, b = pair(200)
    a += 0.05 - (a - b).mean()  # the difference that seems to be there is the true one
    results = [columns(x)["text_ret"].datasets[0] for x in (a, b)]
    found = PairedDifference(float((a - b).mean()), -0.02, 0.12)
    total = 200 + more_queries(*results, found)
    decided = []
    for _ in range(400):
        x, y = pair(total)
        d = x - y
        decided.append(d.mean() > 1.96 * d.std(ddof=1) / np.sqrt(total))
    assert 0.7 < np.mean(decided) < 0.9  # 0.8 is asked for; s was estimated from 200 queries


def test_equal_models_have_no_number_of_queries_that_decides():
    same = columns(hits(50, 0.5))["text_ret"].datasets[0]
    assert more_queries(same, same, PairedDifference(0.0, 0.0, 0.0)) is None


def test_the_page_says_it_in_words():
    own = {"base": columns(hits(60, 0.4)), "merged": columns(hits(60, 0.45, 1)), "fine-tuned": columns(hits(60, 0.05))}
    verdict = judge(own, GENERAL)
    page = verdict_page(verdict)
    more = verdict["own"]["differences"]["merged"]["more_queries"]
    assert "**Ship: base.**" in page and "fine-tuned against base: **worse**" in page
    assert "merged against base: **undecided**" in page and f"About {more} more test queries" in page
    assert "beyond the limit of -5%" in page and "within the limit" in page and "Worse in text_ret" in page


def test_models_measured_on_different_queries_are_refused():
    own = {"base": columns(hits(60, 0.4)), "merged": columns(hits(50, 0.4))}
    general = {name: GENERAL[name] for name in own}
    with pytest.raises(ValueError, match="score both on the same quadruples"):
        judge(own, general)
    with pytest.raises(ValueError, match="the same candidates"):
        judge(own, {"base": GENERAL["base"]})
