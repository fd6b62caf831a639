"""Engines: TensorRT-RTX builds them here, classic TensorRT's calls and our plugins are held against its own bindings.

No engine runs without a GPU.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmfuse.cli import main
from mmfuse.export import build_cli, engine_build, engine_check, engine_plugins, plugins, tensorrt
from mmfuse.export.tensorrt import TensorRTModule, build_tensorrt, write_bundle
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels.contrastive import max_query_similarity
from mmfuse.kernels.multiway import packed_attention, routed_ffn, routed_layer_norm, routed_linear
from mmfuse.kernels.multiway.routing import Part, Routing
from mmfuse.kernels.qformer import few_query_attention, token_attention
from mmfuse.kernels.text import embed_text

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mmfuse.export import check_onnx, export_onnx  # noqa: E402

# one worker: the files are shared
pytestmark = pytest.mark.xdist_group("tensorrt")

rtx = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX (extra rtx) is not installed")
classic = pytest.mark.skipif(
    find_spec("tensorrt_bindings") is None or find_spec("tensorrt_lean_libs") is None,
    reason="tensorrt-cu13-bindings and tensorrt-lean-cu13-libs are not installed",
)
compiler = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


class MLP(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Routed(nn.Module):
    """Two fused operators that are one launch each."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"gamma": (2, 64), "beta": (2, 64), "weight": (2, 48, 64), "bias": (2, 48)}
        self.weights = nn.ParameterDict({name: torch.randn(shape) / 8 for name, shape in shapes.items()})

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        routing, w = Routing(2, (0, 1), offsets, None), self.weights
        x = routed_layer_norm(x, w["gamma"], w["beta"], routing, 1e-5)
        return routed_linear(x, w["weight"], w["bias"], routing, activation="gelu")


class Retrieved(nn.Module):
    """Two more of them, over words and queries."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"table": (40, 48), "position": (12, 48), "gamma": (48,), "beta": (48,)}
        self.weights = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})

    def forward(self, ids: Tensor, pad: Tensor, image: Tensor) -> dict[str, Tensor]:
        w = self.weights
        norm = (w["gamma"], w["beta"], 1e-5)
        tokens = embed_text(ids, w["table"], position=w["position"], norm=norm, scale=2.0, pad_mask=pad)
        typed = embed_text(ids, w["table"], type_embed=w["beta"])
        return {"tokens": tokens, "typed": typed, "similar": max_query_similarity(image, tokens[:, 0])}


class Attended(nn.Module):
    """Queries over images, padded and packed, and a stream in which a text sees what came before."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"queries": (1, 5, 2, 16), "bias": (4, 9, 9), "weight": (2, 128, 64)}
        self.weights = nn.ParameterDict({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()})

    def forward(
        self, tokens: Tensor, words: Tensor, index: Tensor, lengths: Tensor, ends: Tensor, stream: Tensor
    ) -> dict[str, Tensor]:
        queries, samples, x = self.weights["queries"], len(stream), stream.flatten(0, 1)
        parts = [Part(0, samples, 5, place=3), Part(1, samples, 4, kept=lengths.new_full((samples,), 3))]
        routing = Routing.of(parts, 2, samples=samples)
        gated = routed_linear(x, self.weights["weight"] / 8, None, routing, activation="swiglu")
        q, (k, v) = x.unflatten(1, (4, 16)), gated.unflatten(1, (2, 2, 16)).unbind(1)
        sees = ("all", "none"), ("all", "causal")
        return {
            "shared": few_query_attention(queries, tokens, tokens.tanh(), index, lengths).o,
            "own": few_query_attention(words[:, :3], words, words.tanh()).o,
            "packed": few_query_attention(
                queries, words.flatten(0, 1), words.tanh().flatten(0, 1), cu_seqlens=ends, longest=8
            ).o,
            "gated": gated,
            "biased": packed_attention(q, k, v, routing, sees, self.weights["bias"]),
            "grouped": packed_attention(q, k, v, routing),
        }


class Apart(nn.Module):
    """Operators of several launches."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"table": (40, 32), "position": (12, 32), "kind": (32,), "queries": (1, 5, 2, 16), "key": (32, 32)}
        shapes |= {"w1": (2, 48, 32), "b1": (2, 48), "w2": (2, 32, 48), "b2": (2, 32), "inner": (2, 48)}
        self.weights = nn.ParameterDict({name: torch.randn(s, generator=draw) / 4 for name, s in shapes.items()})

    def forward(self, ids: Tensor, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        w, x, routing = self.weights, tokens.flatten(0, 1), Routing.from_split(len(tokens), 8, 3)
        norm, inner = ((w[name], w[name] / 2, 1e-5) for name in ("b2", "inner"))
        return {
            "text": embed_text(ids, w["table"], position=w["position"], type_embed=w["kind"], norm=(None, None, 1e-5)),
            "seen": token_attention(w["queries"], tokens, w["key"], w["key"] + 1, lengths=lengths).o,
            "linear": routed_linear(x, w["w1"], w["b1"], routing, input_norm=norm),
            "ffn": routed_ffn(
                x, w["w1"], w["b1"], w["w2"], w["b2"], routing, norm=inner, input_norm=norm, residual=x
            ),
        }  # fmt: skip


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    return export_onnx(MLP(), {"x": torch.randn(3, 16)}, path, dynamic={"x": {0: "batch"}})


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {"x": torch.randn(6, 64, dtype=torch.float16), "offsets": torch.tensor([0, 4, 6])}
    return export_onnx(Routed().half(), inputs, tmp_path_factory.mktemp("routed") / "routed.onnx")


def words(images: int, texts: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(texts)
    ids = torch.randint(0, 40, (texts, 5), generator=draw)
    return {"ids": ids, "pad": ids > 30, "image": torch.randn(images, 7, 48, generator=draw)}


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    free = {"ids": {0: "texts"}, "pad": {0: "texts"}, "image": {0: "images"}}
    return export_onnx(Retrieved(), words(2, 3), tmp_path_factory.mktemp("words") / "words.onnx", dynamic=free)


def seen(images: int, tokens: int, samples: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    given = {"tokens": (images, 7, 2, 16), "words": (images, tokens, 2, 16), "stream": (samples, 9, 64)}
    found = {name: torch.randn(shape, generator=draw) for name, shape in given.items()}
    found["index"], found["lengths"] = torch.arange(images + 3) % images, torch.arange(images) % 8
    return found | {"ends": torch.arange(images + 2).clamp(max=images) * 4}  # the last one has none


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    free = {name: {0: "images"} for name in ("tokens", "lengths")} | {"words": {0: "images", 1: "tokens"}}
    free |= {"index": {0: "rows"}, "ends": {0: "ends"}, "stream": {0: "samples"}}
    return export_onnx(Attended(), seen(4, 10, 2), tmp_path_factory.mktemp("seen") / "seen.onnx", dynamic=free)


def several(batch: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    ids, tokens = torch.randint(0, 40, (batch, length), generator=draw), torch.randn(batch, 8, 32, generator=draw)
    return {"ids": ids, "tokens": tokens, "lengths": torch.arange(batch) % 9}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    free = {"ids": {0: "batch", 1: "length"}, "tokens": {0: "batch"}, "lengths": {0: "batch"}}
    path = tmp_path_factory.mktemp("apart") / "apart.onnx"
    return export_onnx(Apart(), several(3, 6), path, dynamic=free, target="trt")


PROFILE = {"batch": (1, 4, 8)}


# --- building -------------------------------------------------------------------------------------------------------


@rtx
def test_an_engine_of_the_plain_graph(mlp: Path, tmp_path: Path) -> None:
    built = build_tensorrt(mlp, tmp_path / "mlp.engine", PROFILE, dtype="float32")
    assert built.runtime.startswith("TensorRT-RTX 1.")
    assert built.graph == "built from the plain graph" and not built.ran
    assert built.inputs == {"x": ("FLOAT", (-1, 16))} and built.outputs == {"output": ("FLOAT", (-1, 8))}
    assert built.engine.stat().st_size == built.bytes > 0
    record = json.loads((tmp_path / "mlp.engine.json").read_text())
    assert record["profiles"] == [{"batch": [1, 4, 8]}] and record["runtime"] == built.runtime
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mlp.engine", "mlp.engine.json"]


@rtx
def test_fused_operators_are_built_from_their_functions(routed: Path, tmp_path: Path) -> None:
    built = build_tensorrt(routed, tmp_path / "routed.engine", dtype="float16")
    assert built.plugins == built.registered == () and built.outputs["output"][0] == "HALF"


@rtx
@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (None, r"profiles is empty, expected the sizes of \['batch'\]"),
        ({"rows": (1, 2, 3)}, "names rows; the inputs' free dimensions"),
        ([PROFILE, {}], r"dimension 'batch' at axis 0, of which profiles\[1\] has no sizes"),
        ({"batch": (4, 2, 8)}, "the least, usual and largest size, in order"),
    ],
)
def test_profiles_that_do_not_fit(profiles: Any, message: str, mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_tensorrt(mlp, tmp_path / "mlp.engine", profiles)
    assert not list(tmp_path.iterdir())


@rtx
def test_arguments_that_do_not_fit(mlp: Path, tmp_path: Path) -> None:
    engine = tmp_path / "mlp.engine"
    with pytest.raises(ValueError, match="'float16', but the file computes in float32"):
        build_tensorrt(mlp, engine, PROFILE, dtype="float16")
    with pytest.raises(ValueError, match="strongly_typed is False"):
        build_tensorrt(mlp, engine, PROFILE, runtime="tensorrt-rtx", strongly_typed=False)
    with pytest.raises(ValueError, match="is no file"):
        build_tensorrt(tmp_path / "none.onnx", engine, PROFILE)
    with pytest.raises(ValueError, match="runtime is 'tensorflow'"):
        build_tensorrt(mlp, engine, PROFILE, runtime="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be written"):
        build_tensorrt(mlp, tmp_path / "nowhere" / "mlp.engine", PROFILE)
    with pytest.raises(UnsupportedError, match="runs no plugins"):
        build_tensorrt(mlp, engine, PROFILE, runtime="tensorrt-rtx", plugin_libraries=["lib.so"])


@rtx
def test_a_node_that_is_not_taken(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Unknown", ["x"], ["y"], "a node", domain="other")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(UnsupportedError, match=r"node 'a node' \(Unknown\)"):
        build_tensorrt(tmp_path / "other.onnx", tmp_path / "other.engine")


@rtx
@pytest.mark.parametrize(
    ("script", "message"),
    [("import os; os.abort()", "SIGABRT"), ("import time; time.sleep(60)", r"in 0\.5 s"), ("exit(3)", "exit code 3")],
)
def test_a_builder_that_dies(
    script: str, message: str, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engine_build.py"
    file.write_text(script)
    monkeypatch.setattr(tensorrt, "engine_build", SimpleNamespace(__file__=str(file)))
    with pytest.raises(UnsupportedError, match=message):
        build_tensorrt(mlp, tmp_path / "mlp.engine", PROFILE, timeout=0.5)
    assert [f.name for f in tmp_path.iterdir()] == ["engine_build.py"]


@rtx
def test_the_dtype_of_a_strongly_typed_network_is_no_flag() -> None:
    trt = engine_build.load("tensorrt-rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    job = {"runtime": "tensorrt-rtx", "precision": ["FP16"], "tf32": False}
    with pytest.raises(engine_build.Refused, match="is strongly typed only"):
        engine_build.set_flags(trt, config, job)


@rtx
def test_the_command_builds_an_engine(mlp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "build", str(mlp), "--engine", str(tmp_path / "mlp.engine"), "--json"]
    assert main([*command, "--runtime", "tensorrt-rtx", "--size", "batch=1:4:8"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["graph"] == "built from the plain graph" and record["built"] and not record["ran"]
    assert main([*command, "--runtime", "tensorrt-rtx", "--size", "batch=4"]) == 2
    assert "expected NAME=LEAST:USUAL:LARGEST" in capsys.readouterr().err


def test_the_command_writes_a_bundle_instead(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_cli, "installed", lambda _: False)
    assert main(["export", "build", str(mlp), "--engine", str(tmp_path / "mlp.engine"), "--size", "batch=1:4:8"]) == 0
    assert "TensorRT is not installed: wrote" in capsys.readouterr().out
    assert [f.name for f in tmp_path.iterdir()] == ["mlp.engine.bundle"]


@rtx
def test_the_check_builds_an_engine(tmp_path: Path) -> None:
    model, inputs = MLP().eval(), [{"x": torch.randn(batch, 16)} for batch in (1, 3)]
    file = export_onnx(model, inputs[1], tmp_path / "mlp.onnx", dynamic={"x": {0: "batch"}})
    found = check_onnx(file, model, inputs, also=["tensorrt-rtx"])["checks"][-1]
    assert found["name"] == "tensorrt-rtx" and found["ok"] and found["detail"].endswith("no engine ran")


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(engine_build.Refused, match=r"TensorRT is 8\.6\.1, expected 10\.x and 11\.x"):
        engine_build.load("tensorrt")


def test_no_tensorrt(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed", lambda _: False)
    with pytest.raises(UnsupportedError, match=r"mmfuse\[tensorrt\].*mmfuse\[rtx\].*write_bundle"):
        build_tensorrt(mlp, tmp_path / "mlp.engine", PROFILE)


# --- bundles --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(mlp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(mlp, tmp_path_factory.mktemp("bundles") / "mlp", PROFILE)


def test_what_a_bundle_holds(bundle: Path, mlp: Path) -> None:
    names = {"README.md", "engine_build.py", "engine_check.py", "engine_plugins.py", "job.json", "model.onnx"}
    assert {f.name for f in bundle.iterdir()} == names | {"samples.npz"}
    job = json.loads((bundle / "job.json").read_text())
    assert job["profiles"] == [{"batch": [1, 4, 8]}] and job["plugins"] is None
    readme = (bundle / "README.md").read_text()
    assert tensorrt.CONTAINER in readme and "engine_build.py job.json" in readme
    assert "Plugins: none: no node of the file has a kernel" in readme
    for file in bundle.iterdir():  # nothing names this machine's folders
        assert str(mlp.parent).encode() not in file.read_bytes(), file.name


def test_a_bundle_where_there_is_no_tensorrt(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "engine_build.py", "job.json"], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "TensorRT cannot be imported here" in json.loads(done.stdout)["error"]


def test_the_samples_of_a_bundle_judge(bundle: Path) -> None:
    [(inputs, expected)] = engine_check.samples_of(bundle / "samples.npz")
    assert inputs["x"].shape == (4, 16) and expected["output"].shape == (4, 8)
    assert engine_check.judge(expected, expected, tf32=False) == [("output", 0.0, True)]
    off = {"output": expected["output"] + np.float32(1e-3)}
    assert [holds for *_, holds in engine_check.judge(off, expected, tf32=False)] == [False]
    assert [holds for *_, holds in engine_check.judge(off, expected, tf32=True)] == [True]
    for wrong in ({}, {"output": expected["output"][:2]}, {"output": np.full_like(expected["output"], np.nan)}):
        assert [holds for *_, holds in engine_check.judge(wrong, expected, tf32=True)] == [False]


def test_a_bundle_in_bfloat16_has_no_samples(tmp_path: Path) -> None:
    file = tmp_path / "mlp.onnx"
    export_onnx(MLP(torch.bfloat16), {"x": torch.randn(3, 16, dtype=torch.bfloat16)}, file)
    folder = write_bundle(file, tmp_path / "bundle", plugins=False)
    assert engine_check.samples_of(folder / "samples.npz") == []
    readme = (folder / "README.md").read_text()
    assert "Samples: none" in readme and "Plugins: none: they were not asked for" in readme


def test_bundles_that_cannot_be_written(bundle: Path, mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        write_bundle(mlp, bundle, PROFILE)
    with pytest.raises(ValueError, match="is no file"):
        write_bundle(tmp_path / "none.onnx", tmp_path / "new", PROFILE)
    assert not list(tmp_path.iterdir())


# --- classic TensorRT -----------------------------------------------------------------------------------------------

# what the bindings import and the lean runtime lacks
STUBS = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { return 1; }
void *getBuilderPluginRegistry(int capability) { return 0; }
"""
AS_TENSORRT = """
import sys, tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin
sys.modules["tensorrt.plugin"] = trt.plugin
"""


@pytest.fixture(scope="module")
def run_classic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs Python with the real bindings of classic TensorRT over the library of the lean runtime."""
    spec = find_spec("tensorrt_lean_libs")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "stubs.c").write_text(STUBS)
    command = ["cc", "-shared", "-fPIC", str(folder / "stubs.c"), "-o"]
    lean = next(Path(spec.origin).parent.glob("libnvinfer_lean.so.*"))
    version = lean.suffix
    for name in ("libnvonnxparser", "libnvinfer_plugin"):
        subprocess.run([*command, str(folder / f"{name}.so{version}")], check=True)
    (folder / f"libnvinfer.so{version}").symlink_to(lean)

    def run(script: str, *arguments: str) -> Any:
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
        whole = [sys.executable, "-c", AS_TENSORRT + script, *arguments]
        done = subprocess.run(whole, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


SCRIPTS = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "engine": "ICudaEngine", "context": "IExecutionContext",
}  # fmt: skip
MODULE = {"loaded": "ICudaEngine", "_engine": "ICudaEngine", "_context": "IExecutionContext", "_runtime": "Runtime"}


def names_used(module: Any, classes: dict[str, str]) -> set[str]:
    """Dotted names of TensorRT's module that a file of ours uses, methods of the variables of `classes` among them."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        words: list[str] = []
        while isinstance(node, ast.Attribute):
            words, node = [node.attr, *words], node.value
        if not isinstance(node, ast.Name) or not words:
            continue
        path = [node.id, *words] if node.id != "self" else words
        if path[0] in ("trt", "trtp"):
            found.add(".".join((["plugin"] if path[0] == "trtp" else []) + path[1:]))
        elif path[0] in classes and len(path) > 1:
            found.add(f"{classes[path[0]]}.{path[1]}")
    return {name for name in found if name}


@classic
def test_the_calls_are_those_of_tensorrt(run_classic: Any) -> None:
    scripts = (engine_build, engine_check, engine_plugins)
    names = set().union(*(names_used(script, SCRIPTS) for script in scripts), names_used(tensorrt, MODULE))
    assert {"Builder.create_network", "IExecutionContext.execute_async_v3", "plugin.register"} <= names
    script = """
import json
missing = []
for name in json.loads(sys.argv[1]):
    value = trt
    for word in name.split("."):
        value = getattr(value, word, None)
    # what an instance of plain Python has is not to be seen in its class
    if value is None and "KernelLaunchParams." not in name:
        missing.append(name)
print(json.dumps(missing))
"""
    assert run_classic(script, json.dumps(sorted(names))) == []


REGISTERED = """
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("engine_plugins", sys.argv[1])
plugins = module_from_spec(spec); spec.loader.exec_module(plugins)
manifest = Path(sys.argv[2])
names = plugins.register(trt, manifest)
registry = trt.get_plugin_registry()
found = {c.name: [c.plugin_namespace, c.plugin_version] for c in registry.all_creators if c.plugin_namespace}

class Size:
    def __init__(self, value): self.value = value
    def is_constant(self): return True
    def get_constant_value(self): return self.value

class Sizes:
    def constant(self, value): return Size(value)
    def operation(self, what, a, b):
        a, b = a.value, b.value
        operations = {"SUM": a + b, "SUB": a - b, "PROD": a * b, "CEIL_DIV": -(-a // b) if b else 0}
        return Size(operations[what.name])

trt.IDimensionExpr = Size
from tensorrt_bindings.plugin._lib import QDP_REGISTRY
from tensorrt_bindings.plugin._tensor import SymIntExpr
trtp = trt.plugin
kinds = json.loads(sys.argv[3])
launches = {}
for name in names:
    creator = registry.get_creator(name, "1", "mmfuse")
    how = trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "mmfuse", trt.PluginFieldCollection([]), *how)
    shapes, dtypes = zip(*kinds[name])
    types = plugin.get_output_data_types([getattr(trt.DataType, d) for d in dtypes], [len(s) for s in shapes])
    SymIntExpr._exprBuilder = Sizes()
    inputs = []
    for shape, dtype in kinds[name]:
        desc = trtp.from_shape_expr(tuple(trtp.ShapeExpr(Size(n)) for n in shape), getattr(trt.DataType, dtype))
        inputs.append(desc)
    outputs = QDP_REGISTRY["mmfuse::" + name].register_func(*inputs)
    kernel, ptx, launch, scalars = QDP_REGISTRY["mmfuse::" + name].aot_impl_func(*inputs, outputs, 0)
    launches[name] = {
        "types": [t.name for t in types],
        "shapes": [[e._expr.value for e in o.shape_expr] for o in outputs],
        "kernel": kernel, "entry": kernel in ptx, "grid": launch.grid_x._expr.value,
        "threads": launch.block_x._expr.value, "scalars": [scalars[i]._expr.value for i in range(len(scalars))],
    }
print(json.dumps({"found": found, "launches": launches}))
"""


@pytest.fixture(scope="module")
def compiled(routed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plugins, compiled here."""
    return write_bundle(
        routed,
        tmp_path_factory.mktemp("bundles") / "routed",
        samples=[{"x": torch.randn(6, 64).half(), "offsets": torch.tensor([0, 4, 6])}],
    )


@compiler
def test_the_plugins_of_a_bundle(compiled: Path) -> None:
    manifest = json.loads((compiled / "plugins" / "manifest.json").read_text())
    norm, linear = manifest["plugins"]
    assert norm["name"].startswith("MmfuseRoutedNorm") and linear["name"].startswith("MmfuseRoutedLinear")
    assert json.loads((compiled / "job.json").read_text())["plugins"] == "plugins/manifest.json"
    assert "Plugins: `plugins/` holds our kernels" in (compiled / "README.md").read_text()
    for plugin in manifest["plugins"]:
        assert set(plugin["code"]) == {"80", "90"}
        for code in plugin["code"].values():
            ptx = (compiled / "plugins" / code["ptx"]).read_text()
            # no line information: it names folders
            assert code["shared"] <= 48 << 10 and ".version 8.0" in ptx and ".file" not in ptx
    # inputs, integers, outputs: our kernel has its outputs first
    ptx = (compiled / "plugins" / norm["code"]["80"]["ptx"]).read_text()
    entry = ptx[ptx.index(".entry") : ptx.index(".reqntid")]
    numbers = [int(line.rpartition("_")[2].rstrip(",")) for line in entry.splitlines() if ".param" in line]
    assert numbers == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


@compiler
@classic
def test_plugins_in_the_registry_of_the_lean_runtime(compiled: Path, run_classic: Any) -> None:
    manifest = compiled / "plugins" / "manifest.json"
    norm, linear = (plugin["name"] for plugin in json.loads(manifest.read_text())["plugins"])
    experts = [[(2, 64), "HALF"], [(2, 64), "HALF"], [(3,), "INT64"]]
    kinds = {norm: [[(300, 64), "HALF"], *experts], linear: [[(300, 64), "HALF"], [(2, 48, 64), "HALF"], *experts[1:]]}
    kinds[linear][2] = [(2, 48), "HALF"]
    done = run_classic(REGISTERED, str(engine_plugins.__file__), str(manifest), json.dumps(kinds))
    assert done["found"] == {norm: ["mmfuse", "1"], linear: ["mmfuse", "1"]}
    first, second = done["launches"][norm], done["launches"][linear]
    assert first["types"] == ["HALF", "FLOAT", "FLOAT"] and first["shapes"] == [[300, 64], [300], [300]]
    assert first["grid"] == 300 and first["scalars"] == [0x10, 64, 64] and first["entry"]
    assert second["types"] == ["HALF"] and second["shapes"] == [[300, 48]]
    rows = -(-300 // 128) + 2  # tiles of 128 rows, and one more for each run
    assert second["scalars"] == [0x10, 300, 48, 64, 64, rows, 1] and second["grid"] == rows


@compiler
@classic
def test_plugins_over_words(retrieved: Path, tmp_path: Path, run_classic: Any) -> None:
    tokens, typed, similar = plugins.compile_plugins(retrieved, tmp_path / "plugins")
    manifest = tmp_path / "plugins" / "manifest.json"
    assert json.loads(manifest.read_text())["without"] == {}
    ids, table, row = [(300, 5), "INT64"], [(40, 48), "FLOAT"], [(48,), "FLOAT"]
    kinds = {
        tokens: [ids, table, [(5, 48), "FLOAT"], row, row, [(300, 5), "BOOL"]],
        typed: [ids, table, row],
        similar: [[(9, 7, 48), "FLOAT"], [(300, 48), "FLOAT"]],
    }
    launches = run_classic(REGISTERED, str(engine_plugins.__file__), str(manifest), json.dumps(kinds))["launches"]
    assert launches[tokens]["types"] == ["FLOAT"] * 3 and launches[tokens]["shapes"][0] == [300, 5, 48]
    assert launches[tokens]["grid"] == 1500 and launches[tokens]["scalars"] == [240, 48, 48, 5, 40, 48]
    assert launches[typed]["shapes"] == [[300, 5, 48]]
    assert launches[similar]["types"] == ["FLOAT", "INT32"] and launches[similar]["shapes"] == [[9, 300]] * 2
    assert launches[similar]["scalars"] == [48, 48, 48, 9, 300, 7] and all(of["entry"] for of in launches.values())


@compiler
def test_samples_of_the_most_segments(tmp_path: Path) -> None:
    """What they see and where they lie are the kernel's largest numbers."""
    script = """
import sys
from pathlib import Path
from mmfuse.export import plugins
inputs = {name: (1, (None, 1, 16)) for name in "qkv"} | {"row": (7, (None, 16)), "bias": (1, (1, 60000, 60000))}
inputs |= {name: (7, (None, 4)) for name in ("first", "lengths", "kept")}
node = plugins.Node("four", "packed_attention", inputs, {"places": [0, 197, 400, 50000]})
plugins.ARCHS = (80,)
plugins._compiled(node, plugins.PLUGINS["packed_attention"](node), Path(sys.argv[1]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    whole = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_none(mlp: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.onnx"
    file.write_bytes(mlp.read_bytes()[:500])
    with pytest.raises(ValueError, match="which is not a readable ONNX file"):
        plugins.nodes_of(file)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def values_of(path: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every input and output of our nodes, as onnxruntime computes them by their functions."""
    file = onnx.load(path)
    weights = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in file.graph.initializer}
    names = {name for node in file.graph.node if node.domain for name in (*node.input, *node.output)}
    said = {value.name for value in (*file.graph.output, *file.graph.input)} | weights.keys()
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - said))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = session.run(outputs, {name: t.numpy() for name, t in given.items()})
    return weights | given | {name: torch.from_numpy(t) for name, t in zip(outputs, found, strict=True)}


@compiler
@pytest.mark.parametrize(
    ("which", "given"),
    [
        ("retrieved", words(9, 20)),
        ("attended", seen(5, 6, 3)),
        ("attended", seen(8, 90, 1)),
        ("apart", several(4, 5)),
    ],
)
def test_launches_compute_what_the_nodes_do(
    which: str, given: dict[str, Tensor], request: pytest.FixtureRequest
) -> None:
    """As they are declared, with Triton's interpreter in TensorRT's place."""
    path = request.getfixturevalue(which)
    values, nodes = values_of(path, given), {n.op_type: n for n in onnx.load(path).graph.node}
    for node in plugins.nodes_of(path):
        launch = plugins.PLUGINS[node.operator](node)
        of = {name: values[value] for name, value in zip(node.inputs, nodes[node.name].input, strict=True)}
        sizes: dict[str, int] = {}
        for name, dims in launch.dims.items():
            for dim, n in zip(dims.split(), of[name].shape, strict=True):
                assert sizes.setdefault(dim, n) == n, f"{dim} of {node.name}"

        def number(expression: str, sizes: dict[str, int] = sizes) -> int:
            return engine_plugins.evaluate(expression, sizes, cdiv)

        outputs = {
            name: torch.empty(
                [number(dim) for dim in dims.split()], dtype=torch.int32 if kind == "INT32" else torch.float32
            )
            for name, (dims, kind) in launch.outputs.items()
        }
        module, function = launch.kernel.split(":")
        pointers = {name: of[argument].contiguous() for name, argument in launch.pointers.items()}
        numbers = {name: number(expression) for name, expression in launch.scalars.items()}
        grid = tuple(map(number, launch.grid))
        getattr(import_module(module), function)[grid](**outputs, **pointers, **numbers, **launch.constants)
        expected = values[nodes[node.name].output[0]]
        torch.testing.assert_close(next(iter(outputs.values())), expected, rtol=1e-5, atol=1e-5)


def test_an_operator_of_several_launches_is_a_node_for_each(apart: Path) -> None:
    nodes = [node.operator for node in plugins.nodes_of(apart)]
    ffn = ["routed_layer_norm", "routed_linear"] * 2
    assert sorted(nodes) == sorted(["embed_text", "few_query_attention", "routed_linear", *ffn])
    assert all(node.operator in plugins.PLUGINS for node in plugins.nodes_of(apart))
    given = several(2, 7)
    with torch.no_grad():
        expected = Apart().eval()(**given)
    session = onnxruntime.InferenceSession(apart, providers=["CPUExecutionProvider"])
    found = session.run(list(expected), {name: t.numpy() for name, t in given.items()})
    for name, got in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected[name], rtol=1e-4, atol=1e-5)


@compiler
@classic
def test_plugins_over_images_and_streams(attended: Path, tmp_path: Path, run_classic: Any) -> None:
    names = plugins.compile_plugins(attended, tmp_path / "plugins")
    manifest = tmp_path / "plugins" / "manifest.json"
    assert json.loads(manifest.read_text())["without"] == {}
    values, nodes = values_of(attended, seen(5, 70, 3)), {n.op_type: n for n in onnx.load(attended).graph.node}
    types = {torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}
    kinds = {n: [(tuple(values[i].shape), types[values[i].dtype]) for i in nodes[n].input] for n in names}
    launches = run_classic(REGISTERED, str(engine_plugins.__file__), str(manifest), json.dumps(kinds))["launches"]
    for name, launch in launches.items():
        assert launch["entry"] and launch["shapes"][0] == list(values[nodes[name].output[0]].shape)
    gated, shared, own, packed, biased, grouped = (launches[n.op_type] for n in nodes.values() if n.domain)
    # rows of queries x heads, and tiles of queries
    assert shared["grid"] == 8 * 2 and shared["scalars"] == [2, 5, 5, 7, 0, 32, 16, 224, 32, 16, 224, 32, 16]
    assert own["grid"] == 5 * 2 and own["scalars"] == [2, 3, 5, 70, 96, 32, 16, 2240, 32, 16, 2240, 32, 16]
    assert packed["grid"] == 6 * 2 and packed["scalars"][:7] == [2, 5, 6, 8, 0, 32, 16]
    assert gated["shapes"] == [[27, 64]]
    # samples x heads x tiles of 16 rows, of which two segments have one more
    assert biased["grid"] == 3 * 4 * 2 and biased["scalars"] == [2, 4, 27, 9, 64, 16, 32, 16, 32, 16]
    assert grouped["scalars"] == [2, 4, 27, 64, 16, 32, 16, 32, 16]


# --- running --------------------------------------------------------------------------------------------------------


@rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_engine_runs_without_a_gpu(mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        TensorRTModule(tmp_path / "none.engine")
    built = build_tensorrt(mlp, tmp_path / "mlp.engine", PROFILE)
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        TensorRTModule(built.engine)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_computes_what_pytorch_does(cuda_graph: bool, tmp_path: Path) -> None:
    if not any(map(tensorrt.installed, ("tensorrt", "tensorrt-rtx"))):
        pytest.skip("no TensorRT is installed")
    model = MLP()
    onnx = export_onnx(model, {"x": torch.randn(3, 16)}, tmp_path / "mlp.onnx", dynamic={"x": {0: "batch"}})
    engine = TensorRTModule(build_tensorrt(onnx, tmp_path / "mlp.engine", PROFILE).engine, cuda_graph=cuda_graph)
    model = model.cuda()
    for batch in (1, 4, 8, 4):
        x = torch.randn(batch, 16, device="cuda")
        torch.testing.assert_close(engine(x=x)["output"], model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="which no profile of the engine holds"):
        engine(x=torch.randn(9, 16, device="cuda"))
    with pytest.raises(TypeError, match="x is torch.float16"):
        engine(x=torch.randn(4, 16, device="cuda", dtype=torch.float16))
