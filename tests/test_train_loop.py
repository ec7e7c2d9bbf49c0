"""The training loop on small models."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json

import pytest
import torch
from cases import normal
from torch import nn
from training import ABOUT, CONFIG, data, dit, task, train, vqvae

import mmfast
from mmfast.models import VQVAE, Diffusion, describe_model, load_model
from mmfast.train import NonFiniteError, Task, TrainConfig, fit, read_log
from mmfast.train.checkpoint import checkpoints, newest_checkpoint, read_checkpoint
from mmfast.train.dit import LATENT, DiTTask
from mmfast.train.vqvae import VQVAETask

QUICK = {"steps": 4, "batch_size": 8, "log_every": 1, "sample_every": 0, "device": "cpu"}

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


class Line(Task):
    """A linear map of vectors (B, 3)."""

    def __init__(self, model=None):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3) if model is None else model
        self.seeds = []

    def loss(self, batch, step):
        self.seeds.append(batch["seed"])
        return {"loss": (self.model(batch["x"]) - batch["x"]).square().mean()}


def run(made, out=None, values=None, **options):
    return fit(
        made,
        TrainConfig(**QUICK | options),
        {"x": normal(32, 3)} if values is None else values,
        out=out,
        progress=False,
    )


def test_learning_rates():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [config.lr_at(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    constant = dataclasses.replace(config, schedule="constant")
    assert {constant.lr_at(step) for step in range(10, 110)} == {1.0}


def test_one_step_is_torchs():
    """Against the same step written down: gradient, norm, clipping, AdamW, averages."""
    made, by_hand = Line(), Line().model
    options = {"lr": 0.1, "warmup": 0, "clip": 0.5, "weight_decay": 0.1, "ema": 0.5}
    result = run(made, steps=2, **options, schedule="constant", batch_size=32)
    x = normal(32, 3)
    groups = [{"params": [by_hand.weight]}, {"params": [by_hand.bias], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    average = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    for step in range(2):
        loss = (by_hand(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        for name, p in by_hand.named_parameters():
            average[name].lerp_(p.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    torch.testing.assert_close(
        dict(made.model.named_parameters()), dict(by_hand.named_parameters())
    )
    torch.testing.assert_close(dict(result.model.named_parameters()), average)
    assert result.row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("case", ["vqvae", "dit"])
def test_micro_batches_make_the_step_of_the_whole(case, tmp_path):
    """Weights, codebooks and random numbers; but codes that are replaced come from the last."""
    made = []
    for parts in (1, 4):
        trained = task(case)
        if case == "vqvae":
            model = vqvae(threshold_ema_dead_code=0).double()
            trained = VQVAETask(model, ABOUT, codebook_start=1)
        config = dataclasses.replace(CONFIG, accumulate=parts)
        made.append(fit(trained, config, data(), progress=False).model.state_dict())
    torch.testing.assert_close(made[0], made[1], rtol=1e-9, atol=1e-9)


def test_seeds_are_those_of_samples():
    for parts in (1, 2):
        made = Line()
        run(made, accumulate=parts, seed=3)
        assert torch.cat(made.seeds).tolist() == [(3 << 40) + i for i in range(4 * 8)]


def test_files(tmp_path):
    """What a run leaves behind, and that the model's file is enough to use the model."""
    result = train("vqvae", tmp_path)
    rows = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert "perplexity" not in rows[0]
    assert 1 <= rows[2]["perplexity"] <= 12
    assert 0 < rows[2]["used"] <= 1
    assert rows[2]["loss"] == pytest.approx(rows[2]["reconstruction"] + rows[2]["quantizer"])
    assert result.row == rows[2]
    with Image.open(tmp_path / "samples" / "step-00000004.png") as picture:
        assert picture.size == (4 * 8 + 3 * 2, 2 * 8 + 2)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "step-00000004.png", "step-00000006.png",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["batch_size"] == 8
    path = tmp_path / "model.safetensors"
    assert describe_model(path)["about"] == {"data": ABOUT, "objective": None, "latents": None}
    loaded = load_model(path, VQVAE).double()
    x = data()["image"][:2]
    with torch.no_grad():
        want = result.model(x).reconstruction
        torch.testing.assert_close(loaded(x).reconstruction, want)
        assert not torch.equal(want, task("vqvae").model.eval()(x).reconstruction)


def test_latents_and_their_file(tmp_path):
    """A DiT in a VQ-VAE's latent space: normalised latents, and samples from the file alone."""
    first = train("vqvae", None).model.float()
    values = data(torch.float32)
    latents = first.latents(values["image"])
    made = DiTTask(
        dit(4, 4), Diffusion("squared_cosine", "v_prediction"), ABOUT, vqvae=first, pictures=6,
        sampler_steps=2,
    )  # fmt: skip
    run(made, tmp_path, values, sample_every=4)
    assert first.training is False
    described = describe_model(tmp_path / "model.safetensors")
    assert described["about"]["latents"] == {"part": "vqvae", "shape": [4, 4, 4]}
    diffusion = Diffusion(**described["about"]["objective"])
    normal_ones = diffusion.normalized(latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normal_ones.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal_ones.std(1), torch.ones(4), atol=2e-3, rtol=0)
    again = load_model(tmp_path / "model.safetensors", VQVAE, part="vqvae")
    assert all(torch.equal(a, first.state_dict()[n]) for n, a in again.state_dict().items())
    with Image.open(tmp_path / "samples" / "step-00000004.png") as picture:
        assert picture.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    # Latents that were made before train to the same weights.
    before = DiTTask(dit(4, 4), Diffusion("squared_cosine", "v_prediction"), ABOUT, vqvae=first)
    run(before, None, {LATENT: latents, "label": values["label"]})
    torch.testing.assert_close(before.model.state_dict(), made.model.state_dict())


def test_decoder_only():
    """Encoder and codebook stay as they are; the codebook is k-means of the encoder's outputs."""
    values = data(torch.float32)
    first = train("vqvae", None).model.float().state_dict()
    model = vqvae()
    kept = {n: t.clone() for n, t in first.items() if n.startswith("encoder")}
    model.load_state_dict({**model.state_dict(), **kept})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = run(VQVAETask(model, ABOUT, decoder_only=True), None, values, steps=3)
    after = result.model.state_dict()
    same = {name.split(".")[0] for name in after if torch.equal(after[name], before[name])}
    assert same == {"encoder"}
    assert result.row["loss"] == result.row["reconstruction"]
    vectors = model.latents(values["image"]).flatten(2).mT.flatten(0, 1)
    indices, _ = mmfast.nearest_code(vectors, model.quantizer.codebook)
    counts, sums = mmfast.code_statistics(vectors, indices, 12)
    means = (sums / counts[:, None])[counts > 0]
    # Codes near the means of their vectors: Lloyd's algorithm is about to end.
    error = (means - model.quantizer.codebook[counts > 0]).square().sum(1).mean()
    assert error < 0.1 * vectors.var(0).sum()
    with pytest.raises(ValueError, match="codebook_start must be 0 with decoder_only, got 3"):
        VQVAETask(model, ABOUT, decoder_only=True, codebook_start=3)


def test_shortcut_and_all_stages_start_from_the_data():
    """Before the first step: principal components, and k-means in every stage, for all that
    stages may be left out."""
    values = data(torch.float32)
    quantizer = {
        "type": "ResidualVQ",
        "dim": 4,
        "num_quantizers": 3,
        "codebook_size": 12,
        "kmeans_init": True,
        "quantize_dropout": True,
    }
    made = VQVAE(quantizer, 4, channels=1, widths=(4, 8), num_blocks=1, shortcut=True)
    want = copy.deepcopy(made)
    trained = VQVAETask(made, ABOUT)
    trained.begin({"image": values["image"]}, 0)
    want.initialize_shortcut([values["image"]])
    torch.testing.assert_close(made.encoder.state_dict(), want.encoder.state_dict())
    assert all(bool(stage._codebook.initted) for stage in made.quantizer.layers)
    assert made.quantizer.quantize_dropout


def test_without_labels():
    model = dit(num_classes=1, class_dropout_prob=0.0)
    made = DiTTask(model, Diffusion("flow"), ABOUT, pictures=3, sampler_steps=2)
    result = run(made, None, {"image": data(torch.float32)["image"]})
    assert made.sample(result.model, 4).shape == (1, 8, 3 * 8 + 2 * 2)


def test_checkpointing_and_bfloat16():
    """Neither changes what is learnt by more than rounding."""
    values = data(torch.float32)
    plain = DiTTask(dit(), Diffusion("flow"), ABOUT)
    want = run(plain, None, values, lr=1e-3).row["loss"]
    calls = []
    for options in ({"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        made = DiTTask(dit(), Diffusion("flow"), ABOUT)
        made.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        row = run(made, None, values, lr=1e-3, **options).row
        assert row["loss"] == pytest.approx(want, rel=2e-2)
    assert len(calls) == 2 * 4 + 4
    rows = [
        run(VQVAETask(vqvae(), ABOUT), None, values, precision=precision).row
        for precision in ("float32", "bfloat16")
    ]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=5e-2)
    with pytest.raises(ValueError, match="a Linear has no gradient_checkpointing"):
        run(Line(), gradient_checkpointing=True)


def test_compiling(monkeypatch):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = Line().model

        def forward(self, x):
            return self.line(x)

    want = run(Line(), ema=0.0).row["loss"]
    compiling = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiling)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    assert run(Line(Whole()), compile=True, ema=0.0).row["loss"] == pytest.approx(want, rel=1e-4)
    assert stats["unique_graphs"] > before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite(where, tmp_path):
    """The error names the step, and the last good checkpoint stays the newest."""

    class Breaks(Line):
        def loss(self, batch, step):
            loss = super().loss(batch, step)["loss"]
            if step.number == 6:
                # The square root of 0 is finite, its gradient not.
                loss = loss * torch.nan if where == "loss" else loss + (0 * loss).sqrt()
            return {"loss": loss}

    with pytest.raises(NonFiniteError, match=r"not finite in step 7 of 20: .*step-00000004 is the"):
        run(Breaks(), tmp_path, steps=20, checkpoint_every=4, log_every=10)
    tensors, state = read_checkpoint(newest_checkpoint(tmp_path))
    assert state["step"] == 4
    assert all(t.isfinite().all() for t in tensors["model"].values())
    with pytest.raises(NonFiniteError, match="no checkpoint was written yet"):
        run(Breaks(), tmp_path / "none", steps=20, checkpoint_every=10, log_every=1)


def test_random_numbers_of_pictures_are_their_own(tmp_path):
    """With and without pictures and logs a run has the same bits."""

    class Random(Line):
        def sample(self, model, step):
            return torch.randn(1, 4, 4).clamp(-1, 1)

    made = []
    for name, every in (("with", 1), ("without", 0)):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        nn.init.ones_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        run(Random(model), tmp_path / name, sample_every=every, checkpoint_every=every or 9)
        made.append(model.state_dict())
    assert len(list((tmp_path / "with" / "samples").iterdir())) == 4
    assert all(torch.equal(made[0][name], t) for name, t in made[1].items())


def test_models_of_others(tmp_path):
    """A module that does not know what it was built with is saved as its weights."""
    result = run(Line(), tmp_path)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(weights, dict(result.model.state_dict()))
    with pytest.raises(ValueError, match="holds no mmfast model"):
        describe_model(tmp_path / "model.safetensors")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Line(), tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("loss")]
    assert values == pytest.approx([row["loss"] for row in read_log(tmp_path / "log.csv")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "multiple of accumulate x processes = 4 x 1, got 6"),
        ({"batch_size": 64}, "32 samples do not fill one batch of 64"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"ema": 1.0}, "ema must be from 0 to below 1, got 1.0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        run(Line(), **options)


def test_refuses_a_folder_with_a_run(tmp_path):
    run(Line(), tmp_path)
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        run(Line(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        run(Line(), tmp_path / "file")
    assert len(checkpoints(tmp_path)) == 1


def test_refuses_tasks():
    class Nothing(Line):
        def loss(self, batch, step):
            return {"error": torch.zeros((), requires_grad=True)}

    with pytest.raises(ValueError, match="losses must have 'loss', got error"):
        run(Nothing())
    with pytest.raises(ValueError, match="a Linear has no parameter to train"):
        run(Line(nn.Linear(3, 3).requires_grad_(False)))
    with pytest.raises(ValueError, match=r"the model takes \(1, 8, 8\), its data is \(4, 4, 4\)"):
        DiTTask(dit(), Diffusion("flow"), ABOUT, vqvae=vqvae())
    with pytest.raises(ValueError, match="sampler must be one of"):
        DiTTask(dit(), Diffusion("flow"), ABOUT, sampler="fast")
