"""What is right in exercise 41 (choice by choice on whole arrays, gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

LEFT_OUT = "messages left out"

# --- arrays from everyone to everyone


def parcels(draw, rows, width, ranks):
    """How many rows each rank has for each other: none here and there, nothing at all for rank 0 from the last.

    The numbers are larger than float32 can hold.
    """
    count_rr = draw.ids(rows + 1, ranks, ranks)
    count_rr[-1, 0] = 0
    count_rr[0, 1] += 1
    return {"count_rr": count_rr.tolist(), "x_ND": draw.ids(10**9, int(count_rr.sum()), width)}


def parcel(a, source, to):
    """What rank `source` has for rank `to`: all rows stand in order of sources, then of receivers."""
    before = sum(map(sum, a["count_rr"][:source])) + sum(a["count_rr"][source][:to])
    return a["x_ND"][before : before + a["count_rr"][source][to]]


def call_exchange(code, a, ep):
    came = code.exchange([parcel(a, ep.rank, to) for to in range(ep.size)], ep)
    return {f"from rank {source}": x for source, x in enumerate(came)}


def want_exchange(a, ref, ep):
    return {f"from rank {source}": parcel(a, source, ep.rank) for source in range(ep.size)}


def limits_exchange(a, ep):
    rows = sum(n for to, n in enumerate(a["count_rr"][ep.rank]) if to != ep.rank)
    return {"messages": ep.size - 1, "numbers sent": rows * a["x_ND"].shape[1]}


# --- experts


def inputs(draw, T, D, F, N, k):
    """Tokens in uneven parts, and if they are few none on rank 1; the last expert is nobody's choice where there are enough others."""
    second = 2 + int(draw.ids(T - 4)) if T > 5 else int(draw.ids(T + 1))
    third = second + 1 + int(draw.ids(T - second - 1)) if T > 5 else second
    most = N - 1 if k < N else N
    ids = [draw.rng.permutation(most)[:k] for _ in range(T)]
    a = {"edges": [0, second, third, T], "x_TD": draw(T, D), "id_Tk": np.array(ids, int).reshape(T, k)}
    a |= {"gate_Tk": draw(T, k), "W1_NDF": draw(N, D, F, scale=D**-0.5), "W2_NFD": draw(N, F, D, scale=0.7)}
    return a | {"dy_TD": draw(T, D)}


def own(a, ep):
    """This rank's tokens, and its experts."""
    return slice(*a["edges"][ep.rank : ep.rank + 2]), ep.cut(len(a["W1_NDF"]))


def given(code, a, ep):
    tokens, experts = own(a, ep)
    arrays = [a[name][tokens] for name in ("x_TD", "id_Tk", "gate_Tk")]
    return arrays, [code.counted(a[name][experts]) for name in ("W1_NDF", "W2_NFD")]


def left_out(ep, begun):
    """By how many messages one rank was sent fewer than another since `begun`: in each exchange every rank is sent one."""
    sent = [sum(to == rank for to, _ in ep.talk[begun:]) for rank in range(ep.size) if rank != ep.rank]
    return max(sent) - min(sent)


def forward(code, a, ep):
    arrays, weights = given(code, a, ep)
    begun = len(ep.talk)
    y_tD, _ = code.moe_forward(*arrays, *weights, len(a["W1_NDF"]), ep)
    code.counts[LEFT_OUT] = left_out(ep, begun)
    return {"y": y_tD}


def backward(code, a, ep):
    (x_tD, id_tk, gate_tk), weights = given(code, a, ep)
    N = len(a["W1_NDF"])
    _, saved = code.moe_forward(x_tD, id_tk, gate_tk, *weights, N, ep)
    begun = len(ep.talk)
    found = code.moe_backward(a["dy_TD"][own(a, ep)[0]], saved, *weights, ep)
    code.counts[LEFT_OUT] = left_out(ep, begun)
    return dict(zip(("dx", "dgate", "dW1", "dW2"), found, strict=True))


def expert(x_D, W1_DF, W2_FD):
    a_F = x_D @ W1_DF
    return (a_F / (1 + np.exp(-a_F))) @ W2_FD


def parts(a, ep):
    """By choice: (k, t, D), whose sum over the first dim is this rank's y."""
    tokens, _ = own(a, ep)
    found = np.zeros((a["id_Tk"].shape[1], *a["x_TD"][tokens].shape))
    for t, (x_D, ids, gates) in enumerate(zip(a["x_TD"][tokens], a["id_Tk"][tokens], a["gate_Tk"][tokens], strict=True)):
        for slot, (n, gate) in enumerate(zip(ids, gates, strict=True)):
            found[slot, t] = gate * expert(x_D, a["W1_NDF"][n], a["W2_NFD"][n])
    return found


def want_forward(a, ref, ep):
    return {"y": parts(a, ep).sum(axis=0)}


def choices(a, ref, ep):
    return {"y": {f"choice {slot}": y for slot, y in enumerate(parts(a, ep))}}


def slope(ref, f, x):
    """The gradient of f at the array x."""
    return ref.gradient.at_entries(lambda moved, *_: f(moved["x"]), {"x": x}, "x")


def of_tokens(a, ref, ep):
    """By choice: dx (k, t, D), and dgate (t, k)."""
    tokens, _ = own(a, ep)
    t, D = a["x_TD"][tokens].shape
    k = a["id_Tk"].shape[1]
    dx, dgate = np.zeros((k, t, D)), np.zeros((t, k))
    for i, (x_D, ids, gates, dy_D) in enumerate(
        zip(*(a[n][tokens] for n in ("x_TD", "id_Tk", "gate_Tk", "dy_TD")), strict=True)
    ):
        for slot, n in enumerate(ids):
            W = a["W1_NDF"][n], a["W2_NFD"][n]
            dx[slot, i] = gates[slot] * slope(ref, lambda x, dy_D=dy_D, W=W: dy_D @ expert(x, *W), x_D)
            dgate[i, slot] = dy_D @ expert(x_D, *W)
    return dx, dgate


def of_weights(a, ref, ep, source):
    """dW1 and dW2 of this rank's experts, of the tokens of rank `source` alone."""
    _, experts = own(a, ep)
    tokens, _ = own(a, source)
    W1_nDF, W2_nFD = a["W1_NDF"][experts], a["W2_NFD"][experts]
    dW1, dW2 = np.zeros(W1_nDF.shape), np.zeros(W2_nFD.shape)
    for x_D, ids, gates, dy_D in zip(*(a[n][tokens] for n in ("x_TD", "id_Tk", "gate_Tk", "dy_TD")), strict=True):
        for n, gate in zip(ids, gates, strict=True):
            own_n = n - experts.start
            if 0 <= own_n < len(W1_nDF):
                W1, W2 = W1_nDF[own_n], W2_nFD[own_n]
                dW1[own_n] += gate * slope(ref, lambda W, x=x_D, dy=dy_D, W2=W2: dy @ expert(x, W, W2), W1)
                dW2[own_n] += gate * slope(ref, lambda W, x=x_D, dy=dy_D, W1=W1: dy @ expert(x, W1, W), W2)
    return dW1, dW2


def want_backward(a, ref, ep):
    dx, dgate = of_tokens(a, ref, ep)
    dW1, dW2 = (sum(some) for some in zip(*(of_weights(a, ref, ep, source) for source in ep.others()), strict=True))
    return {"dx": dx.sum(axis=0), "dgate": dgate, "dW1": dW1, "dW2": dW2}


def sources(a, ref, ep):
    found = {"dx": {f"choice {slot}": dx for slot, dx in enumerate(of_tokens(a, ref, ep)[0])}}
    by_rank = [of_weights(a, ref, ep, source) for source in ep.others()]
    return found | {
        name: {f"tokens of rank {r}": dW[n] for r, dW in enumerate(by_rank)} for n, name in enumerate(("dW1", "dW2"))
    }


def costs(times):
    """Rows that leave this rank, rows that come to it from others and go back; the numbers of rows, or the rows' experts, forward only."""

    def limits(a, ep):
        N, D, F = a["W1_NDF"].shape
        tokens, experts = own(a, ep)
        mine = np.isin(a["id_Tk"], np.arange(N)[experts])
        leave, stay = int((~mine[tokens]).sum()), int(mine[tokens].sum())
        return_ = int(mine.sum()) - stay
        about = max(N, leave) if times == 1 else 0
        return {"messages": (4 - times) * (ep.size - 1), "numbers sent": (leave + return_) * D + about,
                LEFT_OUT: 0, "multiplications": times * 2 * int(mine.sum()) * D * F}  # fmt: skip

    return limits


def random_size(rng):
    T, D, F = rng.choice([2, 3, 4, 5, 7], 3, replace=False).tolist()
    return T + 2, D, F, int(rng.choice([4, 5, 7])), int(rng.choice([1, 2, 3]))


SIZES = ((7, 3, 4, 7, 2), (4, 3, 2, 2, 2), (0, 3, 2, 5, 2))
PARTS = (
    Part("exchange", ((3, 2, 3), (1, 4, 3)), parcels, call_exchange, want_exchange, limits=limits_exchange, dtypes=("float64",),
         random_size=lambda rng: (int(rng.integers(1, 6)), int(rng.integers(1, 5)), 3)),
    Part("moe_forward", SIZES, inputs, forward, want_forward, choices, costs(1), random_size=random_size),
    Part("moe_backward", SIZES[:2], inputs, backward, want_backward, sources, costs(2), random_size=random_size),
)  # fmt: skip

SWAP = "came[source] = ep.sendrecv(to, parts[to], source)"
ORDER = 'order = np.argsort(id_tk.ravel(), kind="stable")'
MINE = "[count_N[ep.cut(N, rank)] for rank in range(ep.size)]"
EXPERT = "np.concatenate([np.repeat(np.arange(len(W1_nDF)), count_n) for count_n in back])"
ADD, ADD_BACK = "np.add.at(y_tD, token, gate_c1 * o_cD)", "np.add.at(dx_tD, token, dx_cD)"
SLOPE = "(s + a * s * (1 - s))"
LOOP = "    for n, (rows, a, s) in enumerate(kept):\n"
SAVED = "(token, order, gate_tk, gate_c1, sent, came, x_gD, o_cD, kept)"
KNOWN = """def exchange_rows(parts, counts, ep):
    came = [parts[0][:0]] * ep.size
    came[ep.rank] = parts[ep.rank]
    for step in range(1, ep.size):
        to, source = (ep.rank + step) % ep.size, (ep.rank - step) % ep.size
        if len(parts[to]) and counts[source]:
            came[source] = ep.sendrecv(to, parts[to], source)
        elif len(parts[to]):
            ep.send(to, parts[to])
        elif counts[source]:
            came[source] = ep.recv(source)
    return came


def moe_forward("""
MISTAKES = (
    mistake("all_send", "All ranks send before any receives: nobody takes what is sent.",
            ("        to, source = (r + step) % p, (r - step) % p\n", "        ep.send((r + step) % p, parts[(r + step) % p])\n    for step in range(1, p):\n        source = (r - step) % p\n"),
            (SWAP, "came[source] = ep.recv(source)")),
    mistake("partners", "Each rank receives from the one it sends to: that one sends to somebody else at this step. The rank that sends to you is r - step.",
            ("(r - step) % p", "(r + step) % p")),
    mistake("as_it_comes", "What comes stands in the order in which it came: the r-th of the list is rank r's.",
            ("came = [None] * p\n    came[r] = parts[r]", "came = [parts[r]]"), (SWAP, "came.append(ep.sendrecv(to, parts[to], source))")),
    mistake("own_lost", "What a rank has for itself is lost: it needs no message, but it belongs in the list.", ("came[r] = parts[r]", "came[r] = parts[r][:0]")),
    mistake("own_everywhere", "Every rank gets what is meant for the sender itself.", ("parts[to], source)", "parts[r], source)")),
    mistake("nothing_not_sent", "A rank that has nothing for another leaves the exchange out: the other waits. It sends no rows, but it sends.",
            (SWAP, "if len(parts[to]):\n            " + SWAP + "\n        else:\n            came[source] = ep.recv(source)")),
    mistake("to_everyone", "This is right, but every rank gets all parts: one part is meant for it.",
            (SWAP, "came[source] = [ep.sendrecv(to, x, source) for x in parts][r]")),
    mistake("even_owners", "Experts are dealt out as if every rank had N // p: ep.cut(N, rank) says who has which.",
            (MINE, "[count_N[rank * (N // ep.size) : (rank + 1) * (N // ep.size) if rank + 1 < ep.size else N] for rank in range(ep.size)]")),
    mistake("in_token_order", "Rows stand in order of tokens, and are cut and counted as if in order of experts: sort the choices by expert.",
            (ORDER, "order = np.arange(id_tk.size)")),
    mistake("own_counts", "What came is dealt out by how many rows this rank sent: the sender's counts say which rows are for which expert.",
            (EXPERT, "np.resize(np.repeat(np.arange(len(W1_nDF)), out[ep.rank]), len(x_gD))")),
    mistake("as_one_sender", "What came is taken as sorted by expert from end to end: it is sorted within what each rank sent.",
            (EXPERT, "np.sort(" + EXPERT + ")")),
    mistake("first_expert", "All rows that came go through this rank's first expert.", ("rows = np.flatnonzero(expert_g == n)", "rows = np.flatnonzero((expert_g >= 0) & (n == 0))")),
    mistake("not_sorted_back", "What comes back is in order of experts and is added to tokens in their own order: it goes where it came from.",
            (ADD, "np.add.at(y_tD, np.sort(token), gate_c1 * o_cD)")),
    mistake("gates_in_order", "The gates stand in order of tokens, what they multiply in order of experts: permute both alike.",
            ("gate_tk.ravel()[order][:, None]", "gate_tk.ravel()[:, None]")),
    mistake("last_choice", "Of a token's choices one is left: an index that occurs twice in `y[token] += ...` is added once. Use np.add.at, or a loop.",
            (ADD, "y_tD[token] += gate_c1 * o_cD")),
    mistake("order_not_turned", "What comes back is put in order with `order` itself: it is to be turned round. Row i goes to the choice order[i], f[order] = rows.",
            (ADD, "y_tD += (gate_tk[..., None] * o_cD[order].reshape(*gate_tk.shape, x_tD.shape[1])).sum(axis=1)")),
    mistake("gates_divided", "The gates are divided by their sum: they are used as they are.",
            ("gate_tk.ravel()[order][:, None]", "(gate_tk / gate_tk.sum(axis=1, keepdims=True)).ravel()[order][:, None]")),
    mistake("no_gate", "What comes back is added without its gate.", (ADD, "np.add.at(y_tD, token, o_cD)")),
    mistake("gate_in_front", "The gate multiplies what goes into the expert, which is not linear: it weights what comes out.",
            ("cut(x_tD[token], sent)", "cut(gate_c1 * x_tD[token], sent)"), (ADD, "np.add.at(y_tD, token, o_cD)")),
    mistake("no_activation", "Nothing stands between the expert's two products: h = silu(x W1).", ("(a * s) @ W2_nFD[n]", "a @ W2_nFD[n]")),
    mistake("relu", "The experts use ReLU: silu(a) = a sigmoid(a) is asked for.", ("s = 1 / (1 + np.exp(-a))", "s = (a > 0).astype(a.dtype)")),
    mistake("every_expert", "This is right, but every expert multiplies all rows that came: each row chose one of them.",
            ("a = x_gD[rows] @ W1_nDF[n]", "a = (x_gD @ W1_nDF[n])[rows]")),
    mistake("no_rows_no_message", "This is right, but where no rows come back no message is sent, since both sides know it: every rank calls exchange"
            " each time, and sends arrays of no rows.", ("def moe_forward(", KNOWN), ("exchange(cut(o_gD, came), ep)", "exchange_rows(cut(o_gD, came), sent, ep)"),
            ("exchange(cut(dx_gD, came), ep)", "exchange_rows(cut(dx_gD, came), sent, ep)")),
    mistake("rows_by_number", "This is right, but for each row its expert's number travels too, after counts that say the same, and in a message of its own.",
            ("    x_gD = np.conc", "    exchange(cut(id_tk.ravel()[order], sent), ep)\n    x_gD = np.conc")),
    mistake("no_gate_back", "The gate is missing on the way back into the experts: gate dy goes to them.", ("cut(gate_c1 * dy_tD[token], sent)", "cut(dy_tD[token], sent)")),
    mistake("gate_twice", "The gate multiplies what comes back, too: it is in what went out.", (ADD_BACK, "np.add.at(dx_tD, token, gate_c1 * dx_cD)")),
    mistake("gated_dgate", "The gate's gradient has the gate in it: it is sum dy f(x).", ("(dy_tD[token] * o_cD)", "(gate_c1 * dy_tD[token] * o_cD)")),
    mistake("dgate_of_all", "dgate is made of the token's whole output, all its choices with their gates: it is sum dy f(x) of the choice's own expert.",
            ("    dgate_tk.ravel()[order] = (dy_tD[token] * o_cD).sum(axis=1)\n",
             "    y_tD = np.zeros_like(dy_tD)\n    np.add.at(y_tD, token, gate_c1 * o_cD)\n    dgate_tk.ravel()[order] = (dy_tD[token] * y_tD[token]).sum(axis=1)\n")),
    mistake("dgate_in_order", "dgate stands in order of experts: each belongs to its token and choice.", ("dgate_tk.ravel()[order] =", "dgate_tk.ravel()[:] =")),
    mistake("dx_last_choice", "dx has one choice of each token: an index that occurs twice in `dx[token] += ...` is added once.", (ADD_BACK, "dx_tD[token] += dx_cD")),
    mistake("dx_order_not_turned", "dx is put in order with `order` itself: it is to be turned round. Row i belongs to the choice order[i].",
            (ADD_BACK, "dx_tD += dx_cD[order].reshape(*gate_tk.shape, dx_tD.shape[1]).sum(axis=1)")),
    mistake("dx_not_sorted_back", "dx is added to tokens in their own order: what comes back is in order of experts.", (ADD_BACK, "np.add.at(dx_tD, np.sort(token), dx_cD)")),
    mistake("own_tokens_only", "dW has this rank's own tokens alone: all rows that came to the expert count.",
            (LOOP, "    mine = np.repeat(np.arange(ep.size), came) == ep.rank\n" + LOOP),
            ("(a * s).T @ do_gD[rows]", "(a * s * mine[rows, None]).T @ do_gD[rows]"), ("x_gD[rows].T @ da", "(x_gD[rows] * mine[rows, None]).T @ da")),
    mistake("mean_of_ranks", "dW is divided by the number of ranks: the expert's gradient is the sum over the tokens of all.",
            ("(a * s).T @ do_gD[rows]", "(a * s).T @ do_gD[rows] / ep.size"), ("x_gD[rows].T @ da", "x_gD[rows].T @ da / ep.size")),
    mistake("mean_of_rows", "dW is the mean over the expert's rows: it is the sum.",
            ("(a * s).T @ do_gD[rows]", "(a * s).T @ do_gD[rows] / max(1, len(rows))"), ("x_gD[rows].T @ da", "x_gD[rows].T @ da / max(1, len(rows))")),
    mistake("no_slope", "The derivative of silu is missing.", (SLOPE, "1")),
    mistake("sigmoid_slope", "The derivative of silu lacks its second term: s + a s (1 - s).", (SLOPE, "s")),
    mistake("slope_of_sigmoid", "The derivative is that of the sigmoid: silu has s + a s (1 - s).", (SLOPE, "(s * (1 - s))")),
    mistake("counts_again", "This is right, but backward sends counts again: they are forward's.",
            ("    do_gD = np.concatenate(", "    exchange([np.array([n]) for n in sent], ep)\n    do_gD = np.vstack(")),
    mistake("counts_of_experts_again", "This is right, but backward sends for each expert how many rows go to it, as forward did: keep what came then.",
            ("gate_c1, sent, came, x_gD, o_cD, kept)", "gate_c1, (sent, out), came, x_gD, o_cD, kept)"), ("sent, came, x_gD, o_cD, kept = saved", "(sent, out), came, x_gD, o_cD, kept = saved"),
            ("    do_gD = np.conc", "    exchange(out, ep)\n    do_gD = np.conc")),
    mistake("gates_sent", "This is right, but backward sends the gates too: gate dy goes out, and they stay where they are.",
            ("exchange(cut(gate_c1 * dy_tD[token], sent), ep))", "exchange(cut(dy_tD[token], sent), ep)) * np.concatenate(exchange(cut(gate_c1, sent), ep))")),
    mistake("rows_again", "This is right, but backward sends x to the experts again: they had it in forward, and keep it.",
            ("gate_c1, sent, came, x_gD, o_cD, kept)", "gate_c1, sent, came, x_tD, o_cD, kept)"), ("sent, came, x_gD, o_cD, kept = saved", "sent, came, x_tD, o_cD, kept = saved"),
            ("    do_gD = np.conc", "    x_gD = np.concatenate(exchange(cut(x_tD[token], sent), ep))\n    do_gD = np.conc")),
    mistake("kept_global", "saved is shared by all calls: the next micro-batch's forward has overwritten this one's. Return what backward needs.",
            ("    kept = []\n", "    kept = globals().setdefault('_kept', [])\n    kept.clear()\n")),
)  # fmt: skip
