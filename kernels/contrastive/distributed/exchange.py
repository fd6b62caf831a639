"""The ways in which texts reach every rank, and their gradients come home.

`blocks(text)` yields (texts, where this rank's positives begin in them, or None), the own texts first; `home(grads)`
takes their gradients in reverse, the own texts' last, and returns the sum over ranks for the own texts. Both let texts
and gradients travel while the caller computes: with the block before, and the gradient that `home` asks for next.

CLIP has statistics of all texts in its forward, and gradients only then: `gradients(ys, of_block, send)` calls
`of_block(i, texts)` for every block in a fixed order and returns the sum over ranks for the own texts, if it is to be
sent. `ys` are the texts of the blocks that the forward keeps: of all, if `keeps`, or the own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmfuse.kernels.contrastive.distributed.peers import Peers

Block = tuple[Tensor, int | None]


# the others' texts come in parts, each under way while what came before it is computed: none smaller than the own
# texts, and no more than this, because a collective's latency grows with the number of ranks
_CHUNKS = 4


class Gather:
    """All at once, in a few chunks, each of some rows of every other rank.

    [N] numbers, one of each text, stand by chunk and in a chunk by rank: the same on all ranks, unlike the blocks.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.chunks = peers.chunks(max(1, min(_CHUNKS, peers.size - 1, max(peers.sizes))))

    def blocks(self, text: Tensor) -> Iterator[Block]:
        coming = [c.gathering(part, own=False) for c, part in zip(self.chunks, self._parts(text), strict=True)]
        yield text, 0
        while coming:  # what has arrived is held by the caller alone
            yield coming.pop(0)(), None

    def home(self, grads: Iterable[Tensor]) -> Tensor:
        grads = iter(grads)
        coming = []
        for chunk in reversed(self.chunks):
            g = next(grads)
            nothing = g.new_zeros(chunk.sizes[chunk.rank], *g.shape[1:])
            coming.append(chunk.scattering(chunk.among(nothing, g)))
        own = next(grads)
        return own + torch.cat([arrived() for arrived in reversed(coming)])

    def whole(self, own: Tensor, *others: Tensor) -> Tensor:
        """[N], from a number of each text of every block."""
        return torch.cat([c.among(*parts) for c, *parts in zip(self.chunks, self._parts(own), others, strict=True)])

    def by_block(self, t: Tensor) -> list[Tensor]:
        """`whole` undone."""
        parts = t.split([c.total for c in self.chunks])
        own, others = zip(*(c.apart(part) for c, part in zip(self.chunks, parts, strict=True)), strict=True)
        return [torch.cat(own), *others]

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each rank [W] as one of each text [N]."""
        return torch.cat([c.spread(numbers) for c in self.chunks])

    def columns(self, i: int) -> Iterator[tuple[int, slice]]:
        """Each rank with texts in block i, and where they are."""
        chunk, start = self.chunks[i - 1], 0
        for r, n in enumerate(chunk.sizes):
            if r != chunk.rank:
                yield r, slice(start, start + n)
                start += n

    keeps = True

    def gradients(self, ys: Sequence[Tensor], of_block: Callable[[int, Tensor], Tensor], send: bool) -> Tensor:
        grads = (of_block(i, ys[i]) for i in reversed(range(len(ys))))
        return self.home(grads) if send else list(grads)[-1]

    def _parts(self, own: Tensor) -> tuple[Tensor, ...]:
        return own.tensor_split(len(self.chunks))


class Reduce:
    """Each rank's in turn: they go out to all, and their gradients are summed where they came from."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.others = [r for r in range(peers.size) if r != peers.rank]

    def blocks(self, text: Tensor) -> Iterator[Block]:
        text = text.contiguous()
        if not self.others:
            yield text, 0
            return
        coming = self._send(text, 0)
        yield text, 0
        for r in range(self.peers.size):
            y, work = coming
            with self.peers.waiting("sending the texts around"):
                work.wait()
            if r + 1 < self.peers.size:
                coming = self._send(text, r + 1)
            if r in self.others:
                yield y, None

    def _send(self, text: Tensor, rank: int):  # type: ignore[no-untyped-def]
        """Begin to send `rank`'s texts to all."""
        peers = self.peers
        y = text if rank == peers.rank else text.new_empty(peers.sizes[rank], text.shape[1])
        with peers.waiting("sending the texts around"):
            return y, dist.broadcast(y, _global(peers, rank), group=peers.group, async_op=True)

    def home(self, grads: Iterable[Tensor]) -> Tensor:
        peers = self.peers
        by_rank = dict(zip([*reversed(self.others), peers.rank], grads, strict=True))
        for r in range(peers.size) if self.others else ():
            with peers.waiting("summing the texts' gradients"):
                dist.reduce(by_rank[r], _global(peers, r), group=peers.group)
        return by_rank[peers.rank]


class Ring:
    """From neighbour to neighbour, along one chain or two in opposite directions; gradients go back, summed."""

    def __init__(self, peers: Peers, chains: dict[int, int]) -> None:
        self.peers = peers
        self.chains = {step: hops for step, hops in chains.items() if hops}  # +-1: number of hops

    def source(self, step: int, hop: int) -> int:
        """Whose texts this rank holds after `hop` hops of a chain."""
        return (self.peers.rank - step * hop) % self.peers.size

    def blocks(self, text: Tensor) -> Iterator[Block]:
        held = dict.fromkeys(self.chains, text.contiguous())
        last = max(self.chains.values(), default=0)
        arriving = self._hop(held, 1)
        yield text, 0
        for hop in range(1, last + 1):
            held = self._arrived(arriving)
            arriving = self._hop(held, hop + 1)
            for y in held.values():
                yield y, None

    def home(self, grads: Iterable[Tensor]) -> Tensor:
        grads = iter(grads)
        arriving: tuple[dict[int, Tensor], list[dist.Work]] = ({}, [])
        for hop in range(max(self.chains.values(), default=0), 0, -1):
            sent = {step: next(grads) for step in reversed(self._at(hop))}
            for step, g in self._arrived(arriving).items():
                sent[step] += g
            arriving = self._move(sent, hop - 1, back=True)
        own = next(grads)
        for g in self._arrived(arriving).values():
            own += g
        return own

    def _at(self, hop: int) -> list[int]:
        return [step for step, hops in self.chains.items() if hop <= hops]

    def _hop(self, held: dict[int, Tensor], hop: int):  # type: ignore[no-untyped-def]
        return self._move({step: held[step] for step in self._at(hop)}, hop)

    def _move(self, sent: dict[int, Tensor], hop: int, back: bool = False):  # type: ignore[no-untyped-def]
        """Send each chain's tensor on (or back), and begin to receive what this rank holds at `hop`."""
        peers, ops, received = self.peers, [], {}
        for step, t in sent.items():
            way = -step if back else step
            to, source = ((peers.rank + w) % peers.size for w in (way, -way))
            received[step] = t.new_empty(peers.sizes[self.source(step, hop)], *t.shape[1:])
            if t.numel():
                ops.append(dist.P2POp(dist.isend, t, _global(peers, to), peers.group))
            if received[step].numel():
                ops.append(dist.P2POp(dist.irecv, received[step], _global(peers, source), peers.group))
        with peers.waiting("passing the texts on"):
            return received, dist.batch_isend_irecv(ops) if ops else []

    def _arrived(self, arriving) -> dict[int, Tensor]:  # type: ignore[no-untyped-def]
        received, works = arriving
        with self.peers.waiting("passing the texts on"):
            for work in works:
                work.wait()
        return received


class RingExchange(Ring):
    """CLIP's texts once around a ring in the forward, and once more with their gradients: none but the own are kept.

    [N] numbers, one of each text, stand by rank.
    """

    keeps = False

    def __init__(self, peers: Peers) -> None:
        super().__init__(peers, {1: peers.size - 1})
        self.sources = [self.source(1, hop) for hop in range(peers.size)]

    def whole(self, *blocks: Tensor) -> Tensor:
        return torch.cat([blocks[i] for i in sorted(range(len(blocks)), key=self.sources.__getitem__)])

    def by_block(self, t: Tensor) -> list[Tensor]:
        by_rank = t.split(self.peers.sizes)
        return [by_rank[r] for r in self.sources]

    def spread(self, numbers: Tensor) -> Tensor:
        return self.peers.spread(numbers)

    def columns(self, i: int) -> Iterator[tuple[int, slice]]:
        yield self.sources[i], slice(None)

    def gradients(self, ys: Sequence[Tensor], of_block: Callable[[int, Tensor], Tensor], send: bool) -> Tensor:
        held = {1: ys[0].contiguous()}
        texts, sums = self._hop(held, 1), self._move({}, 0)
        own = of_block(0, held[1])
        for hop in range(1, self.peers.size):
            held = self._arrived(texts)
            texts = self._hop(held, hop + 1)
            g = of_block(hop, held[1])
            if send:  # on to the rank that has these texts next, or, at the last, whose they are
                for so_far in self._arrived(sums).values():
                    g += so_far
                sums = self._move({1: g}, hop + 1)
        for total in self._arrived(sums).values():
            own += total
        return own


def _global(peers: Peers, rank: int) -> int:
    return rank if peers.group is None else dist.get_global_rank(peers.group, rank)


EXCHANGES: dict[str, Callable[[Peers], Gather | Reduce | Ring]] = {
    "bidir": lambda peers: Ring(peers, {1: peers.size // 2, -1: (peers.size - 1) // 2}),
    "shift": lambda peers: Ring(peers, {1: peers.size - 1}),
    "reduce": Reduce,
    "gather": Gather,
}
