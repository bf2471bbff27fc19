"""The MLP learns to read handwritten digits: sharded over tp, with the unsharded layer beside it.

T images   D pixels   V classes
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from layers.loss import cross_entropy, cross_entropy_backward
from layers.mlp import MLP
from layers.optimizer import SGD
from parallel.axis import Axis
from parallel.parameter import drawn

CLASSES, BATCH, EPOCHS, RATE, WARM_UP = 10, 32, 15, 0.05, 0.2


@dataclass(frozen=True)
class Digits:
    """x: (images, 64) scaled to 0..2; labels: (images,) integers."""

    x_train: np.ndarray
    labels_train: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray


def load(dtype: str) -> Digits:
    """The 1,797 images; a fifth of them, drawn once and for all, held out."""
    with gzip.open(files("training") / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    x, labels = (table[:, :-1] / 8).astype(dtype), table[:, -1].astype(np.int64)
    held_out = np.zeros(len(x), bool)
    held_out[np.random.default_rng(0).permutation(len(x))[: len(x) // 5]] = True
    return Digits(x[~held_out], labels[~held_out], x[held_out], labels[held_out])


@dataclass(frozen=True)
class Curve:
    """Of a training run: the mean loss of each epoch, and the accuracy on the held-out images.

    `terms`: of each epoch, what the tolerance of its loss is derived from: the length of a sum and the size of its terms.
    """

    loss: list[float]
    terms: list[tuple[int, float]]
    test_accuracy: float


def train(
    tp: Axis,
    data: Digits,
    d_ff: int,
    activation: str,
    bias: bool,
    dtype: str,
    seed: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Curve:
    """SGD with momentum on softmax cross-entropy, the rate warming up, then falling as a cosine to zero.

    Every rank sees every image. `progress`: wraps the iterable of epochs, to show how far it is.
    """
    mlp = MLP(tp, drawn(seed, dtype), data.x_train.shape[1], d_ff, activation, bias, d_out=CLASSES)
    optimizer = SGD(mlp.parameters, RATE)
    order = np.random.default_rng(seed)
    steps = EPOCHS * (len(data.x_train) // BATCH)
    step, size = 0, 0.0
    losses, terms = [], []
    for _ in progress(range(EPOCHS)):
        shuffled = order.permutation(len(data.x_train))
        total = []
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            batch = shuffled[start : start + BATCH]
            logits_TV, saved = mlp.forward(data.x_train[batch])
            loss, saved_loss = cross_entropy(logits_TV, data.labels_train[batch])
            optimizer.zero_grad()
            mlp.backward(cross_entropy_backward(saved_loss), saved)
            size = max(size, loss, *(float(np.abs(p.grad * p.data).sum()) for p in mlp.parameters))
            warm = min(1.0, (step + 1) / (WARM_UP * steps))
            optimizer.lr = RATE * warm * 0.5 * (1 + np.cos(np.pi * step / steps))
            optimizer.step()
            total.append(loss)
            step += 1
        losses.append(float(np.mean(total)))
        # Each step so far has rounded every weight, through sums of up to d_ff terms; a relative change of all weights
        # by one moves the loss by sum |grad * weight|, and steps that shrink the loss do not stretch what came before.
        terms.append((step * d_ff, size))
    logits_TV, _ = mlp.forward(data.x_test)
    accuracy = float((logits_TV.argmax(axis=1) == data.labels_test).mean())
    return Curve(losses, terms, accuracy)
