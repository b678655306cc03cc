"""Discovery of plugins, with real distributions on the path: what one of them does wrong harms no other."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.api.captioner import CaptionerConfig
from lorakit.api.components import NetworkConfig, OptimizerConfig, SaverConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary
from lorakit.errors import PluginError
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from lorakit.plugins.other_names import PLUGINS
from tests.guests import install, optimizer_source, write_metadata

Discover = Callable[..., Catalog]

_numbers = itertools.count()

HEAD = """
from __future__ import annotations
from typing import TYPE_CHECKING
from attrs import frozen
from lorakit.api import OptimizerConfig, hookimpl
"""


@pytest.fixture
def discover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Discover:
    """Install distributions, each given as its name and the sources of its modules, and discover what there is."""

    def discover(**distributions: list[str]) -> Catalog:
        for distribution, sources in distributions.items():
            # Modules are imported once in a process, so each needs a name of its own; plugins are sorted by it.
            modules = {f"guest_{next(_numbers):04}": source for source in sources}
            install(tmp_path / "site", distribution.replace("_", "-"), **modules)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return Catalog.discover()

    return discover


def test_all_that_comes_with_lorakit_works() -> None:
    """Every built-in plugin loads, and there is at least one of each kind, or one in a package of the repository."""
    catalog = Catalog.discover()
    own = [plugin for plugin in catalog.broken if plugin.provider.distribution == "lorakit"]
    assert own == []
    for base in REGISTRATION_HOOKS.values():
        assert catalog.of_kind(base) or base.kind in PLUGINS, base.kind


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_package_anywhere", "No module named 'no_such_package_anywhere'"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (f"{HEAD}@hookimpl\ndef register_optimisers(): return []", "did you mean 'register_optimizers'?"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(extra): return []", "'extra'"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): return 1 / 0", "ZeroDivisionError: division by zero"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): yield 1 / 0", "ZeroDivisionError: division by zero"),
        (f"{HEAD}def register_optimizers(): return []", "mark its functions with @lorakit.hookimpl"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): pass", "register_optimizers returned None, not a list"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): return 'lion'", "returned 'lion', not a list of classes"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): return OptimizerConfig", "not a list of classes"),
        (f"{HEAD}@hookimpl\ndef register_optimizers(): return [3]", "3, which is not a subclass of OptimizerConfig"),
        (f"{HEAD}@hookimpl\ndef register_networks(): return [OptimizerConfig]", "not a subclass of NetworkConfig"),
        (
            f"{HEAD}class Mine(OptimizerConfig):\n  name = 'mine'\n@hookimpl\ndef register_optimizers(): return [Mine]",
            "Mine is not an attrs class; put @frozen(kw_only=True) above it",
        ),
        (
            f"{HEAD}@frozen(kw_only=True)\nclass Mine(OptimizerConfig):\n  def build(self, groups): pass\n"
            "@hookimpl\ndef register_optimizers(): return [Mine]",
            "Mine has no name; add a line such as: name = 'example'",
        ),
        (
            f"{HEAD}@frozen(kw_only=True)\nclass Mine(OptimizerConfig):\n  name: str = 'mine'\n"
            "@hookimpl\ndef register_optimizers(): return [Mine]",
            "Mine has no name",
        ),
        (
            f"{HEAD}@frozen(kw_only=True)\nclass Mine(OptimizerConfig):\n  name = 'mine'\n"
            "@hookimpl\ndef register_optimizers(): return [Mine]",
            "Mine has no method build, which returns the optimizer",
        ),
        (
            f"{HEAD}if TYPE_CHECKING:\n  from pathlib import Path\n"
            "@frozen(kw_only=True)\nclass Mine(OptimizerConfig):\n  name = 'mine'\n  file: Path\n"
            "  def build(self, groups): pass\n@hookimpl\ndef register_optimizers(): return [Mine]",
            "name 'Path' is not defined; import it outside of `if TYPE_CHECKING`",
        ),
        (
            f"{HEAD}from attrs import field\n@frozen(kw_only=True)\nclass Mine(OptimizerConfig):\n  name = 'mine'\n"
            "  size = field(default=1)\n  def build(self, groups): pass\n"
            "@hookimpl\ndef register_optimizers(): return [Mine]",
            "Mine has a field without a type: size",
        ),
    ],
)
def test_a_broken_plugin_is_noted_and_harms_no_other(discover: Discover, source: str, error: str) -> None:
    """A plugin that fails in any way is listed with its distribution and error; all others are there."""
    before = Catalog.discover()
    catalog = discover(broken_guest=[source], good_guest=[optimizer_source("guest_lion")])
    (broken,) = (plugin for plugin in catalog.broken if plugin.provider.distribution == "broken-guest")
    assert error in broken.error
    assert "\n" not in broken.error
    assert str(broken.provider) == "broken-guest 1.0"
    assert set(before.registrations) < set(catalog.registrations)
    assert catalog.find(OptimizerConfig, "guest_lion").name == "guest_lion"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "from lorakit.components import NetworkConfig, OptimizerConfig",
            "imports lorakit.components, which is not part of the plugin API; "
            "import NetworkConfig, OptimizerConfig from lorakit.api",
        ),
        (
            "from lorakit.schedules import (\n    WarmupConfig,\n    half_waves,\n)",
            "imports lorakit.schedules, which is not part of the plugin API; "
            "import WarmupConfig, cosine_factor from lorakit.api",
        ),
        (
            "import lorakit.engine.observing",
            "imports lorakit.engine, which is not part of the plugin API; import from lorakit.api",
        ),
        (
            "from lorakit.plugins.discovery import Observer",
            "imports lorakit.plugins.discovery, which is not part of the plugin API; import Observer from lorakit.api",
        ),
        ("from lorakit.api import OptimizerConf", "lorakit.api has no OptimizerConf; did you mean OptimizerConfig?"),
        ("from lorakit.api import Frobnicator", "lorakit.api has no Frobnicator"),
        ("from lorakit.testing.nothing import it", "ModuleNotFoundError: No module named 'lorakit.testing.nothing'"),
        (
            "if True: from lorakit.components import Component",
            "imports lorakit.components, which is not part of the plugin API; import Component from lorakit.api",
        ),
    ],
)
def test_imports_that_are_not_promised(discover: Discover, source: str, error: str) -> None:
    """A plugin that imports from another module of lorakit is broken, and its error names the import to write."""
    catalog = discover(stale_guest=[source])
    (broken,) = (plugin for plugin in catalog.broken if plugin.provider.distribution == "stale-guest")
    assert broken.error.endswith(error)


def test_an_entry_point_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points that name no module, or nothing in it, are broken plugins like others."""
    (tmp_path / "pointed_at.py").write_text("")
    write_metadata(tmp_path, "lost", "[lorakit]\na = pointed_at:nothing\nb = nowhere_at_all\nc = pointed_at\n")
    monkeypatch.syspath_prepend(tmp_path)
    errors = {plugin.provider.entry_point: plugin.error for plugin in Catalog.discover().broken}
    assert "has no attribute 'nothing'" in errors["a"]
    assert "No module named 'nowhere_at_all'" in errors["b"]
    assert "it implements no hook" in errors["c"]


def test_entry_points_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution whose metadata is damaged is a broken plugin, and all others are there."""
    before = Catalog.discover()
    write_metadata(tmp_path, "garbled", "[lorakit]\nthis is no entry point\n")
    monkeypatch.syspath_prepend(tmp_path)
    catalog = Catalog.discover()
    (broken,) = (plugin for plugin in catalog.broken if plugin.provider.distribution == "garbled")
    assert broken.provider.entry_point == "entry_points.txt"
    assert "it cannot be read" in broken.error
    assert catalog.registrations == before.registrations


def test_a_distribution_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose distribution has lost its metadata is used, and said to come from an unknown one."""
    install(tmp_path, "nameless", nameless_guest=optimizer_source("nameless"))
    (tmp_path / "nameless-1.0.dist-info" / "METADATA").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = Catalog.discover().of_kind(OptimizerConfig)["nameless"]
    assert found.provider.distribution == "unknown"


def test_a_clash_belongs_to_neither(discover: Discover) -> None:
    """A name that two distributions provide is an error that names both; each is had by its qualified name."""
    catalog = discover(first_guest=[optimizer_source("same")], second_guest=[optimizer_source("same")])
    with pytest.raises(PluginError) as caught:
        catalog.find(OptimizerConfig, "same")
    assert "first-guest 1.0" in str(caught.value)
    assert "second-guest 1.0" in str(caught.value)
    assert "'first-guest:same' or 'second-guest:same'" in str(caught.value)
    first, second = (catalog.find(OptimizerConfig, f"{name}:same") for name in ("first-guest", "Second_Guest"))
    assert first is not second
    assert catalog.full_name(first) == "first-guest:same"


def test_a_guest_takes_no_name_of_a_built_in(discover: Discover) -> None:
    """A guest that calls itself like a built-in clashes with it instead of replacing it."""
    catalog = discover(bold_guest=[optimizer_source("adamw")])
    with pytest.raises(PluginError, match=r"provided by .*bold-guest 1\.0.*lorakit|lorakit .*bold-guest 1\.0"):
        catalog.find(OptimizerConfig, "adamw")
    assert catalog.find(OptimizerConfig, "lorakit:adamw").__module__ == "lorakit.builtin.optimizers.standard"
    assert catalog.find(OptimizerConfig, "bold-guest:adamw").__module__.startswith("guest_")


def test_one_distribution_that_clashes_with_itself(discover: Discover) -> None:
    """Two components of one name in one distribution are an error that says so."""
    catalog = discover(torn_guest=[optimizer_source("torn"), optimizer_source("torn")])
    with pytest.raises(PluginError, match="one distribution cannot provide it twice"):
        catalog.find(OptimizerConfig, "torn")


def test_names_are_per_kind(discover: Discover) -> None:
    """An optimizer may have the name of a saver, and unqualified names stay as they are."""
    catalog = discover(modest_guest=[optimizer_source("safetensors")])
    assert catalog.find(OptimizerConfig, "safetensors") is not catalog.find(SaverConfig, "safetensors")
    assert catalog.full_name(catalog.find(SaverConfig, "safetensors")) == "safetensors"


def test_a_component_that_is_registered_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that imports another's hook, and a distribution that is on the path twice, make no clash."""
    again = "from echo_first import *\nfrom echo_first import register_optimizers"
    for site in ("a", "b"):
        install(tmp_path / site, "echo", echo_first=optimizer_source("echo"), echo_second=again)
        monkeypatch.syspath_prepend(tmp_path / site)
    catalog = Catalog.discover()
    assert len(catalog.of_kind(OptimizerConfig)["echo"]) == 1
    assert catalog.find(OptimizerConfig, "echo").name == "echo"


def test_unknown_names(discover: Discover) -> None:
    """An unknown name is answered with the nearest, or with all there are."""
    catalog = discover(helpful_guest=[optimizer_source("guest_opt")])
    with pytest.raises(PluginError, match=r"no optimizer is called 'AdamW8Bit' \(did you mean 'adamw8bit'\?"):
        catalog.find(OptimizerConfig, "AdamW8Bit")
    with pytest.raises(PluginError, match=r"no network is called 'locon2' \(there are c3lier, lierla"):
        catalog.find(NetworkConfig, "locon2")
    with pytest.raises(PluginError, match=r"'guest_opt' is provided by helpful-guest 1\.0"):
        catalog.find(OptimizerConfig, "lorakit:guest_opt")
    with pytest.raises(PluginError, match=r"no saver is called 'safetensors' \(none is installed\)"):
        Catalog().find(SaverConfig, "safetensors")
    with pytest.raises(PluginError, match=r"'x' \(none is installed; some are in plugins/lorakit-tagger and plugins/l"):
        Catalog().find(CaptionerConfig, "x")


def test_an_unknown_name_may_be_a_broken_plugins(discover: Discover) -> None:
    """Whoever asks for a name that is not there is told of the plugins that are broken, and why."""
    catalog = discover(sick_guest=["import no_such_package_anywhere"])
    with pytest.raises(PluginError) as caught:
        catalog.find(OptimizerConfig, "prodigy")
    assert "of sick-guest 1.0, which may provide it, is broken" in str(caught.value)
    assert "No module named 'no_such_package_anywhere'" in str(caught.value)


def test_missing_packages(discover: Discover) -> None:
    """A component whose packages are not installed is listed, and asking for it names what to install."""
    source = optimizer_source("needy", ("attrs", "no-such-package-a", "no-such-package-b"))
    catalog = discover(needy_guest=[source])
    assert "needy" in catalog.of_kind(OptimizerConfig)
    with pytest.raises(PluginError, match=r"not installed: pip install no-such-package-a no-such-package-b$"):
        catalog.find(OptimizerConfig, "needy")


DETECTOR = (
    "from lorakit.api import DetectedFamily, hookimpl\n@hookimpl\ndef detect_model_family(checkpoint): return {}\n"
)


@pytest.mark.parametrize("answer", ["1 / 0", "7", "__import__('sys').exit()"])
def test_a_detector_that_fails_is_passed_over(
    discover: Discover, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    """A plugin that raises over a checkpoint, or answers nonsense, is warned of, and the next one is asked."""
    plugins = {
        "a_guest": [DETECTOR.format(answer)],
        "b_guest": [DETECTOR.format("DetectedFamily('theirs', 'a model of theirs')")],
    }
    checkpoint = CheckpointSummary(Path("model.ckpt"), "pickle", {"weight": (1,)})
    with caplog.at_level(logging.WARNING, "lorakit"):
        assert discover(**plugins).detect_model_family(checkpoint).name == "theirs"
    assert "of a-guest 1.0 cannot tell the family of model.ckpt" in caplog.text


def test_detectors_see_the_checkpoint(discover: Discover) -> None:
    """A detector is given the summary; a checkpoint that no plugin knows is of no family."""
    catalog = discover(
        family_guest=[DETECTOR.format("DetectedFamily('mine', 'x') if 'my.weight' in checkpoint.tensors else None")]
    )
    known = CheckpointSummary(Path("a"), "safetensors", {"my.weight": (1,)})
    assert catalog.detect_model_family(known).name == "mine"
    assert catalog.detect_model_family(CheckpointSummary(Path("b"), "safetensors", {"other": (1,)})).name is None
    with pytest.raises(PluginError, match="no model family is called 'mine'"):
        catalog.find(ModelFamilyConfig, "mine")
