"""From a graph to something that runs: eager at once, compiled when ready."""

from __future__ import annotations

from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.inductor import compile_inductor
from millrace.compile.tiered import TIERS, Runner

__all__ = ["TIERS", "Compiled", "Runner", "compile_eager", "compile_inductor"]
