"""What users hand in: loaders of episodes, and checks of episodes and batches.

Knows the problem, no module and no strategy. Read :mod:`~lightning_bilevel.data.loaders` first.
"""
