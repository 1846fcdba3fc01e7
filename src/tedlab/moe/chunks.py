"""Lists a process's choices by chunk, so that the rows of one are exchanged while those of another are computed.

Each chunk has an equal part of every expert's rows (see :func:`tedlab.comm.rows.in_chunks`). So products are alike, and
whoever knows the numbers of all rows, knows those of each chunk: no further number is exchanged.
"""

import torch
from torch import Tensor

from tedlab.moe.router import Routing


def by_chunk(routing: Routing, counts_iE: Tensor, chunks: int) -> Routing:
    """Returns a routing to rows whose choices are sorted by chunk, and for each chunk by expert.

    If tensor ranks deal the list, so that row r goes to rank r mod T, each rank's part of it is sorted so.

    Args:
        routing: The routing, sorted by expert.
        counts_iE: (T, E) int64: the rows of each expert that each rank gets, as many in all; T is 1 if nobody deals.
        chunks: The number of chunks.
    """
    (sharers, experts), device, rows = counts_iE.shape, counts_iE.device, len(routing.choice_EC)
    dealt = -(-rows // sharers)
    each = torch.arange(experts, device=device).repeat(sharers)
    expert_iM = each.repeat_interleave(counts_iE.flatten(), output_size=sharers * dealt).view(sharers, dealt)
    start_iM, count_iM = ((counts_iE.cumsum(1) - counts_iE).gather(1, expert_iM), counts_iE.gather(1, expert_iM))
    number_iM = torch.arange(dealt, device=device) - start_iM  # of a row among those of its expert
    chunk_iM = ((number_iM + 1) * chunks - 1) // count_iM
    order_iM = chunk_iM.argsort(stable=True)
    row_R = (order_iM * sharers + torch.arange(sharers, device=device).unsqueeze(1)).t().flatten()
    return routing.reordered(row_R[:rows])  # the rows that pad the list are the last of the last chunk
