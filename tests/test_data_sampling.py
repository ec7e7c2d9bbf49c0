"""Batches in a seeded order: ranks, workers, and resuming in the middle of an epoch."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.data import BatchSampler, Draw, InMemory, Loader, collate, length_mask


def take(batches, count):
    """The next so many batches, over epochs."""
    made = []
    while len(made) < count:
        for batch in batches:
            made.append(batch)
            if len(made) == count:
                break
    return made


@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**40)
)
def test_ranks_share(length, batch, ranks, drop_last, seed):
    """All ranks' batches, together, are those of one process."""
    options = {"seed": seed, "drop_last": drop_last}
    if drop_last and length < batch * ranks:
        with pytest.raises(ValueError, match="do not fill one batch"):
            BatchSampler(length, batch, rank=0, world_size=ranks, **options)
        return
    whole = BatchSampler(length, batch * ranks, rank=0, world_size=1, **options)
    parts = [BatchSampler(length, batch, rank=r, world_size=ranks, **options) for r in range(ranks)]
    for epoch in range(2):
        joined = list(whole)
        lists = [list(part) for part in parts]
        assert [len(part) for part in parts] == [len(batches) for batches in lists]
        for i, want in enumerate(joined):
            assert [x for batches in lists if i < len(batches) for x in batches[i]] == want
        seen = [index for b in joined for index in b]
        assert len(set(seen)) == len(seen) == (len(whole) * batch * ranks if drop_last else length)
        assert all(index.epoch == epoch for index in seen)


def test_order():
    first, second = (list(BatchSampler(100, 10, seed=3)) for _ in range(2))
    assert first == second
    assert first != list(BatchSampler(100, 10, seed=4))
    sampler = BatchSampler(100, 10, seed=3)
    assert (list(sampler), sampler.epoch) == (first, 1)
    assert list(sampler) != first
    assert list(BatchSampler(5, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]
    draw = pickle.loads(pickle.dumps(Draw(7, 3)))
    assert (draw, draw.epoch) == (7, 3)


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 12])
def test_resumes(taken):
    sampler = BatchSampler(23, 4, seed=1)
    take(sampler, taken)
    state = json.loads(json.dumps(sampler.state_dict()))
    want = take(sampler, 9)
    resumed = BatchSampler(23, 4, seed=1)
    resumed.load_state_dict(state)
    assert take(resumed, 9) == want
    # Two ranks take up what one process did, as long as their batches are as large together.
    pair = [BatchSampler(23, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for half in pair:
        half.load_state_dict(state)
    halves = [take(half, 9) for half in pair]
    assert [a + b for a, b in zip(*halves, strict=True)] == want


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 24}, "saved sampler had length 24, this one 23"),
        ({"seed": 5}, "saved sampler had seed 5, this one 1"),
        ({"shuffle": False}, "saved sampler had shuffle False"),
        ({"samples": 6}, "at sample 6 of an epoch, where no batch of 4 begins"),
    ],
)
def test_refuses_other_states(changed, message):
    sampler = BatchSampler(23, 4, seed=1)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **changed})


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "rank": 2}])
def test_refuses(options):
    with pytest.raises(ValueError, match="batch_size must be at least 1 and rank below"):
        BatchSampler(9, **options, world_size=2)


class Rows(torch.utils.data.Dataset):
    """Samples that say with which index and epoch they were asked for."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"index": torch.tensor(int(index)), "epoch": torch.tensor(index.epoch)}


def asked(loader, count):
    return [(b["index"].tolist(), b["epoch"].tolist()) for b in take(loader, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes(workers):
    """In the middle of an epoch, of which workers have fetched more than was handed out."""
    want = asked(Loader(Rows(), 3, seed=2), 10)
    assert [epochs[0] for _, epochs in want] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = Loader(Rows(), 3, seed=2, workers=workers)
    assert asked(loader, 4) == want[:4]
    state = loader.state_dict()
    assert (state["epoch"], state["samples"]) == (1, 3)
    resumed = Loader(Rows(), 3, seed=2, workers=workers)
    resumed.load_state_dict(state)
    assert asked(resumed, 6) == want[4:]
    assert torch.equal(torch.get_rng_state(), before)
    endless = loader.forever()
    assert [next(endless)["index"].tolist() for _ in range(6)] == [i for i, _ in want[4:]]


def test_in_memory():
    data = InMemory(image=torch.arange(12.0).reshape(6, 2), label=torch.arange(6))
    assert len(data) == 6
    assert torch.equal(data[4]["image"], torch.tensor([8.0, 9.0]))
    batches = list(Loader(data, 2, seed=1))
    assert [b["image"].shape for b in batches] == [(2, 2)] * 3
    for batch in batches:
        assert torch.equal(batch["image"][:, 0], 2.0 * batch["label"])
    part = data.subset(torch.tensor([5, 1]))
    assert part[0]["label"] == 5
    plain = next(iter(torch.utils.data.DataLoader(data, 3, collate_fn=data.collate)))
    assert torch.equal(plain["label"], torch.arange(3))
    for tensors in ({}, {"a": torch.zeros(2), "b": torch.zeros(3)}):
        with pytest.raises(ValueError, match="must have one length N"):
            InMemory(**tensors)


def test_collate():
    samples = [{"text": torch.arange(1, n), "x": torch.tensor(n)} for n in (3, 5, 1)]
    batch = collate(samples, {"text": 9})
    assert batch["text"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [9, 9, 9, 9]]
    assert batch["x"].tolist() == [3, 5, 1]
    mask = length_mask(torch.tensor([2, 4, 0]), 4)
    assert torch.equal(mask, batch["text"] != 9)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "the same names, got a and b"),
        ([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 3)}], "a must be of one shape"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2, 2)}], "a must be of one shape"),
    ],
)
def test_collate_refuses(samples, message):
    with pytest.raises(ValueError, match=message):
        collate(samples)
