"""Build lemma-fast: the folder map that pyproject.toml cannot compute. Metadata is there."""

from setuptools import find_packages, setup

FOLDERS = {
    "lemma_fast": "lemma_fast",
    "lemma_fast.kernels": "kernels",
    "lemma_fast.training": "training",
}


def packages() -> list[str]:
    """Name every package below the three folders, so that a new sub-package is never forgotten."""
    names = list(FOLDERS)
    for package, folder in FOLDERS.items():
        names += [f"{package}.{child}" for child in find_packages(folder)]
    return names


setup(packages=packages(), package_dir=FOLDERS)
