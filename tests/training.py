"""Small trainings that the tests of mmfast.train share; as a script, a process of its own.

python tests/training.py FOLDER CASE ...    trains each case into FOLDER/CASE, or goes on
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import normal

from mmfast.data import ImageReader
from mmfast.models import VQVAE, Diffusion, DiT
from mmfast.train import TrainConfig, about_data, fit
from mmfast.train.dit import DiTTask
from mmfast.train.vqvae import VQVAETask

SAMPLES, SIZE, CLASSES = 40, 8, 3
ABOUT = about_data(
    "tests", (1, SIZE, SIZE), ImageReader(SIZE, channels=1), [str(i) for i in range(CLASSES)]
)
CONFIG = TrainConfig(
    steps=6,
    batch_size=8,
    warmup=2,
    lr=1e-2,
    log_every=2,
    checkpoint_every=2,
    sample_every=4,
    device="cpu",
)
CASES: dict[str, dict[str, Any]] = {
    "vqvae": {},
    "vqvae_fsdp": {"distributed": "fsdp"},
    "vqvae_learnable": {"distributed": "fsdp", "accumulate": 2},
    "dit": {"accumulate": 2},
    "dit_fsdp": {"distributed": "fsdp"},
}


def data(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Noisy images of few kinds, with labels."""
    labels = torch.arange(SAMPLES) % CLASSES
    kinds = normal(CLASSES, 1, SIZE, SIZE, seed=1, dtype=dtype)
    images = kinds[labels] + 0.3 * normal(SAMPLES, 1, SIZE, SIZE, dtype=dtype)
    return {"image": images.clamp(-1, 1), "label": labels}


def vqvae(**options: Any) -> VQVAE:
    """A small model, whose codebook starts by k-means and replaces dead codes."""
    torch.manual_seed(0)
    quantizer = {
        "type": "VectorQuantize",
        "dim": 4,
        "codebook_size": 12,
        "kmeans_init": True,
        "threshold_ema_dead_code": 1.5,
        **options,
    }
    return VQVAE(quantizer, 4, channels=1, widths=(4, 8), num_blocks=1)


def dit(channels: int = 1, size: int = SIZE, **options: Any) -> DiT:
    """A small model."""
    torch.manual_seed(0)
    given = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return DiT(size, 2, channels, learn_sigma=False, **given | options)


def task(case: str, dtype: torch.dtype = torch.float64) -> VQVAETask | DiTTask:
    """What a case trains."""
    if case.startswith("vqvae"):
        learnable = {"learnable_codebook": True, "ema_update": False}
        model = vqvae(**(learnable if "learnable" in case else {})).to(dtype)
        return VQVAETask(model, ABOUT, pictures=data(dtype)["image"][:4], codebook_start=2)
    return DiTTask(dit().to(dtype), Diffusion("flow"), ABOUT, sampler_steps=3, pictures=6)


def train(case: str, out: Path | None, *, wait: float = 0, **options: Any) -> Any:
    """Train a case, going on where it was left; each step takes ``wait`` seconds longer."""
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, **CASES[case] | options)
    made = task(case)
    loss = made.loss

    def slower(*arguments: Any) -> Any:
        time.sleep(wait)
        return loss(*arguments)

    made.loss = slower  # type: ignore[method-assign]
    return fit(made, config, data(), out=out, resume=True, progress=False)


def killed_while_writing(out: Path, step: int, **options: Any) -> None:
    """Train the VQ-VAE until this process kills itself in the middle of a checkpoint."""
    import safetensors.torch

    write = safetensors.torch.save_file
    written = []

    def save_file(tensors: Any, path: Path, **rest: Any) -> None:
        write(tensors, path, **rest)
        written.extend([path] if f"step-{step:08d}" in str(path) else [])
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file
    train("vqvae", out, **options)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        train(name, Path(sys.argv[1]) / name)
