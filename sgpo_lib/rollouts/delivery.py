"""Brings the policy's weights to a sampler that holds a copy of its own, and makes sure that they have arrived.

Before every call of `sample` the policy is compared with what was last delivered; where it has changed it is delivered:
a LoRA adapter as a folder under a new version number, never merged; all weights over CUDA IPC where both share a GPU,
else as a saved folder. Then the sampler is asked for the numbers of fingerprint.py, computed from the very tensors that
it multiplies with (of base matrices a part), and they must be the trainer's. A delivery that was skipped, a former one
that came again, an update applied twice, a base that was changed: each gives other numbers and stops the run before a
token is sampled.

    skipped    the sampler has the weights of an earlier step
    repeated   it loaded a former version once more (vLLM does so for a version number that it knows)
    doubled    B is scaled twice, or an adapter lies over a base that already holds it

What the numbers cannot show (a kernel that errs, values that changed places inside a layer) shows in the metric
`sampler_trainer_gap`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sgpo_lib.policy import ADAPTER, WEIGHTS, Policy
from sgpo_lib.rollouts.fingerprint import adapter_numbers, base_numbers, differences, read
from sgpo_lib.rollouts.interface import Engine, Sample, SampleRequest


class Holder(Engine, Protocol):
    """An engine with weights of its own."""

    ours: bool
    """Whether it was started by this process, and ends with it."""

    def load_adapter(self, folder: Path, version: int, name: str) -> None:
        """Sample from the adapter in a folder from now on."""

    def load_weights(self, folder: Path) -> None:
        """Replace all weights by those of a folder."""

    def held(self) -> dict[str, Any] | None:
        """`base`, `adapter` (numbers of fingerprint.py), `adapters`, `dtype`; None where the sampler does not tell."""


@runtime_checkable
class InMemory(Protocol):
    """An engine that takes weights in the GPU's memory. Others get a folder."""

    def receive_weights(self, model: Any) -> None:
        """Replace all weights by those of a model on the same GPU."""


class Delivered:
    """An engine that always samples the current policy. `start` makes the sampler, with the first call of `sample`.

    `folder` is where adapters and weights are put for the sampler, which must see it (without it a temporary one);
    `dtype` is the sampler's. The folder is removed by `close`. Without `verify` the sampler is trusted; the metric
    `weights_verified` is then 0. A sampler of this process that was interrupted or failed is ended, since it may hold
    requests that were not answered; the next call starts another.
    """

    def __init__(self, start: Callable[[], Holder], policy: Policy, folder: Path | None, dtype: torch.dtype,
                 verify: bool = True):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="sgpo-delivery-")
        self.folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self.start, self.policy, self.dtype, self.verify = start, policy, dtype, verify
        self.engine: Holder | None = None
        self.version = 0
        self._told: dict[str, float] = {}
        self._base = base_numbers(base_parameters(policy, dtype), dtype) if policy.lora else {}
        self._delivered = ""

    def sample(self, requests: Sequence[SampleRequest], *, temperature: float, top_p: float,
               max_new_tokens: int) -> list[Sample]:
        """One response per request, in order, from the current policy.

        Raises what the engine raises, and RuntimeError where the sampler does not hold the policy's weights.
        """
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine that starts or wakes wants memory that is free, not what torch keeps
        if self.engine is None:
            self.engine = self.start()
        try:
            self._deliver(self.engine)
            if self.verify:
                self._verify(self.engine)
            samples = self.engine.sample(requests, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        except ValueError:  # a prompt that is too long: nothing was asked
            raise
        except BaseException:
            if self.engine.ours:
                self.engine.close()
                self.engine, self._delivered = None, ""
            raise
        self._told["weights_verified"] = float(self.verify)
        prompt = sum(len(r.prompt_ids) for r in requests)
        self._add("prompt_tokens", prompt)
        self._add("cached_tokens", sum(s.cached_prompt for s in samples))
        return samples

    def rest(self) -> None:
        """As the engine's."""
        if self.engine:
            self.engine.rest()

    def report(self) -> dict[str, float]:
        """`weights_version` (deliveries by this process), `weights_verified` (1 or 0), `delivery_seconds`,
        `delivery_bytes`, `verify_seconds`, and the share of prompt tokens that came from the prefix cache."""
        told, self._told = self._told, {}
        share = told.pop("cached_tokens", 0.0) / max(1.0, told.pop("prompt_tokens", 0.0))
        return {"weights_version": float(self.version), **told, "prompt_cached_share": share}

    def close(self) -> None:
        """End the engine; drop what was put down for it."""
        if self.engine:
            self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._temporary:
            self._temporary.cleanup()

    # -----------------------------------------------------------------------------------------------------------
    def _add(self, name: str, value: float) -> None:
        self._told[name] = self._told.get(name, 0.0) + value

    def _deliver(self, engine: Holder) -> None:
        """Bring the policy over where it is not what was delivered last."""
        current = self.policy.content()
        if current == self._delivered:
            return
        start = time.perf_counter()
        self.version += 1
        target = self.folder / f"version-{self.version:06d}-{current}"
        if not self.policy.lora and self.policy.device.type == "cuda" and isinstance(engine, InMemory):
            with self.policy.whole():
                engine.receive_weights(self.policy.model)
            size = sum(p.numel() * p.element_size() for p in self.policy.parameters())
        else:
            self.policy.save(target, self.dtype)
            what = target / (ADAPTER if self.policy.lora else WEIGHTS)
            size = sum(f.stat().st_size for f in what.glob("*.safetensors"))
            if self.policy.lora:
                engine.load_adapter(what, self.version, f"sgpo-{current}")
            else:
                engine.load_weights(what)
            for old in self.folder.glob("version-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        self._delivered = current
        self._add("delivery_seconds", time.perf_counter() - start)
        self._add("delivery_bytes", size)

    def _verify(self, engine: Holder) -> None:
        """Raises RuntimeError where the sampler holds other weights than the policy."""
        start = time.perf_counter()
        held = engine.held()
        if held is None:
            raise RuntimeError("the sampler does not tell which weights it holds. A server must run with "
                               "VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
                               "sgpo_lib.rollouts.vllm_worker.WeightReader; or set rollout.verify_weights to false")
        dtype = str(self.dtype).split(".")[-1]
        if held["dtype"] != dtype:
            raise RuntimeError(f"the sampler computes in {held['dtype']}, expected {dtype}. Start it with --dtype "
                               f"{dtype}, or set rollout.sampler_dtype to {held['dtype']}")
        if self.policy.lora:
            wrong = [f"base, {w}" for w in differences(held["base"], self._base)]
            wrong = wrong or [f"adapter, {w}" for w in differences(
                held.get("adapter") or {}, adapter_numbers(_adapter(self.policy, self.dtype)))]
        else:
            wrong = differences(held["base"], base_numbers(base_parameters(self.policy, self.dtype), self.dtype))
        if wrong:
            raise RuntimeError(
                f"the sampler does not hold the policy's weights after delivery {self.version}: {len(wrong)} parts "
                f"differ ({'; '.join(wrong[:2])}). The delivery was skipped, came from a former step, or was applied "
                "twice (or another run uses the same server); nothing was sampled. Start the same command again: it "
                "continues from the last checkpoint with a new sampler")
        self._add("verify_seconds", time.perf_counter() - start)


def base_parameters(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What is read of each parameter; the output matrix comes under `lm_head`, also where it is the embeddings'."""
    for name, parameter in policy.model.named_parameters():
        if ".lora_" not in name and "lm_head" not in name:
            yield name.replace(".base_layer.", "."), read(policy.gathered(parameter, dtype))
    yield "lm_head.weight", read(policy.gathered(policy.head()[0], dtype))


def _adapter(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B x scale), the product rounded as vLLM rounds it."""
    for name, module in policy.model.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            b = module.lora_B["default"].weight.detach().to(dtype)
            yield f"{name}.weight", module.lora_A["default"].weight.detach().to(dtype), b * module.scaling["default"]

