"""The projections of a mixer's direction by matrix products: `project` and `project_backward` of `pipeline.ops.kernels`."""

from torch import Tensor

from pipeline.ops.kernels import Projections
from pipeline.ops.linear import linear, weight_gradient


class TorchProjections:
    """Both projections by `linear`. All kernels inherit this; those of the CPU compute them where they are faster."""

    def project(self, u: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
        """Implement `Kernels.project`."""
        projected = linear(u, x_proj)
        return projected, linear(projected[..., : dt_proj.shape[1]], dt_proj)

    def project_backward(
        self, given: Projections, g_delta: Tensor, g_projected: Tensor, g_u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Implement `Kernels.project_backward`."""
        rank = given.dt_proj.shape[1]
        g_projected[:, :rank] = linear(g_delta, given.dt_proj.t())
        g_u.addmm_(g_projected, given.x_proj)
        return weight_gradient(g_projected, given.u), weight_gradient(g_delta, given.projected[:, :rank])
