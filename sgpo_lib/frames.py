"""Run folders as data frames, for figures and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import pandas as pd

from sgpo_lib.config import MethodConfig, RunConfig, TrainConfig, field_index
from sgpo_lib.recipes import METHODS, from_parameters
from sgpo_lib.runs import Run, load_run


def setting(config: RunConfig) -> str:
    """Fingerprint of everything but the seed: runs that share it are repetitions of one another.

    A run that started from another one's weights has that one's setting in it, so that warm-ups may differ in seed.
    """
    start = config.train.init_from
    if start:
        with contextlib.suppress(ValueError):  # a warm-up that is gone keeps its name
            start = setting(load_run(start).config)
    train = dataclasses.replace(config.train, init_from=start)
    return dataclasses.replace(config, seed=0, train=train).fingerprint


def world(config: RunConfig) -> str:
    """Fingerprint of base, problems, sampling, reward and evaluation: what compared methods must share.

    Strategies spoiled on purpose are part of the variant, not of the world, and how often training evaluates is part
    of the training: supervised runs have another `eval_every`.
    """
    data = dataclasses.replace(config.data, bad_strategies="", bad_share=0.0)
    evaluation = dataclasses.replace(config.evaluation, eval_every=0)
    return dataclasses.replace(config, seed=0, method=MethodConfig(), train=TrainConfig(), data=data,
                               evaluation=evaluation).fingerprint


_NAMED = ("train.mini_batch", "train.updates_per_batch", "data.bad_strategies", "data.bad_share")
"""Fields outside `method` that make a variant of a method."""


def variant(config: RunConfig) -> str:
    """What a run is called in comparisons: its method, and the fields in which it departs from the named one.

    For example `sgpo`, `sgpo kl_delta=0.25`, `sgpo g1=10 g2=2`. Learning rate and number of steps are no part of it.
    """
    named = _named(config.profile, config.method.method) if config.method.method in METHODS else config
    fields = [n for n in dict.fromkeys(field_index().values()) if n.startswith("method.")] + list(_NAMED)
    parts = [config.method.method]
    for name in fields:
        section, leaf = name.split(".")
        value = getattr(getattr(config, section), leaf)
        if value != getattr(getattr(named, section), leaf):
            parts.append(f"{leaf}={value}")
    return " ".join(parts)


_named = functools.cache(from_parameters)  # checks a whole configuration: too slow for every run of a study


def runs_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """All metric rows with the columns run, profile, method (the variant), seed, setting, kind, step, and the logged
    metrics."""
    rows = [{"run": r.folder.name, "profile": r.config.profile, "method": variant(r.config),
             "seed": r.config.seed, "setting": setting(r.config), **row} for r in runs for row in r.metrics()]
    return pd.DataFrame(rows, columns=None if rows else ["run", "profile", "method", "seed", "setting", "kind", "step"])


def summaries_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per finished run: run, profile, method, seed, setting, steps, test_accuracy, test_low, test_high, test_k,
    seconds, cpu_seconds, tokens."""
    columns = ["run", "profile", "method", "seed", "setting", "steps", "test_accuracy", "test_low", "test_high",
               "test_k", "seconds", "cpu_seconds", "tokens"]
    rows = []
    for run in runs:
        if not (run.done and (told := run.summary)):
            continue
        test = told.get("test") or {}
        known = {"run": run.folder.name, "profile": run.config.profile, "method": variant(run.config),
                 "seed": run.config.seed, "setting": setting(run.config), "test_accuracy": test.get("accuracy"),
                 "test_low": test.get("accuracy_low"), "test_high": test.get("accuracy_high"), "test_k": test.get("k")}
        rows.append({**{c: told.get(c) for c in columns}, **known})
    return pd.DataFrame(rows, columns=columns)


def comparable(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Per profile the runs that may share a figure: one world, and of each method the setting with the most seeds.

    A world is base, problems, sampling and evaluation; the one with the most runs is taken (then the one changed
    last). Several settings of one method (a smoke run beside the real one, another learning rate) must not be averaged
    either; ties go to the setting with more steps, then to the one changed last.
    """
    worlds: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        worlds.setdefault(run.config.profile, {}).setdefault(world(run.config), []).append(run)
    return {profile: one_setting_each(max(found.values(), key=lambda rs: (len(rs), _changed(rs))))
            for profile, found in worlds.items()}


def one_setting_each(runs: Sequence[Run]) -> list[Run]:
    """Of every variant the setting with the most seeds (then with more steps, then the one changed last)."""
    methods: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        methods.setdefault(variant(run.config), {}).setdefault(setting(run.config), []).append(run)
    chosen: list[Run] = []
    for by_setting in methods.values():
        best = max(by_setting.values(), key=lambda rs: (len(rs), rs[0].config.train.steps, _changed(rs)))
        chosen.extend(sorted(best, key=lambda r: r.config.seed))
    return chosen


def _changed(runs: Sequence[Run]) -> float:
    return max(r.folder.stat().st_mtime for r in runs)
