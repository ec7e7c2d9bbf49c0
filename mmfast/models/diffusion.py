"""Training and sampling of diffusion and flow models, of one description."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmfast
from mmfast.checks import check_choice
from mmfast.models.noising import Noising, uniform
from mmfast.models.variational_bound import variational_bound
from mmfast.schedule import FlowSchedule, SamplerTable, sample, samplers

SAMPLERS = tuple(name for name in samplers.__all__ if not name.startswith("edm"))
_PLACE_ONE_MORE = ("deis", "dpm_solver", "dpm_solver_singlestep", "sa_solver", "unipc")
_BOUND = 1e-3  # weight of the whole variational bound: lambda of Nichol and Dhariwal
# Random numbers of one kind are others than those of the noise, whose offset is the step.
_DROP_STREAM = 1 << 61
START_STREAM = -1  # of sampling, whose steps count from 0

Condition = Mapping[str, Any]


class Losses(NamedTuple):
    """What :meth:`Diffusion.losses` returns, all float32, ``(B,)``.

    Attributes:
        total: to be minimised, in the mean.
        squared: the weighted mean square error of each sample.
        bound: its term of the variational bound in bits per number; 0 without learned variances.
        timesteps: that the model got.
    """

    total: Tensor
    squared: Tensor
    bound: Tensor
    timesteps: Tensor


@dataclasses.dataclass(frozen=True)
class Diffusion(Noising):
    """What a diffusion model learns and how it is sampled: schedule, times, prediction, loss.

    All its fields are plain values: ``Diffusion(**diffusion.config)`` is the same again.

    Args:
        schedule: ``"flow"``, or the variances of :class:`mmfast.schedule.NoiseSchedule`:
            ``"linear"``, ``"scaled_linear"``, ``"squared_cosine"``, ``"sigmoid"``, ``"laplace"`` or
            ``"exponential"``.
        prediction: ``"epsilon"``, ``"v_prediction"``, ``"flow_prediction"`` or ``"sample"``;
            ``"flow_prediction"`` for flows by default, else ``"epsilon"``.
        num_steps: T, timesteps. A flow's model is told t T.
        times: of training: ``"uniform"``, or ``"logit_normal"``: sigmoid of a normal number
            (Esser et al. 2024, arXiv 2403.03206), 1 being noise.
        times_mean, times_std: of that normal number.
        shift: of a flow's times, for training and sampling: more noise for more tokens.
        weighting: of the loss: None, ``"min_snr"``, ``"soft_min_snr"`` or ``"max_snr"``.
        beta_start, beta_end: of linear, scaled_linear and sigmoid schedules.
        zero_snr: no signal is left at the last step (Lin et al. 2024, arXiv 2305.08891).
        data_mean, data_std: the data is normalised with, and samples are brought back: a number or
            one for each channel. For latents, which have any scale.

    Raises:
        ValueError: an unknown name, or options that exclude each other.
    """

    def losses(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        *,
        seed: int | Tensor | None = None,
        offset: int | Tensor = 0,
        rows: Tensor | None = None,
        condition: Condition | None = None,
        drop: float | None = None,
    ) -> Losses:
        """The loss of each sample: :class:`Losses`.

        Args:
            model: called as ``model(x, timesteps, **condition)``. It returns a tensor like x, or
                something whose first item is one. One with twice x's channels, dimension 1, has
                predicted variances too: they learn from the variational bound, as in DiT
                (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 16).
            x0: the data, ``(B, C, ...)``, floating.
            seed, offset, rows: of :meth:`noised`.
            condition: further arguments of the model.
            drop: probability with which a sample loses its condition, for guidance: the model gets
                ``drop``, ``(B,)``, bool, made of the seed. Without, a model draws it for itself.

        Raises:
            TypeError: x0 is no tensor of floating numbers.
            ValueError: shapes do not fit, or variances were predicted for a flow.
        """
        x0 = self.normalized(x0)
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=x0.device)
        batch = self.noised(x0, seed=seed, offset=offset, rows=rows)
        given = dict(condition or {})
        if drop is not None:
            given["drop"] = uniform((x0.shape[0],), seed, offset + _DROP_STREAM, x0.device) < drop
        output = _first(model(batch.noisy, batch.timesteps, **given))
        learned = output.dim() > 1 and output.shape[1] == 2 * x0.shape[1]
        prediction, variance = output.chunk(2, 1) if learned else (output, None)
        if prediction.shape != x0.shape:
            raise ValueError(
                f"the model must give {tuple(x0.shape)}, or twice the channels for learned "
                f"variances, got {tuple(output.shape)}"
            )
        error = (prediction.float() - batch.target.float()).square().flatten(1).mean(1)
        squared = error * batch.weight.float()
        bound = torch.zeros_like(squared)
        if variance is not None:
            bound = variational_bound(
                self.on(x0.device, "bound")[batch.rows].float(),
                batch.rows == 0,
                x0,
                batch.noisy,
                prediction,
                variance,
            )
        total = squared + _BOUND * self.num_steps * bound
        return Losses(total, squared, bound, batch.timesteps)

    def loss(self, model: Callable[..., Any], x0: Tensor, **options: Any) -> Tensor:
        """The mean of :meth:`losses`, which says what the options are. ``()``, float32."""
        return self.losses(model, x0, **options).total.mean()

    def table(
        self,
        sampler: str | None = None,
        steps: int = 50,
        *,
        grid: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SamplerTable:
        """A sampler for what the model was trained on, for :func:`mmfast.schedule.sample`.

        Args:
            sampler: one of :data:`SAMPLERS`; ``"flow_euler"`` for flows by default, else
                ``"dpm_solver"``.
            steps: S.
            grid: further arguments of the schedule's ``grid``, such as ``{"spacing": "trailing"}``.
            options: of the sampler. ``clip=1.0`` keeps the clean sample from -1 to 1, normalised.

        Raises:
            ValueError: an unknown sampler, or one that does not serve this schedule.
        """
        flow = isinstance(self.levels, FlowSchedule)
        if sampler is None:
            sampler = "flow_euler" if flow else "dpm_solver"
        check_choice("sampler", sampler, SAMPLERS)
        places = {} if flow else {"skip_last": sampler in _PLACE_ONE_MORE}
        visited = self.levels.grid(steps, **{**places, **(grid or {})})
        made: SamplerTable = getattr(samplers, sampler)(
            visited, prediction=self.prediction, **options
        )
        return made

    def sample(
        self,
        model: nn.Module,
        shape: Sequence[int],
        *,
        classes: Tensor | None = None,
        condition: Condition | None = None,
        guidance: float | Tensor = 1.0,
        sampler: str | None = None,
        steps: int = 50,
        seed: int | Tensor = 0,
        table: SamplerTable | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Tensor:
        """Draw samples; the model is in evaluation mode meanwhile.

        Args:
            model: as of :meth:`losses`. With guidance, its ``for_guidance(**condition)`` gives the
                arguments of a batch twice as long whose first half has no condition:
                :class:`mmfast.models.DiT` has it.
            shape: ``(B, C, ...)``.
            classes: ``(B,)``, int64: short for ``condition={"y": classes}``.
            condition: further arguments of the model.
            guidance: the scale of classifier-free guidance, a number or ``(B,)``; 1 is none.
            sampler, steps, options: of :meth:`table`. ``"ddpm"`` takes the model's variances if it
                predicts them.
            seed: an int, or an int64 tensor ``(B,)`` with which a sample does not depend on the
                others.
            table: of a sampler, instead of all of those.
            progress: show a bar.

        Returns:
            ``(B, C, ...)``, float32, on the model's device; normalised data is brought back.

        Raises:
            ValueError: both ``classes`` and ``condition`` hold labels, ``classes`` are not of B
                samples, guidance has no condition or the model no ``for_guidance``, or as of
                :func:`mmfast.schedule.sample`.
        """
        parameter = next(model.parameters(), torch.empty(0))
        device = parameter.device
        given = dict(condition or {})
        if classes is not None:
            if "y" in given:
                raise ValueError("classes and condition['y'] cannot both be given")
            if classes.shape != (shape[0],):
                raise ValueError(
                    f"classes must be (B,) = ({shape[0]},), got {tuple(classes.shape)}"
                )
            given["y"] = classes
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        learned = bool(getattr(model, "learn_sigma", False))
        if table is None:
            if learned and sampler == "ddpm":
                options.setdefault("variance", "learned_range")
            table = self.table(sampler, steps, **options)
        if isinstance(guidance, Tensor) or guidance != 1:
            if not hasattr(model, "for_guidance"):
                raise ValueError(
                    f"guidance needs a model with for_guidance, a {type(model).__name__} has none"
                )
            if not given:
                raise ValueError("guidance needs a condition: give classes or condition")
            given = model.for_guidance(**given)  # type: ignore[operator]
        if isinstance(seed, Tensor):
            seed = seed.to(device)
        call: Callable[..., Any] = model
        if learned and not table.learned_variance:

            def call(*args: Any, **kwargs: Any) -> Tensor:
                return _first(model(*args, **kwargs)).chunk(2, 1)[0]

        noise = mmfast.randn(shape, seed=seed, offset=START_STREAM, device=device)
        with evaluating(model):
            drawn = sample(
                call,
                noise,
                table,
                model_kwargs=given,
                guidance_scale=guidance,
                seed=seed,
                progress=progress,
                dtype=parameter.dtype,
            )
        return self.restored(drawn)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and as it was behind."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
