"""What a monitor reads: Prometheus' text format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Bounds in seconds: to a first token, which may wait in a long queue, and between two tokens.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# A sample: its labels and its value.
Sample = tuple[Mapping[str, str], float]


class Histogram:
    """How many values were at most each of `bounds`, which ascend, and how many were beyond the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self, name: str, help: str) -> list[str]:
        lines, total = _head(name, help, "histogram"), 0
        counts = list(self.counts)
        for bound, count in zip([*map(str, self.bounds), "+Inf"], counts, strict=True):
            total += count
            lines.append(_line(f"{name}_bucket", {"le": bound}, total))
        return [*lines, _line(f"{name}_sum", {}, self.sum), _line(f"{name}_count", {}, total)]


class Metrics:
    """`state`: Scheduler.metrics() as of the last step. `responses`: by HTTP status."""

    def __init__(self, state: Mapping[str, object]) -> None:
        self.state = state
        self.first_token, self.inter_token = Histogram(FIRST_TOKEN), Histogram(INTER_TOKEN)
        self.request = Histogram(FIRST_TOKEN)
        self.responses: Counter[int] = Counter()

    def text(self) -> str:
        s = self.state
        finished = dict(s["finished"])
        blocks = {kind: s[f"blocks_{kind}"] for kind in ("used", "kept", "free")}
        all_blocks = sum(n or 0 for n in blocks.values())
        lines = [
            *_metric("requests_waiting", "Requests in the queue.", "gauge", s["waiting"]),
            *_metric("requests_running", "Requests in the batch.", "gauge", s["running"]),
            *_metric(
                "kv_blocks",
                "Blocks of 16 tokens in the KV cache of a rank: in use, kept for the prefix that they hold, or free.",
                "gauge",
                [({"state": kind}, n or 0) for kind, n in blocks.items()],
            ),
            *_metric("kv_use_ratio", "Share of the KV blocks in use.", "gauge", blocks["used"] / max(1, all_blocks)),
            *_metric("slot_use_ratio", "Share of the slots with a request, over all steps.", "gauge", s["slot_use"]),
            *_metric("steps_total", "Steps of the engine.", "counter", s["steps"]),
            *_metric("preemptions_total", "Requests that lost their blocks for a while.", "counter", s["preemptions"]),
            *_metric("prefix_hit_tokens_total", "Tokens found computed in the prefix cache.", "counter", s["hit_tokens"]),
            *_metric("prefill_tokens_total", "Tokens of prompts that were run.", "counter", s["prefill_tokens"]),
            *_metric("decode_tokens_total", "Tokens of answers that were run.", "counter", s["decode_tokens"]),
            *_metric("draft_tokens_total", "Tokens guessed by speculation.", "counter", s["draft_tokens"]),
            *_metric("accepted_tokens_total", "Guesses that were right.", "counter", s["accepted_tokens"]),
            *_metric(
                "requests_total",
                "Answers that ended, by why: an end token or a stop text, the most tokens, or a client that went away.",
                "counter",
                [({"outcome": o}, finished.get(o, 0)) for o in sorted({"stop", "length", "cancelled", *finished})],
            ),
            *_metric(
                "http_responses_total",
                "HTTP responses by status.",
                "counter",
                [({"status": str(status)}, n) for status, n in sorted(self.responses.items())],
            ),
            *self.first_token.lines("rankwise_time_to_first_token_seconds", "From a request's arrival to its first token."),
            *self.inter_token.lines("rankwise_inter_token_seconds", "Between two tokens of a request."),
            *self.request.lines("rankwise_request_seconds", "From a request's arrival to its last token."),
        ]
        return "\n".join(lines) + "\n"


def _metric(name: str, help: str, kind: str, samples: float | Iterable[Sample]) -> list[str]:
    name = f"rankwise_{name}"
    each = [({}, samples)] if isinstance(samples, int | float) else samples
    return [*_head(name, help, kind), *(_line(name, labels, value) for labels, value in each)]


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"{name}{{{pairs}}} {value:.17g}" if pairs else f"{name} {value:.17g}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
