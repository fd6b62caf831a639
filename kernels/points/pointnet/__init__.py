"""The mini-PointNet: tokens of groups of points, of which only the argmax is kept."""

from mmfuse.kernels.points.pointnet.op import mini_pointnet, mini_pointnet_training

__all__ = ["mini_pointnet", "mini_pointnet_training"]
