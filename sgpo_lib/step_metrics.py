"""The row of metrics of one step: sums over this worker's groups, which add up over workers, then means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_lib.objective import DIVERGENCES, ProblemWork, Sums
from sgpo_lib.records import RolloutGroup
from sgpo_lib.session import Session
from sgpo_lib.strategies import is_spoiled
from sgpo_lib.verdict_rates import is_failure


def step_sums(session: Session, groups: Sequence[RolloutGroup], works: Sequence[ProblemWork]) -> Sums:
    """What the row of a step counts in this worker's groups, as sums that add up over workers."""
    autonomous = [o for g in groups for o in g.autonomous]
    guided = [o for g in groups for o in g.guided]
    everything, method = autonomous + guided, session.config.method
    sums: Sums = Sums({
        "problem_count": len(groups), "response_count": len(everything), "autonomous_count": len(autonomous),
        "token_total": sum(len(o.token_ids) for o in everything),
        "autonomous_tokens": sum(len(o.token_ids) for o in autonomous), "p_auto_sum": sum(g.p_auto for g in groups),
        "length_stops": sum(o.stop == "length" for o in everything),
        "unverifiable": sum(o.verdict.status == "unverifiable" for o in everything if o.verdict),
        "no_answer": sum(o.verdict.reason == "no_answer" for o in everything if o.verdict),
        "verdict_failures": sum(is_failure(o.verdict.reason) for o in everything if o.verdict),
        "without_variance": sum(not any(w.advantages) for w in works),
        **{f"{name}_tokens": session.work[name] for name in ("computed", "slots", "skipped")}})
    if method.g2:
        sums.update({"p_guide_sum": sum(g.p_guide for g in groups), "alpha_sum": sum(w.alpha for w in works),
                     "with_target": sum(bool(w.targets) for w in works)})
    if method.g2 and session.config.data.bad_strategies:
        for w in works:
            name = "bad" if is_spoiled(w.group.problem) else "good"
            sums.update({f"alpha_{name}_sum": w.alpha, f"alpha_{name}_count": 1})
    if method.expert != "none":
        learned = [bool(w.expert_advantage if method.expert == "group" else w.imitates) for w in works]
        sums.update({"expert_reward_sum": sum(g.expert.reward for g in groups if g.expert),
                     "learned_expert": sum(learned)})
    return sums


def step_metrics(session: Session, sums: Sums, updates: int, step: int) -> dict[str, Any]:
    """The row of a step, from its sums over all workers, problems and updates."""
    method, problems = session.config.method, sums["problem_count"]

    def per(name: str, count: str) -> float:
        return sums[name] / sums[count] if sums[count] else 0.0

    row: dict[str, Any] = {
        "reward_autonomous": sums["p_auto_sum"] / problems,
        "response_length": per("autonomous_tokens", "autonomous_count"),
        "length_limit_share": per("length_stops", "response_count"),
        "unverifiable_share": per("unverifiable", "response_count"),
        "no_answer_share": per("no_answer", "response_count"),
        "verdict_failure_share": per("verdict_failures", "response_count"),
        "zero_variance_share": sums["without_variance"] / problems,
        "policy_clip_share": per("policy_clipped_count", "policy_token_count"),
        "loss_grpo": sums["loss_grpo"] / updates, "grad_norm": sums["grad_norm"] / updates,
        "entropy": per("entropy_sum", "measured_token_count"),
        "sampler_trainer_gap": per("gap_sum", "measured_token_count"),
        "lr": session.learning_rate(step), "updates": updates, "tokens": sums["token_total"],
        "tokens_per_second": sums["token_total"] / session.seconds["sample"],
        "skipped_share": sums["skipped_tokens"] / max(1, sums["skipped_tokens"] + sums["computed_tokens"]),
        "padding_share": (sums["slots_tokens"] - sums["computed_tokens"]) / max(1, sums["slots_tokens"]),
    }
    if method.g2:
        row |= {"reward_guided": sums["p_guide_sum"] / problems, "alpha": sums["alpha_sum"] / problems,
                "target_share": sums["with_target"] / problems, "loss_kd": sums["loss_kd"] / updates}
    row |= {f"alpha_{name}": sums[f"alpha_{name}_sum"] / sums[f"alpha_{name}_count"] for name in ("bad", "good")
            if sums[f"alpha_{name}_count"]}
    if method.distillation in DIVERGENCES:
        row |= {"kl_mean": per("kl_sum", "kl_token_count"), "kl_kept_mean": per("kl_kept_sum", "kl_token_count"),
                "kl_clipped_share": per("kl_clipped_count", "kl_token_count")}
    if method.expert != "none":
        row |= {"reward_expert": sums["expert_reward_sum"] / problems,
                "expert_share": sums["learned_expert"] / problems,
                "expert_p": per("expert_p_sum", "expert_token_count"), "loss_expert": sums["loss_expert"] / updates}
    if method.entropy_coefficient:
        row["loss_entropy"] = sums["loss_entropy"] / updates
    return row | {"loss": sum(v for k, v in row.items() if k.startswith("loss_"))}
