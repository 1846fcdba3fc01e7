"""Finds what runs as a whole in a model: a block, or blocks that ``moe.shortcut`` joins."""

from collections.abc import Sequence

from tedlab.config import Shortcut
from tedlab.models.block import Block, BlockSpec
from tedlab.models.double_gate import DoubleGatedBlocks, DoubleGatedSpec
from tedlab.models.joined import JoinedSpec, MergedSpec
from tedlab.models.shortcut import BESIDE, ShortcutBlocks, ShortcutSpec
from tedlab.topology import Topology

Unit = BlockSpec | JoinedSpec | MergedSpec


def units(blocks: Sequence[BlockSpec]) -> list[Unit]:
    """Returns for each block what runs as a whole; a pair stands at its second block."""
    found: list[Unit] = list(blocks)
    for index, block in enumerate(blocks):
        if block.moe is not None and block.moe.shortcut != Shortcut.NONE:
            pair = block.moe.paired
            together = tuple(blocks[index - pair : index + 1])
            doubled = block.moe.shortcut == Shortcut.DGMOE
            found[index] = DoubleGatedSpec(together) if doubled else ShortcutSpec(together, BESIDE[block.moe.shortcut])
            found[index - pair : index] = [MergedSpec()] * pair
    return found


def joined(
    spec: JoinedSpec, blocks: Sequence[Block], topology: Topology, length: int
) -> ShortcutBlocks | DoubleGatedBlocks:
    """Makes what runs these blocks as one.

    Args:
        spec: Its specification.
        blocks: The blocks, which hold all parameters.
        topology: The process's place in the meshes.
        length: The number of tokens of a sample.
    """
    if isinstance(spec, ShortcutSpec):
        return ShortcutBlocks(spec, blocks, topology.options, length)
    return DoubleGatedBlocks(blocks)
