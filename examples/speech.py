"""Spoken digits: a VQ-VAE on spectrograms, what its codes say, and speech drawn from codes.

    python examples/speech.py               # some minutes on two cores
    python examples/speech.py --short       # seconds, to see that it runs

espeak-ng speaks the digits in 57 voices, at two speeds and two pitches each. A quarter of the
voices is kept for the test: no model has heard them.

1.  a VQ-VAE learns log-mel spectrograms, with their bands as channels: 0.8 s become 16 codes;
2.  a small network learns to recognise the digit from the codes alone;
3.  a diffusion transformer learns to draw spectrograms from the codes;
4.  another recogniser, of spectrograms, says whether what 1 and 3 make is still the digit.

Writes the models, a picture, and sounds of voices of the test. espeak-ng is a program (on Debian
and Ubuntu: apt-get install espeak-ng); where it is missing, this says so and ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from command_line import run_spoken_example
from rich.console import Console
from torch import Tensor

from mmfast.data import MelReader, split_by_group
from mmfast.data.bundled import VOICES, WORDS, spoken_digits
from mmfast.models import VQVAE, Classifier, ConditionalDiT, Diffusion, code_usage, save_model
from mmfast.train import Step, Task, TrainConfig, about_data, fit
from mmfast.train.classifier import ClassifierTask
from mmfast.train.vqvae import VQVAETask

try:
    import soundfile  # noqa: F401  of the recordings
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'mmfast[examples]' brings it") from None

CODES, DIM = 256, 64  # K and D of the codebook
READER = MelReader(sample_rate=16000, frames=64, n_fft=800, hop=200, n_mels=64, f_min=60.0)
SECONDS = READER.frames * READER.hop / READER.sample_rate
DECIBELS = 40  # of a difference of 1 between two log-mel spectrograms
ABOUT = about_data("spoken digits", READER.shape, READER)
SHOWN = (1, 4, 7)  # digits in the picture, each spoken by another voice


@dataclass(frozen=True)
class Effort:
    """How much is trained, and on how many of the voices."""

    voices: int = len(VOICES)
    vqvae_steps: int = 600
    recognizer_steps: int = 400
    dit_steps: int = 800
    depth: int = 5
    samples: int = 200  # of the test are drawn
    sampler_steps: int = 20


SHORT = Effort(2, 3, 3, 3, 2, 10, 3)


class DrawFromCodes(Task):
    """Training of a diffusion transformer on spectrograms, with their codes as its context."""

    def __init__(self, model: ConditionalDiT, diffusion: Diffusion) -> None:
        self.model: ConditionalDiT = model
        self.diffusion = diffusion

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The diffusion loss."""
        context = {"context": batch["codes"]}
        options = {"seed": batch["seed"], "condition": context, "drop": 0.1}
        return {"loss": self.diffusion.loss(self.model, batch["mel"], **options)}


def share(model: Classifier, x: Tensor, labels: Tensor) -> str:
    """Of the samples, those that are recognised."""
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(256)]) == labels
    return f"{right.float().mean():.1%}"


def draw(rows: Mapping[str, Tensor], titles: list[str], path: Path) -> None:
    """Spectrograms ``(N, bands, frames)`` of each name in a row."""
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.6 * len(titles), 1.9 * len(rows))
    )
    for line, (name, mels) in zip(axes, rows.items(), strict=True):
        for axis, mel in zip(line, mels, strict=True):
            extent = (0, SECONDS, 0, len(mel))
            axis.imshow(mel, origin="lower", aspect="auto", extent=extent, vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    axes[-1][0].set(xticks=(0, 0.4, 0.8), xlabel="s")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def run(seed: int, effort: Effort, out: Path, console: Console) -> dict[str, str]:
    """Train everything with one seed; what was reached, a picture and sounds."""
    torch.manual_seed(seed)
    spoken = spoken_digits(
        VOICES[: effort.voices],
        (140, 190),
        (35, 65),
        sample_rate=READER.sample_rate,
        seconds=SECONDS,
        cache=out / "recordings",
    )
    mels, labels = READER.log_mel(spoken.waveforms[:, 0]), spoken.labels
    train, test = split_by_group(spoken.voices, test=0.25, seed=seed)
    console.print(
        f"seed {seed}: {len(train)} recordings to learn from, {len(test)} of other voices"
    )
    common = {"batch_size": 32, "warmup": 30, "ema": 0.99, "seed": seed}

    console.print(f"seed {seed}: the VQ-VAE")
    quantizer = {
        "type": "VectorQuantize",
        "dim": DIM,
        "codebook_size": CODES,
        "decay": 0.95,
        "kmeans_init": True,
    }
    vqvae = VQVAE(
        quantizer,
        DIM,
        channels=READER.n_mels,
        spatial_dims=1,
        widths=(96, 128, 192),
        num_blocks=1,
        reconstruction="l1",
    )
    task = VQVAETask(vqvae, ABOUT, codebook_start=effort.vqvae_steps // 12)
    config = TrainConfig(steps=effort.vqvae_steps, lr=2e-3, **common)
    vqvae = fit(task, config, {"mel": mels[train]}).model
    save_model(vqvae, out / f"vqvae-{seed}.safetensors", **task.about)
    with torch.no_grad():
        codes = torch.cat([vqvae.encode(part) for part in mels.split(256)])

    console.print(f"seed {seed}: recognisers, of codes and of spectrograms")
    config = TrainConfig(steps=effort.recognizer_steps, lr=2e-3, weight_decay=0.05, **common)
    vectors = F.embedding(codes, vqvae.quantizer.codebook).transpose(1, 2)  # of the codebook
    recognizers = {}
    for name, x in (("codes", vectors), ("mel", mels)):
        made = Classifier(len(WORDS), channels=x.shape[1], spatial_dims=1, widths=(64, 128))
        task = ClassifierTask(made, {"modalities": {name: {}}})
        recognizers[name] = fit(task, config, {name: x[train], "label": labels[train]}).model

    console.print(f"seed {seed}: the diffusion transformer")
    dit = ConditionalDiT(
        (READER.frames,),
        2,
        READER.n_mels,
        hidden_size=128,
        depth=effort.depth,
        num_heads=4,
        context_codes=CODES,
        context_size=codes.shape[1],
    )
    mean, std = mels[train].mean().item(), mels[train].std().item()
    # The noise of a token has more numbers than the token: the sample is what can be predicted.
    diffusion = Diffusion("flow", prediction="sample", data_mean=mean, data_std=std)
    config = TrainConfig(steps=effort.dit_steps, lr=2e-3, **common)
    data = {"mel": mels[train], "codes": codes[train]}
    dit = fit(DrawFromCodes(dit, diffusion), config, data).model
    save_model(dit, out / f"dit-{seed}.safetensors", data=ABOUT, objective=diffusion.config)
    some = test[torch.linspace(0, len(test) - 1, effort.samples).long()]
    with torch.no_grad():
        decoded = vqvae.decode(codes[some])
    context = {"context": codes[some]}
    options = {"condition": context, "steps": effort.sampler_steps, "seed": seed}
    drawn = diffusion.sample(dit, decoded.shape, **options)

    versions = {"original": mels[some], "VQ-VAE": decoded, "diffusion": drawn}
    usage = code_usage(codes[test], CODES)
    reached = {
        f"digits recognised, of {codes.shape[1]} codes": share(
            recognizers["codes"], vectors[test], labels[test]
        ),
        f"perplexity of the {CODES} codes": f"{usage.perplexity:.0f}",
    }
    for name, x in versions.items():
        reached[f"digits recognised, of {name}"] = share(recognizers["mel"], x, labels[some])
    for name in ("VQ-VAE", "diffusion"):
        error = (versions[name] - mels[some]).abs().mean().item()
        reached[f"mean error of {name}, dB"] = f"{DECIBELS * error:.2f}"

    chosen, titles = [], []
    for i, digit in enumerate(SHOWN):
        said = (labels[some] == digit).nonzero()[:, 0]
        chosen.append(int(said[i * len(said) // len(SHOWN)]))
        speaker = spoken.voices[some[chosen[-1]]]
        titles.append(f"“{WORDS[digit]}”, {speaker}")
        for name, x in versions.items():
            READER.write(x[chosen[-1]], out / f"{WORDS[digit]}-{name}-{seed}.wav")
    draw({name: x[chosen] for name, x in versions.items()}, titles, out / f"speech-{seed}.png")
    console.print(f"wrote {out / f'speech-{seed}.png'}, sounds and models", highlight=False)
    return reached


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_spoken_example("speech", __doc__, run, Effort(), SHORT, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
