"""Experts computed by other machines: the same bits, whoever computes what, and whatever happens to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.remote import Net, net
from helpers.reference import greedy, runner
from helpers.checkpoints import tiny_checkpoint

from moray.cluster.cluster_source import ClusterSource
from moray.runtime.convert.converter import convert
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store

pytestmark = pytest.mark.timeout(280)

PROMPT_IDS = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
NUM_TOKENS = 6


@contextmanager
def generating(store: Store, source: ClusterSource, numerics: Numerics = "int8") -> Iterator[Runner]:
    made = Runner(store, source, load_model(store, numerics, torch.device("cpu")), numerics)
    try:
        yield made
    finally:
        made.close()


def test_first(demo: Store) -> None:
    every = list(demo.manifest.shards)
    with runner(demo.path, "int8") as made:
        tokens, logits = greedy(made, PROMPT_IDS, NUM_TOKENS), made.logits(PROMPT_IDS)
    for lanes in ("auto", "remote", "local"):
        with net(demo, every[::2], [every[1::2]], lanes=lanes) as made_net, generating(demo, made_net.source) as made:
            assert greedy(made, PROMPT_IDS, NUM_TOKENS) == tokens
            assert torch.equal(made.logits(PROMPT_IDS), logits)
            print(lanes, made_net.source.remote_stats(), made.stats().bytes_by_source)
