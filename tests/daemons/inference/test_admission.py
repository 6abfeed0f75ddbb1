"""A prompt that is far too long is refused before most of it is tokenised."""

from types import SimpleNamespace

import pytest

from specl.daemons.inference.admission import admit
from specl.shared.errors import ContextExceeded
from specl.shared.messaging.messages import Ask
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.schema import Settings

CONTEXT = 8192


class Engine:
    """Counts the characters that it is asked to encode; `width` of them are a token."""

    def __init__(self, width):
        self.width, self.seen = width, 0
        self.target = SimpleNamespace(context_length=CONTEXT)

    def encode(self, text, special=False):
        self.seen += len(text)
        return [1] * (len(text) // self.width)

    def encode_chat(self, messages, reuse_tokens, owner):
        return "", self.encode(messages[0]["content"])


def ask(text, chat):
    messages = [{"role": "user", "content": text}] if chat else []
    return Ask("a", messages, "" if chat else text, 8, SamplingParams(), "detailed")


@pytest.mark.parametrize("chat", [True, False])
def test_million_digits_are_refused_by_length(chat):
    engine = Engine(width=1)
    with pytest.raises(ContextExceeded, match=r"the prompt has more than \d+ tokens; at most 8192 fit"):
        admit(b"", ask("7" * 1_000_000, chat), 0.0, engine, Settings())
    assert engine.seen < 3 * CONTEXT


@pytest.mark.parametrize("chat", [True, False])
def test_long_text_of_long_tokens_is_admitted(chat):
    engine = Engine(width=10)
    job = admit(b"", ask("x" * 70_000, chat), 0.0, engine, Settings())
    assert len(job.prompt) == 7000
