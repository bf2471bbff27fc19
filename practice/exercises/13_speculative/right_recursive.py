"""Draft by draft, the rest by recursion; probabilities as dictionaries."""


def accept(p_NV, q_GV, draft_G, u_G, u_next):
    p = dict(enumerate(p_NV[0].tolist()))
    if len(draft_G) == 0:
        return [walk(p, u_next)]
    q, x = q_GV[0].tolist(), int(draft_G[0])
    if q[x] <= p[x] or u_G[0] < p[x] / q[x]:
        return [x, *accept(p_NV[1:], q_GV[1:], draft_G[1:], u_G[1:], u_next)]
    return [walk({i: p[i] - q[i] for i in p if p[i] > q[i]}, u_next)]


def walk(weights, u):
    left = u * sum(weights.values())
    for token, weight in weights.items():
        if left < weight:
            return token
        left -= weight
    return token
