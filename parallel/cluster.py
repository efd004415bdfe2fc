"""What a run has: GPUs, and the links between them; what a collective takes on a part of it. Modelled."""

from dataclasses import dataclass

from parallel.gpus import Gpu

EFFICIENCY = 0.55
"""Share of the peak that a GPU sustains while it computes. Whole runs of dense models reach 0.44 to 0.51 of it on one
node of H100 (the highest published), communication included."""
LINK_SHARE = 0.8
"""Share of a link's rate that a large collective sustains."""
START_S, HOP_S, NODE_HOP_S = 8e-6, 3.4e-6, 14e-6
"""Of one collective: its start, and for each rank of its ring a hop within a node or to the next node (what NCCL's own
model of itself takes for large messages: the latencies of ring and Simple in its tuning.cc)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run has."""

    gpu: Gpu
    gpus_a_node: int
    nodes: int
    link_gb_s: float
    """Between GPUs of a node, a GPU, one direction (GB/s)."""
    node_link_gb_s: float
    """Between nodes, all of a node's network cards together, one direction (GB/s)."""
    disk_gb_s: float
    """What all nodes together write to the disk (GB/s)."""
    efficiency: float = EFFICIENCY

    @property
    def gpus(self) -> int:
        return self.gpus_a_node * self.nodes


def ring(size: float, ranks: int, rate: float) -> float:
    """Return the seconds of an all-gather to, or a reduce-scatter from, so many bytes a rank: (n - 1) / n of them pass
    each link of a ring; an all-reduce is both.

    Args:
        rate: bytes/s of a link.
    """
    return 0.0 if ranks == 1 else size * (ranks - 1) / ranks / rate


def rate_of(cluster: Cluster, ranks: int, stride: int) -> float:
    """Return the bytes/s that a rank has to its neighbour in a group whose ranks are `stride` apart.

    A group within a node has the node's links. Of one that spans nodes each ring enters and leaves a node once: it has
    the node's network cards to itself and the groups that lie between its ranks (`stride`).
    """
    rate = cluster.link_gb_s
    if ranks * stride > cluster.gpus_a_node:
        rate = min(rate, cluster.node_link_gb_s / min(stride, cluster.gpus_a_node))
    return rate * 1e9 * LINK_SHARE


def latency(cluster: Cluster, ranks: int, stride: int) -> float:
    """Return the seconds that an all-gather or a reduce-scatter of nothing takes; an all-reduce is both."""
    if ranks == 1:
        return 0.0
    nodes = min(ranks, -(-ranks * stride // cluster.gpus_a_node))
    return START_S + HOP_S * (ranks - nodes) + (NODE_HOP_S * nodes if nodes > 1 else 0.0)
