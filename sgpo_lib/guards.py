"""NaN and infinity: found before they reach a weight, told with the samples that show them, never in a checkpoint.

Rewards, log-probabilities, token KL and losses are looked at where they are computed, and what is found is noted. The
workers compare their notes before each optimizer step (`Guard.stop`), so that all of them stop, or none. Gradients
and weights are looked at there too, and weights once more after the step and before they are written. What was found:

    RUN/not_finite/step-000012.json          step, quantity, where, problem ids, sample indices, parameters
    RUN/not_finite/step-000012.safetensors   of each of these samples: token ids, log-probabilities, what was not finite

Cost on one core for SmolLM2-135M in float32: a look at the weights takes 0.17 s where all of them train, 0.02 s for
LoRA of rank 16 (memory bandwidth), twice an update. The look at a micro-batch is a sum over its tokens.

Shape suffixes: N response tokens of a micro-batch in row order, B its rows, T tokens of one response.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sgpo_lib.policy import Policy
from sgpo_lib.records import Rollout, RolloutGroup
from sgpo_lib.redaction import Redactor
from sgpo_lib.rewards import Verifier
from sgpo_lib.rollouts.groups import judge_groups
from sgpo_lib.storage import write_atomic
from sgpo_lib.world import World

FOLDER = "not_finite"
"""Of a run: what was not finite."""
MOST_SAMPLES = 64
"""Samples that are stored of a step; all are counted."""
REWARD, SAMPLER, LOGP, KL, LOSS = "reward", "sampler's log-probability", "log-probability", "token KL", "loss"
GRADIENT, WEIGHT = "gradient", "weight"
_CURES = {
    REWARD: "Have reward.reward return a number from 0 to 1",
    SAMPLER: "Look at rollout.sampler_dtype and model.dtype, and at the weights it started from",
    LOGP: "Lower train.lr; look at model.dtype and model.compute_dtype, and at the weights it started from",
    KL: "Lower train.lr; look at model.dtype and model.compute_dtype, and at the weights it started from",
    LOSS: "Lower train.lr and the method's coefficients (entropy_coefficient, alpha_fixed, expert_coefficient)",
    GRADIENT: "Lower train.lr; look at model.dtype and model.compute_dtype",
    WEIGHT: "Lower train.lr, and see that train.max_grad_norm is not 0; weights that began so need another base",
}
"""Quantity -> what to do. The order is that in which they are computed: the first is the cause of the others."""


@dataclass(frozen=True)
class Finding:
    """One quantity that is not finite, in one sample or (`sample` None) in named tensors."""

    quantity: str
    where: str
    """Part of the step."""
    sample: Rollout | None = None
    values_T: Tensor | None = None
    """The quantity for each token of the sample."""
    told: tuple[str, ...] = ()
    """Names of tensors, the value of a loss, or the message of a refused reward."""


class Guard:
    """One worker's notes on a step, and what all workers do about them."""

    def __init__(self, run: Path, policy: Policy, world: World):
        self.folder, self.policy, self.world = run / FOLDER, policy, world
        self._found: list[Finding] = []
        self._learned: list[Rollout] = []

    # --- looking -----------------------------------------------------------------------------------------------
    def judge(self, verifier: Verifier, groups: Sequence[RolloutGroup]) -> None:
        """`judge_groups`, and a note where a reward or a log-probability of the sampler is not finite."""
        samples = [(g, o) for g in groups for o in g.responses]
        try:
            judge_groups(verifier, groups)
        except ValueError as error:  # what the user's reward returned; which response it was is asked one by one
            refused = [o for g, o in samples if _refused(verifier, g, o)] or [o for _, o in samples]
            self._found += [Finding(REWARD, "verification", o, told=(str(error),)) for o in refused]
        for _, o in samples:
            if o.verdict and not math.isfinite(o.reward):
                self._found.append(Finding(REWARD, "verification", o))
            if not math.isfinite(sum(o.sampler_logp)):
                self._found.append(Finding(SAMPLER, "sampling", o, torch.tensor(o.sampler_logp)))

    @torch.no_grad()
    def note(self, where: str, samples: Sequence[Rollout], length_B: Tensor, values: Mapping[str, Tensor]) -> None:
        """Look at a micro-batch of samples with these lengths: values of every token [N], or one (LOSS) of all."""
        if LOSS in values and values[LOSS].requires_grad:
            self._learned += samples
        sums = torch.stack([v.detach().sum(dtype=torch.float64) for v in values.values()])
        if bool(sums.isfinite().all()):
            return
        lengths, before = length_B.tolist(), len(self._found)
        for quantity, given in values.items():
            if quantity != LOSS:
                pieces = zip(samples, given.detach().cpu().split(lengths), strict=True)
                self._found += [Finding(quantity, where, o, v.clone()) for o, v in pieces if not v.isfinite().all()]
        if len(self._found) == before:  # no token tells whose fault it is
            self._found += [Finding(LOSS, where, o, told=(str(float(values[LOSS])),)) for o in samples]

    def before_update(self, step: int, norm: float) -> None:
        """Raise what was noted of the passes, of gradients (whose norm is given) or weights. All workers call it."""
        if not math.isfinite(norm):
            gradients = [(n, p.grad) for n, p in self.policy.model.named_parameters() if p.grad is not None]
            names = tuple(not_finite(gradients)) or (f"each number is, their norm is {norm}",)
            self._found.append(Finding(GRADIENT, "backward pass", told=names))
        self.require_finite(step, "before the update")

    def after_update(self, step: int) -> None:
        """Raise where the update has made a weight that is not finite. All workers call it."""
        self.require_finite(step, "after the update")
        self._learned = []

    def require_finite(self, step: int, where: str, others: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Raise what was noted, or weights that train, or `others`, that are not finite. All workers call it."""
        trained = [(n, p) for n, p in self.policy.model.named_parameters() if p.requires_grad]
        if names := not_finite([*trained, *others]):
            self._found.append(Finding(WEIGHT, where, told=tuple(names)))
        self.stop(step)

    def stop(self, step: int) -> None:
        """Raise what any worker has noted, on all of them, once its samples are stored. All workers call it.

        Raises ValueError for a reward, FloatingPointError for anything else.
        """
        mine, self._found = self._found, []
        found = [f for part in self.world.woven([mine]) for f in part]
        if not found:
            return
        if not any(f.sample for f in found):  # whatever was learned from since the last update
            found += [Finding(found[0].quantity, found[0].where, o) for part in self.world.woven([self._learned])
                      for o in part]
        broken = not_finite(self.policy.model.named_parameters())
        tensors = sorted({name for part in self.world.woven([broken]) for name in part})
        raise self.world.by_first(lambda: self._error(step, found, tensors))

    def _error(self, step: int, found: Sequence[Finding], broken: Sequence[str]) -> Exception:
        """What is to be raised; its record is written."""
        quantity = next(q for q in _CURES if any(f.quantity == q for f in found))
        first = [f for f in found if f.quantity == quantity]
        samples = list(dict.fromkeys(id_of(f.sample) for f in first if f.sample))
        names = list(dict.fromkeys(n for f in first for n in f.told))
        text = f"step {step}: {quantity} is not finite ({first[0].where})"
        if names:  # a refused reward says itself what is wrong
            text = f"step {step}: {names[0]}" if quantity == REWARD else f"{text}: {_some(names, 3)}"
        if samples:
            of = "in" if quantity == REWARD or any(f.values_T is not None for f in first) else "learned from"
            text += f"; {of} {len(samples)} sample{'s' * (len(samples) > 1)}: {_some(samples, 4)}"
        if broken and quantity != WEIGHT:
            text += f"; weights are not finite either: {_some(broken, 3)}"
        kept = "No update was made" if first[0].where != "after the update" else "The step is not kept"
        text += f". {kept}, and no checkpoint holds it. {_CURES[quantity]}"
        path = self.folder / f"step-{step:06d}.json"
        record = {"step": step, "quantity": quantity, "where": first[0].where, "message": text,
                  "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "tensors_not_finite": sorted({*broken, *(names if quantity in (GRADIENT, WEIGHT) else ())}),
                  "samples_found": len({id_of(f.sample) for f in found if f.sample})}
        try:
            _store(path, record, found)
        except (OSError, SafetensorError) as error:  # a full disk does not hide what happened
            text += f". {path} could not be written ({error})"
        else:
            text += f". Samples and tensors: {path}"
        return (ValueError if quantity == REWARD else FloatingPointError)(text)


def _store(path: Path, record: dict[str, Any], found: Sequence[Finding]) -> None:
    """The samples with their tensors; JSON is written last, and holds no number that is not finite."""
    rows: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for f in found:
        o, name = f.sample, id_of(f.sample)
        if o and name not in rows and len(rows) < MOST_SAMPLES:
            reward = o.reward if o.verdict else None
            rows[name] = {"problem": o.problem_id, "group": group_of(o), "sample": o.sample, "stop": o.stop,
                          "reward": reward if reward is None or math.isfinite(reward) else str(reward),
                          "text": o.text, "prompt_ids": list(o.prompt_ids), "token_ids": list(o.token_ids),
                          "not_finite": []}
            tensors |= {f"{len(rows) - 1}.{k}": torch.tensor(v) for k, v in (
                ("prompt_ids", o.prompt_ids), ("token_ids", o.token_ids), ("sampler_logp", o.sampler_logp))}
        if name in rows and f.values_T is not None:
            number = list(rows).index(name)
            bad = (~f.values_T.isfinite()).nonzero()[:, 0].tolist()
            rows[name]["not_finite"].append({"quantity": f.quantity, "where": f.where, "tokens": bad[:MOST_SAMPLES]})
            tensors[f"{number}.{f.quantity}, {f.where}"] = f.values_T.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".safetensors")
    save_file(tensors, file)
    record |= {"tensors": file.name, "samples": [{"number": i, **row} for i, row in enumerate(rows.values())]}
    write_atomic(path, json.dumps(Redactor().nested(record), indent=1, allow_nan=False))


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors with a NaN or an infinity, and how many of their numbers are; of this worker's shards."""
    local: list[tuple[str, Any]] = [(n, t.to_local() if hasattr(t, "to_local") else t) for n, t in named]
    local = [(n, t) for n, t in local if t.is_floating_point() and t.numel()]
    if not local:
        return []
    sums = torch.stack([t.sum(dtype=torch.float32).to(local[0][1].device) for _, t in local])
    if bool(sums.isfinite().all()):  # else a sum that is too large, perhaps
        return []
    return [f"{n} ({bad} of {t.numel()} numbers)" for n, t in local if (bad := int((~t.isfinite()).sum()))]


def group_of(sample: Rollout) -> str:
    """`autonomous`, `guided` or `expert`."""
    return "expert" if sample.stop == "written" else "guided" if sample.guided else "autonomous"


def id_of(sample: Rollout | None) -> str:
    """Problem, group and index of a sample."""
    return f"problem {sample.problem_id}, {group_of(sample)} {sample.sample}" if sample else ""


def _refused(verifier: Verifier, group: RolloutGroup, sample: Rollout) -> bool:
    try:
        verifier.judge([(group.problem, sample.text)])
    except ValueError:
        return True
    return False


def _some(texts: Sequence[str], most: int) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
