"""The records that flow through the workbench: problems, strategies, responses, groups.

Shapes: none; these are plain Python values. `TokenBatch`, the tensor form, is made by `batching.py` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgpo_lib.config import DataConfig


@dataclass(frozen=True)
class Strategy:
    """A strategy description `s` (paper, section 3.1 and Table 4): no computation, no answer."""

    problem_type: str
    """Specific, recognisable category of the problem."""
    strategy: str
    """Principle, theorem or technique."""
    steps: tuple[str, ...]
    """High-level procedural steps in order, without their letters."""


@dataclass(frozen=True)
class PromptStyle:
    """Wording of both prompts; one for all problems of a run."""

    instruction: str = DataConfig.instruction
    """`data.instruction`."""
    guided: str = DataConfig.guided_prompt
    """`data.guided_prompt`."""


@dataclass(frozen=True)
class Problem:
    """A problem `q` with its gold answer."""

    id: str
    """Unique within the source."""
    prompt: str
    """Problem text as the model sees it, without instructions."""
    answer: str
    """Gold answer: LaTeX or plain text."""
    strategy: Strategy | None = None
    """Strategy description, where there is one."""
    solution: str = ""
    """Expert solution; empty where there is none."""
    family: str = ""
    """Kind of problem: testbed family, data set, subject."""
    scorer: str = ""
    """Empty: judged by the run's reward. `reasoning-gym:NAME`: judged by that data set's own scorer."""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    """Whatever else the source gave (JSON values)."""
    style: PromptStyle = field(default=PromptStyle(), compare=False)
    """How its prompts are worded."""


@dataclass(frozen=True)
class Verdict:
    """A judgement of one response."""

    status: str
    """`correct`, `wrong` or `unverifiable`."""
    reward: float
    """R(o, q): 1.0 for correct, else 0.0; a user's reward may lie between."""
    reason: str = ""
    """Of `unverifiable`: `no_answer`, `unparsed` (what the policy wrote), `timeout`, `memory`, `crash` (of a user's
    reward: with its message), `bad_gold`."""
    answer: str = ""
    """The final answer that was read from the response."""

    @property
    def correct(self) -> bool:
        """Whether the response belongs to C of Eq. 2."""
        return self.status == "correct"


@dataclass
class Rollout:
    """One sampled response. Token ids are kept as sampled; text is never tokenised again."""

    problem_id: str
    """Whose problem it answers."""
    guided: bool
    """Sampled under pi(.|q,s) rather than pi(.|q)."""
    sample: int
    """Index within its group."""
    prompt_ids: tuple[int, ...]
    """Prompt it was sampled under."""
    token_ids: tuple[int, ...]
    """Response tokens, the end token included where the model ended."""
    text: str
    """Decoded response without special tokens."""
    stop: str
    """`end` (the model ended) or `length` (it ran out of tokens); an expert solution has `written`."""
    sampler_logp: tuple[float, ...] = ()
    """Log-probability of each token under the sampler's untruncated, temperature-1 distribution (nats)."""
    verdict: Verdict | None = None
    """Set by the verifier."""

    @property
    def reward(self) -> float:
        """The verdict's reward. Raises ValueError before the response is judged."""
        if self.verdict is None:
            raise ValueError(f"response {self.sample} of problem {self.problem_id} has not been judged yet")
        return self.verdict.reward

    @property
    def correct(self) -> bool:
        """Whether it was judged correct; False before it is judged."""
        return self.verdict is not None and self.verdict.correct


@dataclass
class RolloutGroup:
    """Both groups of one problem (Algorithm 1, lines 6-9)."""

    problem: Problem
    """q, with its strategy s."""
    autonomous: list[Rollout]
    """o_1..o_G1 ~ pi(.|q)."""
    guided: list[Rollout]
    """o~_1..o~_G2 ~ pi(.|q,s); empty where the method does not guide."""
    unguided_prompt_ids: tuple[int, ...] = ()
    """Prompt of pi(.|q)."""
    guided_prompt_ids: tuple[int, ...] = ()
    """Prompt of pi(.|q,s)."""
    expert: Rollout | None = None
    """The expert solution as a response to the unguided prompt, where the method learns from it (LUFFY, HPT)."""

    @property
    def responses(self) -> list[Rollout]:
        """Every response, the expert's last."""
        return [*self.autonomous, *self.guided, *([self.expert] if self.expert else [])]

    @property
    def p_auto(self) -> float:
        """Mean reward of the autonomous group (Eq. 6)."""
        return sum(o.reward for o in self.autonomous) / len(self.autonomous)

    @property
    def p_guide(self) -> float:
        """Mean reward of the guided group (Eq. 6); 0 where there is none."""
        return sum(o.reward for o in self.guided) / len(self.guided) if self.guided else 0.0
