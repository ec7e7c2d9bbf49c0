"""Steps of diffusers' schedulers: what is measured of them, and the truth of it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.modules import Step
from mmfast import use_backend
from mmfast.schedule.table import TableBuilder, model_output
from mmfast.schedule.table import x as sample

# Seconds of a tiny step: through a class, and of the function alone.
OVERHEAD = {"scheduler_step": 20e-6, "scheduler_add_noise": 20e-6, "sampler_call": 12e-6}
OPS = tuple(OVERHEAD)
SHAPES = {"latents": (1, 16, 21, 60, 104), "tiny": (1, 4, 4, 4)}  # of a video; and what is overhead
SHARE = 0.2  # of a case's time
WEIGHTS = (-0.5, -0.25)  # of the model's output, in the steps of a call
# Times faster than diffusers.
RATIOS = {
    ("scheduler_step", "ddpm_latents"): 5.0,
    ("scheduler_step", "lcm_latents"): 5.0,
    ("scheduler_step", "dpm_2m_latents"): 6.0,
    ("scheduler_step", "dpm_2m_sde_latents"): 6.0,
    ("scheduler_step", "unipc_latents"): 6.0,
    ("scheduler_step", "euler_latents"): 4.0,
    ("scheduler_step", "flow_euler_latents"): 1.6,
    ("scheduler_add_noise", "ddpm_latents"): 1.8,
}

_STEPS = 250
_SPARE = 100  # steps that are enough for a sample, so that no schedule is set while time is taken
_FIRST = 5  # the step that is judged; those before fill the history
_SEED = 3
_TOLERANCE = 2e-4  # of the largest number; the library computes in float32, coefficients too


@dataclass(frozen=True)
class Setting:
    """A scheduler and its configuration.

    Attributes:
        key: for the names of cases.
        name: the class.
        config: what differs from the default.
    """

    key: str
    name: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """For a reader."""
        options = ", ".join(
            value if isinstance(value, str) else f"{name}={value}"
            for name, value in self.config.items()
            if not callable(value)
        )
        name = self.name.removesuffix("Scheduler")
        return f"{name}, {options}" if options else name

    def scheduler(self, classes: Any) -> Any:
        """One, from a module that has the classes."""
        return getattr(classes, self.name)(**self.config)


SETTINGS = (
    Setting("ddpm", "DDPMScheduler"),
    Setting("ddim", "DDIMScheduler"),
    Setting("euler", "EulerDiscreteScheduler"),
    Setting("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    Setting("heun", "HeunDiscreteScheduler"),
    Setting("kdpm2", "KDPM2DiscreteScheduler"),
    Setting("kdpm2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    Setting("lms", "LMSDiscreteScheduler"),
    Setting("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    Setting("ipndm", "IPNDMScheduler"),
    Setting("deis", "DEISMultistepScheduler"),
    Setting("dpm_2m", "DPMSolverMultistepScheduler"),
    Setting("dpm_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Setting("dpm_2s", "DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    Setting("unipc", "UniPCMultistepScheduler"),
    # Without noise in the sample, which its corrector would take back.
    Setting("sa_solver", "SASolverScheduler", {"tau_func": lambda t: 0.0}),
    Setting("lcm", "LCMScheduler"),
    Setting("tcd", "TCDScheduler"),
    Setting("flow_euler", "FlowMatchEulerDiscreteScheduler"),
    Setting("flow_heun", "FlowMatchHeunDiscreteScheduler"),
    Setting("edm_euler", "EDMEulerScheduler"),
    Setting("edm_dpm", "EDMDPMSolverMultistepScheduler"),
)


def arguments(setting: Setting, shape: tuple[int, ...], device: torch.device) -> tuple[Any, ...]:
    """The setting, a sample, the model's output, and noise."""
    return setting, *_tensors(shape, device)


@functools.lru_cache(maxsize=len(SHAPES))
def _tensors(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The same for all settings: nobody writes into them."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device) for _ in range(3))


def judged(tensor: Tensor) -> Tensor:
    """Part of the first frame of a video: steps treat every number alike."""
    return tensor[:, :, :1, :8]


def stepping(scheduler: Any, x: Tensor, output: Tensor) -> Step:
    """A call that makes the next step, of a run that starts again when it is near its end."""
    is_scaled = hasattr(scheduler, "scale_model_input")
    # Consistency models choose among the steps that they were trained for.
    chooses = "original_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters
    options = {"original_inference_steps": _STEPS} if chooses else {}
    timesteps: list[Tensor] = []

    def again() -> None:
        scheduler.set_timesteps(_STEPS, **options)
        timesteps[:] = list(scheduler.timesteps)[::-1]
        if is_scaled:
            scheduler.scale_model_input(x[:1], timesteps[-1])
        for _ in range(_FIRST):
            scheduler.step(output, timesteps.pop(), x, return_dict=False)

    again()

    def run() -> Tensor:
        if len(timesteps) < 2:  # the last step of some takes no noise, or less work
            again()
        result: Tensor = scheduler.step(output, timesteps.pop(), x, return_dict=False)[0]
        return result

    def prepare() -> None:
        if len(timesteps) < _SPARE:
            again()

    return Step(prepare, run)


def step(setting: Setting, x: Tensor, output: Tensor, noise: Tensor) -> Step:
    """mmfast's, with the noise drawn in the kernel."""
    from mmfast.integrations import diffusers

    scheduler = setting.scheduler(diffusers)
    scheduler.use_philox(_SEED)
    return stepping(scheduler, x, output)


def expected_step(
    setting: Setting, x: Tensor, output: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and scale of the noise of the result, in float64: contenders draw other noise."""
    from mmfast.integrations import diffusers

    x, output = judged(x).double(), judged(output).double()
    results = []
    for value in (0.0, 1.0):
        scheduler = setting.scheduler(diffusers)
        scheduler._noise = lambda *_, value=value: torch.full_like(x, value)
        with use_backend("reference"):
            results.append(stepping(scheduler, x, output)())
    return results[0], results[1] - results[0]


def call(setting: Setting, x: Tensor, output: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """The function, with a row of Euler's."""
    from mmfast import sampler_step

    builder = TableBuilder()
    for weight in WEIGHTS:
        builder.row(0.0, next=sample + weight * model_output)
    table, index = builder.build().to(x.device).coefficients, torch.tensor(1, device=x.device)
    return lambda: sampler_step(x, output, table, index)


def expected_call(
    setting: Setting, x: Tensor, output: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64, and no noise."""
    made = judged(x).double() + WEIGHTS[1] * judged(output).double()
    return made, torch.zeros_like(made)


def add_noise(setting: Setting, x: Tensor, output: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """mmfast's."""
    from mmfast.integrations import diffusers

    return adding(setting.scheduler(diffusers), x, noise)


def adding(scheduler: Any, x: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """A call that adds noise."""
    timesteps = torch.full(x.shape[:1], 500, device=x.device)
    return lambda: scheduler.add_noise(x, noise, timesteps)


def expected_add_noise(
    setting: Setting, x: Tensor, output: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The noisy sample in float64, without any noise of a contender's own."""
    from mmfast.integrations import diffusers

    with use_backend("reference"):
        made = adding(setting.scheduler(diffusers), judged(x).double(), judged(noise).double())()
    return made, torch.zeros_like(made)


def judge(result: Any, _: tuple[Any, ...], wanted: tuple[Tensor, Tensor]) -> str:
    """The result itself where there is no noise; else what is left over must be standard normal."""
    mean, scale = wanted
    left = judged(result).to(mean) - mean
    limit = _TOLERANCE * float(mean.abs().max())
    if float(scale.abs().max()) <= limit:
        wrong = int((left.abs() > limit).sum())
        return f"{wrong} of {left.numel()} numbers wrong" if wrong else ""
    noise = left / scale
    spread = 6 / math.sqrt(noise.numel())
    off = abs(float(noise.mean())), abs(float(noise.std(correction=0)) - 1)
    if max(off) > spread:
        return f"noise with a mean of {float(noise.mean()):.1e}, deviation {float(noise.std()):.3f}"
    return ""
