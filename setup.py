"""Installs qkjax as pyproject.toml says; here stands only that configs/ becomes qkjax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["qkjax", "qkjax.*"]), "qkjax.configs"],
    package_dir={"qkjax.configs": "configs"},
)
