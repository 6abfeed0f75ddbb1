"""What Prometheus is told. Knows nothing of requests but their ends."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specl.shared.messaging.messages import Done


class Metrics:
    """The gateway's own figures since it started."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "speclora_requests", "Requests by endpoint and HTTP status", ["endpoint", "status"], **own
        )
        self.active = Gauge("speclora_active_streams", "Answers being made", **own)
        self.cancelled = Counter("speclora_cancelled", "Answers whose client went away", **own)
        self._prompt = Counter("speclora_prompt_tokens", "Tokens read", **own)
        self._output = Counter("speclora_completion_tokens", "Tokens written", **own)
        self._drafted = Counter("speclora_drafted_tokens", "Tokens guessed by any drafter", **own)
        self._accepted = Counter("speclora_accepted_tokens", "Guesses that stood", **own)
        self._ttft = Histogram(
            "speclora_ttft_seconds", "Time to the first token, in the inference daemon",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60), **own,
        )  # fmt: skip
        self._speed = Gauge("speclora_tokens_per_second", "Of the last answer", **own)

    def answered(self, done: Done) -> None:
        """Count a finished answer."""
        stats = done.stats
        self._prompt.inc(stats.prompt_tokens)
        self._output.inc(done.tokens)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        self._ttft.observe(stats.ttft_ms / 1000)
        self._speed.set(stats.tokens_per_second)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
