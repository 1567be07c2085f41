"""The report: what became of each attention of a model, and why."""

from __future__ import annotations

from rewriter.report.data import Subject
from rewriter.report.report import Report

__all__ = ["Report", "Subject"]
