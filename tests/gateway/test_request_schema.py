"""What real clients send, read in this process: neutral values of every dialect, messages that come back, spellings of numbers."""

import pytest

from specl.daemons.gateway.errors import ApiError
from specl.daemons.gateway.request_schema import parse_request
from specl.shared.settings.schema import Settings

HI = [{"role": "user", "content": "hi"}]


def parsed(chat=True, **fields):
    """The request that inference would get."""
    return parse_request(({"messages": HI} if chat else {"prompt": "hi"}) | fields, Settings(), chat).ask


def refused(chat=True, **fields):
    """The field that a refusal names."""
    with pytest.raises(ApiError) as error:
        parsed(chat, **fields)
    assert error.value.status == 400
    return error.value.param


DIALECTS = {
    "openai": {
        "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium", "service_tier": "auto",
        "prompt_cache_retention": "24h", "stop": "", "store": False, "user": "", "logprobs": False, "top_logprobs": 0, "seed": None,
    },
    "vllm": {
        "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "chat_template_kwargs": {}, "use_beam_search": False, "ignore_eos": False, "min_tokens": 0,
        "stop_token_ids": [], "skip_special_tokens": True, "spaces_between_special_tokens": True, "add_generation_prompt": True, "priority": 0,
        "continue_final_message": False, "include_stop_str_in_output": False, "guided_json": None, "bad_words": [], "length_penalty": 1.0, "early_stopping": False,
        "return_token_ids": False, "mm_processor_kwargs": {}, "structured_outputs": {}, "documents": [], "echo": False, "allowed_token_ids": [],
        "stream_options": {"include_usage": False, "continuous_usage_stats": False}, "request_id": "r-1", "cache_salt": "x", "vllm_xargs": {},
    },
    "llama.cpp": {
        "cache_prompt": True, "n_predict": -1, "max_tokens": -1, "seed": -1, "typical_p": 1.0, "repeat_penalty": 1.0, "repeat_last_n": 64, "mirostat": 0,
        "mirostat_tau": 5.0, "mirostat_eta": 0.1, "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_sequence_breakers": ["\n"],
        "xtc_probability": 0, "xtc_threshold": 0.1, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_n_sigma": -1, "grammar": "", "n_probs": 0, "n_keep": 0,
        "id_slot": -1, "timings_per_token": False, "reasoning_format": "auto", "return_progress": False, "post_sampling_probs": False, "lora": [], "image_data": [],
    },
    "ollama": {
        "think": False, "keep_alive": "5m", "options": {}, "format": "", "raw": False, "num_predict": -1, "tfs_z": 1.0, "num_keep": 0, "images": [], "template": "",
    },
    "lm studio": {"ttl": 300, "max_tokens": -1, "repeat_penalty": 1, "top_k": 0, "draft_model": ""},
    "openrouter": {
        "reasoning": {}, "include_reasoning": True, "transforms": [], "provider": {}, "top_a": 0, "plugins": [], "thinking": {"type": "disabled"},
        "enable_thinking": False, "response_format": {}, "tool_choice": "", "reasoning_effort": "", "logit_bias": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("chat", [True, False])
def test_values_that_ask_for_nothing_are_taken(dialect, chat):
    assert parsed(chat, **DIALECTS[dialect]).max_tokens == Settings().speculative.max_tokens


ASKING = {
    "repetition_penalty": 1.1, "min_tokens": 5, "chat_template_kwargs": {"enable_thinking": False}, "guided_json": {}, "json_schema": {}, "n_predict": 5,
    "ignore_eos": True, "skip_special_tokens": False, "add_generation_prompt": False, "mirostat": 2, "grammar": "root ::= 'a'", "think": True,
    "reasoning": {"effort": "high"}, "web_search_options": {}, "stop_token_ids": [1], "frequency_penalty": True, "n": True, "typical_p": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("field", ASKING)
def test_a_value_that_asks_for_something_is_refused(field):
    assert refused(**{field: ASKING[field]}) == field


def test_top_k_minus_one_switches_it_off():
    assert parsed(top_k=-1).sampling.top_k == 0 and refused(top_k=-2) == "top_k"


RETURNED = {
    "reasoning_content": ("", "I thought"), "reasoning": ("", "I thought", {}), "reasoning_details": ([], [{"type": "reasoning.text"}]), "refusal": ("", None),
    "prefix": (False,), "partial": (False,), "annotations": ([], [{"type": "url_citation"}]), "tool_calls": ([], None), "function_call": (None, {}),
    "audio": (None,), "thinking": ("", "hm"), "images": ([],), "id": ("msg-1",), "tool_call_id": ("",), "cache_control": ({"type": "ephemeral"},),
}  # fmt: skip


@pytest.mark.parametrize("field", RETURNED)
def test_an_assistant_message_sent_back_is_taken(field):
    for value in RETURNED[field]:
        messages = [*HI, {"role": "assistant", "content": "hello", field: value}, *HI]
        assert parsed(messages=messages).messages[1] == {"role": "assistant", "content": "hello"}, value


@pytest.mark.parametrize("field, value", [("tool_calls", [{"id": "1"}]), ("prefix", True), ("audio", {"id": "a"})])
def test_a_message_that_asks_for_something_is_refused(field, value):
    messages = [*HI, {"role": "assistant", "content": "hello", field: value}, *HI]
    assert refused(messages=messages) == f"messages[1].{field}"


def test_a_message_may_have_a_name():
    (message,) = parsed(messages=[{"role": "user", "content": "hi", "name": "ada"}]).messages
    assert message["name"] == "ada"
    assert parsed(messages=[{"role": "user", "content": "hi", "name": ""}]).messages == HI
    assert refused(messages=[{"role": "user", "content": "hi", "name": 5}]) == "messages[0].name"


def test_text_parts_of_every_kind_are_joined():
    parts = [
        "a",
        {"type": "text", "text": "b"},
        {"type": "input_text", "text": "c"},
        {"type": "output_text", "text": "d"},
    ]
    assert parsed(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "abcd"
    refusal = [{"type": "thinking", "thinking": "hm"}, {"type": "refusal", "refusal": "no"}]
    assert parsed(messages=[*HI, {"role": "assistant", "content": refusal}, *HI]).messages[1]["content"] == "no"
    assert (
        parsed(messages=[*HI, {"role": "assistant", "content": None, "refusal": "no"}, *HI]).messages[1]["content"]
        == "no"
    )


def test_name_from_elsewhere_is_another_client():
    ids = {
        parse_request({"messages": HI, "user": "ada"}, Settings(), True, at).ask.client_id
        for at in ("10.0.0.1", "10.0.0.2")
    }
    assert len(ids) == 2
