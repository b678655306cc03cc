"""Components of all kinds but models and networks that break their contract in known ways."""

# ruff: noqa: ARG002, ARG005, D101, D102, D400, D415

from __future__ import annotations

import attrs
import click
import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from lorakit.api.captioner import CaptionerConfig
from lorakit.api.command import CommandConfig
from lorakit.api.components import AttentionConfig, LRSchedulerConfig, ObserverConfig, OptimizerConfig, SaverConfig
from lorakit.api.loss import LossConfig
from lorakit.api.observer import Observer
from lorakit.api.sampling import SamplerConfig, TimestepSamplerConfig
from lorakit.networks.adapter_file import SafetensorsSaver, read_adapter
from lorakit.networks.network import torch_groups
from lorakit.testing.contracts import (
    AttentionContract,
    CaptionerContract,
    CommandContract,
    LossContract,
    LRSchedulerContract,
    ObserverContract,
    OptimizerContract,
    SamplerContract,
    SaverContract,
    TimestepSamplerContract,
)


class UntidyConfig(OptimizerConfig):
    name = "Untidy"

    def build(self, groups):
        return SGD(torch_groups(groups))


class TestUntidy(OptimizerContract):
    config = UntidyConfig(lr=1e-2)
    violates = ("test_is_frozen", "test_is_documented", "test_has_a_plain_name", "test_imports_nothing_heavy")


@attrs.frozen(kw_only=True)
class AscendingConfig(OptimizerConfig):
    """Goes uphill, with one learning rate for all and without names."""

    name = "ascending"

    def build(self, groups):
        return SGD([own for group in groups for own in group.parameters], lr=self.lr, maximize=True)


class TestAscending(OptimizerContract):
    config = AscendingConfig(lr=1e-2)
    violates = (
        "test_lowers_the_loss",
        "test_groups_keep_their_names_and_parameters",
        "test_groups_keep_their_learning_rates",
        "test_learning_rate_zero_changes_nothing",
    )


class Forgetful(SGD):
    """Loses its momentum in every state, replaces the gradients, and divides by their norm."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad / parameter.grad.norm()
        return super().step(closure)


@attrs.frozen(kw_only=True)
class ForgetfulConfig(OptimizerConfig):
    """Builds `Forgetful`."""

    name = "forgetful"

    def build(self, groups):
        return Forgetful(torch_groups(groups), momentum=0.5)


class TestForgetful(OptimizerContract):
    config = ForgetfulConfig(lr=1e-2)
    violates = (
        "test_resumes_exactly",
        "test_bears_gradients_of_zero",
        "test_a_step_that_is_skipped_changes_nothing[False]",
        "test_a_step_that_is_skipped_changes_nothing[True]",
        "test_leaves_the_gradient_buffer_in_place",
    )


@attrs.frozen(kw_only=True)
class ErraticConfig(LRSchedulerConfig):
    """Counts in a variable of its own, knows nothing of the run's length and rises above the learning rate."""

    name = "erratic"

    def build(self, optimizer, total_steps):
        calls = iter(range(10**6))
        return LambdaLR(optimizer, [lambda step: 1 + next(calls) / 100, lambda step: 0.5])


class TestErratic(LRSchedulerContract):
    config = ErraticConfig()
    violates = (
        "test_factors_are_sensible",
        "test_total_steps_set_the_pace",
        "test_groups_scale_alike",
        "test_resumes_exactly[1]",
        "test_resumes_exactly[50]",
        "test_resumes_exactly[99]",
    )


def unscaled_attention(query, key, value, mask=None):
    query *= query.shape[-1] ** 0.5
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp()
    return weights @ value / weights.sum(-1, keepdim=True)


def unmasked_attention(query, key, value, mask=None):
    return scaled_dot_product_attention(query, key, value)


@attrs.frozen(kw_only=True)
class UnscaledConfig(AttentionConfig):
    """Forgets the scale, overflows, and changes its inputs."""

    name = "unscaled"

    def build(self):
        return unscaled_attention


class TestUnscaled(AttentionContract):
    config = UnscaledConfig()
    violates = (
        *(f"test_equals_the_formula[{shape}]" for shape in ("self", "cross", "wide", "long-caption")),
        *(f"test_has_the_formulas_gradients[{shape}]" for shape in ("self", "cross", "wide", "long-caption")),
        *(f"test_honours_masks[{shape}]" for shape in ("self", "cross", "wide", "long-caption")),
        "test_bears_large_scores",
        "test_does_not_change_its_inputs",
    )


@attrs.frozen(kw_only=True)
class UnmaskedConfig(AttentionConfig):
    """Ignores masks."""

    name = "unmasked"

    def build(self):
        return unmasked_attention


class TestUnmasked(AttentionContract):
    config = UnmaskedConfig()
    violates = tuple(f"test_honours_masks[{shape}]" for shape in ("self", "cross", "wide", "long-caption"))


class CarelessSaver(SafetensorsSaver):
    """Writes in place, in one precision, without metadata."""

    def save(self, adapter, path):
        save_file({key: tensor.contiguous() for key, tensor in adapter.tensors.items()}, path)

    def load(self, path):
        return read_adapter(path)


@attrs.frozen(kw_only=True)
class CarelessConfig(SaverConfig):
    """Builds `CarelessSaver`."""

    name = "careless"

    def build(self):
        return CarelessSaver(self.precision)


class TestCareless(SaverContract):
    config = CarelessConfig()
    violates = (
        "test_reads_what_it_wrote[fp16]",
        "test_reads_what_it_wrote[bf16]",
        "test_keeps_metadata",
        "test_a_failing_write_leaves_no_file",
        "test_a_failing_write_keeps_the_older_file",
    )


class Nervous(Observer):
    """Fails in the middle of a run, and when it is closed before it was started."""

    def run_started(self, run):
        self.steps = 0

    def step_finished(self, step):
        self.steps += 1
        if step in {1, 4}:
            raise RuntimeError

    def closed(self):
        assert self.steps


@attrs.frozen(kw_only=True)
class NervousConfig(ObserverConfig):
    """Builds `Nervous`."""

    name = "nervous"

    def build(self, run_info):
        return Nervous()


class TestNervous(ObserverContract):
    config = NervousConfig()
    violates = (
        "test_bears_a_whole_run[0]",
        "test_bears_a_whole_run[3]",
        "test_bears_a_run_that_stops_early",
        "test_does_not_change_the_result",
    )


@attrs.frozen(kw_only=True)
class MixingConfig(LossConfig):
    """Gives each number the mean over the images of the batch."""

    name = "mixing"

    def build(self, noise_process):
        return lambda prediction, target, timesteps: (prediction - target).square().mean(0).expand_as(target)


class TestMixing(LossContract):
    config = MixingConfig()
    violates = tuple(
        f"test_compares_number_by_number[{process}]"
        for process in ("DDPM-epsilon", "DDPM-v_prediction", "flow-matching")
    )


@attrs.frozen(kw_only=True)
class BackwardsConfig(LossConfig):
    """Prefers what is far from the target; refused for flow matching by its key."""

    name = "backwards"

    def build(self, noise_process):
        return lambda prediction, target, timesteps: -(prediction - target).square()


class TestBackwards(LossContract):
    config = BackwardsConfig(min_snr_gamma=5.0)
    violates = tuple(
        f"{test}[{process}]"
        for test in ("test_is_least_for_the_target", "test_gradient_points_to_the_target")
        for process in ("DDPM-epsilon", "DDPM-v_prediction")
    )


@attrs.frozen(kw_only=True)
class StuckConfig(TimestepSamplerConfig):
    """Always draws the same."""

    name = "stuck"

    def build(self, noise_process):
        return lambda rng, latent_shape: 5.0


class TestStuck(TimestepSamplerContract):
    config = StuckConfig()
    violates = tuple(
        f"{test}[{process}]"
        for test in (
            "test_draws_timesteps_of_the_process",
            "test_depends_on_the_generator_alone",
            "test_keeps_to_its_bounds",
            "test_shifts",
        )
        for process in ("DDPM", "flow-matching")
    )


@attrs.frozen(kw_only=True)
class IdleConfig(SamplerConfig):
    """Asks for nothing and adds noise of its own."""

    name = "idle"

    def build(self, noise_process):
        return lambda predict, noise, steps, generators: noise + torch.randn(noise.shape)


class TestIdle(SamplerContract):
    config = IdleConfig()
    violates = (
        "test_arrives_at_the_data",
        "test_depends_on_noise_and_generators_alone",
        "test_asks_for_timesteps_of_the_process",
    )


@attrs.frozen(kw_only=True)
class MuteConfig(CommandConfig):
    """Says nothing of itself, takes anything"""

    name = "Mute"

    def build(self):
        @click.command()
        @click.option("--size", default=torch.get_num_threads())
        def mute(size):
            pass

        mute.allow_extra_args = mute.ignore_unknown_options = True
        return mute


class TestMute(CommandContract):
    config = MuteConfig()
    violates = (
        "test_has_a_plain_name",
        "test_is_described_in_a_line",
        "test_help_is_complete",
        "test_refuses_unknown_options",
        "test_builds_without_anything_heavy",
    )


class Vandal:
    """Counts its calls, paints over images, and has nothing to say of a single one."""

    def __init__(self):
        self.calls = 0

    def caption(self, images):
        self.calls += 1
        for image in images:
            image.paste("black", (0, 0, *image.size))
        return [f"call {self.calls}"] * len(images) if len(images) > 1 else []


@attrs.frozen(kw_only=True)
class VandalConfig(CaptionerConfig):
    """Builds `Vandal`."""

    name = "vandal"

    def build(self, device):
        return Vandal()


class TestVandal(CaptionerContract):
    config = VandalConfig()
    violates = (
        "test_captions_each_image",
        "test_captions_are_the_same_again",
        "test_does_not_change_images",
        "test_captions_a_folder",
    )
