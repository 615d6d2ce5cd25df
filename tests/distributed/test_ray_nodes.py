"""Messages of a run about machines, without any machines."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray._private import state

from ray_surgeon.distributed import ray_nodes
from ray_surgeon.distributed.processes import versions

H100 = {"ray.io/accelerator-type": "H100", "ray.io/market-type": "spot"}
NODES: list[dict[str, Any]] = [
    {"NodeID": "head", "Alive": True, "Labels": {}, "Resources": {"CPU": 8.0}},
    {
        "NodeID": "full",
        "Alive": True,
        "Labels": H100,
        "Resources": {"CPU": 8.0, "GPU": 2.0},
    },
    {
        "NodeID": "free",
        "Alive": True,
        "Labels": H100,
        "Resources": {"CPU": 8.0, "GPU": 1.0},
    },
    {
        "NodeID": "leaving",
        "Alive": True,
        "Labels": H100,
        "Resources": {"CPU": 8.0, "GPU": 8.0},
    },
    {"NodeID": "dead", "Alive": False, "Labels": H100, "Resources": {}},
]


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {node["NodeID"]: node["Resources"] for node in NODES} | {"full": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(ray_nodes, "nodes_leaving", lambda: {"leaving"})
    monkeypatch.setattr(state, "available_resources_per_node", lambda: free)


@pytest.mark.parametrize(
    ("labels", "bundle", "expected"),
    [
        ({"zone": "b"}, {"CPU": 1}, (4, "no node has zone=b; ")),
        (
            {"ray.io/market-type": "!spot"},
            {"CPU": 3},
            (2, "no more node with ray.io/market-type="),
        ),
        (
            {"ray.io/accelerator-type": "in(A100, H100)"},
            {"GPU": 1},
            (3, "no more node with ray.io"),
        ),
        (
            {"ray.io/accelerator-type": "!in(A100,H100)"},
            {"GPU": 1},
            (4, "no node with ray.io/acc"),
        ),
        ({}, {"CPU": 1, "GPU": 1}, (3, "no more node has 1 CPU and 1 GPU free; ")),
    ],
)
def test_lacking_resources_are_described(
    labels: Any, bundle: Any, expected: tuple[int, str]
) -> None:
    missing, lack = ray_nodes.lacking(4, bundle, labels)
    assert (missing, lack[: len(expected[1])]) == expected
    assert lack.endswith("; the cluster has 3 nodes, " + lack.rpartition("nodes, ")[2])
    if "GPU" in bundle:
        assert "GPU 1 free of 3" in lack


def test_version_differences_are_reported() -> None:
    said: list[str] = []
    own = versions()
    ray_nodes.say_differences([own, own | {"torch": "1.0"}], said.append)
    (line,) = said
    assert f"the coordinator has torch {own['torch']}, workers have 1.0" in line
    ray_nodes.say_differences([own, own], said.append)
    assert len(said) == 1
