"""The loop as a graph: what is captured, with operations recorded in the place of a GPU's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from sampling import START
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import mmfast.schedule as S

VP = S.NoiseSchedule.from_betas()


class Stream:
    def wait_stream(self, _: Stream) -> None:
        pass


def same(tree: Any) -> Any:
    """The tensors in it, by others of the same memory."""
    return tree_map_only(Tensor, Tensor.detach, tree)


class Graph(TorchDispatchMode):
    """Runs again what ran inside, on the same tensors: no Python in between, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        given = same((args, kwargs or {}))  # with the shapes of now
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *given, same(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def streams(monkeypatch) -> list[Stream]:
    """Those that something ran on, that of the capture last."""
    used: list[Stream] = []

    @contextlib.contextmanager
    def on(stream: Stream):
        used.append(stream)
        yield

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream | None = None):
        used.append(stream)
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return used


def captured(*args: Any, rows: int = 1, **options: Any) -> S.SampleLoop:
    """A loop as on a GPU."""
    loop = S.SampleLoop(*args, **options)
    loop._cuda_graph, loop._rows_at_once = True, rows
    return loop


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 0.001 * t[:, None])


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), torch.sigmoid(x)], 1)


SEEDS = torch.arange(len(START))
LOOPS = {
    "sa_solver": (
        model,
        lambda **made: S.sa_solver(VP.grid(6, skip_last=True), **made),
        {"predict_x0": False},
        {},
    ),
    "guided": (
        model,
        lambda **made: S.euler_ancestral(VP.grid(6), **made),
        {"eta": 0.5},
        {"guidance_scale": 3.0},
    ),
    "thresholded": (
        model,
        lambda **made: S.dpm_solver(VP.grid(6, skip_last=True), **made),
        {"solver_type": "heun"},
        {"guidance_scale": torch.linspace(1, 3, len(START)), "dynamic_threshold": (0.9, 2.0)},
    ),
    "learned": (
        learned,
        lambda **made: S.ddpm(VP.grid(6), variance="learned_range", **made),
        {"clip": 1.0},
        {},
    ),
}


@pytest.mark.parametrize("whole", [False, True], ids=["step", "loop"])
@pytest.mark.parametrize("name", LOOPS)
def test_replays_are_the_loop(streams, name, whole):
    network, make, other, options = LOOPS[name]
    first, second = make(), make(**other)
    x = START.float()
    plain = S.SampleLoop(network, x, first, **options)
    graph = captured(network, x, first, rows=len(first) if whole else 1, **options)
    before = None
    for table in (first, second):
        plain.set_table(table)
        graph.set_table(table)
        for seed in (1, 2):
            found = graph.run(x * seed, seed=seed)
            assert torch.equal(found, plain.run(x * seed, seed=seed))
            assert before is None or not torch.equal(found, before)
            before = found
    assert len(streams) == 2
    assert streams[0] is streams[1]  # which need not be a stream of the first graph's device


def test_seeds_of_samples_are_read_at_each_replay(streams):
    table = S.ddpm(VP.grid(5))
    x = START.float()
    plain, graph = S.SampleLoop(model, x, table), captured(model, x, table, rows=len(table))
    for seeds in (SEEDS, SEEDS + 7):
        assert torch.equal(graph.run(x, seed=seeds), plain.run(x, seed=seeds))
    with pytest.raises(ValueError, match="one for all, or one for each, as when it was captured"):
        graph.run(x, seed=3)


def test_weights_are_cast_inside_the_graph(streams):
    layer = torch.nn.Linear(START.shape[1], START.shape[1])
    table = S.ddim(VP.grid(4))
    x = START.float()
    loops = [
        captured(lambda x, t: layer(x), x, table, rows=4),
        S.SampleLoop(lambda x, t: layer(x), x, table),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)  # a cast that autocast keeps
        assert torch.equal(loops[0].run(x), loops[1].run(x))
        assert torch.is_autocast_cache_enabled()
    torch.nn.init.normal_(layer.weight, std=0.1)  # and drops at its end
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loops[0].run(x), loops[1].run(x))
