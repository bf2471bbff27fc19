"""The two-layer MLP, one hidden unit after another.

    y = b2 + sum over units j of  act(x . W1[:, j] + b1[j])  times  W2[j, :]

Units do not depend on one another, so that a parameter of unit j is moved by the complex step in unit j's term alone; that
makes every entry of every gradient affordable. A gated unit has two inner products: W1 is (D, 2, F), act(gate, up).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-30


def relu(z: np.ndarray) -> np.ndarray:
    return np.where(z.real > 0, z, 0 * z)


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return silu(gate) * up


# The function of a unit's inner products; bounds of its second derivatives, for the tolerance, given those products.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "relu": (relu, lambda z: [[0.0]]),
    "gelu": (gelu, lambda z: [[0.8]]),
    "silu": (silu, lambda z: [[0.5]]),
    "swiglu": (swiglu, lambda gate, up: [[0.5 * np.abs(up), 1.1], [1.1, 0.0]]),
}
# Roundings in the evaluation of an activation, as the length of a sum.
_ACTIVATION_STEPS = 12


def _parts(W1: np.ndarray, b1: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """W1 as (D, inputs, F) and b1 as (inputs, F) of float64, whether gated or not, biased or not."""
    W = W1.astype(np.float64).reshape(len(W1), -1, W1.shape[-1])
    return W, np.zeros(W.shape[1:]) if b1 is None else b1.astype(np.float64).reshape(W.shape[1:])


def grid(tokens: int, d_model: int, d_ff: int, d_out: int, budget: int = 2**22) -> dict[str, np.ndarray]:
    """Which entries to derive: all, while that takes at most `budget` evaluations of the activation for each gradient,
    else an even sample of each dim, first and last included."""
    keep = {"T": tokens, "D": d_model, "F": d_ff, "O": d_out}
    while max(tokens * keep["D"] * keep["F"], keep["T"] * keep["D"] * d_ff) > budget:
        most = max((k for k in keep if keep[k] > 2), key=lambda k: keep[k], default=None)
        if most is None:
            break
        keep[most] = (keep[most] + 1) // 2
    whole = {"T": tokens, "D": d_model, "F": d_ff, "O": d_out}
    return {k: np.linspace(0, whole[k] - 1, keep[k]).round().astype(int) for k in keep}


def forward(
    x: np.ndarray, W1: np.ndarray, b1: np.ndarray | None, W2: np.ndarray, b2: np.ndarray | None, activation: str
) -> np.ndarray:
    """y (T, O) in float64, or complex where an argument is. b1, b2: None for no bias."""
    act, _ = ACTIVATIONS[activation]
    y = np.zeros((len(x), W2.shape[1]), np.result_type(x, W1, W2, np.float64))
    if b2 is not None:
        y = y + b2
    gates = W1.reshape(len(W1), -1, W1.shape[-1])
    biases = np.zeros(gates.shape[1:]) if b1 is None else b1.reshape(gates.shape[1:])
    for j in range(W2.shape[0]):
        products = [x.astype(y.dtype) @ gates[:, i, j] + biases[i, j] for i in range(gates.shape[1])]
        y += np.multiply.outer(act(*products), W2[j])
    return y


def gradients(
    x: np.ndarray,
    W1: np.ndarray,
    b1: np.ndarray | None,
    W2: np.ndarray,
    b2: np.ndarray | None,
    activation: str,
    dy: np.ndarray,
    at: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Derivatives of the loss `sum(dy * y)` at the grid `at`, by name: x, W1, b1, W2, b2, each by complex step."""
    act, _ = ACTIVATIONS[activation]
    X, V, dY = (a.astype(np.float64) for a in (x, W2, dy))
    W, b = _parts(W1, b1)
    inputs = W.shape[1]
    T, D, F, O = (at[k] for k in "TDFO")  # noqa: E741
    dx = np.zeros((len(T), len(D)))
    dW1, db1, dW2 = np.zeros((len(D), inputs, len(F))), np.zeros((inputs, len(F))), np.zeros((len(F), len(O)))
    column = {int(j): n for n, j in enumerate(F)}
    for j in range(W2.shape[0]):
        z = [X @ W[:, i, j] + b[i, j] for i in range(inputs)]
        weight = dY @ V[j]  # the loss has this unit's term  sum_t act(z_t) * weight_t

        def term(moved: list[np.ndarray], weight: np.ndarray = weight) -> np.ndarray:
            return (act(*moved).T * weight).T.imag / STEP

        # x[t, d] moves the unit's products at token t by W1[d, :, j]
        dx += term([z[i][T, None] + 1j * STEP * W[D, i, j] for i in range(inputs)], weight[T])
        if j not in column:
            continue
        n = column[j]
        for i in range(inputs):
            others = [zi.astype(complex) for zi in z]
            # W1[d, i, j] moves product i at token t by x[t, d]; b1[i, j] moves it by 1
            moved = [np.broadcast_to(o[:, None], (len(X), len(D))) for o in others]
            moved[i] = others[i][:, None] + 1j * STEP * X[:, D]
            dW1[:, i, n] = term(moved).sum(axis=0)
            moved = [*others[:i], others[i] + 1j * STEP, *others[i + 1 :]]
            db1[i, n] = term(moved).sum()
        # W2[j, o] stands in the unit's term as it is
        dW2[n] = (dY[:, O] * act(*z)[:, None] * (V[j, O] + 1j * STEP)).sum(axis=0).imag / STEP
    shape = lambda *n: n if W1.ndim == 3 else n[:-2] + n[-1:]  # noqa: E731
    gradients = {"x": dx, "W1": dW1.reshape(shape(len(D), inputs, len(F))), "W2": dW2}
    if b1 is not None:
        gradients["b1"] = db1.reshape(shape(inputs, len(F)))
    if b2 is not None:
        gradients["b2"] = (dY[:, O] * (b2[O] + 1j * STEP)).sum(axis=0).imag / STEP
    return gradients


def sums(
    x: np.ndarray,
    W1: np.ndarray,
    b1: np.ndarray | None,
    W2: np.ndarray,
    b2: np.ndarray | None,
    activation: str,
    dy: np.ndarray,
    unit: float,
) -> dict[str, tuple[list[tuple[int, float]], float]]:
    """For `tolerance`: behind each tensor (y, x, W1, b1, W2, b2) the sums it is made of and what ReLU's jump may add.

    The magnitudes go through the same chain as the values do, absolute value by absolute value: a rounding of the inner
    products moves the result by the slope, and moves the slope by the curvature. `unit`: roundoff of the dtype compared.
    """
    act, curvature = ACTIVATIONS[activation]
    X, A2, dY = (np.abs(a.astype(np.float64)) for a in (x, W2, dy))
    W, b = _parts(W1, b1)
    T, D = X.shape
    F, n_out = A2.shape
    inputs = range(W.shape[1])
    A1 = np.abs(W)
    z = [x.astype(np.float64) @ W[:, i] + b[i] for i in inputs]
    Z = [X @ A1[:, i] + np.abs(b[i]) for i in inputs]
    H = np.abs(act(*z))
    slope = [np.abs(act(*(zk + 1j * STEP * (k == i) for k, zk in enumerate(z))).imag) / STEP for i in inputs]
    C = curvature(*z)
    S = dY @ A2.T
    dZ = [S * slope[i] for i in inputs]
    bent = [S * sum(C[i][k] * Z[k] for k in inputs) for i in inputs]
    moved = sum(slope[i] * Z[i] for i in inputs)
    near = np.abs(z[0]) <= 7 * np.sqrt(D) * unit * Z[0]
    jump = S * near if activation == "relu" else np.zeros_like(S)

    size = lambda a: float(np.max(a))  # noqa: E731
    bias = 0.0 if b2 is None else np.abs(b2)
    # Three ways for something at z to reach a result: a.T contracts tokens into W1, ones into b1, units into x. A result's
    # own sum adds magnitudes; roundings that come from entries before it are independent and add as squares do.
    ways = {
        "W1": lambda a, i, p: (X**p).T @ a**p,
        "b1": lambda a, i, p: (a**p).sum(axis=0),
        "x": lambda a, i, p: a**p @ (A1[:, i] ** p).T,
    }

    def reach(name: str, at_z: list[np.ndarray], p: int) -> float:
        each = [ways[name](at_z[i], i, p) for i in inputs]
        return size(sum(each) if name == "x" else np.max(each, axis=0)) ** (1 / p)

    terms = {"W1": T, "b1": T, "x": F * len(inputs)}
    sums = {
        name: (
            [
                (n, reach(name, dZ, 1)),
                (n_out, reach(name, dZ, 2)),
                (D, reach(name, bent, 2)),
                (_ACTIVATION_STEPS, reach(name, [d + S for d in dZ], 2)),
            ],
            reach(name, [jump for _ in inputs], 1),
        )
        for name, n in terms.items()
    }
    sums["y"] = (
        [
            (F, size(H @ A2 + bias)),
            (D, size(moved**2 @ A2**2) ** 0.5),
            (_ACTIVATION_STEPS, size(H**2 @ A2**2) ** 0.5),
        ],
        0.0,
    )
    sums["W2"] = (
        [
            (T, size(H.T @ dY)),
            (D, size((moved**2).T @ dY**2) ** 0.5),
            (_ACTIVATION_STEPS, size((H**2).T @ dY**2) ** 0.5),
        ],
        0.0,
    )
    sums["b2"] = [(T, size(dY.sum(axis=0)))], 0.0
    return sums
