"""The page shows what results say, and a verdict on each claim, whatever it is."""

import json

import pytest
from PIL import Image

from evidence import claims, report
from evidence.experiment import interval
from evidence.results import best_rates, chosen_of, finished, name_of, pace, updates_to
from tests.evidence.made import result


@pytest.fixture
def folder(tmp_path):
    runs = [("dense", 1e-3, 0, 40), ("moc 8x6", 1e-3, 0, 100), ("moc 8x6", 2e-3, 0, 160), ("moc 8x6", 2e-3, 1, 180)]
    (tmp_path / "full").mkdir()
    Image.new("RGB", (256, 640)).save(tmp_path / "full" / "truth.jpg")
    for of in runs:
        path = tmp_path / "full" / f"{name_of(*of[:3])}.json"
        path.write_text(json.dumps(result(*of)))
        Image.new("RGB", (256, 640)).save(path.with_suffix(".jpg"))
    (tmp_path / "full" / "half.json").write_text(json.dumps(result("own shot", 1e-3, 0, 9) | {"finished": False}))
    return tmp_path


def test_the_page_has_each_arm_at_its_best_rate(folder):
    found = finished(folder / "full")
    assert best_rates(found) == {"dense": 1e-3, "moc 8x6": 2e-3}
    assert [updates_to(r, 0.5) for r in found] == [None, 500, 500, 500]
    lines = report.page_block(folder).splitlines()
    low, high = (round(100 * of) for of in interval(340, 400))
    row = f"| moc 8x6 | 75 % | 2 | 0.002 of 2 | 500 | 20 | 85 ({low}..{high}) | 80, 90 | 50 | 500, 500 |"
    row += " 20.0 | 25.0 | 0.0100 |"
    assert row in lines
    assert lines.index(row) < next(n for n, line in enumerate(lines) if line.startswith("| dense |"))
    assert "| moc 8x6 | 0.95 | 12 | 50 (75) | 10 (10) |" in lines
    assert "| arm | 1 | 2 | 10 |" in lines
    assert not any("own shot" in line for line in lines)


def test_what_was_switched_is_shown_whatever_the_best_rate(tmp_path):
    zero_shot = result("", 1, 0, 60)["test"]["all"]
    switched = {"moc 8x6": {"skipped": 0.88, "zero_shot": zero_shot}}
    dense = result("dense", 1e-3, 0, 90, switched=switched), result("dense", 2e-3, 0, 120)
    save(tmp_path, "full", *dense, result("own shot", 1e-3, 0, 12))
    (verdict,) = verdicts(tmp_path)["d"]
    assert "dense has 45 % correct; best of what it is switched to, moc 8x6 has 30 % correct at once" in verdict
    assert "| dense | moc 8x6 | 88 % |" in report.page_block(tmp_path)


@pytest.mark.parametrize(("far", "too"), [(40, ", and so does dense attention"), (160, "")])
def test_a_fall_of_dense_attention_stands_beside_that_of_moc(tmp_path, far, too):
    moc = result("moc 8x6", 1e-3, 0, 100, skipped=0.88, far=40, near=160)
    save(tmp_path, "full", moc, result("dense", 1e-3, 0, 100, far=far, near=160))
    (verdict,) = verdicts(tmp_path)["c"]
    assert verdict == f"full, stories for choices, moc 8x6 does not fall, of one seed: **fails**{too}"


def test_rates_are_compared_by_trainings_of_the_same_seeds_and_updates():
    easy, hard, better = (result("dense", *of) for of in ((1e-3, 0, 190), (1e-3, 1, 100), (2e-3, 1, 120)))
    assert best_rates([easy, hard, better]) == {"dense": 2e-3}
    assert best_rates([easy, hard, result("dense", 2e-3, 1, 90)]) == {"dense": 1e-3}
    for alone in (better | {"updates": 1000}, result("dense", 2e-3, 2, 199)):
        assert best_rates([easy, hard, alone]) == {"dense": 1e-3}
    later = result("dense", 2e-3, 1, 100)
    assert best_rates([easy, hard, later]) == {"dense": 1e-3}
    later["curve"][0]["share"] = 0.5
    assert best_rates([easy, hard, later]) == {"dense": 2e-3}


def test_plots_and_sheets_are_drawn_and_the_page_is_rewritten(folder):
    root = folder / "root"
    (root / "docs" / "pictures").mkdir(parents=True)
    for page in (report.PAGE, report.FILMS_PAGE):
        (root / page).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(report.Arguments(results=folder, write=True, root=root))
    text = (root / "docs" / "evidence.md").read_text()
    assert text == f"before\n{report.BEGIN}\n{report.page_block(folder)}\n{report.END}\nafter\n"
    shown = [kind for kind in ("claim_a_full", "claim_d_full", "claim_e_full") if f"evidence_{kind}.png" in text]
    assert shown == ["claim_e_full"]
    for file in ("updates.png", "gap.png", "sheet.jpg"):
        assert f"pictures/evidence_full_{file}" in text
        with Image.open(root / "docs" / "pictures" / f"evidence_full_{file}") as picture:
            assert picture.width > 700


def verdicts(results):
    return {claim.letter: claim.verdicts for claim in claims.claims(results)}


def save(results, world, *runs):
    (results / world).mkdir(exist_ok=True)
    for run in runs:
        name = name_of(run["arm"], run["learning_rate"], run["seed"])
        (results / world / f"{name}.json").write_text(json.dumps(run))


def test_without_results_nothing_is_claimed(tmp_path):
    assert report.page_block(tmp_path) == "*Not measured yet.*"
    assert not any(verdicts(tmp_path).values())
    save(tmp_path, "full", result("random 8x6", 1e-3, 0, 20))  # what no claim is about
    assert report.page_block(tmp_path).count("*not measured*") == 6


def test_a_run_that_diverged_is_shown(tmp_path):
    run = result("moc 8x6", 1e-1, 0, 12)
    run["levels"][0]["box_error"] = run["test"]["all"]["box_psnr"] = run["curve"][0]["share"] = None
    save(tmp_path, "full", run)
    lines = report.page_block(tmp_path).splitlines()
    assert "| moc 8x6 | nan |" in lines
    assert any(" nan | 25.0 |" in line for line in lines)


def test_claims_that_hold(tmp_path):
    few = {"dynamic_degree": 0.004, "consistency": 0.99}
    sparse = result("moc 8x1", 1e-3, 0, 90, skipped=0.91)
    sparse["test"]["all"] |= few
    zero_shot, tuned = (result("", 1, 0, n)["test"]["all"] for n in (60, 170))
    switched = {"moc 8x6": {"skipped": 0.88, "zero_shot": zero_shot, "updates": 25, "tuned": tuned}}
    save(
        tmp_path,
        "full",
        result("dense", 1e-3, 0, 90, updates=500, switched=switched),
        result("own shot", 1e-3, 0, 12),
        result("moc 8x6", 1e-3, 0, 180, skipped=0.88),
        result("moc 4x6", 1e-3, 0, 60, skipped=0.9),
        result("random 4x6", 1e-3, 0, 199),
        result("moc 8x6, first frame", 1e-3, 0, 199, skipped=0.87),
        result("recent 8x6", 1e-3, 0, 150, far=20, near=120),
        sparse,
    )
    found = verdicts(tmp_path)
    assert found["a"][0] == (
        "full, stories for choices, 88 % skipped, of one seed: **holds** by moc 8x6: 90 % of answers correct, "
        "dense 45 %; "
        "sooner: **holds**, dense takes more than its updates"
    )
    assert "evidence_claim_a_reading_full" in claims.claims(tmp_path)[0].pictures
    at_cost = "full, stories for choices, at equal attended FLOPs, where the first"
    assert found["b"][:2] == [
        f"{at_cost} {when}: **holds** by moc 8x6, of one seed" for when in ("has P = 0.5", "ends")
    ]
    assert found["b"][2].endswith(
        "at equal FLOPs of all kinds, where the first has P = 0.5: **holds** by moc 8x6, of one seed"
    )
    assert found["c"] == [
        "full, stories for choices, moc 8x6 does not fall, of one seed: **undecided**",
        "full, stories for choices, recent 8x6 falls, of one seed: **holds**",
    ]
    assert found["d"] == [
        "full, stories for choices, of one seed: dense has 45 % correct; best of what it is switched to, moc 8x6 has "
        "30 % correct at once and 85 % after 5 % of the updates, 203 % of dense's gain"
    ]
    assert found["e"][:2] == [
        "full, stories for choices, moc 8x6, first frame is better than moc 8x6, of one seed: **holds**",
        "full, stories for choices, routes of moc 8x6 find the shot, of one seed: **holds**, first after 500 updates, "
        "layer 1, head 2",
    ]
    assert "moc 4x6 is better than moc 8x6, of one seed: **fails**" in found["e"][2]
    assert (
        found["e"][-1]
        == "full, stories for choices, moc 4x6 is better than as many random chunks, of one seed: **fails**"
    )
    assert found["f"] == ["full, stories for choices: **holds**, of one seed; moc 8x1 moves 40 % as much as moc 8x6"]


def test_claims_that_fail_or_are_open(tmp_path):
    runs = [result("dense", 1e-3, 0, 190), result("own shot", 1e-3, 0, 12)]
    moc = result("moc 8x6", 1e-3, 0, 80, far=40, skipped=0.88)
    moc["levels"][0]["into_reveal"] = [[0.2, 0.1]]
    save(tmp_path, "full", *runs, moc, result("recent 8x6", 1e-3, 0, 20))
    found = verdicts(tmp_path)
    assert "**fails** by moc 8x6" in found["a"][0]
    assert "sooner: **fails**" in found["a"][0]
    assert "where the first has P = 0.5: **fails** by moc 8x6" in found["b"][0]
    assert "where the first ends: **holds**" in found["b"][1]  # at a fifth of dense's cost, before that has learned
    assert (
        "FLOPs of all kinds, where the first ends: **fails**" in found["b"][3]
    )  # most of which attention has no part in
    assert "moc 8x6 does not fall, of one seed: **fails**" in found["c"][0]
    assert "recent 8x6 falls, of one seed: **undecided, as too little is remembered**" in found["c"][1]
    assert "find the shot, of one seed: **fails**" in found["e"][0]
    nobody = [result(arm, 1e-3, 0, 13, skipped=0.88) for arm in ("dense", "own shot", "moc 8x6")]
    save(tmp_path, "full", *nobody)
    (verdict,) = [v for v in verdicts(tmp_path)["a"] if "has learned" in v]
    assert verdict.endswith(
        "**undecided**, as neither has learned to remember; sooner: **undecided**, as neither reaches P = 0.5"
    )


def test_final_stories_are_asked_at_the_rate_that_choices_made(tmp_path):
    save(tmp_path, "full", result("dense", 1e-3, 0, 90), result("dense", 2e-3, 0, 80), result("moc 8x6", 1e-3, 0, 90))
    final = [result("dense", 1e-3, 10, 70), result("dense", 2e-3, 10, 199), result("moc 8x6", 1e-3, 10, 150)]
    save(tmp_path, "full-final", *final)
    (world,) = claims.evidence(tmp_path, ["full", "still"])
    arms, where = world.picking("dense", "moc 8x6")
    assert where == "full"
    assert [r["test"]["all"]["correct"] for r in arms["dense"]] == [70]
    assert world.picking("own shot") is None
    kept = chosen_of([result("dense", 2e-3, 10, 70)], [result("dense", 1e-3, 0, 90), result("dense", 2e-3, 0, 80)])
    assert len(kept) == 1  # with none at the best rate, those that there are
    (claim,) = [claim for claim in claims.claims(tmp_path) if claim.letter == "b"]
    assert claim.verdicts[1] == "full, at equal attended FLOPs, where the first ends: **holds** by moc 8x6, of one seed"


def test_a_new_arm_is_compared_on_the_stories_for_choices_and_the_others_stay_where_they_were(tmp_path):
    save(tmp_path, "full", result("dense", 1e-3, 0, 90), result("moc 8x6", 1e-3, 0, 90), result("moc 4x6", 1e-3, 1, 95))
    save(tmp_path, "full-final", *(result(arm, 1e-3, seed, 190) for arm in ("dense", "moc 8x6") for seed in (10, 11)))
    (world,) = claims.evidence(tmp_path, ["full"])
    arms, where = world.picking("dense")
    assert (where, len(arms["dense"])) == ("full", 2)
    found = verdicts(tmp_path)["e"]
    assert found[0].startswith("full, routes of moc 8x6 find the shot: ")
    assert (
        found[1]
        == "full, stories for choices, moc 4x6 is better than moc 8x6, of one seed, not the same: **undecided**"
    )


def test_arms_of_several_seeds_are_apart_if_no_two_seeds_disagree(tmp_path):
    """Intervals of all recalls together know nothing of what differs from seed to seed."""
    seeds = [result("moc 8x6", 1e-3, seed, n) for seed, n in enumerate((190, 15, 190))]
    dense = [result("dense", 1e-3, seed, n) for seed, n in enumerate((100, 110, 100))]
    save(tmp_path, "full", *seeds, *dense)
    assert verdicts(tmp_path)["b"][1].endswith("where the first ends: **undecided** by moc 8x6")
    save(tmp_path, "full", result("moc 8x6", 1e-3, 1, 180))
    assert verdicts(tmp_path)["b"][1].endswith("where the first ends: **holds** by moc 8x6")


def test_trainings_of_one_seed_are_of_one_seed_and_each_has_its_updates(tmp_path):
    """What was trained again is pooled, and still of one seed; and what has not learned says nothing when switched."""
    test = {"skipped": 0.9, "zero_shot": result("", 0, 0, 20)["test"]["all"]}
    gradient = [result("", 0, 0, 1)["curve"][-1] | {"gradient": {"to_earlier": 0.25, "to_right": 0.5}}]
    first, again = result("dense", 1e-3, 0, 30, switched={"moc 8x6": test}), result("dense", 1e-3, 0, 20, updates=900)
    runs = [first, result("own shot", 1e-3, 0, 13), result("moc 8x6", 1e-3, 0, 20, skipped=0.9, curve=gradient)]
    save(tmp_path, "full", *runs)
    (tmp_path / "full" / "dense_0.001_0-again.json").write_text(json.dumps(again))
    found = verdicts(tmp_path)
    assert "90 % skipped, of one seed: " in found["a"][0]
    assert ": dense has 15 % correct; **undecided**, as too little is remembered; best of" in found["d"][0]
    page = report.page_block(tmp_path)
    assert "| dense | 75 % | 2 | 0.001 of 1 | 900, 500 | 20 | 12 (10..16) | 10, 15 |" in page
    assert "| moc 8x6 | 60 | 40 | 2.0 | 25 | 50 |" in page
    assert "| dense | 60 | 40 | 2.0 |  |  |" in page


def test_a_fall_is_told_from_none_where_there_are_enough_recalls(tmp_path):
    for near, far, says in ((200, 198, "holds"), (200, 150, "fails"), (150, 148, "undecided")):
        save(tmp_path, "full", result("moc 8x6", 1e-3, 0, near, near=near, far=far))
        assert verdicts(tmp_path)["c"] == [f"full, stories for choices, moc 8x6 does not fall, of one seed: **{says}**"]


def test_without_recalls_from_far_away_no_fall_is_measured(tmp_path):
    run = result("moc 8x6", 1e-3, 0, 100)
    del run["test"]["by_gap"]["10"]
    save(tmp_path, "full", run)
    assert verdicts(tmp_path)["c"] == [
        "full, stories for choices, moc 8x6: *not measured*, as no recall is so near, or so far"
    ]


def test_long_scenes_are_compared_after_equal_seconds(tmp_path):
    slow = result("dense", 1e-3, 0, 190, milliseconds=80.0)
    save(tmp_path, "long", slow, result("moc 8x6", 1e-3, 0, 100, milliseconds=40.0))
    at_cost = "long, stories for choices, at equal seconds of training, where the first"
    assert verdicts(tmp_path)["b"] == [
        f"{at_cost} {when}: **holds** by moc 8x6, of one seed" for when in ("has P = 0.5", "ends")
    ]


def test_the_page_shows_the_committed_results():
    for name, block in ((report.PAGE, report.page_block), (report.FILMS_PAGE, report.films_block)):
        text = (report.ROOT / name).read_text()
        assert report.with_block(text, block(report.RESULTS), report.BEGIN, report.END) == text


def test_times_of_runs_that_shared_a_gpu_are_left_out():
    runs = [
        result("dense", 1e-3, 0, 10, milliseconds=ms, command=f"x{words}")
        for ms, words in ((20.0, " --per-gpu 1"), (60.0, " --per-gpu 3"))
    ]
    assert (pace(runs), pace(runs[:1]), pace(runs[1:])) == ("20", "20", "-")
