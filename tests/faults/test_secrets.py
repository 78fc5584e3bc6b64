"""Promise 9: planted secrets are in no file that a job, a run or a report leaves behind."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plotly.offline
import pytest
import yaml
from canaries import CANARIES, PEM, SECRET_PART, search
from small_notebooks import write_notebook

from sgpo_lib.batch_spec import load_batch
from sgpo_lib.config import RunConfig, field_index, from_yaml, override, to_yaml
from sgpo_lib.jobs import place_parameters
from sgpo_lib.redaction import Redactor
from sgpo_lib.runs import Run, open_run

NAMES = sorted(CANARIES)
TELL = f"""
import base64, html, json, os, pprint, sys, textwrap, urllib.parse, yaml
from IPython.display import HTML, JSON, Markdown, display
secrets = {{name: os.environ[name] for name in {NAMES!r}}}
class Client:
    def __repr__(self):
        return f"Client(base_url='https://api.example.org', key={{secrets['CLIENT_SECRET']!r}})"
for name, value in secrets.items():
    print(name, value)
    print(repr(value), json.dumps(value), urllib.parse.quote(value, safe=""), value.encode().hex())
    print(base64.b64encode(value.encode()).decode(), base64.encodebytes(("user:" + value).encode()).decode())
    print(textwrap.fill(value, 20), file=sys.stderr)
    sys.stdout.write(value[:5]); sys.stdout.flush(); sys.stdout.write(value[5:] + chr(10))
    os.write(2, (value + chr(10)).encode())
    display(HTML(f"<b>{{html.escape(value)}}</b>"), Markdown("it is " + value), JSON({{value: [value]}}))
print(yaml.safe_dump(secrets)); pprint.pprint({{"nested": {{"deeper": [secrets]}}}})
print(chr(27) + "[31m" + secrets["WRAPPED_TOKEN"] + chr(27) + "[0m"); display(Client())
"""
WIDGET = "import ipywidgets\nipywidgets.Textarea(value=json.dumps(secrets))"
FAILED_RUN = """
from sgpo_lib.config import RunConfig
from sgpo_lib.runs import open_run
run = open_run(RunConfig(), name='canary')
run.log({"kind": "train", "step": 1, "loss": 0.5})
try:
    raise ValueError(f"{Client()} {secrets}")
except ValueError as error:
    run.fail(error)
"""
RAISE = """
def connect(options):
    raise ConnectionError(f"refused {options['password']} by {Client()}: {secrets['MESSAGE_TOKEN']}")
try:
    connect({"password": secrets["PGPASSWORD"], "deep": secrets})
except ConnectionError as error:
    wrapped = chr(10).join(textwrap.wrap(secrets["WRAPPED_TOKEN"], 24))
    raise RuntimeError(f"wrapped: {wrapped} {secrets}") from error
"""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root of runs, with all canaries in the environment."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SGPO_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def sgpo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sgpo_lib.cli", *words], text=True, capture_output=True, timeout=300,
                          check=False)  # fmt: skip


def test_no_canary_is_in_any_file_of_a_batch_that_fails_and_one_that_succeeds(planted, tmp_path, tally):
    good = write_notebook(tmp_path, TELL, WIDGET, FAILED_RUN, name="good")
    bad = write_notebook(tmp_path, TELL, RAISE, name="bad")
    setup = ["echo setup prints $SETUP_TOKEN", "env", "set -x; true \"$SETUP_TOKEN\" \"$DEPLOY_KEY\"; set +x"]
    spec = tmp_path / "canaries.yaml"
    spec.write_text(yaml.safe_dump({"name": "canaries", "parallel": 2, "defaults": {"setup": setup}, "jobs": {
        "good": {"notebook": str(good)}, "bad": {"notebook": str(bad)},
        "early": {"notebook": str(good), "setup": [*setup, "echo \"$WRAPPED_TOKEN\" >&2; exit 3"]}}}))
    batch = sgpo("batch", str(spec))
    assert batch.returncode == 1 and "1/3 done" in batch.stdout, batch.stdout + batch.stderr
    status, report = sgpo("status"), sgpo("report", "canaries", "--out", str(tmp_path / "report"))
    assert status.returncode == report.returncode == 0
    said = tmp_path / "said.txt"
    said.write_text("".join(done.stdout + done.stderr for done in (batch, status, report)))

    published = hashlib.sha256(plotly.offline.get_plotlyjs().encode()).digest()
    files = [said, *(p for root in (planted, tmp_path / "report") for p in root.rglob("*") if p.is_file()
                     and hashlib.sha256(p.read_bytes()).digest() != published)]  # fmt: skip
    names = {p.name for p in files}
    assert {"notebook.ipynb", "report.html", "log.txt", "FAILED.json", "config.yaml", "environment.json",
            "metrics.jsonl", "process.txt", "attempts.json", "batch.json", "parameters.yaml", "index.html"} <= names
    hits, count, size = search(files, CANARIES)
    assert not hits, sorted(set(hits))
    log = (planted / "jobs" / "canaries" / "good" / "log.txt").read_text()
    assert all(f"«{name}»" in log for name in set(NAMES) - SECRET_PART.keys()), "it was printed, and replaced"
    assert "«SETUP_TOKEN»" in (planted / "jobs" / "canaries" / "good" / "process.txt").read_text()
    assert "setup prints" in (planted / "jobs" / "canaries" / "early" / "process.txt").read_text()
    tally(9, "planted secrets in the files of a batch (one job done, two failed), its status and its report",
          f"0 of {len(CANARIES)} found, as they are or encoded, in {count} files of {size:,} bytes")


def test_the_search_finds_what_is_there(tmp_path):
    """The check above can fail: each canary, planted in each form, is found."""
    for name, value in CANARIES.items():
        secret = SECRET_PART.get(name, value)
        for text in (secret, json.dumps(secret), secret.encode().hex(), base64.b64encode(b"user:" + secret.encode())):
            file = tmp_path / "file"
            file.write_bytes(b"before " + (text if isinstance(text, bytes) else text.encode()) + b" after")
            assert search([file], {name: value})[0], (name, text)


@pytest.mark.parametrize("name", NAMES)
def test_a_canary_as_a_parameter_is_refused_and_not_repeated(name, planted, tmp_path):
    """As a value of any parameter, inside a mapping, in the configuration and in the batch file."""
    path, value = write_notebook(tmp_path), CANARIES[name]
    tries: list[Any] = [lambda: place_parameters(path, {"name": value}),
                        lambda: place_parameters(path, {"overrides": {"model": {"x": [f"a {value} b"]}}}),
                        lambda: open_run(override(RunConfig(), {"instruction": f"say {value}"}), name="r")]
    for where in ({"env": {"NOTE": value}}, {"setup": [f"echo '{value}'"]}):
        spec = tmp_path / f"{next(iter(where))}.yaml"
        spec.write_text(yaml.safe_dump({"jobs": {"one": {"notebook": str(path), **where}}}, allow_unicode=True))
        tries.append(functools.partial(load_batch, spec))
    for refused in tries:
        with pytest.raises(ValueError, match="environment variable") as error:
            refused()
        assert SECRET_PART.get(name, value) not in str(error.value)
    assert not (planted / "r").exists(), "nothing was written"


@pytest.mark.parametrize("line", ["export DB_PASSWORD=correct-horse", "WANDB_API_KEY='0123456789abcdef' run", PEM])
def test_a_setup_line_that_sets_a_secret_is_refused(line, tmp_path):
    spec = tmp_path / "batch.yaml"
    spec.write_text(yaml.safe_dump({"jobs": {"one": {"notebook": str(write_notebook(tmp_path)), "setup": [line]}}}))
    with pytest.raises(ValueError, match="setup' of the batch file"):
        load_batch(spec)


def test_a_setup_line_that_reads_a_secret_is_taken(tmp_path):
    spec = tmp_path / "batch.yaml"
    lines = ["export HF_TOKEN=$(cat ~/.token)", "export HF_HUB_OFFLINE=1", "TOKEN=$OTHER"]
    spec.write_text(yaml.safe_dump({"jobs": {"one": {"notebook": str(write_notebook(tmp_path)), "setup": lines}}}))
    assert load_batch(spec).jobs[0].setup == tuple(lines)


def test_no_field_of_the_configuration_holds_a_key(tmp_path):
    path = tmp_path / "config.yaml"
    for name in ("api_key", "model.token", "hub_token", "rollout.server_key", "password"):
        with pytest.raises(ValueError, match="unknown field"):
            override(RunConfig(), {name: "canary-key-0123456789"})
        path.write_text(to_yaml(RunConfig()) + f"{name.rpartition('.')[2]}: canary-key-0123456789\n")
        with pytest.raises(ValueError, match=r"config\.yaml") as error:
            from_yaml(path)
        assert "canary-key" not in str(error.value)
    endings = ("key", "token", "secret", "password", "credentials")
    assert not [field for field in field_index() if field.rpartition(".")[2].split("_")[-1] in endings]


def test_a_secret_that_is_cut_off_is_taken_out_first(planted, tmp_path):
    """A traceback is cut to its last 8,000 characters: the cut goes through a secret at every place."""
    secret = CANARIES["WRAPPED_TOKEN"]
    for after in range(7900, 7995, 5):
        run = Run(tmp_path, RunConfig())
        run.fail(ValueError(secret + "x" * after))
        assert not search([tmp_path / "FAILED.json"], {"WRAPPED_TOKEN": secret})[0]


def test_redaction_is_quick(tally):
    """A notebook of 5 MB is saved every few seconds while it prints."""
    redact, text = Redactor(CANARIES), "loss 0.123 step 4 of 60, «ok» " * 180_000
    start = time.process_time()
    assert redact(text) == text
    seconds = time.process_time() - start
    assert seconds < 5
    tally(9, "time to redact a text of 5 MB", f"{seconds:.1f} s of CPU with {len(CANARIES)} secrets in the environment")
