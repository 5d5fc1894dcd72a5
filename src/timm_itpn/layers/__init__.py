"""Modules that the models are built from."""
import timm.models  # noqa: F401  first: once it has loaded, our models load, which take their parts from files here
