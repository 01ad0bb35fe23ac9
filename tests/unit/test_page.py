"""The server's page and what it is told of the engine, without Ray."""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from helpers.remote import net
from helpers.scripted_engine import PLACES, ScriptedEngine, make_service
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from moray.deploy.serving.api import make_api
from moray.deploy.serving.keys import KeyFile, add_key
from moray.deploy.serving.page_files import HEADERS
from moray.runtime.experts.recent_use import RecentUse
from moray.runtime.store.store import Store

PAGE = Path(__file__).parents[2] / "deploy" / "serving" / "page"
LOCAL = ("127.0.0.1", 5000)


def test_the_page_is_for_everybody_and_the_engine_s_state_for_those_with_a_key(tmp_path: Path) -> None:
    key, engine = add_key(tmp_path / "keys", "alice"), ScriptedEngine(layers=[8, 12])
    api = make_api(make_service(engine), KeyFile(tmp_path / "keys"))
    web = TestClient(api, base_url="http://10.0.0.1", client=("10.0.0.7", 5000))
    for path in ("/", *(f"/page/{file.name}" for file in PAGE.iterdir())):
        answer = web.get(path)
        assert (
            answer.status_code == 200 and HEADERS.items() <= {k.title(): v for k, v in answer.headers.items()}.items()
        )
    assert web.get("/page/..%2fapi.py").status_code == 404 and web.get("/page/none.js").status_code == 404
    assert web.get("/state").status_code == web.get("/v1/models").status_code == 401 and engine.num_views == 0
    bearer = {"Authorization": f"Bearer {key}"}
    state = web.get("/state", headers=bearer).json()
    assert [place["name"] for place in state["places"]] == [place.name for place in PLACES]
    assert [[len(b64decode(layer[name])) for name in ("place", "recent")] for layer in state["layers"]] == [
        [8, 8], [12, 12],
    ]  # fmt: skip
    assert max(b64decode(state["layers"][0]["place"])) < len(PLACES)
    assert (state["model"], state["max_requests"], state["requests"]) == ("tiny-mixtral", 48, 0)
    document = web.get("/openapi.json").json()
    assert document["paths"]["/state"]["get"]["security"] and "/" not in document["paths"]
    engine.is_lost = True
    lost = web.get("/state", headers=bearer)
    assert lost.status_code == 503 and lost.json()["error"]["code"] == "engine_unavailable"
    assert TestClient(make_api(make_service(engine), None), client=("10.0.0.7", 1)).get("/").status_code == 403


def test_the_page_needs_nothing_from_elsewhere_and_its_policy_lets_nothing_in() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and "unsafe" not in str(policy)
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=", html)
    for name in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert (PAGE / name.removeprefix("page/")).is_file()
    for file in PAGE.glob("*.js"):
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|srcdoc", text), file
        for name in re.findall(r'from "(.*?)"', text):
            assert (PAGE / name).is_file()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=8), st.lists(st.integers(0, 500), min_size=3, max_size=9))
def test_recent_use_does_not_depend_on_who_else_asks(pauses: list[float], rates: list[int]) -> None:
    """Tokens that come evenly look the same however often one looks, and are forgotten when they stop."""
    tokens = [np.zeros(len(rates), dtype=np.int64)]
    often, once = RecentUse(tokens, 0.0), RecentUse(tokens, 0.0)
    now = 0.0
    for pause in pauses:
        now += pause
        tokens[0][:] = np.rint(1000 * now * np.array(rates)).astype(np.int64)
        levels = often.levels(now)[0]
    at_once = once.levels(now)[0]
    assert np.abs(levels.astype(int) - at_once.astype(int)).max() <= 1
    assert at_once.max() == (255 if max(rates) else 0)
    assert np.all(np.diff(at_once[np.argsort(rates)].astype(int)) >= 0)
    assert often.levels(now + 200)[0].max() == 0


def test_every_expert_is_where_its_host_says(demo: Store) -> None:
    """Here first, else on a live remote host, else on the disk, as the hosts themselves know it."""
    keys = sorted(demo.manifest.shards, key=lambda key: (key.layer, key.expert))
    with net(demo, keys[::2], [keys[::3], keys[::5]]) as made:
        found = made.source.residency()
        assert [place.tier for place in found.places] == ["disk", "arena", "remote", "remote"]
        assert [place.node for place in found.places[2:]] == ["far-0", "far-1"]
        expected = [[0] * len(layer) for layer in found.layers]
        hosts = [made.local, *(remote.host for remote in made.remotes)]
        for number, host in reversed(list(enumerate(hosts, 1))):
            for layer, experts in enumerate(host.resident()):
                for expert in experts:
                    expected[layer][expert] = number
        assert [layer.tolist() for layer in found.layers] == expected
        assert {0, 1, 2, 3} == {number for layer in expected for number in layer}
        made.source.leave("far-0")
        left = made.source.residency()
        assert [place.name for place in left.places[2:]] == ["far-1"]
        assert max(layer.max() for layer in left.layers) == 2


@pytest.fixture(scope="module")
def demo() -> Store:
    from moray.deploy.config import demo_store

    with Store.open(demo_store()) as made:
        yield made
