"""A fit: the module with its training step, its tie to a Trainer, and what lasts from step to step.

Knows every wing below it. Read :mod:`~lightning_bilevel.training.module` first: its training step is one hypergradient
estimate.
"""
