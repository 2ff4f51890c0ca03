"""What Triton needs: its compiler, which only Linux has."""

from importlib.util import find_spec

NEEDING = ["test_check.py", "test_ran.py", "test_engine_triton.py", "test_sparse_mla_triton.py"]
collect_ignore = [] if find_spec("triton") else NEEDING
