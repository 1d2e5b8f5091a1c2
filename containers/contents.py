"""Prints what the image that it runs in consists of, as CycloneDX JSON: a bill of materials.

The standard library alone, so that neither the image nor the machine that builds it needs a tool.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PROJECT = "critic-job"


def main() -> None:
    packages = {_normal(package.name): package for package in distributions()}
    project = packages.pop(PROJECT)
    python = [_python_package(package) for _, package in sorted(packages.items())]
    commit = Path("/opt/critic/COMMIT").read_text(encoding="utf-8").strip()
    made_of: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": PROJECT,
                "version": project.version,
                "properties": [{"name": "commit", "value": commit}],
            }
        },
        "components": [*python, *_debian_packages()],
    }
    print(json.dumps(made_of, indent=1))


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _python_package(package: Distribution) -> dict[str, Any]:
    component = _component(f"pkg:pypi/{_normal(package.name)}", package.name, package.version)
    said = {name: package.metadata[name] for name in package.metadata}
    if expression := said.get("License-Expression"):
        component["licenses"] = [{"expression": expression}]
    elif (text := said.get("License", "").strip()) and "\n" not in text:
        component["licenses"] = [{"license": {"name": text}}]
    return component


def _debian_packages() -> Iterator[dict[str, Any]]:
    fields = "${Package}\t${Version}\t${Architecture}\n"
    command = ["dpkg-query", "--show", f"--showformat={fields}"]
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in listing.splitlines():
        name, version, architecture = line.split("\t")
        yield _component(f"pkg:deb/debian/{name}", name, version, f"?arch={architecture}")


def _component(purl: str, name: str, version: str, qualifiers: str = "") -> dict[str, Any]:
    address = f"{purl}@{quote(version, safe='')}{qualifiers}"
    return {
        "type": "library",
        "bom-ref": address,
        "name": name,
        "version": version,
        "purl": address,
    }


if __name__ == "__main__":
    main()
