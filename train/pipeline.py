"""Pipeline parallelism by DeepSpeed's PipelineModule (with ZeRO-1): Hugging Face's own layers in thin wrappers.

A stage makes its own layers alone. A tied embedding lies in the first stage and, once more, in the last; DeepSpeed adds
up their gradients.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from checkpoint.source import Source
from checkpoint.zero_files import PARAMETER_NAMES
from parallel.errors import InputError
from parallel.mesh import Mesh, check_model
from parallel.ranks import Ranks, Readers, device, readers
from train.batch import Batch, count_tokens
from train.build import parameter_groups
from train.checkpointing import ShardEngine
from train.engine import (
    EngineConfig,
    Step,
    apply_settings,
    bytes_of_files,
    deepspeed_config,
    forget_groups,
    import_deepspeed,
    owned,
)
from train.fill import check_names, fill_partitions
from train.norms import Keep, watch_norms
from train.saver import Outcome

Hidden = tuple[torch.Tensor, torch.Tensor]
"""Hidden states [B, T, D] and position ids [B, T]."""


class Part(nn.Module):
    """A piece of a Hugging Face model, made when its stage is: `prefix` is its name there."""

    def __init__(self, skeleton: nn.Module, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.inner = skeleton.get_submodule(prefix).to_empty(device="cpu")


class Embedding(Part):
    """The first piece, and where the head is tied to it the last one too."""

    def forward(self, given: Hidden) -> Hidden:
        ids, positions = given
        return self.inner(ids), positions


def tied_head(part: nn.Module, given: Hidden) -> torch.Tensor:
    """Return logits [B, T, V] of the embedding used as a head."""
    return nn.functional.linear(given[0], cast(Any, part).inner.weight)


class Layer(Part):
    """A decoder layer, with the mask and the rotary embedding that the whole model would give it."""

    def __init__(self, skeleton: Any, prefix: str) -> None:
        super().__init__(skeleton, prefix)
        self.config = skeleton.config
        self.rotary = type(skeleton.model.rotary_emb)(config=skeleton.config)

    def forward(self, given: Hidden) -> Hidden:
        from transformers.masking_utils import create_causal_mask

        hidden, positions = given
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        found = self.inner(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.rotary(hidden, positions),
        )
        return (found[0] if isinstance(found, tuple) else found), positions


class Norm(Part):
    def forward(self, given: Hidden) -> Hidden:
        return self.inner(given[0]), given[1]


class Head(Part):
    def forward(self, given: Hidden) -> torch.Tensor:
        return self.inner(given[0])


def build_pipeline(config: Mapping[str, Any], stages: int, loss: Any, *, recompute: bool) -> Any:
    """Return the PipelineModule of a model; weights are not set.

    Raises:
        InputError: the family's model does more between its layers than pass the hidden states on.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from transformers import AutoConfig, AutoModelForCausalLM

    from parallel.families import family_of

    family = family_of(config)
    if family.scaled_embeddings or family.logits_divisor:
        raise InputError(
            f"parallel.pp: the family {family.name} scales between its layers, which no stage does: use tp"
        )
    if family.experts:
        raise InputError(f"parallel.pp: the family {family.name} has experts, which no stage is tested with: use zero")
    if family.plain_heads:
        raise InputError(f"parallel.pp: the family {family.name} has modules of other names than its stages: use zero")
    hf_config = AutoConfig.for_model(**config)
    hf_config.use_cache = False
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    tied = family.is_tied(config)
    first = (
        TiedLayerSpec("embedding", Embedding, skeleton, "model.embed_tokens", tied_weight_attr=["inner.weight"])
        if tied
        else LayerSpec(Embedding, skeleton, "model.embed_tokens")
    )
    last = (
        TiedLayerSpec(
            "embedding",
            Embedding,
            skeleton,
            "model.embed_tokens",
            forward_fn=tied_head,
            tied_weight_attr=["inner.weight"],
        )
        if tied
        else LayerSpec(Head, skeleton, "lm_head")
    )
    layers = [LayerSpec(Layer, skeleton, f"model.layers.{number}") for number in range(hf_config.num_hidden_layers)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        return PipelineModule(
            layers=[first, *layers, LayerSpec(Norm, skeleton, "model.norm"), last],
            num_stages=stages,
            loss_fn=loss,
            partition_method="type:Layer$",
            activation_checkpoint_interval=int(recompute),
            checkpointable_layers=["Layer"],
        )


def names_of(module: nn.Module) -> dict[str, str]:
    """Return the Hugging Face name of each parameter of this stage, by its own name."""
    parts = {id(part): part for part in module.modules() if isinstance(part, Part)}
    owners = {
        id(parameter): f"{part.prefix}.{name}"
        for part in parts.values()
        for name, parameter in part.inner.named_parameters()
    }
    return {name: owners[id(parameter)] for name, parameter in module.named_parameters()}


class PipelineEngine:
    """A running pipeline, with the interface of `train.engine.Engine`."""

    def __init__(self, source: Source, config: EngineConfig, ranks: Ranks, **saving: Any) -> None:
        """Build this rank's stage and fill it; see `train.engine.Engine`."""
        deepspeed = import_deepspeed()
        self.config = config
        self.ranks = ranks
        self.mesh = Mesh(dp=ranks.world_size // config.mesh.pp, pp=config.mesh.pp)
        check_model(self.mesh, source.config, config.sequence_length or 1)
        if config.compile:
            raise InputError("compile: DeepSpeed's pipeline does not compile: leave it out, or use tp")
        if source.family.is_tied(source.config) and config.offload and config.precision == "bfloat16":
            raise InputError(
                "offload: in a pipeline DeepSpeed does not add up a tied embedding's gradients that lie on the CPU in "
                "bfloat16: use offload: none, precision: float32, or tp"
            )
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
        self._config = SimpleNamespace(
            vocab_size=source.config["vocab_size"], max_position_embeddings=source.config["max_position_embeddings"]
        )
        self._scale = 1.0
        self._sums = torch.zeros(1, dtype=torch.float64)
        module = build_pipeline(source.config, self.mesh.pp, self._loss, recompute=config.recompute)
        self._names = names_of(module)
        named = {self._names[name]: parameter for name, parameter in module.named_parameters()}
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
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config))
        self._engine = engine
        self._shards = ShardEngine(ranks, expected=bytes_of_files(module, config, self.mesh, ranks), **saving)
        self._shards.attach(engine)
        names = {parameter: name for name, parameter in named.items()}
        self._norms = watch_norms(engine, config.zero, names, owned(source), ranks, self.mesh)
        check_names(source, {name: tuple(parameter.shape) for name, parameter in named.items()})
        fill_partitions(engine.optimizer, names, source)
        engine.global_steps, engine.global_samples = source.run.step, source.run.samples
        apply_settings(engine.optimizer, config)

    @property
    def model(self) -> "PipelineModel":
        """What evaluation calls; the ranks of one pipeline call it together, with the same text."""
        return PipelineModel(self._engine, self._config)

    @property
    def readers(self) -> Readers:
        """How evaluation shares text: the ranks of a pipeline score the same."""
        return readers(self.ranks, self.mesh.data_rank)

    def _loss(self, logits: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        targets, weights, corpus = labels
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape) * weights
        self._sums.index_add_(0, corpus.cpu(), losses.detach().double().sum(1).cpu())
        return losses.sum() * self._scale

    def step(
        self,
        batches: Sequence[Batch],
        lr: float,
        *,
        corpora: int = 1,
        keep: Keep | None = None,
    ) -> Step:
        """Take one optimizer step; see `train.engine.Engine.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        counts = self.ranks.sum(count_tokens(batches, corpora)) / self.mesh.pp
        scored = round(float(counts.sum()))
        self._scale = self.mesh.dp * self.config.accumulation / scored
        self._sums = torch.zeros(corpora, dtype=torch.float64)
        total: list[torch.Tensor] = []

        def decide(norm: float) -> bool:
            # Only the last stage knows its losses; all stages ask at once.
            total.append(self.ranks.sum(self._sums.clone()))
            return keep is None or keep(float(total[0].sum()) / scored, norm)

        self._norms.expect(decide)
        self._engine.reset_activation_shape()
        self._engine.train_batch(data_iter=_micro_batches(batches))
        losses, norms = total[0] if total else self.ranks.sum(self._sums.clone()), self._norms
        return Step(losses=losses, counts=counts, grad_norm=norms.last, kept=norms.kept, squares=norms.squares)

    def weights(self) -> None:
        """Return None: no rank has all tensors."""

    def save(self, folder: Path, tag: str, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Save a checkpoint; see `train.engine.Engine.save`."""
        self._shards.files = dict(files)
        named = {"growmerge": {**state, PARAMETER_NAMES: self._names}}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=named, save_latest=False)

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
        """Give the memory back."""
        self._shards.saver.close()
        self._engine.destroy()
        del self._engine
        forget_groups()


def _micro_batches(batches: Sequence[Batch]) -> Iterator[tuple[Any, Any]]:
    for batch in batches:
        inputs = batch.ids[:, :-1].contiguous()
        positions = batch.positions
        if positions is None:
            positions = torch.arange(inputs.shape[1]).repeat(len(inputs), 1)
        yield (inputs, positions), (batch.ids[:, 1:].contiguous(), batch.weights, batch.corpus)


class PipelineModel:
    """A pipeline as evaluation sees a model: token ids in, logits out, on every rank of the pipeline.

    Its last hidden states are the logits, and its head leaves them as they are.
    """

    def __init__(self, engine: Any, config: Any) -> None:
        self._engine = engine
        self.config = config
        self.device = device()
        self.training = False

    def eval(self) -> "PipelineModel":
        return self

    @property
    def base_model(self) -> "PipelineModel":
        return self

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        import deepspeed.comm as dist

        engine = self._engine
        ids = input_ids.to(device())
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        nothing = torch.zeros(1, device=ids.device)
        engine.reset_activation_shape()
        engine.total_loss = None  # of the last step; logits would be added to it
        _, logits = engine.eval_batch(
            iter([((ids, positions), (nothing, nothing, nothing))]),
            return_logits=True,
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        shape = (*ids.shape, self.config.vocab_size)
        found = logits.float() if engine.is_last_stage() else torch.empty(shape, device=ids.device)
        dist.broadcast(found, src=engine._loss_stage_global_rank(), group=engine.mpu.get_pipe_parallel_group())
        return SimpleNamespace(logits=found, last_hidden_state=found)
