"""Make processors.npz: what Transformers' processors of logits make of some rows.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/oracles/make_processors.py

V ids; `z` (V,) logits in float64, some of them equal to 0, some negative. Of case i: `prompt_i`, `answer_i`: ids so far;
`bias_i` (ids, values); `numbers_i`: repetition penalty, fewest tokens; `ends_i`; `z_i`: the row after SequenceBias, the fewest
new tokens and RepetitionPenalty, in this order.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

V, CASES = 37, 40


def main():
    rng = np.random.default_rng(0)
    z = 4 * rng.standard_normal(V)
    z[[3, 20]] = 0
    stored = {"z": z}
    for i in range(CASES):
        prompt, answer = rng.integers(V, size=rng.integers(1, 30)), rng.integers(V, size=rng.integers(0, 30))
        ids = rng.choice(V, size=rng.integers(0, 8), replace=False)
        # Of few bits, as SequenceBias keeps them in float32.
        values = np.round(rng.uniform(-100, 100, len(ids)) * 64) / 64
        ends = rng.choice(V, size=rng.integers(1, 4), replace=False)
        repetition, fewest = rng.choice([1.0, 1.3, 0.7, 2.0]), int(rng.choice([0, len(answer), len(answer) + 1, 50]))
        processors = LogitsProcessorList()
        if len(ids):
            processors.append(SequenceBiasLogitsProcessor([[[int(t)], float(b)] for t, b in zip(ids, values, strict=True)]))
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), fewest, [int(e) for e in ends]))
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition)))
        so_far = torch.tensor(np.concatenate([prompt, answer])[None])
        after = processors(so_far, torch.tensor(z[None].copy()))[0].numpy()
        stored |= {f"prompt_{i}": prompt, f"answer_{i}": answer, f"bias_{i}": np.stack([ids, values]), f"ends_{i}": ends}
        stored |= {f"numbers_{i}": np.array([repetition, fewest]), f"z_{i}": after}
    np.savez_compressed(Path(__file__).with_name("processors.npz"), **stored)


if __name__ == "__main__":
    main()
