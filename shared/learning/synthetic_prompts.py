"""Prompts that the target makes up itself: given only what its chat template puts before a user's words, it writes the words.

After Magpie (Xu et al. 2024, arXiv 2406.08464). Shipped prompts come from templates and end after some thousands; answering
them again and again is what a draft learns by heart. Invented ones do not repeat.
"""

from collections.abc import Callable

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import Prompt, answer
from specl.shared.models.language_model import LanguageModel

LONGEST = 64  # tokens of a prompt; what has not ended by then is dropped
SHORTEST = 12  # characters
_MARK = "\x02\x02"


def invent(
    target: LanguageModel,
    count: int,
    temperature: float,
    rng: np.random.Generator,
    wanted: Callable[[str], bool],
) -> list[str]:
    """At most `count` user prompts out of that many tries: whole, not repeated, and `wanted`.

    Raises ModelError where the chat template does not show a user's words.
    """
    before, end = _around(target)
    tries = [Prompt(str(n), before, temperature) for n in range(count)]
    found: dict[str, None] = {}
    for example in answer(target, tries, LONGEST, 1, False, rng):
        written = example.tokens[example.prompt_length :].tolist()
        ends = [place for place, token in enumerate(written) if token == end or token in target.stop_tokens]
        text = target.tokenizer.decode(written[: ends[0]]).strip() if ends else ""
        if len(text) >= SHORTEST and wanted(text):
            found[text] = None
    return list(found)


def _around(target: LanguageModel) -> tuple[list[int], int]:
    """Tokens that the template puts before a user's first words, and the token that ends them."""
    tokenizer = target.tokenizer
    messages = [{"role": "user", "content": _MARK}]
    before, mark, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).partition(
        _MARK
    )
    if not mark or not after:
        raise ModelError(f"the chat template of {target.name} does not show a user's words and their end")
    encode = tokenizer.encode
    return list(encode(before, add_special_tokens=False)), int(encode(after, add_special_tokens=False)[0])
