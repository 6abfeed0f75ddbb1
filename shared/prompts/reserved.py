"""Seeded generator of the three reserved kinds of prompt, which stand for daily work that no draft
saw when it was built.

They must not appear in any training file; `check.py` looks for them. Every kind has a few schemas
with one fixed instruction each, as from a user who does the same work every day, filled with new
values (source/reserved_values.json) every time.

The two splits use the same schemas with disjoint names, towns, products, hosts and so on, so that
they share no prompt: `live` is traffic that a draft may learn from while the server runs, `unseen`
are the prompts that its gain is measured on. Only `random.Random.random` is used, whose sequence
for a given string seed is the same in every Python 3 version.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

__all__ = ["KINDS", "SPLITS", "TRACES", "prompts"]

KINDS: tuple[str, ...] = ("record-to-json", "sql-from-a-sentence", "log-line-summary")
SPLITS: tuple[str, ...] = ("live", "unseen")
TRACES = re.compile(r"json|sql|select .* from|log line|log entr|stack trace|yaml|csv", re.IGNORECASE)


@cache
def _values() -> dict[str, list[str]]:
    """The lists of values. Each is cut in two: of each four neighbours, three belong to "live" and
    one to "unseen".
    """
    path = Path(__file__).parent / "source" / "reserved_values.json"
    values: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return values


class _Source:
    """Random choices for one split."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self._split = split
        self._rng = rng

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._rng.random() * (high - low + 1))

    def any(self, values: Sequence[str]) -> str:
        """One of the values, whatever the split."""
        return values[int(self._rng.random() * len(values))]

    def value(self, name: str) -> str:
        """One value of the named list, from this split's part of it."""
        unseen = self._split == "unseen"
        return self.any([item for index, item in enumerate(_values()[name]) if (index % 4 == 3) == unseen])

    def person(self) -> str:
        """A first and a last name."""
        return f"{self.value('first')} {self.value('last')}"

    def date(self) -> str:
        """A day and a month; months are shared by the splits."""
        return f"{self.number(1, 28)} {self.any(_values()['month'])}"

    def clock(self) -> tuple[str, str, str, str]:
        """Four rising times of one morning or afternoon, as hh:mm:ss."""
        second = self.number(6 * 3600, 22 * 3600)
        times: list[str] = []
        for _ in range(4):
            times.append(f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}")
            second += self.number(1, 90)
        return times[0], times[1], times[2], times[3]


def _record_person(s: _Source) -> str:
    record = s.any(
        (
            "{name} is {age} years old, lives in {town} and works as a {job}.",
            "Our new member is {name} from {town}. Age: {age}. Occupation: {job}.",
            "{name}, {age}, is a {job} and has a flat in {town}.",
        )
    ).format(name=s.person(), age=s.number(19, 74), town=s.value("town"), job=s.value("job"))
    return f"Turn this record into JSON with the keys name, age, city and job.\n\n{record}"


def _record_order(s: _Source) -> str:
    record = s.any(
        (
            "{name} ordered {count} {product} on {date}. The order number is {order} and the total is {total} euros.",
            "Order {order}, placed on {date} by {name}: {count} {product}, {total} euros in total.",
            "On {date} we received order {order}. {name} wants {count} {product} and pays {total} euros.",
        )
    ).format(
        name=s.person(),
        count=s.number(2, 60),
        product=s.value("product"),
        date=s.date(),
        order=s.number(1000, 9999),
        total=s.number(12, 980),
    )
    keys = "order, customer, product, quantity, date and total"
    return f"Turn this order into JSON with the keys {keys}.\n\n{record}"


def _record_device(s: _Source) -> str:
    record = s.any(
        (
            "The {device} in {room} was made by {maker}. It was bought in {year} and its serial number is {serial}.",
            "Serial number {serial}: a {device} by {maker}, bought in {year}, now in {room}.",
            "In {room} there is a {maker} {device} from {year} with the serial number {serial}.",
        )
    ).format(
        device=s.value("device"),
        room=s.value("room"),
        maker=s.value("maker"),
        year=s.number(2009, 2025),
        serial=f"{s.any('ABCDEFGH')}{s.any('JKLMNP')}-{s.number(10000, 99999)}",
    )
    return f"Turn this inventory note into JSON with the keys device, maker, year, serial and location.\n\n{record}"


def _record_booking(s: _Source) -> str:
    record = s.any(
        (
            "{name} booked {nights} nights at {hotel} in {town}, arriving on {date}, for {guests} guests.",
            "Booking for {name}: {hotel}, {town}, from {date}, {nights} nights, {guests} guests.",
            "{hotel} in {town} expects {name} and company, {guests} guests in all, on {date} for {nights} nights.",
        )
    ).format(
        name=s.person(),
        nights=s.number(2, 14),
        hotel=s.value("hotel"),
        town=s.value("town"),
        date=s.date(),
        guests=s.number(2, 6),
    )
    keys = "guest, hotel, city, arrival, nights and guests"
    return f"Turn this booking into JSON with the keys {keys}.\n\n{record}"


def _record_pet(s: _Source) -> str:
    record = s.any(
        (
            "{pet_name} is a {pet} of {age} years. The owner is {name}, and the weight today was {weight} kg.",
            "Owner {name} came with {pet_name}, a {pet}, {age} years old and {weight} kg.",
            "Patient: {pet_name}, {pet}, {age} years, {weight} kg. Owner: {name}.",
        )
    ).format(
        pet_name=s.value("petname"),
        pet=s.any(_values()["pet"]),
        age=s.number(2, 14),
        name=s.person(),
        weight=f"{s.number(1, 29)}.{s.number(1, 9)}",
    )
    return f"Turn this vet's note into JSON with the keys pet, species, age, weight and owner.\n\n{record}"


def _sql_customers(s: _Source) -> str:
    question = s.any(
        (
            "Which customers live in {town}?",
            "How many customers from {town} are older than {age}?",
            "What are the names of the customers in {town} who are younger than {age}?",
            "What is the average age of the customers in {town}?",
            "Is there a customer called {name} in {town}?",
        )
    ).format(town=s.value("town"), age=s.number(20, 70), name=s.person())
    return f"The table customers has the columns id, name, age and city. Write one SQL query.\n\nQuestion: {question}"


def _sql_orders(s: _Source) -> str:
    question = s.any(
        (
            "Which orders contain {product} with a quantity above {count}?",
            "How many {product} has {name} ordered?",
            "What is the highest price of an order of {product} since {year}?",
            "Which customers ordered {product} in {year}?",
            "What was the total price of all orders by {name} in {year}?",
        )
    ).format(product=s.value("product"), count=s.number(2, 90), name=s.person(), year=s.number(2008, 2025))
    columns = "id, customer, product, quantity, price and year"
    return f"The table orders has the columns {columns}. Write one SQL query.\n\nQuestion: {question}"


def _sql_books(s: _Source) -> str:
    question = s.any(
        (
            "Which books by {name} were published after {year}?",
            "How many {genre} books did {name} write?",
            "What is the longest book by {name}, by pages?",
            "Which {genre} books by {name} have fewer than {pages} pages?",
            "List the titles by {name} from the year {year}, in alphabetical order.",
        )
    ).format(name=s.person(), year=s.number(1950, 2024), genre=s.any(_values()["genre"]), pages=s.number(9, 60) * 10)
    columns = "id, title, author, genre, pages and year"
    return f"The table books has the columns {columns}. Write one SQL query.\n\nQuestion: {question}"


def _sql_employees(s: _Source) -> str:
    question = s.any(
        (
            "Who works in {department} in {town} and earns more than {pay}?",
            "How many people in {town} work as a {job}?",
            "What is the highest salary of a {job} in {town}?",
            "Which department does {name} work in?",
            "Who in {town} was hired before {year}, sorted by salary?",
        )
    ).format(
        department=s.any(_values()["department"]),
        town=s.value("town"),
        pay=s.number(24, 95) * 1000,
        job=s.value("job"),
        name=s.person(),
        year=s.number(1995, 2024),
    )
    columns = "id, name, job, department, city, salary and hired"
    return f"The table employees has the columns {columns}. Write one SQL query.\n\nQuestion: {question}"


def _sql_grades(s: _Source) -> str:
    question = s.any(
        (
            "What grade did {name} get in {subject}?",
            "What is the average grade of {name} in {year}?",
            "In which subjects did {name} get more than {grade} points?",
            "How many grades does {name} have in {subject} since {year}?",
        )
    ).format(name=s.person(), subject=s.any(_values()["subject"]), year=s.number(2010, 2025), grade=s.number(40, 95))
    columns = "id, student, subject, points and year"
    return f"The table grades has the columns {columns}. Write one SQL query.\n\nQuestion: {question}"


_SUMMARISE = "Summarise what happened in one sentence."


def _log_disk(s: _Source) -> str:
    host, (a, b, c, d) = s.value("host"), s.clock()
    full = s.number(91, 98)
    lines = [
        f"{a} {host} WARN disk /var at {full}%",
        f"{b} {host} ERROR disk /var at 100%, writes to {s.value('service')} failed",
        f"{c} {host} INFO removed {s.number(3, 80)} old files",
        f"{d} {host} INFO disk /var at {s.number(41, 79)}%",
    ]
    return f"These are log lines of a server. {_SUMMARISE}\n\n" + "\n".join(lines[: s.number(2, 4)])


def _log_login(s: _Source) -> str:
    user, host, (a, b, c, d) = s.value("user"), s.value("host"), s.clock()
    address = f"10.{s.number(0, 255)}.{s.number(0, 255)}.{s.number(2, 254)}"
    ending = s.any((f"INFO account {user} locked for {s.number(5, 60)} minutes", f"INFO login ok for user {user}"))
    lines = [
        f"{a} {host} WARN wrong password for user {user} from {address}",
        f"{b} {host} WARN wrong password for user {user} from {address}",
        f"{c} {host} WARN wrong password for user {user} from {address}",
        f"{d} {host} {ending}",
    ]
    return f"These are log lines of a login service. {_SUMMARISE}\n\n" + "\n".join(lines[s.number(0, 2) :])


def _log_deploy(s: _Source) -> str:
    service, host, (a, b, c, d) = s.value("service"), s.value("host"), s.clock()
    new, old = f"{s.number(2, 9)}.{s.number(0, 30)}", f"1.{s.number(0, 30)}"
    lines = [
        f"{a} deploy {service} {new} to {host} started",
        f"{b} health check of {service} on {host} failed with status {s.any(('500', '502', '503', '504'))}",
        f"{c} rolling back {service} to {old}",
        f"{d} {service} {old} is running on {host}",
    ]
    return f"These are log lines of a deployment. {_SUMMARISE}\n\n" + "\n".join(lines[: s.number(2, 4)])


def _log_backup(s: _Source) -> str:
    service, host, (a, b, c, _) = s.value("service"), s.value("host"), s.clock()
    ending = s.any(
        (
            f"backup of {service} finished, {s.number(2, 900)} MB",
            f"backup of {service} aborted: host {host} not reachable",
            f"backup of {service} finished with {s.number(2, 40)} files skipped",
        )
    )
    lines = [
        f"{a} backup of {service} to {host} started by {s.value('user')}",
        f"{b} connection to {host} slow, {s.number(2, 9)} retries",
        f"{c} {ending}",
    ]
    return f"These are log lines of a nightly backup. {_SUMMARISE}\n\n" + "\n".join(lines)


def _log_queue(s: _Source) -> str:
    service, user, (a, b, c, d) = s.value("service"), s.value("user"), s.clock()
    job = s.number(1000, 99999)
    ending = s.any((f"job {job} done after {s.number(2, 6)} tries", f"job {job} given up, mail sent to {user}"))
    lines = [
        f"{a} queue {service}: job {job} added by {user}",
        f"{b} queue {service}: job {job} failed, {s.any(('timeout', 'file missing', 'out of memory', 'no route'))}",
        f"{c} queue {service}: job {job} tried again",
        f"{d} queue {service}: {ending}",
    ]
    return f"These are log lines of a job queue. {_SUMMARISE}\n\n" + "\n".join(lines)


_SCHEMAS: dict[str, tuple[Callable[[_Source], str], ...]] = {
    "record-to-json": (_record_person, _record_order, _record_device, _record_booking, _record_pet),
    "sql-from-a-sentence": (_sql_customers, _sql_orders, _sql_books, _sql_employees, _sql_grades),
    "log-line-summary": (_log_disk, _log_login, _log_deploy, _log_backup, _log_queue),
}


def prompts(kind: str, count: int, *, seed: int = 0, split: str = "live") -> list[str]:
    """`count` distinct prompts of a reserved kind. The same arguments always give the same list,
    and a shorter list is the beginning of a longer one; thousands are possible. Another seed gives
    other prompts, of which a few may occur under both.

    Raises ValueError for an unknown kind or split, and for a count that is negative or so large
    that no new prompt is found.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError("count must not be negative")
    source = _Source(split, random.Random(f"speclora/{split}/{kind}/{seed}"))
    schemas = _SCHEMAS[kind]
    texts: dict[str, None] = {}
    repeats = 0
    while len(texts) < count:
        schema = schemas[source.number(0, len(schemas) - 1)]
        prompt = schema(source)
        if prompt in texts:
            repeats += 1
            if repeats > 1000 + 10 * count:
                raise ValueError(f"cannot make {count} distinct prompts of kind {kind!r}")
        texts[prompt] = None
    return list(texts)
