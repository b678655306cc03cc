from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import dadaptation
import pytest
import torch
from dadaptation.experimental.dadapt_adam_preprint import DAdaptAdamPreprint
from dadaptation.experimental.dadapt_adan_ip import DAdaptAdanIP
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _foreach_utils
from transformers.optimization import Adafactor

from lorakit.api.components import OptimizerConfig
from lorakit.builtin.optimizers._fused_adamw import FusedAdamW
from lorakit.builtin.optimizers.bitsandbytes import (
    AdamW8bitConfig,
    Lion8bitConfig,
    PagedAdamW8bitConfig,
    PagedAdamW32bitConfig,
    PagedAdamWConfig,
    PagedLion8bitConfig,
    SGDNesterov8bitConfig,
)
from lorakit.builtin.optimizers.dadaptation import (
    DAdaptAdaGradConfig,
    DAdaptAdamConfig,
    DAdaptAdanConfig,
    DAdaptAdanIPConfig,
    DAdaptationConfig,
    DAdaptLionConfig,
    DAdaptSGDConfig,
)
from lorakit.builtin.optimizers.standard import AdafactorConfig, AdamWConfig, LionConfig, SGDNesterovConfig
from lorakit.config.load import config_from_tables
from lorakit.networks.network import ParameterGroup

CONFIGS = [
    AdamWConfig(lr=0.05),
    AdamW8bitConfig(lr=0.05, min_8bit_size=0),
    LionConfig(lr=0.02),
    DAdaptationConfig(),
    AdafactorConfig(lr=0.05),
    AdafactorConfig(relative_step=True),
]
IDS = ["adamw", "adamw8bit", "lion", "dadaptation", "adafactor", "adafactor relative"]
DISTANCE = {"weight_decay": 0.5, "d0": 1e-4, "growth_rate": 1.02}
"""Changed options that most optimizers of D-Adaptation have."""
TARGET = torch.linspace(-1, 1, 64 * 80).view(64, 80)


def group(name: str, lr: float) -> ParameterGroup:
    """One parameter, ½ everywhere."""
    return ParameterGroup(name, name, (nn.Parameter(torch.full_like(TARGET, 0.5)),), lr)


def train(config: OptimizerConfig, groups: Sequence[ParameterGroup], steps: int) -> tuple[Any, list[float]]:
    """Fit each parameter to TARGET; the optimizer and the losses."""
    optimizer = config.build(groups)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([(p - TARGET).square().mean() for one in groups for p in one.parameters]).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return optimizer, losses


def moved(one: ParameterGroup) -> Tensor:
    """How far a group's parameter came from ½."""
    return (one.parameters[0].detach() - 0.5).abs().max()


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_lowers_a_quadratic(config: OptimizerConfig) -> None:
    """Two hundred steps bring a quadratic's loss to a small part of what it was, and the group keeps its name."""
    optimizer, losses = train(config, [group("unet", config.lr)], 200)
    assert losses[-1] < 0.1 * losses[0]
    assert [one["name"] for one in optimizer.param_groups] == ["unet"]


@pytest.mark.parametrize("config", CONFIGS[:3] + CONFIGS[4:5], ids=IDS[:3] + IDS[4:5])
def test_each_group_has_its_own_learning_rate(config: OptimizerConfig) -> None:
    """A group's first step is as long as its own learning rate says."""
    fast, slow = group("unet", 1e-2), group("text_encoder", 1e-4)
    optimizer, _ = train(config, [fast, slow], 1)
    assert [one["lr"] for one in optimizer.param_groups] == [1e-2, 1e-4]
    assert moved(fast) / moved(slow) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_schedule_at_zero_stops_it(config: OptimizerConfig) -> None:
    """While the LR schedule is at zero nothing moves, and then it does."""
    one = group("unet", config.lr)
    optimizer = config.build([one])
    schedule = LambdaLR(optimizer, lambda step: float(step >= 2))
    moves = []
    for _ in range(4):
        before = one.parameters[0].detach().clone()
        (one.parameters[0] - TARGET).square().mean().backward()
        optimizer.step()
        schedule.step()
        moves.append(not torch.equal(before, one.parameters[0]))
    assert moves == [False, False, True, True]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_resumes_exactly(config: OptimizerConfig) -> None:
    """An optimizer restored from its state takes the same steps as one that was never interrupted."""
    whole = group("unet", config.lr)
    train(config, [whole], 10)
    part = group("unet", config.lr)
    optimizer, _ = train(config, [part], 5)
    again = config.build([part])
    again.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        again.zero_grad()
        (part.parameters[0] - TARGET).square().mean().backward()
        again.step()
    assert torch.equal(part.parameters[0], whole.parameters[0])


def test_adamw_options() -> None:
    """betas, eps and weight_decay reach the optimizer: its steps are those of torch's AdamW with the same."""
    ours = group("unet", 1e-2)
    train(AdamWConfig(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3), [ours], 5)
    theirs = nn.Parameter(torch.full_like(TARGET, 0.5))
    reference = AdamW([theirs], 1e-2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3, foreach=False)
    for _ in range(5):
        reference.zero_grad()
        (theirs - TARGET).square().mean().backward()
        reference.step()
    assert torch.allclose(ours.parameters[0], theirs, atol=1e-6)


def test_adamw8bit_keeps_small_states_in_32_bits() -> None:
    """State is 8-bit from `min_8bit_size` numbers on, and 32-bit below."""
    dtypes = {}
    for size in (1, TARGET.numel() + 1):
        optimizer, _ = train(AdamW8bitConfig(min_8bit_size=size), [group("unet", 1e-3)], 1)
        (state,) = optimizer.state.values()
        dtypes[size] = state["state1"].dtype
    assert list(dtypes.values()) == [torch.uint8, torch.float32]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (AdamW8bitConfig(), {"betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.5}),
        (LionConfig(), {"betas": (0.2, 0.5), "weight_decay": 0.5}),
        (PagedAdamWConfig(), {"betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.5}),
        (PagedAdamW8bitConfig(), {"betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.5, "min_8bit_size": 10**6}),
        (Lion8bitConfig(), {"betas": (0.2, 0.5), "weight_decay": 0.5}),
        (SGDNesterovConfig(), {"momentum": 0.5, "weight_decay": 0.5}),
        (SGDNesterov8bitConfig(lr=1.0), {"momentum": 0.5, "weight_decay": 0.5, "min_8bit_size": 10**6}),
        (DAdaptationConfig(), {"betas": (0.5, 0.6), "eps": 1e-2, **DISTANCE}),
        (DAdaptAdamConfig(), {"betas": (0.5, 0.6), "eps": 1e-2, "use_bias_correction": True, **DISTANCE}),
        (DAdaptAdanConfig(), {"betas": (0.5, 0.6, 0.7), "eps": 1e-2, "no_prox": True, **DISTANCE}),
        (DAdaptAdanIPConfig(), {"betas": (0.5, 0.6, 0.7), "eps": 1e-2, "no_prox": True, **DISTANCE}),
        (DAdaptLionConfig(), {"betas": (0.2, 0.5), "weight_decay": 0.5, "d0": 1e-4}),
        (DAdaptAdaGradConfig(), {"momentum": 0.5, "eps": 1e-2, **DISTANCE}),
        (DAdaptSGDConfig(), {"momentum": 0.5, **DISTANCE}),
        (
            AdafactorConfig(),
            {
                "scale_parameter": True,
                "clip_threshold": 0.1,
                "decay_rate": -0.2,
                "beta1": 0.5,
                "eps": (1e-2, 1e-3),
                "weight_decay": 0.5,
                "relative_step": True,
            },
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_option_has_an_effect(config: OptimizerConfig, changes: dict[str, Any]) -> None:
    """Each option by itself changes where a few steps lead."""
    usual = group("unet", config.lr)
    train(config, [usual], 8)
    for name, value in changes.items():
        changed = group("unet", config.lr)
        train(attrs.evolve(config, **{name: value}), [changed], 8)
        assert not torch.equal(changed.parameters[0], usual.parameters[0]), name


def test_decoupled_decay_of_dadaptation(capsys: pytest.CaptureFixture[str]) -> None:
    """`decouple` changes how the weight decay acts, and nothing is printed about it."""
    ends = []
    for decouple in (False, True):
        one = group("unet", 1.0)
        train(DAdaptationConfig(weight_decay=0.5, decouple=decouple), [one], 8)
        ends.append(one.parameters[0].detach())
    assert not torch.equal(*ends)
    assert capsys.readouterr().out == ""


def test_dadaptation_wants_one_learning_rate() -> None:
    """Different learning rates are a problem of the key that differs; zero, which leaves a part out, is none."""
    (problem,) = DAdaptSGDConfig(text_encoder_lr=0.5).problems()
    assert problem.key == "text_encoder_lr"
    assert "text_encoder_lr = 0" in problem.hint
    assert not list(DAdaptationConfig(unet_lr=0.5, text_encoder_lr=0.5).problems())
    assert not list(DAdaptationConfig(text_encoder_lr=0).problems())


def test_dadaptation_refuses_rates_of_single_layers() -> None:
    """Layers with rates of their own, as networks may ask for, are a problem; layers left out are none."""
    (problem,) = DAdaptLionConfig().check_lrs([1.0, 16.0, 0.0])
    assert problem.key == "optimizer.name"
    assert not list(DAdaptLionConfig().check_lrs([1.0, 1.0, 0.0]))
    assert not list(AdamWConfig().check_lrs([1.0, 16.0]))


def test_relative_steps_are_adafactors_own_times_the_schedule() -> None:
    """With relative_step the steps are those of transformers' Adafactor, and a schedule at ½ halves them."""
    ours, half = group("unet", 1e-4), group("unet", 1e-4)
    config = AdafactorConfig(relative_step=True, warmup_init=True)
    train(config, [ours], 5)
    optimizer = config.build([half])
    LambdaLR(optimizer, lambda _: 0.5)
    theirs = nn.Parameter(torch.full_like(TARGET, 0.5))
    reference = Adafactor([theirs], scale_parameter=False, relative_step=True, warmup_init=True)
    for _ in range(5):
        for parameter, one in ((theirs, reference), (half.parameters[0], optimizer)):
            one.zero_grad()
            (parameter - TARGET).square().mean().backward()
            one.step()
    assert torch.equal(ours.parameters[0], theirs)
    assert moved(half) == pytest.approx(float(moved(ours)) / 2, rel=0.02)


def test_adafactor_options_without_effect() -> None:
    """Learning rates beside relative_step, and warmup_init without it, are problems, each of its key."""

    def keys(**options: Any) -> list[str]:
        return [problem.key for problem in AdafactorConfig(**options).problems()]

    assert keys(relative_step=True, lr=1e-3, unet_lr=1e-4, text_encoder_lr=1e-5) == ["lr", "unet_lr", "text_encoder_lr"]
    assert keys(relative_step=True, text_encoder_lr=0) == []
    assert keys(warmup_init=True) == ["warmup_init"]
    assert keys(lr=1e-3, unet_lr=1e-4) == []


@pytest.mark.parametrize("config", [type(config) for config in CONFIGS[:5]])
def test_values_out_of_range(config: type[OptimizerConfig]) -> None:
    """A negative learning rate or weight decay is refused by name."""
    for field in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=field):
            config(**{field: -1.0})


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (PagedAdamWConfig(lr=0.01, weight_decay=0.3), AdamW),
        (PagedAdamW32bitConfig(lr=0.01, betas=(0.5, 0.6), weight_decay=0.3), AdamW),
        (SGDNesterovConfig(lr=10.0, momentum=0.8, weight_decay=0.1), partial(SGD, nesterov=True)),
        (SGDNesterov8bitConfig(lr=10.0, momentum=0.8, weight_decay=0.1, min_8bit_size=10**6), SGD),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_equals_pytorchs(config: OptimizerConfig, reference: Any) -> None:
    """Steps are those of PyTorch's optimizer with the same settings; that of bitsandbytes has no look ahead."""
    ours = group("unet", config.lr)
    train(config, [ours], 5)
    theirs = nn.Parameter(torch.full_like(TARGET, 0.5))
    settings = {key: value for key, value in config.extra_options().items() if key != "min_8bit_size"}
    optimizer = reference([theirs], config.lr, **settings)
    for _ in range(5):
        optimizer.zero_grad()
        (theirs - TARGET).square().mean().backward()
        optimizer.step()
    assert torch.allclose(ours.parameters[0], theirs, atol=1e-6)
    assert moved(ours) > 1e-3


@pytest.mark.parametrize("small", [AdamW8bitConfig, PagedAdamW8bitConfig, Lion8bitConfig, PagedLion8bitConfig])
def test_states_are_in_8_bits(small: Any) -> None:
    """Large tensors have all their state in 8 bits, and go the same way, up to a tenth, as with 32 bits."""
    coarse, fine = group("unet", 1e-3), group("unet", 1e-3)
    for size, one, dtype in ((4096, coarse, torch.uint8), (10**6, fine, torch.float32)):
        optimizer, _ = train(small(lr=1e-3, min_8bit_size=size), [one], 20)
        (state,) = optimizer.state.values()
        assert {value.dtype for key, value in state.items() if key.startswith("state")} == {dtype}
    difference = coarse.parameters[0] - fine.parameters[0]
    assert difference.abs().mean() < 0.1 * (fine.parameters[0] - 0.5).abs().mean()


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (DAdaptationConfig(weight_decay=0.1), DAdaptAdamPreprint),
        (DAdaptAdaGradConfig(momentum=0.5), dadaptation.DAdaptAdaGrad),
        (DAdaptAdamConfig(use_bias_correction=True), dadaptation.DAdaptAdam),
        (DAdaptAdanConfig(no_prox=True), dadaptation.DAdaptAdan),
        (DAdaptAdanIPConfig(betas=(0.9, 0.8, 0.95)), DAdaptAdanIP),
        (DAdaptLionConfig(weight_decay=0.1), dadaptation.DAdaptLion),
        (DAdaptSGDConfig(momentum=0.5, growth_rate=2.0), dadaptation.DAdaptSGD),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_equals_dadaptations(config: OptimizerConfig, cls: Any) -> None:
    """Steps are those of the package's class, up to rounding, and so is the estimate, which is a plain number."""
    ours = group("unet", 1.0)
    optimizer, _ = train(config, [ours], 12)
    theirs = nn.Parameter(torch.full_like(TARGET, 0.5))
    settings = {key: value for key, value in config.extra_options().items() if value is not None}
    reference = cls([theirs], **settings)
    for _ in range(12):
        reference.zero_grad()
        (theirs - TARGET).square().mean().backward()
        reference.step()
    assert torch.allclose(ours.parameters[0], theirs, rtol=0, atol=1e-7)
    assert not torch.equal(theirs, torch.full_like(TARGET, 0.5))
    estimate = optimizer.param_groups[0]["d"]
    assert isinstance(estimate, float)
    assert estimate == pytest.approx(float(reference.param_groups[0]["d"]), rel=1e-5)
    assert estimate > 1e-6


@attrs.frozen(kw_only=True)
class FreeConfig(AdamWConfig):
    """An optimizer that does without a schedule."""

    name = "free"
    schedule_free = True


def test_schedules_beside_schedule_free_optimizers(train_tables: dict[str, Any], tmp_path: Path) -> None:
    """A schedule beside an optimizer that does without one is a warning; the constant one is none."""
    keys = {}
    for name in ("constant", "cosine"):
        config = config_from_tables({**train_tables, "lr_scheduler": {"name": name}}, tmp_path)
        assert not list(config.warnings())
        keys[name] = [warning.key for warning in attrs.evolve(config, optimizer=FreeConfig()).warnings()]
    assert keys == {"constant": [], "cosine": ["lr_scheduler.name"]}


@pytest.mark.parametrize(("devices", "is_fused"), [(["cuda", "meta"], True), (["cuda", "cpu"], False)])
def test_fused_where_pytorch_is(monkeypatch: pytest.MonkeyPatch, devices: list[str], is_fused: bool) -> None:
    """AdamW and SGD are fused on every device for which PyTorch says that it has fused kernels."""
    monkeypatch.setattr(_foreach_utils, "_get_fused_kernels_supported_devices", lambda: devices)
    far = [ParameterGroup("unet", "unet", (nn.Parameter(torch.zeros(3, device="meta")),), 0.1)]
    assert isinstance(AdamWConfig().build(far), FusedAdamW) == is_fused
    assert SGDNesterovConfig().build(far).defaults["fused"] == is_fused
