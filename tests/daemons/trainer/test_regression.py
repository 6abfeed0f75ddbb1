"""The regression slice is made once, and what a power cut has torn of it is made again."""

from types import SimpleNamespace

from specl.daemons.trainer import regression
from specl.daemons.trainer.regression import RegressionSlice
from tests.stored import write_target


def test_only_a_torn_chunk_is_generated_again(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "CHUNK", 2)
    monkeypatch.setattr(regression, "MAX_TOKENS", 4)
    target = write_target(tmp_path / "target", tied=True, quantised=False)
    encode = lambda messages: ("", [5, 9, 11 + len(messages[-1]["content"]) % 90])  # noqa: E731
    engine = SimpleNamespace(target=target, reads_states=True, encode_chat=encode)
    slice_of = lambda: RegressionSlice(tmp_path, engine, 4, lambda: None)  # noqa: E731
    first, folder = slice_of().examples(), slice_of().folder
    assert len(first) == 4 and all(example.states is not None for example in first)
    torn, other = sorted(folder.iterdir(), key=lambda path: path.name)
    whole, made_at, damaged = torn.read_bytes(), other.stat().st_mtime_ns, []
    monkeypatch.setattr(regression, "_damaged", damaged.append)
    for size in (0, 100, len(whole) - 1):
        torn.write_bytes(whole[:size])
        again = slice_of().examples()
        assert [example.id for example in again] == [example.id for example in first]
        assert all((a.tokens == b.tokens).all() for a, b in zip(again, first, strict=True))
    assert len(damaged) == 3 and other.stat().st_mtime_ns == made_at
