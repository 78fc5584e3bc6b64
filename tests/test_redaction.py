"""No secret in what a job is given, nor in anything that it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from small_notebooks import write_notebook

from sgpo_lib.cli import main
from sgpo_lib.config import RunConfig, field_index, to_dict
from sgpo_lib.redaction import Redactor, environment_secrets, refuse_secrets

TOKEN = "hf_" + "aB3dE6gH9k" * 3 + "xyz1"


@pytest.mark.parametrize(("given", "why"), [
    ({"api_key": "abc"}, "'api_key' of n is named like a secret"), ({"hub_token": "abc"}, "named like a secret"),
    ({"settings": {"api_key": "x"}}, "'settings.api_key'"), ({"db.password": "x"}, "named like a secret"),
    ({"note": f"my {TOKEN}"}, "looks like a key"), ({"note": ["a", {"b": "sk-" + "x1" * 15}]}, "looks like a key"),
    ({"id": "AKIA" + "ABCD1234" * 2}, "looks like a key"), ({"note": "correct horse"}, "variable MY_PASSWORD")])
def test_secrets_in_parameters_are_refused(monkeypatch, given, why):
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    with pytest.raises(ValueError, match="environment variable") as error:
        refuse_secrets(given, "n")
    assert why in str(error.value) and not any(s in str(error.value) for s in (TOKEN, "correct horse", "AKIAABCD"))


def test_ordinary_parameters_are_no_secrets():
    names = set(field_index().values()) | {"max_tokens", "tokens", "tokenizer", "keyword", "monkey", "path"}
    refuse_secrets(dict.fromkeys(names, "some words"), "n")
    refuse_secrets({"overrides": to_dict(RunConfig()), "token": "", "key": 3}, "n")


def test_a_refused_secret_is_not_repeated(tmp_path, capsys):
    path = write_notebook(tmp_path)
    assert main(["run", str(path), "-p", f"name={TOKEN}", "--job", str(tmp_path / "job")]) == 2
    err = capsys.readouterr().err
    assert "'name' of trial.ipynb looks like a key" in err and TOKEN not in err
    assert not (tmp_path / "job").exists()


def test_which_values_are_taken_for_secrets(tmp_path):
    (tmp_path / "key.json").write_text("{}")
    environment = {"HF_TOKEN": "abcdefgh12", "A_TOKEN": "true", "B_KEY": "1", "C_SECRET": "none",
                   "PATH": "/usr/local/bin", "GOOGLE_CREDENTIALS": str(tmp_path / "key.json"),
                   "TOKENIZERS_PARALLELISM": "false-and-long", "DB_PASSWORD": "it's \"long\" \\ enough"}
    assert set(environment_secrets(environment).values()) == {"HF_TOKEN", "DB_PASSWORD"}
    redact = Redactor(environment)
    assert redact("true 1 none, abcdefgh12!") == "true 1 none, «HF_TOKEN»!"
    assert redact(repr(environment["DB_PASSWORD"])) == "'«DB_PASSWORD»'"
    assert redact(f"x {TOKEN}.") == "x «secret»." and redact("mask-learning-rates-of-everything") != "«secret»"
    assert redact.nested({"a": ["abcdefgh12", 3], "b": None}) == {"a": ["«HF_TOKEN»", 3], "b": None}
    assert Redactor({})("plain text") == "plain text"


@pytest.mark.slow
def test_no_secret_is_left_behind(tmp_path):
    """Printed, shown, in an error and its traceback, in a widget, written past Jupyter by a process that crashes."""
    value = "s3cr3t-'quoted\"-\\value-of-this-test"
    path = write_notebook(
        tmp_path, "import os\nkey = os.environ['SERVICE_API_KEY']\nprint('printed', key)\nkey",
        "import ipywidgets\nipywidgets.Text(value=key)",
        "os.write(2, f'raw {key}\\n'.encode())\nprint({'key': key}, [key])\n"
        "raise RuntimeError(f'refused {key}')")  # fmt: skip
    command = [sys.executable, "-m", "sgpo_lib.cli", "run", str(path), "--job", str(tmp_path / "job")]
    done = subprocess.run(command, env={**os.environ, "SERVICE_API_KEY": value, "SHORT_TOKEN": "1"}, text=True,
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode == 1 and "refused «SERVICE_API_KEY»" in out and "s3cr3t" not in out
    files = [p for p in (tmp_path / "job").iterdir() if p.is_file() and p.suffix != ".js"]
    texts = {p.name: p.read_text(encoding="utf-8") for p in files}
    assert {"log.txt", "notebook.ipynb", "report.html", "FAILED.json"} <= set(texts)
    for name, text in texts.items():
        assert not any(form in text for form in (value, "s3cr3t", json.dumps(value)[1:-1])), name
    for name in ("log.txt", "notebook.ipynb", "report.html", "FAILED.json"):
        assert "«SERVICE_API_KEY»" in texts[name].replace("\\u00ab", "«").replace("\\u00bb", "»"), name
    assert "raw «SERVICE_API_KEY»" in texts["log.txt"]
    assert "widget-state" in texts["notebook.ipynb"]
