"""Counting memory: of real tensors, or of fake ones.

Fake tensors have shapes and dtypes but no memory, so what a model would need can be counted without reading its
weights, by the code that computes with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.autograd.variable import Variable
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lorakit.errors import PluginError

_META = torch.device("meta")
_READ_A_NUMBER = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_NEW_CONSTANT = torch.ops.aten.lift_fresh.default
_NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_group_norm.default)

_OUTLINES: dict[Any, Any] = {}
"""Results of operations so far, without their tensors: many layers have the same shapes, and a plan has ten steps."""

Run = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""Gives what an operation gives for its arguments."""


def _fake(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives on tensors without memory, of PyTorch's device `meta`, whatever device is asked for.

    Numbers read from them are 1, and nothing in them has overflowed: so no factor makes a layer superfluous.
    """
    if func is _READ_A_NUMBER:
        (tensor,) = args
        if not tensor.is_meta:
            return func(tensor)
        return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
    if func is _NEW_CONSTANT:
        return func(*args)
    is_moved = kwargs.get("device") is not None
    if func is _COPY and args[0].is_meta and is_moved and kwargs.get("dtype") in (None, args[0].dtype):
        # It only asks for a device, and what is there already is not copied.
        return torch.ops.aten.alias(args[0])
    args, kwargs = [_without_memory(value) for value in args], {key: _without_memory(kwargs[key]) for key in kwargs}
    if _takes_device(func):
        kwargs["device"] = _META
    if not _makes_tensors(func):
        return args[0] if _changes_numbers_only(func) else func(*args, **kwargs)
    key = (func, *map(_signature, args), *kwargs, *map(_signature, kwargs.values()))
    if key not in _OUTLINES:
        outline = tree_map_only(Tensor, _Outline.of, func(*args, **kwargs))
        if func in _NORMS:
            # `meta` gives means and deviations in float32; kernels of CPUs give them in the input's dtype.
            outline = outline[0], *(evolve(statistic, dtype=args[0].dtype) for statistic in outline[1:])
        _OUTLINES[key] = outline
    return _tensors(_OUTLINES[key])


@frozen
class _Outline:
    """All that there is of a tensor without memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Outline:
        """The outline of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def tensor(self) -> Tensor:
        """A tensor of this outline, without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=_META)


def _tensors(outline: Any) -> Any:
    """A result with tensors in the place of outlines."""
    if isinstance(outline, _Outline):
        return outline.tensor()
    return type(outline)(map(_tensors, outline)) if isinstance(outline, list | tuple) else outline


def _signature(value: Any) -> Any:
    """What the outlines of an operation's results depend on, of one of its arguments."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, list | tuple):
        return type(value), *map(_signature, value)
    return type(value), value


def _without_memory(value: Any) -> Any:
    """An argument with tensors without memory in the place of others."""
    if isinstance(value, list | tuple):
        return type(value)(map(_without_memory, value))
    return _Outline.of(value).tensor() if isinstance(value, Tensor) and not value.is_meta else value


@cache
def _changes_numbers_only(func: Any) -> bool:
    """Whether an operation gives its first tensor with other numbers in it, as `add_` does, in the same shape."""
    arguments, returns = func._schema.arguments, func._schema.returns
    changed = [own for own in arguments if own.alias_info is not None and own.alias_info.is_write]
    is_in_place = len(returns) == 1 and returns[0].alias_info is not None and changed == arguments[:1]
    return is_in_place and torch.Tag.inplace_view not in func.tags and "resize" not in func.__name__


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation returns new tensors, no views of others, and changes none."""
    schema = func._schema
    return not schema.is_mutable and all(own.alias_info is None for own in (*schema.returns, *schema.arguments))


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


class _FusedAttention(TorchFunctionMode):
    """Attention of tensors without memory, by the kernel that computes it on CPUs, unless that is switched off."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """The result of a function of PyTorch."""
        kwargs = kwargs or {}
        if func is torch.autograd.backward:
            # The mode is off in here, but a backward pass may compute parts of the forward pass once more.
            with self:
                (loss,) = args[0]
                engine = Variable._execution_engine
                return engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        if func is not scaled_dot_product_attention or not torch._C._get_flash_sdp_enabled():
            return func(*args, **kwargs)
        query, key, value, *rest = args
        mask = rest[0] if rest else kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)[0]


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors created while it is active, for as long as they exist.

    What a kernel takes and gives back while it runs is not seen.
    """

    def __init__(self, run: Run | None = None) -> None:
        """A meter of real tensors, unless `run` makes others."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        """Bytes held now."""
        self.peak = 0
        """The most that were held at once."""
        self._run = run
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What the operation gives; its tensors are counted, unless they are views of others."""
        result = self._run(func, args, kwargs or {}) if self._run else func(*args, **(kwargs or {}))
        if func is _COPY and result.is_meta and not args[0].is_meta:
            return result  # of a tensor that has memory, which was there before
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    @contextmanager
    def peak_of_forward_passes(self) -> Iterator[None]:
        """Within, the peak is that of modules' forward passes, without what reading and quantizing weights takes."""
        peak = depth = 0

        def begin(*_: object) -> None:
            nonlocal depth
            if depth == 0:
                self.peak = self.held
            depth += 1

        def end(*_: object) -> None:
            nonlocal depth, peak
            depth -= 1
            peak = max(peak, self.peak)

        hooks = (register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.peak = peak

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        # Not the storage's size: what is first seen as a view, such as a tensor in a mapped file, is copied to a device
        # without what surrounds it.
        size = tensor.nbytes
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.held += size
        self.peak = max(self.peak, self.held)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.held -= size


@contextmanager
def fake_tensors() -> Iterator[MemoryTracker]:
    """Within, tensors are made without memory, on any device; the meter counts what they would take.

    Raises PluginError where code cannot do without the numbers in them.
    """
    try:
        with MemoryTracker(_fake) as meter, _FusedAttention():
            yield meter
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if "meta" not in reason.lower():
            raise
        raise PluginError(
            f"memory cannot be estimated, because a component needs weights for that ({reason}); "
            "try the built-in network and attention backend, or find out by training for a few steps"
        ) from error
