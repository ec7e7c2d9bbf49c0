"""A sampler as a table: one row of coefficients per evaluation of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.schedule.layout import HISTORY, Layout, M, N, P, X


class Linear:
    """A weighted sum of a step's sources: what samplers write their equations with."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        self.weights = dict(weights)

    def __add__(self, other: Linear | int) -> Linear:
        if other == 0:  # the start of sum()
            return self
        if not isinstance(other, Linear):
            return NotImplemented
        total = dict(self.weights)
        for source, weight in other.weights.items():
            total[source] = total.get(source, 0.0) + weight
        return Linear(total)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Linear:
        return Linear({source: weight * float(factor) for source, weight in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        return Linear({source: weight / float(divisor) for source, weight in self.weights.items()})

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear) -> Linear:
        return self + -other

    def __repr__(self) -> str:
        names = {X: "x", M: "m", N: "n", P: "p"}
        terms = (f"{w:+g} {names.get(s, f'h{s - HISTORY}')}" for s, w in self.weights.items())
        return f"Linear({' '.join(terms)})"


x = Linear({X: 1.0})
model_output = Linear({M: 1.0})
noise = Linear({N: 1.0})
denoised = Linear({P: 1.0})
zero = Linear({})


@dataclass(frozen=True)
class SamplerTable:
    """A sampler, ready to run.

    Attributes:
        coefficients: (S, columns) float64, a row per evaluation of the model; see
            :mod:`mmfast.schedule.layout`.
        slots: tensors of history that its steps keep.
        timesteps: (S,) float64: what the model is told at each row.
        initial_scale: of the noise that sampling starts from.
        first_input_scale: of the first row's model input; the later ones are in the table.
        start: alpha and sigma of the first sample, to start from an image: alpha x0 + sigma n.
    """

    coefficients: Tensor
    slots: int
    timesteps: Tensor
    initial_scale: float = 1.0
    first_input_scale: float = 1.0
    start: tuple[float, float] = (0.0, 1.0)

    def __len__(self) -> int:
        return self.coefficients.shape[0]

    @property
    def layout(self) -> Layout:
        """Where things stand in a row."""
        return Layout(self.slots)

    @property
    def stochastic(self) -> bool:
        """Whether any step takes noise."""
        layout = self.layout
        columns = [Layout.DENOISED + N, Layout.NEXT + N]
        columns += [layout.slot(s) + N for s in range(self.slots)]
        return bool((self.coefficients[:, columns] != 0).any())

    @property
    def learned_variance(self) -> bool:
        """Whether any step scales its noise by a variance that the model predicts."""
        return bool((self.coefficients[:, Layout.LOG_SCALE + 1] != 0).any())

    def guided_between(self, low: float, high: float) -> SamplerTable:
        """With guidance at the timesteps from low to high only.

        Kynkäänniemi et al. 2024 (arXiv 2404.07724).
        """
        coefficients = self.coefficients.clone()
        inside = (self.timesteps >= low) & (self.timesteps <= high)
        coefficients[:, Layout.GUIDANCE] = inside.to(coefficients)
        return replace(self, coefficients=coefficients)

    def to(self, device: torch.device | str) -> SamplerTable:
        """The same on ``device``."""
        return replace(
            self, coefficients=self.coefficients.to(device), timesteps=self.timesteps.to(device)
        )


class TableBuilder:
    """Fills a :class:`SamplerTable` row by row, from equations in :class:`Linear`.

    Args:
        ring: how many of the pushed values are remembered: ``last(1)`` is the newest.
        keep: names of values that stay until they are written again.
    """

    def __init__(self, *, ring: int = 0, keep: Sequence[str] = ()) -> None:
        self._ring = ring
        self._names = {name: ring + i for i, name in enumerate(keep)}
        self._layout = Layout(ring + len(keep))
        self._pushed = 0
        self._rows: list[list[float]] = []
        self._timesteps: list[float] = []

    def last(self, k: int) -> Linear:
        """The value that was pushed k pushes ago, before this row's own.

        Raises:
            ValueError: none was, or it is forgotten.
        """
        if not 1 <= k <= min(self._ring, self._pushed):
            raise ValueError(
                f"last({k}): {self._pushed} values were pushed, {self._ring} are remembered"
            )
        return Linear({HISTORY + (self._pushed - k) % self._ring: 1.0})

    @property
    def pushed(self) -> int:
        """How many values can be asked of :meth:`last`."""
        return min(self._ring, self._pushed)

    def kept(self, name: str) -> Linear:
        """The value last written to ``name``."""
        return Linear({HISTORY + self._names[name]: 1.0})

    def row(
        self,
        timestep: float,
        *,
        next: Linear,
        denoised: Linear = zero,
        clip: float | tuple[float, float] | None = None,
        push: Linear | None = None,
        keep: Mapping[str, Linear] | None = None,
        log_scale: tuple[float, float] = (0.0, 0.0),
        input_scale: float = 1.0,
        guidance: float = 1.0,
    ) -> None:
        """Add a step.

        Args:
            timestep: what the model is told here.
            next: the next sample, of all sources.
            denoised: the prediction of the clean sample, of x, the model's output and the noise.
            clip: the range it is clamped to, or c for -c to c.
            push: a value to remember.
            keep: values to keep by name.
            log_scale: bias and factor of the logarithm of the noise's scale, for a model that
                predicts variances.
            input_scale: of ``next``, when the model gets it.
            guidance: 1 where guidance holds, 0 outside its interval.

        Raises:
            ValueError: a coefficient is not finite, ``denoised`` asks for what is not there yet, or
                ``clip`` is no range.
        """
        layout = self._layout
        row = [0.0] * layout.columns

        def put(start: int, value: Linear, sources: int) -> None:
            for source, weight in value.weights.items():
                if weight and source >= sources:
                    raise ValueError(f"denoised may hold x, the model's output and noise: {value}")
                if not math.isfinite(weight):
                    raise ValueError(f"row {len(self._rows)} has a coefficient {weight}: {value}")
                row[start + source] = weight if source < sources else 0.0

        put(Layout.DENOISED, denoised, P)
        clip = math.inf if clip is None else clip
        low, high = clip if isinstance(clip, tuple) else (-clip, clip)
        if not low < high:
            raise ValueError(
                f"clip must be a number above 0, or a low and a higher one, got {clip}"
            )
        row[Layout.LOW], row[Layout.HIGH] = low, high
        row[Layout.LOG_SCALE : Layout.LOG_SCALE + 2] = log_scale
        row[Layout.GUIDANCE] = guidance
        row[Layout.INPUT_SCALE] = input_scale
        put(Layout.NEXT, next, layout.sources)
        for s in range(layout.slots):
            row[layout.slot(s) + HISTORY + s] = 1.0
        written = {self._names[name]: value for name, value in (keep or {}).items()}
        if push is not None:
            written[self._pushed % self._ring] = push
        for s, value in written.items():
            row[layout.slot(s) + HISTORY + s] = 0.0
            put(layout.slot(s), value, layout.sources)
        self._pushed += push is not None
        self._rows.append(row)
        self._timesteps.append(float(timestep))

    def build(
        self,
        *,
        initial_scale: float = 1.0,
        first_input_scale: float = 1.0,
        start: tuple[float, float] = (0.0, 1.0),
    ) -> SamplerTable:
        """The table of the rows so far."""
        return SamplerTable(
            torch.tensor(self._rows, dtype=torch.float64).view(-1, self._layout.columns),
            self._layout.slots,
            torch.tensor(self._timesteps, dtype=torch.float64),
            initial_scale,
            first_input_scale,
            start,
        )


def row_numbers(rows: int, device: torch.device) -> list[Tensor]:
    """Tensors of the numbers from 0 on, for a step of a sampler.

    Each begins at a multiple of 16 bytes, as all memory that is new: kernels are compiled for what
    does, and once more for what does not.
    """
    numbers = torch.arange(rows, device=device)
    return list(torch.stack([numbers, numbers], 1)[:, 0].unbind())
