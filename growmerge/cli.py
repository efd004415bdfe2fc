"""The command line. Verbs import what they need when they run: `--help` and a finished run answer at once."""

import sys
from pathlib import Path

import click

from growmerge import __version__
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
@click.option("--dry-run", is_flag=True, help="Print stages, order, parameters, tokens, FLOPs and cost; do nothing.")
def run(pipeline: Path, workdir: Path | None, executor: str, dry_run: bool) -> None:
    """Run a PIPELINE file: all stages that are not up to date, in order; go on where a killed run stopped."""
    from growmerge.run import dry_run as print_plan
    from growmerge.run import run_pipeline

    if dry_run:
        print_plan(pipeline, workdir)
    else:
        sys.exit(run_pipeline(pipeline, workdir, executor))


@main.command()
@click.argument("workdir", type=click.Path(path_type=Path))
def report(workdir: Path) -> None:
    """Make report.html and report.md of a finished run's WORKDIR anew, from its results.json."""
    from checkpoint.files import read_json, write_bytes
    from growmerge.report import render

    html, markdown = render(read_json(workdir / "results.json"))
    write_bytes(workdir / "report.html", html.encode())
    write_bytes(workdir / "report.md", markdown.encode())


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Read every byte and compare checksums.")
def inspect(checkpoint: Path, check: bool) -> None:
    """Say what a CHECKPOINT folder is: format, tensors, sizes, provenance, and whether it is whole."""
    from growmerge.inspect import print_checkpoint

    print_checkpoint(checkpoint, check=check)


if __name__ == "__main__":
    main()
