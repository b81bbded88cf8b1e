"""A shard: what one rank owns of a parameter, however ZeRO has cut it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The slice of one parameter's fp32 master that this rank owns.

    Args:
        name: Name of the parameter.
        start: First element, counted in the flattened parameter.
        numel: Number of elements.
        flat: The optimizer's tensor that holds them.
        offset: Where they begin in `flat`.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this shard's view (numel,) of a tensor laid out like `flat` (the master itself, a moment, a teacher)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)
