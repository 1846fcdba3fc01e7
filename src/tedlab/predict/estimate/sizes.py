"""The sizes that formulas of memory and time are written in, of one rank and one micro-batch."""

from functools import cached_property

from tedlab.comm.keep import kept_tags
from tedlab.comm.recompute import Plan, Second
from tedlab.comm.rows import Rows
from tedlab.config import TrainConfig
from tedlab.models.gpt import TAGS
from tedlab.predict.volumes import ClosedForm


class Sizes:
    """Numbers of elements and bytes per element; ``docs/plan.md`` has the same letters.

    Attributes:
        form: of what is communicated, and of the parameters.
        accumulated: micro-batches of a step (a).
        tensor: degree (T).
        hidden, ffn, vocabulary: of the model (H, F, V); ``ffn_part`` and ``vocabulary_part`` are a tensor rank's.
        tokens: of a data rank's micro-batch (N).
        outside: tokens between layers: N, or N / T with sequence parallelism (n).
        slots: that the experts here compute (R); ``sent``: of these, what this rank exchanges (X). No capacity: rows,
            when experts are chosen equally often.
        parameter, compute, precise: bytes of a parameter and of the residual stream; of matrix products; of what is
            computed in fp32 or better (p, c, f).
        mixed: whether products are computed in another dtype than parameters have.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.form = config, ClosedForm(config)
        model, form = config.model, self.form
        assert model.vocab_size is not None
        self.accumulated = int(config.trainer["accumulate_grad_batches"])
        self.tensor = form.degrees.tensor
        self.hidden, self.ffn_part = model.hidden, model.ffn // self.tensor
        self.vocabulary_part = model.vocab_size // self.tensor
        self.tokens = form.tokens
        self.outside = form.tokens // self.tensor if form.layout.sequence else form.tokens
        rows = next((rows for n in self.kinds if (rows := form.rows(n)).sent), Rows())
        self.slots, self.sent = rows.computed, rows.sent
        self.parameter, self.compute = form.parameter.itemsize, form.compute.itemsize
        self.precise = form.precise.itemsize
        self.mixed = form.parameter != form.compute

    @cached_property
    def kinds(self) -> dict[int, list[int]]:
        """Blocks that are alike, by the first of them: with or without experts, and what CAC keeps of them."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for block in range(self.config.model.layers):
            kept = kept_tags(self.config.comm.cac, TAGS, block)
            key = (self.form.first[block], *sorted(kept.items()))
            alike.setdefault(key, []).append(block)
        return {blocks[0]: blocks for blocks in alike.values()}

    def second_pass(self, block: int) -> Plan:
        """What recomputation does at each collective of a block."""
        return self.form.second_pass(block, self.config.comm.cac)

    def product_is_dead(self, tag: str, second: Plan) -> bool:
        """Whether recomputation leaves out the matrix product that feeds a collective."""
        return self.config.comm.skip_dead_gemm and second.get(tag, Second.AGAIN) is not Second.AGAIN
