"""The problems of ``peers/against_jax.py`` as one writes them in JAX: jit, vmap, scan, grad, jvp, optax; one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

Step = Callable[[], Any]
"""Takes an outer step and returns the hypergradient by name."""


def modules() -> tuple[Any, Any, Any, Any]:
    """Return ``jax``, ``jax.numpy``, ``jax.lax`` and ``optax``; raise ``ImportError`` where one is missing."""
    jax, optax = import_module("jax"), import_module("optax")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax, import_module("jax.numpy"), import_module("jax.lax"), optax


def of(tensor: torch.Tensor) -> Any:
    """Return a tensor as JAX's array."""
    return modules()[1].asarray(tensor.detach().numpy())


def back(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return JAX's arrays as tensors."""
    return {name: torch.tensor(modules()[0].device_get(value)) for name, value in values.items()}


def linear(p: Any, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def cross_entropies(scores: Any, y: Any) -> Any:
    jax, jnp, *_ = modules()
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], 1)[:, 0]


def sinusoid_loss(p: Any, x: Any, y: Any) -> Any:
    jax, jnp, *_ = modules()
    x = jax.nn.relu(linear(p, "net.body.2", jax.nn.relu(linear(p, "net.body.0", x))))
    return jnp.mean((linear(p, "net.head", x) - y) ** 2)


def image_loss(p: Any, x: Any, y: Any) -> Any:
    jax, _, lax, _ = modules()
    x = x.transpose(0, 2, 3, 1)
    for block in range(4):
        kernel, norm = f"net.body.{3 * block}", f"net.body.{3 * block + 1}"
        sides = ((1, 1), (1, 1))
        x = lax.conv_general_dilated(
            x, p[f"{kernel}.weight"], (2, 2), sides, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = x + p[f"{kernel}.bias"]
        x = (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2)) + 1e-5)
        x = jax.nn.relu(x * p[f"{norm}.weight"] + p[f"{norm}.bias"])
    return cross_entropies(linear(p, "net.head", x.mean((1, 2))), y).mean()


def meta_step(loss: Callable[..., Any], p: Any, batch: Sequence[Any], steps: int, lr: float, tasks: str) -> Step:
    """Return a step of MAML and Adam.

    Args:
        loss: of parameters, inputs and targets.
        p: the start that is learned.
        batch: support and query of all tasks, stacked.
        steps: inner ones.
        lr: their rate.
        tasks: ``"vmap"``, or ``"written out"`` one after the other.
    """
    jax, _, _, optax = modules()

    def after(p: Any, x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        for _ in range(steps):
            p = jax.tree.map(lambda a, g: a - lr * g, p, jax.grad(loss)(p, x, y))
        return loss(p, x_query, y_query)

    def outer(p: Any, *batch: Any) -> Any:
        if tasks == "vmap":
            return jax.vmap(after, (None, 0, 0, 0, 0))(p, *batch).mean()
        return sum(after(p, *(each[i] for each in batch)) for i in range(len(batch[0]))) / len(batch[0])

    adam = optax.adam(1e-3)

    def step(p: Any, state: Any, *batch: Any) -> Any:
        grads = jax.grad(outer)(p, *batch)
        updates, state = adam.update(grads, state, p)
        return optax.apply_updates(p, updates), state, grads

    run, state = jax.jit(step), adam.init(p)
    return lambda: jax.block_until_ready(run(p, state, *batch))[2]


def cleaning_step(p: Any, data: Sequence[Any], steps: int, lr: float, decay: float, rows: Any = None) -> Step:
    """Return a step of data cleaning along the hypergradient, or along its forward gradient in directions ``rows``."""
    jax, jnp, lax, _ = modules()
    p = dict(p)
    logits = p.pop("example_logits")

    def scores(p: Any, x: Any) -> Any:
        return linear(p, "net.2", jnp.tanh(linear(p, "net.0", x)))

    def outer(logits: Any, p: Any, x: Any, y: Any, x_outer: Any, y_outer: Any) -> Any:
        def inner(p: Any) -> Any:
            penalty = decay / 2 * sum((value**2).sum() for value in p.values())
            return (jax.nn.sigmoid(logits) * cross_entropies(scores(p, x), y)).mean() + penalty

        p, _ = lax.scan(
            lambda p, _: (jax.tree.map(lambda a, g: a - lr * g, p, jax.grad(inner)(p)), None), p, None, steps
        )
        return cross_entropies(scores(p, x_outer), y_outer).mean()

    def estimate(logits: Any, *others: Any) -> Any:
        if rows is None:
            return jax.grad(outer)(logits, *others)
        slopes = jax.vmap(lambda row: jax.jvp(lambda x: outer(x, *others), (logits,), (row,))[1])(rows)
        return slopes @ rows / len(rows)

    def step(logits: Any, *others: Any) -> Any:
        grads = estimate(logits, *others)
        return logits - grads, grads

    run = jax.jit(step)
    return lambda: {"example_logits": jax.block_until_ready(run(logits, p, *data))[1]}


def implicit_step(p: Any, data: Sequence[Any], lr: float, terms: int) -> Step:
    """Return an inner step on penalties of a logistic regression, and one of Adam along the implicit gradient there.

    Args:
        p: ``weight`` and ``log_penalty``.
        data: x and signs of the inner batch, then of the outer one.
        lr: inner rate, and α of the Neumann series.
        terms: of the series.
    """
    jax, jnp, _, optax = modules()
    adam = optax.adam(1e-3)
    theta, phi = p["weight"], p["log_penalty"]

    def outer(theta: Any, x: Any, sign: Any) -> Any:
        return jax.nn.softplus(-sign * (x @ theta)).mean()

    def step(theta: Any, phi: Any, state: Any, x: Any, sign: Any, x_outer: Any, sign_outer: Any) -> Any:
        def slope(theta: Any, phi: Any) -> Any:
            return jax.grad(lambda w: outer(w, x, sign) + (jnp.exp(phi) * w**2).sum() / 2)(theta)

        theta = theta - lr * slope(theta, phi)
        term = total = jax.grad(outer)(theta, x_outer, sign_outer)
        for _ in range(terms - 1):
            term = term - lr * jax.jvp(lambda theta: slope(theta, phi), (theta,), (term,))[1]
            total = total + term
        _, pull = jax.vjp(lambda phi: slope(theta, phi), phi)
        grads = -pull(lr * total)[0]
        updates, state = adam.update(grads, state, phi)
        return theta, optax.apply_updates(phi, updates), state, grads

    run, state = jax.jit(step), adam.init(phi)
    return lambda: {"log_penalty": jax.block_until_ready(run(theta, phi, state, *data))[3]}
