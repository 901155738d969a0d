"""What pyproject.toml cannot say: configs/ of the checkout becomes immiscible/recipes of the wheel. All else is there."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["immiscible", "immiscible.*"]), "immiscible.recipes"], package_dir={"immiscible.recipes": "configs"}
)
