"""What is handed to Docker and Kubernetes: linted and validated against the published schemas, and it fits together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml
from ranks import BIN

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docker/compose.yaml"
KUBERNETES = ROOT / "launch/kubernetes.yaml"


def test_the_dockerfile_has_nothing_to_be_linted() -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), "--no-color", str(ROOT / "docker/Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_image_is_not_root_s_and_keeps_its_torch() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["${UID}"], "a number, so that Kubernetes can see that it isn't root"
    assert "FROM nvcr.io/nvidia/pytorch:${NGC}" in lines
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name.split('/')[0]}" for name in copied} <= set(kept), "what is copied is sent to the builder"


@pytest.fixture
def compose() -> dict[str, Any]:
    # compose_spec knows `on-failure`, but not the number of tries, which compose takes too.
    text = COMPOSE.read_text().replace("restart: on-failure:3", "restart: on-failure")
    read = compose_spec.PyCompose.from_yaml(text)
    read.validate()
    found: dict[str, Any] = read.to_dict()
    return found


def test_compose_waits_for_the_snapshot_and_keeps_what_is_written(compose: dict[str, Any]) -> None:
    trainer, board = compose["services"]["trainer"], compose["services"]["tensorboard"]
    assert compose_spec.parse_duration(trainer["stop_grace_period"]) >= 60
    assert trainer["stop_signal"] == "SIGTERM"
    assert trainer["image"] == board["image"]
    places = {volume["target"]: volume for volume in trainer["volumes"]}
    assert places["/cache"]["source"] in compose["volumes"]
    assert {"/opt/revpatch/runs", "/opt/revpatch/data"} <= places.keys()
    for volume in trainer["volumes"]:
        assert volume["type"] == "volume" or volume["source"].startswith("../")
    assert board["ports"] == ["127.0.0.1:6006:6006"]
    dockerfile = trainer["build"]["dockerfile"]
    assert (COMPOSE.parent / trainer["build"]["context"] / dockerfile).is_file()


def test_kubernetes_takes_its_file_and_the_pods_find_each_other() -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    for resource in (service, job):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    assert (service["spec"]["clusterIP"], job["spec"]["completionMode"]) == ("None", "Indexed")
    pod, container = job["spec"]["template"]["spec"], job["spec"]["template"]["spec"]["containers"][0]
    variables = {each["name"]: each["value"] for each in container["env"]}
    host, port = variables["RDZV"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["RANKS"])
    assert all((ROOT / name).is_file() for name in container["command"][1:])
    assert pod["terminationGracePeriodSeconds"] >= 60
