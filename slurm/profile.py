"""A cluster's profile: what all jobs on it need, written once by whoever knows the cluster, in configs/clusters/.

It comes to options of sbatch, lines at the head of a job's script, and the command that runs Python in it.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parallel.errors import InputError

CACHES = {
    "HF_HOME": "huggingface",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "WANDB_CACHE_DIR": "wandb",
}
"""Variables that say where caches are, and the folder of each in a profile's `cache`."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}
"""Compute nodes have no network; `growmerge fetch` and `wandb sync` run on a login node."""
ON_EACH_NODE = 'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap'
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ANSWER_S = 60.0
"""Seconds that a command of a profile has on the login node."""


@dataclass(frozen=True, kw_only=True)
class NodeLocal:
    """A Python environment that each node unpacks onto its own disk when a job starts."""

    archive: str
    """A tar file of the environment, on the shared file system (conda-pack's, or of a venv made at this same path)."""
    folder: str
    """Where it is unpacked; `bin/python` in it runs the job. Variables such as $TMPDIR are the job's."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A cluster. Variables such as $USER or $SCRATCH in folders are filled in, on the node where they are used."""

    description: str = ""
    """Which machine it is for."""
    tested: str | None = None
    """Where and when a run has shown it; without one it is called an untested template."""
    slurm: Mapping[str, str | int] = field(default_factory=dict)
    """Options of sbatch for all jobs: partition, account, qos, constraint, ...; `resources.slurm` of a file wins."""
    nodes_at_most: int | None = None
    """Nodes that one job may have."""
    gpus_per_node: int | None = None
    """GPUs of a node; a job that asks for more is refused before it is submitted."""
    cores_per_node: int | None = None
    """Cores of a node, likewise."""
    minutes_at_most: int | None = None
    """Longest time limit, likewise."""
    gres: str | None = None
    """How GPUs are asked for where --gpus-per-node is not taken, such as `gpu:a100:{gpus}`."""
    srun: tuple[str, ...] = ()
    """Further options of the srun that starts the ranks, such as --cpu-bind=cores."""
    lead_seconds: int = 120
    """How long before its time limit a job is told to save."""
    requeue: bool = True
    """Whether the site lets a job be requeued; where not, successors are queued behind each training beforehand."""
    successors: int = 5
    """How many, where jobs are not requeued."""
    setup: tuple[str, ...] = ()
    """Lines of shell at the head of each job's script: `module load ...`, `source ...`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of all jobs: NCCL's or RCCL's, LD_PRELOAD, MASTER_ADDR of a fast network, ..."""
    python: str | None = None
    """Command that runs Python in a job, such as `apptainer exec --nv --bind {workdir} image.sif python`; the Python
    that submits by default. {workdir} is the run's folder."""
    node_local: NodeLocal | None = None
    """An environment on node-local disk, instead of `python`."""
    workdirs: str | None = None
    """Folder on a shared file system that runs get their workdirs in; `runs` of the current folder by default."""
    cache: str | None = None
    """Folder of all caches: Hugging Face, Triton, Inductor, compiled extensions."""
    temporary: str | None = None
    """TMPDIR of jobs, made on each node."""
    striping: str | None = None
    """Command that is given each new workdir, such as `lfs setstripe -c 8`; what is made in it inherits that."""
    group_writable: bool = False
    """Whether what runs write may be changed by the group."""
    network: bool = False
    """Whether compute nodes reach the network; where not, jobs are told to stay offline."""

    def __post_init__(self) -> None:
        for name in self.environment:
            if not NAME.fullmatch(name):
                raise InputError(f"environment: {name!r} is not the name of a variable")

    @property
    def note(self) -> str:
        """What is to be said of it where it is used."""
        return self.tested or "untested template"

    def refuse(self, *, ranks: int, nodes: int, gpus: int, threads: int, minutes: int) -> None:
        """Refuse what no node of the cluster has.

        Raises:
            InputError: in one line, with what is asked for and what there is.
        """
        for what, asked, most in (
            ("nodes", nodes, self.nodes_at_most),
            ("GPUs a node", gpus, self.gpus_per_node),
            ("cores a node", ranks // nodes * threads, self.cores_per_node),
            ("minutes", minutes, self.minutes_at_most),
        ):
            if most is not None and asked > most:
                raise InputError(f"resources: {asked} {what} are asked for; this cluster has {most}")

    def command(self, workdir: Path) -> str | None:
        """Return the command that runs Python in a job, None for the Python that submits."""
        if self.node_local is not None:
            return _quoted(f"{self.node_local.folder}/bin/python")
        return self.python.replace("{workdir}", shlex.quote(str(workdir))) if self.python else None

    def lines(self, code: Path) -> list[str]:
        """Return the head of a job's script.

        Args:
            code: folder of the packages that the job runs, a copy of what was there when it was submitted.
        """
        found = ["umask 0002"] if self.group_writable else []
        found += self.setup
        variables = {} if self.network else dict(OFFLINE)
        if self.cache is not None:
            variables |= {name: f"{self.cache}/{folder}" for name, folder in CACHES.items()}
        if self.temporary is not None:
            variables["TMPDIR"] = self.temporary
        found += [f"export {name}={_quoted(value)}" for name, value in {**variables, **self.environment}.items()]
        if self.temporary is not None:
            found.append(f"{ON_EACH_NODE} mkdir -p {_quoted(self.temporary)} || finish 1")
        if self.node_local is not None:
            folder, archive = _quoted(self.node_local.folder), _quoted(self.node_local.archive)
            found.append(f"{ON_EACH_NODE} mkdir -p {folder} || finish 1")
            found.append(f"{ON_EACH_NODE} tar -xf {archive} -C {folder} || finish 1")
        # A folder's own `train.py` must not be found before this project's rooms.
        found.append("export PYTHONSAFEPATH=1")
        return [*found, f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']

    def enter(self) -> None:
        """Have this process write as jobs do, and look for models where they do."""
        if self.group_writable:
            os.umask(0o002)
        filled = os.path.expandvars(self.cache or "")
        if filled and "$" not in filled:
            os.environ.update({name: f"{filled}/{folder}" for name, folder in CACHES.items()})

    def prepare(self, workdir: Path) -> None:
        """Make a new workdir, striped.

        Raises:
            InputError: the striping command fails; its own words.
        """
        self.enter()
        if self.striping is None or workdir.exists():
            return
        workdir.mkdir(parents=True)
        command = [*shlex.split(self.striping), str(workdir)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"striping: {error}") from error
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise InputError(f"striping: {shlex.join(command)}: {words[-1]}")


def _quoted(text: str) -> str:
    """Quote for the shell, but let variables be filled in."""
    return '"' + re.sub(r'([\\"`]|\$\()', r"\\\1", text) + '"'
