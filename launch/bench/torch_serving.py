"""Transformers' own batching on the same weights, for `launch.bench serving --peer torch`; only this needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from inference.workload import Workload
from launch.bench import torch_decode

# On a CPU it says at each run which sizes it cannot find out; all of them are given.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

Way = Callable[[Workload], tuple[float, list[list[int]]]]


class Peer(torch_decode.Peer):
    """Both ways take a workload that is all there at once, and return seconds and each request's greedy tokens."""

    def ways(self, load: Workload, slots: int, max_batch_tokens: int) -> tuple[dict[str, Way], dict[str, str]]:
        """Those that get through `load` here, and why the others don't. Raises RuntimeError if none does."""
        every: dict[str, Way] = {
            "torch_continuous": partial(self.continuous, slots=slots, max_batch_tokens=max_batch_tokens),
            "torch_padded": partial(self.padded, slots=slots),
        }
        missing = {}
        for name, way in every.items():
            try:
                way(load)
            except Exception as error:  # whatever a version of it raises on a machine without a GPU
                missing[name] = f"{type(error).__name__}: {error}"
        if len(missing) == len(every):
            raise RuntimeError(f"Transformers serves in no way here: {missing}")
        return {name: way for name, way in every.items() if name not in missing}, missing

    def continuous(self, load: Workload, slots: int, max_batch_tokens: int) -> tuple[float, list[list[int]]]:
        """What `generate_batch` does, but for each request's own max_new_tokens, which it cannot take: its manager, with
        as many requests and tokens a step as ours. Setting it up is not counted."""
        generation = GenerationConfig(do_sample=False, max_new_tokens=max(load.max_tokens), eos_token_id=-1, pad_token_id=0)
        pages = -(-max(len(p) + m for p, m in zip(*load, strict=True)) // ContinuousBatchingConfig.page_size)
        # Its scheduler admits nobody while less than 15 % of the blocks are free.
        sizes = ContinuousBatchingConfig(
            num_blocks=2 * slots * pages, max_batch_tokens=max_batch_tokens, max_requests_per_batch=slots
        )
        run = self.model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=sizes)
        done: dict[str, list[int]] = {}
        with torch.no_grad(), run as manager:
            begun = perf_counter()
            for n, (prompt, most) in enumerate(zip(*load, strict=True)):
                manager.add_request(prompt, request_id=str(n), max_new_tokens=most)
            while len(done) < len(load.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    done[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError(f"its manager ended with {len(done)} of {len(load.prompts)} requests done")
            seconds = perf_counter() - begun
        return seconds, [done[str(n)] for n in range(len(load.prompts))]

    def padded(self, load: Workload, slots: int) -> tuple[float, list[list[int]]]:
        """`generate` on one batch after another, padded on the left, each until its longest request is through."""
        tokens = []
        begun = perf_counter()
        with torch.inference_mode():
            for first in range(0, len(load.prompts), slots):
                prompts, most = load.prompts[first : first + slots], load.max_tokens[first : first + slots]
                width, steps = max(map(len, prompts)), max(most)
                ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
                out = self.model.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
                tokens += [row[width : width + m] for row, m in zip(out.tolist(), most, strict=True)]
        return perf_counter() - begun, tokens
