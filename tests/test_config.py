"""Names, types, faults, YAML and fingerprints of configurations, and what notebooks may hold."""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from sgpo_lib.config import (
    SECTIONS,
    RunConfig,
    difference,
    field_docs,
    field_index,
    from_yaml,
    override,
    to_dict,
    to_yaml,
)
from sgpo_lib.recipes import METHODS, NOTEBOOK_FIELDS, PROFILES, from_parameters

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEAVES = sorted(set(field_index().values()))
DEFAULT = RunConfig()


def get(config: RunConfig, name: str) -> Any:
    """Value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def other_value(value: Any) -> Any:
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {**value, "new": 1} if isinstance(value, dict) else value + "x"


# --------------------------------------------------------------------------------------------------------- names


def test_the_index_holds_every_field_of_every_section():
    expected = {"profile", "seed"}
    for section in SECTIONS:
        expected |= {f"{section}.{f.name}" for f in dataclasses.fields(getattr(DEFAULT, section))}
    assert set(LEAVES) == expected
    assert len(SECTIONS) == 8


@pytest.mark.parametrize("name", LEAVES)
def test_short_and_dotted_name_set_the_same_field_and_no_other(name):
    value = other_value(get(DEFAULT, name))
    short = override(DEFAULT, {name.rpartition(".")[2]: value})
    assert short == override(DEFAULT, {name: value})
    assert get(short, name) == value
    assert [row.partition(":")[0] for row in difference(DEFAULT, short)] == [name]


@pytest.mark.parametrize("name", [*LEAVES, *SECTIONS])
def test_every_field_has_a_docstring(name):
    assert field_docs()[name].strip().endswith((".", ")", "one.", "it."))


def test_overrides_leave_the_original_alone():
    override(DEFAULT, {"steps": 5, "seed": 7, "g1": 3})
    assert RunConfig() == DEFAULT


@pytest.mark.parametrize("wrong, near", [
    ("stepz", "steps"), ("temprature", "temperature"), ("learning_rat", None), ("lora_rnk", "lora_rank"),
    ("train.stepz", "steps"), ("train.lrr", "lr"), ("method.alpha_gama", "alpha_gamma"),
    ("guided_sid", "guided_side"), ("shaping_gama", "shaping_gamma"), ("method.expert_gat", "expert_gate"),
])  # fmt: skip
def test_an_unknown_field_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match="unknown field") as error:
        override(DEFAULT, {wrong: 1})
    text = str(error.value)
    assert repr(wrong) in text
    assert "problems_per_step" in text.partition("Known: ")[2]
    if near:
        hint = text.partition("Did you mean '")[2].partition("'")[0]
        assert hint.rpartition(".")[2] == near


def test_an_unknown_profile_or_method_names_the_nearest_and_all_known():
    with pytest.raises(ValueError, match=r"unknown profile 'smolm2'\. Did you mean 'smollm2'\? Known: .*tiny"):
        from_parameters("smolm2")
    with pytest.raises(ValueError, match=r"unknown method 'grpo'\. Did you mean 'grpo8'\? Known: .*sft_grpo, sgpo"):
        from_parameters("tiny", "grpo")
    with pytest.raises(ValueError, match=r"unknown method 'lufy'\. Did you mean 'luffy'\? Known: .*hpt, luffy, "):
        from_parameters("tiny", "lufy")
    with pytest.raises(ValueError, match=r"unknown field 'stesp'\. Did you mean 'steps'\?"):
        from_parameters("tiny", stesp=3)


# --------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("name, value, wanted", [
    ("steps", "60", "int"), ("steps", 6.0, "int"), ("steps", True, "int"), ("steps", None, "int"),
    ("lr", "fast", "float"), ("lr", True, "float"), ("lr", [1e-4], "float"), ("source", 3, "str"),
    ("trust_remote_code", 1, "bool"), ("trust_remote_code", "yes", "bool"), ("problem_args", [], "dict"),
    ("seed", "0", "int"), ("profile", 1, "str"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_field_value_and_type(name, value, wanted):
    with pytest.raises(ValueError) as error:
        override(DEFAULT, {name: value})
    text = str(error.value)
    full = field_index()[name]
    assert text.startswith(f"{full}: got {value!r} ({type(value).__name__}), expected {wanted}")
    assert field_docs()[full] in text


def test_whole_numbers_and_text_that_reads_as_a_number_become_floats():
    for value in (1, "1e-5", "inf", ".5"):
        found = override(DEFAULT, {"lr": value}).train.lr
        assert isinstance(found, float)
        assert found == float(value)


def test_yaml_one_point_one_reads_1e_minus_5_as_text_and_the_config_as_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  lr: 1e-5\n", encoding="utf-8")
    assert from_yaml(path).train.lr == 1e-5


def test_arguments_of_a_source_survive_the_yaml_file_as_they_are_compared(tmp_path):
    """A tuple would come back as a list, and the run folder would seem to hold another configuration."""
    given: dict[str, Any] = {"digits": (1, 2), "nested": {"a": [1, 2.5, None, True, "x"]}}
    config = override(DEFAULT, {"problem_args": given})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path) == config
    given["digits"] = ()
    given["nested"]["a"].append("changed later")
    assert from_yaml(path) == config


def test_arguments_that_yaml_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="problem_args"):
        override(DEFAULT, {"problem_args": {"x": object()}})


# -------------------------------------------------------------------------------------------------------- faults


def test_all_faults_are_told_at_once():
    bad: dict[str, Any] = {
        "g1": 1, "g2": 0, "alpha_gamma": 0.0, "alpha_max": -0.1, "kl_delta": 0.0, "clip_low": 1.5, "clip_high": 0.0,
        "lr": 0.0, "top_p": 1.5, "temperature": 0.0, "max_new_tokens": 0, "problems_per_step": 0, "n_train": 0,
        "warmup_share": 1.0, "lr_schedule": "wavy", "sampler": "magic", "dtype": "float16", "track": "paper",
        "advantage_std": "robust", "reward_workers": 0, "reward_deadline_s": 0.0, "lora_rank": -1,
        "micro_batch": 0, "updates_per_batch": 0, "kl_chunk_tokens": 0, "keep_checkpoints": 0, "steps": -1,
        "lr_warmup_ratio": 2.0, "eval_temperature": -1.0, "eval_top_p": 0.0,
        "aggregation": "mean", "entropy_coefficient": -1.0, "expert": "trace", "shaping_gamma": 0.0,
        "expert_coefficient": 0.0, "distillation": "kl", "guided_side": "teacher", "ema_decay": 1.0,
        "target_selection": "longest", "kl_clip": "soft", "weighting": "equal", "alpha_fixed": -1.0, "layout": "centre",
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        from_parameters("tiny", "sgpo", **bad)
    told = str(error.value)
    missing = [name for name, value in bad.items() if f"{field_index()[name]}: got {value!r}, expected" not in told]
    assert not missing, told
    assert told.count("\n") >= len(bad)


@pytest.mark.parametrize("name, value", [
    ("g1", 0), ("g1", 1), ("g2", 0), ("alpha_gamma", 0.0), ("alpha_gamma", -0.1), ("alpha_max", -1e-9),
    ("alpha_gamma", float("nan")), ("kl_delta", 0.0), ("kl_delta", -1.0), ("kl_delta", float("nan")),
    ("clip_low", 0.0), ("clip_low", 1.01), ("clip_high", 0.0), ("shaping_gamma", 0.0), ("shaping_gamma", -0.1),
    ("shaping_gamma", float("nan")), ("expert_coefficient", 0.0), ("expert_coefficient", float("nan")),
    ("ema_decay", 1.0), ("ema_decay", -0.1), ("ema_decay", float("nan")), ("alpha_fixed", -1e-9),
    ("entropy_coefficient", -1e-9), ("guided_share", 1.1), ("lr", float("nan")),
    ("mini_batch", 11), ("mini_batch", -1), ("epochs", -1.0),
    # below: until now found only in the middle or at the end of a run, or never
    ("test_k", 0), ("eval_k", 0), ("rollout_batch", 0), ("eval_problems", -1), ("n_validation", -1), ("n_test", -1),
    ("eval_every", -1), ("save_every", -1), ("eval_max_new_tokens", -1), ("context", -1), ("torch_threads", -1),
    ("alpha_base", -0.5), ("alpha_base", float("nan")), ("advantage_eps", -1e-6), ("max_grad_norm", -1.0),
    ("weight_decay", -0.1), ("adam_beta1", 1.0), ("adam_beta2", -0.1), ("lora_dropout", 1.0),
    ("lr", float("inf")), ("epochs", float("inf")), ("temperature", float("inf")),
])  # fmt: skip
def test_one_value_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(ValueError) as error:
        from_parameters("tiny", "sgpo", **{name: value})
    lines = str(error.value).splitlines()
    assert len(lines) == 2, lines
    assert value != value or f"{value!r}" in lines[1]
    assert lines[1].strip().startswith(f"{field_index()[name]}: got ") or name == "epochs"


@pytest.mark.parametrize("values", [
    {"kl_delta": float("inf")}, {"clip_low": 1.0, "clip_high": float("inf")}, {"expert": "group"},
    {"expert": "fallback", "expert_gate": 7}, {"expert_gate": 99}, {"guided_side": "ema", "ema_decay": 0.0},
    {"advantage_std": "none"}, {"alpha_fixed": 0.0, "weighting": "fixed"}, {"policy_gradient": False},
    {"g2": 0, "distillation": "none"}, {"top_p": 1.0}, {"alpha_max": 0.0},
    {"steps": 0}, {"mini_batch": 5}, {"max_grad_norm": 0.0}, {"alpha_base": 0.0}, {"n_validation": 0, "n_test": 0},
    {"eval_every": 0, "eval_problems": 0}, {"save_every": 0},
])  # fmt: skip
def test_limits_that_do_work_are_accepted(values):
    from_parameters("tiny", "sgpo", **values)


def test_supervised_runs_need_no_groups():
    from_parameters("tiny", "sft", g1=0)
    from_parameters("tiny", "sft", g1=1, distillation="forward_kl")


# ---------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("changes", [
    {}, {"kl_delta": float("inf"), "clip_high": float("inf")},
    {"lr": 1e-300, "weight_decay": 1 / 3}, {"source": "1e5", "revision": "12345e67"},
    {"source": "null", "strategies": "yes", "init_from": " a: #b\n'\"", "problems": "ü/日本.jsonl"},
    {"problem_args": {"min_terms": 2, "deep": {"a": [1, None, "x"]}}}, {"source": "x" * 300},
])  # fmt: skip
def test_yaml_round_trip(tmp_path, changes):
    config = override(DEFAULT, changes)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    back = from_yaml(path)
    assert back == config
    assert back.fingerprint == config.fingerprint
    assert difference(back, config) == []


def test_yaml_holds_every_field_in_the_order_of_the_classes():
    import yaml

    read = yaml.safe_load(to_yaml(DEFAULT))
    assert list(read) == ["profile", "seed", *SECTIONS]
    assert read == to_dict(DEFAULT)


@pytest.mark.parametrize("text, told", [
    ("train:\n  stepz: 5\n", "stepz"), ("trian:\n  steps: 5\n", "trian"), ("train:\n  steps: many\n", "many"),
    ("train: 5\n", "train"), ("5: 3\n", "5"), ("- 1\n", "section"), ("just text\n", "section"), ("a: [\n", "line 2"),
])  # fmt: skip
def test_a_bad_file_is_told_by_name_and_place(tmp_path, text, told):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        from_yaml(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)


# --------------------------------------------------------------------------------------------------- fingerprint


def test_equal_configurations_have_equal_fingerprints():
    assert from_parameters(steps=9).fingerprint == from_parameters(**{"train.steps": 9}).fingerprint
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert override(DEFAULT, {"problem_args": one}).fingerprint == override(DEFAULT, {"problem_args": two}).fingerprint
    assert override(DEFAULT, {"lr": 1}).fingerprint == override(DEFAULT, {"lr": 1.0}).fingerprint


def test_any_changed_field_changes_the_fingerprint_and_the_label():
    """Every field but those of `compute`: the same run may go on with another number of workers, and another place for
    vLLM."""
    changed = {name: override(DEFAULT, {name: other_value(get(DEFAULT, name))}) for name in LEAVES}
    devices = [config for name, config in changed.items() if name.startswith("compute.")]
    places = 8
    assert len(devices) == places and {c.fingerprint for c in devices} == {DEFAULT.fingerprint}
    everything = [DEFAULT, *(config for name, config in changed.items() if not name.startswith("compute."))]
    assert len({c.fingerprint for c in everything}) == len(LEAVES) - places + 1
    assert len({c.label for c in everything}) == len(LEAVES) - places + 1
    assert all(len(c.fingerprint) == 12 and int(c.fingerprint, 16) >= 0 for c in everything)


def test_difference_names_both_values():
    assert difference(DEFAULT, override(DEFAULT, {"steps": 7, "seed": 2})) == [
        "seed: 0 there, 2 here", "train.steps: 60 there, 7 here"]


# ----------------------------------------------------------------------------------------------- docs, notebooks


def test_the_table_of_fields_is_up_to_date():
    page = runpy.run_path(str(ROOT / "tools" / "configuration_table.py"))["page"]()
    there = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert there == page, "docs/configuration.md is old. Cure: python tools/configuration_table.py --write"
    assert all(f"| `{name}` |" in there for name in LEAVES)


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    """Cells of a notebook, each with its text in `text`."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "text": "".join(c["source"])} for c in found if c["cell_type"] == kind]


def parameters_cell(path: Path) -> str:
    """Source of the one cell that is tagged `parameters`."""
    tagged = [c["text"] for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: {len(tagged)} cells tagged parameters"
    return tagged[0]


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{i:02}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_parameters_are_literals(self, path):
        for statement in ast.parse(parameters_cell(path)).body:
            assert isinstance(statement, ast.Assign), ast.unparse(statement)
            assert len(statement.targets) == 1
            assert isinstance(statement.targets[0], ast.Name)
            ast.literal_eval(statement.value)

    def test_parameters_are_fields_of_the_configuration(self, path):
        values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(parameters_cell(path)).body
                  if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
        if path.name.startswith(("00", "01")):
            return  # these train nothing: 00 computes by hand, 01 looks at strategies
        assert {"profile", "overrides"} <= set(values)
        assert set(values) <= {*field_index(), *NOTEBOOK_FIELDS}
        assert values.get("profile", "tiny") in PROFILES
        fields = {k: v for k, v in values.items() if k not in {*NOTEBOOK_FIELDS, "method"}}
        override(DEFAULT, fields)
        for method in (values.get("method"), values.get("baseline")):
            assert not method or method in METHODS
        assert values.get("warmup_steps", 0) >= 0

    def test_is_stored_without_outputs(self, path):
        for cell in cells(path):
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert set(cell["metadata"]) <= {"tags"}

    def test_cells_are_short(self, path):
        for cell in cells(path):
            lines = cell["text"].splitlines()
            assert len(lines) <= 15, f"{len(lines)} lines: {lines[0]}"
            for node in ast.walk(ast.parse(cell["text"])):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    assert node.end_lineno - node.lineno < 10, f"function {node.name}"
                assert not isinstance(node, ast.ClassDef)

    def test_reads_on_its_own(self, path):
        first, *_, last = json.loads(path.read_text(encoding="utf-8"))["cells"]
        opening = "".join(first["source"])
        assert first["cell_type"] == "markdown"
        assert opening.startswith(f"# {path.name[:2]} ")
        assert "**Question.**" in opening
        assert "**Method.**" in opening
        headings = [line for c in cells(path, "markdown") for line in c["text"].splitlines() if line.startswith("## ")]
        assert {"## What was seen", "## Summary"} & set(headings), headings
        assert last["cell_type"] in ("markdown", "code")


def test_notebook_fields_are_no_configuration_fields_and_all_are_used():
    assert not set(NOTEBOOK_FIELDS) & set(field_index())
    used = {s.targets[0].id for path in NOTEBOOKS for s in ast.parse(parameters_cell(path)).body
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
    assert set(NOTEBOOK_FIELDS) <= used
