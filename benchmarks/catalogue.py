"""What is measured: every job with its steps, the peer that it is set against, and the figures that are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wanted:
    """Figures to reach; None = none is set.

    Attributes:
        speed: at least so many times the peer's tokens per second, the peer as shipped.
        speed_tuned: the same against the peer with malloc tuned.
        memory: at most this share of the peer's memory above import.
        memory_wide: the same at a vocabulary of 32,768 or more.
        share: at least this share of the machine's matrix-multiply peak.
        update_share: at least this share of it in the update alone.
    """

    speed: float | None = None
    speed_tuned: float | None = None
    memory: float | None = None
    memory_wide: float | None = None
    share: float | None = None
    update_share: float | None = None


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        title: in tables and pictures.
        wanted: what palate is to reach.
        peer_s: about how long the peer takes for a step on two threads, seconds; for the estimate of ``--plan`` alone.
        samples: demonstrations, pairs or responses of one step.
        steps: optimizer steps (of methods that sample: iterations) of one run; ``quick`` of them with ``--quick``.
        warmup: steps at the beginning of a run that do not count.
        peer: the tool that ratios are to, and ``tuned``, the same with malloc tuned.
        samples_responses: a step has phases: generation, scoring, update.
        arguments: of the job's scripts.
    """

    title: str
    wanted: Wanted
    peer_s: float
    samples: int = 16
    steps: int = 8
    quick: int = 4
    warmup: int = 2
    peer: str = "TRL"
    tuned: str = "TRL, malloc tuned"
    samples_responses: bool = False
    arguments: tuple[str, ...] = field(default=())


_PREFERENCES = Wanted(speed=6, speed_tuned=4, memory=0.2)
_GROUPS = Wanted(speed=4.5, memory=0.3)
_GENERATION = Wanted(speed=5, memory=1)
_ITERATIONS = {"samples": 32, "steps": 4, "quick": 2, "warmup": 1, "samples_responses": True}
_DRAWING = {
    "samples": 32,
    "steps": 4,
    "quick": 2,
    "warmup": 1,
    "peer": "transformers generate",
    "tuned": "transformers generate, malloc tuned",
}

JOBS: dict[str, Job] = {
    "sft": Job("SFT", Wanted(speed=5, speed_tuned=3.5, memory=0.2, memory_wide=0.15, share=0.55), 4.5),
    "reward": Job("reward model (BT)", Wanted(speed=3.5, memory=0.3), 2.3, samples=8),
    "dpo": Job("DPO", Wanted(speed=6, speed_tuned=4, memory=0.2, share=0.55), 5.5, samples=8),
    "dpo_cached": Job("DPO, reference cached", _PREFERENCES, 3.6, samples=8),
    "kto": Job("KTO", _PREFERENCES, 8),
    "orpo": Job("ORPO", _PREFERENCES, 2.8, samples=8),
    "grpo": Job("GRPO", _GROUPS, 13, **_ITERATIONS),
    "rloo": Job("RLOO", _GROUPS, 13, **_ITERATIONS),
    "online_dpo": Job("online DPO", _GROUPS, 11, **_ITERATIONS),
    "ppo": Job("PPO", Wanted(speed=3, memory=0.3, update_share=0.5), 27, **_ITERATIONS),
    "generation": Job("generation", _GENERATION, 6, **_DRAWING),
    "generation_groups": Job("generation, groups of 4", _GENERATION, 6, **_DRAWING, arguments=("--group", "4")),
}
