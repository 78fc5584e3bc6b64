"""What must hold exactly, or nearly, between methods: limits, equal methods, no gradient where none belongs.

"Bit for bit" compares with `torch.equal`; both sides then differ in nothing but the field that is spoken of.
"""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
from objective_world import (
    END,
    PAD,
    World,
    assert_same_gradient,
    configured,
    gradient,
    judged,
    make_world,
    opened,
    ours,
    update,
    written_groups,
)

from sgpo_lib.guided_side import GuidedSide
from sgpo_lib.objective import accumulate_distillation, autonomous_logp, plan

DIVERGENCES = ("forward_kl", "reverse_kl")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def assert_same_bits(one: dict, other: dict) -> None:
    assert any(bool(g.abs().max() > 1e-3) for g in one.values())
    assert all(torch.equal(one[name], other[name]) for name in one)


def largest(grads: dict) -> float:
    return max(float(g.abs().max()) for g in grads.values())


def distillation_gradient(session, groups):
    """(gradient, sums, works) of the distillation term alone, at the session's weights."""
    sums: collections.Counter = collections.Counter()
    works = plan(session, groups)
    accumulate_distillation(session, works, len(works), sums)
    return {n: p.grad for n, p in session.policy.model.named_parameters()}, sums, works


# --- equal methods ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [
    {"alpha_max": 0.0}, {"kl_delta": 1e-12}, {"weighting": "fixed", "alpha_fixed": 0.0}], ids=",".join)
def test_without_weight_or_tokens_sgpo_is_grpo_to_the_bit(world, changes):
    """alpha = 0, or a delta that masks every token, adds nothing to the gradient of the same autonomous groups."""
    sgpo, sums, works = ours(world, configured("sgpo", **changes))
    grpo, *_ = ours(world, configured("grpo8"))
    assert_same_bits(sgpo, grpo)
    assert sum(bool(w.targets) for w in works) == 5
    assert sums["kl_clipped_count"] == sums["kl_token_count"]
    assert (sums["kl_token_count"] > 0) == ("kl_delta" in changes)
    assert_same_bits(ours(world, configured("no_distillation"))[0], grpo)


@pytest.mark.parametrize("clip", ["mask", "value"])
def test_an_infinite_delta_is_no_clipping(world, clip):
    unclipped, sums, _ = ours(world, configured("no_kl_clip", kl_clip=clip))
    assert sums["kl_clipped_count"] == 0 < sums["kl_token_count"]
    assert_same_bits(unclipped, ours(world, configured("sgpo", kl_delta=1e6))[0])


def test_no_proximal_is_both_of_its_parts(world):
    both, *_ = ours(world, configured("no_kl_clip", target_selection="all_correct"))
    assert_same_bits(ours(world, configured("no_proximal"))[0], both)


def test_without_old_log_probabilities_the_update_is_on_policy(world):
    """One update per batch: `old` is the policy itself, no ratio, nothing clipped."""
    session = opened(world, configured("sgpo"))
    works = plan(session, world.groups)
    with_old, sums = gradient(session, works, autonomous_logp(session, works))
    without, _ = gradient(session, works, None)
    assert_same_bits(with_old, without)
    assert sums["policy_clipped_count"] == 0
    update(world, session)
    off, _ = gradient(session, works, autonomous_logp(opened(world, session.config), works))
    on, _ = gradient(session, works, None)
    assert any(not torch.allclose(off[n], on[n], rtol=0.01) for n in on), "afterwards they differ"


# --- LUFFY and HPT ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reward", [0, 1])
def test_luffy_learns_nothing_where_the_expert_is_judged_like_every_rollout(world, reward):
    """All advantages are zero: no policy gradient, only the entropy bonus is left."""
    groups = written_groups([((reward,) * 4, (), reward)] * 3)
    nothing, sums, works = ours(world, configured("luffy", entropy_coefficient=0.0), groups)
    assert largest(nothing) == 0.0 and sums["expert_token_count"] > 0
    assert [w.expert_advantage for w in works] == [0.0] * 3
    bonus, sums, _ = ours(world, configured("luffy", entropy_coefficient=0.5), groups)
    entropies = [-(s.exp() * s).sum() / 20 for g in groups for s in
                 (world.moved(o.prompt_ids, o.token_ids) for o in (*g.autonomous, g.expert))]
    loss = -0.5 * sum(entropies) / 15
    names, parameters = zip(*world.moved.model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    assert_same_gradient(bonus, expected)
    assert math.isclose(sums["loss_entropy"], loss.item(), rel_tol=1e-6) and sums["loss_grpo"] == 0.0


def test_luffys_expert_raises_the_bar_for_the_group(world):
    """Four failures and a correct expert: mean 1/5 over all five, and the expert's own advantage is 4/5."""
    groups = written_groups([((0, 0, 0, 0), (), 1)])
    _, _, (work,) = ours(world, configured("luffy"), groups)
    assert work.advantages == pytest.approx([-0.2] * 4) and work.expert_advantage == pytest.approx(0.8)


def test_hpt_without_a_fallback_is_plain_policy_gradient(world):
    """The expert solutions are there and change nothing."""
    groups = [g for g in world.groups if any(o.verdict.correct for o in g.autonomous)]
    assert len(groups) == 5
    hpt, sums, works = ours(world, configured("hpt"), groups)
    assert not any(w.imitates for w in works) and sums["expert_token_count"] == 0
    assert_same_bits(hpt, ours(world, configured("hpt", expert="none"), groups)[0])
    assert_same_bits(hpt, ours(world, configured("hpt", expert_coefficient=9.0), groups)[0])


@pytest.mark.parametrize("micro_batch", [1, 128])
def test_hpt_where_all_fall_back_is_sft(world, micro_batch):
    """coefficient x mean over problems of the expert solution's token mean; the rollouts are only measured."""
    groups = written_groups([((0, 0, 0, 0), (), 1), ((1, 0, 0, 0), (), 0), ((0, 0, 0, 0), (), 1)])
    config = configured("hpt", micro_batch, expert_gate=1, expert_coefficient=0.3, entropy_coefficient=0.0)
    found, sums, works = ours(world, config, groups)
    assert all(w.imitates for w in works)
    assert sums["policy_token_count"] == 0 and sums["loss_grpo"] == 0
    assert sums["measured_token_count"] == sum(len(o.token_ids) for g in groups for o in g.autonomous)
    losses = [-world.moved.of_tokens(g.unguided_prompt_ids, g.expert.token_ids).mean() for g in groups]
    loss = 0.3 * sum(losses) / 3
    names, parameters = zip(*world.moved.model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    assert_same_gradient(found, expected)


@pytest.mark.parametrize("name", ["luffy", "hpt", "sgpo", "no_grpo", "guided_sft"])
def test_mini_batches_of_one_problem_give_no_nan(world, name):
    """Also where a mini-batch has no expert row, no target or nothing to learn."""
    whole: dict = {}
    for group in world.groups:
        found, sums, _ = ours(world, configured(name, 1), [group])
        assert all(bool(g.isfinite().all()) for g in found.values()), group.problem.id
        assert all(math.isfinite(v) for v in sums.values())
        whole = {n: whole.get(n, 0) + g / len(world.groups) for n, g in found.items()}
    assert_same_gradient(ours(world, configured(name))[0], whole, "every problem weighs the same")


# --- the guided side --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_average_without_memory_is_live(world, divergence):
    live, *_ = ours(world, configured("sgpo", distillation=divergence))
    ema, *_ = ours(world, configured("sgpo", distillation=divergence, guided_side="ema", ema_decay=0.0))
    assert_same_bits(live, ema)


@pytest.mark.parametrize("side", ["frozen", "ema"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_before_the_first_update_every_guided_side_is_live(world, divergence, side):
    found = []
    for kind in ("live", side):
        session = opened(world, configured("sgpo", distillation=divergence, guided_side=kind))
        found.append(distillation_gradient(session, world.groups)[0])
    assert_same_bits(*found)


@pytest.mark.parametrize("side", ["live", "frozen", "ema"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_prompts_on_both_sides_diverge_nowhere(world, divergence, side):
    """No divergence and no gradient, whatever the weights, as long as both sides have the same."""
    groups = copy.deepcopy(world.groups)
    config = configured("no_adaptive_weight", distillation=divergence, guided_side=side, ema_decay=0.0)
    real, *_ = distillation_gradient(opened(world, config), groups)
    for group in groups:
        group.guided_prompt_ids = group.unguided_prompt_ids
    found, sums, works = distillation_gradient(opened(world, config), groups)
    assert any(w.targets for w in works) and sums["kl_token_count"] > 0
    assert abs(sums["kl_sum"]) < 1e-12 and abs(sums["loss_kd"]) < 1e-12
    assert largest(found) < 1e-12 < 1e-3 < largest(real)


@pytest.mark.parametrize("side", ["frozen", "ema"])
def test_copies_get_no_gradient_and_change_only_by_following(world, side):
    session = opened(world, configured("sgpo", guided_side=side, ema_decay=0.7))
    copies = session.guided_side.copies
    before = [c.clone() for c in copies]
    distillation_gradient(session, world.groups)
    assert all(c.grad is None and not c.requires_grad for c in copies)
    assert all(torch.equal(c, b) for c, b in zip(copies, before, strict=True))
    start = [p.detach().clone() for p in session.policy.parameters()]
    update(world, session)
    kept = 1.0 if side == "frozen" else 0.7
    for c, old, new in zip(session.guided_side.copies, start, session.policy.parameters(), strict=True):
        torch.testing.assert_close(c, kept * old + (1 - kept) * new.detach(), rtol=1e-12, atol=1e-14)
        assert not torch.equal(new, old)


@pytest.mark.parametrize("side", ["live", "frozen", "ema"])
def test_the_live_weights_are_back_after_a_look_at_the_guided_side(world, side, monkeypatch):
    """The same memory, and also where the forward pass fails."""
    session = opened(world, configured("sgpo", guided_side=side))
    update(world, session)
    parameters, policy = session.policy.parameters(), session.policy
    where = [p.data_ptr() for p in parameters]
    values = [p.detach().clone() for p in parameters]
    batch = policy.token_batch([(g.guided_prompt_ids, g.guided[0].token_ids) for g in world.groups])
    hidden_NH, (matrix_VH, bias_V, _) = session.guided_side.states(batch)
    assert not hidden_NH.requires_grad and not matrix_VH.requires_grad and bias_V is None
    with torch.no_grad():
        same = torch.equal(hidden_NH, policy.response_hidden(batch)), torch.equal(matrix_VH, policy.head()[0])
    assert same == (side == "live",) * 2

    def fail(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "response_hidden", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.guided_side.states(batch)
    assert [p.data_ptr() for p in parameters] == where and all(p.requires_grad for p in parameters)
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))


def test_the_guided_side_of_an_adapter_copies_the_adapter_alone(world):
    from peft import LoraConfig, get_peft_model

    session = opened(world, configured("sgpo"))
    policy = session.policy
    policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    policy.lora = True
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3)
    side = GuidedSide(policy, "frozen", 0.9)
    assert len(side.copies) == len(policy.parameters()) == 2 * 7 * 2
    batch = policy.token_batch([(g.guided_prompt_ids, g.guided[0].token_ids) for g in world.groups])
    before, _ = side.states(batch)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-0.5)
        live = policy.response_hidden(batch)
    assert torch.equal(side.states(batch)[0], before) and not torch.allclose(live, before)


# --- what is a token --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["right", "left"])
@pytest.mark.parametrize("name", ["sgpo", "luffy", "hpt"])
def test_padding_with_the_end_token_changes_nothing(world, name, layout):
    """Every response ends in the end token, which is learned; padding is not, also where it has the same id."""
    config = configured(name, layout=layout)
    usual, sums, _ = ours(world, config)
    shared, shared_sums, _ = ours(world, config, pad=END)
    for parameter, wanted in usual.items():
        torch.testing.assert_close(shared[parameter], wanted, rtol=1e-12, atol=1e-12)
    assert shared_sums == sums
    assert sums["measured_token_count"] == sum(len(o.token_ids) for g in world.groups for o in g.autonomous)
    assert all(o.token_ids[-1] == END != PAD for g in world.groups for o in g.responses)


def test_a_verdict_decides_and_not_a_reward(world):
    """C of Eq. 2, and HPT's gate, count correct responses; a reward between 0 and 1 is no half of one."""
    groups = copy.deepcopy(world.groups[:1])
    for o in (*groups[0].autonomous, *groups[0].guided):
        o.verdict = judged(0.9)
    sgpo, hpt = (ours(world, configured(name), groups)[2][0] for name in ("sgpo", "hpt"))
    assert sgpo.targets == [] and sgpo.alpha == 0.0
    assert hpt.imitates
