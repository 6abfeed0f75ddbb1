"""The statistics of an answer, computed once from its session for the daemon and the Python API."""

from specl.shared.answer_stats import AnswerStats
from specl.shared.engine.costs import Costs
from specl.shared.engine.decode import Session
from specl.shared.engine.decoding_stats import SOURCES


def answer_stats(session: Session, costs: Costs | None, ttft_ms: float) -> AnswerStats:
    """Rounded figures of a session; `ttft_ms` are milliseconds to the first token."""
    stats, tokens = session.stats, len(session.output)
    drafted, accepted = sum(stats.drafted.values()), sum(stats.accepted.values())
    pairs = zip(stats.accepted_by_depth, stats.tested_by_depth, strict=True)
    plain = 1 / costs.verify_s(1) if costs is not None else None
    return AnswerStats(
        drafted=drafted,
        accepted=accepted,
        draft_n=drafted,
        draft_n_accepted=accepted,
        model_drafted=stats.drafted["model"],
        model_accepted=stats.accepted["model"],
        rounds=stats.rounds,
        acceptance_rate=_rounded(stats.acceptance_rate, 4),
        mean_accepted_length=round(tokens / stats.rounds, 3) if stats.rounds else None,
        acceptance_by_depth=[round(accepted / tested, 4) for accepted, tested in pairs if tested],
        tokens_by_source={name: session.sources.count(code) for name, code in SOURCES.items()},
        k_histogram={str(k): rounds for k, rounds in sorted(stats.k_histogram.items())},
        parked_reason=session.draft_length.parked_reason if not stats.drafted["model"] else "",
        tokens_per_second=round(tokens / stats.decode_s, 2) if stats.decode_s else 0.0,
        plain_tokens_per_second_estimate=_rounded(plain, 2),
        ttft_ms=round(ttft_ms, 1),
        prompt_tokens=session.prompt_length,
        reused_prompt_tokens=stats.reused_tokens,
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
