"""mmfast in programs that were written for other libraries: the same results, and the time of both.

    python examples/drop_in.py               # some minutes on two cores
    python examples/drop_in.py --short       # seconds, to see that it runs

1.  A training script of a VQ-VAE, in plain PyTorch with vector-quantize-pytorch. One line changes:

        from vector_quantize_pytorch import VectorQuantize    # before
        from mmfast.nn import VectorQuantize                  # after

    Both learn the same handwritten digits, from the same weights, step by step in turn.

2.  A pipeline of diffusers: scheduler, diffusion transformer and VQModel. One line is added:

        mmfast.integrations.patch(pipeline)

    Both draw the same digits from the same noise.

Times are of the processor, all threads together, so that other programs do not change them: medians
of runs with and without mmfast in turn.

Needs the packages of ``pip install '.[examples,integrations]' vector-quantize-pytorch``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from command_line import run_example
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmfast.integrations
import mmfast.nn
from mmfast.data.bundled import mnist_digits
from mmfast.data.progress import tracked
from mmfast.models import Diffusion
from mmfast.train import Step, Task, TrainConfig, fit

try:
    import vector_quantize_pytorch
    from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler, VQModel
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SystemExit(
        f"error: {error}; pip install '.[examples,integrations]' vector-quantize-pytorch brings it"
    ) from None

DIM = 64  # of the vectors that are quantised
NULL_CLASS = 1000  # DiTPipeline's label of no class


@dataclass(frozen=True)
class Effort:
    """How much is trained and drawn, and on how many of the digits."""

    every: int = 1  # of the digits is used
    codes: int = 8192
    steps: int = 100
    batch: int = 64
    vq_steps: int = 200
    dit_steps: int = 600
    sampling_steps: int = 20
    repeats: int = 7


SHORT = Effort(50, 128, 3, 4, 2, 2, 3, 2)


# A training script


class Autoencoder(nn.Module):
    """As anybody writes it: convolutions, and a quantiser that is given."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, DIM, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(DIM, DIM, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(DIM, DIM, 3, padding=1),
        )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.Conv2d(DIM, DIM, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(DIM, DIM, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(DIM, 1, 4, stride=2, padding=1),
        )

    def vectors(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` of images ``(B, 1, 28, 28)``."""
        return self.encoder(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, indices and the quantiser's loss."""
        quantized, indices, loss = self.quantizer(self.vectors(x))
        side = x.shape[-1] // 4
        return self.decoder(quantized.transpose(1, 2).unflatten(2, (side, side))), indices, loss


def training_step(
    model: Autoencoder, optimizer: torch.optim.Optimizer, x: Tensor
) -> tuple[float, Tensor]:
    """The loss, and the indices of x."""
    reconstruction, indices, loss = model(x)
    error = F.mse_loss(reconstruction, x)
    optimizer.zero_grad()
    (error + loss).backward()
    optimizer.step()
    return error.item(), indices


class Stopwatch:
    """Seconds of a module's forward, summed until they are taken."""

    def __init__(self, module: nn.Module) -> None:
        self._seconds = self._start = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.process_time()

    def _end(self, *_: object) -> None:
        self._seconds += time.process_time() - self._start

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def two_trainings(
    images: Tensor, effort: Effort, seed: int
) -> tuple[Table, dict[str, list[float]], dict[str, str]]:
    """Train with both libraries in turn: a table, the losses of each, and the ratios."""
    torch.manual_seed(seed)
    codes, steps, batch = effort.codes, effort.steps, effort.batch
    ours = Autoencoder(mmfast.nn.VectorQuantize(DIM, codes, decay=0.95))
    # A codebook of k-means, for both: unlike the libraries' own ones it is not random.
    with torch.no_grad():
        vectors = ours.vectors(images[:1024]).flatten(0, 1)
    codebook = mmfast.kmeans(vectors, codes, iterations=5, seed=seed).codebook
    ours.quantizer._codebook.embed_avg.copy_(codebook[None])
    ours.quantizer._codebook.cluster_size.fill_(1)
    ours.quantizer.codebook = codebook
    theirs = Autoencoder(vector_quantize_pytorch.VectorQuantize(DIM, codes, decay=0.95))
    theirs.load_state_dict(ours.state_dict())
    models = {"vector-quantize-pytorch": theirs, "mmfast": ours}

    optimizers = {name: torch.optim.Adam(m.parameters(), 1e-3) for name, m in models.items()}
    watches = {name: Stopwatch(m.quantizer) for name, m in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    whole: dict[str, list[float]] = {name: [] for name in models}
    quantizer: dict[str, list[float]] = {name: [] for name in models}
    same = []
    generator = torch.Generator().manual_seed(seed)
    for step in tracked(range(steps), "training both", steps):
        x = images[torch.randint(len(images), (batch,), generator=generator)]
        indices = []
        for name in sorted(models, reverse=bool(step % 2)):  # the other one first, each time
            start = time.process_time()
            loss, chosen = training_step(models[name], optimizers[name], x)
            whole[name].append(time.process_time() - start)
            quantizer[name].append(watches[name].take())
            losses[name].append(loss)
            indices.append(chosen)
        same.append((indices[0] == indices[1]).float().mean().item())

    table = Table(title=f"Training: {codes} codes, {batch * 49} vectors a step, {steps} steps")
    for column in ("", *models, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    parts = {"step, ms": whole, "quantiser's forward, ms": quantizer}
    cells = {name: compared(times) for name, times in parts.items()}
    for name, cell in cells.items():
        table.add_row(name, *cell)
    last = {name: statistics.fmean(x[-10:]) for name, x in losses.items()}
    table.add_row("error of the first step", *(f"{x[0]:.6f}" for x in losses.values()))
    table.add_row("mean of the last 10", *(f"{x:.6f}" for x in last.values()))
    reached = {
        "training step, times faster": cells["step, ms"][-1],
        "quantiser, times faster": cells["quantiser's forward, ms"][-1],
        "same codes in the first step": f"{same[0]:.2%}",
        "same codes in all steps": f"{statistics.fmean(same):.2%}",
    }
    return table, losses, reached


def compared(times: dict[str, list[float]]) -> list[str]:
    """Medians in milliseconds, the first not counted, and the ratio of the two."""
    medians = [statistics.median(seconds[1:] or seconds) for seconds in times.values()]
    return [*(f"{1e3 * m:.1f}" for m in medians), f"{medians[0] / medians[1]:.2f}"]


# A pipeline of diffusers


class Reconstruct(Task):
    """Training of diffusers' VQModel."""

    def __init__(self, model: VQModel) -> None:
        self.model = model

    def loss(self, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Reconstruction and commitment."""
        out = self.model(batch["image"])
        error = F.mse_loss(out.sample, batch["image"])
        return {"loss": error + 0.1 * out.commit_loss.mean(), "reconstruction": error}


class Denoise(Task):
    """Training of diffusers' DiT, on latents."""

    def __init__(self, model: DiTTransformer2DModel, diffusion: Diffusion) -> None:
        self.model, self.diffusion = model, diffusion

    def loss(self, batch: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The error of the noise."""
        labels = {"class_labels": batch["label"]}
        losses = self.diffusion.losses(
            self.model, batch["latent"], seed=batch["seed"], condition=labels
        )
        return {"loss": losses.total.mean()}


def trained_pipeline(images: Tensor, labels: Tensor, effort: Effort, seed: int) -> DiTPipeline:
    """A pipeline of diffusers, learned from the digits; training, too, runs on patched models."""
    torch.manual_seed(seed)
    vq = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=4,
        num_vq_embeddings=512,
        norm_num_groups=8,
        sample_size=32,
    )
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for model in (vq, dit):
        mmfast.integrations.patch(model)
    settings = {"batch_size": 32, "warmup": 20, "ema": 0.99, "seed": seed}
    config = TrainConfig(steps=effort.vq_steps, lr=2e-3, **settings)
    vq = fit(Reconstruct(vq), config, {"image": images}).model
    with torch.no_grad():
        latents = torch.cat([vq.encode(part).latents for part in images.split(100)])
    vq.register_to_config(scaling_factor=1 / latents.std().item())
    config = TrainConfig(steps=effort.dit_steps, lr=1e-3, **settings)
    data = {"latent": latents * vq.config.scaling_factor, "label": labels}
    dit = fit(Denoise(dit, Diffusion()), config, data).model
    for model in (vq, dit):
        mmfast.integrations.unpatch(model)
    pipeline = DiTPipeline(dit, vq, DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def two_pipelines(
    pipeline: DiTPipeline, effort: Effort, seed: int
) -> tuple[Table, dict[str, Tensor], dict[str, str]]:
    """Draw digits with and without the patch in turn: a table, the images, and the ratios."""
    patched = copy.deepcopy(pipeline)
    report = mmfast.integrations.patch(patched)
    pipelines = {"diffusers": pipeline, "with mmfast": patched}
    classes = list(range(10)) * 2
    latents = torch.randn(2 * len(classes), 4, 8, 8)
    timesteps = torch.full((len(latents),), 500)

    def whole(pipe: DiTPipeline) -> Tensor:
        drawn = pipe(
            classes,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=effort.sampling_steps,
            output_type="np",
        )
        return torch.from_numpy(drawn.images)

    def transformer(pipe: DiTPipeline) -> Tensor:
        labels = torch.tensor(2 * classes)
        return pipe.transformer(latents, timesteps, labels).sample

    def autoencoder(pipe: DiTPipeline) -> Tensor:
        return pipe.vae.decode(latents[: len(classes)]).sample

    def scheduler(pipe: DiTPipeline) -> Tensor:
        pipe.scheduler.set_timesteps(effort.sampling_steps)
        x = latents
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(latents, t, x).prev_sample
        return x

    parts: dict[str, Callable[[DiTPipeline], Tensor]] = {
        "pipeline": whole,
        "transformer, one call": transformer,
        "scheduler's steps": scheduler,
        "quantiser and decoder": autoencoder,
    }
    table = Table(title=f"Sampling: {len(classes)} digits in {effort.sampling_steps} steps")
    for column in ("", *(f"{name}, ms" for name in pipelines), "ratio", "difference"):
        table.add_column(column, justify="right" if column else "left")
    images, reached = {}, {"modules on mmfast": str(len(report.swapped))}
    with torch.no_grad():
        for part, call in parts.items():
            seconds: dict[str, list[float]] = {name: [] for name in pipelines}
            results = {}
            for _ in tracked(range(effort.repeats), part, effort.repeats):
                for name, pipe in pipelines.items():
                    start = time.process_time()
                    results[name] = call(pipe)
                    seconds[name].append(time.process_time() - start)
            first, second = results.values()
            difference = (first - second).abs().max().item()
            cells = compared(seconds)
            table.add_row(part, *cells, f"{difference:.1e}")
            reached[f"{part}, times faster"] = cells[-1]
            if part == "pipeline":
                images = results
                reached["largest difference of a pixel, of 1"] = f"{difference:.1e}"
    return table, images, reached


def draw(losses: dict[str, list[float]], images: dict[str, Tensor], path: Path) -> None:
    """Losses over each other, and the digits of both pipelines."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1.2, 1, 1))
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes[0].plot(values, style, label=name, linewidth=2 if style == "-" else 1.5)
    axes[0].set(title="one training script", xlabel="step", ylabel="squared error", yscale="log")
    axes[0].legend()
    for axis, (name, drawn) in zip(axes[1:], images.items(), strict=True):
        rows = [torch.cat(list(row), 1) for row in drawn[..., 0].split(5)]
        axis.imshow(torch.cat(rows), cmap="gray")
        axis.set(title=f"one pipeline: {name}")
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def run(seed: int, effort: Effort, out: Path, console: Console) -> dict[str, str]:
    """Both comparisons with one seed: their tables, a picture, and the ratios."""
    images, labels = (x[:: effort.every] for x in mnist_digits())
    console.print(f"seed {seed}: a training script, with both libraries in turn")
    training, losses, reached = two_trainings(images, effort, seed)
    console.print(training)
    console.print(f"seed {seed}: training a pipeline of diffusers, its models patched")
    pipeline = trained_pipeline(F.pad(images, (2, 2, 2, 2), value=-1), labels, effort, seed)
    console.print(f"seed {seed}: the pipeline, with and without the patch in turn")
    sampling, drawn, ratios = two_pipelines(pipeline, effort, seed)
    console.print(sampling)
    draw(losses, drawn, out / f"drop_in-{seed}.png")
    console.print(f"wrote {out / f'drop_in-{seed}.png'}", highlight=False)
    return {**reached, **ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_example("drop_in", __doc__, run, Effort(), SHORT, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
