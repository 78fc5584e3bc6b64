"""Views and figures in which every text is a hostile one: what the tests open, and what a notebook of theirs shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from hostile_payloads import file_name

from sgpo_lib import figures, method_figures, strategy_figures, study_figures, token_figures
from sgpo_lib.config import to_yaml
from sgpo_lib.extraction.records import Candidate, Extraction, Leak
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Strategy, Verdict
from sgpo_lib.widgets.run_monitor import RunMonitor


def group_of(text: str) -> RolloutGroup:
    """A problem whose every text is this one."""
    one = Rollout(text, False, 0, (1,), (1, 2), text, "length", verdict=Verdict("wrong", 0.0, text, text))
    problem = Problem(text, text, text, strategy=Strategy(text, text, (text, text)), family=text)
    return RolloutGroup(problem, [one], [replace(one, guided=True)])


def extraction_of(text: str) -> Extraction:
    """A problem whose every text is this one, with a candidate that could be read and one that could not."""
    leak = Leak(0, min(9, len(text)), "answer", text, text)
    read = Candidate(text, Strategy(text, text, (text, text)), score=0.5, comment=text, kind=text, leaks=(leak,))
    return Extraction(Problem(text, text, text, solution=text, family=text), (read, Candidate(text, reason=text)), 0,
                      "kept", (text,))


def monitor_of(root: Path, texts: Sequence[str]) -> RunMonitor:
    """Runs that are called like the texts and failed with them."""
    for text in texts:
        folder = root / file_name(text)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(from_parameters("tiny", "sgpo", 0, steps=40)), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"kind": "train", "step": i, "alpha": 1.0, "seconds_step": 2.0}) + "\n" for i in (1, 2, 3)))
        (folder / "FAILED.json").write_text(json.dumps({"error": text, "message": text}))
    return RunMonitor([root / file_name(text) for text in texts], title=" ".join(texts), every=0)


def drawn(texts: list[str]) -> dict[str, Any]:
    """Figures of the package with hostile names, categories, labels and titles."""
    many = len(texts)
    metrics = pd.DataFrame([{"run": t, "method": t, "seed": 0, "kind": kind, "step": s, "accuracy": 0.5, "alpha": 0.5,
                             "reward_autonomous": 0.5, "seconds_sample": 1.0, "seconds_step": 2.0}
                            for t in texts for kind in ("train", "eval") for s in (1, 2)])
    rates = pd.DataFrame({"p_auto": 0.5, "p_guide": 0.5, "problem": texts})
    described = pd.DataFrame({"kind": texts, "words": 3, "own_numbers": 1, "problem": texts, "answer_leaks": 1,
                              "intermediate_leaks": 0})
    worlds = pd.DataFrame({"where": texts, "method": texts, "test": 0.5, "test_low": 0.4, "test_high": 0.6})
    swept = pd.DataFrame({"field": texts[:6], "value": texts[:6], "paper": False, "speed_difference": 0.1,
                          "speed_difference_low": 0.0, "speed_difference_high": 0.2})
    told = pd.DataFrame({"method": texts, "seeds": 2, "d": 0.1, "d_low": 0.0, "d_high": 0.2})
    return {
        "curves": figures.learning_curves(metrics, title=texts[0]), "panel": figures.training_panel(metrics),
        "phases": figures.phase_seconds(metrics), "rates": figures.pass_rates(rates),
        "steps": figures.step_bars(pd.DataFrame({"step": texts, "kl": 1.0, "tokens": 2})),
        "missing": figures.learning_curves(metrics, texts[-1]), "kinds": strategy_figures.leak_bars(described),
        "words": strategy_figures.abstraction(described), "worlds": study_figures.by_world(worlds, texts[0]),
        "sweeps": study_figures.sweeps(swept),
        "differences": study_figures.differences(told, {"d": texts[0]}, texts[0]),
        "drain": token_figures.drain(pd.DataFrame({"label": texts, "kl": 1.0, "kept_kl": 1.0, "sft_loss": 1.0})),
        "tokens": method_figures.masked_tokens(pd.DataFrame({"token": texts, "kl": [0.5] * many}), 1.0),
        "lines": method_figures.lines(pd.DataFrame({"x": 1.0, "y": 2.0, "by": texts}), "x", "y", "by", texts[0],
                                      (texts[0], texts[-1]))}


CELLS = ["""import pandas as pd
from IPython.display import HTML, display
from sgpo_lib import exports
from pathlib import Path
from sgpo_lib.groups_view import group_html
from sgpo_lib.widgets.token_kl import Pane, TokenKL
from hostile_views import drawn, group_of, monitor_of
from test_token_kl_widget import readings_of""",
         "for text in texts:\n    print(text)\n    display(HTML(group_html(group_of(text))))",
         "display(pd.DataFrame({t: [t] for t in texts}, index=texts[:1]), exports.shown(pd.DataFrame({'a': texts})))",
         "for figure in drawn(texts).values():\n    display(figure)",
         "display(TokenKL([Pane(texts[0], [readings_of(texts)])]), monitor_of(Path(folder) / 'runs', texts))\ntexts",
         "raise ValueError(' '.join(texts))"]
"""What notebooks display, with the payloads for everything that a model or a user could have written."""
