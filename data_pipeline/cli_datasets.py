"""Commands of `sdtrain-data` for data sets that stand: verify, take samples down, write the data card, export."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


class Format(Enum):
    """What a data set can be exported as."""

    HF = "hf"


AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]


@app.command(epilog="Example: sdtrain-data verify data/laion/manifest.json")
def verify(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A manifest.json or images.json.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes alone, not every byte.")] = False,
) -> None:
    """Read every shard of a data set back and compare it with the digest in its manifest."""
    from rich.console import Console
    from rich.progress import track

    from sdtrain.data.manifest import Manifest
    from sdtrain.data.manifest import verify as verify_shards

    found, console = Manifest.load(manifest), Console(stderr=True)
    verify_shards(found, deep=not quick, watched=lambda shards: track(shards, "shards", console=console))
    what = "there, with the right sizes" if quick else "as they were written"
    typer.echo(f"verify: {manifest}: all {len(found.shards):,} shards are {what}")


@app.command(
    epilog="Example: sdtrain-data takedown list.txt --root data --run runs/sd15 --reason 'mail of 21 November'"
)
def takedown(
    requests: Annotated[
        Path, typer.Argument(metavar="LIST", help="Text: a URL, sha256 of a URL or picture, or key in each line.")
    ],
    manifest: Annotated[
        list[Path] | None, typer.Option(help="A manifest; all in its folder are masked. May be repeated.")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="A folder that is searched for manifests. May be repeated.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="A training's run folder: say which steps saw them. May be repeated.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be masked, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Mask samples in every manifest of a data set, for good, without moving any other sample."""
    from rich.console import Console

    from data_pipeline.takedown import take_down
    from data_pipeline.takedown_report import refuse_gaps, show, to_json

    report = take_down(
        requests,
        manifests=manifest or (),
        roots=root or (),
        runs=run or (),
        reason=reason,
        dry_run=dry_run,
        console=Console(stderr=True, quiet=as_json),
    )
    if as_json:
        typer.echo(to_json(report), nl=False)
    else:
        show(report, Console())
    refuse_gaps(report)


@app.command(epilog="Example: sdtrain-data card configs/sd15/data.yaml")
def card(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A page of kind ingestion (YAML).")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Write the data card of a finished data set again; `run` does so whenever it has written the manifest."""
    from rich.console import Console

    from data_pipeline.build import executor_for, runner_for, stages_for
    from data_pipeline.card import refuse_other_page, write_card
    from sdtrain.config.load import load_ingestion

    page = load_ingestion(config, words or ())
    stages = stages_for(page)
    refuse_other_page(runner_for(page, executor_for(page), Console()), stages)
    typer.echo(f"card: wrote {write_card(page, stages)}")


@app.command(epilog="Example: sdtrain-data export configs/sd15/data.yaml --format hf --out exports/laion --with tokens")
def export(
    data: Annotated[Path, typer.Argument(metavar="CONFIG|MANIFEST", help="The page of a data set, or an images.json.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    format: Annotated[Format, typer.Option(help="hf: a folder that `datasets.load_from_disk` opens.")] = Format.HF,
    extra: Annotated[
        list[str] | None, typer.Option("--with", metavar="tokens|moments", help="A further column; may be repeated.")
    ] = None,
) -> None:
    """Write a data set in another format, without the samples that are taken down."""
    from rich.console import Console

    from data_pipeline.export import export as write
    from data_pipeline.export import source_of
    from sdtrain.config.load import load_ingestion

    wanted = data if data.suffix == ".json" else load_ingestion(data)
    source = source_of(wanted, extra or ())
    counts = write(source, out, Console(stderr=True))
    told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    typer.echo(
        f"export: wrote {out}: {told} samples ({format.value}, {len(source.pictures.takedown.keys):,} taken down)"
    )
