"""Damaged checkpoints: never used silently; the run goes on from the newest whole one and ends as if nothing was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from damage_world import DAMAGES, broken_off, copied
from kill_world import killed_config, require_same, result
from parallel_world import Training, on_workers

from sgpo_lib import checkpoints
from sgpo_lib.checkpoints import MANIFEST, faults, sha256
from sgpo_lib.config import override
from sgpo_lib.export import export
from sgpo_lib.policy_sources import open_policy
from sgpo_lib.recipes import from_parameters
from sgpo_lib.runs import Run
from sgpo_lib.trainer import train

pytestmark = pytest.mark.usefixtures("importable")

LAYOUTS = {"adapter": {}, "model": {"lora_rank": 0, "lora_dropout": 0.0},
           "sharded": {"lora_rank": 0, "lora_dropout": 0.0, "guided_side": "live", "compute_dtype": "bfloat16"}}
"""What a checkpoint holds -> the settings that make it so, on one process."""


@pytest.fixture(scope="module", params=LAYOUTS)
def stopped(request, base, tmp_path_factory) -> tuple[Run, Run]:
    """(an uninterrupted run, the same one stopped after its third step with three checkpoints)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        patch.chdir(Path(__file__).parents[1])
        config = killed_config(base, save_every=1, keep_checkpoints=3, **LAYOUTS[request.param])
        whole = train(config, root=tmp_path_factory.mktemp("whole"))
        run = broken_off(config, tmp_path_factory.mktemp("stopped"), 3)
    newest = run.checkpoints()[-1]
    assert [p.name for p in run.checkpoints()] == ["step-000001", "step-000002", "step-000003"]
    assert (newest / request.param).is_dir() and not faults(newest)
    return whole, run


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_no_damage_is_accepted_silently(stopped, tmp_path, capfd, count, tally):
    """Every file of a checkpoint x four damages. Some of the runs are trained to their end."""
    whole, run = stopped
    cases = [(name, damage) for name in files_of(run.checkpoints()[-1]) for damage in DAMAGES]
    ended, expected = 0, result(whole)
    for number, (name, damage) in enumerate(cases):
        broken = copied(run, tmp_path / str(number))
        newest = broken.checkpoints()[-1]
        digest = sha256(newest / name)
        DAMAGES[damage](newest / name)
        found = sha256(newest / name) if damage != "missing" else "missing"
        capfd.readouterr()
        if number % len(cases) in range(0, len(cases), -(-len(cases) // count(2, len(cases)))):
            require_same(result(train(broken.config, root=broken.folder.parent)), expected, [name, damage])
            ended += 1
        else:
            assert broken.newest_checkpoint() == broken.checkpoint(2)
        told = capfd.readouterr().err
        assert f"{newest}: damaged and set aside as damaged-step-000003: " in told, (name, damage)
        if name != MANIFEST:
            assert f"{name}: " in told and digest in told and found in told, (name, damage, told)
        else:
            assert f"{MANIFEST}: " in told
        aside = newest.with_name("damaged-step-000003")
        assert set(files_of(aside)) >= set(files_of(run.checkpoints()[-1])) - {name}, "renamed, not deleted"
        assert (aside / "DAMAGE.txt").read_text().strip() in told
        shutil.rmtree(broken.folder)
    files = len(cases) // len(DAMAGES)
    layout = next(p.name for p in run.checkpoints()[-1].iterdir() if p.is_dir())
    tally(3, f"damaged checkpoint ({layout}/)",
          f"{len(cases)} of {len(cases)} ({files} files x {len(DAMAGES)} damages) found, none used; {ended} of {ended} "
          "runs ended with the bits of the uninterrupted one", files=files_of(run.checkpoints()[-1]))


def test_no_bit_of_a_manifest_can_be_flipped_unseen(stopped, tmp_path, count, tally):
    """One at a time; at full counts all of them."""
    folder = Path(shutil.copytree(stopped[1].checkpoints()[0], tmp_path / "step-000001"))
    data = (folder / MANIFEST).read_bytes()
    places = range(0, 8 * len(data), count(29, 1))
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(flipped)
        assert faults(folder), place
    (folder / MANIFEST).write_bytes(data)
    assert not faults(folder)
    tally(3, f"bits of a manifest of {8 * len(data)} flipped", f"{len(places)} of {len(places)} found")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(stopped, tmp_path):
    whole, run = stopped
    broken = copied(run, tmp_path)
    for path in broken.checkpoints():
        DAMAGES["cut"](path / "optimizer.pt")
    rows = (broken.folder / "metrics.jsonl").read_bytes()
    for _ in range(2):  # and not at the next start either
        with pytest.raises(ValueError, match="no checkpoint is whole, and a run does not begin anew by itself") as told:
            train(broken.config, root=tmp_path)
        assert len(re.findall(r"damaged-step-00000\d: optimizer\.pt: expected .*, found ", str(told.value))) == 3
        assert "or delete these folders to begin anew" in str(told.value)
        assert (broken.folder / "metrics.jsonl").read_bytes() == rows and broken.state == "failed"
    restored = broken.folder / "checkpoints" / "damaged-step-000002"
    shutil.copy(run.checkpoints()[1] / "optimizer.pt", restored)
    restored.rename(restored.with_name("step-000002"))
    require_same(result(train(broken.config, root=tmp_path)), result(whole), ["restored from a copy"])


def test_a_second_damage_of_a_step_is_set_aside_beside_the_first(stopped, tmp_path, capfd):
    broken = copied(stopped[1], tmp_path)
    for name in ("damaged-step-000003", "damaged-step-000003-2"):
        DAMAGES["empty"](broken.checkpoints()[-1] / "optimizer.pt")
        assert broken.newest_checkpoint() == broken.checkpoint(2)
        assert f"set aside as {name}: optimizer.pt: " in capfd.readouterr().err
        shutil.copytree(stopped[1].checkpoints()[-1], broken.folder / "checkpoints" / "step-000003")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_neither_opened_nor_exported_nor_started_from(stopped, tmp_path, damage):
    """Final weights and checkpoints, by the run's name, its step, and the folder's path."""
    whole, run = stopped
    done, other = copied(whole, tmp_path / "done"), copied(run, tmp_path / "other")
    final = next(p for p in done.folder.glob("final/*/*.safetensors"))
    step = next(p for p in (done.checkpoints()[-1]).rglob("*") if p.suffix in (".safetensors", ".distcp"))
    digests = {path: sha256(path) for path in (final, step)}
    for path in digests:
        DAMAGES[damage](path)
    at = checkpoints.step_of(done.checkpoints()[-1])
    for source, path in ((str(done.folder), final), (str(done.folder / "final"), final), (str(final.parent), final),
                         (f"{done.folder}@{at}", step), (str(done.checkpoints()[-1]), step)):
        with pytest.raises(ValueError, match=r"is damaged: .*Restore it from a copy") as told:
            open_policy(source)
        assert path.name in str(told.value) and digests[path] in str(told.value)
    for given in (None, at):
        with pytest.raises(ValueError, match="is damaged"):
            export(done.folder, tmp_path / "out", step=given)
    assert not (tmp_path / "out").exists()
    config = override(other.config, {"train.init_from": str(done.folder)})
    with pytest.raises(ValueError, match=r"final is damaged: .*\.safetensors: .*expected .* SHA-256 "):
        train(config, root=tmp_path / "other", name="started")


def test_the_best_step_is_checked_where_a_run_ends_from_it(base, tmp_path, capfd):
    """A supervised run ends with the weights of its best step, here an early one, which is damaged while it runs."""
    config = from_parameters("tiny", "sft", 0, source=str(base), steps=4, problems_per_step=2, n_train=8,
                             n_validation=2, n_test=0, eval_every=1, lr=0.2, lr_schedule="constant")
    whole = train(config, root=tmp_path / "whole")
    best = whole.summary["best_step"]
    assert best < 4, "the learning rate is meant to spoil the later steps"

    def damages(row: dict) -> None:
        if row["kind"] == "supervised" and row["step"] == 4:
            DAMAGES["bit flipped"](path / "optimizer.pt")

    path = tmp_path / "other" / config.label / "checkpoints" / f"step-{best:06d}"
    with pytest.raises(ValueError, match=rf"step-{best:06d} is damaged: optimizer\.pt: expected .*, found "):
        train(config, root=tmp_path / "other", on_row=damages)
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        train(config, root=tmp_path / "other")
    told = capfd.readouterr().err
    assert f"step-{best:06d}: damaged and set aside" in told and f"needs step-{best:06d}, the best so far" in told
    shutil.rmtree(path.parent)
    again = train(config, root=tmp_path / "other")
    assert again.summary["weights"] == whole.summary["weights"] and again.summary["best_step"] == best


@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES)
def test_two_workers_agree_on_the_newest_whole_checkpoint(base, tmp_path, damage, tally):
    """The first verifies and tells the other; sharded weights, written by both."""
    config = from_parameters("tiny", "sgpo", 0, source=str(base), revision="", reward="rewards_for_tests:coin",
                             steps=4, problems_per_step=2, n_train=8, n_validation=0, n_test=0, max_new_tokens=6,
                             save_every=1, lr=1e-3)
    whole, = on_workers(2, tmp_path, [Training("whole", config)])
    broken = Run(Path(shutil.copytree(whole.folder, tmp_path / "broken")), config)
    for name in ("DONE", "summary.json"):
        (broken.folder / name).unlink()
    shard = sorted((broken.checkpoints()[-1] / "sharded").glob("*.distcp"))[-1]
    DAMAGES[damage](shard)
    again, = on_workers(2, tmp_path, [Training("broken", config)])
    assert (again.folder / "checkpoints" / "damaged-step-000004" / "DAMAGE.txt").exists()
    assert again.summary["weights"] == whole.summary["weights"] and not faults(again.checkpoints()[-1])
    tally(3, f"two workers, one shard {damage}", "set aside by the first, both went on from the one before, to the "
          "weights of the undisturbed run")
