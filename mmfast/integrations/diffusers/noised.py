"""What a scheduler does to samples besides its steps: the model's input, and noise for training."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends, library, memory
from mmfast.integrations.diffusers.placed import Placed, find
from mmfast.integrations.diffusers.state import Index
from mmfast.integrations.diffusers.tables.noising import noising, sums
from mmfast.ops.add_noise import OP as ADD_NOISE
from mmfast.ops.add_noise import add_noise
from mmfast.ops.sampler_step import OP as STEP
from mmfast.ops.sampler_step import reference
from mmfast.schedule.table import row_numbers


class Noised(Placed):
    """The model's input, and samples with the noise of their timesteps."""

    def _scale(self, sample: Tensor, *args: Any, **options: Any) -> Tensor:
        """As the library's: the sample as the model gets it."""
        if not self._scaled:
            return sample
        timestep = args[0] if args else options.get("timestep")
        state = self._state()
        index = self._index(timestep, state)
        if not self._twice:  # the library's have no such attribute
            self.is_scale_input_called = True
        scales = state.scales
        if scales is None:
            scales = state.scales = self._scales()
        if isinstance(index, int):
            return sample * scales[index]
        every = torch.tensor(scales, device=index.device)
        return sample * every.index_select(0, index.reshape(1).clamp(min=0)).to(sample)

    def _scales(self) -> list[float]:
        return [(s * s + 1) ** -0.5 for s in self._state().key[1]]

    def _noisy_points(self) -> Iterable[tuple[float, float]]:
        """alpha and sigma at each index."""
        return [(1.0, sigma) for sigma in self._state().key[1]]

    def _noisy_index(self, timesteps: Tensor, device: torch.device) -> Index:
        begin = self._begin_index
        if begin is not None:
            return begin if self._step_index is None else self._step_index
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
            places = self._state().places
            missing = len(self.timesteps) - 1 if self._missing_is_last else -1
            told = (timesteps if timesteps.dim() == 1 else timesteps.reshape(-1)).tolist()
            found = [places.get(value, missing) for value in told]
            if -1 in found:
                timestep = told[found.index(-1)]
                raise IndexError(f"timestep {timestep} is none of the scheduler's timesteps")
            return found[0] if len(found) == 1 else torch.tensor(found, device=device)
        return find(timesteps.to(device), self.timesteps.to(device), self._missing_is_last)

    def _noised(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As the library's: samples with the noise of their timesteps (B,)."""
        device, dtype = original_samples.device, original_samples.dtype
        state = self._state()
        found = state.noisy.get(device)
        if found is None:
            points = list(self._noisy_points())
            numbers = row_numbers(len(points), device)
            found = noising(points).to(device), sums(points).to(device), numbers
            state.noisy[device] = found
        table, rows, numbers = found
        index = self._noisy_index(timesteps, device)
        if not isinstance(index, Tensor):
            index = numbers[index]
        elif index.numel() == 1 and index.shape != original_samples.shape[:1]:
            index = index.reshape(())
        if noise.dtype != dtype:
            original_samples = original_samples.to(torch.promote_types(dtype, noise.dtype))
        if (
            noise.shape == original_samples.shape
            and noise.device == index.device == device
            and noise.is_floating_point()
            and original_samples.is_floating_point()
            and index.dtype == torch.int64
            and index.shape in ((), original_samples.shape[:1])
            and original_samples.dim()
        ):
            # As in a step, the public function's checks would find nothing.
            derived = library.derived((original_samples, noise))
            untracked = not derived and library.untracked((original_samples, noise))
            if untracked or derived or noise.requires_grad:
                noisy = memory.empty_like(original_samples)
                call = functools.partial(backends.call_on_new, STEP) if untracked else reference
                try:
                    call(
                        original_samples, noise, None, 1.0, None, rows, index, None, None, None,
                        None, noisy, None, None, None,
                    )  # fmt: skip
                except (IndexError, RuntimeError) as error:  # it knows of steps alone
                    _check_rows(index, len(rows), error)
                    raise
                return noisy
            made: tuple[Tensor, ...] = backends.call(
                ADD_NOISE, original_samples, index, table, noise, None, None, False
            )
            return made[0]
        return add_noise(original_samples, index, table, noise=noise, target=None).noisy


def _check_rows(index: Tensor, length: int, error: Exception) -> None:
    """That there are such rows; else it was that."""
    told = index.reshape(-1).tolist()
    for value in told:
        if not 0 <= value < length:
            raise IndexError(f"timesteps must be from 0 to {length - 1}, got {value}") from error
