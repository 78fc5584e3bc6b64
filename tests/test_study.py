"""Variants, worlds, and the tables of a study, against hand arithmetic on made-up run folders."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from run_folders import eval_rows, made_up, train_rows

from sgpo_lib import study as module
from sgpo_lib.comparison import accuracy_differences, bootstrap_interval, mean_metric, paired_interval
from sgpo_lib.config import to_yaml
from sgpo_lib.frames import one_setting_each, setting, variant, world
from sgpo_lib.problems import load
from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.runs import Run
from sgpo_lib.study import Study, choice, end_score, skill, speed

T1, T2 = 12.706, 4.303
"""0.975 quantiles of Student's t with 1 and 2 degrees of freedom."""


@pytest.mark.parametrize(("method", "changes", "name"), [
    ("sgpo", {}, "sgpo"), ("sgpo", {"lr": 1e-3}, "sgpo"), ("sgpo", {"steps": 7}, "sgpo"),
    ("sgpo", {"kl_delta": 0.25}, "sgpo kl_delta=0.25"), ("sgpo", {"g1": 10, "g2": 2}, "sgpo g1=10 g2=2"),
    ("sgpo", {"guided_side": "ema", "ema_decay": 0.95}, "sgpo guided_side=ema ema_decay=0.95"),
    ("sgpo", {"updates_per_batch": 2}, "sgpo updates_per_batch=2"),
    ("no_kl_clip", {"alpha_max": 0.4}, "no_kl_clip alpha_max=0.4"),
    ("sgpo", {"bad_strategies": "wrong", "bad_share": 0.5}, "sgpo bad_strategies=wrong bad_share=0.5")])
def test_variants_are_named_by_what_departs_from_the_method(method, changes, name):
    assert variant(from_parameters("tiny", method, 3, **changes)) == name


def test_named_methods_are_variants_of_themselves():
    assert [variant(from_parameters("tiny", m)) for m in METHODS] == list(METHODS)
    assert variant(from_parameters("qwen2.5-1.5b", "hpt")) == "hpt"  # its published scripts set other values there


def test_what_makes_a_world():
    here = world(from_parameters("tiny", "sgpo"))
    same = [("grpo8", {}), ("sft", {}), ("base", {}), ("sgpo", {"lr": 1e-3}), ("sgpo", {"kl_delta": 2.0}),
            ("sgpo", {"bad_strategies": "wrong", "bad_share": 0.5})]
    other = [{"problem_args": {"level": "easy"}}, {"source": "tiny-l"}, {"test_k": 2}, {"temperature": 0.8},
             {"eval_top_p": 0.9}, {"n_test": 3}, {"data_seed": 1}]
    assert {world(from_parameters("tiny", m, seed=5, **c)) for m, c in same} == {here}
    assert len({here, *(world(from_parameters("tiny", "sgpo", **c)) for c in other)}) == 1 + len(other)


def test_worlds_are_never_mixed(tmp_path):
    """The same differences, each in its own world: a mean over worlds would show."""
    runs, worlds = [], ({}, {"problem_args": {"level": "easy"}}, {"source": "tiny-l"}, {"test_k": 2})
    for i, changes in enumerate(worlds):
        for seed in (0, 1):
            runs += [made_up(tmp_path, "sgpo", seed, [0.5 + i / 10, 0.4], rows=eval_rows(0, i), **changes),
                     made_up(tmp_path, "grpo8", seed, [0.5, 0.4], rows=eval_rows(0, 0), **changes)]
    runs.append(made_up(tmp_path, "hpt", 0, [0.5, 0.4]))
    study = Study(runs)
    labels = list(study.worlds)
    assert labels[0] == study.main == "tiny" and set(labels[1:]) >= {"tiny easy", "tiny-l"} and len(labels) == 4
    assert labels[-1].startswith("tiny (") or "tiny (" in "".join(labels)  # the same base and level, another evaluation
    found = {w: study.difference("sgpo", "grpo8", where=w)[0] for w in labels}
    assert found["tiny"] == 0 and found["tiny easy"] == pytest.approx(0.05) and found["tiny-l"] == pytest.approx(0.1)
    assert sorted(found.values()) == pytest.approx([0, 0.05, 0.1, 0.15])
    assert study.variants() == ["sgpo", "grpo8", "hpt"] and study.runs("hpt", "tiny-l") == {} and not study.left_out
    other = study.world_table(["grpo8"]).set_index("where")
    assert (-other["difference"]).to_dict() == pytest.approx(found)
    assert other["speed_difference"].to_dict() == pytest.approx({w: -20 * v for w, v in found.items()})
    table = study.world_table(["sgpo"])
    assert list(table.columns[:2]) == ["where", "method"] and set(table["method"]) == {"sgpo"}
    assert dict(zip(table["where"], table["test"], strict=True))["tiny easy"] == pytest.approx(0.5)


def test_the_setting_with_most_seeds_is_taken_and_the_rest_is_told(tmp_path):
    kept = [made_up(tmp_path, "sgpo", s, [0.5]) for s in (0, 1)]
    kept += [made_up(tmp_path, "grpo8", s, [0.5], lr=1e-3) for s in (2, 0, 1)]
    fewer = [made_up(tmp_path, "grpo8", s, [1.0], lr=2e-3) for s in (0, 1)]
    longer = [made_up(tmp_path, "grpo8", s, [1.0], steps=80) for s in range(5)]
    lonely = made_up(tmp_path, "hpt", 0, [0.5], problem_args={"level": "easy"})
    open_, failed = (made_up(tmp_path, m, 9, [0.5], done=False) for m in ("luffy", "hpt"))
    failed.fail(RuntimeError("out of memory"))
    study = Study([*fewer, *kept, *longer, lonely, open_, failed])
    assert {r.folder.name for r in study.worlds["tiny"]} == {r.folder.name for r in kept}
    assert [r.config.seed for r in one_setting_each([*kept, *fewer])] == [0, 1, 0, 1, 2]
    assert set(study.left_out) == {r.folder.name for r in (*fewer, *longer, lonely, open_, failed)}
    assert study.left_out[open_.folder.name] == "not finished (stopped)"
    assert study.left_out[failed.folder.name] == "not finished (failed)"
    assert study.left_out[lonely.folder.name] == "no finished 'sgpo' run beside it"
    assert all("another setting" in study.left_out[r.folder.name] for r in fewer)
    assert {study.left_out[r.folder.name] for r in longer} == {"other number of steps than sgpo has here"}
    longer = [made_up(tmp_path, "no_grpo", 0, [1.0], steps=n) for n in (80, 20)]  # as many seeds: more steps win
    assert [r.config.train.steps for r in one_setting_each(longer)] == [80]


def test_warm_ups_that_differ_in_seed_alone_make_one_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path))
    starts = [made_up(tmp_path, "sft", s, steps=10) for s in (0, 1)]
    longer = made_up(tmp_path, "sft", 0, steps=20)
    for run in (*starts, longer):
        (run.folder / "config.yaml").write_text(to_yaml(run.config))
    runs = [made_up(tmp_path, "sgpo", s, [0.5], init_from=r.folder.name) for s, r in enumerate(starts)]
    other = made_up(tmp_path, "sgpo", 2, [0.5], init_from=longer.folder.name)
    gone = made_up(tmp_path, "sgpo", 3, [0.5], init_from="no-such-run")
    settings = [setting(r.config) for r in (*runs, other, gone)]
    assert settings[0] == settings[1] and len(set(settings)) == 3
    assert set(Study([*runs, other]).left_out) == {other.folder.name}


def test_no_reference_is_refused_by_name(tmp_path):
    there = made_up(tmp_path, "grpo8", 0, [0.5])
    begun = made_up(tmp_path, "sgpo", 0, done=False)
    with pytest.raises(ValueError, match="expected finished runs of 'sgpo'") as told:
        Study([there, begun])
    assert there.folder.name in str(told.value) and begun.folder.name in str(told.value)
    with pytest.raises(ValueError, match="no runs"):
        Study([])
    assert list(Study([there], "grpo8").worlds) == ["tiny"]


def test_other_problems_are_refused_by_name(tmp_path):
    runs = [made_up(tmp_path, "sgpo", 0, [0.5]), made_up(tmp_path, "grpo8", 0, [0.5], problems="xyz")]
    with pytest.raises(ValueError, match="problems 'xyz'") as told:
        Study(runs)
    assert runs[1].folder.name in str(told.value)
    runs[1] = made_up(tmp_path, "hpt", 0, [0.5, 1.0])  # the same fingerprint, other rows in the evaluation
    with pytest.raises(ValueError, match=r"other test problems \(1 are only in one\)") as told:
        Study([runs[0], runs[1]]).accuracy_table()
    assert all(r.folder.name in str(told.value) for r in runs)


def test_only_shared_seeds_enter(tmp_path):
    sgpo, grpo = {0: 0.5, 1: 0.75, 2: 0.0}, {1: 0.5, 0: 0.25, 7: 1.0}
    runs = [made_up(tmp_path, "sgpo", s, [v, 0.5], [v, v, v]) for s, v in sgpo.items()]
    runs += [made_up(tmp_path, "grpo8", s, [v, 0.5], [0.1, 0.1, 0.1]) for s, v in grpo.items()]
    study = Study(runs)
    mean, low, high, seeds = study.difference("sgpo", "grpo8")
    assert (mean, seeds) == (pytest.approx(0.125), 2)  # (.25 + 0 + .25 + 0) / 4; seeds 2 and 7 have no partner
    assert (mean, low, high) == bootstrap_interval(np.array([[0.25, 0.0], [0.25, 0.0]])) and low < mean < high
    assert study.difference("grpo8", "sgpo")[0] == pytest.approx(-0.125)
    assert study.difference("sgpo", "grpo8", "transfer")[0] == pytest.approx(0.525)  # (.4 + .65) / 2
    assert study.difference("sgpo", "hpt")[3] == 0 and math.isnan(study.difference("sgpo", "hpt")[0])
    (row,) = accuracy_differences(runs, part="transfer").to_dict("records")
    assert (row["pairs"], row["problems"], row["unpaired"]) == (2, 3, "2, 7")
    assert row["difference"] == pytest.approx(-0.525)


def test_numbers_are_paired_by_seed_and_gaps_left_out(tmp_path):
    value = {"sgpo": {0: 5.0, 1: 7.0, 2: 9.0, 3: math.nan, 4: 1.0}, "grpo8": {1: 1.0, 0: 2.0, 2: 1.0, 3: 1.0, 5: 0.0}}
    runs = [made_up(tmp_path, m, s, [0.5], rows=train_rows(entropy=[v] * 4) if v == v else ())
            for m, seeds in value.items() for s, v in seeds.items()]
    study = Study(runs)
    told = study.number("sgpo", "grpo8", lambda r: mean_metric(r, "entropy"))
    # 3, 6, 8; seed 3 has no number, 4 and 5 no partner: mean 17/3, sample variance 19/3
    half = T2 * math.sqrt(19 / 3) / math.sqrt(3)
    assert told == (pytest.approx(17 / 3), pytest.approx(17 / 3 - half), pytest.approx(17 / 3 + half), 3)
    assert paired_interval(study.runs("sgpo"), {}, speed)[3] == 0


def test_means_over_a_part_of_the_steps(tmp_path):
    run = made_up(tmp_path, "sgpo", 0, steps=8, rows=[*train_rows(entropy=[1, 2, 4, 8]), *eval_rows(9, 1, 2, 3, 6)])
    assert mean_metric(run, "entropy", last=0.25) == 1 and mean_metric(run, "entropy", first=0.75) == 8
    assert mean_metric(run, "entropy", last=0.5) == 1.5 and mean_metric(run, "entropy") == 3.75
    assert math.isnan(mean_metric(run, "alpha")) and math.isnan(mean_metric(run, "entropy", "eval"))
    assert speed(run) == 3.0, "the evaluation before training does not count"
    assert end_score(run) == pytest.approx(11 / 3)
    supervised = made_up(tmp_path, "sft", 0, rows=eval_rows(2.0, 0.5, 0.7, metric="validation_loss"))
    assert end_score(supervised) == -0.5 and math.isnan(speed(supervised))
    assert math.isnan(end_score(made_up(tmp_path, "sft", 1)))
    epochs = made_up(tmp_path, "sgpo", 1, epochs=2.0, steps=60, rows=train_rows(entropy=[1, 2, 4, 8]),
                     summary={"steps": 8})
    assert mean_metric(epochs, "entropy", first=0.75) == 8, "epochs decide the steps, not the field"


def test_table_by_hand(tmp_path):
    runs = [made_up(tmp_path, "sgpo", s, [a, 0.5], [0.2], eval_rows(0, a, a)) for s, a in ((0, 0.5), (1, 0.7))]
    runs += [made_up(tmp_path, "grpo8", s, [a, 0.5], rows=eval_rows(0, 0.1, 0.3)) for s, a in ((0, 0.1), (1, 0.3))]
    runs.append(made_up(tmp_path, "sft", 0, [0.0, 0.0]))
    table = Study(runs).accuracy_table().set_index("method")
    assert list(table.index) == ["sgpo", "grpo8", "sft"] and list(table["seeds"]) == [2, 2, 1]
    sgpo, grpo, sft = (table.loc[m] for m in table.index)
    # means per run .5 and .6: mean .55, standard error .05
    assert (sgpo["test"], sgpo["test_low"]) == (pytest.approx(0.55), pytest.approx(0.55 - T1 * 0.05))
    assert sgpo["test_high"] == pytest.approx(0.55 + T1 * 0.05) and math.isnan(sgpo["difference"])
    assert grpo["difference"] == pytest.approx(-0.2) and grpo["difference_low"] < -0.2 < grpo["difference_high"]
    # speed: sgpo .5 and .7, grpo8 .2 twice; differences -.3 and -.5
    assert (sgpo["speed"], grpo["speed"], grpo["speed_difference"]) == pytest.approx((0.6, 0.2, -0.4))
    assert grpo["speed_difference_low"] == pytest.approx(-0.4 - T1 * 0.1)
    assert sgpo["transfer"] == pytest.approx(0.2) and math.isnan(grpo["transfer"])
    assert sft["test"] == 0 and math.isnan(sft["test_low"]) and math.isnan(sft["speed"]) and math.isnan(sft["skill"])
    assert sft["difference"] == pytest.approx(-0.5) and math.isnan(sft["difference_low"])


def test_choice_and_skill_of_forks(tmp_path):
    """A solution read as it is, with its first number wrong, and cut after its first step."""
    run = made_up(tmp_path, "sgpo", 0, [0.5], n_test=2, n_train=4, n_validation=0)
    first = load(run.config.data).test[0]
    steps = first.solution.split(" ; ")
    wrong = " ; ".join([steps[0].rsplit(" ", 1)[0] + " 98", *steps[1:]])
    row = {"problem_id": first.id, "samples": 3, "correct": 1, "responses": [first.solution, wrong, steps[0] + " ;"]}
    (run.folder / "evaluation" / "test.jsonl").write_text(json.dumps(row))
    # choice: 3 + 3 + 1 of 9. Skill: 3, then 1 (the third step; the second goes on from 98), then 1
    expected = [r for text in row["responses"] for r in module.testbed.read_trace(first, text)]
    assert choice(run) == pytest.approx(7 / 9) and skill(run) == pytest.approx(sum(r.skill for r in expected) / 9)
    assert 4 / 9 <= skill(run) <= 5 / 9
    gone = made_up(tmp_path, "sgpo", 1, [0.5], n_test=2, n_train=4, n_validation=0)
    row_of_both = Study([run, gone]).accuracy_table().iloc[0]
    assert row_of_both["choice"] == pytest.approx(7 / 9), "a seed without readable forks is left out"


def test_sweeps(tmp_path):
    def runs(seeds: dict[int, float], **changes) -> list[Run]:
        return [made_up(tmp_path, "sgpo", s, [v], **changes) for s, v in seeds.items()]
    all_runs = [*runs({0: 0.5, 1: 0.6, 2: 0.9}), *runs({0: 0.4, 1: 0.5}, kl_delta=10.0),
                *runs({0: 0.6, 1: 0.6}, kl_delta=2.0), *runs({0: 0.1}, g1=10, g2=2), *runs({0: 0.2}, g1=6, g2=6),
                *runs({0: 0.3}, updates_per_batch=2), *runs({0: 0.0}, kl_delta=0.5, alpha_max=0.4),
                *runs({0: 0.3}, kl_delta=2.0, guided_side="frozen"), made_up(tmp_path, "no_kl_clip", 0, [0.2]),
                made_up(tmp_path, "grpo8", 0, [0.0], g1=4), made_up(tmp_path, "grpo8", 0, [0.0])]
    table = Study(all_runs).sweep_table()
    assert list(zip(table["field"], table["value"], table["paper"], strict=True)) == [
        ("g1:g2", "6:6", False), ("g1:g2", "8:4", True), ("g1:g2", "10:2", False),
        ("kl_delta", "1", True), ("kl_delta", "2", False), ("kl_delta", "10", False), ("kl_delta", "inf", False),
        ("updates_per_batch", "1", True), ("updates_per_batch", "2", False)]
    rows = table.set_index(["field", "value"])
    assert rows.loc[("kl_delta", "10"), "difference"] == pytest.approx(-0.1), "over the seeds that both have"
    assert math.isnan(rows.loc[("kl_delta", "1"), "difference"]) and rows.loc[("kl_delta", "1"), "seeds"] == 3
    assert rows["difference"].loc[[("g1:g2", "10:2"), ("kl_delta", "inf")]].tolist() == pytest.approx([-0.4, -0.3])
    assert "sgpo guided_side=frozen kl_delta=2.0" not in set(table["method"])
    empty = Study(all_runs[:3]).sweep_table()
    assert isinstance(empty, pd.DataFrame) and empty.empty and "difference" in empty


def test_learning_rates_over_common_seeds(tmp_path):
    def run(seed: int, lr: float, end: float, method: str = "sgpo", **changes) -> Run:
        return made_up(tmp_path, method, seed, [0.5], rows=eval_rows(0, 0, end, end, end), lr=lr, **changes)
    runs = [run(0, 4e-4, 0.2), run(1, 4e-4, 0.4), run(2, 4e-4, 0.9), run(0, 8e-4, 0.5), run(1, 8e-4, 0.3),
            run(0, 2e-4, 0.1), run(1, 2e-4, 0.1), run(7, 2e-4, 1.0)]
    other = [run(0, 1e-3, 1.0, steps=20), run(0, 1e-4, 1.0, kl_delta=2.0), run(0, 2e-3, 1.0, "grpo8"),
             run(0, 3e-3, 1.0, problem_args={"level": "easy"}), run(0, 4e-4, 1.0, steps=20),
             run(1, 8e-4, 1.0, steps=20)]
    for order in ([*runs, *other], [*other, *runs]):
        table = Study([*order]).learning_rates()
        assert list(table["method"]) == ["sgpo"] * 3 and list(table["lr"]) == [2e-4, 4e-4, 8e-4]
        assert list(table["seeds"]) == [2, 2, 2] and list(table["score"]) == pytest.approx([0.1, 0.3, 0.4])
        # 4e-4 and 2e-4 have three seeds each; equal steps: the newer folder is taken
        assert list(table["best"]) == [False, False, True] and table["used"].sum() == 1 and not table["used"].iloc[2]


def test_no_tokens_without_problems_or_with_another_testbed(tmp_path):
    study = Study([made_up(tmp_path, "sgpo", 0, [0.5])])
    assert module.base_tokens(study, 0).empty
    older = Study([made_up(tmp_path, "sgpo", 0, [0.5], revision="00000000")])
    assert module.base_tokens(older, 3).empty


def test_token_summary_by_hand():
    """One response: an opening of 3 nats, forks of 0.5, 1.5 and 2.5, two other tokens; and one without an opening."""
    rows = [("w", 0, 0, False, 3.0, 1.0), ("w", 0, 1, True, 0.5, 1.0), ("w", 0, 2, True, 1.5, 1.0),
            ("w", 0, 3, True, 2.5, 1.0), ("w", 0, -1, False, 0.25, 0.0), ("w", 1, 1, False, 0.25, 0.0)]
    table = pd.DataFrame(rows, columns=["where", "response", "stage", "critical", "kl", "sft_loss"])
    told = module.token_summary(table).iloc[0]
    assert (told["where"], told["responses"], told["opening_kl"]) == ("w", 2, 3.0)
    assert told["forks_above_1"] == pytest.approx(2 / 3) and told["forks_above_2"] == pytest.approx(1 / 3)
    # of nine pairs of a fork and another token the opening wins three; its share of the sum of 8 nats
    assert told["kl_auc"] == pytest.approx(6 / 9) and told["kl_share"] == pytest.approx(4.5 / 8)
    assert module.token_summary(pd.DataFrame()).empty
