"""Pair by pair and token by token, with Python's numbers."""

import math

import numpy as np


def dpo(w_N, l_N, ref_w_N, ref_l_N, beta):
    losses, slopes = [], []
    for w, lost, rw, rl in zip(w_N, l_N, ref_w_N, ref_l_N, strict=True):
        m = beta * float(w - lost - (rw - rl))
        tail = math.exp(-abs(m))
        losses.append(max(-m, 0) + math.log1p(tail))
        slopes.append((1 if m < 0 else tail) / (1 + tail))
    dl = np.array(slopes, w_N.dtype) * (beta / len(w_N))
    return sum(losses) / len(losses), -dl, dl


def grpo(logp_T, old_T, ref_T, lengths, reward_G, eps, beta):
    G = len(lengths)
    mean = sum(map(float, reward_G)) / G
    std = math.sqrt(sum((float(r) - mean) ** 2 for r in reward_G) / G)
    total, dlogp, t = 0.0, np.zeros_like(logp_T), 0
    for n, r in zip(lengths, reward_G, strict=True):
        A = (float(r) - mean) / (std + 1e-4)
        for _ in range(n):
            ratio = math.exp(logp_T[t] - old_T[t])
            off = float(ref_T[t] - logp_T[t])
            cut = (A > 0 and ratio > 1 + eps) or (A < 0 and ratio < 1 - eps)
            gain = A * (1 + eps if A > 0 else 1 - eps) if cut else A * ratio
            total += (gain - beta * (math.expm1(off) - off)) / (G * n)
            dlogp[t] = -((0 if cut else A * ratio) + beta * math.expm1(off)) / (G * n)
            t += 1
    return -total, dlogp
