"""Both groups of each problem (Algorithm 1, lines 6 to 9), and the expert solution where a method learns from it:
sample, then judge. The verifier judges an expert solution like any response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_lib.config import RunConfig
from sgpo_lib.prompts import expert_text, prompt_ids, response_ids
from sgpo_lib.records import Problem, Rollout, RolloutGroup
from sgpo_lib.rewards import Verifier
from sgpo_lib.rollouts.interface import Engine, SampleRequest, sample_seed


def sample_groups(engine: Engine, tokenizer: Any, problems: Sequence[Problem], config: RunConfig,
                  step: int) -> list[RolloutGroup]:
    """o_1..o_G1 ~ pi(.|q) and o~_1..o~_G2 ~ pi(.|q,s) for each problem, all in one call to the engine."""
    method, rollout = config.method, config.rollout
    groups, requests = [], []
    for problem in problems:
        unguided = prompt_ids(tokenizer, problem, guided=False)
        guided = prompt_ids(tokenizer, problem, guided=True) if method.g2 else ()
        groups.append(RolloutGroup(problem, [], [], unguided, guided))
        for ids, count, name in ((unguided, method.g1, "autonomous"), (guided, method.g2, "guided")):
            requests += [SampleRequest(ids, sample_seed(config.seed, "rollout", step, problem.id, name, i))
                         for i in range(count)]
    samples = iter(engine.sample(requests, temperature=rollout.temperature, top_p=rollout.top_p,
                                 max_new_tokens=rollout.max_new_tokens))
    for group in groups:
        if method.expert != "none":
            text = expert_text(group.problem)
            group.expert = Rollout(group.problem.id, False, 0, group.unguided_prompt_ids,
                                   response_ids(tokenizer, text), text, "written")
        for is_guided, count in ((False, method.g1), (True, method.g2)):
            prompt = group.guided_prompt_ids if is_guided else group.unguided_prompt_ids
            for i in range(count):
                drawn = next(samples)
                text = tokenizer.decode(drawn.token_ids, skip_special_tokens=True)
                (group.guided if is_guided else group.autonomous).append(Rollout(
                    group.problem.id, is_guided, i, prompt, drawn.token_ids, text, drawn.stop, drawn.logp))
    return groups


def judge_groups(verifier: Verifier, groups: Sequence[RolloutGroup]) -> None:
    """Set the verdict of every response (Algorithm 1, line 9)."""
    pairs = [(g.problem, o) for g in groups for o in g.responses]
    for (_, rollout), verdict in zip(pairs, verifier.judge([(p, o.text) for p, o in pairs]), strict=True):
        rollout.verdict = verdict


def rollout_rows(groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """One JSON-safe row per response, for `Run.write_rollouts`."""
    return [{"problem": g.problem.id, "gold": g.problem.answer, "guided": o.guided, "expert": o is g.expert,
             "sample": o.sample,
             "text": o.text, "tokens": list(o.token_ids), "stop": o.stop, "reward": o.reward,
             "status": o.verdict.status if o.verdict else "", "reason": o.verdict.reason if o.verdict else ""}
            for g in groups for o in g.responses]
