"""Sequence parallelism: one forward pass over the ranks of a group, exact for every size at every degree.

The image tokens are split into equal consecutive shards, one per rank, with padding at the end of the last shards. The
text is replicated on every rank. All per-token work (norms, MLPs, projections) is local to the shard. Only attention
communicates:

    [text + own shard, all heads]
      Ulysses: all-to-all, heads for tokens             -> [text + own ring chunk, H/u heads]
      ring:    image K/V pass around the ring, partial  -> [text + own ring chunk, H/u heads], attended to all keys
               results are merged by their log-sum-exp
      Ulysses: all-to-all back                          -> [text + own shard, all heads]

Rank r has ring index r // u and Ulysses index r % u. The all-to-all, which sends the most data, therefore runs between
neighbouring ranks, and the u shards of a ring chunk are consecutive tokens. Padding is at the end of a chunk and is
trimmed before every kernel call. Text keys are attended once, together with the local chunk of each ring rank.
(Ulysses: arXiv 2309.14509; ring attention: 2310.01889; both together: 2405.07719.)

With classifier-free guidance, the group may consist of two such meshes, one per guidance branch: ranks 0 ... n/2 - 1
compute the negative branch, the others the positive branch. Each rank gathers the velocity of its counterpart once per
step; the meshes do not communicate otherwise. Every batch item has the same bits as in a group of half the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hv_batch.engine.attention.kernels import Kernel, merge


class JointAttention(Protocol):
    """The attention of text and image across the ranks of a mesh; see `attend_jointly`."""

    def __call__(self, qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SequenceMesh:
    """This rank's position in the u x r grid of ranks that divide one sequence.

    An axis of degree 1 has no process group.
    """

    rank: int  # within the grid
    ulysses_degree: int
    ring_degree: int
    cfg_degree: int = 1
    branch: int = 0  # guidance branch of this grid if there are two grids; 0 is the negative one
    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None  # all ranks of the grid
    cfg: dist.ProcessGroup | None = None  # this rank and its counterpart in the other grid
    world: dist.ProcessGroup | None = None  # all ranks of the denoise group

    @classmethod
    def single(cls) -> SequenceMesh:
        return cls(rank=0, ulysses_degree=1, ring_degree=1)

    @property
    def size(self) -> int:
        """Number of ranks of the grid. The denoise group has `cfg_degree` grids."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        """Number of ranks of the denoise group."""
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
        """Return (start, stop) of this rank's shard of `length` tokens. The last shards may extend into the padding."""
        rows = -(-length // self.size)
        return self.rank * rows, (self.rank + 1) * rows

    def chunk_lengths(self, length: int) -> list[int]:
        """Return the number of tokens in each ring chunk, excluding padding; 0 if a chunk is padding only."""
        rows = -(-length // self.size) * self.ulysses_degree
        return [min(max(length - i * rows, 0), rows) for i in range(self.ring_degree)]

    def shard(self, x: Tensor) -> Tensor:
        """Return this rank's rows of [L, C], zero-padded to the same length on all ranks."""
        start, stop = self.span(x.shape[0])
        return _pad_rows(x[start:stop], stop - start)

    def gather(self, shard: Tensor, length: int) -> Tensor:
        """Return all rows [length, C] from the shards of all ranks, equal on every rank: the inverse of `shard`."""
        if self.size == 1:
            return shard
        full = shard.new_empty(self.size * shard.shape[0], *shard.shape[1:])
        dist.all_gather(list(full.chunk(self.size)), shard.contiguous(), group=self.sequence)
        return full[:length]

    def all_gather_branches(self, x: Tensor) -> Tensor:
        """Concatenate x of both guidance branches along the first axis, negative branch first; equal on every rank.

        Returns x itself if this rank's grid computes both branches.
        """
        if self.cfg_degree == 1:
            return x
        both = x.new_empty(2 * x.shape[0], *x.shape[1:])
        dist.all_gather(list(both.chunk(2)), x.contiguous(), group=self.cfg)
        return both

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks of the denoise group, in order. They are pickled."""
        values = [value]
        if self.world is not None:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.world)
        return values

    def broadcast_from_rank0(self, x: Tensor) -> Tensor:
        """Return x of rank 0 on every rank. Overwrites x."""
        if self.world is not None:
            dist.broadcast(x, group_src=0, group=self.world)
        return x


def attend_jointly(qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor:
    """Compute the joint attention of text and image tokens across the mesh.

    qkv [S + l, 3, H, D] holds the S text tokens, equal on every rank, then this rank's l image rows. Image rows past
    `image_len` (counted over all ranks) are padding. Returns [S + l, H * D] in the same order. The text rows have the
    same bits on every rank; the padding rows are undefined. S must be at least 1, and the Ulysses degree must divide H.
    """
    rows = qkv.shape[0] - text_len
    joint = _heads_to_tokens(qkv, text_len, mesh)
    out = _attend_ring(joint, text_len, mesh.chunk_lengths(image_len), mesh, kernel)
    return _tokens_to_heads(out, text_len, rows, mesh)


def _heads_to_tokens(qkv: Tensor, text_len: int, mesh: SequenceMesh) -> Tensor:
    """[S + l, 3, H, D] -> [S + u*l, 3, H/u, D]: all tokens of the ring chunk, this rank's slice of the heads."""
    u = mesh.ulysses_degree
    if u == 1:
        return qkv
    rows, (_, _, heads, dim) = qkv.shape[0] - text_len, qkv.shape
    mine = slice(mesh.ulysses_index * heads // u, (mesh.ulysses_index + 1) * heads // u)
    # The result is received directly behind the text. With the text first, padding can be trimmed as a view.
    joint = qkv.new_empty(text_len + u * rows, 3, heads // u, dim)
    joint[:text_len] = qkv[:text_len, :, mine]
    outgoing = rearrange(qkv[text_len:], "l k (u h) d -> (u l) k h d", u=u).contiguous()
    dist.all_to_all_single(joint[text_len:], outgoing, group=mesh.ulysses)
    return joint


def _tokens_to_heads(out: Tensor, text_len: int, rows: int, mesh: SequenceMesh) -> Tensor:
    """[S + n, H/u, D] -> [S + l, H * D]; n is the number of tokens, without padding, in the u*l rows of the chunk."""
    u = mesh.ulysses_degree
    image = _pad_rows(out[text_len:], u * rows)
    if u == 1:
        padded = out if image.shape[0] == out.shape[0] - text_len else torch.cat((out[:text_len], image))
        return padded.flatten(1)
    # Each peer receives its image rows and a copy of the text rows, so one collective transfers all heads of both.
    text = out[:text_len].expand(u, -1, -1, -1)
    outgoing = torch.cat((text, image.unflatten(0, (u, rows))), dim=1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=mesh.ulysses)
    return rearrange(incoming, "u n h d -> n (u h d)")


def _attend_ring(joint: Tensor, text_len: int, chunk_lengths: list[int], mesh: SequenceMesh, kernel: Kernel) -> Tensor:
    """[S + c, 3, h, D] -> [S + n, h, D]: text and own chunk attend to the text and to all chunks of the ring."""
    own = joint[: text_len + chunk_lengths[mesh.ring_index]]
    q, k, v = own.unbind(1)
    if mesh.ring_degree == 1:
        return kernel(q, k, v)[0]
    # Chunks are sent with their padding, because all ranks must send equal sizes. The receiver derives the number of
    # padding rows from the ring index of the chunk's owner.
    moving = joint[text_len:, 1:].contiguous()
    out, lse = q, q  # always replaced at hop 0, whose keys include the text
    for hop in range(mesh.ring_degree):
        following, transfers = _pass_on(moving, mesh) if hop < mesh.ring_degree - 1 else (moving, [])
        valid_rows = chunk_lengths[(mesh.ring_index - hop) % mesh.ring_degree]
        if hop == 0:
            out, lse = kernel(q, k, v)
            out = out.float()
        elif valid_rows > 0:
            out, lse = merge(out, lse, *kernel(q, *moving[:valid_rows].unbind(1)))
        for transfer in transfers:
            transfer.wait()
        moving = following
    out = out.to(joint.dtype).contiguous()
    # Ring ranks merge the same chunks in different orders, so their text rows differ by rounding. All ranks use the
    # text rows of ring rank 0: the replicated text keeps equal bits, and all ranks make equal decisions from it.
    dist.broadcast(out[:text_len], group_src=0, group=mesh.ring)
    return out


def _pass_on(chunk: Tensor, mesh: SequenceMesh) -> tuple[Tensor, list[dist.Work]]:
    """Start to send `chunk` to the next ring rank and to receive from the previous one. Overlaps with the kernel."""
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
    """Pad x with zero rows at the end to `rows` rows. Returns x itself if it has as many."""
    missing = rows - x.shape[0]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
