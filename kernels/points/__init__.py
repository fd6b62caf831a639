"""Point clouds: sampling, neighbours, grouping, and the tokens of groups."""

from mmfuse.kernels.points.op import ball_query, farthest_points, group_points, nearest_neighbors
from mmfuse.kernels.points.pointnet import mini_pointnet, mini_pointnet_training

__all__ = [
    "ball_query",
    "farthest_points",
    "group_points",
    "mini_pointnet",
    "mini_pointnet_training",
    "nearest_neighbors",
]
