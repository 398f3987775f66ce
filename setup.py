"""Finds the kernels in a checkout without symlinks; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# There agc_triton/kernels is a text file, and the finder of an editable install does not know
# packages without an __init__.py, so that it has to be a tree of linked files.
LINKED = Path(__file__).with_name("agc_triton").joinpath("kernels").is_dir()

setup(
    package_dir={} if LINKED else {"agc_triton.kernels": "kernels"},
    options={} if LINKED else {"editable_wheel": {"mode": "strict"}},
)
