"""Sampling: repeatable per sample whatever the batch, drawn from the nucleus, token ids kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from sgpo_lib import testbed, tiny
from sgpo_lib.batching import TokenBatch
from sgpo_lib.losses.token_kl import token_logp_and_entropy
from sgpo_lib.policy import Policy
from sgpo_lib.prompts import expert_text, prompt_ids, response_ids
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Verdict
from sgpo_lib.rollouts import transformers_engine
from sgpo_lib.rollouts.groups import judge_groups, rollout_rows, sample_groups
from sgpo_lib.rollouts.interface import SampleRequest, sample_seed
from sgpo_lib.rollouts.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def policy() -> Policy:
    tokenizer = tiny.build_tokenizer()
    return Policy(tiny.build_model(tokenizer, 1), tokenizer, torch.device("cpu"), lora=False, context=512)


def requests(policy: Policy, count: int) -> list[SampleRequest]:
    problems = itertools.islice(testbed.generate(1), count)
    return [SampleRequest(prompt_ids(policy.tokenizer, p, guided=i % 2 == 0), sample_seed("test", i))
            for i, p in enumerate(problems)]


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(policy):
    wanted = requests(policy, 7)
    settings = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12}
    together = TransformersEngine(policy, 64).sample(wanted, **settings)
    apart = TransformersEngine(policy, 2).sample(wanted, **settings)
    backwards = TransformersEngine(policy, 64).sample(wanted[::-1], **settings)[::-1]
    torch.manual_seed(123)  # the global generator plays no part
    again = TransformersEngine(policy, 64).sample(wanted, **settings)
    for a, b, c, d in zip(together, apart, backwards, again, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids == d.token_ids
    other = [SampleRequest(r.prompt_ids, r.seed + 1) for r in wanted]
    assert [s.token_ids for s in TransformersEngine(policy, 64).sample(other, **settings)] != \
           [s.token_ids for s in together]


def test_draws_follow_the_nucleus_of_an_independent_computation(policy):
    """First tokens of 6,000 samples against the float64 nucleus: no token outside it, frequencies within 5 sigma."""
    prompt = requests(policy, 1)[0].prompt_ids
    temperature, top_p, count = 0.7, 0.6, 6000
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature
    weights = [math.exp(x - float(logits.max())) for x in logits.tolist()]
    probability = {i: w / sum(weights) for i, w in enumerate(weights)}
    nucleus, mass = {}, 0.0
    for token in sorted(probability, key=lambda i: -probability[i]):
        if mass >= top_p:
            break
        nucleus[token] = probability[token]
        mass += probability[token]
    drawn = TransformersEngine(policy, 6000).sample(
        [SampleRequest(prompt, sample_seed("nucleus", i)) for i in range(count)],
        temperature=temperature, top_p=top_p, max_new_tokens=1)
    counts: dict[int, int] = {}
    for sample in drawn:
        counts[sample.token_ids[0]] = counts.get(sample.token_ids[0], 0) + 1
    assert set(counts) <= set(nucleus)
    for token, p in nucleus.items():
        expected = p / mass
        sigma = math.sqrt(expected * (1 - expected) / count)
        assert abs(counts.get(token, 0) / count - expected) < 5 * sigma + 1e-9


def test_recorded_log_probabilities_are_the_trainers(policy):
    wanted = requests(policy, 5)
    samples = TransformersEngine(policy, 8).sample(wanted, temperature=1.3, top_p=0.8, max_new_tokens=10)
    batch = TokenBatch.build([(r.prompt_ids, s.token_ids) for r, s in zip(wanted, samples, strict=True)],
                             policy.pad_id())
    with torch.no_grad():
        logp_N, _ = token_logp_and_entropy(policy.response_hidden(batch), batch.target_N, policy.head(), 64)
    recorded = torch.tensor([x for s in samples for x in s.logp])
    assert torch.allclose(logp_N, recorded, atol=2e-5)


def test_the_end_token_belongs_to_the_response_and_nothing_after_it(policy):
    """A model that must end: the bias of the end token is raised through its embedding's row."""
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, 2)
    ending = Policy(model, tokenizer, torch.device("cpu"), lora=False, context=512)
    wanted = requests(ending, 40)
    samples = TransformersEngine(ending, 64).sample(wanted, temperature=3.0, top_p=1.0, max_new_tokens=200)
    stops = set(ending.stop_ids())
    assert {s.stop for s in samples} == {"end", "length"}, "both ways to stop occur in this draw"
    for sample in samples:
        assert len(sample.logp) == len(sample.token_ids)
        assert (sample.token_ids[-1] in stops) == (sample.stop == "end")
        assert not stops & set(sample.token_ids[:-1])


@pytest.mark.parametrize("leave", [0.0, 0.25, 2.0])
def test_greedy_responses_are_those_of_generate(leave, monkeypatch):
    """Against transformers' own loop, one prompt at a time, whenever finished responses leave the batch."""
    monkeypatch.setattr(transformers_engine, "_LEAVE", leave)
    tokenizer = tiny.build_tokenizer()
    policy = Policy(tiny.build_model(tokenizer, 1), tokenizer, torch.device("cpu"), lora=False, context=512)
    with torch.no_grad():
        for parameter in policy.model.parameters():  # as it is made it says the same token for ever
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    wanted = [*requests(policy, 9), *requests(policy, 3)]
    with torch.no_grad():
        own = [policy.model.generate(torch.tensor([r.prompt_ids]), do_sample=False, max_new_tokens=16,
                                     eos_token_id=None)[0, len(r.prompt_ids) :].tolist() for r in wanted]
    # what ends a response is the token that gives them most different lengths
    often = max({t for o in own for t in o}, key=lambda t: len({o.index(t) for o in own if t in o}))
    monkeypatch.setattr(Policy, "stop_ids", lambda self: [often])
    samples = TransformersEngine(policy, 64).sample(wanted, temperature=0.0, top_p=1.0, max_new_tokens=16)
    expected = [o[: o.index(often) + 1] if often in o else o for o in own]
    assert [list(s.token_ids) for s in samples] == expected and len({len(e) for e in expected}) > 2
    assert [s.stop for s in samples] == ["end" if often in o else "length" for o in own]


def test_the_whole_distribution_needs_no_sorted_vocabulary(monkeypatch):
    """With top_p = 1 the token of a draw is the same whether the head or everything is sorted."""
    logits = 2 * torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = transformers_engine.draw(logits, uniform, 0.7, 1.0)
    monkeypatch.setattr(transformers_engine, "_HEAD", 4000)
    whole = transformers_engine.draw(logits, uniform, 0.7, 1.0)
    assert torch.equal(found[0], whole[0])
    probability, order = torch.softmax(logits.double() / 0.7, -1).sort(descending=True)
    naive = [int(order[i, int((probability[i].cumsum(0) <= uniform[i]).sum())]) for i in range(50)]
    assert found[0].tolist() == naive
    torch.testing.assert_close(found[1], torch.log_softmax(logits, -1)[torch.arange(50), found[0]])


def test_a_model_without_a_cache_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "forward", lambda **kw: SimpleNamespace(logits=torch.zeros(1, 1, 9)))
    with pytest.raises(ValueError, match=r"Qwen.*keeps no cache of keys and values.*rollout.sampler=vllm"):
        TransformersEngine(policy, 8).sample(requests(policy, 1), temperature=1.0, top_p=1.0, max_new_tokens=2)


def test_a_prompt_without_room_is_refused(policy):
    with pytest.raises(ValueError, match="context is 512 tokens"):
        TransformersEngine(policy, 8).sample(requests(policy, 1), temperature=1.0, top_p=1.0, max_new_tokens=500)


def test_generation_defaults_of_a_model_do_not_bend_the_distribution(policy, tmp_path):
    """Qwen2.5-Instruct ships a repetition penalty; what is sampled must be the policy that trains."""
    from sgpo_lib.config import ModelConfig
    from sgpo_lib.policy import load_policy

    policy.save(tmp_path)
    folder = tmp_path / "model"
    stored = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**stored, "repetition_penalty": 1.8, "top_k": 3}))
    bent = load_policy(ModelConfig(source=str(folder), device="cpu"), str(folder), 0)
    settings = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 20}
    assert TransformersEngine(bent, 8).sample(requests(policy, 4), **settings) == \
        TransformersEngine(policy, 8).sample(requests(policy, 4), **settings)
    assert bent.stop_ids() == policy.stop_ids()


def test_groups_are_sampled_under_their_own_prompts(policy):
    config = from_parameters("tiny", g1=3, g2=2, max_new_tokens=6)
    problems = list(itertools.islice(testbed.generate(2), 2))
    groups = sample_groups(TransformersEngine(policy, 16), policy.tokenizer, problems, config, step=4)
    for group, problem in zip(groups, problems, strict=True):
        assert [len(group.autonomous), len(group.guided)] == [3, 2]
        assert all(o.prompt_ids == prompt_ids(policy.tokenizer, problem, guided=False) for o in group.autonomous)
        assert all(o.prompt_ids == prompt_ids(policy.tokenizer, problem, guided=True) for o in group.guided)
        tail = len(group.unguided_prompt_ids) - 1  # both prompts end in the same words
        assert group.guided_prompt_ids[-tail:] == group.unguided_prompt_ids[-tail:]
        for o in (*group.autonomous, *group.guided):
            o.verdict = Verdict("wrong", 0.0)
    rows = rollout_rows(groups)
    assert len(rows) == 10 and rows[0]["tokens"] == list(groups[0].autonomous[0].token_ids)
    with pytest.raises(ValueError, match="has not been judged"):
        groups[0].autonomous[0].verdict = None
        _ = groups[0].p_auto


class FakeVerifier:
    """Judges by length, and notes what it was asked."""

    def __init__(self):
        self.asked: list = []

    def judge(self, pairs):
        self.asked = list(pairs)
        return [Verdict("correct", 1.0) if len(text) > 60 else Verdict("wrong", 0.0) for _, text in self.asked]


@pytest.mark.parametrize("method", ["luffy", "hpt"])
def test_an_expert_solution_joins_a_group_and_is_judged_like_any_response(policy, method):
    config = from_parameters("tiny", method, g1=3, max_new_tokens=6, expert_gate=0)
    problems = list(itertools.islice(testbed.generate(2), 2))
    groups = sample_groups(TransformersEngine(policy, 16), policy.tokenizer, problems, config, step=4)
    verifier = FakeVerifier()
    judge_groups(verifier, groups)
    assert len(verifier.asked) == 2 * 4
    for group, problem in zip(groups, problems, strict=True):
        expert, text = group.expert, expert_text(problem)
        assert expert is group.responses[-1] and len(group.responses) == 4
        assert (problem, text) in verifier.asked and expert.reward == float(len(text) > 60)
        assert (expert.text, expert.stop, expert.guided, expert.sampler_logp) == (text, "written", False, ())
        assert expert.prompt_ids == group.autonomous[0].prompt_ids == group.unguided_prompt_ids
        assert expert.token_ids == response_ids(policy.tokenizer, text)
        assert expert.token_ids[-1] == policy.tokenizer.eos_token_id
        assert group.p_auto == sum(o.reward for o in group.autonomous) / 3, "the expert is no pass of the policy"
        assert group.guided == [] and group.p_guide == 0.0
    rows = rollout_rows(groups)
    assert [r["expert"] for r in rows] == [False, False, False, True] * 2
    same = sample_groups(TransformersEngine(policy, 16), policy.tokenizer, problems,
                         from_parameters("tiny", "grpo8", g1=3, max_new_tokens=6), step=4)
    assert all(g.expert is None for g in same)
    assert [[o.token_ids for o in g.autonomous] for g in same] == [[o.token_ids for o in g.autonomous] for g in groups]


def test_the_wording_of_both_prompts_is_configuration():
    """`data.guided_prompt` and `data.instruction` reach every prompt of a run through its problems."""
    from sgpo_lib.problems import load
    from sgpo_lib.prompts import autonomous_text, guided_text, strategy_text

    words = {"guided_prompt": "{problem}\n\nHint: {strategy}", "instruction": "Answer in \\boxed{}."}
    config = from_parameters("tiny", n_train=8, n_validation=2, n_test=2, **words)
    splits = load(config.data)
    for problem in (*splits.warmup, *splits.train, *splits.validation, *splits.test):
        own = f"{problem.prompt}\nAnswer in \\boxed{{}}."
        assert autonomous_text(problem) == own
        assert guided_text(problem, problem.strategy) == f"{own}\n\nHint: {strategy_text(problem.strategy)}"
    tricky = dataclasses.replace(splits.train[0], prompt="What is {strategy}?")
    assert guided_text(tricky, tricky.strategy).startswith("What is {strategy}?\nAnswer"), "filled in once"
    plain = load(from_parameters("tiny", n_train=8, n_validation=2, n_test=2).data)
    assert plain.fingerprint == splits.fingerprint and plain.train[0] == splits.train[0], "the same problems"
    for wrong in ("{strategy}", "{problem}", "{strategy} {strategy} {problem}"):
        with pytest.raises(ValueError, match=r"data\.guided_prompt: got .*once each"):
            from_parameters("tiny", guided_prompt=wrong)
