"""What torch.distributed.checkpoint takes in the place of an optimized model."""

from __future__ import annotations

from torch import nn

from rewriter.optimized_model import OptimizedModel


def for_checkpoint(fast: OptimizedModel) -> nn.Module:
    """A module with the weights of an optimized model, under the names of its state dict, for torch.distributed.checkpoint.

        model_state, optimizer_state = get_state_dict(rewriter.for_checkpoint(fast), optimizer)

    torch looks parameters up by the names of a state dict, and an optimized model's are those of the model that it holds. The
    weights are the same tensors: what is loaded into this module is loaded into `fast`, with the policy's parameters.

    Args:
        fast: of `optimize`, on any layout of processes.

    Returns:
        A module that holds the model's parts. It is not to be called.
    """
    holder = nn.Module()
    holder._modules.update(fast.model._modules)
    holder._parameters.update(fast.model._parameters)
    holder._buffers.update(fast.model._buffers)
    holder._non_persistent_buffers_set = fast.model._non_persistent_buffers_set
    holder._modules["policy_parameters"] = fast.policy_parameters
    return holder
