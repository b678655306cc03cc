"""The [loss] section: which noise is drawn, how a prediction is compared with its target, and with which weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api.components import Component
from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.diffusion.process import Loss, NoiseProcess

_positive = v.optional(v.gt(0))


@frozen(kw_only=True)
class LossConfig(Component):
    """How a prediction is compared with its target, and which noise the target is made of."""

    kind = "loss"
    name_key = "type"
    product = "a function of prediction, target and timesteps"
    product_methods = ("__call__",)
    uses_threshold: ClassVar[bool] = False
    """Whether the `huber_*` keys have an effect."""

    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold between small and large errors changes over the timesteps, for `huber` and `smooth_l1`."""
    huber_c: float = field(default=0.1, validator=v.gt(0))
    """The threshold; a schedule that changes it starts near 1 without noise and falls to this with much noise."""
    huber_scale: float = field(default=1.0, validator=v.gt(0))
    """Multiplier of the threshold in every schedule."""
    min_snr_gamma: float | None = field(default=None, validator=_positive)
    """Clip the SNR in the timestep weights to this value (min-SNR, arXiv:2303.09556); usually 5."""
    debiased_estimation: bool = False
    """Give noisy timesteps more weight (debiased estimation, arXiv:2310.08442)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight timesteps as predicting the noise would, for models that predict the velocity."""
    v_pred_like_loss: float | None = field(default=None, validator=_positive)
    """For noise-prediction models: add this fraction of the v-prediction loss."""
    noise_offset: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Strength of noise that shifts whole channels, for very dark and bright images; 0.05 to 0.1 are usual."""
    noise_offset_random_strength: bool = False
    """Draw each image's strength uniformly between 0 and `noise_offset`."""
    adaptive_noise_scale: float | None = None
    """Add this times the absolute mean of the latents' channel to the strength; the sum is never below 0."""
    multires_noise_iterations: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Add noise at up to this many resolutions, each two to four times as coarse as the one before; 6 to 10 are
    usual."""
    multires_noise_discount: float = field(default=0.3, validator=v.gt(0))
    """Strength of the noise at each resolution relative to the previous one."""
    ip_noise_gamma: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Strength of additional noise in the input that is not in the target (input perturbation, arXiv:2301.11706)."""
    ip_noise_gamma_random_strength: bool = False
    """Draw each image's strength uniformly between 0 and `ip_noise_gamma`."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule to zero terminal SNR (arXiv:2305.08891); for v-prediction models. Where absent, the
    model's files decide."""
    min_timestep: int | None = field(default=None, validator=v.optional(v.ge(0)))
    """Smallest timestep that is drawn; 0 when absent. The same as `timesteps.min`."""
    max_timestep: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Timesteps are drawn below this; the model's number of timesteps when absent. The same as `timesteps.max`."""

    def problems(self) -> Iterator[Problem]:
        """Problems that involve several fields; keys are field names."""
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            yield Problem("adaptive_noise_scale", "needs noise_offset", "give the strength that it is added to")
        if self.max_timestep is not None and (self.min_timestep or 0) >= self.max_timestep:
            yield Problem("min_timestep", f"must be less than max_timestep, {self.max_timestep}")

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Options that do not suit the noise process of the model, as far as it is known; keys are field names."""
        return config.model.noise_process.loss_problems(self)

    def warnings(self) -> Iterator[Problem]:
        """Options that have no effect without another; keys are field names."""
        thresholds = self.uses_threshold, 'type = "huber" or "smooth_l1"'
        needed = {
            "huber_schedule": thresholds,
            "huber_c": thresholds,
            "huber_scale": thresholds,
            "noise_offset_random_strength": (self.noise_offset is not None, "noise_offset"),
            "multires_noise_discount": (self.multires_noise_iterations is not None, "multires_noise_iterations"),
            "ip_noise_gamma_random_strength": (self.ip_noise_gamma is not None, "ip_noise_gamma"),
        }
        defaults = {option.name: option.default for option in fields(LossConfig)}
        for key, (is_met, what) in needed.items():
            if not is_met and getattr(self, key) != defaults[key]:
                yield Problem(key, f"has no effect without {what}")

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Options that hardly suit the noise process of the model; keys are field names."""
        return config.model.noise_process.loss_warnings(self)

    def build(self, noise_process: NoiseProcess) -> Loss:
        """The function that compares predictions with targets.

        It is called with both, float32 [B, C, h, w], and timesteps [B], and returns the loss of each number,
        [B, C, h, w].
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
