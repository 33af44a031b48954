"""Pages load strictly, and everything that is wrong with one is said at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.load import (
    KINDS,
    dump_yaml,
    load_config,
    load_ingestion,
    load_sampling,
    load_training,
)
from sdtrain.config.task import LatentDiffusionTask, MinSnrWeighting
from sdtrain.errors import ConfigError

PAGE = """\
# sdtrain train page.yaml
schema_version: 1
task:        {type: latent_diffusion, condition_dropout: 0.1}
data:        {manifest: data/manifest.json, batch_size: 512, micro_batch_size: 32}
autoencoder: {type: kl, weights: some/vae}
denoiser:    {type: unet, preset: sd15}
conditioner: {type: clip_text, weights: some/clip}
process:     {beta_schedule: scaled_linear, prediction_type: epsilon}
optimizer:   {learning_rate: 1e-4, lr_schedule: cosine, warmup_steps: 500}
trainer:     {max_epochs: 10, precision: bf16}
"""
FOOTER = "\nAll keys of this kind of page: sdtrain config schema training"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "page.yaml"
    path.parent.mkdir()
    path.write_text(PAGE)
    return path


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the one error, without headline and footer."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    headline, *lines, footer = str(caught.value).splitlines()
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    assert headline == f"{path}: {count}"
    assert footer.startswith("All keys of this kind of page: sdtrain config schema ")
    return [line.removeprefix("  ") for line in lines]


# What a good page gives -----------------------------------------------------------------------------------------------


def test_the_url_of_a_manifest_is_kept_as_it_is(page: Path) -> None:
    url = "s3://bucket/data/manifest.json"
    config = load_training(page, [f"data.manifest={url}", "data.cache_dir=/scratch"])
    assert (config.data.manifest, config.data.cache_dir) == (url, Path("/scratch"))
    copy = page.with_name("copy.yaml")
    copy.write_text(dump_yaml(config))
    assert load_training(copy).data == config.data


def test_page_gives_typed_values_and_defaults(page: Path) -> None:
    config = load_training(page)
    assert config.optimizer.learning_rate == 1e-4, "1e-4 is a number, without a dot too"
    assert config.data.manifest == Path("data/manifest.json")
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.seed == 42
    assert config.checkpoint.keep_last == 2
    assert config.validation is None and config.samples is None
    assert isinstance(config.task, LatentDiffusionTask)


def test_name_and_run_dir_follow_from_the_file(page: Path) -> None:
    assert load_training(page).name == "recipes-page"
    assert load_training(page).resolved_run_dir == Path("runs/recipes-page")
    assert load_training(page, ["name=mine"]).resolved_run_dir == Path("runs/mine")
    assert load_training(page, ["name=mine", "run_dir=elsewhere"]).resolved_run_dir == Path("elsewhere")


def test_a_config_cannot_be_changed(page: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_training(page).data.batch_size = 1


def test_dates_and_yes_stay_texts(page: Path) -> None:
    assert load_training(page, ["name=2024-01-01"]).name == "2024-01-01"
    assert load_training(page, ["name=yes"]).name == "yes"


# Overrides ------------------------------------------------------------------------------------------------------------


def test_command_line_beats_yaml_beats_default(page: Path) -> None:
    assert load_training(page).optimizer.warmup_start_lr == 1e-6
    assert load_training(page).optimizer.warmup_steps == 500
    config = load_training(page, ["optimizer.warmup_steps=7", "optimizer.warmup_steps=8", "optimizer.eps=1e-9"])
    assert config.optimizer.warmup_steps == 8, "the last one wins"
    assert config.optimizer.eps == 1e-9


def test_overrides_are_yaml(page: Path) -> None:
    overrides = [
        "ema=null",
        "optimizer.betas=[0.5, 0.9]",
        "trainer.compile=true",
        "validation={every_steps: 5, num_samples: 8, batch_size: 4}",
        "validation.timestep_bins=4",
        "task.loss_weighting={type: min_snr}",
        'samples={every_steps: 5, prompts: ["a: b = c"]}',
    ]
    config = load_training(page, overrides)
    assert config.ema is None
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.trainer.compile is True
    assert config.validation is not None and config.validation.timestep_bins == 4
    assert isinstance(config.task, LatentDiffusionTask) and config.task.loss_weighting == MinSnrWeighting(
        type="min_snr", gamma=5.0
    )
    assert config.samples is not None and config.samples.prompts == ("a: b = c",)


def test_override_makes_absent_sections(page: Path) -> None:
    config = load_training(page, ["tracking.mode=disabled"])
    assert config.tracking.mode == "disabled"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "max_steps",
            "'max_steps' on the command line is not key=value, like optimizer.learning_rate=2e-4",
        ),
        ("=3", "'=3' on the command line is not key=value, like optimizer.learning_rate=2e-4"),
        ("a..b=3", "'a..b=3' on the command line is not key=value, like optimizer.learning_rate=2e-4"),
        (
            "optimizer.learning_rate.peak=3",
            "optimizer.learning_rate.peak (line 9): optimizer.learning_rate = 0.0001 holds no keys; give it as a whole",
        ),
        (
            "optimizer.betas=[0.9",
            "optimizer.betas (line 9): the value '[0.9' on the command line is not YAML: "
            "expected ',' or ']', but got '<stream end>' (line 1, column 5)",
        ),
        (
            "ema={decay: 0.9, decay: 0.8}",
            "ema.decay = 0.9 (command line): is given twice; remove one",
        ),
    ],
)
def test_wrong_overrides(page: Path, override: str, line: str) -> None:
    assert mistakes(page, override) == [line]


# Mistakes: golden texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (
            "learning_rate: 1e-4",
            "learning_rat: 1e-4",
            [
                "optimizer.learning_rate (line 9): is missing: Peak rate.",
                "optimizer.learning_rat = 0.0001 (line 9): unknown key; did you mean optimizer.learning_rate?",
            ],
        ),
        (
            "precision: bf16",
            "precision: bf16, weight_decay: 0.1",
            ["trainer.weight_decay = 0.1 (line 10): unknown key; it belongs at optimizer.weight_decay"],
        ),
        (
            "type: unet, preset: sd15",
            "type: unet, preset: sd15, zzz: 1",
            ["denoiser.zzz = 1 (line 6): unknown key; denoiser may hold type, weights, preset, arch"],
        ),
        ("batch_size: 512", "batch_size: many", ['data.batch_size = "many" (line 4): must be a whole number']),
        ("batch_size: 512", "batch_size: 5e2", ["data.batch_size = 500.0 (line 4): must be a whole number; write 500"]),
        ("batch_size: 512", "batch_size: 0", ["data.batch_size = 0 (line 4): must be > 0"]),
        ("batch_size: 512", "batch_size: true", ["data.batch_size = true (line 4): must be a whole number"]),
        ("1e-4", "fast", ['optimizer.learning_rate = "fast" (line 9): must be a number']),
        ("1e-4", ".nan", ["optimizer.learning_rate = NaN (line 9): must be a finite number"]),
        ("dropout: 0.1", "dropout: 1.5", ["task.condition_dropout = 1.5 (line 3): must be <= 1"]),
        ("dropout: 0.1", "dropout: -1", ["task.condition_dropout = -1 (line 3): must be >= 0"]),
        (
            "precision: bf16",
            "precision: bf61",
            ['trainer.precision = "bf61" (line 10): must be one of fp32, bf16, fp16; did you mean bf16?'],
        ),
        (
            "preset: sd15",
            "preset: sd17",
            [
                'denoiser.preset = "sd17" (line 6): must be one of sd15, sd2, readme, lc_unet_base, lc_unet_3, '
                "lc_unet_5, lc_unet_6, unet_r3, unet_r5, unet_r6; did you mean sd15?"
            ],
        ),
        ("precision: bf16", "precision: bf16, zero_stage: 3", ["trainer.zero_stage = 3 (line 10): must be 2"]),
        (
            "precision: bf16",
            "precision: bf16, compile: 1",
            ["trainer.compile = 1 (line 10): must be true or false"],
        ),
        (
            "latent_diffusion,",
            "latent_difusion,",
            [
                'task.type = "latent_difusion" (line 3): must be one of latent_diffusion, autoencoding; '
                "did you mean latent_diffusion?"
            ],
        ),
        (
            "type: latent_diffusion, ",
            "",
            ["task.type (line 3): is missing; must be one of latent_diffusion, autoencoding"],
        ),
        (
            "trainer:     {max_epochs: 10, precision: bf16}",
            "trainer: 10",
            ["trainer = 10 (line 10): must be a section of key: value lines"],
        ),
        (
            "weights: some/vae",
            "weights: ''",
            ['autoencoder.weights = "" (line 5): must not be empty'],
        ),
        (
            "warmup_steps: 500",
            "warmup_steps: 500, betas: [0.9]",
            ["optimizer.betas.1 (line 9): is missing"],
        ),
        (
            "warmup_steps: 500",
            "warmup_steps: 500, betas: 0.9",
            ["optimizer.betas = 0.9 (line 9): must be a list, like [a, b]"],
        ),
        ("manifest: data/manifest.json", "manifest: 3", ["data.manifest = 3 (line 4): must be a text"]),
        ("some/clip", "some/clip, max_length: 78", ["conditioner.max_length = 78 (line 7): must be <= 77"]),
        (
            "schema_version: 1\n",
            "",
            ["schema_version: is missing: Version of this page's keys."],
        ),
        (
            "optimizer: ",
            "optimiser: ",
            [
                "optimizer: is missing: AdamW and its learning rate.",
                "optimiser (line 9): unknown key; did you mean optimizer?",
            ],
        ),
    ],
)
def test_mistakes_in_a_section(page: Path, old: str, new: str, lines: list[str]) -> None:
    assert old in PAGE
    page.write_text(PAGE.replace(old, new, 1))
    assert sorted(mistakes(page)) == sorted(lines)


def test_lists_that_are_too_short_or_too_long(page: Path) -> None:
    assert mistakes(page, "samples={every_steps: 1, prompts: []}", "optimizer.betas=[0.1, 0.2, 0.3]") == [
        "optimizer.betas = [0.1, 0.2, 0.3] (command line): must hold 2 at most, found 3",
        "samples.prompts = [] (command line): must hold 1 or more, found 0",
    ]


def test_all_mistakes_come_at_once_with_rules_of_the_good_sections(page: Path) -> None:
    page.write_text(PAGE.replace("1e-4", "fast").replace("micro_batch_size: 32", "micro_batch_size: 100, workers: 3"))
    with pytest.raises(ConfigError) as caught:
        load_training(page, ["checkpoint={every_steps: 100, keep_every_steps: 250}", "trainer.max_steps=10", "nope"])
    assert str(caught.value) == (
        f"{page}: 5 mistakes\n"
        "  'nope' on the command line is not key=value, like optimizer.learning_rate=2e-4\n"
        "  data.workers = 3 (line 4): unknown key; did you mean data.num_workers?\n"
        '  optimizer.learning_rate = "fast" (line 9): must be a number\n'
        "  trainer (line 10): give exactly one of max_steps and max_epochs, and set the other to null\n"
        "  checkpoint.keep_every_steps = 250 (command line): must be a multiple of checkpoint.every_steps = 100"
        + FOOTER
    )


def test_a_long_value_is_cut(page: Path) -> None:
    line = mistakes(page, f"trainer.precision={'x' * 200}")[0]
    assert line == f'trainer.precision = "{"x" * 76}... (command line): must be one of fp32, bf16, fp16'


# YAML -----------------------------------------------------------------------------------------------------------------


def test_duplicate_keys_are_named_with_both_lines(page: Path) -> None:
    page.write_text(PAGE + "seed: 1\nseed: 2\nema:\n  decay: 0.9\n  decay: 0.8\n")
    assert mistakes(page) == [
        "seed = 1 (line 11): is given twice, in line 11 and line 12; remove one",
        "ema.decay = 0.9 (line 14): is given twice, in line 14 and line 15; remove one",
    ]


def test_aliases_and_tags_are_refused(page: Path) -> None:
    page.write_text(PAGE + "ema: &again {decay: 0.9}\nname: !!binary aGk=\nseed: !!int x\ntracking: *again\n")
    assert mistakes(page) == [
        'name = "recipes-page" (line 12): the YAML tag !binary is not used in pages; write a plain value',
        "seed = null (line 13): x is no int",
        "tracking = null (line 14): YAML aliases (*name) are not used in pages; write the value out",
        "seed = null (line 13): must be a whole number",
        "tracking = null (line 14): must be a section of key: value lines",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "{path} is not YAML: expected ',' or ']', but got '<stream end>' (line 2, column 1)"),
        ("a: 1\n---\nb: 2\n", "{path} is not YAML: but found another document (line 2, column 1)"),
        ("", "{path}: a page is made of `key: value` lines, found nothing"),
        ("- 1\n- 2\n", "{path}: a page is made of `key: value` lines, found [1, 2]"),
        ("text", '{path}: a page is made of `key: value` lines, found "text"'),
        ("a: \x00", "{path} is not YAML: unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_not_a_page(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == message.format(path=path)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: cannot be read: is not UTF-8 text"
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_missing_file_names_the_likely_one(page: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return str(caught.value)

    folder = page.parent
    assert message(folder / "pages.yaml") == f"{folder}/pages.yaml: no such file; did you mean {page}?"
    assert message(folder / "zzz.yml") == f"{folder}/zzz.yml: no such file; {folder} holds page.yaml"
    nowhere = tmp_path / "nowhere"
    assert message(nowhere / "a.yaml") == f"{nowhere}/a.yaml: no such file, and no YAML page in {nowhere}"


# Kinds and versions ---------------------------------------------------------------------------------------------------


def test_wrong_kind_names_the_right_command(page: Path, tmp_path: Path) -> None:
    sampling = tmp_path / "sample.yaml"
    sampling.write_text("schema_version: 1\nkind: sampling\nrun: runs/x\nprompts: [a]\noutput: out\n")
    with pytest.raises(ConfigError) as caught:
        load_training(sampling)
    assert str(caught.value) == (
        f"{sampling} is a page of kind sampling, not training; it runs with: sdtrain sample {sampling}"
    )
    with pytest.raises(ConfigError, match="is a page of kind training, not ingestion; it runs with: sdtrain train "):
        load_ingestion(page)
    with pytest.raises(ConfigError, match="is a page of kind training, not sampling; it runs with: sdtrain train "):
        load_sampling(page)
    assert load_sampling(sampling).prompts == ("a",)


@pytest.mark.parametrize(
    ("kind", "end"),
    [("smpling", '"smpling" must be one of training, ingestion, sampling; did you mean sampling?'), ("7", "7 must be")],
)
def test_unknown_kind(page: Path, kind: str, end: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(page, [f"kind={kind}"])
    assert str(caught.value).startswith(f"{page}: kind = {end}")


def test_newer_page_is_refused(page: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(page, ["schema_version=2"])
    assert str(caught.value) == (
        f"{page}: schema_version = 2 is newer than this sdtrain, which knows 1 and older; update sdtrain"
    )


@pytest.mark.parametrize("version", ["true", "one", "[1]"])
def test_schema_version_is_a_whole_number(page: Path, version: str) -> None:
    (line,) = mistakes(page, f"schema_version={version}")
    assert line.endswith(" (command line): must be a whole number")


# Dumping --------------------------------------------------------------------------------------------------------------


def all_pages() -> list[Path]:
    return sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", all_pages(), ids=lambda path: "/".join(path.parts[-3:]))
def test_every_shipped_page_loads_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_yaml(config))
    assert load_config(dumped) == config, "a resolved page is a page"
    first = path.read_text().splitlines()[0]
    relative = path.relative_to(Path(__file__).parents[3])
    commands = {"training": ("sdtrain-launch torchrun", "sdtrain train"), "ingestion": ("sdtrain-data run",)}
    allowed = commands.get(config.kind, ("sdtrain sample",))
    assert first.startswith(tuple(f"# {command} {relative}" for command in allowed)), (
        "line 1 is the command that runs it"
    )


def test_shipped_pages_were_found() -> None:
    names = {"/".join(path.parts[path.parts.index("configs") :]) for path in all_pages()}
    recipe = {"data", "train", "train_2x32gb", "sample", "autoencoder"}
    assert {f"configs/sd15/{folder}{name}.yaml" for folder in ("", "tiny/") for name in recipe} <= names


def test_dump_is_complete_and_says_how_to_run(page: Path) -> None:
    text = dump_yaml(load_training(page))
    assert text.startswith("# sdtrain train recipes-page.yaml  (resolved, schema version 1)\nschema_version: 1\n")
    assert "  betas: [0.9, 0.999]\n" in text
    assert "validation: null\n" in text
    assert "  warmup_start_lr: 1e-06\n" in text


def test_published_recipe_is_what_the_page_says() -> None:
    folder = Path(__file__).parents[3] / "configs/sd15"
    for name in ("train", "train_2x32gb"):
        config = load_training(folder / f"{name}.yaml")
        optimizer: dict[str, Any] = config.optimizer.model_dump()
        assert optimizer == {
            "learning_rate": 1e-4,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "weight_decay_on": "all",
            "lr_schedule": "cosine",
            "warmup_steps": 500,
            "warmup_start_lr": 1e-6,
            "final_lr_fraction": 0.01,
            "gradient_clip_norm": 1.0,
        }
        assert config.data.batch_size == 512
        assert config.ema is not None and config.ema.decay == 0.9999
        assert config.process is not None
        assert (config.process.beta_start, config.process.beta_end) == (0.00085, 0.012)
        assert config.validation is not None and config.validation.num_samples == 5000
        assert (config.trainer.precision, config.trainer.compile) == ("bf16", True)
    data = load_ingestion(folder / "data.yaml")
    assert (data.filter.min_aesthetic, data.filter.min_similarity, data.filter.max_pwatermark) == (6.5, 0.28, 0.5)
    assert (data.download.processes, data.download.threads, data.download.jpeg_quality) == (16, 64, 95)
    sample = load_sampling(folder / "sample.yaml")
    assert (sample.sampler, sample.num_steps, sample.eta, sample.guidance_scale) == ("ddim", 30, 0.0, 7.5)


def test_loading_imports_no_torch(page: Path) -> None:
    code = (
        "import sys, sdtrain.config.schema, sdtrain.config.warnings; from sdtrain.config.load import load_config;"
        f"load_config({str(page)!r}); print([name for name in ('torch', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_kind_has_a_command() -> None:
    assert {kind: one.command for kind, one in KINDS.items()} == {
        "training": "sdtrain train",
        "ingestion": "sdtrain-data run",
        "sampling": "sdtrain sample",
    }
