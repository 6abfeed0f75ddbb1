"""A request before it runs: its tokens, every reason to refuse it, and what the engine is told of it. Holds no state."""

from specl.daemons.inference.job import Job
from specl.shared.engine.core import EngineCore
from specl.shared.engine.decode import Options
from specl.shared.errors import RequestRejected
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.schema import Settings


def prepare(job: Job, engine: EngineCore, budget: int) -> None:
    """Tokens of the prompt, and how many of the `budget` of cache tokens its answer may come to need.

    Raises RequestRejected with every reason to refuse it before it waits.
    """
    ask = job.ask
    if ask.messages:
        if not any(
            str(message.get("content", "")).strip() for message in ask.messages if message.get("role") == "user"
        ):
            raise RequestRejected("the prompt is empty")
        job.prompt_text, job.prompt = engine.encode_chat(ask.messages, splice=ask.sampling.seed is None)
    else:
        job.prompt_text, job.prompt = ask.prompt, engine.encode(ask.prompt, special=True)
    if not job.prompt:
        raise RequestRejected("the prompt is empty")
    context = engine.target.context_length
    most = min(context, budget)
    if len(job.prompt) >= most:
        what = "memory.max_kv_cache_tokens is" if budget < context else "the model's context holds"
        raise RequestRejected(f"the prompt has {len(job.prompt)} tokens; {what} {most}")
    job.reserved = min(
        len(job.prompt) + ask.max_tokens, most
    )  # an answer ends where its cache would outgrow the budget


def to_options(job: Job, settings: Settings) -> Options:
    """What the engine is to do; where the request says nothing, what the settings say."""
    ask = job.ask
    fixed = ask.num_draft_tokens
    if fixed is None and settings.speculative.num_draft_tokens != "auto":
        fixed = settings.speculative.num_draft_tokens
    sampling = ask.sampling
    # whether the laws and states of this answer are for keeping
    detailed = ask.mode == "detailed" and ask.record and settings.records.keep == "content"
    return Options(
        sampling=SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed),
        max_tokens=job.reserved - len(job.prompt),
        num_draft_tokens=fixed,
        ngram=settings.speculative.ngram if ask.ngram is None else ask.ngram,
        client_id=ask.client_id if ask.record else "",
        logprobs=ask.logprobs,
        capture_k=settings.training.loss.top_k_logits if detailed else 0,
    )
