"""Build script.  Everything but compiled code is declared in pyproject.toml; there is none yet."""

from setuptools import setup

setup()
