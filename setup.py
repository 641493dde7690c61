"""Names of the installed packages: `cli/` and `configs/` go by names of their own.

pyproject.toml can either find packages or rename their folders, not both; all else is there.
"""

from setuptools import find_packages, setup


def packages(name: str, folder: str) -> list[str]:
    return [name, *(f"{name}.{inner}" for inner in find_packages(folder))]


setup(
    packages=[
        *packages("tensorllm", "tensorllm"),
        *packages("tensorllm_cli", "cli"),
        *packages("tensorllm.configs", "configs"),
    ],
    package_dir={"tensorllm_cli": "cli", "tensorllm.configs": "configs"},
)
