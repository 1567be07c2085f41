"""`python -m rewriter`: the command `rewriter`, where scripts are not on the path."""

from rewriter.cli import app

if __name__ == "__main__":
    app(prog_name="rewriter")
