"""Schedulers of EDM's preconditioning."""

from __future__ import annotations

import math
from typing import Any

from mmfast import schedule
from mmfast.integrations.diffusers.tables.program import Options, Points, Program, grid_of, host
from mmfast.integrations.diffusers.tables.sigmas import churn_options, churned
from mmfast.integrations.diffusers.tables.solvers import multistep
from mmfast.schedule import Grid


def _edm(s: Any, begin: int) -> Grid:
    sigma_data, sigmas = s.config.sigma_data, host(s.sigmas)
    return grid_of(
        host(s.timesteps),
        [(1.0, sigma) for sigma in sigmas],
        begin,
        points_of=Points(sigma_data),
        scales=[1 / math.hypot(sigma_data, sigma) for sigma in sigmas],
        sigma_data=sigma_data,
    )


def _edm_prediction(s: Any) -> str:
    return "edm" if s.config.prediction_type == "epsilon" else "edm_v"


def edm_euler(s: Any, begin: int, options: Options) -> Program:
    """options: those of the churn, and whether the prediction itself is given."""
    *churn, given = options
    prediction = "sample" if given else _edm_prediction(s)
    table = schedule.edm_euler(_edm(s, 0), prediction=prediction, **churn_options(tuple(churn)))
    return Program(table, churned(host(s.sigmas), tuple(churn)))


def edm_dpm(s: Any, begin: int, options: Options) -> Program:
    return multistep(s, schedule.edm_dpm, _edm(s, begin), _edm_prediction(s))
