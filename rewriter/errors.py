"""All exceptions that users meet; each message says what was given, what is expected and what to do."""

from __future__ import annotations


class Error(Exception):
    """Base of all of them."""


class AttentionInputError(Error, ValueError):
    """An input of live-range attention has the wrong shape, dtype or device."""


class CaptureError(Error, RuntimeError):
    """A model cannot be traced without changing what it does; the message says why and what to do."""


class PolicyError(Error, ValueError):
    """A policy cannot be applied to this model or these inputs; the message says what to do."""


class RewriteError(Error, RuntimeError):
    """A model cannot be rewritten as asked; the message says why and what to do."""


class CacheError(Error, ValueError):
    """A cache cannot take what it was given; it is as it was before."""


class ArtifactError(Error, RuntimeError):
    """An artifact cannot be loaded, or cannot take what it was given."""


class ExportError(Error, RuntimeError):
    """A model cannot be exported as asked; the message says why and what to do."""


class VerifyError(Error, ValueError):
    """A kernel or a device that `rewriter verify` was asked for is not there."""


class SpeedWarning(UserWarning):
    """A policy is predicted to make attention no faster at the lengths of a call; the message says by how much."""


class PolicyWarning(UserWarning):
    """A policy is not applied to all of a model's attention; the message says where, and how to make it an error."""
