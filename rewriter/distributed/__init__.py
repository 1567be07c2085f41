"""Several processes: the parts of a model, of a batch and of a text that each of them has."""

from __future__ import annotations

from rewriter.distributed.checkpoints import for_checkpoint
from rewriter.distributed.distribute import distribute
from rewriter.distributed.sharded_parameters import whole_parameters

__all__ = ["distribute", "for_checkpoint", "whole_parameters"]
