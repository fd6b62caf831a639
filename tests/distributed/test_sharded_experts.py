"""Experts in shards over ranks: what one process computes, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import worlds
from distributed import sharded_experts
from distributed.sharded_experts import block, result
from mmfuse.kernels import Routing


def test_shards_are_the_whole() -> None:
    worlds.run(2, sharded_experts.every_kind)


def test_what_is_not_split() -> None:
    worlds.run(2, sharded_experts.refused)


def test_one_graph_of_shards() -> None:
    worlds.run(2, sharded_experts.one_graph, timeout=120)


def test_saved_by_two_loaded_by_one(tmp_path: Path) -> None:
    first, second = worlds.run(2, sharded_experts.saved, str(tmp_path / "shards"))
    assert min(first["bytes"], second["bytes"]) > 0
    dcp_to_torch_save(tmp_path / "shards", tmp_path / "whole")
    one = block(seed=7)
    one.load_state_dict(torch.load(tmp_path / "whole"))
    torch.testing.assert_close(result(one, Routing.from_split(3, 5, 2))["y"], first["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "in shards"])
def test_fully_shard(flat: bool) -> None:
    worlds.run(2 if flat else 4, sharded_experts.under_fsdp, flat)
