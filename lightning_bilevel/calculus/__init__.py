"""The inner step and its derivatives, and runs of inner steps.

Written against :mod:`~lightning_bilevel.problem`; knows no module, no Trainer and no strategy. Read
:mod:`~lightning_bilevel.calculus.inner_loop` first.
"""
