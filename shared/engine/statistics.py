"""What an answer says about itself, the same from the daemon and from the Python API. Pure: a session in, plain values out."""

from specl.shared.answer_stats import AnswerStats
from specl.shared.engine.costs import Costs
from specl.shared.engine.decode import Session, Tally

ENOUGH_DRAFTED = 16  # below this acceptance says too little and is null (DESIGN: two figures)


def acceptance_rate(tally: Tally) -> float | None:
    """accepted / drafted by the model drafter alone; null below 16 drafted."""
    drafted = tally.drafted["model"]
    return tally.accepted["model"] / drafted if drafted >= ENOUGH_DRAFTED else None


def statistics(session: Session, costs: Costs | None, ttft_ms: float) -> AnswerStats:
    """The `stats` of an answer, with llama.cpp's names beside ours where it has them."""
    tally, tokens = session.tally, len(session.output)
    drafted, accepted = sum(tally.drafted.values()), sum(tally.accepted.values())
    depth = [a / t for a, t in zip(tally.accepted_by_depth, tally.tested_by_depth, strict=True) if t]
    plain = 1 / costs.verify_s(1) if costs is not None else None
    sources = session.sources
    return AnswerStats(
        drafted=drafted,
        accepted=accepted,
        draft_n=drafted,
        draft_n_accepted=accepted,
        model_drafted=tally.drafted["model"],
        model_accepted=tally.accepted["model"],
        rounds=tally.rounds,
        acceptance_rate=_rounded(acceptance_rate(tally), 4),
        mean_accepted_length=round(tokens / tally.rounds, 3) if tally.rounds else None,
        acceptance_by_depth=[round(value, 4) for value in depth],
        tokens_by_source={name: sources.count(code) for name, code in (("target", 0), ("model", 1), ("ngram", 2))},
        k_histogram={str(k): n for k, n in sorted(tally.k_histogram.items())},
        parked_reason=session.chooser.parked_reason if not tally.drafted["model"] else "",
        tokens_per_second=round(tokens / tally.decode_s, 2) if tally.decode_s else 0.0,
        plain_tokens_per_second_estimate=_rounded(plain, 2),
        ttft_ms=round(ttft_ms, 1),
        prompt_tokens=session.prompt_length,
        reused_prompt_tokens=tally.reused_tokens,
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
