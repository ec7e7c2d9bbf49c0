"""What all samplers do for a row: tell the model the time, predict, clamp, scale the next input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmfast.checks import check_choice
from mmfast.schedule.grid import Grid
from mmfast.schedule.predictions import PREDICTIONS
from mmfast.schedule.table import Linear, SamplerTable, TableBuilder, denoised

Clip = float | tuple[float, float] | None


class Steps(TableBuilder):
    """A :class:`TableBuilder` that knows the grid and what the model predicts.

    Args:
        grid: where the sampler goes.
        prediction: what the model predicts: see :mod:`mmfast.schedule.predictions`.
        clip: clamp the clean sample to -c to c, or a range. ``math.inf`` clamps nothing, but makes
            the steps follow the prediction that :func:`mmfast.sampler_step` thresholds.
        ring: pushed values to remember.
        keep: names of kept values.
    """

    def __init__(
        self,
        grid: Grid,
        prediction: str,
        clip: Clip = None,
        *,
        ring: int = 0,
        keep: Sequence[str] = (),
    ) -> None:
        check_choice("prediction", prediction, PREDICTIONS)
        super().__init__(ring=ring, keep=keep)
        self.grid = grid
        self.prediction = prediction
        self.clip = clip

    def noise(self, i: int) -> Linear:
        """The noise at point i."""
        return self.grid.noise(i, self.prediction, self.clip)

    def step(
        self,
        i: int,
        next: Linear,
        *,
        to: int | None = None,
        clean: Linear | None = None,
        push: Linear | None = None,
        keep: Mapping[str, Linear] | None = None,
        log_scale: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Add a row for a call of the model at point i.

        Args:
            i: the point.
            next: the next sample.
            to: the point where the next call is, if not i + 1.
            clean: the prediction of the clean sample, if not the grid's.
            push: a value to remember.
            keep: values to keep by name.
            log_scale: of the noise, for a model that predicts variances.
        """
        self.row(
            self.grid.timestep(i),
            next=next,
            denoised=self.grid.denoised(i, self.prediction) if clean is None else clean,
            clip=self.clip,
            push=push,
            keep=keep,
            log_scale=log_scale,
            input_scale=self.grid.scale(i + 1 if to is None else to),
        )

    def clean(self, i: int) -> Linear | None:
        """The step to point i + 1 if no noise is left there: the prediction itself. Else None."""
        alpha, sigma = self.grid.point(i + 1)
        return alpha * denoised if sigma == 0 else None

    def table(self) -> SamplerTable:
        """All rows so far."""
        return self.build(
            initial_scale=self.grid.initial_scale,
            first_input_scale=self.grid.scale(0),
            start=self.grid.point(0),
        )


def check_order(order: int, highest: int) -> None:
    """``order`` is from 1 to ``highest``, else ValueError."""
    if not 1 <= order <= highest:
        raise ValueError(f"order must be from 1 to {highest}, got {order}")
