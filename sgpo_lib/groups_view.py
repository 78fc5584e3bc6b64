"""Both groups of a problem for a reader: responses side by side as static HTML, and tables of what guidance does.

No script; model text is escaped, and characters that could reorder what is around them stand as codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sgpo_lib.config import MethodConfig
from sgpo_lib.escaping import Html
from sgpo_lib.evaluation import mean_interval
from sgpo_lib.losses.guidance_weight import adaptive_weight
from sgpo_lib.records import Rollout, RolloutGroup

_COLOURS = {"correct": "#00795a", "wrong": "#b34700", "unverifiable": "#6b6b6b"}
_BOX = ("border:1px solid var(--jp-border-color2,#c4c4c4);border-left:4px solid {colour};border-radius:4px;"
        "margin:6px 0;padding:6px 10px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;line-height:1.5;"
        "text-align:left")
_COLUMN = "vertical-align:top;width:50%;padding:0 8px;text-align:left;background:transparent"


def group_html(group: RolloutGroup, most: int = 4, characters: int = 600) -> Html:
    """Problem and strategy, then autonomous and guided responses beside each other with verdict, answer and length.

    `most`: responses of each group that are shown; `characters`: of a longer one the middle is left out.
    Raises ValueError where a response has not been judged.
    """
    def column(name: str, responses: Sequence[Rollout]) -> Html:
        passed = sum(o.reward for o in responses)
        left = f", {len(responses) - most} more not shown" if len(responses) > most else ""
        return Html('<td style="{}"><b>{}</b>: {:g} of {} correct{}{}</td>').format(
            _COLUMN, name, passed, len(responses), left, Html("").join(_box(o, characters) for o in responses[:most]))

    strategy = group.problem.strategy
    told = Html("") if strategy is None else Html("<div><b>Strategy</b> {}: {}<br>{}</div>").format(
        strategy.problem_type, strategy.strategy,
        Html("<br>").join(f"({chr(97 + i)}) {step}" for i, step in enumerate(strategy.steps)))
    return Html('<div class="mathjax_ignore tex2jax_ignore" style="color:var(--jp-ui-font-color1,#1b1b1b)">'
                '<div style="white-space:pre-wrap"><b>Problem</b> {}</div>{}'
                '<table style="width:100%;table-layout:fixed;border-collapse:collapse"><tr>{}{}</tr></table>'
                "</div>").format(
        group.problem.prompt, told, column("autonomous", group.autonomous), column("guided", group.guided))


def _box(o: Rollout, characters: int) -> Html:
    assert o.verdict  # its reward was read
    colour, half = _COLOURS[o.verdict.status], characters // 2
    text = o.text if len(o.text) <= characters else f"{o.text[:half]} [...] {o.text[-half:]}"
    why = f" ({o.verdict.reason})" if o.verdict.reason else ""
    answer = f", answer {o.verdict.answer[:80]}" if o.verdict.answer else ""
    end = ", cut off" if o.stop == "length" else ""
    head = f"{o.verdict.status}{why}{answer}, {len(o.token_ids)} tokens{end}"
    ink = f"color-mix(in srgb, {colour} 60%, var(--jp-ui-font-color1,#1b1b1b))"  # readable on light and dark pages
    return Html('<div style="{}"><span style="color:{};font-weight:600">{}</span>\n{}</div>').format(
        _BOX.format(colour=colour), ink, head, text)


def guidance_frame(groups: Sequence[RolloutGroup], method: MethodConfig) -> pd.DataFrame:
    """One row per problem: family, p_auto and p_guide with their 95% Wilson intervals, gain, alpha (Eq. 6).

    alpha is 0 where no guided response is correct (Algorithm 1, line 17).
    """
    rows = []
    for g in groups:
        row: dict[str, Any] = {"problem": g.problem.id, "family": g.problem.family}
        for name, responses in (("p_auto", g.autonomous), ("p_guide", g.guided)):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval([o.reward for o in responses]),
                            strict=True))  # fmt: skip
        teaches = any(o.correct for o in g.guided)
        alpha = adaptive_weight(g.p_guide, g.p_auto, method.alpha_base, method.alpha_gamma, method.alpha_max)
        rows.append({**row, "gain": g.p_guide - g.p_auto, "alpha": alpha if teaches else 0.0})
    return pd.DataFrame(rows)


def guidance_by_family(frame: pd.DataFrame) -> pd.DataFrame:
    """Which problems guidance helps: one row per family of `guidance_frame`, then all, the largest gain first.

    Means over problems; `low` and `high` bound the mean gain (95%, over problems). With one problem the interval is as
    wide as one observation allows.
    """
    def row(part: pd.DataFrame) -> dict[str, float]:
        mean, low, high = (2 * v - 1 for v in mean_interval([(g + 1) / 2 for g in part["gain"]]))
        return {"problems": len(part), "p_auto": part["p_auto"].mean(), "p_guide": part["p_guide"].mean(), "gain": mean,
                "low": low, "high": high, "alpha": part["alpha"].mean()}  # fmt: skip

    parts = {str(name) or "no family": row(part) for name, part in frame.groupby("family")}
    table = pd.DataFrame.from_dict(parts, orient="index").sort_values("gain", ascending=False)
    return pd.concat([table, pd.DataFrame({"all": row(frame)}).T]).astype({"problems": int}).rename_axis("family")
