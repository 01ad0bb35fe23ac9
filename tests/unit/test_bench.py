"""``moray bench``: what is asked for, the arithmetic, and the structure of what it prints. No time is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numba
import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

from moray.deploy.bench.decode import Generated, Prompts, Spent, TokenCost
from moray.deploy.bench.kernels import is_supported
from moray.deploy.bench.kernels_report import verdict
from moray.deploy.bench.options import LAYERS, Coding, make_options, parse_codings, parse_shape
from moray.deploy.bench.pairs import Spread, busy_warning, ratios, time_in_turns
from moray.deploy.bench.working_set import describe_pages, working_set
from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.runtime.errors import ConfigError
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.generation.request import Usage
from moray.runtime.kernels.dequantize import dequantize
from moray.runtime.layout.packed import ENCODINGS, PackedSpec
from moray.runtime.model.families import build_model, load_config
from moray.runtime.model.weights_read import trunk_bytes_read
from moray.runtime.planning.sizes import parse_bytes
from moray.runtime.store.store import Store


@pytest.fixture
def same_threads() -> Iterator[None]:
    """A benchmark sets this process's threads."""
    before = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def moray(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


# -------------------------------------------------------------------------------------- asked


def test_encodings_have_default_groups() -> None:
    assert parse_codings("q8, q4:32,q2,q3:64:u8,bf16,q8:64") == (
        Coding("q8", 64),
        Coding("q4", 32),
        Coding("q2", 16),
        Coding("q3", 64, "u8"),
        Coding("bf16"),
    )


def test_codings_in_words() -> None:
    assert [str(c) for c in parse_codings("q4,q4:64:u8,bf16")] == ["q4 g64", "q4 g64 u8", "bf16"]


def test_sizes_and_shapes() -> None:
    assert [parse_bytes(text) for text in ("512MB", "1GiB", "1.5 KB", "77")] == [512 * 10**6, 1 << 30, 1500, 77]
    assert parse_shape("14336x4096") == (14336, 4096)


@pytest.mark.parametrize("text", ["", "0", "-5MB", "much", "5XB", "MB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--working-set"):
        parse_bytes(text, option="--working-set")


def test_a_quick_run_is_small_unless_told() -> None:
    full = make_options("q4", None, 2, None, None, "int8", quick=False)
    assert (full.rows, full.columns, full.pairs, full.tokens) == (14336, 4096, 5, (16, 64, 256))
    assert full.num_matrices(Coding("q4", 64)) == -(-512_000_000 // (14336 * 4096 * 9 // 16))
    quick = make_options("q4", None, 2, None, 3, "int8", quick=True)
    assert quick.needed_bytes < full.needed_bytes / 10 and quick.pairs == 3


def test_layers_fill_the_working_set() -> None:
    mixtral, fine = LAYERS
    coding = Coding("q4", 64)
    assert mixtral.expert_bytes(coding) == 3 * 14336 * 4096 * 9 // 16
    assert mixtral.num_copies(coding, 512_000_000) == 1 and fine.num_copies(coding, 512_000_000) == 2
    assert all(layer.num_experts % layer.top_k == 0 for layer in LAYERS)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--encodings", "q5"], "unknown encoding 'q5'"),
        (["--encodings", "q4:64:u9"], "q4:64:u9"),
        (["--encodings", "q4:x"], "q4:x"),
        (["--encodings", "bf16:64"], "no groups"),
        (["--encodings", "q4", "--shape", "64"], "ROWSxCOLUMNS"),
        (["--encodings", "q4", "--shape", "0x64"], "ROWSxCOLUMNS"),
        (["--encodings", "q4", "--shape", "128x100"], "group 64 is not legal for 100 columns"),
        (["--encodings", "q8::u8"], "second-level"),
        (["--working-set", "lots"], "--working-set"),
        (["--working-set", "9000000GB"], "--working-set"),
        (["--shape", "9000000x4194304"], "--shape"),
        (["--threads", "0"], "--threads"),
        (["--pairs", "0"], "--pairs"),
        (["--numerics", "gpu"], "--numerics"),
    ],
)
def test_bad_input_to_kernels(arguments: list[str], fragment: str) -> None:
    refused(moray("kernels", "--quick", *arguments), fragment)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["/nowhere"], "/nowhere"),
        (["--new-tokens", "1"], "--new-tokens"),
        (["--prompt-tokens", "1"], "--prompt-tokens"),
        (["--repeat", "0"], "--repeat"),
        (["--hosts", "0"], "hosts"),
    ],
)
def test_bad_input_to_decode(arguments: list[str], fragment: str) -> None:
    refused(moray("decode", *arguments), fragment)


def refused(result: Result, fragment: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and fragment in lines[0], result.output


# --------------------------------------------------------------------------------- arithmetic


def test_turns_begin_with_another_subject_each_round() -> None:
    order: list[str] = []
    now = 0.0

    def subject(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds

    subjects = {"a": lambda: subject("a", 1.0), "b": lambda: subject("b", 2.0), "c": lambda: subject("c", 4.0)}
    assert time_in_turns(subjects, 3, clock=lambda: now, wait=lambda _: None) == {
        "a": [1.0] * 3,
        "b": [2.0] * 3,
        "c": [4.0] * 3,
    }
    assert order == list("cab" + "abc" + "bca" + "cab")


def test_ratios_are_to_the_best_of_the_same_round() -> None:
    # 12 units in 2 s and 3 s, against 12 in 1 s and 6 s, and 24 in 4 s and 2 s
    assert ratios(12, [2, 3], [(12, [1, 6]), (24, [4, 2])]) == [6 / 12, 4 / 12]


def test_spread() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(median=2.0, low=1.0, high=3.0) and spread.variation == 3


def test_a_busy_machine_is_named() -> None:
    assert busy_warning(1.1) == [] and "factor of 2.0" in busy_warning(2.04)[0]


def test_verdicts() -> None:
    assert [verdict(0.85, 0.85), verdict(0.84, 0.85), verdict(0.5, None)] == ["0.85 met", "0.85 missed", ""]


def stats(calls: int, num_bytes: int, seconds: float) -> ExpertsStats:
    return ExpertsStats([[0]], {"host-0": num_bytes, "host-1": 0}, calls, calls, seconds, 2 * seconds, 3 * seconds)


def test_the_cost_of_a_token() -> None:
    spent = Spent.between(stats(10, 500, 1.0), stats(50, 2500, 3.0))  # 40 calls of 4 layers: 10 tokens
    cost = TokenCost.of(spent, num_layers=4, decode_rate=0.5, trunk_bytes=300)
    assert (cost.grouping_s, cost.leases_s, cost.kernel_s) == (0.2, 0.4, 0.6)
    assert cost.total_s == 2 and cost.rest_s == pytest.approx(0.8)
    assert cost.expert_bytes == 200 and cost.bytes_per_s == 250


def test_a_prompt_that_was_computed_again_is_taken_off() -> None:
    prefill = Spent.between(stats(0, 0, 0.0), stats(4, 900, 1.0))
    both = Spent.between(stats(4, 900, 1.0), stats(44, 3800, 4.0))
    assert both.without(prefill) == Spent.between(stats(0, 0, 0.0), stats(36, 2000, 2.0))


def test_decode_counts_tokens_after_the_first() -> None:
    assert Generated(5, first_s=1.0, last_s=3.0, usage=Usage(2, 0, 5)).decode_rate == 2


def test_prompts_begin_differently() -> None:
    prompts = Prompts(10)
    made = [prompts.make(4) for _ in range(7)]
    assert len({prompt[0] for prompt in made}) == 7 and {len(prompt) for prompt in made} == {4}
    assert all(0 <= token < 10 for prompt in made for token in prompt)
    with pytest.raises(ConfigError, match="--repeat"):
        prompts.make(4)


def test_trunk_bytes_of_the_embedded_model(demo: Store) -> None:
    model = build_model(load_config(demo_store()), torch.float32, "meta")
    # Every trunk weight is read (the embedding is the output head too); those that are not packed as float32.
    loose = sum(p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed(demo))
    assert trunk_bytes_read(model, demo.manifest, "cpu") == 4 * loose + sum(s.num_bytes for s in packed(demo).values())


def packed(store: Store) -> dict[str, PackedSpec]:
    return store.manifest.packed_trunk


def test_an_input_embedding_of_its_own_is_not_read(demo: Store) -> None:
    config = load_config(demo_store())
    tied = trunk_bytes_read(build_model(config, torch.float32, "meta"), demo.manifest, "cpu")
    config.tie_word_embeddings = False
    untied = trunk_bytes_read(build_model(config, torch.float32, "meta"), demo.manifest, "cpu")
    embedding = demo.manifest.packed_trunk["model.embed_tokens"].num_bytes
    assert untied == tied - embedding + 4 * config.vocab_size * config.hidden_size  # a head in float32


# -------------------------------------------------------------------------------- working set


@pytest.mark.parametrize(
    "coding", [*(f"{e}:16" for e in ("q8", "q4", "q2")), "q3:32", "q4:16:u8", "q3:32:u8", "q2:16:u8", "bf16", "f32"]
)
def test_working_sets_are_matrices_of_ordinary_numbers(coding: str) -> None:
    (parsed,) = parse_codings(coding)
    specs = [parsed.spec(20, 96), parsed.spec(33, 64)]
    with working_set(specs, 3) as made:
        assert made.num_bytes == 3 * sum(spec.num_bytes for spec in specs)
        assert made.addresses.shape == (3, 2) and (made.addresses % 64 == 0).all()
        assert made.addresses[0, 0] == made.buffer.ctypes.data
        assert len({item[0].tobytes() for item in made.items}) == 3
        for item in made.items:
            for matrix, spec in zip(item, specs, strict=True):
                values = dequantize(torch.from_numpy(matrix), spec, torch.float32).numpy()
                assert np.isfinite(values).all() and 0 < np.abs(values).max() < 1000
        assert "memfd" in describe_pages(int(made.addresses[0, 0]))
        del item, matrix, values


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_kernels_support_every_encoding(encoding: str) -> None:
    assert is_supported(parse_codings(encoding)[0], "int8")


# ----------------------------------------------------------------------------------- structure


@pytest.mark.usefixtures("same_threads")
def test_kernels_as_json() -> None:
    result = moray("kernels", "--quick", "--json", "--encodings", "q4,q2,bf16", "--threads", "2")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["settings"] == {
        "shape": [512, 1024],
        "threads": 2,
        "working_set_bytes": 4_000_000,
        "pairs": 2,
        "numerics": "int8",
        "quick": True,
    }
    assert {"bytes", "pair", "reader", "ratio"} <= set(document["definitions"])
    assert document["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert document["machine"]["cores"] == len(os.sched_getaffinity(0))
    single = document["batch_1"]
    assert [(r["encoding"], r["group"], r["meta"]) for r in single] == [
        ("q4", 64, "f16"),
        ("q2", 16, "f16"),
        ("bf16", 0, None),
    ]
    assert [r["target"] for r in single] == [0.85, 0.70, None]
    assert [r["bytes"] for r in single] == [512 * 1024 * bits // 16 for bits in (9, 8, 32)]
    for result_ in single + document["layers"]:
        check_streamed(result_)
    assert [(r["encoding"], r["tokens"]) for r in document["prefill"]] == [
        (encoding, tokens) for encoding in ("q4", "q2", "bf16") for tokens in (4, 16)
    ]
    assert all(r["target"] == (None if r["encoding"] == "bf16" else 2.5) for r in document["prefill"])
    assert len(document["layers"]) == 6 and document["layers"][0]["layer"]["top_k"] == 2


def check_streamed(result: dict[str, object]) -> None:
    assert set(result["reader_bytes_per_s"]) == {"vectors", "streams"}  # type: ignore[call-overload]
    ratio = result["ratio"]
    assert isinstance(ratio, dict) and 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert result["met"] == (None if result["target"] is None else ratio["median"] >= result["target"])  # type: ignore[operator]


@pytest.mark.usefixtures("same_threads")
def test_kernels_as_tables() -> None:
    result = moray("kernels", "--quick", "--encodings", "q3", "--threads", "1")
    assert result.exit_code == 0, result.output
    for fragment in ("batch 1, 512 x 1024", "q3 g64", "GFLOP/s", "1 threads", "pair: ", "memfd", "0.7 "):
        assert fragment in result.stdout


def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with working_set([PackedSpec(16, 64, "f32")], 2):
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before
