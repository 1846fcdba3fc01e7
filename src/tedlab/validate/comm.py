"""Checks communication: its options, what recomputation takes from memory, sharded sequences, an emulated network."""

from dataclasses import replace
from typing import Any

from tedlab.comm.keep import kept_tags
from tedlab.config import Compiler, Dedup, Granularity, LendPolicy, TrainConfig
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.models import models
from tedlab.moe import mixtures, routers
from tedlab.predict.budget import within_budget
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.cost import collective_seconds
from tedlab.predict.emulate import Emulation
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import Layout


def check_comm(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Checks the options of ``comm``, together with those of ``model`` that they need.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    comm, model = config.comm, config.model
    if comm.cac == "auto":
        load_cluster(comm.emulate or comm.cac_cluster)
    else:
        kept_tags(comm.cac, models[model.architecture].spec(model, config.moe).tags)
    if (comm.cac == "auto") != (comm.cac_budget_bytes is not None):
        raise ValueError(
            f"comm.cac={comm.cac} and comm.cac_budget_bytes={comm.cac_budget_bytes} do not belong together: auto keeps "
            "what a budget of bytes allows, and nothing else has one"
        )
    if comm.cac not in (False, None) and model.recompute.granularity == Granularity.NONE:
        raise ValueError(
            f"comm.cac={comm.cac} keeps collectives' results for recomputation, but with "
            "model.recompute.granularity=none nothing is recomputed; use model.recompute.granularity=block, or "
            "comm.cac=false"
        )
    if model.compile != Compiler.NONE:
        _check_compiled(config)
    if comm.fuse_reduce_scatter and not (comm.dtd or degrees.folded):
        raise ValueError(
            "comm.fuse_reduce_scatter=true makes one reduce-scatter of the experts' all-reduce and DTD's drop, "
            "but comm.dtd is false; use comm.dtd=true, or comm.fuse_reduce_scatter=false"
        )
    if comm.overlap_shared and not (config.moe.num_experts and config.moe.shared.experts):
        raise ValueError(
            "comm.overlap_shared=true computes shared experts while tokens are on their way to routed ones, but "
            f"moe.shared.experts is {config.moe.shared.experts}; use moe.shared.experts=1 or more, or "
            "comm.overlap_shared=false"
        )
    if comm.chunks > 1:
        _check_chunks(config, degrees)
    if comm.by_node:
        _check_nodes(config, degrees)
    if comm.dedup != Dedup.NONE:
        _check_dedup(config, degrees)
    if degrees.sequence:
        _check_sequence(config, degrees)
    _check_emulation(config, degrees)


def what_to_keep(config: TrainConfig, degrees: ParallelDegrees, cluster: ClusterConfig | None = None) -> Any:
    """Returns ``comm.cac``, or for ``auto`` the entries that fit the budget.

    Args:
        config: The job's configuration, complete otherwise.
        degrees: Its parallel degrees.
        cluster: The cluster whose links ``auto`` assumes; None: ``comm.cac_cluster``. An emulated one overrides both.
    """
    if config.comm.cac != "auto":
        return config.comm.cac
    if config.comm.emulate is not None or cluster is None:
        cluster = load_cluster(config.comm.emulate or config.comm.cac_cluster)
    members = Layout(degrees, config.comm).groups(0)
    assert config.comm.cac_budget_bytes is not None
    return within_budget(
        ClosedForm(config),
        config.comm.cac_budget_bytes,
        lambda call: collective_seconds(call.op, call.payload_bytes, members[call.kind], cluster),
    )


def _check_dedup(config: TrainConfig, degrees: ParallelDegrees) -> None:
    comm, moe = config.comm, config.moe
    if moe.num_experts and not mixtures[moe.dispatch].sends_pilots:
        what = "once to each process that holds experts of its choice"
        if comm.dedup == Dedup.GROUP:
            what = "to every process of the expert group"
        raise ValueError(
            f"comm.dedup={comm.dedup} sends a token {what}, but with moe.dispatch={moe.dispatch} each choice has a "
            "place of its own at its expert; use moe.dispatch=dropless, or comm.dedup=none"
        )
    pilots = comm.dedup != Dedup.GROUP  # which save rows, where gathered tokens save the host's waiting
    if pilots and moe.num_experts and moe.top_k == 1:
        raise ValueError(
            f"comm.dedup={comm.dedup} saves rows of tokens with several choices in one process, but moe.top_k is 1; "
            "use moe.top_k=2 or more, or comm.dedup=none"
        )
    layout = Layout(degrees, replace(comm, ranks_per_node=ranks_per_node(config)), moe.sliced)
    if pilots and moe.num_experts == degrees.expert > 1 and layout.nodes == 1:
        raise ValueError(
            f"comm.dedup={comm.dedup} saves rows of tokens with several choices in one process, but with "
            f"parallel.expert={degrees.expert} each process has one of the {moe.num_experts} experts; use "
            f"parallel.expert={degrees.expert // 2} or less, or comm.dedup=none"
        )
    if layout.gathers > 1 and not layout.scattered and degrees.expert > 1:
        who, what, otherwise = "tensor ranks", "comm.dtd=true", ""
        if degrees.folded:
            who, what = "processes", f"a folded layout with parallel.expert_tensor={degrees.expert_tensor}"
            otherwise = ", parallel.expert_tensor=1"
        raise ValueError(
            f"comm.dedup={comm.dedup} sums the choices of a token before {who} reduce them, but {what} reduces every "
            f"row, in the paper's order; use comm.fuse_reduce_scatter=true with it{otherwise}, or comm.dedup=none"
        )


def ranks_per_node(config: TrainConfig, cluster: ClusterConfig | None = None) -> int | None:
    """Returns ``comm.ranks_per_node``, or where it is null and something depends on it, how many ranks share a node.

    Args:
        config: The job's configuration.
        cluster: The cluster that it is predicted for; None: it runs here. An emulated one overrides both.
    """
    comm = config.comm
    if comm.ranks_per_node is not None or not comm.by_node:
        return comm.ranks_per_node
    if comm.emulate is not None:
        return comm.emulate_ranks_per_node or load_cluster(comm.emulate).gpus_per_node
    if cluster is not None:
        return cluster.gpus_per_node
    return max(1, config.parallel.world_size // int(config.trainer["num_nodes"]))


def node_notes(config: TrainConfig, degrees: ParallelDegrees) -> list[str]:
    """Returns notes on exchanges that are asked to go by way of nodes, and do not."""
    comm, per_node = config.comm, ranks_per_node(config)
    if not comm.by_node or per_node is None:
        return ["comm.ranks_per_node does nothing here: no exchange goes by way of nodes."] if per_node else []
    once = comm.dedup == Dedup.NODE
    what = "comm.dedup=node does what rank does here" if once else "comm.hierarchical=true does nothing here"
    nodes = degrees.nodes(per_node)
    if degrees.expert == 1 or not config.moe.num_experts:
        return [f"{what}: all experts are in one process, so nothing is exchanged."]
    if nodes == 1:
        return [f"{what}: each expert group is on one node of {per_node} ranks."]
    if nodes == degrees.expert:
        return [f"{what}: each process of an expert group is on a node of its own."]
    if once and comm.hierarchical:
        return ["comm.hierarchical=true does nothing here: with comm.dedup=node tokens go by way of nodes anyway."]
    return []


def _check_nodes(config: TrainConfig, degrees: ParallelDegrees) -> None:
    comm = config.comm
    if comm.hierarchical and comm.dedup in (Dedup.RANK, Dedup.GROUP):
        raise ValueError(
            f"comm.hierarchical=true sends all rows by way of nodes, but with comm.dedup={comm.dedup} a token goes "
            "directly to each process; use one of the two"
        )
    per_node = ranks_per_node(config)
    assert per_node is not None
    what, otherwise = "comm.hierarchical=true", "comm.hierarchical=false"
    if comm.dedup == Dedup.NODE:
        what, otherwise = "comm.dedup=node", "comm.dedup=rank"
    try:
        degrees.nodes(per_node)
    except ValueError as error:
        raise ValueError(
            f"{what} exchanges by way of nodes, and {error}; use another comm.ranks_per_node or parallel.expert, or "
            f"{otherwise}"
        ) from None


def _check_compiled(config: TrainConfig) -> None:
    if config.comm.cac in ("shard", "auto") or ":shard" in str(config.comm.cac):
        raise ValueError(
            f"comm.cac={config.comm.cac} keeps shards, which the compiler cannot; with model.compile="
            f"{config.model.compile} use true, false or a list of collectives"
        )
    if not config.model.recompute.early_stop:
        raise ValueError(
            f"model.recompute.early_stop=false recomputes what nobody needs, which "
            f"model.compile={config.model.compile} leaves out; use one of the two"
        )
    if config.moe.num_experts and "compile" not in routers[config.moe.gating].supports:
        raise ValueError(f"model.compile={config.model.compile} needs moe.gating=default, not {config.moe.gating}")


def _check_chunks(config: TrainConfig, degrees: ParallelDegrees) -> None:
    chunks, moe = config.comm.chunks, config.moe
    if not moe.num_experts:
        raise ValueError(
            f"comm.chunks={chunks} divides what is exchanged with experts, but moe.num_experts is 0; use comm.chunks=1"
        )
    if config.comm.dedup != Dedup.NONE:
        raise ValueError(
            f"comm.chunks={chunks} divides the rows of each expert, but with comm.dedup={config.comm.dedup} a token "
            "travels once for all of its experts in a process; use one of the two"
        )
    if moe.lend.policy != LendPolicy.NONE:
        raise ValueError(
            f"comm.chunks={chunks} divides the rows of each expert before they are sent, but moe.lend.policy="
            f"{moe.lend.policy} lends experts once for all rows of a layer; use one of the two"
        )
    layout = Layout(degrees, config.comm, moe.sliced)
    tokens = config.data.micro_batch_size * config.model.sequence_length
    most = mixtures[moe.dispatch].dispatch(config.model.hidden, moe).most_chunks(layout, tokens)
    if chunks > most:
        what = "rows" if moe.ragged else "slots of each expert"
        raise ValueError(
            f"comm.chunks={chunks} exceeds the {most} {what} that a process sends for a micro-batch of {tokens} "
            f"tokens; use at most {most}"
        )


def check_interleaving(config: TrainConfig, micro_batches: int) -> None:
    """Checks ``comm.interleave``.

    Args:
        config: The job's configuration.
        micro_batches: The number of micro-batches of a step in each data rank.

    Raises:
        ValueError: If it cannot work.
    """
    if not config.comm.interleave:
        return
    if not config.moe.num_experts:
        raise ValueError(
            "comm.interleave=true computes one micro-batch while another is exchanged with experts, but "
            "moe.num_experts is 0; use comm.interleave=false"
        )
    if micro_batches < 2:
        raise ValueError(
            "comm.interleave=true runs the backward pass of a micro-batch beside the forward pass of the next of its "
            f"step, but a step has {micro_batches}; use a data.batch_size of two micro-batches or more "
            "(data.micro_batch_size × data ranks each), or comm.interleave=false"
        )
    if config.compiles_experts:
        raise ValueError(
            f"comm.interleave=true switches between passes where they wait for an exchange, but with model.compile="
            f"{config.model.compile} slots are exchanged inside of what is compiled, which waits by itself; use "
            "moe.dispatch=dropless, moe.kernel=triton, or one of the two"
        )


def _check_sequence(config: TrainConfig, degrees: ParallelDegrees) -> None:
    moe = config.moe
    if config.comm.dtd:
        raise ValueError(
            "comm.dtd=true drops duplicate tokens, but with parallel.sequence=true there are none: each tensor rank "
            "has its own; use one of the two"
        )
    check_divides("model.sequence_length", config.model.sequence_length, "parallel.tensor", degrees.tensor)
    if moe.num_experts and "groups" not in routers[moe.gating].supports:
        raise ValueError(f"parallel.sequence=true needs moe.gating=default; moe.gating is {moe.gating}")


def _check_emulation(config: TrainConfig, degrees: ParallelDegrees) -> None:
    comm = config.comm
    if comm.emulate is None:
        return
    everybody = {"world": range(degrees.world_size)}
    Emulation(load_cluster(comm.emulate), everybody, comm.emulate_dilation, comm.emulate_ranks_per_node)  # type: ignore[arg-type]
