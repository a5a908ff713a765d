"""Differentiable inner optimizers: ``torch.optim``'s values, out of place, differentiable in every argument."""
