"""What one request asks of the engine; `validate` has every check that needs no prompt."""

from dataclasses import dataclass, field

from specl.shared.errors import RequestRejected
from specl.shared.sampling_params import SamplingParams

MAX_LOGPROBS = 20  # alternatives of a token that a client may ask for, as with OpenAI


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """`num_draft_tokens` None lets measured costs decide; `ngram` allows the n-gram drafter.

    `capture_k`: the target's largest logits that are captured for training, 0 captures nothing.
    `client_id`: whose past answers may draft this one. `cache_owner`: whose cached prefixes it may
    continue, and to whom its own belong. `logprobs`: None for none, otherwise each token's
    log-probability with that many alternatives.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 512
    num_draft_tokens: int | None = None
    ngram: bool = True
    capture_k: int = 0
    client_id: str = ""
    cache_owner: str = ""
    logprobs: int | None = None

    def validate(self) -> None:
        """Raises RequestRejected for a value out of range."""
        if self.max_tokens < 1:
            raise RequestRejected(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestRejected(f"logprobs must be from 0 to {MAX_LOGPROBS}, not {self.logprobs}")
        self.sampling.validate()
