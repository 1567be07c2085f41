"""`compare`: one model under several policies on a text of the user's own, in one table: what a policy costs, and what it saves.

`budget.py` sets a policy's size, `recall.py` makes questions about notes in the text, `compare.py` measures."""

from rewriter.comparison.compare import Comparison
from rewriter.comparison.compare import Result
from rewriter.comparison.compare import compare

__all__ = ["Comparison", "Result", "compare"]
