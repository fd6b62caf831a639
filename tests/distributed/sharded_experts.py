"""What each rank runs in the tests of experts in shards: it raises where something differs from one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.fx import GraphModule

from mmfuse import UnsupportedError
from mmfuse.fused.multiway import MoMEBlock, MoTBlock, MultiwayBlock, flatten_experts, whole_state
from mmfuse.fused.tensor_parallel import shard_experts
from mmfuse.kernels import Routing

KINDS: dict[str, Callable[[], nn.Module]] = {
    "MultiwayBlock": lambda: MultiwayBlock(2, 16, 4, 24),
    "without sub_norm": lambda: MultiwayBlock(2, 16, 4, 24, sub_norm=False),
    "MoMEBlock": lambda: MoMEBlock(2, 16, 4, 24),
}


def block(kind: str = "MultiwayBlock", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = KINDS[kind]().double()
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def result(module: nn.Module, routing: Routing, seed: int = 1) -> dict[str, Tensor]:
    """Output and gradients, each whole."""
    module.zero_grad()
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(15, 16, generator=draw, dtype=torch.float64).requires_grad_()
    y = module(x, routing)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: whole(p.grad) for name, p in module.named_parameters()}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name].view_as(t), t, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def every_kind(rank: int, size: int) -> None:
    """Outputs and gradients, also of one modality alone and of bounds that the host does not know; a step; a copy."""
    mesh = init_device_mesh("cpu", (size,))
    unknown = copy.copy(Routing.from_split(3, 5, 2))
    object.__setattr__(unknown, "bounds", None)
    for kind in KINDS:
        one, two = block(kind), shard_experts(block(kind, seed=rank), mesh)
        for routing in (Routing.from_split(3, 5, 2), Routing.from_split(3, 5, 5), unknown):
            assert_same(result(two, routing), result(one, routing))
        weight = two.get_submodule("mlp" if kind == "MoMEBlock" else "ffn").fc1.weight
        assert weight.to_local().shape == weight.grad.to_local().shape == (2, 24 // size, 16)
        with implicit_replication():
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=True) for m in (one, two)]
            for m in (one, two):
                torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True).step()
        torch.testing.assert_close(whole(norms[1]), norms[0])
        assert_same(*({n: whole(p.detach()) for n, p in m.named_parameters()} for m in (two, one)))
        assert_same(result(copy.deepcopy(two), routing), result(one, routing))
        for key, t in whole_state(two).items():
            torch.testing.assert_close(t, one.state_dict()[key], rtol=1e-12, atol=1e-12)
        other = block(kind, seed=5)
        two.load_state_dict(other.state_dict())  # a rank takes its shards
        assert_same(result(two, routing), result(other, routing))
        same_paths(two.train(), rank, size)


def same_paths(module: nn.Module, rank: int, size: int) -> None:
    """Ranks of different seeds drop the same ones."""
    getattr(module, "_orig_mod", module).drop_path = 0.5
    torch.manual_seed(rank)
    y = module(torch.ones(40, 16, dtype=torch.float64), Routing.from_split(8, 5, 2)).detach()
    of_ranks = [torch.empty_like(y) for _ in range(size)]
    dist.all_gather(of_ranks, y)
    assert all(torch.equal(t, y) for t in of_ranks) and len(y[:16].unique(dim=0)) > 1


def refused(rank: int, size: int) -> None:
    mesh, linear = init_device_mesh("cpu", (size,)), nn.Linear(2, 2)
    hooked = block()
    hooked.ffn.fc1 = nn.Sequential(hooked.ffn.fc1)
    for module, error, message in (
        (linear, ValueError, "Linear has no MultiwayBlock and no MultiwayFFN"),
        (nn.Sequential(MultiwayBlock(2, 15, 5, 24)), ValueError, "0 has 5 heads, expected a multiple of the 2 ranks"),
        (MultiwayBlock(2, 16, 4, 25), ValueError, "ffn has 25 hidden features, expected a multiple of the 2 ranks"),
        (MoTBlock(2, 16, 4, 24), UnsupportedError, "MoTBlock is a MoTBlock, expected a MultiwayBlock or MultiwayFFN"),
        (hooked, UnsupportedError, "ffn has a Sequential, expected a MultiwayLinear"),
        (flatten_experts(block()), UnsupportedError, "MultiwayBlock has a weight of shape (96, 16), expected 3"),
        (shard_experts(block(), mesh), UnsupportedError, "MultiwayBlock has a _Columns, expected a MultiwayLinear"),
    ):
        try:
            shard_experts(module, mesh)
        except error as why:
            assert str(why).startswith(message), why
        else:
            raise AssertionError(message)
        assert all(not isinstance(p, DTensor) for p in module.parameters()) or "_Columns" in message


def one_graph(rank: int, size: int) -> None:
    """The same one on every rank, also where paths are dropped: a compiler may order its collectives anew."""
    module, codes = shard_experts(block(), init_device_mesh("cpu", (size,))), list[str]()

    def backend(graph: GraphModule, _: object) -> Callable[..., object]:
        codes.append(graph.code)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for split in (2, 3):
        routing = Routing.from_split(3, 5, split)
        got, want = result(compiled, routing), result(module, routing)
        assert_same({n.removeprefix("_orig_mod."): t for n, t in got.items()}, want)
    same_paths(compiled.train(), rank, size)
    of_ranks: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(of_ranks, codes)
    assert len(codes) == 2 and all(of == codes for of in of_ranks)


def saved(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    """A checkpoint of shards, which ranks of another seed load; the whole output."""
    mesh, routing = init_device_mesh("cpu", (size,)), Routing.from_split(3, 5, 2)
    module, other = (shard_experts(block(seed=seed), mesh) for seed in (0, 5))
    dcp.save(get_model_state_dict(module), checkpoint_id=folder)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    want = result(module, routing)
    assert_same(result(other, routing), want)
    return {"y": want["y"], "bytes": torch.tensor(sum(f.stat().st_size for f in Path(folder).glob(f"__{rank}_*")))}


def under_fsdp(rank: int, size: int, flat: bool) -> None:
    """`fully_shard` of experts side by side, or of shards of them: over the second dimension of a mesh."""
    mesh = init_device_mesh("cpu", (size, 1) if flat else (size // 2, 2), mesh_dim_names=("data", "experts"))
    one, two = block(), block()
    two = flatten_experts(two) if flat else shard_experts(two, mesh["experts"])
    fully_shard(two, mesh=mesh["data"])
    routing = Routing.from_split(3, 5, 2)
    assert_same(result(two, routing), result(one, routing))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (one, two)]
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*({n: whole(p.detach()) for n, p in m.named_parameters()} for m in (two, one)))
    if flat:  # as many numbers on every rank
        assert all(p.to_local().numel() == p.numel() // size for p in two.parameters())
