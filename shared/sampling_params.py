"""How the tokens of one answer are drawn: one type for the wire, the engine and the Python API. Imports no model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from specl.shared.errors import RequestRejected

SEED_LIMIT = 2**63
RANDOM_SEED = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off.

    With a seed, earlier turns are re-tokenised instead of reusing generated ids, so that the output depends on the
    prompt text only (see Engine.encode_chat).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def validate(self) -> "SamplingParams":
        """Check all values and return self. Raises RequestRejected for a value out of range."""
        if not 0 <= self.temperature <= 10:
            raise RequestRejected(f"temperature must lie between 0 and 10, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RequestRejected(f"top_p must lie above 0 and not above 1, not {self.top_p}")
        if self.top_k < 0:
            raise RequestRejected(f"top_k must not be negative, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise RequestRejected(f"min_p must lie between 0 and 1, not {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < SEED_LIMIT:
            raise RequestRejected("seed must lie between 0 and 2^63 - 1")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the argmax is taken."""
        return self.temperature == 0


class SamplingDefaults(Protocol):
    """The settings' defaults for values that a request does not set. Fields are those of
    SamplingParams.
    """

    @property
    def temperature(self) -> float:
        """0 is greedy."""

    @property
    def top_p(self) -> float:
        """Probability mass of the tokens that may be sampled; 1 is off."""

    @property
    def top_k(self) -> int:
        """Number of tokens that may be sampled; 0 is off."""

    @property
    def min_p(self) -> float:
        """Share of the greatest probability that a token needs; 0 is off."""


def seed_in_range(seed: int | None) -> int | None:
    """A requested seed as the engine takes it: None, a random one, for -1; other negative numbers count from the range's end."""
    return None if seed is None or seed == RANDOM_SEED else seed % SEED_LIMIT if seed < 0 else seed


SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))


def merge_sampling(defaults: SamplingDefaults, requested: Mapping[str, Any]) -> SamplingParams:
    """What a request names, and the defaults for what it leaves out or gives as None; a seed has no default.

    The one place where settings' sampling defaults reach a request. Raises RequestRejected for a name that is none of
    SAMPLING_FIELDS.
    """
    if unknown := sorted(set(requested) - set(SAMPLING_FIELDS)):
        raise RequestRejected(f"unknown: {', '.join(unknown)}", f"known are {', '.join(SAMPLING_FIELDS)}")

    def value(name: str) -> Any:
        return getattr(defaults, name) if requested.get(name) is None else requested[name]

    return SamplingParams(
        temperature=float(value("temperature")),
        top_p=float(value("top_p")),
        top_k=value("top_k"),
        min_p=float(value("min_p")),
        seed=seed_in_range(requested.get("seed")),
    )
