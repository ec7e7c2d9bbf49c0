"""The loop around a sampler: call the model, go a step, as often as the table has rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast import backends, philox
from mmfast.checks import check_device, check_floating
from mmfast.memory import empty_like, new_empty
from mmfast.progress import progress_bar
from mmfast.regions import setting
from mmfast.schedule.layout import Layout, N
from mmfast.schedule.table import SamplerTable, row_numbers
from mmfast.schedule.threshold import dynamic_threshold

Callback = Callable[[int, Tensor, Tensor], None]


def sample(
    model: Callable[..., Any],
    x: Tensor,
    table: SamplerTable,
    *,
    image: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float | Tensor = 1.0,
    dynamic_threshold: tuple[float, float] | None = None,
    seed: int | Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    dtype: torch.dtype | None = None,
    cuda_graph: bool | str = False,
) -> Tensor:
    """Draw samples from a diffusion or flow model.

    Args:
        model: called as ``model(x, t, **model_kwargs)`` with x ``(B, ...)`` and t ``(B,)``, the
            timestep: int64 if all of the table's are whole, else float32. It returns a tensor like
            x, or something whose first item is one. For tables with learned variances it has twice
            the channels, dimension 1, the variances behind.
        x: ``(B, ...)`` standard normal noise. It is scaled as the table asks for.
        table: of a sampler, such as ``mmfast.schedule.dpm_solver(schedule.grid(20))``.
        image: start from this, ``(B, ...)``, with as much of the noise x as the table's first row
            expects: build the table on a grid with ``start`` above 0.
        model_kwargs: further arguments of the model.
        guidance_scale: of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), a
            number or ``(B,)``. Unless it is the number 1, the model gets x twice, ``(2 B, ...)``,
            and its arguments must hold the unconditional half first.
        dynamic_threshold: quantile and maximum of :func:`dynamic_threshold`, such as (0.995, 1.5).
            Samplers built with ``clip=math.inf`` take also the noise from what is left.
        seed: of the noise that stochastic samplers add, an int or an int64 tensor, ``()`` or
            ``(B,)``; drawn from torch's generator if not given. See :func:`mmfast.sampler_step`.
        callback: called after each row as ``callback(i, x, denoised)`` with the sample and the
            prediction of the clean one. The next step overwrites both.
        progress: show a bar on the terminal's standard error.
        dtype: of what the model gets; x's if not given. The running sample and the history are kept
            in float32, or float64 if x is.
        cuda_graph: True or ``"step"``: capture a step, the model in it, as a CUDA graph and replay
            it for each row. ``"loop"``: capture all steps as one graph; it leaves no time between
            them for a callback. The model must be capturable. To sample again without a new capture
            use :class:`SampleLoop`.

    Returns:
        ``(B, ...)``, x's dtype.

    Raises:
        TypeError: x is not of floating numbers, or the model returns none.
        ValueError: shapes do not fit, ``cuda_graph`` elsewhere than on CUDA, or a callback inside a
            graph of the whole loop.
    """
    loop = SampleLoop(
        model,
        x,
        table,
        model_kwargs=model_kwargs,
        guidance_scale=guidance_scale,
        dynamic_threshold=dynamic_threshold,
        dtype=dtype,
        cuda_graph=cuda_graph,
        keep_denoised=callback is not None,
    )
    return loop.run(x, image=image, seed=seed, callback=callback, progress=progress)


class SampleLoop:
    """What :func:`sample` runs, with its buffers, to be run again.

    The table lies in a buffer on the device, and so does the number of the row: :meth:`set_table`
    puts another sampler, schedule or guidance interval in place without a new capture.

    Args:
        model: as of :func:`sample`.
        x: like the noise of the runs: shape, dtype and device count.
        table: of a sampler.
        model_kwargs: as of :func:`sample`. With ``cuda_graph`` its tensors are read in place at
            each run: copy new values into them.
        guidance_scale: as of :func:`sample`.
        dynamic_threshold: as of :func:`sample`.
        dtype: as of :func:`sample`.
        cuda_graph: as of :func:`sample`.
        keep_denoised: have :attr:`denoised` written, for callbacks.

    Raises:
        ValueError: as of :func:`sample`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        table: SamplerTable,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor = 1.0,
        dynamic_threshold: tuple[float, float] | None = None,
        dtype: torch.dtype | None = None,
        cuda_graph: bool | str = False,
        keep_denoised: bool = False,
    ) -> None:
        check_floating("x", x)
        if x.dim() < 1:
            raise ValueError("x must be (B, ...), got a number")
        if not isinstance(table, SamplerTable):
            raise TypeError(f"table must be a SamplerTable, got {type(table).__name__}")
        if cuda_graph not in (False, True, "step", "loop"):
            raise ValueError(f"cuda_graph must be a bool, 'step' or 'loop', got {cuda_graph!r}")
        if cuda_graph and x.device.type != "cuda":
            raise ValueError(f"cuda_graph needs x on a CUDA device, got {x.device}")
        if dynamic_threshold is not None:
            ratio, maximum = dynamic_threshold
            if not (0 <= ratio <= 1 and maximum > 0):
                raise ValueError(
                    "dynamic_threshold must be a quantile from 0 to 1 and a maximum above 0, "
                    f"got {dynamic_threshold}"
                )
            _check_no_churn(table)
        from mmfast.ops import sampler_step  # which imports tables from here

        self._op = sampler_step
        self._op.check_table(table.coefficients)
        device, batch = x.device, x.shape[0]
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._model = model
        self._threshold = dynamic_threshold
        self._kwargs = dict(model_kwargs or {})
        self._guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1
        self._guidance = _guidance(guidance_scale, batch, device) if self._guided else None
        self._x = new_empty(x, x.shape, state)
        self._out_dtype = x.dtype
        calls = (2 if self._guided else 1) * batch
        self._input = new_empty(x, (calls, *x.shape[1:]), dtype)
        self._history = new_empty(self._x, (table.slots, *x.shape)) if table.slots else None
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self._coefficients = table.coefficients.to(device, copy=True)
        whole = bool((table.timesteps == table.timesteps.round()).all())
        self._times = table.timesteps.to(device, torch.int64 if whole else torch.float32, copy=True)
        # Without a graph each step has its row and time as views: nothing is launched for them.
        self._rows = row_numbers(len(table), device)
        self._times_of_rows = [t.expand(calls) for t in self._times.unbind()]
        self._table = table
        # Asked once: elsewhere than on the CPU the answers synchronise.
        self._stochastic, self._learned = table.stochastic, table.learned_variance
        self.denoised = empty_like(self._x) if keep_denoised else None
        self._shared_seed = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cuda_graph = bool(cuda_graph)
        self._rows_at_once = len(table) if cuda_graph == "loop" else 1

    def set_table(self, table: SamplerTable) -> None:
        """Take another table of the same number of rows and slots for the runs that follow.

        Raises:
            ValueError: its shape is another, it has broken timesteps where they were whole, or only
                one of the two takes noise or learned variances; or its predictions take noise and
                they are to be thresholded.
        """
        expected, got = self._coefficients.shape, table.coefficients.shape
        if expected != got:
            raise ValueError(
                f"the table must be {tuple(expected)} as the one before, got {tuple(got)}"
            )
        for kind, before, now in (
            ("noise", self._stochastic, table.stochastic),
            ("learned variances", self._learned, table.learned_variance),
        ):
            if before != now:
                which = "without" if now else "with"
                raise ValueError(f"the table must be {which} {kind} as the one before")
        if not self._times.is_floating_point() and bool(
            (table.timesteps != table.timesteps.round()).any()
        ):
            raise ValueError("the table must have whole timesteps as the one before")
        if self._threshold is not None:
            _check_no_churn(table)
        self._coefficients.copy_(table.coefficients)
        self._times.copy_(table.timesteps)
        self._table = table

    @torch.no_grad()
    def run(
        self,
        x: Tensor,
        *,
        image: Tensor | None = None,
        seed: int | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples: see :func:`sample`.

        Raises:
            ValueError: ``x`` or ``image`` is not like the first x, or a callback wants the denoised
                sample and ``keep_denoised`` is off.
        """
        for name, tensor in (("x", x), ("image", x if image is None else image)):
            if tensor.shape != self._x.shape:
                expected = tuple(self._x.shape)
                raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
            check_floating(name, tensor)
            check_device(buffers=self._x, **{name: tensor})
        if callback is not None and self.denoised is None:
            raise ValueError("a callback needs keep_denoised=True")
        if callback is not None and self._rows_at_once > 1:
            raise ValueError("a callback cannot be called inside a graph of the whole loop")
        if self._stochastic:
            self._set_seed(seed)
        if self._cuda_graph and self._graph is None:
            self._capture()
        alpha, sigma = self._table.start
        if image is None:
            self._x.copy_(x).mul_(self._table.initial_scale)
        else:
            self._x.copy_(x).mul_(sigma).add_(image.to(self._x.dtype), alpha=alpha)
        first = self._x * self._table.first_input_scale
        self._input.copy_(torch.cat([first, first]) if self._guided else first)
        self._step.zero_()
        with _bar(progress, len(self._table)) as done:
            for i in range(0, len(self._table), self._rows_at_once):
                if self._graph is None:
                    self._advance(self._rows[i], self._times_of_rows[i])
                else:
                    self._graph.replay()
                if callback is not None:
                    assert self.denoised is not None
                    callback(i, self._x, self.denoised)
                done(i + self._rows_at_once)
        return self._x.to(self._out_dtype, copy=True)

    def _advance_in_graph(self) -> None:
        """One step, whose row the device knows."""
        timestep = self._times.index_select(0, self._step.view(1)).expand(self._input.shape[0])
        self._advance(self._step, timestep)
        self._step.add_(1)

    def _advance(self, step: Tensor, timestep: Tensor) -> None:
        output = self._model(self._input, timestep, **self._kwargs)
        if not isinstance(output, Tensor):
            if output is None:
                raise TypeError("the model must return a tensor, or a tensor first, got None")
            output = output[0]
        variance = None
        if self._learned:
            output, variance = output.chunk(2, dim=1)
        unconditional = None
        if self._guided:
            unconditional, output = output.chunk(2)
            variance = None if variance is None else variance.chunk(2)[1]
        seed = None
        if self._stochastic:
            seed = self._seed[0] if self._shared_seed else self._seed
        threshold = None
        if self._threshold is not None:
            ratio, maximum = self._threshold
            threshold = dynamic_threshold(
                self._x,
                output,
                self._coefficients.index_select(0, step.view(1))[0],
                unconditional=unconditional,
                guidance=self._guidance,
                ratio=ratio,
                maximum=maximum,
            )
        # The rest are buffers that were made to fit.
        shape, device, check = self._x.shape, self._x.device, self._op.check_numbers
        check("model_output", output, shape, device)
        if unconditional is not None:
            check("unconditional", unconditional, shape, device)
        if variance is not None:
            check("variance", variance, shape, device)
        backends.call(
            self._op.OP, self._x, output, unconditional, 1.0, self._guidance, self._coefficients,
            step, None, seed, variance, threshold, self._x, self._history, self.denoised,
            self._input,
        )  # fmt: skip

    def _set_seed(self, seed: int | Tensor | None) -> None:
        device = self._seed.device
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)
        drawn = philox.as_stream(seed, device, "seed")
        if drawn.shape not in ((), self._seed.shape):
            expected = tuple(self._seed.shape)
            raise ValueError(f"seed must be () or (B,) = {expected}, got {tuple(drawn.shape)}")
        shared = drawn.dim() == 0
        if self._graph is not None and shared != self._shared_seed:
            raise ValueError("seed must be one for all, or one for each, as when it was captured")
        self._shared_seed = shared
        self._seed.copy_(drawn)

    def _capture(self) -> None:
        # Warm up on the capture's stream, as libraries make their workspaces at the first call.
        # PyTorch's own stream for captures is of the device that the process captured on first.
        with torch.cuda.device(self._x.device), _no_casts_kept():
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._x.zero_()
            self._input.zero_()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step.zero_()
                    self._advance_in_graph()
            main.wait_stream(side)
            self._step.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for _ in range(self._rows_at_once):
                    self._advance_in_graph()
        self._graph = graph


def _check_no_churn(table: SamplerTable) -> None:
    """The table's predictions take no noise, else ValueError."""
    if bool((table.coefficients[:, Layout.DENOISED + N] != 0).any()):
        raise ValueError("not possible: dynamic_threshold with churn")


def _guidance(scale: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """(1 or B, 2) factors of the conditional and the unconditional output."""
    scales = torch.as_tensor(scale, dtype=torch.float32, device=device).reshape(-1)
    if scales.shape[0] not in (1, batch):
        raise ValueError(f"guidance_scale must be a number or (B,) = ({batch},)")
    return torch.stack([scales, 1 - scales], 1)


def _no_casts_kept() -> contextlib.AbstractContextManager[None]:
    """Weights are cast by each call under autocast: those it keeps are gone at its end."""
    return setting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False)


@contextlib.contextmanager
def _bar(progress: bool, rows: int) -> Iterator[Callable[[int], None]]:
    """What the loop calls after each row: a progress bar, or nothing."""
    if not progress:
        yield lambda done: None
        return
    with progress_bar("sampling") as bar:
        task = bar.add_task("", total=rows)
        yield lambda done: bar.update(task, completed=done)
