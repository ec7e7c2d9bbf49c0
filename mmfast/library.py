"""The only file that talks to torch.library: schemas, fakes and Python-side kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from mmfast.registry import Backend, Backward, Op

NAMESPACE = "mmfast"

_library = torch.library.Library(NAMESPACE, "DEF")

# Dispatch keys of the Python-side backends. C++ kernels register themselves when the extension
# is loaded, so "cpu" is absent here.
_KEYS = {"cuda": "CUDA"}

below_autograd = torch._C._AutoDispatchBelowAutograd

_overloads: dict[str, Callable[..., Any]] = {}
_functions: dict[str, Callable[..., Any]] = {}  # of ops with gradients

# Arguments that are nothing but what they say: no subclass of a tensor, no symbol of a tracer.
_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None), list, tuple}
_PLAIN |= {torch.Size, torch.dtype}


def _lazy(backend: Backend) -> Callable[..., Any]:
    """A kernel that loads its backend at the first call (Triton is slow to import)."""

    run: Callable[..., Any] | None = None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        if run is None:
            run = backend.load()
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # What torch.no_grad() does, in a tenth of its time.
        torch._C._set_grad_enabled(False)
        try:
            return run(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return kernel


def _setup(backward: Backward, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # A gradient that nobody asks for costs nothing, instead of a tensor of zeros.
    ctx.set_materialize_grads(False)
    backward.setup(ctx, inputs, output)


class _Once(torch.autograd.Function):
    """Copies of the first ``count`` tensors, which depend on the others too, and whose gradient
    raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(ctx.message)


class _Unpacked:
    """A context whose saved tensors have been read: checkpoints give them once."""

    def __init__(self, ctx: Any, saved: tuple[Any, ...]) -> None:
        self._ctx = ctx
        self.saved_tensors = saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _gradients(name: str, backward: Backward) -> Callable[..., Any]:
    """Those of ``backward``, whose own gradients raise: nothing computes them, and a penalty on
    gradients would be left out in silence."""
    if backward.differentiable:
        return backward.gradients
    message = (
        f"trying to differentiate twice: the gradients of mmfast.{name} have none of their own; "
        "use a formulation in plain PyTorch where gradients of gradients are needed"
    )

    def gradients(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward.gradients(ctx, *grads)
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
            raise NotImplementedError(message)  # what they depend on is lost with their batch
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward.gradients(_Unpacked(ctx, saved), *grads)
        found = found if isinstance(found, tuple) else (found,)
        made = [g is not None and all(g is not given for given in grads) for g in found]
        there = [g for g, own in zip(found, made, strict=True) if own]
        sources = [t for t in (*grads, *saved) if t is not None]
        refusing = iter(_Once.apply(message, len(there), *there, *sources) if there else ())
        return tuple(next(refusing) if own else g for g, own in zip(found, made, strict=True))

    return gradients


def differentiable(
    op: Op, run: Callable[..., Any], again: Callable[[], Any] = contextlib.nullcontext
) -> Callable[..., Any]:
    """``run``, with the gradients of ``op``; these are computed inside ``again()``."""
    assert op.backward is not None
    backward, gradients = op.backward, _gradients(op.name, op.backward)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _setup(backward, ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with again():
                return gradients(ctx, *grads)

    return Function.apply


def _function(name: str, backward: Backward, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What torch's kernel for autograd does with an op and ``backward``, in half its time: there
    are no defaults to fill in, no arguments to flatten and no dispatch keys to carry along."""

    gradients = _gradients(name, backward)

    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = kernel(*args)
        _setup(backward, ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    # torch's name, by which profiles show both.
    name = f"GeneratedBackwardFor_{NAMESPACE}_{name}_default"
    function: Any = type(name, (torch.autograd.Function,), members)
    # What torch.autograd.Function's own does where no transform looks on.
    apply = super(torch.autograd.Function, function).apply
    alive = torch._C._functorch.unwrap_if_dead

    def applied(*args: Any) -> Any:
        return apply(*[alive(a) if isinstance(a, torch.Tensor) else a for a in args])

    return applied


def define(op: Op) -> None:
    """Define ``torch.ops.mmfast.<op.name>`` with its reference, fake and Python-side kernels."""
    _library.define(op.name + op.schema)
    qualified = f"{NAMESPACE}::{op.name}"
    _library.impl(op.name, torch.no_grad()(op.reference), "CompositeExplicitAutograd")
    if op.backward is None:
        # Outputs that require no gradient say so; torch's fallback would warn only when one is
        # asked for, and give none.
        _library.impl(op.name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(
            qualified,
            _gradients(op.name, op.backward),
            setup_context=functools.partial(_setup, op.backward),
            lib=_library,
        )
    torch.library.register_fake(qualified, op.fake, lib=_library)
    taken: set[str] = set()
    for backend in op.backends.values():
        if backend.name == "cpp" or backend.missing():
            continue
        for device_type in backend.device_types:
            key = _KEYS.get(device_type)
            if key is not None and key not in taken:
                _library.impl(op.name, _lazy(backend), key)
                taken.add(key)
    if op.vmap is not None:
        torch.library.register_vmap(qualified, op.vmap, lib=_library)
    _overloads[op.name] = getattr(getattr(torch.ops, NAMESPACE), op.name).default
    if op.backward is not None:
        _functions[op.name] = _function(op.name, op.backward, _overloads[op.name])


def _new_output(like: torch.Tensor, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
    return like.new_empty(sizes, dtype=dtype)


# Room for an output; in the extension's memory where its kernels would put theirs.
_library.define("new_output(Tensor like, int[] sizes, ScalarType dtype) -> Tensor")
_library.impl("new_output", _new_output, "CompositeExplicitAutograd")
_library.impl("new_output", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::new_output", _new_output, lib=_library)
new_output: Callable[..., torch.Tensor] = torch.ops.mmfast.new_output.default


# A copy that stays one. Inductor takes ``clone`` for its input, even where the forward changes that
# in place and the backward wants what it was.
_library.define("copied(Tensor t) -> Tensor")
_library.impl("copied", torch.clone, "CompositeExplicitAutograd")
torch.library.register_autograd(f"{NAMESPACE}::copied", lambda _, grad: grad, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::copied", torch.clone, lib=_library)


def copied(t: torch.Tensor) -> torch.Tensor:
    """``t.clone()``, compiled too."""
    return torch.ops.mmfast.copied.default(t) if torch.compiler.is_compiling() else t.clone()


def overload(name: str) -> Callable[..., Any]:
    """The bound ``.default`` overload: the cheapest way into the dispatcher."""
    return _overloads[name]


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """``op`` through the dispatcher, by the cheapest way that gives what all others give."""
    kernel = _overloads[op.name]
    if op.backward is None:
        return kernel(*args)
    if forward_ad._current_level >= 0:
        check_underived(op, args)
    if traced():
        if _differentiated():
            return differentiable(op, lambda *args: run(op, args))(*args)
        return kernel(*args)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        with below_autograd():
            return kernel(*args)
    return (_functions[op.name] if _simple(args) else kernel)(*args)


def traced() -> bool:
    """Whether a compiler or a transform of torch.func looks on."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _simple(args: tuple[Any, ...]) -> bool:
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
        and _PLAIN.issuperset(map(type, args))
    )


def unwatched(args: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd wants to know of a call: no tracer, transform, mode or class."""
    return not traced() and _simple(args)


def derived(args: tuple[Any, ...]) -> bool:
    """Whether an argument carries a tangent, which a kernel would drop."""
    return forward_ad._current_level >= 0 and any(
        isinstance(a, torch.Tensor) and _has_tangent(a) for a in args
    )


def _has_tangent(tensor: torch.Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def check_underived(op: Op, args: tuple[Any, ...]) -> None:
    """Refuse tangents.

    Raises:
        NotImplementedError: an argument carries one.
    """
    if derived(args):
        raise NotImplementedError(
            f"mmfast.{op.name} has no forward-mode derivative, which torch.func.jvp or a dual "
            "tensor asked for; use gradients, or a formulation in plain PyTorch"
        )


def _differentiated() -> bool:
    """Whether torch.func.grad or one like it wants gradients, for which torch's kernel for autograd
    cannot serve."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return False
    stack = functorch.get_interpreter_stack() or []
    return any(transform.key() == functorch.TransformType.Grad for transform in stack)


def untracked(args: tuple[Any, ...]) -> bool:
    """Whether autograd's kernel of an op, which is Python and slow, would do nothing.

    Inside torch.func's transforms that can't be known: gradients may be asked for further down.
    """
    return not traced() and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))


def tracked(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is wanted of any of them, or a tangent carried by one."""
    if derived(tensors):
        return True
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch._C._any_requires_grad(*tensors)
