"""Pickles of PyTorch, DeepSpeed and Megatron-LM, loaded without running anything that they say."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from parallel.errors import InputError


class _Stub:
    """Stands for the few classes that checkpoints name beside tensors; it keeps nothing and does nothing."""

    def __new__(cls, *args: object) -> "_Stub":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_DCP = "torch.distributed.checkpoint"
RECORDS = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("TensorProperties", "ChunkStorageMetadata", "MetadataIndex")),
    (f"{_DCP}.filesystem", "_StorageInfo"),  # where a chunk lies
    # What is named beside and not used: how the tensors lay in memory, and which save it was, by its path.
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.metadata", "StorageMeta"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    # What Megatron-Core keeps besides: how its ranks had planned the save, under names of its own or torch's.
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((f"{_DCP}.planner", "BytesIOWriteData"), (f"{_DCP}.filesystem", "_StoragePrefix")),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    # Of torch until 2.2.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
}
"""What `load_records` takes: each becomes a Record, and nothing of the kind is imported or called."""
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Record:
    """Stands for a class that a pickle names; it keeps an instance's state and does nothing."""

    state: Any = None

    def __init__(self, *args: object) -> None:
        self.state = args

    def __setstate__(self, state: object) -> None:
        self.state = state


_MCORE = "megatron.core"
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Stub, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stub, "deepspeed.utils.tensor_fragment.fragment_address"),
    # Megatron-LM: its arguments, what is among them, and numpy's state of random numbers.
    *((Record, name) for name in ("argparse.Namespace", "types.SimpleNamespace")),
    *((_Stub, f"{_MCORE}.transformer.enums.{name}") for name in ("AttnBackend", "CudaGraphScope", "LayerType")),
    *((_Stub, f"{_MCORE}.{name}") for name in ("enums.ModelType", "optimizer.optimizer_config.OptimizerConfig")),
    *((_Stub, f"{_MCORE}.rerun_state_machine.Rerun{name}") for name in ("Diagnostic", "Mode", "State")),
    (_Stub, f"{_MCORE}.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout"),
    *((_Stub, f"signal.{name}") for name in ("Signals", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")),
    *((_Stub, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((_Stub, f"{module}.BytesIO") for module in ("_io", "io")),  # Transformer Engine's extra state
    *((_Stub, f"numpy.{name}") for name in ("ndarray", "dtype", "dtypes.UInt32DType")),
    *((_Stub, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
    *((_Stub, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
]
"""What `load_pickle` takes besides plain data and tensors; nothing of the kind is imported or called."""


class _Records(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        # Anew for each file: a pickle can set attributes of what it names.
        self._kinds = {kind: type(kind[1], (Record,), {}) for kind in RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) not in self._kinds:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._kinds[module, name]


def load_records(path: Path, kind: str) -> Any:
    """Load a bare pickle (which torch.load does not read), running nothing: plain data, dtypes and Records.

    Raises:
        InputError: the file is missing, truncated, or names anything else.
    """
    try:
        with path.open("rb") as file:
            return _Records(file).load()
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # as in load_pickle
        raise _damaged(str(path), kind, error) from error


def load_part(file: IO[bytes], where: str, kind: str, device: str = "cpu") -> Any:
    """Load what torch.save wrote into a part of a file, as `load_pickle`; on the device "meta" no data is read.

    Raises:
        InputError: as `load_pickle`; the line begins with `where`.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise _damaged(where, kind, error) from error


def load_pickle(path: Path, kind: str = "DeepSpeed file") -> Any:
    """Load a `.pt` file without running anything that it says: plain data, tensors and the classes in ALLOWED.

    Tensors stay in the file until they are read (mmap).

    Raises:
        InputError: the file is missing, truncated, or names anything else.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # torch.load raises errors of many kinds for a damaged or hostile file
        raise _damaged(str(path), kind, error) from error


def attributes_of(entry: object) -> dict[str, Any] | None:
    """Return the attributes of an argparse.Namespace that `load_pickle` loaded; None of anything else."""
    if isinstance(entry, Record):
        return entry.state if isinstance(entry.state, dict) else None
    # Where Megatron-LM is imported, torch.load may take its class for ours, which does as little.
    return vars(entry) if isinstance(entry, argparse.Namespace) else None


def _damaged(where: str, kind: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"{where}: damaged, or not a plain {kind} ({reason[:200]})")
