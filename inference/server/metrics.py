"""What a monitor reads at /metrics, by prometheus_client, in a registry of this server's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

# The version that monitors of any age read; the text is the same in later ones.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
# Bounds in seconds: to a first token, which may wait in a long queue, and between two tokens.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Scheduler.metrics() by their names here.
GAUGES = {
    "requests_waiting": ("waiting", "Requests in the queue."),
    "requests_running": ("running", "Requests in the batch."),
    "slot_use_ratio": ("slot_use", "Share of the slots with a request, over all steps."),
}
COUNTERS = {
    "steps": ("steps", "Steps of the engine."),
    "preemptions": ("preemptions", "Requests that lost their blocks for a while."),
    "prefix_hit_tokens": ("hit_tokens", "Tokens found computed in the prefix cache."),
    "prefill_tokens": ("prefill_tokens", "Tokens of prompts that were run."),
    "decode_tokens": ("decode_tokens", "Tokens of answers that were run."),
    "draft_tokens": ("draft_tokens", "Tokens guessed by speculation."),
    "accepted_tokens": ("accepted_tokens", "Guesses that were right."),
}
# When a counter was made is nothing to see.
disable_created_metrics()


class Metrics:
    """`state`: Scheduler.metrics() as of the last step. `responses`: by HTTP status."""

    def __init__(self, state: Mapping[str, object]) -> None:
        self.state = state
        self.responses: Counter[int] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def histogram(name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"rankwise_{name}_seconds", help, registry=self.registry, buckets=bounds)

        self.first_token = histogram("time_to_first_token", "From a request's arrival to its first token.", FIRST_TOKEN)
        self.inter_token = histogram("inter_token", "Between two tokens of a request.", INTER_TOKEN)
        self.request = histogram("request", "From a request's arrival to its last token.", FIRST_TOKEN)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks a collector for."""
        s = self.state
        for name, (key, help) in GAUGES.items():
            yield GaugeMetricFamily(f"rankwise_{name}", help, value=s[key])
        for name, (key, help) in COUNTERS.items():
            yield CounterMetricFamily(f"rankwise_{name}", help, value=s[key])
        counts = {kind: s[f"blocks_{kind}"] or 0 for kind in ("used", "kept", "free")}
        help = "Blocks of 16 tokens in the KV cache of a rank: in use, kept for the prefix that they hold, or free."
        blocks = GaugeMetricFamily("rankwise_kv_blocks", help, labels=["state"])
        for kind, n in counts.items():
            blocks.add_metric([kind], n)
        use = counts["used"] / max(1, sum(counts.values()))
        yield from (blocks, GaugeMetricFamily("rankwise_kv_use_ratio", "Share of the KV blocks in use.", value=use))
        help = "Answers that ended, by why: an end token or a stop text, the most tokens, or a client that went away."
        requests = CounterMetricFamily("rankwise_requests", help, labels=["outcome"])
        finished = dict.fromkeys(("cancelled", "length", "stop"), 0) | dict(s["finished"])
        for outcome, n in sorted(finished.items()):
            requests.add_metric([outcome], n)
        responses = CounterMetricFamily("rankwise_http_responses", "HTTP responses by status.", labels=["status"])
        for status, n in sorted(self.responses.items()):
            responses.add_metric([str(status)], n)
        yield from (requests, responses)
