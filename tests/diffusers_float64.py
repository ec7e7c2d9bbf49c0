"""diffusers' schedulers in double precision, so that they can be compared to many digits.

They compute in float32. Here their modules are loaded once more with that dtype's name replaced.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor


@functools.cache
def module(name: str) -> types.ModuleType:
    """``diffusers.schedulers.scheduling_<name>`` in float64."""
    found = importlib.util.find_spec(f"diffusers.schedulers.scheduling_{name}")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text().replace("float32", "float64")
    loaded = types.ModuleType(f"diffusers.schedulers.float64_{name}")
    loaded.__package__ = "diffusers.schedulers"
    sys.modules[loaded.__name__] = loaded  # dataclasses look there
    exec(compile(source, found.origin, "exec"), loaded.__dict__)
    return loaded


@contextmanager
def double() -> Iterator[None]:
    """Tensors without a dtype are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def scheduler(name: str, cls: str, **config: object):
    """The class ``cls`` of :func:`module`, made with ``config``."""
    with double():
        return getattr(module(name), cls)(**config)


def loop(
    name: str,
    made,
    model: Callable[[Tensor, float], Tensor],
    x: Tensor,
    noises: Tensor,
    begin: int = 0,
    **options: object,
) -> list[Tensor]:
    """Samples after each call of the model, with ``noises[i]`` in call i."""
    loaded = module(name)
    samples = []
    made._step_index = None
    if begin:
        made.set_begin_index(begin)
    with double(), pytest.MonkeyPatch.context() as patched:
        for i, t in enumerate(made.timesteps[begin:]):
            patched.setitem(loaded.__dict__, "randn_tensor", lambda *a, _i=i, **k: noises[_i])
            scaled = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
            x = made.step(model(scaled, float(t)), t, x, return_dict=False, **options)[0]
            samples.append(x)
    return samples
