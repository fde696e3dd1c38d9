"""What flexmsa asks of a DeviceMesh."""

from torch.distributed.device_mesh import DeviceMesh

__all__ = ["check_mesh"]


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise ValueError unless the mesh has one dimension."""
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.mesh_dim_names or mesh.ndim}; take it by its name")
