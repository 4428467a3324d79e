"""Sequence parallelism: one forward pass over the ranks of a group, exact for every size at every degree.

The image tokens are split flat into equal shards, rank after rank, padded at the very end; the text is on every rank.
All per-token work (norms, MLPs, projections) stays on the shard. Only attention needs the other ranks:

    [text + own shard, all heads]
      Ulysses: all-to-all trades heads for tokens      -> [text + own ring chunk, H/u heads]
      ring:    image K/V travel round, partial results  -> [text + own ring chunk, H/u heads], attended to everything
               merge by their log-sum-exp
      Ulysses: all-to-all back                          -> [text + own shard, all heads]

Rank r has ring index r // u and Ulysses index r % u: the chatty all-to-all runs between neighbours, and the u shards
of one ring chunk are consecutive tokens. Pads therefore sit at the tail of a chunk and are cut off before any kernel
sees them. Text keys are joined once, to the local chunk of each ring rank.
(Ulysses: arXiv 2309.14509; ring: 2310.01889; both together: 2405.07719.)

With classifier-free guidance, the group may be two such meshes, one a guidance branch: ranks 0 ... n/2 - 1 the negative
one, the others the positive one. Counterparts exchange their velocities once a step; nothing else crosses. Every item
is computed as it would be in a group of half the ranks, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hv_batch.engine.attention import Kernel, merge


class JointAttention(Protocol):
    """How the ranks of a mesh attend together; see `attend_jointly`."""

    def __call__(self, qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SequenceMesh:
    """This rank's place in the u x r grid that shares one sequence. A dimension of degree 1 has no process group."""

    rank: int  # within the grid
    ulysses_degree: int
    ring_degree: int
    cfg_degree: int = 1
    branch: int = 0  # which guidance branch this grid computes, where there are two grids: 0 the negative one
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None  # the grid
    cfg: dist.ProcessGroup | None = None  # this rank and its counterpart in the other grid
    world: dist.ProcessGroup | None = None  # all ranks of the group

    @classmethod
    def single(cls) -> SequenceMesh:
        return cls(rank=0, ulysses_degree=1, ring_degree=1)

    @property
    def size(self) -> int:
        """Ranks of the grid; the group has `cfg_degree` grids."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        """Ranks of the whole group."""
        return self.cfg_degree * self.size

    @property
    def world_rank(self) -> int:
        return self.branch * self.size + self.rank

    @property
    def ulysses_index(self) -> int:
        return self.rank % self.ulysses_degree

    @property
    def ring_index(self) -> int:
        return self.rank // self.ulysses_degree

    def span(self, length: int) -> tuple[int, int]:
        """First and past-the-last token of this rank's shard; the tail shards may reach past `length` into padding."""
        rows = -(-length // self.size)
        return self.rank * rows, (self.rank + 1) * rows

    def chunk_lengths(self, length: int) -> list[int]:
        """How many true tokens each ring chunk holds; 0 where a chunk is all padding."""
        rows = -(-length // self.size) * self.ulysses_degree
        return [min(max(length - i * rows, 0), rows) for i in range(self.ring_degree)]

    def shard(self, x: Tensor) -> Tensor:
        """This rank's rows of [L, C], zero-padded to equal length on all ranks."""
        start, stop = self.span(x.shape[0])
        return _pad_rows(x[start:stop], stop - start)

    def gather(self, shard: Tensor, length: int) -> Tensor:
        """The inverse of `shard`: [length, C], the same bits on every rank."""
        if self.size == 1:
            return shard
        full = shard.new_empty(self.size * shard.shape[0], *shard.shape[1:])
        dist.all_gather(list(full.chunk(self.size)), shard.contiguous(), group=self.sequence)
        return full[:length]

    def exchange(self, x: Tensor) -> Tensor:
        """x of both grids, negative branch first, stacked along the first axis: the same bits on every rank."""
        if self.cfg_degree == 1:
            return x
        both = x.new_empty(2 * x.shape[0], *x.shape[1:])
        dist.all_gather(list(both.chunk(2)), x.contiguous(), group=self.cfg)
        return both

    def adopt(self, x: Tensor) -> Tensor:
        """x of the group's first rank, on every rank; x itself may be overwritten."""
        if self.world is not None:
            dist.broadcast(x, group_src=0, group=self.world)
        return x


def attend_jointly(qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor:
    """Attention of text and image over text and image, across the mesh.

    qkv [S + l, 3, H, D]: the S text tokens, equal on every rank, then this rank's l image rows, of which those past
    `image_len` (counted over all ranks) are padding. Returns [S + l, H * D] in the same order; its text rows are the
    same bits on every rank, its padding rows mean nothing. S must be at least 1, H a multiple of the Ulysses degree.
    """
    rows = qkv.shape[0] - text_len
    joint = _heads_to_tokens(qkv, text_len, mesh)
    out = _attend_ring(joint, text_len, mesh.chunk_lengths(image_len), mesh, kernel)
    return _tokens_to_heads(out, text_len, rows, mesh)


def _heads_to_tokens(qkv: Tensor, text_len: int, mesh: SequenceMesh) -> Tensor:
    """[S + l, 3, H, D] -> [S + u*l, 3, H/u, D]: all tokens of the ring chunk, a slice of the heads."""
    u = mesh.ulysses_degree
    if u == 1:
        return qkv
    rows, (_, _, heads, dim) = qkv.shape[0] - text_len, qkv.shape
    mine = slice(mesh.ulysses_index * heads // u, (mesh.ulysses_index + 1) * heads // u)
    # Received straight into its place behind the text: with the text in front, cutting pads later is a view.
    joint = qkv.new_empty(text_len + u * rows, 3, heads // u, dim)
    joint[:text_len] = qkv[:text_len, :, mine]
    outgoing = rearrange(qkv[text_len:], "l k (u h) d -> (u l) k h d", u=u).contiguous()
    dist.all_to_all_single(joint[text_len:], outgoing, group=mesh.ulysses)
    return joint


def _tokens_to_heads(out: Tensor, text_len: int, rows: int, mesh: SequenceMesh) -> Tensor:
    """[S + n, H/u, D] -> [S + l, H * D], n being the true tokens among the chunk's u*l rows."""
    u = mesh.ulysses_degree
    image = _pad_rows(out[text_len:], u * rows)
    if u == 1:
        padded = out if image.shape[0] == out.shape[0] - text_len else torch.cat((out[:text_len], image))
        return padded.flatten(1)
    # Each peer gets its image rows and a copy of the text rows, so one collective brings all heads of both.
    text = out[:text_len].expand(u, -1, -1, -1)
    outgoing = torch.cat((text, image.unflatten(0, (u, rows))), dim=1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=mesh.ulysses)
    return rearrange(incoming, "u n h d -> n (u h d)")


def _attend_ring(joint: Tensor, text_len: int, chunk_lengths: list[int], mesh: SequenceMesh, kernel: Kernel) -> Tensor:
    """[S + c, 3, h, D] -> [S + n, h, D]: text and own chunk attend to the text and to every chunk of the ring."""
    own = joint[: text_len + chunk_lengths[mesh.ring_index]]
    q, k, v = own.unbind(1)
    if mesh.ring_degree == 1:
        return kernel(q, k, v)[0]
    # Whole chunks travel, pads included: ranks must send equal sizes. What is a pad is known from the sender's index.
    moving = joint[text_len:, 1:].contiguous()
    out, lse = q, q  # always replaced at hop 0, whose keys hold at least the text
    for hop in range(mesh.ring_degree):
        following, transfers = _pass_on(moving, mesh) if hop < mesh.ring_degree - 1 else (moving, [])
        true_rows = chunk_lengths[(mesh.ring_index - hop) % mesh.ring_degree]
        if hop == 0:
            out, lse = kernel(q, k, v)
            out = out.float()
        elif true_rows > 0:
            out, lse = merge(out, lse, *kernel(q, *moving[:true_rows].unbind(1)))
        for transfer in transfers:
            transfer.wait()
        moving = following
    out = out.to(joint.dtype).contiguous()
    # Ring ranks merge the same chunks in different orders, so their text rows differ by rounding. Ring rank 0's are
    # taken by all: replicated text stays replicated, bit for bit, and no decision made from it can split the group.
    dist.broadcast(out[:text_len], group_src=0, group=mesh.ring)
    return out


def _pass_on(chunk: Tensor, mesh: SequenceMesh) -> tuple[Tensor, list[dist.Work]]:
    """Start sending `chunk` to the next ring rank and receiving the previous one's, to overlap with the kernel."""
    incoming = torch.empty_like(chunk)
    after, before = (mesh.ring_index + 1) % mesh.ring_degree, (mesh.ring_index - 1) % mesh.ring_degree
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, chunk, group=mesh.ring, group_peer=after),
            dist.P2POp(dist.irecv, incoming, group=mesh.ring, group_peer=before),
        ]
    )
    return incoming, transfers


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Zero rows at the end up to `rows`; x itself when it has them all."""
    missing = rows - x.shape[0]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
