"""Read a kernel's machine code (SASS): instructions of its common path and main loops, and the width of its accesses.

The common path is the one of the fewest instructions from the entry to the end that enters every main loop once: slow
paths and the edges of a matrix are branched around. Main loops hold the tensor-core instructions; a kernel without any
has one in each nest, the longest.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.M)
_ACCESS = re.compile(r"(LDG|STG|LDGSTS|LDS|STS|LDSM|STSM|UTMALDG|UTMASTG|UBLKCP)\b")
_NARROW = re.compile(r"(LDG|STG)\b.*\.[US](8|16)\b")
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "P0", "!P0", or ""
    name: str  # with its suffixes, e.g. "LDG.E.128"
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        # a branch can carry its condition as an operand
        conditional = self.guard or "P" in self.operands or ".DIV" in self.name
        return self.name.split(".")[0] not in ("BRA", "EXIT", "RET", "BRX", "JMP") or bool(conditional)

    @property
    def ends_block(self) -> bool:
        return self.name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")

    @property
    def flops(self) -> float:
        """Of a warp, in a product on the tensor cores; 0 where the shape is not in the name."""
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.name):
            return 2 * int(found[1]) * int(found[2]) * int(found[3]) / 4
        if found := re.match(r"HMMA\.(16)(8)(\d+)", self.name):
            return 2 * int(found[1]) * int(found[2]) * int(found[3])
        return 0


@dataclass(frozen=True)
class Loop:
    """One iteration of a main loop on its common path, without the main loops within it."""

    depth: int
    instructions: int
    tensor_core: int
    flops: float  # of a warp


@dataclass(frozen=True)
class Reading:
    """What the machine code of a kernel shows."""

    instructions: int  # in all
    outside: int  # on the common path, main loops excluded
    loops: tuple[Loop, ...]  # outer before inner
    accesses: dict[str, int]  # on the common path with its loops, by kind and bytes: {"LDG 16": 8}
    narrow: int  # of these, global and of 1 or 2 bytes


NOTHING = Reading(0, 0, (), {}, 0)


def parse(text: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, without padding."""
    found = (Instruction(int(at, 16), guard, name, rest.strip()) for at, guard, name, rest in _LINE.findall(text))
    return [i for i in found if i.name != "NOP"]


def read(text: str) -> Reading:
    """Read the output of `cuobjdump -sass` for one kernel."""
    graph = _Graph(parse(text))
    outside, loops = graph.common_path()
    common = [*outside, *(i for _, body in loops for i in body)]
    return Reading(
        instructions=len(graph.code),
        outside=len(outside),
        loops=tuple(
            Loop(depth, len(body), sum(map(_is_tensor_core, body)), sum(i.flops for i in body)) for depth, body in loops
        ),
        accesses=dict(sorted(Counter(filter(None, map(_access, common))).items())),
        narrow=sum(bool(_NARROW.match(i.name)) for i in common),
    )


def _is_tensor_core(i: Instruction) -> bool:
    return bool(_TENSOR_CORE.match(i.name))


def _access(i: Instruction) -> str | None:
    found = _ACCESS.match(i.name)
    if not found:
        return None
    if found[1][0] == "U":
        return found[1]
    if matrices := re.match(r"..SM\.16\.MT?88(?:\.(\d))?", i.name):
        return f"{found[1]} {4 * int(matrices[1] or 1)}"
    bits = re.findall(r"\.[US]?(8|16|64|128|256)\b", i.name)
    return f"{found[1]} {int(bits[-1]) // 8 if bits else 4}"


class _Graph:
    """Blocks of straight code, by the index of their first instruction, and the edges between them."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        at = {i.address: n for n, i in enumerate(code)}
        starts = {0} | {n + 1 for n, i in enumerate(code) if i.ends_block and n + 1 < len(code)}
        starts |= {at[i.target] for i in code if i.target in at}
        firsts = sorted(starts)
        self.blocks = {a: code[a:b] for a, b in zip(firsts, [*firsts[1:], len(code)], strict=True)}
        following = dict(zip(firsts, firsts[1:], strict=False))
        self.edges: dict[int, list[int]] = {}
        for first, block in self.blocks.items():
            last = block[-1]
            to = [at[last.target]] if last.target in at else []
            if last.falls_through and first in following:
                to.append(following[first])
            self.edges[first] = to

    @cached_property
    def order(self) -> list[int]:
        """Blocks that can be reached, each before those that it leads to, loops aside."""
        seen, done, stack = {0}, [], [(0, iter(self.edges[0]))]
        while stack:
            block, rest = stack[-1]
            to = next((t for t in rest if t not in seen), None)
            if to is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.edges[to])))
        return done[::-1]

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        every = set(self.order)
        before: dict[int, list[int]] = {b: [] for b in every}
        for b in every:
            for to in self.edges[b]:
                before[to].append(b)
        found = dict.fromkeys(every, every) | {0: {0}}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                new = set.intersection(*(found[p] for p in before[b])) | {b}
                changed |= new != found[b]
                found[b] = new
        return found

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of each loop, by its first one."""
        before: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for to in self.edges[b]:
                before[to].append(b)
        loops: dict[int, set[int]] = {}
        for end in self.order:
            for head in self.edges[end]:
                if head in self.dominators[end]:
                    body, todo = loops.setdefault(head, {head}), [end]
                    while todo:
                        b = todo.pop()
                        if b not in body:
                            body.add(b)
                            todo += before[b]
        return loops

    def common_path(self) -> tuple[list[Instruction], list[tuple[int, list[Instruction]]]]:
        """(outside the main loops, [(depth, an iteration)])"""
        loops: list[tuple[int, list[Instruction]]] = []
        ends = [b for b in self.order if self.blocks[b][-1].name == "EXIT" and not self.edges[b]]
        outside = self._walk([0], ends, set(self.order), loops, 0)
        return outside, loops

    def _walk(
        self, starts: Collection[int], ends: Collection[int], region: set[int],
        loops: list[tuple[int, list[Instruction]]], depth: int, within: int | None = None,
    ) -> list[Instruction]:  # fmt: skip
        """The common path through a region; appends its main loops and those within them."""
        path: list[int] = []
        for head in self._main_loops(region, within):
            way = self._shortest(starts, [head], region)
            if way is None:
                continue
            path += way[:-1]
            body = self.loops[head]
            place = len(loops)
            again = [b for b in body if head in self.edges[b]]
            inner = self._walk([head], again, body, loops, depth + 1, head)
            loops.insert(place, (depth, inner))
            starts = {to for b in body for to in self.edges[b] if to in region - body}
        path += self._shortest(starts, ends, region) or []
        return [i for b in path for i in self.blocks[b]]

    def _main_loops(self, region: set[int], within: int | None) -> list[int]:
        inside = [h for h, body in self.loops.items() if h != within and h in region and body <= region]
        outermost = [h for h in inside if not any(h in self.loops[o] for o in inside if o != h)]
        if any(map(_is_tensor_core, self.code)):
            main = [h for h in outermost if any(_is_tensor_core(i) for b in self.loops[h] for i in self.blocks[b])]
        else:
            main = sorted(outermost, key=lambda h: -sum(len(self.blocks[b]) for b in self.loops[h]))[:1]
        return sorted(main, key=self.order.index)

    def _shortest(self, starts: Iterable[int], ends: Collection[int], region: set[int]) -> list[int] | None:
        """The blocks of the way with the fewest instructions; no loop is gone round."""
        todo: list[tuple[int, int, tuple[int, ...]]] = [(len(self.blocks[s]), s, (s,)) for s in starts]
        heapq.heapify(todo)
        seen: set[int] = set()
        while todo:
            cost, b, way = heapq.heappop(todo)
            if b in ends:
                return list(way)
            if b in seen:
                continue
            seen.add(b)
            for to in self.edges[b]:
                if to in region and to not in self.dominators[b]:
                    heapq.heappush(todo, (cost + len(self.blocks[to]), to, (*way, to)))
        return None
