"""Distillation in Triton: a tile of the student's logits and the same tile of the teacher's, side by side on the chip.

    stats          m, l of S and of T, and the sums of exp(T - m) (S - s c), over the negatives of every row and column
    grad           G = a exp(S - rho) + b exp(S - kappa) - a_t exp(T - rho_t) - b_t exp(T - kappa_t)
    teacher_grad   H = a_t exp(T - rho_t) (mean_i - S + s c_i) + b_t exp(T - kappa_t) (mean_j - S + s c_j)

with S = s x yT, T = s_t x_t y_tT. Partial statistics are merged in a fixed order, G and H are written in squares and
multiplied by cuBLAS, as in the template (`mmfuse.kernels.contrastive.kernel`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfuse.kernels._runtime.aot import Spec
from mmfuse.kernels._runtime.dtypes import accumulation_dtype
from mmfuse.kernels._triton.launch import launch
from mmfuse.kernels._triton.tiles import aligned_rows, exp, finite, products, tile_of
from mmfuse.kernels.contrastive import kernel as template
from mmfuse.kernels.contrastive.distill.blocked import Models, Side
from mmfuse.kernels.contrastive.kernel import _finish_tile, _negatives_of, _parts, _softmaxes, _sums_of


@triton.jit
def _add(m, l, c, m_new, l_new, c_new):  # noqa: E741
    """(max, sum, weighted sum) over both sets of columns."""
    top = tl.maximum(m, m_new)
    back, back_new = exp(m - finite(top)), exp(m_new - finite(top))
    return top, l * back + l_new * back_new, c * back + c_new * back_new


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def _distill_stats_kernel(
    centre_ptr,  # [M]
    col_centre_ptr,  # [N]
    row_ptr,  # out [5, tiles_n, M], partial: m and l of S; m, l and c of T
    col_ptr,  # out [5, tiles_m, N], partial
    positive_ptr,  # out [M], U at the positives
    t_positive_ptr,
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # []
    t_x_ptr,  # [M, T_D]
    t_y_ptr,  # [N, T_D]
    t_scale_ptr,  # []
    stride_x,
    stride_y,
    t_stride_x,
    t_stride_y,
    D,
    T_D,
    M,
    N,
    diagonal,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    T_EVEN_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row0, col0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    scale, t_scale = tl.load(scale_ptr), tl.load(t_scale_ptr)
    u = products(
        x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
        ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    t = products(
        t_x_ptr, t_y_ptr, row0, col0, t_stride_x, t_stride_y, M, N, T_D,
        ACC, PRECISION, T_EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    us, ts = _parts(u, PARTS), _parts(t, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    rows = row0 + tl.arange(0, BLOCK_M)
    centre = tl.load(centre_ptr + rows, mask=rows < M, other=0.0)
    m, t_m = tl.full((BLOCK_M,), float("-inf"), ACC), tl.full((BLOCK_M,), float("-inf"), ACC)
    l, t_l, t_c = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)  # noqa: E741
    for i in tl.static_range(PARTS):
        first = col0 + i * WIDTH
        cols = first + tl.arange(0, WIDTH)
        s = _negatives_of(us[i], positive_ptr, scale, M, N, diagonal, row0, first, BLOCK_M, WIDTH)
        m_row, l_row, _, m_col, l_col, _ = _sums_of(s, s, s, False, True)
        m, l, _ = _add(m, l, l, m_row, l_row, l_row)  # noqa: E741
        out, step = col_ptr + tile_m.to(tl.int64) * N + cols, tiles_m.to(tl.int64) * N
        tl.store(out, m_col, mask=cols < N)
        tl.store(out + step, l_col, mask=cols < N)
        s = _negatives_of(ts[i], t_positive_ptr, t_scale, M, N, diagonal, row0, first, BLOCK_M, WIDTH)
        col_centre = tl.load(col_centre_ptr + cols, mask=cols < N, other=0.0)
        w, col_w = (us[i] - centre[:, None]) * scale, (us[i] - col_centre[None, :]) * scale
        m_row, l_row, c_row, m_col, l_col, c_col = _sums_of(s, w, col_w, True, True)
        t_m, t_l, t_c = _add(t_m, t_l, t_c, m_row, l_row, c_row)
        tl.store(out + 2 * step, m_col, mask=cols < N)
        tl.store(out + 3 * step, l_col, mask=cols < N)
        tl.store(out + 4 * step, c_col, mask=cols < N)
    out, step = row_ptr + tile_n.to(tl.int64) * M + rows, tiles_n.to(tl.int64) * M
    tl.store(out, m, mask=rows < M)
    tl.store(out + step, l, mask=rows < M)
    tl.store(out + 2 * step, t_m, mask=rows < M)
    tl.store(out + 3 * step, t_l, mask=rows < M)
    tl.store(out + 4 * step, t_c, mask=rows < M)


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def _distill_grad_kernel(
    g_ptr,  # out [M, N] if STORE
    dot_ptr,  # out [programs] if DOT: sum G U of the tile; for H see `blocked.teacher_grad`
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # []
    t_x_ptr,  # [M, T_D]
    t_y_ptr,  # [N, T_D]
    t_scale_ptr,  # []
    a_ptr,  # [M], of the student; for H the means
    rho_ptr,  # [M], of the student; for H the centres
    b_ptr,  # [N]
    kappa_ptr,  # [N]
    row_about_ptr,  # [M], the teacher's centres, for H
    col_about_ptr,  # [N]
    t_a_ptr,  # [M]
    t_rho_ptr,  # [M]
    t_b_ptr,  # [N]
    t_kappa_ptr,  # [N]
    d_ptr,  # [M]
    stride_g,
    stride_x,
    stride_y,
    t_stride_x,
    t_stride_y,
    D,
    T_D,
    M,
    N,
    diagonal,
    TEACHER: tl.constexpr,  # H instead of G
    STORE: tl.constexpr,
    DOT: tl.constexpr,
    G_SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    T_EVEN_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row0, col0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    scale, t_scale = tl.load(scale_ptr), tl.load(t_scale_ptr)
    u = products(
        x_ptr, y_ptr, row0, col0, stride_x, stride_y, M, N, D,
        ACC, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    t = products(
        t_x_ptr, t_y_ptr, row0, col0, t_stride_x, t_stride_y, M, N, T_D,
        ACC, PRECISION, T_EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    us, ts = _parts(u, PARTS), _parts(t, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    rows = row0 + tl.arange(0, BLOCK_M)
    a = tl.load(a_ptr + rows, mask=rows < M, other=0.0)
    rho = tl.load(rho_ptr + rows, mask=rows < M, other=float("inf"))
    t_a = tl.load(t_a_ptr + rows, mask=rows < M, other=0.0)
    t_rho = tl.load(t_rho_ptr + rows, mask=rows < M, other=float("inf"))
    total = tl.zeros((), ACC)
    DOT_OF_G: tl.constexpr = DOT and not TEACHER
    for i in tl.static_range(PARTS):
        first = col0 + i * WIDTH
        cols = first + tl.arange(0, WIDTH)
        b = tl.load(b_ptr + cols, mask=cols < N, other=0.0)
        t_b = tl.load(t_b_ptr + cols, mask=cols < N, other=0.0)
        t_kappa = tl.load(t_kappa_ptr + cols, mask=cols < N, other=float("inf"))
        kappa = tl.load(kappa_ptr + cols, mask=cols < N, other=float("inf"))
        if TEACHER:
            s_t = ts[i] * t_scale
            p = t_a[:, None] * exp(s_t - t_rho[:, None]) * (a[:, None] - (us[i] - rho[:, None]) * scale)
            q = t_b[None, :] * exp(s_t - t_kappa[None, :]) * (b[None, :] - (us[i] - kappa[None, :]) * scale)
            g = p + q
            if DOT:
                negative = (rows < M)[:, None] & (cols < N)[None, :] & (cols[None, :] != (rows + diagonal)[:, None])
                row_about = tl.load(row_about_ptr + rows, mask=rows < M, other=0.0)
                col_about = tl.load(col_about_ptr + cols, mask=cols < N, other=0.0)
                terms = p * (ts[i] - row_about[:, None]) + q * (ts[i] - col_about[None, :])
                total += tl.sum(tl.where(negative, terms, 0.0))
        else:
            g = _softmaxes(us[i], scale, a, rho, b, kappa, 0.0)
            g -= _softmaxes(ts[i], t_scale, t_a, t_rho, t_b, t_kappa, 0.0)
        total += _finish_tile(
            g, us[i], g_ptr, d_ptr, stride_g, M, N, diagonal, row0, first,
            STORE, DOT_OF_G, G_SCALE, BLOCK_M, WIDTH,
        )  # fmt: skip
    if DOT:
        tl.store(dot_ptr + tl.program_id(0), total)


# --- launches -------------------------------------------------------------------------------------------------------


def _settings(x: Tensor, x_t: Tensor) -> dict[str, object]:
    settings = template._settings("distill", x)
    return settings | {"T_EVEN_D": x_t.shape[1] % settings["BLOCK_D"] == 0}


def stats(given: Models, centre: Tensor) -> tuple[Tensor, ...]:
    """See `blocked.stats`. Extra memory: 20 (N R / BLOCK_M + R N / BLOCK_N) bytes for R = 16384 rows at a time."""
    b, n = len(given.image), len(given.text)
    new = {"dtype": accumulation_dtype(given.image.dtype), "device": centre.device}
    # per direction: m and l of S; m, l and c of T
    rows, cols = (torch.zeros(5, k, **new) for k in (b, n))
    for found in (rows, cols):
        found[0], found[2] = -torch.inf, -torch.inf
    positive, t_positive = torch.empty(2, b, **new)
    x, y, x_t, y_t = map(aligned_rows, (given.image, given.text, given.teacher_image, given.teacher_text))
    settings = _settings(x, x_t)
    tiles_n = triton.cdiv(n, settings["BLOCK_N"])
    for i in range(0, b if n else 0, template._ROWS):
        m = min(b - i, template._ROWS)
        here = slice(i, i + m)
        tiles_m = triton.cdiv(m, settings["BLOCK_M"])
        row, col = torch.empty(5, tiles_n, m, **new), torch.empty(5, tiles_m, n, **new)
        launch(
            _distill_stats_kernel,
            (tiles_m * tiles_n,),
            x,
            centre_ptr=centre[here],
            col_centre_ptr=centre[b:],
            row_ptr=row,
            col_ptr=col,
            positive_ptr=positive[here],
            t_positive_ptr=t_positive[here],
            x_ptr=x[here],
            y_ptr=y,
            scale_ptr=given.scale,
            t_x_ptr=x_t[here],
            t_y_ptr=y_t,
            t_scale_ptr=given.teacher_scale,
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            t_stride_x=x_t.stride(0),
            t_stride_y=y_t.stride(0),
            D=x.shape[1],
            T_D=x_t.shape[1],
            M=m,
            N=n,
            diagonal=i + given.row_offset,
            **settings,
        )
        for into, parts in ((rows[:, here], row), (cols, col)):
            template._merge((into[0], into[1]), parts[:2])
            template._merge((into[2], into[3], into[4]), parts[2:])
    student, teacher = (rows[:2].unbind(), cols[:2].unbind()), (rows[2:4].unbind(), cols[2:4].unbind())
    return *student[0], *student[1], positive, *teacher[0], *teacher[1], t_positive, rows[4], cols[4]


def grad(
    student: Side,
    teacher: Side,
    alpha: Tensor,
    d: Tensor,
    row_offset: int,
    need_x: bool,
    need_y: bool,
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds) of the student, alpha times G's. Extra memory as the template's."""
    in_tiles = need_s and not (need_x or need_y)
    dx, dy, xgy, dot = _grad(student, teacher, student[3:], alpha, d, row_offset, False, need_x, need_y, in_tiles)
    ds = alpha * (dot if in_tiles else xgy).to(alpha.dtype)
    return dx, dy, ds if need_s else alpha.new_empty(0)


def teacher_grad(
    student: Side,
    teacher: Side,
    alpha: Tensor,
    mean: Tensor,
    centre: Tensor,
    t_centre: Tensor,
    d: Tensor,
    row_offset: int,
    need_x: bool,
    need_y: bool,
    need_s: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `blocked.teacher_grad`. Extra memory as the template's."""
    sizes = len(student.x), len(student.y)
    weights = [t for pair in zip(mean.split(sizes), centre.split(sizes), strict=True) for t in pair]
    about = t_centre.split(sizes)
    dx, dy, _, dot = _grad(student, teacher, weights, alpha, d, row_offset, True, need_x, need_y, need_s, about)
    return dx, dy, dot if need_s else dot.new_empty(0)


def _grad(student, teacher, weights, alpha, d, row_offset, of_teacher, need_x, need_y, in_tiles, about=None):  # type: ignore[no-untyped-def]
    """(dx, dy, <x, G y>, the sum that the tiles make if `in_tiles`)."""
    x, y, x_t, y_t = map(aligned_rows, (student.x, student.y, teacher.x, teacher.y))
    settings = _settings(x, x_t)
    a, rho, b, kappa = weights
    row_about, col_about = about or (rho, kappa)
    store = need_x or need_y or not in_tiles
    dot = torch.zeros((), dtype=torch.float64, device=x.device)

    def fill(i: int, j: int, m: int, n: int, g: Tensor) -> None:
        rows, cols = slice(i, i + m), slice(j, j + n)
        programs = triton.cdiv(m, settings["BLOCK_M"]) * triton.cdiv(n, settings["BLOCK_N"])
        part = torch.empty(programs if in_tiles else 0, dtype=alpha.dtype, device=x.device)
        launch(
            _distill_grad_kernel,
            (programs,),
            x,
            g_ptr=g,
            dot_ptr=part,
            x_ptr=x[rows],
            y_ptr=y[cols],
            scale_ptr=student.scale,
            t_x_ptr=x_t[rows],
            t_y_ptr=y_t[cols],
            t_scale_ptr=teacher.scale,
            a_ptr=a[rows],
            rho_ptr=rho[rows],
            b_ptr=b[cols],
            kappa_ptr=kappa[cols],
            row_about_ptr=row_about[rows],
            col_about_ptr=col_about[cols],
            t_a_ptr=teacher.a[rows],
            t_rho_ptr=teacher.rho[rows],
            t_b_ptr=teacher.b[cols],
            t_kappa_ptr=teacher.kappa[cols],
            d_ptr=d[rows],
            stride_g=g.stride(0),
            stride_x=x.stride(0),
            stride_y=y.stride(0),
            t_stride_x=x_t.stride(0),
            t_stride_y=y_t.stride(0),
            D=x.shape[1],
            T_D=x_t.shape[1],
            M=m,
            N=n,
            diagonal=i + row_offset - j,
            TEACHER=of_teacher,
            STORE=store,
            DOT=in_tiles,
            G_SCALE=template._g_scale(x.dtype),
            **settings,
        )
        if in_tiles:
            dot.add_(part.sum(dtype=torch.float64))

    side, left, right = (teacher, x_t, y_t) if of_teacher else (student, x, y)
    factor = side.scale * alpha
    dx, dy, xgy = template._gradients(side.x, side.y, left, right, factor, None, None, need_x, need_y, fill)
    return dx, dy, xgy, dot


# --- ahead-of-time compilation --------------------------------------------------------------------------------------


def aot_specs() -> Iterator[Spec]:
    """Both kernels in each dtype, for `mmfuse compile-report`."""
    for dtype, precision, tile, archs in template.shipped("distill"):
        options = tile | {"PRECISION": precision, "EVEN_D": True, "T_EVEN_D": True}
        yield template.spec(_distill_stats_kernel, "", dtype, options, archs)
        variants = [(0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
        for teacher, store, dot in template.distinct(variants, dtype, precision):
            flags = {"TEACHER": bool(teacher), "STORE": bool(store), "DOT": bool(dot)}
            variant = " ".join(name.lower() for name, on in flags.items() if on)
            more = flags | {"G_SCALE": template._g_scale(dtype)}
            yield template.spec(_distill_grad_kernel, variant, dtype, options | more, archs)
