"""Signal and noise levels, and the four ways in which a denoiser states its prediction.

A model sees x = a x0 + s n, with x0 the clean latent and n standard normal noise, and predicts one of

- epsilon: n;
- v_prediction: a n - s x0 (Salimans and Ho, arXiv 2202.00512);
- sample: x0;
- flow: n - x0, with a = 1 - s (Lipman et al., arXiv 2210.02747).

`levels` finds a and s **in the space of the model's input**: samplers that carry x0 + sigma n divide by
sqrt(1 + sigma^2) in `scale_model_input` before they call the model, so a^2 + s^2 = 1 there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from latent_tiles.errors import ParameterisationError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]

_NO_LEVELS = "{} has neither sigmas nor alphas_cumprod; use memory='none' with it"
_SMALLEST_SIGNAL = 1e-6
"""Below this the clean latent cannot be told from an epsilon prediction."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Signal level `a`, noise level `s` and what the model predicts, at one call of the model.

    Raises:
        ParameterisationError: unknown prediction type, or levels that are negative or both zero.
    """

    signal: float
    noise: float
    prediction: Prediction

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            known = ", ".join(get_args(Prediction))
            raise ParameterisationError(f"unknown prediction type {self.prediction!r}; known are {known}")
        if self.signal < 0 or self.noise < 0 or self.signal + self.noise == 0:
            raise ParameterisationError(f"levels a={self.signal}, s={self.noise} must not be negative or both zero")

    def clean(self, noisy: Tensor, prediction: Tensor) -> Tensor:
        """The clean latent x0 that a prediction at `noisy` stands for.

        Raises:
            ParameterisationError: an epsilon prediction at zero signal says nothing about x0.
        """
        if self.prediction == "epsilon":
            if self.signal < _SMALLEST_SIGNAL:
                msg = f"an epsilon prediction at signal level {self.signal:.1e} does not determine the clean latent"
                raise ParameterisationError(msg)
            return (noisy - self.noise * prediction) / self.signal
        if self.prediction == "v_prediction":
            return self.signal * noisy - self.noise * prediction
        if self.prediction == "flow":
            return noisy - self.noise * prediction
        return prediction

    def noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """A x0 + s n."""
        return self.signal * clean + self.noise * noise

    def rebase(self, prediction: Tensor, seen: Tensor, canvas: Tensor) -> Tensor:
        """State at `canvas` the clean latent that was predicted at `seen`.

        A tile that saw another input than the canvas holds predicts against that input. The returned prediction, read
        at the canvas's input, stands for the same x0; where both inputs are equal it is the prediction, bit for bit.

        Raises:
            ParameterisationError: at noise level zero the input is x0 itself.
        """
        if self.prediction == "sample":
            return prediction
        if self.noise == 0:
            raise ParameterisationError("a prediction at noise level 0 cannot be restated at another input")
        factor = self.signal / self.noise if self.prediction == "v_prediction" else 1 / self.noise
        return prediction + factor * (canvas - seen)


def levels(scheduler: Any, timestep: Tensor | float) -> Levels:
    """Levels of the model's input at a timestep of a diffusers scheduler.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`, before `step` of this call.
        timestep: the timestep that the model is called with; a scalar, or equal over the batch.

    Raises:
        ParameterisationError: a scheduler that states neither sigmas nor cumulated alphas, mixed timesteps, or a
            timestep that is not on its schedule.
    """
    require_levels(scheduler)
    value, config = _scalar(timestep), scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[_index(scheduler, value)])
        stated = config.get("prediction_type", "flow_prediction")
        return Levels(signal=1 - sigma, noise=sigma, prediction="flow" if stated == "flow_prediction" else stated)
    prediction = config.get("prediction_type", "epsilon")
    sigma = _sigma(scheduler, value)
    if sigma is not None:
        scale = 1 / math.sqrt(1 + sigma**2)
        return Levels(signal=scale, noise=sigma * scale, prediction=prediction)
    cumulated = getattr(scheduler, "alphas_cumprod", None)
    if cumulated is None:
        raise ParameterisationError(_NO_LEVELS.format(type(scheduler).__name__))
    # Between two training timesteps (LCM and the like round) the nearer one is what the sampler itself uses.
    alpha = float(cumulated[min(max(round(value), 0), len(cumulated) - 1)])
    return Levels(signal=math.sqrt(alpha), noise=math.sqrt(1 - alpha), prediction=prediction)


def require_levels(scheduler: Any) -> None:
    """Check, before it is set up, that `levels` can serve a scheduler.

    Raises:
        ParameterisationError: it states no levels that are known here.
    """
    if hasattr(scheduler, "precondition_inputs") or "sigma_data" in scheduler.config:
        msg = f"{type(scheduler).__name__} scales inputs by the data's deviation (EDM); use memory='none' with it"
        raise ParameterisationError(msg)
    if getattr(scheduler, "sigmas", None) is None and getattr(scheduler, "alphas_cumprod", None) is None:
        raise ParameterisationError(_NO_LEVELS.format(type(scheduler).__name__))


def _scalar(timestep: Tensor | float) -> float:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    flat = timestep.flatten()
    if bool((flat != flat[0]).any()):
        raise ParameterisationError(f"the rows of the batch have different timesteps {flat.tolist()}")
    return float(flat[0])


def _sigma(scheduler: Any, timestep: float) -> float | None:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or getattr(scheduler, "timesteps", None) is None:
        return None
    if len(sigmas) < len(scheduler.timesteps):
        return None
    index = _index(scheduler, timestep)
    # Second-order samplers of the KDPM2 kind make their second call at an interpolated sigma; the ancestral one keeps
    # it at the place of the first call.
    if getattr(scheduler, "sigmas_interpol", None) is not None and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[index - 1 if hasattr(scheduler, "sigmas_down") else index])
    return float(sigmas[index])


def _index(scheduler: Any, timestep: float) -> int:
    for name in ("step_index", "begin_index"):
        if getattr(scheduler, name, None) is not None:
            return int(getattr(scheduler, name))
    places = [index for index, value in enumerate(scheduler.timesteps.tolist()) if math.isclose(value, timestep)]
    if not places:
        raise ParameterisationError(f"timestep {timestep} is not on the schedule of {type(scheduler).__name__}")
    # A run that starts in the middle of the schedule takes the second of two equal timesteps, as diffusers does.
    return places[1] if len(places) > 1 else places[0]
