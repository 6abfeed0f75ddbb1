"""A client that pauses keeps its request; one whose connection is gone loses it."""

import time
from contextlib import suppress

from specl.shared.errors import SpecLoraError
from tests.harness.instance import SETTINGS
from tests.harness.waiting import wait_until

TIMEOUT = "{threads: 1, client_timeout_s: 0.5}"


def start(instance):
    instance.set(SETTINGS.replace("{threads: 1}", TIMEOUT))
    instance.start("inference", SPECL_TEST_TOKEN_MS="40")
    instance.ready("inference")


def test_reader_that_pauses_gets_the_whole_answer(instance):
    start(instance)
    with instance.client() as client:
        stream = client.stream("pause", max_tokens=150)
        text = next(stream)
        time.sleep(2.0)  # four times as long as a client may be silent, while the answer is made
        text += "".join(stream)
        assert client.last.finish_reason in ("stop", "length") and client.last.text == text


def test_client_that_vanished_loses_its_request(instance):
    start(instance)
    client = instance.client()
    stream = client.stream("vanish", max_tokens=2000)
    next(stream)
    for connection in list(client._open):
        connection.close()  # no Cancel goes out, as if the process were killed
    wait_until(lambda: instance.status("inference")["queue"]["in_flight"] == 0, 5, "its request ends")
    with suppress(SpecLoraError):
        stream.close()
