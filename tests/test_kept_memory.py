"""Memory of outputs: what is kept, for whom, and what a tensor in it can do."""

import copy
import io
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import threading

import pytest
import torch

import mmfast
from mmfast import backends, library, memory

pytestmark = [
    pytest.mark.skipif(bool(backends.extension_missing()), reason="needs the extension"),
    pytest.mark.skipif(backends.interpreting(), reason="of the C++ kernels"),
]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_kept():
    memory.empty_cache()
    assert memory.kept_bytes() == 0
    yield
    memory.empty_cache()


def _noise(numbers: int, seed: int = 0) -> torch.Tensor:
    return mmfast.randn((numbers,), seed=seed)


def test_memory_of_an_output_serves_the_next():
    first = _noise(MIB)
    place = first.data_ptr()
    assert memory.kept_bytes() == 0
    del first
    assert 4 * MIB <= memory.kept_bytes() < 5 * MIB
    second = _noise(MIB)
    assert second.data_ptr() == place
    assert memory.kept_bytes() == 0


def test_rooms_of_products_serve_outputs():
    x, weight = torch.randn(256, 4096), torch.randn(16, 4096)  # activated rows take 4 MiB
    made = torch.ops.mmfast.linear(x, weight, None, "gelu", "float32")
    assert made.nbytes < MIB // 4
    before = memory.kept_bytes()
    assert before >= 4 * MIB
    output = _noise(MIB)
    assert memory.kept_bytes() <= before - 4 * MIB
    del output


def test_free_neighbours_are_one_again():
    outputs = [_noise(MIB, seed) for seed in range(4)]
    expected = [t.clone() for t in outputs]
    places = [t.data_ptr() for t in outputs]
    del outputs[1], outputs[1]
    larger = _noise(2 * MIB)
    assert larger.data_ptr() == places[1]
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[3])


def test_what_comes_and_goes_in_any_order_stays_apart():
    generator = random.Random(0)
    alive: list[tuple[torch.Tensor, float]] = []
    for step in range(400):
        if alive and generator.random() < 0.5:
            tensor, value = alive.pop(generator.randrange(len(alive)))
            assert bool((tensor == value).all())
        like = torch.empty(generator.randrange(1, 600) << 10)
        alive.append((memory.empty_like(like).fill_(step), step))
        if step % 100 == 50:
            memory.empty_cache()
    assert all(bool((tensor == value).all()) for tensor, value in alive)
    del alive, tensor
    assert memory.kept_bytes() > 0


def test_empty_cache_leaves_what_is_in_use():
    used, free = _noise(MIB), _noise(MIB)
    expected = used.clone()
    del free
    memory.empty_cache()
    assert memory.kept_bytes() == 0
    assert torch.equal(used, expected)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_empty_cache_gives_back_what_lies_behind_a_hole():
    hole, used, guard = _noise(16 * MIB), _noise(16 * MIB), _noise(MIB)
    del hole
    memory.empty_cache()
    del used  # one range with the hole now, and its pages are the last
    hole = library.new_output(guard, [16 * MIB], torch.float32)
    before = _resident()
    memory.empty_cache()
    assert memory.kept_bytes() == 0
    assert before - _resident() > 56 * MIB
    assert hole.data_ptr() < guard.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.complex128, torch.uint32])
def test_dtypes_that_no_kernel_writes_are_torchs(dtype):
    out = memory.empty_like(torch.empty(MIB, dtype=dtype))
    assert out.dtype == dtype
    out.untyped_storage().resize_(0)  # kept memory could not


def test_outputs_start_with_cache_lines_at_different_places():
    outputs = [_noise(MIB) for _ in range(8)]
    starts = [t.data_ptr() for t in outputs]
    assert all(start % 64 == 0 for start in starts)
    assert len({start % 4096 for start in starts}) == len(starts)


def test_small_outputs_are_torchs():
    out = _noise(1000)
    del out
    assert memory.kept_bytes() == 0


def test_views_hold_the_memory():
    out = _noise(MIB)
    view, expected = out[5:10], out[5:10].clone()
    del out
    others = [_noise(MIB, seed) for seed in range(1, 4)]
    assert torch.equal(view, expected)
    del others, view
    assert memory.kept_bytes() >= 16 * MIB


def test_what_torch_does_with_tensors_works_in_kept_memory():
    out = _noise(MIB)
    expected = torch.empty(MIB).copy_(out)
    assert torch.equal(copy.deepcopy(out), expected)
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert (out.numpy() == expected.numpy()).all()
    shared = out.share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, expected)


def test_gradients_lie_in_kept_memory_and_outlive_the_graph():
    x = torch.randn(256, 1024, requires_grad=True)
    mmfast.gated_activation(x).sum().backward()
    expected = x.grad.clone()
    for seed in range(3):
        _noise(x.numel(), seed)
    assert torch.equal(x.grad, expected)
    x.grad = None
    assert memory.kept_bytes() >= MIB


def test_empty_like_keeps_strides_and_dtypes():
    x = torch.randn(64, 128, 256)
    assert memory.empty_like(x).shape == x.shape
    assert memory.empty_like(x, torch.float64).dtype == torch.float64
    assert memory.empty_like(x.transpose(0, 2)).stride() == x.transpose(0, 2).stride()
    assert memory.new_empty(x, (3, 5), torch.int64).dtype == torch.int64
    assert memory.kept_bytes() >= x.numel() * 8


def test_empty_like_of_fake_and_mapped_tensors_is_torchs():
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(512, 1024))
        assert isinstance(memory.empty_like(fake), FakeTensor)
    x = torch.randn(4, 512, 1024)
    mapped = torch.vmap(lambda row: memory.empty_like(row).zero_() + row)(x)
    assert torch.equal(mapped, x)


def test_threads_take_and_give_at_once():
    failures = []

    def work(seed):
        expected = mmfast.randn((MIB // 8,), seed=seed).clone()
        for _ in range(200):
            if not torch.equal(mmfast.randn((MIB // 8,), seed=seed), expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _in_child(queue):
    torch.set_num_threads(1)
    out = mmfast.gated_activation(torch.ones(1024, 1024))
    queue.put(float(out[0, 0]))


def test_a_forked_process_has_memory_of_its_own():
    torch.set_num_threads(1)
    kept = _noise(MIB)
    expected = kept.clone()
    spare = _noise(MIB)
    del spare
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    value = queue.get(timeout=60)
    child.join()
    assert child.exitcode == 0
    assert value == float(mmfast.gated_activation(torch.ones(1, 1)))
    assert torch.equal(kept, expected)


@pytest.mark.parametrize(("mib", "kept"), [(0, False), (1, True), (64, True)])
def test_the_environment_says_how_much_is_kept(mib, kept):
    program = (
        "import mmfast\n"
        "from mmfast import memory\n"
        "for _ in range(40):\n"
        "    mmfast.randn((1 << 19,), seed=0)\n"
        "out = [mmfast.randn((1 << 19,), seed=0) for _ in range(80)]\n"
        "del out\n"
        "print(memory.kept_bytes())\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={"MMFAST_KEPT_MIB": str(mib), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (int(printed) > 0) == kept
    assert int(printed) <= mib * MIB


def test_no_addresses_are_reserved_where_they_are_limited():
    program = (
        "import mmfast\n"
        "out = mmfast.randn((1 << 19,), seed=0)\n"
        "print(out.untyped_storage().resizable())\n"
    )
    limit = 1 << 40  # far more than the machine's memory
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == "True\n"


def test_an_amount_that_is_no_number_is_refused():
    failed = subprocess.run(
        [sys.executable, "-c", "import mmfast"],
        env={"MMFAST_KEPT_MIB": "many", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert "MMFAST_KEPT_MIB must be a whole number of MiB, got 'many'" in failed.stderr
