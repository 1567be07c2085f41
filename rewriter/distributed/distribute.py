"""`distribute`: torch's tensor parallelism and FSDP2, and context parallelism over live ranges, by the dimensions of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

from rewriter.distributed.sharded_parameters import shard_parameters
from rewriter.errors import RewriteError
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.optimized_model import OptimizedModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("dp", "cp", "tp")
"""Names that the dimensions of a mesh may have: processes with other rows of a batch, other tokens of a text, other heads."""


def distribute(
    fast: OptimizedModel,
    mesh: DeviceMesh,
    *,
    tp_plan: Mapping[str, Any] | None = None,
    shard: bool | Literal["layers"] = True,
    gather_outputs: bool = True,
) -> OptimizedModel:
    """Spreads an optimized model over the processes of a mesh; losses and gradients are those of one process.

    - `"dp"`: each process has its own batch, and a loss that is the mean over it.
    - `"cp"`, context parallelism: each process is given the same whole texts, and computes a part of their tokens, in two
      pieces that it takes about the same time for. Of the keys of others it gets those that its own tokens still see, which
      for a window or separators are few. The loss is that of the whole text. Texts must be padded to a multiple of twice the
      processes of this dimension. The model must compute tokens one by one but for its attention and its loss; what does
      not is an error at the first call.
    - `"tp"`: `parallelize_module` spreads the weights of its plan.

    Args:
        fast: of `optimize`; changed in place, before its first call.
        mesh: with named dimensions, as `init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))` makes it.
        tp_plan: of torch.distributed.tensor.parallel.parallelize_module, for a mesh with "tp".
        shard: whether the weights are spread over "dp" and "cp" together, and gradients brought together. True: by `fully_shard`,
            as one unit, so that each process has whole weights while the model runs. `"layers"`: those of one layer at a time, in
            the forward and again in the backward, while others are in pieces (arXiv 2411.00284); parameters are DTensors, and
            `whole_parameters` is for generation. False: `DistributedDataParallel` is to be put around the result.
        gather_outputs: whether what the model returns for each token, as logits, is brought together in each process of "cp".
            False leaves each with its own: less to send and to hold, where the loss is all that is read. Which tokens these are
            is not said.

    Returns:
        `fast`.

    Raises:
        RewriteError: the mesh has other dimensions, a plan and "tp" do not come together, "tp" and "cp" do, or "tp" and layers.
    """
    names = tuple(mesh.mesh_dim_names or ())
    if not names or set(names) - set(DIMENSIONS):
        raise RewriteError(
            f"a mesh names its dimensions {', '.join(map(repr, DIMENSIONS))} or some of them, got {names or 'no names'}; "
            'for example init_device_mesh(device_type, (2, 4), mesh_dim_names=("dp", "cp"))'
        )
    if not isinstance(fast, OptimizedModel):
        raise RewriteError(f"distribute takes what rewriter.optimize returns, got {type(fast).__name__}")
    if ("tp" in names) != (tp_plan is not None):
        raise RewriteError("tensor parallelism needs both: a dimension 'tp' in the mesh, and tp_plan")
    if "tp" in names and "cp" in names:
        raise RewriteError(
            "context parallelism of a model whose weights are spread by tp_plan is not supported; leave 'tp' or 'cp' out"
        )
    if shard not in (True, False, "layers"):
        raise RewriteError(f"shard is True, False or 'layers', got {shard!r}")
    if "tp" in names and shard == "layers":
        raise RewriteError(
            "weights that are spread by tp_plan are not gathered layer by layer; leave 'tp' out, or take shard=True"
        )
    if tp_plan is not None:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(fast.model, mesh["tp"], dict(tp_plan))
    if "cp" in names:
        group = mesh.get_group("cp")
        fast.spread_context(ContextGroup(group.group_name, group.rank(), group.size(), bool(shard), gather_outputs))
    data = tuple(name for name in names if name != "tp")
    if shard and data:
        over = mesh[data]._flatten("_".join(data)) if len(data) > 1 else mesh[data]
        if shard == "layers":
            shard_parameters(fast, over)
        else:
            from torch.distributed.fsdp import fully_shard

            fully_shard(fast, mesh=over)
    return fast
