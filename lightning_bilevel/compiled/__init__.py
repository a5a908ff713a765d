"""Compiled inner steps: flat graphs of a step and of its derivatives in the place of the step itself.

Read :mod:`~lightning_bilevel.compiled.step` first: what it computes; :mod:`~lightning_bilevel.compiled.losses`: what is
computed of the losses besides; then :mod:`~lightning_bilevel.compiled.watch`: when it still holds.
"""

from lightning_bilevel.compiled.compiler import Compiler
from lightning_bilevel.compiled.losses import CompiledLosses
from lightning_bilevel.compiled.step import CompiledStep

__all__ = ["CompiledLosses", "CompiledStep", "Compiler"]
