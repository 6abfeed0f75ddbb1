"""Builds the prompt files from the hand-written sources in `source/`; the same sources always give
the same files.

Templates, slot values, passages and code samples are plain text. Slot values and samples are cut
into disjoint parts, one for each split, so that a held-out prompt has another template and other
content than every training prompt. A prompt is dropped when it repeats another one, when it is too
similar to one of the same file, or when it shares eight words in a row with another file.

Run `python build_prompts.py` in this folder, then `python check.py`. Long because it is the record
of how the frozen files were made: it stands alone, needs nothing that is installed, and changes
only together with the files.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "source"
SEED = "speclora-prompts-1"
GRAM = 8
SIMILAR = 0.8

KINDS = (
    "chat", "explanation", "code", "editing", "lists", "mail", "stories", "dialogue", "qa", "summary", "rewording",
    "advice", "planning",
)  # fmt: skip
SPLITS = ("train", "heldout", "regression", "bench")
SHARES = {"train": 0.68, "heldout": 0.11, "regression": 0.10, "bench": 0.11}
CODE_SHARES = {"train": 0.56, "heldout": 0.14, "regression": 0.10, "bench": 0.20}
CODE_SLOTS = {"codetask", "codeconcept", "snippet"}
SHARED_SLOTS = {"lang"}
MINOR_SLOTS = {"lang", "tone", "name", "audience", "n", "m", "style"}

TRAIN_COUNTS = dict.fromkeys(KINDS, 300) | {"dialogue": 360, "code": 330, "editing": 320, "summary": 290}
HELDOUT_COUNTS = dict.fromkeys(KINDS, 18) | {"dialogue": 22, "code": 20}
REGRESSION_COUNTS = dict.fromkeys(KINDS, 15) | {"dialogue": 18, "code": 17}
GENERAL_COUNTS = dict.fromkeys(KINDS, 5) | {"chat": 4, "code": 3, "summary": 4, "rewording": 4}

TAILS = {
    "train": (
        "Keep it short.", "Thanks!", "Please be brief.", "Use simple words.", "No more than 100 words.", "Be creative.",
        "Take your time.", "One paragraph is enough.", "Give an example too.", "In plain English, please.",
        "Thank you 😊",
        "Around 150 words would be great.", "Surprise me.", "Don't use any lists.", "Use bullet points.",
        "End with a question.", "It's for school.", "It's for work.", "A few sentences will do.", "Be specific.",
        "Write it in British English.", "Start right away, no introduction.", "I'm in a hurry.", "Make it fun!",
        "Use short sentences.", "I am new to this.", "Go into detail, please.", "Explain your reasoning.",
        "Could you do that?", "Please.", "Cheers, and have a nice day.", "Avoid clichés.",
    ),
    "heldout": (
        "Thank you so much.", "Two paragraphs, tops.", "Nothing fancy.", "Add a touch of humour.", "No jargon, please!",
        "Stay under eighty words.", "My English is basic.", "As precise as you can.",
    ),
    "regression": (
        "Much appreciated.", "Half a page at most.", "Leave out the obvious.", "I like it concise.",
        "Feel free to joke.",
        "I'm on my phone.", "Give reasons.",
    ),
    "bench": ("Ta!", "Crisp, please.", "Medium length.", "Facts only."),
}  # fmt: skip
FORM = re.compile(
    r"words|sentence|paragraph|lines?\b|list|bullet|brief|short|rhyme|haiku|limerick|table", re.IGNORECASE
)
TAIL_KINDS = {"chat", "explanation", "lists", "mail", "stories", "qa", "advice", "planning"}
CASUAL_KINDS = {"chat", "qa", "advice"}

Message = dict[str, str]
Prompt = dict[str, Any]


def read_sections(path: Path) -> dict[str, list[str]]:
    """The ``[name]`` sections of a file, each as its non-empty lines without comments."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            current = sections.setdefault(line[1:-1], [])
        elif line.strip() and not line.startswith("#"):
            current.append(line.strip())
    return sections


def read_values(path: Path) -> dict[str, list[str]]:
    """The sections of a file whose lines hold values separated by `` | ``."""
    values: dict[str, list[str]] = {}
    for name, lines in read_sections(path).items():
        parts = [part.strip() for line in lines for part in line.split(" | ") if part.strip()]
        values[name] = parts if name in SHARED_SLOTS else list(dict.fromkeys(parts))
    return values


def read_passages(name: str) -> list[str]:
    """The passages of a split, one paragraph each."""
    return (SOURCE / f"passages_{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")


def cut(values: list[str], seed: str) -> dict[str, list[str]]:
    """Shuffle the values and cut them into one part for each split."""
    order = list(values)
    random.Random(f"{SEED}/{seed}").shuffle(order)
    parts: dict[str, list[str]] = {}
    shares = CODE_SHARES if seed in CODE_SLOTS else SHARES
    start, share = 0, 0.0
    for split in SPLITS:
        share += shares[split]
        end = len(order) if split == SPLITS[-1] else round(share * len(order))
        parts[split] = order[start:end]
        start = end
    return parts


def words(text: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"\w+", text.lower())


def text_of(messages: list[Message]) -> str:
    """All turns of a prompt as one text."""
    return "\n".join(message["content"] for message in messages)


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    """All runs of ``size`` words; the whole text when it is shorter."""
    all_words = words(text)
    return {tuple(all_words[i : i + size]) for i in range(max(1, len(all_words) - size + 1))}


def sentences(passage: str) -> list[str]:
    """The sentences of a passage, cut in a simple way."""
    return re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)\s+(?=[A-Z\"])", passage)


class Similarity:
    """Finds prompts of one file that are nearly the same."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._where: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Remember the text, unless most of its word triples are those of an earlier one."""
        triples = grams(text, 3)
        shared: Counter[int] = Counter()
        for triple in triples:
            shared.update(self._where.get(triple, ()))
        for index, count in shared.items():
            if count / (len(triples) + self._sizes[index] - count) > SIMILAR:
                return False
        for triple in triples:
            self._where[triple].append(len(self._sizes))
        self._sizes.append(len(triples))
        return True


class Filler:
    """Fills the slots of templates for one split and prefers values that it has used least."""

    def __init__(
        self, split: str, slots: dict[str, dict[str, list[str]]], passages: list[str], rng: random.Random
    ) -> None:
        self._slots = {name: parts[split] for name, parts in slots.items()}
        self._passages = passages
        self._rng = rng
        self._used: Counter[tuple[str, str]] = Counter()

    def _pick(self, name: str, taken: list[str]) -> str:
        if name in ("n", "m"):
            return str(self._rng.randint(3, 48) if name == "n" else self._rng.randint(2, 19))
        pool = self._passages if name in ("passage", "part") else self._slots[name]
        free = [value for value in pool if value not in taken] or pool
        if name in MINOR_SLOTS:
            return self._rng.choice(free)
        least = min(self._used[name, value] for value in free)
        value = self._rng.choice([value for value in free if self._used[name, value] <= least + 1])
        self._used[name, value] += 1
        return value

    def _part(self, passage: str) -> str:
        cuts = sentences(passage)
        length = min(len(cuts), self._rng.randint(2, 4))
        start = self._rng.randint(0, len(cuts) - length)
        return " ".join(cuts[start : start + length])

    def fill(self, template: str) -> str:
        """The template with every alternative chosen and every slot filled."""
        draw = self._rng.random()

        def either(match: re.Match[str]) -> str:
            options = match[1].split("~")
            return options[int(draw * len(options))]

        text = re.sub(r"\[\[(.+?)\]\]", either, template)
        taken: defaultdict[str, list[str]] = defaultdict(list)
        chosen: dict[str, str] = {}

        def value(match: re.Match[str]) -> str:
            slot, name = match[0], match[1]
            if slot not in chosen:
                picked = self._pick(name, taken["passage" if name == "part" else name])
                taken["passage" if name == "part" else name].append(picked)
                chosen[slot] = self._part(picked) if name == "part" else picked
            before = text[: match.start()].rstrip(' "\n')
            opens = not before or before[-1] in ".!?|" or before.endswith("SYS:")
            result = chosen[slot]
            if name in ("problem", "chatopen") and (before.endswith(":") or text[: match.start()].endswith('"')):
                opens = True
            return result[0].upper() + result[1:] if opens else result

        filled = re.sub(r"\{([a-z]+)\d?\}", value, text)
        filled = re.sub(r"([.!?])\"?\.(?=\s|$)", lambda match: match[0][:-1], filled.replace("\\n", "\n"))
        return re.sub(r"([?!])\?", r"\1", filled)


def to_messages(kind: str, text: str) -> list[Message]:
    """Turn a filled template into messages; those of a dialogue are separated by `` || ``."""
    turns = text.split(" || ") if kind == "dialogue" else [text]
    messages: list[Message] = []
    if turns[0].startswith("SYS: "):
        messages.append({"role": "system", "content": turns.pop(0)[5:]})
    for index, turn in enumerate(turns):
        content = turn.strip()
        messages.append({"role": "assistant" if index % 2 else "user", "content": content[0].upper() + content[1:]})
    return messages


class Builder:
    """Builds one file after another and keeps them apart."""

    def __init__(self) -> None:
        slots = read_values(SOURCE / "slots.txt")
        samples = (SOURCE / "snippets.txt").read_text(encoding="utf-8").strip().split("\n---\n")
        self.slots = {
            name: dict.fromkeys(SPLITS, values) if name in SHARED_SLOTS else cut(values, name)
            for name, values in slots.items()
        } | {"snippet": cut(samples, "snippet")}
        self._grams: dict[tuple[str, ...], str] = {}
        self._seen: set[str] = set()
        self._similar: defaultdict[str, Similarity] = defaultdict(Similarity)
        self.dropped: Counter[str] = Counter()

    def accept(self, file: str, messages: list[Message]) -> bool:
        """Whether the prompt may go into the file; if so it is remembered."""
        text = text_of(messages)
        runs = [run for run in grams(text, GRAM) if len(run) == GRAM]
        if text.lower() in self._seen or any(self._grams.get(run, file) != file for run in runs):
            self.dropped[file] += 1
            return False
        if not self._similar[file].add(text):
            self.dropped[file] += 1
            return False
        self._seen.add(text.lower())
        self._grams.update(dict.fromkeys(runs, file))
        return True

    def from_templates(self, file: str, split: str, counts: dict[str, int]) -> Iterator[Prompt]:
        """Prompts of every kind, taking the templates of each kind in turn."""
        short = file.rsplit("/", 1)[-1]
        rng = random.Random(f"{SEED}/{file}")
        passages = read_passages(short) if (SOURCE / f"passages_{short}.txt").exists() else []
        filler = Filler(split, self.slots, passages, rng)
        templates = read_sections(SOURCE / f"templates_{short}.txt")
        number = 0
        for kind, count in counts.items():
            count_made = tries = 0
            while count_made < count:
                index = tries % len(templates[kind])
                tries += 1
                if tries > 60 * count:
                    raise RuntimeError(f"{file}: cannot make {count} prompts of kind {kind}")
                messages = to_messages(kind, filler.fill(templates[kind][index]))
                self._vary(kind, split, messages, rng)
                if not self.accept(file, messages):
                    continue
                count_made += 1
                number += 1
                name = f"{short}-{kind}-{index + 1:02d}"
                yield {"id": f"{short}-{number:04d}", "kind": kind, "template": name, "messages": messages}

    def _vary(self, kind: str, split: str, messages: list[Message], rng: random.Random) -> None:
        last = messages[-1]
        if "\n" in last["content"]:
            return
        if kind in TAIL_KINDS and len(messages) == 1 and not FORM.search(last["content"]) and rng.random() < 0.4:
            joint = " " if last["content"][-1] in ".!?)" else "\n"
            last["content"] += joint + rng.choice(TAILS[split])
        if kind in CASUAL_KINDS and rng.random() < 0.08:
            last["content"] = last["content"].lower()

    def from_list(self, file: str, rows: list[tuple[str, str, str]]) -> Iterator[Prompt]:
        """Prompts that were written out as (kind, template, text)."""
        short = file.rsplit("/", 1)[-1]
        for number, (kind, template, text) in enumerate(rows, start=1):
            messages = [{"role": "user", "content": text}]
            if not self.accept(file, messages):
                raise RuntimeError(f"{file}: prompt {number} ({template}) is too close to another one:\n{text}")
            yield {
                "id": f"{short}-{number:04d}",
                "kind": kind,
                "template": f"{short}-{template}",
                "messages": messages,
            }


CHANGES = (
    ("map room", "coin room"), ("Marta", "Judit"), ("bed", "row"), ("Mr Patel", "Mr Ruiz"), ("pan", "wok"),
    ("Signe", "Astrid"), ("spoon", "ladle"), ("lamp", "mirror"), ("path", "trail"), ("Lena", "Noor"),
    ("weeks", "months"), ("Arvid", "Kalle"), ("green", "violet"), ("bicycle", "tricycle"), ("cakes", "buns"),
    ("free", "cheap"),
)  # fmt: skip
ENDINGS = (
    "No visitor has ever complained.", "That was the whole trip.", "The clover likes it too.",
    "Everybody walked home together.", "Lend it to nobody.",
)  # fmt: skip


def typo(text: str, rng: random.Random) -> str:
    """The text with two letters of one longer word swapped."""
    spots = [match for match in re.finditer(r"\b[a-z]{6,}\b", text) if match[0][2] != match[0][3]]
    at = rng.choice(spots).start() + 2
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def copy_prompts() -> list[tuple[str, str, str]]:
    """Edits whose answer repeats most of the prompt; each passage serves at most three quite
    different edits.
    """
    rng = random.Random(f"{SEED}/copy")
    passages = read_passages("bench")
    rows: list[tuple[str, str, str]] = []
    for index, passage in enumerate(passages):
        old, new = CHANGES[index]
        if not re.search(rf"\b{old}\b", passage):
            raise RuntimeError(f"passage {index} has no {old!r}")
        if index % 2:
            text = f'Rewrite the following text exactly, changing only "{old}" to "{new}".\n\n{passage}'
        else:
            text = f'{passage}\n\nCopy the text above word for word, but write "{new}" wherever it says "{old}".'
        rows.append(("editing", f"replace-{index % 2 + 1}", text))
    for index in range(0, 16, 2):
        lines = "\n".join(f"- {line}" for line in sentences(passages[index]))
        text = f"Repeat this list with a number in front of each item instead of the dash.\n\n{lines}"
        rows.append(("lists", "number", text))
    for index in range(1, 16, 4):
        flawed = typo(passages[index], rng)
        text = f"There is a single typo in here. Fix it and return the full text.\n\n{flawed}"
        rows.append(("editing", "typo", text))
    for index, ending in zip(range(3, 16, 4), ENDINGS[1:], strict=False):
        text = f'Return this text unchanged and add one more sentence at its end: "{ending}"\n\n{passages[index]}'
        rows.append(("editing", "append", text))
    for index in (5, 9, 11, 13):
        text = f"Put every sentence of this on a line of its own. Change no word.\n\n{passages[index]}"
        rows.append(("editing", "lines", text))
    for sample in (SOURCE / "copy_code.txt").read_text(encoding="utf-8").strip().split("\n---\n"):
        change, code = sample.split("\n", 1)
        old, new = change.split()
        text = f"Rename `{old}` to `{new}` everywhere and give back all of the code.\n\n{code}"
        rows.append(("code", "rename", text))
    return rows


def adversarial_prompts() -> list[tuple[str, str, str]]:
    """Prompts whose answers are hard to foresee."""
    rng = random.Random(f"{SEED}/adversarial")
    values = read_values(SOURCE / "adversarial_words.txt")
    plain = list(values["words"])
    rng.shuffle(plain)
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    rows: list[tuple[str, str, str]] = []
    for index in range(4):
        strings = " ".join("".join(rng.choice(letters) for _ in range(rng.randint(7, 16))) for _ in range(4))
        rows.append(("spelling", "spell", f"Spell these strings one character at a time, with hyphens: {strings}"))
        codes = ", ".join("".join(rng.choice(letters.upper()) for _ in range(6)) for _ in range(5))
        rows.append(("spelling", "backwards", f"Write each of these codes backwards: {codes}"))
        mixed = " ".join("".join(rng.sample(word, len(word))) for word in plain[index * 4 : index * 4 + 4])
        rows.append(("shuffled", "unscramble", f"Unscramble these four words: {mixed}"))
        bag = rng.sample(plain, 9)
        rows.append(("shuffled", "sort-last", f"Sort by last letter, then by first letter: {' '.join(bag)}"))
        step, grow, start = rng.randint(3, 17), rng.randint(2, 6), rng.randint(11, 400)
        series = [start]
        for _ in range(6):
            series.append(series[-1] + step)
            step += grow
        rows.append(("numbers", "series", f"Continue with ten further numbers: {', '.join(map(str, series))}, ..."))
        digits = " ".join(str(rng.randint(100, 9999)) for _ in range(12))
        text = f"Put these from largest to smallest, then give the sum of the odd ones: {digits}"
        rows.append(("numbers", "order", text))
        odd = ", ".join(rng.sample(values["nonsense"], 5))
        text = f"Compose an eight-line nonsense poem that uses {odd} and three new words of your own."
        rows.append(("nonsense", "poem", text))
        rows.append(("mixed", "languages", f"Go on in the same jumble of languages: {values['mixed'][index]}"))
        text = f"Reply with a sentence in five languages at once, like this one: {values['mixed'][index + 4]}"
        rows.append(("mixed", "imitate", text))
        rare = ", ".join(rng.sample(values["rare"], 6))
        rows.append(("names", "rare", f"{rare}: add ten equally rare names, none of them English."))
    return rows


def write(file: str, rows: list[Prompt]) -> None:
    """Write one prompt a line."""
    path = HERE / f"{file}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(prompt, ensure_ascii=False) for prompt in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Build every file; the ones that measure come first, so that training prompts give way to
    them.
    """
    builder = Builder()
    write("bench/copy", list(builder.from_list("bench/copy", copy_prompts())))
    write("bench/adversarial", list(builder.from_list("bench/adversarial", adversarial_prompts())))
    write("bench/code", list(builder.from_templates("bench/code", "bench", {"code": 40})))
    write("bench/general", list(builder.from_templates("bench/general", "bench", GENERAL_COUNTS)))
    write("regression", list(builder.from_templates("regression", "regression", REGRESSION_COUNTS)))
    write("heldout", list(builder.from_templates("heldout", "heldout", HELDOUT_COUNTS)))
    train = list(builder.from_templates("train", "train", TRAIN_COUNTS))
    random.Random(f"{SEED}/order").shuffle(train)
    write("train", train)
    print("dropped:", dict(builder.dropped))


if __name__ == "__main__":
    main()
