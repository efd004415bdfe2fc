"""The command line. Verbs import what they need when they run: `--help` and a finished run answer at once."""

import atexit
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from growmerge import __version__
from growmerge.cli_data import data
from growmerge.cli_eval import compare, evaluate
from growmerge.cli_import import import_models
from growmerge.cli_merging import merge, sweep
from growmerge.cli_stats import stats
from growmerge.cli_targets import target_of, targets
from growmerge.cli_tokenizer import tokenizer
from parallel.errors import InputError

ROOMS = ("checkpoint", "eval", "merge", "parallel", "slurm", "train", "upscale")


class Main(click.Group):
    """Turns bad input into one line and exit code 2."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except InputError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"growmerge: {error}", err=True)
            context.exit(2)
        except KeyboardInterrupt:
            click.echo("growmerge: interrupted; the same command goes on from here", err=True)
            context.exit(130)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="growmerge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Grow a language model, train it on new languages, merge the language models, evaluate: one pipeline.

    Exit codes: 0 done; 1 a check or a stage failed; 2 bad input.
    """
    check_rooms()
    # What was imported is torn down at the end: without looking for garbage in it a second sooner.
    atexit.register(gc.freeze)


def _cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of commands that submit jobs."""
    profile = click.option("--profile", help="The cluster's profile, by name or path; the file's own by default.")
    detach = click.option("--detach", is_flag=True, help="On a cluster: return when all is submitted.")
    return profile(detach(command))


def check_rooms() -> None:
    """Check that `train`, `merge`, ... are this project's: the names are generic, and another package may shadow them.

    Raises:
        InputError: the line names what shadows which room.
    """
    from importlib.util import find_spec

    home = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            raise InputError(
                f"the package {room!r} comes from {found or 'nowhere'}, not from growmerge in {home}; "
                "start outside that folder, or take it off PYTHONPATH"
            )


_SCALE = click.option("--scale", help="One of the file's `scales`: other sizes for the same stages.")


@main.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--workdir", type=click.Path(path_type=Path), help="Where everything goes; runs/<name> by default.")
@click.option(
    "--executor",
    type=click.Choice(["auto", "local", "slurm"]),
    default="auto",
    show_default=True,
    help="Where stages run: processes of this machine, or SLURM jobs.",
)
@_cluster
@_SCALE
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print stages, order, parameters, tokens, FLOPs and cost; with --executor slurm the scripts of sbatch.",
)
def run(
    pipeline: Path,
    workdir: Path | None,
    executor: str,
    profile: str | None,
    detach: bool,
    scale: str | None,
    dry_run: bool,
) -> None:
    """Run a PIPELINE file: all stages that are not up to date, in order; go on where a killed run stopped."""
    from growmerge.run import dry_run as print_plan
    from growmerge.run import run_pipeline

    if dry_run:
        print_plan(pipeline, workdir, executor, profile, scale)
    else:
        sys.exit(run_pipeline(pipeline, workdir, executor, profile, scale, detach=detach))


_WORKDIR = click.argument("workdir", type=click.Path(path_type=Path, exists=True, file_okay=False))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--profile", help="The cluster's profile, whose cache it goes into; the file's own by default.")
@_SCALE
def fetch(config: Path, profile: str | None, scale: str | None) -> None:
    """Bring here what CONFIG names of the Hub and the package index: its jobs need no network then.

    CONFIG is any file that a verb takes: a pipeline, a run, corpora, a merge recipe, a sweep.
    """
    from growmerge.fetch import fetch_all

    click.echo(f"{fetch_all(config, profile, scale)} things are here")


@main.command()
@_WORKDIR
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.option("--watch", is_flag=True, help="Keep showing it until all have ended.")
def status(workdir: Path, as_json: bool, watch: bool) -> None:
    """Show the stages of a WORKDIR: what runs and how far, what waits and why, what failed."""
    from growmerge.status import show

    show(workdir.absolute(), as_json=as_json, watch=watch)


@main.command()
@_WORKDIR
@click.argument("stage", required=False, default="")
@click.option("--rank", default=0, show_default=True, help="Which of its processes.")
def logs(workdir: Path, stage: str, rank: int) -> None:
    """Print what a rank of a STAGE's last job wrote to its log."""
    from growmerge.status import log_of

    click.echo(log_of(workdir.absolute(), stage, rank).read_text(errors="replace"), nl=False)


@main.command()
@_WORKDIR
@click.argument("stages", nargs=-1)
def cancel(workdir: Path, stages: tuple[str, ...]) -> None:
    """Cancel what runs from a WORKDIR, or some of its STAGES; what they have saved stays, and `run` goes on from it."""
    from growmerge.status import cancel as cancel_jobs

    click.echo(cancel_jobs(workdir.absolute(), stages))


@main.command()
@_WORKDIR
@click.argument("stages", nargs=-1)
def resubmit(workdir: Path, stages: tuple[str, ...]) -> None:
    """Submit again what has failed, or was cancelled, of a WORKDIR; STAGES are taken out of the queue first."""
    from growmerge.run import run_pipeline
    from growmerge.status import again
    from growmerge.status import cancel as cancel_jobs
    from growmerge.training import train_file

    command = again(workdir.absolute())
    if stages:
        click.echo(cancel_jobs(workdir.absolute(), stages))
    submit = train_file if command["verb"] == "train" else run_pipeline
    sys.exit(submit(Path(str(command["file"])), workdir, "slurm", command["profile"], detach=True))


@main.command()
@click.option("--profile", help="The cluster's profile, by name or path.")
@click.option("--workdir", type=click.Path(path_type=Path), help="Where runs will be; as the profile says by default.")
@click.option("--nodes", type=click.IntRange(min=1), default=2, show_default=True, help="Compute nodes to look at.")
@click.option("--wait", type=float, default=600.0, show_default=True, help="Seconds that their job may take.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(profile: str | None, workdir: Path | None, nodes: int, wait: float, as_json: bool) -> None:
    """Say whether a cluster, or this machine, is fit: scheduler, folders, nodes, network. Exit 1 if it is not."""
    from growmerge.doctor import examine

    sys.exit(examine(profile, workdir, nodes=nodes, wait=wait, as_json=as_json))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--workdir", type=click.Path(path_type=Path), help="The run's folder; runs/<name> by default.")
@click.option(
    "--executor",
    type=click.Choice(["auto", "local", "slurm"]),
    default="auto",
    show_default=True,
    help="Where its ranks run, unless torchrun or srun has started this command as one of them.",
)
@_cluster
@click.option("--dry-run", is_flag=True, help="Print the script of sbatch; do nothing.")
def train(config: Path, workdir: Path | None, executor: str, profile: str | None, detach: bool, dry_run: bool) -> None:
    """Train what CONFIG says: one run, which goes on by itself where a killed one stopped, on any number of ranks.

    Exit code 75: it was asked to stop (SIGTERM, SIGUSR2) and has saved; the same command goes on.
    """
    from growmerge.training import train_file

    sys.exit(train_file(config, workdir, executor, profile, detach=detach, dry_run=dry_run))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config: Path, as_json: bool) -> None:
    """Say what a model takes on a cluster: memory, time and GPU-hours of each topology that fits, the best first."""
    from growmerge.planner import print_best

    print_best(config, as_json=as_json)


@main.command()
@_WORKDIR
def report(workdir: Path) -> None:
    """Write the report of a WORKDIR of `run`, `train` or `eval`, finished or not: report.html, report.md, report/."""
    from growmerge.reporting import report_on

    click.echo(report_on(workdir.absolute()))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Read every byte and compare checksums.")
@click.option("--finite", is_flag=True, help="Read every value; a NaN or an infinity is an error.")
def inspect(checkpoint: Path, check: bool, finite: bool) -> None:
    """Say what a CHECKPOINT folder is: format, tensors, sizes, provenance, and whether it is whole."""
    from growmerge.inspect import print_checkpoint

    print_checkpoint(checkpoint, check=check, finite=finite)


@main.command()
@targets
@click.option("--width", type=int, default=1, help="Factor of all that is not named below.")
@click.option("--hidden", type=int, help="Factor of the hidden size.")
@click.option("--heads", type=int, help="Factor of the query heads.")
@click.option("--kv-heads", type=int, help="Factor of the key/value heads.")
@click.option("--ffn", type=int, help="Factor of the feed-forward width.")
@click.option("--to-hidden", type=int, help="Hidden size, of any value: what lacks after the factors is padded.")
@click.option("--to-heads", type=int, help="Query heads, likewise.")
@click.option("--to-kv-heads", type=int, help="Key/value heads, likewise.")
@click.option("--to-ffn", type=int, help="Feed-forward width, likewise.")
@click.option("--to-head-dim", type=int, help="Elements of a head, a multiple of what they are.")
@click.option("--depth", help="Add layers: stack, interleave, solar, identity, or a map such as 0-23,8-31.")
@click.option("--layers", type=int, help="Layers of the grown model, with --depth.")
@click.option("--experts", type=int, help="Make a dense model's feed-forward blocks so many experts a layer.")
@click.option("--experts-per-token", type=int, help="To how many of them a token is sent; 2 by default.")
@click.option("--method", default="exact-split", show_default=True, help="exact-split, symmetric or diagonal.")
@click.option("--noise-db", type=float, help="Noise so many dB below the weights, with symmetric or diagonal.")
@click.option(
    "--with-optimizer",
    "state",
    is_flag=False,
    flag_value="scaled",
    default="reset",
    help="Grow Adam's moments and steps, too: scaled (default), or asymmetric: zero in all copies but the first.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides unequal shares and noise.")
def grow(source: Path, **given: Any) -> None:
    """Grow the checkpoint SOURCE into the folder TARGET, in bounded memory. The function stays, but for layers that are
    added otherwise than by `--depth identity`."""
    from growmerge.convert import grow_checkpoint
    from upscale.factors import Recipe

    target = target_of(given)
    click.echo(grow_checkpoint(source, target, Recipe(**given)))


@main.command()
@targets
def convert(source: Path, **given: Any) -> None:
    """Write the checkpoint SOURCE into the folder TARGET in another format, in bounded memory."""
    from growmerge.convert import convert_checkpoint

    click.echo(convert_checkpoint(source, target_of(given)))


@main.command()
@click.argument("small", type=click.Path(path_type=Path))
@click.argument("grown", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to score; a short English one by default.")
@click.option("--tokens", type=int, default=1024, show_default=True, help="Tokens of it at most.")
@click.option("--by-module", is_flag=True, help="Hold a module at a time; so by itself where memory is short.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(small: Path, grown: Path, text: Path | None, tokens: int, by_module: bool, as_json: bool) -> None:
    """Compare GROWN with SMALL on text: logits, KL, argmax, clone symmetry, gradients. Exit 1 if not preserved."""
    from growmerge.verify import print_verification

    sys.exit(print_verification(small, grown, text=text, tokens=tokens, by_module=by_module, as_json=as_json))


for command in (merge, sweep, evaluate, compare, import_models, tokenizer, data, stats):
    main.add_command(command)

if __name__ == "__main__":
    main()
