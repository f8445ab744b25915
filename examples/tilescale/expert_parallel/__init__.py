"""Expert parallelism: tokens go to the ranks that have their experts, and come back as sums. DeepEP's layout, dispatch, cached
dispatch and combine within a host, on `tscompile.language`.

    exchange = ExpertExchange(world, experts=256, topk=8, hidden=7168, dtype=torch.bfloat16, max_recv_tokens=4 * 4096)
    received = exchange.dispatch(x, topk_idx, topk_weights)
    y = exchange.combine_input(received.handle)
    ...                                             # experts read received.x, write y
    out, _ = exchange.combine(y, received.handle)
"""

from .exchange import ExpertExchange, Handle, Received
from .layout import ExchangeRefused, Layout

__all__ = ["ExchangeRefused", "ExpertExchange", "Handle", "Layout", "Received"]
