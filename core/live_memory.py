"""Peak memory of a piece of code, in bytes of live tensors, on any device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class PeakMemory(TorchDispatchMode):
    """Within, follows every tensor that an operation returns; `peak` is the most bytes that lived at once.

    Counts storages, each once, from the operation that made them to their end. What lived before does not count, nor
    does the scratch memory inside an operation.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor.untyped_storage(), counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._follow(tensor.untyped_storage(), counts=True)
        return out

    def _follow(self, storage: torch.UntypedStorage, *, counts: bool) -> None:
        if storage._cdata in self._bytes:
            return
        size = storage.nbytes() if counts else 0
        self._bytes[storage._cdata] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


def _tensors(nest) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(nest)[0] if isinstance(leaf, torch.Tensor)]
