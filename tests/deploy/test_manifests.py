"""The manifests rendered from `deploy/` are strictly valid and follow the rules of this project."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_surgeon.config.job import parse_spec
from ray_surgeon.report.events import GAUGES
from ray_surgeon.run.kubernetes import ray_cluster

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = Path(__file__).parent / "kuberay-crds"
KUSTOMIZATIONS = (ROOT / "deploy").glob("**/kustomization.yaml")
FOLDERS = sorted(p.parent.relative_to(ROOT / "deploy").as_posix() for p in KUSTOMIZATIONS)
RENDERED = [
    f for f in FOLDERS if not f.startswith("components") and f != "serviceaccount"
]
OVERLAYS = [f for f in FOLDERS if f.startswith("overlays")]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl here"
)


@functools.cache
def objects(folder: str) -> dict[str, dict[str, Any]]:
    command = ["kubectl", "kustomize", str(ROOT / "deploy" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def strict(schema: Any) -> Any:
    """Make the schema of a custom resource refuse fields that the API server would prune.

    Fields that the server fills in are accepted.
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
    open_ended = {"x-kubernetes-preserve-unknown-fields", "additionalProperties"}
    if isinstance(properties, dict):
        if not open_ended & {
            name for name, value in schema.items() if value is not False
        }:
            new["additionalProperties"] = False
        required = schema.get("required", [])
        new["required"] = [n for n in required if "default" not in properties.get(n, {})]
    if schema.get("nullable") and isinstance(new.get("type"), str):
        new["type"] = [new["type"], "null"]
    return new


@functools.cache
def validator_of(kind: str) -> jsonschema.Draft202012Validator:
    text = (SCHEMAS / f"{kind.lower()}s.v1.json").read_text()
    return jsonschema.Draft202012Validator(strict(json.loads(text)["openAPIV3Schema"]))


def check(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document["metadata"]) <= {"name", "labels", "annotations", "namespace"}
    validator_of(document["kind"]).validate(document)


def test_check_refuses_unknown_fields() -> None:
    document = yaml.safe_load((ROOT / "deploy/base/rayjob.yaml").read_text())
    check(document)
    document["spec"]["entrypont"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def groups_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of the head and of the workers."""
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@needs_kubectl
@pytest.mark.parametrize("folder", RENDERED)
def test_manifests_follow_the_rules_of_the_operator_and_of_this_project(
    folder: str,
) -> None:
    found = objects(folder)
    document = found.get("RayJob") or found["RayCluster"]
    check(document)
    spec = document["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    if document["kind"] == "RayJob":
        check_rules_of_jobs(spec)
        goes_on = "--resume" in spec["entrypoint"] or not spec["backoffLimit"]
        assert goes_on, "a retry gets a new cluster"
    pods = [group["template"]["spec"] for group in groups_of(document)]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert re.search(r":(?!latest)[^:/]+$", container["image"])
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            resources = container["resources"]
            wanted = {"cpu", "memory", "ephemeral-storage"}
            assert wanted <= set(resources["requests"]) & set(resources["limits"])
    for pod, group in zip(pods, groups_of(document), strict=True):
        container = pod["containers"][0]
        assert {"livenessProbe", "readinessProbe"} <= set(container)
        values = {
            variable["name"]: variable.get("value") for variable in container["env"]
        }
        if "client" in {port["name"] for port in container.get("ports", ())}:
            assert values["GRPC_ENABLE_FORK_SUPPORT"] == "0", (
                "else clients are not served at times"
            )
        mounts = {
            mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]
        }
        assert mounts["/dev/shm"] == "shm"
        assert values["TMPDIR"] in mounts, "exports are fetched to there"
        assert values["RAY_TMPDIR"] == "/tmp", "where the operator's containers look"
        assert "/tmp" in mounts, "the root cannot be written to"
        assert values["HOME"].startswith("/cache/")
        assert pod["terminationGracePeriodSeconds"] > 30, (
            "Ray drains a node that ends for so long"
        )
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {*mounts.values()} == volumes.keys()
        sizes = {
            name: volumes[name]["emptyDir"]["sizeLimit"] for name in ("cache", "tmp")
        }
        on_disk = sum(map(gibibytes, sizes.values()))
        assert int(values["RAY_SURGEON_DISK"]) == gibibytes(sizes["cache"]) * 2**30
        assert len(values) == len(container["env"]), "no variable twice"
        limits = container["resources"]["limits"]
        assert on_disk <= gibibytes(limits["ephemeral-storage"]), "or the pod is evicted"
        shm = volumes["shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert store < gibibytes(shm["sizeLimit"]) < gibibytes(limits["memory"])


def check_rules_of_jobs(spec: dict[str, Any]) -> None:
    """Check the rules by which the operator's validation.go of version 1.7 refuses jobs."""
    assert "clusterSelector" not in spec
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterPodTemplate", "submitterConfig"} & spec.keys()
    assert min(spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) > 0
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    assert shuts_down != ("deletionStrategy" in spec), "one of them"
    assert shuts_down or not {"suspend", "ttlSecondsAfterFinished"} & spec.keys()
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling"), (
        "it excludes DeleteWorkers"
    )
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    seconds = {
        (str(r["condition"]).split(",")[0], r["policy"]): r["condition"] for r in rules
    }
    assert len(seconds) == len(rules), "no rule twice"
    for (condition, policy), given in seconds.items():
        assert len(given.keys() & {"jobStatus", "jobDeploymentStatus"}) == 1
        whole = seconds[condition, "DeleteCluster"]["ttlSeconds"]
        assert policy in ("DeleteCluster", "DeleteWorkers")
        assert given["ttlSeconds"] <= whole
    for group in groups_of({"spec": spec}):
        counts = {"num-cpus", "num-gpus", "memory", "resources", "labels"}
        assert not counts & group["rayStartParams"].keys()


def gibibytes(quantity: str) -> float:
    units = {"Mi": 1 / 1024, "Gi": 1.0, "Ti": 1024.0}
    return float(quantity[:-2]) * units[quantity[-2:]]


@needs_kubectl
@pytest.mark.parametrize("folder", OVERLAYS)
def test_cluster_fits_the_job_spec(folder: str) -> None:
    """There is a GPU for each worker, room for its CPUs, and a run directory that outlives the
    pods.
    """
    found = objects(folder)
    job = parse_spec(found["ConfigMap"]["data"]["job.yaml"])
    (group,) = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    num_workers = job.cluster.num_shards * job.cluster.num_replicas
    gpus = group["replicas"] * int(
        container["resources"]["limits"].get("nvidia.com/gpu", 0)
    )
    assert gpus == num_workers * job.cluster.gpus_per_worker
    per_pod = (
        int(container["resources"]["requests"]["cpu"]) // job.cluster.cpus_per_worker
    )
    assert group["replicas"] * per_pod >= num_workers
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    if job.output.uri.startswith("s3://"):
        assert (
            "eks.amazonaws.com/role-arn"
            in found["ServiceAccount"]["metadata"]["annotations"]
        )
    else:
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
        assert job.output.uri.startswith("/data/")
        assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert "Secret" not in found


@needs_kubectl
def test_spot_and_kueue_components() -> None:
    plain, spot, kueue = (
        objects(f"overlays/{name}")["RayJob"]
        for name in ("gpu-s3", "gpu-spot-s3", "gpu-kueue-s3")
    )
    assert spot["spec"]["backoffLimit"] > plain["spec"]["backoffLimit"]
    head, worker = (group["template"]["spec"] for group in groups_of(spot))
    assert head["nodeSelector"] != worker["nodeSelector"]
    labels = [group["labels"]["ray.io/market-type"] for group in groups_of(spot)]
    assert labels == ["on-demand", "spot"]
    assert {t["key"] for t in worker["tolerations"]} == {"nvidia.com/gpu", "spot"}
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert kueue["spec"]["suspend"] is True
    assert plain["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    watched = objects("overlays/gpu-monitored-s3")
    head, worker = (group["template"] for group in groups_of(plain))
    for pod in (head, worker):
        name = watched["PodMonitor"]["spec"]["selector"]["matchLabels"]
        assert name.items() <= pod["metadata"]["labels"].items()
    ports = {port["name"] for port in head["spec"]["containers"][0]["ports"]}
    assert {
        end["port"] for end in watched["PodMonitor"]["spec"]["podMetricsEndpoints"]
    } <= ports
    policy = watched["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == name
    admitted = [
        rule["from"][0]["podSelector"]["matchLabels"] for rule in policy["ingress"]
    ]
    assert name in admitted
    assert {"app.kubernetes.io/name": "kuberay-operator"} in admitted, (
        "it asks the dashboard"
    )
    cluster = objects("raycluster")["RayCluster"]["spec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}, "several people use it"
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0


def test_ray_cluster_manifest_is_generated_by_the_package() -> None:
    """The RayJob needs the model for its plan, so test_smollm2.py checks it."""
    path = ROOT / "deploy/raycluster/raycluster.yaml"
    assert path.read_text() == ray_cluster(), f"{path} is not kubernetes.ray_cluster()"


def test_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:100"]
    rayjob = yaml.safe_load((ROOT / "deploy/base/rayjob.yaml").read_text())
    version = rayjob["spec"]["rayClusterSpec"]["rayVersion"]
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    assert {f"ray=={version}", "torch==2.13.0"} <= {*locked}, "what the image has"
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^+]+", x) for x in locked if x[0] != "#")
    assert images[-1].startswith(f"rayproject/ray:{version}-")
    # a release of torch is built for one CUDA, which needs a driver
    torch, cuda, driver = "2.13.0", "13.0", "580"
    text = "\n".join(lines)
    assert re.findall(r"torch==(\S+)", text) == [torch]
    assert f"torch {torch} of PyPI is built for CUDA {cuda}" in text
    assert f'NVIDIA_REQUIRE_CUDA="cuda>={cuda}"' in text
    for page in (text, (ROOT / "deploy/README.md").read_text()):
        assert f"driver {driver} or newer" in page
    assert (ROOT / ".dockerignore").read_text().split()[0] == "*"


def test_dashboard_shows_exactly_the_metrics_of_the_package() -> None:
    """Ray prefixes names with `ray_`, and Prometheus appends `_total` to counters."""
    dashboard = json.loads(
        (ROOT / "deploy/components/monitoring/ray-surgeon.json").read_text()
    )
    panels = dashboard["panels"]
    expressions = " ".join(
        target["expr"] for panel in panels for target in panel["targets"]
    )
    gauges = {f"surgeon_{name}" for name in GAUGES}
    used = set(re.findall(r"\bray_(surgeon_\w+)", expressions))
    assert used == gauges | {"surgeon_steps_total", "surgeon_retries_total"}
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)
