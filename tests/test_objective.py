"""The gradient of every method and option against a naive computation, and that each branch is really taken.

The naive side is written from the paper's equations and the issue's words: float64, one response at a time, from the
model's own full logits, with none of our losses. What both sides start from is in `objective_world.py`.

Shape suffixes: T tokens of one response, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from objective_world import LONGEST, World, assert_same_gradient, configured, make_world, opened, ours
from torch import Tensor

from sgpo_lib.method_config import CHOICES
from sgpo_lib.objective import accumulate, autonomous_logp, plan
from sgpo_lib.recipes import METHODS

RL = [name for name, method in METHODS.items() if method.objective == "rl"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"aggregation": how}) for name in ("sgpo", "luffy", "hpt")
      for how in ("response_mean", "token_mean", "sequence_mean") if how != METHODS[name].aggregation),
    ("sgpo", {"kl_clip": "value"}), ("reverse_kl", {"kl_clip": "value"}),
    ("sgpo", {"target_selection": "most_reachable_per_token"}), ("guided_sft", {"target_selection": "all_correct"}),
    ("sgpo", {"advantage_std": "population"}), ("sgpo", {"advantage_std": "none"}), ("sgpo", {"advantage_eps": 0.5}),
    ("sgpo", {"clip_low": 0.1, "clip_high": 0.1}), ("sgpo", {"clip_low": 1.0, "clip_high": math.inf}),
    ("sgpo", {"entropy_coefficient": 0.3}), ("luffy", {"entropy_coefficient": 0.3}),
    ("hpt", {"entropy_coefficient": 0.3, "expert_gate": 1, "aggregation": "response_mean"}),
    ("hpt", {"expert_gate": 1, "expert_coefficient": 0.3}), ("luffy", {"shaping_gamma": 0.01}),
    *((name, {"guided_side": side, "ema_decay": 0.7}) for name in ("sgpo", "reverse_kl", "no_proximal")
      for side in ("frozen", "ema")),
    ("no_adaptive_weight", {"alpha_fixed": 2.5}), ("sgpo", {"alpha_base": 0.2, "alpha_gamma": 0.3, "alpha_max": 0.4}),
    ("group_advantage_weight", {"advantage_std": "population", "alpha_max": 1.2}),
    ("sgpo", {"expert": "group"}), ("sgpo", {"expert": "fallback", "expert_gate": 1}),
    *((name, {"layout": layout}) for name in ("sgpo", "luffy", "hpt") for layout in ("left", "packed")),
]
"""(method, fields in which it differs from its recipe)."""
CUTS = {"one batch": (128, False), "other order, micro-batches of 2": (2, True)}
COUNTS = ("policy_clipped_count", "policy_token_count", "kl_clipped_count", "kl_token_count", "gap_sum", "entropy_sum",
          "measured_token_count", "expert_p_sum", "expert_token_count")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


# --- the naive side ---------------------------------------------------------------------------------------------
def naive_advantages(rewards, eps, std):
    mean = sum(rewards) / len(rewards)
    if std == "none":
        return [r - mean for r in rewards]
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - (std == "sample"))
    return [(r - mean) / (math.sqrt(variance) + eps) for r in rewards]


def naive_policy(logp_T, old_logp_T, advantage, low, high):
    """Eq. 1, token by token: min(rho A, clip(rho, 1 - low, 1 + high) A); and how many tokens the clip binds."""
    terms, bound = [], 0
    for now, before in zip(logp_T, old_logp_T.detach(), strict=True):
        rho = torch.exp(now - before)
        clipped = min(max(rho.item(), 1 - low), 1 + high) * advantage
        binds = clipped < rho.item() * advantage
        terms.append(torch.tensor(clipped, dtype=torch.float64) if binds else rho * advantage)
        bound += binds
    return torch.stack(terms), bound


def naive_expert(logp_T, advantage, gamma):
    """LUFFY: A p / (p + gamma), with the policy's own probability, no ratio and no clip."""
    return torch.stack([advantage * torch.exp(x) / (torch.exp(x) + gamma) for x in logp_T])


def naive_distillation(method, guided_TV, unguided_TV, tokens):
    """Token terms of Eq. 3 and 5, of the reverse divergence, or of cross-entropy; and how many were clipped."""
    if method.distillation == "cross_entropy":
        return -torch.stack([row[token] for row, token in zip(unguided_TV, tokens, strict=True)]), 0
    terms, clipped = [], 0
    for log_p, log_q in zip(guided_TV.detach(), unguided_TV, strict=True):
        first, second = (log_p, log_q) if method.distillation == "forward_kl" else (log_q, log_p)
        d = (first.exp() * (first - second)).sum()
        beyond = d.item() > method.kl_delta
        if beyond:
            d = d * (method.kl_delta / d.item() if method.kl_clip == "value" else 0.0)
        terms.append(d)
        clipped += beyond
    return torch.stack(terms), clipped


def naive_targets(method, group, start):
    """Eq. 4, per token, or all of C; none without distillation or where C is empty."""
    correct = [o for o in group.guided if o.verdict.status == "correct"]
    if method.distillation == "none" or not correct:
        return []
    if method.target_selection == "all_correct":
        return correct
    reach = [start.of_tokens(group.unguided_prompt_ids, o.token_ids).sum().item() for o in correct]
    if method.target_selection == "most_reachable_per_token":
        reach = [total / len(o.token_ids) for total, o in zip(reach, correct, strict=True)]
    return [correct[reach.index(max(reach))]]


def naive_alpha(method, group, targets):
    """Eq. 6, Eq. 8 or a constant; 0 without a target."""
    rewards = [o.verdict.reward for o in group.autonomous]
    if not targets or method.weighting == "fixed":
        return method.alpha_fixed if targets else 0.0
    if method.weighting == "group_advantage":
        raw = naive_advantages([*rewards, targets[0].verdict.reward], method.advantage_eps, method.advantage_std)[-1]
    else:
        p_auto = sum(rewards) / len(rewards)
        p_guide = sum(o.verdict.reward for o in group.guided) / len(group.guided)
        raw = method.alpha_base * (p_guide - p_auto + method.alpha_gamma) / (p_auto + method.alpha_gamma)
    return min(max(raw, 0.0), method.alpha_max)


def naive_mean(how, learned, lengths):
    """Token terms of each problem's learned responses -> one number; `lengths` are those of its whole group."""
    if how == "token_mean":  # all tokens of the mini-batch weigh the same
        return sum(terms.sum() for rows in learned for terms in rows) / sum(map(sum, lengths))
    of_problems = [sum(terms.sum() / (len(terms) if how == "response_mean" else LONGEST) for terms in rows) / len(group)
                   for rows, group in zip(learned, lengths, strict=True)]
    return sum(of_problems) / len(of_problems)


def naive_losses(world: World, method) -> tuple[dict[str, Tensor], collections.Counter]:
    """({term: loss}, facts) of a mini-batch of all problems; its whole loss is the sum of the terms."""
    live, start, problems = world.moved, world.start, len(world.groups)
    guided = {"live": live, "frozen": start, "ema": world.average(method.ema_decay)}[method.guided_side]
    policy, entropy, shaped, lengths = ([[] for _ in world.groups] for _ in range(4))
    facts: collections.Counter = collections.Counter()
    imitation = distillation = torch.zeros((), dtype=torch.float64)
    for i, group in enumerate(world.groups):
        q, expert = group.unguided_prompt_ids, group.expert
        joins = method.expert == "group"
        responses = [*group.autonomous, *([expert] if joins else [])]
        lengths[i] = [len(o.token_ids) for o in responses]
        advantages = naive_advantages([o.verdict.reward for o in responses], method.advantage_eps,
                                      method.advantage_std)
        falls_back = method.expert == "fallback" and sum(
            o.verdict.status == "correct" for o in group.autonomous) <= method.expert_gate

        for o, advantage in zip(group.autonomous, advantages, strict=not joins):
            now_TV, old_T = live(q, o.token_ids), start.of_tokens(q, o.token_ids)
            entropy_T = -(now_TV.exp() * now_TV).sum(-1)
            facts.update(entropy_sum=entropy_T.sum().item(), measured_token_count=len(o.token_ids),
                         gap_sum=sum(abs(a - b) for a, b in zip(old_T.tolist(), o.sampler_logp, strict=True)))
            if method.policy_gradient and not falls_back:
                terms_T, bound = naive_policy(live.of_tokens(q, o.token_ids), old_T, advantage, method.clip_low,
                                              method.clip_high)
                policy[i].append(terms_T)
                entropy[i].append(entropy_T)
                facts.update(policy_clipped_count=bound, policy_token_count=len(terms_T))

        if joins or falls_back:
            expert_TV, expert_T = live(q, expert.token_ids), live.of_tokens(q, expert.token_ids)
            entropy[i].append(-(expert_TV.exp() * expert_TV).sum(-1))
            facts.update(expert_p_sum=expert_T.exp().sum().item(), expert_token_count=len(expert_T))
            if joins:
                shaped[i].append(naive_expert(expert_T, advantages[-1], method.shaping_gamma))
            else:
                imitation = imitation - method.expert_coefficient * expert_T.mean() / problems
                facts["fallbacks"] += 1

        targets = naive_targets(method, group, start)
        alpha = naive_alpha(method, group, targets)
        facts.update({"alpha": alpha, f"{min(len(targets), 2)} targets": 1})
        for o in targets:
            terms_T, clipped = naive_distillation(method, guided(group.guided_prompt_ids, o.token_ids),
                                                  live(q, o.token_ids), o.token_ids)
            distillation = distillation + alpha * terms_T.sum() / len(o.token_ids) / len(targets) / problems
            if alpha > 0 and method.distillation != "cross_entropy":
                facts.update(kl_clipped_count=clipped, kl_token_count=len(terms_T))
    how = method.aggregation
    return {"loss_grpo": -naive_mean(how, policy, lengths), "loss_kd": distillation,
            "loss_expert": imitation - naive_mean(how, shaped, lengths),
            "loss_entropy": -method.entropy_coefficient * naive_mean(how, entropy, lengths)}, facts


def naive_gradient(world: World, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*world.moved.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


# --- agreement --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RL)
def test_what_cannot_teach_is_left_out_and_changes_no_gradient(world, name):
    """Same gradient, losses and shares; fewer tokens in passes, and all of them accounted for."""
    whole, part = (opened(world, configured(name, skip_untaught=skips)) for skips in (False, True))
    found = []
    for session in (whole, part):
        works = plan(session, world.groups)
        old = autonomous_logp(session, works)
        sums = collections.Counter()
        accumulate(session, works, old, sums)
        found.append(({n: p.grad for n, p in session.policy.model.named_parameters()}, sums))
    for (n, expected), got in zip(found[0][0].items(), found[1][0].values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=n)
    for term in ("loss_grpo", "loss_kd", "loss_expert", "policy_token_count", "policy_clipped_count", "kl_token_count"):
        assert math.isclose(found[0][1][term], found[1][1][term], rel_tol=1e-9, abs_tol=1e-12), term
    method = part.config.method
    untaught = sum(len(o.prompt_ids) + len(o.token_ids) for w in works for o, a in zip(
        w.group.autonomous, w.advantages, strict=True)
        if o is not works[0].group.autonomous[0]  # which is measured in every step
        and (w.imitates or not method.policy_gradient or not (a or method.entropy_coefficient)))
    assert 0 < found[1][1]["measured_token_count"] <= found[0][1]["measured_token_count"]
    assert part.work["skipped"] - whole.work["skipped"] == untaught
    assert whole.work["computed"] - part.work["computed"] == 2 * untaught  # the old log-probabilities, and the update


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in RL), *OPTIONS],
                         ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={x}" for k, x in v.items()) or "-")
def test_the_gradient_of_a_mini_batch_is_the_naive_one(world, name, changes):
    """Gradients, losses and counts, in one batch, and in micro-batches with problems in another order."""
    method = configured(name, **changes).method
    losses, facts = naive_losses(world, method)
    expected = naive_gradient(world, sum(losses.values()))
    for cut, (micro_batch, shuffled) in CUTS.items():
        groups = list(world.groups)
        if shuffled:
            random.Random(1).shuffle(groups)
        found, sums, works = ours(world, configured(name, micro_batch, **changes), groups)
        assert_same_gradient(found, expected, cut)
        for term, loss in losses.items():
            assert math.isclose(sums[term], torch.as_tensor(loss).item(), rel_tol=1e-5, abs_tol=1e-6), (cut, term)
        for count in COUNTS:
            assert math.isclose(sums[count], facts[count], rel_tol=1e-9), (cut, count)
        assert math.isclose(sum(w.alpha for w in works), facts["alpha"], rel_tol=1e-9)
        assert sum(w.imitates for w in works) == facts["fallbacks"]
    distils, diverges = method.distillation != "none", method.distillation in ("forward_kl", "reverse_kl")
    clips = {"policy": method.policy_gradient and method.clip_low < 1, "kl": diverges and method.kl_delta < math.inf}
    for what, wanted in clips.items():
        assert (0 < facts[f"{what}_clipped_count"] < facts[f"{what}_token_count"]) == wanted, what
    assert (0 < facts["fallbacks"] < len(world.groups)) == (method.expert == "fallback")
    assert (facts["1 targets"] + facts["2 targets"] > 0) == distils
    assert (facts["2 targets"] > 0) == (distils and method.target_selection == "all_correct")


def test_the_problems_take_every_branch(world):
    """What the agreement above would not show if the problems were all alike."""
    sgpo, per_token = (configured("sgpo", target_selection=s).method
                       for s in ("most_reachable", "most_reachable_per_token"))
    chosen = [naive_targets(sgpo, g, world.start) for g in world.groups]
    alphas = [naive_alpha(sgpo, g, t) for g, t in zip(world.groups, chosen, strict=True)]
    assert alphas[1] == 0.0 and chosen[1], "alpha is clipped at 0 where the autonomous group does better"
    assert alphas[2] == 0.8 and 0 < alphas[0] < 0.8, "it is clipped at alpha_max, and lies in between"
    assert alphas[3] == 0.0 and not chosen[3], "and is 0 where C is empty"
    swapped = [dataclasses.replace(g, unguided_prompt_ids=g.guided_prompt_ids) for g in world.groups]
    others = {"longer ones": [naive_targets(per_token, g, world.start) for g in world.groups],
              "the first": [[o for o in g.guided if o.verdict.correct][:1] for g in world.groups],
              "likely ones under the guided prompt": [naive_targets(sgpo, g, world.start) for g in swapped],
              "likely ones after the update": [naive_targets(sgpo, g, world.moved) for g in world.groups]}
    for what, other in others.items():
        assert chosen != other, f"a rule that takes {what} would go unnoticed"
    eq8 = [naive_alpha(configured("group_advantage_weight").method, g, t)
           for g, t in zip(world.groups, chosen, strict=True)]
    assert eq8[1] == 0.0 and any(0 < a < 0.8 for a in eq8) and 0.8 in eq8
    lengths = {len(o.token_ids) for g in world.groups for o in g.responses}
    assert min(lengths) <= 2 and max(lengths) > LONGEST, "sequences are divided by a length that none has"
    ratios = torch.cat([(world.moved.of_tokens(o.prompt_ids, o.token_ids) -
                         world.start.of_tokens(o.prompt_ids, o.token_ids)).exp()
                        for g in world.groups for o in g.autonomous])
    assert (ratios < 0.8).sum() > 5 and (ratios > 1.28).sum() > 5, "beyond both bounds of the clip"


def test_every_word_of_every_choice_is_among_the_cases():
    methods = [METHODS[name] for name in RL] + [configured(name, **changes).method for name, changes in OPTIONS]
    for name, words in CHOICES.items():
        elsewhere = {"supervised", "none"} if name == "objective" else set()
        assert {getattr(m, name) for m in methods} >= set(words) - elsewhere, name
    assert {configured(name, **changes).train.layout for name, changes in OPTIONS} == {"right", "left", "packed"}
    assert set(RL) == set(METHODS) - {"sft", "base"}
