"""The named profiles and methods: the paper's numbers, what sets a method apart, and fields that cannot go together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sgpo_lib.config import RunConfig, difference, field_docs, from_yaml, to_yaml
from sgpo_lib.config_checks import validate
from sgpo_lib.method_config import CHOICES, MethodConfig
from sgpo_lib.recipes import METHODS, PROFILES, from_parameters

FULL_SCALE = ("qwen2.5-1.5b", "qwen2.5-7b", "llama3-8b")
DEFAULT = RunConfig()
TABLES: dict[str, dict[str, Any]] = {
    # Table 2
    "no_distillation": {"g2": 0, "distillation": "none"},
    "no_grpo": {"policy_gradient": False},
    "no_proximal": {"target_selection": "all_correct", "kl_delta": math.inf},
    "no_kl_clip": {"kl_delta": math.inf},
    "no_target_selection": {"target_selection": "all_correct"},
    "no_adaptive_weight": {"weighting": "fixed"},
    # Tables 3, 6 and 7
    "guided_sft": {"distillation": "cross_entropy"},
    "reverse_kl": {"distillation": "reverse_kl"},
    "group_advantage_weight": {"weighting": "group_advantage"},
}
"""The paper's ablations and variants: the fields in which each differs from SGPO."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_with_every_method_is_valid_and_repeatable(profile, method, tmp_path):
    config = from_parameters(profile, method, seed=5)
    assert (config.profile, config.method.method, config.seed) == (profile, method, 5)
    assert validate(config) is config
    assert config == from_parameters(profile, method, seed=5)
    assert config.label.startswith(f"{profile}-{method}-s5-")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("profile", PROFILES)
def test_methods_of_a_profile_differ_in_the_objective_alone(profile):
    sgpo = from_parameters(profile, "sgpo")
    for method in set(METHODS) - {"sft", "hpt"}:
        changed = {row.partition(":")[0] for row in difference(sgpo, from_parameters(profile, method))}
        assert all(name.startswith("method.") for name in changed), changed
    assert from_parameters(profile, "sft").method.objective == "supervised"
    assert from_parameters(profile, "base").method.objective == "none"


def test_the_order_is_defaults_profile_method_overrides():
    config = from_parameters("tiny", "sft_grpo", g1=6, **{"train.steps": 7})
    assert (config.method.g1, config.method.g2, config.train.steps) == (6, 0, 7)
    assert config.rollout.max_new_tokens == PROFILES["tiny"]["max_new_tokens"] != DEFAULT.rollout.max_new_tokens
    assert config.reward == DEFAULT.reward


def test_a_run_on_tiny_names_the_base_that_it_starts_from():
    assert from_parameters("tiny").model.revision != ""
    assert from_parameters("tiny", revision="deadbeef").model.revision == "deadbeef"
    assert from_parameters("smollm2").model.revision == ""


@pytest.mark.parametrize("profile", PROFILES)
def test_the_papers_numbers_in_the_method(profile):
    config = from_parameters(profile, "sgpo")
    m = config.method
    assert (m.g1, m.g2) == (8, 4)
    assert (m.clip_low, m.clip_high) == (0.2, 0.28)
    assert m.kl_delta == 1.0
    assert (m.alpha_base, m.alpha_gamma, m.alpha_max) == (0.5, 0.1, 0.8)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 0.95)
    assert (m.objective, m.distillation) == ("rl", "forward_kl")


def test_the_baselines_have_the_papers_sample_budgets():
    budget = {name: (m.g1, m.g2, m.expert) for name, m in METHODS.items() if m.objective == "rl"}
    guided = {name: (8, 4, "none") for name in ("sgpo", *TABLES) if name != "no_distillation"}
    assert budget == {
        **guided, "no_distillation": (8, 0, "none"), "grpo8": (8, 0, "none"), "sft_grpo": (12, 0, "none"),
        "luffy": (11, 0, "group"), "luffy8": (7, 0, "group"), "hpt": (12, 0, "fallback")}
    assert set(METHODS) == {*budget, "sft", "base"} and all(m.method == name for name, m in METHODS.items())


def fields(one: RunConfig, other: RunConfig) -> dict[str, Any]:
    """Dotted name -> value in `other`, where the two differ in more than the method's name."""
    names = [row.partition(":")[0] for row in difference(one, other)]
    return {n: getattr(getattr(other, n.partition(".")[0]), n.partition(".")[2]) for n in names if n != "method.method"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", TABLES)
def test_an_ablation_is_sgpo_but_for_the_fields_of_its_table(profile, method):
    changed = fields(from_parameters(profile, "sgpo"), from_parameters(profile, method))
    assert changed == {f"method.{name}": value for name, value in TABLES[method].items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_without_distillation_is_grpo_with_8_under_the_papers_name(profile):
    grpo8 = from_parameters(profile, "grpo8")
    assert fields(grpo8, from_parameters(profile, "no_distillation")) == {}
    assert fields(grpo8, from_parameters(profile, "sft_grpo")) == {"method.g1": 12}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method, g1", [("luffy", 11), ("luffy8", 7)])
def test_luffy_is_grpo_with_an_expert_in_the_group_and_the_originals_loss(profile, method, g1):
    """11 + 1 (or 7 + 1): advantage not divided by a deviation, no clip, gamma 0.1, sums divided by the longest."""
    config = from_parameters(profile, method)
    assert fields(from_parameters(profile, "grpo8"), config) == {
        "method.g1": g1, "method.expert": "group", "method.advantage_std": "none", "method.clip_low": 1.0,
        "method.clip_high": math.inf, "method.aggregation": "sequence_mean", "method.entropy_coefficient": 0.00025}
    assert config.method.shaping_gamma == 0.1
    assert config.method.entropy_coefficient == 0.001 * 8192 / 32768  # per token, beside a policy term over 8192


HPT = {"tiny": (0, 1.0, None), "smollm2": (0, 1.0, None), "qwen2.5-1.5b": (0, 0.3, 5e-6), "qwen2.5-7b": (0, 1.0, 5e-6),
       "llama3-8b": (3, 1.0, 5e-6)}
"""Profile -> HPT's gate (of 12), coefficient of the cross-entropy, and learning rate where it has its own."""


@pytest.mark.parametrize("profile", PROFILES)
def test_hpt_has_the_gate_coefficient_and_rate_of_its_scripts(profile):
    gate, coefficient, lr = HPT[profile]
    config = from_parameters(profile, "hpt")
    expected: dict[str, Any] = {
        "method.expert": "fallback", "method.expert_gate": gate, "method.expert_coefficient": coefficient,
        "method.g1": 12, "train.lr": lr or from_parameters(profile, "luffy").train.lr}
    found = fields(from_parameters(profile, "luffy"), config)
    usual = {"method.expert_gate": 0, "method.expert_coefficient": 1.0, "train.lr": from_parameters(profile).train.lr}
    assert found == {name: value for name, value in expected.items() if usual.get(name) != value}
    other = from_parameters(profile, "hpt", expert_gate=5, lr=3e-3, expert_coefficient=0.7)
    assert (other.method.expert_gate, other.train.lr, other.method.expert_coefficient) == (5, 3e-3, 0.7)


@pytest.mark.parametrize("profile", FULL_SCALE)
def test_the_supervised_warm_up_has_the_papers_settings(profile):
    config = from_parameters(profile, "sft")
    assert (config.train.lr, config.train.lr_warmup_ratio, config.train.problems_per_step) == (1e-5, 0.1, 64)
    assert (config.method.objective, config.method.guided_share, config.train.epochs) == ("supervised", 0.0, 10.0)
    assert config.train.mini_batch == 0


@pytest.mark.parametrize("profile", FULL_SCALE)
def test_the_full_scale_profiles_have_the_papers_settings(profile):
    config = from_parameters(profile, "sgpo")
    assert config.train.lr == 1e-6
    assert config.data.warmup_share == pytest.approx(1 / 3)
    assert config.model.lora_rank == 0
    assert "/" in config.model.source


def test_a_given_source_or_length_clears_what_the_profile_set_for_its_own():
    assert from_parameters("smollm2", problems="mine.jsonl").data.problem_args == {}
    assert from_parameters("smollm2").data.problem_args != {}
    paper = from_parameters("qwen2.5-7b")
    assert paper.train.epochs == 10.0 and from_parameters("qwen2.5-7b", steps=40).train.epochs == 0.0


# --- refused ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "alpha_base", "alpha_gamma", "alpha_fixed", "shaping_gamma", "expert_coefficient", "entropy_coefficient",
    "advantage_eps"])
def test_what_must_be_a_number_is_not_infinite(name):
    """An infinite alpha_gamma makes every alpha NaN, which passes for no target; others spoil the first update."""
    with pytest.raises(ValueError, match=rf"method\.{name}: got inf, expected"):
        from_parameters("tiny", "sgpo", **{name: float("inf")})


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_word_is_refused_with_all_known_ones(name):
    with pytest.raises(ValueError) as error:
        from_parameters("tiny", "sgpo", **{name: "lve"})
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1] == f"method.{name}: got 'lve', expected one of {', '.join(map(repr, CHOICES[name]))}"


def test_every_word_of_the_objective_is_checked_and_documented():
    words = {f.name for f in dataclasses.fields(MethodConfig) if isinstance(f.default, str)} - {"method"}
    assert set(CHOICES) == words
    for name, known in CHOICES.items():
        assert getattr(MethodConfig(), name) in known
        assert all(f"`{word}`" in field_docs()[f"method.{name}"] for word in known)


@pytest.mark.parametrize("method, values, field", [
    ("sgpo", {"g2": 0}, "g2"), ("grpo8", {"g2": -1}, "g2"), ("guided_sft", {"g2": 0}, "g2"),
    ("luffy", {"g1": 1}, "g1"), ("hpt", {"g1": 1}, "g1"),
    ("hpt", {"expert_gate": 12}, "expert_gate"), ("hpt", {"expert_gate": -1}, "expert_gate"),
    ("hpt", {"g1": 3, "expert_gate": 3}, "expert_gate"),
    ("grpo8", {"policy_gradient": False}, "policy_gradient"), ("luffy", {"policy_gradient": False}, "policy_gradient"),
    ("hpt", {"policy_gradient": False}, "policy_gradient"),
    ("no_grpo", {"distillation": "none"}, "policy_gradient"), ("no_grpo", {"expert": "group"}, "policy_gradient"),
    ("grpo8", {"guided_side": "frozen"}, "guided_side"), ("guided_sft", {"guided_side": "ema"}, "guided_side"),
    ("group_advantage_weight", {"advantage_std": "none"}, "advantage_std"),
    ("no_grpo", {"entropy_coefficient": 0.01}, "entropy_coefficient"),
])  # fmt: skip
def test_fields_that_do_not_go_together_are_refused_with_a_cure(method, values, field):
    with pytest.raises(ValueError) as error:
        from_parameters("tiny", method, **values)
    lines = str(error.value).splitlines()
    assert len(lines) == 2, lines
    value = values.get(field, getattr(METHODS[method], field))
    assert lines[1].strip().startswith(f"method.{field}: got {value!r}, expected "), lines
