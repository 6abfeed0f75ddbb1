"""The bench on a tiny random model: everything but the speed is real."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specl.cli.main import main
from specl.shared.bench import measure as measuring
from specl.shared.bench import prompt_sets
from specl.shared.bench.arms import PLAIN, ArmResult, EngineArm, MlxSpeculativeArm, PlainArm, timed, top_two
from specl.shared.bench.concurrency import concurrent_rate
from specl.shared.bench.measure import Plan, Run, measure
from specl.shared.bench.report import as_json, equality, groups, hindsight, ratio
from specl.shared.bench.text_equality import TopTwo, compare, copied_share, first_difference, repeated_share
from specl.shared.engine.core import EngineCore
from specl.shared.engine.costs import Costs
from specl.shared.errors import ConfigError
from specl.shared.models.load import load
from specl.shared.sampling_params import SamplingParams

END = "<|im_end|>"
FROZEN = {
    "general": "391e9ee52cc8",
    "code": "f74ff1b1f36a",
    "structured": "21c75e341450",
    "copy": "9e29ca0b5494",
    "adversarial": "f101eb90dd4c",
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def write_model(folder, seed, layers=2):
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "intermediate_size": 64, "num_attention_heads": 4}
    rest = {"rms_norm_eps": 1e-5, "vocab_size": 257, "num_key_value_heads": 2, "tie_word_embeddings": False}
    shape = {"model_type": "llama", "max_position_embeddings": 2048, "eos_token_id": 256} | sizes | rest
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(shape))
    # weights three times the usual: sharp enough distributions, so that rounding decides no argmax
    weights = {name: value * 3 if value.ndim == 2 else value for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(shape))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    target = write_model(root / "target", 1)
    # a draft that agrees often, not always: the target with noise on its weights
    draft = write_model(root / "draft", 1)
    weights = mx.load(str(draft / "model.safetensors"))
    mx.random.seed(5)
    noisy = {name: value + 0.02 * mx.random.normal(value.shape) * value.ndim for name, value in weights.items()}
    mx.save_safetensors(str(draft / "model.safetensors"), noisy, metadata={"format": "mlx"})
    return target, draft


@pytest.fixture(scope="module")
def engine(folders, tmp_path_factory):
    models = tmp_path_factory.mktemp("none")
    target, draft = (load(str(folder), models) for folder in folders)
    made = EngineCore(target, draft)
    made.costs = Costs({1: 1.0, 8: 1.2}, {1: 0.05, 8: 0.4})
    return made


@pytest.fixture(scope="module")
def runs(engine):
    sampling = SamplingParams()
    arms = [
        PlainArm(engine.target, sampling),
        MlxSpeculativeArm(engine.target, engine.draft, 2, sampling),
        EngineArm("k=0", engine, sampling, 0, ngram=False),
        EngineArm("k=4", engine, sampling, 4, ngram=False),
        EngineArm("auto fast, no n-gram", engine, sampling, None, ngram=False),
        EngineArm("auto fast", engine, sampling, None, ngram=True),
        EngineArm("auto detailed", engine, sampling, None, ngram=True, capture_k=8),
    ]
    items = [*prompt_sets.pick("general", 3), *prompt_sets.pick("copy", 2)]
    seen = []
    found = measure(engine, Plan(items, 40, 1, arms), True, seen.append)
    assert [progress.done for progress in seen] == [7, 14, 21, 28, 35]
    assert seen[-1].left_s == 0
    return found


# ------------------------------------------------------------------------------------------------ texts
def test_repeats_count_8_grams_that_stood_before():
    assert repeated_share(list(range(50))) == 0
    assert repeated_share([1, 2, 3, 4] * 10) == pytest.approx(1 - 4 / 33)
    assert repeated_share([1, 2]) == 0


def test_copies_count_tokens_inside_spans_of_the_prompt():
    prompt = list(range(20))
    assert copied_share(prompt, list(range(5, 15))) == 1
    assert copied_share(prompt, [*range(5, 13), 99, 99]) == pytest.approx(0.8)
    assert copied_share(prompt, [3, 4, 5]) == 0


def test_prefix_lists_differ_at_the_shorter_end():
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2], [1, 2]) is None


def never(start, left):
    raise AssertionError("nothing to resume")


def test_equal_texts_need_no_look_at_the_target():
    assert compare([1, 2, 3], [1, 2, 3], never, never, 1e-3).verdict == "equal"


def test_tie_is_logged_and_checking_resumes():
    resumed = []

    def resume(start, left):
        resumed.append((start, left))
        return [7, 8]

    found = compare([1, 2, 7, 8], [1, 5, 9, 9], lambda i: TopTwo(5, 2, 1e-4), resume, 1e-3)
    assert found.verdict == "tie"
    assert (found.ties[0].position, found.ties[0].expected, found.ties[0].got) == (1, 2, 5)
    assert resumed == [([1, 2], 2)]


def test_a_difference_behind_a_tie_is_still_found():
    tops = {1: TopTwo(5, 2, 1e-4), 3: TopTwo(8, 4, 2.0)}
    found = compare([1, 2, 7, 8], [1, 5, 9, 9], tops.__getitem__, lambda start, left: [7, 4], 1e-3)
    assert (found.verdict, found.position, len(found.ties)) == ("different", 3, 1)


@pytest.mark.parametrize("best", [TopTwo(5, 2, 0.5), TopTwo(6, 2, 1e-5)])
def test_wide_gap_or_other_token_is_no_tie(best):
    assert compare([1, 2], [1, 5], lambda i: best, never, 1e-3).verdict == "different"


def test_arm_without_resume_leaves_the_rest_unchecked():
    found = compare([1, 2, 3], [1, 5, 3], lambda i: TopTwo(2, 5, 0.0), lambda start, left: None, 1e-3)
    assert found.verdict == "unchecked"


def test_top_two_looks_at_the_target_itself(engine):
    prompt = [10, 20, 30, 40]
    logits = np.array(engine.target.model(mx.array([prompt]))[0, -1])
    best = top_two(engine.target, prompt[:2], prompt[2:])
    assert best.first == logits.argmax()
    assert best.gap == pytest.approx(np.sort(logits)[-1] - np.sort(logits)[-2], abs=1e-4)


# ------------------------------------------------------------------------------------------------ measuring
def test_the_clock_leaves_the_first_piece_out():
    answer = timed(iter([[1, 2], [3], [4]]))
    assert (answer.tokens, answer.first) == ([1, 2, 3, 4], 2)
    assert answer.tokens_per_second == pytest.approx(2 / answer.decode_s)


def test_every_arm_writes_the_reference_text(runs):
    assert len(runs) == 35
    checked = [run for run in runs if run.arm != PLAIN]
    assert all(run.comparison.verdict in ("equal", "tie") for run in checked)
    assert all(run.comparison is None for run in runs if run.arm == PLAIN)


def test_a_wrong_text_is_found(engine):
    item = prompt_sets.pick("general", 1)[0]
    _, prompt = engine.encode_chat(item.messages)
    arm = PlainArm(engine.target, SamplingParams())
    expected = arm.run(item, prompt, 12).tokens
    wrong = [*expected[:5], (expected[5] + 1) % 256, *expected[6:]]
    found = measuring.check(engine, arm, prompt, expected, wrong)
    assert (found.verdict, found.position) == ("different", 5)


def test_the_draft_is_both_believed_and_refused(runs):
    answers = [run.result for run in runs if run.arm == "k=4"]
    assert sum(answer.accepted for answer in answers) > 0
    assert sum(answer.rejected for answer in answers) > 0
    assert all(answer.rejected <= answer.drafted - answer.accepted for answer in answers)


def test_the_order_of_the_arms_rotates(runs):
    assert runs[0].arm == PLAIN
    assert runs[7].arm != PLAIN


def test_the_report_is_json_with_every_run(runs):
    report = json.loads(json.dumps(as_json(runs)))
    assert set(report) == {"groups", "hindsight", "equality", "apart", "runs"}
    assert len(report["runs"]) == 35
    assert report["runs"][0]["tokens"] == 40
    rows = next(iter(report["groups"].values()))
    assert rows[0]["arm"] == PLAIN
    assert rows[0]["ratio"]["median"] == 1


# ------------------------------------------------------------------------------------------------ report
def a_run(arm, seconds, prompt="p", tokens=21, set="general", repeated=0.0, copied=0.0, **counts):
    answer = ArmResult(tokens=list(range(tokens)), first=1, ttft_s=0.1, decode_s=seconds, **counts)
    return Run(set, prompt, 0, arm, 5, answer, repeated, copied, counts.pop("comparison", None))


def test_ratios_are_medians_of_single_prompts():
    found = ratio([(2, 1), (3, 1), (10, 1), (5, 0)])
    assert (found.median, found.low, found.high, found.n) == (3, 2, 10, 3)
    assert ratio([]).median is None


def test_looping_and_short_answers_leave_the_headline():
    made = [a_run(arm, 1.0, prompt) for arm in (PLAIN, "auto fast") for prompt in "ab"]
    made += [a_run(PLAIN, 1.0, "loop", repeated=0.5), a_run("auto fast", 0.1, "loop", repeated=0.5)]
    made += [a_run(PLAIN, 1.0, "brief", tokens=3), a_run("auto fast", 0.1, "brief", tokens=3)]
    found = groups(made)
    assert {run.prompt for run in found["general"]} == {"a", "b"}
    assert {run.prompt for run in found["apart: looping"]} == {"loop"}
    assert as_json(made)["apart"] == {"looping": 1, "short": 1}


def test_copying_is_reported_by_the_share_copied():
    made = [a_run(PLAIN, 1.0, str(share), set="copy", copied=share) for share in (0.9, 0.7, 0.1)]
    found = groups(made)
    assert [len(found[label]) for label in ("copied >= 0.75", "copied 0.6 to 0.75", "copied < 0.6")] == [1, 1, 1]


def test_hindsight_compares_auto_with_the_best_fixed_length():
    made = [a_run("k=0", 2.0), a_run("k=4", 1.0), a_run("auto fast", 0.8), a_run("auto fast, no n-gram", 1.25)]
    found = hindsight(made)["general"]
    assert found["best_fixed"] == "k=4"
    assert found["auto fast"] == pytest.approx(1.25)
    assert found["auto fast, no n-gram"] == pytest.approx(0.8)


def test_too_little_drafting_is_inconclusive(runs):
    found = equality(runs)
    assert not found["k=0"]["conclusive"]
    assert found["k=4"]["drafted"] > 100


# ------------------------------------------------------------------------------------------------ sets, crowd, command
def test_the_sets_are_frozen():
    known = {name: prompt_sets.sha256(name)[:12] for name in prompt_sets.NAMES}
    assert known == FROZEN


def test_picks_are_spread_and_distinct():
    found = prompt_sets.pick("structured", 6)
    assert len({item.id for item in found}) == 6
    assert len(prompt_sets.pick("copy", 1000)) == 40


def test_concurrent_workers_share_work_and_raise_errors():
    items = prompt_sets.pick("general", 7)
    assert concurrent_rate(lambda: lambda item: 10, 3, items) > 0

    def broken(item):
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        concurrent_rate(lambda: broken, 2, items)


def test_the_command_writes_everything(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPECL_VAR", str(tmp_path / "var"))
    target, draft = folders
    file = tmp_path / "bench.json"
    main(
        [
            "bench",
            "--prompt",
            "hello there",
            "--iterations",
            "2",
            "--tokens",
            "24",
            "--no-daemon",
            "--k",
            "0,2",
            "--mlx-k",
            "1,2",
        ]
        + ["--target", str(target), "--draft", str(draft), "--json", str(file)]
    )
    report = json.loads(file.read_text())
    assert {run["arm"] for run in report["runs"]} >= {PLAIN, "k=0", "k=2", "mlx-lm speculative K=1", "auto detailed"}
    assert report["options"]["iterations"] == 2
    assert "texts of k=2" in capsys.readouterr().out


def test_a_bad_list_of_lengths_is_bad_usage():
    with pytest.raises(SystemExit) as error:
        main(["bench", "--k", "1,99"])
    assert error.value.code == 2
