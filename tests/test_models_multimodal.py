"""MultimodalDiT and MultimodalDiffusion: any subset conditions the rest."""

from __future__ import annotations

import json

import pytest
import torch
from cases import normal
from whole_models import assert_sound, randomise

from mmfast.models import (
    Diffusion,
    MultimodalDiffusion,
    MultimodalDiT,
    load_model,
    save_model,
)

IMAGE = {"type": "patches", "size": [4, 4], "channels": 2, "patch_size": 2}
SOUND = {"type": "patches", "size": [6], "channels": 1, "patch_size": 2, "mean": 3.0, "std": 2.0}
WORD = {"type": "tokens", "codes": 7, "length": 3, "dim": 5}
ALL = {"image": IMAGE, "sound": SOUND, "word": WORD}


def build(modalities=ALL, **options):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "depth": 2, "num_heads": 2} | options
    return randomise(MultimodalDiT(modalities, **options)).eval()


def data(batch=4, dtype=torch.float32):
    word = torch.randint(7, (batch, 3), generator=torch.Generator().manual_seed(0))
    image = normal(batch, 2, 4, 4, dtype=dtype)
    return {"image": image, "sound": normal(batch, 1, 6, seed=1, dtype=dtype), "word": word}


def numbers(model, batch=4):
    return {name: model.modality(name).numbers(v) for name, v in data(batch).items()}


TIMES = {name: torch.tensor([0.0, 20.0, 500.0, 999.0]) for name in ALL}
LENGTHS = {"sound": torch.tensor([3, 2, 0, 3]), "word": torch.tensor([0, 3, 1, 3])}


def test_sound():
    def loss(model, dtype):
        own = getattr(model, "_orig_mod", model)
        given = {n: own.modality(n).numbers(v).to(dtype) for n, v in data(dtype=dtype).items()}
        outputs = model(given, TIMES, LENGTHS)
        return sum((o * normal(*o.shape, seed=5, dtype=dtype)).sum() for o in outputs.values())

    assert_sound(build(), loss)


def test_an_absent_modality_changes_nothing():
    model = build()
    given = numbers(model)
    with torch.no_grad():
        out = model(given, TIMES, LENGTHS)
        other = {name: v.flip(0) + 1 for name, v in given.items()}
        # What is behind the lengths, and the times of what is absent.
        there = {n: model.there(n, LENGTHS, given["image"])[..., None] for n in ("sound", "word")}
        changed = given | {"word": torch.where(there["word"], given["word"], other["word"])}
        patches = there["sound"].repeat_interleave(2, 1).mT
        changed["sound"] = torch.where(patches, given["sound"], other["sound"])
        gone = torch.where(LENGTHS["word"] == 0, 700.0, TIMES["word"])
        got = model(changed, TIMES | {"word": gone}, LENGTHS)
        torch.testing.assert_close(got["image"], out["image"], rtol=1e-5, atol=1e-5)
        # Absent in all samples is as good as not there.
        none = {"word": torch.zeros(4, dtype=torch.int64)}
        got = model(given, TIMES, LENGTHS | none)
        two = ("image", "sound")
        without = model(
            {n: given[n] for n in two}, {n: TIMES[n] for n in two}, {"sound": LENGTHS["sound"]}
        )
        torch.testing.assert_close(got["image"], without["image"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(without["image"][1], out["image"][1], rtol=1e-2, atol=1e-2)
        full = model(given, TIMES)
        mask = model(given, TIMES, {"sound": torch.full((4,), 3)}, wanted=["sound"])
        assert list(mask) == ["sound"]
        torch.testing.assert_close(mask["sound"], full["sound"], rtol=1e-5, atol=1e-5)


class Spy(torch.nn.Module):
    """Keeps what a model is given."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *given):
        self.given = given
        return self.module(*given)


def test_roles_in_training():
    model, batch = Spy(build()), 600
    there = {"image": torch.rand(batch) < 0.7, "sound": torch.rand(batch) < 0.7}
    everything = data(batch)
    objective = MultimodalDiffusion(drop=0.25)
    made = objective.losses(model, everything, lengths=there, seed=3)
    given, times, lengths = model.given
    clean = {n: model.module.modality(n).numbers(v) for n, v in everything.items()}
    targets = {name: times[name] > 0 for name in ALL}
    for name in ALL:
        assert torch.equal(given[name][~targets[name]], clean[name][~targets[name]])
        assert (given[name][targets[name]] != clean[name][targets[name]]).all()
    present = there | {"word": torch.ones(batch, dtype=torch.bool)}
    count = sum(t.int() for t in targets.values())
    assert count.min() == 1
    assert not any((targets[name] & ~present[name]).any() for name in ALL)
    for name in ALL:
        full = lengths[name] == model.module.modality(name).length
        assert (full | (lengths[name] == 0)).all()
        assert full[targets[name]].all()
        conditions = present[name] & ~targets[name]
        assert abs((~full[conditions]).float().mean() - (1 - 0.75**2)) < 0.1
    weights = [made[n] * targets[n].sum() for n in ALL]
    assert made["loss"] < sum(weights) / batch  # samples of several targets have their mean
    only = objective.losses(model, {"word": everything["word"]}, seed=3)
    torch.testing.assert_close(only["loss"], only["word"])


def test_losses_count_what_is_there():
    model, everything = build(), data()
    objective = MultimodalDiffusion(target=1.0)
    lengths = {"word": torch.tensor([1, 2, 3, 0]), "sound": torch.tensor([1, 0, 2, 3])}
    made = objective.losses(model, everything, lengths=lengths, seed=1)
    changed = dict(everything)
    changed["word"] = torch.where(
        torch.arange(3) < lengths["word"][:, None], changed["word"], 6 - changed["word"]
    )
    changed["sound"] = torch.where(
        torch.arange(6) < 2 * lengths["sound"][:, None, None], changed["sound"], 9.0
    )
    got = objective.losses(model, changed, lengths=lengths, seed=1)
    torch.testing.assert_close(got, made)


def test_a_sample_depends_on_its_own_seed_alone():
    model, everything, seeds = build(), data(), torch.tensor([4, 5, 6, 7])
    objective = MultimodalDiffusion()
    whole = objective.loss(model, everything, seed=seeds, offset=3)
    parts = [
        objective.loss(model, {n: v[i] for n, v in everything.items()}, seed=seeds[i], offset=3)
        for i in (slice(0, 3), slice(3, 4))
    ]
    torch.testing.assert_close(whole, 0.75 * parts[0] + 0.25 * parts[1])
    options = {"steps": 2, "progress": False}
    given = {"word": everything["word"]}
    drawn = objective.generate(model, ["image", "sound"], given, seed=seeds, **options)
    given = {"word": everything["word"][2:]}
    part = objective.generate(model, ["image", "sound"], given, seed=seeds[2:], **options)
    for name in ("image", "sound"):
        torch.testing.assert_close(drawn[name][2:], part[name], rtol=1e-4, atol=1e-4)


def test_guidance_is_against_nothing_given():
    model, given = build(), {"word": data()["word"], "sound": data()["sound"]}
    objective = MultimodalDiffusion()
    options = {"steps": 1, "progress": False}
    with_all = objective.generate(model, ["image"], given, **options)["image"]
    nothing = objective.generate(model, ["image"], batch=4, **options)["image"]
    guided = objective.generate(model, ["image"], given, guidance=3.0, **options)["image"]
    torch.testing.assert_close(guided, nothing + 3 * (with_all - nothing), rtol=1e-4, atol=1e-4)
    absent = {"lengths": {"word": torch.tensor([False] * 4), "sound": torch.zeros(4).long()}}
    again = objective.generate(model, ["image"], given, **absent, **options)["image"]
    torch.testing.assert_close(again, nothing, rtol=1e-5, atol=1e-5)


PREDICTIONS = [
    {"schedule": "flow"},
    {"schedule": "flow", "shift": 2.0, "prediction": "v_prediction"},
    {"schedule": "linear"},
    {"schedule": "squared_cosine", "prediction": "sample"},
    {"schedule": "linear", "prediction": "v_prediction", "zero_snr": True},
]


@pytest.mark.parametrize("options", PREDICTIONS, ids=str)
def test_a_sure_head_predicts_what_is_to_be_learned(options):
    """Of ids that it is certain of: through prediction_of to the training's target."""
    diffusion, word = Diffusion(**options), build().modality("word")
    ids = data()["word"]
    clean = word.numbers(ids)
    rows = torch.tensor([1, 300, 700, 999])
    noised = diffusion.noised(clean, seed=0, rows=rows)
    logits = 50.0 * torch.nn.functional.one_hot(ids, 7)
    made = word.prediction(logits, noised.noisy, noised.timesteps, diffusion)
    torch.testing.assert_close(made, noised.target, rtol=2e-3, atol=2e-3)
    assert torch.equal(word.data(clean + 0.1 * normal(*clean.shape)), ids)


def test_learns_each_from_the_other():
    """Six pairs of a picture and a word: generated ones belong to what was given."""
    torch.manual_seed(1)
    modalities = {
        "image": {"type": "patches", "size": [2, 2], "channels": 1, "patch_size": 1},
        "word": {"type": "tokens", "codes": 3, "length": 2, "dim": 8},
    }
    model = MultimodalDiT(modalities, hidden_size=32, depth=2, num_heads=2)
    pictures = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1],
                             [0, 1, 1, 0], [1, 0, 0, 1]]).float() * 2 - 1  # fmt: skip
    words = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2], [2, 0], [2, 1]])
    pairs = {"image": pictures.view(6, 1, 2, 2).repeat(11, 1, 1, 1), "word": words.repeat(11, 1)}
    objective = MultimodalDiffusion()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(450):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 450)
        loss = objective.loss(model, pairs, seed=0, offset=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = {"steps": 10, "progress": False}

    def right(image, word):
        same = (image.sign()[:, None] == pictures.view(6, 1, 2, 2)).flatten(2).all(2)  # [N, 6]
        return (same & (word[:, None] == words).all(2)).any(1).float().mean()

    image, word = pairs["image"], pairs["word"]
    made = objective.generate(model, ["word"], {"image": image}, **options)
    assert right(image, made["word"]) > 0.9
    made = objective.generate(model, ["image"], {"word": word}, **options)
    assert right(made["image"], word) > 0.85
    made = objective.generate(model, ["image", "word"], batch=66, **options)
    assert right(**made) > 0.3  # 1 in 24 by chance


def test_starts_as_dit_does_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model = MultimodalDiT(ALL, hidden_size=32, depth=2, num_heads=2).eval()
    assert all(o.count_nonzero() == 0 for o in model(numbers(model), TIMES).values())
    randomise(model)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", MultimodalDiT)
    given = numbers(model)
    torch.testing.assert_close(loaded(given, TIMES), model(given, TIMES), rtol=0, atol=0)
    sound = model.modality("sound")
    assert sound.numbers(torch.full((1, 1, 6), 5.0)).eq(1).all()
    assert sound.data(torch.ones(1, 1, 6)).eq(5).all()
    objective = MultimodalDiffusion(Diffusion("linear"), target=0.3, weights={"word": 2.0})
    assert MultimodalDiffusion(**json.loads(json.dumps(objective.config))) == objective


def test_training_compiles_without_a_break():
    model, objective = build(), MultimodalDiffusion()

    def step(everything, present, seed):
        return objective.loss(model, everything, lengths={"sound": present}, seed=seed, offset=5)

    given = data(), torch.tensor([True, False, True, True]), torch.tensor([4, 5, 6, 7])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), step(*given))


def test_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        losses = MultimodalDiffusion().losses(model, data(), seed=0)
    losses["loss"].backward()
    exact = MultimodalDiffusion().losses(model, data(), seed=0)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: MultimodalDiT({}), ValueError, "at least one"),
        (lambda m: MultimodalDiT({"loss": WORD}), ValueError, "none named 'loss'"),
        (
            lambda m: MultimodalDiT({"a": {"type": "pixels"}}),
            ValueError,
            "type of modality 'a' must be one of patches, tokens, got 'pixels'",
        ),
        (lambda m: m({}, {}), ValueError, "numbers must hold at least one modality"),
        (
            lambda m: m(numbers(m), {"image": TIMES["image"]}),
            ValueError,
            "modality 'sound' needs both numbers and times",
        ),
        (
            lambda m: m(numbers(m), TIMES | {"smell": TIMES["image"]}),
            ValueError,
            "modalities are image, sound, word, got 'smell'",
        ),
        (
            lambda m: m(numbers(m), TIMES, {"word": torch.ones(3).long()}),
            ValueError,
            r"times and lengths of 'word' must be \(B,\), got \(4,\) and \(3,\)",
        ),
        (
            lambda m: MultimodalDiffusion().loss(m, {"image": normal(2, 3, 4, 4)}),
            ValueError,
            r"data must be \(B, 2, 4, 4\), got \(2, 3, 4, 4\)",
        ),
        (
            lambda m: MultimodalDiffusion().loss(m, {"word": normal(2, 3)}),
            TypeError,
            "data must be int64, int32, got float32",
        ),
        (
            lambda m: MultimodalDiffusion().loss(m, {"smell": normal(2, 3)}),
            ValueError,
            "data must be of image, sound, word, got smell",
        ),
        (
            lambda m: MultimodalDiffusion().generate(m, ["word"], {"word": data()["word"]}),
            ValueError,
            "want must name others than those given",
        ),
        (
            lambda m: MultimodalDiffusion().generate(m, ["word"]),
            ValueError,
            "given and batch must say one B, got neither",
        ),
        (
            lambda m: MultimodalDiffusion(drop=1.5),
            ValueError,
            r"drop must be from 0 to 1, got 1\.5",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(build())
