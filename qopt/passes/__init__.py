"""Passes on the twin: each is a frozen dataclass whose fields are its options."""

if not __name__.startswith("qopt."):
    raise ImportError("import qopt.passes: the top-level link `passes` is for reading, not for importing")
