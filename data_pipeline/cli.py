"""`sdtrain-data`: from raw metadata to shards. Each command imports what it needs when it runs, so help is instant."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline import cli_datasets
from sdtrain.errors import ExitCode, SdtrainError

if TYPE_CHECKING:
    from data_pipeline.runner import Runner
    from data_pipeline.stage import Stage
    from sdtrain.config.ingestion import IngestionConfig

PLAIN = {"no_args_is_help": True, "rich_markup_mode": None}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn raw web metadata into training shards: filter, deduplicate, download, tokenize, encode.",
    epilog="Exit codes: 0 done, 1 bug, 2 config, 3 data (failed shards are listed in OUT/dead_letter.json), 6 Ray is "
    "gone, 8 storage, 85 told to leave by USR1, 130 interrupted.",
    **PLAIN,
)

app.add_typer(cli_datasets.app)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A page of kind ingestion (YAML).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting over the page; may be repeated.")
]


@app.command(epilog="Example: sdtrain-data run configs/sd15/data.yaml filter dedup filter.min_aesthetic=6 --dry-run")
def run(
    config: ConfigPath,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE | KEY=VALUE]...", help="Stages to run (default: all), settings over the page."),
    ] = None,
    settings: Settings = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Run all stages up to this one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and why, and stop.")] = False,
    await_nodes: Annotated[str | None, typer.Option(hidden=True, help="Start when these are in the cluster.")] = None,
    await_seconds: Annotated[float, typer.Option(hidden=True, help="How long to wait for them.")] = 300.0,
) -> None:
    """Bring a data set up to date: only what is missing or out of date is done."""
    overrides = [word for word in words or () if "=" in word]
    wanted = [word for word in words or () if "=" not in word]
    page = _load(config, [*overrides, *(settings or ())])
    from rich.console import Console

    from data_pipeline.build import executor_for, runner_for, stages_for
    from data_pipeline.runner import choose

    stages = _up_to(stages_for(page), until)
    chosen = choose(stages, wanted)
    with executor_for(page) as executor:
        runner = runner_for(page, executor, Console())
        if dry_run:
            _print_plans(runner, [stage for stage in stages if stage.name in chosen], stages)
        else:
            with _interruptible():
                if await_nodes is not None and page.runner.address is not None:
                    from data_pipeline.ray_nodes import wait_for_nodes

                    wait_for_nodes(page.runner.address, await_nodes.split(","), await_seconds)
                runner.run(stages, wanted)
            if "manifest" in chosen:
                from data_pipeline.card import write_card

                typer.echo(f"card: wrote {write_card(page, stages)}")


@app.command(epilog="Example: sdtrain-data plan configs/sd15/data.yaml filter.min_aesthetic=6 plan.bandwidth_mbit=500")
def plan(
    config: ConfigPath,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON and nothing else.")] = False,
) -> None:
    """Forecast funnel, pictures, bytes and hours from a sample of the metadata, before any picture is fetched."""
    page = _load(config, words or ())
    from rich.console import Console

    from data_pipeline.build import executor_for, runner_for
    from data_pipeline.planner import forecast, plan_stages, tables_of, to_json

    stages = plan_stages(page)
    console = Console()
    with executor_for(page) as executor, _interruptible():
        runner_for(page, executor, Console(quiet=True) if as_json else console).run(stages)
    found = forecast(page)
    if as_json:
        typer.echo(to_json(found), nl=False)
        return
    for table in tables_of(found):
        console.print(table)
    for line in found.assumptions:
        typer.echo(f"assumes: {line}")
    for line in found.warnings:
        typer.echo(f"warning: {line}", err=True)


@app.command(epilog="Example: sdtrain-data status configs/sd15/data.yaml")
def status(
    target: Annotated[
        Path, typer.Argument(metavar="CONFIG|FOLDER", help="A page of kind ingestion (YAML), or its output folder.")
    ],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")] = False,
) -> None:
    """Show how far each stage is, who runs it and what failed, while a run goes on or after it. Reads files only."""
    from rich.console import Console

    from data_pipeline.status import TABLE_WIDTH, lines_of, read_status, table_of, to_json

    found = read_status(target) if target.is_dir() else read_status(_load(target, words or ()).output, is_new=True)
    if as_json:
        typer.echo(to_json(found), nl=False)
        return
    if found.stages:
        Console(width=TABLE_WIDTH).print(table_of(found))
    for line in lines_of(found):
        typer.echo(line)


@app.command("serve-digits", epilog="Example: sdtrain-data serve-digits data/digits --port 8123 --rows 12000")
def serve_digits(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The world's folder; made where it is missing.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; part of every URL of the world.")] = 8123,
    rows: Annotated[int, typer.Option(help="Rows of metadata of a new world.")] = 12_000,
    image_size: Annotated[int, typer.Option(help="Side of the pictures of a new world, in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of a new world.")] = 0,
    make_only: Annotated[bool, typer.Option("--make-only", help="Write the world, serve nothing.")] = False,
) -> None:
    """Serve captioned pictures of real handwritten digits on loopback, with LAION metadata to ingest."""
    from data_pipeline.sources.digits import make_world
    from data_pipeline.sources.digits_server import serve

    if not (folder / "world.json").exists():
        make_world(folder, seed=seed, rows=rows, image_size=image_size, port=port)
        typer.echo(f"made {rows} rows in {folder / 'metadata'}")
    if make_only:
        return
    typer.echo(f"serving {folder} on http://127.0.0.1:{port}/ until interrupted")
    serve(folder, port)


def _up_to(stages: Sequence[Stage], until: str | None) -> Sequence[Stage]:
    """The stages up to one of them; all without one."""
    from data_pipeline.runner import choose

    if until is None:
        return stages
    last = choose(stages, [until])
    return stages[: max(index for index, stage in enumerate(stages) if stage.name in last) + 1]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say after an interrupt or USR1 how to go on (typer itself would end without a word), and exit by it."""

    def leave(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut short what the first began
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        why = f"{interrupt}" or "interrupted"
        typer.echo(f"sdtrain-data: {why}; what is committed stays, run again to go on", err=True)
        raise typer.Exit(int(ExitCode.REQUEUE) if interrupt.args else 130) from None
    finally:
        signal.signal(signal.SIGUSR1, before)


def _load(config: Path, overrides: Sequence[str]) -> IngestionConfig:
    """The page, its warnings printed."""
    from sdtrain.config.load import load_ingestion
    from sdtrain.config.warnings import warnings

    page = load_ingestion(config, overrides)
    for line in warnings(page):
        typer.echo(f"warning: {line}", err=True)
    return page


def _print_plans(runner: Runner, wanted: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """One line per stage; a stage can be planned only when those before it are up to date."""
    blocked: str | None = None
    for stage in stages:
        if blocked is None:
            plan = runner.plan(stage)
            line = plan.summary()
            blocked = None if plan.is_current else stage.name
        else:
            line = f"{stage.name}: waits for {blocked}"
        if stage in wanted:
            typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    An error of the user's or of the data becomes one message and its typed exit code; anything else is a bug and keeps
    its traceback.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sdtrain-data")
    except SdtrainError as error:
        print(f"sdtrain-data: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))


if __name__ == "__main__":
    main()
