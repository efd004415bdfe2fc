"""The DeepSpeed engine: a stock transformers model under ZeRO 0 to 3, started, grown and resumed from a Source.

Each rank fills its part from the Source itself (`train.fill`): a saved run of any topology, a Hugging Face folder, a
grown or merged model, or a model from scratch.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.shard import SubGroup, Topology
from checkpoint.source import Source
from checkpoint.tensor_parallel import cuts_of, piece_of
from checkpoint.zero_files import PARAMETER_NAMES
from parallel.errors import InputError
from parallel.memory import give_back_freed
from parallel.mesh import Mesh, check_model
from parallel.ranks import Ranks, Readers, device, readers
from train.batch import Batch, count_tokens
from train.build import build_model, parameter_groups, partition_config
from train.checkpointing import ShardEngine, file_bytes, shard_bytes
from train.engine_config import EngineConfig
from train.fill import check_names, fill_partitions, fill_plain, fill_zero3
from train.loss import FLASH, attention, give_losses, use_kernels
from train.norms import Keep, watch_norms
from train.saver import Outcome
from train.sequence import SequenceParallel

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


PERSISTENT = 10**6
"""Tensors of up to so many elements stay whole on every rank; fetching them anew for each layer costs more."""

BUCKET = 5 * 10**7
"""Gradient elements reduced at once. DeepSpeed's default, ten times that, is a buffer of a gigabyte or two on each
rank."""
SUB_GROUP = 5 * 10**7
"""Elements that a step works on at once: their gradients are put together in float32 first."""

LIVE = 10**8
"""Elements of gathered weights that stay for the backward pass on a CPU, whose memory all ranks share."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What came of one optimizer step, the same on every rank."""

    losses: torch.Tensor
    """Sum of token losses (nats) by corpus [corpora], float64, over all ranks."""
    counts: torch.Tensor
    """Tokens that counted, by corpus [corpora], float64."""
    grad_norm: float
    """Before clipping; infinite where it was not finite."""
    kept: bool
    """Whether the optimizer stepped."""
    squares: Mapping[str, float]
    """Squared norm of each tensor's gradient, before clipping, by Hugging Face name."""

    @property
    def loss(self) -> float:
        """Mean loss (nats a token)."""
        return float(self.losses.sum() / self.counts.sum())


def import_deepspeed() -> Any:
    """Import DeepSpeed without its compiling anything: on CPU the shared-memory collective takes minutes to build.

    Its Muon optimizer is compiled when it is imported, which every engine does: of no use here, and a second of torch's
    inductor.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = compiled
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    zero: dict[str, Any] = {"stage": config.zero}
    if config.zero:
        zero["reduce_bucket_size"] = BUCKET
    if config.zero == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT
        zero["sub_group_size"] = SUB_GROUP
        if not torch.cuda.is_available():
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    bf16: dict[str, Any] = {"enabled": config.precision == "bfloat16"}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "bf16": bf16,
        "zero_optimization": zero,
        # torch's AdamW: DeepSpeed's own would be compiled first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if bf16["enabled"]:
        found["data_types"] = {"grad_accum_dtype": "fp32"}
        if config.zero in (1, 2):
            bf16["check_grad_overflow"] = True  # or a norm that is not finite would be stepped with
    if config.mesh.sp > 1:
        found["sequence_parallel_size"] = config.mesh.sp
    return found


def _gather_at_once(persistent: list[Any]) -> None:
    """Gather the persistent parameters after a step in one collective; DeepSpeed uses one a parameter."""

    def gather(param_list: list[Any]) -> None:
        apart = [parameter for parameter in param_list if parameter.ds_status.name == "NOT_AVAILABLE"]
        if apart:
            apart[0].all_gather_coalesced(apart).wait()

    if persistent:
        persistent[0].all_gather = gather


def owned(source: Source) -> tuple[str, ...]:
    """Return the names of a source's tensors that are no alias of another."""
    return tuple(name for name, info in source.infos.items() if info.tied_to is None)


def bytes_of_files(model: torch.nn.Module, config: EngineConfig, mesh: Mesh, ranks: Ranks) -> int:
    """Return the bytes that this rank's files of a checkpoint take, with ZeRO 0 to 2."""
    return file_bytes(
        sum(parameter.numel() for parameter in model.parameters()),
        zero=config.zero,
        ranks=mesh.dp * mesh.sp,
        width=2 if config.precision == "bfloat16" else 4,
        first=mesh.data_rank(ranks.rank) == mesh.sequence_rank(ranks.rank) == 0,
    )


def apply_settings(optimizer: Any, config: EngineConfig) -> None:
    """Set this run's settings of every group."""
    for group in optimizer.param_groups:
        decayed = group["name"].partition("/")[0] == "decay"
        group["betas"], group["eps"] = config.betas, config.eps * group["eps_factor"]
        group["weight_decay"] = config.weight_decay * group["weight_decay_factor"] if decayed else 0.0


def forget_groups() -> None:
    """Let DeepSpeed forget an engine's mesh, which it keeps in globals: the next engine may have another."""
    from deepspeed.utils import groups

    groups._release_process_group_references()


class Engine:
    """A running engine: ZeRO, alone or with tensor or sequence parallelism."""

    def __init__(self, source: Source, config: EngineConfig, ranks: Ranks, **saving: Any) -> None:
        """Build the model of the source's config and fill each rank's share from the source.

        Args:
            saving: how checkpoints are saved, see `train.checkpointing.ShardEngine`.

        Raises:
            InputError: the source's tensors are not those of the model, or the model cannot be cut so.
        """
        deepspeed = import_deepspeed()
        self.config = config
        self.ranks = ranks
        mesh = config.mesh
        self.mesh = Mesh(dp=ranks.world_size // (mesh.tp * mesh.sp), tp=mesh.tp, sp=mesh.sp)
        check_model(self.mesh, source.config, config.sequence_length or self.mesh.sp)
        if config.zero == 0 and config.precision == "bfloat16":
            raise InputError("zero: 0 keeps no float32 master copy of bfloat16 weights: use zero: 1, or float32")
        ds_config = deepspeed_config(config)
        if mesh.tp > 1:
            rules = partition_config(source.family, source.config)
            ds_config["tensor_parallel"] = {"autotp_size": mesh.tp, "partition_config": rules}
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
        self._attention = attention(config.kernels, config.precision)
        model: Any = build_model(source.config, ds_config, self.mesh, self._attention)
        self._take_back_kernels = use_kernels(model, "torch" if config.compile else config.kernels)
        give_losses(model, source.config)
        if config.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._sequence = SequenceParallel(model, self.mesh, config, self._attention) if mesh.sp > 1 else None
        named = dict(model.named_parameters())
        groups = parameter_groups(
            named,
            source,
            weight_decay=config.weight_decay,
            eps=config.eps,
            dynamics=config.dynamics,
            decay_embeddings=config.decay_embeddings,
            decay_norms=config.decay_norms,
        )
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        mpu = self._sequence.mpu if self._sequence else None
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
        self._engine = engine
        self.topology = self._live_topology() if config.zero == 3 else None
        expected = (
            bytes_of_files(model, config, self.mesh, ranks) if self.topology is None else shard_bytes(self.topology)
        )
        self._shards = ShardEngine(ranks, expected=expected, **saving)
        if config.zero == 3:
            _gather_at_once(engine.optimizer.persistent_parameters)
        self._cuts = cuts_of(source, mesh.tp) if mesh.tp > 1 else {}
        names = {parameter: name for name, parameter in named.items()}
        self._norms = watch_norms(engine, config.zero, names, owned(source), ranks, self.mesh, self._cuts)
        give_back_freed()  # building leaves holes: of 0.7 GB by a quarter of a billion parameters
        self._load(source)
        self._shards.attach(engine)
        if config.compile:
            engine.compile()

    @property
    def model(self) -> torch.nn.Module:
        """The running model; between `eval()` and `train()` each rank may compute on text of its own."""
        return self._engine.module

    @property
    def readers(self) -> Readers:
        """How evaluation shares text: tensor-parallel ranks score the same, those of a sequence do not."""
        return readers(self.ranks, lambda rank: rank // self.mesh.tp)

    def _live_topology(self) -> Topology:
        optimizer = self._engine.optimizer
        mapping = optimizer.sub_group_to_group_id
        groups = [optimizer.param_groups[mapping[index]]["name"] for index in range(len(mapping))]
        shapes = self._engine._get_zero_param_shapes()
        return Topology(
            ranks=self.ranks.world_size // self.mesh.tp,
            sub_groups=tuple(
                SubGroup(group=group, tensors=tuple((name, tuple(shape)) for name, shape in entry.items()))
                for group, entry in zip(groups, shapes, strict=True)
            ),
        )

    def _load(self, source: Source) -> None:
        if self.mesh.tp > 1:
            source = piece_of(source, self._cuts, self.mesh.tensor_rank(self.ranks.rank))
        optimizer = self._engine.optimizer
        if self.topology is not None:
            check_names(source, {name: shape for group in self.topology.sub_groups for name, shape in group.tensors})
            fill_zero3(optimizer, self.topology, source, self.ranks.rank // self.mesh.tp)
        else:
            names = {parameter: name for name, parameter in self._engine.module.named_parameters()}
            check_names(source, {name: tuple(parameter.shape) for parameter, name in names.items()})
            (fill_partitions if self.config.zero else fill_plain)(optimizer, names, source)
        self._engine.global_steps, self._engine.global_samples = source.run.step, source.run.samples
        apply_settings(optimizer, self.config)

    def step(
        self,
        batches: Sequence[Batch],
        lr: float,
        *,
        corpora: int = 1,
        keep: Keep | None = None,
    ) -> Step:
        """Take one optimizer step.

        Args:
            batches: one a pass; the ranks of one data rank get the same.
            lr: learning rate of the step.
            corpora: how many corpora there are.
            keep: (mean loss, gradient norm) -> whether to step; the same on every rank. A norm that is not finite is
                never stepped with.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.train()
        counts = self.ranks.sum(count_tokens(batches, corpora)) / (self.mesh.tp * self.mesh.sp)
        scored = round(float(counts.sum()))
        sums = torch.zeros(corpora, dtype=torch.float64)
        # DeepSpeed averages over ranks and passes; undone here, so that the loss is a mean over tokens at any topology.
        # Among a sequence's ranks ZeRO-3 averages too, and ZeRO-1 and 2 add up.
        averaged = self.mesh.dp * (self.mesh.sp if self.config.zero == 3 else 1)
        scale = averaged * self.config.accumulation / scored
        for number, batch in enumerate(batches):
            losses = self._losses(batch)
            sums.index_add_(0, batch.corpus, losses.detach().double().sum(1).cpu())
            self._engine.backward(losses.sum() * scale)
            if number == len(batches) - 1:
                sums = self.ranks.sum(sums) / self.mesh.tp  # tensor-parallel ranks have the same losses
                self._norms.expect(None if keep is None else partial(keep, float(sums.sum()) / scored))
            self._engine.step()
        norms = self._norms
        return Step(losses=sums, counts=counts, grad_norm=norms.last, kept=norms.kept, squares=norms.squares)

    def _losses(self, batch: Batch) -> torch.Tensor:
        """Return the weighted token losses [B, T] of this rank's part of a batch."""
        ids, weights = batch.ids.to(device()), batch.weights.to(device())
        inputs, targets = ids[:, :-1], ids[:, 1:]
        positions = None if batch.positions is None else batch.positions.to(device())
        if self._sequence is not None:
            inputs, targets, weights, positions = self._sequence.part(inputs, targets, weights, positions)
        given = {} if positions is None else {"position_ids": positions}
        shape = targets.shape
        if positions is not None and self._attention == FLASH and self._sequence is None:
            # It finds documents by their positions in a single row; a row of the batch begins one, too.
            given = {"position_ids": positions.reshape(1, -1)}
            inputs, targets = inputs.reshape(1, -1), targets.reshape(1, -1)
        return self._engine(input_ids=inputs, targets=targets, **given).view(shape) * weights

    def weights(self) -> Iterator[tuple[str, torch.Tensor]] | None:
        """Return (name, whole weight), one after the other; None where ranks have pieces of matrices.

        All ranks go through them together.
        """
        return None if self.mesh.tp > 1 else self._weights()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed

        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, enabled=self.config.zero == 3):
                yield name, parameter.detach()

    def save(self, folder: Path, tag: str, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Save a checkpoint `folder/tag`: shards by every rank, then the manifest, then the pointer.

        Args:
            state: plain data that comes back as the Source's run state.
            files: small files that belong to the checkpoint, such as config.json.
        """
        self._shards.files = dict(files)
        ours = dict(state)
        if self.config.zero == 0:  # torch numbers the parameters in the order of the groups
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            groups = self._engine.optimizer.param_groups
            ours[PARAMETER_NAMES] = [names[parameter] for group in groups for parameter in group["params"]]
        self._engine.save_checkpoint(str(folder), tag=tag, client_state={"growmerge": ours}, save_latest=False)

    @property
    def expected_bytes(self) -> int:
        """Bytes of this rank's files of a checkpoint, about."""
        return self._shards.expected

    def finished(self) -> Outcome | None:
        """Return what this rank alone knows of the last save, once it has ended."""
        return self._shards.finished()

    def settle(self) -> list[Outcome]:
        """Return how the saves since the last call ended; all ranks together."""
        return self._shards.settle()

    def close(self) -> None:
        """Give the memory back, so that the next run in this process starts clean."""
        self._shards.saver.close()
        self._engine.destroy()
        del self._engine
        self._take_back_kernels()
        if self._sequence is not None:
            self._sequence.close()
        if self.mesh != Mesh(dp=self.mesh.dp):
            forget_groups()
