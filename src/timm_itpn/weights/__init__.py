"""Weight files: their layouts, checks and sources."""
import timm.models  # noqa: F401  first: once it has loaded, our models load, which take their parts from files here
