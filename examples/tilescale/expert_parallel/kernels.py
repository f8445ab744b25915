"""All kernels of the exchange, in the order in which they are launched."""

from .counting import layout, notify
from .moving import combine, dispatch
from .sizes import Sizes

KERNELS = (layout, notify, dispatch, combine)

__all__ = ["KERNELS", "Sizes", "combine", "dispatch", "layout", "notify"]
