"""Spoken digits: a VQ-VAE on spectrograms, what its codes say, and speech drawn from codes.

    python examples/speech.py               # some minutes on two cores
    python examples/speech.py --short       # seconds, to see that it runs

espeak-ng speaks the digits in 57 voices, at two speeds and two pitches each. A quarter of the voices
is kept for the test: no model has heard them. Then

1.  a VQ-VAE learns log-mel spectrograms, with their bands as channels: 0.8 s become 16 codes;
2.  a small network learns to recognise the digit from the codes alone;
3.  a diffusion transformer learns to draw spectrograms from the codes;
4.  another recogniser, of spectrograms, says whether what 1 and 3 make is still the digit.

Writes the models, a picture, and sounds of the voices of the test. espeak-ng is a program (on Debian
and Ubuntu: apt-get install espeak-ng); where it is missing, this says so and ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmfast.data import MelReader, split_by_group
from mmfast.data.bundled import VOICES, WORDS, has_espeak, spoken_digits
from mmfast.models import VQVAE, ConditionalDiT, Diffusion, code_usage, save_model
from mmfast.train import Step, Task, TrainConfig, about_data, fit
from mmfast.train.vqvae import VQVAETask

try:
    import soundfile  # noqa: F401  of the recordings
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'mmfast[examples]' brings it") from None

CODES, DIM = 256, 64  # K and D of the codebook
READER = MelReader(sample_rate=16000, frames=64, n_fft=800, hop=200, n_mels=64, f_min=60.0)
SHOWN = (1, 4, 7)  # digits in the picture, each spoken by another voice


class Recognizer(nn.Module):
    """The digit of a sequence of codes ``(B, L)`` or of spectrograms ``(B, bands, frames)``."""

    def __init__(self, bands: int, codebook: Tensor | None = None) -> None:
        super().__init__()
        self.codes = None if codebook is None else nn.Embedding.from_pretrained(codebook.clone())
        width, layers = 128, []
        for inputs in (bands, width):
            layers += [nn.Conv1d(inputs, width, 5, padding=2), nn.BatchNorm1d(width), nn.GELU()]
            layers += [nn.Dropout(0.3)]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(2 * width, len(WORDS))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)``."""
        return self.body(x if self.codes is None else self.codes(x).transpose(1, 2))


class Recognize(Task):
    """Training of a recogniser; some codes are replaced by others, so that it relies on none."""

    def __init__(self, model: Recognizer) -> None:
        self.model: Recognizer = model

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Cross-entropy."""
        x = batch["x"]
        if self.model.codes is not None:
            x = torch.where(torch.rand(x.shape) < 0.1, torch.randint_like(x, CODES), x)
        return {"loss": F.cross_entropy(self.model(x), batch["label"], label_smoothing=0.1)}


class DrawFromCodes(Task):
    """Training of a diffusion transformer on spectrograms, with their codes as its context."""

    def __init__(self, model: ConditionalDiT, diffusion: Diffusion) -> None:
        self.model: ConditionalDiT = model
        self.diffusion = diffusion

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The diffusion loss."""
        context = {"context": batch["codes"]}
        options = {"seed": batch["seed"], "condition": context}
        return {"loss": self.diffusion.loss(self.model, batch["mel"], **options)}


def recognized(model: Recognizer, x: Tensor, labels: Tensor) -> Tensor:
    """Which of the samples are recognised, bool ``(N,)``."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(256)]) == labels


def share(right: Tensor) -> str:
    """As text."""
    return f"{right.float().mean().item():.1%}"


def draw(rows: Mapping[str, Tensor], titles: list[str], path: Path) -> None:
    """Spectrograms ``(N, bands, frames)`` of each name in a row."""
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(2.6 * len(titles), 1.9 * len(rows)))
    seconds = READER.frames * READER.hop / READER.sample_rate
    for line, (name, mels) in zip(axes, rows.items(), strict=True):
        for axis, mel in zip(line, mels, strict=True):
            extent = (0, seconds, 0, len(mel))
            axis.imshow(mel, origin="lower", aspect="auto", extent=extent, vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    axes[-1][0].set(xticks=(0, 0.4, 0.8), xlabel="s")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/out/speech"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds, to see that it runs")
    parsed = parser.parse_args(arguments)
    console = Console()
    if not has_espeak():
        console.print("skipped: espeak-ng is not installed (apt-get install espeak-ng)")
        return 0
    parsed.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(parsed.seed)
    short = parsed.short

    spoken = spoken_digits(
        VOICES[:4] if short else VOICES,
        (160,) if short else (140, 190),
        (50,) if short else (35, 65),
        sample_rate=READER.sample_rate,
        seconds=READER.frames * READER.hop / READER.sample_rate,
        cache=parsed.out / "recordings",
    )
    mels, labels = READER.log_mel(spoken.waveforms[:, 0]), spoken.labels
    train, test = split_by_group(spoken.voices, test=0.25, seed=parsed.seed)
    console.print(
        f"{len(train)} recordings to learn from, {len(test)} of other voices for the test"
    )
    settings = {"batch_size": 8 if short else 32, "warmup": 30, "ema": 0.99, "seed": parsed.seed}

    console.print("1. the VQ-VAE")
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
    about = about_data("spoken digits", mels.shape[1:], READER)
    task = VQVAETask(vqvae, about, codebook_start=0 if short else 50)
    config = TrainConfig(steps=3 if short else 600, lr=2e-3, **settings)
    vqvae = fit(task, config, {"mel": mels[train]}).model
    save_model(vqvae, parsed.out / "vqvae.safetensors", data=about, objective=None, latents=None)
    with torch.no_grad():
        codes = torch.cat([vqvae.encode(part) for part in mels.split(256)])
        decoded = vqvae.decode(codes[test])

    console.print("2. recognisers: of codes, and of spectrograms")
    config = TrainConfig(steps=3 if short else 600, lr=3e-3, weight_decay=0.05, **settings)
    recognizers = {}
    for name, model, x in (
        ("codes", Recognizer(DIM, vqvae.quantizer.codebook), codes),
        ("mels", Recognizer(READER.n_mels), mels),
    ):
        data = {"x": x[train], "label": labels[train]}
        recognizers[name] = fit(Recognize(model), config, data).model

    console.print("3. the diffusion transformer")
    dit = ConditionalDiT(
        (READER.frames,),
        (2,),
        READER.n_mels,
        hidden_size=128,
        depth=2 if short else 5,
        num_heads=4,
        context_codes=CODES,
        context_size=codes.shape[1],
    )
    mean, std = mels[train].mean().item(), mels[train].std().item()
    diffusion = Diffusion("flow", data_mean=mean, data_std=std)
    config = TrainConfig(steps=3 if short else 800, lr=2e-3, **settings)
    data = {"mel": mels[train], "codes": codes[train]}
    dit = fit(DrawFromCodes(dit, diffusion), config, data).model
    save_model(dit, parsed.out / "dit.safetensors", data=about, objective=diffusion.config)
    drawn = diffusion.sample(
        dit,
        decoded.shape,
        condition={"context": codes[test]},
        steps=3 if short else 20,
        seed=parsed.seed,
    )

    versions = {"original": mels[test], "VQ-VAE": decoded, "diffusion": drawn}
    table = Table(title=f"{len(test)} digits of {len(set(spoken.voices[i] for i in test))} voices never heard")
    for column in ("", "recognised", "error, dB"):
        table.add_column(column, justify="right" if column else "left")
    right = recognized(recognizers["codes"], codes[test], labels[test])
    usage = code_usage(codes[test], CODES)
    table.add_row(f"{codes.shape[1]} codes of {CODES}", share(right), "")
    for name, x in versions.items():
        right = recognized(recognizers["mels"], x, labels[test])
        decibels = 40 * (x - mels[test]).abs().mean().item()
        table.add_row(f"spectrogram, {name}", share(right), f"{decibels:.2f}")
    console.print(table)
    console.print(f"perplexity of the codes {usage.perplexity:.0f} of {CODES}", highlight=False)

    voices = list(dict.fromkeys(spoken.voices[i] for i in test))
    chosen, titles = [], []
    for i, digit in enumerate(SHOWN):
        voice = voices[i % len(voices)]
        at = [j for j, k in enumerate(test) if spoken.voices[k] == voice and labels[k] == digit][0]
        chosen.append(at)
        titles.append(f"“{WORDS[digit]}”, {voice}")
        for name, x in versions.items():
            sound = parsed.out / f"{WORDS[digit]}-{name.lower()}.wav"
            READER.write(x[at], sound)
    path = parsed.out / "speech.png"
    draw({name: x[chosen] for name, x in versions.items()}, titles, path)
    console.print(f"wrote {path}; {time.process_time():.0f} processor seconds", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
