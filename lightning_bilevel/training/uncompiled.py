"""A module that was compiled as a whole runs as it is written; its parts may be compiled."""

from __future__ import annotations

from typing import Any

from lightning_bilevel.host import LightningModule, rank_zero_info, to_uncompiled

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def uncompiled(module: Any) -> Any:
    """Return the module itself, where it or what ``torch.compile`` made of it was given; say so.

    A Trainer compiles the steps of a module that came compiled: here these are hypergradient estimates and adaptations,
    which look at the module and take derivatives of derivatives. Compiling them would take minutes, and fail.

    >>> module = LightningModule()
    >>> uncompiled(module) is module
    True
    """
    original = getattr(module, "_orig_mod", module)
    if not isinstance(original, LightningModule) or (original is module and module._compiler_ctx is None):
        return module
    if original._compiler_ctx is not None:
        to_uncompiled(original)
        for name in _STEPS:  # which it leaves on the instance
            vars(original).pop(name, None)
    kind = type(original).__name__
    rank_zero_info(
        f"`torch.compile` of a whole `{kind}` is left out: its steps take derivatives of derivatives. Compile parts "
        "of it, `self.net = torch.compile(self.net)`, for strategies that differentiate the losses once."
    )
    return original
