"""Components that each break their contract in one way, with the tests that must notice.

`test_suites.py` runs this file; none of its components is registered.
"""

from __future__ import annotations

from types import MappingProxyType

import attrs
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from lorakit.components import (
    AttentionConfig,
    LRSchedulerConfig,
    ModelFamilyConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.engine.observing import Observer
from lorakit.models.stable_diffusion.model import StableDiffusion
from lorakit.networks.config import LoRAConfig
from lorakit.networks.dropout import DropoutRates
from lorakit.networks.lora import LoRAModule, LoRANetwork
from lorakit.networks.network import torch_groups
from lorakit.networks.saving import SafetensorsSaver, read_adapter
from lorakit.plugins import Catalog
from lorakit.testing.contracts import (
    AttentionContract,
    LRSchedulerContract,
    ModelFamilyContract,
    NetworkContract,
    ObserverContract,
    OptimizerContract,
    SaverContract,
)
from lorakit.testing.models import make_tiny_sd1


class UndecoratedConfig(OptimizerConfig):
    """Plain SGD in a class without its decorator."""

    name = "undecorated"

    def build(self, groups):
        return SGD(torch_groups(groups))


class TestUndecorated(OptimizerContract):
    config = UndecoratedConfig(lr=1e-2)
    violates = ("test_is_frozen", "test_imports_nothing_heavy")


@attrs.frozen(kw_only=True)
class UntidyConfig(OptimizerConfig):
    name = "Untidy"
    momentum: float = 0.9

    def build(self, groups):
        return SGD(torch_groups(groups), momentum=self.momentum)


class TestUntidy(OptimizerContract):
    config = UntidyConfig(lr=1e-2)
    violates = ("test_is_documented", "test_has_a_plain_name")


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


def unscaled_attention(query, key, value):
    query *= query.shape[-1] ** 0.5
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp()
    return weights @ value / weights.sum(-1, keepdim=True)


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
        "test_bears_large_scores",
        "test_does_not_change_its_inputs",
    )


@attrs.frozen(kw_only=True)
class CoarseConfig(AttentionConfig):
    """Computes in bfloat16 whatever it is given."""

    name = "coarse"

    def build(self):
        return lambda *inputs: scaled_dot_product_attention(*(t.bfloat16() for t in inputs)).to(inputs[0].dtype)


class TestCoarse(AttentionContract):
    config = CoarseConfig()
    violates = (
        *(f"test_equals_the_formula[{shape}]" for shape in ("self", "cross", "wide", "long-caption")),
        *(f"test_has_the_formulas_gradients[{shape}]" for shape in ("self", "cross", "wide", "long-caption")),
    )


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


class RestlessAdapter(LoRAModule):
    """Starts with an effect, draws from the global generator, ignores its multiplier and trains its layer."""

    def train(self, mode=True):
        self.base.requires_grad_(mode)
        return super().train(mode)

    def initialize(self, seed):
        for factor in (self.lora_down, self.lora_up):
            nn.init.normal_(factor, std=0.01)

    def forward(self, x):
        self.multiplier = 1.0
        return super().forward(dropout(x, 0.1, self.training))


@attrs.frozen(kw_only=True)
class RestlessConfig(LoRAConfig):
    """Adapts all linear layers, whatever the parts."""

    name = "restless"

    def build(self, targets):
        def make(target):
            linear = isinstance(target.module, nn.Linear)
            return RestlessAdapter(target.key, target.module, self.rank, self.alpha) if linear else None

        return LoRANetwork(targets, make, DropoutRates()).attach()


class TestRestless(NetworkContract):
    config = RestlessConfig()
    violates = (
        "test_starts_without_effect",
        "test_trains_the_adapters_alone",
        "test_multiplier_zero_is_the_base_model",
        "test_adapts_the_parts_it_is_told",
        "test_initialisation_follows_the_seed",
        "test_randomness_follows_the_samples",
    )


class Temporary(LoRANetwork):
    """Hands out its own factors, halves what it reads, stays attached, and lets itself be put in half precision."""

    def tensors(self):
        return {
            f"{adapter.key}.{suffix}": tensor.detach()
            for adapter in self.adapters
            for suffix, tensor in adapter.tensors().items()
        }

    def load_tensors(self, tensors, origin=""):
        for adapter in self.adapters:
            for suffix, own in adapter.tensors().items():
                own.data.copy_(tensors.get(f"{adapter.key}.{suffix}", own).mul(0.5).reshape(own.shape))

    def detach(self):
        pass

    def to(self, dtype):
        for own in self.parameters():
            own.data = own.data.to(dtype)


@attrs.frozen(kw_only=True)
class TemporaryConfig(LoRAConfig):
    """Builds `Temporary`."""

    name = "temporary"

    def build(self, targets):
        def make(target):
            adapted = target.part in self.parts and isinstance(target.module, nn.Linear)
            return LoRAModule(target.key, target.module, self.rank, self.alpha) if adapted else None

        return Temporary(targets, make, DropoutRates()).attach()


class TestTemporary(NetworkContract):
    config = TemporaryConfig()
    lr = 0.0
    violates = (
        "test_lowers_the_loss",
        "test_keys_are_those_of_the_layers",
        "test_reads_what_it_wrote",
        "test_refuses_what_does_not_fit",
        "test_detaches",
        "test_parameters_stay_float32",
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


class ForgetfulModel(StableDiffusion):
    """Knows its text by the weights alone, keeps what it should free, and lists its layers from the back."""

    def fingerprint(self, part):
        return part

    def free(self, part):
        pass

    def targets(self, parts):
        return super().targets(parts)[::-1]

    def use_attention(self, backend):
        pass

    def metadata(self):
        return {}

    def predict(self, noisy_latents, timesteps, conditioning):
        return super().predict(noisy_latents, timesteps, conditioning).half()


SD1 = Catalog.discover().find(ModelFamilyConfig, "sd1")


@attrs.frozen(kw_only=True)
class ForgetfulModelConfig(SD1):
    """Builds `ForgetfulModel`."""

    name = "forgetful-model"

    def build(self, device, dtype):
        model = super().build(device, dtype)
        return ForgetfulModel(model.stored, model.variant, device, dtype)


class TestForgetfulModel(ModelFamilyContract):
    config = ForgetfulModelConfig(path="tiny")
    text_settings = MappingProxyType({"clip_skip": 2})
    violates = (
        "test_recognises_its_models",
        "test_predicts[dtype0]",
        "test_predicts[dtype1]",
        "test_targets_are_unique_and_in_order",
        "test_fingerprints",
        "test_frees_and_reads_again",
        "test_uses_the_attention_backend",
        "test_metadata",
    )

    def make_model(self, folder):
        return make_tiny_sd1(folder)
