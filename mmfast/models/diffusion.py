"""Training and sampling of diffusion and flow models, of one description."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmfast
from mmfast.checks import check_choice, check_floating
from mmfast.models.variational_bound import bound_rows, variational_bound
from mmfast.ops.add_noise import SIGMA, TARGETS
from mmfast.schedule import FlowSchedule, NoiseSchedule, SamplerTable, sample, samplers
from mmfast.schedule.betas import BETAS
from mmfast.schedule.weights import NAMED, logit_normal_quantile

TIMES = ("uniform", "logit_normal")
SAMPLERS = tuple(name for name in samplers.__all__ if not name.startswith("edm"))
_PLACE_ONE_MORE = ("deis", "dpm_solver", "dpm_solver_singlestep", "sa_solver", "unipc")
_BOUND = 1e-3  # weight of the whole variational bound: lambda of Nichol and Dhariwal
# Random numbers of one kind are others than those of the noise, whose offset is the step.
_TIMES_STREAM = 1 << 62
_DROP_STREAM = 1 << 61
START_STREAM = -1  # of sampling, whose steps count from 0

Condition = Mapping[str, Any]


class Noised(NamedTuple):
    """A batch to train on.

    Attributes:
        noisy: ``(B, ...)``, what the model gets.
        timesteps: ``(B,)``, likewise: int64, or float32 for flows.
        target: ``(B, ...)``, what it is to predict.
        weight: ``(B,)``, float32, of the loss.
        rows: ``(B,)``, int64: of the schedule's table, from 0 to T - 1.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor
    rows: Tensor


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
class Diffusion:
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

    schedule: str = "linear"
    prediction: str | None = None
    num_steps: int = 1000
    times: str = "uniform"
    times_mean: float = 0.0
    times_std: float = 1.0
    shift: float = 1.0
    weighting: str | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_snr: bool = False
    data_mean: float | Sequence[float] = 0.0
    data_std: float | Sequence[float] = 1.0
    levels: NoiseSchedule | FlowSchedule = dataclasses.field(init=False, repr=False, compare=False)
    _tables: dict[tuple[str, torch.device], Tensor] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        flow = self.schedule == "flow"
        check_choice("schedule", self.schedule, ("flow", *BETAS))
        check_choice("times", self.times, TIMES)
        if self.prediction is None:
            object.__setattr__(self, "prediction", "flow_prediction" if flow else "epsilon")
        assert self.prediction is not None
        check_choice("prediction", self.prediction, TARGETS)
        if self.weighting is not None:
            check_choice("weighting", self.weighting, tuple(NAMED))
        if self.times_std <= 0:
            raise ValueError(f"times_std must be above 0, got {self.times_std}")
        if not flow and self.shift != 1:
            raise ValueError(f"shift is of flows, not of schedule {self.schedule!r}")
        if flow and self.zero_snr:
            raise ValueError("zero_snr is of discrete schedules: flows end without signal anyway")
        if self.prediction == "epsilon" and (flow or self.zero_snr):
            raise ValueError(
                "prediction 'epsilon' says nothing of the sample where no signal is left: use "
                "v_prediction, flow_prediction or sample with this schedule"
            )
        for name in ("data_mean", "data_std"):
            given = getattr(self, name)
            if not isinstance(given, int | float):
                object.__setattr__(self, name, tuple(float(value) for value in given))
        if min(_numbers(self.data_std)) <= 0:
            raise ValueError(f"data_std must be above 0, got {self.data_std}")
        levels = (
            FlowSchedule(self.num_steps, self.shift)
            if flow
            else NoiseSchedule.from_betas(
                self.schedule,
                self.num_steps,
                start=self.beta_start,
                end=self.beta_end,
                zero_snr=self.zero_snr,
            )
        )
        object.__setattr__(self, "levels", levels)
        table = levels.noising_table(self.prediction, self.weighting)
        cpu = torch.device("cpu")
        self._tables["noising", cpu] = table
        # The timesteps that the model is told, of a table's rows: those of the sampling grids.
        self._tables["times", cpu] = (
            (table[:, SIGMA] * self.num_steps).float() if flow else torch.arange(self.num_steps)
        )
        self._tables["mean", cpu] = torch.tensor(_numbers(self.data_mean))
        self._tables["std", cpu] = torch.tensor(_numbers(self.data_std))
        if isinstance(levels, NoiseSchedule):
            self._tables["ratio", cpu] = levels.ratio

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, as JSON knows them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def draw(
        self,
        batch: int,
        *,
        seed: int | Tensor,
        offset: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Rows of the schedule to train at, int64, ``(B,)``: see :meth:`noised` for seed, offset.

        Args:
            batch: B.
            device: of the result; that of a tensor among seed and offset, else the CPU.
        """
        level = uniform((batch,), seed, offset + _TIMES_STREAM, device)
        if self.times == "logit_normal":
            level = logit_normal_quantile(level, self.times_mean, self.times_std)
        return (level * self.num_steps).long().clamp(max=self.num_steps - 1)

    def noised(
        self,
        x0: Tensor,
        *,
        seed: int | Tensor | None = None,
        offset: int | Tensor = 0,
        rows: Tensor | None = None,
    ) -> Noised:
        """Draw times and noise for a batch, which is normalised already.

        Args:
            x0: ``(B, ...)``, floating.
            seed: of times and noise, an int or an int64 tensor on x0's device, ``()`` or ``(B,)``;
                with one for each sample a sample's do not depend on the rest of the batch. Drawn
                from torch's generator if not given.
            offset: likewise: the step of the training. Steps have independent noise.
            rows: ``(B,)``, int64, from 0 to T - 1: instead of drawn times.

        Raises:
            TypeError, ValueError: as of :func:`mmfast.add_noise`.
        """
        check_floating("x0", x0)
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=x0.device)
        if rows is None:
            rows = self.draw(x0.shape[0], seed=seed, offset=offset, device=x0.device)
        table = self._on(x0.device, "noising")
        added = mmfast.add_noise(x0, rows, table, seed=seed, offset=offset)
        assert added.target is not None
        times = self._on(x0.device, "times")[rows]
        return Noised(added.noisy, times, added.target, added.weight, rows)

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
                self._on(x0.device, "bound")[batch.rows].float(),
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
            ValueError: both ``classes`` and ``condition`` hold labels, the model has no
                ``for_guidance``, or as of :func:`mmfast.schedule.sample`.
        """
        parameter = next(model.parameters())
        device = parameter.device
        given = dict(condition or {})
        if classes is not None:
            if "y" in given:
                raise ValueError("classes and condition['y'] cannot both be given")
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

    def prediction_of(self, denoised: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """What a model predicts that takes the clean sample for ``denoised``.

        Args:
            denoised: the clean sample, ``(B, ...)``.
            x: the noisy one, likewise.
            timesteps: that a model is told, ``(B,)``, whole or not, above 0 for flows.
        """
        last = self.num_steps - 1
        if isinstance(self.levels, FlowSchedule):
            sigma = timesteps.double() / self.num_steps
            alpha = 1 - sigma
        else:
            # As NoiseSchedule.at has it.
            ratio = self._on(x.device, "ratio")
            low = timesteps.double().clamp(0, last).floor()
            part = timesteps.double() - low
            row = low.long()
            between = torch.lerp(ratio[row], ratio[(row + 1).clamp(max=last)], part)
            found = torch.where(part == 0, ratio[row], between)
            alpha, sigma = (1 + found**2).rsqrt(), (1 + found**-2).rsqrt()
        lead = (-1, *[1] * (x.dim() - 1))
        alpha, sigma = alpha.float().view(lead), sigma.float().view(lead)
        denoised = denoised.float()
        noise = (x.float() - alpha * denoised) / sigma
        if self.prediction == "epsilon":
            made = noise
        elif self.prediction == "sample":
            made = denoised
        elif self.prediction == "v_prediction":
            made = alpha * noise - sigma * denoised
        else:
            made = noise - denoised
        return made.to(x.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        """The data ``(B, C, ...)`` with the mean 0 and the deviation 1, if ``data_mean`` and
        ``data_std`` are its own."""
        if not self._scaled:
            return x
        mean, std = self._scale(x)
        return (x - mean) / std

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalized`."""
        if not self._scaled:
            return x
        mean, std = self._scale(x)
        return x * std + mean

    @property
    def _scaled(self) -> bool:
        return self.data_mean != 0 or self.data_std != 1

    def _scale(self, x: Tensor) -> list[Tensor]:
        shape = (-1, *[1] * (x.dim() - 2))
        return [self._on(x.device, name).to(x.dtype).view(shape) for name in ("mean", "std")]

    def _on(self, device: torch.device, name: str) -> Tensor:
        """A table on ``device``; that of the bound is made when it is first asked for."""
        if (name, device) not in self._tables:
            cpu = torch.device("cpu")
            if (name, cpu) not in self._tables:
                if not isinstance(self.levels, NoiseSchedule):
                    raise ValueError(
                        "learned variances (learn_sigma) need a discrete schedule, not 'flow'"
                    )
                assert self.prediction is not None
                self._tables[name, cpu] = bound_rows(self.levels, self.prediction)
            self._tables[name, device] = self._tables[name, cpu].to(device)
        return self._tables[name, device]


def uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    offset: int | Tensor,
    device: torch.device | str | None,
) -> Tensor:
    """Numbers from 0 to 1, float32; arguments as of :func:`mmfast.randn`."""
    return torch.special.ndtr(mmfast.randn(shape, seed=seed, offset=offset, device=device))


def _numbers(value: float | Sequence[float]) -> list[float]:
    return [value] if isinstance(value, int | float) else list(value)


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
