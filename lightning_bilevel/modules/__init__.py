"""From a LightningModule to a :class:`~lightning_bilevel.problem.BilevelProblem`.

Knows the problem and its calculus, no strategy and no Trainer. Read :mod:`~lightning_bilevel.modules.hooks` first, what
a user overrides, then :mod:`~lightning_bilevel.modules.functional`, which makes pure functions of it.
"""
