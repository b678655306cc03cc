"""The [loss] section: which noise is drawn, how far a prediction is from its target, and what counts how much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.errors import Problem

_positive = v.optional(v.gt(0))


@frozen(kw_only=True)
class LossSection:
    """How far a prediction is from its target, and from which noise it is made."""

    type: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance of prediction and target: squared, absolute, or squared near zero and absolute further off."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold between near and far changes over the timesteps, for `huber` and `smooth_l1`."""
    huber_c: float = field(default=0.1, validator=v.gt(0))
    """The threshold; a schedule that changes it starts near 1 without noise and comes to this with much noise."""
    huber_scale: float = field(default=1.0, validator=v.gt(0))
    """A factor of the threshold, in every schedule."""
    min_snr_gamma: float | None = field(default=None, validator=_positive)
    """Cap on the signal-to-noise ratio in the weights of timesteps (min-SNR, arXiv:2303.09556); 5 is usual."""
    debiased_estimation: bool = False
    """Weigh noisy timesteps more (debiased estimation, arXiv:2310.08442)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weigh timesteps as predicting the noise would, for models that predict the velocity."""
    v_pred_like_loss: float | None = field(default=None, validator=_positive)
    """Add this share of the loss that predicting the velocity would give, for models that predict the noise."""
    noise_offset: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Strength of noise that shifts whole channels, to learn very dark and bright images; 0.05 to 0.1 are usual."""
    noise_offset_random_strength: bool = False
    """Draw each image's strength evenly between 0 and `noise_offset`."""
    adaptive_noise_scale: float | None = None
    """Add this times the absolute mean of the latents' channel to the strength; never less than 0 in sum."""
    multires_noise_iterations: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Add noise at up to this many resolutions, the next two to four times as coarse each; 6 to 10 are usual."""
    multires_noise_discount: float = field(default=0.3, validator=v.gt(0))
    """Strength of the noise at each resolution as a share of the one before."""
    ip_noise_gamma: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Strength of more noise in the input that is not in the target (input perturbation, arXiv:2301.11706)."""
    ip_noise_gamma_random_strength: bool = False
    """Draw each image's strength evenly between 0 and `ip_noise_gamma`."""
    zero_terminal_snr: bool = False
    """Leave no signal at the last timestep (arXiv:2305.08891), for models that predict the velocity."""
    min_timestep: int | None = field(default=None, validator=v.optional(v.ge(0)))
    """Least timestep that is drawn; 0 when absent."""
    max_timestep: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Timesteps are drawn below this; the model's number of timesteps when absent."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the fields taken together; keys are field names."""
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            yield Problem("adaptive_noise_scale", "needs noise_offset", "give the strength that it is added to")
        if self.max_timestep is not None and (self.min_timestep or 0) >= self.max_timestep:
            yield Problem("min_timestep", f"must be less than max_timestep, {self.max_timestep}")

    def problems_with(self, prediction: str | None, num_timesteps: int) -> Iterator[Problem]:
        """What does not suit a model with so many timesteps that predicts this; None where that is not known yet."""
        if (self.min_timestep or 0) >= num_timesteps:
            yield Problem("loss.min_timestep", f"must be less than the model's {num_timesteps} timesteps")
        if (self.max_timestep or 0) > num_timesteps:
            yield Problem("loss.max_timestep", f"must be at most {num_timesteps}, the model's number of timesteps")
        if prediction == "v_prediction":
            if self.v_pred_like_loss is not None:
                yield Problem("loss.v_pred_like_loss", "is for models that predict the noise", "leave it out")
        elif prediction is not None:
            yield from self._problems_with_noise_prediction(num_timesteps)

    def _problems_with_noise_prediction(self, num_timesteps: int) -> Iterator[Problem]:
        if self.scale_v_pred_loss_like_noise_pred:
            key = "loss.scale_v_pred_loss_like_noise_pred"
            yield Problem(key, "is for models that predict the velocity", 'model.prediction = "v_prediction"')
        if self.zero_terminal_snr and (self.max_timestep or num_timesteps) >= num_timesteps:
            for key in ("debiased_estimation", "v_pred_like_loss"):
                if getattr(self, key):
                    message = "has an infinite weight at the last timestep with loss.zero_terminal_snr"
                    yield Problem(f"loss.{key}", message, f"leave one out, or set max_timestep to {num_timesteps - 1}")

    def warnings(self) -> Iterator[Problem]:
        """Options that have no effect without another."""
        thresholds = self.type in ("huber", "smooth_l1"), 'type = "huber" or "smooth_l1"'
        needed = {
            "huber_schedule": thresholds,
            "huber_c": thresholds,
            "huber_scale": thresholds,
            "noise_offset_random_strength": (self.noise_offset is not None, "noise_offset"),
            "multires_noise_discount": (self.multires_noise_iterations is not None, "multires_noise_iterations"),
            "ip_noise_gamma_random_strength": (self.ip_noise_gamma is not None, "ip_noise_gamma"),
        }
        defaults = {option.name: option.default for option in fields(LossSection)}
        for key, (is_met, what) in needed.items():
            if not is_met and getattr(self, key) != defaults[key]:
                yield Problem(f"loss.{key}", f"has no effect without {what}")

    def warnings_with(self, prediction: str | None) -> Iterator[Problem]:
        """What hardly suits a model that predicts this; None where that is not known yet."""
        if self.zero_terminal_snr and prediction == "epsilon":
            message = (
                "suits models that predict the velocity; nothing is learnt from predicting noise where all is noise"
            )
            yield Problem("loss.zero_terminal_snr", message)
