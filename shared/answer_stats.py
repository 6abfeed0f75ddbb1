"""The statistics of one answer, as the daemon and the Python API give them, and their sum over answers. Values only:
engine/statistics.py makes them."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """What one answer cost. `drafted` and `accepted` count tokens of all drafters, `model_*` those of the model drafter alone.

    `draft_n` and `draft_n_accepted` are llama.cpp's names for `drafted` and `accepted`. `acceptance_rate` is
    model_accepted / model_drafted, None below 16 drafted. `k_histogram`: rounds by draft length. Every field has a default,
    because records of version 1 may lack some.
    """

    drafted: int = 0
    accepted: int = 0
    draft_n: int = 0
    draft_n_accepted: int = 0
    model_drafted: int = 0
    model_accepted: int = 0
    rounds: int = 0
    acceptance_rate: float | None = None
    mean_accepted_length: float | None = None  # output tokens a round
    acceptance_by_depth: list[float] = field(default_factory=list)  # from depth 1
    tokens_by_source: dict[str, int] = field(default_factory=dict)  # target, model, ngram
    k_histogram: dict[str, int] = field(default_factory=dict)
    parked_reason: str = ""  # why the model drafter did not draft
    tokens_per_second: float = 0.0
    plain_tokens_per_second_estimate: float | None = None  # of decoding without drafts
    ttft_ms: float = 0.0
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0


@dataclass(slots=True)
class AnswerTotals:
    """Sums over answers. `drafted` and `accepted` count tokens of the model drafter alone; `seconds` are of decoding."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0

    def add(self, tokens: int, stats: AnswerStats) -> None:
        """Count one answer of `tokens` tokens."""
        seconds = tokens / stats.tokens_per_second if stats.tokens_per_second else 0.0
        self.add_counts(tokens, seconds, stats.model_drafted, stats.model_accepted, stats.rounds)
        self.prompt_tokens += stats.prompt_tokens
        self.reused_prompt_tokens += stats.reused_prompt_tokens

    def add_counts(self, tokens: int, seconds: float, drafted: int, accepted: int, rounds: int = 0) -> None:
        """Count one answer that was measured otherwise."""
        self.answers += 1
        self.tokens += tokens
        self.seconds += seconds
        self.drafted += drafted
        self.accepted += accepted
        self.rounds += rounds

    @property
    def acceptance(self) -> float | None:
        """accepted / drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of decoding; 0 where no time was measured."""
        return self.tokens / self.seconds if self.seconds else 0.0
