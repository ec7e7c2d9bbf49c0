"""The training loop."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.data import write_image
from mmfast.data.errors import needed
from mmfast.data.sampling import Samples
from mmfast.nn.ranks import several
from mmfast.train import checkpoint, distributed
from mmfast.train.batches import Batches, Micros
from mmfast.train.config import TrainConfig
from mmfast.train.ema import Averages
from mmfast.train.logs import Log
from mmfast.train.model_file import write_model
from mmfast.train.optimizer import (
    clip_gradients,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
)
from mmfast.train.progress import TrainingProgress
from mmfast.train.run_folder import claim, write_config
from mmfast.train.state import gathered_state, load_state, named_state
from mmfast.train.stopping import Stopped, stop_signals
from mmfast.train.task import Step, Task
from mmfast.train.window import NonFiniteError, Window
from mmfast.version import __version__


class Fit(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        model: a copy in evaluation mode, with the averaged weights; None on other processes than
            the first.
        step: how many steps have been made.
        row: the last row of the log.
    """

    model: Any
    step: int
    row: dict[str, float]


def fit(
    task: Task,
    config: TrainConfig,
    data: Mapping[str, Tensor] | Samples,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    described: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fit:
    """Train the model of a task.

    Under ``torchrun`` all processes call it alike, and their result is that of one process with
    the joined batches. A run that is killed and resumed on the same machine ends with the bits of
    one that was not.

    Args:
        task: the model and its losses.
        config: how.
        data: named tensors ``(N, ...)``, or samples by index, such as :class:`mmfast.data.Dataset`.
        out: folder for checkpoints, the log, pictures and the model; nothing is written without.
        resume: go on from the newest complete checkpoint in ``out``, if there is one.
        described: further settings to keep in ``config.json``.
        progress: show loss, speed and time left on standard error.

    Raises:
        FileExistsError: ``out`` holds a run, and ``resume`` is not set.
        ImportError: safetensors is not installed, in which checkpoints are written.
        NonFiniteError: a loss or gradient was not finite; the message names the step. The last
            checkpoint, which is older, remains.
        Stopped: Ctrl-C or a termination signal came.
        ValueError: settings do not fit each other, the model, the data or the checkpoint.
    """
    device = distributed.device_named(config.device)
    distributed.join_processes(device)
    with _algorithms(config.deterministic), stop_signals() as stop:
        return _Training(task, config, data, device, out, resume, described, progress).run(stop)


class _Training:
    """One call of :func:`fit`; see its arguments."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        data: Any,
        device: torch.device,
        out: Path | str | None,
        resume: bool,
        described: Mapping[str, Any] | None,
        progress: bool,
    ) -> None:
        self.task, self.config, self.device = task, config, device
        self.main = distributed.rank() == 0
        self.out = None if out is None else Path(out)
        self.batches = Batches(data, config, device)
        if config.gradient_checkpointing and not hasattr(task.model, "gradient_checkpointing"):
            raise ValueError(f"a {type(task.model).__name__} has no gradient_checkpointing")
        loaded = distributed.from_first(lambda: self._open(resume))
        task.to(device)
        task.model.train()
        distributed.same_as_first(named_state(task.model).values())
        self.averages = Averages(task.model, config.ema, main=self.main)
        if config.gradient_checkpointing:
            task.model.gradient_checkpointing = True  # type: ignore[assignment]
        if config.compile:
            task.model.compile()
        self.wrapped = distributed.Wrapped(task, config.distributed)
        self.optimizer = make_optimizer(task.model, config)
        self.averages.follow(task.model)
        checkpoint.seed_everything(config.seed + distributed.rank())
        self.done = self.saved = 0
        if loaded is not None:
            self._load(loaded)
        if self.main and self.out is not None:
            facts = {"mmfast": __version__, **(described or {}), "train": asdict(config)}
            write_config(self.out, facts)
        log = self.out if self.main else None
        self.log = Log(log, start=self.done, tensorboard=config.tensorboard)
        self.progress = TrainingProgress(config.steps, self.done, shown=progress and self.main)
        if self.done:
            self.progress.say(f"resuming after step {self.done}")
        self.window = Window(device)
        self.row = self.log.last

    def _open(self, resume: bool) -> checkpoint.Checkpoint | None:
        """Claim the folder; what is to be resumed."""
        if self.out is None:
            return None
        needed("safetensors.torch")  # or the first checkpoint would be the first to miss it
        claim(self.out, resume)
        path = checkpoint.newest_checkpoint(self.out) if resume else None
        return None if path is None else checkpoint.read_checkpoint(path)

    def _load(self, loaded: checkpoint.Checkpoint) -> None:
        tensors, state = loaded
        if state["step"] > self.config.steps:
            raise ValueError(
                f"the run to be resumed has made {state['step']} steps, got steps = "
                f"{self.config.steps}"
            )
        if state["batch_size"] != self.config.batch_size:
            raise ValueError(
                f"the run to be resumed has batch_size {state['batch_size']}, "
                f"got {self.config.batch_size}"
            )
        self.batches.load_state(state["data"])
        load_state(self.task.model, tensors["model"], "the checkpoint")
        if self.config.ema and "ema" in tensors:
            self.averages.load(tensors["ema"])
        else:
            self.averages.follow(self.task.model)
        load_optimizer(self.task.model, self.optimizer, tensors["optimizer"])
        self.task.load_state(state["task"])
        self.done = self.saved = state["step"]
        rank = distributed.rank()
        if rank < len(state["random"]):
            prefix = f"{rank}:"
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors["random"].items()
                if name.startswith(prefix)
            }
            checkpoint.set_random_state({**state["random"][rank], "tensors": own})

    def run(self, stop: Callable[[], bool]) -> Fit:
        """Train to the end."""
        config = self.config
        try:
            with self.progress:
                batches = self.batches.from_step(self.done)
                while self.done < config.steps:
                    self._step(self.done, self._next(batches, stop))
                    self.done += 1
                    self.progress.step(self.done)
                    self._after(stop)
                if config.sample_every and self.done % config.sample_every:
                    self._picture()
        except NonFiniteError as error:
            kept = None if self.out is None else checkpoint.newest_checkpoint(self.out)
            last = "no checkpoint was written yet" if kept is None else f"{kept} is the last good"
            raise NonFiniteError(
                f"{error} of {config.steps}: {last}; a lower lr, or a longer warmup, may help"
            ) from None
        finally:
            self.log.close()
        return Fit(self.averages.model(), self.done, self.row)

    def _next(self, batches: Iterator[Micros], stop: Callable[[], bool]) -> Micros:
        """The micro-batches of the next step."""
        try:
            return next(batches)
        except RuntimeError:
            # Ctrl-C reaches the processes that read data, too, which may end.
            if not stop() or several():
                raise
            self.window.check(False)
            raise self._stopped() from None

    def _stopped(self) -> Stopped:
        """A checkpoint, and what is to be raised."""
        if self.done > self.saved:
            self._save()
        kept = None
        if self.out is not None and self.done:
            kept = checkpoint.path_of(self.out, self.done)
        return Stopped(self.done, kept)

    def _step(self, number: int, micros: Micros) -> None:
        config, wanted = self.config, self.task.wants(number)
        if wanted:
            self.wrapped.begin(self.batches.some(wanted), number)
            self.averages.follow(self.task.model)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(number)
        numbers: dict[str, Tensor] = {}
        for micro, batch in enumerate(micros):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
            ):
                losses = self.wrapped.loss(batch, Step(number, micro, len(micros)))
            (losses["loss"] / len(micros)).backward()
            for name, value in losses.items():
                share = value.detach() / len(micros)
                numbers[name] = numbers[name] + share if name in numbers else share
        numbers["grad_norm"] = clip_gradients(self.task.model, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(number)
        self.window.add(number, numbers)

    def _after(self, stop: Callable[[], bool]) -> None:
        """What follows a step: a row, a picture, a checkpoint, the end."""
        config, done = self.config, self.done
        last = done == config.steps
        row = done % config.log_every == 0 or last
        save = done % config.checkpoint_every == 0 or last
        picture = bool(config.sample_every) and done % config.sample_every == 0
        if not (row or save or picture or (stop() and not several())):
            return
        stops = self.window.check(stop())
        if row:
            self._row()
        if save:
            self._save()
        if picture:
            self._picture()
        if stops and not last:
            raise self._stopped()

    def _row(self) -> None:
        seconds = self.log.seconds + time.perf_counter() - self.progress.began
        numbers = {**self.window.means(), **self.task.metrics()}
        self.row = {
            "step": self.done,
            "seconds": round(seconds, 3),
            "lr": self.config.lr_at(self.done - 1),
            **numbers,
        }
        self.log.write(self.row)
        self.progress.row(self.done, self.row)

    def _save(self) -> None:
        """A checkpoint, and the model's file."""
        self.saved = self.done
        if self.out is None:
            return
        tensors = {
            "model": gathered_state(named_state(self.task.model)),
            "ema": gathered_state(self.averages.state()),
            "optimizer": gathered_state(optimizer_tensors(self.task.model, self.optimizer)),
        }
        every = distributed.objects_of_all(checkpoint.random_state())
        model = self.averages.model()
        if self.main:
            if not self.config.ema:
                del tensors["ema"]
            tensors["random"] = {
                f"{rank}:{name}": tensor
                for rank, state in enumerate(every)
                for name, tensor in state["tensors"].items()
            }
            state = {
                "batch_size": self.config.batch_size,
                "data": self.batches.state(),
                "task": self.task.state(),
                "random": [{**state, "tensors": None} for state in every],
            }
            checkpoint.write_checkpoint(self.out, self.done, tensors, state, self.config.keep)
            write_model(self.out, model, self.task)
        if several():
            dist.barrier()

    def _picture(self) -> None:
        """A picture of the model's samples, on the first process."""
        model = self.averages.model()
        if model is None or self.out is None:
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.config.seed)
            picture = self.task.sample(model, self.done)
        if picture is not None:
            path = self.out / "samples" / f"step-{self.done:08d}.png"
            path.parent.mkdir(exist_ok=True)
            write_image(picture, path)
            self.log.picture("samples", picture, self.done)


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """Use deterministic algorithms if asked to."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
