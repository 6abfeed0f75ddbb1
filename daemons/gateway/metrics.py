"""The figures that Prometheus reads. Knows nothing of requests but their ends."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specl.shared.messaging.messages import Done


class Metrics:
    """The gateway's figures since it started."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "speclora_requests", "Requests by endpoint and HTTP status", ["endpoint", "status"], registry=registry
        )
        self.active = Gauge("speclora_active_streams", "Answers being made", registry=registry)
        self.cancelled = Counter("speclora_cancelled", "Answers whose client went away", registry=registry)
        self._prompt = Counter("speclora_prompt_tokens", "Tokens read", registry=registry)
        self._output = Counter("speclora_completion_tokens", "Tokens written", registry=registry)
        self._drafted = Counter("speclora_drafted_tokens", "Tokens guessed by any drafter", registry=registry)
        self._accepted = Counter("speclora_accepted_tokens", "Guesses that were accepted", registry=registry)
        self._ttft = Histogram(
            "speclora_ttft_seconds", "Time to the first token, in the inference daemon",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60), registry=registry,
        )  # fmt: skip
        self._speed = Gauge("speclora_tokens_per_second", "Of the last answer", registry=registry)

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
