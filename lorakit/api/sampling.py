"""The bases of timestep samplers, for training, and of samplers, for previews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import Component
from lorakit.api.noise import DDPMSpec, NoiseSpec, shifted
from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.diffusion.process import NoiseProcess, Sampler, TimestepSampler


@frozen(kw_only=True)
class TimestepSamplerConfig(Component):
    """Which timesteps are trained on: a random one for each image."""

    kind = "timestep sampler"
    product = "a function of a generator and the shape of latents"
    product_methods = ("__call__",)

    shift: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Shift timesteps towards noise: t becomes s·t/(1 + (s - 1)·t), with t from 0 to 1; the model's own shift when
    absent, which is none for Stable Diffusion."""
    min: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Smallest timestep, as the model counts them: 0 to 999 for Stable Diffusion, 0 to 1 for flow matching."""
    max: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Timesteps are drawn below this; all when absent. The distribution is scaled to the range from `min` to `max`."""

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Bounds that the model's timesteps do not have, or that are given twice."""
        process, loss = config.model.noise_process, config.loss
        for key, other in {"min": loss.min_timestep, "max": loss.max_timestep}.items():
            value = getattr(self, key)
            if value is not None and other is not None:
                yield Problem(key, f"is the same as loss.{key}_timestep", "leave out one of them")
            elif value is not None and process.num_timesteps and value % 1:
                yield Problem(key, f"must be a whole number, not {value:g}")
        if (self.min or 0) >= process.end or (self.max or 0) > process.end:
            key, limit = ("min", "less than") if (self.min or 0) >= process.end else ("max", "at most")
            yield Problem(key, f"must be {limit} {process.end:g}, where the model's timesteps end")
        elif self.max is not None and (self.min or 0) >= self.max:
            yield Problem("min", f"must be less than max, {self.max:g}")

    def bounds(self, process: NoiseSpec) -> tuple[float, float]:
        """Where the timesteps start, and what they are below; integers where the process counts steps."""
        low, high = self.min or 0, process.end if self.max is None else self.max
        return (int(low), int(high)) if process.num_timesteps else (low, high)

    def timestep(self, fraction: float, process: NoiseSpec, latent_shape: Sequence[int]) -> float:
        """The timestep of a draw between 0 and 1, shifted for latents [C, h, w] and scaled to the bounds."""
        shift = process.training_shift(latent_shape) if self.shift is None else self.shift
        low, high = self.bounds(process)
        timestep = low + (high - low) * shifted(fraction, shift)
        return min(int(timestep), int(high) - 1) if process.num_timesteps else timestep

    def build(self, noise_process: NoiseProcess) -> TimestepSampler:
        """The function that draws the timestep of an image.

        It is called with a `numpy.random.Generator` and the shape [C, h, w] of the latents, and returns an integer
        where the process counts steps.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


@frozen(kw_only=True)
class SamplerConfig(Component):
    """How previews are sampled: from noise to latents. Prompts name it; it has no keys."""

    kind = "sampler"
    name_key = "sampler"
    product = "a function of predictions, noise, steps and generators"
    product_methods = ("__call__",)

    title: ClassVar[str] = ""
    """What web UIs call it, in the text that comes with an image; its name when empty."""
    process: ClassVar[type[NoiseSpec]] = DDPMSpec
    """The kind of noise process that it is for."""

    def build(self, noise_process: NoiseProcess) -> Sampler:
        """The function that samples.

        It is called with `predict`, the noise [B, C, h, w] to start from, the number of steps and B generators, and
        returns the latents, [B, C, h, w]. `predict` takes noisy latents and a timestep, a scalar tensor, and returns
        what the denoiser predicts, guided.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
