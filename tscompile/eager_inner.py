"""The inner compiler of `tilescale.inner = "eager"`: Inductor's graph passes, then the FX graph is run as it is.

No code generation, so a program compiles in seconds; the graphs are those that Inductor would lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

# The FX-graph cache stores generated code, and there is none.
NO_CACHE = {"fx_graph_cache": False, "fx_graph_remote_cache": False}


@contextmanager
def no_caches() -> Iterator[None]:
    """AOTAutograd's cache off, for the same reason."""
    import torch._functorch.config as functorch_config

    with functorch_config.patch(enable_autograd_cache=False):
        yield


def eager_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Run the post-grad passes on `gm` and return it as a boxed callable."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop, view_to_reshape
    from torch._inductor.virtualized import V

    view_to_reshape(gm)
    with torch.no_grad():
        fake_mode = fake_tensor_prop(gm, example_inputs)  # type: ignore[arg-type, unused-ignore]
    with V.set_fake_mode(fake_mode):
        _recursive_post_grad_passes(gm, is_inference=kwargs.get("is_inference", False))
    gm.recompile()
    return make_boxed_func(gm.forward)  # type: ignore[no-any-return, unused-ignore]
