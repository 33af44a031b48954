"""Small worlds that several tests train on, and the public commands that start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdtrain.autoencoders.kl import AutoencoderKL
from sdtrain.autoencoders.load import save_autoencoder
from sdtrain.conditioners.text import build_tokenizer, tokenize, tokenizer_fingerprint
from sdtrain.data.manifest import describe_shard, write_manifest
from sdtrain.data.shard import ShardWriter

CAPTIONS = ("a red square", "a blue circle", "two green lines", "a small dog on grass")


def make_latent_manifest(
    folder: Path, *, train: int = 48, validation: int = 16, size: int = 8, channels: int = 4
) -> Path:
    """Shards of random moments and real tokens in the real format; returns the manifest's path."""
    tokenizer = build_tokenizer(77)
    entries = []
    for split, count, first in (("train", train, 0), ("validation", validation, 10_000)):
        for shard, start in enumerate(range(0, count, 16)):
            path = folder / f"{split}-{shard:05d}.tar"
            with ShardWriter(path) as writer:
                for index in range(start, min(start + 16, count)):
                    random = np.random.Generator(np.random.Philox(first + index))
                    mean = random.standard_normal((channels, size, size))
                    moments = np.concatenate([mean, np.full_like(mean, -6.0)]).astype(np.float16)
                    tokens = tokenize(tokenizer, [CAPTIONS[index % len(CAPTIONS)]])[0]
                    writer.write(f"{first + index:09d}", {"moments.npy": moments, "tokens.npy": tokens})
            entries.append(describe_shard(path, split=split, folder=folder))
    manifest = folder / "manifest.json"
    write_manifest(manifest, entries, fingerprint={"tokenizer": tokenizer_fingerprint(tokenizer)})
    return manifest


def tiny_page(folder: Path, manifest: Path, **sections: dict[str, Any]) -> Path:
    """A page that trains a tiny text-conditioned UNet on `manifest`; `sections` update it section by section."""
    page: dict[str, Any] = {
        "schema_version": 1,
        "run_dir": str(folder / "run"),
        "seed": 7,
        "task": {"type": "latent_diffusion", "condition_dropout": 0.1},
        "data": {
            "manifest": str(manifest),
            "batch_size": 8,
            "micro_batch_size": 2,
            "num_workers": 0,
            "window_shards": 2,
        },
        "autoencoder": {"type": "kl", "preset": "tiny"},
        "denoiser": {
            "type": "unet",
            "arch": {
                "in_channels": 4,
                "out_channels": 4,
                "channels": [16, 32],
                "down_blocks": ["plain", "cross"],
                "layers_per_block": 1,
                "num_heads": 2,
                "context_dim": 32,
                "norm_groups": 8,
            },
        },
        "conditioner": {
            "type": "clip_text",
            "trainable": True,
            "arch": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
        },
        "process": {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        },
        "optimizer": {"learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_steps": 2, "gradient_clip_norm": 1.0},
        "trainer": {"max_steps": 6, "precision": "fp32", "log_every_steps": 1, "timeout_seconds": 240.0},
        "ema": {"decay": 0.99},
        "checkpoint": {"every_steps": 2},
        "tracking": {"mode": "disabled"},
    }
    for name, update in sections.items():
        page[name] = {**(page.get(name) or {}), **update}
    path = folder / "train.yaml"
    path.write_text("# sdtrain train train.yaml\n" + json.dumps(page), encoding="utf-8")  # JSON is YAML
    return path


def write_tiny_autoencoder(folder: Path) -> Path:
    """A randomly initialised autoencoder of two levels in the real format, the same every time."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        latent_channels=4,
        channels=[8, 16],
        layers_per_block=1,
        attention_in_middle=False,
        norm_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    save_autoencoder(network, folder)
    return folder


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(nproc: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a module under torchrun on this machine, as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
