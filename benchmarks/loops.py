"""A whole sampling loop: a diffusion transformer's, and one whose model costs nothing.

On a GPU mmfast's is one launch of a graph; without one, what the host does for a step shows where
the model is small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import transformers
from mmfast import schedule

OP = "sampling_loop"
GRAPH, PATCHED = "mmfast, one graph", "mmfast"
_CHANNELS = 16  # of a token's latents
_TOLERANCE = 5e-2  # of the norm, of products in bfloat16

Prepare = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Setting:
    """What is sampled.

    Attributes:
        model: blocks, batch and tokens; None: a model whose output is there already.
        steps: S.
        shape: of a batch of samples.
    """

    model: transformers.Setting | None
    steps: int
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """For the names of cases."""
        return f"{self.model.key if self.model else 'tiny'}_{self.steps}_steps"

    @property
    def title(self) -> str:
        """For readers."""
        model = self.model.title if self.model else "no model"
        return f"{model}, {self.steps} steps of Euler's"


class Denoiser(nn.Module):
    """The velocity of latents (B, L, c), by the blocks of a diffusion transformer."""

    def __init__(self, setting: transformers.Setting) -> None:
        super().__init__()
        self.blocks = transformers.DiT(setting).blocks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed = nn.Linear(_CHANNELS, setting.width)
            self.out = nn.Linear(setting.width, _CHANNELS)
        rates = torch.exp(-math.log(1e4) * torch.arange(setting.width) / setting.width)
        self.rates = nn.Buffer(rates)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.embed(x)
        c = torch.cos(t[:, None].to(x.dtype) * self.rates)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


class Known(nn.Module):
    """Its output is there already: what a loop takes is what the host does."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.velocity = nn.Buffer(torch.randn(shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity


def arguments(setting: Setting, device: torch.device) -> tuple[Any, ...]:
    """Setting, model, and noise in float32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(setting.shape, generator=generator).to(device)
    if setting.model is None:
        return setting, Known(setting.shape).to(device), noise
    return setting, Denoiser(setting.model).to(device, setting.model.dtype), noise


def _grid(setting: Setting) -> schedule.Grid:
    return schedule.FlowSchedule().grid(setting.steps)


def _dtype(setting: Setting) -> torch.dtype:
    return setting.model.dtype if setting.model else torch.float32


def own(
    prepare: Prepare, graph: bool, setting: Setting, model: nn.Module, noise: Tensor
) -> Callable[[], tuple[Tensor]]:
    """mmfast's loop; ``graph``: as one, where there are any."""
    graphs = "loop" if graph and noise.device.type == "cuda" else False
    loop = schedule.SampleLoop(
        prepare(model) if setting.model else model,
        noise,
        schedule.flow_euler(_grid(setting)),
        dtype=_dtype(setting),
        cuda_graph=graphs,
    )
    return lambda: (loop.run(noise),)


def plain(
    prepare: Prepare, setting: Setting, model: nn.Module, noise: Tensor
) -> Callable[[], tuple[Tensor]]:
    """As a user writes it; levels and times are on the device beforehand."""
    grid, network = _grid(setting), prepare(model)
    levels = [grid.point(i)[1] for i in range(setting.steps + 1)]
    times = torch.tensor([grid.timestep(i) for i in range(setting.steps)], dtype=torch.float32)
    of_batch = times.to(noise.device)[:, None].expand(-1, len(noise))
    dtype = torch.float64 if noise.dtype == torch.float64 else _dtype(setting)

    @torch.no_grad()
    def run() -> tuple[Tensor]:
        x = noise
        for i, t in enumerate(of_batch):
            x = x + (levels[i + 1] - levels[i]) * network(x.to(dtype), t).to(x.dtype)
        return (x,)

    return run


def nothing_to_compile(setting: Setting, *_: Any) -> list[str]:
    """Reasons against compiling the model."""
    return [] if setting.model else ["there is no model"]


def expected(setting: Setting, model: nn.Module, noise: Tensor) -> tuple[Tensor]:
    """In float64."""
    return plain(lambda m: transformers.plain(m).double(), setting, model, noise.double())()


def judge(result: tuple[Tensor], _: tuple[Any, ...], wanted: tuple[Tensor]) -> str:
    """What is further from float64 than products in bfloat16 excuse."""
    worst = max(transformers.errors(result, wanted))
    return "" if worst < _TOLERANCE else f"an error of {worst:.1e} of the norm"


MAKES = {
    GRAPH: functools.partial(own, transformers.patched, True),
    PATCHED: functools.partial(own, transformers.patched, False),
}
