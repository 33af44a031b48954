"""The tasks with small real networks: gradients reach what is trained, and training makes the loss fall."""

import pytest
import torch

from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.conditioners.none import NoConditioner
from sdtrain.conditioners.text import small_clip_text
from sdtrain.data.randomness import normals, uniforms
from sdtrain.denoisers.unet import PRESETS, UNet
from sdtrain.diffusion.process import DiffusionProcess
from sdtrain.records import Batch, Conditioning
from sdtrain.tasks.autoencoding import AutoencodingTask, latent_statistics
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.tasks.parts import count_flops

LATENT_SHAPE = (4, 8, 8)
MAX_LENGTH = 7
START, END = 49406, 49407


def process(prediction_type="epsilon"):
    return DiffusionProcess(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type=prediction_type,
    )


def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=4,
        channels=[8, 16],
        layers_per_block=1,
        attention_in_middle=False,
        norm_groups=4,
        scaling_factor=0.7,
    )


def unet(context_dim, **changes):
    torch.manual_seed(1)
    values = {
        "in_channels": 4,
        "out_channels": 4,
        "channels": [16, 32],
        "down_blocks": ["cross", "plain"] if context_dim else ["plain", "plain"],
        "layers_per_block": 1,
        "num_heads": 2,
        "context_dim": context_dim,
        "mid_block": "cross" if context_dim else "self",
        "norm_groups": 4,
    }
    return UNet(**(values | changes))


def text(trainable):
    return small_clip_text(hidden_size=16, layers=2, heads=2, max_length=MAX_LENGTH, seed=0, trainable=trainable)


def task_with_text(*, trainable, **changes):
    values = {
        "denoiser": unet(16),
        "conditioner": text(trainable),
        "autoencoder": autoencoder(),
        "process": process(),
        "latent_shape": LATENT_SHAPE,
        "condition_dropout": 0.5,
        "loss_weighting": 5.0,
        "latents": "sample",
    }
    return LatentDiffusionTask(**(values | changes))


def batch_at(task, positions):
    """What the loader would hand over, drawn from the positions alone."""
    size = len(positions)
    generator = torch.Generator().manual_seed(int(positions[0]))
    prompts = torch.full((size, MAX_LENGTH), END)
    prompts[:, 0] = START
    prompts[:, 1] = 100 + torch.arange(size)
    return Batch(
        keys=tuple(str(position) for position in positions),
        positions=torch.tensor(positions),
        fields={"moments": torch.randn(size, 8, 8, 8, generator=generator).half(), "tokens": prompts},
        normals={
            name: torch.stack([torch.from_numpy(normals(0, name, position, shape)) for position in positions])
            for name, shape in task.draws.normals.items()
        },
        uniforms={
            name: torch.tensor([uniforms(0, name, position)[0] for position in positions])
            for name in task.draws.uniforms
        },
        weights=torch.ones(size),
    )


def with_drops(batch, *dropped):
    batch.uniforms["condition_drop"] = torch.tensor([0.0 if drop else 0.9 for drop in dropped], dtype=torch.float64)
    return batch


def train(task, name, batch, steps, learning_rate):
    module = task.trainables[name].module
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(name, batch, step).losses.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dropped", [(True, True), (False, False), (True, False)])
def test_a_text_encoder_learns_from_null_and_from_real_prompts(dropped):
    """Token embeddings of the empty prompt learn from dropped items, those of the prompts from the others."""
    task = task_with_text(trainable=True, denoiser=unet(16, zero_init=False))
    batch = with_drops(batch_at(task, [0, 1]), *dropped)
    task.loss("denoiser", batch, 0).losses.sum().backward()
    encoder = task.conditioner.text_model
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    embedding = next(p for name, p in encoder.named_parameters() if name.endswith("token_embedding.weight"))
    words = [embedding.grad[100 + index].abs().sum().item() > 0 for index in range(2)]
    assert words == [not drop for drop in dropped]
    assert embedding.grad[START].abs().sum() > 0


def test_every_parameter_of_the_denoiser_gets_a_gradient():
    task = task_with_text(trainable=False, denoiser=unet(16, zero_init=False))
    batch = with_drops(batch_at(task, [0, 1, 2]), True, False, False)
    task.loss("denoiser", batch, 0).losses.sum().backward()
    assert all(parameter.grad is not None for parameter in task.denoiser.parameters())
    assert all(parameter.grad is None for part in task.frozen.values() for parameter in part.parameters())


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for mode in ("none", "blocks"):
        task = task_with_text(trainable=True, denoiser=unet(16, zero_init=False))
        task.denoiser.set_gradient_checkpointing(mode)
        task.loss("denoiser", with_drops(batch_at(task, [0, 1]), True, False), 0).losses.sum().backward()
        module = task.trainables["denoiser"].module
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item() < 1e-5


def test_training_on_one_batch_makes_the_loss_fall():
    task = task_with_text(trainable=True, loss_weighting=None)
    losses = train(task, "denoiser", batch_at(task, list(range(8))), steps=40, learning_rate=3e-3)
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # zero output at the start: the error is the noise's own power
    assert min(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling(prediction_type, sampler):
    task = task_with_text(trainable=False, process=process(prediction_type))
    conditioning = task.conditioner(batch_at(task, [0, 1]).fields["tokens"])
    images = task.sample(conditioning, [1, 2], num_steps=3, guidance_scale=3.0, sampler=sampler)
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    alone = task.sample(
        Conditioning(tokens=conditioning.tokens[1:]), [2], num_steps=3, guidance_scale=3.0, sampler=sampler
    )
    torch.testing.assert_close(alone[0], images[1], rtol=0, atol=1e-4)


def test_bf16_networks():
    task = task_with_text(trainable=True)
    task.trainables["denoiser"].module.bfloat16()
    task.frozen["autoencoder"].bfloat16()
    batch = batch_at(task, [0, 1])
    output = task.loss("denoiser", batch, 0)
    assert output.losses.dtype == torch.float32
    output.losses.sum().backward()
    images = task.sample(task.conditioner(batch.fields["tokens"]), [0, 1], num_steps=2)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_without_conditions():
    task = task_with_text(trainable=False, denoiser=unet(None), conditioner=NoConditioner(), condition_field=None)
    batch = batch_at(task, [0, 1])
    del batch.fields["tokens"]
    task.loss("denoiser", batch, 0).losses.sum().backward()
    assert task.validate(batch)["loss"].shape == (2,)
    assert task.sample(Conditioning(), [0, 1], num_steps=2).shape == (2, 3, 16, 16)


def test_an_autoencoder_learns_to_reconstruct():
    task = AutoencodingTask(autoencoder=autoencoder(), latent_shape=LATENT_SHAPE, reconstruction="mse", kl_weight=1e-6)
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (4, 3, 4, 4), generator=generator, dtype=torch.uint8)
    batch = batch_at(task, list(range(4)))
    batch.fields = {"pixels": small.repeat_interleave(4, 2).repeat_interleave(4, 3)}
    losses = train(task, "autoencoder", batch, steps=60, learning_rate=1e-2)
    assert min(losses[-5:]) < 0.4 * losses[0]
    assert all(parameter.grad is not None for parameter in task.autoencoder.parameters())


@pytest.mark.parametrize("latents", ["sample", "mean"])
def test_the_scale_of_the_statistics_gives_unit_variance(latents):
    network = autoencoder()
    with torch.no_grad():
        moments = network.encode(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    network.scaling_factor = latent_statistics(network, moments.split(5), latents=latents).scaling_factor
    noise = torch.randn(16, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    raw = network.posterior_sample(moments, noise) if latents == "sample" else network.posterior_mean(moments)
    assert network.scale(raw).std().item() == pytest.approx(1.0, abs=0.02)


def test_flops_are_counted_on_shapes_alone():
    """A 3x3 convolution of 2 to 5 channels at 8x8 and a linear layer, by hand; the network is not run."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 5, 3, padding=1)
            self.linear = torch.nn.Linear(3, 5)
            self.register_buffer("shift", torch.zeros(5))

        def forward(self, latents, timesteps, conditioning):
            told = self.linear(conditioning.tokens).mean(1) + self.shift
            return self.conv(latents) + told.view(-1, 5, 1, 1)

    flops = count_flops(
        Small(),
        torch.empty(1, 2, 8, 8, device="meta"),
        torch.zeros(1, dtype=torch.int64, device="meta"),
        Conditioning(tokens=torch.empty(1, 4, 3, device="meta")),
    )
    assert flops == 2 * (5 * 8 * 8 * 2 * 9) + 2 * (4 * 3 * 5)


def test_flops_of_the_task_grow_with_the_image_and_compiled_blocks_are_not_compiled():
    network = unet(16)
    for block in network.repeated_blocks():
        block.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    counts = [
        LatentDiffusionTask(
            denoiser=network,
            conditioner=text(trainable=False),
            autoencoder=autoencoder(),
            process=process(),
            latent_shape=(4, size, size),
            condition_dropout=0.1,
            loss_weighting=None,
            latents="mean",
        ).forward_flops()
        for size in (8, 16)
    ]
    assert 3.5 < counts[1] / counts[0] < 5.0
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


@pytest.mark.parametrize(("size", "flops"), [(64, 803_273_441_280), (32, 180_106_444_800)])
def test_flops_of_stable_diffusion(size, flops):
    """Frozen; published counts without attention's products are 2 x 339 G at 64x64."""
    with torch.device("meta"):
        network = UNet(**PRESETS["sd15"])
    counted = count_flops(
        network,
        torch.empty(1, 4, size, size, device="meta"),
        torch.zeros(1, dtype=torch.int64, device="meta"),
        Conditioning(tokens=torch.empty(1, 77, 768, device="meta")),
    )
    assert counted == flops
