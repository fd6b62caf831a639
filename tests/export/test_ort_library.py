"""Our kernels in onnxruntime: what they compute, that they ran, and what becomes of arguments that do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.cli import main
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.library import not_built
from mmfuse.kernels.codebook import linear_argmax
from mmfuse.kernels.multiway import Routing, routed_ffn
from mmfuse.kernels.qformer import few_query_attention

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmfuse.export import export_onnx, ort_library, run_onnx  # noqa: E402
from mmfuse.export.ort_kernels import error, reasons, register  # noqa: E402
from mmfuse.export.run import open_session  # noqa: E402

try:
    LIBRARY: Any = ort_library()
except UnsupportedError:
    LIBRARY = None

# one worker: the library is registered for each session of a process
pytestmark = pytest.mark.xdist_group("ort")
built = pytest.mark.skipif(LIBRARY is None, reason=not_built("ort"))

Inputs = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.uint8)


class Case(nn.Module):
    """An operator of tensors, and of weights that are a part of the file."""

    def __init__(self, operator: Callable[..., Any], **weights: Tensor):
        super().__init__()
        self.operator = operator
        self.weights = nn.ParameterDict(weights)

    def forward(self, given: Inputs) -> Any:
        return self.operator(**given, **self.weights)


COLOURS = {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.27, 0.28)}
D = 12
STEM = {"weight": drawn(D, 3, 8, 8) / 10, "bias": drawn(D)}
CLIP = {"weight": drawn(D, 3, 2, 8, 8) / 10, "bias": drawn(D)}
PREFIX = {"prefix": drawn(2, D), "position": drawn(6, D), "prefix_position": drawn(2, D, seed=1)}


def stem(weight: Tensor, bias: Tensor, **given: Tensor) -> Tensor:
    return mmfuse.patch_embed(given.pop("pixels"), weight, bias, **given, **COLOURS)


def every_step(pixels: Tensor, mask: Tensor, norm: Tensor, type_embed: Tensor, **stem: Tensor) -> Tensor:
    own = {"stem_norm": (norm, type_embed, 1e-5), "pre_norm": (norm, None, 1e-6), "mask_token": type_embed}
    return mmfuse.patch_embed(pixels, mask=mask, type_embed=type_embed, **own, **stem, **COLOURS)


def layout(name: str, **how: Any) -> Callable[..., Tensor]:
    return lambda pixels, weight, bias: mmfuse.patch_embed(pixels, weight, bias, layout=name, **how)


def attended(q: Tensor, k: Tensor, v: Tensor, **keys: Any) -> tuple[Tensor, Tensor]:
    found = few_query_attention(q, k, v, **keys, return_lse=True)
    assert found.lse is not None
    return found.o, found.lse.exp()  # no difference of infinities


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Any:
    return attended(q, k, v, cu_seqlens=cu_seqlens, longest=7)


def keys(rows: int, images: int, queries: int, tokens: int) -> Inputs:
    return {
        "q": drawn(rows, queries, 3, 8),
        **{name: drawn(images, tokens, 3, 8, seed=i) for i, name in enumerate("kv")},
    }


E, K, F_, N = 2, 10, 70, 10


def experts(wide: int = 1) -> Inputs:
    shapes = {"w1": (E, wide * F_, K), "b1": (E, wide * F_), "w2": (E, N, F_), "b2": (E, N)}
    norms = {"gamma": (E, K), "beta": (E, K), "inner_gamma": (E, F_), "inner_beta": (E, F_)}
    return {name: drawn(*shape, seed=i) / 3 for i, (name, shape) in enumerate((shapes | norms).items())}


def ffn(activation: Any) -> Callable[..., Tensor]:
    def of(x: Tensor, **w: Tensor) -> Tensor:
        routing, rows = Routing.from_split(x.shape[0], x.shape[1], 2), x.flatten(0, 1)
        return routed_ffn(
            rows, w["w1"], w["b1"], w["w2"], w["b2"], routing, activation=activation, residual=rows, scale=w["b2"][0],
            input_norm=(w["gamma"], w["beta"], 1e-5), norm=(w["inner_gamma"], w["inner_beta"], 1e-6),
        )  # fmt: skip

    return of


def by_id(x: Tensor, ids: Tensor, factor: Tensor, **w: Tensor) -> Tensor:
    routing = Routing.from_ids(ids, E)
    return routed_ffn(routing.pack(x), [*w["w1"]], None, [*w["w2"]], [*w["b2"]], routing, row_scale=factor)


def ids(rows: int) -> Inputs:
    which = torch.randint(0, E, (rows,), generator=torch.Generator().manual_seed(rows))
    return {"x": drawn(rows, K), "ids": which, "factor": drawn(rows).abs()}


# name: (model, samples, dimensions that are free)
CASES: dict[str, Any] = {
    "nearest": (
        Case(mmfuse.nearest_code, codebook=drawn(100, 20)),
        [{"z": drawn(n, 20)} for n in (5, 1, 0, 300)],
        {"z": {0: "n"}},
    ),
    "cosine": (
        Case(
            lambda z, mask, codebook: mmfuse.nearest_code(z, codebook, metric="cosine", mask=mask), codebook=drawn(7, 3)
        ),
        [{"z": drawn(n, 3), "mask": drawn(n) > 0} for n in (5, 1)],
        {"z": {0: "n"}, "mask": {0: "n"}},
    ),
    "weights that are no part of the file": (
        Case(linear_argmax),
        [{"x": drawn(n, 9), "weight": drawn(k, 9), "bias": drawn(k)} for n, k in ((5, 6), (2, 130))],
        {"x": {0: "n"}, "weight": {0: "k"}, "bias": {0: "k"}},
    ),
    "bytes": (Case(stem, **STEM), [{"pixels": pixels(b, 3, 16, 24)} for b in (2, 1, 0, 3)], {"pixels": {0: "b"}}),
    "a prefix": (
        Case(stem, **STEM, **PREFIX),
        [{"pixels": pixels(b, 3, 16, 24)} for b in (2, 1)],
        {"pixels": {0: "b"}},
    ),
    "every step": (
        Case(every_step, **STEM, **PREFIX, norm=drawn(D), type_embed=drawn(D, seed=2)),
        [{"pixels": pixels(b, 3, 16, 24), "mask": drawn(b, 6) > 0} for b in (2, 3)],
        {"pixels": {0: "b"}, "mask": {0: "b"}},
    ),
    "kept": (
        Case(stem, **STEM, **PREFIX),
        [{"pixels": pixels(b, 3, 16, 24), "ids_keep": drawn(b, 6).argsort(1)[:, :n]} for b, n in ((2, 3), (1, 5))],
        {"pixels": {0: "b"}, "ids_keep": {0: "b", 1: "n"}},
    ),
    "a still image": (Case(stem, **CLIP), [{"pixels": pixels(2, 3, 16, 24)}], {"pixels": {0: "b"}}),
    "nhwc": (
        Case(layout("nhwc", std=0.3), **STEM),
        [{"pixels": drawn(b, 16, 24, 3)} for b in (2, 1)],
        {"pixels": {0: "b"}},
    ),
    "ntchw": (Case(layout("ntchw", **COLOURS), **CLIP), [{"pixels": pixels(2, 4, 3, 16, 24)}], {"pixels": {0: "b"}}),
    "zeros": (
        Case(layout("nchw", padding="zero", **COLOURS), **STEM),
        [{"pixels": pixels(2, 3, 13, 21)}],
        {"pixels": {0: "b"}},
    ),
    "overlapping": (
        Case(layout("nchw", stride=(4, 5)), **STEM),
        [{"pixels": drawn(2, 3, 17, 24)}],
        {"pixels": {0: "b"}},
    ),
    "rows of patches": (
        Case(layout("patches", mean=0.5, std=0.5), weight=drawn(D, 21), bias=drawn(D)),
        [{"pixels": drawn(b, n, 21)} for b, n in ((2, 7), (3, 5))],
        {"pixels": {0: "b", 1: "n"}},
    ),
    "a signal": (
        Case(layout("nchw", stride=3), weight=drawn(D, 2, 4), bias=drawn(D)),
        [{"pixels": drawn(2, 2, 22)}],
        {"pixels": {0: "b"}},
    ),
    "queries": (
        Case(attended),
        [keys(b, b, 3, n) for b, n in ((2, 5), (3, 9), (0, 4))],
        {"q": {0: "b"}, "k": {0: "b", 1: "n"}, "v": {0: "b", 1: "n"}},
    ),
    "shared and short": (
        Case(attended),
        [
            keys(1, i, 2, n) | {"kv_index": torch.tensor(rows), "lengths": torch.tensor(lengths)}
            for i, n, rows, lengths in ((2, 5, [0, 1, 1], [0, 3]), (3, 6, [2, 0], [6, 1, 2]))
        ],
        {"k": {0: "i", 1: "n"}, "v": {0: "i", 1: "n"}, "kv_index": {0: "b"}, "lengths": {0: "i"}},
    ),
    "packed": (
        Case(packed),
        [
            {
                "q": drawn(1, 4, 3, 8),
                "k": drawn(t, 3, 8),
                "v": drawn(t, 3, 8, seed=1),
                "cu_seqlens": torch.tensor(bounds),
            }
            for t, bounds in ((9, [0, 5, 9]), (12, [0, 0, 6, 12]))
        ],
        {"k": {0: "t"}, "v": {0: "t"}, "cu_seqlens": {0: "i"}},
    ),
    "by id": (
        Case(by_id, **experts()),
        [ids(n) for n in (9, 1, 2, 203)],
        {n: {0: "t"} for n in ("x", "ids", "factor")},
    ),
    "experts": (
        Case(ffn("gelu"), **experts()),
        [{"x": drawn(b, s, K)} for b, s in ((2, 5), (3, 4), (1, 2))],
        {"x": {0: "b", 1: "s"}},
    ),
    "gated experts": (Case(ffn("swiglu"), **experts(2)), [{"x": drawn(2, 5, K)}], {"x": {0: "b"}}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of a case, made once; without functions, which take most of the time."""
    folder = tmp_path_factory.mktemp("ort")

    @cache
    def export(name: str, mode: Any = "custom") -> Path:
        model, samples, dynamic = CASES[name]
        path = folder / f"{name.replace(' ', '_')}_{mode}.onnx"
        named = {f"given.{key}": dims for key, dims in dynamic.items()}
        return export_onnx(model.eval(), {"given": samples[0]}, path, dynamic=named, mode=mode)

    return export


def feed(sample: Inputs) -> dict[str, np.ndarray]:
    return {f"given.{name}": t.numpy() for name, t in sample.items()}


def session(path: Path, library: Path | None = LIBRARY, profile: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        register(options, path, library)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def nodes(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node if node.domain == "mmfuse"}


def ran(profiled: Any) -> set[str]:
    """The kinds of nodes whose kernels ran."""
    events = json.loads(Path(profiled.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


def outputs(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def judge(model: nn.Module, sample: Inputs, found: list[np.ndarray]) -> None:
    """Against float64: at most twice the error of PyTorch, and rounding."""
    wide = {key: t.double() if t.is_floating_point() else t for key, t in sample.items()}
    with torch.no_grad():
        own, true = outputs(model(sample)), outputs(copy.deepcopy(model).double()(wide))
    for got, eager, wanted in zip(map(torch.from_numpy, found), own, true, strict=True):
        assert got.shape == eager.shape and got.dtype == eager.dtype
        if not eager.is_floating_point():
            assert torch.equal(got, eager)
        elif eager.numel():
            of_ours, of_eager = ((t.double() - wanted).abs().max() for t in (got, eager))
            ulp = torch.finfo(torch.float32).eps * wanted.abs().max()
            assert of_ours <= 2 * of_eager + 4 * ulp, f"{of_ours} against {of_eager}"


@built
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_operator_does(name: str, exported: Callable[..., Path]) -> None:
    model, samples, _ = CASES[name]
    path = exported(name)
    assert nodes(path) and reasons(path) == dict.fromkeys(nodes(path))
    ours = session(path)
    for sample in samples:
        judge(model, sample, ours.run(None, feed(sample)))


@built
@pytest.mark.parametrize("name", ["nearest", "kept", "queries", "experts"])
def test_a_registered_kernel_goes_before_the_function(name: str, exported: Callable[..., Path]) -> None:
    model, samples, _ = CASES[name]
    path = exported(name, "functions")
    assert onnx.load(path).functions
    ours, functions = session(path, profile=True), session(path, None, profile=True)
    for sample in samples[:2]:
        found = ours.run(None, feed(sample))
        judge(model, sample, found)
        for got, body in zip(found, functions.run(None, feed(sample)), strict=True):
            np.testing.assert_allclose(got, body, rtol=1e-4, atol=1e-4)
    assert nodes(path) <= ran(ours) and not nodes(path) & ran(functions)


@built
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "quick_gelu", "silu", "geglu"])
def test_every_activation(activation: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Of a file whose node has another one."""
    name = "gated experts" if activation == "geglu" else "experts"
    file, path = onnx.load(exported(name)), tmp_path / "other.onnx"
    (node,) = (node for node in file.graph.node if node.domain == "mmfuse")
    next(a for a in node.attribute if a.name == "activation").s = activation.encode()
    onnx.save(file, path)
    sample = CASES[name][1][0]
    judge(Case(ffn(activation), **CASES[name][0].weights), sample, session(path).run(None, feed(sample)))


@built
def test_half_precision(tmp_path: Path) -> None:
    """Codes of float16 are found in float32; the others have float32 alone, and stay functions."""
    _, samples, dynamic = CASES["nearest"]
    model, path = Case(mmfuse.nearest_code, codebook=drawn(100, 20).half()), tmp_path / "half.onnx"
    half = {"given": {"z": samples[0]["z"].half()}}
    export_onnx(model, half, path, dynamic={"given.z": dynamic["z"]})
    assert set(reasons(path).values()) == {None}
    found = session(path).run(None, feed(half["given"]))
    assert np.array_equal(found[0], model(half["given"]).numpy())

    stem = Case(layout("nchw"), **{name: t.half() for name, t in STEM.items()})
    export_onnx(stem, {"given": {"pixels": drawn(2, 3, 16, 24).half()}}, path)
    assert list(reasons(path).values()) == ["it has FLOAT16, the library has float32"]
    assert session(path).run(None, feed({"pixels": drawn(2, 3, 16, 24).half()}))


@built
def test_any_number_of_queries_stays_a_function(tmp_path: Path) -> None:
    free = {"given.q": {0: "b", 1: "q"}, "given.k": {0: "b"}, "given.v": {0: "b"}}
    path = export_onnx(Case(attended), {"given": keys(2, 2, 3, 6)}, tmp_path / "any.onnx", dynamic=free, mode="custom")
    assert list(reasons(path).values()) == ["it has any number of queries, products are faster beyond 4"]


@built
def test_nodes_without_functions(exported: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a registered function/op"):
        open_session(exported("experts"), "cpu")
    path = tmp_path / "many.onnx"
    export_onnx(Case(attended), {"given": keys(2, 2, 5, 6)}, path, mode="custom")
    with pytest.raises(UnsupportedError, match="has no function in many.onnx, and it has 5 queries"):
        open_session(path, "cpu", LIBRARY)


WRONG: dict[str, Any] = {
    "features": ("nearest", {"z": drawn(4, 19)}, r"z: expected sizes \[any, 20\], got \[4, 19\]"),
    "mask": ("cosine", {"z": drawn(4, 3), "mask": drawn(5) > 0}, r"mask: expected sizes \[4\], got \[5\]"),
    "no codes": (
        "weights that are no part of the file",
        {"x": drawn(2, 9), "weight": drawn(0, 9), "bias": drawn(0)},
        "weight: expected at least one code",
    ),
    "channels": ("bytes", {"pixels": pixels(2, 4, 16, 24)}, "pixels: expected 3 channels as weight, got 4"),
    "no multiple": ("bytes", {"pixels": pixels(2, 3, 15, 24)}, "pixels: expected a multiple of 8, got 15"),
    "too small": ("bytes", {"pixels": pixels(2, 3, 16, 4)}, "pixels: expected at least 8, got 4"),
    "positions": ("a prefix", {"pixels": pixels(2, 3, 8, 8)}, r"position: expected sizes \[1, 12\], got \[6, 12\]"),
    "kept": (
        "kept",
        {"pixels": pixels(1, 3, 16, 24), "ids_keep": torch.tensor([[0, 6]])},
        "ids_keep: expected 0 to 5, got 6",
    ),
    "heads": ("queries", keys(2, 2, 3, 5) | {"k": drawn(2, 5, 4, 8)}, r"k: expected sizes \[any, any, 3, 8\]"),
    "values": ("queries", keys(2, 2, 3, 5) | {"v": drawn(2, 6, 3, 8)}, "v: expected the sizes of k"),
    "rows": ("queries", keys(2, 3, 3, 5), "q: expected 3 rows or one, got 2"),
    "index": (
        "shared and short",
        keys(1, 2, 2, 5) | {"kv_index": torch.tensor([0, 2]), "lengths": torch.tensor([1, 1])},
        "kv_index: expected one of 2 images",
    ),
    "lengths": (
        "shared and short",
        keys(1, 2, 2, 5) | {"kv_index": torch.tensor([0, 1]), "lengths": torch.tensor([1, 6])},
        "lengths: expected at most 5",
    ),
    "bounds": (
        "packed",
        {"q": drawn(1, 4, 3, 8), "k": drawn(9, 3, 8), "v": drawn(9, 3, 8), "cu_seqlens": torch.tensor([0, 5, 10])},
        "cu_seqlens: expected bounds that do not fall, up to 9",
    ),
    "wide": ("by id", ids(9) | {"x": drawn(9, K + 1)}, r"x: expected sizes \[any, 10\], got \[9, 11\]"),
}


@built
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error(case: str, exported: Callable[..., Path], tmp_path: Path) -> None:
    name, sample, message = WRONG[case]
    file, path = onnx.load(exported(name)), tmp_path / "any.onnx"
    for given in file.graph.input:  # onnxruntime itself looks at sizes that are fixed
        for i, dim in enumerate(given.type.tensor_type.shape.dim):
            dim.dim_param = f"{given.name}_{i}".replace(".", "_")
    del file.graph.value_info[:]
    onnx.save(file, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("mmfuse.nodes", ",".join(nodes(path)))
    options.register_custom_ops_library(str(LIBRARY))
    ours = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=message):
        ours.run(None, feed(sample))
    judge(CASES[name][0], CASES[name][1][0], ours.run(None, feed(CASES[name][1][0])))  # the next call is as before


@built
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, 'config entry "mmfuse.nodes" is missing'),
        ("MmfuseNearestCode_what", "expected names of nodes that there is a kernel for, got MmfuseNearestCode_what"),
        ("MmfuseNearestCode,MmfuseEmbedText", "got MmfuseEmbedText"),
        ("MmfuseRoutedFFN_weights_in", "got MmfuseRoutedFFN_weights_in"),
    ],
)
def test_names_that_the_library_does_not_have(names: str | None, message: str) -> None:
    options = onnxruntime.SessionOptions()
    if names is not None:
        options.add_session_config_entry("mmfuse.nodes", names)
    with pytest.raises(Exception, match=message):
        options.register_custom_ops_library(str(LIBRARY))


@built
def test_threads_change_no_bit(exported: Callable[..., Path]) -> None:
    for name in ("nearest", "bytes", "queries", "by id"):
        path = exported(name)
        sample = CASES[name][1][-1]
        found = []
        for threads in (1, 3):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            register(options, path, LIBRARY)
            at_once = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            found += [at_once.run(None, feed(sample)) for _ in range(2)]
        for other in found[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@built
def test_the_command_says_who_computed_what(exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = exported("kept", "functions")
    (name,) = nodes(path)
    assert main(["export", "run", str(path), "--ops", "--size", "b=3", "--size", "n=2", "--repeat", "1"]) == 0
    assert f"{name}: the library" in " ".join(capsys.readouterr().out.split())
    assert main(["export", "run", str(path), "--ops", str(LIBRARY), "--json", "--repeat", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == {name: None}
    assert run_onnx(path, repeat=1).nodes == {}


@built
def test_info_tells_that_it_loads() -> None:
    assert error() is None


def test_libraries_that_do_not_fit(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = exported("nearest"), tmp_path / "other.so"
    other.write_bytes(b"no library")
    with pytest.raises(ValueError, match="which onnxruntime does not load"):
        run_onnx(path, library=other)
    with pytest.raises(ValueError, match="library is given for provider 'cuda', expected cpu"):
        run_onnx(path, provider="cuda", library=other)
    monkeypatch.setenv("MMFUSE_LIBRARY_DIR", str(tmp_path))
    with pytest.raises(UnsupportedError, match="_C_ort was not built"):
        ort_library()
    assert "_C_ort was not built" in str(error())
