"""How a run trains, as plain data; what each field means and its unit: growmerge.schema.Training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from parallel.mesh import Mesh, mesh_of
from train.alarms import Bound, parse_alarms
from train.engine_config import PATIENCE_S, EngineConfig
from train.guard import Limits
from train.schedule import Kind, Rewarm, Schedule


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run from its first step to its last, on any number of ranks."""

    steps: int
    sequence_length: int
    global_batch: int
    micro_batch: int | None = None
    lr: float
    schedule: str = "wsd"
    warmup: int
    decay: float
    decay_shape: str
    floor: float = 0.0
    rewarm: tuple[Mapping[str, Any], ...] = ()
    """Fields of `train.schedule.Rewarm` each."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_embeddings: bool = True
    decay_norms: bool = False
    clip: float
    precision: str
    documents: str = "packed"
    checkpoint_every: int
    keep: int = 2
    keep_every: int | None = None
    saves: str = "auto"
    evaluate_every: int
    alarms: Mapping[str, str | float] = field(default_factory=dict)
    dynamics: str = "free"
    zero: int = 3
    tp: int = 1
    sp: int = 1
    pp: int = 1
    offload: str = "none"
    recompute: bool = False
    compile: bool = False
    kernels: str = "auto"
    skip_sigma: float = 6.0
    stop_after: int = 8
    stall_minutes: float = 30.0
    tracker: str = "jsonl"

    @cached_property
    def rates(self) -> Schedule:
        """Factors of the peak learning rate by step."""
        return Schedule(
            kind=cast(Kind, self.schedule),
            steps=self.steps,
            warmup=self.warmup,
            decay=self.decay,
            shape=self.decay_shape,
            floor=self.floor,
            rewarm=tuple(Rewarm(**each) for each in self.rewarm),
        )

    @property
    def patience_s(self) -> float:
        """Seconds that a save is waited for: less than what counts as no progress."""
        return min(PATIENCE_S, 60 * self.stall_minutes / 2) if self.stall_minutes else PATIENCE_S

    @property
    def limits(self) -> Limits:
        """What the guard lets pass."""
        return Limits(sigma=self.skip_sigma, stop_after=self.stop_after)

    def bounds(self) -> tuple[Bound, ...]:
        """Return the alarms."""
        return parse_alarms(self.alarms, tuple(self.alarms))

    def mesh(self, world_size: int) -> Mesh:
        return mesh_of(world_size, zero=self.zero, tp=self.tp, sp=self.sp, pp=self.pp)

    def batching(self, data_ranks: int) -> tuple[int, int]:
        """Return (samples a rank and a pass, passes a step) so that all data ranks together cover the global batch."""
        share = -(-self.global_batch // data_ranks)
        micro = min(self.micro_batch or share, share)
        return micro, -(-share // micro)

    def engine(self, mesh: Mesh) -> EngineConfig:
        """Return what the engine is asked for."""
        micro, passes = self.batching(mesh.dp)
        same: dict[str, Any] = {name: getattr(self, name) for name in SAME}
        offload = self.offload == "cpu"
        return EngineConfig(micro_batch=micro, accumulation=passes, mesh=mesh, offload=offload, **same)

    def evaluates_at(self, step: int, last: int) -> bool:
        inside = self.evaluate_every > 0 and step % self.evaluate_every == 0
        return step in (0, last) or inside

    def saves_at(self, step: int, last: int) -> bool:
        return step == last or step % self.checkpoint_every == 0


SAME = (
    *("lr", "betas", "eps", "weight_decay", "clip", "precision", "dynamics", "decay_embeddings", "decay_norms"),
    *("zero", "sequence_length", "recompute", "compile", "kernels"),
)
"""Fields of the engine's config that a plan has by the same name."""
