"""The API as OpenAI's own client and as curl use it."""

import contextlib
import json
import re
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest

from specl.shared.conversations import conversation_of
from tests.harness.waiting import wait_until

ASK = {
    "model": "speclora",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 12,
    "temperature": 0,
}


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def chunks(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_chat_answer_has_text_usage_and_statistics(client):
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 12
    ours = answer.model_extra["speclora"]
    assert ours["recorded"] and ours["rounds"] >= 1 and ours["tokens_per_second"] > 0


def test_a_stream_says_the_same_as_the_whole(client):
    whole = client.chat.completions.create(**ASK).choices[0].message.content
    pieces = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage.completion_tokens > 0 and not pieces[-1].choices
    assert pieces[-2].choices[0].finish_reason and pieces[-2].model_extra["speclora"]["generation_id"]
    assert len([piece for piece in pieces if piece.choices and piece.choices[0].delta.content]) > 1


def test_without_include_usage_no_chunk_speaks_of_it(client):
    assert all(piece.usage is None for piece in client.chat.completions.create(**ASK, stream=True))


def test_plain_completions_go_without_a_chat_template(client, running):
    request = {"model": "speclora", "prompt": "once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.usage.prompt_tokens == len("once upon a time")  # the fake tokenizer: one token a character
    text = "".join(piece.choices[0].text for piece in client.completions.create(**request, stream=True))
    assert text == whole.choices[0].text


def test_stop_text_ends_the_answer(client):
    request = {**ASK, "max_tokens": 40}
    whole = client.chat.completions.create(**request).choices[0].message.content
    stop = whole[5:7]
    short = client.chat.completions.create(**request, stop=[stop])
    assert short.choices[0].message.content == whole[: whole.index(stop)]
    assert short.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text(client):
    request = {**ASK, "temperature": 1.0, "max_tokens": 30}
    texts = [client.chat.completions.create(**request, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_max_completion_tokens_wins(client):
    request = {name: value for name, value in ASK.items() if name != "max_tokens"}
    assert client.chat.completions.create(**request, max_completion_tokens=3).usage.completion_tokens <= 3


def test_text_parts_and_the_developer_role_are_understood(client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    assert client.chat.completions.create(**(ASK | {"messages": messages})).choices[0].message.content


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(**(ASK | {"model": "gpt-9"}))


UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}], "logit_bias": {"5": 1}, "n": 2,
    "frequency_penalty": 0.5, "presence_penalty": -1, "response_format": {"type": "json_object"},
    "functions": [{"name": "f"}], "nonsense": 1, "audio": {"voice": "x"},
}  # fmt: skip


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(http, field):
    answer = http.post("/v1/chat/completions", json=ASK | {field: UNSUPPORTED[field]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert f"`{field}`" in error["message"]


def test_chat_logprobs_are_those_of_its_tokens(client):
    request = ASK | {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    choice = client.chat.completions.create(**request).choices[0]
    rows = choice.logprobs.content
    assert rows and "".join(row.token for row in rows) == choice.message.content
    for row in rows:
        assert len(row.top_logprobs) == 3 and row.top_logprobs[0].logprob == row.logprob <= 0  # greedy: the likeliest
        assert bytes(row.bytes).decode() == row.token
    streamed = [
        row for chunk in client.chat.completions.create(**request, stream=True) for choice in chunk.choices
        for row in (choice.logprobs.content if choice.logprobs else [])
    ]  # fmt: skip
    assert [row.token for row in streamed] == [row.token for row in rows]


def test_log_probabilities_of_a_plain_completion_count_characters(client):
    request = {"model": "speclora", "prompt": "a", "logprobs": 2, "max_tokens": 12, "temperature": 0}
    choice = client.completions.create(**request).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text and logprobs.text_offset[0] == 0
    assert all(
        choice.text[start:].startswith(token)
        for start, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    )
    assert all(
        max(top.values()) == own for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )


def test_alternatives_without_log_probabilities_are_refused(http):
    for request in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 2}):
        answer = http.post("/v1/chat/completions", json=ASK | request)
        assert answer.status_code == 400 and "logprobs" in answer.json()["error"]["param"], answer.text


BAD = {
    "store": [0, "no"], "temperature": [3, -1, "warm", True, 10**400], "top_p": [0, 1.5], "max_tokens": [0, -5, 2.5, "many"], "seed": [2**63, "x"],
    "stop": [[""], 5, ["a"] * 17], "stream": ["yes"], "messages": [[], "hi", [5], [{"role": "tool", "content": "x"}], [{"role": [], "content": "x"}]],
    "stream_options": [{"include_usage": True}], "speclora": [{"unknown": 1}, {"record": "no"}],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(http, field, value):
    answer = http.post("/v1/chat/completions", json=ASK | {field: value})
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]["message"]


def test_neutral_values_and_nulls_are_fine(http):
    neutral = {"n": 1, "logprobs": False, "tools": [], "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    answer = http.post("/v1/chat/completions", json=ASK | neutral | {"seed": None, "stop": None, "user": "me"})
    assert answer.status_code == 200, answer.text


def test_too_long_a_prompt_names_both_counts(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert (
        model["context_length"]
        == model["max_model_len"]
        == http.get(f"/v1/models/{model['id']}").json()["context_length"]
    )
    for stream in (False, True):
        request = ASK | {"messages": [{"role": "user", "content": "x" * 5000}], "stream": stream}
        answer = http.post("/v1/chat/completions", json=request)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        tokens, limit = map(int, re.findall(r"\d+", error["message"]))
        assert tokens > 5000 > limit == model["context_length"]


def test_text_beyond_all_limits_is_context_length_exceeded(http):
    answer = http.post("/v1/completions", json={"prompt": "x" * (1100 << 10)})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("content", ["", None, "hello"])
def test_a_system_message_alone_is_answered(http, content):
    alone = [{"role": "system", "content": "be brief"}]
    messages = alone if content == "hello" else [*alone, {"role": "user", "content": content}]
    answer = http.post("/v1/chat/completions", json=ASK | {"messages": messages})
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"], answer.text
    assert (
        http.post("/v1/chat/completions", json=ASK | {"messages": [{"role": "user", "content": " "}]}).status_code
        == 400
    )


def test_nonsense_bodies_are_refused(http):
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        assert http.post("/v1/chat/completions", content=content, headers=json_type).status_code == 400
    assert http.post("/v1/chat/completions", content=b"x" * (3 << 20), headers=json_type).status_code == 413
    pieces = (b"x" * 65536 for _ in range(48))
    assert http.post("/v1/chat/completions", content=pieces, headers=json_type).status_code == 413
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "more", [{"speclora": {"record": False}}, {"store": False}, {"store": None}, {"store": True}, {}]
)
def test_what_is_not_to_be_kept_is_not(client, more):
    answer = client.chat.completions.create(**ASK, extra_body=more)
    kept = more not in ({"speclora": {"record": False}}, {"store": False})
    assert answer.model_extra["speclora"]["recorded"] is kept


def conversations(running, *answers):
    """The conversation ids under which these answers are stored."""

    def stored():
        with contextlib.closing(sqlite3.connect(f"file:{running.instance.paths.store}?mode=ro", uri=True)) as db:
            found = dict(db.execute("SELECT id, conversation_id FROM generations").fetchall())
        return all(id in found for id in ids) and [found[id] for id in ids]

    ids = [answer.model_extra["speclora"]["generation_id"] for answer in answers]
    return wait_until(stored, 20, "the answers are stored")


def test_chat_turns_are_one_conversation(client, running):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is a lighthouse?"}]
    first = client.chat.completions.create(**ASK | {"messages": turns})
    turns += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and a lightship?"},
    ]
    second = client.chat.completions.create(**ASK | {"messages": turns})
    other = client.chat.completions.create(**ASK | {"messages": turns[3:]})
    named = client.chat.completions.create(
        **ASK | {"messages": turns}, extra_body={"speclora": {"conversation_id": "mine"}}
    )
    ids = conversations(running, first, second, other, named)
    assert ids[0] == ids[1] != ids[2] and ids[3] == "mine"
    assert ids[0] == conversation_of(turns) and "lighthouse" not in ids[0]


def test_repeats_of_a_plain_prompt_are_one_conversation(client, running):
    request = {"model": "speclora", "max_tokens": 4, "temperature": 1.0}
    ids = conversations(
        running, *(client.completions.create(**request, prompt=text) for text in ("ping", "ping", "pong"))
    )
    assert ids[0] == ids[1] == conversation_of([], "ping") != ids[2]


@pytest.mark.parametrize(
    "more",
    [
        {"stop": "\ud800"},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"speclora": {"num_draft_tokens": 2**70}},
    ],
)
def test_what_cannot_travel_is_the_clients_mistake(http, more):
    content = json.dumps(ASK | more).encode()
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "rejected", answer.text


@pytest.mark.parametrize(
    "more",
    [
        {"\ud800": 1},
        {"speclora": {"\ud800": 1}},
        {"stream": True, "stream_options": {"\ud800": 1}},
        {"messages": [{"role": "user", "content": "a", "\udfff": 1}]},
        {"model": "\ud800"},
    ],
)
def test_half_a_surrogate_in_a_name_is_refused(http, more):
    content = json.dumps(ASK | more).encode()
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"], answer.text


def test_a_client_that_leaves_ends_its_answer(running):
    slowly = {"num_draft_tokens": 0, "ngram": False}  # a random model repeats itself, and repeats are drafted fast
    request = ASK | {"max_tokens": 3000, "stream": True, "speclora": slowly}
    with (
        httpx.Client(base_url=running.url, timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=request) as answer,
    ):
        next(answer.iter_raw())
        assert running.instance.status("inference")["queue"]["in_flight"] == 1
    wait_until(lambda: running.instance.status("inference")["queue"]["in_flight"] == 0, 2, "the answer is cancelled")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/chat/completions", json=request | {"stream": False}, timeout=0.7)
    wait_until(lambda: running.instance.status("inference")["queue"]["in_flight"] == 0, 2, "the answer is cancelled")
    metrics = httpx.get(f"{running.url}/metrics").text
    assert "speclora_cancelled_total 2.0" in metrics and "speclora_active_streams 0.0" in metrics


def test_eight_streams_at_once_keep_their_texts_apart(client):
    def text(number):
        request = ASK | {"messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 20}
        return "".join(p.choices[0].delta.content or "" for p in client.chat.completions.create(**request, stream=True))

    alone = [text(number) for number in range(8)]
    together = [""] * 8
    threads = [threading.Thread(target=lambda n=n: together.__setitem__(n, text(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("more", [{}, {"user": "ada"}, {"stream": True}])
def test_a_burst_waits_instead_of_being_refused(running, more):
    with ThreadPoolExecutor(24) as pool:
        asked = [
            pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=ASK | more, timeout=60)
            for _ in range(24)
        ]
    assert [answer.result().status_code for answer in asked] == [200] * 24


def test_curl_reads_a_stream(running):
    command = ["curl", "-sN", f"{running.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(ASK | {"stream": True})], capture_output=True, text=True)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


def test_metrics_and_health(http):
    assert http.get("/health").json() == {"status": "ok", "inference": "ready"}
    text = http.get("/metrics").text
    assert 'speclora_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert "speclora_ttft_seconds_bucket" in text


def test_inference_may_go_and_come_back(running, http):
    inference = next(daemon for daemon in running.instance.daemons if daemon.role == "inference")
    with http.stream("POST", "/v1/chat/completions", json=ASK | {"max_tokens": 3000, "stream": True}) as answer:
        pieces = answer.iter_lines()
        next(pieces)
        inference.kill()
        rest = list(pieces)
    assert any('"code": "inference_unreachable"' in line.replace('":"', '": "') for line in rest)
    down = http.post("/v1/chat/completions", json=ASK)
    assert down.status_code == 503 and "honcho start" in down.json()["error"]["message"]
    time.sleep(2)
    assert http.get("/health").status_code == 503
    running.instance.start("inference", SPECL_TEST_TOKEN_MS="15")
    running.instance.ready("inference")
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200


def test_a_bug_of_ours_still_has_openais_shape(tmp_path):
    import asyncio

    from specl.daemons.gateway.app import make_app
    from specl.shared.paths import Paths
    from specl.shared.settings.schema import Settings

    def broken():
        raise RuntimeError("on purpose")

    app = make_app(Paths(tmp_path, tmp_path).create(), Settings(), None, lambda: False)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.post("/v1/completions", json={"prompt": "a"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specl.daemons.gateway.app.parse_request", lambda *request: broken())
        answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "on purpose" not in answer.text
