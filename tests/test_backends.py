"""The choice of a backend: automatic, forced, refused."""

from __future__ import annotations

import dataclasses
import platform
import sys

import pytest
import torch
from cases import backends_here, device_of, normal

import mmfast
from mmfast import backends
from mmfast.ops import nearest_code
from mmfast.registry import OPS, Backend, register

WITH_CPP = [op for op in OPS.values() if "cpp" in op.backends]
WITH_TRITON = [op for op in OPS.values() if "triton" in op.backends]
BUILT = not backends.extension_missing()


def always_missing() -> list[str]:
    return ["broken on purpose"]


@pytest.mark.skipif(not BUILT, reason="the compiled extension is absent")
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="no C++ kernels here"
)
@pytest.mark.parametrize("op", WITH_CPP, ids=lambda op: op.name)
def test_cpp_is_chosen_on_the_cpu(op):
    chosen, against = backends.automatic(op, "cpu")
    assert chosen == "cpp"
    assert "cpp" not in against
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mmfast::{op.name}", "CPU")


@pytest.mark.skipif(BUILT, reason="the compiled extension is there")
@pytest.mark.parametrize("op", WITH_CPP, ids=lambda op: op.name)
def test_the_reference_serves_without_the_extension(op):
    chosen, against = backends.automatic(op, "cpu")
    assert chosen == "reference"
    assert "the compiled extension is absent" in against["cpp"][0]


@pytest.mark.cuda
@pytest.mark.parametrize("op", WITH_TRITON, ids=lambda op: op.name)
def test_triton_is_chosen_on_cuda(op):
    chosen, against = backends.automatic(op, "cuda")
    assert chosen == "triton"
    assert against["cpp"] == ["runs on cpu, not on cuda"]


def test_reasons_against_every_other_backend():
    op = dataclasses.replace(
        nearest_code.OP,
        backends={
            "first": dataclasses.replace(backends.cpp("nearest_code"), missing=always_missing),
            "second": dataclasses.replace(backends.cpp("nearest_code"), missing=list),
            "third": dataclasses.replace(backends.cpp("nearest_code"), missing=list),
        },
    )
    assert backends.automatic(op, "cpu") == (
        "second",
        {"first": ["broken on purpose"], "third": ["second is preferred"]},
    )
    chosen, against = backends.automatic(op, "cuda")
    assert chosen == "reference"
    assert against["first"] == ["broken on purpose", "runs on cpu, not on cuda"]


@pytest.mark.parametrize("name", backends_here(nearest_code.OP))
def test_forced_backend_is_the_one_that_runs(name, monkeypatch):
    ran = []
    select = backends.select

    def watch(op, chosen, *args):
        ran.append(chosen)
        return select(op, chosen, *args)

    monkeypatch.setattr(backends, "select", watch)
    x, codebook = (t.to(device_of(name)) for t in (normal(5, 3), normal(4, 3)))
    expected = mmfast.nearest_code(x, codebook)
    assert ran == []
    with mmfast.use_backend(name):
        got = mmfast.nearest_code(x, codebook)
    assert ran == [name]
    mmfast.nearest_code(x, codebook)
    assert ran == [name]
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


def test_blocks_nest_and_end_after_an_error():
    with mmfast.use_backend("reference"):
        with pytest.raises(mmfast.BackendError), mmfast.use_backend("cuda"):
            mmfast.nearest_code(normal(5, 3), normal(4, 3))
        assert backends._forced == "reference"
    assert backends._forced is None


def test_unknown_backend():
    message = "backend must be one of reference, cpp, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=f"^{message}$"), mmfast.use_backend("gpu"):
        pass


def test_backend_that_the_op_lacks():
    message = "^nearest_code has no backend 'cuda'; it has reference, cpp, triton$"
    with mmfast.use_backend("cuda"), pytest.raises(mmfast.BackendError, match=message):
        mmfast.nearest_code(normal(5, 3), normal(4, 3))


@pytest.mark.skipif(backends.interpreting(), reason="Triton's interpreter takes CPU tensors")
@pytest.mark.skipif(bool(backends.triton_missing()), reason="triton is not installed")
def test_triton_refuses_the_cpu():
    message = (
        "^nearest_code: backend 'triton' cannot serve this call: "
        "a tensor is on cpu: Triton needs CUDA, or TRITON_INTERPRET=1$"
    )
    with mmfast.use_backend("triton"), pytest.raises(mmfast.BackendError, match=message):
        mmfast.nearest_code(normal(5, 3), normal(4, 3))


@pytest.mark.skipif(not BUILT, reason="the compiled extension is absent")
def test_cpp_refuses_other_devices():
    message = "a tensor is on meta: the C\\+\\+ kernels need the CPU"
    with mmfast.use_backend("cpp"), pytest.raises(mmfast.BackendError, match=message):
        mmfast.nearest_code(normal(5, 3).to("meta"), normal(4, 3).to("meta"))


def test_missing_backend_says_why(monkeypatch):
    broken = Backend("cpp", ("cpu",), lambda: None, always_missing, backends.always)
    monkeypatch.setitem(nearest_code.OP.backends, "cpp", broken)
    message = "^nearest_code: backend 'cpp' cannot serve this call: broken on purpose$"
    with mmfast.use_backend("cpp"), pytest.raises(mmfast.BackendError, match=message):
        mmfast.nearest_code(normal(5, 3), normal(4, 3))


def test_an_error_of_the_extension_is_kept(monkeypatch):
    monkeypatch.setattr(backends, "extension", lambda: ImportError("undefined symbol: thing"))
    assert backends.extension_missing() == [
        "the compiled extension is absent (undefined symbol: thing)"
    ]


def test_op_registered_twice():
    with pytest.raises(ValueError, match="op 'nearest_code' is registered twice"):
        register(nearest_code.OP)
