"""Counting memory: of tensors that are there, or of tensors that are only imagined.

Imagined tensors have shapes and number formats but no memory, so what a model would need can be counted without
reading its weights, by the code that computes with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.errors import PluginError

_READ_A_NUMBER = torch.ops.aten._local_scalar_dense.default


Run = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""Gives what an operation gives for its arguments."""


def _real(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def _imaginary(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives. Of imagined numbers, none is as code might fear, and each counts as 1.

    So nothing has overflowed, and no factor makes a layer superfluous.
    """
    if func is not _READ_A_NUMBER:
        return func(*args, **kwargs)
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    (tensor,) = args
    if not isinstance(tensor, FakeTensor):
        with unset_fake_temporarily():
            return func(tensor)
    if tensor.constant is not None:
        return func(tensor)
    return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors that come to be while it is on, for as long as they are there.

    What a kernel takes and gives back while it runs is not seen.
    """

    def __init__(self, run: Run = _real) -> None:
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
        result = self._run(func, args, kwargs or {})
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

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
def imagined() -> Iterator[MemoryMeter]:
    """Within, tensors are made without memory, on any device; the meter counts what they would take.

    Raises PluginError where code cannot do without the numbers in them.
    """
    from torch._subclasses import fake_tensor as fake

    try:
        with fake.FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter(_imaginary) as meter:
            yield meter
    except (
        fake.DataDependentOutputException,
        fake.DynamicOutputShapeException,
        fake.UnsupportedFakeTensorException,
        fake.UnsupportedOperatorException,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(
            f"memory cannot be estimated, because a component needs weights for that ({reason}); "
            "try the built-in network and attention backend, or find out by training for a few steps"
        ) from error
