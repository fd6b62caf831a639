"""What each rank runs in the tests of accelerate() under tools for several processes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmfuse
from mmfuse.fused.acceleration.method import Fused
from mmfuse.fused.qformer import ImageQueries, QFormerConfig
from rule_samples import SAMPLES, Sample


def every_rule(rank: int, size: int) -> None:
    Fused._aside = lambda *_: False  # however small a model is
    mesh = init_device_mesh("cpu", (size,))

    def replicated(model: nn.Module, sample: Sample) -> nn.Module:
        return DistributedDataParallel(model)

    def sharded(model: nn.Module, sample: Sample) -> nn.Module:
        scalars = {p for p in model.parameters() if p.dim() == 0}  # it takes none
        return fully_shard(model, mesh=mesh, ignored_params=scalars)

    def sharded_by_parts(model: nn.Module, sample: Sample) -> nn.Module:
        fully_shard(model.get_submodule(sample.child), mesh=mesh)
        scalars = {p for p in model.parameters() if p.dim() == 0}  # it takes none
        return fully_shard(model, mesh=mesh, ignored_params=scalars)

    for rule, sample in SAMPLES.items():
        if rule.endswith((":CoCa", ":NormEMAVectorQuantizer")):  # there is nothing to train
            continue
        for tool in (replicated, sharded, sharded_by_parts):
            if tool is not replicated and rule.endswith(":NaFlexEmbeds"):
                continue  # it adds positions in place to what FSDP hooks, at which torch itself crashes
            want = result(sample, tool(sample.model(), sample), rank)
            for order in ("before", "after"):
                model = sample.model()
                if order == "before":
                    mmfuse.accelerate(model, ops=sample.ops)
                model = tool(model, sample)
                if order == "after":
                    report = mmfuse.accelerate(model, ops=sample.ops)
                    called = ("open_clip.loss:", "vector_quantize", "transformers.models.ernie4_5_vl_moe")
                    read = not rule.startswith(called) and tool is not replicated
                    assert not read or any("DTensor" in e.why or "FSDP" in e.why for e in report.left), report
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = result(sample, model, rank)
                what = f"{rule}, {tool.__name__}, {order}"
                assert list(got) == list(want) and len(want) > 1, what
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")


def qformer_layer_by_layer(rank: int, size: int) -> None:
    """Keys and values of a sharded layer are formed while it runs."""
    results = []
    for parts in ((), range(2)):
        torch.manual_seed(0)
        config = QFormerConfig(encoder_width=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        model = ImageQueries(config, 3).double().eval()
        tokens = torch.randn(2, 5, 12, dtype=torch.float64)
        if parts:
            mesh = init_device_mesh("cpu", (size,))
            for i in parts:
                fully_shard(model.bert.encoder.layer[i], mesh=mesh)
        (output,) = model.bert(model.query_tokens, kv=model.see(tokens, once=True))
        output.square().sum().backward()
        weight = model.bert.encoder.layer[0].crossattention.self.key.weight
        assert isinstance(weight, DTensor) == bool(parts)
        grad = weight.grad.full_tensor() if parts else weight.grad
        results.append((output.detach(), grad))
    torch.testing.assert_close(*results)


def result(sample: Sample, model: nn.Module, rank: int) -> dict[str, Tensor]:
    """The output, and the gradients as they are over all ranks."""
    torch.manual_seed(10 + rank)
    output = sample.run(model, torch.float64)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weight).sum().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
