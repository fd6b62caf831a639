"""Our Triton kernels as TensorRT plugins, compiled ahead of time: an engine holds the PTX and runs without Python.

A plugin is one launch, without workspace: pointers to the inputs, integers, pointers to the outputs, in that order. The
entry of the PTX that Triton writes has our kernel's order; the declarations of its parameters are put into TensorRT's.

No GPU is needed, and Triton outside its interpreter: `compile_plugins` compiles in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Any

from mmfuse.export.nodes import DOMAIN
from mmfuse.export.require import require
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels._runtime.device import triton_missing

# PTX of 80 is what later GPUs compile themselves; 90's has wgmma, and is for Hopper alone
ARCHS = (80, 90)
# CUDA 12.0 and later take it
PTX_VERSION = 80
SHARED_LIMIT = 48 << 10  # bytes that a launch may have without asking for more
_MOST_RUNS = 7  # experts of 4 bits in a positive 32-bit integer
# ONNX's element type: (Triton's, TensorRT's)
_TYPES = {
    1: ("fp32", "FLOAT"), 10: ("fp16", "HALF"), 16: ("bf16", "BF16"), 7: ("i64", "INT64"), 6: ("i32", "INT32"),
    9: ("i1", "BOOL"),
}  # fmt: skip
_NAMED = {name: triton for triton, name in _TYPES.values()}


@dataclass(frozen=True)
class Node:
    """An operator of a file: what every node of this name has in common.

    Args:
        inputs: by the operator's name of the argument: (ONNX element type, shape), a free size as None.
        attributes: by name.
    """

    name: str
    operator: str
    inputs: Mapping[str, tuple[int, tuple[int | None, ...]]]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """The one launch that computes a node.

    Args:
        kernel: "module:function" of a `triton.jit` function.
        pointers: the kernel's arguments for inputs of the node: {"z_ptr": "x"}.
        dims: named sizes of the inputs: {"x": "T D"}.
        outputs: the kernel's arguments that it writes, in the node's order: {"y_ptr": ("T D", "x")}, the shape in named
            sizes, and the dtype, of an input or by TensorRT's name. What a node leaves out comes last.
        scalars: the kernel's integers, as sums and products of named sizes and `cdiv`.
        grid: likewise.
        constants: what the kernel is compiled for; options: how.
        aligned: integers that are divisible by 16.
    """

    kernel: str
    pointers: Mapping[str, str]
    dims: Mapping[str, str]
    outputs: Mapping[str, tuple[str, str]]
    scalars: Mapping[str, str]
    grid: Sequence[str]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: Sequence[str] = ()


# --- which operators are one launch ---------------------------------------------------------------------------------

_MULTIWAY = "mmfuse.kernels.multiway.kernel"


def _routing(node: Node) -> dict[str, Any]:
    experts = node.attributes["experts"]
    if len(experts) > _MOST_RUNS:
        raise UnsupportedError(f"{node.name} has {len(experts)} runs, a plugin takes {_MOST_RUNS} at most")
    return {"experts": str(sum(e << (4 * r) for r, e in enumerate(experts))), "RUNS": len(experts)}


def _one_tensor(node: Node, *names: str) -> None:
    """The kernels read one tensor of all experts."""
    for name in names:
        if f"{name}_0" in node.inputs:
            raise UnsupportedError(f"{node.name} has {name} as a list, a plugin takes one tensor of all experts")


def _floats(node: Node, *names: str) -> None:
    for name in names:
        if name in node.inputs and node.inputs[name][0] not in (1, 10, 16):
            raise UnsupportedError(f"{node.name} has {name} of ONNX's type {node.inputs[name][0]}, expected floats")


def _fixed(node: Node, name: str, axis: int) -> int:
    size = node.inputs[name][1][axis]
    if size is None:
        raise UnsupportedError(f"{node.name} has a free size at axis {axis} of {name}, which a plugin is compiled for")
    return size


def _routed_norm(node: Node) -> Launch:
    import triton.language as tl
    from triton import next_power_of_2

    _one_tensor(node, "gammas", "betas")
    _floats(node, "x", "gammas", "betas")
    routing, d = _routing(node), _fixed(node, "x", 1)
    pointers = {"z_ptr": "x", "gamma_ptr": "gammas", "beta_ptr": "betas", "offsets_ptr": "offsets"}
    dims = {"x": "T D", "gammas": "E D", "betas": "E D", "offsets": "R"}
    block = next_power_of_2(d)
    return Launch(
        kernel=f"{_MULTIWAY}:_rows_kernel",
        pointers=pointers,
        dims=dims,
        outputs={"y_ptr": ("T D", "x"), "mean_ptr": ("T", "FLOAT"), "rstd_ptr": ("T", "FLOAT")},
        scalars={"experts": routing["experts"], "D": "D", "stride_z": "D"},
        grid=("T",),
        constants={
            "eps": node.attributes["eps"], "RUNS": routing["RUNS"], "ACTIVATION": "none", "NORM": True,
            "CENTRED": bool(node.attributes["centred"]), "EVEN": d % 16 == 0, "ACC": tl.float32, "BLOCK": block,
        },
        options={"num_warps": min(16, max(1, block // 512))},
        aligned=("D", "stride_z") if d % 16 == 0 else (),
    )  # fmt: skip


def _routed_linear(node: Node) -> Launch:
    import triton.language as tl

    from mmfuse.kernels.multiway import kernel
    from mmfuse.kernels.multiway.arguments import GATED

    _one_tensor(node, "weights", "biases", "gammas")
    if "gammas" in node.inputs:
        raise UnsupportedError(
            f"{node.name} has a norm before its product, a launch of its own: target trt makes it a node of its own"
        )
    _floats(node, "x", "weights", "biases", "residual", "scale", "row_scale")
    routing, k = _routing(node), _fixed(node, "weights", 2)
    activation, half = node.attributes["activation"], node.inputs["x"][0] != 1
    gated, wide = activation in GATED, _fixed(node, "weights", 1)
    # the kernel's own choice
    tile: dict[str, int] = kernel._GATED_TILE if gated and half else kernel._TILES["half" if half else "single"]  # noqa: SLF001
    n = wide // 2 if gated else wide
    options: dict[str, int] = {name: tile[name] for name in ("num_warps", "num_stages") if name in tile}
    tiles_m = f"(cdiv(T, {tile['BLOCK_M']}) + {routing['RUNS']})"
    tiles_n = -(-n // tile["BLOCK_N"])
    pointers = {
        "x_ptr": "x", "w_ptr": "weights", "b_ptr": "biases", "residual_ptr": "residual", "scale_ptr": "scale",
        "row_scale_ptr": "row_scale", "offsets_ptr": "offsets",
    }  # fmt: skip
    dims = {
        "x": "T K", "weights": "E W K", "biases": "E W", "residual": "T N", "scale": "N", "row_scale": "T",
        "offsets": "R",
    }  # fmt: skip
    given = {pointer: name for pointer, name in pointers.items() if name in node.inputs}
    return Launch(
        kernel=f"{_MULTIWAY}:_product_kernel",
        pointers=given,
        dims={name: dims[name] for name in given.values()},
        outputs={"y_ptr": (f"T {n}", "residual" if "residual" in node.inputs else "x")},
        scalars={
            "experts": routing["experts"], "T": "T", "N": str(n), "K": "K", "stride_x": "K", "tiles_m": tiles_m,
            "tiles_n": str(tiles_n),
        },
        grid=(f"{tiles_m} * {tiles_n}",),
        constants={
            **dict.fromkeys([*(p for p in pointers if p not in given), "z_ptr"]), "RUNS": routing["RUNS"],
            "ACTIVATION": activation, "GATED": gated, "TRANSPOSED": False, "ACC": tl.float32, "PRECISION": "ieee",
            "EVEN_K": k % tile["BLOCK_K"] == 0, "EVEN_N": n % 16 == 0, "GROUP_M": kernel._GROUP_M,
            **{name: size for name, size in tile.items() if name not in options},
        },
        options=options,
        aligned=tuple(s for s, size in (("N", n), ("K", k), ("stride_x", k)) if size % 16 == 0),
    )  # fmt: skip


def _embed_text(node: Node) -> Launch:
    import triton.language as tl
    from triton import next_power_of_2

    if "text_position" in node.inputs and "text_type" in node.inputs:
        raise UnsupportedError(f"{node.name} has positions and a type, whose sum target trt leaves to the runtime")
    pointers = {"ids_ptr": "ids", "table_ptr": "table", "gamma_ptr": "gamma", "beta_ptr": "beta", "pad_ptr": "pad_mask"}
    pointers["shift_ptr"] = "text_position" if "text_position" in node.inputs else "text_type"
    dims = {
        "ids": "B L", "table": "V D", "text_position": "L D", "text_type": "D", "gamma": "D", "beta": "D",
        "pad_mask": "B L",
    }  # fmt: skip
    given = {pointer: name for pointer, name in pointers.items() if name in node.inputs}
    _floats(node, "table", "text_position", "text_type", "gamma", "beta")
    d, normed, outputs = _fixed(node, "table", 1), "eps" in node.attributes, {"out_ptr": ("B L D", "table")}
    if normed:
        outputs |= {"mean_ptr": ("B L", "FLOAT"), "rstd_ptr": ("B L", "FLOAT")}
    block = max(16, next_power_of_2(d))
    absent = {"mean_ptr", "rstd_ptr", *pointers} - outputs.keys() - given.keys()
    return Launch(
        kernel="mmfuse.kernels.text.kernel:_embed_kernel",
        pointers=given,
        dims={name: dims[name] for name in given.values()},
        outputs=outputs,
        scalars={"stride_b": "L * D", "stride_l": "D", "stride_v": "D", "L": "L", "V": "V", "D": "D"},
        grid=("B * L",),
        constants={
            **dict.fromkeys(absent), "stride_d": 1, "stride_s": d if "text_position" in node.inputs else 0,
            "scale": float(node.attributes["scale"]), "eps": float(node.attributes.get("eps", 0.0)),
            "SHIFT": "shift_ptr" in given, "NORM": normed, "GAMMA": "gamma" in node.inputs,
            "BETA": "beta" in node.inputs, "PAD": "pad_mask" in node.inputs, "ACC": tl.float32, "BLOCK": block,
        },
        options={"num_warps": 4 if block <= 1024 else 8},
        aligned=("stride_b", "stride_l", "stride_v", "D") if d % 16 == 0 else (),
    )  # fmt: skip


_MOST_QUERIES = 256  # whose numbers a row of the kernel's tile has


def _max_query(node: Node) -> Launch:
    import triton.language as tl

    from mmfuse.kernels.contrastive.max_query import kernel

    _floats(node, "image", "text")
    queries, d = _fixed(node, "image", 1), _fixed(node, "image", 2)
    if queries > _MOST_QUERIES:
        raise UnsupportedError(f"{node.name} has {queries} queries, a plugin takes {_MOST_QUERIES} at most")
    texts = node.inputs["text"][1][0]
    even = texts is not None and texts % 16 == 0
    tile = kernel._tile(  # noqa: SLF001  the kernel's own choice
        "max", "ieee" if node.inputs["image"][0] == 1 else "half", queries, odd=bool(d % 64) or not even
    )
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    return Launch(
        kernel=f"{kernel.__name__}:_query_max_kernel",
        pointers={"q_ptr": "image", "t_ptr": "text"},
        dims={"image": "B Q D", "text": "N D"},
        outputs={"u_ptr": ("B N", "FLOAT"), "k_ptr": ("B N", "INT32")},
        scalars={"stride_q": "D", "stride_t": "D", "D": "D", "B": "B", "N": "N", "Q": "Q"},
        grid=(f"cdiv(B, {tile['IMAGES']}) * cdiv(N, {tile['BLOCK_N']})",),
        constants={
            "ACC": tl.float32, "PRECISION": "ieee", "EVEN_D": d % tile["BLOCK_D"] == 0, "EVEN_N": even, **tile,
        },
        options=options,
        aligned=("stride_q", "stride_t", "D") if d % 16 == 0 else (),
    )  # fmt: skip


_WIDEST_HEAD = 128  # that a program holds
_MANY = 256  # queries, keys or rows of a sample, where the file does not say how many


def _head(node: Node) -> int:
    d = _fixed(node, "q", len(node.inputs["q"][1]) - 1)
    if d > _WIDEST_HEAD:
        raise UnsupportedError(f"{node.name} has heads of {d} numbers, a plugin takes {_WIDEST_HEAD} at most")
    return d


def _few_query(node: Node) -> Launch:
    import triton.language as tl

    from mmfuse.kernels.qformer import kernel

    packed, shared = "cu_seqlens" in node.inputs, "kv_index" in node.inputs
    if packed and "longest" in node.inputs:
        raise UnsupportedError(f"{node.name} has packed images of which the longest is known when the model runs")
    _floats(node, "q", "k", "v")
    d, (rows, queries, *_), longest = _head(node), node.inputs["q"][1], node.attributes.get("longest")
    tile = kernel._tile(  # noqa: SLF001  the kernel's own choice
        _MANY if queries is None else queries,
        _MANY if longest is None else longest,
        d,
        4 if node.inputs["q"][0] == 1 else 2,
    )
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {
        "q_ptr": "q", "k_ptr": "k", "v_ptr": "v", "index_ptr": "kv_index", "lengths_ptr": "lengths",
        "cu_ptr": "cu_seqlens", "seed_ptr": "seed",
    }  # fmt: skip
    given = {pointer: name for pointer, name in pointers.items() if name in node.inputs}
    padded = "I" if shared else "B"
    images = "(C-1)" if packed else padded
    batch, keys = "B" if shared else images, "T H D" if packed else f"{padded} N H D"
    dims = {
        "q": "R Q H D", "k": keys, "v": keys, "kv_index": "B", "lengths": padded, "cu_seqlens": "C", "seed": "one",
    }  # fmt: skip
    strides = {"stride_qb": "0" if rows == 1 else "Q * H * D", "stride_qq": "H * D", "stride_qh": "D"}
    for of in "kv":
        strides |= {f"stride_{of}i": "0" if packed else "N * H * D", f"stride_{of}n": "H * D", f"stride_{of}h": "D"}
    statistics = f"{batch} H Q", "FLOAT"
    return Launch(
        kernel=f"{kernel.__name__}:_attend_kernel",
        pointers=given,
        dims={name: dims[name] for name in given.values()},
        outputs={"o_ptr": (f"{batch} Q H D", "q"), "max_ptr": statistics, "sum_ptr": statistics},
        scalars={"H": "H", "Q": "Q", "images": images, "N": str(longest) if packed else "N", **strides},
        grid=(f"{batch} * H", f"cdiv(Q, {tile['BLOCK_Q']})"),
        constants={
            **dict.fromkeys(pointers.keys() - given.keys()), "drop": float(node.attributes["dropout"]),
            "scale": d**-0.5, "ONE": longest is not None and longest <= tile["BLOCK_N"], "ACC": tl.float32,
            "PRECISION": "ieee", "D": d, **tile,
        },
        options=options,
        aligned=tuple(strides) if d % 16 == 0 else (),
    )  # fmt: skip


_MOST_SEGMENTS = 4


def _packed_attention(node: Node) -> Launch:
    import triton.language as tl

    from mmfuse.kernels.multiway import attention_kernel as kernel

    d, heads, of_keys, runs = _head(node), _fixed(node, "q", 1), _fixed(node, "k", 1), _fixed(node, "first", 1)
    biased = "bias" in node.inputs
    places = node.attributes.get("places") if biased else [0] * runs
    if runs > _MOST_SEGMENTS:
        raise UnsupportedError(f"{node.name} has samples of {runs} segments, a plugin takes {_MOST_SEGMENTS} at most")
    if places is None:
        raise UnsupportedError(f"{node.name} has a bias in places that are known when the model runs")
    _floats(node, "q", "k", "v", "bias")
    longest = node.inputs["row"][1][1]
    tile = kernel._tile(  # noqa: SLF001  the kernel's own choice
        _MANY if longest is None else longest, d, 4 if node.inputs["q"][0] == 1 else 2
    )
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    tiles = f"(cdiv(S, {tile['BLOCK_M']}) + {runs - 1})"
    strides = {"stride_q": "H * D", "stride_k": "J * D", "stride_v": "J * D"}
    strides |= dict.fromkeys(("stride_qh", "stride_kh", "stride_vh"), "D")
    return Launch(
        kernel=f"{kernel.__name__}:_packed_attend_kernel",
        pointers={f"{of}_ptr": of for of in ("q", "k", "v", "bias", "first", "lengths", "kept") if of in node.inputs},
        dims={
            "q": "T H D", "k": "T J D", "v": "T J D", "row": "B S", "first": "B R", "lengths": "B R", "kept": "B R",
            **({"bias": "H P P"} if biased else {}),
        },
        outputs={"o_ptr": ("T H*D", "q"), "max_ptr": ("H T", "FLOAT"), "sum_ptr": ("H T", "FLOAT")},
        scalars={"tiles": tiles, "H": "H", "T": "T", **({"P": "P"} if biased else {}), **strides},
        grid=(f"B * H * {tiles}",),
        constants={
            **({} if biased else {"bias_ptr": None, "P": 0}), "scale": d**-0.5, "G": heads // of_keys,
            "ACC": tl.float32, "PRECISION": "ieee", "D": d, "UNIT": gcd(16, d), **tile,
            **kernel.of_runs(places, node.attributes.get("sees", ())),
        },
        options=options,
        aligned=tuple(strides) if d % 16 == 0 else (),
    )  # fmt: skip


PLUGINS: dict[str, Callable[[Node], Launch]] = {
    "embed_text": _embed_text,
    "few_query_attention": _few_query,
    "max_query_similarity": _max_query,
    "packed_attention": _packed_attention,
    "routed_layer_norm": _routed_norm,
    "routed_linear": _routed_linear,
}

# the other operators that leave as nodes, and why they have none
_PRODUCTS = "products of the library between our launches"
WITHOUT: dict[str, str] = {
    "embed_pair": "a launch for the image and another for the text",
    "interpolate_position": "of a fixed grid it is a constant, of a free one no input has the result's size",
    "mini_pointnet": _PRODUCTS,
    "nearest_code": "four launches: norms, operands, the search, and ties",
    "nearest_neighbors": "a launch that needs workspace for its distances",
    "patch_embed": "two launches: folded weights, and tokens",
    "patch_embed_packed": "two launches: folded weights, and tokens",
    "project_kv": "products of the library alone",
    "routed_ffn": "two launches: a product for each layer; `--target trt` makes them `routed_linear`",
    "select_head": _PRODUCTS,
    "similarity_topk": "a launch for parts of the gallery, and what merges them",
    "token_attention": "a product of the library, then a launch; `--target trt` makes it `few_query_attention`",
}


# --- a file's plugins -----------------------------------------------------------------------------------------------


def compile_plugins(onnx: str | Path, folder: str | Path) -> list[str]:
    """Compile the kernels that the nodes of a file can be, into `folder`: PTX for each of ARCHS, and manifest.json.

    Args:
        onnx: a file of `export_onnx` in the mode "functions", whose functions name the inputs.
        folder: is made; nothing is made where no node has a kernel.

    Returns:
        The names of the nodes that have a plugin. manifest.json says of the others why they have none.

    Raises:
        ValueError: the file cannot be read, or the folder not be made.
        UnsupportedError: onnx or Triton is missing, or a kernel does not compile.
    """
    require("onnx")
    onnx, folder = Path(onnx).resolve(), Path(folder).resolve()
    if not onnx.is_file():
        raise ValueError(f"onnx is {str(onnx)!r}, which is no file")
    if why := triton_missing():
        raise UnsupportedError(f"plugins are compiled by Triton: {why}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # line information has the names of this machine's folders
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    command = [sys.executable, "-m", __spec__.name, str(onnx), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        raise UnsupportedError(f"the plugins of {onnx.name} do not compile: {done.stderr.strip()[-500:]}")
    result = json.loads(last)
    if "error" in result:
        raise ValueError(result["error"])
    names: list[str] = result["plugins"]
    return names


def _compile_all(onnx: Path, folder: Path) -> dict[str, Any]:
    plugins, without = [], {}
    try:
        for node in nodes_of(onnx):
            try:
                if node.operator not in PLUGINS:
                    raise UnsupportedError(f"{node.operator}: {WITHOUT[node.operator]}")
                plugins.append(_compiled(node, PLUGINS[node.operator](node), folder))
            except UnsupportedError as error:
                without[node.name] = str(error)
        if plugins:
            (folder / "manifest.json").write_text(json.dumps({"plugins": plugins, "without": without}, indent=1))
    except ValueError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"folder is {str(folder)!r}, which cannot be written: {error}"}
    return {"plugins": [plugin["name"] for plugin in plugins]}


def nodes_of(onnx: Path) -> list[Node]:
    """The fused operators of a file, one for each name."""
    import onnx_ir as ir

    try:
        model = ir.load(onnx)
    except Exception as error:  # of the file system and of protobuf
        raise ValueError(f"onnx is {str(onnx)!r}, which is not a readable ONNX file: {error}") from error
    functions = {function.name: function for function in model.functions.values() if function.domain == DOMAIN}
    found: dict[str, Node] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type in found or node.op_type not in functions:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        formal = [str(value.name).removeprefix(f"{node.op_type}__") for value in functions[node.op_type].inputs]
        inputs = {name: _described(value) for name, value in zip(formal, node.inputs, strict=True)}
        found[node.op_type] = Node(node.op_type, attributes["operator"], inputs, attributes)
    return list(found.values())


def _described(value: Any) -> tuple[int, tuple[int | None, ...]]:
    known = value.const_value if value.const_value is not None else value
    if known.dtype is None or known.shape is None:
        raise UnsupportedError(f"{value.name} has no shape or dtype in the file")
    return int(known.dtype), tuple(n if isinstance(n, int) else None for n in known.shape)


def _compiled(node: Node, launch: Launch, folder: Path) -> dict[str, Any]:
    """What `engine_plugins` registers, of PTX files that are written beside it."""
    module, function = launch.kernel.split(":")
    kernel = getattr(import_module(module), function)
    types = {p: f"*{_TYPES[node.inputs[name][0]][0]}" for p, name in launch.pointers.items()}
    for pointer, (_, dtype) in launch.outputs.items():
        types[pointer] = f"*{_TYPES[node.inputs[dtype][0]][0] if dtype in node.inputs else _NAMED[dtype]}"
    types |= dict.fromkeys(launch.scalars, "i32")
    signature = {n: types[n] for n in kernel.arg_names if n not in launch.constants}
    pointer_of = {name: pointer for pointer, name in launch.pointers.items()}
    order = [pointer_of.get(name) for name in node.inputs]  # None: an input that the kernel does not read
    order += [*(n for n in signature if n in launch.scalars), *launch.outputs]
    folder.mkdir(exist_ok=True)
    code = {}
    for arch in ARCHS:
        compiled = _fitting(kernel, signature, launch, arch)
        ptx = reordered(compiled.asm["ptx"], list(signature), order)
        _assemble(ptx, arch)
        file = f"{node.name}.sm_{arch}.ptx"
        (folder / file).write_text(ptx)
        code[str(arch)] = {
            "ptx": file,
            "kernel": compiled.metadata.name,
            "threads": compiled.metadata.num_warps * 32,
            "shared": compiled.metadata.shared,
        }
    dims = {name: launch.dims.get(name) or _unnamed(name, len(node.inputs[name][1])) for name in node.inputs}
    return {
        "name": node.name,
        "inputs": dims,
        "outputs": [{"shape": shape, "dtype": dtype} for shape, dtype in launch.outputs.values()],
        "scalars": [launch.scalars[n] for n in signature if n in launch.scalars],
        "grid": list(launch.grid),
        "code": code,
    }


def _fitting(kernel: Any, signature: dict[str, str], launch: Launch, arch: int) -> Any:
    """Compiled with as many stages as fit: TensorRT is not known to raise the limit of shared memory for a plugin."""
    from mmfuse.kernels._runtime.aot import compiled_for

    constants, warps = dict(launch.constants), launch.options.get("num_warps", 4)
    for stages in range(launch.options.get("num_stages", 1), 0, -1):
        compiled = compiled_for(
            kernel, signature, constants, arch, warps, stages, launch.aligned, ptx_version=PTX_VERSION
        )
        if compiled.metadata.shared <= SHARED_LIMIT:
            return compiled
    raise UnsupportedError(
        f"the kernel needs {compiled.metadata.shared} bytes of shared memory, at most {SHARED_LIMIT}"
    )


def _unnamed(name: str, dims: int) -> str:
    return " ".join(f"{name}_{axis}" for axis in range(dims))


_ENTRY = re.compile(r"(\.visible \.entry \w+\(\n)(.*?)(\n\))", re.S)


def reordered(ptx: str, names: Sequence[str], order: Sequence[str | None]) -> str:
    """PTX whose entry takes its parameters in another order; `names` are those of the present one, in order.

    None in `order` is a pointer that the kernel does not read. The two pointers to scratch memory that Triton adds at
    the end are left out: a kernel of ours that used one would not assemble.
    """
    found = _ENTRY.search(ptx)
    if found is None:
        raise UnsupportedError("the PTX has no entry of the form that is known")
    declared = [line.strip().rstrip(",") for line in found[2].split("\n")]
    if len(declared) != len(names) + 2:
        raise UnsupportedError(f"the PTX has {len(declared)} parameters, expected {len(names)} and two for scratch")
    by_name = dict(zip(names, declared, strict=False))
    unread = (f".param .u64 unread_{i}" for i in range(len(order)))
    lines = [by_name[name] if name is not None else next(unread) for name in order]
    return ptx[: found.start(2)] + ",\n".join(f"\t{line}" for line in lines) + ptx[found.end(2) :]


def _assemble(ptx: str, arch: int) -> None:
    """Triton's ptxas takes it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = f"sm_{arch}a" if f".target sm_{arch}a" in ptx else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), f"--gpu-name={target}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedError(f"ptxas does not take the kernel: {done.stderr.strip()}")


if __name__ == "__main__":
    print(json.dumps(_compile_all(Path(sys.argv[1]), Path(sys.argv[2]))))
