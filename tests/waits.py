"""What makes the host wait for a GPU, seen without one: tensors on the meta device stand for those on a GPU.

The meta device has no numbers, so nothing that is read from it can be had by chance.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "item")
# Operators whose result has a size that only the device knows.
SIZES = ("nonzero", "masked_select", "argwhere", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount")
COPIES = ("_to_copy", "copy_", "_copy_from")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
FROM_HOST = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Waited(AssertionError):
    """An operator for which the host waits."""


class NoWaiting(TorchDispatchMode):
    """Raises Waited where the host would wait for the device.

    It sees reads of a number, operators whose result has an unknown size, masks of booleans as indices, and copies between the
    host and the device. A copy is one of unpinned memory here, since only a GPU has pinned memory.
    """

    def __enter__(self) -> "NoWaiting":
        self._functions = _FromHost()
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._functions.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors}
        if name in COPIES and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        there = "meta" in devices
        if there and (name in READS or name in SIZES or (name in COPIES and len(devices) > 1)):
            raise Waited(name)
        if there and name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waited(name)
        if (
            there
            and name in INDEXING
            and any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if t is not None)
        ):
            raise Waited(f"{name} by a mask")
        if (
            name == "_sample_dirichlet" and there
        ):  # torch has no kernel of it for meta tensors; CUDA's waits for nothing
            return torch.empty_like(args[0])
        return function(*args, **kwargs)


class _FromHost(TorchFunctionMode):
    """Raises Waited where a tensor is made of Python numbers on the device, which copies them from unpinned memory."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FROM_HOST:
            numbers = args[1] if function is torch.Tensor.new_tensor else args[0]
            own = args[0].device if function is torch.Tensor.new_tensor else "cpu"
            where = torch.device(kwargs.get("device") or own)
            if where.type == "meta" and not (isinstance(numbers, torch.Tensor) and numbers.is_meta):
                raise Waited(function.__name__)
        return function(*args, **kwargs)
