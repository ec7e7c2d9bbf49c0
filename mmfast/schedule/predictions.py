"""What a model's output stands for: clean sample and noise as linear maps of input and output.

The model's input is x = alpha x0 + sigma n.

| | the output m is | |
|---|---|---|
| epsilon | n | Ho et al. 2020, arXiv 2006.11239 |
| sample | x0 | |
| v_prediction | alpha n - sigma x0 | Salimans and Ho 2022, arXiv 2202.00512 |
| flow_prediction | n - x0 | Lipman et al. 2023, arXiv 2210.02747 |
| edm | F in D(x) = c_skip x + c_out F(c_in x) | Karras et al. 2022, arXiv 2206.00364, table 1 |
| edm_v | the same with -c_out | |
"""

from __future__ import annotations

from mmfast.checks import check_choice

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v")


def edm_preconditioning(sigma: float, sigma_data: float) -> tuple[float, float]:
    """c_skip and c_out of Karras et al. 2022 (arXiv 2206.00364), table 1."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total**0.5


def denoised_from(
    prediction: str, alpha: float, sigma: float, sigma_data: float | None = None
) -> tuple[float, float]:
    """(a, b) of x0 = a x + b m.

    Raises:
        ValueError: an unknown prediction, alpha = 0 where the output says nothing of x0, or no
            ``sigma_data`` for edm.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        total = alpha**2 + sigma**2
        return alpha / total, -sigma / total
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if alpha == 0:
        raise ValueError(
            f"prediction {prediction!r} says nothing of the sample where alpha is 0: "
            "use v_prediction or sample, or a schedule with a floor for alphas_cumprod"
        )
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    c_skip, c_out = _edm(prediction, sigma / alpha, sigma_data)
    return c_skip / alpha, c_out


def noise_from(
    prediction: str, alpha: float, sigma: float, sigma_data: float | None = None
) -> tuple[float, float]:
    """(c, d) of n = c x + d m; sigma is above 0.

    Raises:
        ValueError: as :func:`denoised_from`, but for alpha = 0.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "sample":
        return 1 / sigma, -alpha / sigma
    if prediction == "v_prediction":
        total = alpha**2 + sigma**2
        return sigma / total, alpha / total
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    a, b = denoised_from(prediction, alpha, sigma, sigma_data)
    return (1 - alpha * a) / sigma, -alpha * b / sigma


def target_of(
    prediction: str, alpha: float, sigma: float, sigma_data: float | None = None
) -> tuple[float, float]:
    """(t_x, t_n): what the model should give is t_x x0 + t_n n.

    Raises:
        ValueError: as :func:`denoised_from`.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    simple = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v_prediction": (-sigma, alpha),
        "flow_prediction": (-1.0, 1.0),
    }
    if prediction in simple:
        return simple[prediction]
    c_skip, c_out = _edm(prediction, sigma / alpha, sigma_data)
    return (1 - c_skip) / c_out, -c_skip * sigma / alpha / c_out


def _edm(prediction: str, sigma: float, sigma_data: float | None) -> tuple[float, float]:
    if sigma_data is None:
        raise ValueError(
            f"prediction {prediction!r} needs sigma_data: a grid of an EDMSchedule has it"
        )
    c_skip, c_out = edm_preconditioning(sigma, sigma_data)
    return c_skip, -c_out if prediction == "edm_v" else c_out
