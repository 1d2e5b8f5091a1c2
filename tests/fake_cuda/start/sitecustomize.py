"""Lets host code go on where it reads what a kernel, which never ran, would have written."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _PatchTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _patch(module.Tensor, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(tensor: Any, torch: Any) -> None:
    plain_repeat, plain_finite = tensor.repeat_interleave, tensor.isfinite

    def repeat_interleave(
        self: Any, repeats: Any, dim: Any = None, *, output_size: Any = None
    ) -> Any:
        """The length of the result comes from a sum that the GPU would have made."""
        if type(repeats) is tensor and repeats.is_cuda and output_size is None:
            output_size = int(repeats.cpu().sum())
        return plain_repeat(self, repeats, dim, output_size=output_size)

    def isfinite(self: Any) -> Any:
        """What nothing has computed is as good as finite; the question still waits for the GPU."""
        if not self.is_cuda:
            return plain_finite(self)
        torch.cuda.current_stream().synchronize()
        return torch.ones(1, dtype=torch.bool)

    tensor.repeat_interleave, tensor.isfinite = repeat_interleave, isfinite


sys.meta_path.insert(0, _PatchTorch())
