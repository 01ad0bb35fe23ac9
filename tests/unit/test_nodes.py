from __future__ import annotations

import pytest

from moray.cluster.nodes import NodeInfo, choose_compute_node
from moray.runtime.errors import ClusterError

PLAIN = NodeInfo("a", {}, 0)
HERE = NodeInfo("b", {"role": "host"}, 0)
LABELLED = NodeInfo("c", {"role": "compute"}, 0)
GPU = NodeInfo("d", {}, 2)


def test_labels_win_over_nearness_and_nearness_over_names() -> None:
    assert choose_compute_node([PLAIN, HERE, LABELLED, GPU], "b", needs_gpu=False) is LABELLED
    assert choose_compute_node([PLAIN, HERE, GPU], "b", needs_gpu=False) is HERE
    assert choose_compute_node([GPU, PLAIN], "elsewhere", needs_gpu=False) is PLAIN


def test_a_gpu_is_a_condition() -> None:
    assert choose_compute_node([PLAIN, HERE, LABELLED, GPU], "b", needs_gpu=True) is GPU
    with pytest.raises(ClusterError, match="none of the 3 nodes has a GPU; use device cpu"):
        choose_compute_node([PLAIN, HERE, LABELLED], "b", needs_gpu=True)
