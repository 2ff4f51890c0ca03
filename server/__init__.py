"""The HTTP server: FastAPI over an engine thread."""
