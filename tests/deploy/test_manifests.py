"""What `deploy/` renders to is valid, strictly, and keeps our own rules."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_surgeon.report.events import GAUGES
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = Path(__file__).parent / "kuberay-crds"
FOLDERS = sorted(
    path.parent.relative_to(ROOT / "deploy").as_posix()
    for path in (ROOT / "deploy").glob("**/kustomization.yaml")
)
RENDERED = [f for f in FOLDERS if not f.startswith("components") and f != "serviceaccount"]
OVERLAYS = [f for f in FOLDERS if f.startswith("overlays")]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed"
)


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: a key stands twice in {keys}"
        return super().construct_mapping(node, deep)


def objects(folder: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "deploy" / folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.load_all(done.stdout, StrictLoader)}


def strict(schema: Any) -> Any:
    """Make the schema of a custom resource refuse what the API server would prune, and accept what
    it would fill in.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        new.pop("type", None)
        new["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = schema.get("properties")
    if (
        isinstance(properties, dict)
        and not schema.get("x-kubernetes-preserve-unknown-fields")
        and "additionalProperties" not in schema
    ):
        new["additionalProperties"] = False
    if "required" in new and isinstance(properties, dict):
        new["required"] = [
            name for name in schema["required"] if "default" not in properties.get(name, {})
        ]
    if schema.get("format") == "int32":
        new |= {
            "minimum": max(-(2**31), schema.get("minimum", -(2**31))),
            "maximum": min(2**31 - 1, schema.get("maximum", 2**31 - 1)),
        }
    if schema.get("nullable") and isinstance(new.get("type"), str):
        new["type"] = [new["type"], "null"]
    return new


def check(document: dict[str, Any], kind: str) -> None:
    schema = strict(
        json.loads((SCHEMAS / f"{kind.lower()}s.v1.json").read_text())["openAPIV3Schema"]
    )
    document = copy.deepcopy(document)
    assert document.pop("apiVersion") == "ray.io/v1"
    assert document.pop("kind") == kind
    assert set(document.pop("metadata")) <= {"name", "labels", "annotations", "namespace"}
    schema["properties"] = {
        k: v for k, v in schema["properties"].items() if k not in ("apiVersion", "kind", "metadata")
    }
    schema["required"] = [
        name for name in schema.get("required", []) if name in schema["properties"]
    ]
    jsonschema.Draft202012Validator(schema).validate(document)


@needs_kubectl
@pytest.mark.parametrize("folder", RENDERED)
def test_custom_resources_fit_the_schemas(folder: str) -> None:
    found = objects(folder)
    kinds = {"RayJob", "RayCluster"} & set(found)
    assert kinds
    for kind in kinds:
        check(found[kind], kind)


def test_the_check_is_strict() -> None:
    document = yaml.safe_load((ROOT / "deploy/base/rayjob.yaml").read_text())
    check(document, "RayJob")
    for path, value in (
        (("spec", "entrypont"), "x"),
        (("spec", "backoffLimit"), "2"),
        (("spec", "ttlSecondsAfterFinished"), 2**31),
    ):
        wrong = copy.deepcopy(document)
        wrong[path[0]][path[1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, "RayJob")


def pods(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    groups = [
        ("head", cluster["headGroupSpec"]),
        *((g["groupName"], g) for g in cluster["workerGroupSpecs"]),
    ]
    return [(name, group["template"]["spec"]) for name, group in groups]


@needs_kubectl
@pytest.mark.parametrize("folder", RENDERED)
def test_rules_of_the_operator_and_of_ours(folder: str) -> None:
    found = objects(folder)
    document = found.get("RayJob") or found["RayCluster"]
    name = document["metadata"]["name"]
    spec = document["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= (47 if document["kind"] == "RayJob" else 53)
    if document["kind"] == "RayJob":
        assert spec["shutdownAfterJobFinishes"] or "ttlSecondsAfterFinished" not in spec
        assert "clusterSelector" not in spec
        assert "--resume" in spec["entrypoint"] or not spec["backoffLimit"], (
            "a retry gets a new cluster"
        )
    submitters = (
        [("submitter", spec["submitterPodTemplate"]["spec"])]
        if "submitterPodTemplate" in spec
        else []
    )
    for place, pod in pods(document) + submitters:
        assert pod["securityContext"]["runAsNonRoot"] is True, place
        for container in pod["containers"]:
            image, _, tag = container["image"].rpartition(":")
            assert image
            assert tag not in ("", "latest"), f"{place}: {container['image']}"
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), place
    for place, pod in pods(document):
        container = pod["containers"][0]
        assert {"livenessProbe", "readinessProbe"} <= set(container), place
        if "client" in {port["name"] for port in container.get("ports", ())}:
            assert {"name": "GRPC_ENABLE_FORK_SUPPORT", "value": "0"} in container["env"], (
                "else Ray clients are not served at times"
            )
        assert {"mountPath": "/dev/shm", "name": "shm"} in container["volumeMounts"]
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert values["TMPDIR"] in {mount["mountPath"] for mount in container["volumeMounts"]}, (
            "exports are fetched to there"
        )
        assert values["RAY_TMPDIR"] == "/tmp", "where the operator's containers look"
        (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert gibibytes(shm["emptyDir"]["sizeLimit"]) < gibibytes(
            container["resources"]["limits"]["memory"]
        )
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    cluster = spec.get("rayClusterSpec", spec)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (shm,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")
        assert int(group["rayStartParams"]["object-store-memory"]) < 2**30 * gibibytes(
            shm["emptyDir"]["sizeLimit"]
        )
    for group in cluster["workerGroupSpecs"]:
        assert (
            group["minReplicas"]
            <= group.get("replicas", group["minReplicas"])
            <= group["maxReplicas"]
        )


def gibibytes(quantity: str) -> float:
    units = {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}
    return float(quantity[:-2]) * units[quantity[-2:]]


def job_of(found: dict[str, dict[str, Any]]) -> JobSpec:
    return parse_spec(found["ConfigMap"]["data"]["job.yaml"])


@needs_kubectl
@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_cluster_fits_the_job_spec(folder: str) -> None:
    """As many GPUs as workers, room for their CPUs, and a run directory that outlives the pods."""
    found = objects(folder)
    job = job_of(found)
    (group,) = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    num_workers = job.cluster.num_shards * job.cluster.num_replicas
    gpus = group["replicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus == num_workers * job.cluster.gpus_per_worker
    per_pod = int(container["resources"]["requests"]["cpu"]) // job.cluster.cpus_per_worker
    assert group["replicas"] * per_pod >= num_workers
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    if job.output.uri.startswith("s3://"):
        assert "eks.amazonaws.com/role-arn" in found["ServiceAccount"]["metadata"]["annotations"]
    else:
        volume = next(
            v for v in group["template"]["spec"]["volumes"] if v["name"] == mounts["/data"]
        )
        assert job.output.uri.startswith("/data/")
        assert (
            volume["persistentVolumeClaim"]["claimName"]
            == found["PersistentVolumeClaim"]["metadata"]["name"]
        )
    assert "Secret" not in found


@needs_kubectl
def test_what_the_components_do() -> None:
    spot = objects("overlays/gpu-spot-s3")["RayJob"]
    kueue = objects("overlays/gpu-kueue-s3")["RayJob"]
    assert (
        spot["spec"]["backoffLimit"] > objects("overlays/gpu-s3")["RayJob"]["spec"]["backoffLimit"]
    )
    (_, head), (_, worker) = pods(spot)
    assert head["nodeSelector"] != worker["nodeSelector"]
    assert spot["spec"]["submitterPodTemplate"]["spec"]["nodeSelector"] == head["nodeSelector"]
    assert {t["key"] for t in worker["tolerations"]} == {"nvidia.com/gpu", "spot"}
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert kueue["spec"]["suspend"] is True
    cluster = objects("raycluster")["RayCluster"]["spec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (
        cluster["workerGroupSpecs"][0]["minReplicas"]
        == 0
        < cluster["workerGroupSpecs"][0]["maxReplicas"]
    )


def test_the_image_is_pinned_small_and_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:100"]
    rayjob = yaml.safe_load((ROOT / "deploy/base/rayjob.yaml").read_text())
    version = rayjob["spec"]["rayClusterSpec"]["rayVersion"]
    assert images[-1].startswith(f"rayproject/ray:{version}-")
    allowed = (ROOT / ".dockerignore").read_text().split()
    assert allowed[0] == "*"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_dockerfile_is_linted() -> None:
    done = subprocess.run(
        ["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    """Ray adds `ray_` to names, and Prometheus `_total` to counters."""
    dashboard = json.loads((ROOT / "deploy/grafana/ray-surgeon.json").read_text())
    expressions = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    )
    used = set(re.findall(r"\bray_(surgeon_\w+)", expressions))
    assert used == {f"surgeon_{name}" for name in GAUGES} | {
        "surgeon_steps_total",
        "surgeon_retries_total",
    }
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
