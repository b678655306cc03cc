"""Noise processes as config checks know them: their timesteps and defaults, and the options that suit them; no torch.

What mixes noise into latents is in `lorakit.diffusion`: `DDPMSchedule` and `FlowMatching`, each with the spec of
its kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import frozen

from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.api.loss import LossConfig


@frozen(kw_only=True)
class NoiseSpec:
    """A kind of noise process, with the settings of one family of models."""

    title: ClassVar[str]
    """What messages call it."""
    timestep_sampler: ClassVar[str] = "uniform"
    """The timestep sampler that a config without `timesteps.name` gets."""
    sampler: ClassVar[str]
    """The sampler of previews that a config without one gets."""

    num_timesteps: int | None = None
    """How many timesteps there are, counted from 0; None where time is a number from 0 (clean) to 1 (noise)."""

    @property
    def end(self) -> float:
        """What timesteps are below: their number, or 1."""
        return self.num_timesteps or 1.0

    def timestep(self, fraction: float) -> float:
        """The timestep at a fraction of the way from clean latents to noise; an integer where timesteps are."""
        return int(self.num_timesteps * fraction) if self.num_timesteps else fraction

    def training_shift(self, latent_shape: Sequence[int]) -> float:  # noqa: ARG002
        """How far training's timesteps are shifted towards noise, for latents [C, h, w]; 1 is not at all."""
        return 1.0

    def loss_problems(self, loss: LossConfig) -> Iterator[Problem]:  # noqa: ARG002
        """Options of the loss that this process cannot have; keys are field names."""
        return iter(())

    def loss_warnings(self, loss: LossConfig) -> Iterator[Problem]:  # noqa: ARG002
        """Options of the loss that hardly suit this process; keys are field names."""
        return iter(())


@frozen(kw_only=True)
class DDPMSpec(NoiseSpec):
    """Noise in discrete steps (Ho et al., 2020, arXiv:2006.11239)."""

    title: ClassVar[str] = "DDPM"
    sampler: ClassVar[str] = "ddim"

    num_timesteps: int = 1000
    """How many timesteps there are."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts: the noise ε or the velocity v; None while the model's files have not been read."""

    def loss_problems(self, loss: LossConfig) -> Iterator[Problem]:
        """Timesteps beyond the last, and options for models that predict something else."""
        if (loss.min_timestep or 0) >= self.num_timesteps:
            yield Problem("min_timestep", f"must be less than the model's {self.num_timesteps} timesteps")
        if (loss.max_timestep or 0) > self.num_timesteps:
            message = f"must be at most {self.num_timesteps}, the model's number of timesteps"
            yield Problem("max_timestep", message)
        if self.prediction == "v_prediction" and loss.v_pred_like_loss is not None:
            yield Problem("v_pred_like_loss", "is for models that predict the noise", "leave it out")
        if self.prediction != "epsilon":
            return
        if loss.scale_v_pred_loss_like_noise_pred:
            hint = 'model.prediction = "v_prediction"'
            yield Problem("scale_v_pred_loss_like_noise_pred", "is for models that predict the velocity", hint)
        if loss.zero_terminal_snr and (loss.max_timestep or self.num_timesteps) >= self.num_timesteps:
            for key in ("debiased_estimation", "v_pred_like_loss"):
                if getattr(loss, key):
                    message = "has an infinite weight at the last timestep with loss.zero_terminal_snr"
                    hint = f"leave one out, or set max_timestep to {self.num_timesteps - 1}"
                    yield Problem(key, message, hint)

    def loss_warnings(self, loss: LossConfig) -> Iterator[Problem]:
        """Zero terminal SNR for a model that predicts the noise."""
        if loss.zero_terminal_snr and self.prediction == "epsilon":
            message = "suits models that predict the velocity; predicting noise from pure noise teaches nothing"
            yield Problem("zero_terminal_snr", message)


@frozen
class ShiftLine:
    """A shift that grows with the number L of image tokens: ln s is a line through (L₀, μ₀) and (L₁, μ₁).

    It is not clamped beyond these points, as in diffusers.
    """

    tokens: tuple[int, int] = (256, 4096)
    """L₀ and L₁."""
    mu: tuple[float, float] = (0.5, 1.15)
    """μ₀ and μ₁; the defaults are FLUX.1's."""
    patch: int = 2
    """Side of a token in latents."""

    def mu_of(self, latent_shape: Sequence[int]) -> float:
        """Ln s for latents [C, h, w]."""
        count = (latent_shape[1] // self.patch) * (latent_shape[2] // self.patch)
        (first, last), (low, high) = self.tokens, self.mu
        return low + (count - first) * (high - low) / (last - first)


@frozen(kw_only=True)
class FlowSpec(NoiseSpec):
    """Flow matching along straight lines (Lipman et al., 2023, arXiv:2210.02747): x_t = (1 − t)·x₀ + t·ε."""

    title: ClassVar[str] = "flow matching"
    timestep_sampler: ClassVar[str] = "logit_normal"
    sampler: ClassVar[str] = "flow_euler"

    shift: float | ShiftLine = 1.0
    """The shift of training's timesteps where `timesteps.shift` is not set."""
    preview_shift: float | ShiftLine = 1.0
    """The shift of the timesteps that previews are sampled at."""
    shift_terminal: float | None = None
    """The last timestep of previews before 0, which the others are stretched to; None leaves them as they are."""
    timestep_scale: float = 1000.0
    """What a timestep is multiplied by for the denoiser."""

    def training_shift(self, latent_shape: Sequence[int]) -> float:
        """How far training's timesteps are shifted towards noise, for latents [C, h, w]; 1 is not at all."""
        return _shift(self.shift, latent_shape)

    def sampling_shift(self, latent_shape: Sequence[int], steps: int) -> float:  # noqa: ARG002
        """How far timesteps of a preview of N steps are shifted towards noise, for latents [C, h, w]."""
        return _shift(self.preview_shift, latent_shape)

    def loss_problems(self, loss: LossConfig) -> Iterator[Problem]:
        """Options that are made for DDPM."""
        for key in ("min_snr_gamma", "debiased_estimation", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"):
            if getattr(loss, key):
                yield Problem(key, "weights the timesteps of DDPM, and this model uses flow matching", "leave it out")
        if loss.zero_terminal_snr:
            message = "changes the schedule of DDPM, and this model uses flow matching, which ends in pure noise anyway"
            yield Problem("zero_terminal_snr", message, "leave it out")
        if loss.uses_threshold and loss.huber_schedule == "snr":
            message = '"snr" follows the schedule of DDPM, and this model uses flow matching'
            yield Problem("huber_schedule", message, 'set "exponential" or "constant"')
        for key in ("min_timestep", "max_timestep"):
            if getattr(loss, key) is not None:
                message = "counts the steps of DDPM, and this model uses flow matching"
                yield Problem(key, message, f"set timesteps.{key[:3]}, from 0 to 1")

    def loss_warnings(self, loss: LossConfig) -> Iterator[Problem]:
        """Noise that images are never drawn from."""
        for key in ("noise_offset", "multires_noise_iterations"):
            if getattr(loss, key):
                message = "is for DDPM; with flow matching, images start from noise without it, at any brightness"
                yield Problem(key, message, "leave it out")


def _shift(shift: float | ShiftLine, latent_shape: Sequence[int]) -> float:
    return math.exp(shift.mu_of(latent_shape)) if isinstance(shift, ShiftLine) else shift


def shifted(timestep: float, shift: float) -> float:
    """s·t / (1 + (s − 1)·t), which adds ln s to logit(t); for t from 0 to 1."""
    return shift * timestep / (1 + (shift - 1) * timestep)
