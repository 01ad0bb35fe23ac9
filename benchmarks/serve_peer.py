"""moray's server against llama.cpp's at 1, 4 and 8 clients: tokens a second and time to the first token.

    python benchmarks/serve_peer.py --peer-python /tmp/peer/venv/bin/python --directory /tmp/models
    python benchmarks/serve_peer.py --quick                                  # tiny models: does it work?

Models, kept in --directory: ``--layers`` layers (4) of Mixtral-8x7B's geometry and of Qwen3-30B-A3B's, with embeddings
and head, as a store and as a GGUF file (make_store.py, make_gguf.py) of the same bits a weight: 4.5 in experts,
attention, embedding and head. Each token's experts are planted (``--routing random``), and so is what follows it: both
generate the same text, which is checked. Both have the same vocabulary (vocabulary.py): a character is a token.

Sides, one at a time, each with ``--threads`` threads (all cores):
- *moray*: ``moray serve STORE --device cpu``;
- *llama_cpp.server*: llama-cpp-python's server, told to end what it began. It answers one request after the other;
- *llama.cpp, batched*: llama.cpp's parallel decoding through its C functions (peer_worker.py), all clients' tokens in
  one batch: no HTTP, no text, no sampling but the largest logit. The bound of a server of llama.cpp's own.

Load: a *wave* of as many requests at once as there are clients, each a prompt of ``--prompt-tokens`` random
characters, streamed, greedy, ``--output-tokens`` long; the next wave begins when all have ended. No two prompts begin
alike. The client is that of ``moray bench serve``.
- *tokens/s*: generated tokens of a wave / seconds from its begin to its end, median of the waves;
- *first token*: from the wave's begin to a request's first piece of text, median of all requests.
*ratio*: moray's tokens/s over the other side's, and the other side's first token over moray's: above 1 is better.

Each of ``--rounds`` rounds starts all sides anew, every other in the opposite order; the first wave of a side and a
number of clients is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any, Protocol

import httpx2
import numpy as np
from common import describe_machine, print_table, working_directory
from geometry import PRESETS, Geometry
from make_gguf import make_gguf
from make_store import write_store
from peer_client import Peer, add_peer_python, open_peer
from peer_sizes import gguf_sizes, store_sizes, total_bits
from replay import replay_random
from vocabulary import CHARACTERS, gguf_vocabulary, longest_walk, pieces_of, write_tokenizer

import moray
from moray.deploy.bench.serve_client import Answer, Endpoint
from moray.runtime.convert.recipe import Recipe
from moray.runtime.store.store import Store

RECIPE = "experts=hqq4:64,attention=hqq4:64,embeddings=hqq4:64"
CLIENTS = (1, 4, 8)
SIDES = ("moray", "llama_cpp.server", "llama.cpp, batched")
_START_S = 300.0
_ANSWER_S = 600.0


@dataclass(frozen=True)
class Wave:
    """Requests that were made at once."""

    first_s: list[float]
    whole_s: float
    num_tokens: int


@dataclass
class Measured:
    """All waves of one side with so many clients."""

    waves: list[Wave] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(wave.num_tokens / wave.whole_s for wave in self.waves)

    @property
    def first_s(self) -> float:
        return median(seconds for wave in self.waves for seconds in wave.first_s)


class Texts:
    """Prompts of random characters; no two have the same first three."""

    def __init__(self, length: int) -> None:
        self._length, self._random = length, np.random.default_rng(0)
        letters = len(CHARACTERS) - 1
        self._beginnings = iter(self._random.permutation(letters**3).tolist())

    def make(self, count: int) -> list[str]:
        return [self._make() for _ in range(count)]

    def _make(self) -> str:
        letters, number = len(CHARACTERS) - 1, next(self._beginnings)
        first = [number % letters, number // letters % letters, number // letters**2]
        rest = self._random.integers(0, letters, self._length - len(first)).tolist()
        return "".join(CHARACTERS[index] for index in [*first, *rest])


class Side(Protocol):
    """Something that answers waves."""

    def text(self, prompt: str, count: int) -> str: ...

    def wave(self, prompts: list[str], count: int) -> Wave: ...


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model

    def text(self, prompt: str, count: int) -> str:
        body = {"model": self._model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        answer = httpx2.post(f"{self._url}/completions", json=body, timeout=_ANSWER_S)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def wave(self, prompts: list[str], count: int) -> Wave:
        return asyncio.run(self._wave(prompts, count))

    async def _wave(self, prompts: list[str], count: int) -> Wave:
        async with httpx2.AsyncClient(base_url=self._url, timeout=_ANSWER_S) as client:
            endpoint = Endpoint(client, "completions", self._model, _ANSWER_S)
            await client.get("models")  # both sides keep the connection
            started = perf_counter()
            answers = [Answer(started) for _ in prompts]
            pairs = zip(prompts, answers, strict=True)
            await asyncio.gather(*(endpoint.ask(prompt, count, answer) for prompt, answer in pairs))
        for answer in answers:
            if answer.error is not None or answer.output_tokens != count:
                raise SystemExit(f"{self._model}: {answer.output_tokens} tokens of {count}, {answer.detail}")
        whole_s = max(answer.ended_s for answer in answers) - started
        return Wave([answer.first_s for answer in answers], whole_s, count * len(answers))


class Batched:
    """llama.cpp's own batches, behind a pipe."""

    def __init__(self, peer: Peer, vocab: int) -> None:
        self._peer, self._pieces = peer, pieces_of(vocab)
        self._ids = {character: index * longest_walk(vocab) for index, character in enumerate(CHARACTERS)}

    def text(self, prompt: str, count: int) -> str:
        answer = self._ask([prompt], count)
        return "".join(self._pieces[index] for index in answer["ids"][0]).replace("\u0120", " ")

    def wave(self, prompts: list[str], count: int) -> Wave:
        answer = self._ask(prompts, count)
        return Wave(answer["first_s"], answer["whole_s"], count * len(prompts))

    def _ask(self, prompts: list[str], count: int) -> dict[str, Any]:
        ids = [[self._ids[character] for character in prompt] for prompt in prompts]
        return self._peer.request("wave", prompts=ids, count=count)


# ----------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Models:
    """One geometry on disk, twice."""

    name: str
    geometry: Geometry
    store: Path
    gguf: Path


def prepare(root: Path, name: str, geometry: Geometry) -> Models:
    """Write what is not there. A model that was kept must have as many layers."""
    store, gguf = root / f"{name}-served", root / f"{name}-served.gguf"
    sizes = {"layers": geometry.layers, "experts": geometry.experts, "active": geometry.active}
    replay = replay_random(tokens=geometry.vocab, **sizes)
    if not store.exists():
        with TemporaryDirectory(dir=root) as partial:
            made = write_store(Path(partial) / "store", geometry, Recipe.parse(RECIPE), replay=replay)
            write_tokenizer(made, geometry.vocab)
            made.rename(store)
    if not gguf.exists():
        partial_gguf = root / f"{name}.gguf.partial"
        made = make_gguf(partial_gguf, geometry, replay=replay, vocabulary=gguf_vocabulary(geometry.vocab))
        made.rename(gguf)
    found = json.loads((store / "config.json").read_text())["num_hidden_layers"]
    if found != geometry.layers:
        raise SystemExit(f"{store} has {found} layers, expected {geometry.layers}; name another --directory")
    return Models(name, geometry, store, gguf)


# ------------------------------------------------------------------------------------------ sides


@contextmanager
def opened(name: str, models: Models, options: argparse.Namespace) -> Iterator[Side]:
    if name == "moray":
        command = [sys.executable, "-m", "moray.deploy.cli", "serve", models.store, "--device", "cpu"]
        command += ["--threads", options.threads, "--max-requests", max(CLIENTS)]
        with running(command, "--port") as url:
            yield Server(url, models.store.name)
    elif name == "llama_cpp.server":
        command = [options.peer_python, "-m", "llama_cpp.server", "--model", models.gguf, "--n_ctx", _context(options)]
        command += ["--n_threads", options.threads, "--n_threads_batch", options.threads]
        command += ["--interrupt_requests", "False"]  # else a new request ends the answer to the one before
        with running(command, "--port") as url:
            yield Server(url, str(models.gguf))
    else:
        with open_peer(options.peer_python) as peer:
            context = _context(options) * max(CLIENTS)
            peer.load(models.gguf, threads=options.threads, context=context, sequences=max(CLIENTS))
            yield Batched(peer, models.geometry.vocab)


def _context(options: argparse.Namespace) -> int:
    """Tokens of a request, in whole blocks of llama.cpp's cache."""
    return -(-(options.prompt_tokens + options.output_tokens) // 256) * 256


@contextmanager
def running(command: list[Any], port_flag: str) -> Iterator[str]:
    """A server's address, until it is told to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with TemporaryDirectory() as directory, (Path(directory) / "log").open("w+") as log:
        arguments = [str(part) for part in [*command, port_flag, port]]
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        try:
            _await_server(process, url, Path(log.name))
            yield url
        finally:
            process.terminate()
            process.wait()


def _await_server(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = perf_counter() + _START_S
    while perf_counter() < deadline and process.poll() is None:
        try:
            if httpx2.get(f"{url}/models", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            sleep(0.2)
    raise SystemExit(f"a server did not start:\n{log.read_text()[-2000:]}")


# -------------------------------------------------------------------------------------- measuring


def measure(models: Models, options: argparse.Namespace) -> dict[tuple[str, int], Measured]:
    texts = Texts(options.prompt_tokens)
    found = {(side, clients): Measured() for clients in CLIENTS for side in SIDES}
    answers: dict[str, str] = {}
    for turn in range(options.rounds):
        for name in SIDES if turn % 2 == 0 else SIDES[::-1]:
            with opened(name, models, options) as side:
                answers[name] = side.text("the same question", options.output_tokens)
                for clients in CLIENTS:
                    for number in range(options.waves + 1):
                        wave = side.wave(texts.make(clients), options.output_tokens)
                        if number:
                            found[name, clients].waves.append(wave)
                    rate = wave.num_tokens / wave.whole_s
                    print(
                        f"round {turn + 1}, {name}, {clients} clients: {rate:.1f} tokens/s", file=sys.stderr, flush=True
                    )
    if len(set(answers.values())) != 1:
        raise SystemExit(f"the sides' answers differ: {answers}")
    return found


def print_found(models: Models, found: dict[tuple[str, int], Measured], options: argparse.Namespace) -> None:
    with Store.open(models.store) as store:
        bits = total_bits(store_sizes(store.manifest)), total_bits(gguf_sizes(models.gguf))
    geometry = models.geometry
    print(f"\n## {models.name}: {geometry.layers} layers, {geometry.experts} experts, top {geometry.active}")
    print(f"bits a weight: moray {bits[0]:.3f}, llama.cpp {bits[1]:.3f}; the same text from all sides")
    print(f"prompts of {options.prompt_tokens} tokens, answers of {options.output_tokens}\n")
    rows = []
    for clients in CLIENTS:
        ours = found["moray", clients]
        for name in SIDES:
            other = found[name, clients]
            cells = [f"{other.rate:.1f}", f"{other.first_s * 1e3:.0f}"]
            ratios = [f"{ours.rate / other.rate:.2f}", f"{other.first_s / ours.first_s:.2f}"] if other != ours else []
            rows.append([f"{clients} clients, {name}", *cells, *(ratios or ["", ""])])
    print_table(["", "tokens/s", "first token, ms", "ratio", "ratio of first"], rows)


_NAMES = {"mixtral": "mixtral-8x7b", "qwen": "qwen3-30b-a3b"}
_TINY = {"mixtral": "tiny", "qwen": "tiny-qwen"}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_python(parser)
    parser.add_argument("--directory", type=Path, help="where models are and stay; without it, a temporary one")
    parser.add_argument("--only", choices=sorted(_NAMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--waves", type=int, default=3, help="of each side and number of clients, in a round (3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (all cores)")
    parser.add_argument("--prepare-only", action="store_true", help="write the models and end")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


@contextmanager
def _directory(options: argparse.Namespace, geometries: dict[str, Geometry]) -> Iterator[Path]:
    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
        yield options.directory
        return
    with working_directory(sum(6 * geometry.num_parameters // 5 for geometry in geometries.values())) as root:
        yield root


def main() -> None:
    options = _parse()
    names = [options.only] if options.only else list(_NAMES)
    geometries = {
        name: replace(PRESETS[_TINY[name]], vocab=4096)
        if options.quick
        else replace(PRESETS[_NAMES[name]], layers=options.layers)
        for name in names
    }
    walk = min(longest_walk(geometry.vocab) for geometry in geometries.values())
    if options.output_tokens >= walk:
        raise SystemExit(f"--output-tokens is {options.output_tokens}, expected less than {walk}")
    print(f"{describe_machine()}\nmoray {moray.__version__}, {options.threads} threads each")
    with _directory(options, geometries) as root:
        for name, geometry in geometries.items():
            models = prepare(root, ("tiny-" if options.quick else "") + name, geometry)
            if not options.prepare_only:
                print_found(models, measure(models, options), options)


if __name__ == "__main__":
    main()
