"""Which backend serves a call: the dispatcher's choice, or one that the user forces."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmfast import library
from mmfast.registry import Backend, Op

NAMES = ("reference", "cpp", "triton", "cuda")

_forced: str | None = None


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; the message lists the reasons."""


@functools.cache
def extension() -> Any:
    """The compiled extension ``mmfast._C``, or the ImportError that loading it raised."""
    try:
        return importlib.import_module("mmfast._C")
    except ImportError as error:
        return error


def extension_missing() -> list[str]:
    """Why the compiled extension is not there; empty when it is."""
    loaded = extension()
    if not isinstance(loaded, ImportError):
        return []
    return [f"the compiled extension is absent ({loaded})"]


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_missing() -> list[str]:
    """Why Triton cannot run at all; empty when it can."""
    return [] if _has_triton() else ["the package triton is not installed"]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton_device(*tensors: torch.Tensor) -> list[str]:
    """Reasons against Triton because of where the tensors live."""
    if interpreting():
        return []
    return [
        f"a tensor is on {t.device}: Triton needs CUDA, or TRITON_INTERPRET=1"
        for t in tensors
        if t.device.type != "cuda"
    ][:1]


def on_cpu(*tensors: torch.Tensor) -> list[str]:
    """Reasons against the C++ kernels because of where the tensors live."""
    return [
        f"a tensor is on {t.device}: the C++ kernels need the CPU"
        for t in tensors
        if t.device.type != "cpu"
    ][:1]


def always(*_: Any) -> list[str]:
    """``supported`` of a backend with nothing against any argument."""
    return []


def cpp(name: str) -> Backend:
    """The C++ backend of op ``name``: what the dispatcher holds for CPU tensors."""
    return Backend(
        name="cpp",
        device_types=("cpu",),
        load=lambda: library.overload(name),
        missing=extension_missing,
        supported=lambda *args: on_cpu(*(a for a in args if isinstance(a, torch.Tensor))),
    )


def triton(load: Callable[[], Callable[..., Any]], supported: Callable[..., list[str]]) -> Backend:
    """The Triton backend of an op; ``supported`` adds reasons of the op's own."""

    def reasons(*args: Any) -> list[str]:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        return on_triton_device(*tensors) + supported(*args)

    return Backend("triton", ("cuda",), load, triton_missing, reasons)


def forced() -> str | None:
    """The backend of the innermost :func:`use_backend`, if any."""
    return _forced


def isa() -> str:
    """The instruction set of the C++ kernels here; empty without them."""
    return "" if extension_missing() else extension().isa()


# What torch.compiler.assume_constant_result does, which imports the compiler: a second.
isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every mmfast op inside the block on backend ``name``, or raise.

    The setting holds for the whole process, as ``torch.backends`` flags do.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: ``name`` is none of these.
        BackendError: (by the op called inside) the backend cannot serve the call; says why.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def call(op: Op, *args: Any) -> Any:
    """Run ``op`` on checked arguments: through the dispatcher, or on the forced backend."""
    if op.mutates:
        # No kernel says that it changed them; autograd would use what it saved, changed.
        torch.autograd.graph.increment_version(op.changed(args))
    return call_on_new(op, *args)


def call_on_new(op: Op, *args: Any) -> Any:
    """:func:`call` where the arguments that the op changes are new: autograd has saved none."""
    if _forced is None:
        return library.run(op, args)
    run = select(op, _forced, *args)
    if op.backward is not None and _forced != "reference":
        library.check_underived(op, args)
    if op.backward is None or not torch.is_grad_enabled():
        with torch.no_grad():
            return run(*args)
    return library.differentiable(op, run, functools.partial(use_backend, _forced))(*args)


def select(op: Op, name: str, *args: Any) -> Callable[..., Any]:
    """The callable of backend ``name``.

    Raises:
        BackendError: it cannot serve ``args``; the message gives every reason.
    """
    if name == "reference":
        return op.reference
    backend = op.backends.get(name)
    if backend is None:
        have = ", ".join(["reference", *op.backends])
        raise BackendError(f"{op.name} has no backend {name!r}; it has {have}")
    reasons = backend.missing() or backend.supported(*args)
    if reasons:
        raise BackendError(
            f"{op.name}: backend {name!r} cannot serve this call: {'; '.join(reasons)}"
        )
    return backend.load()


def automatic(op: Op, device_type: str) -> tuple[str, dict[str, list[str]]]:
    """The backend that serves ``op`` on ``device_type`` here, and the reasons against others."""
    against: dict[str, list[str]] = {}
    chosen = "reference"
    for name, backend in op.backends.items():
        reasons = list(backend.missing())
        if device_type not in backend.device_types:
            reasons.append(f"runs on {', '.join(backend.device_types)}, not on {device_type}")
        if reasons:
            against[name] = reasons
        elif chosen == "reference":
            chosen = name
        else:
            against[name] = [f"{chosen} is preferred"]
    return chosen, against
