"""Search: plans from facts, under thresholds and limits."""

if not __name__.startswith("qopt."):
    raise ImportError("import qopt.search: the top-level link `search` is for reading, not for importing")
