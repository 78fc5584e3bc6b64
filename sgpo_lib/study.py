"""Many runs as one study: worlds (base, problems, evaluation), variants in them, and tables with intervals.

    runs -> Study: per world one setting per variant -> tables (this module), claims (claims.py), figures

Nothing is averaged over worlds. What does not belong (unfinished, failed, fewer seeds, another learning rate) is left
out by name, in `left_out`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sgpo_lib import comparison, testbed
from sgpo_lib.analysis import selectivity, token_table
from sgpo_lib.comparison import mean_metric
from sgpo_lib.config import RunConfig
from sgpo_lib.figures import mean_interval, methods_of
from sgpo_lib.frames import one_setting_each, variant, world
from sgpo_lib.problems import load
from sgpo_lib.records import Problem
from sgpo_lib.rollouts.groups import judge_groups, sample_groups
from sgpo_lib.runs import Run
from sgpo_lib.session import open_model
from sgpo_lib.storage import read_jsonl
from sgpo_lib.tiny import base_key

Told = tuple[float, float, float, int]
"""Difference, low and high end of its 95% interval, seeds behind it."""


def world_label(run: Run) -> str:
    """A world's name for a person: base and arguments of its problems."""
    args = " ".join(f"{v}" if k == "level" else f"{k}={v}" for k, v in sorted(run.config.data.problem_args.items()))
    return f"{run.config.model.source} {args}".strip()


_OTHER = "another setting of its method was taken: more seeds, else more steps, else the newer one"


class Study:
    """The runs of one profile, by world and variant.

    `worlds`: label -> runs that may be compared, the one with the most variants first. `left_out`: run folder -> why.
    Raises ValueError where no finished run has the reference method.
    """

    def __init__(self, runs: Sequence[Run], reference: str = "sgpo"):
        self.reference = reference
        self.left_out = {r.folder.name: f"not finished ({r.state})" for r in runs if not r.done}
        self.all = [r for r in runs if r.done]
        found: dict[str, list[Run]] = {}
        for run in self.all:
            found.setdefault(world(run.config), []).append(run)
        kept = []
        for everything in found.values():
            members = self._as_long_as_reference(everything)
            chosen = one_setting_each(members)
            names = {r.folder.name for r in chosen}
            self.left_out |= {r.folder.name: _OTHER for r in members if r.folder.name not in names}
            if reference in {variant(r.config) for r in chosen}:
                kept.append(chosen)
            else:
                self.left_out |= dict.fromkeys(names, f"no finished {reference!r} run beside it")
        if not kept:
            told = ", ".join(f"{n}: {why}" for n, why in list(self.left_out.items())[:6]) or "no runs"
            raise ValueError(f"nothing to compare with: expected finished runs of {reference!r}; {told}. Train some "
                             "first: make paper-quick, or notebook 06")
        kept.sort(key=lambda rs: (-len({variant(r.config) for r in rs}), -len(rs), world_label(rs[0])))
        self.worlds: dict[str, list[Run]] = {}
        for chosen in kept:
            label = world_label(chosen[0])
            label = label if label not in self.worlds else f"{label} ({world(chosen[0].config)[:6]})"
            comparison.check_together(chosen, reference)
            self.worlds[label] = chosen

    def _as_long_as_reference(self, runs: Sequence[Run]) -> list[Run]:
        """Without RL runs that took other numbers of steps than the reference's setting; they are named."""
        own = one_setting_each([r for r in runs if variant(r.config) == self.reference])
        if not own:
            return list(runs)
        length = own[0].config.train.steps, own[0].config.train.epochs
        other = {r.folder.name for r in runs if r.config.method.objective == "rl"
                 and (r.config.train.steps, r.config.train.epochs) != length}
        self.left_out |= dict.fromkeys(other, f"other number of steps than {self.reference} has here")
        return [r for r in runs if r.folder.name not in other]

    @property
    def main(self) -> str:
        """Label of the world with the most variants."""
        return next(iter(self.worlds))

    def runs(self, name: str, where: str = "") -> dict[int, Run]:
        """Seed -> run of a variant in a world (the main one by default); empty where there is none."""
        return self._by_variant(where or self.main).get(name, {})

    @functools.cache  # noqa: B019 - a study lives as long as its notebook
    def _by_variant(self, where: str) -> dict[str, dict[int, Run]]:
        return comparison.by_variant(self.worlds[where])

    def variants(self, where: str = "") -> list[str]:
        """Names of the variants of a world, named methods first."""
        return methods_of(pd.DataFrame({"method": list(self._by_variant(where or self.main))}))

    def difference(self, ours: str, theirs: str, part: str = "test", where: str = "") -> Told:
        """Accuracy of `ours` minus `theirs`: mean, 95% interval over seeds and problems, seeds. NaN and 0 for none."""
        a, b = ({s: r for s, r in self.runs(name, where).items() if r.summary.get(part)} for name in (ours, theirs))
        if not set(a) & set(b):
            return math.nan, math.nan, math.nan, 0
        difference_SP = comparison.score_differences(a, b, part)
        return (*comparison.bootstrap_interval(difference_SP), len(difference_SP))

    def number(self, ours: str, theirs: str, measure: Callable[[Run], float],
               where: str = "") -> Told:
        """A number per run, `ours` minus `theirs`: mean, 95% t-interval over shared seeds, seeds."""
        return comparison.paired_interval(self.runs(ours, where), self.runs(theirs, where), measure)

    def accuracy_table(self, where: str = "") -> pd.DataFrame:
        """One row per variant of a world: seeds, accuracies with intervals, differences to the reference, speed.

        Columns method, seeds; test, transfer (mean over seeds, t-interval in _low and _high); difference and
        transfer_difference (minus the reference's accuracy, over seeds and problems); speed (mean validation accuracy
        over the evaluations of training), speed_difference (t-interval over seeds). On the testbed also choice and
        skill (shares of the forks of test responses) and opening (share of test responses that begin as only guided
        ones of the base do).
        """
        rows = []
        for name in self.variants(where):
            members = self.runs(name, where)
            row: dict[str, object] = {"method": name, "seeds": len(members)}
            for part in ("test", "transfer"):
                values = [(r.summary.get(part) or {}).get("accuracy", math.nan) for r in members.values()]
                row |= dict(zip(_ends(part), mean_interval(values), strict=True))
            if name != self.reference:
                for column, told in (
                        ("difference", self.difference(name, self.reference, where=where)),
                        ("transfer_difference", self.difference(name, self.reference, "transfer", where)),
                        ("speed_difference", self.number(name, self.reference, speed, where))):
                    row |= dict(zip(_ends(column), told[:3], strict=True))
            for column, measure in (("speed", speed), ("choice", choice), ("skill", skill), ("opening", opening)):
                row[column] = mean_interval([measure(r) for r in members.values()])[0]
            rows.append(row)
        columns = ["method", "seeds", *_ends("test"), *_ends("difference"), "speed", *_ends("speed_difference"),
                   *_ends("transfer"), *_ends("transfer_difference"), "choice", "skill", "opening"]
        return pd.DataFrame(rows).reindex(columns=columns)

    def sweep_table(self) -> pd.DataFrame:
        """Variants of the main world that differ from the reference in one number of the method, beside the reference.

        Columns field, value, paper (the reference's value), method, seeds, then difference, transfer_difference and
        speed_difference to the reference over the shared seeds, with their bounds. g1 and g2 count as one field.
        """
        table = self.accuracy_table().set_index("method")
        reference = _numbers(next(iter(self.runs(self.reference).values())).config)
        rows: list[dict[str, object]] = []
        for name in [n for n in table.index if n != self.reference]:
            config = next(iter(self.runs(name).values())).config
            own = _numbers(config)
            fields = [f for f in own if own[f] != reference[f]]
            if len(fields) == 1 and _words(config) == _words(next(iter(self.runs(self.reference).values())).config):
                rows.append({"field": fields[0], "value": own[fields[0]], "paper": False, "method": name})
        rows += [{"field": field, "value": reference[field], "paper": True, "method": self.reference}
                 for field in dict.fromkeys(str(r["field"]) for r in rows)]
        rows.sort(key=lambda r: (str(r["field"]), *(float(v) for v in str(r["value"]).split(":"))))
        kept = ["seeds", *_ends("difference"), *_ends("transfer_difference"), *_ends("speed_difference")]
        told = pd.DataFrame([{**r, **table.loc[str(r["method"]), kept].to_dict()} for r in rows],
                            columns=["field", "value", "paper", "method", *kept])
        return told.astype({"seeds": int})

    def world_table(self, methods: Sequence[str]) -> pd.DataFrame:
        """`accuracy_table` of every world, for the given variants, with a column `where`."""
        tables = [self.accuracy_table(where).assign(where=where) for where in self.worlds]
        table = pd.concat(tables, ignore_index=True)
        return table[table["method"].isin(methods)][["where", *tables[0].columns.drop("where")]]

    def learning_rates(self) -> pd.DataFrame:
        """How the learning rates of the main world were chosen, by method and rate.

        Columns method, lr, seeds (those that every rate of the method has), score (`end_score`, by which the rate was
        chosen), test and skill (which played no part), used (the rate of the tables), best.
        """
        main = self.worlds[self.main]
        used = {variant(r.config): r.config for r in main}
        found: dict[str, dict[float, dict[int, Run]]] = {}
        for run in [r for r in self.all if world(r.config) == world(main[0].config)]:
            name = variant(run.config)
            if _same_but_rate(run.config, used[name]):
                found.setdefault(name, {}).setdefault(run.config.train.lr, {})[run.config.seed] = run
        rows = []
        for name in self.variants():
            rates = found[name]
            if len(rates) < 2:
                continue
            seeds = sorted(set.intersection(*(set(runs) for runs in rates.values())))
            told = {lr: [mean_interval([f(runs[s]) for s in seeds])[0] for f in (end_score, final_accuracy, skill)]
                    for lr, runs in rates.items() if seeds}
            best = max((v[0] for v in told.values() if not math.isnan(v[0])), default=math.nan)
            rows += [(name, lr, len(seeds), *values, lr == used[name].train.lr, values[0] == best)
                     for lr, values in sorted(told.items())]
        return pd.DataFrame(rows, columns=["method", "lr", "seeds", "score", "test", "skill", "used", "best"])


def _numbers(config: RunConfig) -> dict[str, str]:
    """The numbers of a method and its updates, as text."""
    told = {k: f"{v:g}" for k, v in vars(config.method).items()
            if isinstance(v, int | float) and not isinstance(v, bool) and k not in ("g1", "g2")}
    more = {"updates_per_batch": config.train.updates_per_batch, "mini_batch": config.train.mini_batch}
    return told | {"g1:g2": f"{config.method.g1}:{config.method.g2}"} | {k: str(v) for k, v in more.items()}


def _words(config: RunConfig) -> dict[str, object]:
    """What is no number in a method, its name aside, and what was done to the strategies."""
    told = {k: v for k, v in vars(config.method).items() if isinstance(v, str | bool) and k != "method"}
    return told | {"bad": (config.data.bad_strategies, config.data.bad_share)}


def _ends(column: str) -> tuple[str, str, str]:
    return column, f"{column}_low", f"{column}_high"


def _same_but_rate(a: RunConfig, b: RunConfig) -> bool:
    train = dataclasses.replace(b.train, lr=a.train.lr)
    return dataclasses.replace(a, seed=0) == dataclasses.replace(b, seed=0, train=train)


def speed(run: Run) -> float:
    """Mean validation accuracy over the evaluations after step 0: how early a run is good, in one number."""
    return mean_metric(run, "accuracy", "eval")


def final_accuracy(run: Run) -> float:
    """Accuracy of the final evaluation on test problems; NaN without one."""
    return float((run.summary.get("test") or {}).get("accuracy", math.nan))


def end_score(run: Run) -> float:
    """Mean validation accuracy of the last three evaluations of training; of a supervised run minus its lowest
    validation loss (nats per token), since that is what chooses its checkpoint."""
    rows = run.metrics("eval")
    told = [r["accuracy"] for r in rows if "accuracy" in r]
    losses = [r["validation_loss"] for r in rows if "validation_loss" in r]
    return float(np.mean(told[-3:])) if told else -min(losses) if losses else math.nan


def choice(run: Run) -> float:
    """Share of the forks of the test responses at which the right operation was named; NaN elsewhere than on the
    testbed (`testbed.read_trace`)."""
    return _forks(run)[0]


def skill(run: Run) -> float:
    """Share of the forks of the test responses at which the named operation was carried out rightly; NaN as above."""
    return _forks(run)[1]


def opening(run: Run) -> float:
    """Share of the test responses that begin with `testbed.OPENING`; NaN as above."""
    texts = [t for row in _responses(run) for t in row["responses"]]
    return float(np.mean([t.strip().startswith(testbed.OPENING) for t in texts])) if texts else math.nan


def _responses(run: Run) -> list[dict[str, Any]]:
    if run.config.data.problems != "testbed":
        return []
    return read_jsonl(run.folder / "evaluation" / "test.jsonl", {"problem_id": str, "responses": list}, ("problem_id",))


def _forks(run: Run) -> tuple[float, float]:
    problems = _problems(run)
    readings = [step for row in _responses(run) for text in row["responses"]
                for step in testbed.read_trace(problems[row["problem_id"]], text)]
    if not readings:
        return math.nan, math.nan
    return float(np.mean([r.choice for r in readings])), float(np.mean([r.skill for r in readings]))


_CACHE: dict[str, dict[str, Problem]] = {}


def _problems(run: Run) -> dict[str, Problem]:
    if run.config.data.problems != "testbed":
        return {}
    key = world(run.config)
    if key not in _CACHE:
        _CACHE[key] = {p.id: p for p in load(run.config.data).test}
    return _CACHE[key]


def base_tokens(study: Study, problems: int) -> pd.DataFrame:
    """Token divergences of each world's base on its own correct guided responses (`analysis.token_table`).

    `problems` training problems of every testbed world, the reference's number of guided samples each; a column
    `where` names the world. Empty for 0 problems. Left out: worlds without known strategy-critical words (no testbed),
    and bases of another version of the testbed.
    """
    frames = []
    for where in study.worlds if problems else ():
        config = next(iter(study.runs(study.reference, where).values())).config
        if config.data.problems != "testbed" or config.model.revision != base_key(config.model.source):
            continue
        model = open_model(config)
        groups = sample_groups(model.engine, model.policy.tokenizer, model.splits.train[:problems], config, step=0)
        with model.verifier:
            judge_groups(model.verifier, groups)
        frames.append(token_table(model.policy, groups, testbed.fork_words()).assign(where=where))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def token_summary(tokens: pd.DataFrame) -> pd.DataFrame:
    """`analysis.selectivity` by world, over all tokens of `base_tokens`; with the share of fork words above 1 and 2
    nats, and the mean divergence of a response's first token where it opens before the first step."""
    rows = []
    for where, part in tokens.groupby("where", sort=False) if len(tokens) else ():
        forks, first = part[part["critical"]], part.groupby("response").head(1)
        rows.append({"where": where, "responses": part["response"].nunique(),
                     **selectivity(part, part["critical"].tolist()), "forks_above_1": float((forks["kl"] > 1).mean()),
                     "forks_above_2": float((forks["kl"] > 2).mean()),
                     "opening_kl": float(first.loc[first["stage"] == 0, "kl"].mean())})
    return pd.DataFrame(rows)
