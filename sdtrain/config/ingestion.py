"""Kind `ingestion`: from raw metadata to shards with tokens and latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.base import (
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SchemaVersion,
    Section,
)
from sdtrain.config.curation import CaptionsConfig, ContentDedupConfig, ScoresConfig
from sdtrain.config.problems import Problem
from sdtrain.config.trainer import Precision

Port = Annotated[int, Field(ge=1, le=65535)]


class LaionSource(Section):
    """LAION metadata in parquet files.

    Attributes:
        type: `laion`.
        metadata: A folder of parquet files, a glob like `metadata/part-*.parquet`, or a URL of either that fsspec
            reads: `hf://datasets/ORG/NAME`, `s3://BUCKET/FOLDER/*.parquet`. What is remote is copied once.
        columns: Our name to the file's name, for files whose columns are called otherwise, e.g. `{url: image_link}`.
    """

    type: Literal["laion"]
    metadata: NonEmptyStr
    columns: dict[str, str] = Field(default_factory=dict)


class DigitsSource(Section):
    """Captioned pictures made of scikit-learn's handwritten digits: needs no network, for tests and the demo.

    Attributes:
        type: `digits`.
        num_images: How many are made.
    """

    type: Literal["digits"]
    num_images: PositiveInt = 1797


class ShardsSource(Section):
    """WebDataset shards that exist already, made by img2dataset or any other tool: nothing is fetched again.

    Attributes:
        type: `shards`.
        shards: A folder of tars, a glob like `shards/*.tar`, or a URL of either that fsspec reads. Of each sample the
            picture (jpg, jpeg, png or webp), txt and json are taken. What is remote is copied once.
    """

    type: Literal["shards"]
    shards: NonEmptyStr


SourceConfig = Annotated[LaionSource | DigitsSource | ShardsSource, Field(discriminator="type")]

NullPolicy = Literal["reject", "keep"]


class NullsConfig(Section):
    """What happens to a row whose value for a rule is absent.

    Attributes:
        aesthetic: Rows without an aesthetic score.
        similarity: Rows without a CLIP similarity.
        size: Rows without width or height.
        caption: Rows without a caption.
        pwatermark: Rows without a watermark probability.
        nsfw: Rows without an NSFW tag or punsafe value.
    """

    aesthetic: NullPolicy = "reject"
    similarity: NullPolicy = "reject"
    size: NullPolicy = "reject"
    caption: NullPolicy = "reject"
    pwatermark: NullPolicy = "reject"
    nsfw: NullPolicy = "reject"


class NsfwConfig(Section):
    """What counts as safe: the string column where there is one, else the numeric one.

    Attributes:
        allow: Values of the string column NSFW that pass.
        max_punsafe: Rows with punsafe below this pass where only the numeric column exists.
    """

    allow: tuple[NonEmptyStr, ...] = ("UNLIKELY",)
    max_punsafe: Fraction = 0.2


Percent = Annotated[float, Field(ge=0, le=100)]


class PercentilesConfig(Section):
    """Thresholds as percentiles of a column over the whole table: the exact value, whatever the number of workers.

    Attributes:
        aesthetic: Rows with a score below this percentile are rejected.
        similarity: Rows with a CLIP similarity below this percentile are rejected.
        pwatermark: Rows with a watermark probability above this percentile are rejected.
        punsafe: Rows with a punsafe above this percentile are rejected.
    """

    aesthetic: Percent | None = None
    similarity: Percent | None = None
    pwatermark: Percent | None = None
    punsafe: Percent | None = None


class FilterConfig(Section):
    """Which rows are worth a download; null switches a rule off. A rule whose column is absent is an error.

    Attributes:
        min_aesthetic: Least aesthetic score, on the scale that aesthetic_scale names.
        aesthetic_scale: Predictor that the scores come from; the two are not comparable.
        min_similarity: Least CLIP similarity of picture and caption.
        min_width: Least width in pixels.
        min_height: Least height in pixels.
        min_aspect_ratio: Least width / height.
        max_aspect_ratio: Greatest width / height.
        min_caption_chars: Fewest characters of a caption.
        max_caption_chars: Most characters of a caption.
        max_pwatermark: Rows with a watermark probability below this pass.
        nsfw: What counts as safe; null takes everything.
        nulls: What happens to rows with absent values.
        percentiles: Thresholds that follow from the table; each is applied beside the fixed one.
        keep_rejected: Write rejected rows too, each with the rule that rejected it.
    """

    min_aesthetic: float | None = 6.5
    aesthetic_scale: Literal["v1", "v2"] = "v2"
    min_similarity: float | None = 0.28
    min_width: PositiveInt | None = 512
    min_height: PositiveInt | None = 512
    min_aspect_ratio: PositiveFloat | None = 0.5
    max_aspect_ratio: PositiveFloat | None = 2.0
    min_caption_chars: NonNegativeInt | None = 20
    max_caption_chars: PositiveInt | None = 300
    max_pwatermark: Fraction | None = 0.5
    nsfw: NsfwConfig | None = NsfwConfig()
    nulls: NullsConfig = NullsConfig()
    percentiles: PercentilesConfig = PercentilesConfig()
    keep_rejected: bool = False


class DedupConfig(Section):
    """Which rows are the same.

    Attributes:
        by: `url`, or `url_text` (the same URL with another caption is another row).
        exclude: Lists of pictures that must not be trained on, such as those of an evaluation set: text files with a
            URL or its hash (a sample's key by `url`) in each line, or parquet files with a URL column.
    """

    by: Literal["url", "url_text"] = "url"
    exclude: tuple[Path, ...] = ()


class ValidationSplitConfig(Section):
    """The samples that are never trained on.

    Attributes:
        num_samples: How many, chosen by a hash of their key.
    """

    num_samples: NonNegativeInt = 5000


class DownloadConfig(Section):
    """How pictures are fetched, checked and brought to one size.

    Attributes:
        contact: E-mail or URL in the user agent, so that the owner of a site can reach you.
        image_size: Side of the pictures in pixels.
        resize_mode: `center_crop`: shorter side to image_size, then the middle. `keep_ratio`: shorter side to
            image_size, nothing cut. `border`: longer side to image_size, white around it. `buckets`: scaled and cut to
            that shape of bucket_shapes whose aspect ratio is nearest to the picture's own.
        bucket_shapes: Width and height of each bucket; null takes shapes of about image_size squared pixels in steps
            of 64, from 1:2 to 2:1.
        only_if_bigger: Reject pictures that would have to be enlarged.
        jpeg_quality: Quality of the stored JPEG files.
        samples_per_shard: Rows in one shard, before links turn out to be dead.
        processes: Downloading processes over all machines.
        threads: Downloading threads of each process.
        timeout_seconds: Longest silence of a server.
        total_timeout_seconds: Longest time for one picture, redirects and retries included.
        retries: Further attempts after a failure that may pass.
        retry_round: Raise it by one to ask again, once, for the pictures of finished shards that failed for reasons
            that may pass. What arrived before stays as it is.
        max_bytes: Bytes after which a body is cut off and counted as failed.
        max_pixels: Pixels above which a picture is refused before it is decoded.
        allowed_ports: Ports that may be connected to.
        allow_loopback: Allow 127.0.0.1; for tests and the demo only.
        max_redirects: Redirects that are followed, each checked like a first address.
        connections_per_host: Requests at a time to one host from all processes together; each may always send one.
        host_gap_seconds: Least time between the starts of two requests to one host from all processes together.
        max_retry_after_seconds: Longest `Retry-After` that is waited for; a host that asks for more is left alone.
        honored_robots_tags: Rules in a server's `X-Robots-Tag` that make a picture be left out; empty honours none.
        blocked_urls: Text files with a URL or its sha256 in each line: never opened, be it after a redirect.
        blocked_bytes: Text files with the sha256 or md5 of a picture's file in each line: never stored.
    """

    contact: NonEmptyStr | None = None
    image_size: PositiveInt = 512
    resize_mode: Literal["center_crop", "keep_ratio", "border", "buckets"] = "center_crop"
    bucket_shapes: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(default=None, min_length=1)
    only_if_bigger: bool = True
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    samples_per_shard: PositiveInt = 1000
    processes: PositiveInt = 16
    threads: PositiveInt = 64
    timeout_seconds: PositiveFloat = 10.0
    total_timeout_seconds: PositiveFloat = 60.0
    retries: NonNegativeInt = 2
    retry_round: NonNegativeInt = 0
    max_bytes: PositiveInt = 33_554_432
    max_pixels: PositiveInt = 64_000_000
    allowed_ports: tuple[Port, ...] = Field(default=(80, 443), min_length=1)
    allow_loopback: bool = False
    max_redirects: NonNegativeInt = 3
    connections_per_host: PositiveInt = 64
    host_gap_seconds: NonNegativeFloat = 0.0
    max_retry_after_seconds: NonNegativeFloat = 30.0
    honored_robots_tags: tuple[NonEmptyStr, ...] = ("noai", "noimageai")
    blocked_urls: tuple[Path, ...] = ()
    blocked_bytes: tuple[Path, ...] = ()


class TokenizeConfig(Section):
    """How captions become CLIP tokens.

    Attributes:
        max_length: Tokens per caption, padded and cut.
    """

    max_length: Annotated[int, Field(ge=2, le=77)] = 77


class EncodeConfig(Section):
    """How pictures become moments (mean and log-variance) of latents.

    Attributes:
        autoencoder: A folder in diffusers' layout or a hub name.
        batch_size: Pictures in one forward.
        precision: Working precision; moments are stored in fp16.
        check_samples: Pictures per shard that are decoded again and compared.
        compile: Compile the blocks of the encoder, for each size of pictures once in every worker.
        flips: Store the moments of the mirrored pictures too, in the shards to train on; each sample that is read takes
            one of the two by its own draw. Twice the work and twice the bytes.
    """

    autoencoder: NonEmptyStr
    batch_size: PositiveInt = 16
    precision: Precision = "fp32"
    check_samples: NonNegativeInt = 4
    compile: bool = False
    flips: bool = False


class PlanConfig(Section):
    """What `sdtrain-data plan` goes by; no run depends on it.

    Attributes:
        sample: Share of the URLs that the forecast rests on, chosen by their hash.
        min_sample_rows: Rows that it rests on at least, so that small tables are forecast as well as large ones.
        link_success: Share of the links that still give a usable picture; 0.60 to 0.75 is normal for LAION today.
        bandwidth_mbit: Of the download, in megabits a second.
        fetched_bytes_per_pixel: Bytes of a picture on the web for each of its pixels.
        stored_bytes_per_pixel: Bytes of a stored picture for each of its pixels; the default is that of `jpeg_quality`
            95.
        images_per_core_second: Pictures that one downloading process fetches and resizes in a second, or one worker
            takes out of adopted shards.
        gpu: What encodes; its published speed and a utilisation of 30 % are taken.
        num_gpus: How many of them.
        encode_images_per_second: What one of them encodes in truth, where it is known; null takes the estimate.
        score_images_per_second: What one of them scores in truth; null forecasts no hours for the scores.
    """

    sample: Annotated[float, Field(gt=0, le=1)] = 0.01
    min_sample_rows: NonNegativeInt = 20_000
    link_success: Annotated[float, Field(gt=0, le=1)] = 0.65
    bandwidth_mbit: PositiveFloat = 1000.0
    fetched_bytes_per_pixel: PositiveFloat = 0.2
    stored_bytes_per_pixel: PositiveFloat = 0.1335
    images_per_core_second: PositiveFloat = 60.0
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090"] = "a100"
    num_gpus: PositiveInt = 1
    encode_images_per_second: PositiveFloat | None = None
    score_images_per_second: PositiveFloat | None = None


class CardConfig(Section):
    """What the data card says that no stage can know.

    Attributes:
        license: Licence or terms under which pictures and captions may be used, in your words.
        contact: Whom to write to, to have a picture taken down.
        notes: What else a reader should know: purpose, known gaps, what the data must not be used for.
    """

    license: NonEmptyStr | None = None
    contact: NonEmptyStr | None = None
    notes: NonEmptyStr | None = None


class RunnerConfig(Section):
    """How the stages are spread by Ray; the output does not depend on it.

    Attributes:
        workers: Tasks at a time; null takes the cores.
        address: A Ray cluster, `auto` for the one of this machine; null starts Ray in this process.
        memory_per_worker_bytes: Limit of each worker, so that a hostile picture costs one sample.
        max_attempts: Attempts at a shard before it is put on the dead-letter list.
    """

    workers: PositiveInt | None = None
    address: NonEmptyStr | None = None
    memory_per_worker_bytes: PositiveInt = 4_000_000_000
    max_attempts: PositiveInt = 3


class IngestionConfig(Section):
    """One data set.

    Attributes:
        schema_version: Version of this page's keys.
        kind: `ingestion`.
        name: What the data set is called; null takes folder and file name.
        output: Folder for the stages' files, the shards and `manifest.json`.
        seed: Start of the choice of validation samples.
        source: Where the rows come from.
        filter: Which rows are worth a download.
        dedup: Which rows are the same.
        validation: The samples that are never trained on.
        download: How pictures are fetched.
        content_dedup: Which pictures are the same, whatever their URLs; null keeps them all.
        scores: Scores of the pictures and their thresholds; null computes none.
        captions: Other captions for the samples; null keeps those that came with the pictures.
        tokenize: How captions become tokens.
        encode: How pictures become latents; null stores pictures only (to train an autoencoder).
        runner: How the stages are spread.
        plan: What the forecast goes by.
        card: What the data card says beyond what the stages know.
    """

    schema_version: SchemaVersion
    kind: Literal["ingestion"]
    name: NonEmptyStr | None = None
    output: Path
    seed: NonNegativeInt = 42
    source: SourceConfig
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    validation: ValidationSplitConfig = ValidationSplitConfig()
    download: DownloadConfig = DownloadConfig()
    content_dedup: ContentDedupConfig | None = None
    scores: ScoresConfig | None = None
    captions: CaptionsConfig | None = None
    tokenize: TokenizeConfig = TokenizeConfig()
    encode: EncodeConfig | None = None
    runner: RunnerConfig = RunnerConfig()
    plan: PlanConfig = PlanConfig()
    card: CardConfig = CardConfig()


def filter_ranges_are_not_empty(filter: FilterConfig) -> Iterator[Problem]:
    """A least value above the greatest rejects every row."""
    for low, high in (("min_aspect_ratio", "max_aspect_ratio"), ("min_caption_chars", "max_caption_chars")):
        least, greatest = getattr(filter, low), getattr(filter, high)
        if least is not None and greatest is not None and least > greatest:
            yield Problem(f"filter.{low}", f"must be <= filter.{high} = {greatest:g}, else no row is left")


def pictures_are_big_enough(filter: FilterConfig, download: DownloadConfig) -> Iterator[Problem]:
    """Rows that the download must reject should not be asked for."""
    if not download.only_if_bigger or download.resize_mode == "border":  # which asks for one long side only
        return
    for name in ("min_width", "min_height"):
        least = getattr(filter, name)
        if least is not None and least < download.image_size:
            advice = "raise it, or set download.only_if_bigger=false"
            yield Problem(f"filter.{name}", f"must be >= download.image_size = {download.image_size}; {advice}")


def bucket_shapes_are_used(download: DownloadConfig) -> Iterator[Problem]:
    """Shapes without their mode would be ignored."""
    if download.bucket_shapes is not None and download.resize_mode != "buckets":
        yield Problem("download.bucket_shapes", f"needs download.resize_mode=buckets, not {download.resize_mode}")


def total_time_covers_one_attempt(download: DownloadConfig) -> Iterator[Problem]:
    """A total below one attempt's limit makes the latter meaningless."""
    if download.total_timeout_seconds < download.timeout_seconds:
        limit = download.timeout_seconds
        yield Problem("download.total_timeout_seconds", f"must be >= download.timeout_seconds = {limit:g}")


def thresholds_have_a_score(scores: ScoresConfig | None) -> Iterator[Problem]:
    """An aesthetic threshold needs a head."""
    if scores is None or scores.aesthetic_head is not None:
        return
    for name in ("min_aesthetic", "aesthetic_percentile"):
        if getattr(scores, name) is not None:
            yield Problem(f"scores.{name}", "needs scores.aesthetic_head, the file of the predictor; give it, or null")


INGESTION_RULES = (
    filter_ranges_are_not_empty,
    pictures_are_big_enough,
    total_time_covers_one_attempt,
    bucket_shapes_are_used,
    thresholds_have_a_score,
)
