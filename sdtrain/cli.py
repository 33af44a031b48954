"""`sdtrain`: train, sample, export, inspect. Each command imports what it needs when it runs, so help is instant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdtrain.errors import ConfigError, DataError, PreflightError, SdtrainError
from sdtrain.run_dir import REFUSED_STEP, Exit, RunDir, tell_launcher

if TYPE_CHECKING:
    from sdtrain.config.load import Config
    from sdtrain.config.run import TrainingConfig

PLAIN = {"no_args_is_help": True, "rich_markup_mode": None}  # rich costs 0.1 s at import

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-train latent diffusion models: train, sample, export, inspect.",
    epilog="Exit codes: 0 done, 1 bug, 2 config, 3 data, 4 no valid checkpoint, 5 diverged, 6 hang, 7 no progress, "
    "8 storage, 9 preflight, 85 start me again.",
    **PLAIN,
)
config_app = typer.Typer(help="Look at pages: show, check, compare.", **PLAIN)
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A page (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings over the page, like optimizer.learning_rate=2e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


# Runs -----------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: sdtrain train configs/sd15/tiny/train.yaml trainer.max_steps=2 --resume never")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|PATH|never",
            help="Go on from the newest checkpoint, from this one, or afresh. PATH may be a URL of an upload store.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything that needs no GPU, and stop.")] = False,
) -> None:
    """Train as one rank; sdtrain-launch starts many."""
    from sdtrain.config.load import load_training

    page = load_training(config, overrides or [])
    start = _resume(resume)
    _warn(page)
    if dry_run:
        typer.echo(_plan(page, int(os.environ.get("WORLD_SIZE", "1")), start))
        return
    from sdtrain.evaluation import during_training
    from sdtrain.export.after_training import export_weights
    from sdtrain.training.run import Hooks
    from sdtrain.training.run import train as run

    hooks = Hooks(validate=during_training.validate, sample=during_training.sample, finish=export_weights)
    run(page, resume=start, hooks=hooks)


@app.command(epilog="Example: sdtrain sample configs/sd15/tiny/sample.yaml guidance_scale=3 seed=7")
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    """Draw pictures from a trained run."""
    from sdtrain.config.load import load_sampling

    page = load_sampling(config, overrides or [])
    _warn(page)
    from sdtrain.evaluation.sampling import sample as run

    run(page)


@app.command(epilog="Example: sdtrain export runs/sd15 --output weights/sd15")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or one checkpoint's folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    ema: Annotated[bool, typer.Option(help="Take the averaged weights, or the last ones.")] = True,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the written weights.")] = "fp32",
    latent_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents, for a run whose data is not here.")
    ] = None,
    scale_manifest: Annotated[
        Path | None, typer.Option(help="For an autoencoder: pictures to measure the latents' scaling factor on.")
    ] = None,
) -> None:
    """Write a run's weights in diffusers' layout."""
    from sdtrain.export.diffusers import export as write

    size = None if latent_size is None else (latent_size, latent_size)
    written = write(run, output, ema=ema, dtype=dtype, latent_size=size, scale_manifest=scale_manifest)
    typer.echo(f"weights: {written}")


@app.command(epilog="Example: sdtrain inspect runs/sd15 --no-verify")
def inspect(
    run: RunPath,
    verify: Annotated[bool, typer.Option(help="Read every byte of every checkpoint back.")] = True,
    audit: Annotated[
        bool, typer.Option("--audit", help="Prove by the ledger that no sample was lost or repeated; 4 if it was.")
    ] = False,
    seen: Annotated[
        Path | None, typer.Option(metavar="KEYS", help="Say which steps saw the samples whose keys a file lists.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's checkpoints, the proof of its sample order, and how it last ended."""
    if audit:
        from sdtrain.evaluation.audit import audit as prove

        prove(run, as_json=as_json)
        return
    if seen is not None:
        from sdtrain.evaluation.exposure import show_seen

        show_seen(run, seen, as_json=as_json)
        return
    from sdtrain.evaluation.inspect_run import inspect as show

    show(run, verify=verify, as_json=as_json)


@app.command(epilog="Example: sdtrain doctor configs/sd15/tiny/train.yaml")
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A training page; else the machine.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    worker: Annotated[bool, typer.Option("--worker", help="As one rank of a job, together with the others.")] = False,
    output: Annotated[Path | None, typer.Option(help="With --worker: folder that gets preflight.json.")] = None,
    hosts: Annotated[str, typer.Option(help="With --worker: the job's hosts, so that absent ones have names.")] = "",
    join_seconds: Annotated[float, typer.Option(help="With --worker: how long to wait for absent ranks.")] = 300.0,
) -> None:
    """Check that this machine, or all nodes of a job, can run a page: 0 or 9."""
    from sdtrain.config.load import load_training

    if worker:
        if config is None or output is None:
            raise ConfigError("doctor --worker needs CONFIG and --output FOLDER; sdtrain-launch gives both")
        from sdtrain.training.preflight.doctor import examine_as_rank

        page = partial(load_training, config, overrides or [])
        raise typer.Exit(examine_as_rank(page, output, expected=hosts.split(), join_seconds=join_seconds))
    page = None if config is None else load_training(config, overrides or [])
    from sdtrain.training.preflight.doctor import examine_alone

    found = examine_alone(page)
    typer.echo(_json(found.as_json()) if as_json else found.text())
    if not found.passed:
        raise PreflightError(found.reason)


@app.command(epilog="Example: sdtrain evaluate samples/digits --world data/digits/world.json --output accuracy.json")
def evaluate(
    samples: Annotated[Path, typer.Argument(metavar="SAMPLES", help="Output folder of `sdtrain sample`.")],
    world: Annotated[Path, typer.Option(help="The digits world's world.json.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
) -> None:
    """Judge drawn digits by their captions: digit and colour."""
    from sdtrain.evaluation.prompt_accuracy import score_samples

    score_samples(samples, world, output)
    typer.echo(output.read_text(encoding="utf-8"), nl=False)


@app.command(epilog="Example: sdtrain report runs/sd15 --output report.html --funnel data/laion/02-filter/funnel.json")
def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Run folders.")] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Training report",
    funnel: Annotated[Path | None, typer.Option(help="Survival funnel of the filter (JSON).")] = None,
    download: Annotated[Path | None, typer.Option(help="Counts of the download (JSON).")] = None,
    grid: Annotated[list[Path] | None, typer.Option(help="Picture to show; may be repeated.")] = None,
    accuracy: Annotated[list[Path] | None, typer.Option(help="Output of `sdtrain evaluate`; may be repeated.")] = None,
    timings: Annotated[Path | None, typer.Option(help="Seconds by step (JSON).")] = None,
) -> None:
    """Write one HTML page about data, training and samples."""
    from sdtrain.evaluation.report import write_report

    page = write_report(
        output,
        title=title,
        funnel_json=funnel,
        download_summary=download,
        runs=runs or (),
        grids=grid or (),
        prompt_accuracy=accuracy or (),
        timings_json=timings,
    )
    typer.echo(f"report: {page}")


# Pages ----------------------------------------------------------------------------------------------------------------


@config_app.command("show", epilog="Example: sdtrain config show configs/sd15/train.yaml trainer.compile=false")
def config_show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved page: every key with the value that a run gets."""
    from sdtrain.config.load import dump_yaml, load_config

    page = load_config(config, overrides or [])
    typer.echo(_json(page.model_dump(mode="json")) if as_json else dump_yaml(page), nl=as_json)


@config_app.command("check", epilog="Example: sdtrain config check configs/sd15/train.yaml --world-size 8")
def config_check(
    config: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Check the batch for this number of ranks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a page is right, what it does in vain, and which command runs it."""
    from sdtrain.config.load import KINDS, load_config
    from sdtrain.config.run import TrainingConfig, grad_accum_steps
    from sdtrain.config.warnings import warnings

    page = load_config(config, overrides or [])
    command = " ".join([KINDS[page.kind].command, str(config), *(overrides or [])])
    facts: dict[str, object] = {"page": str(config), "kind": page.kind, "command": command, "warnings": warnings(page)}
    if world_size is not None:
        if not isinstance(page, TrainingConfig):
            raise ConfigError(f"--world-size is for training pages; {config} is of kind {page.kind}")
        facts |= {"world_size": world_size, "grad_accum_steps": grad_accum_steps(page, world_size)}
    if as_json:
        typer.echo(_json(facts))
        return
    _warn(page)
    if isinstance(page, TrainingConfig) and world_size is not None:
        typer.echo(_batch(page, world_size))
    typer.echo(f"{config}: a valid {page.kind} page; it runs with: {command}")


@config_app.command("diff", epilog="Example: sdtrain config diff runs/sd15/config.yaml configs/sd15/train.yaml")
def config_diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A page, such as the one that a run keeps.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another page of the same kind.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the keys whose values differ, and whether a resumed run may change them. Settings go over AFTER."""
    from sdtrain.config.load import differences, load_config

    old, new = load_config(before), load_config(after, overrides or [])
    if old.kind != new.kind:
        raise ConfigError(f"{before} is of kind {old.kind} and {after} of kind {new.kind}; only equal kinds compare")
    found = differences(old, new)
    if as_json:
        rows = [
            {"path": one.path, "before": one.before, "after": one.after, "on_resume": one.is_allowed_on_resume}
            for one in found
        ]
        typer.echo(_json(rows))
        return
    for one in found:
        typer.echo(f"{one}{'' if one.is_allowed_on_resume else '  (not on resume)'}")
    if not found:
        typer.echo("no difference")


@config_app.command("schema", epilog="Example: sdtrain config schema training > training.schema.json")
def config_schema(
    kind: Annotated[str, typer.Argument(metavar="training|ingestion|sampling", help="Kind of page.")] = "training",
) -> None:
    """Print the JSON schema of a kind of page: every key, its meaning and its default."""
    from sdtrain.config.load import KINDS
    from sdtrain.config.schema import json_schema

    if kind not in KINDS:
        raise ConfigError(f"there is no kind of page called {kind}; there are {', '.join(KINDS)}")
    typer.echo(_json(json_schema(kind)))


# Shared ---------------------------------------------------------------------------------------------------------------


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _resume(text: str) -> str | Path:
    """Where to start from.

    Raises:
        ConfigError: Neither a keyword, nor a URL, nor a checkpoint's folder.
    """
    from sdtrain.checkpoints.manifest import FOLDER, MANIFEST, list_checkpoints

    path = Path(text)
    if text in ("auto", "never") or "://" in text:
        return text
    if path.is_dir() and ((path / MANIFEST).is_file() or FOLDER.fullmatch(path.name)):
        return path  # whether it is whole, all ranks will find out together
    found = "no such checkpoint folder"
    if path.is_dir():
        held = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
        found = f"no checkpoint, but it holds some, the newest is {held[0].path}" if held else "holds no checkpoint"
    raise ConfigError(
        f"--resume {text}: {found}; give auto, never, a folder such as RUN/checkpoints/step-N or "
        "a URL such as s3://BUCKET/RUN/step-N"
    )


def _warn(page: Config) -> None:
    """Print a page's warnings once, not on every rank."""
    from sdtrain.config.warnings import warnings

    if os.environ.get("RANK", "0") == "0":
        for line in warnings(page):
            typer.echo(f"warning: {line}", err=True)


def _batch(page: TrainingConfig, world_size: int) -> str:
    from sdtrain.config.run import grad_accum_steps

    micro, accumulation = page.data.micro_batch_size, grad_accum_steps(page, world_size)
    return f"batch: {page.data.batch_size} = {micro} per rank x {accumulation} accumulation x {world_size} ranks"


def _plan(page: TrainingConfig, world_size: int, resume: str | Path) -> str:
    """What a run would do, as far as it shows without torch.

    Raises:
        ConfigError: The batch does not split over the ranks, or the folder is not a run's.
        DataError: The manifest is missing.
        StorageError: The folder cannot be written to.
    """
    batch = _batch(page, world_size)
    if isinstance(page.data.manifest, Path) and not page.data.manifest.is_file():
        raise DataError(f"data.manifest = {page.data.manifest}: no such file; `sdtrain-data run` writes it")
    folder = RunDir(page.resolved_run_dir)
    folder.refuse_unusable()
    kept = sorted(one.name for one in folder.checkpoints.glob("step-*") if one.is_dir() and "." not in one.name)
    length = f"{page.trainer.max_steps} steps" if page.trainer.max_steps else f"{page.trainer.max_epochs} epochs"
    newest = f"newest checkpoint {kept[-1]}" if kept else "no checkpoint yet"
    return "\n".join(
        [
            f"folder: {folder.path} ({newest}; resume {resume})",
            f"data: {page.data.manifest}",
            batch,
            f"length: {length}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    An error of the user's or of the run becomes one message and its typed exit code; anything else is a bug and keeps
    its traceback.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sdtrain")
    except SdtrainError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a node all say the same
            print(f"sdtrain: {error}", file=sys.stderr)
            rank = int(os.environ.get("RANK", "0"))
            tell_launcher(Exit(int(error.exit_code), str(error), REFUSED_STEP, rank, "none"))
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
