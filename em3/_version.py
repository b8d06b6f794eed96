"""The one place where the version is written: setup.py, the wheel and `em3 --version` read it from here."""

__version__ = "0.1.0"
