"""DPO from the two implicit rewards and a sigmoid by tanh; GRPO answer by answer, with a mask made of signs."""

import numpy as np


def dpo(w_N, l_N, ref_w_N, ref_l_N, beta):
    rewards = beta * np.stack([w_N - ref_w_N, l_N - ref_l_N])
    top = np.maximum(rewards[0], rewards[1])
    loss = (top + np.log(np.exp(rewards - top).sum(axis=0)) - rewards[0]).mean()
    p_l = np.exp(rewards[1] - top) / np.exp(rewards - top).sum(axis=0)
    return float(loss), p_l * (-beta / w_N.size), p_l * (beta / w_N.size)


def grpo(logp_T, old_T, ref_T, lengths, reward_G, eps, beta):
    centred = reward_G - np.mean(reward_G)
    A_G = centred / (np.sqrt(np.mean(centred**2)) + 1e-4)
    ends = np.cumsum(lengths)
    losses, parts = [], [logp_T[:0]]
    for A, end, n in zip(A_G, ends, lengths, strict=True):
        if n == 0:
            losses.append(0.0)
            continue
        new, old, ref = (x[end - n : end] for x in (logp_T, old_T, ref_T))
        ratio = np.exp(new - old)
        free = (np.sign(A) * (ratio - 1)) <= eps
        gain = np.where(free, ratio, 1 + np.sign(A) * eps) * A
        kl = np.exp(ref - new) + new - ref - 1
        losses.append(-np.mean(gain - beta * kl))
        parts.append((beta * (1 - np.exp(ref - new)) - free * ratio * A) / (n * len(lengths)))
    return np.mean(losses), np.concatenate(parts).astype(logp_T.dtype)
