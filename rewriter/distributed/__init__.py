"""Several processes: the parts of a model, of a batch and of a text that each of them has."""

from __future__ import annotations

from rewriter.distributed.checkpoints import for_checkpoint
from rewriter.distributed.distribute import distribute
from rewriter.distributed.sharded_parameters import whole_parameters
from rewriter.distributed.stages import Device
from rewriter.distributed.stages import StagePlan
from rewriter.distributed.stages import plan_stages
from rewriter.distributed.stages import stage

__all__ = ["Device", "StagePlan", "distribute", "for_checkpoint", "plan_stages", "stage", "whole_parameters"]
