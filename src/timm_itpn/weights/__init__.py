"""Weight files: their layouts, checks and errors."""
from .checkpoint import fit_to_model as fit_to_model
from .checkpoint import to_native as to_native
from .errors import readable_load_errors as readable_load_errors
