"""Promise 11: weights and code from elsewhere. What could run a program is refused by name, and nothing of it runs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from sgpo_lib.config import ModelConfig, to_yaml
from sgpo_lib.policy import SHARDS, Policy, load_policy
from sgpo_lib.policy_sources import open_policy
from sgpo_lib.ray_driver import unpickled
from sgpo_lib.recipes import from_parameters
from sgpo_lib.trainer import train
from sgpo_lib.training_state import load_state, save_state
from sgpo_lib.weight_files import load_shards, remote_code

ROOT = Path(__file__).parents[2]


class Evil:
    """A pickle of this runs a command when it is opened."""

    def __init__(self, marker: Path, way: str = "system"):
        self.marker, self.way = marker, way

    def __reduce__(self) -> Any:
        ways: dict[str, Any] = {
            "system": (os.system, (f"touch {self.marker}",)),
            "exec": (exec, (f"open({str(self.marker)!r}, 'w')",)),
            "call": (subprocess.call, (["touch", str(self.marker)],)),
            "path": (Path.touch, (self.marker,)),
            "eval": (eval, (f"open({str(self.marker)!r}, 'w')",))}
        return ways[self.way]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the untrained model, to be spoiled."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def refused(work: Callable[[], Any], marker: Path, *said: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        work()
    assert all(word in str(error.value) for word in said), str(error.value)
    assert not marker.exists(), "the payload ran"


def settings(source: Path, **more: Any) -> Any:
    return lambda: load_policy(ModelConfig(source=str(source), device="cpu", **more), str(source), 0)


def test_the_payload_works(tmp_path):
    """Each of the pickles does run when it is opened as any pickle."""
    for way in ("system", "exec", "call", "path", "eval"):
        marker = tmp_path / way
        pickle.loads(pickle.dumps(Evil(marker, way)))
        assert marker.exists()


# --- pickles ---------------------------------------------------------------------------------------------------------
def test_pytorch_model_bin(model, marker):
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(marker)}, model / "pytorch_model.bin")
    refused(settings(model), marker, f"{model}/pytorch_model.bin: refused", "safetensors", "convert it")
    refused(lambda: open_policy(str(model), device="cpu"), marker, "pytorch_model.bin: refused")


@pytest.mark.parametrize("dump", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_under_the_name_of_safetensors(model, marker, dump):
    if dump:
        (model / "model.safetensors").write_bytes(dump(Evil(marker, "exec")))
    else:
        torch.save(Evil(marker, "exec"), model / "model.safetensors")
    refused(settings(model), marker, f"{model}/model.safetensors: refused (a pickle under the name")


def test_an_index_that_names_a_pickle(model, marker):
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(marker)}, model / "shard.bin")
    for name in ("shard.bin", "../elsewhere.safetensors"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(settings(model), marker, Path(name).name, "refused (named by model.safetensors.index.json)")


def test_a_configuration_that_names_a_pickle(model, marker):
    torch.save({"model.norm.weight": Evil(marker)}, model / "other.bin")
    told = json.loads((model / "config.json").read_text()) | {"transformers_weights": "other.bin"}
    (model / "config.json").write_text(json.dumps(told))
    refused(settings(model), marker, f"{model}/other.bin: refused (named by config.json)")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_pickle(base, tmp_path, marker, name):
    folder = tmp_path / "adapter"
    load_policy(ModelConfig(source=str(base), device="cpu", lora_rank=4), str(base), 0).save(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"lora": Evil(marker, "call")}, folder / name)
    refused(lambda: open_policy(str(folder), base=str(base), device="cpu"), marker, f"{folder}/{name}: refused")


def state_of(base: Path, folder: Path) -> tuple[Policy, torch.optim.Optimizer]:
    policy = load_policy(ModelConfig(source=str(base), device="cpu", lora_rank=4), str(base), 0)
    optimizer = torch.optim.AdamW(policy.parameters())
    sum(p.sum() for p in policy.parameters()).backward()
    optimizer.step()
    save_state(policy, optimizer, [], folder, first=True)
    return policy, optimizer


@pytest.mark.parametrize("way", ["system", "path"])
def test_an_optimizer_that_is_a_pickle(base, tmp_path, marker, way):
    policy, optimizer = state_of(base, tmp_path)
    load_state(policy, optimizer, tmp_path)
    torch.save({"guided_side": [], "optimizer": Evil(marker, way)}, tmp_path / "optimizer.pt")
    refused(lambda: load_state(policy, optimizer, tmp_path), marker, f"{tmp_path}/optimizer.pt: refused")
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Evil(marker, way)))
    refused(lambda: load_state(policy, optimizer, tmp_path), marker, f"{tmp_path}/optimizer.pt: refused")


def sharded(base: Path, folder: Path) -> Policy:
    """A checkpoint of sharded weights, with an entry that is no tensor."""
    policy = load_policy(ModelConfig(source=str(base), device="cpu"), str(base), 0)
    dcp.save({"model": get_model_state_dict(policy.model), "rate": {"lr": 0.5, "names": ["a"]}},
             checkpoint_id=str(folder / SHARDS))  # fmt: skip
    return policy


def test_the_index_of_a_sharded_checkpoint_that_is_a_pickle(base, tmp_path, marker):
    policy = sharded(base, tmp_path)
    policy.load(tmp_path)
    state = {"rate": {"lr": 0.0, "names": [""]}}
    load_shards(state, tmp_path / SHARDS)
    assert state == {"rate": {"lr": 0.5, "names": ["a"]}}, "what is no tensor comes too"
    index = tmp_path / SHARDS / ".metadata"
    for evil in (pickle.dumps(Evil(marker)), pickle.dumps({"state_dict_metadata": Evil(marker, "exec")}),
                 b"\x80\x04\x8c(torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c"
                 + bytes([len(f"touch {marker}")]) + f"touch {marker}".encode() + b"\x85R."):
        index.write_bytes(evil)
        refused(lambda: policy.load(tmp_path), marker, f"{index}: refused")


def test_an_entry_of_a_sharded_checkpoint_that_is_a_pickle(base, tmp_path, marker):
    """torch opens what is no tensor with weights_only=False."""
    sharded(base, tmp_path)
    dcp.save({"rate": {"lr": Evil(marker)}}, checkpoint_id=str(tmp_path / "evil"))
    refused(lambda: load_shards({"rate": {"lr": 0.0}}, tmp_path / "evil"), marker, str(tmp_path / "evil"), "'rate.lr'")
    dcp.load({"rate": {"lr": 0.0}}, checkpoint_id=str(tmp_path / "evil"))
    assert marker.exists(), "torch's own way runs it"


def test_a_pickle_of_ray_in_a_folder_that_others_may_enter(tmp_path, marker):
    folder = tmp_path / "driver"
    folder.mkdir(mode=0o700)
    (folder / "task").write_bytes(pickle.dumps({"fine": 1}))
    assert unpickled(folder / "task") == {"fine": 1}
    (folder / "task").write_bytes(pickle.dumps(Evil(marker)))
    folder.chmod(0o755)
    refused(lambda: unpickled(folder / "task"), marker, f"{folder}/task: not opened")
    folder.chmod(0o700)
    (folder / "task").rename(tmp_path / "elsewhere")
    (folder / "task").symlink_to(tmp_path / "elsewhere")
    refused(lambda: unpickled(folder / "task"), marker, f"{folder}/task: not opened")


# --- code that comes with weights ------------------------------------------------------------------------------------
MODELING = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own_model"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(model: Path, marker: Path, known: bool = False) -> None:
    """The model as one of a class of its own; `known`: of a type that transformers knows as well."""
    (model / "modeling_own.py").write_text(MODELING.format(marker=str(marker)))
    path = model / "config.json"
    told = json.loads(path.read_text()) | {"architectures": ["OwnModel"], "auto_map": {
        "AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}}
    path.write_text(json.dumps(told if known else told | {"model_type": "own_model"}))


def with_tokenizer_code(model: Path, marker: Path) -> None:
    (model / "tokenization_own.py").write_text(TOKENIZER.format(marker=str(marker)))
    path = model / "tokenizer_config.json"
    told = json.loads(path.read_text()) | {"tokenizer_class": "OwnTokenizer",
                                           "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(("spoil", "file", "names"), [
    (with_code, "config.json", "modeling_own.OwnModel"),
    (with_tokenizer_code, "tokenizer_config.json", "tokenization_own.OwnTokenizer")], ids=["model", "tokenizer"])
def test_a_model_with_code_of_its_own(model, marker, spoil, file, names):
    spoil(model, marker)
    cure = "set model.trust_remote_code=true"
    refused(settings(model), marker, f"{model}/{file}: auto_map names", names, cure, "Nothing of it ran")
    refused(lambda: open_policy(str(model), device="cpu"), marker, f"{model}/{file}", names)
    config = from_parameters("tiny", "sgpo", 0, source=str(model), steps=1, n_train=4, n_validation=0, n_test=0)
    refused(lambda: train(config, root=model.parent), marker, f"{model}/{file}", names)


def test_code_of_a_model_that_transformers_knows_is_not_run(model, marker):
    with_code(model, marker, known=True)
    assert type(settings(model)().model).__name__ == "Qwen3ForCausalLM" and not marker.exists()


def test_code_that_is_asked_for_is_said_and_recorded(model, marker, tmp_path, monkeypatch, tally):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(model, marker)
    config = from_parameters("tiny", "sgpo", 0, source=str(model), trust_remote_code=True, steps=1, n_train=4, g1=2,
                             g2=2, n_validation=0, n_test=0, problems_per_step=2, max_new_tokens=4, torch_threads=1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    code = ("import sys; from pathlib import Path; from sgpo_lib.config import from_yaml; "
            "from sgpo_lib.trainer import train; train(from_yaml(Path(sys.argv[1])), root=Path(sys.argv[2]))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.yaml"), str(tmp_path / "root")],
                          text=True, capture_output=True, timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists() and f"trust_remote_code=true: Python code that comes with {model} may run" in done.stderr
    (run,) = (tmp_path / "root").iterdir()
    told = json.loads((run / "remote_code.json").read_text())
    own = next(path for path in told if path.endswith("modeling_own.py"))
    assert told[own] == hashlib.sha256((model / "modeling_own.py").read_bytes()).hexdigest()
    assert "trust_remote_code: true" in (run / "config.yaml").read_text() and not remote_code()
    tally(11, "files that would run a program: pickles as weights, adapters, optimizer, index and entries of shards, "
          "models and tokenizers with code of their own", "all refused with the file's name, 0 payloads ran")


# --- our own sources -------------------------------------------------------------------------------------------------
BANNED = ["exec('1')", "eval('1')", "import pickle\npickle.loads(b'')", "import pickle\npickle.load(open('f', 'rb'))",
          "import marshal\nmarshal.loads(b'')", "import yaml\nyaml.load('', Loader=yaml.Loader)",
          "import subprocess\nsubprocess.run('ls', shell=True)", "import os\nos.system('ls')",
          "import tarfile\ntarfile.open('f').extractall()"]
RULES = "S102,S202,S301,S302,S307,S506,S602,S604,S605"
EXCEPTIONS = {"sgpo_lib/ray_driver.py": 2, "sgpo_lib/jobs.py": 1}
"""Files with lines that the linter is told to pass over, and how many: each says why."""


def lint(*what: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    ruff = Path(sys.executable).with_name("ruff")
    return subprocess.run([str(ruff), "check", "--no-cache", "--output-format", "concise", *what], input=code,
                          cwd=ROOT, text=True, capture_output=True, timeout=120, check=False)  # fmt: skip


def test_the_linter_finds_what_would_run_text_as_a_program():
    for code in BANNED:
        found = lint("--stdin-filename", "sgpo_lib/planted.py", "-", code=code + "\n")
        assert any(f" {rule} " in found.stdout for rule in RULES.split(",")), (code, found.stdout, found.stderr)


def test_our_sources_run_no_text_as_a_program():
    found = lint("--select", RULES, "sgpo_lib", "tools", "benchmarks", "notebooks")
    assert found.returncode == 0, found.stdout + found.stderr
    rules = re.compile(r"noqa: (?:S102|S202|S30\d|S506|S60\d)")
    told = {str(path.relative_to(ROOT)): len(rules.findall(path.read_text()))
            for folder in ("sgpo_lib", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    assert {path: count for path, count in told.items() if count} == EXCEPTIONS


def calls(folder: str) -> list[tuple[str, str, ast.Call]]:
    """(file, name that is called, call)."""
    return [(str(path.relative_to(ROOT)), ast.unparse(node.func), node) for path in (ROOT / folder).rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]  # fmt: skip


def test_models_are_loaded_from_safetensors_without_code():
    """What the linter has no rule for."""
    seen = 0
    for file, name, call in [c for folder in ("sgpo_lib", "tools") for c in calls(folder)]:
        named = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name.endswith("ForCausalLM.from_pretrained"):
            seen += 1
            assert named.get("use_safetensors") == "True" or "gguf_file" in named, (file, ast.unparse(call))
        assert named.get("trust_remote_code") in (None, "config.trust_remote_code", "model.trust_remote_code",
                                                  "trust_remote_code"), (file, ast.unparse(call))  # fmt: skip
        assert named.get("allow_pickle", "False") == "False", (file, ast.unparse(call))
        assert not name.startswith(("np.load", "numpy.load")) or "allow_pickle" in named, file
        assert name.split(".")[-1] not in ("unpack_archive", "extractall"), (file, name)
        assert name != "torch.load" or named.get("weights_only") == "True", file
    assert seen >= 2
