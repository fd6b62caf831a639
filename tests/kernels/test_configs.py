"""Tables of what was measured: which is read, what it decides, and what is wrong with one that is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import mmfuse
from mmfuse.kernels._runtime import chosen, configs, operators
from mmfuse.kernels._runtime.device import device_name, slug, vectors

CPU = torch.device("cpu")
REFERENCE = "AMD EPYC, 2 threads, avx512"


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU whose tables ship."""
    monkeypatch.setattr(configs, "device_name", lambda device: REFERENCE)
    configs.forget()
    yield
    configs.forget()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Writes the user's table of the contrastive losses."""
    monkeypatch.setenv("MMFUSE_TUNED", str(tmp_path))
    path = configs.path_of(tmp_path, "contrastive", CPU)

    def table(content: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        configs.forget()
        return path

    return table


def runs(n: int, dtype: torch.dtype = torch.float32, columns: int = 8, **options: object) -> str:
    x = torch.empty(n, columns, dtype=dtype)
    return chosen(lambda: mmfuse.clip_loss(x, x, 1.0, **options))


def test_the_users_table_comes_before_what_ships(write) -> None:  # type: ignore[no-untyped-def]
    fused = runs(400)
    assert fused in ("cpu", "chunked") and runs(100) == "torch"
    write(
        {"threads": 2, "vectors": "avx512", "least": {f"clip_loss/{name}/float32": 100 for name in ("cpu", "chunked")}}
    )
    assert runs(10) == fused and runs(9) == "torch"
    # what it does not have is what ships
    assert runs(100, torch.float64) == "torch" and runs(400, torch.float64) == "chunked"
    write({"least": {"clip_loss/cpu/float32": None, "clip_loss/chunked/float32": None}})
    assert runs(400) == "torch"
    assert "a later one is faster in float32\n" in mmfuse.explain("clip_loss", *[torch.empty(400, 8)] * 2, 1.0)


def test_the_fewest_columns_and_the_kind(write) -> None:  # type: ignore[no-untyped-def]
    for name in ("cpu", "chunked"):
        assert configs.least("contrastive", "clip_loss", name, CPU, "bfloat16") == ((256, 8192**2), (0, 2048**2))
    x = torch.empty(2048, 256, dtype=torch.bfloat16)
    assert runs(2048, x.dtype, 255) != "torch" and runs(2048, x.dtype, 256) == "torch"
    ids = torch.arange(400)
    assert runs(400, ids=ids) == "torch" != runs(400)
    write({"least": {"clip_loss/chunked": 0, "clip_loss/cpu": None}})
    # the shorter key is for what has no entry of its own
    assert runs(10, torch.float16) == "chunked" and runs(100) == "torch"


def test_a_compiled_graph_reads_them_too(write) -> None:  # type: ignore[no-untyped-def]
    write({"least": {"clip_loss/cpu/float64": 0, "clip_loss/chunked/float64": 0}})
    x = torch.randn(8, 4, dtype=torch.float64)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(str(graph.graph))
        return graph

    step = torch.compile(lambda x: mmfuse.clip_loss(x, x, 10.0), fullgraph=True, backend=backend)
    torch.testing.assert_close(step(x), mmfuse.clip_loss(x, x, 10.0))
    assert len(graphs) == 1 and "clip_loss_chunked" in graphs[0]


def test_another_cpu_is_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = configs.tables("contrastive")[slug(REFERENCE)]
    (step,) = configs.least("contrastive", "siglip_loss", "cpu", CPU, "float32")
    monkeypatch.setattr(configs, "device_name", lambda device: "Another CPU")
    monkeypatch.setattr(configs, "vectors", lambda: "default")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    configs.forget()
    factor = 16 * 128 / (shipped["threads"] * 512)
    assert configs.least("contrastive", "siglip_loss", "cpu", CPU, "float32") == ((0, round(factor * step[1])),)
    assert configs.least("contrastive", "moco_loss", "chunked", CPU, "bfloat16") == ((0, None),)
    assert configs.least("contrastive", "siglip_loss", "cpu", torch.device("meta"), "float32") == ()


def test_a_model_has_the_same_vectors_if_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"threads": 2, "least": {"clip_loss/cpu": 100}}
    shipped = {
        "a": table | {"vectors": "avx512"},
        "b": table | {"vectors": "avx512_bf16", "least": {"clip_loss/cpu": 7}},
    }
    monkeypatch.setattr(configs, "tables", cache(lambda family: shipped))
    monkeypatch.setattr(configs, "device_name", lambda device: "Another CPU")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for kind, least in (("avx512_bf16", 14), ("avx512", 200), ("avx2", 100)):
        monkeypatch.setattr(configs, "vectors", lambda kind=kind: kind)
        configs.forget()
        assert configs.least("contrastive", "clip_loss", "cpu", CPU, "float32") == ((0, least),)


def test_ranks_choose_alike(write, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    write({"least": {"distributed_clip_loss/cpu/float32": 7, "clip_loss/cpu/float32": 7}})
    monkeypatch.setattr(configs, "vectors", lambda: "default")
    for name in (REFERENCE, "Another CPU"):
        monkeypatch.setattr(configs, "device_name", lambda device, name=name: name)
        configs.forget()
        aside = operators()["distributed_clip_loss"].aside
        assert aside("cpu", CPU, 640**2 - 1, "float32") and not aside("cpu", CPU, 640**2, "float32")


def test_what_ships_is_read() -> None:
    root = Path(configs.__file__).parents[1]
    tables = sorted(root.glob("*/configs/*.json"))
    assert {t.parent.parent.name for t in tables} >= {"contrastive", "head", "patch", "points", "text"}
    for path in tables:
        for name in configs.read(path).get("least", {}):
            operator, implementation = name.split("/")[:2]
            assert operators()[operator].family == path.parent.parent.name and implementation != "torch"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ([], "holds list, expected a table with arch, threads, vectors, configs, least"),
        ({"lest": {}}, "'lest' is not known, expected some of arch, threads"),
        ({"least": []}, r"'least' is \[\], expected entries by key"),
        ({"threads": "two"}, "'threads' is 'two', expected an integer >= 0"),
        ({"least": {"clap_loss/cpu": 1}}, "'clap_loss/cpu': 'clap_loss' is no operator that has a size"),
        ({"least": {"clip_loss/gpu": 1}}, "'gpu' is none of its implementations triton, cuda, cpu, chunked, torch"),
        ({"least": {"clip_loss/torch": 1}}, "'torch' is the last of its implementations, which steps aside for none"),
        ({"least": {"clip_loss": 1}}, "'' is none of its implementations"),
        ({"least": {"clip_loss/cpu/floats": 1}}, "'floats' is neither a kind .* nor a number of columns"),
        ({"least": {"clip_loss/cpu/float32/2/3": 1}}, "'2/3' is neither"),
        ({"least": {"clip_loss/cpu/float32": -1}}, "'clip_loss/cpu/float32' is -1, expected an integer >= 0 or null"),
        ({"least": {"clip_loss/cpu/float32": 1.5}}, "is 1.5, expected an integer"),
        (
            {"vectors": "avx3"},
            "'vectors' is 'avx3', expected one of amx_bf16, avx512_bf16, avx512, "
            "avx512_bf16_2x256, avx512_2x256, avx2, default",
        ),
        ({"configs": {"stats/bfloat16/1024": {"BLOCK_M": "128"}}}, "'stats/bfloat16/1024' is .*, expected launch"),
    ],
)
def test_a_table_that_is_none(content: object, message: str, write) -> None:  # type: ignore[no-untyped-def]
    path = write(content)
    with pytest.raises(ValueError, match=message) as caught:
        runs(4)
    assert str(caught.value).startswith(str(path))


def test_the_names_of_devices() -> None:
    assert slug("NVIDIA H200") == "NVIDIA_H200" and re.search(r"_\d+_threads_[a-z0-9_]+$", slug(device_name(CPU)))
    known = ("amx_bf16", "avx512_bf16", "avx512", "avx512_bf16_2x256", "avx512_2x256", "avx2", "default")
    assert vectors() in known


def test_where_the_users_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.tuned_folder() is None
    monkeypatch.delenv("MMFUSE_TUNED")
    assert configs.tuned_folder() == tmp_path / "mmfuse" / "tuned"
