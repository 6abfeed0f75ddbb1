"""Request fields that may be sent as long as they ask for nothing, in the dialects of OpenAI, vLLM, llama.cpp, Ollama,
LM Studio and OpenRouter. Knows names and values, no request.

A client that sends all its defaults must not be refused. A field that would change the answer is refused by name.
"""

from typing import Any

from specl.daemons.gateway.errors import ApiError
from specl.shared.conversations import asks_for_nothing

# fields that do not change the answer, or that only tune a feature that is off: any value is taken
IGNORED = {
    "user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "service_tier", "request_id",
    "cache_prompt", "cache_salt", "priority", "keep_alive", "ttl", "id_slot", "slot_id", "include_reasoning", "parallel_tool_calls",
    "reasoning_format", "parse_tool_calls", "guided_decoding_backend", "detokenize", "spaces_between_special_tokens",
    "repeat_last_n", "penalize_nl", "penalize_newline", "repetition_penalty_range", "mirostat_tau", "mirostat_eta",
    "dry_base", "dry_allowed_length",
    "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "smoothing_curve", "adaptive_decay",
    "length_penalty", "min_keep", "temperature_last",
}  # fmt: skip
# values that ask for nothing, beside null; any other value is refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "num_beams": (1,), "n_predict": (-1, -2), "num_predict": (-1, -2), "max_new_tokens": (-1,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "repeat_penalty": (1,),
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "logit_bias": ({}, []), "typical_p": (1,), "typ_p": (1,),
    "typical": (1,), "tfs_z": (1,), "tfs": (1,), "top_a": (0,), "top_n_sigma": (-1, 0), "nsigma": (-1, 0), "mirostat": (0, False),
    "mirostat_mode": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "dynatemp_range": (0,), "smoothing_factor": (0,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "penalty_alpha": (0,), "guidance_scale": (1,), "cfg_scale": (1,),
    "adaptive_target": (-1,), "min_tokens": (0,), "min_length": (0,), "n_probs": (0,),
    "prompt_logprobs": (False,), "top_logprobs": (0,), "n_keep": (0, -1), "num_keep": (0, -1), "n_indent": (0,), "n_discard": (0,),
    "t_max_predict_ms": (0, -1), "reasoning_budget": (0, -1), "reasoning_budget_tokens": (0, -1), "thinking_budget": (0,),
    "do_sample": (True,), "add_generation_prompt": (True,), "skip_special_tokens": (True,), "add_bos_token": (True,),
    "tool_choice": ("none", "auto", {}), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"}, "text"), "modalities": (["text"], []), "format": ("", "text"),
    "reasoning_effort": ("none", ""), "verbosity": ("medium", ""), "reasoning": ({}, {"effort": "none"}, {"enabled": False}),
    "thinking": ({}, False, {"type": "disabled"}), "truncation": ("disabled", ""), "tool_stream": (False,), "web_search_options": (),
    "guided_json": (), "json_schema": (),
}  # fmt: skip


def _equals(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _neutral_values(name: str) -> tuple[Any, ...]:
    """Values of a field of NEUTRAL that ask for nothing; an empty text, list or map does, unless no value does."""
    return (*NEUTRAL[name], "", [], {}) if NEUTRAL[name] else ()


def refuse_unsupported(body: dict[str, Any], known: set[str]) -> None:
    """Raises ApiError for the first field, neither known nor ignored, whose value asks for something."""
    for name, value in body.items():
        if name in known or name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            if not asks_for_nothing(value):
                raise ApiError(400, f"`{name}` is not supported by this server", name, "unsupported_parameter")
        elif not any(_equals(value, item) for item in _neutral_values(name)):
            allowed = ", ".join(str(item) for item in NEUTRAL[name])
            only = f" (only {allowed})" if allowed else ""
            raise ApiError(400, f"`{name}` is not supported by this server{only}", name, "unsupported_parameter")
