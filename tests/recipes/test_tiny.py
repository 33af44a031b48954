"""The tiny recipe from pictures to samples, page by page, with nothing set over the pages but where things lie."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_pipeline.build
import data_pipeline.cli
from data_pipeline.cluster import InlineExecutor
from sdtrain.autoencoders.load import autoencoder_facts
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.pipelines import load_pipeline
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.checkpoints.weights import read_buffers
from sdtrain.config.load import load_ingestion
from sdtrain.data.manifest import Manifest
from sdtrain.records import Conditioning
from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import MetricsLog, read_metrics
from tests.engines import one_rank, sdtrain

pytestmark = pytest.mark.engine

PAGES = Path(__file__).parents[2] / "configs" / "sd15" / "tiny"
STEPS = 4
RUN = RunDir(Path("runs/sd15-tiny-train"))


def sdtrain_data(*arguments: object) -> int:
    """Run a command line of `sdtrain-data` in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_pipeline.build, "executor_for", lambda page: nullcontext(InlineExecutor()))
        with pytest.raises(SystemExit) as left:
            data_pipeline.cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to work in: the pages' paths are relative."""
    folder, before = tmp_path_factory.mktemp("tiny"), Path.cwd()
    os.chdir(folder)
    with one_rank():
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def pictures(here: Path) -> Manifest:
    assert sdtrain_data("run", PAGES / "data.yaml", "encode=null") == 0
    return Manifest.load(Path("data/tiny/images.json"))


@pytest.fixture(scope="module")
def autoencoder(pictures: Manifest) -> Path:
    assert sdtrain("train", PAGES / "autoencoder.yaml") == 0
    weights = Path("runs/sd15-tiny-autoencoder/weights/step-00000004")
    assert weights.is_dir(), "where data.yaml and train.yaml look for it"
    return weights


@pytest.fixture(scope="module")
def latents(autoencoder: Path) -> Manifest:
    assert sdtrain_data("run", PAGES / "data.yaml") == 0
    return Manifest.load(Path("data/tiny/manifest.json"))


@pytest.fixture(scope="module")
def trained(latents: Manifest) -> RunDir:
    assert sdtrain("train", PAGES / "train.yaml") == 0
    return RUN


def state(run: RunDir, step: int = STEPS) -> dict[str, torch.Tensor]:
    """fp32 master, moments, EMA and buffers of a checkpoint."""
    checkpoint = Checkpoint.open(run.checkpoints / f"step-{step:08d}")
    whole = {
        f"{kind}/{name}": tensor for kind in KINDS for name, tensor in assemble(checkpoint, "denoiser", kind).items()
    }
    return whole | read_buffers(checkpoint, "denoiser")


def losses(run: RunDir) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run.metrics)]


def test_pictures_train_an_autoencoder_whose_validation_is_told(autoencoder: Path, pictures: Manifest) -> None:
    assert (pictures.num_samples("train"), pictures.num_samples("validation")) == (80, 16)
    assert pictures.field_shapes["jpg"] == (3, 64, 64)
    rows = read_metrics(RunDir(Path("runs/sd15-tiny-autoencoder")).metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert 0 < rows[-1]["validation/reconstruction"] < 1


def test_latents_are_those_of_this_autoencoder(latents: Manifest, autoencoder: Path) -> None:
    assert latents.field_shapes["moments.npy"] == (8, 8, 8)
    assert (latents.num_samples("train"), latents.num_samples("validation")) == (80, 16)
    facts = autoencoder_facts(str(autoencoder))
    assert latents.fingerprint["autoencoder"] == facts | {"precision": load_encode_precision()}


def load_encode_precision() -> str:
    encode = load_ingestion(PAGES / "data.yaml").encode
    assert encode is not None
    return encode.precision


def test_training_validates_draws_and_exports(trained: RunDir) -> None:
    rows = read_metrics(trained.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {f"validation/loss_bin_{index:02d}" for index in range(4)} < set(rows[-1])
    with Image.open(trained.samples / "step-00000004.png") as grid:
        assert min(grid.size) >= 64
    assert (trained.weights / "step-00000004" / "model_index.json").is_file()


def test_two_steps_and_two_more_are_four_bit_by_bit(trained: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a keyboard's interrupt after step 2, because the schedule knows the whole length."""
    real = MetricsLog.log

    def log(self: MetricsLog, step: int, row: dict[str, float]) -> None:
        real(self, step, row)
        if step == 2 and "train/loss" in row:  # a second interrupt would not wait
            signal.raise_signal(signal.SIGINT)

    run = RunDir(Path("runs/stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", log)
        assert sdtrain("train", PAGES / "train.yaml", f"run_dir={run.path}") == 0
    left = run.read_exit()
    assert left is not None and left.step == 2
    assert not (run.checkpoints / "step-00000004").exists()
    assert sdtrain("train", PAGES / "train.yaml", f"run_dir={run.path}") == 0
    expected, found = state(trained), state(run)
    assert {name.split("/")[0] for name in expected} >= set(KINDS)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(run) == losses(trained)
    early = state(run, 2)
    assert not torch.equal(early["ema/denoiser.conv_in.weight"], expected["ema/denoiser.conv_in.weight"])


def test_recomputing_and_accumulating_train_the_same(trained: RunDir) -> None:
    assert sdtrain("train", PAGES / "train_2x32gb.yaml") == 0
    other = RunDir(Path("runs/sd15-tiny-train-2x32gb"))
    assert losses(other) == pytest.approx(losses(trained), rel=1e-4)


def test_samples_are_drawn(trained: RunDir) -> None:
    assert sdtrain("sample", PAGES / "sample.yaml") == 0
    listed = json.loads(Path("samples/sd15-tiny/samples.json").read_text())
    pictures = sorted(path for path in Path("samples/sd15-tiny").rglob("*.png") if path.name != "grid.png")
    assert len(pictures) == 2
    assert "a red handwritten seven on a blue background" in json.dumps(listed)
    with Image.open(pictures[0]) as picture:
        assert picture.size == (64, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_export_opens_in_diffusers_and_computes_the_same(trained: RunDir) -> None:
    from diffusers import StableDiffusionPipeline

    assert sdtrain("export", trained.path, "--output", "weights/sd15-tiny") == 0
    theirs = StableDiffusionPipeline.from_pretrained("weights/sd15-tiny", local_files_only=True)
    ours = load_pipeline(Path("weights/sd15-tiny"))
    prompt = "a red handwritten seven on a blue background"
    ids = theirs.tokenizer(prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    noised, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    with torch.no_grad():
        text = theirs.text_encoder(ids)[0]
        mine = ours.conditioner(ids).tokens
        assert torch.equal(mine, text)
        expected = theirs.unet(noised, timesteps, encoder_hidden_states=text.expand(2, -1, -1)).sample
        found = ours.denoiser(noised, timesteps, Conditioning(tokens=text.expand(2, -1, -1)))
        assert expected.std() > 0
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        image = theirs.vae.decode(noised).sample
        assert (ours.autoencoder.decode(noised) - image).norm() <= 1e-6 * image.norm()
    exported = theirs.unet.state_dict()
    averaged = {name: value for name, value in state(trained).items() if name.startswith("ema/denoiser.")}
    assert {name.removeprefix("ema/denoiser.") for name in averaged} == set(exported)
    assert all(torch.equal(exported[name.removeprefix("ema/denoiser.")], value) for name, value in averaged.items())
    pixels = np.asarray(theirs(prompt, num_inference_steps=2, output_type="np", generator=generator).images)
    assert pixels.shape == (1, 64, 64, 3)
