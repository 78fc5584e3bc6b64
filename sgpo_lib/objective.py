"""What a batch of groups means for the weights: plan (advantages, targets, alpha), then gradients of Eq. 7.

Each `accumulate_` function adds one term's gradient of a mini-batch, micro-batch by micro-batch, and its sums to
`sums`. Means are over the mini-batch: counts are taken before it is cut into micro-batches, and over all workers that
share it, so the cut does not change the result.

Every RL method is these terms with other fields of `MethodConfig`:

    policy gradient   autonomous group (Eq. 1; GRPO, DAPO, Dr. GRPO, LUFFY, HPT)
    expert            LUFFY: one more row of the group. HPT: cross-entropy in place of a group that fails
    distillation      Eq. 3 to 6 on guided responses; reverse KL; cross-entropy

Shape suffixes: N response tokens of a micro-batch in row order, B its rows.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgpo_lib.batching import Row, TokenBatch
from sgpo_lib.config import MethodConfig
from sgpo_lib.guards import KL, LOGP, LOSS
from sgpo_lib.losses.distillation import clipped_kl_loss, select_targets
from sgpo_lib.losses.grpo import entropy_bonus, group_advantages, grpo_loss
from sgpo_lib.losses.guidance_weight import adaptive_weight, group_advantage_weight
from sgpo_lib.losses.imitation import falls_back, luffy_loss, sft_loss
from sgpo_lib.losses.masked import Counts, response_mean_weights, sum_by_row, token_weights
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, reverse_kl_unguided_to_guided
from sgpo_lib.records import Rollout, RolloutGroup
from sgpo_lib.session import Session

DIVERGENCES = {"forward_kl": forward_kl_guided_to_unguided, "reverse_kl": reverse_kl_unguided_to_guided}
Sums = collections.Counter
"""Sums over tokens and micro-batches of a step, by name."""


@dataclass
class ProblemWork:
    """What one problem contributes to the loss."""

    group: RolloutGroup
    advantages: list[float]
    """A_i of the autonomous group."""
    targets: list[int]
    """Indices of the guided responses to distil: o+ alone (Eq. 4) or all of C (Eq. 2); empty without distillation."""
    alpha: float
    """alpha(q); 0 where there is no target (Algorithm 1, line 17)."""
    expert_advantage: float = 0.0
    """LUFFY: advantage of the expert solution within the group that it joins."""
    imitates: bool = False
    """HPT: the rollouts are dropped and the expert solution is learned."""


@torch.no_grad()
def plan(session: Session, groups: Sequence[RolloutGroup]) -> list[ProblemWork]:
    """Advantages (Eq. 1), targets (Eq. 4) and weights (Eq. 6) of a batch, under the weights before its first update."""
    method = session.config.method
    reach = _reach(session, groups) if method.distillation != "none" else {}
    works = []
    for group in groups:
        joined = [group.expert] if group.expert and method.expert == "group" else []
        rewards_G = torch.tensor([o.reward for o in (*group.autonomous, *joined)], dtype=torch.float64)
        advantages = group_advantages(rewards_G, method.advantage_eps, method.advantage_std).tolist()
        expert_advantage = advantages.pop() if joined else 0.0
        work = ProblemWork(group, advantages, targets=[], alpha=0.0, expert_advantage=expert_advantage)
        if method.distillation != "none":
            work.targets = select_targets(method.target_selection, [reach.get(id(o), 0.0) for o in group.guided],
                                          [len(o.token_ids) for o in group.guided], _correct(group.guided))
            work.alpha = _alpha(method, group, work.targets)
        work.imitates = method.expert == "fallback" and falls_back(sum(_correct(group.autonomous)), method.expert_gate)
        works.append(work)
    return works


def _correct(rollouts: Sequence[Rollout]) -> list[bool]:
    return [o.correct for o in rollouts]


def _reach(session: Session, groups: Sequence[RolloutGroup]) -> dict[int, float]:
    """id(guided response) -> sum_t log pi(o_t | q, o_<t) in nats, for the correct ones of problems that have several:
    the only one is the target whatever its value, and where all are, none is asked for it."""
    correct = [(g, o) for g in groups if session.config.method.target_selection != "all_correct"
               and sum(_correct(g.guided)) > 1 for o in g.guided if o.correct]
    rows: list[Row] = [(g.unguided_prompt_ids, o.token_ids) for g, o in correct]
    session.work["skipped"] += sum(len(g.unguided_prompt_ids) + len(o.token_ids) for g in groups for o in g.guided
                                   if o.correct) - _tokens(rows)
    reach: dict[int, float] = {}
    for part in session.micro_batches(rows, learns=False):
        batch = _token_batch(session, rows, part)
        logp_N = session.logp_and_entropy(batch)[0]
        session.guard.note("choice of the target", [correct[i][1] for i in part], batch.length_B, {LOGP: logp_N})
        sums_B = sum_by_row(logp_N, batch.row_N, len(part))
        reach.update({id(correct[i][1]): value for i, value in zip(part, sums_B.tolist(), strict=True)})
    return reach


def _alpha(method: MethodConfig, group: RolloutGroup, targets: Sequence[int]) -> float:
    if not targets:
        return 0.0
    if method.weighting == "fixed":
        return method.alpha_fixed
    if method.weighting == "group_advantage":
        return group_advantage_weight([o.reward for o in group.autonomous], group.guided[targets[0]].reward,
                                      method.advantage_eps, method.advantage_std, method.alpha_max)
    return adaptive_weight(group.p_guide, group.p_auto, method.alpha_base, method.alpha_gamma, method.alpha_max)


@torch.no_grad()
def autonomous_logp(session: Session, works: Sequence[ProblemWork]) -> dict[int, torch.Tensor]:
    """id(response) -> log pi_old of its tokens, by the trainer itself, before the batch's first update."""
    first = _first(session, works)
    rollouts = [o for w in works for o, a in zip(w.group.autonomous, w.advantages, strict=True)
                if o is first or not _skips(session, w, a)]
    rows: list[Row] = [(o.prompt_ids, o.token_ids) for o in rollouts]
    old: dict[int, torch.Tensor] = {}
    for part in session.micro_batches(rows, learns=False):
        batch = _token_batch(session, rows, part)
        logp_N = session.logp_and_entropy(batch)[0]
        session.guard.note("before the first update", [rollouts[i] for i in part], batch.length_B, {LOGP: logp_N})
        pieces = logp_N.split(batch.length_B.tolist())
        old.update({id(rollouts[i]): piece for i, piece in zip(part, pieces, strict=True)})
    return old


def accumulate(session: Session, works: Sequence[ProblemWork], old_logp: dict[int, torch.Tensor] | None,
               sums: Sums) -> None:
    """Gradient of a mini-batch's whole loss. `old_logp` is None where the batch's first update is its only one."""
    counts, problems = _counts(session, works)
    with session.phase("policy"):
        accumulate_policy_gradient(session, works, old_logp, counts, sums)
    if session.config.method.expert != "none":
        with session.phase("expert"):
            accumulate_expert(session, works, counts, problems, sums)
    if session.config.method.distillation != "none":
        with session.phase("distil"):
            accumulate_distillation(session, works, problems, sums)


def _teaches(method: MethodConfig, work: ProblemWork, advantage: float) -> bool:
    """Whether the policy gradient of a response is not zero (Eq. 1 has the factor A_i)."""
    return method.policy_gradient and not work.imitates and (advantage != 0 or method.entropy_coefficient > 0)


def _skips(session: Session, work: ProblemWork, advantage: float) -> bool:
    return session.config.train.skip_untaught and not _teaches(session.config.method, work, advantage)


def _first(session: Session, works: Sequence[ProblemWork]) -> Rollout | None:
    """The batch's first autonomous response, on the worker that has it: measured in every step, whatever is skipped."""
    return works[0].group.autonomous[0] if works and session.world.first else None


def _counts(session: Session, works: Sequence[ProblemWork]) -> tuple[Counts, int]:
    """What the mini-batch's means divide by, over all workers: (responses of the policy gradient, problems).

    HPT's dropped responses count, so that each problem weighs 1/B.
    """
    rollouts = [o for w in works for o in w.group.autonomous]
    if session.config.method.expert == "group":
        rollouts += [w.group.expert for w in works if w.group.expert]
    total = session.world.added(collections.Counter(
        rows=len(rollouts), tokens=sum(len(o.token_ids) for o in rollouts), problems=len(works)))
    return Counts(total["rows"], total["tokens"], session.config.rollout.max_new_tokens), total["problems"]


def accumulate_policy_gradient(session: Session, works: Sequence[ProblemWork],
                               old_logp: dict[int, torch.Tensor] | None, counts: Counts, sums: Sums) -> None:
    """Gradient of -L_GRPO (Eq. 1) and of the entropy bonus. Responses that teach nothing are left out but for the
    batch's first one, or, without `skip_untaught`, measured."""
    method, device = session.config.method, session.policy.device
    first = _first(session, works)
    for learns in (True, False):
        flat = [(o, a) for w in works for o, a in zip(w.group.autonomous, w.advantages, strict=True)
                if learns == _teaches(method, w, a)]
        rows: list[Row] = [(o.prompt_ids, o.token_ids) for o, _ in flat]
        if not learns:
            if method.policy_gradient:  # none of their tokens is clipped
                sums["policy_token_count"] += sum(len(o.token_ids) for w in works for o, a in zip(
                    w.group.autonomous, w.advantages, strict=True) if not w.imitates and a == 0
                    and not _teaches(method, w, a))
            if session.config.train.skip_untaught:
                flat = [(o, a) for o, a in flat if (o is first if old_logp is None else id(o) in old_logp)]
                measured: list[Row] = [(o.prompt_ids, o.token_ids) for o, _ in flat]
                session.work["skipped"] += _tokens(rows) - _tokens(measured)
                rows = measured
        for part in session.micro_batches(rows, learns=learns):
            batch = _token_batch(session, rows, part)
            with torch.set_grad_enabled(learns):
                logp_N, entropy_N = session.logp_and_entropy(batch, entropy_gradient=method.entropy_coefficient > 0)
            old_N = torch.cat([old_logp[id(flat[i][0])] for i in part]) if old_logp is not None else logp_N.detach()
            sampler_N = torch.tensor([x for i in part for x in flat[i][0].sampler_logp], device=device)
            sums.update({"entropy_sum": float(entropy_N.detach().sum()), "measured_token_count": len(sampler_N),
                         "gap_sum": float((old_N - sampler_N).abs().sum())})
            samples = [flat[i][0] for i in part]
            if not learns:
                session.guard.note("policy gradient", samples, batch.length_B, {LOGP: logp_N})
                continue
            advantage_B = torch.tensor([flat[i][1] for i in part], dtype=logp_N.dtype, device=device)
            weight_N = token_weights(method.aggregation, batch.length_B, batch.row_N, counts, logp_N.dtype)
            output = grpo_loss(logp_N, old_N, batch.spread(advantage_B), weight_N, method.clip_low, method.clip_high)
            sums.update(output.metrics)
            sums.update({"loss_grpo": float(output.loss.detach())})
            loss = output.loss + _bonus(method, entropy_N, weight_N, sums)
            session.guard.note("policy gradient", samples, batch.length_B, {LOGP: logp_N, LOSS: loss})
            session.backward(loss)


def _bonus(method: MethodConfig, entropy_N: torch.Tensor, weight_N: torch.Tensor, sums: Sums) -> torch.Tensor | float:
    if not method.entropy_coefficient:
        return 0.0
    output = entropy_bonus(entropy_N, weight_N, method.entropy_coefficient)
    sums.update({"loss_entropy": float(output.loss.detach())})
    return output.loss


def accumulate_expert(session: Session, works: Sequence[ProblemWork], counts: Counts, problems: int,
                      sums: Sums) -> None:
    """Gradient of expert solutions: LUFFY's shaped row of each group, or HPT's cross-entropy where a problem fails.

    Both originals put the entropy bonus on these tokens too; its weights are those of the policy gradient.
    """
    method, device = session.config.method, session.policy.device
    chosen = [(w, w.group.expert) for w in works if w.group.expert and (method.expert == "group" or w.imitates)]
    rows: list[Row] = [(o.prompt_ids, o.token_ids) for _, o in chosen]
    for part in session.micro_batches(rows, learns=True):
        batch = _token_batch(session, rows, part)
        logp_N, entropy_N = session.logp_and_entropy(batch, entropy_gradient=method.entropy_coefficient > 0)
        weight_N = token_weights(method.aggregation, batch.length_B, batch.row_N, counts, logp_N.dtype)
        if method.expert == "group":
            advantage_B = torch.tensor([chosen[i][0].expert_advantage for i in part], dtype=logp_N.dtype, device=device)
            output = luffy_loss(logp_N, batch.spread(advantage_B), weight_N, method.shaping_gamma)
        else:
            share_B = torch.full((len(part),), method.expert_coefficient / problems, dtype=logp_N.dtype,
                                 device=device)
            output = sft_loss(logp_N, response_mean_weights(batch.length_B, batch.row_N, share_B))
        loss = output.loss + _bonus(method, entropy_N, weight_N, sums)
        session.guard.note("expert solutions", [chosen[i][1] for i in part], batch.length_B, {LOGP: logp_N, LOSS: loss})
        session.backward(loss)
        sums.update({"loss_expert": float(output.loss.detach()), "expert_p_sum": float(logp_N.detach().exp().sum()),
                     "expert_token_count": len(logp_N)})


def accumulate_distillation(session: Session, works: Sequence[ProblemWork], problems: int, sums: Sums) -> None:
    """Gradient of alpha(q) L_KD (Eq. 2 or 5, and 7) of a mini-batch: mean over its problems and their targets."""
    method, device = session.config.method, session.policy.device
    chosen = [(w, w.group.guided[j]) for w in works if w.alpha > 0 for j in w.targets]
    rows: list[Row] = [(w.group.unguided_prompt_ids, o.token_ids) for w, o in chosen]
    guided_rows: list[Row] = [(w.group.guided_prompt_ids, o.token_ids) for w, o in chosen]
    guided = method.distillation in DIVERGENCES
    for part in session.micro_batches(guided_rows if guided else rows, learns=True, guided=guided):
        batch = _token_batch(session, rows, part)
        share_B = torch.tensor([w.alpha / problems / len(w.targets) for w, _ in (chosen[i] for i in part)],
                               dtype=torch.float64, device=device)
        weight_N = response_mean_weights(batch.length_B, batch.row_N, share_B)
        if method.distillation == "cross_entropy":
            logp_N, _ = session.logp_and_entropy(batch)
            output, values = sft_loss(logp_N, weight_N.to(logp_N.dtype)), {LOGP: logp_N}
        else:
            guided_hidden_NH, guided_head = session.guided_side.states(_token_batch(session, guided_rows, part))
            kl_N = DIVERGENCES[method.distillation](
                guided_hidden_NH, session.policy.response_hidden(batch), session.policy.head(),
                session.config.train.kl_chunk_tokens, guided_head)
            output = clipped_kl_loss(kl_N, weight_N.to(kl_N.dtype), method.kl_delta, method.kl_clip)
            values = {KL: kl_N}
        session.guard.note("distillation", [chosen[i][1] for i in part], batch.length_B, {**values, LOSS: output.loss})
        session.backward(output.loss)
        sums.update(output.metrics)
        sums.update({"loss_kd": float(output.loss.detach())})


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in rows)


def _token_batch(session: Session, rows: Sequence[Row], part: Sequence[int]) -> TokenBatch:
    chosen = [rows[i] for i in part]
    batch = session.policy.token_batch(chosen, session.config.train.layout)
    session.work.update({"computed": batch.tokens, "slots": batch.input_ids_RS.numel(),
                         "shared": _tokens(chosen) - batch.tokens})
    return batch
