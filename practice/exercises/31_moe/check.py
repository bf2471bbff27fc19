"""What is right in exercise 31 (choice by choice, gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

WEIGHTS = ("Wr_DN", "W1_NDF", "W2_NFD")
NAMES = ("x_TD", *WEIGHTS)


def logits(draw, T, N, k):
    """With ties: few different values; one row is far beyond what exp can take."""
    z_TN = draw.cast(draw.rng.integers(-3, 4, (T, N)) / 2)
    z_TN[-1:, 0] = 1e4
    z_TN[-1:, -1] = 1e4 + 0.5
    z_TN[-1:, 1:-1] *= -3000
    return {"z_TN": z_TN, "k": k}


def call_route(code, a, at):
    ids, gates = code.route(a["z_TN"], a["k"])
    return {"id": ids, "gate": gates}


def chosen(z_N, k):
    """By selection: the largest that is left, the lowest id first."""
    left = list(range(len(z_N)))
    found = []
    for _ in range(k):
        found.append(max(left, key=lambda n: (z_N[n].real, -n)))
        left.remove(found[-1])
    return found


def softmax(z):
    e = np.exp(z - max(z.real))
    return e / e.sum()


def want_route(a, ref, at):
    ids = [chosen(z_N, a["k"]) for z_N in a["z_TN"]]
    gates = [softmax(z_N[n]) for z_N, n in zip(a["z_TN"], ids, strict=True)]
    shape = (len(ids), a["k"])
    return {"id": np.array(ids, int).reshape(shape), "gate": np.array(gates, float).reshape(shape)}


def inputs(draw, T, D, F, N, k):
    """Logits that are all well apart, so that rounding chooses nobody; the last expert is nobody's choice."""
    while True:
        x_TD, Wr_DN = draw(T, D), draw(D, N, scale=1.5 / D**0.5)
        x_TD[:, 0] = np.abs(x_TD[:, 0]) + draw.cast(0.3)
        Wr_DN[:, -1] = 0
        Wr_DN[0, -1] = -8
        z_TN = np.sort(x_TD.astype(np.float64) @ Wr_DN, axis=1)
        if not T or np.diff(z_TN, axis=1).min() > 0.01:
            break
    a = {"x_TD": x_TD, "Wr_DN": Wr_DN, "W1_NDF": draw(N, D, F, scale=D**-0.5), "W2_NFD": draw(N, F, D, scale=0.7), "k": k}
    return a | {"dy_TD": draw(T, D)}


def forward(code, a, at):
    y_TD, _ = code.moe_forward(a["x_TD"], a["Wr_DN"], *(code.counted(a[n]) for n in WEIGHTS[1:]), a["k"])
    return {"y": y_TD}


def backward(code, a, at):
    x_TD = a["x_TD"].copy()
    _, saved = code.moe_forward(x_TD, *(a[n] for n in WEIGHTS), a["k"])
    found = code.moe_backward(a["dy_TD"], saved, a["Wr_DN"], *(code.counted(a[n]) for n in WEIGHTS[1:]))
    return dict(zip(("dx", "dWr", "dW1", "dW2"), found, strict=True))


def terms(x_D, W, k, routed=None):
    """Of one token: each choice's part of y. `routed`: the x that the router sees."""
    z_N = (x_D if routed is None else routed) @ W["Wr_DN"]
    ids = chosen(z_N, k)
    for n, gate in zip(ids, softmax(z_N[ids]), strict=True):
        a_F = x_D @ W["W1_NDF"][n]
        yield n, gate * ((a_F / (1 + np.exp(-a_F))) @ W["W2_NFD"][n])


def want_forward(a, ref, at):
    y = [sum(part for _, part in terms(x_D, a, a["k"])) for x_D in a["x_TD"]]
    return {"y": np.array(y).reshape(a["x_TD"].shape)}


def derived(a, ref, only=None):
    """Gradients by complex step; `only`: x moves on one of its two paths alone."""
    ids = [[n for n, _ in terms(x_D, a, a["k"])] for x_D in a["x_TD"]]

    def loss(moved, name, index):
        """x moves its own token, an expert's weight those that chose it."""
        total = 0.0
        for t, x_D in enumerate(moved["x_TD"]):
            if index[0] == t if name == "x_TD" else index[0] in ids[t] or name == "Wr_DN":
                routed = {"experts": a["x_TD"][t], "router": x_D}.get(only)
                own = a["x_TD"][t] if only == "router" else x_D
                total += sum((a["dy_TD"][t] * part).sum() for _, part in terms(own, moved, a["k"], routed))
        return total + 0j

    names = NAMES if only is None else NAMES[:1]
    arrays = {n: a[n] for n in NAMES}
    return {n: ref.gradient.at_entries(loss, arrays, n) for n in names}


def want_backward(a, ref, at):
    return {f"d{n.partition('_')[0]}": g for n, g in derived(a, ref).items()}


def choices(a, ref, at):
    by_token = [[part for _, part in terms(x_D, a, a["k"])] for x_D in a["x_TD"]]
    parts = np.array(by_token).reshape(len(by_token), a["k"], a["x_TD"].shape[1])
    return {"y": {f"choice {j}": parts[:, j] for j in range(a["k"])}}


def paths(a, ref, at):
    return {"dx": {f"through the {n}": derived(a, ref, n)["x_TD"] for n in ("experts", "router")}}


def own_rows(times):
    def limits(a, at):
        T, D = a["x_TD"].shape
        return {"multiplications": times * 2 * T * a["k"] * D * a["W1_NDF"].shape[2]}

    return limits


def random_size(rng):
    T, D, F = rng.choice([2, 3, 4, 5, 7], 3, replace=False).tolist()
    return T, D, F, int(rng.choice([5, 6, 8])), int(rng.choice([1, 2, 3]))


SIZES = ((5, 3, 4, 6, 2), (4, 2, 3, 7, 3), (3, 4, 5, 6, 1), (0, 3, 2, 5, 2))
PARTS = (
    Part("route", ((5, 6, 2), (4, 7, 3), (3, 40, 5), (0, 5, 2), (2, 4, 4)), logits, call_route, want_route,
         random_size=lambda rng: (int(rng.integers(2, 8)), int(rng.choice([5, 9, 33])), int(rng.integers(1, 5)))),
    Part("moe_forward", SIZES, inputs, forward, want_forward, choices, own_rows(1), random_size=random_size,
         influence=(("x_TD", "y"),)),
    Part("moe_backward", SIZES, inputs, backward, want_backward, paths, own_rows(2), random_size=random_size),
)  # fmt: skip

TOP = 'np.argsort(-z_TN, axis=1, kind="stable")[:, :k]'
E, ADD = "np.exp(top_TK - top_TK[:, :1])", "y_TD[token] += gate_TK[token, slot, None] * o"
SLOPE = "(s + a * s * (1 - s))"
DZ = "gate_TK * (dgate_TK - (gate_TK * dgate_TK).sum(axis=1, keepdims=True))"
ROUTER = "    dx_TD += dz_TN @ Wr_DN.T\n"
MISTAKES = (
    mistake("smallest", "The smallest logits choose: argsort is ascending.", (TOP, 'np.argsort(z_TN, axis=1, kind="stable")[:, :k]')),
    mistake("ascending", "The k largest are right, but the smallest of them comes first: the largest logit's expert is the first.",
            ("    top_TK = np.take", "    id_TK = id_TK[:, ::-1]\n    top_TK = np.take"),
            ("top_TK - top_TK[:, :1]", "top_TK - top_TK[:, -1:]")),
    mistake("by_number", "The chosen experts stand in order of their numbers: the largest logit's comes first.",
            ("    top_TK = np.take", "    id_TK = np.sort(id_TK, axis=1)\n    top_TK = np.take"),
            (E, "np.exp(top_TK - top_TK.max(axis=1, keepdims=True))")),
    mistake("ties_turned", "Of equal logits the higher expert comes first: an ascending sort that is turned round turns ties too. Sort -z, stably.",
            (TOP, 'np.argsort(z_TN, axis=1, kind="stable")[:, ::-1][:, :k]')),
    mistake("ties_by_chance", "Of equal logits whichever the sort leaves first is taken: NumPy's default sort is not stable. Ask for"
            ' kind="stable".', (TOP, "np.argsort(-z_TN, axis=1)[:, :k]")),
    mistake("over_all", "The gates are the softmax over all experts and do not add to 1: it is over the k chosen logits alone.",
            ("gate_TK = e_TK / e_TK.sum(axis=1, keepdims=True)",
             "gate_TK = e_TK / np.exp(z_TN - z_TN.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)")),
    mistake("no_gate", "The experts' outputs are added without their gates.", (ADD, "y_TD[token] += o")),
    mistake("capacity", "An expert takes no more than its even share of T k / N tokens, and drops the rest: no token is dropped here.",
            ("token, slot = np.nonzero(id_TK == n)\n        a",
             "token, slot = (x[: -(-id_TK.size // len(W1_NDF))] for x in np.nonzero(id_TK == n))\n        a")),
    mistake("capacity_above", "An expert takes only so many tokens, a little above its even share of T k / N, and drops the rest: no token is"
            " dropped here.", ("token, slot = np.nonzero(id_TK == n)\n        a",
            "token, slot = (x[: -(-5 * id_TK.size // (4 * len(W1_NDF)))] for x in np.nonzero(id_TK == n))\n        a")),
    mistake("last_expert", "Of a token's experts only the one with the highest number is left: add them. (An index that occurs twice in"
            " `y[token] += ...` is added once.)", (ADD, "y_TD[token] = gate_TK[token, slot, None] * o")),
    mistake("first_choice", "Only each token's first choice is in y, with its gate: add all k.",
            (ADD, "y_TD[token] += gate_TK[token, slot, None] * o * (slot == 0)[:, None]")),
    mistake("last_choice", "Only each token's last choice is in y: each choice replaces the one before it instead of being added.",
            (ADD, "y_TD[token] += gate_TK[token, slot, None] * o * (slot == k - 1)[:, None]")),
    mistake("first_gate", "Every choice is weighted with the token's first gate: each has its own.",
            ("gate_TK[token, slot, None] * o", "gate_TK[token, 0, None] * o")),
    mistake("unsorted_gates", "The gates stand in order of the tokens, the rows in order of the experts: permute both together.",
            ("    kept = []\n", "    kept, at = [], 0\n"),
            (ADD, "y_TD[token] += gate_TK.ravel()[at : at + len(token), None] * o\n        at += len(token)")),
    mistake("gate_in_front", "The gate multiplies the expert's input: behind a function that is not linear it is something else. It weights the output.",
            ("a = x_TD[token] @ W1_NDF[n]", "a = gate_TK[token, slot, None] * x_TD[token] @ W1_NDF[n]"), (ADD, "y_TD[token] += o")),
    mistake("relu", "The experts use ReLU: a sigmoid(a) is asked for.", ("s = 1 / (1 + np.exp(-a))", "s = (a > 0).astype(a.dtype)")),
    mistake("no_activation", "Nothing stands between the experts' two products: h = a sigmoid(a).", ("(a * s) @ W2_NFD[n]", "a @ W2_NFD[n]")),
    mistake("dense", "This is right, but every expert multiplies all tokens: then k of N saves nothing. Take the rows that chose it.",
            ("a = x_TD[token] @ W1_NDF[n]", "a = (x_TD @ W1_NDF[n])[token]")),
    mistake("no_router", "The router's path is missing in dx: x also moves the gates.", (ROUTER, "")),
    mistake("router_not_taught", "dWr is 0: the gates depend on the logits, and these on Wr.", ("dWr_DN = x_TD.T @ dz_TN", "dWr_DN = 0 * Wr_DN"),
            (ROUTER, "")),
    mistake("no_jacobian", "The gates' gradient is passed on as the logits': the softmax's backward is missing.", (DZ, "dgate_TK")),
    mistake("no_row_term", "The softmax's backward lacks its row term: dz = gate (dgate - sum gate dgate).", (DZ, "gate_TK * dgate_TK")),
    mistake("gate_squared", "The softmax's backward has only its diagonal, gate (1 - gate): the chosen logits move each other's gates.",
            (DZ, "gate_TK * (1 - gate_TK) * dgate_TK")),
    mistake("hidden_not_gated", "The gradient that goes into an expert's hidden values lacks the token's gate: dW2 has it, dW1 and dx have not.",
            ("dh = do @ W2_NFD[n].T", "dh = dy @ W2_NFD[n].T")),
    mistake("gated_dgate", "The gate's gradient is made of the gated output: it is sum dy f(x), without the gate.",
            ("(dy * o).sum(axis=1)", "(dy * o).sum(axis=1) * gate_TK[token, slot]"), (DZ, DZ)),
    mistake("first_columns", "The gradients of the chosen logits stand in the first k columns: each belongs in its expert's.",
            ("np.put_along_axis(dz_TN, id_TK, dz_TK, axis=1)", "dz_TN[:, : id_TK.shape[1]] = dz_TK")),
    mistake("no_gate_back", "The gate is missing on the way back into the experts: what comes to an output is gate dy.",
            ("do = gate_TK[token, slot, None] * dy", "do = dy")),
    mistake("dW2_no_gate", "dW2 lacks the gate: what came out of W2 was multiplied with it.", ("(a * s).T @ do", "(a * s).T @ dy")),
    mistake("dx_replaced", "dx has only the expert with the highest number of each token (and the router): add what comes from all k.",
            ("dx_TD[token] += da @ W1_NDF[n].T", "dx_TD[token] = da @ W1_NDF[n].T")),
    mistake("no_slope", "The derivative of a sigmoid(a) is missing.", (SLOPE, "1")),
    mistake("sigmoid_slope", "The derivative of a sigmoid(a) lacks its second term: s + a s (1 - s).", (SLOPE, "s")),
    mistake("slope_of_sigmoid", "The derivative is that of the sigmoid: a sigmoid(a) has s + a s (1 - s).", (SLOPE, "(s * (1 - s))")),
    mistake("last_token", "dW1 and dW2 have only one token of each expert, the last: add them up.",
            ("(a * s).T @ do", "(a * s)[-1:].T @ do[-1:]"), ("x_TD[token].T @ da", "x_TD[token][-1:].T @ da[-1:]")),
    mistake("mean", "The weights' gradients are means over tokens: they are sums.",
            ("dW2_NFD[n] = (a * s).T @ do", "dW2_NFD[n] = (a * s).T @ do / max(1, len(x_TD))"),
            ("dW1_NDF[n] = x_TD[token].T @ da", "dW1_NDF[n] = x_TD[token].T @ da / max(1, len(x_TD))"),
            ("dWr_DN = x_TD.T @ dz_TN", "dWr_DN = x_TD.T @ dz_TN / max(1, len(x_TD))")),
    mistake("kept_global", "saved is shared by all calls: the next layer's forward has overwritten this one's. Return what backward needs.",
            ("    kept = []\n", "    kept = globals().setdefault('_kept', [])\n    kept.clear()\n")),
)  # fmt: skip
