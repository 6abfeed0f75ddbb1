"""Prompts that the target writes itself: given only what its chat template puts before a user's
words, it writes the words.

After Magpie (Xu et al. 2024, arXiv 2406.08464). The shipped prompts come from templates and end
after some thousands; a draft that sees the same ones again and again learns them by heart.
Synthetic ones do not repeat.
"""

from collections.abc import Callable

import numpy as np

from specl.shared.errors import ModelError
from specl.shared.learning.batch_generate import Prompt, batch_generate
from specl.shared.models import chat_prompt
from specl.shared.models.language_model import LanguageModel

LONGEST = 64  # tokens of a prompt; one that has not ended by then is dropped
SHORTEST = 12  # characters
_MARK = "\x02\x02"


def synthetic_prompts(
    target: LanguageModel,
    count: int,
    temperature: float,
    rng: np.random.Generator,
    accepts: Callable[[str], bool],
) -> list[str]:
    """Up to `count` different, complete user prompts that pass `accepts`, out of `count` attempts.

    Raises ModelError where the chat template does not show a user's words.
    """
    before, end = _template_around_user(target)
    attempts = [Prompt(str(n), before, temperature) for n in range(count)]
    texts: dict[str, None] = {}
    for example in batch_generate(target, attempts, LONGEST, 1, False, rng):
        written = example.tokens[example.prompt_length :].tolist()
        ends = [index for index, token in enumerate(written) if token == end or token in target.stop_tokens]
        text = target.tokenizer.decode(written[: ends[0]]).strip() if ends else ""
        if len(text) >= SHORTEST and accepts(text):
            texts[text] = None
    return list(texts)


def _template_around_user(target: LanguageModel) -> tuple[list[int], int]:
    """Tokens that the template puts before a user's first words, and the token that ends them."""
    tokenizer = target.tokenizer
    messages = [{"role": "user", "content": _MARK}]
    rendered = chat_prompt.render(tokenizer, messages, target.content_form).text
    before, mark, after = rendered.partition(_MARK)
    if not mark or not after:
        raise ModelError(f"the chat template of {target.name} does not show a user's words and their end")
    encode = tokenizer.encode
    return list(encode(before, add_special_tokens=False)), int(encode(after, add_special_tokens=False)[0])
