"""SkyPilot's own reading of a task file, for an environment that has SkyPilot and none of this
project: `python sky_parse.py task.yaml SECRET=value...` prints what it understood, as JSON.
"""

import json
import sys

import sky
import yaml


def main(path: str, *secrets: str) -> None:
    with open(path, encoding="utf-8") as file:
        tree = yaml.safe_load(file)
    given = [tuple(secret.split("=", 1)) for secret in secrets]
    task = sky.Task.from_yaml_config(tree, secrets_overrides=given or None)
    task.validate_name()
    task.validate_run()
    (resources,) = task.resources
    found = {
        "name": task.name,
        "run": task.run,
        "nodes": task.num_nodes,
        "accelerators": resources.accelerators,
        "cpus": resources.cpus,
        "memory": resources.memory,
        "spot": resources.use_spot,
        "image": resources.extract_docker_image(),
        "recovery": resources.job_recovery,
        "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
        "mounts": {path: storage.source for path, storage in task.storage_mounts.items()},
    }
    print("PARSED " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
