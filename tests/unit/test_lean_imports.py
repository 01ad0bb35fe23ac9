from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.reference import greedy, runner

from moray.deploy.config import demo_store

_PROMPT, _COUNT = [5, 6, 7, 8, 9, 10], 16
_GENERATE = """
import json, sys
from moray.runtime.model.lean_imports import import_lean
import_lean()
from helpers.reference import greedy, runner
from moray.deploy.config import demo_store
with runner(demo_store(), "int8") as made:
    tokens = greedy(made, {prompt}, {count})
loaded = [name for name in ("torch._dynamo", "sympy", "hqq", "torch.distributed.tensor") if name in sys.modules]
import torch, transformers
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():  # of torch's compiler, which comes when it is asked for
    pass
compiled = torch.compiler.disable(len)("four")
print(json.dumps([tokens, loaded, "torch._dynamo" in sys.modules, compiled, transformers.MixtralConfig.__name__]))
"""


@pytest.mark.slow
def test_a_lean_process_computes_the_same_and_finds_what_it_left_out(tmp_path: Path) -> None:
    code = _GENERATE.format(prompt=_PROMPT, count=_COUNT)
    paths = json.dumps([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {paths}\n{code}"]
    for _ in range(2):  # the second time, transformers' names come from the cache
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr
        tokens, loaded, later, compiled, name = json.loads(child.stdout.splitlines()[-1])
        assert loaded == []
        assert later and compiled == 4 and name == "MixtralConfig"
    with runner(demo_store(), "int8") as made:
        assert greedy(made, _PROMPT, _COUNT) == tokens
