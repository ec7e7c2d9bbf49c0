"""Diffusion: what is trained and what is sampled agree, and both are what the papers say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import normal
from torch import nn
from whole_models import assert_sound

import mmfast
from mmfast.models import Diffusion, DiT
from mmfast.models.diffusion import SAMPLERS

DISCRETE = [{}, {"prediction": "v_prediction"}, {"prediction": "sample"}]
FLOWS = [{"schedule": "flow"}, {"schedule": "flow", "shift": 3.0, "times": "logit_normal"}]


def small(**options):
    torch.manual_seed(0)
    options = {"num_classes": 4, "learn_sigma": False} | options
    model = DiT(8, 2, 3, hidden_size=16, depth=2, num_heads=2, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


class Ideal(nn.Module):
    """The best prediction for data that is all one number: what it is to predict is known."""

    def __init__(self, diffusion: Diffusion, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.diffusion, self.value = diffusion, value

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        levels, made = self.diffusion.levels, []
        for sample, time in zip(x.double(), t.tolist(), strict=True):
            alpha, sigma = levels.at(time)
            noise = (sample - alpha * self.value) / max(sigma, 1e-9)
            made.append(
                {
                    "epsilon": noise,
                    "sample": torch.full_like(noise, self.value),
                    "v_prediction": alpha * noise - sigma * self.value,
                    "flow_prediction": noise - self.value,
                }[self.diffusion.prediction]
            )
        return torch.stack(made).to(x) * self.scale


@pytest.mark.parametrize("options", DISCRETE + FLOWS, ids=str)
def test_an_ideal_model_has_no_loss_and_samples_the_data(options):
    """Levels, times and predictions of training are those of sampling."""
    diffusion = Diffusion(**options)
    model = Ideal(diffusion, 0.7)
    x0 = torch.full((16, 2, 3), 0.7)
    losses = diffusion.losses(model, x0, seed=1)
    assert losses.total.max() < 1e-7
    for sampler in (None, "dpm_solver", "ddim"):
        drawn = diffusion.sample(model, (2, 2, 3), steps=10, sampler=sampler, progress=False)
        torch.testing.assert_close(drawn, x0[:2], atol=2e-3, rtol=0)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("options", DISCRETE + FLOWS, ids=str)
def test_noised_is_what_the_papers_say(options):
    diffusion = Diffusion(**options)
    x0 = normal(64, 5, dtype=torch.float64)
    rows = torch.arange(64) * 15
    batch = diffusion.noised(x0, seed=3, offset=2, rows=rows)
    noise = mmfast.randn(x0.shape, seed=3, offset=2, dtype=torch.float32).double()
    if options.get("schedule") == "flow":
        level = (rows + 1).double() / 1000
        level = diffusion.shift * level / (1 + (diffusion.shift - 1) * level)
        torch.testing.assert_close(batch.timesteps.double(), level * 1000, rtol=1e-5, atol=1e-4)
        alpha, sigma = (1 - level)[:, None], level[:, None]
    else:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)[rows][:, None]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        assert torch.equal(batch.timesteps, rows)
    target = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[diffusion.prediction]
    torch.testing.assert_close(batch.noisy, alpha * x0 + sigma * noise, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(batch.target, target, atol=1e-4, rtol=1e-5)


def test_times():
    uniform = Diffusion().draw(4000, seed=0).double() / 1000
    assert uniform.min() < 0.01
    assert uniform.max() > 0.99
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - math.sqrt(1 / 12)) < 0.01
    options = {"times": "logit_normal", "times_mean": -0.5, "times_std": 0.7}
    level = Diffusion("flow", **options).draw(4000, seed=0).double() / 1000
    numbers = torch.logit(level.clamp(5e-4, 0.9995))
    assert abs(numbers.mean() + 0.5) < 0.05
    assert abs(numbers.std() - 0.7) < 0.05


def test_a_sample_depends_on_its_own_seed_alone():
    diffusion, model, x0 = Diffusion(), small(), normal(4, 3, 8, 8)
    seeds, y = torch.tensor([5, -6, 7, 8]), torch.tensor([0, 1, 2, 3])
    options = {"offset": 9, "drop": 0.5}
    whole = diffusion.losses(model, x0, seed=seeds, condition={"y": y}, **options)
    part = diffusion.losses(model, x0[2:], seed=seeds[2:], condition={"y": y[2:]}, **options)
    assert torch.equal(whole.timesteps[2:], part.timesteps)
    torch.testing.assert_close(whole.total[2:], part.total)
    other = diffusion.losses(model, x0, seed=seeds, offset=10, condition={"y": y})
    assert not torch.equal(whole.timesteps, other.timesteps)
    options = {"steps": 3, "progress": False}
    drawn = diffusion.sample(model, x0.shape, classes=y, seed=seeds, **options)
    alone = diffusion.sample(model, (1, 3, 8, 8), classes=y[2:3], seed=seeds[2:3], **options)
    torch.testing.assert_close(drawn[2:3], alone)


def test_conditions_are_dropped():
    seen = []

    def model(x, t, drop):
        seen.append(drop)
        return x

    Diffusion().loss(model, normal(2000, 1), seed=1, drop=0.3)
    assert abs(seen[0].float().mean() - 0.3) < 0.03


def test_weights_are_those_of_the_schedule():
    plain, weighted = Diffusion(), Diffusion(weighting="min_snr")
    model, x0, y = small(), normal(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    rows = torch.tensor([0, 10, 200, 500, 800, 999])
    made = [d.losses(model, x0, seed=1, rows=rows, condition={"y": y}) for d in (plain, weighted)]
    snr = plain.levels.snr[rows]
    expected = made[0].total.double() * snr.clamp(max=5) / snr
    torch.testing.assert_close(made[1].total.double(), expected, rtol=1e-4, atol=1e-7)
    mean = plain.loss(model, x0, seed=1, rows=rows, condition={"y": y})
    torch.testing.assert_close(mean, made[0].total.mean())


def bound(diffusion, rows, x0, noisy, output):
    """The bound's terms by torch.distributions, in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    small = betas * (1 - before) / (1 - kept)
    small[0] = small[1]
    result = []
    for t, clean, x, out in zip(rows.tolist(), x0, noisy, output, strict=True):
        prediction, variance = out.chunk(2)
        guess = (x - (1 - kept[t]).sqrt() * prediction) / kept[t].sqrt()

        def mean(z, t=t, x=x):
            a = before[t].sqrt() * betas[t] / (1 - kept[t])
            return a * z + (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - kept[t]) * x

        share = (variance + 1) / 2
        log_variance = share * betas[t].log() + (1 - share) * small[t].log()
        model = torch.distributions.Normal(mean(guess), (log_variance / 2).exp())
        if t:
            true = torch.distributions.Normal(mean(clean), small[t].sqrt())
            nats = torch.distributions.kl_divergence(true, model)
        else:
            low, high = model.cdf(clean - 1 / 255), model.cdf(clean + 1 / 255)
            low = torch.where(clean < -0.999, 0.0, low)
            high = torch.where(clean > 0.999, 1.0, high)
            nats = -(high - low).clamp(min=1e-12).log()
        result.append(nats.mean() / math.log(2))
    return torch.stack(result)


def test_learned_variances_have_the_bound():
    diffusion = Diffusion()
    x0 = normal(5, 3, 4).clamp(-1, 1)
    rows = torch.tensor([0, 0, 1, 400, 999])
    batch = diffusion.noised(x0, seed=0, rows=rows)
    # At t = 0 the guess must be close, or its likelihood is the floor's.
    prediction = batch.target + 0.05 * normal(5, 3, 4, seed=1)
    output = torch.cat([prediction, normal(5, 3, 4, seed=2)], 1).requires_grad_()
    losses = diffusion.losses(lambda x, t: output, x0, seed=0, rows=rows)
    expected = bound(diffusion, rows, x0.double(), batch.noisy.double(), output.double())
    torch.testing.assert_close(losses.bound.double(), expected, rtol=2e-3, atol=1e-4)
    squared = (prediction - batch.target).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.total, squared + losses.bound)
    # The prediction learns from the squared error alone.
    of_prediction, of_variance = torch.autograd.grad(losses.bound.sum(), output)[0].chunk(2, 1)
    assert of_prediction.count_nonzero() == 0
    assert of_variance.count_nonzero() == of_variance.numel()


def test_guidance_and_learned_variances_in_sampling():
    model = small(learn_sigma=True)
    diffusion, y = Diffusion(), torch.tensor([1, 2])
    options = {"classes": y, "steps": 4, "seed": 3, "progress": False}

    def by_hand(x, t, y):
        with torch.no_grad():
            return model(x, t, y)[:, :3]

    drawn = diffusion.sample(model, (2, 3, 8, 8), guidance=3.0, **options)
    expected = mmfast.schedule.sample(
        by_hand, mmfast.randn((2, 3, 8, 8), seed=3, offset=-1), diffusion.table(None, 4),
        model_kwargs={"y": torch.tensor([4, 4, 1, 2])}, guidance_scale=3.0, progress=False,
    )  # fmt: skip
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, diffusion.sample(model, (2, 3, 8, 8), **options))
    learned = diffusion.sample(model, (2, 3, 8, 8), sampler="ddpm", **options)
    assert diffusion.table("ddpm", 4, variance="learned_range").learned_variance
    fixed = diffusion.sample(model, (2, 3, 8, 8), sampler="ddpm", variance="fixed_small", **options)
    assert not torch.equal(learned, fixed)


def test_sampling_neither_drops_labels_nor_changes_modes():
    model = small(class_dropout_prob=0.999).train()
    model.blocks[0].eval()
    options = {"classes": torch.tensor([1, 2]), "steps": 2, "progress": False}
    drawn = Diffusion().sample(model, (2, 3, 8, 8), **options)
    assert model.training
    assert not model.blocks[0].training
    assert torch.equal(drawn, Diffusion().sample(model.eval(), (2, 3, 8, 8), **options))


def test_scale_of_the_data():
    diffusion = Diffusion("flow", data_mean=[1.0, -2.0], data_std=[3.0, 0.5])
    x = normal(4, 2, 6) * torch.tensor([3.0, 0.5])[:, None] + torch.tensor([1.0, -2.0])[:, None]
    torch.testing.assert_close(diffusion.normalized(x), normal(4, 2, 6), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(diffusion.restored(diffusion.normalized(x)), x)
    model = Ideal(diffusion, 0.0)
    losses = diffusion.losses(model, torch.tensor([1.0, -2.0]).view(1, 2, 1).expand(3, 2, 4))
    assert losses.total.max() < 1e-7
    drawn = diffusion.sample(model, (1, 2, 4), steps=5, progress=False)
    torch.testing.assert_close(drawn[0, :, 0], torch.tensor([1.0, -2.0]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("options", DISCRETE + FLOWS, ids=str)
def test_description_there_and_back(options):
    diffusion = Diffusion(data_std=[1.0, 2.0], **options)
    assert Diffusion(**json.loads(json.dumps(diffusion.config))) == diffusion


def test_step_is_the_references():
    """Loss, gradients and a step in float32 against float64 on the reference backend."""
    diffusion, condition = Diffusion(weighting="min_snr"), {"y": torch.tensor([1, 3])}
    x0 = normal(2, 3, 8, 8)

    def loss(model, dtype):
        return diffusion.loss(model, x0.to(dtype), seed=2, offset=7, condition=condition)

    assert_sound(small(learn_sigma=True), loss, compiles=False)


def test_compile_without_a_break():
    model, diffusion = small(learn_sigma=True), Diffusion(weighting="min_snr")
    x0, y = normal(2, 3, 8, 8), torch.tensor([1, 3])

    def step(x0, y, seed):
        return diffusion.loss(model, x0, seed=seed, offset=7, condition={"y": y})

    seed = torch.tensor(3)
    expected = step(x0, y, seed)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x0, y, seed)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_every_sampler_has_a_table():
    made = {}
    for name in SAMPLERS:
        discrete = not name.startswith("flow")
        made[name] = len(Diffusion("linear" if discrete else "flow").table(name, 5))
    assert min(made.values()) >= 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Diffusion("cosine"), "schedule must be one of flow, linear"),
        (lambda: Diffusion("flow", "epsilon"), "'epsilon' says nothing of the sample"),
        (lambda: Diffusion(zero_snr=True), "'epsilon' says nothing of the sample"),
        (lambda: Diffusion(shift=2.0), "shift is of flows, not of schedule 'linear'"),
        (lambda: Diffusion(times="normal"), "times must be one of uniform, logit_normal"),
        (lambda: Diffusion(weighting="edm"), "weighting must be one of min_snr"),
        (lambda: Diffusion(data_std=0.0), r"data_std must be above 0, got 0\.0"),
        (lambda: Diffusion().table("heunn"), "sampler must be one of ddim"),
        (
            lambda: Diffusion("flow").loss(small(learn_sigma=True), normal(2, 3, 8, 8)),
            "learn_sigma.* need a discrete schedule",
        ),
        (
            lambda: Diffusion().loss(lambda x, t: x[:, :2], normal(2, 3, 8, 8)),
            r"the model must give \(2, 3, 8, 8\), .* got \(2, 2, 8, 8\)",
        ),
        (
            lambda: Diffusion().sample(
                small(class_dropout_prob=0.0), (1, 3, 8, 8), classes=torch.tensor([1]), guidance=2
            ),
            "needs class_dropout_prob above 0",
        ),
        (
            lambda: Diffusion().sample(nn.Conv2d(3, 3, 1), (1, 3, 8, 8), guidance=2),
            "needs a model with for_guidance, a Conv2d has none",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
