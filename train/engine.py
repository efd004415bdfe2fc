"""The DeepSpeed engine: a stock transformers model under ZeRO-3, started, grown and resumed through `read_shard`.

DeepSpeed loads what our checkpoint engine hands it, and that comes from a Source: a saved run, a Hugging Face folder, a
grown or merged model, or a model from scratch. No rank ever holds a whole model.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from checkpoint.shard import SubGroup, Topology
from checkpoint.source import FACTORS, Group, Source
from parallel.errors import InputError
from parallel.families import NORMS, family_of
from parallel.ranks import Ranks, device
from train.checkpointing import ShardEngine

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


PERSISTENT = 10**6
"""Tensors of up to so many elements stay whole on every rank; fetching them anew for each layer costs more."""


DYNAMICS: dict[str, tuple[str, ...]] = {
    "preserve": FACTORS,
    "mup": ("lr_factor", "weight_decay_factor", "eps_factor"),
    "free": (),
}
"""By name: the factors of a grown model's groups that training applies. preserve: all, so that a symmetrically grown
model trains as the small one did; mup: those of the optimizer (muP's width rules, arXiv 2203.03466), clipping as usual;
free: none."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What DeepSpeed is asked for."""

    micro_batch: int
    """Samples a rank and a pass."""
    accumulation: int
    """Passes a step."""
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    precision: str
    """float32 or bfloat16 (compute and stored weights; the master copy is float32)."""
    dynamics: str = "free"
    """Which of the factors that growth gave the source's groups are applied, a key of DYNAMICS."""


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its compiling anything: on CPU the shared-memory collective takes minutes to build."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.precision == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT},
        # torch's AdamW: DeepSpeed's own would be compiled first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def parameter_groups(
    model: torch.nn.Module, source: Source, *, weight_decay: float, eps: float, dynamics: str = "free"
) -> list[dict[str, Any]]:
    """Return AdamW's groups by name: matrices and embeddings are decayed, norms and biases are not.

    Each is divided further by the factors of the source's groups that `dynamics` applies; they stay in the group, so
    that a checkpoint keeps them.
    """
    table = family_of(source.config).tensors(source.config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        vector = table[name].kind in (*NORMS, "bias")
        grown = source.groups.get(source.infos[name].group, Group())
        factors = {key: getattr(grown, key) if key in DYNAMICS[dynamics] else 1.0 for key in FACTORS}
        mark = source.infos[name].group.partition("/")[2]
        kind = "no_decay" if vector else "decay"
        group = f"{kind}/{mark}" if any(factor != 1.0 for factor in factors.values()) else kind
        decay = 0.0 if vector else weight_decay * factors["weight_decay_factor"]
        values: dict[str, Any] = {
            "name": group,
            "params": [],
            "weight_decay": decay,
            "eps": eps * factors["eps_factor"],
            **factors,
        }
        groups.setdefault(group, values)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"])


def build_model(config: Mapping[str, Any], ds_config: Mapping[str, Any]) -> torch.nn.Module:
    """Build the stock transformers model, every parameter cut over the ranks as it is made; weights are not set."""
    deepspeed = _import_deepspeed()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    hf_config = AutoConfig.for_model(**config)
    hf_config.use_cache = False
    with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.tie_weights()
    # zero.Init makes every float tensor in the run's dtype; rotary frequencies lose too much in bfloat16.
    for module in model.modules():
        for name, child in module.named_children():
            if "rotary" in name:
                setattr(module, name, type(child)(config=hf_config))
    return model


def _weigh_norms(optimizer: Any) -> None:
    """Weigh each group's gradient norm in clipping by its `norm_weight`, as growth asks for."""
    weights = [group["norm_weight"] for group in optimizer.param_groups]
    mapping = optimizer.sub_group_to_group_id
    factors = [math.sqrt(weights[mapping[index]]) for index in range(len(mapping))]
    plain = optimizer._get_norm_groups

    def weighed() -> list[torch.Tensor]:
        # A norm of -1 stands for one that is not finite.
        return [torch.where(norm < 0, norm, norm * factor) for norm, factor in zip(plain(), factors, strict=True)]

    if any(factor != 1.0 for factor in factors):
        optimizer._get_norm_groups = weighed


def _gather_at_once(persistent: list[Any]) -> None:
    """Gather the persistent parameters after a step in one collective; DeepSpeed uses one a parameter."""

    def gather(param_list: list[Any]) -> None:
        apart = [parameter for parameter in param_list if parameter.ds_status.name == "NOT_AVAILABLE"]
        if apart:
            apart[0].all_gather_coalesced(apart).wait()

    if persistent:
        persistent[0].all_gather = gather


class Engine:
    """A running ZeRO-3 engine."""

    def __init__(self, source: Source, config: EngineConfig, ranks: Ranks) -> None:
        """Build the model of the source's config and fill each rank's share from the source.

        Raises:
            InputError: the source's tensors are not those of the model.
        """
        deepspeed = _import_deepspeed()
        ds_config = deepspeed_config(config)
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
        model = build_model(source.config, ds_config)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, source, weight_decay=config.weight_decay, eps=config.eps, dynamics=config.dynamics),
            lr=config.lr,
            betas=config.betas,
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        self._engine = engine
        self.config = config
        self.ranks = ranks
        self.topology = self._live_topology()
        self._shards = ShardEngine(self.topology, ranks)
        engine.checkpoint_engine = self._shards
        engine._copy_recovery_script = lambda *_: None
        _gather_at_once(engine.optimizer.persistent_parameters)
        _weigh_norms(engine.optimizer)
        self._load(source)

    @property
    def model(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def _live_topology(self) -> Topology:
        optimizer = self._engine.optimizer
        groups = [optimizer.param_groups[index]["name"] for index in self._group_of_sub_groups()]
        shapes = self._engine._get_zero_param_shapes()
        return Topology(
            ranks=self.ranks.world_size,
            sub_groups=tuple(
                SubGroup(group=group, tensors=tuple((name, tuple(shape)) for name, shape in entry.items()))
                for group, entry in zip(groups, shapes, strict=True)
            ),
        )

    def _group_of_sub_groups(self) -> list[int]:
        mapping = self._engine.optimizer.sub_group_to_group_id
        return [mapping[index] for index in range(len(mapping))]

    def _load(self, source: Source) -> None:
        for sub_group in self.topology.sub_groups:
            for name, shape in sub_group.tensors:
                info = source.infos.get(name)
                if info is None or info.shape != shape:
                    found = "missing" if info is None else f"of shape {info.shape}"
                    raise InputError(f"tensor {name} is {found} in the checkpoint; the model needs {shape}")
        with TemporaryDirectory() as temporary, self._shards.serving(source, self._engine):
            tag = "start"
            folder = Path(temporary) / tag
            folder.mkdir()
            # DeepSpeed looks for its files before it asks for their content.
            for path in (self._engine._get_ckpt_name(temporary, tag), self._engine._get_zero_ckpt_name(temporary, tag)):
                Path(path).touch()
            loaded, _ = self._engine.load_checkpoint(temporary, tag=tag)
        assert loaded is not None, "DeepSpeed found no checkpoint where one was served"
        for group in self._engine.optimizer.param_groups:
            decayed = group["name"].partition("/")[0] == "decay"
            group["betas"], group["eps"] = self.config.betas, self.config.eps * group["eps_factor"]
            group["weight_decay"] = self.config.weight_decay * group["weight_decay_factor"] if decayed else 0.0

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]], lr: float, scored: int) -> float:
        """Take one optimizer step and return this rank's sum of token losses (nats).

        Args:
            batches: one (input_ids [B, T + 1], weights [B]) a pass; a sample of weight 0 fills up a short rank.
            lr: learning rate of the step.
            scored: tokens that count, over all ranks and passes; the loss is their mean.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.train()
        total = 0.0
        # DeepSpeed averages over ranks and passes; undone here, so that the loss is a mean over tokens at any topology.
        scale = self.ranks.world_size * self.config.accumulation / scored
        for batch in batches:
            ids, weights = (tensor.to(device()) for tensor in batch)
            logits = self._engine(input_ids=ids[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            loss = (losses.view(len(ids), -1) * weights[:, None]).sum()
            total += float(loss.detach())
            self._engine.backward(loss * scale)
            self._engine.step()
        return total

    def save(self, folder: Path, tag: str, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Save a checkpoint `folder/tag`: shards by every rank, then the manifest, then the pointer.

        Args:
            state: plain data that comes back as the Source's run state.
            files: small files that belong to the checkpoint, such as config.json.
        """
        self._shards.files = dict(files)
        self._engine.save_checkpoint(str(folder), tag=tag, client_state={"growmerge": dict(state)}, save_latest=False)

    def close(self) -> None:
        """Give the memory back, so that the next run in this process starts clean."""
        self._engine.destroy()
        del self._engine
